//! The state machine of one node.

mod attempt;

use std::collections::{BTreeMap, BTreeSet};

use ovl_proto::alloc::{AllocMap, AllocMessage, Ballot, Change, Refusal};
use ovl_proto::id::NodeId;

use self::attempt::Attempt;
use super::acceptor::{Answer, Durable};
use super::queue::{Pending, Queue, Route};
use super::{DEADLINE_MS, DELEGATE_MS, Event, Output, RESEND_MS};

/// So many peers a node asks for the map at once that has none.
const ASKED_AT_ONCE: usize = 3;

/// One node's part in the agreement. Times are milliseconds of any clock that does not go back.
#[derive(Debug)]
pub struct Replica {
    me: NodeId,
    durable: Durable,
    alive: BTreeSet<NodeId>,
    queue: Queue,
    attempt: Option<Attempt>,
    /// The highest ballot number that another proposer is known to use.
    highest_seen: u64,
    /// Ballots in a row that gave way to another proposer's.
    failures: u32,
    /// No ballot begins before.
    not_before: u64,
    /// When each member last answered a ballot of ours.
    heard: BTreeMap<NodeId, u64>,
    /// A node without a map asks again then.
    ask_at: u64,
    next_id: u64,
    random: u64,
}

impl Replica {
    /// A node with what it had on disk, or [`Durable::default`]. The seed must be a new random
    /// number in each run: request ids begin with it, and peers would take the same one for a
    /// duplicate.
    pub fn new(me: NodeId, durable: Durable, seed: u64) -> Self {
        let mut allocator = Self {
            me,
            durable,
            alive: BTreeSet::new(),
            queue: Queue::default(),
            attempt: None,
            highest_seen: 0,
            failures: 0,
            not_before: 0,
            heard: BTreeMap::new(),
            ask_at: 0,
            next_id: 0,
            random: seed,
        };
        allocator.next_id = allocator.random();
        allocator
    }

    /// Makes this node the only member of a new cluster, if it knows of none. The cluster's number
    /// is random and not 0.
    pub fn bootstrap(&mut self, cluster: u64) -> Output {
        let mut out = Output::default();
        let members = BTreeSet::from([self.me]);
        self.learn(&AllocMap { cluster, version: 1, members, ..AllocMap::default() }, &mut out);
        out
    }

    /// The last map known to be agreed.
    pub fn map(&self) -> &AllocMap {
        &self.durable.learned
    }

    /// What has to be on disk whenever an output says so.
    pub fn durable(&self) -> &Durable {
        &self.durable
    }

    /// Who proposes for all: the smallest live member, as far as is known here.
    pub fn coordinator(&self) -> Option<NodeId> {
        let live = |node: &&NodeId| **node == self.me || self.alive.contains(*node);
        self.map().members.iter().find(live).copied()
    }

    /// When [`Self::tick`] is next needed; a later call does no harm but takes longer.
    pub fn next_tick(&self) -> Option<u64> {
        let waits = |pending: &Pending| match pending.route {
            Route::New => self.ask_at.min(pending.deadline),
            Route::Asked { until, .. } | Route::Learning { until, .. } => until.min(pending.deadline),
            Route::Own if self.attempt.is_none() => self.not_before.min(pending.deadline),
            Route::Own => pending.deadline,
        };
        let resend = self.attempt.as_ref().map(|attempt| attempt.resend_at);
        self.queue.iter().map(|(_, pending)| waits(pending)).chain(resend).min()
    }

    /// Asks for a change, and gives the number under which [`Event::Done`] reports it, perhaps in
    /// this very output. `alive` are the peers that can be reached.
    ///
    /// Ends within [`DEADLINE_MS`]. [`Refusal::NoMajority`] leaves open whether the change will
    /// still be made. For [`Change::Release`] see the module's documentation.
    pub fn request(&mut self, now_ms: u64, change: Change, alive: &BTreeSet<NodeId>) -> (u64, Output) {
        let id = self.next_id;
        self.next_id = id.wrapping_add(1);
        self.queue.push_local(id, change, now_ms.saturating_add(DEADLINE_MS));
        (id, self.tick(now_ms, alive))
    }

    /// Time passes: sends again what was not answered, and gives up what took too long.
    pub fn tick(&mut self, now_ms: u64, alive: &BTreeSet<NodeId>) -> Output {
        self.alive.clone_from(alive);
        let mut out = Output::default();
        self.advance(now_ms, &mut out);
        out
    }

    /// Gossip says which map a peer has.
    pub fn hear(&mut self, from: NodeId, cluster: u64, version: u64) -> Output {
        let mut out = Output::default();
        if !self.reject_foreign(from, cluster, &mut out) && version > self.map().version {
            out.send(from, AllocMessage::Ask { known: self.map().version });
        }
        out
    }

