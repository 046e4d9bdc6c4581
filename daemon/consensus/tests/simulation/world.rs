//! Simulated hosts, the network between them, and the invariants.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use ovl_consensus::{Durable, Event, Output, RecoveryEnd, Replica, apply, is_step};
use ovl_proto::alloc::{AllocMap, AllocMessage, Block, Change, Refusal};
use ovl_proto::id::{NetworkId, NodeId};

use super::fake::Fake;
use super::lies::OUTSIDER;
use super::storm::Weather;

const STEP_MS: u64 = 5;
const CLUSTER: u64 = 77;

pub(crate) fn network(number: u8) -> NetworkId {
    NetworkId([number; 5])
}

#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub(crate) decrees: usize,
    pub(crate) done: usize,
    pub(crate) no_majority: usize,
    pub(crate) crashes: usize,
    pub(crate) forgets: usize,
    pub(crate) lies: usize,
    pub(crate) recoveries: usize,
    pub(crate) left_out: usize,
}

impl Stats {
    pub(crate) fn add(&mut self, other: &Self) {
        self.decrees += other.decrees;
        self.done += other.done;
        self.no_majority += other.no_majority;
        self.crashes += other.crashes;
        self.forgets += other.forgets;
        self.lies += other.lies;
        self.recoveries += other.recoveries;
        self.left_out += other.left_out;
    }
}

/// A pseudo-random number generator: SplitMix64.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }

    pub(crate) fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }

    pub(crate) fn pick<const N: usize>(&mut self, from: [u64; N]) -> u64 {
        from[self.below(N as u64) as usize]
    }
}

pub(crate) struct Node {
    pub(crate) id: NodeId,
    pub(crate) up: Option<Replica>,
    pub(crate) disk: Durable,
    /// Unanswered requests.
    pub(crate) open: BTreeMap<u64, Change>,
    /// The result of the last request.
    pub(crate) last: Option<Result<u64, Refusal>>,
    /// Blocks whose release it requested. It does not use them until the release succeeds.
    pub(crate) giving_up: BTreeSet<Block>,
    pub(crate) has_released: bool,
}

struct Envelope {
    at: u64,
    /// `None` for the outsider, who reaches everybody.
    from: Option<usize>,
    to: usize,
    message: AllocMessage,
}

pub(crate) struct World {
    pub(crate) random: Random,
    /// The rates of faults; no faults if `None`.
    pub(crate) weather: Option<Weather>,
    pub(crate) now: u64,
    pub(crate) nodes: Vec<Node>,
    /// Whether messages from one host to another are lost, as a from × to matrix.
    pub(crate) cut: Vec<bool>,
    /// Every map that any host ever learned, by cluster and version.
    pub(crate) agreed: BTreeMap<(u64, u64), AllocMap>,
    /// Whether hosts look whom they see, and ask others whether the cluster was recovered.
    pub(crate) looks: bool,
    /// Hosts that were ever forgotten. A host is forgotten only if it is gone, so the blocks that these believe to
    /// hold are not checked.
    pub(crate) ever_forgotten: BTreeSet<NodeId>,
    pub(crate) stats: Stats,
    /// The host that also sends lies, as does an outsider.
    pub(crate) liar: Option<usize>,
    /// Proved maps that were sent, for replays.
    pub(crate) sent: Vec<AllocMessage>,
    wire: Vec<Envelope>,
    /// Whether any host's map, or its use of it, has changed since the last check.
    news: bool,
}

impl World {
    pub(crate) fn new(seed: u64, count: usize) -> Self {
        let node = |number: usize| Node {
            id: NodeId([number as u8 + 1; 10]),
            up: None,
            disk: Durable::default(),
            open: BTreeMap::new(),
            last: None,
            giving_up: BTreeSet::new(),
            has_released: false,
        };
        let mut world = Self {
            random: Random(seed),
            weather: None,
            now: 1_000_000,
            nodes: (0..count).map(node).collect(),
            cut: vec![false; count * count],
            agreed: BTreeMap::new(),
            looks: false,
            ever_forgotten: BTreeSet::new(),
            stats: Stats::default(),
            liar: None,
            sent: Vec::new(),
            wire: Vec::new(),
            news: false,
        };
        world.start_all();
        let first = world.random.below(count as u64) as usize;
        world.with(first, |up, _| up.bootstrap(CLUSTER));
        world
    }

