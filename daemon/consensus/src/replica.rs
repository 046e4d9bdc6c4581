//! The state machine of a consensus replica.

mod attempt;
mod recover;

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use ovl_proto::alloc::{AllocMap, AllocMessage, Ballot, Change, Decision, MapStep, Proof, Refusal};
use ovl_proto::id::NodeId;

use self::attempt::Attempt;
use self::recover::{LeftOut, Proposal};
use super::acceptor::{Durable, MAX_BALLOT_STEP, Reply};
use super::offers::Offers;
use super::proof::{Signatures, statement};
use super::queue::{ChangeQueue, Delegation, PendingChange};
use super::recovery::Sight;
use super::{ADMIT_MS, DEADLINE_MS, DELEGATE_MS, Event, Output, RESEND_MS, apply};

/// The number of peers that a node without a map asks for it at a time.
const PEERS_ASKED: usize = 3;

/// The number of ballots of one proposer that an acceptor promises at once. After as many without a decision, it
/// promises one in [`BALLOT_PAUSE_MS`], so that a proposer that never ends does not prevent the ballots of others.
const BALLOTS_AT_ONCE: u32 = 16;
/// See [`BALLOTS_AT_ONCE`]. In milliseconds.
const BALLOT_PAUSE_MS: u64 = 1000;

/// A consensus replica: one host's part in the agreement. Times are milliseconds of a clock that never goes back.
#[derive(Debug)]
pub struct Replica {
    me: NodeId,
    signatures: Rc<dyn Signatures>,
    durable: Durable,
    alive: BTreeSet<NodeId>,
    queue: ChangeQueue,
    attempt: Option<Attempt>,
    /// The highest ballot number that another proposer is known to have used.
    highest_seen: u64,
    /// The number of consecutive ballots that yielded to another proposer's.
    failures: u32,
    /// The time before which no ballot starts.
    not_before: u64,
    /// The time at which each member last answered a ballot of this replica.
    heard: BTreeMap<NodeId, u64>,
    /// The time at which a node without a map asks for it again.
    ask_at: u64,
    /// The maps that peers offer to a node without a map.
    offers: Offers,
    /// The ballots that each proposer was promised since the last decision, and the time of the last one.
    promises: BTreeMap<NodeId, (u32, u64)>,
    /// How far ballots may be above [`Durable::highest_counter`], and the time when that last grew.
    stretch: (u64, u64),
    /// Which members this node sees.
    sight: Sight,
    /// A recovery that was requested here and is not complete.
    proposal: Option<Proposal>,
    left_out: LeftOut,
    next_id: u64,
    random: u64,
}

impl Replica {
    /// Creates a replica with its durable state, or [`Durable::default`] for a new host.
    ///
    /// `seed` must be a new random number in each run: it determines the first request id, and peers would take a
    /// repeated id for a duplicate.
    pub fn new(me: NodeId, signatures: Rc<dyn Signatures>, durable: Durable, seed: u64) -> Self {
        let mut replica = Self {
            me,
            signatures,
            durable,
            alive: BTreeSet::new(),
            queue: ChangeQueue::default(),
            attempt: None,
            highest_seen: 0,
            failures: 0,
            not_before: 0,
            heard: BTreeMap::new(),
            ask_at: 0,
            offers: Offers::default(),
            promises: BTreeMap::new(),
            stretch: (0, 0),
            sight: Sight::default(),
            proposal: None,
            left_out: LeftOut::default(),
            next_id: 0,
            random: seed,
        };
        replica.next_id = replica.random();
        replica
    }

    /// Makes this node the only member of a new cluster, if it knows of no cluster. The cluster number must be random
    /// and not 0. The node alone signs the first map.
    pub fn bootstrap(&mut self, cluster: u64) -> Output {
        let mut out = Output::default();
        if !self.durable.is_fresh() {
            return out;
        }
        let map = AllocMap { cluster, version: 1, members: BTreeSet::from([self.me]), ..AllocMap::default() };
        let ballot = Ballot { counter: self.durable.promised.counter.saturating_add(1), node: self.me };
        self.durable.promised = ballot;
        let statement = statement(&*self.signatures, ballot, &map);
        let votes = vec![self.signatures.sign(&statement)];
        let proof = Proof { statement, votes };
        self.adopt(&Decision { map, proof, ..Decision::default() }, Vec::new(), &mut out);
        out
    }

    /// Returns the last map that is known to be agreed.
    pub fn map(&self) -> &AllocMap {
        &self.durable.learned
    }

