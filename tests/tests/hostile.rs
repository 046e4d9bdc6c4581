//! What workloads and users of a host cannot do to the overlay and to the host.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use anyhow::{Result, ensure};
use netns_lab::{Host, Netns, Workload, wait_until};
use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use ovl_tests::inject::{PORT, listener, receive, spoofing_socket, vni_of, vxlan};
use ovl_tests::ports::{create_bridge_network, outsider};
use ovl_tests::routed::create_routed_network;
use ovl_tests::{Attached, SOON, attach, create_network, ping_all_pairs, start_lab, wait_clean};

const FORGED: &str = "forged by a workload";
const MARKER: &str = "sent by an endpoint";
const VXLAN: u16 = 4789;

/// Connects a workload to a bridge of another program, as `docker0` is, which masquerades its packets.
fn on_foreign_bridge(host: &Host, name: &str) -> Workload {
    let workload = host.workload(name).unwrap();
    host.exec_ok(["ip", "link", "add", "docker0", "type", "bridge"]).unwrap();
    host.exec_ok(["ip", "addr", "add", "172.30.0.1/24", "dev", "docker0"]).unwrap();
    host.exec_ok(["ip", "link", "set", "docker0", "up"]).unwrap();
    let netns = workload.netns_name();
    let pair = ["ip", "link", "add", "vdocker", "type", "veth", "peer", "name", "eth0", "netns", netns];
    host.exec_ok(pair).unwrap();
    host.exec_ok(["ip", "link", "set", "vdocker", "master", "docker0", "up"]).unwrap();
    for args in [
        &["ip", "link", "set", "lo", "up"][..],
        &["ip", "link", "set", "eth0", "up"],
        &["ip", "addr", "add", "172.30.0.2/24", "dev", "eth0"],
        &["ip", "route", "add", "default", "via", "172.30.0.1"],
    ] {
        workload.exec_ok(args.iter().copied()).unwrap();
    }
    let rules = "table ip foreign { chain post { type nat hook postrouting priority srcnat; policy accept; \
                 ip saddr 172.30.0.0/24 oifname != \"docker0\" masquerade; }; }";
    host.exec_ok(["nft", rules]).unwrap();
    workload
}

/// Sends a datagram as `nobody`, without any capability.
fn send_as_nobody(from: &Netns, datagram: &[u8], to: SocketAddr) {
    let escaped: String = datagram.iter().map(|byte| format!("\\x{byte:02x}")).collect();
    let script = format!("printf '{escaped}' > /dev/udp/{}/{}", to.ip(), to.port());
    let drop = ["setpriv", "--reuid=65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"];
    // A send that the host drops may fail.
    from.exec([&drop[..], &["bash", "-c", &script]].concat()).unwrap();
}

/// Sends a datagram from any address, and from an address that the sender does not have.
fn send_as_root(from: &Netns, datagram: &[u8], to: SocketAddr, forged: IpAddr) {
    let plain = from.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
    let _ = plain.send_to(datagram, to);
    let _ = spoofing_socket(from, forged).send_to(datagram, to);
}

#[test]
fn vxlan_that_a_workload_or_a_user_writes_reaches_no_endpoint() {
    let lab = start_lab(2).unwrap();
    let hosts = [&lab["h1"], &lab["h2"]];
    create_network(&lab, "flat", &["--subnet", "10.1.0.0/16"]).unwrap();
    create_routed_network(&lab, "pods", &["--subnet", "10.2.0.0/16", "--backend", "vxlan"]).unwrap();
    create_bridge_network(hosts[0], "local", &["--subnet", "10.3.0.0/24"]).unwrap();
    let victims =
        [attach(hosts[0], "v1", "flat", &[]).unwrap(), attach(hosts[1], "v2", "flat", &[]).unwrap()];
    let workloads = [
        attach(hosts[0], "switched", "flat", &[]).unwrap().workload,
        attach(hosts[0], "routed", "pods", &[]).unwrap().workload,
        attach(hosts[0], "bridged", "local", &[]).unwrap().workload,
        on_foreign_bridge(hosts[0], "foreign"),
    ];
    ping_all_pairs(&victims, SOON).unwrap();
    let vni = vni_of(hosts[0], "flat");
    let vteps = hosts.map(|host| host.address().unwrap());
    let at = |n: usize| SocketAddr::new(vteps[n], VXLAN);
    let frame = |n: usize| vxlan(vni, &victims[1 - n], &victims[n], FORGED);

    // The same packet arrives when a machine of the underlay sends it from a member's address.
    let switch = outsider(&lab).unwrap();
    for (n, victim) in victims.iter().enumerate() {
        let socket = listener(victim, &victim.address(), Duration::from_secs(1));
        wait_until(SOON, "a packet from the address of a member to arrive", || {
            spoofing_socket(&switch, vteps[1 - n]).send_to(&frame(n), at(n))?;
            anyhow::Ok(receive(&socket).as_deref() == Some(FORGED))
        })
        .unwrap();
    }

    let senders = workloads.iter().map(|workload| &**workload).chain([&**hosts[0]]);
    for sender in senders {
        for (n, victim) in victims.iter().enumerate() {
            let socket = listener(victim, &victim.address(), SOON);
            send_as_nobody(sender, &frame(n), at(n));
            // Any other address of the host has the same socket behind it.
            send_as_root(sender, &frame(n), at(n), vteps[1 - n]);
            if n == 0 {
                send_as_root(sender, &frame(0), SocketAddr::new([10, 1, 0, 1].into(), VXLAN), vteps[1]);
                send_as_root(sender, &frame(0), SocketAddr::new([127, 0, 0, 1].into(), VXLAN), vteps[1]);
            }
            // A forged packet that was not dropped would be received first.
            let from = &victims[1 - n];
            let own = from.workload.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
            own.send_to(MARKER.as_bytes(), (victim.address(), PORT)).unwrap();
            assert_eq!(receive(&socket).as_deref(), Some(MARKER), "from {}", sender.netns_name());
        }
    }

    // A host itself reaches a routed endpoint of another host, by VXLAN that belongs to its socket.
    let routed = attach(hosts[1], "r2", "pods", &[]).unwrap();
    hosts[0].ping_until(routed.address(), SOON).unwrap();
    let echo = routed.workload.tcp_echo(0).unwrap();
    let sent = FORGED.repeat(10_000);
    let back = hosts[0].tcp_roundtrip(routed.address(), echo.port(), sent.as_bytes()).unwrap();
    assert_eq!(back, sent.as_bytes());
    wait_clean(lab.hosts(), SOON).unwrap();
}

