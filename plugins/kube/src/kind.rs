//! The kinds that are followed: where the API server has them, and what of an object is handed on.

use std::fmt::{Display, Formatter};

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::{NetworkPolicy, ServiceCIDR};
use kube::Resource as _;
use ovl_proto::resource::{Kind, Name};
use serde_json::{Map, Value, json};

use crate::status::Status;

/// The kinds of the cluster's objects that one host mirrors for all. Pods are followed by the host of their node.
pub(crate) const MIRRORED: [Kind; 6] = [
    Kind::Namespace,
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
    }
}

/// A kind that is followed.
pub(crate) trait Followed: Copy + Display {
    /// Returns the path of its objects in all namespaces.
    fn path(self) -> String;

    /// Whether an API server may not have the kind.
    fn is_optional(self) -> bool {
        false
    }

    /// Reads an object that the API server sent.
    fn read(self, value: Value) -> Result<Object, Unusable>;
}

impl Followed for Kind {
    fn path(self) -> String {
        path(self)
    }

    fn is_optional(self) -> bool {
        // Kubernetes has ServiceCIDRs since 1.33, and ClusterNetworkPolicies once they are defined.
        matches!(self, Kind::ServiceCidr | Kind::ClusterNetworkPolicy)
    }

    fn read(self, value: Value) -> Result<Object, Unusable> {
        object(self, value)
    }
}

/// The Nodes of the API server, which are no objects of ovl.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Nodes;

impl Display for Nodes {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str("Node")
    }
}

impl Followed for Nodes {
    fn path(self) -> String {
        Node::url_path(&(), None)
    }

    fn read(self, value: Value) -> Result<Object, Unusable> {
        let (name, version) = identity(&self, &value)?;
        Ok(Object { name, version, uid: String::new(), manifest: None, status: Status::default() })
    }
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
    /// The manifest. `None` if the object does not concern ovl.
    pub manifest: Option<Value>,
    /// The status of a Service. Empty for other kinds.
    pub status: Status,
}

/// Reads an object that the API server sent, and leaves out what ovl has no use for.
pub(crate) fn object(kind: Kind, mut value: Value) -> Result<Object, Unusable> {
    let (name, version) = identity(&kind, &value)?;
    let uid = text(&value, "/metadata/uid");
    let status = if kind == Kind::Service { Status::of(&value) } else { Status::default() };
    let manifest = if kind == Kind::Pod { pod(&value) } else { Some(others(kind, &mut value, &status)) };
    Ok(Object { name, version, uid, manifest, status })
}

fn text(value: &Value, path: &str) -> String {
    value.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// Returns the name and the version of an object.
fn identity(kind: &dyn Display, value: &Value) -> Result<(Name, u64), Unusable> {
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

/// Returns an object of a kind other than Pod, which is handed on nearly as it is.
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

/// Returns an object with only these of its fields.
fn some_of(value: &Value, fields: &[&str]) -> Value {
    let found = fields.iter().filter_map(|field| Some(((*field).to_owned(), value.get(*field)?.clone())));
    Value::Object(found.collect::<Map<_, _>>())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

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
            found.manifest.unwrap(),
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
            object(Kind::Pod, value).unwrap().manifest.unwrap(),
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
