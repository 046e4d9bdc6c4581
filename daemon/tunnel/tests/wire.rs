//! Tests of interfaces over the kernel's devices and sockets. The peer is another engine, or boringtun in the
//! hands of the test, which can do what an attacker or a bad network does.

#![allow(clippy::unwrap_used, clippy::panic, clippy::expect_used, reason = "tests and their helpers")]

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use netns_lab::{Host, Lab, LabConfig, uninterrupted, wait_until};
use ovl_tunnel::{Engine, FrameSource, InterfaceConfig, PeerConfig, PrivateKey, public_key};

const PATIENCE: Duration = Duration::from_secs(20);
const PORT: u16 = 51940;

fn key(n: u8) -> PrivateKey {
    PrivateKey([n; 32])
}

fn inside(n: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, u16::from(n))
}

fn ip(host: &Host, line: &str) {
    host.exec_ok(["ip"].into_iter().chain(line.split_whitespace())).unwrap();
}

fn peer(n: u8, endpoint: SocketAddr) -> PeerConfig {
    let allowed =
        vec![format!("10.9.{n}.0/24").parse().unwrap(), format!("{}/128", inside(n)).parse().unwrap()];
    PeerConfig { endpoint, allowed }
}

fn at(host: &Host) -> SocketAddr {
    SocketAddr::new(host.address().unwrap(), PORT)
}

/// Creates an engine on host `n`, with an interface that has the addresses `10.9.n.1` and `fd00::n`.
fn engine(host: &Host, n: u8) -> Engine {
    let engine = Engine::new();
    serve(&engine, host, n);
    engine
}

fn serve(engine: &Engine, host: &Host, n: u8) {
    let config = InterfaceConfig { key: key(n), listen: at(host), address: inside(n), vxlan_port: 51942 };
    host.run(|| engine.set_interface("ovt-0", &config)).unwrap().unwrap();
    ip(host, "link set ovt-0 mtu 1440 up");
    ip(host, &format!("addr add 10.9.{n}.1/32 dev ovt-0"));
    ip(host, &format!("addr add {}/128 dev ovt-0 nodad", inside(n)));
    ip(host, "route add 10.9.0.0/16 dev ovt-0");
    ip(host, "route add fd00::/64 dev ovt-0");
}

fn lab() -> Lab {
    Lab::new(LabConfig::hosts(2)).unwrap()
}

fn pair() -> (Lab, Engine, Engine) {
    let lab = lab();
    let (a, b) = (engine(&lab["h1"], 1), engine(&lab["h2"], 2));
    a.set_peer("ovt-0", public_key(&key(2)), &peer(2, at(&lab["h2"]))).unwrap();
    b.set_peer("ovt-0", public_key(&key(1)), &peer(1, at(&lab["h1"]))).unwrap();
    (lab, a, b)
}

/// A peer that the test controls.
struct RawPeer {
    tunn: Tunn,
    socket: UdpSocket,
    engine: SocketAddr,
}

impl RawPeer {
    fn new(host: &Host, engine: SocketAddr, own: u8, theirs: u8) -> Self {
        let tunn = Tunn::new(
            StaticSecret::from([own; 32]),
            PublicKey::from(public_key(&key(theirs))),
            None,
            None,
            7,
            None,
        );
        Self { tunn, socket: Self::socket(host), engine }
    }

    fn socket(host: &Host) -> UdpSocket {
        let address = host.address().unwrap();
        let socket = host.run(|| UdpSocket::bind((address, 0))).unwrap().unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        socket
    }

    fn send(&self, datagram: &[u8]) {
        self.socket.send_to(datagram, self.engine).unwrap();
    }

