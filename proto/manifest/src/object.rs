//! Reads manifests as typed objects, completes them, and validates them field by field, as the Kubernetes API server
//! does.

mod cluster_policy;
mod fields;
mod kinds;
mod names;
mod policy;
mod service;
mod typed;
mod unset;
mod workload;

use ovl_proto::resource::{
    DEFAULT_NAMESPACE, IntOrString, IpBlock, Kind, Meta, Name, PolicyType, Resource, ResourceKey, Source,
    USER_MAPS, Validation,
};
use serde_json::{Map, Value, json};

use crate::problem::{FieldProblem, FieldProblems};

use self::fields::Treatment;
pub use self::fields::without_indices;
use self::kinds::{Class, ListOf};
use self::names::{is_label, is_label_key, is_label_value, is_subdomain};
use self::typed::Typed;

/// The maximum size of all annotations of an object in bytes, as in Kubernetes.
const MAX_ANNOTATIONS: usize = 256 << 10;

/// An object that was read from a manifest.
#[derive(Debug, Clone, PartialEq)]
pub struct Read {
    /// The object with defaults, but without what the cluster allocates.
    pub resource: Resource,
    /// Fields that were dropped although they are typing errors or would change what ovl does.
    pub warnings: Vec<FieldProblem>,
    /// Fields that do not change what ovl does, each with what ovl does not do.
    pub ignored: Vec<FieldProblem>,
}

/// An object of a document.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Its path in the document with a dot at the end, such as `items[2].`. Empty: it is the document itself.
    pub path: String,
    /// The index among the items of the document, if that is a list.
    pub index: Option<usize>,
    /// The object.
    pub value: Value,
}

/// Returns the objects of a document: the document itself, or the items of a list and of the lists in it.
pub fn items(document: Value) -> Vec<Item> {
    let mut all = Vec::new();
    flatten(Item { path: String::new(), index: None, value: document }, &mut all);
    all
}

fn flatten(mut item: Item, all: &mut Vec<Item>) {
    let text = |field: &str| item.value.get(field).and_then(Value::as_str).unwrap_or_default();
    let list = kinds::list_of(text("apiVersion"), text("kind"));
    let items = match (list, item.value.get_mut("items")) {
        (Some(_), Some(Value::Array(items))) => std::mem::take(items),
        (Some(_), Some(Value::Null)) => Vec::new(),
        _ => {
            all.push(item);
            return;
        }
    };
    for (n, mut value) in items.into_iter().enumerate() {
        // The server omits the kind of items of a list of one kind.
        if let (Some(ListOf::Kind(kind)), Value::Object(fields)) = (list, &mut value) {
            fields.entry("apiVersion").or_insert_with(|| kind.api_version().into());
            fields.entry("kind").or_insert_with(|| kind.name().into());
        }
        flatten(
            Item { path: format!("{}items[{n}].", item.path), index: item.index.or(Some(n)), value },
            all,
        );
    }
}

/// Which object a manifest describes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identity {
    /// An object that ovl acts on.
    Object(ResourceKey),
    /// An object of a kind that ovl does not act on.
    Foreign {
        /// `apiVersion` and `kind`, separated by a space.
        kind: String,
        /// Whether it is a policy: what it forbids would be allowed.
        is_policy: bool,
    },
}

/// Returns which object a manifest describes. `namespace` applies if the manifest names none.
///
/// # Errors
///
/// If a field of the key is missing or invalid.
pub fn identify(manifest: &Value, namespace: Option<&str>) -> Result<Identity, Vec<FieldProblem>> {
    let mut problems = FieldProblems::default();
    let identity = read_identity(manifest, namespace, &mut problems);
    identity.filter(|_| problems.is_empty()).ok_or(problems.into_inner())
}

/// Returns the kind and name of an object for messages, such as `Service shop/web`, as far as the manifest has them.
pub fn label(manifest: &Value) -> String {
    let text = |path: &str| manifest.pointer(path).and_then(Value::as_str).filter(|text| !text.is_empty());
    let Some(kind) = text("/kind") else { return String::new() };
    match (text("/metadata/namespace"), text("/metadata/name")) {
        (Some(namespace), Some(name)) => format!("{kind} {namespace}/{name}"),
        (None, Some(name)) => format!("{kind} {name}"),
        (_, None) => kind.to_owned(),
    }
}

