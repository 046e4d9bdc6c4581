//! Cluster objects: every member may write them, the last write wins (by [`Stamp`]), and every host keeps all of
//! them, tombstones included.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::clock::Stamp;
use crate::id::NetworkId;
use crate::record::{PublicKey, Signature};
use crate::resource::{Resource, ResourceKey};
use crate::wire::{self, WireError};

/// The key of a cluster object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ObjectKey {
    /// A network.
    Network(NetworkId),
    /// A Kubernetes object.
    Resource(ResourceKey),
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
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
}

/// One write of a cluster object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    /// The stamp of the write. Its node is the writer.
    pub stamp: Stamp,
    /// Whether this is a tombstone. The body stays, because hosts may still use the object.
    pub deleted: bool,
    /// The content.
    pub body: Body,
}

/// The content of an object, by kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Body {
    /// A network.
    Network(Network),
    /// A Kubernetes object.
    Resource(Resource),
}

impl Object {
    /// Returns the key of the object.
    pub fn key(&self) -> ObjectKey {
        match &self.body {
            Body::Network(network) => ObjectKey::Network(network.id),
            Body::Resource(resource) => ObjectKey::Resource(resource.key()),
        }
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
