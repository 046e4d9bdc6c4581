//! v1 Pod: labels, named ports and DNS names for endpoints of the same namespace and name.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Meta, Protocol};

/// v1 Pod.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Pod {
    /// The metadata. Its labels apply to the endpoint.
    pub metadata: Meta,
    /// The desired state.
    pub spec: PodSpec,
    /// The status, as given in the manifest.
    pub status: PodStatus,
}

/// The specification of a Pod.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSpec {
    /// The containers. Kubernetes requires at least one, ovl none.
    pub containers: Vec<Container>,
    /// The host name in its DNS record. Empty: the pod's name.
    pub hostname: String,
    /// The headless Service under whose name the DNS record is. Empty: no record.
    pub subdomain: String,
}

/// A container of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Container {
    /// The container's name.
    pub name: String,
    /// The ports. Services and policies can refer to a port by its name.
    pub ports: Vec<ContainerPort>,
}

/// A port on which a container listens.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerPort {
    /// The port's name; may be empty.
    pub name: String,
    /// The port number, 1 to 65535.
    pub container_port: u16,
    /// The protocol; TCP by default.
    pub protocol: Protocol,
}

/// The status of a Pod: its addresses if it has no endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodStatus {
    /// The first of `pod_ips`.
    #[serde(rename = "podIP")]
    pub pod_ip: Option<IpAddr>,
    /// At most one an address family.
    #[serde(rename = "podIPs")]
    pub pod_ips: Vec<PodIp>,
}

/// One address of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodIp {
    /// The address.
    pub ip: IpAddr,
}
