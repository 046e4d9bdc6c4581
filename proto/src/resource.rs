//! The Kubernetes objects that ovl acts on: v1 Namespace, Pod, Service and Node, discovery.k8s.io/v1 EndpointSlice,
//! networking.k8s.io/v1 NetworkPolicy and ServiceCIDR, policy.networking.k8s.io/v1alpha2 ClusterNetworkPolicy.
//!
//! The same types serve manifests (JSON and YAML, with the field names of Kubernetes) and the wire, with numbered fields
//! ([`crate::wire::fields`]). Reading a manifest fills in absent fields, and [`Resource::to_manifest`] omits empty ones.
//! Objects in the cluster have all defaults filled in.
//!
//! Types without numbered fields have a fixed shape: what is added goes into the type that has them.

mod cidr;
mod cluster_policy;
mod labels;
mod node;
mod pod;
mod policy;
mod port;
mod service;
mod slice;
mod source;

use std::collections::BTreeMap;

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

pub use self::cidr::*;
pub use self::cluster_policy::*;
pub use self::labels::*;
pub use self::node::*;
pub use self::pod::*;
pub use self::policy::*;
pub use self::port::*;
pub use self::service::*;
pub use self::slice::*;
pub use self::source::*;
use crate::clock::{Stamp, timestamp};
use crate::fields;
use crate::wire::fields::Unknown;
use crate::wire::{self, WireError};

/// The namespace of objects that do not name one.
pub const DEFAULT_NAMESPACE: &str = "default";

/// The kinds of object that ovl acts on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// v1 Namespace.
    Namespace,
    /// v1 Pod.
    Pod,
    /// v1 Service.
    Service,
    /// discovery.k8s.io/v1 EndpointSlice.
    EndpointSlice,
    /// networking.k8s.io/v1 NetworkPolicy.
    NetworkPolicy,
    /// networking.k8s.io/v1 ServiceCIDR.
    ServiceCidr,
    /// policy.networking.k8s.io/v1alpha2 ClusterNetworkPolicy.
    ClusterNetworkPolicy,
    /// v1 Node.
    Node,
}

impl Kind {
    /// All kinds, in the order in which they are listed.
    pub const ALL: [Self; 8] = [
        Self::Namespace,
        Self::Pod,
        Self::Service,
        Self::EndpointSlice,
        Self::NetworkPolicy,
        Self::ServiceCidr,
        Self::ClusterNetworkPolicy,
        Self::Node,
    ];

