//! The effect of changes on a map, and the cases of the protocol that the simulation in `tests/simulation` meets too
//! rarely.

mod lies;
mod recovery;

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use ipnet::IpNet;
use ovl_proto::alloc::{
    AgreedKey, AllocMap, AllocMessage, Ballot, Block, Change, Decision, MapStep, Proof, Refusal, Vote,
};
use ovl_proto::id::{ClusterKeyId, NetworkId, NodeId};
use ovl_proto::wire;
use proptest::prelude::*;

use super::fake::Fake;
use super::{
    ADMIT_MS, DEADLINE_MS, DELEGATE_MS, Durable, Event, MAX_REMOTE_REQUESTS, Output, Replica, Signatures,
    apply, apply_all, is_step, proof,
};

const A: NodeId = NodeId([1; 10]);
const B: NodeId = NodeId([2; 10]);
const C: NodeId = NodeId([3; 10]);
const D: NodeId = NodeId([4; 10]);
const NET: NetworkId = NetworkId([7; 5]);

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn block(text: &str) -> Block {
    Block { network: NET, prefix: net(text) }
}

fn claim(owner: NodeId, subnet: &str, block_length: u8, blocks: u32) -> Change {
    Change::Claim { network: NET, subnet: net(subnet), block_length, owner, blocks }
}

fn exact(owner: NodeId, prefix: &str) -> Change {
    Change::ClaimExact { block: block(prefix), owner }
}

fn map_of(members: &[NodeId], blocks: &[(&str, NodeId)]) -> AllocMap {
    AllocMap {
        cluster: 9,
        version: 4,
        members: members.iter().copied().collect(),
        previous_members: members.iter().copied().collect(),
        blocks: blocks.iter().map(|(prefix, owner)| (block(prefix), *owner)).collect(),
        ..AllocMap::default()
    }
}

fn held(map: &AllocMap, owner: NodeId) -> Vec<String> {
    map.blocks.iter().filter(|(_, o)| **o == owner).map(|(b, _)| b.prefix.to_string()).collect()
}

fn vote(by: NodeId, ballot: Ballot, map: &AllocMap) -> Vote {
    Fake(by).sign(&proof::statement(&Fake(by), ballot, map))
}

/// The decision of a map by these hosts, in a ballot of the first one. Its counter is the version.
fn decision(map: &AllocMap, signers: &[NodeId]) -> Decision {
    let ballot = Ballot { counter: map.version, node: signers[0] };
    let votes = signers.iter().map(|by| vote(*by, ballot, map)).collect();
    let statement = proof::statement(&Fake(signers[0]), ballot, map);
    Decision { map: map.clone(), proof: Proof { statement, votes }, ..Decision::default() }
}

fn learn(map: &AllocMap, signers: &[NodeId]) -> AllocMessage {
    AllocMessage::Learn(Box::new(decision(map, signers)))
}

fn fresh(me: NodeId) -> Replica {
    Replica::new(me, Rc::new(Fake(me)), Durable::default(), 1)
}

/// Creates a replica that knows a map, with nothing in flight.
fn node(me: NodeId, map: &AllocMap) -> Replica {
    let members: Vec<NodeId> = map.members.iter().copied().collect();
    let proof = decision(map, &members).proof;
    let durable = Durable { learned: map.clone(), proof, ..Durable::default() };
    Replica::new(me, Rc::new(Fake(me)), durable, 5)
}

fn done(out: &Output) -> Option<Result<u64, Refusal>> {
    out.events.iter().find_map(|event| match event {
        Event::Done { result, .. } => Some(result.clone()),
        Event::Learned
        | Event::ForeignCluster { .. }
        | Event::Fork { .. }
        | Event::Unproved { .. }
        | Event::RecoveryEnded(_) => None,
    })
}