fn read_identity(
    manifest: &Value,
    namespace: Option<&str>,
    problems: &mut FieldProblems,
) -> Option<Identity> {
    if !manifest.is_object() {
        problems.add("", "not an object with apiVersion, kind and metadata");
        return None;
    }
    let (version, kind) = (required(manifest, "apiVersion", problems), required(manifest, "kind", problems));
    let (version, kind) = (version?, kind?);
    if kinds::list_of(version, kind).is_some() {
        problems.add("items", "is missing or not a list");
        return None;
    }
    let foreign = |is_policy| Some(Identity::Foreign { kind: format!("{version} {kind}"), is_policy });
    match kinds::classify(version, kind) {
        Class::Known(kind) => read_key(kind, manifest, namespace, problems).map(Identity::Object),
        Class::Foreign => foreign(false),
        Class::ForeignPolicy => foreign(true),
        Class::Wrong(field, reason) => {
            problems.add(field, reason);
            None
        }
    }
}

/// Returns the text of a field at a path such as `metadata.name`.
fn required<'a>(manifest: &'a Value, path: &str, problems: &mut FieldProblems) -> Option<&'a str> {
    let text = optional(manifest, path, problems)?;
    problems.want(text.is_some(), path, "is missing");
    text
}

/// Returns the text of a field, or `None` in it if the field is absent or empty. `None` if it is not a text.
#[allow(clippy::option_option, reason = "absent is no problem, another type is one")]
fn optional<'a>(manifest: &'a Value, path: &str, problems: &mut FieldProblems) -> Option<Option<&'a str>> {
    let found = path.split('.').try_fold(manifest, |value, field| value.get(field));
    match found {
        None | Some(Value::Null) => Some(None),
        Some(Value::String(text)) => Some(Some(text.as_str()).filter(|text| !text.is_empty())),
        Some(Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_)) => {
            problems.add(path, "is not a string: put it in quotation marks");
            None
        }
    }
}

fn read_key(
    kind: Kind,
    manifest: &Value,
    namespace: Option<&str>,
    problems: &mut FieldProblems,
) -> Option<ResourceKey> {
    let metadata = manifest.get("metadata").unwrap_or(&Value::Null);
    if !metadata.is_null() && !metadata.is_object() {
        problems.add("metadata", "is not an object");
        return None;
    }
    let generated =
        manifest.pointer("/metadata/generateName").is_some_and(|prefix| !fields::is_empty(prefix));
    let Some(name) = optional(manifest, "metadata.name", problems)? else {
        let reason = if generated { "is missing: ovl generates no names" } else { "is missing" };
        problems.add("metadata.name", reason);
        return None;
    };
    let own = optional(manifest, "metadata.namespace", problems)?;
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

/// Reads the manifest of an object that ovl acts on. `namespace` applies if the manifest names none.
///
/// # Errors
///
/// All problems of the manifest.
pub fn read(
    manifest: Value,
    namespace: Option<&str>,
    validation: Validation,
) -> Result<Read, Vec<FieldProblem>> {
    let mut problems = FieldProblems::default();
    let key = match read_identity(&manifest, namespace, &mut problems) {
        Some(Identity::Object(key)) => key,
        Some(Identity::Foreign { kind, .. }) => {
            problems.add("kind", format!("ovl does not act on {kind}"));
            return Err(problems.into_inner());
        }
        None => return Err(problems.into_inner()),
    };
    let Value::Object(mut fields) = manifest else { return Err(problems.into_inner()) };
    fields.remove("apiVersion");
    fields.remove("kind");
    remove_server_fields(key.kind, &mut fields, &mut problems);
    let mut given = Value::Object(fields);
    remove_nulls(&mut given);
    unset::remove(key.kind, &mut given);
    let terminating = take_deletion(key.kind, &mut given);
    let mut resource = match Resource::read(key.kind, Typed(&given)) {
        Ok(resource) => resource,
        Err(problem) => {
            problems.push(problem);
            return Err(problems.into_inner());
        }
    };
    let mut unsupported = Unsupported::new(key.kind, validation);
    // Serializing the typed object omits the fields that the types do not have.
    match as_written(&resource) {
        Ok(known) => find_unsupported(&given, &known, "", &mut unsupported),
        Err(error) => problems.add("", error.to_string()),
    }
    problems.append(&mut unsupported.errors);
    resource.meta_mut().namespace = key.name.namespace;
    complete(&mut resource, terminating, &mut unsupported.warnings);
    if let Resource::Service(service) = &mut resource {
        service::take_source_ranges(service, &mut problems);
    }
    check_into(&resource, &mut problems);
    let Unsupported { warnings, ignored, .. } = unsupported;
    if problems.is_empty() { Ok(Read { resource, warnings, ignored }) } else { Err(problems.into_inner()) }
}

/// Validates an object, whether it comes from a manifest or from another host.
///
/// # Errors
///
/// All problems of the object.
pub fn check(resource: &Resource) -> Result<(), Vec<FieldProblem>> {
    let mut problems = FieldProblems::default();
    check_into(resource, &mut problems);
    if problems.is_empty() { Ok(()) } else { Err(problems.into_inner()) }
}

/// Removes the fields that the Kubernetes API server writes and ignores in a manifest. They describe the object of
/// another cluster. The uid of a Pod stays: the Pod's container runtime names it too.
fn remove_server_fields(kind: Kind, fields: &mut Map<String, Value>, problems: &mut FieldProblems) {
    if let Some(Value::Object(metadata)) = fields.get_mut("metadata") {
        for field in ["creationTimestamp", "generation", "managedFields", "resourceVersion", "selfLink"] {
            metadata.remove(field);
        }
        if kind != Kind::Pod {
            metadata.remove("uid");
        }
    }
    // ovl uses only the status of a Pod and of a Node, and the addresses that another program gave a LoadBalancer.
    if !matches!(kind, Kind::Pod | Kind::Node)
        && let Some(status) = fields.remove("status")
    {
        problems.want(status.is_null() || status.is_object(), "status", "not an object");
        let is_balancer =
            fields.get("spec").and_then(|spec| spec.get("type")) == Some(&"LoadBalancer".into());
        if kind == Kind::Service && is_balancer {
            let ingress = status.pointer("/loadBalancer/ingress").and_then(Value::as_array);
            let ingress: Vec<Value> = ingress.into_iter().flatten().filter_map(translated_ingress).collect();
            fields.insert("status".to_owned(), json!({ "loadBalancer": { "ingress": ingress } }));
        }
    }
}

/// Returns an address of a LoadBalancer as ovl keeps it. `None` for a host name, and for an address that hosts must not
/// translate, because the load balancer changes packets itself (`ipMode: Proxy`).
fn translated_ingress(ingress: &Value) -> Option<Value> {
    let ip = ingress.get("ip")?.as_str()?.parse::<std::net::IpAddr>().ok()?;
    let is_vip = ingress.get("ipMode").is_none_or(|mode| mode.is_null() || mode == "VIP");
    is_vip.then(|| json!({ "ip": ip }))
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
        Resource::ServiceCidr(it) => serde_json::to_value(it),
        Resource::ClusterNetworkPolicy(it) => serde_json::to_value(it),
        Resource::Node(it) => serde_json::to_value(it),
    }
}

