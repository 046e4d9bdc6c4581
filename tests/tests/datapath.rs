//! Overlay traffic between endpoints, isolation of networks, and the MTU.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Netns, PortMtu, Underlay, uninterrupted, wait_until};
use ovl_tests::inject::{mac_bytes, spoofing_socket};
use ovl_tests::routed::create_routed_network;
use ovl_tests::{
    Attached, SOON, assert_contains, assert_no_reply, attach, attach_workload, create_network, ctl_error,
    ping_all_pairs, rows, set_bridge_nf_call, start_lab, start_lab_with, text, wait_clean, wait_endpoints,
};
use serde_json::Value;

/// UDP port of listeners in workloads.
const PORT: u16 = 5000;

/// VXLAN port of all labs here.
const VXLAN_PORT: u16 = 4789;

/// Underlay addresses of the switch, which is not a host of the cluster.
const OUTSIDE_V4: &str = "192.168.77.250";
const OUTSIDE_V6: &str = "fd77::fa";

/// Assigns these addresses to the switch, which then acts as a machine on the underlay that is not a member.
fn outsider(lab: &Lab, addresses: &[&str]) -> Netns {
    let switch = lab.switch();
    for address in addresses {
        let (length, nodad) = if address.contains(':') { (64, &["nodad"][..]) } else { (24, &[][..]) };
        let prefix = format!("{address}/{length}");
        switch.exec_ok([&["ip", "addr", "add", &prefix, "dev", "br0"], nodad].concat()).unwrap();
    }
    switch
}

/// Checks ping, TCP and UDP between every two of these workloads, over each of their addresses.
fn assert_full_connectivity(all: &[Attached]) {
    let bulk: Vec<u8> = (0..200_000_u32).map(|number| (number % 251) as u8).collect();
    let datagram = &bulk[..4000];
    for to in all {
        assert!(!to.addresses().is_empty(), "{}", to.json);
        for address in to.addresses() {
            let at = SocketAddr::new(address.parse().unwrap(), 0);
            let (tcp, udp) = (to.workload.tcp_echo_on(at).unwrap(), to.workload.udp_echo_on(at).unwrap());
            for from in all.iter().filter(|from| from.name != to.name) {
                let path = format!("from {} to {} at {address}", from.name, to.name);
                from.workload.ping_until(&address, SOON).context(path.clone()).unwrap();
                let back =
                    from.workload.tcp_roundtrip(&address, tcp.port(), &bulk).context(path.clone()).unwrap();
                assert!(back == bulk, "TCP {path}");
                let back = from.workload.udp_roundtrip(&address, udp.port(), datagram).context(path.clone());
                assert!(back.unwrap() == datagram, "UDP {path}");
            }
        }
    }
}

/// Binds a UDP socket in a namespace. Its reads time out after [`SOON`].
fn listener(at: &Netns, address: impl Into<IpAddr>, port: u16) -> UdpSocket {
    let address = SocketAddr::new(address.into(), port);
    let socket = at.run(|| UdpSocket::bind(address)).unwrap().unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket
}

/// Receives the next datagram and its source.
fn receive(socket: &UdpSocket) -> Result<(String, SocketAddr)> {
    let mut buffer = [0; 2048];
    let (length, from) = uninterrupted(|| socket.recv_from(&mut buffer))?;
    Ok((String::from_utf8_lossy(&buffer[..length]).into_owned(), from))
}

