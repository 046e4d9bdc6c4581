//! Cluster objects: every member may write them, the last write wins (by [`Stamp`]), and every host keeps all of
//! them, tombstones included.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::clock::Stamp;
use crate::fields;
use crate::id::NetworkId;
use crate::record::{PublicKey, Signature};
use crate::resource::{Kind, Resource, ResourceKey};
use crate::wire::fields::{self, Fields, Reader, Unknown, Writer, deserialize_numbered, serialize_numbered};
use crate::wire::{self, Bytes, WireError};

/// The key of a cluster object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ObjectKey {
    /// A network.
    Network(NetworkId),
    /// A Kubernetes object.
    Resource(ResourceKey),
    /// An object of a kind that this release does not know.
    Unknown {
        /// The number of the kind.
        kind: u32,
        /// The encoded name.
        name: Vec<u8>,
    },
}

/// The maximum length of the reason why an object is not understood, in characters.
const MAX_WHY: usize = 200;
/// The number of the kind of networks.
const NETWORK: u32 = 1;
/// The numbers of the kinds of Kubernetes objects.
const KINDS: [(u32, Kind); 8] = [
    (2, Kind::Namespace),
    (3, Kind::Pod),
    (4, Kind::Service),
    (5, Kind::EndpointSlice),
    (6, Kind::NetworkPolicy),
    (7, Kind::ServiceCidr),
    (8, Kind::ClusterNetworkPolicy),
    (9, Kind::Node),
];

impl ObjectKey {
    /// The maximum size of an encoded name, of any kind and in any release.
    pub const MAX_NAME_BYTES: usize = 512;

    /// Returns the number of the kind, and the encoded name.
    fn encoded(&self) -> (u32, Result<Vec<u8>, WireError>) {
        match self {
            Self::Network(id) => (NETWORK, wire::encode_body(id)),
            Self::Resource(ResourceKey { kind, name }) => {
                let number = KINDS.iter().find(|(_, known)| known == kind).map_or(0, |(number, _)| *number);
                (number, wire::encode_body(name))
            }
            Self::Unknown { kind, name } => (*kind, Ok(name.clone())),
        }
    }

    fn decode(number: u32, name: &[u8]) -> Result<Self, WireError> {
        if name.len() > Self::MAX_NAME_BYTES {
            return Err(WireError::Malformed("an object with a name that is too long".to_owned()));
        }
        Ok(match KINDS.iter().find(|(known, _)| *known == number) {
            Some((_, kind)) => Self::Resource(ResourceKey { kind: *kind, name: wire::decode_body(name)? }),
            None if number == NETWORK => Self::Network(wire::decode_body(name)?),
            None => Self::Unknown { kind: number, name: name.to_vec() },
        })
    }
}

impl std::fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Network(id) => write!(f, "network {id}"),
            Self::Resource(key) => key.fmt(f),
            Self::Unknown { kind, name } => {
                write!(f, "object {} of kind {kind}", data_encoding::HEXLOWER.encode(name))
            }
        }
    }
}

impl Serialize for ObjectKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (number, name) = self.encoded();
        serialize_numbered(number, name, serializer)
    }
}

impl<'de> Deserialize<'de> for ObjectKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let (number, name) = deserialize_numbered(deserializer)?;
        Self::decode(number, name).map_err(D::Error::custom)
    }
}

/// The driver of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// The network spans hosts.
    Overlay,
    /// The network is local to one host, which alone stores it. It is never a cluster object.
    Bridge,
}

/// What an overlay network carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Ethernet: one subnet on all hosts.
    L2,
    /// IP: each host has blocks of its own, and routes to the blocks of other hosts.
    L3,
}

/// How packets of a routed network reach other hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// Encapsulated in VXLAN.
    #[default]
    Vxlan,
    /// Not encapsulated: all hosts are on one segment, or the routers between them have routes to the blocks.
    Direct,
    /// Not encapsulated to hosts on the local segment, in VXLAN to all others.
    Auto,
}

