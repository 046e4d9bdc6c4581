//! What goes over the overlay, what does not, and how large it may be.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Netns, PortMtu, Underlay, wait_until};
use ovl_tests::{
    Attached, SOON, assert_says, attach, attach_workload, make_network, ping_all_pairs, refused, rows,
    show_frames_to_firewall, started, started_with, text, wait_clean, wait_endpoints,
};
use serde_json::Value;

const SECOND: Duration = Duration::from_secs(1);

/// UDP port of listeners in workloads.
const PORT: u16 = 5000;

/// The VXLAN port of all labs here.
const VXLAN_PORT: u16 = 4789;

/// An address of the underlay that belongs to no host of the cluster: the switch's own.
const OUTSIDE_V4: &str = "192.168.77.250";
const OUTSIDE_V6: &str = "fd77::fa";

/// Gives the switch these addresses: a machine on the underlay that is no member.
fn outsider(lab: &Lab, addresses: &[&str]) -> Netns {
    let switch = lab.switch();
    for address in addresses {
        let (length, nodad) = if address.contains(':') { (64, &["nodad"][..]) } else { (24, &[][..]) };
        let prefix = format!("{address}/{length}");
        switch.exec_ok([&["ip", "addr", "add", &prefix, "dev", "br0"], nodad].concat()).unwrap();
    }
    switch
}

/// Pings, TCP and UDP between every two of these workloads, over each of their addresses.
fn everything_between(all: &[Attached]) {
    let bulk: Vec<u8> = (0..200_000_u32).map(|number| (number % 251) as u8).collect();
    let datagram = &bulk[..4000];
    for to in all {
        assert!(!to.addresses().is_empty(), "{}", to.json);
        for address in to.addresses() {
            let at = SocketAddr::new(address.parse().unwrap(), 0);
            let (tcp, udp) = (to.workload.tcp_echo_on(at).unwrap(), to.workload.udp_echo_on(at).unwrap());
            for from in all.iter().filter(|from| from.name != to.name) {
                let way = format!("from {} to {} at {address}", from.name, to.name);
                from.workload.ping_until(&address, SOON).context(way.clone()).unwrap();
                let back =
                    from.workload.tcp_roundtrip(&address, tcp.port(), &bulk).context(way.clone()).unwrap();
                assert!(back == bulk, "TCP {way}");
                let back = from.workload.udp_roundtrip(&address, udp.port(), datagram).context(way.clone());
                assert!(back.unwrap() == datagram, "UDP {way}");
            }
        }
    }
}

/// A socket in a namespace, at that address and port, whose reads end after [`SOON`].
fn listener(at: &Netns, address: impl Into<IpAddr>, port: u16) -> UdpSocket {
    let address = SocketAddr::new(address.into(), port);
    let socket = at.run(|| UdpSocket::bind(address)).unwrap().unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket
}

/// The next datagram, and where it came from.
fn next(socket: &UdpSocket) -> Result<(String, SocketAddr)> {
    let mut buffer = [0; 2048];
    let (length, from) = socket.recv_from(&mut buffer)?;
    Ok((String::from_utf8_lossy(&buffer[..length]).into_owned(), from))
}

