//! A majority is lost in a storm, the survivors recover in another one, and the lost hosts return.

use ovl_consensus::LOST_MS;
use ovl_proto::alloc::Change;

use super::world::{Stats, World};
use super::{run_seeds, storm::Weather};

impl World {
    /// Passes time in which hosts look around, and nothing else happens.
    fn pass(&mut self, for_ms: u64) {
        self.step();
        self.now += for_ms;
        self.step();
    }

    /// Loses a majority, and requests recoveries on survivors among faults until one is made. Returns the lost hosts, and
    /// those that were taken for lost.
    fn lose_and_recover(&mut self, faults: bool) -> Vec<usize> {
        let count = self.nodes.len();
        self.looks = true;
        let mut order: Vec<usize> = (0..count).collect();
        for index in (1..count).rev() {
            let other = self.random.below(index as u64 + 1) as usize;
            order.swap(index, other);
        }
        let left = 1 + self.random.below((count as u64 - 1) / 2) as usize;
        let lost = order.split_off(left);
        let survivors = order;
        for node in &lost {
            self.crash(*node);
        }
        self.cut.fill(false);
        let old = self.nodes[survivors[0]].disk.learned.cluster;
        for round in 0..60 {
            self.restart(&survivors);
            self.weather = None;
            self.pass(LOST_MS);
            let disk = |node: &usize| &self.nodes[*node].disk;
            if survivors.iter().all(|node| disk(node).learned.cluster != old || disk(node).held.is_some()) {
                let out = survivors.iter().filter(|node| disk(node).learned.cluster == old);
                return lost.iter().chain(out).copied().collect();
            }
            self.weather = (faults && round < 20).then(|| Weather::draw(&mut self.random));
            let end = self.now + 6000;
            while self.now < end {
                let none_yet = survivors.iter().all(|node| self.nodes[*node].disk.learned.cluster == old);
                if none_yet && self.random.percent(2) {
                    let node = survivors[self.random.below(survivors.len() as u64) as usize];
                    let cluster = 1000 + self.random.below(1 << 40);
                    self.with(node, |up, now| {
                        if up.map().cluster == old {
                            up.recover(now, cluster, 1).unwrap_or_default()
                        } else {
                            Default::default()
                        }
                    });
                }
                self.step();
            }
        }
        panic!("no recovery");
    }

    fn restart(&mut self, which: &[usize]) {
        let mut others = Vec::new();
        for node in 0..self.nodes.len() {
            if !which.contains(&node) && self.nodes[node].up.is_none() {
                others.push(node);
            }
        }
        self.start_all();
        for node in others {
            self.nodes[node].up = None;
        }
    }

    /// The lost hosts return one by one or together among faults, and all that are not in the recovered cluster accept it.
    fn return_and_accept(&mut self, lost: &[usize], faults: bool) {
        let together = self.random.percent(50);
        self.weather = faults.then(|| Weather::draw(&mut self.random));
        let mut back = Vec::new();
        for node in lost {
            back.push(*node);
            if !together || back.len() == lost.len() {
                let all: Vec<usize> = (0..self.nodes.len())
                    .filter(|node| !lost.contains(node) || back.contains(node))
                    .collect();
                for _ in 0..3 {
                    self.restart(&all);
                    for node in 0..self.nodes.len() {
                        self.request_any(node);
                    }
                    self.run(200);
                }
            }
        }
        self.weather = None;
        self.cut.fill(false);
        self.start_all();
        let lost = lost.to_vec();
        let survivor = (0..self.nodes.len()).find(|node| !lost.contains(node)).unwrap();
        let new = self.nodes[survivor].disk.learned.cluster;
        let of_new = |world: &Self, node: usize| world.nodes[node].disk.learned.cluster == new;
        self.run_until("who returned knows of the recovery", |world| {
            lost.iter().all(|node| of_new(world, *node) || world.nodes[*node].disk.held.is_some())
        });
        for node in lost {
            self.ever_forgotten.insert(self.nodes[node].id);
            let at = self.now + 3000;
            while !of_new(self, node) {
                assert!(self.now < at, "it has the map that it accepts");
                self.with(node, |up, _| up.accept_recovery().unwrap_or_default());
                self.step();
            }
            let id = self.nodes[node].id;
            self.ask(survivor, Change::Unban(id));
            self.run_until_answered();
        }
    }
}

fn run(many: u64, faults: bool) -> Option<Stats> {
    let world_of = |seed| World::new(seed, 3 + (seed % 4) as usize);
    run_seeds(many, world_of, |world| {
        world.heal_and_claim();
        world.storm(1000);
        world.heal_and_claim();
        // Some of these are not decided when the majority is lost.
        for _ in 0..10 {
            let node = world.random.below(world.nodes.len() as u64) as usize;
            world.request_any(node);
            world.step();
        }
        let lost = world.lose_and_recover(faults);
        world.return_and_accept(&lost, faults);
        world.heal_and_claim();
    })
}

#[test]
fn recoveries_without_faults_bring_all_together_again() {
    if let Some(total) = run(40, false) {
        assert!(total.recoveries >= 40 && total.left_out >= 40, "{total:?}");
    }
}

#[test]
fn recoveries_in_storms_give_no_block_to_two_members_of_a_cluster() {
    if let Some(total) = run(150, true) {
        // Some hosts crash before they report the end.
        assert!(total.recoveries >= 140 && total.left_out >= 100, "{total:?}");
    }
}