/// Removes the time at which the deletion of an object was requested. Returns whether it is a Pod that has one: it is
/// shutting down.
fn take_deletion(kind: Kind, given: &mut Value) -> bool {
    let metadata = given.get_mut("metadata").and_then(Value::as_object_mut);
    let deletion = metadata.and_then(|metadata| metadata.remove("deletionTimestamp"));
    kind == Kind::Pod && deletion.is_some_and(|deletion| !fields::is_empty(&deletion))
}

/// The fields of a manifest that the types do not have.
struct Unsupported {
    kind: Kind,
    validation: Validation,
    errors: Vec<FieldProblem>,
    warnings: Vec<FieldProblem>,
    ignored: Vec<FieldProblem>,
}

impl Unsupported {
    fn new(kind: Kind, validation: Validation) -> Self {
        Self { kind, validation, errors: Vec::new(), warnings: Vec::new(), ignored: Vec::new() }
    }

    fn add(&mut self, field: String, value: &Value) {
        let treatment = fields::treatment(self.kind, &without_indices(&field), value);
        let (list, reason) = match (treatment, self.validation) {
            (Treatment::Informative, _) | (Treatment::Unknown, Validation::Ignore) => return,
            (Treatment::Unknown, Validation::Strict) => (&mut self.errors, "is not a known field"),
            (Treatment::Unknown, Validation::Warn) => (&mut self.warnings, "is not a known field"),
            (Treatment::Ignored(reason), _) => (&mut self.ignored, reason),
            (Treatment::Effective(reason), Validation::Strict) => (&mut self.errors, reason),
            (Treatment::Effective(reason), Validation::Warn | Validation::Ignore) => {
                (&mut self.warnings, reason)
            }
            (Treatment::Protective(reason), _) => (&mut self.errors, reason),
        };
        list.push(FieldProblem { field, reason: reason.to_owned() });
    }
}

/// Adds each field of `given` that `known` does not have.
fn find_unsupported(given: &Value, known: &Value, path: &str, unsupported: &mut Unsupported) {
    match (given, known) {
        (Value::Object(given), Value::Object(known)) => {
            for (key, value) in given {
                let field = join(path, key);
                match known.get(key) {
                    Some(known) => find_unsupported(value, known, &field, unsupported),
                    None => unsupported.add(field, value),
                }
            }
        }
        (Value::Array(given), Value::Array(known)) => {
            for (n, (given, known)) in given.iter().zip(known).enumerate() {
                find_unsupported(given, known, &format!("{path}[{n}]"), unsupported);
            }
        }
        _ => {}
    }
}

