//! Source checks: what an endpoint may send on switched, bridge, encrypted and routed networks.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use anyhow::{Result, ensure};
use netns_lab::{Host, wait_until};
use ovl_tests::frames::{
    Bytes, EVERYONE, FrameSocket, ICMPV6, advertisement, arp, datagram, discovery, ethernet, ipv6,
    link_local, mac, tagged,
};
use ovl_tests::inject::{PORT, listener, receive, spoofing_socket};
use ovl_tests::ports::create_bridge_network;
use ovl_tests::routed::create_routed_network;
use ovl_tests::{
    Attached, Capture, SOON, assert_contains, attach, create_network, ctl_error, ping_all_pairs, rows,
    start_lab, text, wait_clean,
};

/// EtherType for local experiments (IEEE 802).
const EXPERIMENT: u16 = 0x88b5;
/// EtherType of path probes.
const PROBES: u16 = 0x88b6;
const MARKER: &str = "sent after all others";

fn v4(endpoint: &Attached) -> Ipv4Addr {
    endpoint.addresses()[0].parse().unwrap()
}

fn v6(endpoint: &Attached) -> Ipv6Addr {
    endpoint.addresses()[1].parse().unwrap()
}

fn mac_of(endpoint: &Attached) -> Bytes {
    mac(&endpoint.mac())
}

/// A frame with its name, which the frame contains.
type Named = (&'static str, Vec<u8>);

/// Frames that the endpoint may not send. `gateway` and the addresses of `victim` belong to others, `free` to nobody.
fn forbidden(
    endpoint: &Attached,
    victim: &Attached,
    gateway: Ipv4Addr,
    free: (Ipv4Addr, Ipv6Addr),
) -> Vec<Named> {
    let (own, theirs) = (mac_of(endpoint), mac_of(victim));
    let local = link_local(own);
    let (address, address6) = (v4(endpoint), v6(endpoint));
    let nd = |source: Ipv6Addr, kind: u8, target: Ipv6Addr, text: &'static str| {
        (text, ipv6(own, source, ICMPV6, &discovery(kind, target, text)))
    };
    let udp = |from: Bytes, source: IpAddr, ports: (u16, u16), text: &'static str| {
        (text, datagram(from, source, ports, text))
    };
    let claim = |sender: Bytes, claimed: Ipv4Addr, text: &'static str| {
        (text, arp(own, 2, (sender, claimed), v4(victim), text))
    };
    // Destination options without content in front of the message.
    let hidden = |text: &'static str| {
        let behind = [&[ICMPV6, 0, 1, 4, 0, 0, 0, 0][..], &advertisement(text)].concat();
        (text, ipv6(own, local, 60, &behind))
    };
    let router = |text: &'static str| (text, ipv6(own, local, ICMPV6, &advertisement(text)));
    let in_vlan = |tags: usize, (text, frame): Named| (text, tagged(&frame, tags));
    vec![
        router("a router advertisement"),
        hidden("a hidden router advertisement"),
        in_vlan(1, router("a router advertisement with a tag")),
        in_vlan(2, router("a router advertisement with two tags")),
        nd(local, 137, v6(victim), "a redirect"),
        nd(local, 136, v6(victim), "an advertisement of another's address"),
        nd(address6, 136, link_local(theirs), "an advertisement of another's link-local address"),
        nd(local, 136, free.1, "an advertisement of a free address"),
        nd(Ipv6Addr::UNSPECIFIED, 135, v6(victim), "duplicate address detection of another's address"),
        nd(link_local(theirs), 135, v6(victim), "a solicitation from another's link-local address"),
        claim(own, v4(victim), "ARP for another's address"),
        claim(own, gateway, "ARP for the gateway"),
        claim(own, free.0, "ARP for a free address"),
        claim(theirs, address, "ARP with another's MAC address"),
        udp(own, v4(victim).into(), (4000, 4001), "a datagram from another's address"),
        udp(own, v6(victim).into(), (4000, 4001), "a datagram from another's IPv6 address"),
        udp(own, free.0.into(), (4000, 4001), "a datagram from a free address"),
        udp(own, free.1.into(), (4000, 4001), "a datagram from a free IPv6 address"),
        udp(theirs, address.into(), (4000, 4001), "a datagram from another's MAC address"),
        udp(own, Ipv4Addr::UNSPECIFIED.into(), (4000, 4001), "a datagram from no address"),
        udp(own, address.into(), (67, 68), "an offer of a DHCP server"),
        udp(own, local.into(), (547, 546), "an offer of a DHCPv6 server"),
        ("a path probe", ethernet(EVERYONE, own, PROBES, b"a path probe")),
        ("another's MAC address", ethernet(EVERYONE, theirs, EXPERIMENT, b"another's MAC address")),
        ("a free MAC address", ethernet(EVERYONE, [2, 0, 0, 0, 0, 9], EXPERIMENT, b"a free MAC address")),
    ]
}

