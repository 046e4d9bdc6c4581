//! The state machine of a consensus replica.

mod attempt;

use std::collections::{BTreeMap, BTreeSet};

use ovl_proto::alloc::{AllocMap, AllocMessage, Ballot, Change, Refusal};
use ovl_proto::id::NodeId;

use self::attempt::Attempt;
use super::acceptor::{Durable, Vote};
use super::queue::{ChangeQueue, Delegation, PendingChange};
use super::{DEADLINE_MS, DELEGATE_MS, Event, Output, RESEND_MS};

/// The number of peers that a node without a map asks for it at a time.
const PEERS_ASKED: usize = 3;

/// A consensus replica: one host's part in the agreement. Times are milliseconds of a clock that never goes back.
#[derive(Debug)]
pub struct Replica {
    me: NodeId,
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
    next_id: u64,
    random: u64,
}

impl Replica {
    /// Creates a replica with its durable state, or [`Durable::default`] for a new host.
    ///
    /// `seed` must be a new random number in each run: it determines the first request id, and peers would take a
    /// repeated id for a duplicate.
    pub fn new(me: NodeId, durable: Durable, seed: u64) -> Self {
        let mut replica = Self {
            me,
            durable,
            alive: BTreeSet::new(),
            queue: ChangeQueue::default(),
            attempt: None,
            highest_seen: 0,
            failures: 0,
            not_before: 0,
            heard: BTreeMap::new(),
            ask_at: 0,
            next_id: 0,
            random: seed,
        };
        replica.next_id = replica.random();
        replica
    }

