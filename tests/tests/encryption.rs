//! Encrypted networks: connectivity, what is visible on the underlay, and injected packets.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Netns, PortMtu, Underlay, wait_until};
use ovl_tests::inject::{PORT, listener, mac_bytes, receive, spoofing_socket, vni_of, vxlan};
use ovl_tests::routed::{create_routed_network, routes};
use ovl_tests::{
    Attached, Capture, Flow, SOON, assert_contains, assert_no_reply, attach, create_network, ctl_error, peer,
    ping_all_pairs, start_lab_with, text, wait_clean, wait_problem,
};
use serde_json::Value;

/// Text that must never be visible on the underlay.
const MARKER: &str = "the cat sat on the mat";
/// Text on an unencrypted network, which shows that the capture works.
const OPEN: &str = "any dog may read this";
/// Text in injected packets.
const FORGED: &str = "forged by a stranger";
const PLAIN_VXLAN: u16 = 4789;
const SEALED_VXLAN: u16 = 51942;
const SECOND: Duration = Duration::from_secs(1);
/// Timeout of a key rotation, which waits several seconds until no packet arrives through the old WireGuard interface.
const LATER: Duration = Duration::from_secs(60);

/// Three hosts with an encrypted switched network `blue`, an encrypted routed network `pods`, both dual-stack, and an
/// unencrypted network `open`.
struct EncryptedLab {
    lab: Lab,
    blue: Vec<Attached>,
    pods: Vec<Attached>,
    open: Vec<Attached>,
}

fn encrypted_lab(underlay: Underlay) -> EncryptedLab {
    let lab = start_lab_with(LabConfig::hosts(3).underlay(underlay)).unwrap();
    let options = ["--encrypted", "--subnet", "10.99.0.0/24", "--subnet", "fd99::/64"];
    create_network(&lab, "blue", &options).unwrap();
    let options = ["--encrypted", "--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"];
    create_routed_network(&lab, "pods", &options).unwrap();
    create_network(&lab, "open", &["--subnet", "10.98.0.0/24"]).unwrap();
    let on = |network: &str, stem: &str| -> Vec<Attached> {
        let hosts = lab.hosts().iter();
        hosts.map(|h| attach(h, &format!("{stem}{}", h.name()), network, &[]).unwrap()).collect()
    };
    let (blue, pods, open) = (on("blue", "b"), on("pods", "p"), on("open", "o"));
    let world = EncryptedLab { lab, blue, pods, open };
    for all in [&world.blue, &world.pods, &world.open] {
        ping_all_pairs(all, SOON).unwrap();
    }
    wait_clean(world.lab.hosts(), SOON).unwrap();
    world
}

impl EncryptedLab {
    fn host(&self, name: &str) -> &Host {
        &self.lab[name]
    }

    fn encrypted(&self) -> [&Vec<Attached>; 2] {
        [&self.blue, &self.pods]
    }
}

/// Echoes a text, and more data made of it, over UDP and TCP, between all these workloads.
fn echo_everywhere(all: &[Attached], text: &str) -> Result<()> {
    let long = text.repeat(4000);
    for to in all {
        for address in to.addresses() {
            let at = SocketAddr::new(address.parse()?, 0);
            let (tcp, udp) = (to.workload.tcp_echo_on(at)?, to.workload.udp_echo_on(at)?);
            for from in all.iter().filter(|from| from.name != to.name) {
                let path = || format!("from {} to {} at {address}", from.name, to.name);
                from.workload.ping_until(&address, SOON).with_context(path)?;
                let back =
                    from.workload.tcp_roundtrip(&address, tcp.port(), long.as_bytes()).with_context(path)?;
                ensure!(back == long.as_bytes(), "TCP {}", path());
                // Also a datagram of several fragments.
                for times in [1, 200] {
                    let datagram = text.repeat(times);
                    let sent = datagram.as_bytes();
                    let back = from.workload.udp_roundtrip(&address, udp.port(), sent).with_context(path)?;
                    ensure!(back == sent, "UDP {}", path());
                }
            }
        }
    }
    Ok(())
}

