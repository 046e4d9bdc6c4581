//! WireGuard devices of the kernel: against the fake, and against the real kernel if it has WireGuard.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use netlink_packet_wireguard::WireguardTimeSpec;
use ovl_dataplane::device::Device;
use ovl_dataplane::diff::diff;
use ovl_dataplane::op::{LinkOp, Op, WireguardOp};
use ovl_dataplane::state::{Dataplane, Link, Source, Tunnel, TunnelKind, TunnelPeer};
use ovl_proto::id::TunnelKey;
use proptest::prelude::*;

use super::fake::{self, Fake, State, public_of};
use super::lab::{Container, Lab, in_namespace, ip, mac, net, run};
use crate::KernelError;
use crate::socket::Batch;
use crate::sources::{Change, Sources};
use crate::wireguard::Wireguard;

const FAMILY: u16 = 0x1e;

fn device() -> Device {
    Device::tunnel(false)
}

fn start(cut: usize) -> (Fake, Wireguard) {
    let mut state = State { family: Some(FAMILY), cut, ..State::default() };
    for second in [false, true] {
        let index = 5 + u32::from(second);
        let device = fake::Device { index, up: true, ..fake::Device::default() };
        state.devices.insert(Device::tunnel(second).to_string(), device);
    }
    let (fake, netlink) = Fake::start(state);
    (fake, Wireguard::over(netlink))
}

fn end(fake: Fake, wireguard: Wireguard) {
    drop(wireguard);
    fake.end();
}

fn peer(endpoint: &str, allowed: &[&str]) -> TunnelPeer {
    TunnelPeer {
        endpoint: endpoint.parse().expect(endpoint),
        allowed: allowed.iter().map(|text| net(text)).collect(),
    }
}

fn key(n: u8) -> TunnelKey {
    TunnelKey([n; 32])
}

/// Applies an operation as the worker does.
fn apply(wireguard: &mut Wireguard, secrets: &BTreeMap<TunnelKey, [u8; 32]>, op: &Op) {
    match op {
        Op::Wireguard(WireguardOp::SetInterface(device, Tunnel { key, port, .. })) => {
            wireguard.set(*device, &secrets[key], *port)
        }
        Op::Wireguard(WireguardOp::SetPeer(device, key, peer)) => wireguard.set_peer(*device, *key, peer),
        Op::Wireguard(WireguardOp::DeletePeer(device, key)) => wireguard.delete_peer(*device, *key),
        other => panic!("{other}"),
    }
    .unwrap_or_else(|error| panic!("{op}: {error}"));
}

fn dump(wireguard: &mut Wireguard, devices: &[Device]) -> Dataplane {
    let mut kernel = Dataplane::default();
    for device in devices {
        let (tunnel, peers) = wireguard.dump(*device).expect("dump");
        kernel.tunnels.insert(*device, tunnel);
        kernel.tunnel_peers.extend(peers.into_iter().map(|(key, peer)| ((*device, key), peer)));
    }
    kernel
}

/// Applies the plan to the desired state, and asserts that the plan is empty afterwards.
fn settle(wireguard: &mut Wireguard, secrets: &BTreeMap<TunnelKey, [u8; 32]>, desired: &Dataplane) {
    let devices: Vec<Device> = desired.tunnels.keys().copied().collect();
    for op in diff(&dump(wireguard, &devices), desired, true) {
        apply(wireguard, secrets, &op);
    }
    let actual = dump(wireguard, &devices);
    assert_eq!(&actual, desired);
    assert_eq!(diff(&actual, desired, true), []);
}

