//! Messages of the sync stream. The stream is one-way in purpose: each node dials every live peer,
//! and what it has to say, question or answer, goes over the connection that it dialled.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::alloc::AllocMessage;
use crate::clock::Stamp;
use crate::id::{NetworkId, NodeId};
use crate::object::{ObjectKey, SignedObject};
use crate::record::SignedRecord;
use crate::secret::Secret;
use crate::table::Update;

/// Whatever one daemon has to say to another beside gossip.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// The sender's record, for a receiver that gossip has not told yet.
    Record(SignedRecord),
    /// A change of a table, pushed by its owner, or a whole table, from whoever has it.
    Table(Update),
    /// Please send the whole table of this node.
    TablePull(NodeId),
    /// The answer to [`Self::TablePull`] by one that does not have it.
    TableUnknown(NodeId),
    /// Objects, pushed when they are written or asked for.
    Objects(Vec<SignedObject>),
    /// All objects that the sender has. Answered with those that it lacks, or has older.
    ObjectIndex {
        /// Each with its stamp.
        index: Vec<(ObjectKey, Stamp)>,
        /// Whether the receiver shall send its own index in turn.
        reply: bool,
    },
    /// Agreement on the allocation map.
    Alloc(AllocMessage),
    /// May I use this address out of your block? Without an address: any one of that family that
    /// is free.
    LeaseRequest {
        /// The asker's number.
        id: u64,
        /// The network.
        network: NetworkId,
        /// What is asked for.
        wish: LeaseWish,
    },
    /// The answer to [`Self::LeaseRequest`].
    LeaseReply {
        /// The asker's number.
        id: u64,
        /// The address, or why not, in words for the user.
        result: Result<IpAddr, String>,
    },
    /// The cluster key that the allocation map names, for a member that does not have it.
    ClusterKey(Secret<[u8; 32]>),
}

/// Which address is wanted from another host's block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LeaseWish {
    /// This one.
    Exact(IpAddr),
    /// Any one of this subnet.
    AnyOf(ipnet::IpNet),
}
