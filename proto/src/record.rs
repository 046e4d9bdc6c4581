//! The host record: what every host must know of every other, in one small signed value that travels in gossip.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::fields;
use crate::id::{ClusterKeyId, NetworkId, NodeId, TunnelKey};
use crate::wire::fields::{Reader, Unknown};
use crate::wire::{self, WireError};

/// An Ed25519 public key.
pub type PublicKey = [u8; 32];

/// The purpose of a signature, so that a signature made for one purpose is invalid for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Domain {
    /// A host record.
    Record,
    /// The head of an owner table.
    Table,
    /// A cluster object.
    Object,
    /// The handshake of a stream.
    Stream,
    /// A statement of a host in gossip: that it is alive, and its hints.
    Statement,
    /// A vote for an allocation map: see [`crate::alloc::Statement`].
    Map,
    /// A consent to a recovery: see [`crate::alloc::Recovery`].
    Recovery,
}

impl Domain {
    /// Returns the bytes to sign: a label that ends in a zero byte, then the message.
    pub fn message(self, body: &[u8]) -> Vec<u8> {
        let label: &[u8] = match self {
            Self::Record => b"ovl record v1\0",
            Self::Table => b"ovl table v1\0",
            Self::Object => b"ovl object v1\0",
            Self::Stream => b"ovl stream v1\0",
            Self::Statement => b"ovl statement v1\0",
            Self::Map => b"ovl map v1\0",
            Self::Recovery => b"ovl recovery v1\0",
        };
        [label, body].concat()
    }
}

/// An Ed25519 signature (RFC 8032).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Signature(pub [u8; 64]);

impl std::fmt::Debug for Signature {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Signature(..)")
    }
}

impl Serialize for Signature {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.0)
    }
}

impl<'de> Deserialize<'de> for Signature {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = Vec::<u8>::deserialize(deserializer)?;
        let length = bytes.len();
        bytes
            .try_into()
            .map(Self)
            .map_err(|_| serde::de::Error::invalid_length(length, &"the 64 bytes of a signature"))
    }
}

/// The presence that a host states in its record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Presence {
    /// The daemon is running.
    Running,
    /// The daemon is restarting. Its kernel goes on forwarding, so its entries stay in use.
    Restarting,
    /// The host left by `ovlctl leave` or `teardown`. Its entries are withdrawn at once.
    Left,
}

/// How peers reach the tunnel of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tunnel {
    /// The public tunnel key.
    pub key: TunnelKey,
    /// The UDP port at the VTEP's address. It is even in even key epochs.
    pub port: u16,
    /// The key epoch. It counts the rotations of any host's tunnel key.
    pub epoch: u32,
    /// Whether the WireGuard interface of the previous key epoch still exists.
    pub rotating: bool,
    /// Whether the kernel's WireGuard encrypts; else ovld itself does. Both speak the same protocol.
    pub kernel: bool,
}

/// The maximum number of cluster keys that a host opens with, other than the one that it seals with.
pub const MAX_OTHER_KEYS: usize = 2;

/// Bits of [`NodeRecord::probe_kinds`].
pub mod probe_kinds {
    /// Probes of directly routed paths.
    pub const DIRECT: u8 = 1;
    /// Probes of the offload of checksums in VXLAN.
    pub const OFFLOAD: u8 = 2;
}

/// The maximum length of [`NodeRecord::further`].
pub const MAX_FURTHER: usize = 4;

/// The maximum length of [`NodeRecord::not_built`].
pub const MAX_NOT_BUILT: usize = 4;

/// The maximum length of the name of a zone in bytes: that of the value of a label, such as
/// `topology.kubernetes.io/zone` of a Node.
pub const MAX_ZONE: usize = 63;

/// Whether a text is the name of a zone: empty, or letters, digits, dots, underscores and hyphens.
pub fn is_zone(text: &str) -> bool {
    text.len() <= MAX_ZONE && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
}

/// The first bytes of the address that only names a host, within `fd00::/8` (RFC 4193).
const NAME_PREFIX: [u8; 6] = *b"\xfdovlid";