#[test]
fn device_has_the_configured_key_port_and_peers() {
    let (fake, mut wireguard) = start(8192);
    assert!(wireguard.is_there().expect("answer"));
    let (tunnel, peers) = wireguard.dump(device()).expect("dump");
    assert_eq!((tunnel, peers.len()), (Tunnel { key: TunnelKey([0; 32]), port: 0, local: None }, 0));

    let secret = [7; 32];
    wireguard.set(device(), &secret, 51940).expect("set");
    let there = peer("192.0.2.2:51940", &["fd00::2/128", "10.1.2.0/24"]);
    wireguard.set_peer(device(), key(2), &there).expect("peer");
    wireguard.set_peer(device(), key(3), &peer("[2001:db8::3]:7", &["fd00::3/128"])).expect("peer");
    let (tunnel, peers) = wireguard.dump(device()).expect("dump");
    assert_eq!(tunnel, Tunnel { key: TunnelKey(public_of(secret)), port: 51940, local: None });
    assert_eq!(peers[&key(2)], there);
    assert_eq!(peers[&key(3)], peer("[2001:db8::3]:7", &["fd00::3/128"]));
    assert_eq!(wireguard.dump(Device::tunnel(true)).expect("dump").1.len(), 0, "the other is another");

    // A new key keeps the peers.
    wireguard.set(device(), &[8; 32], 51940).expect("set");
    assert_eq!(wireguard.dump(device()).expect("dump").1, peers);

    wireguard.delete_peer(device(), key(2)).expect("deleted");
    wireguard.delete_peer(device(), key(2)).expect("an absent object is no error");
    assert_eq!(wireguard.dump(device()).expect("dump").1.keys().collect::<Vec<_>>(), [&key(3)]);
    assert_eq!(fake.state().devices["ovt-0"].private, Some([8; 32]));
    end(fake, wireguard);
}

#[test]
fn allowed_address_belongs_to_one_peer() {
    let (fake, mut wireguard) = start(8192);
    wireguard
        .set_peer(device(), key(1), &peer("192.0.2.1:1", &["10.0.0.0/24", "10.0.1.0/24"]))
        .expect("peer");
    wireguard.set_peer(device(), key(2), &peer("192.0.2.2:1", &["10.0.1.0/24"])).expect("peer");
    let (_, peers) = wireguard.dump(device()).expect("dump");
    assert_eq!(peers[&key(1)].allowed, [net("10.0.0.0/24")].into());
    assert_eq!(peers[&key(2)].allowed, [net("10.0.1.0/24")].into());
    // All addresses are replaced, also by none.
    wireguard.set_peer(device(), key(1), &peer("192.0.2.1:1", &[])).expect("peer");
    assert_eq!(wireguard.dump(device()).expect("dump").1[&key(1)].allowed, [].into());
    end(fake, wireguard);
}

#[test]
fn long_lists_are_split_into_messages_in_both_directions() {
    let (fake, mut wireguard) = start(3000);
    let allowed: BTreeSet<IpNet> = (0..2500u32)
        .map(|n| {
            let address = if n % 2 == 0 {
                IpAddr::from((0x0a00_0000 + n).to_be_bytes())
            } else {
                IpAddr::from((0xfd00_u128 << 112 | u128::from(n)).to_be_bytes())
            };
            address.into()
        })
        .collect();
    let long = TunnelPeer { endpoint: "192.0.2.2:1".parse().expect("endpoint"), allowed };
    wireguard.set_peer(device(), key(200), &long).expect("peer");
    assert_eq!(fake.state().changes, 5);
    for n in 0..100 {
        wireguard.set_peer(device(), key(n), &peer("[2001:db8::1]:1", &["fd01::/64"])).expect("peer");
    }
    let (_, peers) = wireguard.dump(device()).expect("dump");
    assert_eq!(peers.len(), 101);
    assert_eq!(peers[&key(200)], long);
    assert_eq!(peers[&key(99)].allowed, [net("fd01::/64")].into(), "the last peer that got it");
    assert!(fake.state().dumped > 20, "{}", fake.state().dumped);
    end(fake, wireguard);
}

#[test]
fn interrupted_dump_is_repeated() {
    let (fake, mut wireguard) = start(600);
    for n in 0..20 {
        wireguard.set_peer(device(), key(n), &peer("192.0.2.1:1", &[])).expect("peer");
    }
    fake.state().disturb = 2;
    assert_eq!(wireguard.dump(device()).expect("dump").1.len(), 20);
    assert_eq!(fake.state().disturb, 0);
    end(fake, wireguard);
}