#[test]
fn claim_takes_the_lowest_free_blocks() {
    let map = map_of(&[A, B], &[("10.0.0.8/29", B), ("10.0.0.17/32", B), ("10.0.0.32/27", B)]);
    let next = apply(&map, &claim(A, "10.0.0.0/24", 29, 4)).unwrap().unwrap();
    assert_eq!(held(&next, A), ["10.0.0.0/29", "10.0.0.24/29", "10.0.0.64/29", "10.0.0.72/29"]);
    assert_eq!((next.version, next.previous_members), (5, map.members.clone()));
    // Blocks of another length, from before the subnet grew, and one that contains the subnet.
    let next = apply(&map, &claim(A, "10.0.0.0/16", 24, 1)).unwrap().unwrap();
    assert_eq!(held(&next, A), ["10.0.1.0/24"]);
    let wide = map_of(&[A, B], &[("10.0.0.0/8", B)]);
    assert!(matches!(apply(&wide, &claim(A, "10.0.0.0/24", 29, 1)), Err(Refusal::Full { blocks: 32, .. })));
}

#[test]
fn claim_works_at_both_ends_of_the_address_space() {
    let map = map_of(&[A, B], &[("ffff:ffff:ffff:ffff::/65", B), ("255.255.255.254/32", B)]);
    let next = apply(&map, &claim(A, "ffff:ffff:ffff:ffff::/64", 65, 1)).unwrap().unwrap();
    assert_eq!(held(&next, A), ["ffff:ffff:ffff:ffff:8000::/65"]);
    let full = apply(&next, &claim(B, "ffff:ffff:ffff:ffff::/64", 112, 2));
    assert!(matches!(full, Err(Refusal::Full { .. })), "{full:?}");
    let next = apply(&map, &claim(A, "255.255.255.254/31", 32, 1)).unwrap().unwrap();
    assert_eq!(held(&next, A), ["255.255.255.255/32"]);
    let map = map_of(&[A], &[]);
    for (all, length) in [("::/0", 0), ("0.0.0.0/0", 0), ("::/0", 128)] {
        assert!(apply(&map, &claim(A, all, length, 1)).unwrap().is_some());
    }
    let much = apply(&map, &claim(A, "fd00::/8", 128, u32::MAX)).unwrap().unwrap();
    assert_eq!(much.blocks.len(), super::MAX_BLOCKS_PER_CLAIM);
}

#[test]
fn claim_of_held_blocks_changes_nothing() {
    let map = map_of(&[A, B], &[("10.0.0.0/29", A), ("10.0.0.8/29", B)]);
    assert_eq!(apply(&map, &claim(A, "10.0.0.0/24", 29, 1)), Ok(None));
    assert_eq!(apply(&map, &exact(A, "10.0.0.0/29")), Ok(None));
    assert_eq!(apply(&map, &exact(A, "10.0.0.4/30")), Ok(None));
    let refusal = Refusal::Held { prefix: net("10.0.0.8/29"), holder: B };
    assert_eq!(apply(&map, &exact(A, "10.0.0.10/32")), Err(refusal.clone()));
    assert_eq!(
        apply(&map, &exact(B, "10.0.0.0/28")).unwrap_err(),
        Refusal::Held { prefix: net("10.0.0.0/29"), holder: A }
    );
    assert_eq!(apply(&map, &exact(C, "10.0.0.16/29")), Err(Refusal::NotMember(C)));
    assert_eq!(apply(&map, &claim(C, "10.0.0.0/24", 29, 1)), Err(Refusal::NotMember(C)));
    assert_eq!(apply(&map, &exact(A, "10.0.0.17/29")), Err(Refusal::NotABlock(net("10.0.0.17/29"))));
    assert_eq!(apply(&map, &claim(A, "10.0.0.0/24", 23, 1)), Err(Refusal::NotABlock(net("10.0.0.0/24"))));
    let release = |owner| Change::Release { block: block("10.0.0.8/29"), owner };
    assert_eq!(apply(&map, &release(A)), Ok(None));
    assert_eq!(apply(&map, &release(B)).unwrap().unwrap().blocks.len(), 1);
    assert_eq!(apply(&map, &Change::DropNetwork(NetworkId([1; 5]))), Ok(None));
    assert!(apply(&map, &Change::DropNetwork(NET)).unwrap().unwrap().blocks.is_empty());
}

#[test]
fn forgotten_host_loses_its_blocks_and_may_return() {
    let map = map_of(&[A, B], &[("10.0.0.0/29", A), ("10.0.0.8/29", B)]);
    let next = apply(&map, &Change::Forget(B)).unwrap().unwrap();
    assert!(held(&next, B).is_empty() && next.forgotten.contains(&B));
    assert_eq!(apply(&next, &Change::Forget(B)), Ok(None));
    assert_eq!(apply(&next, &Change::Forget(A)), Err(Refusal::LastMember(A)));
    let back = apply(&next, &Change::Admit(B)).unwrap().unwrap();
    assert!(back.forgotten.is_empty() && back.members == map.members);
    assert_eq!(apply(&back, &Change::Admit(B)), Ok(None));
}

