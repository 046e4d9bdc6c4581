//! Owner tables: what one host owns. A table has one writer, a revision, and a signature, so that any host can
//! forward it and none can change it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::id::{EndpointId, Mac, NetworkId, NodeId};
use crate::publish::Published;
use crate::record::Signature;
use crate::resource::Name;

/// The revision of a table, ordered by the owner's epoch, then by change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Revision {
    /// The generation of the owner when it started this epoch of the table.
    pub epoch: u64,
    /// The change number, which each change increments by one.
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

/// An endpoint: an interface of a workload on a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The id, unique on its host.
    pub id: EndpointId,
    /// The name, unique on its network among hosts that reach each other.
    pub name: String,
    /// The Kubernetes namespace; `default` by default.
    pub namespace: String,
    /// The network that it is attached to.
    pub network: NetworkId,
    /// The MAC address of the interface in the workload's namespace.
    pub mac: Mac,
    /// The addresses, each with the prefix length of its subnet, in the order of the network's subnets.
    pub addresses: Vec<IpNet>,
    /// Further names that resolve to it.
    pub aliases: Vec<String>,
    /// The labels that selectors match. The v1 Pod of the endpoint may add labels: see [`Self::pod_name`].
    pub labels: BTreeMap<String, String>,
    /// Whether Services send it connections. Set by the client that attached it.
    pub ready: bool,
    /// The published ports of its host.
    pub publish: Vec<Published>,
    /// Prefixes that it may send from, beside its own addresses: for VRRP, or for machines behind it. At most
    /// [`Self::MAX_ALLOWED`].
    pub allowed: Vec<IpNet>,
    /// MAC addresses that it may send from, beside its own. At most [`Self::MAX_ALLOWED_MACS`].
    pub allowed_macs: Vec<Mac>,
    /// The pod that it belongs to. `None` if no container runtime named one.
    #[serde(default)]
    pub pod: Option<PodIdentity>,
}

/// The pod of an endpoint, as its container runtime named it. Its namespace is that of the endpoint.
///
/// Several endpoints can have the same pod: one on each network, and those of an earlier sandbox of the pod, or of a
/// deleted pod of the same name, that was not detached yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodIdentity {
    /// The name. Several endpoints of a network can have it, while [`Endpoint::name`] is unique.
    pub name: String,
    /// The unique id that the Kubernetes API server gave the pod. Empty if the runtime did not say it.
    pub uid: String,
    /// When the pod's sandbox was attached, in milliseconds since 1970, and later than each sandbox of a pod of the same
    /// name that its host knew. All endpoints of a sandbox have the same value.
    pub created: u64,
}

impl Endpoint {
    /// The maximum number of allowed prefixes.
    pub const MAX_ALLOWED: usize = 64;
    /// The maximum number of allowed MAC addresses.
    pub const MAX_ALLOWED_MACS: usize = 16;

    /// Returns the names that may resolve to it in lower case, the form in which names are compared (RFC 4343): its
    /// name, its aliases and the name of its pod.
    pub fn canonical_names(&self) -> impl Iterator<Item = String> {
        let pod = self.pod.as_ref().map(|pod| &pod.name);
        std::iter::once(&self.name).chain(&self.aliases).chain(pod).map(|name| name.to_ascii_lowercase())
    }

    /// Returns the namespace and name of the v1 Pod that describes it. Without a [`Self::pod`], its own name is the
    /// Pod's.
    pub fn pod_name(&self) -> Name {
        Name::new(&self.namespace, self.pod.as_ref().map_or(&self.name, |pod| &pod.name))
    }

    /// Returns the single addresses in [`Self::allowed`].
    pub fn allowed_addresses(&self) -> impl Iterator<Item = IpAddr> {
        let single = self.allowed.iter().filter(|prefix| prefix.prefix_len() == prefix.max_prefix_len());
        single.map(IpNet::addr)
    }
}

/// An entry of an owner table.
#[allow(clippy::large_enum_variant, reason = "almost all entries are endpoints")]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Entry {
    /// An endpoint.
    Endpoint(Endpoint),
    /// A lease: an address of one of the owner's blocks that another host may use, for `--ip` and when no block is
    /// free.
    Lease {
        /// The network.
        network: NetworkId,
        /// The address.
        address: IpAddr,
        /// The host that may use it.
        to: NodeId,
    },
    /// The path MTU to a peer, if it is less than the MTU of the owner's link.
    PathMtu {
        /// The peer.
        peer: NodeId,
        /// The path MTU in bytes, including the outer IP header.
        mtu: u16,
    },
    /// A container engine of the owner refers to the network, so it must not be deleted.
    Held(NetworkId),
    /// The owner announces this address of a LoadBalancer on the underlay.
    Announced(IpAddr),
}

/// The key of an entry.
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
    /// Returns the key of the entry.
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

/// The part of a table that the owner signs (in [`crate::record::Domain::Table`], encoded as a body). It suffices to
/// verify a whole table from any sender.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The owner of the table.
    pub owner: NodeId,
    /// The revision of the table.
    pub revision: Revision,
    /// The digest of all entries, in two steps, so that its update after a change does not depend on the number of
    /// entries. The SHA-256 of each encoded entry belongs to the part that its first byte modulo [`Self::PARTS`]
    /// selects. The hash of a part is the SHA-256 of its entries' hashes in ascending order, or zeros if the part is
    /// empty. The digest is the SHA-256 of the hashes of the parts.
    pub digest: [u8; 32],
}

impl Head {
    /// The number of parts of the digest.
    pub const PARTS: usize = 64;
}

/// An update of a table: a change, or the whole table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Update {
    /// The head after the update.
    pub head: Head,
    /// The owner's signature of `head`.
    pub signature: Signature,
    /// The revision that the update applies to. `None` if it is the whole table.
    pub base: Option<Revision>,
    /// Entries to add or replace.
    pub set: Vec<Entry>,
    /// Entries to remove.
    pub unset: Vec<Key>,
}
