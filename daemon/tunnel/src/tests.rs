//! Tests of the engine over queues in memory: two engines, and everything that a network can do to their
//! datagrams.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ovl_udp::trial::Offload;

use crate::api::{FrameSource, InterfaceConfig, PeerConfig, PrivateKey, public_key};
use crate::checksum;
use crate::engine::Engine;
use crate::memory::{Datagram, MemoryHost, MemoryNetwork};
use crate::packet::{ETHERNET_HEADER, Gso, Ip, UDP, VnetHeader, put};
use crate::segments;

const PATIENCE: Duration = Duration::from_secs(30);
/// Long enough for a packet that must not arrive.
const NOT_ARRIVING: Duration = Duration::from_millis(50);
const DEVICE: &str = "ovt-0";

/// An engine on a host in memory.
struct Node {
    host: MemoryHost,
    engine: Engine<MemoryHost>,
    number: u8,
}

fn key(number: u8) -> PrivateKey {
    PrivateKey([number; 32])
}

fn endpoint(number: u8) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, number], 51940))
}

fn inner(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, number.into())
}

impl Node {
    fn new(network: &MemoryNetwork, number: u8) -> Self {
        let host = MemoryHost::new(network);
        let node = Self { engine: Engine::with_backend(host.clone()), host, number };
        node.start(DEVICE);
        node
    }

    fn config(&self) -> InterfaceConfig {
        let (listen, address) = (endpoint(self.number), inner(self.number));
        InterfaceConfig { key: key(self.number), listen, address, vxlan_port: 51942 }
    }

    fn start(&self, device: &str) {
        self.engine.set_interface(device, &self.config()).unwrap();
    }

    fn add_peer(&self, number: u8) {
        let allowed = vec![
            format!("10.9.{number}.0/24").parse().unwrap(),
            format!("{}/128", inner(number)).parse().unwrap(),
        ];
        let config = PeerConfig { endpoint: endpoint(number), allowed };
        self.engine.set_peer(DEVICE, public_key(&key(number)), &config).unwrap();
    }

    fn send(&self, packet: &[u8]) {
        self.host.inject(DEVICE, packet);
    }

    fn receive(&self) -> Vec<u8> {
        self.host.take(DEVICE, PATIENCE).expect("a packet")
    }

    fn receives_nothing(&self) -> bool {
        self.host.take(DEVICE, NOT_ARRIVING).is_none()
    }

    fn has_session(&self) -> bool {
        self.engine.state().interfaces[0].peers[0].last_handshake.is_some()
    }

    /// Begins another handshake with the peer, as its timer does after two minutes.
    fn rekey(&self, peer: u8) {
        let interface = self.engine.interface(DEVICE).unwrap();
        let peer = interface.peers().by_key(&public_key(&key(peer))).cloned().unwrap();
        interface.initiate_handshake(&peer, true);
    }
}

/// An IP packet with an experimental protocol (RFC 3692) around a payload.
fn packet(from: u8, to: u8, payload: &[u8]) -> Vec<u8> {
    packet_between(Ipv4Addr::new(10, 9, from, 1), Ipv4Addr::new(10, 9, to, 1), payload)
}

fn packet_between(from: Ipv4Addr, to: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; 20];
    packet.extend_from_slice(payload);
    let length = packet.len() as u16;
    put(&mut packet, 0, &[0x45]);
    put(&mut packet, 2, &length.to_be_bytes());
    put(&mut packet, 8, &[64, 253]);
    put(&mut packet, 12, &[from.octets(), to.octets()].concat());
    let sum = checksum::finish(checksum::add(0, &packet[..20]));
    put(&mut packet, 10, &sum.to_be_bytes());
    packet
}

fn packet_v6(from: u8, to: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; 40];
    packet.extend_from_slice(payload);
    put(&mut packet, 0, &[0x60]);
    put(&mut packet, 4, &(payload.len() as u16).to_be_bytes());
    put(&mut packet, 6, &[253, 64]);
    put(&mut packet, 8, &[inner(from).octets(), inner(to).octets()].concat());
    packet
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < until, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Two engines that are peers and have a session.
fn pair() -> (MemoryNetwork, Node, Node) {
    let network = MemoryNetwork::default();
    let (a, b) = (Node::new(&network, 1), Node::new(&network, 2));
    a.add_peer(2);
    b.add_peer(1);
    a.send(&packet(1, 2, b"first"));
    assert!(b.receive().ends_with(b"first"));
    b.send(&packet(2, 1, b"second"));
    assert!(a.receive().ends_with(b"second"));
    (network, a, b)
}

