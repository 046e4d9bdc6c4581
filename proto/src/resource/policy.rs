//! networking.k8s.io/v1 NetworkPolicy, in full.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{IntOrString, LabelSelector, Meta, Protocol};

/// networking.k8s.io/v1 NetworkPolicy.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetworkPolicy {
    /// The policy selects pods of its own namespace.
    pub metadata: Meta,
    /// What was asked for.
    pub spec: PolicySpec,
}

/// What was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicySpec {
    /// Whom it isolates; without requirements every pod of the namespace.
    pub pod_selector: LabelSelector,
    /// In which directions. In the cluster always filled in: what the manifest says, or ingress, and egress where
    /// there are rules for it.
    pub policy_types: Vec<PolicyType>,
    /// What may come in; nothing may where there are no rules and `policy_types` names the direction.
    pub ingress: Vec<IngressRule>,
    /// What may go out.
    pub egress: Vec<EgressRule>,
}

/// A direction, as the selected pod sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PolicyType {
    /// To it.
    Ingress,
    /// From it.
    Egress,
}

/// What may come in: from any of the peers, to any of the ports.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct IngressRule {
    /// None: every port and protocol.
    pub ports: Vec<PolicyPort>,
    /// None: everybody.
    pub from: Vec<PolicyPeer>,
}

/// What may go out: to any of the peers, at any of the ports.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EgressRule {
    /// None: every port and protocol.
    pub ports: Vec<PolicyPort>,
    /// None: everybody.
    pub to: Vec<PolicyPeer>,
}

/// Ports.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyPort {
    /// TCP unless given.
    pub protocol: Protocol,
    /// A number, or a name that the receiving pod gives to one of its ports. Nothing: all of the protocol.
    pub port: Option<IntOrString>,
    /// All from `port`, a number then, to this one.
    pub end_port: Option<u16>,
}

/// Whom a rule is about: addresses, or pods.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyPeer {
    /// Pods of the policy's own namespace, or of those that `namespace_selector` selects.
    pub pod_selector: Option<LabelSelector>,
    /// All pods of these namespaces, or those of them that `pod_selector` selects.
    pub namespace_selector: Option<LabelSelector>,
    /// Addresses; neither selector stands beside it.
    pub ip_block: Option<IpBlock>,
}

/// Addresses.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct IpBlock {
    /// The range.
    pub cidr: IpNet,
    /// Ranges within it that do not belong to it.
    #[serde(default)]
    pub except: Vec<IpNet>,
}
