//! Consensus on the allocation map ([`AllocMap`]): which hosts are members, and which member holds which block of
//! addresses.
//!
//! The map is one replicated register. Each *decree* replaces the map of version v by one of
//! version v + 1, and is decided by single-decree Paxos (Lamport, *Paxos Made Simple*, 2001). As
//! in CASPaxos (Rystsov, *CASPaxos: Replicated State Machines without logs*, 2018) there is no log
//! and no leader: messages carry the whole value, any member may propose, and a change is a function of the
//! previous map. Maps are small and change rarely, so simplicity matters more than throughput.
//!
//! | file | content |
//! | --- | --- |
//! | `acceptor.rs` | the durable state of a node, and how it votes |
//! | `replica/attempt.rs` | one ballot of a proposer |
//! | `queue.rs` | the pending changes, and what each waits for |
//! | `replica.rs` | the state machine around these: messages, requests, time |
//! | `change.rs` | the effect of a change on a map |
//!
//! # The rules
//!
//! M(v) denotes the members that the agreed map of version v names.
//!
//! 1. An acceptor promises and accepts as in Paxos, with one ballot for all versions, and *accepts
//!    a map of version v + 1 only while v is the last version it knows to be agreed*. One that
//!    knows an earlier version requests v first; one that knows a later version replies with it.
//! 2. A proposer that knows v prepares with a majority of M(v). If one of them knows a later map,
//!    the proposer adopts that map and restarts. Of the maps of version v + 1 that they accepted it
//!    proposes the one with the highest ballot, unchanged. Only if there is none, it proposes its own.
//! 3. A map is decided when a majority of M(v) *and* a majority of M(v + 1) accepted it in one
//!    ballot.
//! 4. A ballot number is used once: the proposer stores its own promise on disk before it sends the ballot.
//!
//! # Why no two maps of one version are ever decided
//!
//! By induction over versions: let v be unique, and let X of version v + 1 be decided in ballot b,
//! by a majority A of M(v). Take the lowest ballot c > b that proposes another map for v + 1. Its
//! proposer prepared with a majority Q of M(v); some acceptor a is in A and Q, and accepted X
//! before it promised c. By rule 1 any map that a accepted in between had version v + 1 or later, since
//! the version that a knows to be agreed never decreases. If it was later, a knew v + 1 and replied with it, and c
//! proposed nothing on v. Otherwise a reported a map of version v + 1 and of a ballot from b to c, and the
//! highest such report, from a or another, is X because c is the lowest exception. So c proposes
//! X. A map that is older than v + 1 and has a higher ballot does not hide X from the proposer,
//! since it looks only at maps of version v + 1.
//!
//! This needs only the majority of M(v). The majority of M(v + 1) matters afterwards: once a
//! change is reported as done, the new members can continue even if every old member is
//! lost, however many members one decree replaces.
//!
//! A proposal that fails halfway may still be completed later by another proposer, at the version
//! it was made for, and at no later one. For that reason every change is idempotent, and [`Forget`] and
//! [`Release`] are proposed only by the host that received the request: a late duplicate of a
//! forwarded one could take away what was claimed again since. *A host that requests
//! [`Release`] must not use the block from that moment on, and must repeat the request until it succeeds*.
//!
//! Even a change without effect, or a refused one, is answered only after a majority has replied: the answer holds
//! for the latest map, not for the one that happens to be known locally.
//!
//! # Who proposes
//!
//! Any host may propose at any time, but two proposers delay each other. So requests go to the coordinator, the
//! smallest live member, which makes one decree of all pending requests. If it does not answer, the host proposes
//! the change itself after [`DELEGATE_MS`].
//!
//! # Integration
//!
//! The crate is a state machine without clock, I/O or randomness: [`Replica`] takes messages,
//! requests and the time, and returns an [`Output`]. If its `persist` is set, [`Replica::durable`]
//! must be on disk before the caller acts on anything else in the output.
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
pub use change::{MAX_BLOCKS_PER_CLAIM, apply, apply_all};
pub use queue::MAX_REMOTE_REQUESTS;
pub use replica::Replica;

use ovl_proto::alloc::{AllocMessage, Refusal};
use ovl_proto::id::NodeId;

/// How long a request may take before it fails with [`Refusal::NoMajority`], in milliseconds.
pub const DEADLINE_MS: u64 = 3000;
/// How long a host waits for the coordinator before it proposes the change itself, in milliseconds.
pub const DELEGATE_MS: u64 = 500;
/// The interval after which an unanswered message is sent again, in milliseconds.
pub const RESEND_MS: u64 = 100;

/// The actions that the caller must perform, in this order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[must_use]
pub struct Output {
    /// Whether to write [`Replica::durable`] to disk, and sync it, before the caller acts on anything below.
    pub persist: bool,
    /// The messages to send, in order. Any of them may be lost.
    pub send: Vec<(NodeId, AllocMessage)>,
    /// The events for the rest of the daemon.
    pub events: Vec<Event>,
}

/// An event for the rest of the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// [`Replica::map`] has a later version.
    Learned,
    /// A request of this host is completed or refused.
    Done {
        /// The number that [`Replica::request`] returned.
        id: u64,
        /// The version of the map that contains the change, which is known locally.
        result: Result<u64, Refusal>,
    },
    /// A peer has a map of another cluster, because both hosts were bootstrapped. Reported for every such message.
    ForeignCluster {
        /// The peer.
        from: NodeId,
        /// The number of its cluster.
        cluster: u64,
    },
}

impl Output {
    fn send(&mut self, to: NodeId, message: AllocMessage) {
        self.send.push((to, message));
    }
}

/// Returns the majority of a number of members.
fn majority(of: usize) -> usize {
    of / 2 + 1
}