#[test]
fn second_rotation_of_the_cluster_key_is_refused() {
    let key = |n: u8| AgreedKey { id: ClusterKeyId([n; 4]), commitment: [n; 16], since_ms: u64::from(n) };
    let map = map_of(&[A], &[]);
    let first = Change::Key { from: None, to: key(1) };
    let map = apply(&map, &first).unwrap().unwrap();
    assert_eq!(map.key, Some(key(1)));
    assert_eq!(apply(&map, &first), Ok(None), "idempotent");
    let second = Change::Key { from: None, to: key(2) };
    assert_eq!(apply(&map, &second), Err(Refusal::AnotherKey(ClusterKeyId([1; 4]))));
    let later = Change::Key { from: Some(ClusterKeyId([1; 4])), to: key(2) };
    let map = apply(&map, &later).unwrap().unwrap();
    assert_eq!(map.key, Some(key(2)));
    assert!(apply(&map, &first).is_err(), "a late copy changes nothing");
    let same_id = AgreedKey { id: key(2).id, ..key(9) };
    let other = Change::Key { from: None, to: same_id };
    assert!(apply(&map, &other).is_err(), "another key with the same id is another key");
}

#[test]
fn banned_host_returns_after_the_ban_or_with_the_next_key() {
    let map = map_of(&[A, B], &[("10.0.0.0/29", A), ("10.0.0.8/29", B)]);
    let next = apply(&map, &Change::Ban(B)).unwrap().unwrap();
    assert!(held(&next, B).is_empty() && next.banned.contains(&B) && next.forgotten.contains(&B));
    assert_eq!(apply(&next, &Change::Ban(B)), Ok(None));
    assert_eq!(apply(&next, &Change::Admit(B)), Err(Refusal::Banned(B)));
    let free = apply(&next, &Change::Unban(B)).unwrap().unwrap();
    assert_eq!(apply(&free, &Change::Unban(B)), Ok(None));
    assert!(apply(&free, &Change::Admit(B)).unwrap().is_some());
    let to = AgreedKey { id: ClusterKeyId([1; 4]), commitment: [1; 16], since_ms: 1 };
    let rotated = apply(&next, &Change::Key { from: None, to }).unwrap().unwrap();
    assert!(apply(&rotated, &Change::Admit(B)).unwrap().is_some());
    // A host that left can be banned afterwards, and one that never was a member cannot.
    let left = apply(&map, &Change::Forget(B)).unwrap().unwrap();
    assert!(apply(&left, &Change::Ban(B)).unwrap().unwrap().banned.contains(&B));
    assert_eq!(apply(&left, &Change::Ban(C)), Ok(None));
    assert_eq!(apply(&left, &Change::Ban(A)), Err(Refusal::LastMember(A)));
}

#[test]
fn block_is_free_between_two_holders() {
    let map = map_of(&[A, B], &[("10.0.0.0/29", A), ("10.0.0.8/29", B)]);
    let release = Change::Release { block: block("10.0.0.0/29"), owner: A };
    let (next, results) = apply_all(&map, [&release, &exact(B, "10.0.0.0/29"), &Change::Admit(C)]);
    assert_eq!(results, [Ok(())], "the claim waits for the next decree");
    let next = next.unwrap();
    assert!(is_step(&map, &next));
    let after = apply(&next, &exact(B, "10.0.0.0/29")).unwrap().unwrap();
    assert!(is_step(&next, &after) && !is_step(&map, &AllocMap { version: 5, ..after }));
}

