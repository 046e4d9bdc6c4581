//! The anti-spoofing filter: real VXLAN packets over a veth pair that replaces the tunnel.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv6Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use ovl_dataplane::device::Device;
use ovl_dataplane::state::Source;
use ovl_proto::id::{Mac, NetworkId};

use super::lab::{Container, in_namespace, ip, mac, run, vxlan};
use crate::sources::{Change, Sources};

const PORT: u16 = 51942;
const VNI: u32 = 4097;
const OTHER: u32 = 4098;

fn source(from: &str, addresses: &[&str]) -> Source {
    Source { from: [ip(from)].into(), addresses: addresses.iter().map(|text| ip(text)).collect() }
}

fn change(vni: u32, n: u32, source: Source) -> Change {
    Change { vni, mac: mac(n), source: Some(source) }
}

fn devices() -> BTreeMap<u32, Device> {
    [(VNI, vxlan()), (OTHER, Device::vxlan(NetworkId([9; 5])))].into()
}

/// A remote host behind a tunnel, and the local host's VXLAN device.
struct Hosts {
    far: Container,
    /// Sockets in the namespace of the remote host: at its tunnel address, and at another address.
    senders: [UdpSocket; 2],
}

impl Hosts {
    fn new() -> Self {
        let far = Container::new();
        run(&format!("ip link add ovt-0 mtu 9000 type veth peer name ovt-0 netns {}", far.path()));
        run("ip link set ovt-0 up; ip addr add fd00::1/64 dev ovt-0 nodad");
        far.run("ip link set lo up; ip link set ovt-0 up; ip addr add fd00::2/64 dev ovt-0 nodad; ip addr add fd00::3/64 dev ovt-0 nodad");
        let add = |local: u8, remote: u8| {
            format!(
                "ip link add vx address {} type vxlan id {VNI} local fd00::{local} remote fd00::{remote} dstport {PORT}; \
                     ip addr add 10.1.0.{local}/24 dev vx; ip addr add fd10::{local}/64 dev vx nodad; ip link set vx up",
                mac(local.into())
            )
        };
        run(&add(1, 2));
        far.run(&add(2, 1));
        let netns = std::fs::File::open(far.path()).expect("namespace");
        let senders = std::thread::spawn(move || {
            nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET).expect("entered");
            ["[fd00::2]:0", "[fd00::3]:0"].map(|at| UdpSocket::bind(at).expect(at))
        });
        Self { far, senders: senders.join().expect("far end") }
    }

    /// Sends a frame in a VXLAN packet. Returns whether it passed, as the counters of the kernel show.
    fn passes(&self, sources: &mut Sources, from: usize, vni: u32, frame: &[u8]) -> bool {
        let (refused, received) = (sources.refused().expect("count"), received());
        let to: SocketAddr = (ip("fd00::1"), PORT).into();
        self.senders[from].send_to(&packet(vni, frame), to).expect("sent");
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            match (sources.refused().expect("count") - refused, self::received() - received) {
                (0, 0) => assert!(Instant::now() < until, "neither refused nor received"),
                (1, 0) => return false,
                (0, 1) => return true,
                other => panic!("{other:?}"),
            }
        }
    }

    /// Stops all other traffic, such as neighbour discovery.
    fn quiet(&self) {
        run("ip link set vx addrgenmode none; ip addr flush dev vx");
        self.far.run("ip link set vx down");
    }
}

/// The number of frames that the VXLAN device received.
fn received() -> u64 {
    let shown: serde_json::Value = serde_json::from_str(&run("ip -s -j link show vx")).expect("JSON");
    shown[0]["stats64"]["rx"]["packets"].as_u64().expect("count")
}

fn packet(vni: u32, frame: &[u8]) -> Vec<u8> {
    [&[8, 0, 0, 0][..], &(vni << 8).to_be_bytes(), frame].concat()
}

fn frame(from: Mac, kind: u16, payload: &[u8]) -> Vec<u8> {
    [&[0xff; 6][..], &from.0, &kind.to_be_bytes(), payload].concat()
}