    /// Returns the state that must be on disk when [`Output::persist`] is set.
    pub fn durable(&self) -> &Durable {
        &self.durable
    }

    /// Returns the coordinator: the smallest live member, as far as this node knows.
    pub fn coordinator(&self) -> Option<NodeId> {
        self.live_members().next()
    }

    /// Returns the live members, the smallest first.
    fn live_members(&self) -> impl Iterator<Item = NodeId> {
        let live = |node: &&NodeId| **node == self.me || self.alive.contains(*node);
        self.map().members.iter().filter(live).copied()
    }

    /// Returns when [`Self::tick`] is needed next. A later call is safe, but delays requests.
    pub fn next_tick(&self) -> Option<u64> {
        let waits = |pending: &PendingChange| match pending.route {
            Delegation::New => self.ask_at.min(pending.deadline),
            Delegation::Asked { until, .. } | Delegation::Learning { until, .. } => {
                until.min(pending.deadline)
            }
            Delegation::Own if self.attempt.is_none() => self.not_before.min(pending.deadline),
            Delegation::Own => pending.deadline,
        };
        let resend = self.attempt.as_ref().map(|attempt| attempt.resend_at);
        self.queue.iter().map(|(_, pending)| waits(pending)).chain(resend).min()
    }

    /// Requests a change, and returns the number with which [`Event::Done`] reports it, possibly in the same output.
    /// `alive` are the reachable peers.
    ///
    /// The request ends within [`DEADLINE_MS`]. After [`Refusal::NoMajority`] the change may still be
    /// made. For [`Change::Release`] see the crate's documentation.
    pub fn request(&mut self, now_ms: u64, change: Change, alive: &BTreeSet<NodeId>) -> (u64, Output) {
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        self.queue.push_local(id, change, now_ms.saturating_add(DEADLINE_MS));
        (id, self.tick(now_ms, alive))
    }

    /// Advances the time: resends unanswered messages, and fails expired requests.
    pub fn tick(&mut self, now_ms: u64, alive: &BTreeSet<NodeId>) -> Output {
        self.alive.clone_from(alive);
        let mut out = Output::default();
        self.advance(now_ms, &mut out);
        out
    }

    /// Handles a peer's hint in gossip about the map that it has.
    pub fn hear(&mut self, from: NodeId, cluster: u64, version: u64) -> Output {
        let mut out = Output::default();
        if !self.reject_foreign(from, cluster, &mut out) && version > self.map().version {
            self.ask_map(from, &mut out);
        }
        out
    }

    /// Asks a peer for a later map. A node without a map believes only peers that it asked.
    pub fn ask(&mut self, peer: NodeId) -> Output {
        let mut out = Output::default();
        self.ask_map(peer, &mut out);
        out
    }

    fn ask_map(&mut self, peer: NodeId, out: &mut Output) {
        if peer != self.me && (!self.durable.is_fresh() || self.offers.note_asked(peer)) {
            out.send(peer, AllocMessage::Ask { known: self.map().version });
        }
    }

    /// Handles a message. `from` must be authenticated.
    pub fn handle(&mut self, now_ms: u64, from: NodeId, message: AllocMessage) -> Output {
        let mut out = Output::default();
        if from != self.me {
            self.dispatch(now_ms, from, message, &mut out);
            self.advance(now_ms, &mut out);
        }
        out
    }