/// Whether nothing waits to be read.
fn is_silent(socket: &UdpSocket) -> bool {
    socket.set_nonblocking(true).unwrap();
    let result = socket.recv_from(&mut [0; 64]);
    socket.set_nonblocking(false).unwrap();
    result.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

/// Sends a text in one datagram, to a broadcast address too.
fn send(from: &Netns, to: SocketAddr, text: &str) {
    let any = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { IpAddr::from(Ipv6Addr::UNSPECIFIED) };
    let socket = from.run(|| UdpSocket::bind((any, 0))).unwrap().unwrap();
    socket.set_broadcast(true).unwrap();
    socket.send_to(text.as_bytes(), to).unwrap();
}

/// The index of an interface.
fn index_of(at: &Netns, interface: &str) -> u32 {
    let link = at.ip_json(&["link", "show", "dev", interface]).unwrap();
    u32::try_from(link[0]["ifindex"].as_u64().unwrap()).unwrap()
}

/// Whether a packet of that size, IP header included, is answered uncut.
fn fits(from: &Netns, address: &str, size: u32) -> bool {
    let headers = if address.contains(':') { 48 } else { 28 };
    let payload = (size - headers).to_string();
    from.exec(["ping", "-n", "-c1", "-W1", "-Mdo", "-s", &payload, address]).unwrap().success()
}

/// Checks that exactly the MTU fits between two workloads, and no byte more.
fn assert_fits_exactly(from: &Attached, to: &Attached, mtu: u32) {
    for address in to.addresses() {
        wait_until(SOON, &format!("{mtu} bytes to {address}"), || fits(&from.workload, &address, mtu))
            .unwrap();
        assert!(!fits(&from.workload, &address, mtu + 1), "{} bytes pass to {address}", mtu + 1);
    }
}

/// The MTU of an interface.
fn mtu_of(at: &Netns, interface: &str) -> Result<u32> {
    let link = at.ip_json(&["link", "show", "dev", interface])?;
    link[0]["mtu"].as_u64().and_then(|mtu| u32::try_from(mtu).ok()).with_context(|| format!("{link}"))
}

/// The MTU of a network in force, if it is the same as ovlctl says, on the bridge, on the VXLAN
/// device and at both ends of the endpoints, on all their hosts.
fn network_mtu(network: &str, all: &[Attached]) -> Result<u32> {
    let mut seen: Vec<(String, u32)> = Vec::new();
    for each in all {
        let host = each.workload.host();
        let info = host.ctl_json(&["network", "inspect", network])?;
        let said = info["mtu"].as_u64().and_then(|mtu| u32::try_from(mtu).ok()).context("no MTU")?;
        let bridge = text(&info["bridge"]);
        seen.push((format!("{} says", host.name()), said));
        for device in [bridge.clone(), bridge.replace("ovb-", "ovx-"), each.device()] {
            seen.push((format!("{device} on {}", host.name()), mtu_of(host, &device)?));
        }
        let inner = text(&each.json["ifname"]);
        seen.push((format!("{inner} in {}", each.name), mtu_of(&each.workload, &inner)?));
    }
    let first = seen.first().context("no endpoint")?.1;
    ensure!(seen.iter().all(|(_, mtu)| *mtu == first), "{seen:?}");
    Ok(first)
}

fn wait_mtu(network: &str, all: &[Attached], wanted: u32, timeout: Duration) {
    wait_until(timeout, &format!("an MTU of {wanted}"), || {
        let mtu = network_mtu(network, all)?;
        ensure!(mtu == wanted, "it is {mtu}");
        Ok(())
    })
    .unwrap();
}

/// The VTEPs in a host's flood list for a network, as `bridge` shows them.
fn floods(host: &Host, network: &str) -> Result<Vec<String>> {
    let info = host.ctl_json(&["network", "inspect", network])?;
    let Some(bridge) = info["bridge"].as_str() else { return Ok(Vec::new()) };
    let entries = host.bridge_json(&["fdb", "show", "dev", &bridge.replace("ovb-", "ovx-")])?;
    let all = entries.as_array().into_iter().flatten();
    let mut vteps: Vec<String> =
        all.filter(|entry| entry["mac"] == "00:00:00:00:00:00").map(|entry| text(&entry["dst"])).collect();
    vteps.sort();
    Ok(vteps)
}

fn wait_floods(host: &Host, network: &str, wanted: &[&str]) {
    wait_until(SOON, &format!("{} to flood to {wanted:?}", host.name()), || {
        let vteps = floods(host, network)?;
        ensure!(vteps == wanted, "it floods to {vteps:?}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_dual_stack_network_carries_ping_tcp_and_udp_within_and_between_hosts() {
    let lab = started(3).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.99.0.0/24", "--subnet", "fd99::/64"]).unwrap();
    let all = [("h1", "a"), ("h1", "b"), ("h2", "c"), ("h3", "d")]
        .map(|(host, name)| attach(&lab[host], name, "blue", &[]).unwrap());
    for each in &all {
        assert_eq!(each.addresses().len(), 2, "{}", each.json);
    }
    everything_between(&all);
    // As Docker and Kubernetes set up their hosts: frames within the network pass our chains too.
    lab.hosts().iter().for_each(|host| show_frames_to_firewall(host, true).unwrap());
    everything_between(&all);
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn an_ipv6_underlay_carries_ipv4_and_ipv6_networks() {
    let lab = started_with(LabConfig::hosts(2).underlay(Underlay::V6)).unwrap();
    make_network(&lab, "four", &["--subnet", "10.99.0.0/24"]).unwrap();
    make_network(&lab, "six", &["--subnet", "fd99::/64"]).unwrap();
    for network in ["four", "six"] {
        let all = [("h1", "a"), ("h1", "b"), ("h2", "c")]
            .map(|(host, name)| attach(&lab[host], &format!("{name}-{network}"), network, &[]).unwrap());
        everything_between(&all);
    }
    let peers = rows(&lab["h1"], &["peers"]).unwrap();
    assert!(
        peers.iter().any(|peer| peer["address"] == "[fd77::2]:7940" && peer["vtep"] == "fd77::2"),
        "{peers:?}"
    );
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn broadcast_reaches_all_endpoints_of_its_network_and_no_others() {
    let lab = started(2).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    make_network(&lab, "red", &["--subnet", "10.98.0.0/24"]).unwrap();
    let blue =
        [("h1", "a"), ("h1", "b"), ("h2", "c")].map(|(h, name)| attach(&lab[h], name, "blue", &[]).unwrap());
    let red = [("h1", "x"), ("h2", "y")].map(|(h, name)| attach(&lab[h], name, "red", &[]).unwrap());
    ping_all_pairs(&blue, SOON).unwrap();
    ping_all_pairs(&red, SOON).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();

    let hear = |all: &[Attached]| -> Vec<UdpSocket> {
        all.iter().map(|each| listener(&each.workload, Ipv4Addr::UNSPECIFIED, PORT)).collect()
    };
    let (hears_blue, hears_red) = (hear(&blue[1..]), hear(&red));
    for broadcast in ["10.99.0.255:5000", "255.255.255.255:5000"] {
        send(&blue[0].workload, broadcast.parse().unwrap(), broadcast);
        for socket in &hears_blue {
            assert_eq!(next(socket).unwrap().0, broadcast);
        }
    }
    // Whatever had come over from blue would have been there before this.
    for (socket, each) in hears_red.iter().zip(&red) {
        let address = SocketAddr::new(each.address().parse().unwrap(), PORT);
        let other = red.iter().find(|other| other.name != each.name).unwrap();
        send(&other.workload, address, "to one in red");
        assert_eq!(next(socket).unwrap().0, "to one in red");
    }
}

#[test]
fn multicast_reaches_members_on_other_hosts() {
    let lab = started(2).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.99.0.0/24", "--subnet", "fd99::/64"]).unwrap();
    let all =
        [("h1", "a"), ("h1", "b"), ("h2", "c")].map(|(h, name)| attach(&lab[h], name, "blue", &[]).unwrap());
    ping_all_pairs(&all, SOON).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    let group4: Ipv4Addr = "239.1.2.3".parse().unwrap();
    // Of organisation scope and of link scope: the latter is what mDNS and router discovery use.
    let groups6: [Ipv6Addr; 2] = ["ff18::1234".parse().unwrap(), "ff12::1234".parse().unwrap()];
    let sockets: Vec<(UdpSocket, UdpSocket)> = all[1..]
        .iter()
        .map(|each| {
            let index = index_of(&each.workload, "eth0");
            let four = listener(&each.workload, Ipv4Addr::UNSPECIFIED, PORT);
            four.join_multicast_v4(&group4, &each.address().parse().unwrap()).unwrap();
            let six = listener(&each.workload, Ipv6Addr::UNSPECIFIED, PORT + 1);
            for group in &groups6 {
                six.join_multicast_v6(group, index).unwrap();
            }
            (four, six)
        })
        .collect();
    let from = &all[0].workload;
    send(from, (group4, PORT).into(), "IPv4 group");
    let scope = index_of(from, "eth0");
    for group in groups6 {
        send(from, SocketAddrV6::new(group, PORT + 1, 0, scope).into(), &group.to_string());
    }
    for (four, six) in &sockets {
        assert_eq!(next(four).unwrap().0, "IPv4 group");
        for group in groups6 {
            assert_eq!(next(six).unwrap().0, group.to_string());
        }
    }
}

#[test]
fn one_namespace_can_be_on_several_networks_and_networks_are_isolated() {
    let lab = started(2).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.99.0.0/24", "--subnet", "fd99::/64"]).unwrap();
    make_network(&lab, "red", &["--subnet", "10.98.0.0/24", "--subnet", "fd98::/64"]).unwrap();
    let both = attach(&lab["h1"], "both", "blue", &[]).unwrap();
    let both_red = attach_workload(both.workload.clone(), "red", &[]).unwrap();
    assert_eq!((text(&both.json["ifname"]), text(&both_red.json["ifname"])), ("eth0".into(), "eth1".into()));
    let blue = [("h1", "b1"), ("h2", "b2")].map(|(h, name)| attach(&lab[h], name, "blue", &[]).unwrap());
    let red = [("h1", "r1"), ("h2", "r2")].map(|(h, name)| attach(&lab[h], name, "red", &[]).unwrap());
    for to in blue.iter().chain(&red) {
        for address in to.addresses() {
            both.workload.ping_until(&address, SOON).unwrap();
        }
    }
    ping_all_pairs(&blue, SOON).unwrap();
    ping_all_pairs(&red, SOON).unwrap();
    for (from, to) in blue.iter().flat_map(|from| red.iter().map(move |to| (from, to))) {
        for (from, to) in [(from, to), (to, from)] {
            for address in to.addresses() {
                assert!(!from.workload.ping(&address, SECOND / 4), "{} reaches {}", from.name, to.name);
            }
        }
    }
    // Detached from one, it stays on the other.
    lab["h1"].ctl_ok(&["detach", "both", "--network", "blue"]).unwrap();
    both.workload.ping_until(red[1].address(), SOON).unwrap();
    assert!(!both.workload.ping(blue[1].address(), SECOND / 4));
}

#[test]
fn endpoints_reach_outside_through_their_own_host_with_its_address() {
    let lab = started_with(LabConfig::hosts(2).underlay(Underlay::Dual)).unwrap();
    let outside = outsider(&lab, &[OUTSIDE_V4, OUTSIDE_V6]);
    make_network(&lab, "blue", &["--subnet", "10.99.0.0/24", "--subnet", "fd99::/64"]).unwrap();
    let all = [("h1", "a"), ("h2", "b")].map(|(h, name)| attach(&lab[h], name, "blue", &[]).unwrap());
    for (address, port) in [(OUTSIDE_V4, PORT), (OUTSIDE_V6, PORT + 1)] {
        let address: IpAddr = address.parse().unwrap();
        let hears = listener(&outside, address, port);
        let echo = outside.tcp_echo_on((address, port).into()).unwrap();
        for each in &all {
            each.workload.ping_until(address, SOON).unwrap();
            send(&each.workload, (address, port).into(), &each.name);
            let (name, from) = next(&hears).unwrap();
            assert_eq!(name, each.name);
            assert!(each.workload.host().addresses().contains(&from.ip()), "{name} came from {from}");
            assert_eq!(each.workload.tcp_roundtrip(address, echo.port(), b"out").unwrap(), b"out");
        }
    }
    // And other hosts' own addresses, and the gateway itself.
    for target in ["192.168.77.1", "192.168.77.2", "fd77::1", "fd77::2", "10.99.0.1"] {
        all[0].workload.ping_until(target, SOON).unwrap();
    }
}

#[test]
fn an_internal_network_has_no_way_out() {
    let lab = started(2).unwrap();
    let outside = outsider(&lab, &[OUTSIDE_V4]);
    make_network(&lab, "inner", &["--subnet", "10.98.0.0/24", "--internal"]).unwrap();
    make_network(&lab, "outer", &["--subnet", "10.99.0.0/24"]).unwrap();
    let all = [("h1", "a"), ("h2", "b")].map(|(h, name)| attach(&lab[h], name, "inner", &[]).unwrap());
    let other = attach(&lab["h1"], "c", "outer", &[]).unwrap();
    ping_all_pairs(&all, SOON).unwrap();
    other.workload.ping_until(OUTSIDE_V4, SOON).unwrap();
    let from = &all[0].workload;
    let hears = listener(&outside, Ipv4Addr::UNSPECIFIED, PORT);
    assert!(!from.ping(OUTSIDE_V4, SECOND / 4));

    // A workload may write its own routes: as if the gateway were there, with the bridge's MAC.
    let bridge = text(&lab["h1"].ctl_json(&["network", "inspect", "inner"]).unwrap()["bridge"]);
    let mac = text(&lab["h1"].ip_json(&["link", "show", "dev", &bridge]).unwrap()[0]["address"]);
    from.exec_ok(["ip", "neigh", "replace", "10.98.0.1", "lladdr", &mac, "dev", "eth0"]).unwrap();
    from.exec_ok(["ip", "route", "add", "default", "via", "10.98.0.1"]).unwrap();
    for target in [OUTSIDE_V4, "192.168.77.1", "192.168.77.2", &other.address()] {
        assert!(!from.ping(target, SECOND / 4), "{target} answers");
    }
    let to = SocketAddr::new(OUTSIDE_V4.parse().unwrap(), PORT);
    send(from, to, "from the inside");
    send(&other.workload, to, "from the outside");
    assert_eq!(next(&hears).unwrap().0, "from the outside");
    assert!(is_silent(&hears));
}

/// The VXLAN header, and an Ethernet frame with a UDP datagram.
fn vxlan_packet(vni: u32, to_mac: [u8; 6], to: Ipv4Addr, port: u16, payload: &[u8]) -> Vec<u8> {
    let udp_length = u16::try_from(8 + payload.len()).unwrap();
    let from: [u8; 4] = [10, 99, 0, 200];
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_length).to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    ip.extend(from);
    ip.extend(to.octets());
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let folded = u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    ip[10..12].copy_from_slice(&(!folded).to_be_bytes());

    let mut packet = vec![8, 0, 0, 0];
    packet.extend((vni << 8).to_be_bytes());
    packet.extend(to_mac);
    packet.extend([2, 0, 0, 0, 0, 200, 8, 0]);
    packet.extend(ip);
    // No checksum: IPv4 allows that.
    packet.extend([port.to_be_bytes(), port.to_be_bytes(), udp_length.to_be_bytes(), [0, 0]].concat());
    packet.extend(payload);
    packet
}

fn mac_bytes(mac: &str) -> [u8; 6] {
    let bytes: Vec<u8> = mac.split(':').map(|part| u8::from_str_radix(part, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}

fn assert_strangers_vxlan_reaches_nobody(underlay: Underlay, outside_address: &str) {
    let lab = started_with(LabConfig::hosts(2).underlay(underlay)).unwrap();
    let outside = outsider(&lab, &[outside_address]);
    make_network(&lab, "blue", &["--subnet", "10.99.0.0/24", "--vni", "777"]).unwrap();
    let all = [("h1", "a"), ("h2", "b")].map(|(h, name)| attach(&lab[h], name, "blue", &[]).unwrap());
    ping_all_pairs(&all, SOON).unwrap();
    let target = &all[1];
    let hears = listener(&target.workload, Ipv4Addr::UNSPECIFIED, PORT);
    let vtep = SocketAddr::new(lab["h2"].address().unwrap(), VXLAN_PORT);
    let inject = |from: &Netns, mac: [u8; 6], text: &str| {
        let local: IpAddr =
            if vtep.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = from.run(|| UdpSocket::bind((local, 0))).unwrap().unwrap();
        let to = target.address().parse().unwrap();
        socket.send_to(&vxlan_packet(777, mac, to, PORT, text.as_bytes()), vtep).unwrap();
    };
    // The switch has to have asked for h2's MAC address, or the order would not be kept.
    outside.ping_until(vtep.ip(), SOON).unwrap();
    let mac = mac_bytes(&target.mac());
    inject(&outside, mac, "from a stranger");
    inject(&outside, [0xff; 6], "from a stranger to all");
    // The same packet of a member shows that it is a good one, and that the others are not late.
    inject(&lab["h1"], mac, "from a member");
    assert_eq!(next(&hears).unwrap().0, "from a member");
    assert!(is_silent(&hears));
}

#[test]
fn vxlan_packets_of_strangers_reach_nobody() {
    assert_strangers_vxlan_reaches_nobody(Underlay::V4, OUTSIDE_V4);
}

#[test]
fn vxlan_packets_of_strangers_reach_nobody_on_an_ipv6_underlay() {
    assert_strangers_vxlan_reaches_nobody(Underlay::V6, OUTSIDE_V6);
}

/// Counts what VXLAN packets between hosts carry.
const WATCH: &str = "table bridge watch {
    counter asked4 {}
    counter asked6 {}
    counter echoes {}
    chain forward {
        type filter hook forward priority -10; policy accept;
        udp dport 4789 @th,224,16 0x0806 counter name asked4
        udp dport 4789 @th,224,16 0x86dd @th,288,8 58 @th,560,8 135 counter name asked6
        udp dport 4789 @th,224,16 0x0800 @th,312,8 1 counter name echoes
        udp dport 4789 @th,224,16 0x86dd @th,288,8 58 @th,560,8 128 counter name echoes
    }
}";

fn counted(switch: &Netns, name: &str) -> u64 {
    let listed = switch.exec_ok(["nft", "-j", "list", "counter", "bridge", "watch", name]).unwrap();
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let all = listed["nftables"].as_array().unwrap();
    all.iter().find_map(|each| each["counter"]["packets"].as_u64()).unwrap()
}

#[test]
fn no_question_for_a_known_endpoint_crosses_the_underlay() {
    let lab = started(2).unwrap();
    let switch = lab.switch();
    make_network(&lab, "blue", &["--subnet", "10.99.0.0/24", "--subnet", "fd99::/64"]).unwrap();
    let all = [("h1", "a"), ("h2", "b")].map(|(h, name)| attach(&lab[h], name, "blue", &[]).unwrap());
    for host in lab.hosts() {
        wait_endpoints(host, &["a on h1 is ready", "b on h2 is ready"], SOON).unwrap();
    }
    wait_clean(lab.hosts(), SOON).unwrap();
    switch.exec_input(["nft", "-f", "-"], Some(WATCH)).unwrap();
    for (from, to) in [(&all[0], &all[1]), (&all[1], &all[0])] {
        for address in to.addresses() {
            // At once: nobody waits for an answer that has to cross.
            from.workload.ping_until(&address, SOON).unwrap();
        }
        from.workload.exec_ok(["ip", "neigh", "flush", "all"]).unwrap();
        for address in to.addresses() {
            from.workload.ping_until(&address, SOON).unwrap();
        }
    }
    assert!(counted(&switch, "echoes") >= 12, "{} echoes", counted(&switch, "echoes"));
    assert_eq!((counted(&switch, "asked4"), counted(&switch, "asked6")), (0, 0));
    // These counters do count: one for an address that nobody has is asked everywhere.
    assert!(!all[0].workload.ping("10.99.0.222", SECOND / 4));
    assert!(!all[0].workload.ping("fd99::dead", SECOND / 4));
    assert!(counted(&switch, "asked4") > 0 && counted(&switch, "asked6") > 0);
}

#[test]
fn flood_lists_hold_the_hosts_with_endpoints_and_no_others() {
    let lab = started(3).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    attach(&lab["h1"], "a", "blue", &[]).unwrap();
    attach(&lab["h2"], "b", "blue", &[]).unwrap();
    wait_floods(&lab["h1"], "blue", &["192.168.77.2"]);
    wait_floods(&lab["h2"], "blue", &["192.168.77.1"]);
    assert!(floods(&lab["h3"], "blue").unwrap().is_empty());
    assert!(!lab["h3"].exec_ok(["ip", "-o", "link"]).unwrap().contains("ovx-"));
    attach(&lab["h3"], "c", "blue", &[]).unwrap();
    wait_floods(&lab["h1"], "blue", &["192.168.77.2", "192.168.77.3"]);
    wait_floods(&lab["h2"], "blue", &["192.168.77.1", "192.168.77.3"]);
    wait_floods(&lab["h3"], "blue", &["192.168.77.1", "192.168.77.2"]);
    lab["h2"].ctl_ok(&["detach", "b"]).unwrap();
    wait_floods(&lab["h1"], "blue", &["192.168.77.3"]);
    wait_floods(&lab["h3"], "blue", &["192.168.77.1"]);
    wait_floods(&lab["h2"], "blue", &[]);
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn the_mtu_is_what_the_underlay_carries_and_no_byte_is_lost_or_cut() {
    for (underlay, mtu, expected) in [(Underlay::V4, 1500, 1450), (Underlay::V6, 9000, 8930)] {
        let lab = started_with(LabConfig::hosts(2).underlay(underlay).mtu(mtu)).unwrap();
        make_network(&lab, "blue", &["--subnet", "10.99.0.0/24", "--subnet", "fd99::/64"]).unwrap();
        let all = [("h1", "a"), ("h2", "b")].map(|(h, name)| attach(&lab[h], name, "blue", &[]).unwrap());
        wait_mtu("blue", &all, expected, SOON);
        assert_fits_exactly(&all[0], &all[1], expected);
        assert_fits_exactly(&all[1], &all[0], expected);
    }
}

#[test]
fn a_change_of_the_underlays_mtu_is_followed_everywhere() {
    let lab = started(2).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    let all = [("h1", "a"), ("h2", "b")].map(|(h, name)| attach(&lab[h], name, "blue", &[]).unwrap());
    wait_mtu("blue", &all, 1450, SOON);
    lab["h2"].set_mtu(1400, PortMtu::Follow).unwrap();
    wait_mtu("blue", &all, 1350, SOON);
    assert_fits_exactly(&all[0], &all[1], 1350);
    lab["h2"].set_mtu(1500, PortMtu::Follow).unwrap();
    wait_mtu("blue", &all, 1450, SOON);
    assert_fits_exactly(&all[0], &all[1], 1450);
    // A smaller one can be asked for; a larger one than the paths carry is not in force.
    lab["h1"].ctl_ok(&["network", "update", "blue", "--mtu", "1300"]).unwrap();
    wait_mtu("blue", &all, 1300, SOON);
    lab["h1"].ctl_ok(&["network", "update", "blue", "--mtu", "4000"]).unwrap();
    wait_mtu("blue", &all, 1450, SOON);
    lab["h1"].ctl_ok(&["network", "update", "blue", "--mtu", "0"]).unwrap();
    wait_mtu("blue", &all, 1450, SOON);
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn a_path_that_becomes_narrower_is_found_out() {
    let lab = started(3).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    let all = [("h1", "a"), ("h2", "b")].map(|(h, name)| attach(&lab[h], name, "blue", &[]).unwrap());
    wait_mtu("blue", &all, 1450, SOON);
    // No host is told; the port lets four bytes more pass.
    lab["h2"].set_port_mtu(1400).unwrap();
    let mtu = wait_until(SOON * 2, "an MTU that the narrow port lets pass", || {
        let mtu = network_mtu("blue", &all)?;
        ensure!(mtu <= 1354, "it is {mtu}");
        Ok(Some(mtu))
    })
    .unwrap();
    assert!(mtu >= 1342, "{mtu} wastes too much");
    assert_fits_exactly(&all[0], &all[1], mtu);
    let path = rows(&lab["h1"], &["peers"]).unwrap().into_iter().find(|peer| peer["name"] == "h2").unwrap();
    assert!((1392..=1404).contains(&path["path_mtu"].as_u64().unwrap()), "{path}");
    // A host that is not on the narrow path has its full width with the others.
    let third = attach(&lab["h3"], "c", "blue", &[]).unwrap();
    lab["h2"].ctl_ok(&["detach", "b"]).unwrap();
    wait_mtu("blue", &[all[0].clone(), third], 1450, SOON);
}

#[test]
fn another_vxlan_port_can_be_configured() {
    let lab = started_with(LabConfig::hosts(2).config("vxlan_port = 8472")).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    let all = [("h1", "a"), ("h2", "b")].map(|(h, name)| attach(&lab[h], name, "blue", &[]).unwrap());
    let count = "table bridge watch {
        counter crossed {}
        chain forward { type filter hook forward priority -10; policy accept; udp dport 8472 counter name crossed; }
    }";
    lab.switch().exec_input(["nft", "-f", "-"], Some(count)).unwrap();
    ping_all_pairs(&all, SOON).unwrap();
    assert!(counted(&lab.switch(), "crossed") >= 4);
}

#[test]
fn a_vni_that_a_foreign_device_has_is_reported_with_its_name() {
    let lab = started(1).unwrap();
    let host = &lab["h1"];
    make_network(&lab, "blue", &["--subnet", "10.99.0.0/24", "--vni", "777"]).unwrap();
    host.exec_ok("ip link add foreign7 type vxlan id 777 dstport 4789 nolearning".split(' ')).unwrap();
    host.exec_ok(["ip", "link", "set", "foreign7", "up"]).unwrap();
    let workload = host.workload("a").unwrap();
    let error = refused(host, &["attach", "a", "--network", "blue", "--netns", workload.path_str()]).unwrap();
    assert_says(&error, &["foreign7", "777"]);
    assert!(!workload.exec_ok(["ip", "-o", "link"]).unwrap().contains("eth0"));
    host.exec_ok(["ip", "link", "del", "foreign7"]).unwrap();
    wait_until(SOON, "the attach to work", || attach_workload(workload.clone(), "blue", &[]).map(drop))
        .unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}