    /// Makes this node the only member of a new cluster, if it knows of no cluster. The cluster number must be random
    /// and not 0.
    pub fn bootstrap(&mut self, cluster: u64) -> Output {
        let mut out = Output::default();
        let members = BTreeSet::from([self.me]);
        self.learn(&AllocMap { cluster, version: 1, members, ..AllocMap::default() }, &mut out);
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
        let live = |node: &&NodeId| **node == self.me || self.alive.contains(*node);
        self.map().members.iter().find(live).copied()
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
            out.send(from, AllocMessage::Ask { known: self.map().version });
        }
        out
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
        match message {
            AllocMessage::Prepare { ballot, known } if ballot.node == from => {
                let answer = self.durable.on_prepare(ballot, known);
                self.answer(now, from, ballot, answer, out);
            }
            AllocMessage::Accept { ballot, map } if ballot.node == from => {
                if !self.reject_foreign(from, map.cluster, out) {
                    let answer = self.durable.on_accept(ballot, &map);
                    self.answer(now, from, ballot, answer, out);
                }
            }
            // A proposer sends only its own ballots.
            AllocMessage::Prepare { .. } | AllocMessage::Accept { .. } => {}
            AllocMessage::Promise { ballot, accepted, learned } => {
                let maps = [accepted.as_ref().map(|(_, map)| map), learned.as_ref()];
                let foreign = maps.into_iter().flatten().find(|map| self.durable.is_foreign(map.cluster));
                if let Some(map) = foreign {
                    self.reject_foreign(from, map.cluster, out);
                    return;
                }
                // A later map ends the ballot, so this answer to it is obsolete.
                if !learned.is_some_and(|map| self.learn(&map, out)) {
                    self.on_promise(now, from, ballot, accepted, out);
                }
            }
            AllocMessage::Accepted { ballot } => self.on_accepted(now, from, ballot, out),
            AllocMessage::Nack { ballot, promised } => self.on_nack(now, from, ballot, promised),
            AllocMessage::Learn(map) => {
                if !self.reject_foreign(from, map.cluster, out) {
                    self.learn(&map, out);
                }
            }
            AllocMessage::Ask { known } => self.on_ask(from, known, out),
            AllocMessage::Request { id, change } => {
                if !self.durable.is_fresh() && may_be_forwarded(&change, from) {
                    self.queue.push_remote(from, id, change, now.saturating_add(DEADLINE_MS));
                }
            }
            AllocMessage::Reply { id, result } => self.on_reply(now, from, id, result, out),
        }
    }

    fn answer(&mut self, now: u64, to: NodeId, ballot: Ballot, answer: Vote, out: &mut Output) {
        out.persist |= answer.persist;
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
        let map = self.map();
        if known < map.version {
            out.send(from, AllocMessage::Learn(map.clone()));
            self.resend_accept(from, out);
        } else if known > map.version {
            out.send(from, AllocMessage::Ask { known: map.version });
        }
    }

    fn on_reply(&mut self, now: u64, from: NodeId, id: u64, result: Result<u64, Refusal>, out: &mut Output) {
        let known = self.map().version;
        let Some((key, pending)) = self.queue.asked(from, id) else { return };
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
            // This node may reach a majority even if the coordinator does not.
            Err(Refusal::NoMajority { .. }) => pending.route = Delegation::Own,
            result => self.finish(key, result, out),
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

    /// Adopts an agreed map if it is later than the known one. Returns whether it was adopted.
    pub(super) fn learn(&mut self, map: &AllocMap, out: &mut Output) -> bool {
        if !self.durable.learn(map) {
            return false;
        }
        out.persist = true;
        out.events.push(Event::Learned);
        self.heard.retain(|node, _| map.members.contains(node));
        self.end_attempt(out);
        let known = self.map().version;
        let done =
            |route: Delegation| matches!(route, Delegation::Learning { version, .. } if version <= known);
        for key in self.queue.keys(|pending| done(pending.route)) {
            self.finish(key, Ok(known), out);
        }
        true
    }

    /// Performs all actions that are due.
    fn advance(&mut self, now: u64, out: &mut Output) {
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
        while self.attempt.is_none() && self.not_before <= now && self.queue.own().next().is_some() {
            let before = self.durable.promised;
            self.start(now, out);
            if self.durable.promised == before {
                break;
            }
        }
    }

    fn expire(&mut self, now: u64, out: &mut Output) {
        let late = self.queue.keys(|pending| pending.deadline <= now);
        if late.is_empty() {
            return;
        }
        let refusal = self.shortage(now.saturating_sub(DEADLINE_MS));
        for key in late {
            self.finish(key, Err(refusal.clone()), out);
        }
        if self.queue.own().next().is_none() {
            self.attempt = None;
        }
    }

    /// Decides for each local change who proposes it.
    fn route(&mut self, now: u64, out: &mut Output) {
        let me = self.me;
        let fresh = self.durable.is_fresh();
        let coordinator = self.coordinator().filter(|node| *node != me);
        let alive = &self.alive;
        for (_, pending) in self.queue.iter_mut().filter(|(_, pending)| pending.origin.is_none()) {
            pending.route = match pending.route {
                Delegation::Asked { until, .. } | Delegation::Learning { until, .. } if until <= now => {
                    Delegation::Own
                }
                Delegation::Asked { coordinator, .. } if !alive.contains(&coordinator) => Delegation::New,
                route => route,
            };
            if pending.route != Delegation::New || fresh {
                continue;
            }
            pending.route = match coordinator {
                Some(coordinator) if may_be_forwarded(&pending.change, me) => {
                    let change = pending.change.clone();
                    out.send(coordinator, AllocMessage::Request { id: pending.id, change });
                    Delegation::Asked { coordinator, until: now.saturating_add(DELEGATE_MS) }
                }
                Some(_) | None => Delegation::Own,
            };
        }
        if fresh && self.ask_at <= now && self.queue.iter().next().is_some() {
            self.ask_peers(now, out);
        }
    }

    /// Asks a few peers for the map. In a large cluster, too many replies would follow if all were asked.
    fn ask_peers(&mut self, now: u64, out: &mut Output) {
        let mut peers: Vec<NodeId> = self.alive.iter().copied().filter(|node| *node != self.me).collect();
        self.ask_at = now.saturating_add(if peers.is_empty() { RESEND_MS } else { DELEGATE_MS });
        for _ in 0..PEERS_ASKED.min(peers.len()) {
            let pick = self.random() as usize % peers.len();
            out.send(peers.swap_remove(pick), AllocMessage::Ask { known: 0 });
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
        Change::Forget(_) | Change::Release { .. } => false,
    }
}
