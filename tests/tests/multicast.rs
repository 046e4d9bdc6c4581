//! Multicast on switched networks, with and without encryption: copies go only to hosts with members of the group.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use netns_lab::{Host, Lab, Netns, uninterrupted, wait_until};
use ovl_tests::frames::{FrameSocket, ICMPV6, ethernet, ipv6, link_local, mac};
use ovl_tests::{
    Attached, Capture, SOON, attach, create_network, ensure_settled, ping_all_pairs, rows, start_lab,
    wait_clean, wait_no_problem, wait_problem,
};

const PORT: u16 = 5000;
/// The longest time from a join to the first packet from another host.
const JOIN: Duration = Duration::from_secs(1);
/// The longest time from the last leave to the last copy.
const LEAVE: Duration = Duration::from_secs(10);
/// Time between two datagrams of a sender.
const INTERVAL: Duration = Duration::from_millis(5);
const GROUPS: [&str; 2] = ["239.1.2.3", "ff15::1234"];

fn index_of(at: &Netns) -> u32 {
    let link = at.ip_json(&["link", "show", "dev", "eth0"]).unwrap();
    u32::try_from(link[0]["ifindex"].as_u64().unwrap()).unwrap()
}

fn any(like: IpAddr) -> IpAddr {
    if like.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

/// Opens a socket that has joined a group.
fn member(at: &Attached, group: &str) -> UdpSocket {
    let (group, index): (IpAddr, u32) = (group.parse().unwrap(), index_of(&at.workload));
    let socket = at.workload.run(|| UdpSocket::bind((any(group), PORT))).unwrap().unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    match group {
        IpAddr::V4(group) => socket.join_multicast_v4(&group, &at.address().parse().unwrap()).unwrap(),
        IpAddr::V6(group) => socket.join_multicast_v6(&group, index).unwrap(),
    }
    socket
}

/// Datagrams with a text and a number, to a group, until the sender is dropped.
struct Sender {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u32>>,
}

impl Sender {
    fn start(from: &Attached, group: &str, text: &str) -> Self {
        let group: IpAddr = group.parse().unwrap();
        let to: SocketAddr = match group {
            IpAddr::V4(group) => (group, PORT).into(),
            IpAddr::V6(group) => SocketAddrV6::new(group, PORT, 0, index_of(&from.workload)).into(),
        };
        let socket = from.workload.run(|| UdpSocket::bind((any(group), 0))).unwrap().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, text) = (Arc::clone(&stop), text.to_owned());
        let thread = std::thread::spawn(move || {
            let mut sent = 0;
            while !stopped.load(Ordering::Relaxed) {
                socket.send_to(format!("{text} {sent}").as_bytes(), to).unwrap();
                sent += 1;
                std::thread::sleep(INTERVAL);
            }
            sent
        });
        Self { stop, thread: Some(thread) }
    }

    /// Stops, and returns the number of datagrams.
    fn finish(mut self) -> u32 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn number(datagram: &[u8]) -> u32 {
    let text = String::from_utf8_lossy(datagram);
    text.rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap()
}

/// Receives one datagram, and returns its number.
fn receive(socket: &UdpSocket) -> u32 {
    let mut buffer = [0; 512];
    let length = uninterrupted(|| socket.recv(&mut buffer)).unwrap();
    number(&buffer[..length])
}

/// The elements of a set of `bridge ovl-guard`, as text.
fn elements(host: &Host, set: &str) -> String {
    let listed = host.exec_ok(["nft", "list", "set", "bridge", "ovl-guard", set]).unwrap();
    listed.split_once("elements").map(|(_, elements)| elements.to_owned()).unwrap_or_default()
}

/// Waits until hosts send no multicast of groups without members.
fn wait_followed(lab: &Lab) {
    for host in lab.hosts() {
        wait_until(SOON, "groups to be followed", || elements(host, "open").is_empty()).unwrap();
    }
}

fn three_hosts(options: &[&str]) -> (Lab, Vec<Attached>) {
    let lab = start_lab(3).unwrap();
    let subnets = ["--subnet", "10.1.0.0/24", "--subnet", "fd01::/64"];
    create_network(&lab, "flat", &[&subnets[..], options].concat()).unwrap();
    let all: Vec<Attached> = lab
        .hosts()
        .iter()
        .map(|host| attach(host, &format!("w-{}", host.name()), "flat", &[]).unwrap())
        .collect();
    ping_all_pairs(&all, SOON).unwrap();
    (lab, all)
}

/// Sends to a group for a while after a join on host 2, and returns the time until the first packet arrives there, and the
/// number of copies on host 3, which has no member.
fn join_and_count(lab: &Lab, all: &[Attached], group: &str) -> (Duration, u64) {
    let capture = Capture::start(&lab["h3"], &["GROUP", "CONTROL"]).unwrap();
    let sender = Sender::start(&all[0], group, "GROUP");
    let started = Instant::now();
    let socket = member(&all[1], group);
    receive(&socket);
    let took = started.elapsed();
    for _ in 0..100 {
        receive(&socket);
    }
    sender.finish();
    // Groups of the link go to all: the capture would have seen a copy.
    let control = Sender::start(&all[0], "224.0.0.251", "CONTROL");
    wait_until(SOON, "the control on h3", || capture.count("CONTROL") > 0).unwrap();
    control.finish();
    (took, capture.finish().unwrap().count("GROUP"))
}

fn copies_go_to_members(options: &[&str]) {
    let (lab, all) = three_hosts(options);
    for group in GROUPS {
        let (took, copies) = join_and_count(&lab, &all, group);
        assert_eq!(copies, 0, "copies for {group} on a host without members");
        assert!(took < JOIN, "{group} arrived {took:?} after the join");
    }
    // A second member on the third host, which speaks the earlier versions of the protocols.
    for setting in ["net.ipv4.conf.eth0.force_igmp_version=2", "net.ipv6.conf.eth0.force_mld_version=1"] {
        all[2].workload.exec_ok(["sysctl", "-qw", setting]).unwrap();
    }
    for group in GROUPS {
        let sockets = [member(&all[1], group), member(&all[2], group)];
        let sender = Sender::start(&all[0], group, "GROUP");
        for socket in &sockets {
            receive(socket);
        }
        sender.finish();
    }
    wait_clean(lab.hosts(), SOON).unwrap();
    // Both have left.
    wait_until(LEAVE, "no member", || elements(&lab["h1"], "joined").is_empty()).unwrap();
    for group in GROUPS {
        let captures = ["h2", "h3"].map(|host| Capture::start(&lab[host], &["GROUP", "CONTROL"]).unwrap());
        let sender = Sender::start(&all[0], group, "GROUP");
        let control = Sender::start(&all[0], "224.0.0.251", "CONTROL");
        for capture in captures {
            wait_until(SOON, "the control", || capture.count("CONTROL") > 50).unwrap();
            assert_eq!(capture.finish().unwrap().count("GROUP"), 0, "{group}");
        }
        drop((sender, control));
    }
    for host in lab.hosts() {
        ensure_settled(host).unwrap();
    }
    wait_no_problem(&lab["h1"], SOON).unwrap();
}

#[test]
fn copies_go_only_to_hosts_with_members() {
    copies_go_to_members(&[]);
}

#[test]
fn copies_go_only_to_hosts_with_members_on_an_encrypted_network() {
    copies_go_to_members(&["--encrypted"]);
}

/// A killed daemon forwards on, and the next one takes over what it finds, on either side.
fn restart_loses_nothing(options: &[&str]) {
    let (lab, all) = three_hosts(options);
    for group in GROUPS {
        let socket = member(&all[1], group);
        let sender = Sender::start(&all[0], group, "GROUP");
        let first = receive(&socket);
        let stop = AtomicBool::new(false);
        let got = std::thread::scope(|scope| {
            let receiver = scope.spawn(|| {
                let mut got = BTreeSet::from([first]);
                socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
                let mut buffer = [0; 512];
                while !stop.load(Ordering::Relaxed) {
                    match uninterrupted(|| socket.recv(&mut buffer)) {
                        Ok(length) => drop(got.insert(number(&buffer[..length]))),
                        Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
                    }
                }
                got
            });
            for name in ["h1", "h2"] {
                lab[name].kill9().unwrap();
                lab[name].restart().unwrap();
                lab[name].wait_ready(SOON).unwrap();
                lab.wait_all_alive(SOON).unwrap();
                wait_followed(&lab);
                wait_clean(lab.hosts(), SOON).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
            receiver.join().unwrap()
        });
        let sent = sender.finish();
        let last = *got.last().unwrap();
        assert!(last > first && last <= sent, "{first} {last} {sent}");
        let lost: Vec<u32> = (first..last).filter(|number| !got.contains(number)).collect();
        assert!(lost.is_empty(), "{group}: lost {} of {sent}: {lost:?}", lost.len());
        drop(socket);
        // Groups are followed again.
        let (took, copies) = join_and_count(&lab, &all, "239.5.5.5");
        assert!(took < JOIN && copies == 0, "{took:?}, {copies} copies");
    }
}

#[test]
fn no_packet_is_lost_when_daemons_are_killed() {
    restart_loses_nothing(&[]);
}

#[test]
fn joins_of_a_workload_are_bounded() {
    const JOINED: u16 = 10_000;
    let (lab, all) = three_hosts(&[]);
    let neighbour = attach(&lab["h2"], "neighbour", "flat", &[]).unwrap();
    let greedy = &all[1];
    greedy.workload.exec_ok(["sysctl", "-qw", "net.ipv4.igmp_max_memberships=200"]).unwrap();
    let address: Ipv4Addr = greedy.address().parse().unwrap();
    let sockets: Vec<UdpSocket> = (0..JOINED / 100)
        .map(|n| {
            let socket = greedy.workload.run(|| UdpSocket::bind(("0.0.0.0", 0))).unwrap().unwrap();
            for group in n * 100..(n + 1) * 100 {
                let [high, low] = group.to_be_bytes();
                socket.join_multicast_v4(&Ipv4Addr::new(239, 7, high, low), &address).unwrap();
            }
            socket
        })
        .collect();
    wait_problem(&lab["h2"], &["w-h2", "more than 256 multicast groups"], SOON).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    let entries = lab["h1"].exec_ok(["bridge", "fdb", "show"]).unwrap();
    let groups = entries.lines().filter(|line| line.starts_with("01:00:5e:07:")).count();
    assert!((1..=256).contains(&groups), "{groups} entries");
    // Others join as before.
    let socket = member(&neighbour, "239.1.2.3");
    let sender = Sender::start(&all[0], "239.1.2.3", "GROUP");
    receive(&socket);
    sender.finish();
    drop((sockets, socket));
    wait_until(SOON, "no member", || elements(&lab["h1"], "joined").is_empty()).unwrap();
    wait_no_problem(&lab["h2"], SOON).unwrap();
}

#[test]
fn queries_of_a_workload_are_refused() {
    let lab = start_lab(1).unwrap();
    create_network(&lab, "flat", &["--subnet", "10.1.0.0/24", "--subnet", "fd01::/64"]).unwrap();
    let forger = attach(&lab["h1"], "forger", "flat", &[]).unwrap();
    let own = mac(&forger.mac());
    let address: Ipv4Addr = forger.address().parse().unwrap();
    let all_hosts = Ipv4Addr::new(224, 0, 0, 1);
    // IPv4 with protocol 2, and in it a query for the members of a group.
    let mut igmp = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 1, 2, 0, 0];
    igmp.extend(address.octets());
    igmp.extend(all_hosts.octets());
    igmp.extend([0x11, 1, 0, 0, 239, 1, 2, 3]);
    let mld = [&[130, 0, 0, 0, 0, 1, 0, 0][..], &[0; 16]].concat();
    let socket = FrameSocket::open(&forger.workload, "eth0").unwrap();
    socket.send(&ethernet([1, 0, 0x5e, 0, 0, 1], own, 0x0800, &igmp)).unwrap();
    socket.send(&ipv6(own, link_local(own), ICMPV6, &mld)).unwrap();
    wait_until(SOON, "two refused frames", || {
        let all = rows(&lab["h1"], &["endpoints"]).unwrap();
        all.iter().any(|row| row["name"] == "forger" && row["refused"] == 2)
    })
    .unwrap();
}
