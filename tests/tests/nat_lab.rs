//! The lab's NAT boxes are what their presets say: checked with real sockets by the method of RFC 5780.
//!
//! Two hosts on the switch, with two ports each, stand for the STUN server's addresses. A client behind a box sends to some of
//! them; they say from where it seems to come (mapping), and answer from others (filtering).

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use netns_lab::{
    Access, Behavior, Host, Lab, LabConfig, Netns, Underlay, lab_names, presets, uninterrupted, wait_until,
};

/// Time in which a datagram arrives that is expected.
const SOON: Duration = Duration::from_secs(3);

/// Time after which a TCP connection is taken to be blocked.
const BLOCKED: Duration = Duration::from_millis(200);

const PORTS: [u16; 2] = [3478, 3479];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

impl Family {
    fn any(self) -> IpAddr {
        match self {
            Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
        }
    }

    fn find(self, addresses: Vec<IpAddr>) -> Option<IpAddr> {
        addresses.into_iter().find(|address| address.is_ipv4() == (self == Family::V4))
    }
}

/// Opens a UDP socket on a host.
fn open(host: &Netns, family: Family, port: u16) -> UdpSocket {
    open_at(host, (family.any(), port).into())
}

fn open_at(host: &Netns, address: SocketAddr) -> UdpSocket {
    let socket = host.run(|| UdpSocket::bind(address)).unwrap().unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    socket
}

/// Receives one datagram. `None` if there is none at the moment, or an earlier one was refused.
fn receive(socket: &UdpSocket) -> Option<(Vec<u8>, SocketAddr)> {
    let mut buffer = [0; 512];
    let (length, from) = uninterrupted(|| socket.recv_from(&mut buffer)).ok()?;
    Some((buffer[..length].to_vec(), from))
}

/// The servers on the switch: the sockets of each address and port.
struct Servers {
    sockets: [[UdpSocket; 2]; 2],
    addresses: [IpAddr; 2],
}

impl Servers {
    fn start(lab: &Lab, family: Family) -> Self {
        let hosts = ["h1", "h2"];
        let addresses = hosts.map(|host| family.find(lab[host].addresses()).unwrap());
        let at =
            |index: usize| PORTS.map(|port| open_at(&lab[hosts[index]], (addresses[index], port).into()));
        Servers { sockets: [at(0), at(1)], addresses }
    }

    fn at(&self, (address, port): (usize, usize)) -> SocketAddr {
        (self.addresses[address], PORTS[port]).into()
    }

    /// Sends from a client to a server, and returns the address from which the server hears it.
    fn hear(&self, client: &UdpSocket, server: (usize, usize)) -> Result<SocketAddr> {
        let socket = &self.sockets[server.0][server.1];
        while receive(socket).is_some() {}
        let word = unique();
        client.send_to(&word, self.at(server)).context("cannot send")?;
        let start = Instant::now();
        while start.elapsed() < SOON {
            match receive(socket) {
                Some((data, from)) if data == word => return Ok(from),
                _ => {}
            }
        }
        bail!("server {server:?} heard nothing of {:?}", client.local_addr())
    }

    /// Sends from servers to an outer address of a client, and returns the servers that it hears of them. `known` is one that
    /// the client hears in any case: it sends last, so what has not arrived by then was filtered. What is `expected` is awaited.
    fn reach(
        &self,
        client: &UdpSocket,
        to: SocketAddr,
        servers: &[(usize, usize)],
        known: (usize, usize),
        expected: &[(usize, usize)],
    ) -> Result<Vec<(usize, usize)>> {
        while receive(client).is_some() {}
        for &(address, port) in servers.iter().chain([&known]) {
            self.sockets[address][port].send_to(b"x", to)?;
        }
        let mut heard = BTreeSet::new();
        let start = Instant::now();
        let is_done = |heard: &BTreeSet<SocketAddr>| {
            expected.iter().chain([&known]).all(|&server| heard.contains(&self.at(server)))
        };
        while !is_done(&heard) && start.elapsed() < SOON {
            heard.extend(receive(client).map(|(_, from)| from));
        }
        ensure!(heard.contains(&self.at(known)), "not even {known:?} reached it: {heard:?}");
        Ok(servers.iter().copied().filter(|&server| heard.contains(&self.at(server))).collect())
    }
}