/// Frames that the endpoint may send.
fn allowed(endpoint: &Attached) -> Vec<Named> {
    let own = mac_of(endpoint);
    let local = link_local(own);
    let opaque: Ipv6Addr = "fe80::1234:5678:9abc:def0".parse().unwrap();
    let (address, address6) = (v4(endpoint), v6(endpoint));
    let nd = |source: Ipv6Addr, kind: u8, target: Ipv6Addr, text: &'static str| {
        (text, ipv6(own, source, ICMPV6, &discovery(kind, target, text)))
    };
    let udp =
        |source: IpAddr, ports: (u16, u16), text: &'static str| (text, datagram(own, source, ports, text));
    let none = Ipv6Addr::UNSPECIFIED;
    vec![
        ("own ARP", arp(own, 2, (own, address), Ipv4Addr::BROADCAST, "own ARP")),
        ("a probe", arp(own, 1, (own, Ipv4Addr::UNSPECIFIED), address, "a probe")),
        udp(address.into(), (4000, 4001), "own datagram"),
        udp(address6.into(), (4000, 4001), "own IPv6 datagram"),
        udp(local.into(), (4000, 4001), "own link-local datagram"),
        udp(opaque.into(), (4000, 4001), "a datagram from an opaque link-local address"),
        udp(Ipv4Addr::UNSPECIFIED.into(), (68, 67), "a DHCP client"),
        udp(local.into(), (546, 547), "a DHCPv6 client"),
        nd(address6, 136, address6, "own advertisement"),
        nd(local, 136, local, "own link-local advertisement"),
        nd(local, 136, opaque, "an advertisement of an opaque link-local address"),
        nd(none, 135, address6, "own duplicate address detection"),
        nd(none, 133, none, "a router solicitation"),
        ("another protocol", ethernet(EVERYONE, own, EXPERIMENT, b"another protocol")),
    ]
}

/// Sends frames, then a frame that passes, and returns those that each of the receivers got.
fn received(from: &Attached, to: &[&Attached], frames: &[Named]) -> Vec<Vec<&'static str>> {
    let texts: Vec<&str> = frames.iter().map(|(text, _)| *text).chain([MARKER]).collect();
    let captures: Vec<Capture> = to.iter().map(|to| Capture::start(&to.workload, &texts).unwrap()).collect();
    let socket = FrameSocket::open(&from.workload, "eth0").unwrap();
    for (_, frame) in frames {
        socket.send(frame).unwrap();
    }
    socket.send(&datagram(mac_of(from), v4(from).into(), (4000, 4001), MARKER)).unwrap();
    for (to, capture) in to.iter().zip(&captures) {
        wait_until(SOON, &format!("{} to get the last frame", to.name), || {
            ensure!(capture.count(MARKER) > 0);
            Ok(())
        })
        .unwrap();
    }
    let seen = captures.into_iter().map(|capture| capture.finish().unwrap());
    seen.map(|seen| frames.iter().map(|(text, _)| *text).filter(|text| seen.count(text) > 0).collect())
        .collect()
}

