//! Owner tables: what one node owns. One writer, a revision, and a signature that lets anybody
//! pass the table on and nobody change it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::id::{EndpointId, Mac, NetworkId, NodeId};
use crate::publish::Published;
use crate::record::Signature;

/// The state of a table: a later run of the owner, then a later change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Revision {
    /// The generation of the owner when it began this table anew.
    pub epoch: u64,
    /// Grows by one with each change.
    pub change: u64,
}

impl std::fmt::Display for Revision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.epoch, self.change)
    }
}

impl std::str::FromStr for Revision {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (epoch, change) = text.split_once('.').unwrap_or((text, ""));
        Ok(Self { epoch: epoch.parse()?, change: change.parse()? })
    }
}

/// An interface of a workload on a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Unique on its host.
    pub id: EndpointId,
    /// Unique on its network, among hosts that hear each other.
    pub name: String,
    /// The Kubernetes namespace, `default` unless given.
    pub namespace: String,
    /// What it is attached to.
    pub network: NetworkId,
    /// Of the interface inside the namespace.
    pub mac: Mac,
    /// Each with the length of its subnet, in the order of the network's subnets.
    pub addresses: Vec<IpNet>,
    /// More names that it answers to.
    pub aliases: Vec<String>,
    /// What selectors match; a v1 Pod of the same namespace and name may say more.
    pub labels: BTreeMap<String, String>,
    /// Services send it connections. Set by whoever attached it.
    pub ready: bool,
    /// Ports of its host that lead to it.
    pub publish: Vec<Published>,
}

impl Endpoint {
    /// The names and aliases in lower case: the form in which they are compared (RFC 4343).
    pub fn canonical_names(&self) -> impl Iterator<Item = String> {
        std::iter::once(&self.name).chain(&self.aliases).map(|name| name.to_ascii_lowercase())
    }
}

/// One thing that a node owns.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Entry {
    /// An interface of a workload.
    Endpoint(Endpoint),
    /// An address of one of the owner's blocks that another node may use: for `--ip`, and when no
    /// block is left to claim.
    Lease {
        /// The network.
        network: NetworkId,
        /// The address.
        address: IpAddr,
        /// Who may use it.
        to: NodeId,
    },
    /// The path to a peer carries less than the owner's link does.
    PathMtu {
        /// The peer.
        peer: NodeId,
        /// In bytes, the outer IP header included.
        mtu: u16,
    },
    /// A container engine of this host has the network among its own: it is not to be removed.
    Held(NetworkId),
    /// The owner answers for this address of a LoadBalancer on the underlay.
    Announced(IpAddr),
}

/// Which entry of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Key {
    /// [`Entry::Endpoint`].
    Endpoint(EndpointId),
    /// [`Entry::Lease`].
    Lease(NetworkId, IpAddr),
    /// [`Entry::PathMtu`].
    PathMtu(NodeId),
    /// [`Entry::Held`].
    Held(NetworkId),
    /// [`Entry::Announced`].
    Announced(IpAddr),
}

impl Entry {
    /// Its place in the table.
    pub fn key(&self) -> Key {
        match self {
            Self::Endpoint(endpoint) => Key::Endpoint(endpoint.id),
            Self::Lease { network, address, .. } => Key::Lease(*network, *address),
            Self::PathMtu { peer, .. } => Key::PathMtu(*peer),
            Self::Held(network) => Key::Held(*network),
            Self::Announced(address) => Key::Announced(*address),
        }
    }
}

/// What the owner signs (in [`crate::record::Domain::Table`], encoded as a body): enough to check
/// a whole table, whoever sent it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Whose table.
    pub owner: NodeId,
    /// Its state.
    pub revision: Revision,
    /// Of all entries, in two steps, so that a change of one costs little however many there are: the
    /// SHA-256 of each encoded entry belongs to the part that its first byte modulo [`Self::PARTS`]
    /// names; each part has the SHA-256 over its hashes in ascending order, or zeros if it has none;
    /// this is the SHA-256 over the parts.
    pub digest: [u8; 32],
}

impl Head {
    /// Into how many parts the entries fall for the digest.
    pub const PARTS: usize = 64;
}

/// A change of a table, or all of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Update {
    /// The state after the update.
    pub head: Head,
    /// Of `head`, by the owner.
    pub signature: Signature,
    /// The state that it applies to; nothing where it is the whole table.
    pub base: Option<Revision>,
    /// Entries to add or replace.
    pub set: Vec<Entry>,
    /// Entries to remove.
    pub unset: Vec<Key>,
}
