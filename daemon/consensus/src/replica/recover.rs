//! A replica's part in a recovery from the loss of a majority: to request one, to consent, and to be left out of one.

use std::collections::{BTreeMap, BTreeSet};

use ovl_proto::alloc::{
    AllocMap, AllocMessage, Ballot, Consent, Decision, Dissent, Proof, Recovery, RecoveryProof, Refusal,
    Statement,
};
use ovl_proto::id::NodeId;

use super::Replica;
use crate::proof::{is_vote_of, statement};
use crate::recovery::first_map;
use crate::{Event, Output, RESEND_MS, RecoveryEnd, majority};

/// How long the survivors have to consent, in milliseconds.
const CONSENT_MS: u64 = 5000;
/// How often a host that was left out tells the other members, in milliseconds.
const TELL_MS: u64 = 2000;

/// A recovery that was requested on this host.
#[derive(Debug)]
pub(super) struct Proposal {
    recovery: Recovery,
    map: AllocMap,
    /// What a survivor signs about the map.
    statement: Statement,
    consents: BTreeMap<NodeId, Consent>,
    resend_at: u64,
    deadline: u64,
}

/// What a host that was left out of a recovery knows of it during this run.
#[derive(Debug, Default)]
pub(super) struct LeftOut {
    /// The map of the recovered cluster that was last received.
    offer: Option<Decision>,
    /// The members that go on in the old cluster.
    going_on: BTreeSet<NodeId>,
    tell_at: u64,
}

impl Replica {
    /// Notes which other members of the cluster are seen: their daemons or their kernels answer, and they have not joined a
    /// recovered cluster. Call it at least once a second.
    pub fn note_present(&mut self, now_ms: u64, present: BTreeSet<NodeId>) {
        self.sight.note(now_ms, self.me, present, &self.durable.learned.members);
    }

    /// Returns for how many milliseconds no majority has been seen; `None` if one is. A recovery needs [`crate::LOST_MS`].
    pub fn majority_lost_for(&self, now_ms: u64) -> Option<u64> {
        self.sight.since(false).map(|since| now_ms.saturating_sub(since))
    }

    /// Returns the recovery of this host's cluster that other hosts made without it, because of which it takes part in no
    /// agreement.
    pub fn held(&self) -> Option<&RecoveryProof> {
        self.durable.held.as_deref()
    }

    /// Whether this host goes on in spite of the recovery with this number.
    pub fn has_refused(&self, cluster: u64) -> bool {
        self.durable.refused.contains(&cluster)
    }

    /// Returns the recoveries by which the cluster of this host came from earlier ones, oldest first.
    pub fn recoveries(&self) -> &[RecoveryProof] {
        &self.durable.recoveries
    }

    /// Makes this host and the other members that are seen the members of a new cluster, because the majority of this one is
    /// lost for good. An operator must have requested it. `cluster` is the number of the new cluster, random and not 0; `at_ms`
    /// the time in milliseconds since 1970. The end is reported as [`Event::RecoveryEnded`], possibly in the same output.
    ///
    /// # Errors
    ///
    /// A majority lives or lived within [`crate::LOST_MS`], or this host takes no part in agreement.
    pub fn recover(&mut self, now_ms: u64, cluster: u64, at_ms: u64) -> Result<Output, Dissent> {
        if !self.is_member() || self.durable.held.is_some() || cluster == 0 {
            return Err(Dissent::OtherMap);
        }
        let members = &self.durable.learned.members;
        let mut survivors: BTreeSet<NodeId> = self.sight.present().intersection(members).copied().collect();
        survivors.insert(self.me);
        self.sight.consents(now_ms, &survivors)?;
        let Some(counter) = self.durable.promised.counter.checked_add(1) else {
            return Err(Dissent::OtherMap);
        };
        let ballot = Ballot { counter, node: self.me };
        self.durable.promised = ballot;
        let last = &self.durable.learned;
        let recovery = Recovery {
            from: last.cluster,
            version: last.version,
            map: self.signatures.digest(last),
            cluster,
            survivors,
            ballot,
            at_ms,
        };
        let map = first_map(last, &recovery);
        let statement = statement(&*self.signatures, ballot, &map);
        let own = self.consent(&recovery, &statement);
        self.proposal = Some(Proposal {
            consents: BTreeMap::from([(self.me, own)]),
            recovery,
            map,
            statement,
            resend_at: now_ms,
            deadline: now_ms.saturating_add(CONSENT_MS),
        });
        let mut out = Output { persist: true, ..Output::default() };
        self.recover_if_consented(&mut out);
        self.advance(now_ms, &mut out);
        Ok(out)
    }