    /// Receives a datagram of the engine and returns the packet in it. The inner `None` means that there is
    /// no packet.
    fn receive(&mut self) -> Option<Option<Vec<u8>>> {
        let mut datagram = [0; 2048];
        let length = uninterrupted(|| self.socket.recv(&mut datagram)).ok()?;
        let mut room = [0; 2048];
        Some(match self.tunn.decapsulate(None, &datagram[..length], &mut room) {
            TunnResult::WriteToNetwork(reply) => {
                let reply = reply.to_vec();
                self.send(&reply);
                None
            }
            TunnResult::WriteToTunnelV4(packet, _) | TunnResult::WriteToTunnelV6(packet, _) => {
                Some(packet.to_vec())
            }
            TunnResult::Done | TunnResult::Err(_) => None,
        })
    }

    /// Makes a handshake and returns whether there is a session then.
    fn shake_hands(&mut self) -> bool {
        let mut message = [0; 148];
        let TunnResult::WriteToNetwork(message) = self.tunn.format_handshake_initiation(&mut message, true)
        else {
            return false;
        };
        let message = message.to_vec();
        self.send(&message);
        let established = |raw: &Self| raw.tunn.stats().0.is_some_and(|age| age < Duration::from_secs(3600));
        let before = self.tunn.stats().0;
        let until = Instant::now() + Duration::from_secs(3);
        while Instant::now() < until {
            if self.receive().is_none() {
                break;
            }
            if established(self) && self.tunn.stats().0 != before {
                return true;
            }
        }
        established(self)
    }

    /// Seals a UDP packet for port 9 of the engine's address in the tunnel, without sending it.
    fn seal(&mut self, from: Ipv4Addr, content: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0];
        packet.extend(from.octets());
        packet.extend([10, 9, 1, 1]);
        packet.extend([0, 99, 0, 9]);
        packet.extend((8 + content.len() as u16).to_be_bytes());
        packet.extend([0, 0]);
        packet.extend(content);
        let length = packet.len() as u16;
        packet[2..4].copy_from_slice(&length.to_be_bytes());
        let sum: u32 = packet[..20].chunks(2).map(|p| u32::from(p[0]) << 8 | u32::from(p[1])).sum();
        let sum = (sum & 0xffff) + (sum >> 16);
        packet[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        let mut room = [0; 2048];
        match self.tunn.encapsulate(&packet, &mut room) {
            TunnResult::WriteToNetwork(datagram) => datagram.to_vec(),
            other => panic!("no session: {other:?}"),
        }
    }
}

const OWN: Ipv4Addr = Ipv4Addr::new(10, 9, 2, 1);

/// Creates an engine on `h1` and a raw peer with a session on `h2`.
fn raw() -> (Lab, Engine, RawPeer, UdpSocket) {
    let lab = lab();
    let a = engine(&lab["h1"], 1);
    let mut raw = RawPeer::new(&lab["h2"], at(&lab["h1"]), 2, 1);
    a.set_peer("ovt-0", public_key(&key(2)), &peer(2, raw.socket.local_addr().unwrap())).unwrap();
    assert!(raw.shake_hands());
    let service = lab["h1"].run(|| UdpSocket::bind("10.9.1.1:9")).unwrap().unwrap();
    service.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    (lab, a, raw, service)
}

/// Sends a last message, and returns all that arrived before it.
fn arrived(raw: &mut RawPeer, service: &UdpSocket) -> Vec<Vec<u8>> {
    let last = raw.seal(OWN, b"last");
    raw.send(&last);
    let mut all = Vec::new();
    let mut buffer = [0; 2048];
    loop {
        let length = uninterrupted(|| service.recv(&mut buffer)).expect("the last message");
        if &buffer[..length] == b"last" {
            return all;
        }
        all.push(buffer[..length].to_vec());
    }
}

