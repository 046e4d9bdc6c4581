//! Owner tables: what one host owns. A table has one writer, a revision, and a signature, so that any host can
//! forward it and none can change it.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::de::Error as _;
use serde::ser::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::fields;
use crate::id::{EndpointId, Mac, NetworkId, NodeId};
use crate::publish::Published;
use crate::record::Signature;
use crate::resource::{Labels, Name, Pod};
use crate::wire::fields::{Unknown, deserialize_numbered, serialize_numbered};
use crate::wire::{self, Bytes, WireError};

/// The revision of a table, ordered by the owner's epoch, then by change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Eq)]
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
    pub labels: Labels,
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
    /// Boxed, because most endpoints of a cluster without pods have none.
    pub pod: Option<Box<PodIdentity>>,
    /// The multicast groups that it has joined and that its host follows ([`is_followed`]), in ascending order, at most
    /// [`Self::MAX_GROUPS`]. `None` if its host does not follow them: it then gets the packets of all groups.
    pub groups: Option<Vec<IpAddr>>,
    /// What the Kubernetes API server of this host's node says of the pod: its labels, named ports, phase and readiness.
    /// `None`: nothing is known from there, and a v1 Pod of the cluster may describe it. Boxed, as [`Self::pod`].
    pub described: Option<Box<Pod>>,
    /// Fields that this release does not know.
    pub unknown: Unknown,
}

fields! {
    Endpoint {
        1 id, 2 name, 3 namespace, 4 network, 5 mac, 6 addresses, 7 aliases optional, 8 labels optional, 9 ready,
        10 publish optional, 11 allowed optional, 12 allowed_macs optional, 13 pod optional, 14 groups optional,
        15 described optional, ..unknown
    }
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

/// Returns the canonical form of a name of an endpoint or a network: lower case (RFC 4343), without dots at the end. Names
/// with the same canonical form are one name in DNS.
///
/// A host of an earlier release may have names with dots at the end.
pub fn canonical_name(name: &str) -> String {
    name.trim_end_matches('.').to_ascii_lowercase()
}

/// Whether hosts follow who has joined a group of a switched network. What is sent to any other group goes to all hosts
/// with endpoints there: the groups of the link that no switch may follow (RFC 4541, section 2.1.2: 224.0.0.0/24; section
/// 3: ff02::1), those of the interface, which are not sent at all, and those of neighbour discovery (ff02::1:ff00:0/104),
/// without which an endpoint cannot be reached.
pub fn is_followed(group: IpAddr) -> bool {
    match group {
        IpAddr::V4(group) => group.is_multicast() && !matches!(group.octets(), [224, 0, 0, _]),
        IpAddr::V6(group) => {
            let scope = group.octets()[1] & 0xf;
            let solicited = matches!(group.segments(), [0xff02, 0, 0, 0, 0, 1, 0xff00..=0xffff, _]);
            let all_nodes = matches!(group.segments(), [0xff02, 0, 0, 0, 0, 0, 0, 1]);
            group.is_multicast() && scope > 1 && !solicited && !all_nodes
        }
    }
}

/// Whether two names have the same [`canonical_name`].
pub fn is_same_name(one: &str, other: &str) -> bool {
    one.trim_end_matches('.').eq_ignore_ascii_case(other.trim_end_matches('.'))
}

impl Endpoint {
    /// The maximum number of allowed prefixes.
    pub const MAX_ALLOWED: usize = 64;
    /// The maximum number of allowed MAC addresses.
    pub const MAX_ALLOWED_MACS: usize = 16;
    /// The maximum number of multicast groups.
    pub const MAX_GROUPS: usize = 256;

    /// Returns the names that may resolve to it in their canonical form: its name, its aliases and the name of its pod.
    pub fn canonical_names(&self) -> impl Iterator<Item = String> {
        let pod = self.pod.as_ref().map(|pod| &pod.name);
        std::iter::once(&self.name).chain(&self.aliases).chain(pod).map(|name| canonical_name(name))
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
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// The owner does not reach this host directly, although it is alive.
    Unreached(NodeId),
    /// An entry that this release does not understand. It is kept and passed on, and has no effect.
    Opaque(Opaque),
}

/// An entry that this release does not understand: of an unknown kind, or with a content that it must not act on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Opaque {
    /// The key.
    pub key: Key,
    /// The encoded content.
    pub content: Vec<u8>,
}

impl Opaque {
    /// Returns why the entry is not understood.
    pub fn why(&self) -> String {
        let (kind, ..) = self.key.encoded();
        match content_of(self.key, &self.content) {
            Some(Err(WireError::NotUnderstood(what))) => what,
            Some(Err(error)) => format!("the content of table entries of kind {kind} ({error})"),
            Some(Ok(_)) | None => format!("table entries of kind {kind}"),
        }
    }
}

/// The key of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
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
    /// [`Entry::Unreached`].
    Unreached(NodeId),
    /// An entry of a kind that this release does not know.
    Unknown(UnknownKey),
}

/// The key of an entry of an unknown kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnknownKey {
    kind: u32,
    length: u8,
    /// The encoded key, then zeros.
    bytes: [u8; Key::MAX_BYTES],
}

/// The numbers of the kinds of entries.
mod kind {
    pub(super) const ENDPOINT: u32 = 1;
    pub(super) const LEASE: u32 = 2;
    pub(super) const PATH_MTU: u32 = 3;
    pub(super) const HELD: u32 = 4;
    pub(super) const ANNOUNCED: u32 = 5;
    pub(super) const UNREACHED: u32 = 6;
}

impl Key {
    /// The maximum size of an encoded key, of any kind and in any release.
    pub const MAX_BYTES: usize = 32;