    pub(crate) fn start_all(&mut self) {
        for node in self.nodes.iter_mut().filter(|node| node.up.is_none()) {
            let seed = self.random.below(u64::MAX);
            node.up = Some(Replica::new(node.id, Rc::new(Fake(node.id)), node.disk.clone(), seed));
        }
    }

    pub(crate) fn crash(&mut self, node: usize) {
        self.stats.crashes += 1;
        self.nodes[node].up = None;
        self.nodes[node].open.clear();
    }

    /// Splits the network: only hosts on the same side reach each other.
    pub(crate) fn split(&mut self, side: &[u64]) {
        let pairs = side.iter().flat_map(|from| side.iter().map(move |to| from != to));
        self.cut = pairs.collect();
    }

    fn reaches(&self, from: usize, to: usize) -> bool {
        !self.cut[from * self.nodes.len() + to]
    }

    pub(crate) fn ask(&mut self, node: usize, change: Change) {
        let alive = self.alive(node);
        let Node { up: Some(up), open, .. } = &mut self.nodes[node] else { return };
        let (id, out) = up.request(self.now, change.clone(), &alive);
        // The result may be in the same output.
        open.insert(id, change);
        self.absorb(node, out);
    }

    pub(crate) fn step(&mut self) {
        self.now += STEP_MS;
        while let Some(next) = self.next_due() {
            let Envelope { from, to, message, .. } = self.wire.swap_remove(next);
            if from.is_none_or(|from| self.reaches(from, to)) {
                let from = from.map_or(OUTSIDER, |from| self.nodes[from].id);
                self.with(to, |up, now| up.handle(now, from, message));
            }
        }
        if let Some(liar) = self.liar
            && self.random.percent(50)
        {
            self.lie(liar);
        }
        for node in 0..self.nodes.len() {
            if self.looks {
                self.look(node);
            }
            let alive = self.alive(node);
            self.with(node, |up, now| up.tick(now, &alive));
            if self.random.percent(5) {
                let peer = self.random.below(self.nodes.len() as u64) as usize;
                let (id, map) = (self.nodes[peer].id, &self.nodes[peer].disk.learned);
                let (cluster, version) = (map.cluster, map.version);
                self.with(node, |up, _| up.hear(id, cluster, version));
            }
        }
        if std::mem::take(&mut self.news) {
            self.check_holders();
        }
    }

    /// Returns any message that is due, because messages are reordered.
    fn next_due(&mut self) -> Option<usize> {
        let due: Vec<usize> = (0..self.wire.len()).filter(|i| self.wire[*i].at <= self.now).collect();
        (!due.is_empty()).then(|| due[self.random.below(due.len() as u64) as usize])
    }

    /// Returns the peers that a node believes to be alive.
    fn alive(&mut self, node: usize) -> BTreeSet<NodeId> {
        let mistaken = self.weather.as_ref().map_or(0, |weather| weather.mistaken);
        let mut alive = BTreeSet::new();
        for peer in (0..self.nodes.len()).filter(|peer| *peer != node) {
            let reached = self.nodes[peer].up.is_some() && self.reaches(peer, node);
            if reached != self.random.percent(mistaken) {
                alive.insert(self.nodes[peer].id);
            }
        }
        alive
    }