#[test]
fn packets_of_all_sizes_cross() {
    let (lab, a, _b) = pair();
    lab["h1"].ping_until("10.9.2.1", PATIENCE).unwrap();
    lab["h1"].ping_until(inside(2), PATIENCE).unwrap();
    // One side began a handshake before the other side knew it.
    let before = a.state().drops.unauthenticated;
    let (tcp, udp) = (lab["h2"].tcp_echo(7).unwrap(), lab["h2"].udp_echo(7).unwrap());
    for length in [1, 15, 16, 17, 1399, 1400, 1401, 70_000, 1_000_000] {
        let payload: Vec<u8> = (0..length).map(|n| (n % 251) as u8).collect();
        for to in ["10.9.2.1".to_owned(), inside(2).to_string()] {
            let back = lab["h1"].tcp_roundtrip(&to, tcp.port(), &payload).unwrap();
            assert!(back == payload, "{length} bytes by TCP to {to}");
            if length <= 1400 {
                let back = lab["h1"].udp_roundtrip(&to, udp.port(), &payload).unwrap();
                assert!(back == payload, "{length} bytes by UDP to {to}");
            }
        }
    }
    let state = a.state();
    let status = &state.interfaces[0].peers[0];
    assert!(status.last_handshake.is_some());
    assert!(status.sent > 2_000_000 && status.received > 2_000_000, "{status:?}");
    assert_eq!((state.drops.spoofed, state.drops.unauthenticated), (0, before));
}

#[test]
fn replayed_and_changed_datagrams_are_dropped() {
    let (_lab, a, mut raw, service) = raw();
    let good = raw.seal(OWN, b"once");
    raw.send(&good);
    assert_eq!(arrived(&mut raw, &service), [b"once"]);
    // Replayed, truncated, with flipped bits, too long, and never a message.
    raw.send(&good);
    let other = raw.seal(OWN, b"never");
    for length in 0..other.len() {
        raw.send(&other[..length]);
    }
    for byte in 0..other.len() {
        let mut flipped = other.clone();
        flipped[byte] ^= 1 << (byte % 8);
        raw.send(&flipped);
    }
    raw.send(&[&other[..], &[0]].concat());
    for kind in 0..6 {
        raw.send(&[&[kind][..], &[0; 147]].concat());
        raw.send(&[kind; 60_000]);
    }
    assert_eq!(arrived(&mut raw, &service), Vec::<Vec<u8>>::new());
    assert!(a.state().drops.unauthenticated > other.len() as u64);
    // The original of the changed datagrams is still valid.
    raw.send(&other);
    assert_eq!(arrived(&mut raw, &service), [b"never"]);
}

#[test]
fn reordered_datagrams_are_accepted() {
    let (_lab, _a, mut raw, service) = raw();
    let mut all: Vec<Vec<u8>> = (0..200_u8).map(|n| raw.seal(OWN, &[n])).collect();
    all.reverse();
    all.iter().for_each(|datagram| raw.send(datagram));
    let mut numbers: Vec<u8> = arrived(&mut raw, &service).iter().map(|content| content[0]).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..200).collect::<Vec<u8>>());
}

#[test]
fn a_peer_may_send_from_its_allowed_ips_alone() {
    let (_lab, a, mut raw, service) = raw();
    for from in [[10, 9, 1, 1], [10, 9, 3, 1], [127, 0, 0, 1], [192, 0, 2, 1]] {
        let forged = raw.seal(from.into(), b"forged");
        raw.send(&forged);
    }
    assert_eq!(arrived(&mut raw, &service), Vec::<Vec<u8>>::new());
    assert_eq!(a.state().drops.spoofed, 4);
}

#[test]
fn an_unknown_key_gets_no_answer() {
    let lab = lab();
    let a = engine(&lab["h1"], 1);
    let mut stranger = RawPeer::new(&lab["h2"], at(&lab["h1"]), 3, 1);
    a.set_peer("ovt-0", public_key(&key(2)), &peer(2, "192.0.2.77:1".parse().unwrap())).unwrap();
    assert!(!stranger.shake_hands());
    // The key of a peer, but another key of the engine.
    let mut mistaken = RawPeer::new(&lab["h2"], at(&lab["h1"]), 2, 9);
    assert!(!mistaken.shake_hands());
    assert!(a.state().drops.unauthenticated >= 2);
    assert!(a.state().interfaces[0].peers[0].last_handshake.is_none());
}

