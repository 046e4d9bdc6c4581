//! policy.networking.k8s.io/v1alpha2 ClusterNetworkPolicy, all fields.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::{LabelSelector, Meta};
use crate::fields;
use crate::wire::fields::Unknown;

/// policy.networking.k8s.io/v1alpha2 ClusterNetworkPolicy: rules of the administrator about pods of all namespaces.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct ClusterNetworkPolicy {
    /// The metadata.
    pub metadata: Meta,
    /// The desired state.
    pub spec: ClusterPolicySpec,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json ClusterNetworkPolicy { 1 metadata optional, 2 spec optional, ..unknown } }

/// The specification of a ClusterNetworkPolicy.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct ClusterPolicySpec {
    /// Whether it decides before or after the NetworkPolicies. In the cluster it is always given.
    pub tier: Option<Tier>,
    /// The precedence among the policies of its tier, from 0 to 1000: the lowest number decides first. In the cluster it is
    /// always given.
    pub priority: Option<u16>,
    /// The pods that it is about.
    pub subject: PolicySubject,
    /// The rules about connections to these pods, of which the first that fits decides.
    pub ingress: Vec<ClusterIngressRule>,
    /// The rules about connections from these pods, of which the first that fits decides.
    pub egress: Vec<ClusterEgressRule>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! {
    json ClusterPolicySpec {
        1 tier optional, 2 priority optional, 3 subject optional, 4 ingress optional, 5 egress optional, ..unknown
    }
}

/// The place of a ClusterNetworkPolicy beside the NetworkPolicies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Tier {
    /// Before them, which cannot override it.
    Admin,
    /// After them: for pods that no NetworkPolicy isolates.
    Baseline,
}

impl std::fmt::Display for Tier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Admin => "Admin",
            Self::Baseline => "Baseline",
        })
    }
}

/// What a rule of a ClusterNetworkPolicy does with a connection that fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum RuleAction {
    /// Allows it. No further policy is asked.
    Accept,
    /// Refuses it. No further policy is asked.
    Deny,
    /// Leaves the decision to the next tier.
    Pass,
}

impl std::fmt::Display for RuleAction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Accept => "Accept",
            Self::Deny => "Deny",
            Self::Pass => "Pass",
        })
    }
}

/// The pods that a ClusterNetworkPolicy is about. One of the fields is given.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct PolicySubject {
    /// All pods of these namespaces.
    pub namespaces: Option<LabelSelector>,
    /// Some pods of some namespaces.
    pub pods: Option<NamespacedPod>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json PolicySubject { 1 namespaces optional, 2 pods optional, ..unknown } }

/// Pods of some namespaces.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct NamespacedPod {
    /// The namespaces. Without requirements: all.
    pub namespace_selector: LabelSelector,
    /// The pods of these namespaces. Without requirements: all.
    pub pod_selector: LabelSelector,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json NamespacedPod { 1 namespace_selector optional, 2 pod_selector optional, ..unknown } }

/// An ingress rule of a ClusterNetworkPolicy.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct ClusterIngressRule {
    /// The name of the rule, for messages. May be empty.
    pub name: String,
    /// What it does. In the cluster it is always given.
    pub action: Option<RuleAction>,
    /// The sources, at least one.
    pub from: Vec<ClusterPeer>,
    /// The protocols and ports. Empty: all.
    pub protocols: Vec<ClusterProtocol>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! {
    json ClusterIngressRule { 1 name optional, 2 action optional, 3 from optional, 4 protocols optional, ..unknown }
}

/// An egress rule of a ClusterNetworkPolicy.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct ClusterEgressRule {
    /// The name of the rule, for messages. May be empty.
    pub name: String,
    /// What it does. In the cluster it is always given.
    pub action: Option<RuleAction>,
    /// The destinations, at least one.
    pub to: Vec<ClusterPeer>,
    /// The protocols and ports. Empty: all.
    pub protocols: Vec<ClusterProtocol>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! {
    json ClusterEgressRule { 1 name optional, 2 action optional, 3 to optional, 4 protocols optional, ..unknown }
}

/// A peer of a rule. One of the fields is given. If there is none that ovl acts on, the rule *fails closed*: with `Accept`
/// it fits nothing by this peer, with another action it is a rule that denies everything.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct ClusterPeer {
    /// All pods of these namespaces.
    pub namespaces: Option<LabelSelector>,
    /// Some pods of some namespaces.
    pub pods: Option<NamespacedPod>,
    /// Addresses, of egress rules only.
    pub networks: Vec<IpNet>,
    /// Nodes, of egress rules only: their addresses. Without requirements: all. While no Node is known, the rule fails
    /// closed.
    pub nodes: Option<LabelSelector>,
    /// Names of the DNS, of egress rules with the action `Accept` only: `www.example.com`, or `*.example.com` for the names below
    /// it. They stand for the addresses that the workloads were told for them.
    pub domain_names: Vec<String>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! {
    json ClusterPeer {
        1 namespaces optional, 2 pods optional, 3 networks optional, 4 nodes optional, 5 domain_names optional, ..unknown
    }
}

/// A protocol of a rule. One of the fields is given.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct ClusterProtocol {
    /// TCP.
    pub tcp: Option<ClusterPorts>,
    /// UDP.
    pub udp: Option<ClusterPorts>,
    /// SCTP.
    pub sctp: Option<ClusterPorts>,
    /// The name of a port of the receiving pod, whose protocol counts. May be empty: not given.
    pub destination_named_port: String,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! {
    json ClusterProtocol {
        1 tcp optional, 2 udp optional, 3 sctp optional, 4 destination_named_port optional, ..unknown
    }
}

/// The ports of a protocol.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct ClusterPorts {
    /// The destination port.
    pub destination_port: Option<ClusterPort>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json ClusterPorts { 1 destination_port optional, ..unknown } }

/// A port or a range of ports. One of the fields is given.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct ClusterPort {
    /// A port; 0 if not given.
    pub number: u16,
    /// Several ports.
    pub range: Option<PortRange>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json ClusterPort { 1 number optional, 2 range optional, ..unknown } }

/// The ports from one to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PortRange {
    /// The first port.
    pub start: u16,
    /// The last port.
    pub end: u16,
}
