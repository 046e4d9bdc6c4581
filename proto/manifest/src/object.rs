//! Reads manifests as typed objects, completes them, and validates them field by field, as the Kubernetes API server
//! does.

mod fields;
mod names;
mod policy;
mod service;
mod typed;
mod workload;

use ovl_proto::resource::{
    DEFAULT_NAMESPACE, IntOrString, IpBlock, Kind, Meta, Name, PolicyType, Resource, ResourceKey, USER_MAPS,
};
use serde_json::{Map, Value};

use crate::problem::{Problem, Problems};

use self::names::{is_label, is_label_key, is_label_value, is_service_name, is_subdomain};
use self::typed::Typed;

/// The maximum size of all annotations of an object, in bytes.
const MAX_ANNOTATIONS: usize = 128 << 10;
/// The maximum number of labels of an object.
const MAX_LABELS: usize = 64;

/// An object that was read from a manifest.
#[derive(Debug, Clone, PartialEq)]
pub struct Read {
    /// The object with defaults, but without what the cluster allocates.
    pub resource: Resource,
    /// The fields that were ignored.
    pub warnings: Vec<Problem>,
}

/// Returns the objects of a document: the document itself, or the items of a list, each with its path.
pub fn items(document: Value) -> Vec<(String, Value)> {
    let is_list = document.get("kind").and_then(Value::as_str).is_some_and(|kind| kind.ends_with("List"));
    match document {
        Value::Object(mut fields) if is_list => match fields.remove("items") {
            Some(Value::Array(items)) => {
                items.into_iter().enumerate().map(|(n, item)| (format!("items[{n}]."), item)).collect()
            }
            Some(other) => vec![(String::new(), other)],
            None => Vec::new(),
        },
        other => vec![(String::new(), other)],
    }
}

/// Returns the key of a manifest's object. `namespace` applies if the manifest names none.
///
/// # Errors
///
/// If a field of the key is missing or invalid.
pub fn key(manifest: &Value, namespace: Option<&str>) -> Result<ResourceKey, Vec<Problem>> {
    let mut problems = Problems::default();
    let key = read_key(manifest, namespace, &mut problems);
    key.filter(|_| problems.is_empty()).ok_or(problems.into_inner())
}

fn read_key(manifest: &Value, namespace: Option<&str>, problems: &mut Problems) -> Option<ResourceKey> {
    if !manifest.is_object() {
        problems.add("", "not an object with apiVersion, kind and metadata");
        return None;
    }
    let text = |path: &str| manifest.pointer(path).and_then(Value::as_str).filter(|text| !text.is_empty());
    let (version, kind) = (text("/apiVersion"), text("/kind"));
    problems.want(version.is_some(), "apiVersion", "is missing");
    problems.want(kind.is_some(), "kind", "is missing");
    let (version, kind) = (version?, kind?);
    let Some(kind) = Kind::ALL.into_iter().find(|it| it.name() == kind && it.api_version() == version) else {
        let all: Vec<String> = Kind::ALL.iter().map(|it| format!("{} {it}", it.api_version())).collect();
        problems.add("kind", format!("{version} {kind} is not supported; these are: {}", all.join(", ")));
        return None;
    };
    let Some(name) = text("/metadata/name") else {
        problems.add("metadata.name", "is missing");
        return None;
    };
    let own = text("/metadata/namespace");
    if !kind.is_namespaced() {
        problems.want(own.is_none(), "metadata.namespace", format!("a {kind} has no namespace"));
        return Some(ResourceKey { kind, name: Name::new("", name) });
    }
    if let (Some(own), Some(wanted)) = (own, namespace)
        && own != wanted
    {
        problems.add("metadata.namespace", format!("is {own}, but {wanted} was requested"));
    }
    let namespace = own.or(namespace).unwrap_or(DEFAULT_NAMESPACE);
    Some(ResourceKey { kind, name: Name::new(namespace, name) })
}