    /// Returns the `kind` of manifests.
    pub fn name(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Pod => "Pod",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::ServiceCidr => "ServiceCIDR",
            Self::ClusterNetworkPolicy => "ClusterNetworkPolicy",
            Self::Node => "Node",
        }
    }

    /// Returns the `apiVersion` of manifests.
    pub fn api_version(self) -> &'static str {
        match self {
            Self::Namespace | Self::Pod | Self::Service | Self::Node => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
            Self::NetworkPolicy | Self::ServiceCidr => "networking.k8s.io/v1",
            Self::ClusterNetworkPolicy => "policy.networking.k8s.io/v1alpha2",
        }
    }

    /// Returns the qualified name that kubectl prints before a `/`.
    pub fn qualified(self) -> &'static str {
        match self {
            Self::Namespace => "namespace",
            Self::Pod => "pod",
            Self::Service => "service",
            Self::EndpointSlice => "endpointslice.discovery.k8s.io",
            Self::NetworkPolicy => "networkpolicy.networking.k8s.io",
            Self::ServiceCidr => "servicecidr.networking.k8s.io",
            Self::ClusterNetworkPolicy => "clusternetworkpolicy.policy.networking.k8s.io",
            Self::Node => "node",
        }
    }

    /// Returns the singular, plural and short names that kubectl accepts, in lower case.
    pub fn spellings(self) -> &'static [&'static str] {
        match self {
            Self::Namespace => &["namespace", "namespaces", "ns"],
            Self::Pod => &["pod", "pods", "po"],
            Self::Service => &["service", "services", "svc"],
            Self::EndpointSlice => &[
                "endpointslice",
                "endpointslices",
                "endpointslices.discovery.k8s.io",
                "endpointslice.discovery.k8s.io",
            ],
            Self::NetworkPolicy => &[
                "networkpolicy",
                "networkpolicies",
                "netpol",
                "networkpolicies.networking.k8s.io",
                "networkpolicy.networking.k8s.io",
            ],
            Self::ServiceCidr => &[
                "servicecidr",
                "servicecidrs",
                "servicecidrs.networking.k8s.io",
                "servicecidr.networking.k8s.io",
            ],
            Self::ClusterNetworkPolicy => &[
                "clusternetworkpolicy",
                "clusternetworkpolicies",
                "cnp",
                "clusternetworkpolicies.policy.networking.k8s.io",
                "clusternetworkpolicy.policy.networking.k8s.io",
            ],
            Self::Node => &["node", "nodes", "no"],
        }
    }

    /// Whether objects of this kind decide which connections are allowed.
    pub fn is_policy(self) -> bool {
        matches!(self, Self::NetworkPolicy | Self::ClusterNetworkPolicy)
    }

    /// Whether objects of this kind are in namespaces.
    pub fn is_namespaced(self) -> bool {
        !matches!(self, Self::Namespace | Self::ServiceCidr | Self::ClusterNetworkPolicy | Self::Node)
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The name of an object, unique among those of its kind.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Name {
    /// The namespace; empty for kinds without one.
    pub namespace: String,
    /// The name within the namespace.
    pub name: String,
}

impl Name {
    /// Creates a name in a namespace.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let slash = if self.namespace.is_empty() { "" } else { "/" };
        write!(f, "{}{slash}{}", self.namespace, self.name)
    }
}

/// The key of a Kubernetes object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ResourceKey {
    /// The kind.
    pub kind: Kind,
    /// The name.
    pub name: Name,
}

impl std::fmt::Display for ResourceKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// The creation time of an object. Of two objects that claim the same address or port, the older one keeps it.
///
/// Manifests show it as a timestamp. It is not read back, because only the cluster sets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Created(pub Stamp);

impl Serialize for Created {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            // Kubernetes uses a resolution of one second.
            let time = timestamp(self.0.wall_ms / 1000 * 1000).replace(".000Z", "Z");
            serializer.serialize_str(&time)
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Created {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            IgnoredAny::deserialize(deserializer).map(|_| Self::default())
        } else {
            Stamp::deserialize(deserializer).map(Self)
        }
    }
}

/// The metadata of an object.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct Meta {
    /// The name within the namespace.
    pub name: String,
    /// The namespace; empty for kinds without one.
    pub namespace: String,
    /// The labels that selectors match.
    pub labels: Labels,
    /// The annotations, which ovl ignores.
    pub annotations: BTreeMap<String, String>,
    /// The creation time, written by the cluster.
    pub creation_timestamp: Created,
    /// The unique id that the Kubernetes API server gave the object. Only kept of Pods, whose runtimes name it. May be
    /// empty.
    pub uid: String,
    /// Where the object was mirrored from. `None`: it is ovl's own. No manifest has it. Boxed, because most objects of a
    /// cluster without Kubernetes have none.
    #[serde(skip)]
    pub source: Option<Box<Source>>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! {
    json Meta {
        1 name optional, 2 namespace optional, 3 labels optional, 4 annotations optional,
        5 creation_timestamp optional, 6 uid optional, 7 source optional, ..unknown
    }
}

/// Requirements on labels. An empty selector matches everything.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct LabelSelector {
    /// Labels that must have these values.
    pub match_labels: Labels,
    /// Further requirements, all of which must hold.
    pub match_expressions: Vec<Requirement>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json LabelSelector { 1 match_labels optional, 2 match_expressions optional, ..unknown } }

