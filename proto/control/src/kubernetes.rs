//! The parts of requests and replies with which `ovl-kube` hands on what a Kubernetes API server has.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use ovl_proto::id::NodeId;
use ovl_proto::resource::{Kind, Name, ResourceKey, Source};

/// A request to take over objects of a Kubernetes API server: the staged documents, each as the server has it, and what
/// was deleted there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mirror {
    /// The Kubernetes cluster: see [`Source::cluster`].
    pub cluster: String,
    /// The kinds of which the staged documents are all objects. Mirrored objects of such a kind that are not among them
    /// were deleted.
    #[serde(default)]
    pub listed: Vec<ListedKind>,
    /// Objects that were deleted.
    #[serde(default)]
    pub deleted: Vec<DeletedObject>,
    /// Objects that cannot be handed on.
    #[serde(default)]
    pub failed: Vec<NotMirrored>,
}

/// A kind that was listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListedKind {
    /// The kind.
    pub kind: Kind,
    /// The API's `resourceVersion` of the list.
    pub version: u64,
}

/// An object that was deleted at the API server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeletedObject {
    /// The object.
    pub key: ResourceKey,
    /// The API's `resourceVersion` of the deletion.
    pub version: u64,
}

/// A request about the pods of this host's node: the staged documents are v1 Pods as the API server has them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodePods {
    /// Whether the documents are all pods of the node.
    pub whole: bool,
    /// Pods that were deleted.
    #[serde(default)]
    pub deleted: Vec<DeletedPod>,
}

/// A pod that was deleted at the API server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeletedPod {
    /// The namespace.
    pub namespace: String,
    /// The name.
    pub name: String,
    /// The unique id: another pod may have the name by now.
    pub uid: String,
}

/// What `ovl-kube` says of itself while it keeps the connection of its request.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MirrorOffer {
    /// Why it does not reach the API server. `None`: it does, and can mirror its objects.
    #[serde(default)]
    pub unreachable: Option<String>,
    /// What it cannot follow although it reaches the API server. `None`: it follows everything.
    #[serde(default)]
    pub trouble: Option<String>,
}

/// The result of [`crate::Request::Mirror`] and [`crate::Request::NodePods`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mirrored {
    /// How many objects were written or deleted.
    pub changed: usize,
    /// How many were passed over, because a later state of them is known.
    pub stale: usize,
    /// The objects that are not in force as the API server has them. They are tried again if they are sent again.
    pub failed: Vec<NotMirrored>,
}

/// An object that is not in force as the API server has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotMirrored {
    /// The object.
    pub key: ResourceKey,
    /// Why, and what to do.
    pub reason: String,
}

/// Hosts to join through.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Join {
    /// The addresses of hosts that may be members, at most [`Self::MOST`].
    pub hosts: Vec<IpAddr>,
    /// Whether this host is to begin a new cluster, if it is in none.
    #[serde(default)]
    pub begin: bool,
}

impl Join {
    /// How many hosts are named at most: one that is a member is enough.
    pub const MOST: usize = 16;
}

/// The Nodes of an API server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Nodes {
    /// The names of all Node objects.
    pub names: BTreeSet<String>,
}

/// What an API server has of the Node of this host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OwnNode {
    /// The zone that it is in. Empty: none is named.
    #[serde(default)]
    pub zone: String,
    /// The blocks of addresses that the API server gives to its pods (`spec.podCIDRs`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pod_cidrs: Vec<IpNet>,
}

/// What ovld has to say to the API server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApiReport {
    /// Why new pods of this host would fail, in a sentence. `None`: they would not.
    pub unready: Option<String>,
    /// The addresses of LoadBalancers. `None`: another host says them.
    pub balanced: Option<Balanced>,
    /// The id of this host, if it is in no cluster and is to join through the Nodes: see [`crate::Request::Join`].
    pub seeks: Option<NodeId>,
}

/// The addresses of the Services of type LoadBalancer that ovl serves.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balanced {
    /// The pools of which ovl gives addresses. Whatever is not in one was written by another program.
    pub pools: Vec<IpNet>,
    /// The Services, by namespace and name.
    pub services: Vec<BalancedService>,
}

/// A Service of type LoadBalancer that ovl serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalancedService {
    /// The Service.
    pub name: Name,
    /// The API's `resourceVersion` of the state for which these are its addresses.
    pub version: u64,
    /// Its addresses of the pool. Empty if none is free.
    pub addresses: Vec<IpAddr>,
}

/// Where a mirrored object comes from, as `ovlctl get -o json` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceInfo {
    /// The Kubernetes cluster: see [`Source::cluster`].
    pub cluster: String,
    /// The API's `resourceVersion`, as text, as in Kubernetes.
    pub version: String,
}

impl From<&Source> for SourceInfo {
    fn from(source: &Source) -> Self {
        Self { cluster: source.cluster.clone(), version: source.version.to_string() }
    }
}