    /// A message has come. `from` must be authentic.
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
            // A ballot of another than the sender is nothing that a proposer sends.
            AllocMessage::Prepare { .. } | AllocMessage::Accept { .. } => {}
            AllocMessage::Promise { ballot, accepted, learned } => {
                let maps = [accepted.as_ref().map(|(_, map)| map), learned.as_ref()];
                let foreign = maps.into_iter().flatten().find(|map| self.durable.is_foreign(map.cluster));
                if let Some(map) = foreign {
                    self.reject_foreign(from, map.cluster, out);
                    return;
                }
                // After a later map the ballot is over, and this answer to it of no use.
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

    fn answer(&mut self, now: u64, to: NodeId, ballot: Ballot, answer: Answer, out: &mut Output) {
        out.persist |= answer.persist;
        if answer.ask {
            out.send(to, AllocMessage::Ask { known: self.map().version });
        }
        if let Some(message) = answer.message {
            out.send(to, message);
        }
        if self.durable.promised == ballot {
            self.on_promised_to_another(now);
        }
    }

    fn on_ask(&mut self, from: NodeId, known: u64, out: &mut Output) {
        let map = self.map();
        if known < map.version {
            out.send(from, AllocMessage::Learn(map.clone()));
            self.accept_again(from, out);
        } else if known > map.version {
            out.send(from, AllocMessage::Ask { known: map.version });
        }
    }

    fn on_reply(&mut self, now: u64, from: NodeId, id: u64, result: Result<u64, Refusal>, out: &mut Output) {
        let known = self.map().version;
        let Some((key, pending)) = self.queue.asked(from, id) else { return };
        match result {
            // The asker will look into its map.
            Ok(version) if version > known => {
                pending.route =
                    Route::Learning { whom: from, version, until: now.saturating_add(DELEGATE_MS) };
                out.send(from, AllocMessage::Ask { known });
            }
            // That the coordinator reaches no majority does not mean that we do not.
            Err(Refusal::NoMajority { .. }) => pending.route = Route::Own,
            result => self.finish(key, result, out),
        }
    }

    /// Says so, if a map is of another cluster than ours.
    fn reject_foreign(&self, from: NodeId, cluster: u64, out: &mut Output) -> bool {
        let foreign = self.durable.is_foreign(cluster);
        if foreign {
            out.events.push(Event::ForeignCluster { from, cluster });
        }
        foreign
    }

    /// Takes over an agreed map, if it is later than ours, and says whether.
    pub(super) fn learn(&mut self, map: &AllocMap, out: &mut Output) -> bool {
        if !self.durable.learn(map) {
            return false;
        }
        out.persist = true;
        out.events.push(Event::Learned);
        self.heard.retain(|node, _| map.members.contains(node));
        self.end_attempt(out);
        let known = self.map().version;
        let done = |route: Route| matches!(route, Route::Learning { version, .. } if version <= known);
        for key in self.queue.keys(|pending| done(pending.route)) {
            self.finish(key, Ok(known), out);
        }
        true
    }

    /// Everything that time or a new state of things makes due.
    fn advance(&mut self, now: u64, out: &mut Output) {
        self.expire(now, out);
        self.route(now, out);
        match &self.attempt {
            Some(attempt) if attempt.resend_at <= now => self.resend(now, out),
            Some(_) => {}
            None => self.start_ballots(now, out),
        }
    }

    /// One ballot may end at once, if this node alone is a majority, and leave the next to do: the
    /// first one may have had to complete what was begun before.
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

    /// Finds somebody to propose each of our own changes.
    fn route(&mut self, now: u64, out: &mut Output) {
        let me = self.me;
        let fresh = self.durable.is_fresh();
        let coordinator = self.coordinator().filter(|node| *node != me);
        let alive = &self.alive;
        for (_, pending) in self.queue.iter_mut().filter(|(_, pending)| pending.origin.is_none()) {
            pending.route = match pending.route {
                Route::Asked { until, .. } | Route::Learning { until, .. } if until <= now => Route::Own,
                Route::Asked { whom, .. } if !alive.contains(&whom) => Route::New,
                route => route,
            };
            if pending.route != Route::New || fresh {
                continue;
            }
            pending.route = match coordinator {
                Some(whom) if may_be_forwarded(&pending.change, me) => {
                    let change = pending.change.clone();
                    out.send(whom, AllocMessage::Request { id: pending.id, change });
                    Route::Asked { whom, until: now.saturating_add(DELEGATE_MS) }
                }
                Some(_) | None => Route::Own,
            };
        }
        if fresh && self.ask_at <= now && self.queue.iter().next().is_some() {
            self.ask_anyone(now, out);
        }
    }

    /// A node without a map asks a few peers: in a large cluster all of them would answer.
    fn ask_anyone(&mut self, now: u64, out: &mut Output) {
        let mut peers: Vec<NodeId> = self.alive.iter().copied().filter(|node| *node != self.me).collect();
        self.ask_at = now.saturating_add(if peers.is_empty() { RESEND_MS } else { DELEGATE_MS });
        for _ in 0..ASKED_AT_ONCE.min(peers.len()) {
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

    /// Answers whoever asked, if the request has not expired meanwhile.
    fn finish(&mut self, key: u64, result: Result<u64, Refusal>, out: &mut Output) {
        let Some(pending) = self.queue.remove(key) else { return };
        match pending.origin {
            None => out.events.push(Event::Done { id: pending.id, result }),
            Some(from) => out.send(from, AllocMessage::Reply { id: pending.id, result }),
        }
    }

    /// SplitMix64 (Steele, Lea, Flood, 2014).
    pub(super) fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// Whether another host may propose the change for the one that wants it. A copy that is late must
/// do no harm, which rules out what takes away; and a host claims for itself.
fn may_be_forwarded(change: &Change, wanted_by: NodeId) -> bool {
    match change {
        Change::Admit(_) | Change::DropNetwork(_) | Change::Key { .. } => true,
        Change::Claim { owner, .. } | Change::ClaimExact { owner, .. } => *owner == wanted_by,
        Change::Forget(_) | Change::Release { .. } => false,
    }
}
