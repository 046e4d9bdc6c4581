//! Kubernetes' objects, as far as ovl acts on them: v1 Namespace, Pod and Service, discovery.k8s.io/v1
//! EndpointSlice, networking.k8s.io/v1 NetworkPolicy.
//!
//! One set of types for manifests (JSON and YAML, with Kubernetes' field names) and for the wire. The wire's
//! codec does not describe itself, so every field is always written: what a manifest leaves out is filled in
//! when it is read, and [`Resource::to_manifest`] leaves out again what is empty. What is in the cluster has
//! all defaults filled in.

mod pod;
mod policy;
mod port;
mod service;
mod slice;

use std::collections::BTreeMap;

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

pub use self::pod::*;
pub use self::policy::*;
pub use self::port::*;
pub use self::service::*;
pub use self::slice::*;
use crate::clock::{Stamp, timestamp};

/// The namespace of what names none.
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
}

impl Kind {
    /// All of them, in the order in which they are listed.
    pub const ALL: [Self; 5] =
        [Self::Namespace, Self::Pod, Self::Service, Self::EndpointSlice, Self::NetworkPolicy];

    /// As manifests say it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Pod => "Pod",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::NetworkPolicy => "NetworkPolicy",
        }
    }

    /// As manifests say it.
    pub fn api_version(self) -> &'static str {
        match self {
            Self::Namespace | Self::Pod | Self::Service => "v1",
            Self::EndpointSlice => "discovery.k8s.io/v1",
            Self::NetworkPolicy => "networking.k8s.io/v1",
        }
    }

    /// As kubectl prints it before a `/`.
    pub fn qualified(self) -> &'static str {
        match self {
            Self::Namespace => "namespace",
            Self::Pod => "pod",
            Self::Service => "service",
            Self::EndpointSlice => "endpointslice.discovery.k8s.io",
            Self::NetworkPolicy => "networkpolicy.networking.k8s.io",
        }
    }

    /// Singular, plural and short names, as kubectl takes them; in lower case.
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
        }
    }

    /// Whether its objects are in namespaces.
    pub fn is_namespaced(self) -> bool {
        self != Self::Namespace
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The name of an object among those of its kind.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Name {
    /// Empty for kinds that are in no namespace.
    pub namespace: String,
    /// Within the namespace.
    pub name: String,
}

impl Name {
    /// One in a namespace.
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

/// Which object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ResourceKey {
    /// Its kind.
    pub kind: Kind,
    /// Its name.
    pub name: Name,
}

impl std::fmt::Display for ResourceKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.kind, self.name)
    }
}

/// When an object was made: of two objects that claim one address or port the older one keeps it. In
/// manifests a time of day, which is not read back: only the cluster knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Created(pub Stamp);

impl Serialize for Created {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            // To the second, as Kubernetes has it.
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

/// Labels, and what selectors require of them.
pub type Labels = BTreeMap<String, String>;

/// What all objects have.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Meta {
    /// Within the namespace.
    pub name: String,
    /// Empty for kinds that are in no namespace.
    pub namespace: String,
    /// What selectors match.
    pub labels: Labels,
    /// For people and programs; ovl does not look at them.
    pub annotations: BTreeMap<String, String>,
    /// Written by the cluster.
    pub creation_timestamp: Created,
}

/// Requirements on labels; none at all match everything.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LabelSelector {
    /// Labels with these values.
    pub match_labels: Labels,
    /// All of these hold too.
    pub match_expressions: Vec<Requirement>,
}

/// One requirement on one label.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Requirement {
    /// The label.
    pub key: String,
    /// What is required of it.
    pub operator: Operator,
    /// Some with `In` and `NotIn`, none with the others.
    #[serde(default)]
    pub values: Vec<String>,
}

/// How a label is judged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Operator {
    /// It is there, with one of the values.
    In,
    /// It is not there, or with another value.
    NotIn,
    /// It is there.
    Exists,
    /// It is not there.
    DoesNotExist,
}

impl LabelSelector {
    /// Whether these labels are selected.
    pub fn matches(&self, labels: &Labels) -> bool {
        has_all(labels, &self.match_labels) && self.match_expressions.iter().all(|r| r.matches(labels))
    }
}