/// A requirement on one label.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Requirement {
    /// The label's key.
    pub key: String,
    /// The condition.
    pub operator: Operator,
    /// The values: at least one with `In` and `NotIn`, none with the other operators.
    #[serde(default)]
    pub values: Vec<String>,
}

/// The condition on a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Operator {
    /// The label exists with one of the values.
    In,
    /// The label is absent, or has another value.
    NotIn,
    /// The label exists.
    Exists,
    /// The label is absent.
    DoesNotExist,
}

impl LabelSelector {
    /// Whether the selector matches labels.
    pub fn matches(&self, labels: &Labels) -> bool {
        has_all(labels, &self.match_labels) && self.match_expressions.iter().all(|r| r.matches(labels))
    }
}

impl Requirement {
    /// Whether labels meet the requirement.
    pub fn matches(&self, labels: &Labels) -> bool {
        let value = labels.get(&self.key);
        match self.operator {
            Operator::In => value.is_some_and(|value| self.values.contains(value)),
            Operator::NotIn => value.is_none_or(|value| !self.values.contains(value)),
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        }
    }
}

/// Whether labels contain all required labels with the same values: the selector of a Service.
pub fn has_all(labels: &Labels, required: &Labels) -> bool {
    required.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// v1 Namespace. A namespace without an object exists too; its only label is the one that Kubernetes adds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct Namespace {
    /// Its name and labels.
    pub metadata: Meta,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json Namespace { 1 metadata optional, ..unknown } }

/// An object of any kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resource {
    /// See [`Namespace`].
    Namespace(Namespace),
    /// See [`Pod`].
    Pod(Pod),
    /// See [`Service`].
    Service(Box<Service>),
    /// See [`EndpointSlice`].
    EndpointSlice(EndpointSlice),
    /// See [`NetworkPolicy`].
    NetworkPolicy(NetworkPolicy),
    /// See [`ServiceCidr`].
    ServiceCidr(ServiceCidr),
    /// See [`ClusterNetworkPolicy`].
    ClusterNetworkPolicy(ClusterNetworkPolicy),
    /// See [`NodeObject`].
    Node(NodeObject),
}