/// Puts VLAN tags (802.1Q) into a frame.
fn tagged(tags: usize, frame: &[u8]) -> Vec<u8> {
    [&frame[..12], &[0x81, 0, 0, 5].repeat(tags)[..], &frame[12..]].concat()
}

fn arp(from: Mac, sender: Mac, address: [u8; 4]) -> Vec<u8> {
    let fixed = [0, 1, 8, 0, 6, 4, 0, 2];
    frame(from, 0x0806, &[&fixed[..], &sender.0, &address, &[0; 10]].concat())
}

fn ipv4(from: Mac, address: [u8; 4]) -> Vec<u8> {
    let fixed = [0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0];
    frame(from, 0x0800, &[&fixed[..], &address, &[10, 1, 0, 1], &[0; 8]].concat())
}

fn ipv6(from: Mac, address: &str, next: u8, payload: &[u8]) -> Vec<u8> {
    let address: Ipv6Addr = address.parse().expect(address);
    let [a, b] = (payload.len() as u16).to_be_bytes();
    let fixed = [0x60, 0, 0, 0, a, b, next, 255];
    frame(from, 0x86dd, &[&fixed[..], &address.octets(), &[0xff; 16], payload].concat())
}

/// A neighbour advertisement for an address, to all nodes.
fn advertisement(target: &str) -> Vec<u8> {
    let target: Ipv6Addr = target.parse().expect(target);
    [&[136, 0, 0, 0, 0x20, 0, 0, 0][..], &target.octets(), &[2, 1], &mac(2).0].concat()
}