#[test]
fn only_valid_steps_are_accepted() {
    let mut map = map_of(&[A, B], &[("10.0.0.0/29", A), ("10.0.0.8/29", B)]);
    (map.forgotten, map.banned) = (BTreeSet::from([C]), BTreeSet::from([C]));
    let good = AllocMap { version: 5, ..map.clone() };
    assert!(is_step(&map, &good));
    let wrong: [fn(&mut AllocMap); 14] = [
        |map| map.cluster = 8,
        |map| map.version = 4,
        |map| map.version = 6,
        |map| map.version = u64::MAX,
        |map| map.members.clear(),
        |map| {
            map.members.remove(&B);
        },
        |map| map.previous_members = BTreeSet::from([A]),
        |map| map.members = BTreeSet::from([A, B, C]),
        |map| map.forgotten.clear(),
        |map| {
            map.forgotten.insert(NodeId([9; 10]));
        },
        |map| {
            map.banned.insert(A);
        },
        |map| {
            map.blocks.insert(block("10.0.0.8/29"), A);
        },
        |map| {
            map.blocks.insert(block("10.0.0.12/30"), A);
        },
        |map| {
            map.blocks.insert(block("10.0.0.16/29"), C);
        },
    ];
    for (number, wrong) in wrong.into_iter().enumerate() {
        let mut next = good.clone();
        wrong(&mut next);
        assert!(!is_step(&map, &next), "{number}: {next:?}");
    }
}

proptest! {
    /// Compares with a list of every address of a small range.
    #[test]
    fn blocks_never_overlap(
        steps in prop::collection::vec((0_u8..5, 0_u8..3, any::<u8>(), 24_u8..=32, 0_u32..4), 1..60),
    ) {
        let mut map = map_of(&[A, B, C], &[]);
        for (kind, owner, at, length, count) in steps {
            let owner = [A, B, C][usize::from(owner)];
            let prefix = IpNet::new([10, 0, 0, at].into(), length).unwrap().trunc();
            let block = Block { network: NET, prefix };
            let subnet = IpNet::new(prefix.addr(), length - length % 8).unwrap().trunc();
            let change = match kind {
                0 => Change::ClaimExact { block, owner },
                1 => Change::Release { block: *map.blocks.keys().next().unwrap_or(&block), owner },
                2 => Change::DropNetwork(NetworkId([at % 20; 5])),
                _ => Change::Claim { network: NET, subnet, block_length: length, owner, blocks: count },
            };
            let mut of: BTreeMap<u8, NodeId> = BTreeMap::new();
            let result = apply(&map, &change);
            if let Ok(Some(next)) = &result {
                prop_assert!(is_step(&map, next));
                prop_assert_eq!(apply(next, &change), Ok(None), "idempotent");
                let step = map.step_to(next, [0; 32]).unwrap();
                prop_assert!(map.next(&step).as_ref() == Some(next));
                prop_assert!(step.held.len() + step.freed.len() <= next.blocks.len() + map.blocks.len());
                map = next.clone();
            }
            for (block, owner) in &map.blocks {
                for host in block.prefix.hosts().chain([block.prefix.network(), block.prefix.broadcast()]) {
                    let std::net::IpAddr::V4(host) = host else { unreachable!() };
                    if *of.entry(host.octets()[3]).or_insert(*owner) != *owner {
                        prop_assert!(false, "{} is held twice", host);
                    }
                }
            }
            if matches!(result, Err(Refusal::Full { .. })) {
                let first_free = subnet.subnets(length).unwrap().take(300).filter(|candidate| {
                    !map.blocks.keys().any(|b| b.prefix.contains(candidate) || candidate.contains(&b.prefix))
                });
                let own = map.blocks.iter().filter(|(b, o)| subnet.contains(&b.prefix) && **o == owner).count();
                prop_assert!(first_free.count() + own < count as usize, "there was room");
            }
        }
    }
}

#[test]
fn single_member_decides_at_once() {
    let mut a = fresh(A);
    let out = a.bootstrap(9);
    assert!(out.persist && out.events == [Event::Learned] && a.map().members == BTreeSet::from([A]));
    assert_eq!(a.bootstrap(10), Output::default(), "only once");
    let (id, out) = a.request(0, claim(A, "10.0.0.0/24", 29, 2), &BTreeSet::new());
    assert!(out.persist && out.send.is_empty());
    assert_eq!(out.events, [Event::Learned, Event::Done { id, result: Ok(2) }]);
    let (id, out) = a.request(0, claim(A, "10.0.0.0/24", 29, 2), &BTreeSet::new());
    assert_eq!(out.events, [Event::Done { id, result: Ok(2) }]);
}

