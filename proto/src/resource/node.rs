//! v1 Node: the labels and addresses by which ClusterNetworkPolicies name nodes as peers.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::Meta;
use crate::fields;
use crate::wire::fields::Unknown;

/// v1 Node. A member of the cluster need not have one, and it need not be of a member.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct NodeObject {
    /// The metadata. Policies select a node by its labels.
    pub metadata: Meta,
    /// The status, as given in the manifest.
    pub status: NodeStatus,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json NodeObject { 1 metadata optional, 2 status optional, ..unknown } }

/// The status of a Node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct NodeStatus {
    /// Its addresses. In the cluster there are no names among them.
    pub addresses: Vec<NodeAddress>,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json NodeStatus { 1 addresses optional, ..unknown } }

/// An address of a Node.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(remote = "Self", rename_all = "camelCase", default)]
pub struct NodeAddress {
    /// What it is for: `InternalIP`, `ExternalIP` or a name.
    #[serde(rename = "type")]
    pub kind: String,
    /// The address, or the name.
    pub address: String,
    /// Fields that this release does not know.
    #[serde(skip)]
    pub unknown: Unknown,
}

fields! { json NodeAddress { 1 kind optional, 2 address optional, ..unknown } }

impl NodeAddress {
    /// Returns the address. `None` if it is a name.
    pub fn ip(&self) -> Option<IpAddr> {
        self.address.parse::<IpAddr>().ok().map(|address| address.to_canonical())
    }
}
