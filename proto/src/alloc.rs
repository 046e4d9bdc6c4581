//! The allocation map: which hosts are members, and which member holds which block of addresses. It is one value that
//! changes only by agreement of a majority. The protocol is in the crate `ovl-consensus`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::fields;
use crate::id::{ClusterKeyId, NetworkId, NodeId};
use crate::record::{PublicKey, Signature};
use crate::wire::fields::{Unknown, variants};

/// A block of addresses of a network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Block {
    /// The network.
    pub network: NetworkId,
    /// The prefix of the block, without host bits.
    pub prefix: IpNet,
}

/// The cluster key that the members agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgreedKey {
    /// Its id.
    pub id: ClusterKeyId,
    /// A hash of the key, which is long enough that nobody finds another key with it.
    pub commitment: [u8; 16],
    /// When the rotation to it started, by the clock of the host that requested it, in milliseconds since 1970.
    pub since_ms: u64,
}

/// The allocation map at one version.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AllocMap {
    /// The cluster number, drawn at random by the host that bootstrapped; 0 if no map is known.
    pub cluster: u64,
    /// The version, which each agreement increments by one.
    pub version: u64,
    /// The members: the electorate, and the only hosts whose entries are used.
    pub members: BTreeSet<NodeId>,
    /// The members at the previous version, whose majority agreed to this one.
    pub previous_members: BTreeSet<NodeId>,
    /// Former members. A host that returns is admitted again, unless it is banned.
    pub forgotten: BTreeSet<NodeId>,
    /// Former members that `ovlctl peers forget` removed. They are not admitted again until `ovlctl peers admit` or
    /// until a rotation of the cluster key starts, which empties the set.
    pub banned: BTreeSet<NodeId>,
    /// The holder of each block.
    pub blocks: BTreeMap<Block, NodeId>,
    /// The key of the last rotation that was started; `None` before the first one. Because it is part of the map, two
    /// rotations never run at once, and hosts without a majority cannot start one.
    pub key: Option<AgreedKey>,
    /// The number of the first cluster, if this one is the recovery of another one: see [`Recovery`]. 0 if it is not.
    /// Marked: addresses of tunnels are derived from it, so that a recovery does not change them.
    pub origin: u64,
    /// Fields that this release does not know.
    pub unknown: Unknown,
}

fields! {
    AllocMap {
        1 cluster, 2 version, 3 members, 4 previous_members, 5 forgotten optional, 6 banned optional, 7 blocks optional,
        8 key optional, 9 origin marked, ..unknown
    }
}

/// The difference between a map and the next one. What a decree sends is as large as what it changes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MapStep {
    /// The version of the next map.
    pub version: u64,
    /// The SHA-256 of the next map, encoded. A receiver that gets another one needs the whole map.
    pub map: [u8; 32],
    /// The members, if they change.
    pub members: Option<BTreeSet<NodeId>>,
    /// The former members, if they change.
    pub forgotten: Option<BTreeSet<NodeId>>,
    /// The banned hosts, if they change.
    pub banned: Option<BTreeSet<NodeId>>,
    /// The blocks that get a holder, or another one.
    pub held: BTreeMap<Block, NodeId>,
    /// The blocks that become free.
    pub freed: BTreeSet<Block>,
    /// The cluster key, if it changes.
    pub key: Option<AgreedKey>,
}

fields! {
    MapStep {
        1 version, 2 map, 3 members optional, 4 forgotten optional, 5 banned optional, 6 held optional, 7 freed optional,
        8 key optional
    }
}

impl AllocMap {
    /// Returns the number of the cluster, or of the first one of which it is a recovery.
    pub fn origin(&self) -> u64 {
        if self.origin == 0 { self.cluster } else { self.origin }
    }

    /// Returns the difference to the next map, whose hash is given. `None` if a [`MapStep`] cannot express it.
    pub fn step_to(&self, next: &Self, hash: [u8; 32]) -> Option<MapStep> {
        let changed =
            |before: &BTreeSet<NodeId>, after: &BTreeSet<NodeId>| (before != after).then(|| after.clone());
        let held = next.blocks.iter().filter(|(block, holder)| self.blocks.get(block) != Some(holder));
        let freed = self.blocks.keys().filter(|block| !next.blocks.contains_key(block));
        let step = MapStep {
            version: next.version,
            map: hash,
            members: changed(&self.members, &next.members),
            forgotten: changed(&self.forgotten, &next.forgotten),
            banned: changed(&self.banned, &next.banned),
            held: held.map(|(block, holder)| (*block, *holder)).collect(),
            freed: freed.copied().collect(),
            key: next.key.filter(|key| self.key != Some(*key)),
        };
        (self.next(&step).as_ref() == Some(next)).then_some(step)
    }

