//! networking.k8s.io/v1 NetworkPolicy, all fields.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{IntOrString, LabelSelector, Meta, Protocol};
use crate::fields;
use crate::wire::fields::Unknown;

/// networking.k8s.io/v1 NetworkPolicy.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct NetworkPolicy {
    /// The metadata. The policy selects pods of its own namespace.
    pub metadata: Meta,
    /// The desired state.
    pub spec: PolicySpec,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json NetworkPolicy { 1 metadata optional, 2 spec optional, ..unknown } }

/// The specification of a NetworkPolicy.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct PolicySpec {
    /// The pods that it isolates. Without requirements: every pod of the namespace.
    pub pod_selector: LabelSelector,
    /// The directions in which it isolates. In the cluster this is always filled in: by default ingress, and egress
    /// if there are egress rules.
    pub policy_types: Vec<PolicyType>,
    /// The ingress rules. Without rules no ingress is allowed if `policy_types` contains ingress.
    pub ingress: Vec<IngressRule>,
    /// The egress rules.
    pub egress: Vec<EgressRule>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! {
    json PolicySpec {
        1 pod_selector optional, 2 policy_types optional, 3 ingress optional, 4 egress optional, ..unknown
    }
}

/// A direction, as seen from the selected pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PolicyType {
    /// Connections to the pod.
    Ingress,
    /// Connections from the pod.
    Egress,
}

/// An ingress rule: allows connections from any of the peers to any of the ports.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct IngressRule {
    /// The ports. Empty: every port and protocol.
    pub ports: Vec<PolicyPort>,
    /// The peers. Empty: every source.
    pub from: Vec<PolicyPeer>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json IngressRule { 1 ports optional, 2 from optional, ..unknown } }

/// An egress rule: allows connections to any of the peers at any of the ports.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct EgressRule {
    /// The ports. Empty: every port and protocol.
    pub ports: Vec<PolicyPort>,
    /// The peers. Empty: every destination.
    pub to: Vec<PolicyPeer>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json EgressRule { 1 ports optional, 2 to optional, ..unknown } }

/// A port or a range of ports of a rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct PolicyPort {
    /// The protocol; TCP by default.
    pub protocol: Protocol,
    /// A number, or a name that the receiving pod gives to one of its ports. `None`: all ports of the protocol.
    pub port: Option<IntOrString>,
    /// The last port of a range that starts at `port`, which is a number then.
    pub end_port: Option<u16>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json PolicyPort { 1 protocol optional, 2 port optional, 3 end_port optional, ..unknown } }

/// A peer of a rule: addresses, or pods.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct PolicyPeer {
    /// Pods of the policy's own namespace, or of those that `namespace_selector` selects.
    pub pod_selector: Option<LabelSelector>,
    /// The namespaces whose pods match: all of them, or those that `pod_selector` selects.
    pub namespace_selector: Option<LabelSelector>,
    /// The addresses. Excludes both selectors.
    pub ip_block: Option<IpBlock>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! {
    json PolicyPeer {
        1 pod_selector optional, 2 namespace_selector optional, 3 ip_block optional, ..unknown
    }
}

/// A range of addresses with exceptions.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IpBlock {
    /// The range.
    pub cidr: IpNet,
    /// Ranges within it that are excluded.
    #[serde(default)]
    pub except: Vec<IpNet>,
}