/// The number of frames of an endpoint that were refused, as its host lists it.
fn refused(host: &Host, endpoint: &Attached) -> u64 {
    let all = rows(host, &["endpoints"]).unwrap();
    let row = all.iter().find(|row| row["name"] == endpoint.name.as_str()).unwrap();
    row["refused"].as_u64().unwrap()
}

fn metric(host: &Host, endpoint: &Attached) -> Result<u64> {
    let all = host.ctl_ok(&["metrics"])?;
    let is_ours = |line: &&str| {
        line.starts_with("ovl_endpoint_refused_frames_total{")
            && line.contains(&format!("endpoint=\"{}\"", endpoint.name))
    };
    let line = all.lines().find(is_ours).unwrap_or("0");
    Ok(line.rsplit(' ').next().unwrap_or_default().parse()?)
}

/// Checks what `endpoint` can send to the others.
fn check_frames(host: &Host, endpoint: &Attached, others: &[&Attached], gateway: Ipv4Addr) {
    let free = ("10.1.0.250".parse().unwrap(), "fd01::250".parse().unwrap());
    let good = allowed(endpoint);
    let names: Vec<&str> = good.iter().map(|(text, _)| *text).collect();
    for (other, got) in others.iter().zip(received(endpoint, others, &good)) {
        assert_eq!(got, names, "from {} to {}", endpoint.name, other.name);
    }
    let before = refused(host, endpoint);
    let bad = forbidden(endpoint, others[0], gateway, free);
    for got in received(endpoint, others, &bad) {
        assert_eq!(got, Vec::<&str>::new(), "from {}", endpoint.name);
    }
    assert_eq!(refused(host, endpoint) - before, bad.len() as u64, "from {}", endpoint.name);
    assert_eq!(metric(host, endpoint).unwrap(), refused(host, endpoint));
    // Fragments have ports and types only in the first one.
    for address in others[0].addresses() {
        endpoint.workload.exec_ok(["ping", "-c1", "-W5", "-s4000", &address]).unwrap();
    }
}

#[test]
fn switched_endpoint_sends_only_from_its_own_addresses() {
    for options in [&[][..], &["--encrypted"]] {
        let lab = start_lab(2).unwrap();
        let subnets = ["--subnet", "10.1.0.0/24", "--subnet", "fd01::/64"];
        create_network(&lab, "flat", &[&subnets[..], options].concat()).unwrap();
        let hosts = [&lab["h1"], &lab["h2"]];
        let a = attach(hosts[0], "a", "flat", &[]).unwrap();
        let b = attach(hosts[0], "b", "flat", &[]).unwrap();
        let c = attach(hosts[1], "c", "flat", &[]).unwrap();
        ping_all_pairs(&[a.clone(), b.clone(), c.clone()], SOON).unwrap();
        check_frames(hosts[0], &a, &[&b, &c], Ipv4Addr::new(10, 1, 0, 1));
        wait_clean(lab.hosts(), SOON).unwrap();
    }
}

#[test]
fn endpoint_of_a_bridge_network_sends_only_from_its_own_addresses() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    create_bridge_network(host, "local", &["--subnet", "10.1.0.0/24", "--subnet", "fd01::/64"]).unwrap();
    let a = attach(host, "a", "local", &[]).unwrap();
    let b = attach(host, "b", "local", &[]).unwrap();
    ping_all_pairs(&[a.clone(), b.clone()], SOON).unwrap();
    check_frames(host, &a, &[&b], Ipv4Addr::new(10, 1, 0, 1));
    wait_clean(lab.hosts(), SOON).unwrap();
}

/// Waits until a workload reaches an address, and returns the MAC address behind it.
fn mac_behind(from: &Attached, address: &str) -> String {
    from.workload.exec_ok(["ip", "neigh", "flush", "to", address]).unwrap();
    from.workload.ping_until(address, SOON).unwrap();
    let found = from.workload.ip_json(&["neigh", "show", address]).unwrap();
    text(&found[0]["lladdr"])
}