    fn dispatch(&mut self, now: u64, from: NodeId, message: AllocMessage, out: &mut Output) {
        let fresh = self.durable.is_fresh();
        let member = self.map().members.contains(&from);
        match message {
            AllocMessage::Learn(decision) if fresh => {
                self.offers.put(now, from, *decision, &*self.signatures);
            }
            AllocMessage::Learn(decision) => self.on_decision(now, from, &decision, out),
            AllocMessage::Reply { id, result } => self.on_reply(now, from, id, result, out),
            // A node without a map does not know who may propose. It asks for the map on its own.
            _ if fresh => {}
            AllocMessage::Ask { known } => self.on_ask(from, known, out),
            AllocMessage::AskRecovery { cluster } => self.on_ask_recovery(from, cluster, out),
            AllocMessage::Recover(recovery) => self.on_recover(now, from, &recovery, out),
            AllocMessage::Consent { cluster, result } => self.on_consent(from, cluster, result, out),
            AllocMessage::Recovered(proof) => self.on_recovered(now, from, &proof, out),
            AllocMessage::GoesOn { cluster } => self.on_goes_on(from, cluster, out),
            AllocMessage::Request { .. }
            | AllocMessage::Prepare { .. }
            | AllocMessage::Accept { .. }
            | AllocMessage::AcceptStep { .. }
                if self.durable.held.is_some() =>
            {
                if member && let Some((_, told)) = self.held_answer() {
                    out.send(from, told);
                }
            }
            AllocMessage::Request { id, change } => {
                // A host that is not a member may only ask to be admitted.
                let may = member || change == Change::Admit(from);
                if may && may_be_forwarded(&change, from) && self.is_member() {
                    // Two that propose delay each other, and hosts that ask for their admission do not know who proposes.
                    let other = self.coordinator().is_some_and(|node| node != self.me && node != from);
                    let passed_on = other && !member && matches!(change, Change::Admit(_));
                    let route = if passed_on { Delegation::New } else { Delegation::Own };
                    self.queue.push_remote(from, id, change, now.saturating_add(DEADLINE_MS), route);
                }
            }
            AllocMessage::Accepted { ballot, vote } => self.on_accepted(now, from, ballot, vote, out),
            AllocMessage::Nack { ballot, promised } => self.on_nack(now, from, ballot, promised),
            AllocMessage::Prepare { ballot, known } if ballot.node == from => {
                if !member {
                    // One of both is behind, or the sender is no member.
                    self.on_ask(from, known, out);
                } else if self.may_promise(now, ballot, out) {
                    let answer = self.durable.on_prepare(ballot, known);
                    self.answer(now, from, ballot, answer, out);
                }
            }
            AllocMessage::Accept { ballot, map } if ballot.node == from => {
                if self.reject_foreign(from, map.cluster, out) {
                    return;
                }
                if !member {
                    self.on_ask(from, map.version.saturating_sub(1), out);
                } else if self.may_promise(now, ballot, out) {
                    let answer = self.durable.on_accept(&*self.signatures, ballot, &map);
                    self.answer(now, from, ballot, answer, out);
                }
            }
            AllocMessage::AcceptStep { ballot, step } if ballot.node == from => {
                if !member {
                    self.on_ask(from, step.version.saturating_sub(1), out);
                } else if self.may_promise(now, ballot, out) {
                    match self.next_map(&step) {
                        Some(map) => {
                            let answer = self.durable.on_accept(&*self.signatures, ballot, &map);
                            self.answer(now, from, ballot, answer, out);
                        }
                        None => self.on_other_step(from, step.version, out),
                    }
                }
            }
            AllocMessage::Decided { step, proof } => {
                if self.reject_foreign(from, proof.statement.cluster, out) {
                    return;
                }
                match self.next_map(&step) {
                    Some(map) => {
                        self.on_decision(now, from, &Decision { map, proof, ..Decision::default() }, out);
                    }
                    // It says nothing new, unless it is about another map of the known version.
                    None if proof.statement.map == self.durable.proof.statement.map => {}
                    None if step.version < self.map().version => {}
                    None => self.on_other_step(from, step.version, out),
                }
            }
            // A proposer sends only its own ballots.
            AllocMessage::Prepare { .. } | AllocMessage::Accept { .. } | AllocMessage::AcceptStep { .. } => {}
            AllocMessage::Promise { ballot, accepted, learned } => {
                if !self.expects_promise(from, ballot) {
                    return;
                }
                let maps = [accepted.as_ref().map(|(_, map)| map), learned.as_ref().map(|later| &later.map)];
                let foreign = maps.into_iter().flatten().find(|map| self.durable.is_foreign(map.cluster));
                if let Some(map) = foreign {
                    self.reject_foreign(from, map.cluster, out);
                    return;
                }
                match learned {
                    // A later map ends the ballot. If it is not proved, the promise does not count either: the
                    // acceptor says that it knows more than this ballot builds on.
                    Some(decision) if !self.learn(&decision, out) => {
                        self.note_unproved(from, &decision, out);
                    }
                    Some(_) => {}
                    None => self.on_promise(now, from, accepted, out),
                }
            }
        }
    }

