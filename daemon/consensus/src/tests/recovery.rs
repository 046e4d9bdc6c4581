//! Recoveries from the loss of a majority.

use ovl_proto::alloc::{Consent, Dissent, Recovery, RecoveryProof};

use super::*;
use crate::{LOST_MS, RecoveryEnd};

const D: NodeId = NodeId([4; 10]);
const E: NodeId = NodeId([5; 10]);
/// The number of the recovered cluster.
const NEW: u64 = 99;
/// After the time for which a majority must be lost.
const LATER: u64 = LOST_MS + 100;

/// Creates hosts that know a map of five members, and since time 0 see these others.
fn hosts<const N: usize>(ids: [NodeId; N], seen: &[NodeId]) -> BTreeMap<NodeId, Replica> {
    let map = map_of(&[A, B, C, D, E], &[("10.1.0.0/24", A), ("10.1.1.0/24", B), ("10.1.2.0/24", C)]);
    let host = |id| {
        let mut host = node(id, &map);
        see(&mut host, 0, seen);
        (id, host)
    };
    ids.into_iter().map(host).collect()
}

fn see(host: &mut Replica, now: u64, others: &[NodeId]) {
    host.note_present(now, others.iter().copied().collect());
}

/// Delivers all messages between these hosts. Returns the events with their hosts.
fn settle(
    hosts: &mut BTreeMap<NodeId, Replica>,
    now: u64,
    from: NodeId,
    out: Output,
) -> Vec<(NodeId, Event)> {
    let mut events: Vec<_> = out.events.into_iter().map(|event| (from, event)).collect();
    let mut queue: Vec<_> = out.send.into_iter().map(|(to, message)| (from, to, message)).collect();
    while let Some((from, to, message)) = queue.pop() {
        let Some(host) = hosts.get_mut(&to) else { continue };
        let out = host.handle(now, from, message);
        events.extend(out.events.into_iter().map(|event| (to, event)));
        queue.extend(out.send.into_iter().map(|(next, message)| (to, next, message)));
    }
    events
}

/// Requests a recovery on A, and returns how it ended.
fn recover(hosts: &mut BTreeMap<NodeId, Replica>, now: u64) -> RecoveryEnd {
    let out = hosts.get_mut(&A).unwrap().recover(now, NEW, 7).unwrap();
    let events = settle(hosts, now, A, out);
    let end = |(host, event): &(NodeId, Event)| match event {
        Event::RecoveryEnded(end) if *host == A => Some(end.clone()),
        _ => None,
    };
    events.iter().find_map(end).unwrap()
}

/// The host asks another one whether its cluster was recovered.
fn hear_of(hosts: &mut BTreeMap<NodeId, Replica>, now: u64, host: NodeId, from: NodeId) {
    let out = hosts[&host].ask_recovery(from);
    settle(hosts, now, host, out);
}

fn set(ids: &[NodeId]) -> BTreeSet<NodeId> {
    ids.iter().copied().collect()
}

#[test]
fn one_survivor_goes_on_alone_and_the_lost_are_banned() {
    let mut hosts = hosts([A], &[]);
    let a = hosts.get_mut(&A).unwrap();
    let lately = Dissent::Majority { present: BTreeSet::new() };
    assert_eq!(a.recover(LOST_MS - 1, NEW, 7), Err(lately));
    assert_eq!(recover(&mut hosts, LATER), RecoveryEnd::Done);
    let a = hosts.get_mut(&A).unwrap();
    let map = a.map().clone();
    assert_eq!((map.cluster, map.version, map.origin()), (NEW, 5, 9));
    assert_eq!((map.members.clone(), map.banned.clone()), (set(&[A]), set(&[B, C, D, E])));
    assert_eq!(map.blocks, BTreeMap::from([(block("10.1.0.0/24"), A)]));
    // It decides alone, also after a restart.
    let mut a = Replica::new(A, Rc::new(Fake(A)), a.durable().clone(), 2);
    let (_, out) = a.request(LATER, exact(A, "10.1.1.0/24"), &BTreeSet::new());
    assert_eq!(done(&out), Some(Ok(6)));
    assert_eq!(a.map().origin(), 9);
}