#[test]
fn settings_by_others_are_noticed_and_undone() {
    let (fake, mut wireguard) = start(8192);
    let secrets = BTreeMap::from([(TunnelKey(public_of([1; 32])), [1; 32])]);
    let mut desired = Dataplane::default();
    desired.tunnels.insert(device(), Tunnel { key: TunnelKey(public_of([1; 32])), port: 51940, local: None });
    desired.tunnel_peers.insert((device(), key(2)), peer("192.0.2.2:1", &["10.0.2.0/24"]));
    desired.tunnel_peers.insert((device(), key(3)), peer("192.0.2.3:1", &["10.0.3.0/24"]));
    settle(&mut wireguard, &secrets, &desired);
    type Disturb = fn(&mut fake::Device);
    let disturb: [(&str, Disturb); 9] = [
        ("private key", |device| device.private = Some([9; 32])),
        ("no private key", |device| device.private = None),
        ("port", |device| device.port = 7),
        ("mark", |device| device.mark = 7),
        ("preshared key", |device| device.peers[0].preshared = [1; 32]),
        ("keepalive", |device| device.peers[0].keepalive = 0),
        ("endpoint", |device| device.peers[0].endpoint = Some("192.0.2.99:1".parse().expect("endpoint"))),
        ("allowed", |device| device.peers[1].allowed.push(net("0.0.0.0/0"))),
        ("peer", |device| device.peers.push(fake::Peer { key: [77; 32], ..fake::Peer::default() })),
    ];
    for (what, disturb) in disturb {
        disturb(fake.state().devices.get_mut("ovt-0").expect("device"));
        assert_ne!(dump(&mut wireguard, &[device()]), desired, "{what}");
        settle(&mut wireguard, &secrets, &desired);
        assert_eq!(fake.state().devices["ovt-0"].mark, 0);
        assert!(fake.state().devices["ovt-0"].peers.iter().all(|peer| peer.preshared == [0; 32]));
    }
    end(fake, wireguard);
}

#[test]
fn status_has_endpoint_handshake_and_counters() {
    let (fake, mut wireguard) = start(8192);
    wireguard.set_peer(device(), key(1), &peer("192.0.2.1:1", &[])).expect("peer");
    wireguard.set_peer(device(), key(2), &peer("192.0.2.2:1", &[])).expect("peer");
    let endpoint: SocketAddr = "[2001:db8::99]:4000".parse().expect("endpoint");
    let at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("after 1970")
        - Duration::from_secs(60);
    {
        let mut state = fake.state();
        let peer = state.devices.get_mut("ovt-0").expect("device").peer([2; 32]);
        peer.endpoint = Some(endpoint);
        peer.handshake =
            WireguardTimeSpec { seconds: at.as_secs() as i64, nano_seconds: at.subsec_nanos().into() };
        (peer.received, peer.sent) = (1 << 40, 77);
    }
    let status = wireguard.status(device()).expect("status");
    let (one, two) = (status[&key(1)], status[&key(2)]);
    assert_eq!((one.endpoint, one.last_handshake), (Some("192.0.2.1:1".parse().expect("endpoint")), None));
    assert_eq!((two.endpoint, two.received, two.sent), (Some(endpoint), 1 << 40, 77));
    let since = two.last_handshake.expect("a handshake");
    assert!((60..120).contains(&since.as_secs()), "{since:?}");
    end(fake, wireguard);
}

#[test]
fn errors_say_what_to_do() {
    let (fake, mut wireguard) = start(8192);
    fake.state().taken = vec![51940];
    let error = wireguard.set(device(), &[1; 32], 51940).expect_err("taken").to_string();
    assert!(error.contains("UDP port 51940") && error.contains("ss -ulnp"), "{error}");
    // Port 0 lets the kernel choose.
    wireguard.set(device(), &[1; 32], 1).expect("set");
    wireguard.set(device(), &[1; 32], 0).expect("set");
    assert_ne!(wireguard.dump(device()).expect("dump").0.port, 0);

    let gone = Device::new("ovt-9").expect("name");
    let none = Err(KernelError::NoDevice(gone));
    assert_eq!(wireguard.set(gone, &[1; 32], 1), none);
    assert_eq!(wireguard.set_peer(gone, key(1), &peer("192.0.2.1:1", &[])), none);
    assert_eq!(wireguard.dump(gone).map(drop), none);
    wireguard.delete_peer(gone, key(1)).expect("an absent object is no error");

    // Another message type of the family, as after the module was loaded again.
    fake.state().family = Some(FAMILY + 1);
    wireguard.set(device(), &[1; 32], 1).expect("set");
    fake.state().family = None;
    assert!(!wireguard.is_there().expect("answer"));
    let error = wireguard.set(device(), &[1; 32], 1).expect_err("no WireGuard").to_string();
    assert!(error.contains("no WireGuard") && error.contains("userspace"), "{error}");
    wireguard.delete_peer(device(), key(1)).expect("an absent object is no error");
    end(fake, wireguard);
}