    /// Whether the acceptor may promise a ballot to its proposer now. If its counter is out of range, it is refused.
    fn may_promise(&mut self, now: u64, ballot: Ballot, out: &mut Output) -> bool {
        let promised = self.durable.promised;
        if ballot <= promised {
            return true;
        }
        let (stretch, at) = &mut self.stretch;
        if ballot.counter > self.durable.highest_counter().saturating_add(*stretch) {
            // A proposer that is truly so far ahead is let in sooner or later.
            if now >= at.saturating_add(BALLOT_PAUSE_MS) {
                (*stretch, *at) = (stretch.saturating_add(MAX_BALLOT_STEP), now);
            }
            out.send(ballot.node, AllocMessage::Nack { ballot, promised });
            return false;
        }
        let (count, last) = self.promises.entry(ballot.node).or_default();
        if *count >= BALLOTS_AT_ONCE && now < last.saturating_add(BALLOT_PAUSE_MS) {
            return false;
        }
        (*count, *last) = (count.saturating_add(1), now);
        true
    }

    fn is_member(&self) -> bool {
        self.map().members.contains(&self.me)
    }

    fn answer(&mut self, now: u64, to: NodeId, ballot: Ballot, answer: Reply, out: &mut Output) {
        out.persist |= answer.persist;
        if answer.persist {
            self.stretch.0 = 0;
        }
        if answer.ask {
            out.send(to, AllocMessage::Ask { known: self.map().version });
        }
        if let Some(message) = answer.message {
            out.send(to, message);
        }
        if self.durable.promised == ballot {
            self.on_promise_to_other(now);
        }
    }

    fn on_ask(&mut self, from: NodeId, known: u64, out: &mut Output) {
        let version = self.map().version;
        if known < version {
            out.send(from, self.learn_message(known));
            self.resend_accept(from, out);
        } else if known > version {
            out.send(from, AllocMessage::Ask { known: version });
        }
    }

    fn on_reply(&mut self, now: u64, from: NodeId, id: u64, result: Result<u64, Refusal>, out: &mut Output) {
        let known = self.map().version;
        let fallback = self.fallback();
        let Some((key, pending)) = self.queue.asked(from, id) else { return };
        self.heard.insert(from, now);
        let here = apply(&self.durable.learned, &pending.change);
        match result {
            // The requester waits until it has that map itself.
            Ok(version) if version > known => {
                pending.route = Delegation::Learning {
                    coordinator: from,
                    version,
                    until: now.saturating_add(DELEGATE_MS),
                };
                out.send(from, AllocMessage::Ask { known });
            }
            // The own map must say the same: the coordinator may be behind, or lie.
            Ok(_) if here == Ok(None) => self.finish(key, Ok(known), out),
            Err(refusal) if here.is_err() => self.finish(key, Err(refusal), out),
            // This node may reach a majority even if the coordinator does not.
            Ok(_) | Err(_) => pending.route = fallback,
        }
    }

    /// Returns the route of a local change that another host did not make: only members propose.
    fn fallback(&self) -> Delegation {
        if self.is_member() { Delegation::Own } else { Delegation::New }
    }

    fn on_decision(&mut self, now: u64, from: NodeId, decision: &Decision, out: &mut Output) {
        if self.durable.is_foreign(decision.map.cluster) && self.on_recovered_map(now, decision, out) {
            return;
        }
        if !self.reject_foreign(from, decision.map.cluster, out) && !self.learn(decision, out) {
            self.answer_fork(from, decision, out);
            self.note_unproved(from, decision, out);
        }
    }

    /// Returns the map that a step from the known map leads to. `None` if it is a step from another map, or has what this
    /// release does not know.
    fn next_map(&self, step: &MapStep) -> Option<AllocMap> {
        let next = self.map().next(step)?;
        (self.signatures.digest(&next) == step.map).then_some(next)
    }

    /// Answers a step to `version` that does not fit the known map: sends the later map, or asks for the whole one.
    fn on_other_step(&self, to: NodeId, version: u64, out: &mut Output) {
        let (before, known) = (version.saturating_sub(1), self.map().version);
        if before < known {
            out.send(to, self.learn_message(before));
        }
        if before > known {
            out.send(to, AllocMessage::Ask { known });
        }
        if before == known {
            // The sender may know another map of this version. It sends the one that it knows, and the one that it
            // proposes.
            out.send(to, AllocMessage::Ask { known: known.saturating_sub(1) });
        }
    }

    /// Whether a map is of another cluster; reports that as an event.
    fn reject_foreign(&self, from: NodeId, cluster: u64, out: &mut Output) -> bool {
        let foreign = self.durable.is_foreign(cluster);
        if foreign {
            out.events.push(Event::ForeignCluster { from, cluster });
        }
        foreign
    }

