//! v1 Pod: labels, named ports and DNS names for the endpoints of the pod.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Meta, Protocol};
use crate::fields;
use crate::wire::fields::Unknown;

/// v1 Pod.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct Pod {
    /// The metadata. Its labels apply to the endpoint.
    pub metadata: Meta,
    /// The desired state.
    pub spec: PodSpec,
    /// The status, as given in the manifest.
    pub status: PodStatus,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json Pod { 1 metadata optional, 2 spec optional, 3 status optional, ..unknown } }

/// The specification of a Pod.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct PodSpec {
    /// The containers. Kubernetes requires at least one, ovl none.
    pub containers: Vec<Container>,
    /// The host name in its DNS record. Empty: the pod's name.
    pub hostname: String,
    /// The headless Service under whose name the DNS record is. Empty: no record.
    pub subdomain: String,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json PodSpec { 1 containers optional, 2 hostname optional, 3 subdomain optional, ..unknown } }

impl Pod {
    /// Whether its containers have ended for good. Its addresses may be those of another pod by now.
    pub fn is_finished(&self) -> bool {
        matches!(self.status.phase, Some(PodPhase::Succeeded | PodPhase::Failed))
    }

    /// Whether Services may send it connections: its condition Ready is met. Without that condition, it is ready unless
    /// its phase says that it does not run, because manifests written by hand have neither.
    pub fn is_ready(&self) -> bool {
        let status = &self.status;
        let condition = status.conditions.iter().find(|condition| condition.kind == READY_CONDITION);
        match (condition, status.phase) {
            (_, Some(PodPhase::Succeeded | PodPhase::Failed)) => false,
            (Some(condition), _) => condition.status == ConditionStatus::True,
            (None, phase) => matches!(phase, None | Some(PodPhase::Running)),
        }
    }
}

/// A container of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct Container {
    /// The container's name.
    pub name: String,
    /// The ports. Services and policies can refer to a port by its name.
    pub ports: Vec<ContainerPort>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json Container { 1 name optional, 2 ports optional, ..unknown } }

/// A port on which a container listens.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct ContainerPort {
    /// The port's name; may be empty.
    pub name: String,
    /// The port number, 1 to 65535.
    pub container_port: u16,
    /// The protocol; TCP by default.
    pub protocol: Protocol,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json ContainerPort { 1 name optional, 2 container_port optional, 3 protocol optional, ..unknown } }

/// The status of a Pod: whether it is ready, and its addresses if it has no endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct PodStatus {
    /// The first of `pod_ips`.
    #[serde(rename = "podIP")]
    pub pod_ip: Option<IpAddr>,
    /// At most one an address family.
    #[serde(rename = "podIPs")]
    pub pod_ips: Vec<PodIp>,
    /// The phase of its containers. `None`: not given.
    pub phase: Option<PodPhase>,
    /// The condition [`READY_CONDITION`], if given. In the cluster there is no other one.
    pub conditions: Vec<PodCondition>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! {
    json PodStatus {
        1 pod_ip optional, 2 pod_ips optional, 3 phase optional, 4 conditions optional, ..unknown
    }
}

/// The type of the condition that says whether a pod accepts connections.
pub const READY_CONDITION: &str = "Ready";

/// The phase of a pod's containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PodPhase {
    /// Not all containers have been started.
    Pending,
    /// At least one container is running or starts again.
    Running,
    /// All containers have ended with success. They do not start again.
    Succeeded,
    /// All containers have ended, one of them with a failure. They do not start again.
    Failed,
    /// The host of the pod does not report.
    Unknown,
}

/// A condition of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodCondition {
    /// The type of the condition.
    #[serde(rename = "type")]
    pub kind: String,
    /// Whether it is met.
    pub status: ConditionStatus,
}

/// Whether a condition is met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConditionStatus {
    /// It is met.
    True,
    /// It is not met.
    False,
    /// It is not known.
    Unknown,
}

/// One address of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodIp {
    /// The address.
    pub ip: IpAddr,
}