    /// Joins the recovered cluster that this host was left out of: an operator says that it is the one that goes on. `None` if
    /// there is none, or if its map has not arrived.
    pub fn accept_recovery(&mut self) -> Option<Output> {
        self.durable.held.as_ref()?;
        let decision = self.left_out.offer.take()?;
        let (links, path) = self.durable.recovered_path(&*self.signatures, &decision)?;
        let mut out = Output::default();
        self.adopt_recovered(&decision, links, path, &mut out);
        Some(out)
    }

    /// Goes on in the old cluster: an operator says that its majority was not lost. `None` if this host was not left out of a
    /// recovery.
    pub fn reject_recovery(&mut self) -> Option<Output> {
        let cluster = self.durable.held.as_ref()?.recovery.cluster;
        self.go_on(cluster);
        Some(Output { persist: true, ..Output::default() })
    }

    /// Asks a peer of another cluster whether that is a recovery of this host's.
    pub fn ask_recovery(&self, peer: NodeId) -> Output {
        let mut out = Output::default();
        let cluster = self.map().cluster;
        if peer != self.me && cluster != 0 {
            out.send(peer, AllocMessage::AskRecovery { cluster });
        }
        out
    }

    /// Whether it makes sense to ask hosts of another cluster: this host does not know yet what they recovered.
    pub fn wants_recovery(&self) -> bool {
        let survivor = |held: &RecoveryProof| held.recovery.survivors.contains(&self.me);
        self.left_out.offer.is_none() || self.held().is_some_and(survivor)
    }

    fn consent(&self, recovery: &Recovery, about: &Statement) -> Consent {
        Consent { recovery: self.signatures.sign_recovery(recovery), map: self.signatures.sign(about) }
    }

    /// Answers a request to consent.
    pub(super) fn on_recover(&mut self, now: u64, from: NodeId, recovery: &Recovery, out: &mut Output) {
        let last = &self.durable.learned;
        let concerned = recovery.from == last.cluster
            && recovery.ballot.node == from
            && recovery.survivors.contains(&from)
            && recovery.survivors.contains(&self.me);
        if !concerned {
            return;
        }
        if recovery.version != last.version {
            // One of the two learns the later map first.
            self.on_ask(from, recovery.version, out);
            return;
        }
        let same = self.is_member()
            && self.durable.held.is_none()
            && recovery.survivors.is_subset(&last.members)
            && recovery.cluster != 0
            && recovery.cluster != last.cluster
            && recovery.ballot.counter <= self.durable.highest_counter()
            && recovery.map == self.signatures.digest(last);
        let may = match self.sight.consents(now, &recovery.survivors) {
            _ if !same => Err(Dissent::OtherMap),
            Ok(()) if self.proposal.is_some() && self.me < from => Err(Dissent::Busy),
            may => may,
        };
        let result = may.map(|()| {
            let map = first_map(last, recovery);
            self.consent(recovery, &statement(&*self.signatures, recovery.ballot, &map))
        });
        if result.is_ok() {
            // A host that consented to another recovery does not complete its own, so of two only one is completed.
            self.end_proposal(RecoveryEnd::Changed, out);
        }
        out.send(from, AllocMessage::Consent { cluster: recovery.cluster, result });
    }

