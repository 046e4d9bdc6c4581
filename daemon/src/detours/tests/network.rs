//! Many hosts that decide about detours by themselves, on links that are cut and healed: a simulation in rounds.
//!
//! Each host knows what it hears, what members pass on to it, and what others have said of their links, as far as that has
//! reached it along the paths that the hosts have at that moment. It says of all hosts that do not answer that it does not reach
//! them, whether it has a detour to them or not. Pings are ideal: one that a member which relays could pass on is passed on. So
//! what fails here is a decision.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use proptest::prelude::*;

use super::super::*;
use super::ms;

/// The duration of a round, which is that of the decisions in `node::detours`.
const ROUND: Duration = Duration::from_millis(200);
/// Rounds between pings through others, rounded down: they are sent every half second.
const RELAYED_EVERY: usize = 2;
/// Rounds for which a host counts as alive after an answer.
const ALIVE: usize = 13;
const HOP_LIMIT: usize = ovl_relay::frame::HOP_LIMIT as usize;

/// What a host says of its links, with a version.
type Statement = (usize, Rc<BTreeSet<NodeId>>);

struct Host {
    detours: Detours,
    /// The round in which each other host last answered directly.
    heard: Vec<Option<usize>>,
    /// Who last passed on its answer, and in which round.
    through: Vec<Option<(usize, usize)>>,
    /// What the others have said, as far as it has come here.
    known: Vec<Statement>,
    /// The live members and those that do not answer, when `links` was computed.
    members: (BTreeSet<usize>, BTreeSet<NodeId>),
    is_stale: bool,
    links: Links,
    paths: BTreeMap<NodeId, Vec<NodeId>>,
}

impl Host {
    fn new(count: usize) -> Self {
        Host {
            detours: Detours::default(),
            heard: vec![Some(0); count],
            through: vec![None; count],
            known: vec![Statement::default(); count],
            members: Default::default(),
            is_stale: true,
            links: Links::default(),
            paths: BTreeMap::new(),
        }
    }

    fn hears(&self, other: usize, round: usize, ping_every: Duration) -> bool {
        let silent_after = (ping_every + SILENT).as_millis() / ROUND.as_millis();
        self.heard[other].is_some_and(|heard| round - heard <= silent_after as usize)
    }

    fn is_alive(&self, other: usize, round: usize) -> bool {
        let last = self.heard[other].max(self.through[other].map(|(_, at)| at));
        last.is_some_and(|last| round - last <= ALIVE)
    }
}

struct Network {
    up: Vec<Vec<bool>>,
    relays: Vec<bool>,
    hosts: Vec<Host>,
    round: usize,
    start: Instant,
    ping_every: Duration,
    random: u64,
    /// The turns of the last round.
    turns: usize,
    /// Pairs whose datagrams go in a circle, and for how many rounds.
    circles: BTreeMap<(usize, usize), usize>,
}

fn id(index: usize) -> NodeId {
    let mut id = [0; 10];
    id[..8].copy_from_slice(&(index as u64).to_be_bytes());
    NodeId(id)
}

fn index(id: NodeId) -> usize {
    id.0[..8].iter().fold(0, |number, byte| number << 8 | usize::from(*byte))
}

/// The fate of a datagram that follows the next hops of all hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Arrives(usize),
    Lost,
    Circles,
}

impl Network {
    fn new(count: usize, seed: u64) -> Self {
        Network {
            up: vec![vec![true; count]; count],
            relays: vec![true; count],
            hosts: (0..count).map(|_| Host::new(count)).collect(),
            round: 0,
            start: Instant::now(),
            // As gossip pings: less often in large clusters.
            ping_every: (Duration::from_micros(33_333) * count as u32).clamp(ms(600), ms(2000)),
            random: seed | 1,
            turns: 0,
            circles: BTreeMap::new(),
        }
    }

    /// A random number below `bound` (Marsaglia, "Xorshift RNGs").
    fn below(&mut self, bound: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        ((self.random >> 11) % bound as u64) as usize
    }

    fn set(&mut self, one: usize, other: usize, is_up: bool) {
        self.up[one][other] = is_up || one == other;
        self.up[other][one] = is_up || one == other;
    }

    /// Sets all links by whether two hosts reach each other.
    fn wire(&mut self, reach: impl Fn(usize, usize) -> bool) {
        for one in 0..self.hosts.len() {
            for other in 0..one {
                self.set(one, other, reach(other, one));
            }
        }
    }