#[test]
fn acceptor_accepts_only_the_successor_of_an_agreed_map() {
    let v4 = map_of(&[A, B, C], &[]);
    let v5 = apply(&v4, &exact(A, "10.0.0.0/29")).unwrap().unwrap();
    let v6 = apply(&v5, &exact(A, "10.0.0.8/29")).unwrap().unwrap();
    let mut b = node(B, &v4);
    let ballot = |counter| Ballot { counter, node: A };
    let accepted = |counter, map: &AllocMap| AllocMessage::Accepted {
        ballot: ballot(counter),
        vote: vote(B, ballot(counter), map),
    };
    let out = b.handle(0, A, AllocMessage::Accept { ballot: ballot(1), map: v5.clone() });
    assert_eq!(out.send, [(A, accepted(1, &v5))]);
    // The decision of version 5 was lost. The accepted map must stay visible to proposers.
    let next = AllocMessage::Accept { ballot: ballot(2), map: v6.clone() };
    let out = b.handle(0, A, next.clone());
    assert_eq!(out.send, [(A, AllocMessage::Ask { known: 4 })]);
    assert_eq!(b.durable().accepted, Some((ballot(1), v5.clone())));
    assert!(b.handle(0, A, learn(&v5, &[A, B])).persist);
    assert_eq!(b.handle(0, A, next).send, [(A, accepted(2, &v6))]);
    assert_eq!(b.durable().accepted, Some((ballot(2), v6)));
}

#[test]
fn whole_map_is_sent_to_an_acceptor_that_cannot_carry_out_the_step() {
    let v4 = map_of(&[A, B], &[("10.0.0.0/29", B)]);
    let mut a = node(A, &v4);
    let ballot = {
        let (_, out) = a.request(0, exact(A, "10.0.0.8/29"), &BTreeSet::from([B]));
        let [(B, AllocMessage::Prepare { ballot, .. })] = out.send.as_slice() else { panic!("{out:?}") };
        *ballot
    };
    let out = a.handle(1, B, AllocMessage::Promise { ballot, accepted: None, learned: None });
    let [(B, AllocMessage::AcceptStep { step, .. })] = out.send.as_slice() else { panic!("{out:?}") };
    assert_eq!(step.held.keys().copied().collect::<Vec<_>>(), [block("10.0.0.8/29")], "only what changes");
    // A later release may change what this one does not know: another map than the step describes results.
    let other = MapStep { map: [7; 32], ..step.clone() };
    let mut b = node(B, &v4);
    let ask = AllocMessage::Ask { known: 3 };
    let out = b.handle(2, A, AllocMessage::AcceptStep { ballot, step: other });
    assert_eq!((out.persist, out.send), (false, vec![(A, ask.clone())]));
    let answer = a.handle(3, B, ask);
    let [(B, AllocMessage::Learn(_)), (B, whole @ AllocMessage::Accept { .. })] = answer.send.as_slice()
    else {
        panic!("{answer:?}")
    };
    let out = b.handle(4, A, whole.clone());
    let [(A, accepted @ AllocMessage::Accepted { .. })] = out.send.as_slice() else { panic!("{out:?}") };
    let out = a.handle(5, B, accepted.clone());
    assert_eq!(done(&out), Some(Ok(5)));
    // The decision is as short as the proposal.
    let [(B, AllocMessage::Decided { step, proof })] = out.send.as_slice() else { panic!("{out:?}") };
    let other = MapStep { map: [7; 32], ..step.clone() };
    let out = b.handle(6, A, AllocMessage::Decided { step: other, proof: proof.clone() });
    assert_eq!((out.events.as_slice(), out.send), ([].as_slice(), vec![(A, AllocMessage::Ask { known: 3 })]));
    let decided = AllocMessage::Decided { step: step.clone(), proof: proof.clone() };
    assert_eq!(b.handle(7, A, decided.clone()).events, [Event::Learned]);
    assert_eq!(b.map(), a.map());
    assert_eq!(b.handle(8, A, decided).send, [], "known");
    // A host that missed the one before asks for it.
    let mut late = node(B, &v4);
    let next = MapStep { version: 6, ..step.clone() };
    let out = late.handle(9, A, AllocMessage::Decided { step: next, proof: Proof::default() });
    assert_eq!(out.send, [(A, AllocMessage::Ask { known: 4 })]);
}