/// The names of this process's threads that serve a device.
fn threads_of(device: &str) -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
    names.filter(|name| name.starts_with(device)).collect()
}

#[test]
fn packets_of_both_families_cross_in_both_directions() {
    let (_network, a, b) = pair();
    for length in [0, 1, 15, 16, 17, 1000, 1380] {
        let payload: Vec<u8> = (0..length).map(|n| (n % 251) as u8).collect();
        for (from, to) in [(&a, &b), (&b, &a)] {
            for packet in
                [packet(from.number, to.number, &payload), packet_v6(from.number, to.number, &payload)]
            {
                from.send(&packet);
                let received = to.receive();
                // Padding is cut off by the length in the header.
                let end = Ip::parse(&received).unwrap().end;
                assert!(received[..end] == packet, "{length} bytes");
            }
        }
    }
    assert!(a.has_session() && b.has_session());
    let (state_a, state_b) = (a.engine.state(), b.engine.state());
    assert_eq!((state_a.drops.spoofed, state_a.drops.no_peer), (0, 0));
    assert_eq!((state_b.drops.spoofed, state_b.drops.no_peer), (0, 0));
    assert_eq!(state_b.interfaces[0].peers[0].endpoint, endpoint(1));
}

#[test]
fn a_handshake_needs_the_keys_of_both_sides() {
    let network = MemoryNetwork::default();
    let (a, b) = (Node::new(&network, 1), Node::new(&network, 2));
    // `b` does not know `a`.
    a.add_peer(2);
    a.send(&packet(1, 2, b"waits"));
    wait_until("the initiation is dropped", || b.engine.state().drops.unauthenticated > 0);
    assert!(!a.has_session());
    // Then it does, and the packet that has waited arrives.
    b.add_peer(1);
    assert!(b.receive().ends_with(b"waits"));
    wait_until("both have a session", || a.has_session() && b.has_session());
}

#[test]
fn rekeying_under_load_loses_and_repeats_no_packet() {
    const COUNT: u32 = 3_000;
    /// Packets in flight at the same time.
    const WINDOW: u32 = 64;
    let (network, a, b) = pair();
    let handshakes = Arc::new(Mutex::new(0));
    let seen = Arc::clone(&handshakes);
    network.set_filter(move |datagram| {
        *seen.lock().unwrap() += u32::from(datagram.bytes[0] == 2);
        true
    });
    let mut times_received = vec![0_u32; COUNT as usize];
    let (mut sent, mut received) = (0, 0);
    while received < COUNT {
        while sent < COUNT && sent < received + WINDOW {
            a.send(&packet(1, 2, &sent.to_be_bytes()));
            sent += 1;
            // From both sides in turn.
            match sent % 500 {
                100 => a.rekey(2),
                350 => b.rekey(1),
                _ => {}
            }
        }
        let packet = b.receive();
        let number = u32::from_be_bytes(packet[20..24].try_into().unwrap());
        times_received[number as usize] += 1;
        received += 1;
    }
    let wrong: Vec<_> = times_received.iter().enumerate().filter(|(_, times)| **times != 1).collect();
    assert!(wrong.is_empty(), "not exactly once: {wrong:?}");
    let responses = *handshakes.lock().unwrap();
    assert!(responses >= 4, "{responses} handshakes");
    assert!(b.receives_nothing());
}

/// Catches the next data message from `a` to `b` instead of delivering it.
fn catch(network: &MemoryNetwork, a: &Node, packet: &[u8]) -> Datagram {
    let caught = Arc::new(Mutex::new(None));
    let place = Arc::clone(&caught);
    network.set_filter(move |datagram| {
        // A keepalive has 32 bytes, and a datagram of a trial is longer than any packet of these tests.
        let length = datagram.bytes.len();
        let is_data = datagram.bytes[0] == 4
            && length > 32
            && length < segments::LENGTH
            && datagram.from == endpoint(1);
        if is_data {
            place.lock().unwrap().get_or_insert_with(|| datagram.clone());
        }
        !is_data
    });
    a.send(packet);
    wait_until("the datagram is sent", || caught.lock().unwrap().is_some());
    network.remove_filter();
    caught.lock().unwrap().take().unwrap()
}

