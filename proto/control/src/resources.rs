//! The parts of requests and replies about Kubernetes objects.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::kubernetes::SourceInfo;
use ovl_proto::resource::{Kind, Protocol, Validation};

/// The maximum number of documents that a client may stage on one connection.
pub const MAX_STAGED: usize = 65_536;
/// The maximum size of all staged documents of one connection, in bytes.
pub const MAX_STAGED_BYTES: usize = 128 << 20;

/// An object of a manifest file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// The file name, as the user gave it.
    pub file: String,
    /// The line of the file where it begins, from 1.
    pub line: usize,
    /// The path of the object in its document with a dot at the end, such as `items[2].`. Empty: the document itself.
    #[serde(default)]
    pub within: String,
    /// The content: one object, not a list.
    pub value: Value,
}

/// A request to apply the staged documents.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Apply {
    /// The namespace of objects that do not name one. `None`: `default`.
    #[serde(default)]
    pub namespace: Option<String>,
    /// Whether to only check, without writing.
    #[serde(default)]
    pub dry_run: bool,
    /// How fields are treated that the Kubernetes API does not have.
    #[serde(default)]
    pub validation: Validation,
    /// Whether kinds and fields that ovl does not act on are errors.
    #[serde(default)]
    pub strict: bool,
    /// Whether an object that exists already is an error.
    #[serde(default)]
    pub create: bool,
    /// Whether the reply contains each object before and after.
    #[serde(default)]
    pub show: bool,
}

/// What a request did with an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// It did not exist before.
    Created,
    /// It was changed.
    Configured,
    /// It already had this content.
    Unchanged,
    /// It was deleted.
    Deleted,
    /// It did not exist, so it could not be deleted.
    Absent,
}

impl std::fmt::Display for Action {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Configured => "configured",
            Self::Unchanged => "unchanged",
            Self::Deleted => "deleted",
            Self::Absent => "absent",
        })
    }
}

/// An object that was written, or would be in a dry run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Applied {
    /// The kind.
    pub kind: Kind,
    /// The namespace; empty for kinds without one.
    pub namespace: String,
    /// The name.
    pub name: String,
    /// What was done with it.
    pub action: Action,
    /// The object before the change, with [`Apply::show`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Value>,
    /// The object after the change, with [`Apply::show`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Value>,
}

/// The result of [`crate::Request::Apply`] and [`crate::Request::Delete`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AppliedAll {
    /// The objects, in the order of the documents.
    pub objects: Vec<Applied>,
    /// What is unusual, but no error.
    pub warnings: Vec<ManifestProblem>,
    /// The known fields that ovl does not act on.
    pub ignored: Vec<IgnoredFields>,
    /// The kinds that ovl does not act on, such as `apps/v1 Deployment`, with the number of their objects.
    pub foreign: BTreeMap<String, usize>,
}

/// Fields that ovl does not act on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IgnoredFields {
    /// The kind of the objects.
    pub kind: Kind,
    /// What ovl does not do.
    pub reason: String,
    /// The paths of the fields, without indices: `spec.containers[].image`.
    pub fields: BTreeSet<String>,
    /// The number of objects that have one of the fields.
    pub objects: usize,
}

impl std::fmt::Display for IgnoredFields {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let fields: Vec<&str> = self.fields.iter().map(String::as_str).collect();
        let (plural, count) = (if self.objects == 1 { "" } else { "s" }, self.objects);
        write!(f, "{} ({count} object{plural}): ignored {}: {}", self.kind, fields.join(", "), self.reason)
    }
}

/// A problem with a field of a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestProblem {
    /// The file name, as the user gave it.
    pub file: String,
    /// The line where the object begins, from 1.
    pub line: usize,
    /// The kind and name of the object, such as `Service shop/web`. Empty: not known.
    pub object: String,
    /// The path of the field, such as `spec.ports[0].port`. Empty: the whole object.
    pub field: String,
    /// What is wrong, and what is expected.
    pub reason: String,
}