#[test]
fn peer_with_the_devices_own_key_is_skipped() {
    let (fake, mut wireguard) = start(8192);
    wireguard.set_peer(device(), TunnelKey(public_of([1; 32])), &peer("192.0.2.1:1", &[])).expect("peer");
    wireguard.set(device(), &[1; 32], 1).expect("set");
    assert_eq!(wireguard.dump(device()).expect("dump").1.len(), 0, "dropped with the key");
    wireguard.set_peer(device(), TunnelKey(public_of([1; 32])), &peer("192.0.2.1:1", &[])).expect("peer");
    assert_eq!(wireguard.dump(device()).expect("dump").1.len(), 0, "never added");
    end(fake, wireguard);
}

#[test]
fn debug_output_has_no_private_key() {
    let (fake, mut wireguard) = start(8192);
    let secret = [0xa7; 32];
    wireguard.set(device(), &secret, 51940).expect("set");
    wireguard.dump(device()).expect("dump");
    // The last received dump contains it.
    let shown = format!("{wireguard:?}");
    assert!(!shown.contains("167, 167") && !shown.contains("a7a7"), "{shown}");
    let mut batch = Batch::default();
    batch.push_built(FAMILY, 0, &secret);
    assert!(!format!("{batch:?}").contains("167, 167"));
    end(fake, wireguard);
}