/// The address by which a host is known that has none which others can dial, because it is behind NAT. No packet is sent to it.
pub fn name_address(host: NodeId) -> Ipv6Addr {
    let mut bytes = [0; 16];
    bytes.iter_mut().zip(NAME_PREFIX.iter().chain(&host.0)).for_each(|(to, from)| *to = *from);
    bytes.into()
}

/// The host that an address only names. `None` if packets can be sent to the address.
pub fn named_by(address: IpAddr) -> Option<NodeId> {
    let IpAddr::V6(v6) = address else { return None };
    let bytes = v6.octets();
    let (prefix, id) = bytes.split_first_chunk()?;
    (*prefix == NAME_PREFIX).then_some(NodeId(*id.first_chunk()?))
}

/// The cluster keys of a host.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ClusterKeys {
    /// The key that it seals with.
    pub seals: ClusterKeyId,
    /// The other keys that it opens with, at most [`MAX_OTHER_KEYS`]. Empty unless a rotation is in progress.
    pub opens: Vec<ClusterKeyId>,
}

impl ClusterKeys {
    /// Whether the host can open what is sealed with a key.
    pub fn has(&self, key: ClusterKeyId) -> bool {
        self.seals == key || self.opens.contains(&key)
    }
}

/// The wire versions that a host speaks: see [`wire::VERSION`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireVersions {
    /// The oldest one.
    pub oldest: u8,
    /// The newest one, not below the oldest.
    pub newest: u8,
}

impl WireVersions {
    /// Returns those of this daemon.
    pub fn own() -> Self {
        Self { oldest: wire::version(), newest: wire::version() }
    }

    /// Whether there is a version that both sides speak.
    pub fn overlap(self, other: Self) -> bool {
        self.oldest <= other.newest && other.oldest <= self.newest
    }
}

impl std::fmt::Display for WireVersions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.oldest == self.newest {
            write!(f, "{}", self.newest)
        } else {
            write!(f, "{} to {}", self.oldest, self.newest)
        }
    }
}

/// A host's statement about itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeRecord {
    /// The hash of `public_key`: see [`NodeId`].
    pub id: NodeId,
    /// The key that verifies the signatures of this record and of the host's table and objects.
    pub public_key: PublicKey,
    /// The host's name, unique in a correctly configured cluster.
    pub name: String,
    /// The generation, which grows with every start and every change of address. The highest one is current.
    pub generation: u64,
    /// The revision, which grows with every change of the record within a generation.
    pub revision: u64,
    /// The number of the cluster that admitted it; 0 before admission.
    pub cluster: u64,
    /// The address of gossip and streams. See [`name_address`] for a host behind NAT.
    pub address: SocketAddr,
    /// The VTEP: the source and destination address of its VXLAN packets.
    pub vtep: IpAddr,
    /// The UDP port of its VXLAN device.
    pub vxlan_port: u16,
    /// The MTU of the link that holds `vtep`, in bytes.
    pub link_mtu: u16,
    /// The tunnel. A host without one takes no part in encrypted networks.
    pub tunnel: Option<Tunnel>,
    /// See [`ClusterKeys`].
    pub keys: ClusterKeys,
    /// See [`Presence`].
    pub presence: Presence,
    /// The release of its ovld.
    pub version: String,
    /// The wire versions that it speaks.
    pub wire: WireVersions,
    /// The version of the path probes that it sends and answers; 0 if it does neither.
    pub probes: u8,
    /// Networks in which it has endpoints and that it does not build, because they cover addresses that it needs: at most
    /// [`MAX_NOT_BUILT`].
    pub not_built: Vec<NetworkId>,
    /// The kinds of path probes that it sends and answers beside those of [`Self::probes`]: bits of [`probe_kinds`].
    pub probe_kinds: u8,
    /// The TCP port of its metrics at the IP address of [`Self::address`]; 0 if other hosts cannot read them there.
    pub metrics_port: u16,
    /// The zone that it is in, as its configuration says; empty: none. At most [`MAX_ZONE`] bytes.
    pub zone: String,
    /// Whether its `ovl-kube` reaches a Kubernetes API server, so that it can mirror that server's objects.
    pub mirrors: bool,
    /// Whether the host is a Node of a Kubernetes API server, which says who is a member: a lost host is forgotten when its
    /// Node object is deleted.
    pub is_node: bool,
    /// The UDP port of relayed datagrams at the VTEP's address; 0 if it neither sends nor takes them.
    pub relay_port: u16,
    /// Whether it passes datagrams on between hosts that do not reach each other.
    pub relays: bool,
    /// Further addresses of gossip and streams, of either family, at which others can dial it: at most [`MAX_FURTHER`]. Some may not
    /// be its own, as a forwarded port. Its relayed datagrams are at the same IP addresses. Empty for a host behind NAT.
    pub further: Vec<SocketAddr>,
    /// Fields that this release does not know.
    pub unknown: Unknown,
}