#[test]
fn two_survivors_of_five_agree_and_one_that_does_not_answer_is_waited_for() {
    let mut both = hosts([A, B], &[A, B]);
    assert_eq!(recover(&mut both, LATER), RecoveryEnd::Done);
    for host in both.values() {
        assert_eq!((host.map().cluster, host.map().members.clone()), (NEW, set(&[A, B])));
    }
    // One alone decides nothing in the new cluster.
    let a = both.get_mut(&A).unwrap();
    let (_, out) = a.request(LATER, exact(A, "10.1.3.0/24"), &BTreeSet::new());
    assert_eq!(done(&out), None);

    let mut alone = hosts([A], &[B]);
    let a = alone.get_mut(&A).unwrap();
    let _ = a.recover(LATER, NEW, 7).unwrap();
    let out = a.tick(LATER + 10_000, &BTreeSet::new());
    assert_eq!(out.events, [Event::RecoveryEnded(RecoveryEnd::Silent(set(&[B])))]);
    assert_eq!(a.map().cluster, 9);
}

#[test]
fn survivor_that_sees_more_does_not_consent() {
    for (seen, why) in
        [(&[A, C, D][..], Dissent::Majority { present: set(&[A, C, D]) }), (&[C], Dissent::Sees(C))]
    {
        let mut hosts = hosts([A, B], &[A, B]);
        see(hosts.get_mut(&B).unwrap(), LATER, seen);
        assert_eq!(recover(&mut hosts, LATER), RecoveryEnd::Refused { by: B, why });
        assert!(hosts.values().all(|host| host.map().cluster == 9));
    }
    // Nor does one that saw a majority lately.
    let mut hosts = hosts([A, B], &[A, B]);
    let b = hosts.get_mut(&B).unwrap();
    see(b, LATER - 10, &[A, C, D]);
    see(b, LATER - 5, &[A]);
    let why = Dissent::Majority { present: set(&[A]) };
    assert_eq!(recover(&mut hosts, LATER), RecoveryEnd::Refused { by: B, why });
}

#[test]
fn majority_that_comes_back_meanwhile_ends_the_recovery() {
    let mut hosts = hosts([A, B], &[A, B]);
    let a = hosts.get_mut(&A).unwrap();
    let out = a.recover(LATER, NEW, 7).unwrap();
    see(a, LATER + 1, &[B, C, D]);
    let events = settle(&mut hosts, LATER + 2, A, out);
    assert!(events.iter().all(|(_, event)| *event != Event::RecoveryEnded(RecoveryEnd::Done)), "{events:?}");
    assert!(hosts.values().all(|host| host.map().cluster == 9));
}

#[test]
fn survivors_with_maps_of_two_versions_recover_from_the_later_one() {
    let mut hosts = hosts([A, B], &[A, B]);
    let later = AllocMap { version: 5, ..hosts[&A].map().clone() };
    let _ = hosts.get_mut(&B).unwrap().handle(1, C, learn(&later, &[A, B, C]));
    assert_eq!(recover(&mut hosts, LATER), RecoveryEnd::Changed);
    assert_eq!(hosts[&A].map().version, 5);
    assert_eq!(recover(&mut hosts, LATER), RecoveryEnd::Done);
    assert!(hosts.values().all(|host| (host.map().cluster, host.map().version) == (NEW, 6)));
}

#[test]
fn hosts_that_come_back_take_no_part_one_by_one_and_together() {
    let mut all = hosts([A, C, D, E], &[]);
    assert_eq!(recover(&mut all, LATER), RecoveryEnd::Done);
    for host in [C, D, E] {
        see(all.get_mut(&host).unwrap(), LATER, &[C, D, E]);
    }
    hear_of(&mut all, LATER + 1, C, A);
    assert_eq!(all[&C].held().unwrap().recovery.cluster, NEW);
    // A request of D meets C, which tells it, and so on: no majority of the old cluster is left.
    let alive = set(&[C, D, E]);
    for host in [D, E] {
        let (_, out) = all.get_mut(&host).unwrap().request(LATER + 2, exact(host, "10.1.9.0/24"), &alive);
        settle(&mut all, LATER + 2, host, out);
        let out = all.get_mut(&host).unwrap().tick(LATER + 200, &alive);
        settle(&mut all, LATER + 200, host, out);
    }
    let out = all.get_mut(&C).unwrap().tick(LATER + 3000, &alive);
    settle(&mut all, LATER + 3000, C, out);
    for id in [C, D, E] {
        assert_eq!((all[&id].map().cluster, all[&id].map().version), (9, 4));
        // Also after a restart, and although they see each other for long.
        let mut host = Replica::new(id, Rc::new(Fake(id)), all[&id].durable().clone(), 2);
        see(&mut host, LATER, &[C, D, E]);
        let (_, out) = host.request(3 * LATER, exact(id, "10.1.9.0/24"), &alive);
        assert_eq!(done(&out), Some(Err(Refusal::Recovered { by: A })));
        let ballot = Ballot { counter: 1000, node: E };
        let promised = host.durable().promised;
        let out = host.handle(3 * LATER, E, AllocMessage::Prepare { ballot, known: 4 });
        assert!(id == E || matches!(out.send[..], [(E, AllocMessage::Recovered(_)), ..]), "{out:?}");
        assert_eq!(host.durable().promised, promised);
    }
}

