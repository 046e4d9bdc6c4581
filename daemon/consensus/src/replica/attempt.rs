//! A ballot of a proposer, from the first message to the decision.

use std::collections::BTreeSet;

use ovl_proto::alloc::{AllocMap, AllocMessage, Ballot, Refusal};
use ovl_proto::id::NodeId;

use super::Replica;
use crate::{Output, RESEND_MS, apply_all, majority};

/// A ballot in flight. It is dropped as soon as a later map is known, so it always builds on the map that its
/// proposer knows.
#[derive(Debug)]
pub(super) struct Attempt {
    ballot: Ballot,
    phase: Phase,
    pub(super) resend_at: u64,
}

#[derive(Debug)]
enum Phase {
    Prepare {
        promised: BTreeSet<NodeId>,
        /// The accepted map with the highest ballot, which must be completed before any other proposal.
        best: Option<(Ballot, AllocMap)>,
    },
    Accept {
        map: AllocMap,
        accepted: BTreeSet<NodeId>,
        /// The results of the changes in the map, by their keys in the queue.
        results: Vec<(u64, Result<(), Refusal>)>,
    },
}

impl Replica {
    /// Starts a ballot for the pending changes that this node proposes itself.
    pub(super) fn start(&mut self, now: u64, out: &mut Output) {
        // When the ballot numbers are exhausted nothing can be proposed, because a number must not be used twice.
        let Some(counter) = self.durable.promised.counter.max(self.highest_seen).checked_add(1) else {
            self.not_before = now.saturating_add(RESEND_MS);
            return;
        };
        let ballot = Ballot { counter, node: self.me };
        self.durable.promised = ballot;
        out.persist = true;
        let mut attempt = Attempt {
            ballot,
            phase: Phase::Prepare { promised: BTreeSet::from([self.me]), best: None },
            resend_at: now,
        };
        attempt.report(self.durable.accepted.clone(), self.durable.learned.version);
        self.attempt = Some(attempt);
        self.resend(now, out);
        self.propose_if_promised(now, out);
    }

    pub(super) fn on_promise(
        &mut self,
        now: u64,
        from: NodeId,
        ballot: Ballot,
        accepted: Option<(Ballot, AllocMap)>,
        out: &mut Output,
    ) {
        let learned = &self.durable.learned;
        let Some(attempt) = self.attempt.as_mut().filter(|attempt| attempt.ballot == ballot) else { return };
        let Phase::Prepare { promised, .. } = &mut attempt.phase else { return };
        if !learned.members.contains(&from) {
            return;
        }
        promised.insert(from);
        self.heard.insert(from, now);
        attempt.report(accepted, learned.version);
        self.propose_if_promised(now, out);
    }

    fn propose_if_promised(&mut self, now: u64, out: &mut Output) {
        let learned = &self.durable.learned;
        let Some(attempt) = &mut self.attempt else { return };
        let Phase::Prepare { promised, best } = &mut attempt.phase else { return };
        if !has_majority(promised, &learned.members) {
            return;
        }
        let (map, results) = match best.take() {
            Some((_, map)) => (map, Vec::new()),
            None => {
                let (keys, changes): (Vec<u64>, Vec<_>) = self.queue.own().unzip();
                let (map, results) = apply_all(learned, changes);
                let results: Vec<_> = keys.into_iter().zip(results).collect();
                let Some(map) = map else {
                    // A majority has promised and knows no later map, so the results hold.
                    let version = learned.version;
                    self.attempt = None;
                    self.failures = 0;
                    self.finish_all(results, version, out);
                    return;
                };
                (map, results)
            }
        };
        // This node may have promised another proposer's later ballot since this one started.
        if self.durable.promised > attempt.ballot {
            self.give_way(now);
            return;
        }
        let mut accepted = BTreeSet::new();
        if learned.members.contains(&self.me) || map.members.contains(&self.me) {
            out.persist |= self.durable.accept(attempt.ballot, &map);
            accepted.insert(self.me);
        }
        attempt.phase = Phase::Accept { map, accepted, results };
        self.resend(now, out);
        self.decide_if_accepted(out);
    }

    pub(super) fn on_accepted(&mut self, now: u64, from: NodeId, ballot: Ballot, out: &mut Output) {
        let learned = &self.durable.learned;
        let Some(attempt) = self.attempt.as_mut().filter(|attempt| attempt.ballot == ballot) else { return };
        let Phase::Accept { map, accepted, .. } = &mut attempt.phase else { return };
        if !learned.members.contains(&from) && !map.members.contains(&from) {
            return;
        }
        accepted.insert(from);
        self.heard.insert(from, now);
        self.decide_if_accepted(out);
    }

    fn decide_if_accepted(&mut self, out: &mut Output) {
        let Some(Attempt { phase: Phase::Accept { map, accepted, .. }, .. }) = &self.attempt else { return };
        let old = &self.durable.learned.members;
        if !has_majority(accepted, old) || !has_majority(accepted, &map.members) {
            return;
        }
        let recipients: BTreeSet<_> = old.union(&map.members).chain(&self.alive).copied().collect();
        for node in recipients.into_iter().filter(|node| *node != self.me) {
            out.send(node, AllocMessage::Learn(map.clone()));
        }
        let map = map.clone();
        self.learn(&map, out);
    }

