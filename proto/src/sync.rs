//! The messages of a stream between two daemons. Messages travel in one direction: each host connects to every live
//! peer, and sends its requests and its replies over the connection that it opened.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::alloc::AllocMessage;
use crate::clock::Stamp;
use crate::id::{NetworkId, NodeId};
use crate::object::{ObjectKey, SignedObject};
use crate::record::SignedRecord;
use crate::secret::Secret;
use crate::table::Update;

/// A message from one daemon to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// The sender's record, for a receiver that does not have it from gossip yet.
    Record(SignedRecord),
    /// A change of a table, pushed by its owner, or a whole table, from any host that has it.
    Table(Update),
    /// A request for the whole table of a host.
    TablePull(NodeId),
    /// The reply to [`Self::TablePull`] if the receiver does not have the table.
    TableUnknown(NodeId),
    /// Objects: pushed when they are written, or sent on request.
    Objects(Vec<SignedObject>),
    /// An index of all objects that the sender has. The reply is those that it lacks or has an older version of.
    ObjectIndex {
        /// The key and stamp of each object.
        index: Vec<(ObjectKey, Stamp)>,
        /// Whether the receiver replies with its own index.
        reply: bool,
    },
    /// A message of the consensus on the allocation map.
    Alloc(AllocMessage),
    /// A request for a lease of an address of the receiver's block.
    LeaseRequest {
        /// The requester's number.
        id: u64,
        /// The network.
        network: NetworkId,
        /// The requested address.
        wish: LeaseWish,
    },
    /// The reply to [`Self::LeaseRequest`].
    LeaseReply {
        /// The requester's number.
        id: u64,
        /// The address, or an error message for the user.
        result: Result<IpAddr, String>,
    },
    /// The cluster key that the allocation map names, for a member that does not have it.
    ClusterKey(Secret<[u8; 32]>),
}

/// The address that a lease request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LeaseWish {
    /// This address.
    Exact(IpAddr),
    /// Any free address of this subnet.
    AnyOf(ipnet::IpNet),
}