#[test]
fn replayed_truncated_and_changed_datagrams_are_dropped() {
    let (network, a, b) = pair();
    let good = packet(1, 2, b"only once");
    let datagram = catch(&network, &a, &good);
    let before = b.engine.state().drops.unauthenticated;
    let mut bad = 0;
    let mut deliver = |bytes: Vec<u8>| {
        network.deliver(Datagram { bytes, ..datagram.clone() });
        bad += 1;
    };
    // The empty datagram has no part to look at.
    for length in 1..datagram.bytes.len() {
        deliver(datagram.bytes[..length].to_vec());
    }
    for byte in 0..datagram.bytes.len() {
        let mut bytes = datagram.bytes.clone();
        bytes[byte] ^= 1 << (byte % 8);
        deliver(bytes);
    }
    deliver([&datagram.bytes[..], &[0]].concat());
    wait_until("all bad datagrams are dropped", || b.engine.state().drops.unauthenticated == before + bad);
    assert!(b.receives_nothing());
    // The original is valid until it was received once.
    network.deliver(datagram.clone());
    assert_eq!(b.receive()[..good.len()], good);
    network.deliver(datagram.clone());
    wait_until("the replay is dropped", || b.engine.state().drops.unauthenticated == before + bad + 1);
    assert!(b.receives_nothing());
    assert_eq!(b.engine.state().drops.spoofed, 0);
}

#[test]
fn a_peer_that_restarts_with_its_clock_set_back_gets_a_handshake_at_once() {
    let network = MemoryNetwork::default();
    // What the peer sends with the earlier clock. Nothing listens at the other address yet.
    let caught: Arc<Mutex<Option<Datagram>>> = Arc::default();
    let place = Arc::clone(&caught);
    network.set_filter(move |datagram| {
        if datagram.bytes[0] == 1 {
            place.lock().unwrap().get_or_insert_with(|| datagram.clone());
        }
        true
    });
    let earlier = Node::new(&network, 1);
    earlier.add_peer(2);
    wait_until("an initiation is sent", || caught.lock().unwrap().is_some());
    drop(earlier);
    let initiation = caught.lock().unwrap().take().unwrap();
    // With the later clock both have a session, and `b` knows a later timestamp.
    let (a, b) = (Node::new(&network, 1), Node::new(&network, 2));
    a.add_peer(2);
    b.add_peer(1);
    a.send(&packet(1, 2, b"first"));
    assert!(b.receive().ends_with(b"first"));
    let counts: Arc<Mutex<(u32, u32)>> = Arc::default();
    let of_b = Arc::clone(&counts);
    network.set_filter(move |datagram| {
        if datagram.from == endpoint(2) {
            let (initiations, responses) = &mut *of_b.lock().unwrap();
            *initiations += u32::from(datagram.bytes[0] == 1);
            *responses += u32::from(datagram.bytes[0] == 2);
        }
        true
    });
    a.rekey(2);
    wait_until("a response", || counts.lock().unwrap().1 > 0);
    let start = Instant::now();
    network.deliver(initiation.clone());
    wait_until("a handshake in the other direction", || counts.lock().unwrap().0 > 0);
    // Its timers begin one after 15 s at the earliest.
    assert!(start.elapsed() < Duration::from_secs(10));
    // Once in a while only, however often it is repeated.
    let begun = counts.lock().unwrap().0;
    (0..50).for_each(|_| network.deliver(initiation.clone()));
    a.send(&packet(1, 2, b"second"));
    assert!(b.receive().ends_with(b"second"));
    assert!(counts.lock().unwrap().0 <= begun + 1 + u32::try_from(start.elapsed().as_secs()).unwrap());
}

#[test]
fn reordered_datagrams_are_accepted() {
    let (network, a, b) = pair();
    let mut caught: Vec<Datagram> = (0..100).map(|n| catch(&network, &a, &packet(1, 2, &[n]))).collect();
    caught.reverse();
    caught.into_iter().for_each(|datagram| network.deliver(datagram));
    let mut numbers: Vec<u8> = (0..100).map(|_| b.receive()[20]).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..100).collect::<Vec<u8>>());
}