#[test]
fn only_frames_of_allowed_sources_pass_and_others_are_counted() {
    in_namespace(async || {
        let mut sources = Sources::open(PORT).expect("socket");
        sources
            .apply(&[
                change(VNI, 2, source("fd00::2", &["10.1.0.2", "fd10::2"])),
                change(VNI, 3, source("fd00::3", &["10.1.0.3", "fd10::3"])),
                change(OTHER, 4, source("fd00::2", &["10.1.0.4", "fd10::4"])),
            ])
            .expect("set");
        let hosts = Hosts::new();
        hosts.quiet();
        let (own, other, elsewhere) = (mac(2), mac(3), mac(4));
        // The hop-by-hop header of a multicast listener report, with the router alert option.
        let report = |kind| [&[58, 0, 5, 2, 0, 0, 1, 0, kind][..], &[0; 19]].concat();
        let hidden = [&[58, 0, 1, 4, 0, 0, 0, 0][..], &advertisement("fd10::3")].concat();
        let cases: &[(&str, usize, u32, Vec<u8>, bool)] = &[
            ("its own address", 0, VNI, ipv4(own, [10, 1, 0, 2]), true),
            ("its own IPv6 address", 0, VNI, ipv6(own, "fd10::2", 17, &[0; 8]), true),
            ("ARP", 0, VNI, arp(own, own, [10, 1, 0, 2]), true),
            ("link-local", 0, VNI, ipv6(own, "fe80::1234", 17, &[0; 8]), true),
            ("the end of link-local", 0, VNI, ipv6(own, "febf:ffff::1", 17, &[0; 8]), true),
            ("no IPv6 address yet", 0, VNI, ipv6(own, "::", 58, &[135; 24]), true),
            ("no address yet", 0, VNI, ipv4(own, [0; 4]), true),
            ("an ARP probe", 0, VNI, arp(own, own, [0; 4]), true),
            ("an advertisement", 0, VNI, ipv6(own, "fd10::2", 58, &advertisement("fd10::2")), true),
            ("a link-local advertisement", 0, VNI, ipv6(own, "fe80::2", 58, &advertisement("fe80::2")), true),
            ("a listener report", 0, VNI, ipv6(own, "fe80::2", 0, &report(143)), true),
            ("another host's, from it", 1, VNI, ipv4(other, [10, 1, 0, 3]), true),
            //
            ("wrong MAC", 0, VNI, ipv4(other, [10, 1, 0, 2]), false),
            ("wrong MAC and its address", 0, VNI, ipv4(other, [10, 1, 0, 3]), false),
            ("unknown MAC", 0, VNI, ipv4(mac(77), [10, 1, 0, 2]), false),
            ("wrong outer address", 1, VNI, ipv4(own, [10, 1, 0, 2]), false),
            ("wrong inner address", 0, VNI, ipv4(own, [10, 1, 0, 3]), false),
            ("wrong inner IPv6 address", 0, VNI, ipv6(own, "fd10::3", 17, &[0; 8]), false),
            ("not quite link-local", 0, VNI, ipv6(own, "fec0::1", 17, &[0; 8]), false),
            ("link-local of an unknown MAC", 0, VNI, ipv6(mac(77), "fe80::1", 17, &[0; 8]), false),
            ("wrong address in ARP", 0, VNI, arp(own, own, [10, 1, 0, 3]), false),
            ("wrong MAC in ARP", 0, VNI, arp(own, other, [10, 1, 0, 2]), false),
            ("another's entry in ARP", 0, VNI, arp(own, other, [10, 1, 0, 3]), false),
            ("wrong VNI", 0, OTHER, ipv4(own, [10, 1, 0, 2]), false),
            ("unknown VNI", 0, 5000, ipv4(own, [10, 1, 0, 2]), false),
            ("a VNI's MAC in another", 0, VNI, ipv4(elsewhere, [10, 1, 0, 4]), false),
            ("another's advertisement", 0, VNI, ipv6(own, "fd10::2", 58, &advertisement("fd10::3")), false),
            ("the same, link-local", 0, VNI, ipv6(own, "fe80::2", 58, &advertisement("fd10::3")), false),
            ("the same behind options", 0, VNI, ipv6(own, "fd10::2", 0, &hidden), false),
            ("the same behind others", 0, VNI, ipv6(own, "fd10::2", 60, &hidden), false),
            ("one tag", 0, VNI, tagged(1, &ipv4(own, [10, 1, 0, 2])), true),
            ("one tag before IPv6", 0, VNI, tagged(1, &ipv6(own, "fd10::2", 17, &[0; 8])), true),
            ("one tag before ARP", 0, VNI, tagged(1, &arp(own, own, [10, 1, 0, 2])), true),
            ("a wrong address behind a tag", 0, VNI, tagged(1, &ipv4(own, [10, 1, 0, 3])), false),
            ("a wrong IPv6 address behind it", 0, VNI, tagged(1, &ipv6(own, "fd10::3", 17, &[0; 8])), false),
            ("a wrong address in ARP behind it", 0, VNI, tagged(1, &arp(own, own, [10, 1, 0, 3])), false),
            (
                "another's advertisement behind it",
                0,
                VNI,
                tagged(1, &ipv6(own, "fd10::2", 58, &advertisement("fd10::3"))),
                false,
            ),
            ("two tags", 0, VNI, tagged(2, &ipv4(own, [10, 1, 0, 2])), false),
            ("another protocol", 0, VNI, frame(own, 0x88cc, &[0; 60]), true),
            ("another protocol behind a tag", 0, VNI, tagged(1, &frame(own, 0x88cc, &[0; 60])), true),
            ("another protocol, wrong MAC", 0, VNI, frame(other, 0x88cc, &[0; 60]), false),
            ("a frame without its EtherType", 0, VNI, frame(own, 0x88cc, &[])[..13].to_vec(), false),
            ("a frame that is cut", 0, VNI, ipv4(own, [10, 1, 0, 2])[..28].to_vec(), false),
            ("no frame", 0, VNI, Vec::new(), false),
        ];
        let mut refused = 0;
        for (what, from, vni, frame, passes) in cases {
            assert_eq!(hosts.passes(&mut sources, *from, *vni, frame), *passes, "{what}");
            refused += u64::from(!passes);
        }
        assert_eq!(sources.refused().expect("count"), refused);
        // The filter ignores other ports.
        let to: SocketAddr = (ip("fd00::1"), PORT + 1).into();
        let other = UdpSocket::bind(to).expect("socket");
        other.set_read_timeout(Some(Duration::from_secs(10))).expect("time-out");
        hosts.senders[0].send_to(b"hello", to).expect("sent");
        assert_eq!(other.recv(&mut [0; 16]).expect("received"), 5);
        assert_eq!(sources.refused().expect("count"), refused);
    });
}