#[test]
fn the_engine_follows_a_peer_that_moves_and_forgets_a_deleted_one() {
    let (lab, a, mut raw, service) = raw();
    raw.socket = RawPeer::socket(&lab["h2"]);
    let moved = raw.seal(OWN, b"moved");
    raw.send(&moved);
    assert_eq!(arrived(&mut raw, &service), [b"moved"]);
    assert_eq!(a.state().interfaces[0].peers[0].endpoint, raw.socket.local_addr().unwrap());
    service.send_to(b"answer", "10.9.2.1:99").unwrap();
    let answer = std::iter::from_fn(|| raw.receive()).flatten().next().expect("an answer at the new address");
    assert!(answer.ends_with(b"answer"), "{answer:?}");
    // The session ends with the peer, in both directions.
    a.delete_peer("ovt-0", public_key(&key(2)));
    let late = raw.seal(OWN, b"late");
    let before = a.state().drops;
    raw.send(&late);
    wait_until(PATIENCE, "the late message is dropped", || {
        a.state().drops.unauthenticated > before.unauthenticated
    })
    .unwrap();
    let _ = service.send_to(b"nobody", "10.9.2.1:99");
    wait_until(PATIENCE, "the answer is dropped", || a.state().drops.no_peer > before.no_peer).unwrap();
    service.set_nonblocking(true).unwrap();
    assert!(service.recv(&mut [0; 16]).is_err());
}

#[test]
fn rekeying_under_load_loses_no_packet() {
    let (lab, _a, mut raw, service) = raw();
    let sender = service.try_clone().unwrap();
    const COUNT: u32 = 3_000;
    /// Packets in flight: fewer than any buffer holds.
    const IN_FLIGHT: u32 = 50;
    let arrived = Arc::new(AtomicU32::new(0));
    let so_far = Arc::clone(&arrived);
    let sending = std::thread::spawn(move || {
        let until = Instant::now() + PATIENCE;
        for n in 0..COUNT {
            while n >= so_far.load(Ordering::Relaxed) + IN_FLIGHT && Instant::now() < until {
                std::thread::yield_now();
            }
            sender.send_to(&n.to_be_bytes(), "10.9.2.1:99").unwrap();
        }
    });
    let mut seen = vec![0_u32; COUNT as usize];
    let mut handshakes = 0;
    let mut count = 0;
    let until = Instant::now() + PATIENCE;
    while count < COUNT && Instant::now() < until {
        // The peer begins several handshakes; meanwhile data uses the old keys.
        if count / 500 > handshakes {
            handshakes += 1;
            let mut message = [0; 148];
            if let TunnResult::WriteToNetwork(message) =
                raw.tunn.format_handshake_initiation(&mut message, true)
            {
                let message = message.to_vec();
                raw.send(&message);
            }
        }
        if let Some(Some(packet)) = raw.receive() {
            let number: [u8; 4] = packet[28..32].try_into().unwrap();
            seen[u32::from_be_bytes(number) as usize] += 1;
            count += 1;
            arrived.store(count, Ordering::Relaxed);
        }
    }
    sending.join().unwrap();
    assert!(handshakes >= 4);
    let wrong: Vec<_> = seen.iter().enumerate().filter(|(_, times)| **times != 1).collect();
    assert!(wrong.is_empty(), "not exactly once: {wrong:?}");
    drop(lab);
}

#[test]
fn a_restarted_peer_has_a_session_at_once() {
    let (lab, _a, b) = pair();
    lab["h1"].ping_until("10.9.2.1", PATIENCE).unwrap();
    drop(b);
    assert!(!lab["h1"].ping("10.9.2.1", Duration::from_millis(300)));
    let b = engine(&lab["h2"], 2);
    b.set_peer("ovt-0", public_key(&key(1)), &peer(1, at(&lab["h1"]))).unwrap();
    // Well before the 15 seconds after which the other side would notice the lost session.
    let took = lab["h1"].ping_until("10.9.2.1", PATIENCE).unwrap();
    assert!(took < Duration::from_secs(5), "{took:?}");
}