fn unique() -> Vec<u8> {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    COUNTER.fetch_add(1, Ordering::Relaxed).to_be_bytes().to_vec()
}

/// RFC 5780, section 4.3: towards another port and another address of the server.
fn mapping(servers: &Servers, client: &Netns, family: Family) -> Result<Behavior> {
    let socket = open(client, family, 0);
    let [first, port, address] = [(0, 0), (0, 1), (1, 0)].map(|server| servers.hear(&socket, server));
    let (first, port, address) = (first?, port?, address?);
    ensure!(servers.hear(&socket, (0, 0))? == first, "the same connection has another mapping");
    let other = servers.hear(&socket, (1, 1))?;
    match (first == port, first == address) {
        (true, true) if other == first => Ok(Behavior::EndpointIndependent),
        (true, false) if other == address => Ok(Behavior::AddressDependent),
        (false, false) if other != first && other != port && other != address => {
            Ok(Behavior::AddressAndPortDependent)
        }
        _ => bail!("no kind of RFC 4787: {first}, {port}, {address}, {other}"),
    }
}

/// RFC 5780, section 4.4: from another address and from another port of the server.
fn filtering(servers: &Servers, client: &Netns, family: Family, expected: Behavior) -> Result<Behavior> {
    let socket = open(client, family, 0);
    let outer = servers.hear(&socket, (0, 0))?;
    let awaited: &[(usize, usize)] = match expected {
        Behavior::EndpointIndependent => &[(1, 1), (1, 0), (0, 1)],
        Behavior::AddressDependent => &[(0, 1)],
        Behavior::AddressAndPortDependent => &[],
    };
    let heard = servers.reach(&socket, outer, &[(1, 1), (1, 0), (0, 1)], (0, 0), awaited)?;
    match heard.as_slice() {
        [(1, 1), (1, 0), (0, 1)] => Ok(Behavior::EndpointIndependent),
        [(0, 1)] => Ok(Behavior::AddressDependent),
        [] => Ok(Behavior::AddressAndPortDependent),
        _ => bail!("no kind of RFC 4787: heard from {heard:?}"),
    }
}

/// RFC 5780, section 4.5: one client sends to the outer address of another one, which has sent there as well. Returns whether
/// the datagram arrives, and checks that it comes from the sender's outer address (RFC 4787, requirement 9).
fn hairpin(servers: &Servers, from: &Netns, to: &Netns, expected: bool) -> Result<bool> {
    let (one, two) = (open(from, Family::V4, 0), open(to, Family::V4, 0));
    let (outer_one, outer_two) = (servers.hear(&one, (0, 0))?, servers.hear(&two, (0, 0))?);
    for _ in 0..2 {
        one.send_to(b"x", outer_two)?;
        two.send_to(b"x", outer_one)?;
    }
    // What has not arrived before an answer of the server was dropped.
    servers.sockets[0][0].send_to(b"last", outer_two)?;
    let (mut heard, mut is_last) = (false, false);
    let start = Instant::now();
    while !(is_last && heard == expected) && start.elapsed() < SOON {
        let Some((data, source)) = receive(&two) else { continue };
        is_last |= data == b"last";
        if data == b"x" {
            ensure!(source == outer_one, "from {source} in place of {outer_one}");
            heard = true;
        }
    }
    ensure!(is_last, "the server's answer did not arrive");
    Ok(heard)
}

/// Returns whether a TCP connection opens, which one that is expected has more time for.
fn tcp_passes(from: &Netns, to: SocketAddr, expected: bool) -> bool {
    let time = if expected { SOON } else { BLOCKED };
    from.run(|| TcpStream::connect_timeout(&to, time)).unwrap().is_ok()
}

/// What is measured of one host.
#[derive(Debug, PartialEq, Eq)]
struct Measured {
    /// `None` if no UDP passes.
    mapping: Option<Behavior>,
    filtering: Option<Behavior>,
    /// Whether its source address is its own.
    is_translated: bool,
    tcp_out: bool,
    tcp_in: bool,
}