    /// A host looks which other members are there, and asks those of another cluster about it, as the daemon does.
    fn look(&mut self, node: usize) {
        let Some(up) = &self.nodes[node].up else { return };
        let (cluster, members) = (up.map().cluster, up.map().members.clone());
        let there =
            |peer: &usize| *peer != node && self.nodes[*peer].up.is_some() && self.reaches(*peer, node);
        let seen: Vec<usize> = (0..self.nodes.len()).filter(there).collect();
        let seen = seen.into_iter().filter(|peer| members.contains(&self.nodes[*peer].id));
        let (present, others): (Vec<usize>, Vec<usize>) =
            seen.partition(|peer| self.nodes[*peer].disk.learned.cluster == cluster);
        let ids =
            |peers: Vec<usize>| -> BTreeSet<NodeId> { peers.into_iter().map(|p| self.nodes[p].id).collect() };
        let (present, others) = (ids(present), ids(others));
        let asks = self.random.percent(3);
        self.with(node, |up, now| {
            up.note_present(now, present);
            let other = others.first().filter(|_| asks && up.wants_recovery());
            other.map(|peer| up.ask_recovery(*peer)).unwrap_or_default()
        });
    }

    pub(crate) fn with(&mut self, node: usize, act: impl FnOnce(&mut Replica, u64) -> Output) {
        let now = self.now;
        if let Some(up) = &mut self.nodes[node].up {
            let out = act(up, now);
            self.absorb(node, out);
        }
    }

    /// Acts on an output as the daemon does. The host may crash at any point of it.
    fn absorb(&mut self, node: usize, out: Output) {
        let busy = out.persist || !out.send.is_empty();
        let chance = self.weather.as_ref().filter(|_| busy).map(|weather| weather.crash_one_of);
        let dies = chance.is_some_and(|one_of| self.random.below(one_of) == 0);
        // Crash before the write, after it, or in the middle of the messages.
        let dies = if dies { self.random.below(3) } else { 3 };
        if dies == 0 {
            return self.crash(node);
        }
        let Node { up: Some(up), disk, .. } = &mut self.nodes[node] else { return };
        if out.persist {
            let later = disk.learned.version <= up.map().version;
            assert!(later || disk.learned.cluster != up.map().cluster, "versions grow");
            if disk.held.is_some() && up.held().is_some() {
                let Durable { promised, accepted, .. } = up.durable();
                let none_new = accepted.is_none() || *accepted == disk.accepted;
                assert!(disk.promised == *promised && none_new, "a host that was left out takes no part");
            }
            if disk.held.is_none() && up.held().is_some() {
                self.stats.left_out += 1;
            }
            assert!(disk.promised <= up.durable().promised, "promises grow");
            disk.clone_from(up.durable());
            self.news = true;
            self.check_agreed(node);
        } else {
            assert_eq!(disk, up.durable(), "a durable change without `persist`");
        }
        if dies == 1 {
            return self.crash(node);
        }
        let count = out.send.len();
        for (index, (to, message)) in out.send.into_iter().enumerate() {
            if dies == 2 && index > count / 2 {
                return self.crash(node);
            }
            self.post(node, to, message);
        }
        for event in out.events {
            match event {
                Event::Done { id, result } => self.done(node, id, result),
                Event::Learned => {}
                Event::Fork { .. } => panic!("no host votes twice"),
                // A host without proofs, such as one that has just joined, may send a map to one that was away.
                Event::Unproved { .. } => {}
                Event::RecoveryEnded(end) => self.stats.recoveries += usize::from(end == RecoveryEnd::Done),
                Event::ForeignCluster { .. } => {
                    assert!(self.liar.is_some() || self.looks, "there is only one cluster")
                }
            }
        }
    }

    fn post(&mut self, from: usize, to: NodeId, message: AllocMessage) {
        if let AllocMessage::Prepare { ballot, .. }
        | AllocMessage::Accept { ballot, .. }
        | AllocMessage::AcceptStep { ballot, .. } = &message
        {
            assert!(*ballot <= self.nodes[from].disk.promised, "a restart would reuse the ballot");
        }
        if to == OUTSIDER {
            return;
        }
        let to = self.nodes.iter().position(|node| node.id == to).expect("a known node");
        assert_ne!(from, to, "a message to itself");
        if self.liar.is_some() && matches!(message, AllocMessage::Learn(_) | AllocMessage::Decided { .. }) {
            self.sent.push(message.clone());
            let surplus = self.sent.len().saturating_sub(64);
            self.sent.drain(..surplus);
        }
        let fair = (0, 0, 4);
        let (lost, doubled, slowest) = self.weather.as_ref().map_or(fair, |w| (w.lost, w.doubled, w.slowest));
        if self.random.percent(lost) {
            return;
        }
        let copies = 1 + u64::from(self.random.percent(doubled));
        for copy in 0..copies {
            // A duplicate may arrive much later.
            let at = self.now + 1 + self.random.below(slowest) + copy * self.random.below(3000);
            self.wire.push(Envelope { at, from: Some(from), to, message: message.clone() });
        }
    }

