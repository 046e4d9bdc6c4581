//! The node record: what every host must know of every other, in one small signed value that
//! travels in gossip.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::id::{ClusterKeyId, NodeId, TunnelKey};
use crate::wire::{self, WireError};

/// An Ed25519 public key.
pub type PublicKey = [u8; 32];

/// What a signature is over, so that one made for one purpose never serves another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Domain {
    /// A node record.
    Record,
    /// The head of an owner table.
    Table,
    /// A cluster object.
    Object,
    /// The handshake of a sync stream.
    Stream,
}

impl Domain {
    /// The bytes to sign: a label that ends in a zero byte, then the message.
    pub fn message(self, body: &[u8]) -> Vec<u8> {
        let label: &[u8] = match self {
            Self::Record => b"ovl record v1\0",
            Self::Table => b"ovl table v1\0",
            Self::Object => b"ovl object v1\0",
            Self::Stream => b"ovl stream v1\0",
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

/// What a node says of itself about its being there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Presence {
    /// At work.
    Running,
    /// Stopped to be started again: its kernel goes on forwarding, so its entries are kept.
    Restarting,
    /// Withdrawn by `ovlctl leave` or `teardown`: its entries go at once.
    Left,
}

/// How a node's end of the tunnel is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tunnel {
    /// The public half of its key pair.
    pub key: TunnelKey,
    /// The UDP port, at the VTEP's address: even in even epochs.
    pub port: u16,
    /// Counts the rotations of any host's key: see `core`'s ends.
    pub epoch: u32,
    /// It has moved to this epoch, and the end of the one before is still there.
    pub rotating: bool,
    /// The kernel's WireGuard device does it; else ovld itself. The two speak the same protocol.
    pub kernel: bool,
}

/// Other cluster keys than the one that it seals with, at most, that a node opens with.
pub const MOST_OTHER_KEYS: usize = 2;

/// The cluster keys that a node has.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ClusterKeys {
    /// What it sends is sealed with this one.
    pub seals: ClusterKeyId,
    /// The others that it takes, at most [`MOST_OTHER_KEYS`]; none unless the key is being rotated.
    pub opens: Vec<ClusterKeyId>,
}

impl ClusterKeys {
    /// Whether it understands what is sealed with that key.
    pub fn has(&self, key: ClusterKeyId) -> bool {
        self.seals == key || self.opens.contains(&key)
    }
}

/// A node, as it describes itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// The hash of `public_key`: see [`NodeId`].
    pub id: NodeId,
    /// Checks this record's signature, and those of the node's table and objects.
    pub public_key: PublicKey,
    /// For people; unique in a healthy cluster.
    pub name: String,
    /// Grows with every start and every change of address; the highest one counts.
    pub generation: u64,
    /// Grows with every change of the record within a generation.
    pub revision: u64,
    /// The cluster that it was admitted to; 0 before that.
    pub cluster: u64,
    /// Where gossip and sync reach it.
    pub address: SocketAddr,
    /// Where its VXLAN packets come from and go to.
    pub vtep: IpAddr,
    /// The UDP port of its VXLAN device.
    pub vxlan_port: u16,
    /// The MTU of the link that holds `vtep`, in bytes.
    pub link_mtu: u16,
    /// Its end of the tunnel; none where it has none, and gets nothing of encrypted networks.
    pub tunnel: Option<Tunnel>,
    /// See [`ClusterKeys`].
    pub keys: ClusterKeys,
    /// See [`Presence`].
    pub presence: Presence,
    /// The release of its ovld.
    pub version: String,
}

impl NodeRecord {
    /// Which of two records of one node is the later one.
    pub fn order(&self) -> (u64, u64) {
        (self.generation, self.revision)
    }
}

/// A record with its owner's signature over the exact bytes that were encoded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedRecord {
    /// An encoded [`NodeRecord`].
    pub body: Vec<u8>,
    /// By the key inside, in [`Domain::Record`].
    pub signature: Signature,
}

impl SignedRecord {
    /// The record inside, before anything is checked.
    pub fn record(&self) -> Result<NodeRecord, WireError> {
        wire::decode_body(&self.body)
    }

    /// As a gossip value, which must be text. Stays well under 1 KiB: chitchat gives up on nodes
    /// with values too large for one delta.
    pub fn to_text(&self) -> Result<String, WireError> {
        Ok(data_encoding::BASE64_NOPAD.encode(&wire::encode(self)?))
    }

    /// The reverse of [`Self::to_text`].
    pub fn from_text(text: &str) -> Result<Self, WireError> {
        let bytes = data_encoding::BASE64_NOPAD
            .decode(text.as_bytes())
            .map_err(|error| WireError::Malformed(error.to_string()))?;
        wire::decode(&bytes)
    }
}

/// What is known of a host's liveness.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PeerState {
    /// Gossips.
    Alive,
    /// Does not gossip, and its kernel still answers, or it said that it restarts: its entries stay.
    Suspect,
    /// Neither gossips nor answers: its entries are withdrawn.
    Dead,
    /// Withdrew by itself.
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
    fn a_record_stays_small_enough_for_gossip() {
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
                opens: vec![ClusterKeyId([6; 4]); MOST_OTHER_KEYS],
            },
            presence: Presence::Running,
            version: "100.100.100".to_owned(),
        };
        let signed =
            SignedRecord { body: wire::encode_body(&record).unwrap(), signature: Signature([3; 64]) };
        let text = signed.to_text().unwrap();
        assert!(text.len() < 576, "{}", text.len());
        assert_eq!(SignedRecord::from_text(&text).unwrap(), signed);
        assert_eq!(signed.record().unwrap(), record);
    }
}