#[test]
fn what_is_sent_is_as_large_as_what_changes() {
    let members: Vec<NodeId> = (1..=60).map(|number| NodeId([number; 10])).collect();
    let mut map = map_of(&members, &[]);
    for number in 0..3600_u16 {
        let [high, low] = number.to_be_bytes();
        let prefix = IpNet::new([10, high, low, 0].into(), 24).unwrap();
        map.blocks.insert(Block { network: NET, prefix }, members[usize::from(number % 60)]);
    }
    let next = apply(&map, &exact(A, "10.200.0.0/24")).unwrap().unwrap();
    let step = map.step_to(&next, [0; 32]).unwrap();
    let size = |bytes: Result<Vec<u8>, _>| bytes.unwrap().len();
    let (whole, short) = (size(wire::encode_body(&next)), size(wire::encode_body(&step)));
    assert!(whole > 70_000 && short < 100, "{whole} {short}");
}

#[test]
fn change_of_members_needs_a_majority_of_the_new_ones() {
    let old = map_of(&[A], &[]);
    let mut a = node(A, &old);
    let (_, out) = a.request(0, Change::Admit(B), &BTreeSet::from([B]));
    let [(B, AllocMessage::AcceptStep { ballot, step })] = out.send.as_slice() else { panic!("{out:?}") };
    let map = old.next(step).unwrap();
    assert_eq!(done(&out), None);
    let mut b = fresh(B);
    // A host without a map asks for it on its own.
    let accept = AllocMessage::Accept { ballot: *ballot, map };
    assert_eq!(b.handle(0, A, out.send[0].1.clone()), Output::default());
    assert_eq!(b.ask(A).send, [(A, AllocMessage::Ask { known: 0 })]);
    let out = a.handle(1, B, AllocMessage::Ask { known: 0 });
    assert_eq!(out.send, [(B, learn(&old, &[A])), (B, accept.clone())]);
    assert_eq!(b.handle(2, A, learn(&old, &[A])).events, []);
    // It waits for more answers.
    assert_eq!(b.tick(102, &BTreeSet::new()).events, [Event::Learned]);
    let out = b.handle(102, A, accept);
    let out = a.handle(103, B, out.send[0].1.clone());
    assert_eq!(done(&out), Some(Ok(5)));
    // The decision proves itself to the host that joins, and is kept as a step of the history.
    let [(B, AllocMessage::Learn(decided))] = out.send.as_slice() else { panic!("{out:?}") };
    assert_eq!(b.handle(104, A, AllocMessage::Learn(decided.clone())).events, [Event::Learned]);
    assert_eq!(a.durable().history.proofs(), std::slice::from_ref(&decided.proof));
    assert_eq!(b.durable().history, a.durable().history);
}

#[test]
fn host_proposes_a_request_itself_if_the_coordinator_is_silent() {
    let map = map_of(&[A, B, C], &[]);
    let mut b = node(B, &map);
    let alive = BTreeSet::from([A, C]);
    let (_, out) = b.request(0, claim(B, "10.0.0.0/24", 29, 1), &alive);
    assert!(matches!(out.send.as_slice(), [(A, AllocMessage::Request { .. })]), "{out:?}");
    assert_eq!(b.next_tick(), Some(DELEGATE_MS));
    let out = b.tick(DELEGATE_MS, &alive);
    assert!(matches!(out.send.as_slice(), [(A, AllocMessage::Prepare { .. }), (C, _)]), "{out:?}");
    let out = b.tick(DEADLINE_MS, &alive);
    assert_eq!(done(&out), Some(Err(Refusal::NoMajority { answered: 1, needed: 2, members: 3 })));
    // Forget is never forwarded to another host.
    let (_, out) = b.request(9000, Change::Forget(C), &alive);
    assert!(matches!(out.send.as_slice(), [(A, AllocMessage::Prepare { .. }), (C, _)]), "{out:?}");
    let mut a = node(A, &map);
    let out = a.handle(0, B, AllocMessage::Request { id: 1, change: Change::Forget(C) });
    assert_eq!(out, Output::default());
}