impl std::fmt::Display for ManifestProblem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}: ", self.file, self.line)?;
        if !self.object.is_empty() {
            write!(f, "{}: ", self.object)?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.reason)
    }
}

/// Selects the objects of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResourceQuery {
    /// The kind.
    pub kind: Kind,
    /// The namespace. `None`: all namespaces.
    #[serde(default)]
    pub namespace: Option<String>,
    /// The name. `None`: all names.
    #[serde(default)]
    pub name: Option<String>,
}

/// A Kubernetes object, as `ovlctl get` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResourceInfo {
    /// The kind.
    pub kind: Kind,
    /// The namespace; empty for kinds without one.
    pub namespace: String,
    /// The name.
    pub name: String,
    /// The creation time, in milliseconds since 1970.
    pub created_ms: u64,
    /// The manifest, with what was allocated.
    pub manifest: Value,
    /// The endpoints of a Pod, one for each network.
    pub endpoints: Vec<PodEndpoint>,
    /// The pods that a NetworkPolicy selects, as `NAMESPACE/NAME`.
    pub selects: Vec<String>,
    /// The Kubernetes API server that the object is mirrored from. `None`: it is ovl's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceInfo>,
}

/// An endpoint of a Pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodEndpoint {
    /// The host's name.
    pub node: String,
    /// The addresses, one for each address family.
    pub addresses: Vec<IpAddr>,
    /// Whether Services send it connections.
    pub ready: bool,
}

/// A Service and its backends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceBackends {
    /// The namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
    /// The creation time, in milliseconds since 1970.
    pub created_ms: u64,
    /// The ports, in the order of the Service.
    pub ports: Vec<BackendPort>,
    /// The addresses of a LoadBalancer, and which hosts announce each.
    pub announced: Vec<AnnouncedAddress>,
    /// Sentences on what differs from its specification.
    pub notes: Vec<String>,
}

/// An announced address of a LoadBalancer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnnouncedAddress {
    /// The address.
    pub address: IpAddr,
    /// The hosts that answer for it on the underlay: one, but for an instant.
    pub nodes: Vec<String>,
}

/// A port of a Service and its backends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendPort {
    /// The name; may be empty.
    pub name: String,
    /// The protocol.
    pub protocol: Protocol,
    /// The port at the Service's addresses. `None` for a headless Service without ports.
    pub port: Option<u16>,
    /// The backends, including those that are not ready.
    pub backends: Vec<BackendInfo>,
}

/// A backend of a port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendInfo {
    /// The address at which it listens.
    pub address: IpAddr,
    /// The port at which it listens. `None` for a headless Service without ports.
    pub port: Option<u16>,
    /// The name of the endpoint or Pod. Empty for an address of an EndpointSlice.
    pub name: String,
    /// The host's name. Empty: unknown.
    pub node: String,
    /// Whether Services send it connections.
    pub ready: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_name_the_file_the_line_and_the_object() {
        let mut problem = ManifestProblem {
            file: "shop.yaml".to_owned(),
            line: 12,
            object: "Service shop/web".to_owned(),
            field: "spec.ports[0].port".to_owned(),
            reason: "is missing".to_owned(),
        };
        assert_eq!(problem.to_string(), "shop.yaml:12: Service shop/web: spec.ports[0].port: is missing");
        (problem.object, problem.field) = (String::new(), String::new());
        assert_eq!(problem.to_string(), "shop.yaml:12: is missing");
        let ignored = IgnoredFields {
            kind: Kind::Pod,
            reason: "ovl runs no containers".to_owned(),
            fields: BTreeSet::from(["spec.volumes".to_owned(), "spec.containers[].image".to_owned()]),
            objects: 2,
        };
        assert_eq!(
            ignored.to_string(),
            "Pod (2 objects): ignored spec.containers[].image, spec.volumes: ovl runs no containers"
        );
    }
}
