//! The faults of a run, the requests of hosts during it, and the recovery at its end.

use ovl_proto::alloc::{Block, Change};
use ovl_proto::id::{NetworkId, NodeId};

use super::world::{Node, Random, World, network};

/// The rates of faults, chosen anew for each run, because one fault can mask another.
pub(crate) struct Weather {
    /// The percentage of lost messages.
    pub(crate) lost: u64,
    /// The percentage of duplicated messages.
    pub(crate) doubled: u64,
    /// The longest delay of a message, in milliseconds.
    pub(crate) slowest: u64,
    /// The percentage of wrong verdicts about a peer's liveness.
    pub(crate) mistaken: u64,
    /// One of this many outputs ends in a crash.
    pub(crate) crash_one_of: u64,
    /// The percentage of requests that replace much of the membership. 0 in half of the runs, because the blocks that
    /// a forgotten host believes to hold prove nothing.
    upheaval: u64,
}

impl Weather {
    pub(crate) fn draw(random: &mut Random) -> Self {
        Self {
            lost: random.pick([0, 5, 15, 30, 50]),
            doubled: random.pick([0, 8, 30]),
            slowest: random.pick([4, 40, 200]),
            mistaken: random.pick([1, 5, 30]),
            crash_one_of: random.pick([40, 150, 1000]),
            upheaval: random.pick([0, 0, 10, 30]),
        }
    }
}

impl World {
    pub(crate) fn storm(&mut self, for_ms: u64) {
        let weather = Weather::draw(&mut self.random);
        let upheaval = weather.upheaval;
        self.weather = Some(weather);
        let end = self.now + for_ms;
        while self.now < end {
            if self.random.percent(8) {
                self.inject_fault();
            }
            if self.random.percent(25) {
                let node = self.any();
                if self.random.percent(upheaval) { self.upheaval(node) } else { self.request_any(node) }
            }
            self.step();
        }
        self.weather = None;
    }

    fn any(&mut self) -> usize {
        self.random.below(self.nodes.len() as u64) as usize
    }

    fn any_id(&mut self) -> NodeId {
        let node = self.any();
        self.nodes[node].id
    }

    fn inject_fault(&mut self) {
        let count = self.nodes.len();
        match self.random.below(12) {
            0 => {
                let node = self.any();
                self.crash(node);
            }
            1..=3 => self.start_all(),
            4..=5 => {
                let side: Vec<u64> = (0..count).map(|_| self.random.below(2)).collect();
                self.split(&side);
            }
            // Reachability need not be symmetric.
            6..=7 => self.cut = (0..count * count).map(|_| self.random.percent(30)).collect(),
            8..=10 => self.cut.fill(false),
            _ => {}
        }
    }

    /// Requests a change to members that have little in common with the current ones.
    fn upheaval(&mut self, node: usize) {
        for _ in 0..1 + self.random.below(4) {
            let gone = self.any_id();
            self.ever_forgotten.insert(gone);
            self.stats.forgets += 1;
            self.ask(node, Change::Forget(gone));
        }
        for _ in 0..self.random.below(4) {
            let new = self.any_id();
            self.ask(node, Change::Admit(new));
        }
    }

    /// Requests a change of a common kind.
    pub(crate) fn request_any(&mut self, node: usize) {
        let Node { id: me, up: Some(up), open, giving_up, .. } = &self.nodes[node] else { return };
        let (me, map) = (*me, up.map());
        let held: Vec<Block> = map.blocks.iter().filter(|(_, o)| **o == me).map(|(b, _)| *b).collect();
        let releasing = open.values().any(|change| matches!(change, Change::Release { .. }));
        let given_up = giving_up.first().or(held.first()).copied().filter(|_| !releasing);
        if open.len() > 3 {
            return;
        }
        if !map.members.contains(&me) {
            return self.ask(node, Change::Admit(me));
        }
        let wanted = held.len() as u32 + 1;
        match self.random.below(20) {
            0 => self.ask(node, Change::DropNetwork(network(3))),
            1..=4 => {
                if let Some(block) = given_up {
                    self.nodes[node].giving_up.insert(block);
                    self.nodes[node].has_released = true;
                    self.ask(node, Change::Release { block, owner: me });
                }
            }
            5..=6 => {
                let prefix = format!("10.7.0.{}/28", self.random.below(4) * 16).parse().unwrap();
                self.ask(
                    node,
                    Change::ClaimExact { block: Block { network: network(1), prefix }, owner: me },
                );
            }
            7..=8 => self.claim(node, network(3), "fd00::/64", 112, wanted),
            _ => self.claim(node, network(1), "10.7.0.0/24", 29, wanted),
        }
    }

    pub(crate) fn claim(
        &mut self,
        node: usize,
        network: NetworkId,
        subnet: &str,
        block_length: u8,
        blocks: u32,
    ) {
        let owner = self.nodes[node].id;
        let subnet = subnet.parse().unwrap();
        self.ask(node, Change::Claim { network, subnet, block_length, owner, blocks });
    }

    /// Ends all faults. Then all hosts join, and claim at the same instant.
    pub(crate) fn heal_and_claim(&mut self) {
        self.cut.fill(false);
        self.start_all();
        self.run_until_answered();
        let ids: Vec<NodeId> = self.nodes.iter().map(|node| node.id).collect();
        for (node, me) in ids.into_iter().enumerate() {
            self.ask(node, Change::Admit(me));
        }
        self.run_until_answered();
        for node in 0..self.nodes.len() {
            assert!(matches!(self.nodes[node].last, Some(Ok(_))), "{node}: {:?}", self.nodes[node].last);
            self.claim(node, network(8), "10.8.0.0/16", 24, 2);
        }
        self.run_until_answered();
        for node in &self.nodes {
            assert!(matches!(node.last, Some(Ok(_))), "{:?}", node.last);
            let map = &node.disk.learned;
            let held = map.blocks.iter().filter(|(b, o)| b.network == network(8) && **o == node.id);
            assert_eq!(held.count(), 2);
        }
        // Remaining requests of the storm may still be decided.
        self.run_until("all hosts have the same map", |world| {
            let map = &world.nodes[0].disk.learned;
            let same = world.nodes.iter().all(|node| node.disk.learned == *map);
            same && map.members.len() == world.nodes.len()
        });
    }

    /// Runs until every request is answered, and fails if one is not answered in time.
    pub(crate) fn run_until_answered(&mut self) {
        self.run_until("requests are answered", |world| world.nodes.iter().all(|node| node.open.is_empty()));
    }

    pub(crate) fn run_until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = self.now + 3100;
        while !holds(self) {
            assert!(self.now < deadline, "not in time: {what}");
            self.step();
        }
    }

    pub(crate) fn run(&mut self, for_ms: u64) {
        let end = self.now + for_ms;
        while self.now < end {
            self.step();
        }
    }
}