#[test]
fn allowed_addresses_and_mac_addresses_can_be_used_on_all_hosts() {
    const SHARED: &str = "10.1.0.200";
    const VIRTUAL: &str = "00:00:5e:00:01:07";
    for options in [&[][..], &["--encrypted"]] {
        let lab = start_lab(2).unwrap();
        let subnets = ["--subnet", "10.1.0.0/24", "--subnet", "fd01::/64"];
        create_network(&lab, "flat", &[&subnets[..], options].concat()).unwrap();
        let hosts = [&lab["h1"], &lab["h2"]];
        let more = ["--allow-address", SHARED, "--allow-mac", VIRTUAL];
        let routers =
            [attach(hosts[0], "r1", "flat", &more).unwrap(), attach(hosts[1], "r2", "flat", &more).unwrap()];
        let clients =
            [attach(hosts[0], "c1", "flat", &[]).unwrap(), attach(hosts[1], "c2", "flat", &[]).unwrap()];
        assert_eq!(routers[0].json["allowed"], serde_json::json!(["10.1.0.200/32"]));
        assert_eq!(routers[0].json["allowed_macs"], serde_json::json!([VIRTUAL]));
        ping_all_pairs(&[&routers[..], &clients].concat(), SOON).unwrap();

        // The address moves from one to the other.
        let prefix = format!("{SHARED}/32");
        for router in &routers {
            router.workload.exec_ok(["ip", "addr", "add", &prefix, "dev", "eth0"]).unwrap();
            for client in &clients {
                assert_eq!(mac_behind(client, SHARED), router.mac());
            }
            router.workload.exec_ok(["ip", "addr", "del", &prefix, "dev", "eth0"]).unwrap();
        }
        // The same with a MAC address of its own, as VRRP has it.
        for router in &routers {
            for args in [
                &["sysctl", "-qw", "net.ipv4.conf.all.arp_ignore=1"][..],
                &["ip", "link", "add", "link", "eth0", "vrrp", "address", VIRTUAL, "type", "macvlan"],
                &["ip", "addr", "add", &prefix, "dev", "vrrp"],
                &["ip", "link", "set", "vrrp", "up"],
            ] {
                router.workload.exec_ok(args.iter().copied()).unwrap();
            }
            for client in &clients {
                assert_eq!(mac_behind(client, SHARED), VIRTUAL);
            }
            router.workload.exec_ok(["ip", "link", "del", "vrrp"]).unwrap();
        }

        // Others may use neither.
        let own = mac_of(&clients[0]);
        let shared: Ipv4Addr = SHARED.parse().unwrap();
        let stolen = [
            ("ARP for it", arp(own, 2, (own, shared), v4(&clients[1]), "ARP for it")),
            ("a datagram from it", datagram(own, shared.into(), (4000, 4001), "a datagram from it")),
            ("its MAC address", ethernet(EVERYONE, mac(VIRTUAL), EXPERIMENT, b"its MAC address")),
        ];
        for got in received(&clients[0], &[&routers[0], &clients[1]], &stolen) {
            assert_eq!(got, Vec::<&str>::new());
        }
        assert_eq!(refused(hosts[0], &clients[0]), stolen.len() as u64);
        // Nor does an endpoint get the address by chance, and who has it as its own keeps it.
        let owner = attach(hosts[0], "owner", "flat", &["--ip", SHARED]).unwrap();
        for client in &clients {
            assert_eq!(mac_behind(client, SHARED), owner.mac());
        }
        wait_clean(lab.hosts(), SOON).unwrap();
    }
}

#[test]
fn attach_says_what_a_network_cannot_allow() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    create_network(&lab, "flat", &["--subnet", "10.1.0.0/24"]).unwrap();
    create_routed_network(&lab, "pods", &["--subnet", "10.2.0.0/16"]).unwrap();
    let there = attach(host, "there", "flat", &[]).unwrap();
    let workload = host.workload("w").unwrap();
    let says = |network: &str, more: &[&str]| {
        let args = ["attach", "w", "--network", network, "--netns", workload.path_str()];
        ctl_error(host, &[&args[..], more].concat()).unwrap()
    };
    assert_contains(&says("flat", &["--allow-address", "192.0.2.1"]), &["192.0.2.1", "10.1.0.0/24"]);
    assert_contains(&says("flat", &["--allow-address", "10.1.0.0/28"]), &["gateway 10.1.0.1"]);
    assert_contains(&says("flat", &["--allow-mac", &there.mac()]), &["in use by endpoint there"]);
    assert_contains(&says("pods", &["--allow-mac", "00:00:5e:00:01:07"]), &["pods is routed"]);
}