impl Resource {
    /// Returns the kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Namespace(_) => Kind::Namespace,
            Self::Pod(_) => Kind::Pod,
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::NetworkPolicy(_) => Kind::NetworkPolicy,
            Self::ServiceCidr(_) => Kind::ServiceCidr,
            Self::ClusterNetworkPolicy(_) => Kind::ClusterNetworkPolicy,
            Self::Node(_) => Kind::Node,
        }
    }

    /// Returns the metadata.
    pub fn meta(&self) -> &Meta {
        match self {
            Self::Namespace(it) => &it.metadata,
            Self::Pod(it) => &it.metadata,
            Self::Service(it) => &it.metadata,
            Self::EndpointSlice(it) => &it.metadata,
            Self::NetworkPolicy(it) => &it.metadata,
            Self::ServiceCidr(it) => &it.metadata,
            Self::ClusterNetworkPolicy(it) => &it.metadata,
            Self::Node(it) => &it.metadata,
        }
    }

    /// Returns the metadata for modification.
    pub fn meta_mut(&mut self) -> &mut Meta {
        match self {
            Self::Namespace(it) => &mut it.metadata,
            Self::Pod(it) => &mut it.metadata,
            Self::Service(it) => &mut it.metadata,
            Self::EndpointSlice(it) => &mut it.metadata,
            Self::NetworkPolicy(it) => &mut it.metadata,
            Self::ServiceCidr(it) => &mut it.metadata,
            Self::ClusterNetworkPolicy(it) => &mut it.metadata,
            Self::Node(it) => &mut it.metadata,
        }
    }

    /// Returns the name.
    pub fn name(&self) -> Name {
        Name::new(&self.meta().namespace, &self.meta().name)
    }

    /// Returns the key.
    pub fn key(&self) -> ResourceKey {
        ResourceKey { kind: self.kind(), name: self.name() }
    }

    /// Encodes the object as the content of a cluster object.
    ///
    /// # Errors
    ///
    /// If it exceeds the size limit of encodings.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        match self {
            Self::Namespace(it) => wire::encode_body(it),
            Self::Pod(it) => wire::encode_body(it),
            Self::Service(it) => wire::encode_body(it),
            Self::EndpointSlice(it) => wire::encode_body(it),
            Self::NetworkPolicy(it) => wire::encode_body(it),
            Self::ServiceCidr(it) => wire::encode_body(it),
            Self::ClusterNetworkPolicy(it) => wire::encode_body(it),
            Self::Node(it) => wire::encode_body(it),
        }
    }

    /// Decodes what [`Self::encode`] returns.
    ///
    /// # Errors
    ///
    /// If the bytes are malformed, or of a later release and not understood.
    pub fn decode(kind: Kind, content: &[u8]) -> Result<Self, WireError> {
        Ok(match kind {
            Kind::Namespace => Self::Namespace(wire::decode_body(content)?),
            Kind::Pod => Self::Pod(wire::decode_body(content)?),
            Kind::Service => Self::Service(Box::new(wire::decode_body(content)?)),
            Kind::EndpointSlice => Self::EndpointSlice(wire::decode_body(content)?),
            Kind::NetworkPolicy => Self::NetworkPolicy(wire::decode_body(content)?),
            Kind::ServiceCidr => Self::ServiceCidr(wire::decode_body(content)?),
            Kind::ClusterNetworkPolicy => Self::ClusterNetworkPolicy(wire::decode_body(content)?),
            Kind::Node => Self::Node(wire::decode_body(content)?),
        })
    }

    /// Takes over the fields of an earlier write that this release does not know, from its metadata, its specification
    /// and its status: a manifest cannot contain them.
    pub fn keep_unknown(&mut self, before: &Self) {
        match (&mut *self, before) {
            (Self::Namespace(new), Self::Namespace(old)) => new.unknown.clone_from(&old.unknown),
            (Self::Pod(new), Self::Pod(old)) => {
                new.unknown.clone_from(&old.unknown);
                new.spec.unknown.clone_from(&old.spec.unknown);
                new.status.unknown.clone_from(&old.status.unknown);
            }
            (Self::Service(new), Self::Service(old)) => {
                new.unknown.clone_from(&old.unknown);
                new.spec.unknown.clone_from(&old.spec.unknown);
                new.status.unknown.clone_from(&old.status.unknown);
            }
            (Self::EndpointSlice(new), Self::EndpointSlice(old)) => new.unknown.clone_from(&old.unknown),
            (Self::NetworkPolicy(new), Self::NetworkPolicy(old)) => {
                new.unknown.clone_from(&old.unknown);
                new.spec.unknown.clone_from(&old.spec.unknown);
            }
            (Self::ServiceCidr(new), Self::ServiceCidr(old)) => {
                new.unknown.clone_from(&old.unknown);
                new.spec.unknown.clone_from(&old.spec.unknown);
            }
            (Self::ClusterNetworkPolicy(new), Self::ClusterNetworkPolicy(old)) => {
                new.unknown.clone_from(&old.unknown);
                new.spec.unknown.clone_from(&old.spec.unknown);
            }
            (Self::Node(new), Self::Node(old)) => {
                new.unknown.clone_from(&old.unknown);
                new.status.unknown.clone_from(&old.status.unknown);
            }
            _ => return,
        }
        self.meta_mut().unknown.clone_from(&before.meta().unknown);
    }

    /// Returns the object as a manifest without empty fields.
    ///
    /// # Errors
    ///
    /// If serialization fails.
    pub fn to_manifest(&self) -> Result<Value, serde_json::Error> {
        let mut value = match self {
            Self::Namespace(it) => serde_json::to_value(it),
            Self::Pod(it) => serde_json::to_value(it),
            Self::Service(it) => serde_json::to_value(it),
            Self::EndpointSlice(it) => serde_json::to_value(it),
            Self::NetworkPolicy(it) => serde_json::to_value(it),
            Self::ServiceCidr(it) => serde_json::to_value(it),
            Self::ClusterNetworkPolicy(it) => serde_json::to_value(it),
            Self::Node(it) => serde_json::to_value(it),
        }?;
        remove_empty(&mut value);
        if let Self::Service(service) = self {
            remove_inapplicable(service, &mut value);
        }
        if let Value::Object(fields) = &mut value {
            fields.insert("apiVersion".to_owned(), self.kind().api_version().into());
            fields.insert("kind".to_owned(), self.kind().name().into());
        }
        Ok(value)
    }

    /// Reads an object from a manifest without `apiVersion` and `kind`.
    ///
    /// The caller's `read` decides how unknown fields are handled and how errors name the field.
    ///
    /// # Errors
    ///
    /// The error of `read`.
    pub fn read<E>(kind: Kind, read: impl ReadManifest<Error = E>) -> Result<Self, E> {
        Ok(match kind {
            Kind::Namespace => Self::Namespace(read.read()?),
            Kind::Pod => Self::Pod(read.read()?),
            Kind::Service => Self::Service(Box::new(read.read()?)),
            Kind::EndpointSlice => Self::EndpointSlice(read.read()?),
            Kind::NetworkPolicy => Self::NetworkPolicy(read.read()?),
            Kind::ServiceCidr => Self::ServiceCidr(read.read()?),
            Kind::ClusterNetworkPolicy => Self::ClusterNetworkPolicy(read.read()?),
            Kind::Node => Self::Node(read.read()?),
        })
    }
}