    /// Counts a consent.
    pub(super) fn on_consent(
        &mut self,
        from: NodeId,
        cluster: u64,
        result: Result<Consent, Dissent>,
        out: &mut Output,
    ) {
        let signatures = &*self.signatures;
        let Some(proposal) = self.proposal.as_mut() else { return };
        let Recovery { survivors, .. } = &proposal.recovery;
        if proposal.recovery.cluster != cluster || !survivors.contains(&from) {
            return;
        }
        match result {
            Ok(consent) => {
                let signed = signatures.author(&consent.recovery) == from
                    && signatures.verify_recovery(&proposal.recovery, &consent.recovery)
                    && is_vote_of(signatures, from, &proposal.statement, &consent.map);
                if signed {
                    proposal.consents.insert(from, consent);
                    self.recover_if_consented(out);
                }
            }
            Err(why) => self.end_proposal(RecoveryEnd::Refused { by: from, why }, out),
        }
    }

    /// Makes the recovery once all survivors consented.
    fn recover_if_consented(&mut self, out: &mut Output) {
        let complete = |proposal: &Proposal| proposal.recovery.survivors.len() == proposal.consents.len();
        // What came back since is not lost.
        if self.sight.since(false).is_none() || !self.proposal.as_ref().is_some_and(complete) {
            return;
        }
        let Some(Proposal { recovery, map, statement, consents, .. }) = self.proposal.take() else { return };
        let (recovered, accepted) = consents.into_values().map(|each| (each.recovery, each.map)).unzip();
        let others: Vec<NodeId> =
            recovery.survivors.iter().copied().filter(|node| *node != self.me).collect();
        let link = RecoveryProof { recovery, votes: recovered };
        let proof = Proof { statement, votes: accepted };
        let decision = Decision { map, proof, history: Vec::new(), recoveries: vec![link.clone()] };
        self.adopt_recovered(&decision, vec![link], Vec::new(), out);
        for node in others {
            out.send(node, AllocMessage::Learn(Box::new(decision.clone())));
        }
        out.events.push(Event::RecoveryEnded(RecoveryEnd::Done));
    }

    fn end_proposal(&mut self, end: RecoveryEnd, out: &mut Output) {
        if self.proposal.take().is_some() {
            out.events.push(Event::RecoveryEnded(end));
        }
    }

    /// Adopts a map of a recovered cluster.
    fn adopt_recovered(
        &mut self,
        decision: &Decision,
        links: Vec<RecoveryProof>,
        path: Vec<Proof>,
        out: &mut Output,
    ) {
        self.durable.adopt_recovered(decision, links, path);
        self.left_out = LeftOut::default();
        self.sight = Default::default();
        self.note_adopted(out);
    }

    /// Ends a proposal for another map than the known one.
    pub(super) fn drop_outdated_proposal(&mut self, out: &mut Output) {
        let last = &self.durable.learned;
        let outdated = |proposal: &Proposal| {
            (proposal.recovery.from, proposal.recovery.version) != (last.cluster, last.version)
        };
        if self.proposal.as_ref().is_some_and(outdated) {
            self.end_proposal(RecoveryEnd::Changed, out);
        }
    }

    /// Handles a map of another cluster. Returns false if that is no recovery of this one.
    pub(super) fn on_recovered_map(&mut self, now: u64, decision: &Decision, out: &mut Output) -> bool {
        let cluster = self.map().cluster;
        let link = decision.recoveries.iter().find(|link| link.recovery.from == cluster);
        let Some(link) = link.filter(|link| self.durable.is_left_by(&*self.signatures, link)) else {
            return false;
        };
        let Some((links, path)) = self.durable.recovered_path(&*self.signatures, decision) else {
            return false;
        };
        if self.joins(now, &link.recovery) {
            self.adopt_recovered(decision, links, path, out);
        } else if self.is_left_out(now, link, out) {
            self.left_out.offer = Some(decision.clone());
        }
        true
    }

    /// Handles a recovery of which a member of the old cluster tells.
    pub(super) fn on_recovered(&mut self, now: u64, from: NodeId, link: &RecoveryProof, out: &mut Output) {
        if !self.durable.is_left_by(&*self.signatures, link) || !self.map().members.contains(&from) {
            return;
        }
        if !self.is_left_out(now, link, out) {
            out.send(from, AllocMessage::GoesOn { cluster: link.recovery.cluster });
        }
    }