    /// Adopts a map if it is proved and later than the known one. Returns whether it was adopted.
    pub(super) fn learn(&mut self, decision: &Decision, out: &mut Output) -> bool {
        if let Some(path) = self.durable.proved_path(&*self.signatures, decision) {
            self.adopt(decision, path, out);
            return true;
        }
        if self.durable.is_fork(&*self.signatures, decision) {
            out.events.push(Event::Fork { version: decision.map.version });
            self.adopt(decision, Vec::new(), out);
            return true;
        }
        false
    }

    /// Reports a member's later map that cannot be verified.
    fn note_unproved(&self, from: NodeId, decision: &Decision, out: &mut Output) {
        let version = decision.map.version;
        if version > self.map().version && self.map().members.contains(&from) {
            out.events.push(Event::Unproved { version });
        }
    }

    /// Sends the own map to a host that sent another one of the same version in a lower ballot.
    fn answer_fork(&self, to: NodeId, theirs: &Decision, out: &mut Output) {
        let (map, own) = (&self.durable.learned, self.durable.proof.statement.ballot);
        if theirs.map.version == map.version && theirs.map != *map && theirs.proof.statement.ballot < own {
            out.send(to, self.learn_message(map.version));
        }
    }

    /// Returns the known map for a host that knows an earlier version.
    pub(super) fn learn_message(&self, known: u64) -> AllocMessage {
        AllocMessage::Learn(Box::new(self.durable.decision_since(known)))
    }

    /// Adopts a proved map.
    pub(super) fn adopt(&mut self, decision: &Decision, path: Vec<Proof>, out: &mut Output) {
        self.durable.adopt(decision, path);
        self.note_adopted(out);
    }

    /// Does what follows from another map.
    fn note_adopted(&mut self, out: &mut Output) {
        out.persist = true;
        out.events.push(Event::Learned);
        self.offers = Offers::default();
        self.promises.clear();
        let members = &self.durable.learned.members;
        self.heard.retain(|node, _| members.contains(node));
        self.end_attempt(out);
        let known = self.map().version;
        let due =
            |route: Delegation| matches!(route, Delegation::Learning { version, .. } if version <= known);
        let fallback = self.fallback();
        for key in self.queue.keys(|pending| due(pending.route)) {
            let done =
                self.queue.get(key).is_some_and(|pending| apply(self.map(), &pending.change) == Ok(None));
            if done {
                self.finish(key, Ok(known), out);
            } else if let Some(pending) = self.queue.get_mut(key) {
                // The coordinator did not tell the truth, or the change was undone since.
                pending.route = fallback;
            }
        }
    }

    /// Performs all actions that are due.
    fn advance(&mut self, now: u64, out: &mut Output) {
        if self.durable.is_fresh()
            && let Some(decision) = self.offers.choose(now)
        {
            self.durable.note_origin(&*self.signatures, &decision);
            self.adopt(&decision, Vec::new(), out);
        }
        self.advance_recovery(now, out);
        self.expire(now, out);
        self.route(now, out);
        match &self.attempt {
            Some(attempt) if attempt.resend_at <= now => self.resend(now, out),
            Some(_) => {}
            None => self.start_ballots(now, out),
        }
    }

    /// Starts ballots until none is needed or one is in flight.
    ///
    /// If this node alone is a majority, a ballot ends at once. Another one may be needed, because the first may have
    /// completed an earlier proposal instead of its own.
    fn start_ballots(&mut self, now: u64, out: &mut Output) {
        while self.is_member()
            && self.durable.held.is_none()
            && self.attempt.is_none()
            && self.not_before <= now
            && self.queue.own().next().is_some()
        {
            let before = self.durable.promised;
            self.start(now, out);
            if self.durable.promised == before {
                break;
            }
        }
    }

    fn expire(&mut self, now: u64, out: &mut Output) {
        let late = self.queue.keys(|pending| pending.deadline <= now);
        if !late.is_empty() {
            let refusal = self.shortage(now.saturating_sub(DEADLINE_MS));
            for key in late {
                self.finish(key, Err(refusal.clone()), out);
            }
        }
        if self.queue.own().next().is_none() && self.attempt.as_ref().is_some_and(|attempt| attempt.ends(now))
        {
            self.attempt = None;
        }
    }