/// Whether a socket has nothing to read.
fn is_silent(socket: &UdpSocket) -> bool {
    socket.set_nonblocking(true).unwrap();
    let result = socket.recv_from(&mut [0; 64]);
    socket.set_nonblocking(false).unwrap();
    result.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

/// Sends a text in one datagram. The destination can be a broadcast address.
fn send(from: &Netns, to: SocketAddr, text: &str) {
    let any = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { IpAddr::from(Ipv6Addr::UNSPECIFIED) };
    let socket = from.run(|| UdpSocket::bind((any, 0))).unwrap().unwrap();
    socket.set_broadcast(true).unwrap();
    socket.send_to(text.as_bytes(), to).unwrap();
}

/// Index of an interface.
fn index_of(at: &Netns, interface: &str) -> u32 {
    let link = at.ip_json(&["link", "show", "dev", interface]).unwrap();
    u32::try_from(link[0]["ifindex"].as_u64().unwrap()).unwrap()
}

/// Whether an unfragmented packet of this size, IP header included, gets a reply.
fn fits(from: &Netns, address: &str, size: u32) -> bool {
    let headers = if address.contains(':') { 48 } else { 28 };
    let payload = (size - headers).to_string();
    from.exec(["ping", "-n", "-c1", "-W1", "-Mdo", "-s", &payload, address]).unwrap().success()
}

/// Checks that a packet of the MTU passes between two workloads, and that one more byte does not.
fn assert_fits_exactly(from: &Attached, to: &Attached, mtu: u32) {
    for address in to.addresses() {
        wait_until(SOON, &format!("{mtu} bytes to {address}"), || fits(&from.workload, &address, mtu))
            .unwrap();
        assert!(!fits(&from.workload, &address, mtu + 1), "{} bytes reach {address}", mtu + 1);
    }
}

/// MTU of an interface.
fn mtu_of(at: &Netns, interface: &str) -> Result<u32> {
    let link = at.ip_json(&["link", "show", "dev", interface])?;
    link[0]["mtu"].as_u64().and_then(|mtu| u32::try_from(mtu).ok()).with_context(|| format!("{link}"))
}

/// Effective MTU of a network. Fails unless `ovlctl`, the bridge, the VXLAN device and both sides of each endpoint's
/// veth pair agree, on all hosts of the endpoints.
fn network_mtu(network: &str, all: &[Attached]) -> Result<u32> {
    let mut seen: Vec<(String, u32)> = Vec::new();
    for each in all {
        let host = each.workload.host();
        let info = host.ctl_json(&["network", "inspect", network])?;
        let reported = info["mtu"].as_u64().and_then(|mtu| u32::try_from(mtu).ok()).context("no MTU")?;
        let bridge = text(&info["bridge"]);
        seen.push((format!("ovlctl on {}", host.name()), reported));
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
    wait_until(timeout, &format!("an effective MTU of {wanted}"), || {
        let mtu = network_mtu(network, all)?;
        ensure!(mtu == wanted, "the MTU is {mtu}");
        Ok(())
    })
    .unwrap();
}

/// VTEPs in a host's flood list for a network, as `bridge fdb` shows them.
fn flood_list(host: &Host, network: &str) -> Result<Vec<String>> {
    let info = host.ctl_json(&["network", "inspect", network])?;
    let Some(bridge) = info["bridge"].as_str() else { return Ok(Vec::new()) };
    let entries = host.bridge_json(&["fdb", "show", "dev", &bridge.replace("ovb-", "ovx-")])?;
    let all = entries.as_array().into_iter().flatten();
    let mut vteps: Vec<String> =
        all.filter(|entry| entry["mac"] == "00:00:00:00:00:00").map(|entry| text(&entry["dst"])).collect();
    vteps.sort();
    Ok(vteps)
}

fn wait_flood_list(host: &Host, network: &str, wanted: &[&str]) {
    wait_until(SOON, &format!("{} to flood to {wanted:?}", host.name()), || {
        let vteps = flood_list(host, network)?;
        ensure!(vteps == wanted, "it floods to {vteps:?}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn dual_stack_network_carries_ping_tcp_and_udp_within_and_between_hosts() {
    let lab = start_lab(3).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24", "--subnet", "fd99::/64"]).unwrap();
    let all = [("h1", "a"), ("h1", "b"), ("h2", "c"), ("h3", "d")]
        .map(|(host, name)| attach(&lab[host], name, "blue", &[]).unwrap());
    for each in &all {
        assert_eq!(each.addresses().len(), 2, "{}", each.json);
    }
    assert_full_connectivity(&all);
    // Docker and Kubernetes enable this on their hosts. Frames within the network then pass ovl's chains too.
    lab.hosts().iter().for_each(|host| set_bridge_nf_call(host, true).unwrap());
    assert_full_connectivity(&all);
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn ipv6_underlay_carries_ipv4_and_ipv6_networks() {
    let lab = start_lab_with(LabConfig::hosts(2).underlay(Underlay::V6)).unwrap();
    create_network(&lab, "four", &["--subnet", "10.99.0.0/24"]).unwrap();
    create_network(&lab, "six", &["--subnet", "fd99::/64"]).unwrap();
    for network in ["four", "six"] {
        let all = [("h1", "a"), ("h1", "b"), ("h2", "c")]
            .map(|(host, name)| attach(&lab[host], &format!("{name}-{network}"), network, &[]).unwrap());
        assert_full_connectivity(&all);
    }
    let peers = rows(&lab["h1"], &["peers"]).unwrap();
    assert!(
        peers.iter().any(|peer| peer["address"] == "[fd77::2]:7940" && peer["vtep"] == "fd77::2"),
        "{peers:?}"
    );
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn broadcast_reaches_exactly_the_endpoints_of_its_network() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    create_network(&lab, "red", &["--subnet", "10.98.0.0/24"]).unwrap();
    let blue =
        [("h1", "a"), ("h1", "b"), ("h2", "c")].map(|(h, name)| attach(&lab[h], name, "blue", &[]).unwrap());
    let red = [("h1", "x"), ("h2", "y")].map(|(h, name)| attach(&lab[h], name, "red", &[]).unwrap());
    ping_all_pairs(&blue, SOON).unwrap();
    ping_all_pairs(&red, SOON).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();

    let listen = |all: &[Attached]| -> Vec<UdpSocket> {
        all.iter().map(|each| listener(&each.workload, Ipv4Addr::UNSPECIFIED, PORT)).collect()
    };
    let (blue_sockets, red_sockets) = (listen(&blue[1..]), listen(&red));
    for broadcast in ["10.99.0.255:5000", "255.255.255.255:5000"] {
        send(&blue[0].workload, broadcast.parse().unwrap(), broadcast);
        for socket in &blue_sockets {
            assert_eq!(receive(socket).unwrap().0, broadcast);
        }
    }
    // Marker: a broadcast that leaked from blue would be read before this datagram.
    for (socket, each) in red_sockets.iter().zip(&red) {
        let address = SocketAddr::new(each.address().parse().unwrap(), PORT);
        let other = red.iter().find(|other| other.name != each.name).unwrap();
        send(&other.workload, address, "marker");
        assert_eq!(receive(socket).unwrap().0, "marker");
    }
}

#[test]
fn multicast_reaches_members_on_other_hosts() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24", "--subnet", "fd99::/64"]).unwrap();
    let all =
        [("h1", "a"), ("h1", "b"), ("h2", "c")].map(|(h, name)| attach(&lab[h], name, "blue", &[]).unwrap());
    ping_all_pairs(&all, SOON).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    let group4: Ipv4Addr = "239.1.2.3".parse().unwrap();
    // Organisation-local and link-local scope. mDNS and router discovery use the latter.
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
    let scope = index_of(from, "eth0");
    // Other hosts learn of a join a moment later, so what is sent first may not arrive.
    let arrives = |socket: &UdpSocket, to: SocketAddr, text: &str| {
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        wait_until(SOON, &format!("{text} to arrive"), || {
            send(from, to, text);
            std::iter::from_fn(|| receive(socket).ok()).any(|(received, _)| received == text)
        })
        .unwrap();
    };
    for (four, six) in &sockets {
        arrives(four, (group4, PORT).into(), "IPv4 group");
        for group in groups6 {
            arrives(six, SocketAddrV6::new(group, PORT + 1, 0, scope).into(), &group.to_string());
        }
    }
}

#[test]
fn namespace_can_be_on_several_networks_and_networks_are_isolated() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24", "--subnet", "fd99::/64"]).unwrap();
    create_network(&lab, "red", &["--subnet", "10.98.0.0/24", "--subnet", "fd98::/64"]).unwrap();
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
                assert_no_reply(&from.workload, &address);
            }
        }
    }
    // After a detach from one network, the other one still works.
    lab["h1"].ctl_ok(&["detach", "both", "--network", "blue"]).unwrap();
    both.workload.ping_until(red[1].address(), SOON).unwrap();
    assert_no_reply(&both.workload, &blue[1].address());
}

#[test]
fn egress_is_masqueraded_with_the_address_of_the_local_host() {
    let lab = start_lab_with(LabConfig::hosts(2).underlay(Underlay::Dual)).unwrap();
    let outside = outsider(&lab, &[OUTSIDE_V4, OUTSIDE_V6]);
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24", "--subnet", "fd99::/64"]).unwrap();
    let all = [("h1", "a"), ("h2", "b")].map(|(h, name)| attach(&lab[h], name, "blue", &[]).unwrap());
    for (address, port) in [(OUTSIDE_V4, PORT), (OUTSIDE_V6, PORT + 1)] {
        let address: IpAddr = address.parse().unwrap();
        let listener_socket = listener(&outside, address, port);
        let echo = outside.tcp_echo_on((address, port).into()).unwrap();
        for each in &all {
            each.workload.ping_until(address, SOON).unwrap();
            send(&each.workload, (address, port).into(), &each.name);
            let (name, from) = receive(&listener_socket).unwrap();
            assert_eq!(name, each.name);
            assert!(each.workload.host().addresses().contains(&from.ip()), "{name} came from {from}");
            assert_eq!(each.workload.tcp_roundtrip(address, echo.port(), b"out").unwrap(), b"out");
        }
    }
    // The underlay addresses of the hosts, and the gateway, are reachable too.
    for target in ["192.168.77.1", "192.168.77.2", "fd77::1", "fd77::2", "10.99.0.1"] {
        all[0].workload.ping_until(target, SOON).unwrap();
    }
}

#[test]
fn internal_network_has_no_egress() {
    let lab = start_lab(2).unwrap();
    let outside = outsider(&lab, &[OUTSIDE_V4]);
    create_network(&lab, "inner", &["--subnet", "10.98.0.0/24", "--internal"]).unwrap();
    create_network(&lab, "outer", &["--subnet", "10.99.0.0/24"]).unwrap();
    let all = [("h1", "a"), ("h2", "b")].map(|(h, name)| attach(&lab[h], name, "inner", &[]).unwrap());
    let other = attach(&lab["h1"], "c", "outer", &[]).unwrap();
    ping_all_pairs(&all, SOON).unwrap();
    other.workload.ping_until(OUTSIDE_V4, SOON).unwrap();
    let from = &all[0].workload;
    let outside_socket = listener(&outside, Ipv4Addr::UNSPECIFIED, PORT);
    assert_no_reply(from, OUTSIDE_V4);

    // A workload can add its own routes: here a default route through the MAC address of the bridge.
    let bridge = text(&lab["h1"].ctl_json(&["network", "inspect", "inner"]).unwrap()["bridge"]);
    let mac = text(&lab["h1"].ip_json(&["link", "show", "dev", &bridge]).unwrap()[0]["address"]);
    from.exec_ok(["ip", "neigh", "replace", "10.98.0.1", "lladdr", &mac, "dev", "eth0"]).unwrap();
    from.exec_ok(["ip", "route", "add", "default", "via", "10.98.0.1"]).unwrap();
    for target in [OUTSIDE_V4, "192.168.77.1", "192.168.77.2", &other.address()] {
        assert_no_reply(from, target);
    }
    let to = SocketAddr::new(OUTSIDE_V4.parse().unwrap(), PORT);
    // The marker from `outer` is sent after this datagram, so a leak would be received first.
    send(from, to, "from the inside");
    send(&other.workload, to, "from the outside");
    assert_eq!(receive(&outside_socket).unwrap().0, "from the outside");
    assert!(is_silent(&outside_socket));
}

/// Builds a VXLAN header and an Ethernet frame with a UDP datagram.
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
    // The UDP checksum is optional in IPv4.
    packet.extend([port.to_be_bytes(), port.to_be_bytes(), udp_length.to_be_bytes(), [0, 0]].concat());
    packet.extend(payload);
    packet
}