/// Sends a router advertisement (RFC 4861, section 4.2) to all nodes: a default router with a prefix.
fn advertise_router(from: &Netns, ifname: &str) -> Result<()> {
    let index =
        from.ip_json(&["link", "show", "dev", ifname])?[0]["ifindex"].as_i64().unwrap() as libc::c_int;
    from.run(|| -> Result<()> {
        let fd = socket(AddressFamily::Inet6, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::IcmpV6)?;
        let hops: libc::c_int = 255;
        for (option, value) in [(libc::IPV6_MULTICAST_HOPS, hops), (libc::IPV6_MULTICAST_IF, index)] {
            // SAFETY: the pointer is valid for a value of this length.
            let done = unsafe {
                let length = size_of::<libc::c_int>() as libc::socklen_t;
                libc::setsockopt(fd.as_raw_fd(), libc::SOL_IPV6, option, (&raw const value).cast(), length)
            };
            ensure!(done == 0, "{}", std::io::Error::last_os_error());
        }
        // SAFETY: the descriptor is a socket, and owned here.
        let raw = unsafe {
            <UdpSocket as std::os::fd::FromRawFd>::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(fd))
        };
        // Hop limit 64, a lifetime of 1,800 s, and the prefix 2001:db8:bad::/64.
        let mut message = vec![134, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
        message.extend([3, 4, 64, 0xc0, 0, 0, 14, 16, 0, 0, 14, 16, 0, 0, 0, 0]);
        message.extend([0x20, 1, 0xd, 0xb8, 0xb, 0xad, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        raw.send_to(&message, "[ff02::1]:0")?;
        Ok(())
    })?
}

#[test]
fn host_takes_no_default_route_and_no_address_from_a_workload() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    create_network(&lab, "flat", &["--subnet", "10.1.0.0/16"]).unwrap();
    create_network(&lab, "inner", &["--subnet", "10.4.0.0/16", "--internal"]).unwrap();
    create_routed_network(&lab, "pods", &["--subnet", "10.2.0.0/16"]).unwrap();
    create_bridge_network(host, "local", &["--subnet", "10.3.0.0/24"]).unwrap();
    let attached: Vec<Attached> = [("a", "flat"), ("b", "pods"), ("c", "local"), ("d", "inner")]
        .map(|(name, network)| attach(host, name, network, &[]).unwrap())
        .into();
    let foreign = on_foreign_bridge(host, "foreign");
    assert_eq!(host.exec_ok(["sysctl", "-n", "net.ipv6.conf.all.forwarding"]).unwrap().trim(), "0");
    let defaults = || host.ip_json(&["-6", "route", "show", "default"]);
    wait_until(SOON, "the host to take the router of the other program's bridge", || {
        for endpoint in &attached {
            advertise_router(&endpoint.workload, "eth0")?;
        }
        advertise_router(&foreign, "eth0")?;
        let found = defaults()?;
        ensure!(found.as_array().is_some_and(|all| !all.is_empty()), "{found}");
        Ok(())
    })
    .unwrap();
    let found = defaults().unwrap();
    assert!(found.as_array().unwrap().iter().all(|route| route["dev"] == "docker0"), "{found}");
    let addresses = host.exec_ok(["ip", "-6", "-o", "addr", "show", "scope", "global"]).unwrap();
    assert!(!addresses.contains("ov"), "{addresses}");
    wait_clean(lab.hosts(), SOON).unwrap();
}
