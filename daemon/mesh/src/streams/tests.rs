use std::time::Instant;

use ovl_proto::sync::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::*;
use crate::keys::ClusterKey;

struct Node {
    id: NodeId,
    links: Streams,
    events: mpsc::Receiver<StreamEvent>,
}

fn record_of(identity: &Identity, name: &str) -> NodeRecord {
    NodeRecord { name: name.to_owned(), ..crate::keys::tests::record_of(identity) }
}

fn keyring(keys: &[u8]) -> Arc<Keyring> {
    let mut keys = keys.iter().map(|byte| ClusterKey::new([*byte; 32]));
    Arc::new(Keyring::new(keys.next().unwrap(), keys.collect()))
}

async fn node_at(listen: SocketAddr, identity: Arc<Identity>, keys: &[u8]) -> Node {
    let keyring = keyring(keys);
    let record = identity.sign_record(&record_of(&identity, "node")).unwrap();
    let (sender, events) = mpsc::channel(64);
    let id = identity.id();
    let transport = Arc::new(crate::transport::HostTransport::default());
    let links = Streams::start(
        StreamsConfig { listen, listen_also: None, identity, keyring, record, transport, behind_nat: false },
        sender,
    )
    .await
    .unwrap();
    Node { id, links, events }
}

async fn node(keys: &[u8]) -> Node {
    node_at("127.0.0.1:0".parse().unwrap(), Arc::new(Identity::ephemeral()), keys).await
}

impl Node {
    fn addr(&self) -> SocketAddr {
        self.links.local_addr()
    }

    fn dial(&self, others: &[&Node]) {
        self.links.set_peers(others.iter().map(|other| (other.id, other.addr())).collect());
    }

    async fn wait<T>(&mut self, fits: impl Fn(StreamEvent) -> Option<T>) -> T {
        let found = async {
            loop {
                if let Some(found) = fits(self.events.recv().await.expect("streams ended")) {
                    return found;
                }
            }
        };
        timeout(Duration::from_secs(10), found).await.expect("the event does not come")
    }

    async fn wait_up(&mut self, node: NodeId) {
        self.wait(|event| matches!(event, StreamEvent::Up(peer) if peer == node).then_some(())).await;
    }

    async fn wait_down(&mut self, node: NodeId) {
        self.wait(|event| matches!(event, StreamEvent::Down(peer) if peer == node).then_some(())).await;
    }

    async fn wait_message(&mut self) -> (NodeId, Message) {
        self.wait(|event| match event {
            StreamEvent::Message { from, message, .. } => Some((from, message)),
            _ => None,
        })
        .await
    }
}

fn text(length: usize) -> Message {
    Message::LeaseReply { id: 1, result: Err("x".repeat(length)) }
}

#[tokio::test]
async fn messages_travel_in_both_directions_over_two_streams() {
    let (mut a, mut b) = (node(&[1]).await, node(&[1]).await);
    assert!(!a.links.send(b.id, &text(1)));
    a.dial(&[&b]);
    b.dial(&[&a]);
    a.wait_up(b.id).await;
    b.wait_up(a.id).await;
    assert!(a.links.connected().contains(&b.id));
    for length in [0, 10, 70_000, 5 << 20] {
        assert!(a.links.send(b.id, &text(length)));
        let (from, message) = b.wait_message().await;
        assert_eq!((from, message), (a.id, text(length)));
    }
    for number in 0..500 {
        assert!(b.links.send(a.id, &Message::LeaseReply { id: number, result: Err(String::new()) }));
    }
    for number in 0..500 {
        let (_, message) = a.wait_message().await;
        assert!(matches!(message, Message::LeaseReply { id, .. } if id == number), "in order");
    }
    a.links.set_peers(BTreeMap::new());
    a.wait_down(b.id).await;
    assert!(a.links.connected().is_empty() && !a.links.send(b.id, &text(1)));
}

#[tokio::test]
async fn handshake_sends_the_record_and_another_host_is_refused() {
    let (mut a, mut b, c) = (node(&[1]).await, node(&[1]).await, node(&[1]).await);
    // a expects c at the address of b.
    a.links.set_peers([(c.id, b.addr())].into());
    let record = b
        .wait(|event| match event {
            StreamEvent::Record { record, .. } => Some(record),
            _ => None,
        })
        .await;
    assert_eq!(record.id, a.id);
    assert!(timeout(Duration::from_millis(500), a.events.recv()).await.is_err(), "never up");
    assert!(a.links.connected().is_empty());
}

