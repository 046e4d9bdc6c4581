//! Hosts that lie: what a host without membership, or a single member, must not be able to do.

use super::*;
use crate::MAX_BALLOT_STEP;

const D: NodeId = NodeId([4; 10]);
/// A host that was never a member.
const EVIL: NodeId = NodeId([66; 10]);

fn v4() -> AllocMap {
    map_of(&[A, B, C], &[("10.0.0.0/29", A), ("10.0.0.8/29", B)])
}

/// A map in which all members but the liar are gone.
fn captured(map: &AllocMap, by: NodeId, version: u64) -> AllocMap {
    let blocks = map.blocks.keys().map(|block| (*block, by)).collect();
    AllocMap {
        version,
        members: BTreeSet::from([by]),
        previous_members: map.members.clone(),
        blocks,
        ..map.clone()
    }
}

/// Starts a request, and returns the ballot of its first message.
fn prepared(node: &mut Replica, alive: &[NodeId]) -> Ballot {
    let (_, out) = node.request(0, exact(A, "10.0.0.16/29"), &alive.iter().copied().collect());
    match out.send.first() {
        Some((_, AllocMessage::Prepare { ballot, .. })) => *ballot,
        other => panic!("{other:?}"),
    }
}

fn assert_unmoved(node: &Replica, before: &Durable) {
    assert_eq!((node.map(), &node.durable().accepted), (&before.learned, &before.accepted));
}

#[test]
fn promise_of_a_host_that_is_no_member_replaces_nothing() {
    for version in [5, u64::MAX] {
        let mut a = node(A, &v4());
        let before = a.durable().clone();
        let forged = captured(&v4(), EVIL, version);
        let learned = Some(Box::new(decision(&forged, &[EVIL])));
        // Unasked, and for the ballot in flight.
        let own = prepared(&mut a, &[B, C]);
        for ballot in [Ballot { counter: 9, node: A }, Ballot { counter: 9, node: EVIL }, own] {
            let message = AllocMessage::Promise { ballot, accepted: None, learned: learned.clone() };
            let out = a.handle(0, EVIL, message);
            assert_eq!(out, Output::default());
            assert_unmoved(&a, &before);
        }
    }
}

#[test]
fn promise_of_a_member_needs_the_proof_of_its_map() {
    let mut a = node(A, &v4());
    let ballot = prepared(&mut a, &[B, C]);
    let before = a.durable().clone();
    let forged = captured(&v4(), C, 5);
    let promise =
        |decision| AllocMessage::Promise { ballot, accepted: None, learned: Some(Box::new(decision)) };
    let out = a.handle(0, C, promise(decision(&forged, &[C])));
    assert_eq!(out.events, [Event::Unproved { version: 5 }]);
    assert!(!out.persist && out.send.is_empty(), "it does not count as a promise either");
    assert_unmoved(&a, &before);
    // Without a ballot in flight that waits for it, even a proved map is not taken from a promise.
    let good = apply(&v4(), &exact(C, "10.0.0.24/29")).unwrap().unwrap();
    let mut idle = node(A, &v4());
    assert_eq!(idle.handle(0, C, promise(decision(&good, &[B, C]))), Output::default());
    assert_eq!(a.handle(0, C, promise(decision(&good, &[B, C]))).events[0], Event::Learned);
}