fn tunnel_of(host: &Host, name: &str) -> Result<Value> {
    Ok(peer(host, name)?["tunnel"].clone())
}

/// Waits until a host has a session with another one in the tunnel.
fn wait_session(host: &Host, name: &str) {
    wait_until(SOON, &format!("the tunnel from {} to {name}", host.name()), || {
        let tunnel = tunnel_of(host, name)?;
        ensure!(tunnel["last_handshake_s"].is_u64() && tunnel["rtt_us"].is_u64(), "{tunnel}");
        Ok(())
    })
    .unwrap();
}

fn traffic_passes_and_is_encrypted(underlay: Underlay) {
    let world = encrypted_lab(underlay);
    let capture = Capture::start(&world.lab.switch(), &[MARKER, OPEN]).unwrap();
    echo_everywhere(&world.open, OPEN).unwrap();
    wait_until(SOON, "the text of the unencrypted network to be captured", || capture.count(OPEN) > 0)
        .unwrap();
    let before = capture.frames();
    for all in world.encrypted() {
        echo_everywhere(all, MARKER).unwrap();
    }
    // Programs on the host use the tunnel, too.
    for address in world.pods[1].addresses() {
        world.host("h1").ping_until(address, SOON).unwrap();
    }
    let captured = capture.finish().unwrap();
    assert!(captured.frames() > before + 100, "no traffic passed the switch");
    assert_eq!(captured.count(MARKER), 0, "plain text on the underlay");

    for host in world.lab.hosts() {
        for other in world.lab.hosts().iter().filter(|other| other.name() != host.name()) {
            wait_session(host, other.name());
            let row = peer(host, other.name()).unwrap();
            assert_eq!(row["encryption"], "wireguard (userspace)", "{row}");
            assert!(row["tunnel"]["sent_bytes"].as_u64() > Some(10_000), "{row}");
            assert!(row["tunnel"]["received_bytes"].as_u64() > Some(10_000), "{row}");
        }
        let wide = host.ctl_ok(&["peers", "-o", "wide"]).unwrap();
        assert!(wide.contains("HANDSHAKE") && wide.contains("wireguard (userspace)"), "{wide}");
        let metrics = host.ctl_ok(&["metrics"]).unwrap();
        assert!(metrics.contains("ovl_tunnel_sent_bytes_total{peer="), "{metrics}");
    }
    assert_no_fragmentation(&world);
    wait_clean(world.lab.hosts(), SOON).unwrap();
}

/// Checks that a packet of the MTU passes unfragmented, and that one more byte does not.
fn assert_no_fragmentation(world: &EncryptedLab) {
    for (all, around) in [(&world.blue, 70 + 40), (&world.pods, 40)] {
        let outer = if world.host("h1").address().unwrap().is_ipv4() { 20 } else { 40 };
        let mtu = 1500 - around - outer;
        for address in all[1].addresses() {
            let headers = if address.contains(':') { 48 } else { 28 };
            let fits = |size: u32| {
                let payload = (size - headers).to_string();
                let ping = ["ping", "-n", "-c1", "-W1", "-Mdo", "-s", &payload, &address];
                all[0].workload.exec(ping).unwrap().success()
            };
            wait_until(SOON, &format!("{mtu} bytes to {address}"), || fits(mtu)).unwrap();
            assert!(!fits(mtu + 1), "{} bytes reach {address}", mtu + 1);
        }
    }
}

/// MTU of the interface of an endpoint.
fn mtu_of(endpoint: &Attached) -> Result<u32> {
    let link = endpoint.workload.ip_json(&["link", "show", "dev", "eth0"])?;
    Ok(u32::try_from(link[0]["mtu"].as_u64().context("no MTU")?)?)
}

