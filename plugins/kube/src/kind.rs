//! The kinds that are followed: where the API server has them, and what of an object is handed on.

use std::sync::Arc;

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::{NetworkPolicy, ServiceCIDR};
use kube::Resource as _;
use ovl_proto::resource::{Kind, Name};
use serde_json::{Map, Value, json};

use crate::status::Status;

/// The kinds of the cluster's objects that one host mirrors for all. Pods are followed by the host of their node.
pub(crate) const MIRRORED: [Kind; 7] = [
    Kind::Namespace,
    // Before the policies that name them.
    Kind::Node,
    Kind::NetworkPolicy,
    Kind::ClusterNetworkPolicy,
    Kind::ServiceCidr,
    Kind::Service,
    Kind::EndpointSlice,
];

/// The path of ClusterNetworkPolicies, which are defined by a CustomResourceDefinition of the network-policy-api project.
const CLUSTER_POLICIES: &str = "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies";

/// Returns the path of a kind's objects in all namespaces.
pub(crate) fn path(kind: Kind) -> String {
    match kind {
        Kind::Namespace => Namespace::url_path(&(), None),
        Kind::Pod => Pod::url_path(&(), None),
        Kind::Service => Service::url_path(&(), None),
        Kind::EndpointSlice => EndpointSlice::url_path(&(), None),
        Kind::NetworkPolicy => NetworkPolicy::url_path(&(), None),
        Kind::ServiceCidr => ServiceCIDR::url_path(&(), None),
        Kind::ClusterNetworkPolicy => CLUSTER_POLICIES.to_owned(),
        Kind::Node => Node::url_path(&(), None),
    }
}

/// Whether an API server may not have a kind.
pub(crate) fn is_optional(kind: Kind) -> bool {
    // Kubernetes has ServiceCIDRs since 1.33, and ClusterNetworkPolicies once they are defined.
    matches!(kind, Kind::ServiceCidr | Kind::ClusterNetworkPolicy)
}

/// Why an object cannot be handed on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Unusable {
    /// It has no name.
    #[error("the API server sent a {0} without a name")]
    NoName(String),
    /// Its version is not a number.
    #[error("the API server sent {0} with the resourceVersion '{1}', which is not a number")]
    NoVersion(Name, String),
}

/// An object as it is handed on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Object {
    /// The name.
    pub name: Name,
    /// The API's `resourceVersion`.
    pub version: u64,
    /// The unique id; may be empty.
    pub uid: String,
    /// The manifest, as JSON: a tree of values would take many times the memory. `None` if the object does not concern ovl.
    pub manifest: Option<Arc<str>>,
    /// The status of a Service. Empty for other kinds.
    pub status: Status,
}

/// Reads an object that the API server sent, and leaves out what ovl has no use for.
pub(crate) fn object(kind: Kind, mut value: Value) -> Result<Object, Unusable> {
    let (name, version) = identity(kind, &value)?;
    let uid = text(&value, "/metadata/uid");
    let status = if kind == Kind::Service { Status::of(&value) } else { Status::default() };
    let manifest = match kind {
        Kind::Pod => pod(&value),
        Kind::Node => Some(node(&value)),
        Kind::Namespace
        | Kind::Service
        | Kind::EndpointSlice
        | Kind::NetworkPolicy
        | Kind::ServiceCidr
        | Kind::ClusterNetworkPolicy => Some(others(kind, &mut value, &status)),
    };
    let manifest = manifest.map(|manifest| manifest.to_string().into());
    Ok(Object { name, version, uid, manifest, status })
}

fn text(value: &Value, path: &str) -> String {
    value.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// Returns the name and the version of an object.
fn identity(kind: Kind, value: &Value) -> Result<(Name, u64), Unusable> {
    let name = Name::new(text(value, "/metadata/namespace"), text(value, "/metadata/name"));
    if name.name.is_empty() {
        return Err(Unusable::NoName(kind.to_string()));
    }
    let version = text(value, "/metadata/resourceVersion");
    match version.parse() {
        Ok(number) => Ok((name, number)),
        Err(_) => Err(Unusable::NoVersion(name, version)),
    }
}

/// Returns an object of a kind other than Pod and Node, which is handed on nearly as it is.
fn others(kind: Kind, value: &mut Value, status: &Status) -> Value {
    if let Some(fields) = value.as_object_mut() {
        // Lists leave them out of their items.
        fields.insert("apiVersion".to_owned(), kind.api_version().into());
        fields.insert("kind".to_owned(), kind.name().into());
        fields.remove("status");
        // Addresses that another program gave it. What ovl wrote there itself is passed over by ovld.
        fields.extend(status.manifest().map(|status| ("status".to_owned(), status)));
        if kind == Kind::Namespace {
            fields.remove("spec");
        }
    }
    if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
        metadata.remove("ownerReferences");
        if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
            annotations.remove("kubectl.kubernetes.io/last-applied-configuration");
        }
    }
    value.take()
}