/// How a manifest's fields that the Kubernetes API does not have are treated: the words of `kubectl --validate`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Validation {
    /// As errors. So are fields that would change what ovl does.
    #[default]
    Strict,
    /// As warnings.
    Warn,
    /// Not at all. Fields that would change what ovl does are warnings.
    Ignore,
}

/// Deserializes a manifest for [`Resource::read`].
pub trait ReadManifest {
    /// Why the manifest cannot be read.
    type Error;

    /// Reads the manifest as a type.
    ///
    /// # Errors
    ///
    /// If the manifest does not fit the type.
    fn read<T: DeserializeOwned>(self) -> Result<T, Self::Error>;
}

/// The manifest fields whose value is a map with keys of the user.
pub const USER_MAPS: [&str; 4] = ["labels", "annotations", "matchLabels", "selector"];

/// Removes null, empty lists, empty strings and empty maps from a manifest.
///
/// A map that only becomes empty by this stays: a selector without requirements differs from no selector. A map with
/// keys of the user keeps every entry: a label without a value is a label.
fn remove_empty(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|_, field| match field {
                Value::Null => false,
                Value::Array(items) => !items.is_empty(),
                Value::Object(fields) => !fields.is_empty(),
                Value::String(text) => !text.is_empty(),
                Value::Bool(_) | Value::Number(_) => true,
            });
            fields
                .iter_mut()
                .filter(|(key, _)| !USER_MAPS.contains(&key.as_str()))
                .for_each(|(_, field)| remove_empty(field));
        }
        Value::Array(items) => items.iter_mut().for_each(remove_empty),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Removes the fields of a Service's manifest that Kubernetes does not write, or would reject.
fn remove_inapplicable(service: &Service, value: &mut Value) {
    let Some(Value::Object(spec)) = value.get_mut("spec") else { return };
    if !service.is_reached_from_outside() {
        spec.remove("externalTrafficPolicy");
    }
    if service.spec.kind == ServiceType::ExternalName {
        spec.remove("internalTrafficPolicy");
    }
    if !service.spec.publish_not_ready_addresses {
        spec.remove("publishNotReadyAddresses");
    }
}

#[cfg(test)]
mod tests;