fields! {
    NodeRecord {
        1 id, 2 public_key, 3 name, 4 generation, 5 revision, 6 cluster, 7 address, 8 version, 9 wire, 10 vtep,
        11 vxlan_port, 12 link_mtu, 13 tunnel optional, 14 keys, 15 presence, 16 probes optional,
        17 not_built optional, 18 probe_kinds optional, 19 metrics_port optional, 20 zone optional,
        21 mirrors optional,
        22 is_node optional,
        23 relay_port optional, 24 relays optional,
        25 further optional,
        ..unknown
    }
}

/// The part of a record that every release can read, so that a host can be named whose record is not understood
/// otherwise: the fields 1 to 9 of [`NodeRecord`], which are frozen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordHead {
    /// As [`NodeRecord::id`].
    pub id: NodeId,
    /// As [`NodeRecord::public_key`].
    pub public_key: PublicKey,
    /// As [`NodeRecord::name`].
    pub name: String,
    /// As [`NodeRecord::generation`].
    pub generation: u64,
    /// As [`NodeRecord::revision`].
    pub revision: u64,
    /// As [`NodeRecord::cluster`].
    pub cluster: u64,
    /// As [`NodeRecord::address`].
    pub address: SocketAddr,
    /// As [`NodeRecord::version`].
    pub version: String,
    /// As [`NodeRecord::wire`].
    pub wire: WireVersions,
}

impl NodeRecord {
    /// Whether the host is behind NAT: others cannot dial it, and it is reached where its datagrams come from.
    pub fn is_behind_nat(&self) -> bool {
        named_by(self.address.ip()).is_some()
    }

    /// The addresses of gossip and streams, the main one first. That of a host behind NAT only names it.
    pub fn addresses(&self) -> impl Iterator<Item = SocketAddr> + '_ {
        std::iter::once(self.address).chain(self.further.iter().copied())
    }

    /// Whether the host has an address of a family: of IPv4, or of IPv6.
    pub fn has_family(&self, ipv4: bool) -> bool {
        self.vtep.is_ipv4() == ipv4 || self.further.iter().any(|at| at.is_ipv4() == ipv4)
    }

    /// Whether no packet can be sent from one host to the other, because they have no address family in common.
    pub fn is_apart(&self, other: &Self) -> bool {
        ![true, false].into_iter().any(|ipv4| self.has_family(ipv4) && other.has_family(ipv4))
    }

    /// Returns the value by which two records of one host are ordered: the larger one is later.
    pub fn order(&self) -> (u64, u64) {
        (self.generation, self.revision)
    }
}

/// A host record with its owner's signature over the exact bytes that were encoded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedRecord {
    /// An encoded [`NodeRecord`].
    #[serde(with = "wire::bytes")]
    pub body: Vec<u8>,
    /// The signature by the record's own key, in [`Domain::Record`].
    pub signature: Signature,
}

impl SignedRecord {
    /// Decodes the record without verifying its signature.
    ///
    /// # Errors
    ///
    /// If the body is malformed.
    pub fn record(&self) -> Result<NodeRecord, WireError> {
        wire::decode_body(&self.body)
    }