fn assert_vxlan_of_non_members_is_dropped(underlay: Underlay, outside_address: &str) {
    let lab = start_lab_with(LabConfig::hosts(2).underlay(underlay)).unwrap();
    let outside = outsider(&lab, &[outside_address]);
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24", "--vni", "777"]).unwrap();
    let all = [("h1", "a"), ("h2", "b")].map(|(h, name)| attach(&lab[h], name, "blue", &[]).unwrap());
    ping_all_pairs(&all, SOON).unwrap();
    let target = &all[1];
    let socket = listener(&target.workload, Ipv4Addr::UNSPECIFIED, PORT);
    let vtep = SocketAddr::new(lab["h2"].address().unwrap(), VXLAN_PORT);
    let inject = |source: IpAddr, mac: [u8; 6], text: &str| {
        let socket = spoofing_socket(&outside, source);
        let to = target.address().parse().unwrap();
        socket.send_to(&vxlan_packet(777, mac, to, PORT, text.as_bytes()), vtep).unwrap();
    };
    // Resolve the MAC address of h2 first. Otherwise the neighbour queue could reorder the packets.
    outside.ping_until(vtep.ip(), SOON).unwrap();
    let mac = mac_bytes(&target.mac());
    let stranger = outside_address.parse().unwrap();
    inject(stranger, mac, "from a non-member");
    inject(stranger, [0xff; 6], "from a non-member, broadcast");
    // Marker: the same packet from a member's address shows that the packet is valid, and that the others were not just
    // delayed.
    inject(lab["h1"].address().unwrap(), mac, "from a member");
    assert_eq!(receive(&socket).unwrap().0, "from a member");
    assert!(is_silent(&socket));
}

