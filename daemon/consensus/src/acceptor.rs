//! The acceptor: what a node must never forget, and how it votes.

use ovl_proto::alloc::{AllocMap, AllocMessage, Ballot};
use serde::{Deserialize, Serialize};

/// What must be on disk before an answer leaves. A node that forgot it could vote twice, so a node
/// that lost it must come back under another id.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Durable {
    /// No earlier ballot is taken part in.
    pub promised: Ballot,
    /// The map accepted last, while it is not known to be decided; always of the version after
    /// `learned`.
    pub accepted: Option<(Ballot, AllocMap)>,
    /// The last map known to be agreed; that of cluster 0 where none is.
    pub learned: AllocMap,
}

/// How an acceptor answers.
pub(super) struct Answer {
    pub(super) message: Option<AllocMessage>,
    /// The acceptor knows less than the proposer and should ask it for the agreed map.
    pub(super) ask: bool,
    pub(super) persist: bool,
}

impl Answer {
    fn only(message: AllocMessage) -> Self {
        Self { message: Some(message), ask: false, persist: false }
    }
}

impl Durable {
    /// Whether no map has been heard of.
    pub(super) fn is_fresh(&self) -> bool {
        self.learned.cluster == 0
    }

    /// Whether a map belongs to another cluster than ours.
    pub(super) fn is_foreign(&self, cluster: u64) -> bool {
        cluster != 0 && !self.is_fresh() && cluster != self.learned.cluster
    }

    pub(super) fn on_prepare(&mut self, ballot: Ballot, known: u64) -> Answer {
        if ballot < self.promised {
            return Answer::only(AllocMessage::Nack { ballot, promised: self.promised });
        }
        let persist = self.promised != ballot;
        self.promised = ballot;
        let learned = (self.learned.version > known).then(|| self.learned.clone());
        let promise = AllocMessage::Promise { ballot, accepted: self.accepted.clone(), learned };
        Answer { message: Some(promise), ask: known > self.learned.version, persist }
    }

    pub(super) fn on_accept(&mut self, ballot: Ballot, map: &AllocMap) -> Answer {
        if map.version <= self.learned.version {
            // Decided long ago. The proposer is behind, or its message was late.
            return Answer::only(AllocMessage::Learn(self.learned.clone()));
        }
        if ballot < self.promised {
            return Answer::only(AllocMessage::Nack { ballot, promised: self.promised });
        }
        // See rule 1 in the module's documentation: not on top of what is not known to be agreed.
        if self.is_fresh() || map.version - 1 > self.learned.version {
            return Answer { message: None, ask: true, persist: false };
        }
        let follows = map.cluster == self.learned.cluster && map.previous_members == self.learned.members;
        if !follows || map.members.is_empty() {
            return Answer { message: None, ask: false, persist: false };
        }
        let persist = self.accept(ballot, map);
        Answer { message: Some(AllocMessage::Accepted { ballot }), ask: false, persist }
    }

    /// Accepts a map that was checked, and says whether that is news.
    pub(super) fn accept(&mut self, ballot: Ballot, map: &AllocMap) -> bool {
        // One ballot has one map.
        let known = self.accepted.as_ref().is_some_and(|(accepted, _)| *accepted == ballot);
        self.promised = ballot;
        if !known {
            self.accepted = Some((ballot, map.clone()));
        }
        !known
    }

    /// Takes over an agreed map if it is later than ours and of our cluster, and says whether.
    pub(super) fn learn(&mut self, map: &AllocMap) -> bool {
        let later = map.cluster != 0 && map.version > self.learned.version;
        if !later || self.is_foreign(map.cluster) {
            return false;
        }
        self.learned.clone_from(map);
        // What is decided is of no use to a proposer any more: one that does not know of the
        // decision is told.
        if self.accepted.as_ref().is_some_and(|(_, accepted)| accepted.version <= map.version) {
            self.accepted = None;
        }
        true
    }
}