#[test]
fn majority_that_lives_goes_on_and_takes_those_along_that_restart() {
    let mut all = hosts([A, C, D, E], &[C, D, E]);
    see(all.get_mut(&A).unwrap(), 0, &[]);
    assert_eq!(recover(&mut all, LATER), RecoveryEnd::Done);
    for host in [C, D] {
        hear_of(&mut all, LATER, host, A);
        assert!(all[&host].held().is_none() && all[&host].has_refused(NEW));
    }
    // E has just started, so it has not seen the others for long.
    let mut e = node(E, all[&E].map());
    see(&mut e, LATER, &[C, D]);
    all.insert(E, e);
    hear_of(&mut all, LATER, E, A);
    assert!(all[&E].held().is_some());
    let out = all.get_mut(&E).unwrap().tick(LATER + 2000, &set(&[C, D]));
    settle(&mut all, LATER + 2000, E, out);
    assert!(all[&E].held().is_none() && all[&E].has_refused(NEW));
    let (_, out) = all.get_mut(&C).unwrap().request(LATER, exact(C, "10.1.9.0/24"), &set(&[D, E]));
    let events = settle(&mut all, LATER, C, out);
    assert!(events.iter().any(|(_, event)| matches!(event, Event::Done { result: Ok(5), .. })), "{events:?}");
    // The host that was recovered alone learns nothing of it, and cannot be talked into it.
    assert_eq!((all[&A].map().cluster, all[&A].map().version), (NEW, 5));
}

#[test]
fn host_that_was_left_out_returns_when_both_sides_say_so() {
    let mut all = hosts([A, C], &[]);
    assert_eq!(recover(&mut all, LATER), RecoveryEnd::Done);
    let (_, out) = all.get_mut(&A).unwrap().request(LATER, exact(A, "10.1.2.0/24"), &BTreeSet::new());
    settle(&mut all, LATER, A, out);
    assert_eq!(all.get_mut(&C).unwrap().accept_recovery(), None, "it knows of none");
    hear_of(&mut all, LATER, C, A);
    let out = all.get_mut(&C).unwrap().accept_recovery().unwrap();
    assert!(out.persist);
    settle(&mut all, LATER, C, out);
    assert_eq!(all[&C].map(), all[&A].map());
    let admit = |all: &mut BTreeMap<NodeId, Replica>| {
        let (_, out) = all.get_mut(&C).unwrap().request(LATER, Change::Admit(C), &set(&[A]));
        let events = settle(all, LATER, C, out);
        events.into_iter().find_map(|(_, event)| match event {
            Event::Done { result, .. } => Some(result),
            _ => None,
        })
    };
    assert_eq!(admit(&mut all), Some(Err(Refusal::Banned(C))));
    let (_, out) = all.get_mut(&A).unwrap().request(LATER, Change::Unban(C), &set(&[C]));
    settle(&mut all, LATER, A, out);
    assert!(matches!(admit(&mut all), Some(Ok(_))));
    assert_eq!(all[&C].map().members, set(&[A, C]));
    assert_eq!(all[&C].map().blocks[&block("10.1.2.0/24")], A);
}