/// Reads a manifest. `namespace` applies if the manifest names none. Unsupported fields are problems, or warnings if
/// `lenient`.
///
/// # Errors
///
/// All problems of the manifest.
pub fn read(manifest: Value, namespace: Option<&str>, lenient: bool) -> Result<Read, Vec<Problem>> {
    let mut problems = Problems::default();
    let Some(key) = read_key(&manifest, namespace, &mut problems) else { return Err(problems.into_inner()) };
    let Value::Object(mut fields) = manifest else { return Err(problems.into_inner()) };
    fields.remove("apiVersion");
    fields.remove("kind");
    remove_server_fields(key.kind, &mut fields, &mut problems);
    let mut given = Value::Object(fields);
    remove_nulls(&mut given);
    let terminating = take_deletion(key.kind, &mut given);
    let mut resource = match Resource::read(key.kind, Typed(&given)) {
        Ok(resource) => resource,
        Err(problem) => {
            problems.push(problem);
            return Err(problems.into_inner());
        }
    };
    let mut unknown = Vec::new();
    // Serializing the typed object omits the fields that the types do not have.
    match as_written(&resource) {
        Ok(known) => find_unsupported(&given, &known, "", &mut |field, value| match fields::refusal(
            key.kind,
            &fields::without_indices(&field),
            value,
        ) {
            Some(reason) => problems.add(field, reason),
            None => unknown.push(Problem { field, reason: "is not supported".to_owned() }),
        }),
        Err(error) => problems.add("", error.to_string()),
    }
    if !lenient {
        problems.append(&mut unknown);
    }
    resource.meta_mut().namespace = key.name.namespace;
    complete(&mut resource, terminating);
    if let Resource::Service(service) = &resource {
        let ranges = service.metadata.annotations.get(fields::SOURCE_RANGES_ANNOTATION);
        problems.want(
            ranges.is_none_or(String::is_empty),
            format!("metadata.annotations.{}", fields::SOURCE_RANGES_ANNOTATION),
            fields::SOURCE_RANGES,
        );
    }
    check_into(&resource, &mut problems);
    if problems.is_empty() { Ok(Read { resource, warnings: unknown }) } else { Err(problems.into_inner()) }
}

/// Validates an object, whether it comes from a manifest or from another host.
///
/// # Errors
///
/// All problems of the object.
pub fn check(resource: &Resource) -> Result<(), Vec<Problem>> {
    let mut problems = Problems::default();
    check_into(resource, &mut problems);
    if problems.is_empty() { Ok(()) } else { Err(problems.into_inner()) }
}

/// Removes the fields that the Kubernetes API server writes and ignores in a manifest. They describe the object of
/// another cluster.
fn remove_server_fields(kind: Kind, fields: &mut Map<String, Value>, problems: &mut Problems) {
    if let Some(Value::Object(metadata)) = fields.get_mut("metadata") {
        for field in
            ["creationTimestamp", "generation", "managedFields", "resourceVersion", "selfLink", "uid"]
        {
            metadata.remove(field);
        }
    }
    // ovl uses only the status of a Pod.
    if kind != Kind::Pod
        && let Some(status) = fields.remove("status")
    {
        problems.want(status.is_null() || status.is_object(), "status", "not an object");
    }
}