    /// Decodes the part of the record that every release can read, without verifying its signature.
    ///
    /// # Errors
    ///
    /// If that part is malformed.
    pub fn head(&self) -> Result<RecordHead, WireError> {
        let mut reader = Reader::new("NodeRecord", wire::fields_of(&self.body)?)?;
        let head = RecordHead {
            id: reader.need(1, false)?,
            public_key: reader.need(2, false)?,
            name: reader.need(3, false)?,
            generation: reader.need(4, false)?,
            revision: reader.need(5, false)?,
            cluster: reader.need(6, false)?,
            address: reader.need(7, false)?,
            version: reader.need(8, false)?,
            wire: reader.need(9, false)?,
        };
        Ok(head)
    }

    /// Encodes the record as a gossip value, which must be text.
    ///
    /// The text has no version byte of its own: the record in it says which versions the host speaks.
    ///
    /// It stays well below 1 KiB, because chitchat does not send a host's values if they exceed one delta.
    ///
    /// # Errors
    ///
    /// If the record cannot be encoded.
    pub fn to_text(&self) -> Result<String, WireError> {
        Ok(data_encoding::BASE64_NOPAD.encode(&wire::encode_body(self)?))
    }

    /// Decodes the text that [`Self::to_text`] returns.
    ///
    /// # Errors
    ///
    /// If the text is not Base64, or the frame is malformed.
    pub fn from_text(text: &str) -> Result<Self, WireError> {
        let bytes = data_encoding::BASE64_NOPAD
            .decode(text.as_bytes())
            .map_err(|error| WireError::Malformed(error.to_string()))?;
        wire::decode_body(&bytes)
    }
}

/// The liveness of a host: the verdict of the local host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PeerState {
    /// The host gossips.
    Alive,
    /// The host does not gossip, but its kernel answers or it announced a restart. Its entries stay in use.
    Suspect,
    /// The host neither gossips nor answers. Its entries are withdrawn.
    Dead,
    /// The host left the cluster.
    Left,
}

impl std::fmt::Display for PeerState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Alive => "alive",
            Self::Suspect => "suspect",
            Self::Dead => "dead",
            Self::Left => "left",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_fits_a_gossip_value() {
        let record = NodeRecord {
            id: NodeId([1; 10]),
            public_key: [2; 32],
            name: "n".repeat(63),
            generation: u64::MAX,
            revision: u64::MAX,
            cluster: u64::MAX,
            address: "[fd00:1:2:3:4:5:6:7]:65535".parse().unwrap(),
            vtep: "fd00:1:2:3:4:5:6:7".parse().unwrap(),
            vxlan_port: 4789,
            link_mtu: 1500,
            tunnel: Some(Tunnel {
                key: TunnelKey([4; 32]),
                port: 51940,
                epoch: u32::MAX,
                rotating: true,
                kernel: true,
            }),
            keys: ClusterKeys {
                seals: ClusterKeyId([5; 4]),
                opens: vec![ClusterKeyId([6; 4]); MAX_OTHER_KEYS],
            },
            presence: Presence::Running,
            version: "100.100.100".to_owned(),
            wire: WireVersions::own(),
            probes: u8::MAX,
            not_built: vec![NetworkId([7; 5]); MAX_NOT_BUILT],
            probe_kinds: u8::MAX,
            metrics_port: u16::MAX,
            zone: "z".repeat(MAX_ZONE),
            mirrors: true,
            is_node: true,
            relay_port: 7942,
            relays: true,
            further: vec!["[fd00:1:2:3:4:5:6:8]:65535".parse().unwrap(); MAX_FURTHER],
            unknown: Unknown::default(),
        };
        let signed =
            SignedRecord { body: wire::encode_body(&record).unwrap(), signature: Signature([3; 64]) };
        let text = signed.to_text().unwrap();
        assert!(text.len() < 860, "{}", text.len());
        assert_eq!(SignedRecord::from_text(&text).unwrap(), signed);
        assert_eq!(signed.record().unwrap(), record);
        let head = signed.head().unwrap();
        assert_eq!((head.id, head.name, head.wire), (record.id, record.name, record.wire));
    }
}