    /// Ends the ballot because a later map is known. If that map is its own, its changes are done; if not, they wait
    /// for the next ballot.
    pub(super) fn end_attempt(&mut self, out: &mut Output) {
        self.failures = 0;
        let Some(Attempt { phase: Phase::Accept { map, results, .. }, .. }) = self.attempt.take() else {
            return;
        };
        if map == self.durable.learned {
            self.finish_all(results, map.version, out);
        }
    }

    /// Handles a reply that the sender promised a later ballot.
    pub(super) fn on_nack(&mut self, now: u64, from: NodeId, ballot: Ballot, promised: Ballot) {
        if self.attempt.as_ref().is_none_or(|attempt| attempt.ballot != ballot) {
            return;
        }
        if self.durable.learned.members.contains(&from) {
            self.heard.insert(from, now);
        }
        self.highest_seen = self.highest_seen.max(promised.counter);
        self.give_way(now);
    }

    /// Handles a promise of this node to another proposer. A ballot in its prepare phase is lost then. One that was
    /// accepted locally may still succeed.
    pub(super) fn on_promise_to_other(&mut self, now: u64) {
        let preparing = |attempt: &Attempt| matches!(attempt.phase, Phase::Prepare { .. });
        if self.attempt.as_ref().is_some_and(preparing) {
            self.give_way(now);
        }
    }

    /// Drops the ballot and waits for a random time before the next one. The time grows with each failure, so that
    /// two proposers do not prevent each other's success forever.
    fn give_way(&mut self, now: u64) {
        self.attempt = None;
        let window = 10_u64 << self.failures.min(4);
        self.failures = self.failures.saturating_add(1);
        self.not_before = now.saturating_add(window + self.random() % (2 * window + 1));
    }

    /// Sends the ballot's message to all members that have not answered it.
    pub(super) fn resend(&mut self, now: u64, out: &mut Output) {
        let learned = &self.durable.learned;
        let Some(attempt) = &mut self.attempt else { return };
        attempt.resend_at = now.saturating_add(RESEND_MS);
        let ballot = attempt.ballot;
        match &attempt.phase {
            Phase::Prepare { promised, .. } => {
                for to in learned.members.difference(promised) {
                    out.send(*to, AllocMessage::Prepare { ballot, known: learned.version });
                }
            }
            Phase::Accept { map, accepted, .. } => {
                for to in learned.members.union(&map.members).filter(|to| !accepted.contains(to)) {
                    // A joining host needs the agreed map before it can accept the next one.
                    if !learned.members.contains(to) {
                        out.send(*to, AllocMessage::Learn(learned.clone()));
                    }
                    out.send(*to, AllocMessage::Accept { ballot, map: map.clone() });
                }
            }
        }
    }

    /// Resends the accept message to a node that could not accept because it lacked the agreed map, which it was sent
    /// now.
    pub(super) fn resend_accept(&self, to: NodeId, out: &mut Output) {
        let Some(Attempt { ballot, phase: Phase::Accept { map, accepted, .. }, .. }) = &self.attempt else {
            return;
        };
        let concerned = self.durable.learned.members.contains(&to) || map.members.contains(&to);
        if concerned && !accepted.contains(&to) {
            out.send(to, AllocMessage::Accept { ballot: *ballot, map: map.clone() });
        }
    }

    /// Returns the error for a missing majority, with the number of members that have answered since a time.
    ///
    /// It counts the old members, or the new ones if the old ones are not what is missing.
    pub(super) fn shortage(&self, since: u64) -> Refusal {
        let old = &self.durable.learned.members;
        let electorate = match &self.attempt {
            Some(Attempt { phase: Phase::Accept { map, accepted, .. }, .. })
                if has_majority(accepted, old) =>
            {
                &map.members
            }
            Some(_) | None => old,
        };
        let answered =
            |node: &&NodeId| **node == self.me || self.heard.get(*node).is_some_and(|heard| *heard >= since);
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Refusal::NoMajority {
            answered: count(electorate.iter().filter(answered).count()),
            needed: count(majority(electorate.len())),
            members: count(electorate.len()),
        }
    }
}

impl Attempt {
    /// Records the map that an acceptor, which may be this node, accepted before it promised.
    fn report(&mut self, accepted: Option<(Ballot, AllocMap)>, learned: u64) {
        let Phase::Prepare { best, .. } = &mut self.phase else { return };
        let Some((ballot, map)) = accepted.filter(|(_, map)| map.version.checked_sub(1) == Some(learned))
        else {
            return;
        };
        if best.as_ref().is_none_or(|(best, _)| *best < ballot) {
            *best = Some((ballot, map));
        }
    }
}

fn has_majority(votes: &BTreeSet<NodeId>, members: &BTreeSet<NodeId>) -> bool {
    votes.intersection(members).count() >= majority(members.len())
}