/// Returns of a pod what its endpoint needs. `None` if it has the network of its node, so no endpoint.
fn pod(value: &Value) -> Option<Value> {
    let spec = value.get("spec").unwrap_or(&Value::Null);
    if spec.get("hostNetwork") == Some(&Value::Bool(true)) {
        return None;
    }
    let list = |field: &str| spec.get(field).and_then(Value::as_array).into_iter().flatten();
    // Those that go on running have ports as the others have.
    let sidecars =
        list("initContainers").filter(|it| it.get("restartPolicy").is_some_and(|it| it == "Always"));
    let containers = list("containers").chain(sidecars).filter_map(|container| {
        let ports = container.get("ports").and_then(Value::as_array).into_iter().flatten();
        let named = ports.filter(|port| port.get("name").is_some_and(|name| name != ""));
        let named: Vec<Value> =
            named.map(|port| some_of(port, &["name", "containerPort", "protocol"])).collect();
        (!named.is_empty()).then(|| json!({ "name": container.get("name"), "ports": named }))
    });
    let conditions = value.pointer("/status/conditions").and_then(Value::as_array).into_iter().flatten();
    let ready = conditions.filter(|condition| condition.get("type").is_some_and(|it| it == "Ready"));
    let ready: Vec<Value> = ready.map(|condition| some_of(condition, &["type", "status"])).collect();
    let metadata = value.get("metadata").unwrap_or(&Value::Null);
    let mut kept =
        some_of(metadata, &["name", "namespace", "uid", "resourceVersion", "labels", "deletionTimestamp"]);
    // The kubelet gives a static pod the uid in this annotation, and tells runtimes that one.
    const MIRROR: &str = "kubernetes.io/config.mirror";
    if let Some(uid) = metadata.get("annotations").and_then(|all| all.get(MIRROR)) {
        kept["annotations"] = json!({ MIRROR: uid });
    }
    let mut described = some_of(spec, &["hostname", "subdomain"]);
    described["containers"] = containers.collect();
    Some(json!({
        "apiVersion": Kind::Pod.api_version(),
        "kind": Kind::Pod.name(),
        "metadata": kept,
        "spec": described,
        "status": { "phase": value.pointer("/status/phase"), "conditions": ready },
    }))
}

/// Returns of a Node what policies need. The rest changes with each heartbeat.
fn node(value: &Value) -> Value {
    let metadata = value.get("metadata").unwrap_or(&Value::Null);
    let status = value.get("status").unwrap_or(&Value::Null);
    json!({
        "apiVersion": Kind::Node.api_version(),
        "kind": Kind::Node.name(),
        "metadata": some_of(metadata, &["name", "resourceVersion", "creationTimestamp", "labels"]),
        "status": some_of(status, &["addresses"]),
    })
}

/// Whether a manifest differs from an earlier one of the same object in anything but the version.
pub(crate) fn differs(before: &str, now: &str) -> bool {
    let read = |manifest: &str| serde_json::from_str(manifest).unwrap_or(Value::Null);
    before != now && values_differ(&read(before), &read(now))
}

fn values_differ(before: &Value, now: &Value) -> bool {
    const VERSION: &str = "resourceVersion";
    let (Some(before), Some(now)) = (before.as_object(), now.as_object()) else { return before != now };
    let rest = |fields: &Map<String, Value>| fields.len() - usize::from(fields.contains_key(VERSION));
    let differing = |(name, value): (&String, &Value)| {
        name != VERSION
            && before.get(name).is_none_or(|before| match name.as_str() {
                "metadata" => values_differ(before, value),
                _ => before != value,
            })
    };
    rest(before) != rest(now) || now.iter().any(differing)
}