    /// Returns the next map. `None` if the step is to another version. The caller compares the hash.
    pub fn next(&self, step: &MapStep) -> Option<Self> {
        if self.version.checked_add(1) != Some(step.version) {
            return None;
        }
        let mut next = self.clone();
        next.version = step.version;
        next.previous_members.clone_from(&self.members);
        for (set, changed) in [
            (&mut next.members, &step.members),
            (&mut next.forgotten, &step.forgotten),
            (&mut next.banned, &step.banned),
        ] {
            if let Some(changed) = changed {
                set.clone_from(changed);
            }
        }
        next.blocks.retain(|block, _| !step.freed.contains(block));
        next.blocks.extend(&step.held);
        next.key = step.key.or(self.key);
        Some(next)
    }
}

/// A change of the allocation map. All changes are idempotent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Admits a host as a member.
    Admit(NodeId),
    /// Removes a member and frees its blocks. It may return.
    Forget(NodeId),
    /// Removes a member, frees its blocks, and bans it. Bans a former member.
    Ban(NodeId),
    /// Ends the ban of a host, which may then ask to be admitted.
    Unban(NodeId),
    /// Ensures that a host holds a number of blocks of a subnet.
    Claim {
        /// The network.
        network: NetworkId,
        /// The subnet. Its first free blocks are taken.
        subnet: IpNet,
        /// The prefix length of its blocks.
        block_length: u8,
        /// The host that requests the blocks.
        owner: NodeId,
        /// How many blocks of the subnet the owner holds afterwards.
        blocks: u32,
    },
    /// Ensures that a host holds a given block. Refused if another host holds it.
    ClaimExact {
        /// The block.
        block: Block,
        /// The host that requests the block.
        owner: NodeId,
    },
    /// Releases a block. No effect if the owner does not hold it.
    Release {
        /// The block.
        block: Block,
        /// The host that releases the block.
        owner: NodeId,
    },
    /// Frees all blocks of a deleted network.
    DropNetwork(NetworkId),
    /// Starts a rotation of the cluster key, unless another one was started meanwhile.
    Key {
        /// The key of the last rotation that the requester knows.
        from: Option<ClusterKeyId>,
        /// The new key.
        to: AgreedKey,
    },
}

variants! {
    Change {
        1 Admit { 1 0: node },
        2 Forget { 1 0: node },
        3 Ban { 1 0: node },
        4 Unban { 1 0: node },
        5 Claim { 1 network: network, 2 subnet: subnet, 3 block_length: length, 4 owner: owner, 5 blocks: blocks },
        6 ClaimExact { 1 block: block, 2 owner: owner },
        7 Release { 1 block: block, 2 owner: owner },
        8 DropNetwork { 1 0: network },
        9 Key { 1 from: from, 2 to: to },
    }
}

/// Why a change was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// Another host holds the requested block.
    Held {
        /// The block.
        prefix: IpNet,
        /// Its holder.
        holder: NodeId,
    },
    /// Every block of the subnet has a holder.
    Full {
        /// The subnet.
        subnet: IpNet,
        /// How many blocks it has.
        blocks: u64,
    },
    /// The requesting host is not a member.
    NotMember(NodeId),
    /// The host was removed for good.
    Banned(NodeId),
    /// The last member cannot be forgotten.
    LastMember(NodeId),
    /// Too few members answered in time.
    NoMajority {
        /// The number of members that answered.
        answered: u32,
        /// The number of members that are a majority.
        needed: u32,
        /// The number of members.
        members: u32,
    },
    /// The prefix is not aligned, or does not have the subnet's block length.
    NotABlock(IpNet),
    /// Another rotation of the cluster key was started.
    AnotherKey(ClusterKeyId),
    /// Other hosts recovered the cluster without this one, which therefore takes no part in agreement: see [`Recovery`].
    Recovered {
        /// The host on which it was recovered.
        by: NodeId,
    },
}

variants! {
    Refusal {
        1 Held { 1 prefix: prefix, 2 holder: holder },
        2 Full { 1 subnet: subnet, 2 blocks: blocks },
        3 NotMember { 1 0: node },
        4 Banned { 1 0: node },
        5 LastMember { 1 0: node },
        6 NoMajority { 1 answered: answered, 2 needed: needed, 3 members: members },
        7 NotABlock { 1 0: prefix },
        8 AnotherKey { 1 0: key },
        9 Recovered { 1 by: by },
    }
}