#[test]
fn forged_decisions_are_not_learned() {
    let map = v4();
    let next = apply(&map, &exact(C, "10.0.0.24/29")).unwrap().unwrap();
    let good = decision(&next, &[B, C]);
    let forged = captured(&map, EVIL, 5);
    let mut bad = vec![
        // Signatures of a minority, of hosts that are no members, and of one member several times.
        decision(&next, &[C]),
        decision(&forged, &[EVIL]),
        decision(&forged, &[EVIL, C]),
        decision(&next, &[C, C, C]),
        decision(&next, &[C, EVIL, D]),
        // Valid signatures of something else.
        Decision { map: forged.clone(), ..good.clone() },
        Decision { map: AllocMap { version: 6, ..next.clone() }, ..good.clone() },
        Decision { map: AllocMap { version: u64::MAX, ..next.clone() }, ..good.clone() },
    ];
    let mut moved = good.clone();
    moved.proof.statement.map = Fake(A).digest(&forged);
    moved.map = AllocMap { members: map.members.clone(), ..forged };
    bad.push(moved);
    let mut other_ballot = good.clone();
    other_ballot.proof.statement.ballot.counter += 1;
    bad.push(other_ballot);
    // Votes of different ballots do not add up: each of them alone decides nothing.
    let mut mixed = good.clone();
    mixed.proof.votes[1] = vote(C, Ballot { counter: 4, node: B }, &next);
    bad.push(mixed);
    // A key of another host.
    let mut stolen = good.clone();
    stolen.proof.votes[0].key = stolen.proof.votes[1].key;
    bad.push(stolen);
    for (number, decision) in bad.into_iter().enumerate() {
        for from in [C, EVIL] {
            let mut a = node(A, &map);
            let before = a.durable().clone();
            let out = a.handle(0, from, AllocMessage::Learn(Box::new(decision.clone())));
            assert!(!out.persist && out.send.is_empty(), "{number}: {out:?}");
            assert_unmoved(&a, &before);
        }
    }
    // From whomever it comes: the proof is enough.
    let mut a = node(A, &map);
    assert_eq!(a.handle(0, EVIL, AllocMessage::Learn(Box::new(good))).events, [Event::Learned]);
    // An older map that was decided once is not taken back.
    let out = a.handle(0, B, learn(&map, &[A, B, C]));
    assert!(!out.persist && *a.map() == next, "{out:?}");
}

#[test]
fn admission_needs_the_votes_of_those_who_are_admitted() {
    // The old members signed, but no majority of the new ones exists.
    let map = v4();
    let mut next = apply(&map, &Change::Admit(D)).unwrap().unwrap();
    for ghost in 100..110 {
        next = AllocMap { version: 4, previous_members: map.members.clone(), ..next };
        next = apply(&next, &Change::Admit(NodeId([ghost; 10]))).unwrap().unwrap();
        next.previous_members.clone_from(&map.members);
    }
    let mut a = node(A, &map);
    assert!(!a.handle(0, B, learn(&next, &[A, B, C])).persist);
}

#[test]
fn host_that_was_away_follows_the_chain_of_members() {
    // The members change one by one from A, B, C to hosts that A has never heard of.
    let mut maps = vec![v4()];
    let mut history = Vec::new();
    let mut latest = decision(&maps[0], &[A, B, C]);
    for (out, new) in [(C, 10), (B, 11), (NodeId([10; 10]), 12)] {
        for change in [Change::Admit(NodeId([new; 10])), Change::Forget(out)] {
            let map = maps.last().unwrap();
            let next = apply(map, &change).unwrap().unwrap();
            // All members of both but A sign.
            let signers: Vec<NodeId> =
                map.members.union(&next.members).copied().filter(|node| *node != A).collect();
            latest = decision(&next, &signers);
            history.push(latest.proof.clone());
            maps.push(next);
        }
    }
    history.pop();
    latest.history = history;
    let without = Decision { history: Vec::new(), ..latest.clone() };
    let mut a = node(A, &maps[0]);
    let out = a.handle(0, B, AllocMessage::Learn(Box::new(without)));
    assert_eq!(out.events, [Event::Unproved { version: 10 }]);
    for forged in 0..latest.history.len() {
        let mut bad = latest.clone();
        bad.history[forged].statement.members.insert(EVIL);
        assert!(!a.handle(0, B, AllocMessage::Learn(Box::new(bad))).persist, "{forged}");
    }
    assert_eq!(a.handle(0, B, AllocMessage::Learn(Box::new(latest.clone()))).events, [Event::Learned]);
    assert_eq!(a.map(), maps.last().unwrap());
    // It can show the way to others.
    assert_eq!(a.durable().history.proofs().len(), 6);
    let ask = a.handle(0, NodeId([12; 10]), AllocMessage::Ask { known: 4 });
    assert_eq!(ask.send, [(NodeId([12; 10]), AllocMessage::Learn(Box::new(latest)))]);
}

#[test]
fn history_is_bounded() {
    let mut map = map_of(&[A], &[]);
    let mut a = node(A, &map);
    for _ in 0..crate::MAX_HISTORY {
        for change in [Change::Admit(B), Change::Forget(B)] {
            map = apply(&map, &change).unwrap().unwrap();
            assert!(a.handle(0, B, learn(&map, &[A, B])).persist);
        }
    }
    assert_eq!(a.durable().history.proofs().len(), crate::MAX_HISTORY);
    let oldest = a.durable().history.proofs()[0].statement.version;
    assert_eq!(oldest, map.version + 1 - crate::MAX_HISTORY as u64);
}