#[tokio::test]
async fn record_of_another_host_is_refused() {
    let (mut a, mut b) = (node(&[1]).await, node(&[1]).await);
    // a sends the record of another host without having its key.
    let other = Identity::ephemeral();
    a.links.set_record(other.sign_record(&record_of(&other, "other")).unwrap());
    a.dial(&[&b]);
    assert!(timeout(Duration::from_millis(500), b.events.recv()).await.is_err());
    b.dial(&[&a]);
    assert!(
        timeout(Duration::from_millis(500), async {
            while !matches!(b.events.recv().await, Some(StreamEvent::Up(_))) {}
        })
        .await
        .is_err()
    );
    drop(a.events.try_recv());
}

#[tokio::test]
async fn unknown_cluster_key_is_refused_and_any_key_of_the_keyring_is_accepted() {
    let (mut a, b, mut c) = (node(&[1]).await, node(&[2]).await, node(&[3, 1]).await);
    a.dial(&[&b, &c]);
    a.wait_up(c.id).await;
    assert!(a.links.send(c.id, &text(1)));
    c.wait_message().await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(a.links.connected(), [c.id].into());
}

#[tokio::test]
async fn stream_is_replaced_for_another_key_without_losing_a_message() {
    let (mut a, mut b) = (node(&[1]).await, node(&[1]).await);
    a.dial(&[&b]);
    a.wait_up(b.id).await;
    let new = ClusterKey::new([2; 32]).id();
    b.links.set_keyring(keyring(&[1, 2]));
    for number in 0..2000 {
        assert!(a.links.send(b.id, &Message::LeaseReply { id: number, result: Err("x".repeat(100)) }));
        if number == 500 {
            a.links.set_keyring(keyring(&[2, 1]));
        }
        if number % 100 == 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    let mut last = None;
    for number in 0..2000 {
        let next = |event| match event {
            StreamEvent::Message { key, message, .. } => Some((key, message)),
            _ => None,
        };
        let (key, message) = b.wait(next).await;
        assert!(matches!(message, Message::LeaseReply { id, .. } if id == number), "in order");
        last = Some(key);
    }
    assert_eq!(last, Some(new));
    // The old key is dropped. No stream uses it any more, so none is closed.
    b.links.set_keyring(keyring(&[2]));
    a.links.set_keyring(keyring(&[2]));
    assert!(a.links.send(b.id, &text(1)));
    b.wait_message().await;
    assert!(a.events.try_recv().is_err(), "no event");
}

#[tokio::test]
async fn dropping_a_key_closes_the_streams_that_use_it() {
    let (mut a, mut b) = (node(&[1]).await, node(&[2, 1]).await);
    // b does not know that a lacks its first key.
    b.dial(&[&a]);
    a.dial(&[&b]);
    b.wait_up(a.id).await;
    a.wait_up(b.id).await;
    b.links.set_keyring(keyring(&[2]));
    a.wait_down(b.id).await;
    b.wait_down(a.id).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(a.links.connected().is_empty() && b.links.connected().is_empty());
}

#[tokio::test]
async fn garbage_is_refused_and_silent_connections_are_bounded() {
    let (mut a, mut b) = (node(&[1]).await, node(&[1]).await);
    let mut slow = Vec::new();
    for garbage in [&b""[..], b"\0", b"\xff\xff", b"\0\x35\x01garbage", b"GET / HTTP/1.1\r\n\r\n", &[0; 5000]]
    {
        let mut stream = TcpStream::connect(b.addr()).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        slow.push(stream);
    }
    // A handshake with the right size and key id, and random content.
    let mut forged = vec![0, 53, wire::VERSION];
    forged.extend_from_slice(&ClusterKey::new([1; 32]).id().0);
    forged.extend_from_slice(&[7; 48]);
    let mut stream = TcpStream::connect(b.addr()).await.unwrap();
    stream.write_all(&forged).await.unwrap();
    assert_eq!(stream.read(&mut [0; 100]).await.unwrap(), 0, "closed without a reply");
    // The number of silent connections is bounded, and they block other peers only for a short time.
    for _ in 0..40 {
        slow.push(TcpStream::connect(b.addr()).await.unwrap());
    }
    drop(slow);
    a.dial(&[&b]);
    a.wait_up(b.id).await;
    assert!(a.links.send(b.id, &text(3)));
    b.wait_message().await;
}

#[tokio::test]
async fn restarted_peer_is_dialled_again() {
    let identity = Arc::new(Identity::ephemeral());
    let mut a = node(&[1]).await;
    let b = node_at("127.0.0.1:0".parse().unwrap(), Arc::clone(&identity), &[1]).await;
    let (id, addr) = (b.id, b.addr());
    a.dial(&[&b]);
    a.wait_up(id).await;
    b.links.shutdown().await;
    a.wait_down(id).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let mut b = node_at(addr, identity, &[1]).await;
    let start = Instant::now();
    a.links.kick(id);
    a.wait_up(id).await;
    assert!(start.elapsed() < Duration::from_millis(500));
    assert!(a.links.send(id, &text(1)));
    b.wait_message().await;
}

#[tokio::test]
async fn shutdown_writes_queued_messages() {
    let (mut a, mut b) = (node(&[1]).await, node(&[1]).await);
    a.dial(&[&b]);
    a.wait_up(b.id).await;
    for _ in 0..20 {
        assert!(a.links.send(b.id, &text(100_000)));
    }
    let (start, drain) = (Instant::now(), async { while a.events.recv().await.is_some() {} });
    tokio::join!(a.links.shutdown(), drain, async {
        for _ in 0..20 {
            b.wait_message().await;
        }
    });
    assert!(start.elapsed() < FLUSH);
}

#[tokio::test]
async fn stream_to_a_peer_that_does_not_read_is_closed() {
    let (mut a, mut b) = (node(&[1]).await, node(&[1]).await);
    a.dial(&[&b]);
    a.wait_up(b.id).await;
    // The events of b are not received, so b stops reading.
    let sent = (0..200).take_while(|_| a.links.send(b.id, &text(1 << 20))).count();
    assert!((15..100).contains(&sent), "{sent}");
    assert!(a.links.connected().is_empty());
    a.wait_down(b.id).await;
    a.wait_up(b.id).await;
    drop(b.events.try_recv());
}

#[tokio::test]
async fn broadcast_reaches_seven_peers_at_once() {
    let mut nodes = Vec::new();
    for _ in 0..7 {
        nodes.push(node(&[1]).await);
    }
    let mut a = node(&[1]).await;
    a.dial(&nodes.iter().collect::<Vec<_>>());
    for node in &nodes {
        timeout(Duration::from_secs(5), async {
            while !a.links.connected().contains(&node.id) {
                a.events.recv().await;
            }
        })
        .await
        .unwrap();
    }
    let mut best = Duration::MAX;
    for _ in 0..50 {
        let start = Instant::now();
        assert_eq!(a.links.broadcast(&text(100)), 7);
        for node in &mut nodes {
            node.wait_message().await;
        }
        best = best.min(start.elapsed());
    }
    assert!(best < Duration::from_millis(5), "{best:?}");
    println!("broadcast to 7: {best:?}");
}

#[tokio::test]
async fn message_that_is_not_understood_is_ignored_and_the_stream_stays_open() {
    use ovl_proto::alloc::{AllocMap, AllocMessage, Ballot};

    let (mut a, mut b) = (node(&[1]).await, node(&[1]).await);
    a.dial(&[&b]);
    a.wait_up(b.id).await;
    let mut map = AllocMap::default();
    map.unknown.set(900, true, b"later");
    assert!(a.links.send(b.id, &Message::Alloc(AllocMessage::Accept { ballot: Ballot::default(), map })));
    let (from, what) = b
        .wait(|event| match event {
            StreamEvent::NotUnderstood { from, what } => Some((from, what)),
            _ => None,
        })
        .await;
    assert_eq!((from, what.as_str()), (a.id, "field 900 of AllocMap"));
    assert!(a.links.send(b.id, &text(3)));
    assert_eq!(b.wait_message().await, (a.id, text(3)));
}

#[tokio::test]
async fn idle_streams_rest_except_some_and_go_on_with_the_next_message() {
    let mut nodes = Vec::new();
    for _ in 0..3 {
        nodes.push(node(&[1]).await);
    }
    let mut a = node(&[1]).await;
    a.dial(&nodes.iter().collect::<Vec<_>>());
    for _ in &nodes {
        a.wait(|event| matches!(event, StreamEvent::Up(_)).then_some(())).await;
    }
    let open = |a: &Node| a.links.shared.open.load(std::sync::atomic::Ordering::Relaxed);
    async fn until(reached: impl Fn() -> bool) {
        let wait = async {
            while !reached() {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(Duration::from_secs(10), wait).await.expect("is not reached");
    }
    until(|| open(&a) == 1).await;
    assert_eq!(a.links.connected().len(), 3, "they are up for the daemon");
    assert_eq!(a.links.broadcast(&text(10)), 3);
    for node in &mut nodes {
        assert_eq!(node.wait_message().await, (a.id, text(10)));
    }
    assert!(a.events.try_recv().is_err(), "neither down nor up");
    // A peer that was started again is greeted as a new one.
    until(|| open(&a) == 1).await;
    for node in &nodes {
        a.links.met(node.id, 77);
    }
    let (mut downs, mut ups) = (0, 0);
    while ups < 2 {
        match timeout(Duration::from_secs(10), a.events.recv()).await.expect("not dialled again") {
            Some(StreamEvent::Down(_)) => downs += 1,
            Some(StreamEvent::Up(_)) => ups += 1,
            _ => {}
        }
    }
    assert_eq!(downs, 2);
    assert!(
        timeout(Duration::from_millis(100), a.events.recv()).await.is_err(),
        "the third one did not rest"
    );
}

/// An address of this machine at which there is no listener.
fn dead() -> SocketAddr {
    "127.0.0.1:1".parse().unwrap()
}

fn through(relays: bool, ways: &[(&Node, &Node)]) -> Ways {
    Ways { relays, through: ways.iter().map(|(to, relay)| (to.id, relay.addr())).collect() }
}

#[tokio::test]
async fn stream_goes_through_members_and_is_replaced_without_loss_when_the_host_is_reached_directly() {
    let (mut a, r, s, mut b) = (node(&[1]).await, node(&[1]).await, node(&[1]).await, node(&[1]).await);
    a.links.set_ways(through(false, &[(&b, &r)]));
    r.links.set_ways(through(true, &[(&b, &s)]));
    s.links.set_ways(through(true, &[]));
    let peers = |b_at: SocketAddr| BTreeMap::from([(b.id, b_at), (r.id, r.addr()), (s.id, s.addr())]);
    r.links.set_peers(peers(dead()));
    s.links.set_peers(peers(b.addr()));
    a.links.set_peers(BTreeMap::from([(b.id, dead())]));
    a.wait_up(b.id).await;
    assert!(a.links.send(b.id, &text(1 << 20)));
    assert_eq!(b.wait_message().await, (a.id, text(1 << 20)));
    assert_eq!(a.links.shared.passed.counts().len(), 0);
    assert_eq!(r.links.shared.passed.counts().get(&a.id), Some(&1));
    // That of `r` itself is the other one.
    assert_eq!(s.links.shared.passed.counts().get(&r.id), Some(&2));

    // Directly again: nothing is lost, and the members are free.
    let at = b.addr();
    a.links.lock().outbound.get(&b.id).unwrap().replace_addr(at);
    a.links.set_ways(Ways::default());
    for size in 1..50 {
        assert!(a.links.send(b.id, &text(size)));
    }
    for size in 1..50 {
        assert_eq!(b.wait_message().await, (a.id, text(size)));
    }
    let free = async {
        while !r.links.shared.passed.counts().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(10), free).await.expect("the relayed stream stays");
}

#[tokio::test]
async fn stream_through_a_member_that_does_not_relay_is_refused_and_the_next_way_is_taken_at_once() {
    let (mut a, r, s, b) = (node(&[1]).await, node(&[1]).await, node(&[1]).await, node(&[1]).await);
    let peers = BTreeMap::from([(b.id, b.addr())]);
    r.links.set_peers(peers.clone());
    s.links.set_peers(peers);
    s.links.set_ways(through(true, &[]));
    a.links.set_ways(through(false, &[(&b, &r)]));
    a.links.set_peers(BTreeMap::from([(b.id, dead())]));
    let up = timeout(Duration::from_millis(300), a.wait_up(b.id)).await;
    assert!(up.is_err(), "the first one does not relay");
    a.links.set_ways(through(false, &[(&b, &s)]));
    a.wait_up(b.id).await;
    assert_eq!(s.links.shared.passed.counts().get(&a.id), Some(&1));
}

#[tokio::test]
async fn stream_that_would_go_in_a_circle_ends() {
    let (a, r, s, b) = (node(&[1]).await, node(&[1]).await, node(&[1]).await, node(&[1]).await);
    r.links.set_ways(through(true, &[(&b, &s)]));
    s.links.set_ways(through(true, &[(&b, &r)]));
    for host in [&r, &s] {
        host.links.set_peers(BTreeMap::from([(b.id, dead())]));
    }
    a.links.set_ways(through(false, &[(&b, &r)]));
    a.links.set_peers(BTreeMap::from([(b.id, dead())]));
    let shared = Arc::clone(&a.links.shared);
    let key = shared.keyring();
    let (mut stream, _) = relayed::connect(&shared, b.id, dead(), key.sealing()).await.unwrap();
    let record = shared.record();
    let ended = noise::dial(&mut *stream, key.sealing(), &shared.identity, &record, Purpose::Messages);
    assert!(timeout(Duration::from_secs(10), ended).await.expect("it goes round and round").is_err());
}