    fn fate(&self, from: usize, to: usize) -> Fate {
        let mut seen = [from; HOP_LIMIT + 1];
        for hops in 0..=HOP_LIMIT {
            let at = seen[hops];
            if at == to {
                return Fate::Arrives(hops);
            }
            let next = self.hosts[at].detours.relay(id(to)).map_or(to, index);
            if !self.up[at][next] || next != to && !self.relays[next] {
                return Fate::Lost;
            }
            if seen[..=hops].contains(&next) {
                return Fate::Circles;
            }
            if let Some(place) = seen.get_mut(hops + 1) {
                *place = next;
            }
        }
        Fate::Lost
    }

    /// The neighbour that passes on a ping to a silent host and its answer, if one can: the one on the way first.
    fn helper(&self, from: usize, to: usize) -> Option<usize> {
        let host = &self.hosts[from];
        let last = host.through[to].map(|(by, _)| by);
        let first = host.detours.relay(id(to)).map(index).into_iter().chain(last);
        let passes = |by: &usize| {
            let hears = self.hosts[*by].hears(to, self.round, self.ping_every);
            let hop = self.hosts[*by].detours.relay(id(to)).map(index);
            *by != to
                && self.up[from][*by]
                && hop.filter(|_| !hears) != Some(from)
                && matches!(self.fate(*by, to), Fate::Arrives(_))
        };
        first.chain((0..self.hosts.len()).filter(|by| *by != from)).find(passes)
    }

    fn step(&mut self) {
        self.round += 1;
        let (count, round) = (self.hosts.len(), self.round);
        for one in 0..count {
            for other in (0..count).filter(|other| *other != one) {
                if self.up[one][other] {
                    self.hosts[one].heard[other] = Some(round);
                }
            }
        }
        for one in 0..count {
            for other in
                (0..count).filter(|other| *other != one && (one + other + round) % RELAYED_EVERY == 0)
            {
                let host = &self.hosts[one];
                let hears = host.hears(other, round, self.ping_every);
                if (!hears || host.detours.relay(id(other)).is_some())
                    && let Some(by) = self.helper(one, other)
                {
                    self.hosts[one].through[other] = Some((by, round));
                }
            }
        }
        self.spread();
        self.turns = (0..count).map(|at| self.decide(at)).sum();
    }

    /// Statements go over the streams between hosts, and from neighbour to neighbour.
    fn spread(&mut self) {
        let count = self.hosts.len();
        for to in 0..count {
            let neighbours: Vec<usize> = (0..count).filter(|at| *at != to && self.up[to][*at]).collect();
            let neighbour =
                if neighbours.is_empty() { None } else { Some(neighbours[self.below(neighbours.len())]) };
            for of in (0..count).filter(|of| *of != to) {
                let current = self.hosts[to].known[of].0;
                let pushed = (self.hosts[of].known[of].0 > current
                    && matches!(self.fate(of, to), Fate::Arrives(_)))
                .then_some(of);
                let from = pushed.or(neighbour.filter(|at| self.hosts[*at].known[of].0 > current));
                if let Some(from) = from {
                    self.hosts[to].known[of] = self.hosts[from].known[of].clone();
                    self.hosts[to].is_stale = true;
                }
            }
        }
    }

    /// Lets a host decide, and returns the number of its turns.
    fn decide(&mut self, at: usize) -> usize {
        let (count, round, ping_every) = (self.hosts.len(), self.round, self.ping_every);
        let now = self.start + ROUND * round as u32;
        let host = &mut self.hosts[at];
        let alive: BTreeSet<usize> =
            (0..count).filter(|other| *other != at && host.is_alive(*other, round)).collect();
        let ago = |then: usize| ROUND * (round - then) as u32;
        let peers: BTreeMap<NodeId, Evidence> = alive
            .iter()
            .map(|&other| {
                let through = host.through[other].map(|(by, then)| (id(by), ago(then)));
                (id(other), Evidence { heard: host.heard[other].map(ago), through, lost: false })
            })
            .collect();
        let relays: BTreeSet<NodeId> =
            alive.iter().filter(|other| self.relays[**other]).map(|other| id(*other)).collect();
        let silent: BTreeSet<NodeId> =
            peers.iter().filter(|(_, peer)| peer.is_silent(ping_every)).map(|(peer, _)| *peer).collect();
        let members = (alive, silent);
        if host.is_stale || host.members != members {
            let live = members.0.iter().copied().chain([at]);
            let said = live.clone().flat_map(|of| host.known[of].1.iter().map(move |peer| (id(of), *peer)));
            let said = said.chain(members.1.iter().map(|peer| (id(at), *peer)));
            host.links = Links::new(live.clone().map(|of| (id(of), self.relays[of])), said);
            host.paths = host.links.paths(id(at), |_| 0);
            (host.members, host.is_stale) = (members, false);
        }
        let turns = host.detours.decide(&peers, &relays, (&host.links, &host.paths), ping_every, now);
        let turns = turns.len();
        let dead = (0..count).filter(|other| *other != at && !host.members.0.contains(other)).map(id);
        let silent = host.members.1.iter().copied();
        let says: BTreeSet<NodeId> = host.detours.unreached().chain(silent).chain(dead).collect();
        if says != *host.known[at].1 {
            host.known[at] = (host.known[at].0 + 1, Rc::new(says));
            host.is_stale = true;
        }
        turns
    }

