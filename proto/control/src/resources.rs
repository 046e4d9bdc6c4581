//! Kubernetes' objects over the control socket.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use ovl_proto::resource::{Kind, Protocol};

/// Documents that a client may stage on one connection, and their bytes.
pub const MAX_STAGED: usize = 65_536;
/// See [`MAX_STAGED`].
pub const MAX_STAGED_BYTES: usize = 128 << 20;

/// A document of a file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// The file, as the user knows it.
    pub file: String,
    /// Its place in the file, from 1.
    pub document: usize,
    /// What it says.
    pub value: Value,
}

/// What is to become of the staged documents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Apply {
    /// For objects that name none; nothing: `default`.
    #[serde(default)]
    pub namespace: Option<String>,
    /// Everything but writing.
    #[serde(default)]
    pub dry_run: bool,
    /// Fields that are not supported are warnings.
    #[serde(default)]
    pub lenient: bool,
    /// Send each object as it was and as it would be.
    #[serde(default)]
    pub show: bool,
}

/// What became of an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// There was none.
    Created,
    /// It was another.
    Configured,
    /// It was so already.
    Unchanged,
    /// It is gone.
    Deleted,
    /// There was none to delete.
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

/// An object that was written, or would be.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Applied {
    /// Its kind.
    pub kind: Kind,
    /// Empty for kinds that are in no namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// What became of it.
    pub action: Action,
    /// As it was; with [`Apply::show`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub before: Option<Value>,
    /// As it is or would be; with [`Apply::show`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<Value>,
}

/// What was written.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AppliedAll {
    /// In the order of the documents.
    pub objects: Vec<Applied>,
    /// Fields that were passed over.
    pub warnings: Vec<ManifestProblem>,
}

/// What is wrong with a field of a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestProblem {
    /// The file, as the user knows it.
    pub file: String,
    /// The document's place in it, from 1.
    pub document: usize,
    /// Such as `spec.ports[0].port`; empty: the document as a whole.
    pub field: String,
    /// What is wrong, and what would be right.
    pub reason: String,
}

impl std::fmt::Display for ManifestProblem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, document {}: ", self.file, self.document)?;
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.reason)
    }
}

/// Which objects are asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResourceQuery {
    /// Their kind.
    pub kind: Kind,
    /// Nothing: all namespaces.
    #[serde(default)]
    pub namespace: Option<String>,
    /// Nothing: all names.
    #[serde(default)]
    pub name: Option<String>,
}

/// An object as users see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResourceInfo {
    /// Its kind.
    pub kind: Kind,
    /// Empty for kinds that are in no namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// With what was allocated.
    pub manifest: Value,
    /// Of a Pod: its endpoints, one for each network.
    pub endpoints: Vec<PodEndpoint>,
    /// Of a NetworkPolicy: names of the pods that it selects, with their namespace.
    pub selects: Vec<String>,
}

/// An endpoint of a Pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodEndpoint {
    /// The host's name.
    pub node: String,
    /// One for each address family that it has.
    pub addresses: Vec<IpAddr>,
    /// Services send it connections.
    pub ready: bool,
}

/// A Service and what stands behind it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceBackends {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// In its order.
    pub ports: Vec<BackendPort>,
    /// Of a LoadBalancer: its addresses, and who announces each.
    pub announced: Vec<AnnouncedAddress>,
    /// What is not as its specification asks, in sentences.
    pub notes: Vec<String>,
}

/// An address of a LoadBalancer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnnouncedAddress {
    /// The address.
    pub address: IpAddr,
    /// Hosts that answer for it on the underlay: one, but for an instant.
    pub nodes: Vec<String>,
}

/// A port of a Service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendPort {
    /// May be empty.
    pub name: String,
    /// What it runs over.
    pub protocol: Protocol,
    /// At the Service's addresses; nothing of a headless Service without ports.
    pub port: Option<u16>,
    /// Who takes connections, or would if they were ready.
    pub backends: Vec<BackendInfo>,
}

/// A backend of a port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackendInfo {
    /// Where it listens.
    pub address: IpAddr,
    /// Where it listens; nothing of a headless Service without ports.
    pub port: Option<u16>,
    /// The endpoint or Pod; empty where an EndpointSlice lists an address.
    pub name: String,
    /// The host's name; empty: unknown.
    pub node: String,
    /// Services send it connections.
    pub ready: bool,
}