#[test]
fn vxlan_packets_of_non_members_are_dropped() {
    assert_vxlan_of_non_members_is_dropped(Underlay::V4, OUTSIDE_V4);
}

#[test]
fn vxlan_packets_of_non_members_are_dropped_on_an_ipv6_underlay() {
    assert_vxlan_of_non_members_is_dropped(Underlay::V6, OUTSIDE_V6);
}

/// nftables rules that count ARP requests, neighbour solicitations and echo requests in VXLAN packets.
const WATCH: &str = "table bridge watch {
    counter arp_requests {}
    counter ndp_requests {}
    counter echoes {}
    chain forward {
        type filter hook forward priority -10; policy accept;
        udp dport 4789 @th,224,16 0x0806 counter name arp_requests
        udp dport 4789 @th,224,16 0x86dd @th,288,8 58 @th,560,8 135 counter name ndp_requests
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
fn arp_and_ndp_are_answered_by_the_owner_of_an_address() {
    let lab = start_lab(2).unwrap();
    let switch = lab.switch();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24", "--subnet", "fd99::/64"]).unwrap();
    let all = [("h1", "a"), ("h2", "b")].map(|(h, name)| attach(&lab[h], name, "blue", &[]).unwrap());
    for host in lab.hosts() {
        wait_endpoints(host, &["a on h1 is ready", "b on h2 is ready"], SOON).unwrap();
    }
    wait_clean(lab.hosts(), SOON).unwrap();
    switch.exec_input(["nft", "-f", "-"], Some(WATCH)).unwrap();
    for (from, to) in [(&all[0], &all[1]), (&all[1], &all[0])] {
        for address in to.addresses() {
            from.workload.ping_until(&address, SOON).unwrap();
        }
        from.workload.exec_ok(["ip", "neigh", "flush", "all"]).unwrap();
        for address in to.addresses() {
            from.workload.ping_until(&address, SOON).unwrap();
        }
    }
    assert!(counted(&switch, "echoes") >= 12, "{} echoes", counted(&switch, "echoes"));
    // They cross, so that an address that moves or is in use is seen on all hosts.
    assert!(counted(&switch, "arp_requests") > 0 && counted(&switch, "ndp_requests") > 0);
    // Nobody answers for an address that nobody has: the hosts themselves do not.
    assert_no_reply(&all[0].workload, "10.99.0.222");
    assert_no_reply(&all[0].workload, "fd99::dead");
}

#[test]
fn flood_lists_contain_exactly_the_hosts_with_endpoints() {
    let lab = start_lab(3).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    attach(&lab["h1"], "a", "blue", &[]).unwrap();
    attach(&lab["h2"], "b", "blue", &[]).unwrap();
    wait_flood_list(&lab["h1"], "blue", &["192.168.77.2"]);
    wait_flood_list(&lab["h2"], "blue", &["192.168.77.1"]);
    assert!(flood_list(&lab["h3"], "blue").unwrap().is_empty());
    assert!(!lab["h3"].exec_ok(["ip", "-o", "link"]).unwrap().contains("ovx-"));
    attach(&lab["h3"], "c", "blue", &[]).unwrap();
    wait_flood_list(&lab["h1"], "blue", &["192.168.77.2", "192.168.77.3"]);
    wait_flood_list(&lab["h2"], "blue", &["192.168.77.1", "192.168.77.3"]);
    wait_flood_list(&lab["h3"], "blue", &["192.168.77.1", "192.168.77.2"]);
    lab["h2"].ctl_ok(&["detach", "b"]).unwrap();
    wait_flood_list(&lab["h1"], "blue", &["192.168.77.3"]);
    wait_flood_list(&lab["h3"], "blue", &["192.168.77.1"]);
    wait_flood_list(&lab["h2"], "blue", &[]);
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn mtu_is_exactly_what_the_underlay_carries() {
    for (underlay, mtu, expected) in [(Underlay::V4, 1500, 1450), (Underlay::V6, 9000, 8930)] {
        let lab = start_lab_with(LabConfig::hosts(2).underlay(underlay).mtu(mtu)).unwrap();
        create_network(&lab, "blue", &["--subnet", "10.99.0.0/24", "--subnet", "fd99::/64"]).unwrap();
        let all = [("h1", "a"), ("h2", "b")].map(|(h, name)| attach(&lab[h], name, "blue", &[]).unwrap());
        wait_mtu("blue", &all, expected, SOON);
        assert_fits_exactly(&all[0], &all[1], expected);
        assert_fits_exactly(&all[1], &all[0], expected);
    }
}

#[test]
fn mtu_follows_a_change_of_the_underlay_mtu() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    let all = [("h1", "a"), ("h2", "b")].map(|(h, name)| attach(&lab[h], name, "blue", &[]).unwrap());
    wait_mtu("blue", &all, 1450, SOON);
    lab["h2"].set_mtu(1400, PortMtu::Follow).unwrap();
    wait_mtu("blue", &all, 1350, SOON);
    assert_fits_exactly(&all[0], &all[1], 1350);
    lab["h2"].set_mtu(1500, PortMtu::Follow).unwrap();
    wait_mtu("blue", &all, 1450, SOON);
    assert_fits_exactly(&all[0], &all[1], 1450);
    // A smaller MTU can be configured. A larger one than the paths carry has no effect.
    lab["h1"].ctl_ok(&["network", "update", "blue", "--mtu", "1300"]).unwrap();
    wait_mtu("blue", &all, 1300, SOON);
    lab["h1"].ctl_ok(&["network", "update", "blue", "--mtu", "4000"]).unwrap();
    wait_mtu("blue", &all, 1450, SOON);
    lab["h1"].ctl_ok(&["network", "update", "blue", "--mtu", "0"]).unwrap();
    wait_mtu("blue", &all, 1450, SOON);
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn path_mtu_discovery_detects_a_narrower_path() {
    let lab = start_lab(3).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    let all = [("h1", "a"), ("h2", "b")].map(|(h, name)| attach(&lab[h], name, "blue", &[]).unwrap());
    wait_mtu("blue", &all, 1450, SOON);
    // No host gets an ICMP message. The port allows four bytes more, for a VLAN tag.
    lab["h2"].set_port_mtu(1400).unwrap();
    let mtu = wait_until(SOON * 2, "an MTU that the narrow port lets pass", || {
        let mtu = network_mtu("blue", &all)?;
        ensure!(mtu <= 1354, "the MTU is {mtu}");
        Ok(Some(mtu))
    })
    .unwrap();
    assert!(mtu >= 1342, "an MTU of {mtu} is unnecessarily small");
    assert_fits_exactly(&all[0], &all[1], mtu);
    let path = rows(&lab["h1"], &["peers"]).unwrap().into_iter().find(|peer| peer["name"] == "h2").unwrap();
    assert!((1392..=1404).contains(&path["path_mtu"].as_u64().unwrap()), "{path}");
    // A host that is not on the narrow path keeps the full MTU with the others.
    let third = attach(&lab["h3"], "c", "blue", &[]).unwrap();
    lab["h2"].ctl_ok(&["detach", "b"]).unwrap();
    wait_mtu("blue", &[all[0].clone(), third], 1450, SOON);
}

#[test]
fn long_packets_pass_on_paths_of_every_kind_that_became_narrow_in_silence() {
    for underlay in [Underlay::V4, Underlay::V6] {
        let lab = start_lab_with(LabConfig::hosts(2).underlay(underlay)).unwrap();
        let subnets =
            if underlay == Underlay::V4 { ["10.60", "10.61", "10.62"] } else { ["fd60", "fd61", "fd62"] };
        let subnets = subnets.map(|start| match underlay {
            Underlay::V6 => format!("{start}::/48"),
            Underlay::V4 | Underlay::Dual => format!("{start}.0.0/16"),
        });
        let kinds = [
            ("direct", ["--backend", "direct"].as_slice()),
            ("wrapped", &["--backend", "vxlan"]),
            ("sealed", &["--encrypted"]),
        ];
        let mut networks = Vec::new();
        for ((name, more), subnet) in kinds.into_iter().zip(&subnets) {
            create_routed_network(&lab, name, &[&["--subnet", subnet.as_str()], more].concat()).unwrap();
            let all = [("h1", "a"), ("h2", "b")].map(|(host, workload)| {
                attach(&lab[host], &format!("{name}-{workload}"), name, &[]).unwrap()
            });
            ping_all_pairs(&all, SOON).unwrap();
            networks.push((name, all));
        }
        create_network(&lab, "switched", &["--encrypted", "--subnet", "10.63.0.0/16"]).unwrap();
        let all = [("h1", "a"), ("h2", "b")].map(|(host, workload)| {
            attach(&lab[host], &format!("switched-{workload}"), "switched", &[]).unwrap()
        });
        ping_all_pairs(&all, SOON).unwrap();
        networks.push(("switched", all));
        // No host gets an ICMP message.
        lab["h2"].set_port_mtu(1400).unwrap();
        let bulk = vec![7; 200_000];
        for (name, [from, to]) in &networks {
            let echo = to.workload.tcp_echo(0).unwrap();
            wait_until(SOON * 2, &format!("long packets on {name}"), || {
                let back = from.workload.tcp_roundtrip(&to.addresses()[0], echo.port(), &bulk)?;
                ensure!(back == bulk, "{} bytes came back", back.len());
                Ok(())
            })
            .unwrap();
        }
        wait_clean(lab.hosts(), SOON).unwrap();
    }
}

#[test]
fn vxlan_port_can_be_configured() {
    let lab = start_lab_with(LabConfig::hosts(2).config("vxlan_port = 8472")).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
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
fn vni_conflict_with_a_foreign_device_is_reported_with_its_name() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24", "--vni", "777"]).unwrap();
    host.exec_ok("ip link add foreign7 type vxlan id 777 dstport 4789 nolearning".split(' ')).unwrap();
    host.exec_ok(["ip", "link", "set", "foreign7", "up"]).unwrap();
    let workload = host.workload("a").unwrap();
    let error =
        ctl_error(host, &["attach", "a", "--network", "blue", "--netns", workload.path_str()]).unwrap();
    assert_contains(&error, &["foreign7", "777"]);
    assert!(!workload.exec_ok(["ip", "-o", "link"]).unwrap().contains("eth0"));
    host.exec_ok(["ip", "link", "del", "foreign7"]).unwrap();
    wait_until(SOON, "the attach to succeed", || attach_workload(workload.clone(), "blue", &[]).map(drop))
        .unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}