#[test]
fn a_peer_may_send_from_its_allowed_ips_alone() {
    let (_network, a, b) = pair();
    let to = Ipv4Addr::new(10, 9, 2, 1);
    for from in [[10, 9, 2, 1], [10, 9, 3, 1], [127, 0, 0, 1]] {
        a.send(&packet_between(from.into(), to, b"forged"));
    }
    wait_until("the forged packets are dropped", || b.engine.state().drops.spoofed == 3);
    a.send(&packet_between([10, 9, 1, 77].into(), to, b"allowed"));
    assert!(b.receive().ends_with(b"allowed"));
    // No peer has the destination.
    a.send(&packet(1, 7, b"nowhere"));
    wait_until("the packet is dropped", || a.engine.state().drops.no_peer == 1);
}

#[test]
fn a_socket_that_stands_in_for_a_peer_is_taken_and_left_by_configuration_alone() {
    let (network, a, b) = pair();
    a.send(&packet(1, 2, b"directly"));
    assert!(b.receive().ends_with(b"directly"));
    let at_b = || b.engine.state().interfaces[0].peers[0].endpoint;
    // What `a` sends comes out of a socket of the host of `b`, at its address.
    let detour = SocketAddr::new(endpoint(2).ip(), 40_000);
    let datagram = catch(&network, &a, &packet(1, 2, b"on the detour"));
    network.deliver(Datagram { from: detour, ..datagram });
    assert!(b.receive().ends_with(b"on the detour"));
    assert_eq!(at_b(), endpoint(1), "it is not configured");
    let allowed = b.engine.state().interfaces[0].peers[0].config.allowed.clone();
    b.engine.set_peer(DEVICE, public_key(&key(1)), &PeerConfig { endpoint: detour, allowed }).unwrap();
    network.remove_filter();
    a.send(&packet(1, 2, b"directly again"));
    assert!(b.receive().ends_with(b"directly again"));
    assert_eq!(at_b(), detour, "it is still configured");
}

#[test]
fn a_new_port_and_a_new_key_need_no_new_device() {
    let (_network, a, b) = pair();
    let listen = SocketAddr::from(([192, 0, 2, 1], 51945));
    a.engine.set_interface(DEVICE, &InterfaceConfig { listen, ..a.config() }).unwrap();
    a.send(&packet(1, 2, b"from the new port"));
    assert!(b.receive().ends_with(b"from the new port"));
    wait_until("the peer follows", || b.engine.state().interfaces[0].peers[0].endpoint == listen);
    b.send(&packet(2, 1, b"to the new port"));
    assert!(a.receive().ends_with(b"to the new port"));
    // The old sockets are closed.
    let other = Engine::with_backend(a.host.clone());
    other.set_interface("ovt-1", &a.config()).unwrap();
    // With a new key the old session is worth nothing.
    a.engine.set_interface(DEVICE, &InterfaceConfig { listen, key: key(5), ..a.config() }).unwrap();
    assert!(!a.has_session());
    b.engine.delete_peer(DEVICE, public_key(&key(1)));
    let config = PeerConfig { endpoint: listen, allowed: vec!["10.9.1.0/24".parse().unwrap()] };
    b.engine.set_peer(DEVICE, public_key(&key(5)), &config).unwrap();
    b.send(&packet(2, 1, b"with the new key"));
    assert!(a.receive().ends_with(b"with the new key"));
}

#[test]
fn a_deleted_device_is_created_anew_with_its_peers() {
    let (_network, a, b) = pair();
    a.host.delete_device(DEVICE);
    wait_until("the loss is noticed", || a.engine.state().interfaces.is_empty());
    a.start(DEVICE);
    a.send(&packet(1, 2, b"again"));
    assert!(b.receive().ends_with(b"again"));
}

/// A broadcast frame with an IPv4 packet.
fn frame(from: u8, source: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, from, 8, 0]);
    frame.extend(packet_between(source.into(), [10, 8, 0, 255].into(), b"frame"));
    frame
}

