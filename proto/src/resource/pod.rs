//! v1 Pod: what an endpoint of the same namespace and name gets from it.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Meta, Protocol};

/// v1 Pod.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Pod {
    /// Its labels are those of the endpoint.
    pub metadata: Meta,
    /// What was asked for.
    pub spec: PodSpec,
    /// What became of it; as given in the manifest.
    pub status: PodStatus,
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PodSpec {
    /// At least one in Kubernetes; here none are needed.
    pub containers: Vec<Container>,
    /// Of its record in DNS; empty: the pod's name.
    pub hostname: String,
    /// The headless Service under whose name the record is; empty: no record.
    pub subdomain: String,
}

/// A container of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Container {
    /// For people.
    pub name: String,
    /// Those that have a name can be named by Services and policies.
    pub ports: Vec<ContainerPort>,
}

/// A port on which a container listens.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ContainerPort {
    /// May be empty.
    pub name: String,
    /// 1 to 65535.
    pub container_port: u16,
    /// TCP unless given.
    pub protocol: Protocol,
}

/// The addresses of a pod that is no endpoint of ours.
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
