use ovl_proto::record::Presence;
use ovl_proto::record::WireVersions;
use ovl_proto::table::Revision;
use ovl_proto::wire::fields::Unknown;
use tokio::time::timeout;

use super::*;
use crate::keys::{ClusterKey, Identity};

/// The wall clock of the hosts, to which each adds its generation.
const WALL_MS: u64 = 1_800_000_000_000;

struct Node {
    identity: Arc<Identity>,
    record: NodeRecord,
    gossip: Gossip,
    events: mpsc::Receiver<GossipEvent>,
    /// The latest event about each peer.
    peers: HashMap<NodeId, (NodeRecord, Hints, bool)>,
}

fn free_port() -> SocketAddr {
    std::net::UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn record_at(identity: &Identity, address: SocketAddr, generation: u64) -> NodeRecord {
    NodeRecord {
        id: identity.id(),
        public_key: *identity.public_key(),
        name: format!("node-{}", address.port()),
        generation,
        revision: 1,
        cluster: 0,
        address,
        vtep: address.ip(),
        vxlan_port: 4789,
        link_mtu: 9000,
        tunnel: None,
        keys: ovl_proto::record::ClusterKeys::default(),
        presence: Presence::Running,
        version: "0.1.0".to_owned(),
        wire: WireVersions::own(),
        probes: 0,
        not_built: Vec::new(),
        probe_kinds: 0,
        metrics_port: 0,
        zone: String::new(),
        mirrors: false,
        is_node: false,
        relay_port: 0,
        relays: false,
        further: Vec::new(),
        unknown: Unknown::default(),
    }
}

async fn node_of(
    identity: Arc<Identity>,
    address: SocketAddr,
    generation: u64,
    join: &[SocketAddr],
    key: u8,
) -> Node {
    start(identity, address, generation, join, key, Duration::from_millis(200)).await
}

async fn start(
    identity: Arc<Identity>,
    address: SocketAddr,
    generation: u64,
    join: &[SocketAddr],
    key: u8,
    interval: Duration,
) -> Node {
    let record = record_at(&identity, address, generation);
    let (sender, events) = mpsc::channel(64);
    let config = GossipConfig {
        listen: address,
        listen_also: None,
        identity: Arc::clone(&identity),
        keyring: Arc::new(Keyring::new(ClusterKey::new([key; 32]), Vec::new())),
        record: identity.sign_record(&record).unwrap(),
        hints: Hints::default(),
        join: join.iter().map(SocketAddr::to_string).collect(),
        interval,
        transport: Arc::new(crate::transport::HostTransport::default()),
        wall_clock: Arc::new(move || WALL_MS + generation),
    };
    let gossip = Gossip::start(config, sender).await.unwrap();
    Node { identity, record, gossip, events, peers: HashMap::new() }
}

async fn node(join: &[SocketAddr]) -> Node {
    node_of(Arc::new(Identity::ephemeral()), free_port(), 1, join, 1).await
}

impl Node {
    async fn next(&mut self) -> GossipEvent {
        let event = timeout(Duration::from_secs(20), self.events.recv()).await;
        let event = event.expect("the event does not come").expect("gossip ended");
        if let GossipEvent::Peer { record, hints, alive, .. } = &event {
            self.peers.insert(record.id, (record.clone(), *hints, *alive));
        }
        event
    }

    /// Waits for an event that fits.
    async fn wait(&mut self, fits: impl Fn(&GossipEvent) -> bool) {
        while !fits(&self.next().await) {}
    }

    /// Waits until the latest event about a peer fits. Returns the time that it took.
    async fn wait_peer(&mut self, id: NodeId, fits: impl Fn(&NodeRecord, &Hints, bool) -> bool) -> Duration {
        let start = Instant::now();
        while !self.peers.get(&id).is_some_and(|(record, hints, alive)| fits(record, hints, *alive)) {
            self.next().await;
        }
        start.elapsed()
    }

    async fn wait_alive(&mut self, id: NodeId) -> Duration {
        self.wait_peer(id, |_, _, alive| alive).await
    }
}

#[tokio::test]
async fn rotation_loses_no_event_and_a_host_with_the_old_key_alone_is_understood() {
    let key = |n: u8| ClusterKey::new([n; 32]);
    let ring = |first, others: &[u8]| {
        Arc::new(Keyring::new(key(first), others.iter().map(|other| key(*other)).collect()))
    };
    let mut a = node(&[]).await;
    let mut b = node(&[a.record.address]).await;
    let (ida, idb) = (a.record.id, b.record.id);
    a.wait_alive(idb).await;
    b.wait_alive(ida).await;
    for gossip in [&a.gossip, &b.gossip] {
        gossip.set_keys(ring(1, &[2]), HashMap::new()).unwrap();
    }
    for gossip in [&a.gossip, &b.gossip] {
        gossip.set_keys(ring(2, &[1]), HashMap::new()).unwrap();
    }
    // The host is new: replies to it use the key that it seals with.
    let mut c = node(&[a.record.address]).await;
    let idc = c.record.id;
    c.wait_alive(ida).await;
    a.wait_alive(idc).await;
    let hints = Hints { table: Revision { epoch: 1, change: 7 }, objects: [9; 32], alloc: 3 };
    a.gossip.set_hints(hints);
    b.wait_peer(ida, |_, told, _| *told == hints).await;
    c.wait_peer(ida, |_, told, _| *told == hints).await;
    // The old key is dropped: the host with the old key alone loses its peers.
    for gossip in [&a.gossip, &b.gossip] {
        gossip.set_keys(ring(2, &[]), HashMap::new()).unwrap();
    }
    a.wait_peer(idc, |_, _, alive| !alive).await;
    c.wait_peer(ida, |_, _, alive| !alive).await;
    assert!(!a.gossip.other_keys().is_empty() && !c.gossip.other_keys().is_empty());
    assert!(b.peers[&ida].2 && a.peers[&idb].2, "the two other hosts never lost each other");
    for node in [a, b, c] {
        node.gossip.shutdown().await;
    }
}

#[tokio::test]
async fn a_host_learns_the_wall_clocks_of_its_peers() {
    let mut a = node(&[]).await;
    let b = node(&[a.record.address]).await;
    a.wait_alive(b.record.id).await;
    // It came with the signed answer that made the peer alive.
    let clocks = a.gossip.clocks();
    let clock = clocks.get(&b.record.id).copied().unwrap();
    let began = WALL_MS + b.record.generation;
    assert!((began..began + 10_000).contains(&clock), "{clock}");
    for node in [a, b] {
        node.gossip.shutdown().await;
    }
}

#[tokio::test]
async fn three_hosts_find_each_other_and_learn_changes() {
    let mut a = node(&[]).await;
    let mut b = node(&[a.record.address]).await;
    let mut c = node(&[a.record.address, b.record.address]).await;
    let (ida, idb, idc) = (a.record.id, b.record.id, c.record.id);
    for (node, others) in [(&mut a, [idb, idc]), (&mut b, [ida, idc]), (&mut c, [ida, idb])] {
        for other in others {
            node.wait_alive(other).await;
        }
    }

    let hints = Hints { table: Revision { epoch: 1, change: 7 }, objects: [9; 32], alloc: 3 };
    a.gossip.set_hints(hints);
    for node in [&mut b, &mut c] {
        let took = node.wait_peer(ida, |_, told, _| *told == hints).await;
        assert!(took < Duration::from_millis(1500), "{took:?}");
    }

    a.record.revision = 2;
    a.record.presence = Presence::Restarting;
    let signed = a.identity.sign_record(&a.record).unwrap();
    a.gossip.set_record(signed.clone());
    for node in [&mut b, &mut c] {
        node.wait_peer(ida, |record, _, _| *record == a.record).await;
    }

    a.record.revision = 3;
    let signed = a.identity.sign_record(&a.record).unwrap();
    a.gossip.announce(signed).await;
    for node in [&mut b, &mut c] {
        node.wait(|event| matches!(event, GossipEvent::Announced { record, .. } if record.revision == 3))
            .await;
        while node.gossip.path_mtus().get(&ida) != Some(&9000) {
            node.next().await;
        }
    }

    let contacts = b.gossip.contacts();
    assert!(contacts[&ida].rtt.is_some() && contacts[&ida].last_heard.elapsed() < Duration::from_secs(2));
    assert_eq!(b.gossip.counters().dropped_malformed, 0);

    // Killed: it sends no announcement.
    drop(c);
    let took = a.wait_peer(idc, |_, _, alive| !alive).await;
    assert!(took > Duration::from_millis(1700) && took < Duration::from_secs(4), "{took:?}");
    assert!(b.wait_peer(idc, |_, _, alive| !alive).await < Duration::from_secs(1));

    for node in [a, b] {
        node.gossip.shutdown().await;
        std::net::UdpSocket::bind(node.record.address).expect("the socket is closed");
    }
}

#[tokio::test]
async fn hosts_send_their_records_themselves_without_a_round_of_gossip() {
    let seldom = Duration::from_secs(60);
    let new = |join: Vec<SocketAddr>| async move {
        start(Arc::new(Identity::ephemeral()), free_port(), 1, &join, 1, seldom).await
    };
    let mut a = new(Vec::new()).await;
    let mut b = new(vec![a.record.address]).await;
    let (ida, idb) = (a.record.id, b.record.id);
    a.wait_alive(idb).await;
    // It hears of the second host from the first one, which the second host does not ask again.
    let mut c = new(vec![a.record.address]).await;
    let idc = c.record.id;
    let took = [c.wait_alive(idb).await, b.wait_alive(idc).await, a.wait_alive(idc).await];
    assert!(took.iter().all(|took| *took < Duration::from_secs(4)), "{took:?}");
    a.record.revision = 2;
    a.record.presence = Presence::Restarting;
    a.gossip.set_record(a.identity.sign_record(&a.record).unwrap());
    for node in [&mut b, &mut c] {
        let took = node.wait_peer(ida, |record, _, _| *record == a.record).await;
        assert!(took < Duration::from_millis(500), "{took:?}");
    }
}

#[tokio::test]
async fn restarted_host_keeps_its_identity() {
    let mut a = node(&[]).await;
    let b = node(&[a.record.address]).await;
    let (id, address) = (b.record.id, b.record.address);
    a.wait_alive(id).await;
    b.gossip.shutdown().await;
    let mut b = node_of(b.identity, address, 2, &[], 1).await;
    a.wait_peer(id, |record, _, _| record.generation == 2).await;
    b.wait_alive(a.record.id).await;
    let later = timeout(
        Duration::from_secs(4),
        a.wait(|event| matches!(event, GossipEvent::Peer { alive: false, .. })),
    );
    assert!(later.await.is_err(), "its old generation does not make it dead");
}

#[tokio::test]
async fn known_host_is_dialled_until_it_answers() {
    let mut a = node(&[]).await;
    let identity = Arc::new(Identity::ephemeral());
    let (id, address) = (identity.id(), free_port());
    a.gossip.set_known(vec![(id, address)]);
    tokio::time::sleep(Duration::from_millis(500)).await;
    let _b = node_of(identity, address, 1, &[], 1).await;
    assert!(a.wait_alive(id).await < Duration::from_secs(3));
}

#[tokio::test]
async fn host_with_another_key_is_not_authenticated() {
    let mut a = node(&[]).await;
    let b = node_of(Arc::new(Identity::ephemeral()), free_port(), 1, &[a.record.address], 2).await;
    let found = timeout(Duration::from_secs(2), a.wait(|_| true)).await;
    assert!(found.is_err());
    let counters = a.gossip.counters();
    assert!(counters.dropped_unauthenticated > 0 && counters.received == 0);
    assert_eq!(counters.strangers, ["127.0.0.1".parse::<std::net::IpAddr>().unwrap()]);
    drop(b);
}

#[tokio::test]
async fn garbage_and_replays_are_dropped() {
    let mut a = node(&[]).await;
    let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut sealer = seal::Sealer::new(&ClusterKey::new([1; 32])).unwrap();
    let mut datagram = Vec::new();
    sealer.seal(&[250, 1, 2, 3], None, &mut datagram).unwrap();
    let stranger = Identity::ephemeral();
    let mut forged = a.identity.sign_record(&record_at(&stranger, free_port(), 1)).unwrap();
    forged.body.reverse();
    let mut announcement = Vec::new();
    sealer.seal(&Packet::Announce(forged).encode().unwrap(), None, &mut announcement).unwrap();
    for bytes in [&datagram[..], &datagram, &announcement, b"", b"garbage", &[1; 100], &[0; 9000]] {
        socket.send_to(bytes, a.record.address).await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let counters = a.gossip.counters();
    assert_eq!(counters.dropped_replayed, 1);
    assert_eq!(counters.dropped_malformed, 2);
    assert_eq!(counters.dropped_unauthenticated, 4);
    let b = node(&[a.record.address]).await;
    a.wait_alive(b.record.id).await;
}

#[tokio::test]
async fn clash_of_a_cloned_host_is_reported() {
    let mut a = node(&[]).await;
    let document = ring::signature::Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new()).unwrap();
    let clone = || Arc::new(Identity::from_pkcs8_for_tests(document.as_ref()));
    let b = node_of(clone(), free_port(), 5, &[a.record.address], 1).await;
    let mut c = node_of(clone(), free_port(), 5, &[a.record.address], 1).await;
    let id = b.record.id;
    for node in [&mut a, &mut c] {
        node.wait(|event| matches!(event, GossipEvent::Clash { node, .. } if *node == id)).await;
    }
}

/// A host with the cluster key that runs no gossip, and sends what a test wants.
struct KeyHolder {
    socket: tokio::net::UdpSocket,
    identity: Identity,
    agreement: pair::Agreement,
    sealer: seal::Sealer,
    opener: seal::Opener,
}

impl KeyHolder {
    async fn new() -> Self {
        let (identity, key) = (Identity::ephemeral(), ClusterKey::new([1; 32]));
        let keyring = Arc::new(Keyring::new(key.clone(), Vec::new()));
        Self {
            socket: tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap(),
            sealer: seal::Sealer::new(&key).unwrap(),
            opener: seal::Opener::new(identity.id(), keyring),
            agreement: pair::Agreement::new(identity.id()).unwrap(),
            identity,
        }
    }

    async fn send(&mut self, to: SocketAddr, packet: &Packet) {
        let mut datagram = Vec::new();
        self.sealer.seal(&packet.encode().unwrap(), None, &mut datagram).unwrap();
        self.socket.send_to(&datagram, to).await.unwrap();
    }

    /// The next pong of another host, signed or not.
    async fn pong(&mut self) -> Packet {
        let mut buffer = [0; 2000];
        loop {
            let (length, _) =
                timeout(Duration::from_secs(5), self.socket.recv_from(&mut buffer)).await.unwrap().unwrap();
            let Ok((_, plain)) = self.opener.open(&mut buffer[..length]) else { continue };
            let packet = Packet::decode(plain).unwrap();
            if let Packet::Pong(_) | Packet::PairPong(_) = packet {
                return packet;
            }
        }
    }

    /// Signs answers to pings for a while.
    async fn answer_for(&mut self, time: Duration) {
        let end = Instant::now() + time;
        let mut buffer = [0; 2000];
        while let Ok(received) = tokio::time::timeout_at(end, self.socket.recv_from(&mut buffer)).await {
            let (length, from) = received.unwrap();
            let Ok((_, plain)) = self.opener.open(&mut buffer[..length]) else { continue };
            if let Packet::Ping { nonce } = Packet::decode(plain).unwrap() {
                let answer = Some(statement::Answer { nonce, run: self.sealer.run() });
                let statement = statement::Statement {
                    answer,
                    sequence: (1, 0),
                    hints: Hints::default(),
                    wall_ms: 0,
                    agreement: Some(self.agreement.public()),
                    ping: None,
                };
                let signed = statement::SignedStatement::sign(&self.identity, &statement).unwrap();
                self.send(from, &Packet::Pong(signed)).await;
            }
        }
    }
}

#[tokio::test]
async fn holder_of_the_key_cannot_keep_a_host_alive_or_set_its_hints() {
    let mut a = node(&[]).await;
    let c = node(&[a.record.address]).await;
    let idc = c.record.id;
    a.wait_alive(idc).await;
    let told = a.peers[&idc].1;
    let mut holder = KeyHolder::new().await;
    // It proves to be a host, so what it says is decoded.
    holder.send(a.record.address, &Packet::Ping { nonce: 1 }).await;
    holder.answer_for(Duration::from_millis(300)).await;
    let host = decode::Incarnation { node: idc, generation: 1, address: c.record.address };
    let own_pair = holder.agreement.pair(a.record.id, [9; 32]).unwrap();
    drop(c);
    let start = Instant::now();
    let a_address = a.record.address;
    let forge = async {
        for round in 0_u64.. {
            let heartbeat = decode::Exchange::syn(vec![(host, [1_000_000 + round, 0, 0])]);
            let data = bytes::Bytes(heartbeat.encode().unwrap());
            let message = u32::try_from(round).unwrap();
            let fragment = packet::Fragment { message, index: 0, count: 1, compressed: false, data };
            holder.send(a_address, &Packet::Chitchat(fragment)).await;
            // An answer and hints in the name of the other host, with its own signature or with none.
            let statement = statement::Statement {
                answer: Some(statement::Answer { nonce: round, run: holder.sealer.run() }),
                sequence: (u64::MAX, round),
                hints: Hints { alloc: 99, ..Hints::default() },
                wall_ms: 0,
                agreement: None,
                ping: None,
            };
            let signed = statement::SignedStatement::sign(&holder.identity, &statement).unwrap();
            let forged = signed.with_key(*c_key(&a, idc));
            holder.send(a_address, &Packet::Hints(forged.clone())).await;
            holder.send(a_address, &Packet::Pong(forged.clone())).await;
            holder.send(a_address, &Packet::Relayed(forged)).await;
            // With a key that only the holder has.
            let forged = pair::PairStatement::new(&own_pair, &statement).unwrap();
            holder.send(a_address, &Packet::PairPong(forged)).await;
            holder.answer_for(Duration::from_millis(100)).await;
        }
    };
    tokio::select! {
        () = forge => {}
        () = tokio::time::sleep(Duration::from_secs(4)) => {}
    }
    while let Ok(Some(event)) = timeout(Duration::from_millis(10), a.events.recv()).await {
        if let GossipEvent::Peer { record, hints, alive, .. } = event {
            a.peers.insert(record.id, (record, hints, alive));
        }
    }
    let (_, hints, alive) = &a.peers[&idc];
    assert!(!alive, "alive {:?} after it was killed", start.elapsed());
    assert_eq!(*hints, told);
}

#[tokio::test]
async fn answers_are_authenticated_with_the_key_of_two_hosts_once_both_know_it() {
    let a = node(&[]).await;
    let mut holder = KeyHolder::new().await;
    let (id, address) = (holder.identity.id(), holder.socket.local_addr().unwrap());
    a.gossip.set_known(vec![(id, address)]);
    // It signs answers to the pings of the other host, which has the key from then on.
    holder.answer_for(Duration::from_millis(1500)).await;
    holder.send(a.record.address, &Packet::Ping { nonce: 1 }).await;
    let Packet::Pong(signed) = holder.pong().await else { panic!("not signed") };
    let (_, statement) = signed.claim().unwrap();
    let pair = holder.agreement.pair(a.record.id, statement.agreement.unwrap()).unwrap();
    holder.send(a.record.address, &Packet::PairPing { nonce: 2, pair: pair.id() }).await;
    let Packet::PairPong(made) = holder.pong().await else { panic!("signed") };
    let answer = made.open(&pair).unwrap().answer.unwrap();
    assert_eq!(
        (answer.nonce, Some(answer.run)),
        (2, signed.claim().unwrap().1.answer.map(|answer| answer.run))
    );
    // With another key, as after a restart of the other host.
    holder.send(a.record.address, &Packet::PairPing { nonce: 3, pair: [7; 8] }).await;
    let Packet::Pong(signed) = holder.pong().await else { panic!("not signed") };
    assert!(signed.is_valid() && signed.claim().unwrap().1.answer.unwrap().nonce == 3);
}

#[tokio::test]
async fn two_hosts_agree_on_a_key_again_after_a_restart() {
    let mut a = node(&[]).await;
    let mut b = node(&[a.record.address]).await;
    let (ida, idb, address) = (a.record.id, b.record.id, b.record.address);
    let pair = |node: &Node, of| node.gossip.hub.lock().book.pair(of).map(pair::Pair::id);
    let mut earlier = None;
    for generation in 2..4 {
        a.wait_alive(idb).await;
        b.wait_alive(ida).await;
        let start = Instant::now();
        let agreed = loop {
            let (one, other) = (pair(&a, idb), pair(&b, ida));
            if one.is_some() && one == other && one != earlier {
                break one;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "{one:?} {other:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        earlier = agreed;
        // Both stay alive by answers that are not signed.
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(a.gossip.hub.lock().book.is_alive(idb, Instant::now()));
        assert!(b.gossip.hub.lock().book.is_alive(ida, Instant::now()));
        b.gossip.shutdown().await;
        b = node_of(b.identity, address, generation, &[a.record.address], 1).await;
        a.wait_peer(idb, |record, _, _| record.generation == generation).await;
    }
}

/// The public key of a peer.
fn c_key(node: &Node, peer: NodeId) -> &ovl_proto::record::PublicKey {
    &node.peers[&peer].0.public_key
}

#[tokio::test]
async fn host_of_another_wire_version_is_told_who_answers_and_named() {
    let mut a = node(&[]).await;
    let mut other = KeyHolder::new().await;
    let mut datagram = Vec::new();
    other.sealer.seal_version(9, b"of a later release", None, &mut datagram).unwrap();
    let mut buffer = [0; 2000];
    // Twice: the answer is limited to one in ten seconds.
    for _ in 0..2 {
        other.socket.send_to(&datagram, a.record.address).await.unwrap();
    }
    let (length, _) =
        timeout(Duration::from_secs(5), other.socket.recv_from(&mut buffer)).await.unwrap().unwrap();
    assert_eq!(buffer[0], ovl_proto::wire::INTRODUCTION);
    let (_, plain) = other.opener.open(&mut buffer[..length]).unwrap();
    let signed: SignedRecord = ovl_proto::wire::decode_body(plain).unwrap();
    assert_eq!(signed.head().unwrap().id, a.record.id);

    let mut record = record_at(&other.identity, free_port(), 1);
    record.wire = WireVersions { oldest: 8, newest: 9 };
    let plain = ovl_proto::wire::encode_body(&other.identity.sign_record(&record).unwrap()).unwrap();
    other.sealer.seal_version(ovl_proto::wire::INTRODUCTION, &plain, None, &mut datagram).unwrap();
    other.socket.send_to(&datagram, a.record.address).await.unwrap();
    let id = record.id;
    a.wait(|event| matches!(event, GossipEvent::Announced { record, .. } if record.id == id)).await;

    // A record that is not understood otherwise names its host all the same.
    record.revision = 2;
    record.unknown.set(900, true, b"later");
    let plain = ovl_proto::wire::encode_body(&other.identity.sign_record(&record).unwrap()).unwrap();
    other.sealer.seal_version(ovl_proto::wire::INTRODUCTION, &plain, None, &mut datagram).unwrap();
    other.socket.send_to(&datagram, a.record.address).await.unwrap();
    let named = |event: &GossipEvent| matches!(event, GossipEvent::NotUnderstood { head, why, .. } if head.id == id && why == "field 900 of NodeRecord");
    a.wait(named).await;
}