#[test]
fn frames_cross_and_spoofed_frames_are_dropped() {
    let (_network, a, b) = pair();
    for (node, other) in [(&a, 2), (&b, 1)] {
        node.engine.add_tap("ovx-t", 7).unwrap();
        node.engine.set_path(inner(other), DEVICE).unwrap();
        node.engine.add_flood("ovx-t", inner(other)).unwrap();
        let addresses = vec![Ipv4Addr::new(10, 8, 0, other).into()];
        let source = FrameSource { from: vec![inner(other)], addresses };
        node.engine.set_source("ovx-t", [2, 0, 0, 0, 0, other], source).unwrap();
    }
    let error = a.engine.add_tap("ovx-u", 7).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists);
    for (from, to) in [(&a, &b), (&b, &a)] {
        let sent = frame(from.number, [10, 8, 0, from.number]);
        from.host.inject("ovx-t", &sent);
        assert_eq!(to.host.take("ovx-t", PATIENCE), Some(sent));
    }
    // Another MAC address, and another IP address.
    a.host.inject("ovx-t", &frame(9, [10, 8, 0, 1]));
    a.host.inject("ovx-t", &frame(1, [10, 8, 0, 9]));
    wait_until("the spoofed frames are dropped", || b.engine.state().drops.spoofed == 2);
    // A truncated frame goes nowhere.
    a.host.inject("ovx-t", &[0xff; ETHERNET_HEADER - 3]);
    wait_until("the short frame is dropped", || a.engine.state().drops.no_peer == 1);
    // Deleting the network frees the device and the identifier at once.
    b.engine.delete_tap("ovx-t");
    assert!(b.engine.state().taps.is_empty() && !b.host.has_device("ovx-t"));
    b.engine.add_tap("ovx-u", 7).unwrap();
}

/// Sends two UDP datagrams of equal length from `a` to `b` as one packet, which the engine cuts.
fn send_uncut(a: &Node) {
    const PAYLOAD: u16 = 500;
    let mut packet = packet(1, 2, &[7; 8 + 2 * PAYLOAD as usize]);
    put(&mut packet, 9, &[UDP]);
    put(&mut packet, 24, &(8 + 2 * PAYLOAD).to_be_bytes());
    let header = VnetHeader {
        needs_checksum: true,
        gso: Gso::Udp,
        header_length: 28,
        gso_size: PAYLOAD,
        checksum_start: 20,
        checksum_offset: 6,
    };
    a.host.inject_with(DEVICE, header, &packet);
}

#[test]
fn datagrams_are_not_divided_while_that_damages_them_on_the_way_to_a_peer() {
    let (network, a, b) = pair();
    let verdict = |node: &Node| node.engine.state().interfaces[0].peers[0].segments;
    wait_until("the trial of both", || [&a, &b].iter().all(|node| verdict(node) == Offload::Works));
    send_uncut(&a);
    assert_eq!([b.receive().len(), b.receive().len()], [528; 2]);

    let divided = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&divided);
    network.set_filter(move |datagram| {
        let is_damaged = datagram.from == endpoint(1) && datagram.is_divided;
        if is_damaged && datagram.bytes.len() < segments::LENGTH {
            seen.fetch_add(1, Ordering::SeqCst);
        }
        !is_damaged
    });
    wait_until("the damage to be seen", || verdict(&a) == Offload::Damages);
    let before = divided.load(Ordering::SeqCst);
    send_uncut(&a);
    assert_eq!([b.receive().len(), b.receive().len()], [528; 2]);
    assert_eq!(divided.load(Ordering::SeqCst), before, "divided datagrams");
    assert_eq!(verdict(&b), Offload::Works, "the other direction");

    network.remove_filter();
    wait_until("its end to be seen", || verdict(&a) == Offload::Works);
}

#[test]
fn a_dropped_interface_leaves_no_thread_no_device_and_no_socket() {
    let network = MemoryNetwork::default();
    let node = Node::new(&network, 1);
    node.engine.delete_interface(DEVICE);
    for round in 0..50 {
        node.start("ovt-mem");
        // A thread sets its name itself, after it was started.
        wait_until("the threads run", || !threads_of("ovt-mem").is_empty());
        let before = Instant::now();
        if round % 2 == 0 {
            node.engine.delete_interface("ovt-mem");
        } else {
            // The next round opens the same device and the same address.
            let other = Engine::with_backend(node.host.clone());
            node.engine.delete_interface("ovt-mem");
            other.set_interface("ovt-mem", &node.config()).unwrap();
            drop(other);
        }
        assert!(before.elapsed() < Duration::from_secs(2), "{:?}", before.elapsed());
        assert!(!node.host.has_device("ovt-mem"));
    }
    // A joined thread stays in /proc for a moment.
    wait_until("all threads are gone", || threads_of("ovt-mem").is_empty());
}