    /// The length of the shortest path between all pairs: `None` where relays do not lead.
    fn distances(&self) -> Vec<Vec<Option<usize>>> {
        let count = self.hosts.len();
        let cut = (0..count).flat_map(|one| (0..one).map(move |other| (one, other)));
        let cut = cut.filter(|(one, other)| !self.up[*one][*other]).map(|(one, other)| (id(one), id(other)));
        let links = Links::new((0..count).map(|at| (id(at), self.relays[at])), cut);
        let of = |one: usize| -> Vec<Option<usize>> {
            let paths = links.paths(id(one), |_| 0);
            let length = |other: usize| match paths.get(&id(other)) {
                Some(path) => Some(path.len() + 1),
                None => self.up[one][other].then_some(1),
            };
            (0..count).map(length).collect()
        };
        (0..count).map(of).collect()
    }

    /// What is wrong with the paths. `None` if each pair that relays can join is joined, and no datagram goes in a circle; if
    /// `shortest`, by as few relays as possible. A detour that waits until the direct path has proved itself is longer.
    fn fault(&self, distances: &[Vec<Option<usize>>], shortest: bool) -> Option<String> {
        for (from, row) in distances.iter().enumerate() {
            for (to, distance) in row.iter().enumerate().filter(|(to, _)| *to != from) {
                let (fate, expected) = (self.fate(from, to), distance.map_or(Fate::Lost, Fate::Arrives));
                let is_joined = matches!((fate, expected), (Fate::Arrives(_), Fate::Arrives(_)));
                if fate != expected && (shortest || !is_joined) {
                    let path = self.hosts[from].detours.path(id(to));
                    let path: Vec<usize> = path.into_iter().map(index).collect();
                    return Some(format!("{from} to {to}: {fate:?} in place of {expected:?}, by {path:?}"));
                }
            }
        }
        None
    }

    /// Runs until nothing is wrong with the paths and no host has made a turn for a while. Returns after how many rounds the paths
    /// were right.
    fn settle(&mut self, most: usize, shortest: bool) -> Result<usize, String> {
        let distances = self.distances();
        let start = self.round;
        let (mut calm, mut right) = (0, start);
        while calm < CALM {
            let fault = self.fault(&distances, shortest);
            if fault.is_some() {
                right = self.round + 1;
            }
            if self.round - start >= most {
                return Err(format!("after {most} rounds: {fault:?}, {} turns in the last one", self.turns));
            }
            self.watch()?;
            calm = if self.turns == 0 && fault.is_none() { calm + 1 } else { 0 };
        }
        Ok(right - start)
    }

    /// Runs a round, and fails if datagrams of a pair have gone in a circle for too long.
    fn watch(&mut self) -> Result<(), String> {
        self.step();
        let before = std::mem::take(&mut self.circles);
        self.circles = self.circling(&before);
        match self.circles.iter().find(|(_, rounds)| **rounds > MOST_CIRCLING) {
            Some((pair, rounds)) => Err(format!("datagrams of {pair:?} go in a circle for {rounds} rounds")),
            None => Ok(()),
        }
    }

    /// Adds a round to the pairs whose datagrams go in a circle, and forgets others.
    fn circling(&self, before: &BTreeMap<(usize, usize), usize>) -> BTreeMap<(usize, usize), usize> {
        let count = self.hosts.len();
        let pairs = (0..count).flat_map(|one| (0..count).map(move |other| (one, other)));
        let circling = pairs.filter(|(one, other)| self.fate(*one, *other) == Fate::Circles);
        circling.map(|pair| (pair, before.get(&pair).map_or(1, |rounds| rounds + 1))).collect()
    }
}

