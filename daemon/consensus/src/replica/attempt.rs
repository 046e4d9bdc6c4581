//! A ballot of a proposer, from the first message to the decision.

use std::collections::{BTreeMap, BTreeSet};

use ovl_proto::alloc::{AllocMap, AllocMessage, Ballot, Decision, MapStep, Proof, Refusal, Statement, Vote};
use ovl_proto::id::NodeId;

use super::Replica;
use crate::proof::{is_vote_of, statement};
use crate::{MAX_RESEND_MS, Output, RESEND_MS, apply_all, is_step, majority};

/// How far a refusal raises the counter of the next ballot at most. It is so small that a member that lies cannot drive
/// this proposer out of the range of other acceptors, which grows each second.
const MAX_RAISE: u64 = 1 << 16;

/// Time in milliseconds for which a ballot continues after its start although no request waits for its changes.
const MAX_BALLOT_MS: u64 = 10_000;

/// A ballot in flight. It is dropped as soon as a later map is known, so it always builds on the map that its
/// proposer knows.
#[derive(Debug)]
pub(super) struct Attempt {
    ballot: Ballot,
    phase: Phase,
    /// The members that promised a later ballot.
    refused: BTreeSet<NodeId>,
    pub(super) resend_at: u64,
    /// The interval after which its message is sent again the next time.
    resend_after: u64,
    /// When its first message was sent.
    started: u64,
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
        /// The difference to the known map. `None` if only the whole map expresses it.
        step: Option<Box<MapStep>>,
        /// What an acceptor of the map signs.
        statement: Statement,
        /// The verified votes.
        votes: BTreeMap<NodeId, Vote>,
        /// The results of the changes in the map, by their keys in the queue.
        results: Vec<(u64, Result<(), Refusal>)>,
    },
}

impl Replica {
    /// Starts a ballot for the pending changes that this node proposes itself.
    pub(super) fn start(&mut self, now: u64, out: &mut Output) {
        // When the ballot numbers are exhausted nothing can be proposed, because a number must not be used twice.
        let decided = self.durable.proof.statement.ballot.counter;
        let used = self.durable.promised.counter.max(self.highest_seen).max(decided);
        let Some(counter) = used.checked_add(1) else {
            self.not_before = now.saturating_add(RESEND_MS);
            return;
        };
        let ballot = Ballot { counter, node: self.me };
        self.durable.promised = ballot;
        out.persist = true;
        let mut attempt = Attempt {
            ballot,
            phase: Phase::Prepare { promised: BTreeSet::from([self.me]), best: None },
            refused: BTreeSet::new(),
            resend_at: now,
            resend_after: RESEND_MS,
            started: now,
        };
        attempt.report(self.durable.accepted.clone(), self.durable.learned.version);
        self.attempt = Some(attempt);
        self.resend(now, out);
        self.propose_if_promised(now, out);
    }

    /// Whether a member's promise answers the ballot in flight. No other promise is looked at.
    pub(super) fn expects_promise(&self, from: NodeId, ballot: Ballot) -> bool {
        self.durable.learned.members.contains(&from)
            && self.attempt.as_ref().is_some_and(|attempt| {
                attempt.ballot == ballot && matches!(attempt.phase, Phase::Prepare { .. })
            })
    }

