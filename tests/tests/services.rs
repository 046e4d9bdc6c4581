//! Services: types and fields, on switched and routed networks, and connections while backends, hosts and daemons fail.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Netns, wait_until};
use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
};
use ovl_tests::resolver::dig;
use ovl_tests::routed::create_network_of_mode;
use ovl_tests::service::{Connection, NamedServer, UdpClient, apply, ask, wait_answers};
use ovl_tests::{Attached, SOON, attach, start_lab, text, wait_clean};
use serde_json::json;

const MODES: [&str; 2] = ["l2", "l3"];

/// Creates a dual-stack network in a mode.
fn network(lab: &Lab, mode: &str) -> Result<()> {
    let subnets = ["--subnet", "10.60.0.0/16", "--subnet", "fd60::/64"];
    create_network_of_mode(lab, mode, "blue", &subnets)
}

/// A Service `web` with TCP port 80 and UDP port 53, and these additional fields in its spec.
fn web(more: &str) -> String {
    format!(
        "{{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{{\"name\":\"web\"}},\"spec\":{{
            \"selector\":{{\"app\":\"web\"}},\"ipFamilyPolicy\":\"PreferDualStack\",
            \"ports\":[{{\"name\":\"http\",\"port\":80,\"targetPort\":8080,\"nodePort\":NODEPORT}},
                     {{\"name\":\"dns\",\"port\":53,\"targetPort\":8080,\"protocol\":\"UDP\"}}]{more}}}}}"
    )
    .replace(",\"nodePort\":NODEPORT", if more.contains("NodePort") { ",\"nodePort\":30080" } else { "" })
}

/// Cluster IPs of the Service, as the first host shows them.
fn addresses(lab: &Lab) -> Result<Vec<IpAddr>> {
    let found = lab.hosts()[0].ctl_json(&["get", "svc", "web"])?;
    let all = found["spec"]["clusterIPs"].as_array().context("no addresses")?;
    Ok(all.iter().map(text).map(|each| each.parse()).collect::<Result<_, _>>()?)
}

/// Attaches a backend: an endpoint with the label, and a server in it.
fn backend(host: &Host, name: &str) -> Result<(Attached, NamedServer)> {
    let at = attach(host, name, "blue", &["--label", "app=web"])?;
    let server = NamedServer::start(&at.workload, name, 8080)?;
    Ok((at, server))
}

/// Starts a lab with a host in each of these zones.
fn start_lab_of_zones(zones: &[&str]) -> Result<Lab> {
    let lab = Lab::new(LabConfig::hosts(zones.len()))?;
    for (host, zone) in lab.hosts().iter().zip(zones) {
        host.set_config(&format!("zone = '{zone}'\n"))?;
    }
    lab.start_all()?;
    Ok(lab)
}

fn refused_at(from: &Netns, to: SocketAddr) -> Result<()> {
    let start = Instant::now();
    match Connection::open(from, to)? {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        other => anyhow::bail!("{to} is not refused: {other:?}"),
    }
    ensure!(start.elapsed() < Duration::from_secs(3), "the refusal took {:?}", start.elapsed());
    Ok(())
}

#[test]
fn cluster_ip_leads_to_all_backends_from_everywhere() -> Result<()> {
    for mode in MODES {
        let lab = start_lab(3)?;
        let [h1, h2, h3] = lab.hosts() else { unreachable!() };
        network(&lab, mode)?;
        apply(&lab, h2, &web(""))?;
        let (near, _near) = backend(h1, "near")?;
        let (_far, _server) = backend(h2, "far")?;
        let client = attach(h1, "client", "blue", &[])?;
        let other = attach(h3, "other", "blue", &[])?;
        for address in addresses(&lab)? {
            let [tcp, udp] = [80, 53].map(|port| SocketAddr::new(address, port));
            for from in [&client, &other, &near] {
                wait_answers(&from.workload, tcp, &["far", "near"])
                    .with_context(|| format!("{mode}: from {}", from.name))?;
            }
            // Source addresses are kept, except for a backend that connects to itself (hairpin).
            for from in [&client, &near] {
                for _ in 0..8 {
                    let answer = ask(&from.workload, tcp)?;
                    let own: Vec<IpAddr> =
                        from.addresses().iter().map(|a| a.parse()).collect::<Result<_, _>>()?;
                    let is_self = answer.name == from.name;
                    ensure!(
                        own.contains(&answer.seen) != is_self,
                        "{mode}: {} seen as {answer:?}",
                        from.name
                    );
                }
            }
            for from in [&client, &other] {
                let mut seen = Vec::new();
                for _ in 0..24 {
                    seen.push(
                        UdpClient::open(&from.workload, udp)?
                            .ask()
                            .with_context(|| format!("{mode}: UDP"))?
                            .name,
                    );
                }
                seen.sort();
                seen.dedup();
                ensure!(seen == ["far", "near"], "{mode}: {seen:?}");
            }
        }
        // The backends' own addresses still work beside the Service.
        for to in near.addresses() {
            let answer = ask(&client.workload, SocketAddr::new(to.parse()?, 8080))?;
            ensure!(
                answer.name == "near" && client.addresses().contains(&answer.seen.to_string()),
                "{answer:?}"
            );
        }
        wait_clean(lab.hosts(), SOON)?;
    }
    Ok(())
}

#[test]
fn connections_are_balanced_equally() -> Result<()> {
    let lab = start_lab(2)?;
    let [h1, h2] = lab.hosts() else { unreachable!() };
    network(&lab, "l3")?;
    apply(&lab, h1, &web(""))?;
    let mut servers = Vec::new();
    for (host, name) in [(h1, "a"), (h2, "b"), (h2, "c")] {
        servers.push(backend(host, name)?);
    }
    let client = attach(h1, "client", "blue", &[])?;
    let to = SocketAddr::new(addresses(&lab)?[0], 80);
    wait_answers(&client.workload, to, &["a", "b", "c"])?;
    let mut counts: BTreeMap<String, f64> = BTreeMap::new();
    const ASKED: u16 = 600;
    for _ in 0..ASKED {
        *counts.entry(ask(&client.workload, to)?.name).or_default() += 1.0;
    }
    let expected = f64::from(ASKED) / 3.0;
    let chi2: f64 = counts.values().map(|count| (count - expected).powi(2) / expected).sum();
    // Chi-square with two degrees of freedom: a balanced run exceeds this once in a million.
    ensure!(counts.len() == 3 && chi2 < 27.6, "{counts:?}: chi square {chi2}");
    Ok(())
}

#[test]
fn service_without_backends_refuses_at_once() -> Result<()> {
    for mode in MODES {
        let lab = start_lab(2)?;
        let [h1, h2] = lab.hosts() else { unreachable!() };
        network(&lab, mode)?;
        apply(&lab, h1, &web(",\"type\":\"NodePort\""))?;
        let client = attach(h1, "client", "blue", &[])?;
        let to = SocketAddr::new(addresses(&lab)?[0], 80);
        wait_until(SOON, "a refusal", || refused_at(&client.workload, to))?;
        let udp = UdpClient::open(&client.workload, SocketAddr::new(to.ip(), 53))?;
        let refusal = udp.ask().expect_err("no backend must answer");
        assert_eq!(refusal.kind(), io::ErrorKind::ConnectionRefused, "{mode}: {refusal}");
        let node = SocketAddr::new(h1.address()?, 30080);
        wait_until(SOON, "a refusal at the node port", || refused_at(h2, node))?;
        // A backend that is not ready does not count.
        let (_at, _server) = backend(h1, "web")?;
        wait_answers(&client.workload, to, &["web"])?;
        h1.ctl_ok(&["endpoint", "unready", "web"])?;
        wait_until(SOON, "a refusal", || refused_at(&client.workload, to))?;
        h1.ctl_ok(&["endpoint", "ready", "web"])?;
        wait_answers(&client.workload, to, &["web"])?;
    }
    Ok(())
}

#[test]
fn node_port_is_open_on_every_host() -> Result<()> {
    let lab = start_lab(3)?;
    let [h1, h2, h3] = lab.hosts() else { unreachable!() };
    network(&lab, "l3")?;
    apply(&lab, h1, &web(",\"type\":\"NodePort\""))?;
    let (_one, _first) = backend(h1, "one")?;
    let (_two, _second) = backend(h2, "two")?;
    let outside = h3.address()?;
    for host in [h1, h2] {
        let to = SocketAddr::new(host.address()?, 30080);
        wait_answers(h3, to, &["one", "two"])?;
        // The source address is kept for a backend on the same host. Otherwise the reply would take another path.
        let here = if host.name() == h1.name() { "one" } else { "two" };
        for _ in 0..12 {
            let answer = ask(h3, to)?;
            ensure!((answer.seen == outside) == (answer.name == here), "at {to}: {answer:?}");
        }
    }
    // With externalTrafficPolicy Local, each host uses only its own backends, and keeps the source address.
    apply(&lab, h1, &web(",\"type\":\"NodePort\",\"externalTrafficPolicy\":\"Local\""))?;
    for (host, name) in [(h1, "one"), (h2, "two")] {
        let to = SocketAddr::new(host.address()?, 30080);
        wait_answers(h3, to, &[name])?;
        ensure!(ask(h3, to)?.seen == outside);
    }
    Ok(())
}

#[test]
fn session_affinity_keeps_a_client_on_its_backend() -> Result<()> {
    let lab = start_lab(2)?;
    let [h1, h2] = lab.hosts() else { unreachable!() };
    network(&lab, "l3")?;
    apply(&lab, h1, &web(",\"sessionAffinity\":\"ClientIP\""))?;
    let mut servers: BTreeMap<&str, (Attached, NamedServer)> = BTreeMap::new();
    for (host, name) in [(h1, "a"), (h2, "b"), (h2, "c")] {
        servers.insert(name, backend(host, name)?);
    }
    let clients: Vec<Attached> =
        (0..8).map(|n| attach(h1, &format!("client-{n}"), "blue", &[])).collect::<Result<_>>()?;
    for address in addresses(&lab)? {
        let to = SocketAddr::new(address, 80);
        wait_until(SOON, "an answer", || ask(&clients[0].workload, to).map(drop))?;
        let mut seen = Vec::new();
        for client in &clients {
            let first = ask(&client.workload, to)?.name;
            for _ in 0..6 {
                let now = ask(&client.workload, to)?.name;
                ensure!(now == first, "{} moved from {first} to {now} at {to}", client.name);
            }
            seen.push(first);
        }
        seen.sort();
        seen.dedup();
        ensure!(seen.len() > 1, "all clients are with {seen:?}");
    }
    // When a backend is removed, its clients move to another one and stay there, and others' clients do not move.
    let to = SocketAddr::new(addresses(&lab)?[0], 80);
    let before: Vec<String> =
        clients.iter().map(|client| Ok(ask(&client.workload, to)?.name)).collect::<Result<_>>()?;
    let gone = before[0].clone();
    let (at, server) = servers.remove(gone.as_str()).context("no such backend")?;
    at.workload.host().ctl_ok(&["detach", &gone])?;
    drop(server);
    for (client, before) in clients.iter().zip(before) {
        let now = wait_until(SOON, "another backend", || {
            let now = ask(&client.workload, to)?.name;
            ensure!(now != gone, "still {gone}");
            Ok(Some(now))
        })?;
        ensure!(before == gone || now == before, "{} moved from {before} to {now}", client.name);
        ensure!(ask(&client.workload, to)?.name == now);
    }
    Ok(())
}

#[test]
fn removed_backend_loses_udp_flows_and_keeps_open_connections() -> Result<()> {
    for mode in MODES {
        let lab = start_lab(2)?;
        let [h1, h2] = lab.hosts() else { unreachable!() };
        network(&lab, mode)?;
        apply(&lab, h1, &web(""))?;
        let (_a, _one) = backend(h1, "a")?;
        let (_b, two) = backend(h2, "b")?;
        let client = attach(h1, "client", "blue", &[])?;
        let [tcp, udp] = [80, 53].map(|port| addresses(&lab).map(|all| SocketAddr::new(all[0], port)));
        let (tcp, udp) = (tcp?, udp?);
        wait_answers(&client.workload, tcp, &["a", "b"])?;
        // A UDP flow and a TCP connection to the backend that is removed.
        let flow = wait_until(SOON, "a flow to b", || {
            let flow = UdpClient::open(&client.workload, udp)?;
            ensure!(flow.ask()?.name == "b");
            Ok(Some(flow))
        })?;
        let mut open = wait_until(SOON, "a connection to b", || {
            let mut open = Connection::open(&client.workload, tcp)??;
            ensure!(open.read_answer()?.name == "b");
            Ok(Some(open))
        })?;
        h2.ctl_ok(&["endpoint", "unready", "b"])?;
        wait_until(SOON, "the flow to move to another backend", || {
            ensure!(flow.ask()?.name == "a");
            Ok(())
        })?;
        wait_answers(&client.workload, tcp, &["a"])?;
        // The open connection is not cut.
        ensure!(open.ask()?.name == "b", "{mode}: the connection has moved");
        // The last backend, too.
        h1.ctl_ok(&["endpoint", "unready", "a"])?;
        wait_until(SOON, "the flow to be refused", || match flow.ask() {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
            other => anyhow::bail!("{other:?}"),
        })?;
        drop(two);
    }
    Ok(())
}

#[test]
fn connections_survive_changes_of_other_backends() -> Result<()> {
    let lab = start_lab(2)?;
    let [h1, h2] = lab.hosts() else { unreachable!() };
    network(&lab, "l2")?;
    apply(&lab, h1, &web(""))?;
    let (_a, _one) = backend(h1, "a")?;
    let (_b, _two) = backend(h2, "b")?;
    let client = attach(h1, "client", "blue", &[])?;
    let to = SocketAddr::new(addresses(&lab)?[0], 80);
    wait_answers(&client.workload, to, &["a", "b"])?;
    let mut open = Vec::new();
    for _ in 0..16 {
        let mut connection = Connection::open(&client.workload, to)??;
        open.push((connection.read_answer()?, connection));
    }
    for n in 0..8 {
        let (_at, server) = backend(if n % 2 == 0 { h1 } else { h2 }, &format!("x{n}"))?;
        // New connections do not hit a removed backend.
        for _ in 0..8 {
            ask(&client.workload, to)?;
        }
        h1.ctl_ok(&["endpoints"])?;
        let host = if n % 2 == 0 { h1 } else { h2 };
        host.ctl_ok(&["endpoint", "unready", &format!("x{n}")])?;
        wait_until(SOON, "no new connections to the removed backend", || {
            for _ in 0..16 {
                ensure!(ask(&client.workload, to)?.name != format!("x{n}"));
            }
            Ok(())
        })?;
        drop(server);
    }
    // The daemon is killed, and then the rules are flushed.
    h1.kill9()?;
    for (first, connection) in &mut open {
        ensure!(connection.ask()? == *first, "while ovld is killed");
    }
    wait_answers(&client.workload, to, &["a", "b"])?;
    h1.start()?;
    wait_clean(lab.hosts(), SOON)?;
    h1.exec_ok(["nft", "flush", "ruleset"])?;
    wait_answers(&client.workload, to, &["a", "b"])?;
    wait_clean(lab.hosts(), SOON)?;
    for (first, connection) in &mut open {
        ensure!(connection.ask()? == *first, "after the flush");
    }
    Ok(())
}

#[test]
fn backends_of_a_dead_host_are_removed() -> Result<()> {
    let lab = start_lab(3)?;
    let [h1, h2, _] = lab.hosts() else { unreachable!() };
    network(&lab, "l3")?;
    apply(&lab, h1, &web(""))?;
    let (_a, _one) = backend(h1, "a")?;
    let (_b, two) = backend(h2, "b")?;
    let client = attach(h1, "client", "blue", &[])?;
    let to = SocketAddr::new(addresses(&lab)?[0], 80);
    wait_answers(&client.workload, to, &["a", "b"])?;
    drop(two);
    h2.destroy()?;
    wait_answers(&client.workload, to, &["a"])?;
    // A deleted Service leaves nothing behind.
    h1.ctl_ok(&["delete", "svc", "web"])?;
    wait_until(SOON, "the tables to be deleted", || {
        let tables = h1.exec_ok(["nft", "list", "tables"])?;
        ensure!(!tables.contains("ovl-services") && !tables.contains("ovl-divert"), "{tables}");
        Ok(())
    })
}

/// Reads the next sequence number of a socket's queue (tcp(7), `TCP_REPAIR`): 1 is the receive queue, 2 the send queue.
fn sequence(stream: &TcpStream, queue: libc::c_int) -> Result<u32> {
    let set = |option, value: libc::c_int| -> Result<()> {
        // SAFETY: the pointer is valid for a value of this length.
        let done = unsafe {
            let length = size_of::<libc::c_int>() as libc::socklen_t;
            libc::setsockopt(stream.as_raw_fd(), libc::IPPROTO_TCP, option, (&raw const value).cast(), length)
        };
        ensure!(done == 0, "{}", io::Error::last_os_error());
        Ok(())
    };
    set(libc::TCP_REPAIR, 1)?;
    set(libc::TCP_REPAIR_QUEUE, queue)?;
    let (mut sequence, mut length) = (0_u32, size_of::<u32>() as libc::socklen_t);
    // SAFETY: both pointers are valid, and the value has this length.
    let done = unsafe {
        let (value, length) = ((&raw mut sequence).cast(), &raw mut length);
        libc::getsockopt(stream.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_QUEUE_SEQ, value, length)
    };
    ensure!(done == 0, "{}", io::Error::last_os_error());
    // -1 ends it without a window probe.
    set(libc::TCP_REPAIR, -1)?;
    Ok(sequence)
}

/// Sends an empty segment of a connection, with a sequence number far beyond the window.
fn send_beyond_window(at: &Netns, stream: &TcpStream) -> Result<()> {
    let (SocketAddr::V4(own), SocketAddr::V4(peer)) = (stream.local_addr()?, stream.peer_addr()?) else {
        anyhow::bail!("not an IPv4 connection");
    };
    let mut segment = [own.port().to_be_bytes(), peer.port().to_be_bytes()].concat();
    segment.extend(sequence(stream, 2)?.wrapping_add(10_000_000).to_be_bytes());
    segment.extend(sequence(stream, 1)?.to_be_bytes());
    // Five words of header, ACK, a window of 1000; checksum; no urgent data.
    segment.extend([0x50, 0x10, 3, 232, 0, 0, 0, 0]);
    let pseudo = [own.ip().octets(), peer.ip().octets(), [0, 6, 0, 20]].concat();
    let words = pseudo.chunks(2).chain(segment.chunks(2));
    let sum: u32 = words.map(|two| u32::from(u16::from_be_bytes([two[0], two[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
    segment[16..18].copy_from_slice(&checksum.to_be_bytes());
    at.run(|| -> Result<()> {
        let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Tcp)?;
        sendto(raw.as_raw_fd(), &segment, &SockaddrIn::from(peer), MsgFlags::empty())?;
        Ok(())
    })?
}

#[test]
fn segment_beyond_the_window_does_not_reset_a_connection() -> Result<()> {
    for mode in MODES {
        let lab = start_lab(2)?;
        let [h1, h2] = lab.hosts() else { unreachable!() };
        network(&lab, mode)?;
        apply(&lab, h1, &web(""))?;
        let backend = attach(h1, "backend", "blue", &["--label", "app=web"])?;
        let listener = backend.workload.run(|| TcpListener::bind(("0.0.0.0", 8080)))??;
        let to = SocketAddr::new(addresses(&lab)?[0], 80);
        ensure!(to.is_ipv4(), "{to}");
        for host in [h1, h2] {
            let client = attach(host, &format!("client-{}", host.name()), "blue", &[])?;
            let mut near = wait_until(SOON, "a connection", || {
                anyhow::Ok(Some(client.workload.run(|| TcpStream::connect_timeout(&to, SOON))??))
            })?;
            let (mut far, _) = listener.accept()?;
            for stream in [&near, &far] {
                stream.set_read_timeout(Some(SOON))?;
            }
            for n in 0..3 {
                send_beyond_window(&backend.workload, &far)?;
                let mut byte = [0];
                near.write_all(&[n])?;
                far.read_exact(&mut byte).with_context(|| format!("{mode}: from {}", client.name))?;
                far.write_all(&byte)?;
                near.read_exact(&mut byte).with_context(|| format!("{mode}: to {}", client.name))?;
            }
        }
        wait_clean(lab.hosts(), SOON)?;
    }
    Ok(())
}

#[test]
fn what_no_service_has_in_the_service_range_is_refused() -> Result<()> {
    for mode in MODES {
        let lab = start_lab(1)?;
        let [h1] = lab.hosts() else { unreachable!() };
        network(&lab, mode)?;
        // Without a route, nothing would leave the host anyway.
        for route in ["default", "::/0"] {
            h1.exec_ok(["ip", "route", "replace", route, "dev", "eth0"])?;
        }
        apply(&lab, h1, &web(""))?;
        apply(&lab, h1, &web("").replace("\"web\"}", "\"other\"}"))?;
        let (_backend, _server) = backend(h1, "backend")?;
        let client = attach(h1, "client", "blue", &[])?;
        let used = addresses(&lab)?;
        wait_answers(&client.workload, SocketAddr::new(used[0], 80), &["backend"])?;
        let unused: [IpAddr; 2] = ["10.96.77.77".parse()?, "fd00:10:96::7777".parse()?];
        let from: [&Netns; 2] = [&client.workload, h1];
        for from in from {
            for (address, port) in used.iter().map(|address| (*address, 81)).chain(unused.map(|at| (at, 80)))
            {
                refused_at(from, SocketAddr::new(address, port)).with_context(|| mode.to_owned())?;
                // A program of the host learns it when it sends. The kernel limits the rate of ICMP messages.
                wait_until(SOON, "UDP to be refused", || {
                    let asked = UdpClient::open(from, SocketAddr::new(address, port))?.ask();
                    let refused = [io::ErrorKind::ConnectionRefused, io::ErrorKind::PermissionDenied];
                    let is_refused = asked.as_ref().is_err_and(|error| refused.contains(&error.kind()));
                    ensure!(is_refused, "{mode}: UDP from {from:?} to {address}: {asked:?}");
                    Ok(())
                })?;
            }
        }
        // So are the addresses of a Service that is deleted.
        h1.ctl_ok(&["delete", "svc", "web"])?;
        for address in used {
            wait_until(SOON, "a refusal", || refused_at(&client.workload, SocketAddr::new(address, 80)))?;
        }
        wait_clean(lab.hosts(), SOON)?;
    }
    Ok(())
}

#[test]
fn near_backends_are_preferred_while_there_are_some() -> Result<()> {
    for mode in MODES {
        let lab = start_lab_of_zones(&["a", "a", "b"])?;
        let [h1, h2, h3] = lab.hosts() else { unreachable!() };
        network(&lab, mode)?;
        let prefer = |what: &str| apply(&lab, h1, &web(&format!(",\"trafficDistribution\":\"{what}\"")));
        prefer("PreferSameNode")?;
        let all = [(h1, "one"), (h2, "two"), (h3, "three")].map(|(host, name)| backend(host, name));
        let _all = all.into_iter().collect::<Result<Vec<_>>>()?;
        let clients = [h1, h3].map(|host| attach(host, &format!("client-{}", host.name()), "blue", &[]));
        let [first, third] = clients;
        let (first, third) = (first?, third?);
        let asked = |from: &Netns, names: &[&str]| -> Result<()> {
            for address in addresses(&lab)? {
                wait_answers(from, SocketAddr::new(address, 80), names).with_context(|| mode.to_owned())?;
            }
            Ok(())
        };
        asked(&first.workload, &["one"])?;
        asked(&third.workload, &["three"])?;
        // Without a backend on the host, those in the zone, and without any there, all.
        h1.ctl_ok(&["endpoint", "unready", "one"])?;
        asked(&first.workload, &["two"])?;
        h2.ctl_ok(&["endpoint", "unready", "two"])?;
        asked(&first.workload, &["three"])?;
        h1.ctl_ok(&["endpoint", "ready", "one"])?;
        h2.ctl_ok(&["endpoint", "ready", "two"])?;
        prefer("PreferSameZone")?;
        asked(&first.workload, &["one", "two"])?;
        asked(&third.workload, &["three"])?;
        h3.ctl_ok(&["endpoint", "unready", "three"])?;
        asked(&third.workload, &["one", "two"])?;
        wait_clean(lab.hosts(), SOON)?;
    }
    Ok(())
}

/// The labels of a Service that kube-proxy leaves to others. DNS has it all the same.
#[test]
fn service_of_another_proxy_has_a_name_and_no_translation() -> Result<()> {
    for mode in MODES {
        let lab = start_lab(1)?;
        let [h1] = lab.hosts() else { unreachable!() };
        network(&lab, mode)?;
        let labelled = |label: &str| {
            web("").replace(
                "\"name\":\"web\"",
                &format!("\"name\":\"web\",\"labels\":{{\"service.kubernetes.io/{label}\":\"x\"}}"),
            )
        };
        apply(&lab, h1, &labelled("any"))?;
        apply(&lab, h1, &web("").replace("\"web\"}", "\"other\"}"))?;
        let (_backend, _server) = backend(h1, "backend")?;
        let client = attach(h1, "client", "blue", &[])?;
        let used = addresses(&lab)?;
        for label in ["service-proxy-name", "headless"] {
            for address in &used {
                wait_answers(&client.workload, SocketAddr::new(*address, 80), &["backend"])?;
            }
            apply(&lab, h1, &labelled(label))?;
            for address in &used {
                wait_until(SOON, "a refusal", || {
                    refused_at(&client.workload, SocketAddr::new(*address, 80))
                })?;
            }
            let found = dig(&client.workload, "127.0.0.11", &["web.default.svc.cluster.local", "A"])?;
            ensure!(found == [used[0].to_string()], "{mode}: {found:?}");
            let described = h1.ctl_ok(&["describe", "svc", "web"])?;
            ensure!(described.contains("not translated by ovl"), "{described}");
            apply(&lab, h1, &labelled("any"))?;
        }
        wait_clean(lab.hosts(), SOON)?;
    }
    Ok(())
}

#[test]
fn affinity_tells_backends_at_one_address_apart() -> Result<()> {
    let lab = start_lab(1)?;
    let [h1] = lab.hosts() else { unreachable!() };
    network(&lab, "l3")?;
    let at = attach(h1, "both", "blue", &[])?;
    let _servers =
        [NamedServer::start(&at.workload, "first", 8081)?, NamedServer::start(&at.workload, "second", 8082)?];
    let slice = |name: &str, port: u16| {
        json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": name, "labels": {"kubernetes.io/service-name": "web"}},
            "endpoints": [{"addresses": [at.address()]}], "ports": [{"name": "http", "port": port}]})
    };
    let service = json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"sessionAffinity": "ClientIP", "ports": [{"name": "http", "port": 80}]}});
    let list =
        json!({"apiVersion": "v1", "kind": "List", "items": [service, slice("a", 8081), slice("b", 8082)]});
    apply(&lab, h1, &list.to_string())?;
    let to = SocketAddr::new(addresses(&lab)?[0], 80);
    let mut seen = BTreeSet::new();
    // The probability that 16 clients are all sent to one of two backends is 1 in 32,768.
    for n in 0..16 {
        let client = attach(h1, &format!("client-{n}"), "blue", &[])?;
        let first = wait_until(SOON, "an answer", || anyhow::Ok(Some(ask(&client.workload, to)?.name)))?;
        for _ in 0..3 {
            let now = ask(&client.workload, to)?.name;
            ensure!(now == first, "{} moved from {first} to {now}", client.name);
        }
        seen.insert(first);
    }
    ensure!(seen.len() == 2, "all clients are with {seen:?}");
    Ok(())
}
