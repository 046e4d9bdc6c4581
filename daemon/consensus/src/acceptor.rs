//! The acceptor: the durable state of a node, and how it votes.

use std::sync::Arc;

use ovl_proto::alloc::{AllocMap, AllocMessage, Ballot, Decision, Proof, RecoveryProof};
use ovl_proto::wire::fields::Unknown;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::change::is_step;
use super::proof::{Signatures, statement};

/// How far a ballot may be above the highest one that the acceptor promised or knows a decision of. If none else comes,
/// the distance grows by as much each second.
///
/// A host without a majority tries about once in three seconds, so it stays below this for more than a year. A member
/// that exhausts the numbers needs 2^40 seconds.
pub const MAX_BALLOT_STEP: u64 = 1 << 24;

/// The maximum number of membership changes whose proofs a host keeps. At 60 members a proof has 4 KB.
pub const MAX_HISTORY: usize = 128;

/// The state that must be on disk before a reply is sent. A node that lost it could vote twice, so it must return
/// with another id.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Durable {
    /// The promised ballot. The node takes part in no earlier one.
    pub promised: Ballot,
    /// The last accepted map, until it is known to be decided. Its version is always that of `learned` plus one.
    pub accepted: Option<(Ballot, AllocMap)>,
    /// The last map known to be agreed. Its cluster number is 0 if none is known.
    pub learned: AllocMap,
    /// The proof of `learned`.
    pub proof: Proof,
    /// The proofs of the last changes of the members.
    pub history: History,
    /// How the cluster came from earlier ones, oldest first.
    pub recoveries: Vec<RecoveryProof>,
    /// The recovery that this node was left out of. Because of it, the node takes part in no agreement.
    pub held: Option<Box<RecoveryProof>>,
    /// The numbers of recovered clusters in spite of which this node goes on.
    pub refused: Vec<u64>,
    /// Fields that this release does not know.
    pub unknown: Unknown,
}

ovl_proto::fields! {
    Durable {
        1 promised, 2 accepted optional, 3 learned, 4 proof, 5 history optional, 6 recoveries optional, 7 held marked,
        8 refused optional, ..unknown
    }
}

/// The proofs of the last changes of the members, oldest first, at most [`MAX_HISTORY`]. Copies share their memory: the
/// state is copied for each save, and the history seldom changes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct History(Arc<Vec<Proof>>);

impl History {
    /// Returns the proofs, oldest first.
    pub fn proofs(&self) -> &[Proof] {
        &self.0
    }

    /// Adds proofs, and drops the oldest ones if there are too many.
    fn extend(&mut self, path: Vec<Proof>) {
        if path.is_empty() {
            return;
        }
        let proofs = Arc::make_mut(&mut self.0);
        proofs.extend(path);
        let surplus = proofs.len().saturating_sub(MAX_HISTORY);
        proofs.drain(..surplus);
    }
}

impl Serialize for History {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.as_slice().serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for History {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Vec::deserialize(deserializer).map(|proofs| Self(Arc::new(proofs)))
    }
}

/// The reply of an acceptor.
pub(super) struct Reply {
    pub(super) message: Option<AllocMessage>,
    /// Whether the acceptor must ask the proposer for a later agreed map.
    pub(super) ask: bool,
    pub(super) persist: bool,
}

impl Reply {
    fn only(message: AllocMessage) -> Self {
        Self { message: Some(message), ask: false, persist: false }
    }
}

impl Durable {
    /// Whether no map is known.
    pub(super) fn is_fresh(&self) -> bool {
        self.learned.cluster == 0
    }

    /// Whether a map belongs to another cluster.
    pub(super) fn is_foreign(&self, cluster: u64) -> bool {
        cluster != 0 && !self.is_fresh() && cluster != self.learned.cluster
    }

    /// Returns the highest counter that the acceptor promises.
    pub(super) fn highest_counter(&self) -> u64 {
        let known = self.promised.counter.max(self.proof.statement.ballot.counter);
        known.saturating_add(MAX_BALLOT_STEP)
    }

    pub(super) fn on_prepare(&mut self, ballot: Ballot, known: u64) -> Reply {
        if ballot < self.promised {
            return Reply::only(AllocMessage::Nack { ballot, promised: self.promised });
        }
        let persist = self.promised != ballot;
        self.promised = ballot;
        let learned = (self.learned.version > known).then(|| Box::new(self.decision_since(known)));
        let promise = AllocMessage::Promise { ballot, accepted: self.accepted.clone(), learned };
        Reply { message: Some(promise), ask: known > self.learned.version, persist }
    }

    pub(super) fn on_accept(&mut self, signatures: &dyn Signatures, ballot: Ballot, map: &AllocMap) -> Reply {
        let before = map.version.saturating_sub(1);
        if map.version <= self.learned.version {
            // The version is decided already. The proposer is behind, or its message was delayed.
            return Reply::only(AllocMessage::Learn(Box::new(self.decision_since(before))));
        }
        if ballot < self.promised {
            return Reply::only(AllocMessage::Nack { ballot, promised: self.promised });
        }
        // Rule 1 of the crate's documentation: accept only the successor of a map that is known to be agreed.
        if self.is_fresh() || before > self.learned.version {
            return Reply { message: None, ask: true, persist: false };
        }
        // Rule 5. If the proposer knows another map of this version, it learns that.
        if !is_step(&self.learned, map) {
            return Reply::only(AllocMessage::Learn(Box::new(self.decision_since(before))));
        }
        if self.accepted.as_ref().is_some_and(|(accepted, known)| *accepted == ballot && known != map) {
            // The proposer sent another map in the same ballot. A second vote could decide both.
            return Reply { message: None, ask: false, persist: false };
        }
        let persist = self.accept(ballot, map);
        let vote = signatures.sign(&statement(signatures, ballot, map));
        Reply { message: Some(AllocMessage::Accepted { ballot, vote }), ask: false, persist }
    }

    /// Accepts a checked map, the only one of its ballot. Returns whether the state has changed.
    pub(super) fn accept(&mut self, ballot: Ballot, map: &AllocMap) -> bool {
        let known = self.accepted.as_ref().is_some_and(|(accepted, _)| *accepted == ballot);
        self.promised = ballot;
        if !known {
            self.accepted = Some((ballot, map.clone()));
        }
        !known
    }

    /// Adopts a proved decision. `path` are the proofs of the membership changes up to it.
    pub(super) fn adopt(&mut self, decision: &Decision, path: Vec<Proof>) {
        let Decision { map, proof, .. } = decision;
        self.learned.clone_from(map);
        self.proof.clone_from(proof);
        self.history.extend(path);
        // A proposer no longer needs a decided map: if it does not know the decision, it is sent the map.
        if self.accepted.as_ref().is_some_and(|(_, accepted)| accepted.version <= map.version) {
            self.accepted = None;
        }
    }
}