/// The filter sees a fragmented packet reassembled, or its first fragment alone. A frame that is refused whole is
/// refused in fragments too.
#[test]
fn fragments_do_not_bypass_the_filter() {
    in_namespace(async || {
        let mut sources = Sources::open(PORT).expect("socket");
        sources.apply(&[change(VNI, 2, source("fd00::2", &["10.1.0.2"]))]).expect("set");
        let hosts = Hosts::new();
        hosts.quiet();
        hosts.far.run("ip link set ovt-0 mtu 1280");
        let padded = |mut frame: Vec<u8>| {
            frame.resize(3000, 0);
            frame
        };
        assert!(!hosts.passes(&mut sources, 0, VNI, &padded(ipv4(mac(3), [10, 1, 0, 2]))));
        assert!(!hosts.passes(&mut sources, 0, VNI, &padded(ipv4(mac(2), [10, 1, 0, 3]))));
        assert!(hosts.passes(&mut sources, 0, VNI, &padded(ipv4(mac(2), [10, 1, 0, 2]))));
    });
}

#[test]
fn traffic_passes_only_while_its_source_is_allowed() {
    in_namespace(async || {
        let mut sources = Sources::open(PORT).expect("socket");
        let there = source("fd00::2", &["10.1.0.2", "fd10::2"]);
        sources.apply(&[change(VNI, 2, there)]).expect("set");
        let hosts = Hosts::new();
        let ping = |to: &str| {
            std::process::Command::new("ping")
                .args(["-c", "1", "-W", "1", to])
                .output()
                .expect("ping")
                .status
                .success()
        };
        run("ping -c 2 -i 0.1 -w 20 10.1.0.2; ping -c 2 -i 0.1 -w 20 fd10::2");
        assert_eq!(sources.refused().expect("count"), 0, "no packet of the kernels themselves");
        sources.apply(&[change(VNI, 2, source("fd00::2", &["fd10::2"]))]).expect("set");
        assert!(!ping("10.1.0.2") && ping("fd10::2"));
        sources.apply(&[Change { vni: VNI, mac: mac(2), source: None }]).expect("set");
        assert!(!ping("10.1.0.2") && !ping("fd10::2"));
        assert!(sources.refused().expect("count") >= 3);
        drop(hosts);
    });
}

#[test]
fn dump_returns_what_was_set() {
    in_namespace(async || {
        let mut sources = Sources::open(PORT).expect("socket");
        assert_eq!(sources.dump(&devices()).expect("dump"), BTreeMap::new());
        assert_eq!(sources.refused().expect("count"), 0);
        let first = source("fd00::2", &["10.1.0.2", "10.1.0.9", "fd10::2"]);
        let second = source("fd00::3", &[]);
        sources
            .apply(&[
                change(VNI, 2, first.clone()),
                change(OTHER, 2, second.clone()),
                change(77, 5, second.clone()),
            ])
            .expect("set");
        let [here, there] = [VNI, OTHER].map(|vni| (devices()[&vni], mac(2)));
        let all = BTreeMap::from([(here, first), (there, second.clone())]);
        assert_eq!(sources.dump(&devices()).expect("dump"), all);
        // Moved to another host, with one address fewer.
        let moved = source("fd00::4", &["10.1.0.2", "fd10::2"]);
        sources.apply(&[change(VNI, 2, moved.clone())]).expect("set");
        assert_eq!(sources.dump(&devices()).expect("dump")[&here], moved);
        // The last change counts.
        let gone = Change { vni: OTHER, mac: mac(2), source: None };
        sources.apply(&[change(OTHER, 2, moved.clone()), gone.clone()]).expect("set");
        sources.apply(&[gone]).expect("an absent object is no error");
        assert_eq!(sources.dump(&devices()).expect("dump"), [(here, moved.clone())].into());
        // A new process finds the elements, and deletes those of unknown networks.
        let mut sources = Sources::open(PORT).expect("socket");
        sources.ensure().expect("rules");
        assert_eq!(sources.dump(&devices()).expect("dump"), [(here, moved)].into());
        sources.retain(&[VNI, OTHER].into()).expect("strays");
        assert!(
            run("nft list set inet ovl-sources hosts").matches(" . ").count() == 4,
            "the type, and one element"
        );
        sources.retain(&BTreeSet::new()).expect("strays");
        assert_eq!(sources.dump(&devices()).expect("dump"), BTreeMap::new());
        sources.remove().expect("removed");
        sources.remove().expect("an absent object is no error");
        assert!(!run("nft list tables").contains("ovl-sources"));
        let error = sources.apply(&[change(VNI, 2, source("192.0.2.1", &[]))]).expect_err("IPv4").to_string();
        assert!(error.contains("192.0.2.1 is not a tunnel address"), "{error}");
    });
}