fn measure(
    lab: &Lab,
    servers: &Servers,
    host: &Host,
    family: Family,
    expected: &Measured,
) -> Result<Measured> {
    let udp = if expected.mapping.is_some() {
        let wanted = expected.filtering.context("a mapping without a filter")?;
        Some((mapping(servers, host, family)?, filtering(servers, host, family, wanted)?))
    } else {
        let client = open(host, family, 0);
        client.send_to(b"x", servers.at((0, 0)))?;
        // TCP is what passes afterwards.
        ensure!(tcp_passes(host, servers.at((0, 0)), true), "no TCP");
        ensure!(
            receive(&servers.sockets[0][0])
                .is_none_or(|(_, from)| Some(from.ip()) != family.find(host.outer_addresses())),
            "UDP passes"
        );
        None
    };
    let own = family.find(host.addresses()).context("no address")?;
    let outer = family.find(host.outer_addresses()).context("no outer address")?;
    if udp.is_some() {
        let client = open(host, family, 0);
        let seen = servers.hear(&client, (0, 0))?;
        ensure!(seen.ip() == outer, "it is seen as {seen} in place of {outer}");
    }
    let _echo = host.tcp_echo(7000)?;
    Ok(Measured {
        mapping: udp.map(|(mapping, _)| mapping),
        filtering: udp.map(|(_, filtering)| filtering),
        is_translated: own != outer,
        tcp_out: tcp_passes(host, servers.at((0, 0)), true),
        tcp_in: tcp_passes(&lab["h1"], (outer, 7000).into(), expected.tcp_in),
    })
}

use Behavior::{
    AddressAndPortDependent as PORT, AddressDependent as ADDRESS, EndpointIndependent as INDEPENDENT,
};