#[test]
fn counter_cannot_jump() {
    let map = v4();
    let mut b = node(B, &map);
    let start = b.durable().clone();
    for counter in [u64::MAX, u64::MAX - 1, MAX_BALLOT_STEP * 2] {
        let ballot = Ballot { counter, node: C };
        let refused = AllocMessage::Nack { ballot, promised: Ballot::default() };
        let out = b.handle(0, C, AllocMessage::Prepare { ballot, known: 4 });
        assert_eq!((out.persist, out.send), (false, vec![(C, refused.clone())]));
        let next = apply(&map, &exact(C, "10.0.0.24/29")).unwrap().unwrap();
        let out = b.handle(0, C, AllocMessage::Accept { ballot, map: next });
        assert_eq!((out.persist, out.send), (false, vec![(C, refused)]));
    }
    assert_eq!(*b.durable(), start);
    // One that is a little ahead, as after a long isolation, is let in after a while.
    let mut patient = node(B, &map);
    let ballot = Ballot { counter: 4 + 3 * MAX_BALLOT_STEP, node: C };
    let prepare = AllocMessage::Prepare { ballot, known: 4 };
    let mut seconds = 0;
    while !patient.handle(1000 * seconds, C, prepare.clone()).persist {
        seconds += 1;
    }
    assert!((2..5).contains(&seconds), "{seconds}");
    // A refusal cannot make the proposer use up its numbers either.
    let mut a = node(A, &map);
    let ballot = prepared(&mut a, &[B, C]);
    let promised = Ballot { counter: u64::MAX, node: C };
    let _ = a.handle(1, C, AllocMessage::Nack { ballot, promised });
    let _ = a.handle(1, B, AllocMessage::Nack { ballot, promised });
    let out = a.tick(1000, &BTreeSet::from([B, C]));
    let Some((_, AllocMessage::Prepare { ballot: second, .. })) = out.send.first() else { panic!("{out:?}") };
    assert!(second.counter > ballot.counter && second.counter <= ballot.counter + MAX_BALLOT_STEP);
    assert!(matches!(
        b.handle(1000, A, AllocMessage::Prepare { ballot: *second, known: 4 }).send.as_slice(),
        [(A, AllocMessage::Promise { .. })]
    ));
}

#[test]
fn refusal_of_one_member_does_not_end_a_ballot() {
    let mut a = node(A, &v4());
    let ballot = prepared(&mut a, &[B, C]);
    let _ = a.handle(1, C, AllocMessage::Nack { ballot, promised: Ballot { counter: 7, node: C } });
    let out = a.handle(2, B, AllocMessage::Promise { ballot, accepted: None, learned: None });
    let Some((_, AllocMessage::AcceptStep { step, .. })) = out.send.first() else { panic!("{out:?}") };
    let map = a.map().next(step).unwrap();
    let _ = a.handle(3, C, AllocMessage::Nack { ballot, promised: Ballot { counter: 7, node: C } });
    let accepted = AllocMessage::Accepted { ballot, vote: vote(B, ballot, &map) };
    assert!(matches!(done(&a.handle(4, B, accepted)), Some(Ok(5))));
}

#[test]
fn endless_ballots_of_one_member_do_not_stop_the_others() {
    let mut b = node(B, &v4());
    let prepare = |counter, node| AllocMessage::Prepare { ballot: Ballot { counter, node }, known: 4 };
    let promised = |out: &Output| matches!(out.send.as_slice(), [(_, AllocMessage::Promise { .. })]);
    let taken = (1..100).filter(|counter| promised(&b.handle(0, C, prepare(*counter, C)))).count();
    assert_eq!(taken, 16);
    assert!(promised(&b.handle(0, A, prepare(200, A))));
    assert!(!promised(&b.handle(999, C, prepare(300, C))));
    assert!(promised(&b.handle(1000, C, prepare(300, C))));
}