/// Fills in the fields that derive from others, and removes those without effect. `terminating`: it is a Pod that is
/// shutting down.
fn complete(resource: &mut Resource, terminating: bool, warnings: &mut Vec<FieldProblem>) {
    match resource {
        Resource::Namespace(_) | Resource::EndpointSlice(_) => {}
        Resource::Pod(pod) => workload::complete(pod, terminating),
        Resource::Service(it) => service::complete(it, warnings),
        Resource::ServiceCidr(it) => it.spec.cidrs.iter_mut().for_each(|range| *range = range.trunc()),
        Resource::ClusterNetworkPolicy(it) => {
            let networks = it.spec.egress.iter_mut().flat_map(|rule| &mut rule.to);
            networks.flat_map(|peer| &mut peer.networks).for_each(|net| *net = net.trunc());
        }
        Resource::Node(it) => it.status.addresses.retain(|address| address.ip().is_some()),
        Resource::NetworkPolicy(it) => {
            let spec = &mut it.spec;
            if spec.policy_types.is_empty() {
                spec.policy_types.push(PolicyType::Ingress);
                spec.policy_types.extend((!spec.egress.is_empty()).then_some(PolicyType::Egress));
            }
            spec.policy_types.sort_unstable();
            spec.policy_types.dedup();
            let from = spec.ingress.iter_mut().flat_map(|rule| &mut rule.from);
            let to = spec.egress.iter_mut().flat_map(|rule| &mut rule.to);
            for IpBlock { cidr, except } in from.chain(to).filter_map(|peer| peer.ip_block.as_mut()) {
                *cidr = cidr.trunc();
                except.iter_mut().for_each(|net| *net = net.trunc());
            }
        }
    }
}

fn check_into(resource: &Resource, problems: &mut FieldProblems) {
    check_meta(resource.kind(), resource.meta(), problems);
    match resource {
        Resource::Namespace(_) => {}
        Resource::Pod(it) => workload::check_pod(it, problems),
        Resource::Service(it) => service::check(it, problems),
        Resource::EndpointSlice(it) => workload::check_slice(it, problems),
        Resource::NetworkPolicy(it) => policy::check(it, problems),
        Resource::ServiceCidr(it) => service::check_cidr(it, problems),
        Resource::ClusterNetworkPolicy(it) => cluster_policy::check(it, problems),
        Resource::Node(it) => workload::check_node(it, problems),
    }
}

fn check_meta(kind: Kind, meta: &Meta, problems: &mut FieldProblems) {
    match kind {
        // A name of a Service may begin with a digit since Kubernetes 1.34.
        Kind::Service | Kind::Namespace => {
            problems.want(is_label(&meta.name), "metadata.name", names::LABEL);
        }
        Kind::Pod
        | Kind::EndpointSlice
        | Kind::NetworkPolicy
        | Kind::ServiceCidr
        | Kind::ClusterNetworkPolicy
        | Kind::Node => {
            problems.want(is_subdomain(&meta.name), "metadata.name", names::SUBDOMAIN);
        }
    }
    let namespace_is_right =
        if kind.is_namespaced() { is_label(&meta.namespace) } else { meta.namespace.is_empty() };
    problems.want(namespace_is_right, "metadata.namespace", names::LABEL);
    let uid = &meta.uid;
    problems.want(uid.is_empty() || kind == Kind::Pod, "metadata.uid", "is kept of Pods only");
    problems.want(uid.is_empty() || is_subdomain(uid), "metadata.uid", names::SUBDOMAIN);
    if let Some(source) = &meta.source {
        let is_named = (1..=Source::MAX_CLUSTER).contains(&source.cluster.len())
            && source.cluster.bytes().all(|byte| byte.is_ascii_graphic());
        problems.want(is_named, "metadata", "has a source that is none");
    }
    check_labels("metadata.labels", &meta.labels, problems);
    problems.want(
        meta.annotations.keys().all(|key| is_label_key(key)),
        "metadata.annotations",
        names::LABEL_KEY,
    );
    let size: usize = meta.annotations.iter().map(|(key, value)| key.len() + value.len()).sum();
    problems.want(size <= MAX_ANNOTATIONS, "metadata.annotations", "are larger than 256 KiB in total");
}

pub(crate) fn check_labels(field: &str, labels: &ovl_proto::resource::Labels, problems: &mut FieldProblems) {
    for (key, value) in labels {
        problems.want(is_label_key(key), format!("{field}.{key}"), names::LABEL_KEY);
        problems.want(is_label_value(value), format!("{field}.{key}"), names::LABEL_VALUE);
    }
}

/// Validates a port number, or a container's name for a port.
pub(crate) fn check_port(field: &str, port: &IntOrString, problems: &mut FieldProblems) {
    match port {
        IntOrString::Int(number) => check_number(field, *number, problems),
        IntOrString::String(name) => problems.want(names::is_port_name(name), field, names::PORT_NAME),
    }
}

pub(crate) fn check_number(field: &str, port: u16, problems: &mut FieldProblems) {
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