#[test]
fn operator_can_reject_a_recovery() {
    let mut all = hosts([A, C, D, E], &[]);
    assert_eq!(recover(&mut all, LATER), RecoveryEnd::Done);
    for host in [C, D, E] {
        hear_of(&mut all, LATER, host, A);
        let host = all.get_mut(&host).unwrap();
        assert!(host.held().is_some() && host.reject_recovery().unwrap().persist);
        assert_eq!(host.reject_recovery(), None);
    }
    let (_, out) = all.get_mut(&C).unwrap().request(LATER, exact(C, "10.1.9.0/24"), &set(&[D, E]));
    let events = settle(&mut all, LATER, C, out);
    assert!(events.iter().any(|(_, event)| matches!(event, Event::Done { result: Ok(5), .. })), "{events:?}");
}

#[test]
fn survivor_that_missed_the_end_follows_once_no_majority_is_left_for_long() {
    let mut all = hosts([A, B], &[A, B]);
    let out = all.get_mut(&A).unwrap().recover(LATER, NEW, 7).unwrap();
    // B consents, and A makes the recovery; B does not hear of it, and restarts.
    let (_, ask) = out.send.into_iter().find(|(to, _)| *to == B).unwrap();
    let consent = all.get_mut(&B).unwrap().handle(LATER, A, ask);
    for (to, message) in consent.send {
        assert_eq!(to, A);
        let _ = all.get_mut(&A).unwrap().handle(LATER, B, message);
    }
    assert_eq!(all[&A].map().cluster, NEW);
    let mut b = Replica::new(B, Rc::new(Fake(B)), all[&B].durable().clone(), 2);
    see(&mut b, LATER, &[]);
    all.insert(B, b);
    hear_of(&mut all, LATER + 1, B, A);
    assert_eq!(all[&B].map().cluster, 9);
    assert!(all[&B].held().is_some());
    assert!(all[&B].wants_recovery());
    hear_of(&mut all, 2 * LATER, B, A);
    assert_eq!((all[&B].map(), all[&B].held()), (all[&A].map(), None));
}

#[test]
fn recoveries_that_a_known_member_did_not_sign_are_not_believed() {
    let outsider = NodeId([9; 10]);
    let mut all = hosts([A, C], &[]);
    assert_eq!(recover(&mut all, LATER), RecoveryEnd::Done);
    let good = all[&A].recoveries()[0].clone();
    let signed = |recovery: Recovery, by: &[NodeId]| RecoveryProof {
        votes: by.iter().map(|by| Fake(*by).sign_recovery(&recovery)).collect(),
        recovery,
    };
    let with = |survivors: &[NodeId]| Recovery { survivors: set(survivors), ..good.recovery.clone() };
    let c = all.get_mut(&C).unwrap();
    for forged in [
        signed(with(&[outsider]), &[outsider]),
        signed(with(&[A, outsider]), &[outsider]),
        signed(with(&[A, B]), &[A]),
        signed(with(&[]), &[A]),
        signed(Recovery { from: 8, ..good.recovery.clone() }, &[A]),
        signed(Recovery { cluster: 9, ..good.recovery.clone() }, &[A]),
        RecoveryProof { recovery: Recovery { at_ms: 8, ..good.recovery.clone() }, ..good.clone() },
    ] {
        for from in [A, B, outsider] {
            let out = c.handle(LATER, from, AllocMessage::Recovered(Box::new(forged.clone())));
            assert_eq!((c.held(), out.persist), (None, false), "{forged:?}");
        }
    }
    // An outsider cannot tell of it, and cannot continue the chain.
    let _ = c.handle(LATER, outsider, AllocMessage::Recovered(Box::new(good.clone())));
    assert_eq!(c.held(), None);
    let next = Recovery { from: NEW, cluster: 100, survivors: set(&[outsider]), ..good.recovery.clone() };
    let map = AllocMap { cluster: 100, version: 6, members: set(&[outsider]), ..AllocMap::default() };
    let map = AllocMap { previous_members: map.members.clone(), ..map };
    let decision =
        Decision { recoveries: vec![good.clone(), signed(next, &[outsider])], ..decision(&map, &[outsider]) };
    let _ = c.handle(LATER, A, AllocMessage::Learn(Box::new(decision)));
    assert_eq!(c.held(), None);
    let _ = c.handle(LATER, B, AllocMessage::Recovered(Box::new(good)));
    assert!(c.held().is_some());
}

