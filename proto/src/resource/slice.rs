//! discovery.k8s.io/v1 EndpointSlice: backends that another program lists.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Meta, Protocol};
use crate::fields;
use crate::wire::fields::Unknown;

/// The label with the name of a slice's Service, which is in the same namespace.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// discovery.k8s.io/v1 EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase")]
pub struct EndpointSlice {
    /// The metadata. The label [`SERVICE_NAME_LABEL`] names the Service.
    #[serde(default)]
    pub metadata: Meta,
    /// The family of all addresses.
    pub address_type: AddressType,
    /// The endpoints, at most 1,000.
    #[serde(default)]
    pub endpoints: Vec<SliceEndpoint>,
    /// The ports, the same on all endpoints.
    #[serde(default)]
    pub ports: Vec<SlicePort>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! {
    json EndpointSlice {
        1 metadata optional, 2 address_type, 3 endpoints optional, 4 ports optional, ..unknown
    }
}

/// The family of a slice's addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum AddressType {
    /// IPv4.
    IPv4,
    /// IPv6.
    IPv6,
}

/// An endpoint of a slice: one backend.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct SliceEndpoint {
    /// Its addresses, at least one. Only the first one is used, as by kube-proxy.
    pub addresses: Vec<IpAddr>,
    /// Whether it accepts connections.
    pub conditions: Conditions,
    /// The host name of its DNS record, under the Service's name.
    pub hostname: String,
    /// The name of its host in the cluster. Empty: unknown.
    pub node_name: String,
    /// The clients that it is meant for. `None`: all.
    pub hints: Option<EndpointHints>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! {
    json SliceEndpoint {
        1 addresses optional, 2 conditions optional, 3 hostname optional, 4 node_name optional, 5 hints optional,
        ..unknown
    }
}

/// The clients that an endpoint of a slice is meant for. Hosts follow hints if all ready endpoints have some.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct EndpointHints {
    /// Those in these zones, at most 8.
    pub for_zones: Vec<HintTarget>,
    /// Those on these hosts, at most 8.
    pub for_nodes: Vec<HintTarget>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json EndpointHints { 1 for_zones optional, 2 for_nodes optional, ..unknown } }

/// A zone or a host that an endpoint is meant for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HintTarget {
    /// Its name.
    pub name: String,
}

/// Whether a backend accepts connections. Absent values have the defaults of Kubernetes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Conditions {
    /// Whether it accepts new connections. `None`: yes.
    pub ready: Option<bool>,
    /// As `ready`, regardless of termination. `None`: as `ready`.
    pub serving: Option<bool>,
    /// Whether it is shutting down. `None`: no.
    pub terminating: Option<bool>,
}

/// A port of a slice's endpoints.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct SlicePort {
    /// The name of the Service port that it belongs to.
    pub name: String,
    /// The protocol; TCP by default.
    pub protocol: Protocol,
    /// The port at which the endpoints listen. `None` means all ports, which a Service cannot use.
    pub port: Option<u16>,
    /// The application protocol, informational.
    pub app_protocol: Option<String>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! {
    json SlicePort {
        1 name optional, 2 protocol optional, 3 port optional, 4 app_protocol optional, ..unknown
    }
}