/// When traffic of a network between hosts passes through the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Encrypt {
    /// Never.
    #[default]
    No,
    /// Always.
    Yes,
    /// To a host to which there is no path for packets in plain text: NAT is between the two, or it is reached through members or
    /// over TCP. To all others in plain text.
    Auto,
}

impl std::fmt::Display for Encrypt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::No => "no",
            Self::Yes => "yes",
            Self::Auto => "auto",
        })
    }
}

impl std::str::FromStr for Encrypt {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "no" | "false" => Ok(Self::No),
            "yes" | "true" => Ok(Self::Yes),
            "auto" => Ok(Self::Auto),
            _ => Err("expected yes, no or auto".to_owned()),
        }
    }
}

/// A subnet of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
    /// The prefix.
    pub prefix: IpNet,
    /// The gateway address: the first host address of the prefix at the time of creation. It stays when the prefix
    /// grows. It is reserved on an internal network too.
    pub gateway: IpAddr,
    /// The prefix length of the blocks that hosts claim from the subnet. It is fixed at creation, so that blocks
    /// stay aligned when the prefix grows.
    pub block_length: u8,
    /// Whether the network is routed. Then each block has its own gateway, its first host address.
    pub routed: bool,
}

/// A network as the user requested it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// The id, drawn at random by the host that creates the network.
    pub id: NetworkId,
    /// The name, unique in the cluster after conflicts are resolved (`ovl_cluster::networks`).
    pub name: String,
    /// The time of creation. Of two networks with the same name or VNI, the older one keeps it.
    pub created: Stamp,
    /// See [`Driver`].
    pub driver: Driver,
    /// See [`Mode`].
    pub mode: Mode,
    /// VXLAN network identifier, 1 to 2^24 - 1; 0 on a bridge network.
    pub vni: u32,
    /// The subnets, at least one. More than one of an address family is possible but unusual.
    pub subnets: Vec<Subnet>,
    /// The MTU that the user requested, in bytes. `None`: derived from the path MTUs.
    pub mtu: Option<u16>,
    /// Whether traffic between hosts passes only through the tunnel.
    pub encrypted: bool,
    /// Whether the network has no gateway.
    pub internal: bool,
    /// See [`Backend`]. Used on a routed network only.
    pub backend: Backend,
    /// Whether its endpoints have a resolver that resolves their names.
    pub names: bool,
    /// Whether a container engine created it. It is deleted with the last engine network that refers to it, see
    /// [`crate::table::Entry::Held`].
    pub on_demand: bool,
    /// Whether endpoints that are on internal networks alone get answers for names outside of the cluster.
    pub external_names: bool,
    /// Whether traffic passes through the tunnel to those hosts to which there is no path in plain text: see
    /// [`Encrypt::Auto`]. Without effect if `encrypted` is set. A host that does not know this sends everything in plain text.
    pub auto_encrypt: bool,
    /// Fields that this release does not know.
    pub unknown: Unknown,
}

impl Network {
    /// Returns when its traffic passes through the tunnel.
    pub fn encrypt(&self) -> Encrypt {
        match (self.encrypted, self.auto_encrypt) {
            (true, _) => Encrypt::Yes,
            (false, true) => Encrypt::Auto,
            (false, false) => Encrypt::No,
        }
    }

    /// Whether its traffic may pass through the tunnel.
    pub fn may_be_sealed(&self) -> bool {
        self.encrypt() != Encrypt::No
    }
}

fields! {
    Network {
        1 id, 2 name, 3 created, 4 driver, 5 mode, 6 vni, 7 subnets, 8 mtu optional, 9 encrypted optional,
        10 internal optional, 11 backend optional, 12 names, 13 on_demand optional,
        14 external_names optional, 15 auto_encrypt optional, ..unknown
    }
}

/// One write of a cluster object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// The stamp of the write. Its node is the writer.
    pub stamp: Stamp,
    /// Whether this is a tombstone. The body stays, because hosts may still use the object.
    pub deleted: bool,
    /// The content.
    pub body: Body,
}