    /// Sends a lie, past all faults but partitions.
    pub(crate) fn inject(&mut self, from: Option<usize>, to: usize, message: AllocMessage) {
        self.stats.lies += 1;
        let at = self.now + 1 + self.random.below(4);
        self.wire.push(Envelope { at, from, to, message });
    }

    fn done(&mut self, node: usize, id: u64, result: Result<u64, Refusal>) {
        let Node { id: me, open, giving_up, has_released, disk, last, .. } = &mut self.nodes[node];
        let change = open.remove(&id).expect("an open request, and one answer");
        *last = Some(result.clone());
        match result {
            Ok(version) => {
                self.stats.done += 1;
                self.news = true;
                assert!(version <= disk.learned.version, "a completed change is in the known map");
                if let Change::Release { block, .. } = &change {
                    giving_up.remove(block);
                }
                // Network 3 is sometimes dropped, which undoes claims in the same decree.
                let claim = matches!(&change, Change::Claim { network: n, .. } if *n != network(3));
                if claim && !*has_released && !self.ever_forgotten.contains(me) {
                    let map = &self.agreed[&(disk.learned.cluster, version)];
                    assert_eq!(apply(map, &change), Ok(None), "{change:?} is done");
                }
            }
            Err(Refusal::NoMajority { .. }) => self.stats.no_majority += 1,
            Err(_) => {}
        }
    }

    /// Checks that there is one map of each version, in which no two blocks overlap.
    fn check_agreed(&mut self, node: usize) {
        let learned = &self.nodes[node].disk.learned;
        if learned.version == 0 {
            return;
        }
        let version = (learned.cluster, learned.version);
        if let Some(known) = self.agreed.get(&version) {
            assert_eq!(known, learned, "two maps of one version");
            return;
        }
        if let Some(before) = self.agreed.get(&(version.0, version.1 - 1)) {
            assert!(is_step(before, learned), "{before:?}\n{learned:?}");
        }
        assert_disjoint(learned.blocks.keys());
        assert!(learned.blocks.values().all(|owner| learned.members.contains(owner)));
        self.agreed.insert(version, learned.clone());
        self.stats.decrees += 1;
    }

    /// Checks that no two hosts of a cluster believe at one time that they hold the same address, however old their maps
    /// are.
    fn check_holders(&self) {
        let clusters: BTreeSet<u64> = self.nodes.iter().map(|node| node.disk.learned.cluster).collect();
        clusters.into_iter().for_each(|cluster| self.check_holders_of(cluster));
    }

    fn check_holders_of(&self, cluster: u64) {
        let mut held = Vec::new();
        let nodes = self.nodes.iter().filter(|node| node.disk.learned.cluster == cluster);
        for node in nodes.filter(|node| !self.ever_forgotten.contains(&node.id)) {
            let own = node.disk.learned.blocks.iter().filter(|(_, owner)| **owner == node.id);
            let used = |block: &&Block| block.network != network(3) && !node.giving_up.contains(block);
            held.extend(own.map(|(block, _)| block).filter(used));
        }
        held.sort_unstable();
        assert_disjoint(held);
    }
}

/// Checks that no blocks overlap. They must be sorted, so that overlapping blocks are neighbours.
fn assert_disjoint<'a>(blocks: impl IntoIterator<Item = &'a Block>) {
    let mut last: Option<&Block> = None;
    for block in blocks {
        if let Some(last) = last.filter(|last| last.network == block.network) {
            let overlap = last.prefix.contains(&block.prefix) || block.prefix.contains(&last.prefix);
            assert!(!overlap, "{last:?} and {block:?}");
        }
        last = Some(block);
    }
}
