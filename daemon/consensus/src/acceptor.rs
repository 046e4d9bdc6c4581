//! The acceptor: the durable state of a node, and how it votes.

use ovl_proto::alloc::{AllocMap, AllocMessage, Ballot};
use serde::{Deserialize, Serialize};

/// The state that must be on disk before a reply is sent. A node that lost it could vote twice, so it must return
/// with another id.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Durable {
    /// The promised ballot. The node takes part in no earlier one.
    pub promised: Ballot,
    /// The last accepted map, until it is known to be decided. Its version is always that of `learned` plus one.
    pub accepted: Option<(Ballot, AllocMap)>,
    /// The last map known to be agreed. Its cluster number is 0 if none is known.
    pub learned: AllocMap,
}

/// The reply of an acceptor.
pub(super) struct Vote {
    pub(super) message: Option<AllocMessage>,
    /// Whether the acceptor must ask the proposer for a later agreed map.
    pub(super) ask: bool,
    pub(super) persist: bool,
}

impl Vote {
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

    pub(super) fn on_prepare(&mut self, ballot: Ballot, known: u64) -> Vote {
        if ballot < self.promised {
            return Vote::only(AllocMessage::Nack { ballot, promised: self.promised });
        }
        let persist = self.promised != ballot;
        self.promised = ballot;
        let learned = (self.learned.version > known).then(|| self.learned.clone());
        let promise = AllocMessage::Promise { ballot, accepted: self.accepted.clone(), learned };
        Vote { message: Some(promise), ask: known > self.learned.version, persist }
    }

    pub(super) fn on_accept(&mut self, ballot: Ballot, map: &AllocMap) -> Vote {
        if map.version <= self.learned.version {
            // The version is decided already. The proposer is behind, or its message was delayed.
            return Vote::only(AllocMessage::Learn(self.learned.clone()));
        }
        if ballot < self.promised {
            return Vote::only(AllocMessage::Nack { ballot, promised: self.promised });
        }
        // Rule 1 of the crate's documentation: accept only the successor of a map that is known to be agreed.
        if self.is_fresh() || map.version - 1 > self.learned.version {
            return Vote { message: None, ask: true, persist: false };
        }
        let follows = map.cluster == self.learned.cluster && map.previous_members == self.learned.members;
        if !follows || map.members.is_empty() {
            return Vote { message: None, ask: false, persist: false };
        }
        let persist = self.accept(ballot, map);
        Vote { message: Some(AllocMessage::Accepted { ballot }), ask: false, persist }
    }

    /// Accepts a checked map. Returns whether the state has changed.
    pub(super) fn accept(&mut self, ballot: Ballot, map: &AllocMap) -> bool {
        // A ballot proposes only one map.
        let known = self.accepted.as_ref().is_some_and(|(accepted, _)| *accepted == ballot);
        self.promised = ballot;
        if !known {
            self.accepted = Some((ballot, map.clone()));
        }
        !known
    }

    /// Adopts an agreed map if it is later than the known one and of the same cluster. Returns whether it was
    /// adopted.
    pub(super) fn learn(&mut self, map: &AllocMap) -> bool {
        let later = map.cluster != 0 && map.version > self.learned.version;
        if !later || self.is_foreign(map.cluster) {
            return false;
        }
        self.learned.clone_from(map);
        // A proposer no longer needs a decided map: if it does not know the decision, it is sent the map.
        if self.accepted.as_ref().is_some_and(|(_, accepted)| accepted.version <= map.version) {
            self.accepted = None;
        }
        true
    }
}
