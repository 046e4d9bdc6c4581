use super::*;

#[test]
fn host_that_is_late_itself_waits_longer_for_others() {
    let mut book = PeerBook::new(1500, Instant::now());
    let (now, peer) = (Instant::now(), NodeId([1; 10]));
    book.entry(peer, SocketAddr::from(([192, 0, 2, 1], 7940)), now);
    book.proved(peer, now);
    let silent = now + ALIVE_FOR;
    book.note_lateness(PUNCTUAL);
    assert!(!book.is_alive(peer, silent));
    book.note_lateness(Duration::from_millis(600));
    assert!(
        book.is_alive(peer, now + Duration::from_millis(6499))
            && !book.is_alive(peer, now + Duration::from_millis(6500))
    );
    book.note_lateness(Duration::from_secs(60));
    assert!(!book.is_alive(peer, now + MAX_ALIVE_FOR), "bounded");
    // Ten seconds of ticks later it is punctual again.
    (0..50).for_each(|_| book.note_lateness(Duration::ZERO));
    assert!(!book.is_alive(peer, silent + Duration::from_millis(500)));
}

#[test]
fn ping_that_is_due_soon_is_sent_with_an_answer_and_no_other_one() {
    let start = Instant::now();
    let mut book = PeerBook::new(1500, start);
    let (peer, addr) = (NodeId([1; 10]), SocketAddr::from(([192, 0, 2, 1], 7940)));
    assert_eq!(book.ping_along(peer, start), None, "unknown");
    book.list(peer, (addr, None), 1500, (true, true), start);
    let is_due =
        |book: &mut PeerBook, now: Instant| book.due(now).iter().any(|due| matches!(due, Due::Ping { .. }));
    assert!(is_due(&mut book, start));
    assert_eq!(book.ping_along(peer, start), None, "one is pending");
    book.answered(peer, start, start);
    assert_eq!(book.ping_along(peer, start + PING_EVERY / 3), None, "early");
    let sent = start + PING_EVERY * 2 / 3;
    let nonce = book.ping_along(peer, sent).unwrap();
    assert_eq!(book.take_ping(peer, nonce), Some(sent));
    book.answered(peer, sent, sent);
    assert!(!is_due(&mut book, start + PING_EVERY), "in place of this one");
    assert!(!is_due(&mut book, sent + PING_EVERY - Duration::from_millis(1)));
    assert!(is_due(&mut book, sent + PING_EVERY));
    // It is repeated if it is lost.
    let again = sent + PING_EVERY + Duration::from_millis(1);
    book.answered(peer, sent + PING_EVERY, again);
    assert!(book.ping_along(peer, again + PING_EVERY).is_some());
    assert!(is_due(&mut book, again + PING_EVERY + HURRY));
}

#[test]
fn new_peer_gets_the_record_of_this_host_twice_and_one_that_answered_does_not() {
    let start = Instant::now();
    let mut book = PeerBook::new(1500, start);
    let addr = |number| SocketAddr::from(([192, 0, 2, number], 7940));
    for number in 1..=2 {
        book.list(NodeId([number; 10]), (addr(number), None), 1500, (false, true), start);
    }
    book.proved(NodeId([2; 10]), start);
    let mut introduced = Vec::new();
    for tick in 0..10 {
        for due in book.due(start + Duration::from_millis(200) * tick) {
            if let Due::Ping { to, introduce: true, .. } = due {
                introduced.push(to);
            }
        }
    }
    assert_eq!(introduced, [addr(1), addr(1)]);
}

#[test]
fn many_silent_peers_cost_a_bounded_number_of_datagrams() {
    let start = Instant::now();
    let mut book = PeerBook::new(1500, start);
    let helper = NodeId([60; 10]);
    for number in 1..=60 {
        let addr = SocketAddr::from(([192, 0, 2, number], 7940));
        book.list(NodeId([number; 10]), (addr, None), 1500, (true, true), start);
    }
    let (mut pings, mut relayed) = (0, 0);
    for tick in 0..50 {
        let now = start + Duration::from_millis(200) * tick;
        // Others are asked only if one answers itself.
        assert!(relayed == 0 || tick > 10);
        if tick >= 10 {
            book.answered(helper, now, now);
        }
        for due in book.due(now) {
            match due {
                Due::PingFor { node, .. } if node == helper => panic!("it answers"),
                Due::Ping { .. } => pings += 1,
                Due::PingFor { .. } => relayed += 1,
                Due::Probe { node, .. } => assert_eq!(node, helper, "a probe of a silent peer"),
            }
        }
    }
    // In ten seconds: each peer every 1.5 s, and what the limits allow, which can be saved up for one second.
    assert!((360..=420 + 11 * EARLY_PINGS).contains(&pings), "{pings}");
    assert!((1..=11 * RELAYED_PINGS).contains(&relayed), "{relayed}");
}

