//! The allocation map: which hosts are members, and which of them holds which block of addresses.
//! It is one value that changes only by agreement of a majority; `core`'s `alloc` has the protocol.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::id::{ClusterKeyId, NetworkId, NodeId};

/// A block of addresses of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Block {
    /// The network.
    pub network: NetworkId,
    /// The block itself: a multiple of its own size.
    pub prefix: IpNet,
}

/// The cluster key that all members have, or shall have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgreedKey {
    /// Its id.
    pub id: ClusterKeyId,
    /// When it was agreed on, by the clock of the host that was asked: milliseconds since 1970.
    pub since_ms: u64,
}

/// The allocation map at one version.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct AllocMap {
    /// Drawn by the host that bootstrapped; 0 where none has been heard of.
    pub cluster: u64,
    /// Grows by one with each agreement.
    pub version: u64,
    /// The electorate, and the only hosts whose entries count.
    pub members: BTreeSet<NodeId>,
    /// The electorate of the version before, whose majority agreed to this one.
    pub previous_members: BTreeSet<NodeId>,
    /// Hosts that were members and are no more. One that returns is admitted anew.
    pub forgotten: BTreeSet<NodeId>,
    /// Who holds what.
    pub blocks: BTreeMap<Block, NodeId>,
    /// The last key that a rotation was begun to; none before the first one. So no two rotations are
    /// ever under way, and hosts that are cut off from a majority begin none.
    pub key: Option<AgreedKey>,
}

/// A wish to change the map. All of them are idempotent: asking twice changes nothing more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// Make a host a member.
    Admit(NodeId),
    /// Take a host out, and free its blocks.
    Forget(NodeId),
    /// See to it that a host holds this many blocks of a subnet.
    Claim {
        /// The network.
        network: NetworkId,
        /// The subnet, whose first block is taken that is free.
        subnet: IpNet,
        /// The prefix length of its blocks.
        block_length: u8,
        /// Who wants it.
        owner: NodeId,
        /// How many blocks of the subnet the owner shall hold at the end.
        blocks: u32,
    },
    /// See to it that a host holds this very block; refused if another one does.
    ClaimExact {
        /// The block.
        block: Block,
        /// Who wants it.
        owner: NodeId,
    },
    /// Give a block back; nothing happens if it is not the owner's.
    Release {
        /// The block.
        block: Block,
        /// Who gives it back.
        owner: NodeId,
    },
    /// Free all blocks of a network that is gone.
    DropNetwork(NetworkId),
    /// Begin a rotation of the cluster key, unless another one was begun meanwhile.
    Key {
        /// The last one that was begun to, as far as the asker knows.
        from: Option<ClusterKeyId>,
        /// The new one.
        to: AgreedKey,
    },
}

/// Why a change was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Refusal {
    /// Another host holds the block that was asked for.
    #[error("block {prefix} is held by {holder}")]
    Held {
        /// The block.
        prefix: IpNet,
        /// Its holder.
        holder: NodeId,
    },
    /// Every block of the subnet has a holder.
    #[error("all {blocks} blocks of {subnet} are held")]
    Full {
        /// The subnet.
        subnet: IpNet,
        /// How many blocks it has.
        blocks: u64,
    },
    /// The host that asks is no member.
    #[error("{0} is not a member of the cluster")]
    NotMember(NodeId),
    /// The last member cannot be forgotten.
    #[error("{0} is the only member")]
    LastMember(NodeId),
    /// Too few members answered in time.
    #[error("{answered} of {members} known hosts answered and {needed} are needed")]
    NoMajority {
        /// How many answered.
        answered: u32,
        /// How many are needed.
        needed: u32,
        /// How many there are.
        members: u32,
    },
    /// A block that is not aligned, or not of the length that the subnet has.
    #[error("{0} is not a block")]
    NotABlock(IpNet),
    /// Another rotation of the cluster key was begun.
    #[error("the cluster key is being changed to {0}")]
    AnotherKey(ClusterKeyId),
}

/// The number of an attempt to change the map; ordered by counter, then by proposer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Ballot {
    /// Grows.
    pub counter: u64,
    /// Who tries.
    pub node: NodeId,
}

/// What proposers and acceptors say to each other.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AllocMessage {
    /// Phase one: promise to take part in no earlier ballot.
    Prepare {
        /// The attempt.
        ballot: Ballot,
        /// The version that the proposer knows to be agreed.
        known: u64,
    },
    /// The answer to [`Self::Prepare`].
    Promise {
        /// The attempt.
        ballot: Ballot,
        /// The last value that was accepted here, with its ballot.
        accepted: Option<(Ballot, AllocMap)>,
        /// The last map known here to be agreed, if it is later than what the proposer knows.
        learned: Option<AllocMap>,
    },
    /// Phase two: accept this map.
    Accept {
        /// The attempt.
        ballot: Ballot,
        /// The map.
        map: AllocMap,
    },
    /// The answer to [`Self::Accept`].
    Accepted {
        /// The attempt.
        ballot: Ballot,
    },
    /// The answer to either where a later ballot was promised.
    Nack {
        /// The attempt that is refused.
        ballot: Ballot,
        /// The one that was promised.
        promised: Ballot,
    },
    /// A map that a majority agreed on.
    Learn(AllocMap),
    /// Which version do you know? Answered with [`Self::Learn`] if it is later than `known`.
    Ask {
        /// The asker's version.
        known: u64,
    },
    /// Please make this change: to the member that proposes for all while it is alive.
    Request {
        /// The asker's number for it.
        id: u64,
        /// The change.
        change: Change,
    },
    /// The answer to [`Self::Request`].
    Reply {
        /// The asker's number.
        id: u64,
        /// Done, at this version, or why not.
        result: Result<u64, Refusal>,
    },
}