/// Rounds without a turn after which the hosts have settled.
const CALM: usize = 10;
/// Rounds for which datagrams of a pair may go in a circle while hosts know different things: two seconds.
const MOST_CIRCLING: usize = 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// All reach a few, as hosts behind strict NAT reach those with public addresses.
    Public,
    /// Two groups that one host joins.
    Racks,
    /// Five groups, of which each reaches the next one.
    Chain,
    /// A random tree and some more links: many pairs need three relays, or more than there may be.
    Sparse,
    /// All links but some.
    Dense,
}

const SHAPES: [Shape; 5] = [Shape::Public, Shape::Racks, Shape::Chain, Shape::Sparse, Shape::Dense];

impl Network {
    fn shape(&mut self, shape: Shape) {
        let count = self.hosts.len();
        match shape {
            Shape::Public => self.wire(|one, other| one.min(other) < 3),
            Shape::Racks => self.wire(|one, other| one % 2 == other % 2 || one.min(other) == 0),
            Shape::Chain => {
                let size = count.div_ceil(5);
                self.wire(|one, other| (one / size).abs_diff(other / size) <= 1);
            }
            Shape::Sparse => {
                self.wire(|_, _| false);
                for one in 1..count {
                    let other = self.below(one);
                    self.set(one, other, true);
                }
                self.flip(count, true);
            }
            Shape::Dense => {
                self.wire(|_, _| true);
                self.flip(count * 3, false);
            }
        }
    }

    /// Cuts or heals random links.
    fn flip(&mut self, links: usize, is_up: bool) {
        for _ in 0..links {
            let (one, other) = (self.below(self.hosts.len()), self.below(self.hosts.len()));
            self.set(one, other, is_up);
        }
    }
}

/// Rounds in which hosts find the paths of a topology: eight seconds, of which silence is noticed after one to two and a half.
const MOST_ROUNDS: usize = 40;
/// The same after several links have changed at different times.
const MOST_ROUNDS_OF_CHANGES: usize = 60;
/// Rounds in which all direct paths are used again: the longest time that they have to prove themselves, and some.
const MOST_ROUNDS_TO_HEAL: usize = 330;

/// Lets a topology settle, changes it three times, each time in several steps, and heals it.
fn run(network: &mut Network, shape: Shape) -> Result<(), String> {
    network.shape(shape);
    network.settle(MOST_ROUNDS, true)?;
    for _ in 0..3 {
        for _ in 0..1 + network.below(5) {
            let (links, is_up) = (network.below(network.hosts.len()), network.below(2) == 0);
            network.flip(links, is_up);
            for _ in 0..network.below(10) {
                network.watch()?;
            }
        }
        network.settle(MOST_ROUNDS_OF_CHANGES, false)?;
    }
    network.wire(|_, _| true);
    network.settle(MOST_ROUNDS_TO_HEAL, true)?;
    if network.hosts.iter().all(|host| host.detours.is_empty()) {
        Ok(())
    } else {
        Err("detours are left".to_owned())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// In any topology, and after any changes of it, all pairs that up to three relays can join are joined, no datagram goes in a
    /// circle for longer than two seconds, and the hosts stop turning.
    #[test]
    fn hosts_settle_on_paths_that_join_all(
        count in 4_usize..22,
        seed in any::<u64>(),
        shape in prop::sample::select(&SHAPES[..]),
        others in prop::collection::vec(any::<u8>(), 0..3),
    ) {
        let mut network = Network::new(count, seed);
        for other in others {
            network.relays[usize::from(other) % count] = false;
        }
        prop_assert_eq!(run(&mut network, shape), Ok(()));
    }
}

#[test]
fn hundreds_of_hosts_settle() {
    for shape in [Shape::Public, Shape::Racks] {
        let mut network = Network::new(150, 1);
        network.shape(shape);
        let settled = network.settle(MOST_ROUNDS, true);
        assert!(settled.is_ok(), "{shape:?}: {settled:?}");
    }
}

#[test]
fn no_datagram_goes_in_a_circle_to_a_host_to_which_no_member_relays() {
    for (count, seed, other) in [(6, 4121877398114793652, 238), (11, 3847494151774968682, 166)] {
        let mut network = Network::new(count, seed);
        network.relays[other % count] = false;
        assert_eq!(run(&mut network, Shape::Sparse), Ok(()), "{count} hosts");
    }
}