    /// Whether this host is a survivor, and still has reason to consent. Its signature was checked.
    fn joins(&self, now: u64, recovery: &Recovery) -> bool {
        let last = &self.durable.learned;
        recovery.survivors.contains(&self.me)
            && recovery.version == last.version
            && recovery.map == self.signatures.digest(last)
            && self.sight.consents(now, &recovery.survivors).is_ok()
    }

    /// Whether this host takes no part in agreement because of a verified recovery. If it has lived with a majority for long, it
    /// goes on.
    fn is_left_out(&mut self, now: u64, link: &RecoveryProof, out: &mut Output) -> bool {
        let cluster = link.recovery.cluster;
        if self.durable.refused.contains(&cluster) {
            return false;
        }
        if self.durable.held.is_some() {
            return true;
        }
        out.persist = true;
        if self.sight.is_lasting(now, true) {
            self.go_on(cluster);
            return false;
        }
        self.durable.held = Some(Box::new(link.clone()));
        self.left_out = LeftOut::default();
        self.attempt = None;
        self.end_proposal(RecoveryEnd::Changed, out);
        true
    }

    fn go_on(&mut self, cluster: u64) {
        self.durable.refuse(cluster);
        self.left_out = LeftOut::default();
    }

    /// Notes that a member goes on. If a majority does, so does this host.
    pub(super) fn on_goes_on(&mut self, from: NodeId, cluster: u64, out: &mut Output) {
        let members = &self.durable.learned.members;
        let Some(held) = self.durable.held.as_ref() else { return };
        let Recovery { cluster: known, survivors, .. } = &held.recovery;
        if *known != cluster || !members.contains(&from) || survivors.contains(&from) {
            return;
        }
        self.left_out.going_on.insert(from);
        if self.left_out.going_on.intersection(members).count() + 1 >= majority(members.len()) {
            self.go_on(cluster);
            out.persist = true;
        }
    }

    /// Answers a host of an earlier cluster of which this one is a recovery.
    pub(super) fn on_ask_recovery(&self, from: NodeId, cluster: u64, out: &mut Output) {
        if self.durable.recoveries.iter().any(|link| link.recovery.from == cluster) {
            out.send(from, self.learn_message(0));
        }
    }

    /// Returns the refusal of local requests, and the answer to others, if this host takes no part in agreement.
    pub(super) fn held_answer(&self) -> Option<(Refusal, AllocMessage)> {
        let held = self.durable.held.as_ref()?;
        let refusal = Refusal::Recovered { by: held.recovery.ballot.node };
        Some((refusal, AllocMessage::Recovered(held.clone())))
    }

    /// Performs what is due of a recovery.
    pub(super) fn advance_recovery(&mut self, now: u64, out: &mut Output) {
        self.drop_outdated_proposal(out);
        if self.sight.since(false).is_none() {
            let why = Dissent::Majority { present: self.sight.present().clone() };
            self.end_proposal(RecoveryEnd::Refused { by: self.me, why }, out);
        }
        if let Some(proposal) = &mut self.proposal {
            let waiting = |node: &&NodeId| !proposal.consents.contains_key(*node);
            if proposal.deadline <= now {
                let silent = proposal.recovery.survivors.iter().filter(waiting).copied().collect();
                self.end_proposal(RecoveryEnd::Silent(silent), out);
            } else if proposal.resend_at <= now {
                for node in proposal.recovery.survivors.iter().filter(waiting) {
                    out.send(*node, AllocMessage::Recover(Box::new(proposal.recovery.clone())));
                }
                proposal.resend_at = now.saturating_add(RESEND_MS);
            }
        }
        let Some((refusal, told)) = self.held_answer() else { return };
        for key in self.queue.keys(|pending| pending.origin.is_none()) {
            self.finish(key, Err(refusal.clone()), out);
        }
        if self.left_out.tell_at <= now {
            self.left_out.tell_at = now.saturating_add(TELL_MS);
            let others = self.map().members.intersection(&self.alive).filter(|node| **node != self.me);
            for node in others {
                out.send(*node, told.clone());
            }
        }
    }
}