    /// Returns the number of the kind, and the encoded key.
    fn encoded(&self) -> (u32, Vec<u8>) {
        // Keys have a fixed shape that can always be encoded.
        let bytes = |value: Result<Vec<u8>, WireError>| value.unwrap_or_default();
        match self {
            Self::Endpoint(id) => (kind::ENDPOINT, bytes(wire::encode_body(id))),
            Self::Lease(network, address) => (kind::LEASE, bytes(wire::encode_body(&(network, address)))),
            Self::PathMtu(peer) => (kind::PATH_MTU, bytes(wire::encode_body(peer))),
            Self::Held(network) => (kind::HELD, bytes(wire::encode_body(network))),
            Self::Announced(address) => (kind::ANNOUNCED, bytes(wire::encode_body(address))),
            Self::Unreached(peer) => (kind::UNREACHED, bytes(wire::encode_body(peer))),
            Self::Unknown(UnknownKey { kind, length, bytes }) => {
                (*kind, bytes.get(..usize::from(*length)).unwrap_or_default().to_vec())
            }
        }
    }

    fn decode(number: u32, bytes: &[u8]) -> Result<Self, WireError> {
        Ok(match number {
            kind::ENDPOINT => Self::Endpoint(wire::decode_body(bytes)?),
            kind::LEASE => {
                let (network, address) = wire::decode_body(bytes)?;
                Self::Lease(network, address)
            }
            kind::PATH_MTU => Self::PathMtu(wire::decode_body(bytes)?),
            kind::HELD => Self::Held(wire::decode_body(bytes)?),
            kind::ANNOUNCED => Self::Announced(wire::decode_body(bytes)?),
            kind::UNREACHED => Self::Unreached(wire::decode_body(bytes)?),
            _ => Self::Unknown(UnknownKey::new(number, bytes)?),
        })
    }
}

impl UnknownKey {
    fn new(kind: u32, key: &[u8]) -> Result<Self, WireError> {
        let mut bytes = [0; Key::MAX_BYTES];
        match bytes.get_mut(..key.len()) {
            Some(place) => place.copy_from_slice(key),
            None => return Err(WireError::Malformed("a key of a table entry that is too long".to_owned())),
        }
        Ok(Self { kind, length: u8::try_from(key.len()).unwrap_or(u8::MAX), bytes })
    }
}

impl Serialize for Key {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (number, bytes) = self.encoded();
        serialize_numbered(number, Ok(bytes), serializer)
    }
}

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (number, bytes) = deserialize_numbered(deserializer)?;
        Self::decode(number, bytes).map_err(D::Error::custom)
    }
}

/// Decodes the content of an entry; `None` if its kind is unknown.
fn content_of(key: Key, content: &[u8]) -> Option<Result<Entry, WireError>> {
    Some(match key {
        Key::Endpoint(id) => wire::decode_body(content).and_then(|endpoint: Endpoint| {
            if endpoint.id == id {
                Ok(Entry::Endpoint(endpoint))
            } else {
                Err(WireError::Malformed("an endpoint with the key of another one".to_owned()))
            }
        }),
        Key::Lease(network, address) => {
            wire::decode_body(content).map(|to| Entry::Lease { network, address, to })
        }
        Key::PathMtu(peer) => wire::decode_body(content).map(|mtu| Entry::PathMtu { peer, mtu }),
        Key::Held(network) => wire::decode_body(content).map(|()| Entry::Held(network)),
        Key::Announced(address) => wire::decode_body(content).map(|()| Entry::Announced(address)),
        Key::Unreached(peer) => wire::decode_body(content).map(|()| Entry::Unreached(peer)),
        Key::Unknown(_) => return None,
    })
}

/// An entry is its kind, its key and its content: what does not know the kind can still replace and remove it.
impl Serialize for Entry {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (number, key) = self.key().encoded();
        let content = match self {
            Self::Endpoint(endpoint) => wire::encode_body(endpoint),
            Self::Lease { to, .. } => wire::encode_body(to),
            Self::PathMtu { mtu, .. } => wire::encode_body(mtu),
            Self::Held(_) | Self::Announced(_) | Self::Unreached(_) => Ok(Vec::new()),
            Self::Opaque(opaque) => {
                return (number, Bytes(&key), Bytes(&opaque.content)).serialize(serializer);
            }
        };
        (number, Bytes(&key), Bytes(&content.map_err(S::Error::custom)?)).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (number, key, content): (u32, &'de [u8], &'de [u8]) = Deserialize::deserialize(deserializer)?;
        let key = Key::decode(number, key).map_err(D::Error::custom)?;
        Ok(match content_of(key, content) {
            Some(Ok(entry)) => entry,
            Some(Err(_)) | None => Self::Opaque(Opaque { key, content: content.to_vec() }),
        })
    }
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
            Self::Unreached(peer) => Key::Unreached(*peer),
            Self::Opaque(opaque) => opaque.key,
        }
    }
}

/// The part of a table that the owner signs (in [`crate::record::Domain::Table`], encoded as a body). It suffices to
/// verify a whole table from any sender.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// When this revision was written by the owner's clock, in milliseconds since 1970: others see by it how long changes take.
    /// `None`: the owner does not say it.
    pub written_ms: Option<u64>,
    /// Fields that this release does not know.
    pub unknown: Unknown,
}

fields! { Head { 1 owner, 2 revision, 3 digest, 4 written_ms optional, ..unknown } }

impl Head {
    /// The number of parts of the digest.
    pub const PARTS: usize = 64;
}

/// An update of a table: a change, or the whole table.
#[derive(Debug, Clone, PartialEq, Eq)]
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

fields! { Update { 1 head, 2 signature, 3 base optional, 4 set optional, 5 unset optional } }