/// Each preset with its mapping and filtering of IPv4 (`None` if UDP is blocked), whether it translates IPv4, and whether
/// TCP comes in. IPv6 is filtered in the same way.
type Expected = (&'static str, Option<(Behavior, Behavior)>, bool, bool);

const EXPECTED: [Expected; 13] = [
    ("public", Some((INDEPENDENT, INDEPENDENT)), false, true),
    ("firewall", Some((INDEPENDENT, PORT)), false, false),
    ("full-cone", Some((INDEPENDENT, INDEPENDENT)), true, false),
    ("full-cone-hairpin", Some((INDEPENDENT, INDEPENDENT)), true, false),
    ("restricted", Some((INDEPENDENT, ADDRESS)), true, false),
    ("port-restricted", Some((INDEPENDENT, PORT)), true, false),
    ("port-restricted-hairpin", Some((INDEPENDENT, PORT)), true, false),
    ("address-dependent", Some((ADDRESS, ADDRESS)), true, false),
    ("symmetric", Some((PORT, PORT)), true, false),
    ("cgn", Some((INDEPENDENT, PORT)), true, false),
    ("cgn-symmetric", Some((PORT, PORT)), true, false),
    ("udp-blocked", None, true, false),
    ("short", Some((INDEPENDENT, PORT)), true, false),
];

#[test]
fn presets_map_and_filter_as_they_say() {
    let mut config = LabConfig::hosts(2 + EXPECTED.len()).underlay(Underlay::Dual);
    for (expected, number) in EXPECTED.iter().zip(3..) {
        config = config.access(&format!("h{number}"), expected.0.parse().unwrap());
    }
    let lab = Lab::new(config).unwrap();
    let mut wrong = Vec::new();
    for family in FAMILIES {
        let servers = Servers::start(&lab, family);
        let _echoes = ["h1", "h2"].map(|host| lab[host].tcp_echo(PORTS[0]).unwrap());
        for (&(name, udp, translates, tcp_in), number) in EXPECTED.iter().zip(3..) {
            let is_translated = translates && family == Family::V4;
            let udp = udp.map(|(mapping, filtering)| {
                // Without translation there is one mapping only.
                (if is_translated { mapping } else { INDEPENDENT }, filtering)
            });
            let expected = Measured {
                mapping: udp.map(|(mapping, _)| mapping),
                filtering: udp.map(|(_, filtering)| filtering),
                is_translated,
                tcp_out: true,
                tcp_in,
            };
            match measure(&lab, &servers, &lab[format!("h{number}").as_str()], family, &expected) {
                Ok(measured) if measured == expected => {}
                Ok(measured) => {
                    wrong.push(format!("{name} {family:?}: {measured:?} in place of {expected:?}"))
                }
                Err(error) => wrong.push(format!("{name} {family:?}: {error:#}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let tested: Vec<&str> = EXPECTED.iter().map(|each| each.0).chain(["v4-only", "v6-only"]).collect();
    let all: BTreeSet<&str> = presets().iter().map(|preset| preset.name).collect();
    assert_eq!(all, tested.into_iter().collect(), "each preset is tested");
}

/// Returns a lab with two servers and these hosts behind NAT, `h3` and so on.
fn lab_with(accesses: &[&str]) -> Lab {
    let mut config = LabConfig::hosts(2 + accesses.len());
    for (access, number) in accesses.iter().zip(3..) {
        config = config.access(&format!("h{number}"), access.parse().unwrap());
    }
    Lab::new(config).unwrap()
}

#[test]
fn hosts_behind_one_box_have_mappings_of_their_own() {
    for (preset, keeps) in [("full-cone", false), ("port-restricted", true), ("address-dependent", false)] {
        let lab = lab_with(&[preset, "h3", "h3"]);
        let servers = Servers::start(&lab, Family::V4);
        let clients = ["h3", "h4", "h5"].map(|host| open(&lab[host], Family::V4, 7940));
        let outer: Vec<SocketAddr> =
            clients.iter().map(|client| servers.hear(client, (0, 0)).unwrap()).collect();
        let expected = lab["h3"].outer_addresses()[0];
        assert!(outer.iter().all(|seen| seen.ip() == expected), "{outer:?}");
        let ports: BTreeSet<u16> = outer.iter().map(SocketAddr::port).collect();
        assert_eq!(ports.len(), 3, "{preset}: {outer:?}");
        assert_eq!(ports.contains(&7940), keeps, "{preset}: {outer:?}");
        for (client, outer) in clients.iter().zip(&outer) {
            assert_eq!(servers.hear(client, (0, 1)).unwrap(), *outer, "{preset}");
            let same = servers.hear(client, (1, 0)).unwrap() == *outer;
            assert_eq!(same, preset != "address-dependent", "{preset}");
            let reached = servers.reach(client, *outer, &[(0, 1)], (0, 0), &[(0, 1)]).unwrap();
            assert_eq!(reached, [(0, 1)], "{preset}: each gets what is sent to its port");
        }
        // Inside, they reach each other without the box.
        clients[0].send_to(b"inside", (lab["h4"].addresses()[0], 7940)).unwrap();
        let (data, from) = wait_until(SOON, "a datagram in the LAN", || receive(&clients[1])).unwrap();
        assert_eq!((data.as_slice(), from.ip()), (b"inside".as_slice(), lab["h3"].addresses()[0]));
    }
}

#[test]
fn hairpinning_is_as_the_preset_says() {
    for (preset, expected) in [
        ("full-cone", false),
        ("full-cone-hairpin", true),
        ("port-restricted", false),
        ("port-restricted-hairpin", true),
        ("symmetric", false),
    ] {
        let lab = lab_with(&[preset, "h3"]);
        let servers = Servers::start(&lab, Family::V4);
        assert_eq!(hairpin(&servers, &lab["h3"], &lab["h4"], expected).unwrap(), expected, "{preset}");
        assert_eq!(
            hairpin(&servers, &lab["h3"], &lab["h3"], expected).unwrap(),
            expected,
            "{preset}, itself"
        );
    }
    // A carrier's box has the homes behind it as its inner side.
    for (preset, expected) in [("cgn", true), ("cgn-symmetric", false)] {
        let lab = lab_with(&[preset, preset]);
        let servers = Servers::start(&lab, Family::V4);
        assert_eq!(hairpin(&servers, &lab["h3"], &lab["h4"], expected).unwrap(), expected, "{preset}");
    }
}

/// Lets two hosts open a path to each other at the same time, as ICE does: both send to where the server sees the other one, and
/// to where they hear it from. Returns whether each hears the other.
fn punch(servers: &Servers, hosts: [&Netns; 2]) -> Result<bool> {
    let sockets = hosts.map(|host| open(host, Family::V4, 0));
    let mut known = [BTreeSet::new(), BTreeSet::new()];
    let mut outer = Vec::new();
    for (socket, at) in sockets.iter().zip([1, 0]) {
        let seen = servers.hear(socket, (0, 0))?;
        known[at].insert(seen);
        outer.push(seen);
    }
    let mut heard = [false; 2];
    // One round for each step: a datagram that opens, one that passes, the answer to it.
    for _ in 0..4 {
        for (socket, others) in sockets.iter().zip(&known) {
            for other in others {
                socket.send_to(b"punch", other)?;
            }
        }
        for at in 0..2 {
            // What has not arrived before an answer of the server was dropped.
            let word = unique();
            servers.sockets[0][0].send_to(&word, outer[at])?;
            wait_until(SOON, "the server's answer", || {
                let (data, from) = receive(&sockets[at])?;
                if data == b"punch" {
                    heard[at] = true;
                    known[at].insert(from);
                }
                (data == word).then_some(())
            })?;
        }
    }
    Ok(heard == [true; 2])
}

#[test]
fn pairs_connect_where_both_kinds_allow_it() {
    let kinds = [
        "public",
        "full-cone",
        "restricted",
        "port-restricted",
        "address-dependent",
        "symmetric",
        "cgn",
        "cgn-symmetric",
        "firewall",
    ];
    // Twice, so that each kind meets itself too.
    let lab = lab_with(&[kinds, kinds].concat());
    let servers = Servers::start(&lab, Family::V4);
    let host = |index: usize| &lab[format!("h{}", 3 + index).as_str()];
    let mut wrong = Vec::new();
    for (one, name) in kinds.iter().enumerate() {
        for (two, other) in kinds.iter().enumerate().skip(one) {
            let (from, to) = (host(one), host(kinds.len() + two));
            let expected = from.access().allows_direct(&to.access());
            match punch(&servers, [from, to]) {
                Ok(direct) if direct == expected => {}
                Ok(direct) => wrong.push(format!("{name}, {other}: {direct}")),
                Err(error) => wrong.push(format!("{name}, {other}: {error:#}")),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // By the rules of RFC 4787, in words.
    let allows = |one: &str, two: &str| {
        let [one, two] = [one, two].map(|name| name.parse::<Access>().unwrap());
        one.allows_direct(&two)
    };
    assert!(allows("port-restricted", "cgn") && allows("symmetric", "restricted"));
    assert!(!allows("symmetric", "symmetric") && !allows("symmetric", "port-restricted"));
    assert!(!allows("udp-blocked", "public") && !allows("v6-only", "public"));
}

/// Returns the number of mappings that a box remembers.
fn mappings(nat_box: &Netns) -> usize {
    let text = nat_box.exec_ok(["nft", "list", "map", "ip", "nat", "inward"]).unwrap();
    text.matches(" expires ").count()
}

#[test]
fn mappings_live_as_long_as_they_are_used() {
    let lab = lab_with(&["short", "port-restricted"]);
    let servers = Servers::start(&lab, Family::V4);
    let [short, long] = ["h3", "h4"].map(|host| open(&lab[host], Family::V4, 0));
    let start = Instant::now();
    let (outer, outer_long) = (servers.hear(&short, (0, 0)).unwrap(), servers.hear(&long, (0, 0)).unwrap());
    let lifetime = Duration::from_secs(5);
    wait_until(SOON * 4, "a mapping in use to outlive its lifetime", || {
        assert_eq!(servers.hear(&short, (0, 0)).unwrap(), outer);
        start.elapsed() > lifetime + Duration::from_secs(1)
    })
    .unwrap();
    let idle = Instant::now();
    assert!(servers.reach(&short, outer, &[], (0, 0), &[]).is_ok());
    let nat_box = &lab["h3"].nat_boxes()[0];
    wait_until(SOON * 4, "the mapping to be forgotten", || mappings(nat_box) == 0).unwrap();
    assert!(idle.elapsed() + Duration::from_millis(100) > lifetime, "forgotten after {:?}", idle.elapsed());
    wait_until(SOON * 2, "the connection to be forgotten", || {
        !nat_box.exec_ok(["cat", "/proc/net/nf_conntrack"]).unwrap().contains("udp")
    })
    .unwrap();
    // The server's answers do not arrive any more, unlike those to the other host.
    servers.sockets[0][0].send_to(b"late", outer).unwrap();
    assert!(servers.reach(&long, outer_long, &[], (0, 0), &[]).is_ok());
    assert_eq!(receive(&short), None);
}

#[test]
fn mappings_are_forgotten_on_request() {
    let lab = lab_with(&["full-cone", "cgn"]);
    let servers = Servers::start(&lab, Family::V4);
    for host in ["h3", "h4"] {
        let client = open(&lab[host], Family::V4, 0);
        let old = servers.hear(&client, (0, 0)).unwrap();
        assert!(servers.reach(&client, old, &[], (0, 0), &[]).is_ok());
        lab[host].forget_mappings().unwrap();
        servers.sockets[0][0].send_to(b"late", old).unwrap();
        let new = servers.hear(&client, (0, 0)).unwrap();
        assert!(new.ip() == old.ip() && new.port() != old.port(), "{host}: {old}, then {new}");
        let reached = servers.reach(&client, new, &[], (0, 0), &[]);
        assert!(reached.is_ok(), "{host}: {reached:?}");
    }
    let error = lab["h1"].forget_mappings().unwrap_err().to_string();
    assert!(error.contains("not behind a NAT box"), "{error}");
}

#[test]
fn running_lab_changes_its_boxes() {
    let lab = Lab::new(LabConfig::hosts(4).underlay(Underlay::Dual)).unwrap();
    let servers = FAMILIES.map(|family| Servers::start(&lab, family));
    let seen = |host: &str| {
        let seen = FAMILIES.map(|family| {
            let client = open(&lab[host], family, 0);
            servers[usize::from(family == Family::V6)].hear(&client, (0, 1)).unwrap().ip()
        });
        let outer = lab[host].outer_addresses();
        assert_eq!(seen.as_slice(), outer, "{host}");
        seen.map(|address| address.to_string())
    };
    let set = |host: &str, access: &str| lab[host].set_access(&access.parse().unwrap());
    assert_eq!(seen("h3"), ["192.168.77.3", "fd77::3"]);
    for access in ["full-cone", "cgn", "symmetric", "firewall", "cgn-symmetric", "none", "port-restricted"] {
        set("h3", access).unwrap();
        let outer = seen("h3");
        let expected = match access {
            "cgn" => "192.168.77.251",
            // The first carrier's box goes only after the second one has come.
            "cgn-symmetric" => "192.168.77.251",
            _ => "192.168.77.3",
        };
        assert_eq!(outer, [expected, "fd77::3"], "{access}");
    }

    // Another host in the same LAN: the box stays as long as it is needed.
    set("h4", "h3").unwrap();
    assert_eq!(seen("h4"), ["192.168.77.3", "fd77::4"]);
    let error = set("h3", "none").unwrap_err().to_string();
    assert!(error.contains("h4 is behind the NAT box of h3"), "{error}");
    assert!(set("h2", "h4").unwrap_err().to_string().contains("no NAT box of its own"));
    assert!(set("h3", "h3").is_err() && set("h3", "h9").is_err());

    // Another outer address, for both.
    let client = open(&lab["h3"], Family::V4, 0);
    let old = servers[0].hear(&client, (0, 0)).unwrap();
    let renumbered = lab["h3"].renumber().unwrap();
    assert!(!renumbered.contains(&old.ip()) && seen("h3")[0] == renumbered[0].to_string());
    assert_eq!(seen("h4")[0], seen("h3")[0]);
    assert_ne!(servers[0].hear(&client, (0, 0)).unwrap().ip(), old.ip());
    assert_ne!(lab["h3"].renumber().unwrap(), renumbered, "each time another one");
    seen("h3");

    // A host without a box, too.
    let own = lab["h2"].addresses();
    let renumbered = lab["h2"].renumber().unwrap();
    assert!(own.iter().all(|address| !renumbered.contains(address)) && lab["h2"].addresses() == renumbered);
    assert!(
        lab["h3"].ping(renumbered[0].to_string(), SOON) && lab["h3"].ping(renumbered[1].to_string(), SOON)
    );

    // Hosts of one family.
    set("h4", "v4-only").unwrap();
    assert_eq!(lab["h4"].addresses(), ["192.168.77.4".parse::<IpAddr>().unwrap()]);
    assert!(!lab["h4"].exec_ok(["ip", "-6", "addr"]).unwrap().contains("fd77"));
    set("h4", "v6-only").unwrap();
    assert_eq!(lab["h4"].addresses(), ["fd77::4".parse::<IpAddr>().unwrap()]);
    assert!(!lab["h4"].exec_ok(["ip", "-4", "addr", "show", "eth0"]).unwrap().contains("inet "));
    assert!(lab["h4"].ping("fd77::1", SOON));
    set("h3", "none").unwrap();
    assert_eq!(seen("h3"), ["192.168.77.3", lab["h3"].addresses()[1].to_string().as_str()]);
    let namespaces = lab["h1"].exec_ok(["ip", "netns"]).unwrap();
    assert!(!namespaces.contains(&format!("{}-n", lab.name())), "a box is left: {namespaces}");
}

#[test]
fn faults_and_lost_hosts_work_behind_boxes() {
    let lab = lab_with(&["port-restricted", "symmetric"]);
    let reaches = |from: &str, to: &str| lab[from].ping(to, Duration::from_millis(300));
    assert!(reaches("h3", "192.168.77.1") && reaches("h4", "192.168.77.1"));
    lab.cut(&[("h3", "h1")], false).unwrap();
    assert!(!reaches("h3", "192.168.77.1") && reaches("h3", "192.168.77.2") && reaches("h4", "192.168.77.1"));
    // The cut stays where the host is.
    lab["h3"].set_access(&Access::PUBLIC).unwrap();
    assert!(!reaches("h3", "192.168.77.1") && reaches("h3", "192.168.77.2"));
    lab.heal().unwrap();
    lab["h3"].set_access(&"cgn".parse().unwrap()).unwrap();
    assert!(lab["h3"].ping_until("192.168.77.1", SOON).is_ok());

    lab["h3"].link_down().unwrap();
    assert!(!reaches("h3", "192.168.77.1"));
    lab["h3"].link_up().unwrap();
    assert!(lab["h3"].ping_until("192.168.77.1", SOON).is_ok());
    lab["h3"].set_port_mtu(1300).unwrap();
    let fits = |size: &str| {
        lab["h3"].exec(["ping", "-c1", "-W0.3", "-Mdo", "-s", size, "192.168.77.1"]).unwrap().success()
    };
    assert!(fits("1200") && !fits("1400"));
    lab["h3"].set_port_mtu(1500).unwrap();

    lab["h3"].destroy().unwrap();
    lab["h3"].restore().unwrap();
    assert_eq!(lab["h3"].addresses(), ["192.168.1.3".parse::<IpAddr>().unwrap()]);
    assert!(lab["h3"].ping_until("192.168.77.1", SOON).is_ok());

    let name = lab.name().to_owned();
    drop(lab);
    assert!(!lab_names().unwrap().contains(&name));
    let left: Vec<String> = std::fs::read_dir("/run/netns")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .filter(|entry| entry.starts_with(&format!("{name}-")))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn underlay_of_one_family_has_boxes_too() {
    let config = LabConfig::hosts(3).underlay(Underlay::V6).access("h3", "restricted".parse().unwrap());
    let lab = Lab::new(config).unwrap();
    let servers = Servers::start(&lab, Family::V6);
    assert_eq!(filtering(&servers, &lab["h3"], Family::V6, ADDRESS).unwrap(), ADDRESS);
    let error = lab["h2"].set_access(&"v4-only".parse().unwrap()).unwrap_err().to_string();
    assert!(error.contains("--underlay dual"), "{error}");
}