/// Checks that what endpoints may send arrives: pings as long as their MTU, TCP, and datagrams in fragments.
fn assert_everything_fits(all: &[Attached], text: &str) {
    echo_everywhere(all, text).unwrap();
    for address in all[1].addresses() {
        wait_until(SOON, &format!("a ping of the MTU to {address}"), || {
            let headers = if address.contains(':') { 48 } else { 28 };
            let payload = (mtu_of(&all[0])? - headers).to_string();
            // With DF, unless an ICMP message said that the path carries less.
            let ping = ["ping", "-n", "-c1", "-W1", "-Mwant", "-s", &payload, &address];
            ensure!(all[0].workload.exec(ping)?.success(), "{} bytes do not arrive", mtu_of(&all[0])?);
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn encrypted_networks_work_on_links_that_carry_less_than_ipv6_needs() {
    let both = ["--subnet", "10.61.0.0/16", "--subnet", "fd61::/48"];
    for (underlay, mtu, later) in
        [(Underlay::V4, 1500, 1400), (Underlay::V4, 1280, 1500), (Underlay::V6, 1420, 1280)]
    {
        let lab = start_lab_with(LabConfig::hosts(2).underlay(underlay).mtu(mtu)).unwrap();
        create_network(&lab, "switched4", &["--encrypted", "--subnet", "10.60.0.0/16"]).unwrap();
        create_network(&lab, "switched", &[&["--encrypted"], &both[..]].concat()).unwrap();
        create_routed_network(&lab, "routed4", &["--encrypted", "--subnet", "10.62.0.0/16"]).unwrap();
        create_routed_network(
            &lab,
            "routed",
            &["--encrypted", "--subnet", "10.63.0.0/16", "--subnet", "fd63::/48"],
        )
        .unwrap();
        let networks = ["switched4", "switched", "routed4", "routed"];
        let on = |network: &str| -> Vec<Attached> {
            let hosts = lab.hosts().iter();
            hosts.map(|h| attach(h, &format!("{network}{}", h.name()), network, &[]).unwrap()).collect()
        };
        let all = networks.map(on);
        for endpoints in &all {
            assert_everything_fits(endpoints, MARKER);
        }
        for host in lab.hosts() {
            host.set_mtu(later, PortMtu::Follow).unwrap();
        }
        for (endpoints, network) in all.iter().zip(networks) {
            let around = if network.starts_with("switched") { 70 + 40 } else { 40 };
            let outer = if underlay == Underlay::V4 { 20 } else { 40 };
            let carried = later - around - outer;
            let wanted = if network.ends_with('4') { carried } else { carried.max(1280) };
            wait_until(SOON, &format!("the MTU of {network} on links of {later}"), || {
                let found = mtu_of(&endpoints[0])?;
                ensure!(found == wanted, "it is {found}, not {wanted}");
                Ok(())
            })
            .unwrap();
            assert_everything_fits(endpoints, MARKER);
        }
        wait_clean(lab.hosts(), SOON).unwrap();
    }
}

#[test]
fn no_plain_text_on_an_ipv4_underlay() {
    traffic_passes_and_is_encrypted(Underlay::V4);
}

#[test]
fn no_plain_text_on_an_ipv6_underlay() {
    traffic_passes_and_is_encrypted(Underlay::V6);
}

/// Routes packets for an address through a host. `false` for IPv6 over IPv4, which is impossible.
fn route_via(switch: &Netns, to: &str, vtep: IpAddr) -> bool {
    let is_v6 = to.contains(':');
    if is_v6 && vtep.is_ipv4() {
        return false;
    }
    let via = vtep.to_string();
    // An IPv4 route can have an IPv6 next hop.
    let via = if vtep.is_ipv6() && !is_v6 { vec!["via", "inet6", &via] } else { vec!["via", &via] };
    switch.exec_ok([&["ip", "route", "replace", to], via.as_slice(), &["dev", "br0"]].concat()).unwrap();
    true
}

fn injected_packets_are_dropped(underlay: Underlay) {
    let world = encrypted_lab(underlay);
    let (h1, h2) = (world.host("h1"), world.host("h2"));
    let switch = world.lab.switch();
    let (vtep, member) = (h1.address().unwrap(), h2.address().unwrap());
    let (outside, length) = if vtep.is_ipv4() { ("192.168.77.250", 24) } else { ("fd77::fa", 64) };
    let prefix = format!("{outside}/{length}");
    let nodad = if vtep.is_ipv4() { &[][..] } else { &["nodad"][..] };
    switch.exec_ok([&["ip", "addr", "add", &prefix, "dev", "br0"], nodad].concat()).unwrap();
    let sources: [IpAddr; 2] = [outside.parse().unwrap(), member];

    // The same packets do arrive on an unencrypted network, so dropping them below proves something.
    let socket = listener(&world.open[0], &world.open[0].address(), SECOND);
    let packet = vxlan(vni_of(h1, "open"), &world.open[1], &world.open[0], FORGED);
    wait_until(SOON, "an injected VXLAN packet to arrive on an unencrypted network", || {
        spoofing_socket(&switch, member).send_to(&packet, (vtep, PLAIN_VXLAN))?;
        anyhow::Ok(receive(&socket).as_deref() == Some(FORGED))
    })
    .unwrap();

    create_routed_network(&world.lab, "bare", &["--subnet", "10.61.0.0/16", "--subnet", "fd61::/48"])
        .unwrap();
    let bare = attach(h1, "bare", "bare", &[]).unwrap();
    for address in bare.addresses() {
        let socket = listener(&bare, &address, SECOND);
        let (to, at): (IpAddr, _) = (address.parse().unwrap(), address.as_str());
        wait_until(SOON, "an injected plain packet to arrive on an unencrypted network", || {
            if !route_via(&switch, at, vtep) {
                return anyhow::Ok(true);
            }
            let source = sources.into_iter().find(|source| source.is_ipv4() == to.is_ipv4());
            let source = source.unwrap_or([192, 0, 2, 77].into());
            spoofing_socket(&switch, source).send_to(FORGED.as_bytes(), (to, PORT))?;
            Ok(receive(&socket).as_deref() == Some(FORGED))
        })
        .unwrap();
    }

    let mut listeners = Vec::new();
    for all in world.encrypted() {
        for address in all[0].addresses() {
            listeners.push((&all[1], address.clone(), listener(&all[0], &address, SOON)));
        }
    }
    // VXLAN packets from a non-member and with a member's address, to both ports and with the VNIs of all networks.
    let vnis = ["blue", "pods", "open"].map(|network| vni_of(h1, network));
    for source in sources {
        let socket = spoofing_socket(&switch, source);
        for port in [PLAIN_VXLAN, SEALED_VXLAN] {
            for vni in vnis {
                for all in world.encrypted() {
                    socket.send_to(&vxlan(vni, &all[1], &all[0], FORGED), (vtep, port)).unwrap();
                }
            }
        }
    }
    // Through the gateway of the unencrypted network, with the address of an encrypted network's endpoint.
    let gateway = h1.ctl_json(&["network", "inspect", "open"]).unwrap();
    assert_eq!(gateway["gateways"][0], "10.98.0.1");
    let bridge = h1.ip_json(&["link", "show", "dev", &text(&gateway["bridge"])]).unwrap();
    let gateway = mac_bytes(&text(&bridge[0]["address"]));
    for all in world.encrypted() {
        let mut packet = vxlan(vnis[2], &all[1], &all[0], FORGED);
        packet[8..14].copy_from_slice(&gateway);
        spoofing_socket(&switch, member).send_to(&packet, (vtep, PLAIN_VXLAN)).unwrap();
    }
    // Plain packets to the endpoints' addresses through the host, from a non-member, a member, and a remote endpoint,
    // in each family that the underlay has.
    for (peer, address, _) in &listeners {
        let to: IpAddr = address.parse().unwrap();
        if !route_via(&switch, address, vtep) {
            continue;
        }
        let remote = peer.addresses().into_iter().map(|each| each.parse::<IpAddr>().unwrap());
        let unknown = [[192, 0, 2, 77].into()];
        let all = sources.into_iter().chain(remote).chain(unknown);
        for source in all.filter(|from| from.is_ipv4() == to.is_ipv4()) {
            spoofing_socket(&switch, source).send_to(FORGED.as_bytes(), (to, PORT)).unwrap();
        }
    }
    // Marker: an injected packet that was not dropped would be received first.
    for (from, address, socket) in &listeners {
        let to = SocketAddr::new(address.parse().unwrap(), PORT);
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let sender = from.workload.run(|| UdpSocket::bind(any)).unwrap().unwrap();
        sender.send_to(MARKER.as_bytes(), to).unwrap();
        assert_eq!(receive(socket).as_deref(), Some(MARKER), "at {address}");
    }
    assert!(h1.exec_ok(["nft", "list", "table", "inet", "ovl"]).unwrap().contains("51942"));
}

#[test]
fn injected_packets_are_dropped_on_an_ipv4_underlay() {
    injected_packets_are_dropped(Underlay::V4);
}

#[test]
fn injected_packets_are_dropped_on_an_ipv6_underlay() {
    injected_packets_are_dropped(Underlay::V6);
}

#[test]
fn without_ovld_nothing_passes_and_nothing_leaves_unencrypted() {
    let world = encrypted_lab(Underlay::V4);
    let (h1, h2) = (world.host("h1"), world.host("h2"));
    let capture = Capture::start(&world.lab.switch(), &[MARKER]).unwrap();
    let send = |text: &str| {
        for all in world.encrypted() {
            for address in all[1].addresses() {
                let to: SocketAddr = SocketAddr::new(address.parse().unwrap(), PORT);
                let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
                let socket = all[0].workload.run(|| UdpSocket::bind(any)).unwrap().unwrap();
                // ICMP "unreachable" makes this fail, which is fine.
                socket.send_to(text.as_bytes(), to).ok();
            }
        }
    };
    let assert_unreachable = |all: &[Attached]| {
        all[1].addresses().iter().for_each(|address| assert_no_reply(&all[0].workload, address));
    };
    h1.stop().unwrap();
    send(MARKER);
    for all in world.encrypted() {
        assert_unreachable(all);
    }
    send(MARKER);
    // Without ovld, another program may also flush the routes.
    for family in ["-4", "-6"] {
        h1.exec_ok(["ip", family, "route", "flush", "proto", "79"]).unwrap();
    }
    h1.exec_ok(["ip", "route", "replace", "default", "via", &h2.address().unwrap().to_string()]).unwrap();
    send(MARKER);
    for all in world.encrypted() {
        assert_unreachable(all);
    }
    h1.start().unwrap();
    send(MARKER);
    h1.wait_ready(SOON).unwrap();
    for all in world.encrypted() {
        ping_all_pairs(all, SOON).unwrap();
    }
    h1.kill9().unwrap();
    send(MARKER);
    h1.start().unwrap();
    h1.wait_ready(SOON).unwrap();
    for all in world.encrypted() {
        echo_everywhere(all, MARKER).unwrap();
    }
    assert_eq!(capture.finish().unwrap().count(MARKER), 0, "plain text on the underlay");
    wait_clean(world.lab.hosts(), SOON).unwrap();
}

#[test]
fn encrypted_networks_have_egress_through_the_local_host() {
    let world = encrypted_lab(Underlay::Dual);
    let switch = world.lab.switch();
    switch.exec_ok(["ip", "addr", "add", "192.168.77.250/24", "dev", "br0"]).unwrap();
    switch.exec_ok(["ip", "addr", "add", "fd77::fa/64", "dev", "br0", "nodad"]).unwrap();
    for outside in ["192.168.77.250", "fd77::fa"] {
        let echo = switch.tcp_echo_on(SocketAddr::new(outside.parse().unwrap(), 0)).unwrap();
        for all in world.encrypted() {
            all[0].workload.ping_until(outside, SOON).unwrap();
            assert_eq!(all[0].workload.tcp_roundtrip(outside, echo.port(), b"out").unwrap(), b"out");
        }
    }
}

#[test]
fn forgotten_host_is_removed_from_the_tunnel() {
    let world = encrypted_lab(Underlay::V4);
    let (h1, h3) = (world.host("h1"), world.host("h3"));
    for name in ["h2", "h3"] {
        wait_session(h1, name);
    }
    h3.kill9().unwrap();
    h3.link_down().unwrap();
    wait_until(SOON, "h3 to be dead on h1", || anyhow::Ok(peer(h1, "h3")?["state"] == "dead")).unwrap();
    assert_eq!(peer(h1, "h3").unwrap()["encryption"], "none");
    h1.ctl_ok(&["peers", "forget", "h3"]).unwrap();
    // h3 is cut off, so it does not learn that it was forgotten.
    let blocked: Vec<String> = world.pods[2].addresses();
    for host in ["h1", "h2"] {
        wait_until(SOON, &format!("{host} to have no route or peer of h3"), || {
            let listed = routes(world.host(host))?;
            ensure!(!listed.iter().any(|route| blocked.iter().any(|b| route.contains(b))), "{listed:?}");
            ensure!(peer(world.host(host), "h3").is_err(), "h3 is listed");
            Ok(())
        })
        .unwrap();
    }
    for all in world.encrypted() {
        assert_no_reply(&all[0].workload, &all[2].address());
        ping_all_pairs(&all[..2], SOON).unwrap();
    }
    wait_clean(&world.lab.hosts()[..2], SOON).unwrap();
}

#[test]
fn without_the_configured_tunnel_nothing_passes_and_status_reports_it() {
    let lab = Lab::new(LabConfig::hosts(2)).unwrap();
    lab["h2"].set_config("tunnel = 'kernel'\n").unwrap();
    lab.start_all().unwrap();
    if lab["h2"].exec(["ip", "link", "add", "probe0", "type", "wireguard"]).unwrap().success() {
        lab["h2"].exec_ok(["ip", "link", "del", "probe0"]).unwrap();
        eprintln!("skipped: this kernel has WireGuard");
        return;
    }
    create_network(&lab, "blue", &["--encrypted", "--subnet", "10.99.0.0/24"]).unwrap();
    let all = [("h1", "a"), ("h2", "b"), ("h2", "c")]
        .map(|(host, name)| attach(&lab[host], name, "blue", &[]).unwrap());
    wait_problem(&lab["h2"], &["tunnel = \"kernel\"", "WireGuard"], SOON).unwrap();
    wait_problem(&lab["h1"], &["host h2 has no tunnel"], SOON).unwrap();
    assert_eq!(peer(&lab["h1"], "h2").unwrap()["encryption"], "none");
    // Traffic within a host needs no tunnel.
    ping_all_pairs(&all[1..], SOON).unwrap();
    assert_no_reply(&all[0].workload, &all[1].address());
    assert_no_reply(&all[1].workload, &all[0].address());
}

#[test]
fn encrypt_setting_applies_to_new_networks_and_reports_unencrypted_ones() {
    let lab = Lab::new(LabConfig::hosts(2)).unwrap();
    lab["h2"].set_config("encrypt = true\n").unwrap();
    lab.start_all().unwrap();
    create_network(&lab, "blue", &[]).unwrap();
    wait_problem(&lab["h2"], &["encrypt = true", "network blue is not encrypted"], SOON).unwrap();
    lab["h2"].ctl_ok(&["network", "create", "red"]).unwrap();
    let red = lab["h2"].ctl_json(&["network", "inspect", "red"]).unwrap();
    assert_eq!(red["encrypted"], true, "{red}");
    wait_until(SOON, "the tunnel on h1", || {
        anyhow::Ok(peer(&lab["h1"], "h2")?["encryption"] == "wireguard (userspace)")
    })
    .unwrap();
}

/// Tunnel key of a host as another host reports it, and whether it is being rotated.
fn tunnel_key(on: &Host, of: &str) -> Result<(String, bool)> {
    let status = on.ctl_json(&["key", "status"])?;
    let row = status["hosts"].as_array().into_iter().flatten().find(|row| row["name"] == of);
    let row = row.with_context(|| format!("{of} is not in {status}"))?;
    Ok((text(&row["tunnel"]), row["tunnel_rotating"] == true))
}

/// Tunnel interfaces on a host.
fn tunnel_interfaces(host: &Host) -> Result<Vec<String>> {
    let links = host.ip_json(&["link"])?;
    let names = links.as_array().into_iter().flatten().map(|link| text(&link["ifname"]));
    Ok(names.filter(|name| name.starts_with("ovt-")).collect())
}

#[test]
fn tunnel_key_rotation_loses_no_packet_and_leaks_no_plain_text() {
    let world = encrypted_lab(Underlay::V4);
    let capture = Capture::start(&world.lab.switch(), &[MARKER]).unwrap();
    let flows: Vec<Flow> = world
        .encrypted()
        .iter()
        .flat_map(|all| [Flow::start(&all[0], &all[1]).unwrap(), Flow::start(&all[2], &all[1]).unwrap()])
        .collect();
    let hosts: Vec<&Host> = world.lab.hosts().iter().collect();
    for (round, name) in ["h2", "h1", "h2"].into_iter().enumerate() {
        let host = world.host(name);
        let (before, _) = tunnel_key(host, name).unwrap();
        if round == 0 {
            // Only one rotation at a time, also without a waiting client.
            host.ctl_ok(&["key", "rotate", "--no-wait"]).unwrap();
            let error = ctl_error(host, &["key", "rotate"]).unwrap();
            assert_contains(&error, &["is being rotated", "key status"]);
        } else {
            host.ctl_ok(&["key", "rotate"]).unwrap();
        }
        for all in world.encrypted() {
            echo_everywhere(all, MARKER).unwrap();
        }
        wait_until(LATER, &format!("the new key of {name} and one tunnel interface on all hosts"), || {
            let (after, _) = tunnel_key(host, name)?;
            ensure!(after != before, "still {before}");
            for on in &hosts {
                ensure!(tunnel_key(on, name)? == (after.clone(), false), "on {}", on.name());
                let interfaces = tunnel_interfaces(on)?;
                ensure!(interfaces.len() == 1, "{interfaces:?} on {}", on.name());
            }
            Ok(())
        })
        .unwrap();
        let key = std::fs::read_to_string(host.state_dir().join("tunnel.key")).unwrap();
        assert_eq!(key.lines().count(), 1, "the old key is still in the file");
        assert!(!host.log().contains(key.split_whitespace().next().unwrap()), "a private key is in the log");
    }
    for flow in flows {
        flow.finish_without_loss().unwrap();
    }
    assert_eq!(capture.finish().unwrap().count(MARKER), 0, "plain text on the underlay");
}

#[test]
fn kill_during_a_tunnel_key_rotation_resumes_it() {
    let world = encrypted_lab(Underlay::V4);
    let h1 = world.host("h1");
    h1.ctl_ok(&["key", "rotate", "--no-wait"]).unwrap();
    let (key, _) = tunnel_key(h1, "h1").unwrap();
    h1.kill9().unwrap();
    h1.start().unwrap();
    wait_until(LATER, "the rotation to finish", || {
        ensure!(tunnel_key(h1, "h1")? == (key.clone(), false), "{:?}", tunnel_key(h1, "h1")?);
        ensure!(tunnel_interfaces(h1)?.len() == 1, "{:?}", tunnel_interfaces(h1)?);
        Ok(())
    })
    .unwrap();
    for all in world.encrypted() {
        ping_all_pairs(all, SOON).unwrap();
    }
}