#[test]
fn request_to_ping_a_peer_follows_the_hops_and_where_hosts_are_cut_off_asks_on() {
    let start = Instant::now();
    let mut book = PeerBook::new(1500, start);
    let id = |number| NodeId([number; 10]);
    let addr = |number| SocketAddr::from(([192, 0, 2, number], 7940));
    for number in 1..=5 {
        book.list(id(number), (addr(number), None), 1500, (true, true), start);
    }
    [1, 2, 3].iter().for_each(|number| book.answered(id(*number), start, start));
    let to = |book: &mut PeerBook, node, asker| -> Vec<u8> {
        book.towards(id(node), id(asker), start).iter().map(|(hop, _)| hop.0[0]).collect()
    };
    assert_eq!(to(&mut book, 2, 1), [2], "it answers");
    assert_eq!(to(&mut book, 5, 1), [5], "silent, but all others are reached: it may be new");
    book.set_hops([(id(4), id(3)), (id(2), id(3))].into());
    assert_eq!(to(&mut book, 2, 1), [2], "it answers again");
    assert_eq!(to(&mut book, 4, 1), [3], "on the way");
    assert_eq!(to(&mut book, 4, 3), [1, 2], "not back");
    assert_eq!(to(&mut book, 5, 1), [2, 3], "these may know more");
    assert_eq!(to(&mut book, 9, 1), [2, 3]);
}

#[test]
fn dead_peer_is_searched_for_through_others_only_while_some_are_reached_through_others() {
    let start = Instant::now();
    let mut book = PeerBook::new(1500, start);
    let id = |number| NodeId([number; 10]);
    let addr = |number| SocketAddr::from(([192, 0, 2, number], 7940));
    book.list(id(1), (addr(1), None), 1500, (true, true), start);
    book.list(id(5), (addr(5), None), 1500, (false, true), start);
    book.set_known(&[(id(1), addr(1)), (id(5), addr(5))], start);
    let searches = |book: &mut PeerBook, from: u64, to: u64| {
        let mut found = Vec::new();
        for ms in (from..to).step_by(100) {
            let now = start + Duration::from_millis(ms);
            book.answered(id(1), now, now);
            let due = book.due(now).into_iter();
            found.extend(
                due.filter(|due| matches!(due, Due::PingFor { node, .. } if *node == id(5))).map(|_| ms),
            );
        }
        found
    };
    searches(&mut book, 0, 4000);
    assert!(searches(&mut book, 4000, 10_000).is_empty(), "it is dialled");
    book.set_hops([(id(4), id(1))].into());
    let found = searches(&mut book, 10_000, 20_000);
    assert!(
        (4..=6).contains(&found.len()) && found.windows(2).all(|pair| pair[1] - pair[0] >= 2000),
        "{found:?}"
    );
}

#[test]
fn live_peer_that_misses_a_ping_gets_many_at_once_and_later_no_more_than_others() {
    let start = Instant::now();
    let mut book = PeerBook::new(1500, start);
    let (peer, addr) = (NodeId([1; 10]), SocketAddr::from(([192, 0, 2, 1], 7940)));
    book.list(peer, (addr, None), 1500, (true, true), start);
    book.answered(peer, start, start);
    let pings = |book: &mut PeerBook, now: Instant| {
        book.due(now).iter().filter(|due| matches!(due, Due::Ping { .. })).count()
    };
    let mut sent = Vec::new();
    let mut now = start;
    while now < start + Duration::from_secs(6) {
        sent.extend((0..pings(&mut book, now)).map(|_| (now - start).as_millis()));
        now += book.next_hurry().map_or(Duration::from_millis(200), |at| {
            at.saturating_duration_since(now).min(Duration::from_millis(200))
        });
    }
    assert_eq!(sent[..9], [600, 650, 700, 750, 800, 850, 900, 950, 1000], "{sent:?}");
    let intervals: Vec<u128> = sent.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert_eq!(intervals[8..15], [200; 7], "{intervals:?}");
    assert!(intervals[16..].iter().all(|wait| *wait == 600), "{intervals:?}");
    // One that takes long to answer has the time for it, and one that answers is not hurried.
    let mut book = PeerBook::new(1500, start);
    book.list(peer, (addr, None), 1500, (true, true), start);
    book.answered(peer, start, start + Duration::from_millis(400));
    let next = start + Duration::from_millis(600);
    assert_eq!((pings(&mut book, next), book.next_hurry()), (1, Some(next + Duration::from_millis(500))));
    book.answered(peer, next, next + Duration::from_millis(400));
    assert_eq!(book.next_hurry(), None);
}