/// The content of an object, by kind.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::large_enum_variant, reason = "it is taken apart at once and not kept in lists")]
pub enum Body {
    /// A network.
    Network(Network),
    /// A Kubernetes object.
    Resource(Resource),
    /// What this release does not understand. It is kept and passed on, and has no effect.
    Opaque {
        /// The key of the object.
        key: ObjectKey,
        /// The encoded content.
        content: Vec<u8>,
        /// What is not known, for users.
        why: String,
    },
}

impl Body {
    fn content(&self) -> Result<Vec<u8>, WireError> {
        match self {
            Self::Network(network) => wire::encode_body(network),
            Self::Resource(resource) => resource.encode(),
            Self::Opaque { content, .. } => Ok(content.clone()),
        }
    }

    /// Decodes a content, which is opaque if this release does not understand it.
    fn decode(key: ObjectKey, content: &[u8]) -> Self {
        let opaque = |key, why: String| {
            let why = why.chars().take(MAX_WHY).collect();
            Self::Opaque { key, content: content.to_vec(), why }
        };
        let decoded = match &key {
            ObjectKey::Network(_) => wire::decode_body(content).map(Self::Network),
            ObjectKey::Resource(ResourceKey { kind, .. }) => {
                Resource::decode(*kind, content).map(Self::Resource)
            }
            ObjectKey::Unknown { kind, .. } => {
                Err(WireError::NotUnderstood(format!("objects of kind {kind}")))
            }
        };
        match decoded {
            Ok(body) if body.key() == key => body,
            Ok(_) => opaque(key, "an object whose content has another name".to_owned()),
            Err(WireError::NotUnderstood(what)) => opaque(key, what),
            Err(error) => {
                let why = format!("the content of {key} ({error})");
                opaque(key, why)
            }
        }
    }

    /// Returns the key of the object.
    pub fn key(&self) -> ObjectKey {
        match self {
            Self::Network(network) => ObjectKey::Network(network.id),
            Self::Resource(resource) => ObjectKey::Resource(resource.key()),
            Self::Opaque { key, .. } => key.clone(),
        }
    }
}

impl Object {
    /// Returns the key of the object.
    pub fn key(&self) -> ObjectKey {
        self.body.key()
    }
}

/// An object has four fields in every release: what is added goes into the content.
impl Fields for Object {
    const WHAT: &'static str = "Object";

    fn to_fields(&self) -> Result<Vec<u8>, WireError> {
        let mut writer = Writer::new(None);
        writer.put(1, false, &self.stamp)?;
        writer.put_optional(2, false, &self.deleted)?;
        writer.put(3, false, &self.key())?;
        writer.put(4, false, &Bytes(&self.body.content()?))?;
        Ok(writer.finish())
    }

    fn from_fields(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(Self::WHAT, bytes)?;
        let (stamp, deleted, key) =
            (reader.need(1, false)?, reader.optional(2, false)?, reader.need(3, false)?);
        let body = Body::decode(key, reader.bytes(4)?);
        reader.finish()?;
        Ok(Self { stamp, deleted, body })
    }
}

impl Serialize for Object {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        fields::serialize(self, serializer)
    }
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        fields::deserialize(deserializer)
    }
}

/// A cluster object with its writer's signature over the exact bytes that were encoded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedObject {
    /// An encoded [`Object`].
    #[serde(with = "wire::bytes")]
    pub body: Vec<u8>,
    /// The writer's public key. Its hash is the writer's id.
    pub writer_key: PublicKey,
    /// The signature, in [`crate::record::Domain::Object`].
    pub signature: Signature,
}

impl SignedObject {
    /// Decodes the object without verifying its signature.
    ///
    /// # Errors
    ///
    /// If the body is malformed.
    pub fn object(&self) -> Result<Object, WireError> {
        wire::decode_body(&self.body)
    }
}