impl Refusal {
    /// Returns the refusal as a sentence without advice, in which `name` names hosts.
    pub fn sentence(&self, name: impl Fn(NodeId) -> String) -> String {
        match self {
            Self::Held { prefix, holder } => format!("block {prefix} is held by host {}", name(*holder)),
            Self::Full { subnet, blocks } => {
                format!("subnet {subnet}: another host holds each of the {blocks} blocks")
            }
            Self::NotMember(node) => format!("{} is not a member of the cluster yet", name(*node)),
            Self::Banned(node) => format!("host {} was taken out with `ovlctl peers forget`", name(*node)),
            Self::LastMember(node) => {
                format!("{} is the last host of the cluster: it cannot be forgotten", name(*node))
            }
            Self::NoMajority { answered, needed, members } => format!(
                "no majority of the cluster can be reached: {answered} of {members} hosts answered and {needed} are \
                 needed"
            ),
            Self::Recovered { by } => format!(
                "the cluster was recovered on host {} from the loss of its majority, without this host, which therefore \
                 takes part in no agreement",
                name(*by)
            ),
            Self::NotABlock(prefix) => {
                format!("invalid block {prefix}: not aligned, or not of the subnet's block length")
            }
            Self::AnotherKey(key) => format!(
                "the cluster key is being changed to another one, {key}, which somebody began at the same time"
            ),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence(|node| node.to_string()))
    }
}

impl std::error::Error for Refusal {}

/// A ballot number, ordered by counter, then by proposer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
pub struct Ballot {
    /// The counter, which only grows.
    pub counter: u64,
    /// The proposer.
    pub node: NodeId,
}

/// What an acceptor signs when it accepts a map. Only such a signature is a vote.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Statement {
    /// The cluster number.
    pub cluster: u64,
    /// The version of the map.
    pub version: u64,
    /// The ballot in which the map was accepted.
    pub ballot: Ballot,
    /// The members of the map, so that a chain of statements proves who may sign the next one.
    pub members: BTreeSet<NodeId>,
    /// The SHA-256 of the encoded map.
    pub map: [u8; 32],
    /// Fields that this release does not know.
    pub unknown: Unknown,
}

fields! { Statement { 1 cluster, 2 version, 3 ballot, 4 members, 5 map, ..unknown } }

/// The signature of an acceptor under a [`Statement`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vote {
    /// The acceptor's public key. Its hash is the acceptor's id.
    pub key: PublicKey,
    /// The signature, in [`crate::record::Domain::Map`].
    pub signature: Signature,
}

/// A statement with the signatures of a majority of the members at the version before it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Proof {
    /// The statement.
    pub statement: Statement,
    /// The votes for it.
    pub votes: Vec<Vote>,
}

/// A map with the proof that it was decided.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Decision {
    /// The map.
    pub map: AllocMap,
    /// The proof of the map.
    pub proof: Proof,
    /// The proofs of changes of the members since a version that the receiver knows, oldest first. They lead from the
    /// members that it knows to those that signed the map.
    pub history: Vec<Proof>,
    /// How the cluster came from earlier ones, oldest first, for a host that knows no map or one of an earlier cluster.
    pub recoveries: Vec<RecoveryProof>,
}

fields! { Decision { 1 map, 2 proof, 3 history optional, 4 recoveries optional } }

/// A cluster that its survivors continue under a new number, because the majority of its members is lost for good.
///
/// Each survivor signs it, in [`crate::record::Domain::Recovery`]. The first map of the new cluster follows from it and
/// from the last map of the old one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Recovery {
    /// The number of the cluster whose majority is lost.
    pub from: u64,
    /// The version of its last map that the survivors know. The new cluster begins with the next one.
    pub version: u64,
    /// The SHA-256 of that map, encoded.
    pub map: [u8; 32],
    /// The number of the new cluster, drawn at random.
    pub cluster: u64,
    /// The members of the new cluster: all that are left.
    pub survivors: BTreeSet<NodeId>,
    /// The ballot in which they accept the first map of the new cluster. Its node is the host on which it was requested.
    pub ballot: Ballot,
    /// When it was requested, by the clock of that host, in milliseconds since 1970.
    pub at_ms: u64,
}

fields! {
    Recovery { 1 from, 2 version, 3 map, 4 cluster, 5 survivors, 6 ballot, 7 at_ms }
}

/// A recovery with the signature of each survivor.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct RecoveryProof {
    /// The recovery.
    pub recovery: Recovery,
    /// The signatures.
    pub votes: Vec<Vote>,
}