#[test]
fn consents_for_another_recovery_or_of_others_do_not_count() {
    let mut a = hosts([A], &[B]).remove(&A).unwrap();
    let out = a.recover(LATER, NEW, 7).unwrap();
    let Some((_, AllocMessage::Recover(recovery))) = out.send.first().cloned() else { panic!("{out:?}") };
    let map = crate::first_map(a.map(), &recovery);
    let consent = |by: NodeId, recovery: &Recovery, map: &AllocMap| Consent {
        recovery: Fake(by).sign_recovery(recovery),
        map: vote(by, recovery.ballot, map),
    };
    let other = Recovery { at_ms: 8, ..*recovery.clone() };
    let other_map = AllocMap { version: 7, ..map.clone() };
    for (cluster, result) in [
        (NEW + 1, consent(B, &recovery, &map)),
        (NEW, consent(C, &recovery, &map)),
        (NEW, consent(B, &other, &map)),
        (NEW, consent(B, &recovery, &other_map)),
    ] {
        let _ = a.handle(LATER, B, AllocMessage::Consent { cluster, result: Ok(result) });
        assert_eq!(a.map().cluster, 9);
    }
    let result = Ok(consent(B, &recovery, &map));
    let _ = a.handle(LATER, B, AllocMessage::Consent { cluster: NEW, result });
    assert_eq!(a.map().cluster, NEW);
}

#[test]
fn two_recoveries_in_a_row_lead_from_the_first_cluster_to_the_last() {
    let mut all = hosts([A, B, C], &[A, B]);
    assert_eq!(recover(&mut all, LATER), RecoveryEnd::Done);
    // B is lost too.
    let a = all.get_mut(&A).unwrap();
    see(a, LATER, &[]);
    let _ = a.recover(2 * LATER, NEW + 1, 8).unwrap();
    assert_eq!((a.map().cluster, a.map().origin()), (NEW + 1, 9));
    let new = NodeId([8; 10]);
    all.insert(new, fresh(new));
    let out = all.get_mut(&new).unwrap().ask(A);
    settle(&mut all, 2 * LATER, new, out);
    let _ = all.get_mut(&new).unwrap().tick(2 * LATER + 1000, &set(&[A]));
    // A host that joined later tells of both, too.
    assert_eq!(all[&new].recoveries().len(), 2);
    let old = all[&C].map().clone();
    for from in [new, A] {
        let mut c = node(C, &old);
        see(&mut c, 2 * LATER, &[]);
        all.insert(C, c);
        hear_of(&mut all, 2 * LATER, C, from);
        let c = all.get_mut(&C).unwrap();
        assert_eq!(c.held().unwrap().recovery.cluster, NEW);
        let _ = c.accept_recovery().unwrap();
        assert_eq!(all[&C].map(), all[&A].map());
    }
}

#[test]
fn proofs_of_recoveries_survive_the_disk() {
    let mut all = hosts([A, C], &[]);
    assert_eq!(recover(&mut all, LATER), RecoveryEnd::Done);
    hear_of(&mut all, LATER, C, A);
    for host in all.values() {
        let stored = wire::encode_body(host.durable()).unwrap();
        assert_eq!(wire::decode_body::<Durable>(&stored).unwrap(), *host.durable());
    }
}

#[test]
fn of_two_recoveries_at_once_one_is_made() {
    let mut all = hosts([A, B], &[A, B]);
    let of_a = all.get_mut(&A).unwrap().recover(LATER, NEW, 7).unwrap();
    let of_b = all.get_mut(&B).unwrap().recover(LATER, NEW + 1, 7).unwrap();
    // Each is asked while its own is under way.
    let mut events = Vec::new();
    for (from, to, out) in [(B, A, of_b), (A, B, of_a)] {
        for (_, message) in out.send {
            let answer = all.get_mut(&to).unwrap().handle(LATER, from, message);
            events.extend(settle(&mut all, LATER, to, answer));
        }
    }
    let ended = |host, end| events.contains(&(host, Event::RecoveryEnded(end)));
    assert!(ended(A, RecoveryEnd::Done) && !ended(B, RecoveryEnd::Done), "{events:?}");
    assert!(all.values().all(|host| host.map().cluster == NEW));
}
