//! Consensus on the allocation map ([`AllocMap`]): which hosts are members, and which member holds which block of
//! addresses.
//!
//! The map is one replicated register. Each *decree* replaces the map of version v by one of
//! version v + 1, and is decided by single-decree Paxos (Lamport, *Paxos Made Simple*, 2001). As
//! in CASPaxos (Rystsov, *CASPaxos: Replicated State Machines without logs*, 2018) there is no log
//! and no leader: any member may propose, and a change is a function of the previous map. A message means the whole
//! value. To hosts that know the map before, it is sent as the difference ([`MapStep`]) with the hash of the result; a
//! host that cannot carry it out asks for the whole map. So a decree costs what it changes, however large the map is.
//!
//! | file | content |
//! | --- | --- |
//! | `acceptor.rs` | the durable state of a node, and how it votes |
//! | `replica/attempt.rs` | one ballot of a proposer |
//! | `proof.rs` | signatures under a map, and whether they are those of a majority |
//! | `chain.rs` | which maps a host believes, by the proofs since the one that it knows |
//! | `offers.rs` | the first map of a new host |
//! | `queue.rs` | the pending changes, and what each waits for |
//! | `replica.rs` | the state machine around these: messages, requests, time |
//! | `change.rs` | the effect of a change on a map, and what one decree may change |
//! | `recovery.rs`, `replica/recover.rs` | a cluster whose majority is lost for good, and hosts that were left out of one |
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
//! 5. An acceptor accepts only a valid step from the map that it knows ([`is_step`]), and one map in a ballot. It
//!    signs what it accepts: cluster, version, ballot, members and the hash of the map ([`Statement`]). Its promise
//!    counts only if the map that it reports is such a step.
//! 6. A map is learned only with its proof: the signatures of majorities by rule 3, all of one ballot. A host that knows
//!    v learns a later map if a majority of the members that it knows signed it. If they changed since, it needs the
//!    proofs of the changes in between: each is signed by a majority of the members that the one before it names.
//! 7. Only members of the known map promise, propose and refuse. Others may ask for the map, request their own
//!    admission, vote for the map that admits them, and pass on proofs. A promise counts only for the ballot in flight.
//! 8. A ballot is refused if its counter is more than [`MAX_BALLOT_STEP`] above all that the acceptor promised or knows
//!    a proof of. The distance grows by as much each second in which such a ballot comes.
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
//! since it looks only at maps of version v + 1. By rule 5 a proof has signatures of one ballot, and each of them is an
//! acceptance, so a map with a proof is decided in the sense of rule 3.
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
//! # Hosts that lie
//!
//! Signatures are verified where a map is learned, and by the proposer for each vote. Nothing else has to be believed:
//!
//! * **A host that is no member** has no vote that counts in any proof, and its other messages are dropped (rule 7). It
//!   can pass on proved maps only, and those are true. So an outsider, or a former member, cannot change what a host has
//!   learned. The exception is a host that has no map yet. It believes the majority of the peers that it asked, of those
//!   whose map is signed by its own members. An attacker that is most of what such a host reaches can keep it in a
//!   cluster of its own, and no other host is affected.
//! * **A member** can make another host learn only what a majority signed, which takes all but one of their votes from
//!   other members. Those that follow the rules sign valid steps only: the version grows by one, and no block passes from
//!   one holder to another. They report no map that they did not accept, and count no promise that contradicts rule 5.
//! * **Proofs of an older map** are not later than what is known, and those of another cluster name its number.
//! * **Counters**: a version grows by one per step, because acceptors sign nothing else. A ballot counter grows by at most
//!   2^24 for each promise, and each promise waits for the disk; 2^40 of them would be needed. A refusal raises the
//!   counter of a proposer by at most 2^16, so refusals that lie cannot drive it out of the range of other acceptors.
//! * **Competing ballots**: of one proposer, 16 ballots without a decision are promised at once, then one in a second.
//!   A refusal by one member does not end a ballot that a majority promises within [`RESEND_MS`].
//! * **Answers of the coordinator** are compared with the own map. If they do not hold there, the host proposes the change
//!   itself; a host that is not a member asks another one.
//!
//! A member that lies can delay what needs its vote, and it may do what any member may: forget and admit hosts, drop the
//! blocks of a network, release a block on behalf of its holder, and claim free ones, in a step each.
//!
//! **What a majority cannot survive is a member that votes twice**: it reports that it accepted nothing, or another map
//! than it did. Two majorities of an odd number of members may have this one member in common, and then both maps are
//! decided. No protocol with majorities prevents that: of three members, two must be able to decide without the third. To
//! exclude it, n members would have to decide with more than (n + f) / 2 votes for f liars, which is all three of three.
//! Availability with one dead host of three is worth more here. What remains is repaired: both maps are proved steps from
//! one map. Hosts that meet two proved maps of one version all take the one with the higher ballot, and report
//! [`Event::Fork`]. Among hosts that follow rule 1 this never happens.
//!
//! A host keeps the proofs of the last [`MAX_HISTORY`] changes of the members. One that was away for more of them still
//! follows if a majority of the members that it knows signed one of the kept ones. Otherwise it reports
//! [`Event::Unproved`], and must begin anew. An attacker with the identities of most former members can deceive a
//! host that was away since they were members, until it hears a map that it knows to be later.
//!
//! # Recovery from the loss of a majority
//!
//! Without a majority nothing can be decided, and no protocol lets a minority decide safely: what it cannot see may live
//! behind a cut. So a minority never goes on in its cluster. It begins another one, with a random number ([`Recovery`]), and
//! the rules above hold inside each cluster: statements, maps and proofs name its number, and are refused by hosts of
//! another one. An operator requests it on one survivor ([`Replica::recover`]), who has to know that the rest is gone.
//!
//! 1. *Survivors* are the requesting host and the members that it sees. Each of them must consent, with two signatures: one
//!    under the recovery, one under the first map of the new cluster, which follows from the recovery and the last map
//!    ([`first_map`]). A host consents only if it knows the same last map, has seen no majority of its members for
//!    [`LOST_MS`], and sees no member that is not among the survivors. The requesting host is held to the same.
//! 2. The requesting host moves to the new cluster once all consented and it has seen no majority meanwhile. Another survivor
//!    moves when it learns the map with all signatures, and rule 1 still holds for it at that moment. To consent is no promise
//!    to be kept on disk: before the move, a host is a member of the old cluster as if nothing had been, and it moves in one
//!    write to the disk.
//! 3. A host that consented to a recovery gives up one that it requested itself.
//! 4. The lost members are banned in the first map, and their blocks are free.
//! 5. A host that learns of a verified recovery of its cluster, and does not move by rule 2, is *left out*. It takes part in
//!    no agreement from then on, also after restarts: it neither promises, accepts nor proposes, and tells the other members
//!    of the old cluster, so that hosts which return together do not become a majority unnoticed.
//! 6. The exception is a host that has seen a majority of the old cluster for [`LOST_MS`] when it learns of the recovery: it
//!    *goes on*. So does a host that was left out if enough members go on that they are a majority with it, and one whose
//!    operator rejects the recovery ([`Replica::reject_recovery`]).
//! 7. A host that was left out moves to the new cluster only if its operator says so ([`Replica::accept_recovery`]). There it
//!    is a banned host until the members end the ban.
//!
//! **Within each cluster nothing changes.** The first map of the new cluster is the only one of its version: it follows from
//! the recovery, whose number is random, and a survivor signs no other map of that version, because it moves to the new
//! cluster with that map. What is decided afterwards is a decree of the survivors. A host is in one cluster at a time, so its
//! votes count in one. Ballot numbers are not used again, whatever the cluster, so a promise that was delayed counts for the
//! cluster in which its ballot was started, and it reports no accepted map of another one.
//!
//! **Two recoveries that are requested at once** on hosts that see each other cannot both be made: for both, each of the two
//! hosts would have to consent to the other's recovery before it requested its own (rule 3), and each after the other one did.
//!
//! **What it may cost** is what the operator cannot know: if the majority lives behind a cut, there are two clusters. Both
//! hand out the blocks of the other one's members. Neither uses entries of the other one's members, and both report it. What
//! the majority decided last, and no survivor learned, is lost.
//!
//! **A member that lies** can recover itself alone whenever it likes, because a recovery by one survivor has one signature.
//! No other host follows it: a survivor needs its own signature, and all others an act of their operator. A majority that lives goes
//! on (rule 6), and takes along those that restart. What a liar gains: hosts that have all just started, with no
//! majority seen for [`LOST_MS`], stop agreeing until their operators reject the recovery; and hosts of a minority that lost
//! its majority for as long consent to what it requests, without an operator. They are then in a cluster with the liar,
//! which their `status` says, and lose nothing that a minority could do. **Outsiders** can do neither: a recovery counts only
//! if a member that the host knows signed it.
//!
//! A host that is down for several recoveries in a row follows them if each has a survivor in common with the one before, and
//! at most [`MAX_RECOVERIES`] are kept.
//!
//! # Cost
//!
//! A change costs each learner one hash of the map and a majority of signature checks; the proposer checks as many votes,
//! an acceptor signs once. Promises, requests and repeated maps cost none.
//!
//! # Who proposes
//!
//! Any member may propose at any time, but two proposers delay each other. So requests go to the coordinator, the
//! smallest live member, which makes one decree of all pending requests. If it does not answer within [`DELEGATE_MS`],
//! a member proposes the change itself. A host that asks for admission asks another member after [`ADMIT_MS`],
//! which passes that on to the coordinator, or, if that one is silent, to the member after it. So two propose at most.
//!
//! # Integration
//!
//! The crate is a state machine without clock, I/O, randomness or cryptography: [`Replica`] takes messages,
//! requests and the time, signs and verifies through [`Signatures`], and returns an [`Output`]. If its `persist` is set, [`Replica::durable`]
//! must be on disk before the caller acts on anything else in the output.
//!
//! [`Statement`]: ovl_proto::alloc::Statement
//! [`Forget`]: ovl_proto::alloc::Change::Forget
//! [`Release`]: ovl_proto::alloc::Change::Release
//! [`AllocMap`]: ovl_proto::alloc::AllocMap
//! [`MapStep`]: ovl_proto::alloc::MapStep
//! [`Recovery`]: ovl_proto::alloc::Recovery