#[test]
fn changes_of_sources_by_others_are_noticed_and_repaired() {
    in_namespace(async || {
        let mut sources = Sources::open(PORT).expect("socket");
        let wanted = source("fd00::2", &["10.1.0.2", "fd10::2"]);
        let set = [change(VNI, 2, wanted.clone()), change(VNI, 3, wanted.clone())];
        sources.apply(&set).expect("set");
        let all = sources.dump(&devices()).expect("dump");
        assert_eq!(all.len(), 2);
        let them = "0x1001 . 0x020000000002";
        for line in [
            "nft flush ruleset".to_owned(),
            "nft delete table inet ovl-sources".to_owned(),
            "nft flush chain inet ovl-sources input".to_owned(),
            "nft insert rule inet ovl-sources check_frame accept".to_owned(),
            "nft add table inet ovl-sources { flags dormant; }".to_owned(),
            "nft flush set inet ovl-sources v4".to_owned(),
            format!("nft delete element inet ovl-sources hosts {{ fd00::2 . {them} }}"),
            format!("nft add element inet ovl-sources hosts {{ fd00::9 . {them} }}"),
            format!("nft add element inet ovl-sources v4 {{ {them} . 0x0a010063 }}"),
        ] {
            run(&line.replace("{ ", "'{ ").replace(" }", " }'"));
            assert_ne!(sources.dump(&devices()).expect("dump"), all, "{line}");
            sources.apply(&set).expect("set");
            assert_eq!(sources.dump(&devices()).expect("dump"), all, "{line}");
            assert_eq!(
                run("nft list table inet ovl-sources").matches("goto check_vxlan").count(),
                1,
                "{line}"
            );
        }
        // Without a dump in between, so that the cache is stale.
        run(&format!("nft delete element inet ovl-sources hosts '{{ fd00::2 . {them} }}'"));
        sources.apply(&[Change { vni: VNI, mac: mac(2), source: None }]).expect("set");
        assert_eq!(sources.dump(&devices()).expect("dump").len(), 1);
        // Sets of another shape, as another version may have created.
        run("nft delete table inet ovl-sources; nft add table inet ovl-sources");
        run("nft add set inet ovl-sources hosts '{ type ipv4_addr; }'");
        sources.apply(&set).expect("set");
        assert_eq!(sources.dump(&devices()).expect("dump"), all);
    });
}

#[test]
fn many_sources_are_set_at_once() {
    in_namespace(async || {
        let mut sources = Sources::open(PORT).expect("socket");
        let start = Instant::now();
        sources.ensure().expect("rules");
        println!("the rules: {:?}", start.elapsed());
        let many = |first: u32, count: u32| -> Vec<Change> {
            (first..first + count)
                .map(|n| {
                    let [_, a, b, c] = n.to_be_bytes();
                    let address = format!("10.{a}.{b}.{c}");
                    change(VNI, n, source("fd00::2", &[&address, &format!("fd10::{n:x}")]))
                })
                .collect()
        };
        for (first, count) in [(1, 1), (2, 1000), (10_000, 10_000)] {
            let start = Instant::now();
            sources.apply(&many(first, count)).expect("set");
            println!("{count} sources: {:?}", start.elapsed());
        }
        let start = Instant::now();
        assert_eq!(sources.dump(&devices()).expect("dump").len(), 11_001);
        println!("a dump of 11,001: {:?}", start.elapsed());
        let start = Instant::now();
        sources.retain(&BTreeSet::new()).expect("strays");
        println!("all gone: {:?}", start.elapsed());
        assert_eq!(sources.dump(&devices()).expect("dump").len(), 0);
    });
}
