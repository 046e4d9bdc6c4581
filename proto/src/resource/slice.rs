//! discovery.k8s.io/v1 EndpointSlice: backends that somebody else lists.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Meta, Protocol};

/// The label that names the Service of a slice, in the same namespace.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// discovery.k8s.io/v1 EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EndpointSlice {
    /// [`SERVICE_NAME_LABEL`] tells the Service.
    #[serde(default)]
    pub metadata: Meta,
    /// Of all addresses.
    pub address_type: AddressType,
    /// At most 1,000.
    #[serde(default)]
    pub endpoints: Vec<SliceEndpoint>,
    /// The same on all endpoints.
    #[serde(default)]
    pub ports: Vec<SlicePort>,
}

/// The family of a slice's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AddressType {
    /// IPv4.
    IPv4,
    /// IPv6.
    IPv6,
}

/// A backend.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SliceEndpoint {
    /// Interchangeable; at least one. The first one counts, as with kube-proxy.
    pub addresses: Vec<IpAddr>,
    /// Whether it takes connections.
    pub conditions: Conditions,
    /// Of its record in DNS, under the Service's.
    pub hostname: String,
    /// The host that it is on, by its name in the cluster; empty: unknown.
    pub node_name: String,
}

/// Whether a backend takes connections; nothing said counts as Kubernetes has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Conditions {
    /// Nothing: yes.
    pub ready: Option<bool>,
    /// As `ready`, whether it is on its way out or not. Nothing: as `ready`.
    pub serving: Option<bool>,
    /// On its way out. Nothing: no.
    pub terminating: Option<bool>,
}

/// A port of a slice's endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SlicePort {
    /// The name of the Service's port that it belongs to.
    pub name: String,
    /// TCP unless given.
    pub protocol: Protocol,
    /// Where the endpoints listen. Nothing, all ports, is of no use to a Service.
    pub port: Option<u16>,
    /// For people.
    pub app_protocol: Option<String>,
}