mod acceptor;
mod chain;
mod change;
#[cfg(any(test, fuzzing))]
#[path = "../tests/fake/mod.rs"]
#[allow(clippy::unwrap_used, reason = "for tests alone")]
mod fake;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod offers;
mod proof;
mod queue;
mod recovery;
mod replica;
#[cfg(test)]
mod tests;

pub use acceptor::{Durable, History, MAX_BALLOT_STEP, MAX_HISTORY};
pub use change::{MAX_BLOCKS_PER_CLAIM, apply, apply_all, is_step};
pub use proof::Signatures;
pub use queue::MAX_REMOTE_REQUESTS;
pub use recovery::{LOST_MS, MAX_RECOVERIES, first_map};
pub use replica::Replica;

use std::collections::BTreeSet;

use ovl_proto::alloc::{AllocMessage, Dissent, Refusal};
use ovl_proto::id::NodeId;

/// How long a request may take before it fails with [`Refusal::NoMajority`], in milliseconds.
pub const DEADLINE_MS: u64 = 3000;
/// How long a host waits for the coordinator before it proposes the change itself, in milliseconds.
pub const DELEGATE_MS: u64 = 500;
/// How long a host that is not a member waits for the coordinator before it asks another member for its admission, in
/// milliseconds. Longer than [`DELEGATE_MS`]: a coordinator that many hosts ask at once is slow, and would be slower if other
/// members proposed their admission as well.
pub const ADMIT_MS: u64 = 1500;
/// The interval after which an unanswered message is sent again, in milliseconds. It doubles each time, up to
/// [`MAX_RESEND_MS`]: hosts that are slow because they have much to do would have more to do.
pub const RESEND_MS: u64 = 100;
/// The maximum interval after which an unanswered message is sent again, in milliseconds.
pub const MAX_RESEND_MS: u64 = 800;

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
    /// A majority signed another map of a known version, in a higher ballot, and it was adopted. A member voted twice.
    Fork {
        /// The version.
        version: u64,
    },
    /// A later map cannot be verified from the known one. The sender lies or lacks the proofs, or this host was away
    /// for more changes of the members than hosts keep.
    Unproved {
        /// The version.
        version: u64,
    },
    /// A recovery that was requested on this host is complete, or failed.
    RecoveryEnded(RecoveryEnd),
}

/// How a requested recovery ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecoveryEnd {
    /// This host is a member of the new cluster, and the other survivors are told.
    Done,
    /// A host does not consent.
    Refused {
        /// The host.
        by: NodeId,
        /// Why.
        why: Dissent,
    },
    /// These hosts did not answer in time.
    Silent(BTreeSet<NodeId>),
    /// This host learned a later map, or of another recovery.
    Changed,
}

impl Output {
    fn send(&mut self, to: NodeId, message: AllocMessage) {
        self.send.push((to, message));
    }
}

/// Returns how many of this number of members are a majority.
pub fn majority(of: usize) -> usize {
    of / 2 + 1
}