/// Why a host does not consent to a recovery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Dissent {
    /// It sees a majority of the members, or saw one lately.
    Majority {
        /// The members that it sees, without itself.
        present: BTreeSet<NodeId>,
    },
    /// It sees a member that is not among the survivors.
    Sees(NodeId),
    /// It is not a member, knows another map, or takes part in no agreement.
    OtherMap,
    /// A recovery was requested on it, too.
    Busy,
}

variants! {
    Dissent {
        1 Majority { 1 present: present },
        2 Sees { 1 0: node },
        3 OtherMap {},
        4 Busy {},
    }
}

/// The two signatures of a survivor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Consent {
    /// That under the [`Recovery`].
    pub recovery: Vote,
    /// That under the [`Statement`] about the first map of the new cluster.
    pub map: Vote,
}

/// A message of the consensus protocol.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AllocMessage {
    /// Phase one: asks for a promise to take part in no earlier ballot.
    Prepare {
        /// The ballot.
        ballot: Ballot,
        /// The last agreed version that the proposer knows.
        known: u64,
    },
    /// The answer to [`Self::Prepare`].
    Promise {
        /// The ballot.
        ballot: Ballot,
        /// The last map that the sender accepted, with its ballot.
        accepted: Option<(Ballot, AllocMap)>,
        /// The last agreed map that the sender knows, if it is later than the proposer's.
        learned: Option<Box<Decision>>,
    },
    /// Phase two: asks to accept a map.
    Accept {
        /// The ballot.
        ballot: Ballot,
        /// The map.
        map: AllocMap,
    },
    /// As [`Self::Accept`], for an acceptor that knows the map before.
    AcceptStep {
        /// The ballot.
        ballot: Ballot,
        /// The difference to the map before.
        step: MapStep,
    },
    /// The answer to [`Self::Accept`] and [`Self::AcceptStep`].
    Accepted {
        /// The ballot.
        ballot: Ballot,
        /// The sender's vote for the map.
        vote: Vote,
    },
    /// The answer to [`Self::Prepare`], [`Self::Accept`] or [`Self::AcceptStep`] of an acceptor that promised a later ballot.
    Nack {
        /// The refused ballot.
        ballot: Ballot,
        /// The promised ballot.
        promised: Ballot,
    },
    /// A map that a majority agreed on, with its proof.
    Learn(Box<Decision>),
    /// As [`Self::Learn`], for a host that knows the map before.
    Decided {
        /// The difference to the map before.
        step: MapStep,
        /// The proof of the map.
        proof: Proof,
    },
    /// Asks for the agreed map. Answered with [`Self::Learn`] if the receiver's is later than `known`.
    Ask {
        /// The sender's version.
        known: u64,
    },
    /// Asks the coordinator to propose a change.
    Request {
        /// The requester's number for it.
        id: u64,
        /// The change.
        change: Change,
    },
    /// The answer to [`Self::Request`].
    Reply {
        /// The requester's number.
        id: u64,
        /// The version that contains the change, or why it was refused.
        result: Result<u64, Refusal>,
    },
    /// Asks a survivor to consent to a recovery.
    Recover(Box<Recovery>),
    /// The answer to [`Self::Recover`].
    Consent {
        /// The number of the new cluster.
        cluster: u64,
        /// The signatures, or why there are none.
        result: Result<Consent, Dissent>,
    },
    /// Asks whether a cluster was recovered. Answered with [`Self::Learn`], with the recoveries since.
    AskRecovery {
        /// The number of the sender's cluster.
        cluster: u64,
    },
    /// Tells a member of the old cluster that it was recovered.
    Recovered(Box<RecoveryProof>),
    /// The answer to [`Self::Recovered`] of a host that goes on in the old cluster, because its majority lives.
    GoesOn {
        /// The number of the cluster that it does not join.
        cluster: u64,
    },
}

variants! {
    AllocMessage {
        1 Prepare { 1 ballot: ballot, 2 known: known },
        2 Promise { 1 ballot: ballot, 2 accepted: accepted optional, 3 learned: learned optional },
        3 Accept { 1 ballot: ballot, 2 map: map },
        4 Accepted { 1 ballot: ballot, 2 vote: vote },
        5 Nack { 1 ballot: ballot, 2 promised: promised },
        6 Learn { 1 0: decision },
        7 Ask { 1 known: known },
        8 Request { 1 id: id, 2 change: change },
        9 Reply { 1 id: id, 2 result: result },
        10 AcceptStep { 1 ballot: ballot, 2 step: step },
        11 Decided { 1 step: step, 2 proof: proof },
        12 Recover { 1 0: recovery },
        13 Consent { 1 cluster: cluster, 2 result: result },
        14 AskRecovery { 1 cluster: cluster },
        15 Recovered { 1 0: proof },
        16 GoesOn { 1 cluster: cluster },
    }
}