#[test]
fn forged_votes_are_not_counted() {
    let mut a = node(A, &v4());
    let ballot = prepared(&mut a, &[B, C]);
    let out = a.handle(0, B, AllocMessage::Promise { ballot, accepted: None, learned: None });
    let Some((_, AllocMessage::AcceptStep { step, .. })) = out.send.first() else { panic!("{out:?}") };
    let map = a.map().next(step).unwrap();
    let old = Ballot { counter: ballot.counter - 1, ..ballot };
    for (from, vote) in [
        (B, vote(C, ballot, &map)),
        (B, vote(B, old, &map)),
        (B, vote(B, ballot, &v4())),
        (EVIL, vote(EVIL, ballot, &map)),
    ] {
        let out = a.handle(0, from, AllocMessage::Accepted { ballot, vote });
        assert_eq!(out, Output::default(), "{from}");
    }
    let out = a.handle(0, B, AllocMessage::Accepted { ballot, vote: vote(B, ballot, &map) });
    assert_eq!(done(&out), Some(Ok(5)));
}

#[test]
fn acceptor_signs_one_map_of_a_ballot() {
    let mut b = node(B, &v4());
    let ballot = Ballot { counter: 1, node: C };
    let one = apply(&v4(), &exact(C, "10.0.0.24/29")).unwrap().unwrap();
    let other = apply(&v4(), &exact(C, "10.0.0.32/29")).unwrap().unwrap();
    let accept = |map: &AllocMap| AllocMessage::Accept { ballot, map: map.clone() };
    assert_eq!(b.handle(0, C, accept(&one)).send.len(), 1);
    assert_eq!(b.handle(0, C, accept(&other)), Output::default());
    assert_eq!(b.handle(0, C, accept(&one)).send.len(), 1, "a repetition is answered");
}

#[test]
fn acceptor_does_not_help_to_take_a_block() {
    let mut b = node(B, &v4());
    let ballot = Ballot { counter: 1, node: C };
    let before = b.durable().clone();
    let mut taken = apply(&v4(), &exact(C, "10.0.0.24/29")).unwrap().unwrap();
    taken.blocks.insert(block("10.0.0.0/29"), C);
    for map in [taken.clone(), captured(&v4(), C, 5), captured(&v4(), EVIL, 5)] {
        let out = b.handle(0, C, AllocMessage::Accept { ballot, map });
        assert!(!out.persist && matches!(out.send.as_slice(), [(C, AllocMessage::Learn(_))]), "{out:?}");
    }
    assert_unmoved(&b, &before);
    // Nor does a proposer complete it, if an acceptor claims to have accepted it.
    let mut a = node(A, &v4());
    let own = prepared(&mut a, &[B, C]);
    let accepted = Some((Ballot { counter: 0, node: C }, taken));
    let out = a.handle(0, C, AllocMessage::Promise { ballot: own, accepted, learned: None });
    let proposes = |message: &AllocMessage| {
        matches!(message, AllocMessage::Accept { .. } | AllocMessage::AcceptStep { .. })
    };
    assert!(!out.send.iter().any(|(_, message)| proposes(message)), "{out:?}");
}

#[test]
fn hosts_that_are_no_members_do_not_take_part() {
    let mut a = node(A, &v4());
    let ballot = Ballot { counter: 1, node: EVIL };
    let next = apply(&v4(), &Change::Admit(EVIL)).unwrap().unwrap();
    let before = a.durable().clone();
    for message in [
        AllocMessage::Prepare { ballot, known: 4 },
        AllocMessage::Accept { ballot, map: next },
        AllocMessage::Nack { ballot, promised: ballot },
        AllocMessage::Reply { id: 1, result: Ok(9) },
        AllocMessage::Request { id: 1, change: Change::Admit(D) },
        AllocMessage::Request { id: 1, change: claim(A, "10.0.0.0/24", 29, 1) },
        AllocMessage::Request { id: 1, change: Change::Ban(A) },
    ] {
        assert_eq!(a.handle(0, EVIL, message), Output::default());
        assert_eq!(*a.durable(), before);
    }
    // Asking for admission is what such a host may do, unless it is banned.
    let out = a.handle(0, EVIL, AllocMessage::Request { id: 1, change: Change::Admit(EVIL) });
    assert!(matches!(out.send.as_slice(), [(_, AllocMessage::Prepare { .. }), ..]), "{out:?}");
    let mut alone = map_of(&[A], &[]);
    (alone.forgotten, alone.banned) = (BTreeSet::from([D]), BTreeSet::from([D]));
    let mut a = node(A, &alone);
    let out = a.handle(0, D, AllocMessage::Request { id: 1, change: Change::Admit(D) });
    assert_eq!(out.send, [(D, AllocMessage::Reply { id: 1, result: Err(Refusal::Banned(D)) })]);
    // Nor does it come back with the last map that named it.
    let was_member = map_of(&[A, D], &[]);
    assert!(!a.handle(0, D, learn(&was_member, &[A, D])).persist);
    assert_eq!(*a.map(), alone);
}