impl Requirement {
    /// Whether these labels meet it.
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

/// Whether labels have all those that are required, with the same values: a Service's selector.
pub fn has_all(labels: &Labels, required: &Labels) -> bool {
    required.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// v1 Namespace. One that nobody made exists as well, with no labels but the one that Kubernetes gives to each.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Namespace {
    /// Its name and labels.
    pub metadata: Meta,
}

/// An object of any kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
}

impl Resource {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Namespace(_) => Kind::Namespace,
            Self::Pod(_) => Kind::Pod,
            Self::Service(_) => Kind::Service,
            Self::EndpointSlice(_) => Kind::EndpointSlice,
            Self::NetworkPolicy(_) => Kind::NetworkPolicy,
        }
    }

    /// Its metadata.
    pub fn meta(&self) -> &Meta {
        match self {
            Self::Namespace(it) => &it.metadata,
            Self::Pod(it) => &it.metadata,
            Self::Service(it) => &it.metadata,
            Self::EndpointSlice(it) => &it.metadata,
            Self::NetworkPolicy(it) => &it.metadata,
        }
    }

    /// Its metadata, to be changed.
    pub fn meta_mut(&mut self) -> &mut Meta {
        match self {
            Self::Namespace(it) => &mut it.metadata,
            Self::Pod(it) => &mut it.metadata,
            Self::Service(it) => &mut it.metadata,
            Self::EndpointSlice(it) => &mut it.metadata,
            Self::NetworkPolicy(it) => &mut it.metadata,
        }
    }

    /// Its name among those of its kind.
    pub fn name(&self) -> Name {
        Name::new(&self.meta().namespace, &self.meta().name)
    }

    /// Which object it is.
    pub fn key(&self) -> ResourceKey {
        ResourceKey { kind: self.kind(), name: self.name() }
    }

    /// As a manifest, without what is empty or left at nothing.
    pub fn to_manifest(&self) -> Result<Value, serde_json::Error> {
        let mut value = match self {
            Self::Namespace(it) => serde_json::to_value(it),
            Self::Pod(it) => serde_json::to_value(it),
            Self::Service(it) => serde_json::to_value(it),
            Self::EndpointSlice(it) => serde_json::to_value(it),
            Self::NetworkPolicy(it) => serde_json::to_value(it),
        }?;
        leave_out_empty(&mut value);
        if let Self::Service(service) = self {
            leave_out_moot(service, &mut value);
        }
        if let Value::Object(fields) = &mut value {
            fields.insert("apiVersion".to_owned(), self.kind().api_version().into());
            fields.insert("kind".to_owned(), self.kind().name().into());
        }
        Ok(value)
    }

    /// From a manifest without `apiVersion` and `kind`, read by `read`: so the caller chooses what becomes of
    /// unknown fields, and how errors name their place.
    pub fn read<E>(kind: Kind, read: impl ReadManifest<Error = E>) -> Result<Self, E> {
        Ok(match kind {
            Kind::Namespace => Self::Namespace(read.read()?),
            Kind::Pod => Self::Pod(read.read()?),
            Kind::Service => Self::Service(Box::new(read.read()?)),
            Kind::EndpointSlice => Self::EndpointSlice(read.read()?),
            Kind::NetworkPolicy => Self::NetworkPolicy(read.read()?),
        })
    }
}

/// See [`Resource::read`].
pub trait ReadManifest {
    /// Why it cannot be read.
    type Error;

    /// Reads it as this type.
    fn read<T: DeserializeOwned>(self) -> Result<T, Self::Error>;
}

/// The fields of manifests that hold a map whose keys are the user's.
const USERS_MAPS: [&str; 4] = ["labels", "annotations", "matchLabels", "selector"];

/// Takes out of a manifest what is null, an empty list, an empty text, or an empty map that was one before. A
/// map that only becomes empty stays: a selector without requirements is another thing than none. Of a map whose
/// keys are the user's, every entry stays: a label without a value is a label.
fn leave_out_empty(value: &mut Value) {
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
                .filter(|(key, _)| !USERS_MAPS.contains(&key.as_str()))
                .for_each(|(_, field)| leave_out_empty(field));
        }
        Value::Array(items) => items.iter_mut().for_each(leave_out_empty),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// Takes out of a Service's manifest what Kubernetes does not write, or would refuse to read.
fn leave_out_moot(service: &Service, value: &mut Value) {
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
