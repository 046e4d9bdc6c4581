//! Agreement on the allocation map ([`AllocMap`]): which hosts are members, and which of them
//! holds which block of addresses.
//!
//! The map is one replicated register. Each *decree* replaces the map of version v by one of
//! version v + 1, and is decided by single-decree Paxos (Lamport, *Paxos Made Simple*, 2001). As
//! in CASPaxos (Rystsov, *CASPaxos: Replicated State Machines without logs*, 2018) there is no log
//! and no leader: the whole value travels, anybody may propose, and a change is a function of the
//! map before it. Maps are small and change rarely, so simplicity wins over throughput.
//!
//! | file | what is in it |
//! | --- | --- |
//! | `acceptor.rs` | what a node must never forget, and how it votes |
//! | `replica/attempt.rs` | one ballot of a proposer |
//! | `queue.rs` | the changes that wait, and on whom |
//! | `replica.rs` | the state machine around these: messages, requests, time |
//! | `change.rs` | what a change makes of a map |
//!
//! # The rules
//!
//! Write M(v) for the members that the agreed map v names.
//!
//! 1. An acceptor promises and accepts as in Paxos, with one ballot for all versions, and *accepts
//!    a map of version v + 1 only while v is the last version it knows to be agreed*. One that
//!    knows less asks for v first; one that knows more says so.
//! 2. A proposer that knows v prepares with a majority of M(v). If one of them knows a later map,
//!    the proposer takes that and starts anew. Of the maps of version v + 1 that they accepted it
//!    proposes the one with the highest ballot, unchanged; only if there is none, its own.
//! 3. A map is decided when a majority of M(v) *and* a majority of M(v + 1) accepted it in one
//!    ballot.
//! 4. A ballot number is used once: the proposer promises it to itself, on disk, before it leaves.
//!
//! # Why no two maps of one version are ever decided
//!
//! By induction over versions: let v be unique, and let X of version v + 1 be decided in ballot b,
//! by a majority A of M(v). Take the lowest ballot c > b that proposes another map for v + 1. Its
//! proposer prepared with a majority Q of M(v); some acceptor a is in A and Q, and accepted X
//! before it promised c. By rule 1 whatever a accepted in between had version v + 1 or later, since
//! what a knows to be agreed never gets older. If later, a knew v + 1, said so, and c proposed
//! nothing on v. Otherwise a reported a map of version v + 1 and of a ballot from b to c, and the
//! highest such report, from a or another, is X because c is the lowest exception. So c proposes
//! X. A map that is older than v + 1 and has a higher ballot does not hide X from the proposer,
//! since it looks only at maps of version v + 1.
//!
//! The majority of M(v) is what this needs. The majority of M(v + 1) is for afterwards: once a
//! change is reported as done, the new electorate can go on even if every host of the old one is
//! gone, whatever number of members one decree replaces.
//!
//! A proposal that fails halfway may still be completed later by another proposer, at the version
//! it was made for, and at no later one. That is why every change is idempotent, why [`Forget`] and
//! [`Release`] are only ever proposed by the host that was asked to (a late duplicate of a
//! forwarded one could take away what was claimed anew since), and why *a host that asks for
//! [`Release`] must not use the block from that moment on, and must ask again until it succeeds*.
//!
//! Even a change that finds nothing to do, or is refused, is answered only after a majority was
//! asked: the answer holds for the latest map, not for the one that happens to be known here.
//!
//! # Who proposes
//!
//! Any host may, at any time, but two at once delay each other. So requests go to the smallest
//! live member, which makes one decree of all that wait. If it does not answer, the host proposes
//! itself after [`DELEGATE_MS`].
//!
//! # The shell's part
//!
//! All of it is a state machine without clock, I/O or randomness: [`Replica`] takes messages,
//! requests and the time, and gives an [`Output`]. If its `persist` is set, [`Replica::durable`]
//! must be on disk before anything else in the output is acted upon.
//!
//! [`Forget`]: ovl_proto::alloc::Change::Forget
//! [`Release`]: ovl_proto::alloc::Change::Release
//! [`AllocMap`]: ovl_proto::alloc::AllocMap

mod acceptor;
mod change;
mod queue;
mod replica;
#[cfg(test)]
mod tests;

pub use acceptor::Durable;
pub use change::{MOST_BLOCKS_AT_ONCE, apply, apply_all};
pub use queue::MOST_REMOTE_REQUESTS;
pub use replica::Replica;

use ovl_proto::alloc::{AllocMessage, Refusal};
use ovl_proto::id::NodeId;

/// How long a request may take before it fails with [`Refusal::NoMajority`].
pub const DEADLINE_MS: u64 = 3000;
/// How long the coordinator has to answer before a host proposes its change itself.
pub const DELEGATE_MS: u64 = 500;
/// When an unanswered message is sent again.
pub const RESEND_MS: u64 = 100;

/// What the shell has to do, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[must_use]
pub struct Output {
    /// Write [`Replica::durable`] to disk, and sync it, before anything below is acted upon.
    pub persist: bool,
    /// Messages, in the order in which they should leave. Any of them may be lost.
    pub send: Vec<(NodeId, AllocMessage)>,
    /// What the rest of the daemon should know.
    pub events: Vec<Event>,
}

/// What the rest of the daemon should know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// [`Replica::map`] is a later one.
    Learned,
    /// A request of this host is done, at this version of the map (which is known here), or not.
    Done {
        /// As [`Replica::request`] gave it.
        id: u64,
        /// The version that has it.
        result: Result<u64, Refusal>,
    },
    /// A peer has a map of another cluster: both were bootstrapped. Comes with every such message.
    ForeignCluster {
        /// The peer.
        from: NodeId,
        /// Its cluster.
        cluster: u64,
    },
}

impl Output {
    fn send(&mut self, to: NodeId, message: AllocMessage) {
        self.send.push((to, message));
    }
}

/// How many of so many are a majority.
fn majority(of: usize) -> usize {
    of / 2 + 1
}