/// Returns an object with only these of its fields.
fn some_of(value: &Value, fields: &[&str]) -> Value {
    let found = fields.iter().filter_map(|field| Some(((*field).to_owned(), value.get(*field)?.clone())));
    Value::Object(found.collect::<Map<_, _>>())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn read(manifest: &str) -> Value {
        serde_json::from_str(manifest).unwrap()
    }

    #[test]
    fn kinds_have_the_paths_of_the_api() {
        assert_eq!(path(Kind::Service), "/api/v1/services");
        assert_eq!(path(Kind::EndpointSlice), "/apis/discovery.k8s.io/v1/endpointslices");
        assert_eq!(path(Kind::NetworkPolicy), "/apis/networking.k8s.io/v1/networkpolicies");
    }

    #[test]
    fn objects_get_their_kind_and_lose_what_only_clients_of_the_api_need() {
        let value = json!({
            "metadata": {
                "name": "web", "namespace": "shop", "resourceVersion": "17", "uid": "u1", "managedFields": [{}],
                "annotations": { "kubectl.kubernetes.io/last-applied-configuration": "{}", "a": "b" },
            },
            "spec": { "type": "ClusterIP" },
            "status": { "loadBalancer": {} },
        });
        let found = object(Kind::Service, value).unwrap();
        assert_eq!((found.name, found.version, found.uid.as_str()), (Name::new("shop", "web"), 17, "u1"));
        assert_eq!(
            read(&found.manifest.unwrap()),
            json!({
                "apiVersion": "v1", "kind": "Service",
                "metadata": {
                    "name": "web", "namespace": "shop", "resourceVersion": "17", "uid": "u1",
                    "annotations": { "a": "b" },
                },
                "spec": { "type": "ClusterIP" },
            })
        );
    }

    #[test]
    fn objects_without_a_name_or_an_ordered_version_are_refused() {
        assert_eq!(object(Kind::Service, json!({})), Err(Unusable::NoName("Service".to_owned())));
        let value = json!({ "metadata": { "name": "web", "resourceVersion": "a7" } });
        assert_eq!(
            object(Kind::Namespace, value),
            Err(Unusable::NoVersion(Name::new("", "web"), "a7".to_owned()))
        );
    }

    #[test]
    fn nodes_are_reduced_to_labels_and_addresses() {
        let value = |version: &str, beat: &str| {
            json!({
                "metadata": {
                    "name": "n1", "resourceVersion": version, "uid": "u", "labels": { "role": "db" },
                    "annotations": { "a": "b" }, "creationTimestamp": "2026-01-01T00:00:00Z",
                },
                "spec": { "podCIDR": "10.0.0.0/24" },
                "status": {
                    "conditions": [{ "type": "Ready", "lastHeartbeatTime": beat }],
                    "addresses": [{ "type": "InternalIP", "address": "192.0.2.1" }],
                },
            })
        };
        let manifest = |value: Value| object(Kind::Node, value).unwrap().manifest.unwrap();
        let first = manifest(value("3", "now"));
        assert_eq!(
            read(&first),
            json!({
                "apiVersion": "v1", "kind": "Node",
                "metadata": {
                    "name": "n1", "resourceVersion": "3", "labels": { "role": "db" },
                    "creationTimestamp": "2026-01-01T00:00:00Z",
                },
                "status": { "addresses": [{ "type": "InternalIP", "address": "192.0.2.1" }] },
            })
        );
        assert!(!differs(&first, &manifest(value("4", "later"))));
        let mut labelled = value("5", "later");
        labelled["metadata"]["labels"]["role"] = "web".into();
        assert!(differs(&first, &manifest(labelled)));
        let mut moved = value("6", "later");
        moved["status"]["addresses"][0]["address"] = "192.0.2.2".into();
        assert!(differs(&first, &manifest(moved)));
        let mut bare = value("7", "later");
        bare["metadata"].as_object_mut().unwrap().remove("labels");
        assert!(differs(&first, &manifest(bare)));
    }

    #[test]
    fn pods_are_reduced_to_labels_named_ports_and_readiness() {
        let value = json!({
            "metadata": {
                "name": "db-0", "namespace": "shop", "resourceVersion": "3", "uid": "u", "labels": { "app": "db" },
                "annotations": { "x": "y" }, "deletionTimestamp": "2026-01-01T00:00:00Z",
            },
            "spec": {
                "nodeName": "n1", "subdomain": "db", "volumes": [{}],
                "containers": [
                    { "name": "c", "image": "i", "ports": [
                        { "name": "pg", "containerPort": 5432, "protocol": "TCP", "hostPort": 5432 },
                        { "containerPort": 1 },
                    ] },
                    { "name": "bare" },
                ],
                "initContainers": [
                    { "name": "once", "ports": [{ "name": "no", "containerPort": 2 }] },
                    { "name": "side", "restartPolicy": "Always", "ports": [{ "name": "m", "containerPort": 3 }] },
                ],
            },
            "status": { "phase": "Running", "podIP": "10.0.0.1", "conditions": [
                { "type": "Ready", "status": "True", "reason": "r" }, { "type": "Initialized", "status": "True" },
            ] },
        });
        assert_eq!(
            read(&object(Kind::Pod, value).unwrap().manifest.unwrap()),
            json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {
                    "name": "db-0", "namespace": "shop", "resourceVersion": "3", "uid": "u", "labels": { "app": "db" },
                    "deletionTimestamp": "2026-01-01T00:00:00Z",
                },
                "spec": { "subdomain": "db", "containers": [
                    { "name": "c", "ports": [{ "name": "pg", "containerPort": 5432, "protocol": "TCP" }] },
                    { "name": "side", "ports": [{ "name": "m", "containerPort": 3 }] },
                ] },
                "status": { "phase": "Running", "conditions": [{ "type": "Ready", "status": "True" }] },
            })
        );
        let host =
            json!({ "metadata": { "name": "p", "resourceVersion": "1" }, "spec": { "hostNetwork": true } });
        assert_eq!(object(Kind::Pod, host).unwrap().manifest, None);
    }
}