#[test]
fn coordinator_that_lies_about_a_request_is_not_believed() {
    let alive = BTreeSet::from([A, C]);
    for result in [Ok(4), Ok(0), Err(Refusal::LastMember(A)), Err(Refusal::Banned(B))] {
        let mut b = node(B, &v4());
        let (id, out) = b.request(0, exact(B, "10.0.0.16/29"), &alive);
        assert!(matches!(out.send.as_slice(), [(A, AllocMessage::Request { .. })]), "{out:?}");
        let out = b.handle(1, A, AllocMessage::Reply { id, result });
        assert_eq!(done(&out), None);
        assert!(matches!(out.send.first(), Some((_, AllocMessage::Prepare { .. }))), "{out:?}");
    }
    // What holds here too is believed.
    let mut b = node(B, &v4());
    let (id, _) = b.request(0, exact(B, "10.0.0.0/29"), &alive);
    let refusal = Refusal::Held { prefix: net("10.0.0.0/29"), holder: A };
    let out = b.handle(1, A, AllocMessage::Reply { id, result: Err(refusal.clone()) });
    assert_eq!(done(&out), Some(Err(refusal)));
}

#[test]
fn host_without_a_map_believes_the_majority_of_those_that_it_asked() {
    let map = v4();
    let mut forged = captured(&map, EVIL, 9);
    (forged.cluster, forged.previous_members) = (10, BTreeSet::from([EVIL]));
    let mut d = fresh(D);
    // No peer was asked.
    assert_eq!(d.handle(0, EVIL, learn(&forged, &[EVIL])), Output::default());
    assert_eq!(d.tick(500, &BTreeSet::new()), Output::default());
    for peer in [EVIL, A, B] {
        let _ = d.ask(peer);
    }
    let _ = d.handle(1000, EVIL, learn(&forged, &[EVIL]));
    // A map that its own members did not sign is no answer.
    let _ = d.handle(1000, A, learn(&map, &[A]));
    let _ = d.handle(1010, A, learn(&map, &[A, B]));
    let _ = d.handle(1020, B, learn(&map, &[A, C]));
    assert_eq!(d.tick(1100, &BTreeSet::new()).events, [Event::Learned]);
    assert_eq!(*d.map(), map);
    // From then on an outsider cannot turn it.
    let out = d.handle(1200, EVIL, learn(&forged, &[EVIL]));
    assert_eq!(out.events, [Event::ForeignCluster { from: EVIL, cluster: 10 }]);
    let out = d.handle(1200, EVIL, learn(&captured(&map, EVIL, 50), &[EVIL]));
    assert_eq!(out, Output::default());
}

#[test]
fn hosts_whose_member_voted_twice_agree_again() {
    // C voted for both maps: with A in one ballot, with B in a later one.
    let one = apply(&v4(), &exact(A, "10.0.0.24/29")).unwrap().unwrap();
    let other = apply(&v4(), &exact(B, "10.0.0.24/29")).unwrap().unwrap();
    let mut later = decision(&other, &[B, C]);
    let ballot = Ballot { counter: 8, node: B };
    later.proof.statement.ballot = ballot;
    later.proof.votes = vec![vote(B, ballot, &other), vote(C, ballot, &other)];
    let (mut a, mut b) = (node(A, &v4()), node(B, &v4()));
    assert!(a.handle(0, C, learn(&one, &[A, C])).persist);
    assert!(b.handle(0, C, AllocMessage::Learn(Box::new(later.clone()))).persist);
    let out = b.handle(0, A, learn(&one, &[A, C]));
    assert_eq!(out.send, [(A, AllocMessage::Learn(Box::new(later.clone())))]);
    let out = a.handle(0, B, AllocMessage::Learn(Box::new(later)));
    assert_eq!(out.events, [Event::Fork { version: 5 }, Event::Learned]);
    assert_eq!(a.map(), b.map());
}