    /// Decides for each local change, and for each that is passed on, who proposes it.
    fn route(&mut self, now: u64, out: &mut Output) {
        let me = self.me;
        if self.durable.is_fresh() {
            if self.ask_at <= now && self.queue.iter().next().is_some() {
                self.ask_peers(now, out);
            }
            return;
        }
        let member = self.is_member();
        if !member {
            let wrong =
                |pending: &PendingChange| pending.origin.is_none() && pending.change != Change::Admit(me);
            for key in self.queue.keys(wrong) {
                self.finish(key, Err(Refusal::NotMember(me)), out);
            }
        }
        let coordinator = self.coordinator().filter(|node| *node != me);
        let other = self.any_live_member();
        let next = self.live_members().nth(1);
        let fallback = self.fallback();
        let alive = &self.alive;
        let routed = |pending: &PendingChange| pending.origin.is_none() || pending.route != Delegation::Own;
        for (_, pending) in self.queue.iter_mut().filter(|(_, pending)| routed(pending)) {
            pending.route = match pending.route {
                Delegation::Asked { until, .. } if until <= now && pending.origin.is_some() => {
                    Delegation::New
                }
                Delegation::Asked { until, .. } | Delegation::Learning { until, .. } if until <= now => {
                    fallback
                }
                Delegation::Asked { coordinator, .. } if !alive.contains(&coordinator) => Delegation::New,
                Delegation::Own if !member => Delegation::New,
                route => route,
            };
            if pending.route != Delegation::New {
                continue;
            }
            // A host that is not a member cannot propose. If the coordinator fails, it asks another member.
            let passed_on = pending.origin.is_some();
            let asked = match pending.asked {
                0 => coordinator,
                // Two propose at most, however many members are asked.
                _ if passed_on => next.filter(|node| *node != me && coordinator.is_some()),
                _ if member => coordinator,
                _ => other,
            };
            pending.route = match asked {
                Some(coordinator) if may_be_forwarded(&pending.change, me) => {
                    let change = pending.change.clone();
                    out.send(coordinator, AllocMessage::Request { id: pending.id, change });
                    let until = match pending.asked {
                        0 if passed_on => now.saturating_add(ADMIT_MS),
                        _ if passed_on => pending.deadline,
                        _ if member => now.saturating_add(DELEGATE_MS),
                        _ => now.saturating_add(ADMIT_MS),
                    };
                    pending.asked = pending.asked.saturating_add(1);
                    Delegation::Asked { coordinator, until }
                }
                Some(_) | None => fallback,
            };
        }
    }

    /// Returns a random live member other than this node.
    fn any_live_member(&mut self) -> Option<NodeId> {
        let pick = self.random();
        let live = self.map().members.intersection(&self.alive).filter(|node| **node != self.me);
        let live: Vec<NodeId> = live.copied().collect();
        live.get(pick as usize % live.len().max(1)).copied()
    }

    /// Asks a few peers for the map. In a large cluster, too many replies would follow if all were asked.
    fn ask_peers(&mut self, now: u64, out: &mut Output) {
        let mut peers: Vec<NodeId> = self.alive.iter().copied().filter(|node| *node != self.me).collect();
        self.ask_at = now.saturating_add(if peers.is_empty() { RESEND_MS } else { DELEGATE_MS });
        for _ in 0..PEERS_ASKED.min(peers.len()) {
            let pick = self.random() as usize % peers.len();
            let peer = peers.swap_remove(pick);
            self.ask_map(peer, out);
        }
    }

    pub(super) fn finish_all(
        &mut self,
        results: Vec<(u64, Result<(), Refusal>)>,
        version: u64,
        out: &mut Output,
    ) {
        for (key, result) in results {
            self.finish(key, result.map(|()| version), out);
        }
    }

    /// Completes a request and reports the result to the requester. No effect if the request has expired.
    fn finish(&mut self, key: u64, result: Result<u64, Refusal>, out: &mut Output) {
        let Some(pending) = self.queue.remove(key) else { return };
        match pending.origin {
            None => out.events.push(Event::Done { id: pending.id, result }),
            Some(from) => out.send(from, AllocMessage::Reply { id: pending.id, result }),
        }
    }

    /// Returns a pseudo-random number: SplitMix64 (Steele, Lea, Flood, 2014).
    pub(super) fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Whether another host may propose a change on behalf of the requester.
///
/// A late copy must do no harm, which excludes changes that take something away. And a host claims only for itself.
fn may_be_forwarded(change: &Change, wanted_by: NodeId) -> bool {
    match change {
        Change::Admit(_) | Change::DropNetwork(_) | Change::Key { .. } => true,
        Change::Claim { owner, .. } | Change::ClaimExact { owner, .. } => *owner == wanted_by,
        Change::Forget(_) | Change::Ban(_) | Change::Unban(_) | Change::Release { .. } => false,
    }
}
