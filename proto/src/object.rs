//! Cluster objects: many writers, the last one wins (by [`Stamp`]), tombstones included, kept by
//! every node.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::clock::Stamp;
use crate::id::NetworkId;
use crate::record::{PublicKey, Signature};
use crate::resource::{Resource, ResourceKey};
use crate::wire::{self, WireError};

/// Which object.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum ObjectKey {
    /// A network.
    Network(NetworkId),
    /// One of Kubernetes' objects.
    Resource(ResourceKey),
}

/// How a network is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Driver {
    /// Stretched over hosts.
    Overlay,
    /// On one host alone, which keeps it for itself: never one of the cluster's objects.
    Bridge,
}

/// What an overlay carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Ethernet: one subnet on all hosts.
    L2,
    /// IP: each host routes to the blocks of the others.
    L3,
}

/// How packets of a routed network reach other hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// In VXLAN, whatever lies between the hosts.
    #[default]
    Vxlan,
    /// As they are: all hosts are on one segment, or the routers between them know the blocks.
    Direct,
    /// As they are to hosts on our segment, in VXLAN to the others.
    Auto,
}

/// One range of addresses of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
    /// The range.
    pub prefix: IpNet,
    /// The gateway's address: the first one of the range as it was when the network was made, so
    /// that it stays when the range grows. Set aside on an internal network too.
    pub gateway: IpAddr,
    /// The prefix length of the blocks that hosts claim from it; fixed when the network is made,
    /// so that blocks stay aligned when the range grows.
    pub block_length: u8,
    /// Of a routed network: each block has a gateway of its own, its first host address.
    pub routed: bool,
}

/// A network, as it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Drawn by its maker.
    pub id: NetworkId,
    /// For people; unique in the cluster, see `core`'s resolution of conflicts.
    pub name: String,
    /// When it was made: of two networks with one name or one VNI the older one keeps it.
    pub created: Stamp,
    /// See [`Driver`].
    pub driver: Driver,
    /// See [`Mode`].
    pub mode: Mode,
    /// VXLAN network identifier, 1 to 2^24 - 1; 0 on a bridge network.
    pub vni: u32,
    /// At least one; at most one an address family is usual and not required.
    pub subnets: Vec<Subnet>,
    /// Asked for by the user; nothing: what the paths carry.
    pub mtu: Option<u16>,
    /// Only ever through the tunnel.
    pub encrypted: bool,
    /// Without a gateway.
    pub internal: bool,
    /// See [`Backend`]; of use on a routed network.
    pub backend: Backend,
    /// Its endpoints have a resolver, which knows their names.
    pub names: bool,
    /// Made by a container engine: it goes with the last engine's network that stands for it, see
    /// [`crate::table::Entry::Held`].
    pub on_demand: bool,
}

/// An object at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Object {
    /// The write; its node is the writer.
    pub stamp: Stamp,
    /// A tombstone. The body stays, so that what still uses the object can be named and served.
    pub deleted: bool,
    /// The content.
    pub body: Body,
}

/// The content of an object, by kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Body {
    /// A network.
    Network(Network),
    /// One of Kubernetes' objects.
    Resource(Resource),
}

impl Object {
    /// Which object.
    pub fn key(&self) -> ObjectKey {
        match &self.body {
            Body::Network(network) => ObjectKey::Network(network.id),
            Body::Resource(resource) => ObjectKey::Resource(resource.key()),
        }
    }
}

/// An object with its writer's signature over the exact bytes that were encoded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedObject {
    /// An encoded [`Object`].
    #[serde(with = "wire::bytes")]
    pub body: Vec<u8>,
    /// The writer's key; its hash is the writer's id.
    pub writer_key: PublicKey,
    /// In [`crate::record::Domain::Object`].
    pub signature: Signature,
}

impl SignedObject {
    /// The object inside, before anything is checked.
    pub fn object(&self) -> Result<Object, WireError> {
        wire::decode_body(&self.body)
    }
}