#[test]
fn admission_asked_of_another_member_is_passed_on_to_the_coordinator() {
    let map = map_of(&[A, B, C], &[]);
    let (mut a, mut b) = (node(A, &map), node(B, &map));
    let alive = BTreeSet::from([A, C]);
    let _ = b.tick(0, &alive);
    let request = AllocMessage::Request { id: 7, change: Change::Admit(D) };
    let out = b.handle(0, D, request.clone());
    assert_eq!(out.send, [(A, request.clone())]);
    let _ = a.tick(0, &BTreeSet::from([B, C]));
    let out = a.handle(0, B, request);
    assert!(matches!(out.send.as_slice(), [(B, AllocMessage::Prepare { .. }), (C, _)]), "{out:?}");
    // If the coordinator is silent, the next member proposes it, whichever member was asked.
    let _ = b.tick(ADMIT_MS - 1, &alive);
    let out = b.tick(ADMIT_MS, &alive);
    assert!(matches!(out.send.as_slice(), [(A, AllocMessage::Prepare { .. }), (C, _)]), "{out:?}");
    let (mut c, alive) = (node(C, &map), BTreeSet::from([A, B]));
    let _ = c.tick(0, &alive);
    let asked: Vec<NodeId> = [0, DELEGATE_MS, ADMIT_MS, 2 * ADMIT_MS - 1]
        .into_iter()
        .flat_map(|now| {
            let out = match now {
                0 => c.handle(0, D, AllocMessage::Request { id: 7, change: Change::Admit(D) }),
                now => c.tick(now, &alive),
            };
            out.send.into_iter().map(|(to, _)| to)
        })
        .collect();
    assert_eq!(asked, [A, B]);
}

#[test]
fn ballot_is_sent_again_less_and_less_often() {
    let mut a = node(A, &map_of(&[A, B, C], &[]));
    let alive = BTreeSet::from([B, C]);
    let _ = a.request(0, claim(A, "10.0.0.0/24", 29, 1), &alive);
    let again: Vec<u64> = (1..DEADLINE_MS).filter(|now| !a.tick(*now, &alive).send.is_empty()).collect();
    assert_eq!(again, [100, 300, 700, 1500, 2300]);
}

#[test]
fn map_of_another_cluster_is_reported_and_never_adopted() {
    let map = map_of(&[A, B], &[]);
    let mut other = map_of(&[A, B, C], &[]);
    (other.cluster, other.version) = (10, 50);
    let mut a = node(A, &map);
    let (_, out) = a.request(0, exact(A, "10.0.0.0/29"), &BTreeSet::from([B]));
    let [(B, AllocMessage::Prepare { ballot, .. })] = out.send.as_slice() else { panic!("{out:?}") };
    let (own, ballot) = (*ballot, Ballot { counter: 1, node: B });
    let accepted = Some((ballot, other.clone()));
    for message in [
        learn(&other, &[A, B, C]),
        AllocMessage::Accept { ballot, map: other.clone() },
        AllocMessage::Promise { ballot: own, accepted, learned: None },
        AllocMessage::Promise {
            ballot: own,
            accepted: None,
            learned: Some(Box::new(decision(&other, &[A, B, C]))),
        },
    ] {
        let out = a.handle(0, B, message);
        assert_eq!(out.events, [Event::ForeignCluster { from: B, cluster: 10 }]);
        assert!(!out.persist && out.send.is_empty());
    }
    assert_eq!(a.hear(B, 10, 1).events, [Event::ForeignCluster { from: B, cluster: 10 }]);
    assert_eq!(a.hear(B, 9, 7).send, [(B, AllocMessage::Ask { known: 4 })]);
    assert_eq!(*a.map(), map);
}

#[test]
fn remote_requests_are_limited_and_deduplicated() {
    let mut a = node(A, &map_of(&[A, B, C], &[]));
    for id in (0..5000).chain(0..5000) {
        let _ = a.handle(0, B, AllocMessage::Request { id, change: claim(B, "10.0.0.0/24", 29, 1) });
    }
    let out = a.tick(DEADLINE_MS, &BTreeSet::new());
    let replies: BTreeSet<u64> = out
        .send
        .iter()
        .map(|(_, message)| match message {
            AllocMessage::Reply { id, .. } => *id,
            message => panic!("{message:?}"),
        })
        .collect();
    assert_eq!((replies.len(), out.send.len()), (MAX_REMOTE_REQUESTS, MAX_REMOTE_REQUESTS));
}