    /// Counts a promise that is expected.
    pub(super) fn on_promise(
        &mut self,
        now: u64,
        from: NodeId,
        accepted: Option<(Ballot, AllocMap)>,
        out: &mut Output,
    ) {
        let learned = &self.durable.learned;
        let Some(attempt) = self.attempt.as_mut() else { return };
        let Phase::Prepare { promised, .. } = &mut attempt.phase else { return };
        // An acceptor that knows the same map accepts only a step from it.
        let invalid = |(ballot, map): &(Ballot, AllocMap)| {
            map.version > learned.version && (*ballot >= attempt.ballot || !is_step(learned, map))
        };
        if accepted.as_ref().is_some_and(invalid) {
            // The acceptor lies, or knows another map of this version.
            out.send(from, self.learn_message(self.durable.learned.version));
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
        if !has_majority(promised.iter(), &learned.members) {
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
        let signatures = &*self.signatures;
        let statement = statement(signatures, attempt.ballot, &map);
        let step = learned.step_to(&map, statement.map).map(Box::new);
        out.persist |= self.durable.accept(attempt.ballot, &map);
        let votes = BTreeMap::from([(self.me, signatures.sign(&statement))]);
        attempt.phase = Phase::Accept { map, step, statement, votes, results };
        attempt.refused.clear();
        attempt.resend_after = RESEND_MS;
        self.resend(now, out);
        self.decide_if_accepted(out);
    }

    pub(super) fn on_accepted(
        &mut self,
        now: u64,
        from: NodeId,
        ballot: Ballot,
        vote: Vote,
        out: &mut Output,
    ) {
        let learned = &self.durable.learned;
        let Some(attempt) = self.attempt.as_mut().filter(|attempt| attempt.ballot == ballot) else { return };
        let Phase::Accept { map, statement, votes, .. } = &mut attempt.phase else { return };
        let concerned = learned.members.contains(&from) || map.members.contains(&from);
        if !concerned || votes.contains_key(&from) || !is_vote_of(&*self.signatures, from, statement, &vote) {
            return;
        }
        votes.insert(from, vote);
        self.heard.insert(from, now);
        self.decide_if_accepted(out);
    }

    fn decide_if_accepted(&mut self, out: &mut Output) {
        let Some(Attempt { phase: Phase::Accept { map, step, statement, votes, .. }, .. }) = &self.attempt
        else {
            return;
        };
        let old = &self.durable.learned.members;
        if !has_majority(votes.keys(), old) || !has_majority(votes.keys(), &map.members) {
            return;
        }
        let proof = Proof { statement: statement.clone(), votes: votes.values().cloned().collect() };
        let path = if map.members == *old { Vec::new() } else { vec![proof.clone()] };
        let decision = Decision { map: map.clone(), proof, ..Decision::default() };
        let recipients: BTreeSet<_> = old.union(&map.members).chain(&self.alive).copied().collect();
        for node in recipients.into_iter().filter(|node| *node != self.me) {
            // A host that joins may lack the map before this one.
            let message = match step.as_ref().filter(|_| old.contains(&node)) {
                Some(step) => {
                    AllocMessage::Decided { step: MapStep::clone(step), proof: decision.proof.clone() }
                }
                None => AllocMessage::Learn(Box::new(decision.clone())),
            };
            out.send(node, message);
        }
        self.adopt(&decision, path, out);
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
    ///
    /// The ballot goes on with the others, because one member's word must not end it. It ends when a majority is
    /// impossible, or if there is none when it would be sent again.
    pub(super) fn on_nack(&mut self, now: u64, from: NodeId, ballot: Ballot, promised: Ballot) {
        let members = &self.durable.learned.members;
        let Some(attempt) = self.attempt.as_mut().filter(|attempt| attempt.ballot == ballot) else { return };
        let new = match &attempt.phase {
            Phase::Prepare { .. } => members,
            Phase::Accept { map, .. } => &map.members,
        };
        if !members.contains(&from) && !new.contains(&from) {
            return;
        }
        self.heard.insert(from, now);
        attempt.refused.insert(from);
        let highest = self.durable.promised.counter.saturating_add(MAX_RAISE);
        self.highest_seen = self.highest_seen.max(promised.counter.min(highest));
        let lost = |members: &BTreeSet<NodeId>| {
            members.intersection(&attempt.refused).count() > members.len() - majority(members.len())
        };
        if lost(members) || lost(new) {
            self.give_way(now);
        }
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

    /// Sends the ballot's message to all members that have not answered it, or gives way to a later ballot.
    pub(super) fn resend(&mut self, now: u64, out: &mut Output) {
        if self.attempt.as_ref().is_some_and(|attempt| !attempt.refused.is_empty()) {
            self.give_way(now);
        }
        let learned = &self.durable.learned;
        let Some(attempt) = &mut self.attempt else { return };
        attempt.resend_at = now.saturating_add(attempt.resend_after);
        attempt.resend_after = attempt.resend_after.saturating_mul(2).min(MAX_RESEND_MS);
        let ballot = attempt.ballot;
        match &attempt.phase {
            Phase::Prepare { promised, .. } => {
                for to in learned.members.difference(promised) {
                    out.send(*to, AllocMessage::Prepare { ballot, known: learned.version });
                }
            }
            // A host that joins and lacks the map before this one asks for it.
            Phase::Accept { map, step, votes, .. } => {
                let message = match step {
                    Some(step) => AllocMessage::AcceptStep { ballot, step: MapStep::clone(step) },
                    None => AllocMessage::Accept { ballot, map: map.clone() },
                };
                for to in learned.members.union(&map.members).filter(|to| !votes.contains_key(to)) {
                    out.send(*to, message.clone());
                }
            }
        }
    }

    /// Sends the whole map to a node that could not accept it, because it lacked the agreed map, which it was sent now, or
    /// could not carry out the step.
    pub(super) fn resend_accept(&self, to: NodeId, out: &mut Output) {
        let Some(Attempt { ballot, phase: Phase::Accept { map, votes, .. }, .. }) = &self.attempt else {
            return;
        };
        let concerned = self.durable.learned.members.contains(&to) || map.members.contains(&to);
        if concerned && !votes.contains_key(&to) {
            out.send(to, AllocMessage::Accept { ballot: *ballot, map: map.clone() });
        }
    }

    /// Returns the error for a missing majority, with the number of members that have answered since a time.
    ///
    /// It counts the old members, or the new ones if the old ones are not what is missing.
    pub(super) fn shortage(&self, since: u64) -> Refusal {
        let old = &self.durable.learned.members;
        let electorate = match &self.attempt {
            Some(Attempt { phase: Phase::Accept { map, votes, .. }, .. })
                if has_majority(votes.keys(), old) =>
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
    /// Whether the ballot ends when no request waits for its changes. A change that some members have accepted can still be
    /// decided, and its request is repeated. If such ballots ended, a change whose ballot takes longer than requests wait
    /// would never be decided.
    pub(super) fn ends(&self, now: u64) -> bool {
        let is_slow = now.saturating_sub(self.started) < MAX_BALLOT_MS;
        !(is_slow && matches!(self.phase, Phase::Accept { .. }))
    }

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

fn has_majority<'a>(votes: impl Iterator<Item = &'a NodeId>, members: &BTreeSet<NodeId>) -> bool {
    votes.filter(|node| members.contains(node)).count() >= majority(members.len())
}