#[test]
fn a_deleted_device_is_created_anew_with_its_peers() {
    let (lab, a, _b) = pair();
    lab["h1"].ping_until("10.9.2.1", PATIENCE).unwrap();
    ip(&lab["h1"], "link del ovt-0");
    wait_until(PATIENCE, "the loss is noticed", || a.state().interfaces.is_empty()).unwrap();
    serve(&a, &lab["h1"], 1);
    assert_eq!(a.state().interfaces[0].peers[0].key, public_key(&key(2)));
    lab["h1"].ping_until("10.9.2.1", PATIENCE).unwrap();
}

#[test]
fn a_new_port_and_a_new_key_need_no_new_device() {
    let (lab, a, b) = pair();
    lab["h1"].ping_until("10.9.2.1", PATIENCE).unwrap();
    let index = lab["h1"].ip_json(&["link", "show", "ovt-0"]).unwrap()[0]["ifindex"].clone();
    let listen = SocketAddr::new(lab["h1"].address().unwrap(), PORT + 5);
    let config = InterfaceConfig { key: key(1), listen, address: inside(1), vxlan_port: 51942 };
    lab["h1"].run(|| a.set_interface("ovt-0", &config)).unwrap().unwrap();
    assert_eq!(a.state().interfaces[0].listen, listen);
    // The session continues, because the peer follows.
    lab["h1"].ping_until("10.9.2.1", PATIENCE).unwrap();
    let config = InterfaceConfig { key: key(5), ..config };
    lab["h1"].run(|| a.set_interface("ovt-0", &config)).unwrap().unwrap();
    assert!(!lab["h1"].ping("10.9.2.1", Duration::from_millis(300)));
    b.delete_peer("ovt-0", public_key(&key(1)));
    b.set_peer("ovt-0", public_key(&key(5)), &peer(1, listen)).unwrap();
    lab["h1"].ping_until("10.9.2.1", PATIENCE).unwrap();
    assert_eq!(lab["h1"].ip_json(&["link", "show", "ovt-0"]).unwrap()[0]["ifindex"].clone(), index);
}

#[test]
fn a_third_of_the_datagrams_lost_loses_no_more_packets() {
    let (lab, a, _b) = pair();
    lab.loss(30.0).unwrap();
    // The messages of the handshake are lost like others.
    lab["h1"].ping_until("10.9.2.1", PATIENCE).unwrap();
    let echo = lab["h2"].udp_echo(7).unwrap();
    let socket = lab["h1"].run(|| UdpSocket::bind("10.9.1.1:0")).unwrap().unwrap();
    socket.connect(("10.9.2.1", echo.port())).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    for n in 0..400_u16 {
        socket.send(&n.to_be_bytes()).unwrap();
    }
    let mut back = std::collections::BTreeSet::new();
    let mut buffer = [0; 16];
    while let Ok(length) = uninterrupted(|| socket.recv(&mut buffer)) {
        assert!(back.insert(buffer[..length].to_vec()), "twice");
    }
    // About half of them cross both ways: 196, with a standard deviation of 10.
    assert!((130..260).contains(&back.len()), "{} of 400", back.len());
    assert_eq!(a.state().drops.unauthenticated, 0);
}