#[test]
fn routed_endpoint_may_send_from_an_allowed_prefix() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    create_routed_network(&lab, "pods", &["--subnet", "10.2.0.0/16", "--subnet", "fd02::/64"]).unwrap();
    let more = ["--allow-address", "192.0.2.0/28", "--allow-address", "2001:db8:9::/64"];
    let a = attach(host, "a", "pods", &more).unwrap();
    let b = attach(host, "b", "pods", &[]).unwrap();
    ping_all_pairs(&[a.clone(), b.clone()], SOON).unwrap();
    for (number, source) in ["192.0.2.7", "2001:db8:9::7"].into_iter().enumerate() {
        let to = b.addresses()[number].clone();
        let socket = listener(&b, &to, SOON);
        let source: IpAddr = source.parse().unwrap();
        spoofing_socket(&a.workload, source).send_to(b"from a network behind it", (&*to, PORT)).unwrap();
        assert_eq!(receive(&socket).as_deref(), Some("from a network behind it"), "{source}");
    }
    assert_eq!(refused(host, &a), 0);
}

#[test]
fn routed_endpoint_sends_only_from_its_own_addresses() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    let subnets = ["--subnet", "10.2.0.0/16", "--subnet", "fd02::/64"];
    create_routed_network(&lab, "pods", &subnets).unwrap();
    let a = attach(host, "a", "pods", &[]).unwrap();
    let b = attach(host, "b", "pods", &[]).unwrap();
    ping_all_pairs(&[a.clone(), b.clone()], SOON).unwrap();
    let port = PORT;
    let receive_from = |source: IpAddr| {
        let to = if source.is_ipv4() { b.addresses()[0].clone() } else { b.addresses()[1].clone() };
        let socket = listener(&b, &to, SOON);
        if source != a.addresses()[usize::from(source.is_ipv6())].parse::<IpAddr>().unwrap() {
            spoofing_socket(&a.workload, source).send_to(b"forged", (&*to, port)).unwrap();
        }
        // The own datagram is sent last and over the same path.
        let own = a.workload.run(|| UdpSocket::bind(("::", 0))).unwrap().unwrap();
        let to: IpAddr = to.parse().unwrap();
        let mapped = match to {
            IpAddr::V4(to) => to.to_ipv6_mapped(),
            IpAddr::V6(to) => to,
        };
        own.send_to(MARKER.as_bytes(), (mapped, port)).unwrap();
        receive(&socket)
    };
    let mut expected = refused(host, &a);
    for source in ["10.2.200.9", "192.0.2.1", "fd02::bad", "2001:db8::1"] {
        assert_eq!(receive_from(source.parse().unwrap()).as_deref(), Some(MARKER), "from {source}");
        expected += 1;
        assert_eq!(refused(host, &a), expected, "from {source}");
    }
    for source in b.addresses() {
        assert_eq!(receive_from(source.parse().unwrap()).as_deref(), Some(MARKER), "from {source}");
        expected += 1;
    }
    let socket = FrameSocket::open(&a.workload, "eth0").unwrap();
    let own = mac_of(&a);
    socket.send(&ipv6(own, link_local(own), ICMPV6, &advertisement("a router"))).unwrap();
    socket.send(&ipv6(own, link_local(own), ICMPV6, &discovery(137, v6(&b), "a redirect"))).unwrap();
    wait_until(SOON, "the frames to be counted", || {
        ensure!(refused(host, &a) == expected + 2, "{} of {}", refused(host, &a), expected + 2);
        Ok(())
    })
    .unwrap();
    ping_all_pairs(&[a, b], SOON).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}