/// Two tunnel devices whose peers share a few keys and addresses, so that addresses move between peers. Each address
/// belongs to one peer.
fn world() -> impl Strategy<Value = Dataplane> {
    let peer = (0u8..6, any::<bool>(), 1u16..4, any::<bool>());
    let peers = proptest::collection::vec(peer, 0..8);
    let owners = proptest::collection::vec(proptest::option::of((any::<bool>(), 0u8..6)), 12);
    (any::<[bool; 2]>(), 51940u16..51943, peers, owners).prop_map(|(keys, port, peers, owners)| {
        let mut kernel = Dataplane::default();
        for (second, other) in [false, true].into_iter().zip(keys) {
            let key = TunnelKey(public_of([100 + 2 * u8::from(second) + u8::from(other); 32]));
            kernel.tunnels.insert(
                Device::tunnel(second),
                Tunnel { key, port: port + 1000 * u16::from(second), local: None },
            );
        }
        for (n, second, port, is_v6) in peers {
            let host = if is_v6 { ip("2001:db8::2") } else { ip("192.0.2.2") };
            let peer = TunnelPeer { endpoint: (host, port).into(), allowed: BTreeSet::new() };
            kernel.tunnel_peers.insert((Device::tunnel(second), key(n)), peer);
        }
        for (i, owner) in owners.into_iter().enumerate() {
            let address = if i % 2 == 0 { format!("10.0.{i}.0/24") } else { format!("fd00::{i}/128") };
            if let Some((second, n)) = owner
                && let Some(peer) = kernel.tunnel_peers.get_mut(&(Device::tunnel(second), key(n)))
            {
                peer.allowed.insert(net(&address));
            }
        }
        kernel
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// The kernel reaches each desired state from the one before.
    #[test]
    fn kernel_reaches_the_desired_state(worlds in proptest::collection::vec(world(), 1..6), cut in 200usize..2000) {
        let (fake, mut wireguard) = start(cut);
        let secrets = (100..104).map(|n| (TunnelKey(public_of([n; 32])), [n; 32])).collect();
        for world in &worlds {
            settle(&mut wireguard, &secrets, world);
        }
        end(fake, wireguard);
    }
}

/// Whether the kernel of this machine has WireGuard. Prints a notice if not.
fn has_wireguard() -> bool {
    let there = Wireguard::open().and_then(|mut wireguard| wireguard.is_there()).expect("probe");
    if !there {
        // Not through the capture of the test runner: a skipped test must be visible.
        let _ = std::io::Write::write_all(
            &mut std::io::stderr(),
            b"\n*** SKIPPED: this kernel has no WireGuard; the virtual machines run this test ***\n",
        );
    }
    there
}

fn tunnel_link(mtu: u16) -> Link {
    Link::Tunnel { kind: TunnelKind::Kernel, mtu, up: true }
}

/// The probe is correct on any kernel: if it returns false, no device can be created, and the error says why.
#[test]
fn wireguard_probe_agrees_with_the_kernel() {
    in_namespace(async || {
        let lab = Lab::start();
        let there = Wireguard::open().and_then(|mut wireguard| wireguard.is_there()).expect("probe");
        let outcome =
            lab.kernel.apply(vec![Op::Link(LinkOp::Add(device(), tunnel_link(1420)))]).await.remove(0);
        match outcome.result {
            Ok(()) => assert!(there),
            Err(error) => {
                assert!(!there, "{error}");
                assert!(error.to_string().contains("no WireGuard"), "{error}");
            }
        }
        assert_eq!(run("ip -o link").contains("ovt-0"), there);
    });
}

/// As against the fake, and `wg` shows the same if it is installed.
#[test]
fn real_kernel_reaches_the_desired_state() {
    in_namespace(async || {
        if !has_wireguard() {
            return;
        }
        let lab = Lab::start();
        let devices = [Device::tunnel(false), Device::tunnel(true)];
        let mut links = Dataplane::default();
        for device in devices {
            links.links.insert(device, tunnel_link(1420));
        }
        let actual = lab.dump().await;
        for op in diff(&actual, &links, false) {
            let outcome = lab.kernel.apply(vec![op]).await.remove(0);
            outcome.result.unwrap_or_else(|error| panic!("{}: {error}", outcome.op));
        }
        let found = lab.dump().await;
        assert_eq!(found.links, links.links);
        assert!(!run("ip -6 addr show dev ovt-0").contains("fe80"), "a link-local address");
        let change = Op::Link(LinkOp::Set(device(), tunnel_link(1420), tunnel_link(1380)));
        lab.kernel.apply(vec![change]).await.remove(0).result.expect("MTU");
        assert_eq!(lab.dump().await.links[&device()], tunnel_link(1380));

        let mut wireguard = Wireguard::open().expect("socket");
        let secrets: BTreeMap<_, _> = (100..104).map(|n| (TunnelKey(public_of([n; 32])), [n; 32])).collect();
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        for _ in 0..30 {
            let world = proptest::strategy::Strategy::new_tree(&world(), &mut runner).expect("world");
            let world = proptest::strategy::ValueTree::current(&world);
            settle(&mut wireguard, &secrets, &world);
            assert_wg_agrees(&world);
        }
        // More than one message, and more than one datagram in reply.
        let mut world = dump(&mut wireguard, &devices);
        world.tunnel_peers.clear();
        for n in 0..1500u16 {
            let [a, b] = n.to_be_bytes();
            let mut its = [3; 32];
            its[..2].copy_from_slice(&[a, b]);
            let peer = peer("192.0.2.2:1", &[&format!("10.{a}.{b}.0/24"), &format!("fd00::{n:x}/128")]);
            world.tunnel_peers.insert((device(), TunnelKey(its)), peer);
        }
        let long = (0..2000u32).map(|n| IpAddr::from((0x0b00_0000 + n).to_be_bytes()).into()).collect();
        let long = TunnelPeer { endpoint: "[2001:db8::2]:1".parse().expect("endpoint"), allowed: long };
        world.tunnel_peers.insert((device(), key(9)), long);
        let start = std::time::Instant::now();
        settle(&mut wireguard, &secrets, &world);
        println!("1,501 peers set, and dumped twice: {:?}", start.elapsed());
        assert_wg_agrees(&world);
        assert_eq!(wireguard.status(device()).expect("status").len(), 1501);
        let doomed = devices.map(|device| Op::Link(LinkOp::Delete(device))).to_vec();
        lab.kernel.apply(doomed).await.into_iter().for_each(|outcome| outcome.result.expect("deleted"));
        assert_eq!(wireguard.dump(device()).map(drop), Err(KernelError::NoDevice(device())));
    });
}

/// Packets pass between the devices of two hosts, until the peer is deleted.
#[test]
fn packets_pass_through_real_wireguard_devices() {
    in_namespace(async || {
        if !has_wireguard() {
            return;
        }
        let lab = Lab::start();
        let mut wireguard = Wireguard::open().expect("socket");
        let far = Container::new();
        run(&format!("ip link set up1 netns {}", far.path()));
        far.run("ip link set lo up; ip link set up1 up; ip addr add 192.0.2.2/24 dev up1");
        let keys = [[1; 32], [2; 32]].map(|secret| TunnelKey(public_of(secret)));
        let op = Op::Link(LinkOp::Add(device(), tunnel_link(1420)));
        lab.kernel.apply(vec![op]).await.remove(0).result.expect("link");
        wireguard.set(device(), &[1; 32], 51940).expect("set");
        wireguard.set_peer(device(), keys[1], &peer("192.0.2.2:51950", &["fd00::2/128"])).expect("peer");
        // The socket of a device stays in the namespace where it was created, so the remote device is created there.
        far.run("ip link add ovt-0 mtu 1420 type wireguard; ip link set ovt-0 up; ip addr add fd00::2/64 dev ovt-0 nodad");
        let netns = std::fs::File::open(far.path()).expect("namespace");
        let there = std::thread::spawn(move || {
            nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET).expect("entered");
            let mut wireguard = Wireguard::open().expect("socket");
            wireguard.set(device(), &[2; 32], 51950).expect("set");
            let back = peer("192.0.2.1:51940", &["fd00::1/128"]);
            wireguard.set_peer(device(), keys[0], &back).expect("peer");
        });
        there.join().expect("far end");
        run("ip addr add fd00::1/64 dev ovt-0 nodad");
        run("ping -6 -c 3 -i 0.2 -w 20 fd00::2");
        let status = wireguard.status(device()).expect("status")[&keys[1]];
        assert!(status.last_handshake.is_some_and(|since| since < Duration::from_secs(60)), "{status:?}");
        assert!(status.received > 0 && status.sent > 0, "{status:?}");
        assert_eq!(status.endpoint, Some("192.0.2.2:51950".parse().expect("endpoint")));

        // A switched network in the tunnel: the remote host may send only from its own addresses.
        let mut sources = Sources::open(51942).expect("socket");
        sources.ensure().expect("rules");
        for (n, other) in [(1, 2), (2, 1)] {
            let line = format!(
                "ip link add vx address {} type vxlan id 4097 local fd00::{n} remote fd00::{other} dstport 51942; \
                 ip addr add 10.1.0.{n}/24 dev vx; ip link set vx up",
                mac(n)
            );
            if n == 1 {
                run(&line)
            } else {
                far.run(&line)
            };
        }
        let may = |address: &str| {
            let source = Source { from: [ip("fd00::2")].into(), addresses: [ip(address)].into() };
            [Change { vni: 4097, mac: mac(2), source: Some(source) }]
        };
        sources.apply(&may("10.1.0.2")).expect("set");
        run("ping -c 3 -i 0.2 -w 20 10.1.0.2");
        let refused = sources.refused().expect("count");
        sources.apply(&may("10.1.0.3")).expect("set");
        assert!(!answers("10.1.0.2"), "from an address that is not its own");
        assert!(sources.refused().expect("count") > refused);

        wireguard.delete_peer(device(), keys[1]).expect("deleted");
        assert!(!answers("fd00::2"), "from a deleted peer");
    });
}

/// Whether an address answers within two seconds.
fn answers(address: &str) -> bool {
    let ping = std::process::Command::new("ping").args(["-c", "2", "-w", "2", address]).output();
    ping.expect("ping").status.success()
}

/// Asserts that `wg show` lists the same keys, ports, endpoints and allowed addresses.
fn assert_wg_agrees(world: &Dataplane) {
    if std::process::Command::new("wg").arg("--version").output().is_err() {
        let _ = std::io::Write::write_all(&mut std::io::stderr(), b"\n*** no program wg: not compared ***\n");
        return;
    }
    let mut shown = Dataplane::default();
    for line in run("wg show all dump").lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let device = Device::new(fields[0]).expect("name");
        if let [_, _, public, port, _] = fields[..] {
            let tunnel =
                Tunnel { key: public.parse().expect("key"), port: port.parse().expect("port"), local: None };
            shown.tunnels.insert(device, tunnel);
        } else {
            let allowed = fields[4].split(',').filter(|text| *text != "(none)").map(net).collect();
            let peer = TunnelPeer { endpoint: fields[3].parse().expect("endpoint"), allowed };
            shown.tunnel_peers.insert((device, fields[1].parse().expect("key")), peer);
        }
    }
    assert_eq!(&shown, world);
}