/// Creates a switched network on a host. The TAP devices themselves are the endpoints.
fn switched(lab: &Lab, n: u8, engine: &Engine) {
    let host = &lab[format!("h{n}").as_str()];
    let other = 3 - n;
    let mac = |n| [2, 0, 0, 0, 0, n];
    host.run(|| engine.add_tap("ovx-t", 7)).unwrap().unwrap();
    engine.set_path(inside(other), "ovt-0").unwrap();
    engine.set_remote("ovx-t", mac(other), inside(other)).unwrap();
    engine.add_flood("ovx-t", inside(other)).unwrap();
    let addresses =
        vec![format!("10.8.0.{other}").parse().unwrap(), format!("fd08::{other}").parse().unwrap()];
    engine.set_source("ovx-t", mac(other), FrameSource { from: vec![inside(other)], addresses }).unwrap();
    ip(host, &format!("link set ovx-t address 02:00:00:00:00:0{n} mtu 1370 up"));
    ip(host, &format!("addr add 10.8.0.{n}/24 dev ovx-t"));
    ip(host, &format!("addr add fd08::{n}/64 dev ovx-t nodad"));
}

#[test]
fn frames_cross_and_spoofed_frames_are_dropped() {
    let (lab, a, b) = pair();
    switched(&lab, 1, &a);
    switched(&lab, 2, &b);
    lab["h1"].ping_until("10.8.0.2", PATIENCE).unwrap();
    lab["h1"].ping_until("fd08::2", PATIENCE).unwrap();
    let echo = lab["h2"].tcp_echo(7).unwrap();
    let payload: Vec<u8> = (0..1_000_000).map(|n| (n % 251) as u8).collect();
    for to in ["10.8.0.2", "fd08::2"] {
        assert!(lab["h1"].tcp_roundtrip(to, echo.port(), &payload).unwrap() == payload, "{to}");
    }
    assert_eq!(a.state().drops.spoofed, 0);
    // Another IP address, then another MAC address: the host may use neither.
    ip(&lab["h2"], "addr add 10.8.0.9/24 dev ovx-t");
    assert!(!lab["h2"].exec(["ping", "-c1", "-W1", "-I", "10.8.0.9", "10.8.0.1"]).unwrap().success());
    let spoofed = a.state().drops.spoofed;
    assert!(spoofed > 0);
    ip(&lab["h2"], "link set ovx-t address 02:00:00:00:00:09");
    assert!(!lab["h2"].ping("10.8.0.1", Duration::from_secs(1)));
    assert!(a.state().drops.spoofed > spoofed);
    ip(&lab["h2"], "link set ovx-t address 02:00:00:00:00:02");
    lab["h1"].ping_until("10.8.0.2", PATIENCE).unwrap();
    a.delete_tap("ovx-t");
    assert!(a.state().taps.is_empty());
    assert!(!lab["h1"].exec(["ip", "link", "show", "ovx-t"]).unwrap().success());
}

/// The names of this process's threads that serve a device.
fn threads_of(device: &str) -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| name.starts_with(device)).collect()
}

#[test]
fn a_dropped_interface_leaves_no_thread_and_no_device() {
    const ROUNDS: u32 = 50;
    let lab = lab();
    let host = &lab["h1"];
    let config = InterfaceConfig { key: key(1), listen: at(host), address: inside(1), vxlan_port: 51942 };
    let mut ending = Duration::ZERO;
    for _ in 0..ROUNDS {
        let engine = Engine::new();
        // Each round needs the name and the port that the one before has used.
        host.run(|| engine.set_interface("ovt-end", &config)).unwrap().unwrap();
        host.run(|| engine.add_tap("ovt-end-tap", 7)).unwrap().unwrap();
        engine.set_peer("ovt-end", public_key(&key(2)), &peer(2, at(&lab["h2"]))).unwrap();
        // A thread sets its name itself, after it was started.
        wait_until(PATIENCE, "the threads run", || threads_of("ovt-end").len() >= 4).unwrap();
        let before = Instant::now();
        drop(engine);
        ending += before.elapsed();
    }
    // Deleting the two devices takes the kernel most of this time.
    assert!(ending < ROUNDS * Duration::from_millis(500), "{ending:?} for {ROUNDS} engines");
    // A joined thread stays in /proc for a moment.
    wait_until(Duration::from_secs(1), "all threads are gone", || threads_of("ovt-end").is_empty()).unwrap();
    assert!(!host.exec(["ip", "link", "show", "ovt-end"]).unwrap().success());
}
