//! Three hosts that follow the protocol among messages of a member that lies and of an outsider, for the fuzzer in
//! `tests/fuzz` and for a property test.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use ovl_proto::alloc::{AllocMap, AllocMessage, Block, Change};
use ovl_proto::id::{NetworkId, NodeId};
use ovl_proto::wire;

use crate::fake::Fake;
use crate::{Output, Replica, Signatures};

const HONEST: [NodeId; 3] = [NodeId([1; 10]), NodeId([2; 10]), NodeId([3; 10])];
const LIAR: NodeId = NodeId([4; 10]);
const OUTSIDER: NodeId = NodeId([9; 10]);
/// More would only make a run slower.
const MAX_STEPS: usize = 256;
const MAX_WAITING: usize = 1000;

struct World {
    hosts: Vec<Replica>,
    now_ms: u64,
    /// Receiver, sender and message.
    waiting: Vec<(NodeId, NodeId, AllocMessage)>,
    /// What was sent, for whoever repeats it.
    seen: Vec<AllocMessage>,
    /// The map of each version that a host knew to be agreed.
    agreed: BTreeMap<u64, AllocMap>,
}

impl World {
    fn new() -> Self {
        let host = |me: NodeId| {
            let signatures: Rc<dyn Signatures> = Rc::new(Fake(me));
            Replica::new(me, signatures, Default::default(), u64::from(me.0.first().copied().unwrap_or(1)))
        };
        let hosts = HONEST.into_iter().map(host).collect();
        let mut world =
            Self { hosts, now_ms: 0, waiting: Vec::new(), seen: Vec::new(), agreed: BTreeMap::new() };
        world.with(0, |host, _| host.bootstrap(7));
        for (at, node) in HONEST.into_iter().enumerate().skip(1) {
            world.with(at, |host, _| host.ask(HONEST[0]));
            world.settle();
            world.with(at, |host, now| host.request(now, Change::Admit(node), &alive()).1);
            world.settle();
        }
        world.with(0, |host, now| host.request(now, Change::Admit(LIAR), &alive()).1);
        world.settle();
        world
    }

    fn with(&mut self, at: usize, act: impl FnOnce(&mut Replica, u64) -> Output) {
        let now = self.now_ms;
        let Some(host) = self.hosts.get_mut(at) else { return };
        let out = act(host, now);
        let map = host.map().clone();
        let from = HONEST.get(at).copied().unwrap_or_default();
        let known = self.agreed.entry(map.version).or_insert_with(|| map.clone());
        assert_eq!(*known, map, "two maps of one version");
        for (to, message) in out.send {
            self.seen.push(message.clone());
            self.waiting.push((to, from, message));
        }
        self.waiting.truncate(MAX_WAITING);
        self.seen.truncate(MAX_WAITING);
    }

    fn deliver(&mut self, number: usize) {
        if self.waiting.is_empty() {
            return;
        }
        let (to, from, message) = self.waiting.swap_remove(number % self.waiting.len());
        if let Some(at) = HONEST.iter().position(|host| *host == to) {
            self.with(at, |host, now| host.handle(now, from, message));
        }
    }

    fn tick(&mut self, at: usize, milliseconds: u64) {
        self.now_ms = self.now_ms.saturating_add(milliseconds);
        self.with(at, |host, now| host.tick(now, &alive()));
    }

    /// Delivers everything, and lets time pass, until nothing is sent any more.
    fn settle(&mut self) {
        for round in 0..200 {
            while !self.waiting.is_empty() {
                self.deliver(0);
            }
            self.tick(round % HONEST.len(), 50);
        }
    }
}

fn alive() -> BTreeSet<NodeId> {
    HONEST.into_iter().chain([LIAR]).collect()
}

/// Runs steps that the bytes describe: messages that arrive in any order, twice or never, time, requests, and messages of
/// the liar and of the outsider, which are those of others or made from the bytes. No two hosts ever know different maps
/// of one version.
pub fn agreement(bytes: &[u8]) {
    let mut world = World::new();
    assert!(world.hosts.iter().all(|host| host.map().members == alive()));
    let mut rest = bytes;
    for _ in 0..MAX_STEPS {
        let [step, value, behind @ ..] = rest else { return };
        rest = behind;
        let (at, number) = (usize::from(step >> 4) % HONEST.len(), usize::from(*value));
        match step & 7 {
            0 | 1 => world.deliver(number),
            2 => world.tick(at, 10 * u64::from(*value)),
            3 => world.with(at, |host, now| host.request(now, claim(at, *value), &alive()).1),
            4 => drop(world.waiting.pop()),
            5 | 6 => {
                let from = if step & 8 == 0 { LIAR } else { OUTSIDER };
                let again = world.seen.get(number % world.seen.len().max(1)).cloned();
                if let Some(message) = again {
                    world.with(at, |host, now| host.handle(now, from, message));
                }
            }
            _ => {
                let from = if step & 8 == 0 { LIAR } else { OUTSIDER };
                let (chunk, behind) = rest.split_at(rest.len().min(number));
                rest = behind;
                if let Ok(message) = wire::decode_body::<AllocMessage>(chunk) {
                    world.with(at, |host, now| host.handle(now, from, message));
                }
            }
        }
    }
}

/// A claim of a block by an honest host.
fn claim(at: usize, number: u8) -> Change {
    let prefix = ipnet::Ipv4Net::new([10, 0, number, 0].into(), 24).map(ipnet::IpNet::V4).unwrap_or_default();
    let owner = HONEST.get(at).copied().unwrap_or_default();
    Change::ClaimExact { block: Block { network: NetworkId([1; 5]), prefix }, owner }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn hosts_agree(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            super::agreement(&bytes);
        }
    }

    #[test]
    fn corpus_passes() {
        ovl_corpus::replay("agreement", super::agreement);
    }
}