/// Removes fields that are null, which means that they are not given. In a map with keys of the user, null is the empty
/// string, as in Kubernetes: `matchLabels: {app: }` requires an empty label, and without it the selector would match
/// everything.
fn remove_nulls(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, field| !field.is_null());
            for (key, field) in fields {
                match field {
                    Value::Object(entries) if USER_MAPS.contains(&key.as_str()) => {
                        entries
                            .values_mut()
                            .filter(|entry| entry.is_null())
                            .for_each(|entry| *entry = "".into());
                    }
                    other => remove_nulls(other),
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(remove_nulls),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

fn join(path: &str, field: &str) -> String {
    if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") }
}

/// Returns the object as a value with every field of its type.
fn as_written(resource: &Resource) -> Result<Value, serde_json::Error> {
    match resource {
        Resource::Namespace(it) => serde_json::to_value(it),
        Resource::Pod(it) => serde_json::to_value(it),
        Resource::Service(it) => serde_json::to_value(it),
        Resource::EndpointSlice(it) => serde_json::to_value(it),
        Resource::NetworkPolicy(it) => serde_json::to_value(it),
    }
}

/// Removes the time at which the deletion of an object was requested. Returns whether it is a Pod that has one: it is
/// shutting down.
fn take_deletion(kind: Kind, given: &mut Value) -> bool {
    let metadata = given.get_mut("metadata").and_then(Value::as_object_mut);
    let deletion = metadata.and_then(|metadata| metadata.remove("deletionTimestamp"));
    kind == Kind::Pod && deletion.is_some_and(|deletion| !fields::is_empty(&deletion))
}

/// Calls `unknown` with the path and value of each field of `given` that `known` does not have.
fn find_unsupported(given: &Value, known: &Value, path: &str, unknown: &mut impl FnMut(String, &Value)) {
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => {
            for (key, value) in given {
                let field = join(path, key);
                match known.get(key) {
                    Some(known) => find_unsupported(value, known, &field, unknown),
                    None => unknown(field, value),
                }
            }
        }
        (Value::Array(given), Value::Array(known)) => {
            for (n, (given, known)) in given.iter().zip(known).enumerate() {
                find_unsupported(given, known, &format!("{path}[{n}]"), unknown);
            }
        }
        _ => {}
    }
}

/// Fills in the fields that derive from others. `terminating`: it is a Pod that is shutting down.
fn complete(resource: &mut Resource, terminating: bool) {
    match resource {
        Resource::Namespace(_) | Resource::EndpointSlice(_) => {}
        Resource::Pod(pod) => workload::complete(pod, terminating),
        Resource::Service(it) => service::complete(it),
        Resource::NetworkPolicy(it) => {
            let spec = &mut it.spec;
            if spec.policy_types.is_empty() {
                spec.policy_types.push(PolicyType::Ingress);
                spec.policy_types.extend((!spec.egress.is_empty()).then_some(PolicyType::Egress));
            }
            spec.policy_types.sort_unstable();
            let from = spec.ingress.iter_mut().flat_map(|rule| &mut rule.from);
            let to = spec.egress.iter_mut().flat_map(|rule| &mut rule.to);
            for IpBlock { cidr, except } in from.chain(to).filter_map(|peer| peer.ip_block.as_mut()) {
                *cidr = cidr.trunc();
                except.iter_mut().for_each(|net| *net = net.trunc());
            }
        }
    }
}

fn check_into(resource: &Resource, problems: &mut Problems) {
    check_meta(resource.kind(), resource.meta(), problems);
    match resource {
        Resource::Namespace(_) => {}
        Resource::Pod(it) => workload::check_pod(it, problems),
        Resource::Service(it) => service::check(it, problems),
        Resource::EndpointSlice(it) => workload::check_slice(it, problems),
        Resource::NetworkPolicy(it) => policy::check(it, problems),
    }
}

fn check_meta(kind: Kind, meta: &Meta, problems: &mut Problems) {
    match kind {
        Kind::Service => problems.want(is_service_name(&meta.name), "metadata.name", names::SERVICE_NAME),
        Kind::Namespace => problems.want(is_label(&meta.name), "metadata.name", names::LABEL),
        Kind::Pod | Kind::EndpointSlice | Kind::NetworkPolicy => {
            problems.want(is_subdomain(&meta.name), "metadata.name", names::SUBDOMAIN);
        }
    }
    let namespace_is_right =
        if kind.is_namespaced() { is_label(&meta.namespace) } else { meta.namespace.is_empty() };
    problems.want(namespace_is_right, "metadata.namespace", names::LABEL);
    check_labels("metadata.labels", &meta.labels, problems);
    problems.want(
        meta.annotations.keys().all(|key| is_label_key(key)),
        "metadata.annotations",
        names::LABEL_KEY,
    );
    let size: usize = meta.annotations.iter().map(|(key, value)| key.len() + value.len()).sum();
    problems.want(size <= MAX_ANNOTATIONS, "metadata.annotations", "are larger than 128 KiB in total");
}

pub(crate) fn check_labels(field: &str, labels: &ovl_proto::resource::Labels, problems: &mut Problems) {
    problems.want(labels.len() <= MAX_LABELS, field, format!("exceed the limit of {MAX_LABELS}"));
    for (key, value) in labels {
        problems.want(is_label_key(key), format!("{field}.{key}"), names::LABEL_KEY);
        problems.want(is_label_value(value), format!("{field}.{key}"), names::LABEL_VALUE);
    }
}

/// Validates a port number, or a container's name for a port.
pub(crate) fn check_port(field: &str, port: &IntOrString, problems: &mut Problems) {
    match port {
        IntOrString::Int(number) => check_number(field, *number, problems),
        IntOrString::String(name) => problems.want(names::is_port_name(name), field, names::PORT_NAME),
    }
}

pub(crate) fn check_number(field: &str, port: u16, problems: &mut Problems) {
    problems.want(port != 0, field, "a port must be between 1 and 65535");
}

/// Whether an address can be that of a workload or a Service.
pub(crate) fn is_usable(address: std::net::IpAddr) -> bool {
    let link_local = match address {
        std::net::IpAddr::V4(v4) => v4.is_link_local(),
        std::net::IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !address.is_unspecified() && !address.is_loopback() && !address.is_multicast() && !link_local
}

pub(crate) const USABLE: &str =
    "not the address of one host: it must not be unspecified, loopback, link-local or multicast";

#[cfg(test)]
mod tests;
