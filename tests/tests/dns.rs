//! Names of endpoints, as on Docker's networks: the resolver at 127.0.0.11.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Result, ensure};
use netns_lab::{Host, LabConfig, Netns, uninterrupted, wait_until};
use ovl_tests::frames::{FrameSocket, ipv4, mac, syn};
use ovl_tests::inject::{PORT, listener, receive};
use ovl_tests::ports::create_bridge_network;
use ovl_tests::resolver::{dig, status};
use ovl_tests::routed::create_routed_network;
use ovl_tests::{
    Attached, SOON, assert_contains, attach, attach_workload, create_network, ctl_error, rows, start_lab,
    start_lab_with, text, wait_clean,
};

/// Address of the resolver.
const AT: &str = "127.0.0.11";
/// Address of the resolver for workloads without IPv4.
const AT_V6: &str = "fd6f:766c::53";

fn wait_name(from: &Netns, name: &str, expected: &[String]) -> Result<()> {
    let mut expected = expected.to_vec();
    expected.sort();
    wait_until(SOON, &format!("{name} to resolve to {expected:?}"), || {
        let found = dig(from, AT, &[name])?;
        ensure!(found == expected, "{found:?}");
        Ok(())
    })
}

#[test]
fn endpoint_names_resolve_to_addresses_on_all_hosts() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24", "--subnet", "fd70::/64"]).unwrap();
    let [h1, h2] = lab.hosts() else { panic!() };
    let web = attach(h2, "web", "blue", &["--alias", "WWW"]).unwrap();
    let api = attach(h1, "api", "blue", &[]).unwrap();
    let addresses = web.addresses();
    wait_name(&api.workload, "web", &addresses[..1]).unwrap();
    // Over UDP and TCP, case-insensitively, by alias, with the network's name, and by the full name.
    for name in ["web", "WEB", "web.", "www", "web.blue", "web.blue.ovl.internal"] {
        for more in ["+notcp", "+tcp"] {
            assert_eq!(dig(&api.workload, AT, &[name, more]).unwrap(), addresses[..1], "{name} {more}");
        }
        assert_eq!(dig(&api.workload, AT, &[name, "AAAA"]).unwrap(), addresses[1..], "{name}");
    }
    // PTR records of both families.
    for address in &addresses {
        assert_eq!(dig(&api.workload, AT, &["-x", address]).unwrap(), ["web.blue."]);
    }
    // Types that the name does not have, and addresses of the network, are not forwarded.
    assert_eq!(status(&api.workload, AT, &["web", "MX"]).unwrap(), "NOERROR");
    assert_eq!(status(&api.workload, AT, &["-x", "10.70.0.200"]).unwrap(), "NXDOMAIN");
    // A container resolves its own name.
    assert_eq!(dig(&web.workload, AT, &["web"]).unwrap(), addresses[..1]);
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn detached_name_is_withdrawn_at_once_locally_and_soon_remotely() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let [h1, h2] = lab.hosts() else { panic!() };
    let here = attach(h1, "here", "blue", &[]).unwrap();
    let there = attach(h2, "there", "blue", &[]).unwrap();
    let web = attach(h1, "web", "blue", &[]).unwrap();
    // On the local host the name resolves as soon as the command returns.
    assert_eq!(dig(&here.workload, AT, &["web"]).unwrap(), [web.address()]);
    wait_name(&there.workload, "web", &[web.address()]).unwrap();
    h1.ctl_ok(&["detach", "web"]).unwrap();
    // The name is not found under the cluster's domain, which is not forwarded.
    assert_eq!(dig(&here.workload, AT, &["web.blue.ovl.internal"]).unwrap(), Vec::<String>::new());
    assert_eq!(status(&here.workload, AT, &["web.blue.ovl.internal"]).unwrap(), "NXDOMAIN");
    wait_name(&there.workload, "web.blue.ovl.internal", &[]).unwrap();
}

#[test]
fn shared_alias_returns_the_addresses_of_all_endpoints_rotated() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let [h1, h2] = lab.hosts() else { panic!() };
    let replicas: Vec<Attached> = [(h1, "a1"), (h2, "a2"), (h2, "a3")]
        .into_iter()
        .map(|(host, name)| attach(host, name, "blue", &["--alias", "api"]).unwrap())
        .collect();
    let all: Vec<String> = replicas.iter().map(Attached::address).collect();
    let asker = &replicas[0].workload;
    wait_name(asker, "api", &all).unwrap();
    let first = |_| {
        let output = asker.exec_ok(["dig", "+short", "@127.0.0.11", "api"]).unwrap();
        output.lines().next().unwrap_or_default().to_owned()
    };
    let firsts: std::collections::BTreeSet<String> = (0..30).map(first).collect();
    assert_eq!(firsts.len(), all.len(), "{firsts:?}");
    // More records than a datagram holds: truncated over UDP, complete over TCP, which dig uses by itself.
    let many: Vec<Attached> =
        (0..40).map(|i| attach(h1, &format!("m{i}"), "blue", &["--alias", "many"]).unwrap()).collect();
    let mut expected: Vec<String> = many.iter().map(Attached::address).collect();
    expected.sort();
    assert_eq!(dig(asker, AT, &["many", "+noedns"]).unwrap(), expected);
    let cut = asker.exec_ok(["dig", "@127.0.0.11", "many", "+noedns", "+ignore"]).unwrap();
    assert!(cut.contains(" tc ") || cut.contains(" tc;"), "{cut}");
}

#[test]
fn endpoints_resolve_only_names_of_their_own_networks() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    create_network(&lab, "red", &["--subnet", "10.71.0.0/24"]).unwrap();
    let [h1, h2] = lab.hosts() else { panic!() };
    // The same alias on both networks.
    let blue = attach(h1, "db-blue", "blue", &["--alias", "db"]).unwrap();
    let red = attach(h2, "db-red", "red", &["--alias", "db"]).unwrap();
    let in_blue = attach(h2, "b", "blue", &[]).unwrap();
    let in_red = attach(h2, "r", "red", &[]).unwrap();
    wait_name(&in_blue.workload, "db", &[blue.address()]).unwrap();
    wait_name(&in_red.workload, "db", &[red.address()]).unwrap();
    // Neither with the network's name, nor by address.
    assert_ne!(status(&in_blue.workload, AT, &["db.red"]).unwrap(), "NOERROR");
    assert_ne!(status(&in_blue.workload, AT, &["db-red"]).unwrap(), "NOERROR");
    assert_eq!(status(&in_blue.workload, AT, &["db.red.ovl.internal"]).unwrap(), "NXDOMAIN");
    assert_ne!(status(&in_blue.workload, AT, &["-x", &red.address()]).unwrap(), "NOERROR");
    // On both networks: the first interface's network takes precedence, and the network's name selects one.
    let both = attach(h1, "both-b", "blue", &[]).unwrap();
    let also = attach_workload(both.workload.clone(), "red", &[]).unwrap();
    wait_name(&also.workload, "db", &[blue.address()]).unwrap();
    wait_name(&also.workload, "db.red", &[red.address()]).unwrap();
    // After the first interface is detached, the resolver stays.
    h1.ctl_ok(&["detach", &both.name, "--network", "blue"]).unwrap();
    wait_name(&also.workload, "db", &[red.address()]).unwrap();
}

#[test]
fn names_resolve_on_internal_routed_and_ipv6_networks_too() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "inner", &["--subnet", "10.72.0.0/24", "--internal"]).unwrap();
    create_routed_network(&lab, "pods", &["--subnet", "10.73.0.0/16"]).unwrap();
    create_network(&lab, "six", &["--subnet", "fd74::/64"]).unwrap();
    create_network(&lab, "hidden", &["--subnet", "fd75::/64", "--internal"]).unwrap();
    create_routed_network(&lab, "pods6", &["--subnet", "fd76::/48"]).unwrap();
    let [h1, h2] = lab.hosts() else { panic!() };
    for (network, at, kind) in [
        ("inner", AT, "A"),
        ("pods", AT, "A"),
        ("six", AT_V6, "AAAA"),
        ("hidden", AT_V6, "AAAA"),
        ("pods6", AT_V6, "AAAA"),
    ] {
        let asker = attach(h1, &format!("a-{network}"), network, &[]).unwrap();
        let web = attach(h2, &format!("w-{network}"), network, &["--alias", "web"]).unwrap();
        for how in ["+notcp", "+tcp"] {
            wait_until(SOON, &format!("web on {network} {how}"), || {
                let found = dig(&asker.workload, at, &["web", kind, how])?;
                ensure!(found == [web.address()], "{found:?}");
                Ok(())
            })
            .unwrap();
        }
        let conf = h1.ctl_ok(&["dns", "--resolv-conf", "--from", &asker.name]).unwrap();
        assert_contains(&conf, &[&format!("nameserver {at}\n"), "options ndots:0\n"]);
    }
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn negative_answers_carry_a_soa_for_caching() {
    let lab = start_lab(1).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let web = attach(&lab.hosts()[0], "web", "blue", &[]).unwrap();
    // RFC 2308: a SOA record of a domain above the name, whose minimum is the negative TTL.
    let numbers = "1 7200 1800 86400 5";
    for (question, expected, domain) in [
        (&["nobody.blue.ovl.internal"][..], "NXDOMAIN", "ovl.internal."),
        (&["web.blue.ovl.internal", "AAAA"], "NOERROR", "ovl.internal."),
        (&["blue.ovl.internal"], "NOERROR", "ovl.internal."),
        (&["web", "AAAA"], "NOERROR", "."),
        (&["web.blue", "AAAA"], "NOERROR", "blue."),
        (&["-x", "10.70.0.200"], "NXDOMAIN", "0.70.10.in-addr.arpa."),
        (&["nobody.default.svc.cluster.local"], "NXDOMAIN", "cluster.local."),
        (&["svc.cluster.local"], "NOERROR", "cluster.local."),
    ] {
        for how in ["+notcp", "+tcp", "+noedns"] {
            let question = [question, &[how]].concat();
            assert_eq!(status(&web.workload, AT, &question).unwrap(), expected, "{question:?}");
            let args = [&["dig", "+noall", "+authority", "@127.0.0.11"], &question[..]].concat();
            let authority = web.workload.exec_ok(args).unwrap();
            let words: Vec<&str> = authority.split_whitespace().collect();
            assert_eq!(words.join(" "), format!("{domain} 5 IN SOA {domain} . {numbers}"), "{question:?}");
        }
    }
    let asked = dig(&web.workload, AT, &["cluster.local", "SOA"]).unwrap();
    assert_eq!(asked, [format!("cluster.local. . {numbers}")]);
    // Positive answers have no authority section.
    let found = web.workload.exec_ok(["dig", "+noall", "+authority", "@127.0.0.11", "web"]).unwrap();
    assert_eq!(found, "");
}

#[test]
fn sandbox_resolv_conf_names_the_resolver_with_ndots_0() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let [h1, h2] = lab.hosts() else { panic!() };
    let web = attach(h2, "web", "blue", &[]).unwrap();
    let sandbox = h1.promised_workload("box").unwrap();
    let name = sandbox.netns_name().to_owned();
    h1.ctl_ok(&["sandbox", "create", &name, "--network", "blue"]).unwrap();
    let path = format!("/etc/netns/{name}/resolv.conf");
    let conf = std::fs::read_to_string(&path).unwrap();
    assert_contains(&conf, &["nameserver 127.0.0.11\n", "options ndots:0\n"]);
    // The C library in the namespace resolves the name: `ip netns exec` bind-mounts the file.
    wait_until(SOON, "getent to find web", || {
        let output = h1.exec(["ip", "netns", "exec", &name, "getent", "ahostsv4", "web"])?;
        ensure!(output.stdout.starts_with(&web.address()), "{}{}", output.stdout, output.stderr);
        Ok(())
    })
    .unwrap();
    h1.ctl_ok(&["sandbox", "rm", &name]).unwrap();
    assert!(!std::path::Path::new(&path).exists(), "{path} is not removed");
}

#[test]
fn resolver_occupies_no_port_and_does_not_pin_the_namespace() {
    let lab = start_lab(1).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let host = &lab.hosts()[0];
    let web = attach(host, "web", "blue", &[]).unwrap();
    // The workload can run a resolver of its own on all addresses.
    web.workload
        .run(|| -> std::io::Result<()> {
            UdpSocket::bind(("0.0.0.0", 53))?;
            TcpListener::bind(("0.0.0.0", 53))?;
            UdpSocket::bind(("::", 53))?;
            Ok(())
        })
        .unwrap()
        .unwrap();
    assert_eq!(dig(&web.workload, AT, &["web"]).unwrap(), [web.address()]);
    let sockets = web.workload.exec_ok(["ss", "-Htuln"]).unwrap();
    assert_eq!(sockets, "", "a socket listens in the namespace");
    // Deleting the namespace's last name deletes the namespace, and then the endpoint.
    web.workload.destroy().unwrap();
    wait_until(SOON, "the endpoint to be deleted", || {
        let left = rows(host, &["endpoints"])?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn neighbours_cannot_reach_loopback_listeners() {
    let lab = start_lab(1).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let host = &lab.hosts()[0];
    let victim = attach(host, "victim", "blue", &[]).unwrap();
    let other = attach(host, "other", "blue", &[]).unwrap();
    let listener = victim.workload.run(|| TcpListener::bind("127.0.0.2:8080")).unwrap().unwrap();
    listener.set_nonblocking(true).unwrap();
    // The attacker sends packets for 127.0.0.2 to the victim, and accepts the replies.
    for command in [
        "sysctl -qw net.ipv4.conf.eth0.route_localnet=1".to_owned(),
        format!("ip neigh replace {} lladdr {} dev eth0 nud permanent", victim.address(), victim.mac()),
        format!(
            "ip route add 127.0.0.2 via {} dev eth0 table local src {}",
            victim.address(),
            other.address()
        ),
        "nft delete table ip ovl-dns".to_owned(),
    ] {
        other.workload.exec_ok(command.split(' ')).unwrap();
    }
    let attempt = || {
        let target = "127.0.0.2:8080".parse().unwrap();
        other.workload.run(move || TcpStream::connect_timeout(&target, Duration::from_millis(700))).unwrap()
    };
    assert!(attempt().is_err());
    assert!(listener.accept().is_err());
    // Counter-check: without the rules of ovl the attempt succeeds, so it was a real one. ovld soon restores the source
    // checks, which drop the victim's answer.
    victim.workload.exec_ok(["nft", "delete", "table", "ip", "ovl-dns"]).unwrap();
    wait_until(SOON, "the attempt to succeed", || {
        host.exec(["nft", "delete", "table", "bridge", "ovl-guard"])?;
        attempt()?;
        anyhow::Ok(())
    })
    .unwrap();
}

#[test]
fn clients_that_are_bound_to_127_0_0_1_get_answers_on_every_network() {
    let lab = start_lab(2).unwrap();
    let [h1, h2] = lab.hosts() else { panic!() };
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24", "--subnet", "fd70::/64"]).unwrap();
    create_network(&lab, "red", &["--subnet", "10.71.0.0/24", "--encrypted"]).unwrap();
    create_network(&lab, "inner", &["--subnet", "10.72.0.0/24", "--internal"]).unwrap();
    create_routed_network(&lab, "pods", &["--subnet", "10.73.0.0/16", "--subnet", "fd73::/48"]).unwrap();
    create_bridge_network(h1, "own", &["--subnet", "10.74.0.0/24"]).unwrap();
    for network in ["blue", "red", "inner", "pods", "own"] {
        let web = attach(if network == "own" { h1 } else { h2 }, network, network, &[]).unwrap();
        // The second one has its queries on the same port of the host.
        let asking = ["a", "b"].map(|name| attach(h1, &format!("{name}-{network}"), network, &[]).unwrap());
        wait_name(&asking[0].workload, network, &web.addresses()[..1]).unwrap();
        for asker in &asking {
            for source in ["127.0.0.1", "0.0.0.0"] {
                for how in ["+notcp", "+tcp"] {
                    let query = [network, how, "-b", source];
                    let found = dig(&asker.workload, AT, &query).unwrap();
                    assert_eq!(found, web.addresses()[..1], "{query:?}");
                }
            }
        }
    }
    // With another interface first, and after that is detached.
    let both = attach(h1, "both", "pods", &[]).unwrap();
    let also = attach_workload(both.workload.clone(), "blue", &[]).unwrap();
    let query = ["blue.blue", "-b", "127.0.0.1"];
    let found = dig(&also.workload, AT, &query).unwrap();
    h1.ctl_ok(&["detach", &both.name, "--network", "pods"]).unwrap();
    assert_eq!(dig(&also.workload, AT, &query).unwrap(), found);
    assert_eq!(found.len(), 1);
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn forged_answers_of_the_resolver_do_not_reach_loopback() {
    let lab = start_lab(1).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let host = &lab.hosts()[0];
    let [victim, other] = ["victim", "other"].map(|name| attach(host, name, "blue", &[]).unwrap());
    let streams = victim.workload.run(|| TcpListener::bind("127.0.0.1:8080")).unwrap().unwrap();
    let local = listener(&victim, "127.0.0.1", Duration::from_millis(300));
    let open = listener(&victim, &victim.address(), SOON);
    let macs = (mac(&victim.mac()), mac(&other.mac()));
    let from_resolver = (Ipv4Addr::new(127, 0, 0, 11), Ipv4Addr::LOCALHOST);
    let own = (other.address().parse().unwrap(), victim.address().parse().unwrap());
    let socket = FrameSocket::open(&other.workload, "eth0").unwrap();
    let forge = || {
        socket.send(&syn(macs, from_resolver, (53, 8080)))?;
        socket.send(&ipv4(macs, from_resolver, (53, PORT), "forged"))?;
        socket.send(&ipv4(macs, own, (53, PORT), "own"))
    };
    forge().unwrap();
    assert_eq!(receive(&open).as_deref(), Some("own"));
    assert_eq!(receive(&local), None);
    // Counter-check: they were real attempts. ovld soon restores the source checks. Even without them, nobody can open a
    // connection.
    wait_until(SOON, "a forged datagram to arrive without the source checks", || {
        host.exec(["nft", "delete", "table", "bridge", "ovl-guard"])?;
        forge()?;
        ensure!(receive(&local).as_deref() == Some("forged"));
        Ok(())
    })
    .unwrap();
    let opening = victim.workload.exec_ok(["ss", "-Htn", "state", "syn-recv"]).unwrap();
    assert_eq!(opening, "", "{streams:?}");
}

#[test]
fn only_endpoints_get_answers() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let [h1, h2] = lab.hosts() else { panic!() };
    let web = attach(h1, "web", "blue", &[]).unwrap();
    assert_eq!(dig(&web.workload, AT, &["web"]).unwrap(), [web.address()]);
    // From the underlay, by every address of the resolver.
    let gateway = h1.address().unwrap().to_string();
    for address in ["169.254.79.53", "127.0.0.11"] {
        let args = ["ip", "route", "replace", address, "via", &gateway, "table", "local"];
        if h2.exec(args).unwrap().success() {
            let asked = h2.exec(["dig", "+time=1", "+tries=1", "-p", "7953", &format!("@{address}"), "web"]);
            assert!(!asked.unwrap().success(), "{address} answers a query from the underlay");
        }
    }
    // Nor the host itself, which is not an endpoint.
    let own = ["dig", "+time=1", "+tries=1", "-p", "7953", "@169.254.79.53", "web"];
    assert!(!h1.exec(own).unwrap().success());
}

#[test]
fn names_survive_a_daemon_kill_and_are_updated_afterwards() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let [h1, h2] = lab.hosts() else { panic!() };
    let api = attach(h1, "api", "blue", &[]).unwrap();
    let web = attach(h2, "web", "blue", &[]).unwrap();
    wait_name(&api.workload, "web", &[web.address()]).unwrap();
    h1.kill9().unwrap();
    h1.start().unwrap();
    h1.wait_ready(SOON).unwrap();
    // The redirection in the namespace was left in place, and the names are restored from the cache at once.
    assert_eq!(dig(&api.workload, AT, &["web"]).unwrap(), [web.address()]);
    let new = attach(h2, "new", "blue", &[]).unwrap();
    wait_name(&api.workload, "new", &[new.address()]).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn names_of_a_failed_host_are_withdrawn_until_it_returns() {
    let lab = start_lab(3).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let hosts: &[Host] = lab.hosts();
    let api = attach(&hosts[0], "api", "blue", &[]).unwrap();
    let web = attach(&hosts[1], "w1", "blue", &["--alias", "web"]).unwrap();
    let other = attach(&hosts[2], "w2", "blue", &["--alias", "web"]).unwrap();
    wait_name(&api.workload, "web", &[web.address(), other.address()]).unwrap();
    hosts[1].link_down().unwrap();
    wait_name(&api.workload, "web", &[other.address()]).unwrap();
    // A bounded window: names must stay withdrawn after the failed host's records have expired everywhere, and there
    // is no event for "did not come back". 30 s is longer than any host keeps them.
    let back = std::time::Instant::now() + Duration::from_secs(30);
    wait_until(Duration::from_secs(60), "30 s without the names of the failed host", || {
        let found = dig(&api.workload, AT, &["web"])?;
        assert_eq!(found, [other.address()]);
        ensure!(std::time::Instant::now() > back, "the window is not over");
        Ok(())
    })
    .unwrap();
    hosts[1].link_up().unwrap();
    wait_name(&api.workload, "web", &[web.address(), other.address()]).unwrap();
}

#[test]
fn resolver_survives_malformed_queries() {
    let lab = start_lab(1).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let host = &lab.hosts()[0];
    let web = attach(host, "web", "blue", &[]).unwrap();
    let good = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03web\x00\x00\x01\x00\x01".to_vec();
    let mut messages: Vec<Vec<u8>> = (0..good.len()).map(|length| good[..length].to_vec()).collect();
    for i in 0..good.len() {
        for value in [0x00, 0x3f, 0x40, 0xc0, 0xff] {
            let mut message = good.clone();
            message[i] = value;
            messages.push(message);
        }
    }
    messages.push(vec![0xff; 1400]);
    let ask = move |messages: &[Vec<u8>]| -> std::io::Result<Vec<u8>> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect((AT, 53))?;
        for message in messages {
            socket.send(message)?;
        }
        socket.set_read_timeout(Some(SOON))?;
        let mut buffer = [0; 2048];
        loop {
            let length = uninterrupted(|| socket.recv(&mut buffer))?;
            // The answers to the other messages have another ID or an error.
            if length > 30 && buffer[..2] == [0xab, 0xcd] {
                return Ok(buffer[..length].to_vec());
            }
        }
    };
    let mut last = good.clone();
    last[..2].copy_from_slice(&[0xab, 0xcd]);
    messages.push(last);
    web.workload.run(|| ask(&messages)).unwrap().unwrap();
    // Over TCP: a length without its message, and garbage.
    for garbage in [&[0xff, 0xff, 0x00][..], &[0, 5, 1, 2, 3, 4, 5], &[0, 0]] {
        let send = || -> std::io::Result<()> {
            let mut stream = TcpStream::connect((AT, 53))?;
            stream.write_all(garbage)?;
            stream.shutdown(std::net::Shutdown::Write)?;
            stream.set_read_timeout(Some(SOON))?;
            stream.read_to_end(&mut Vec::new()).map(drop)
        };
        // It does not matter how the connection is closed.
        let _ = web.workload.run(send).unwrap();
    }
    assert_eq!(dig(&web.workload, AT, &["web"]).unwrap(), [web.address()]);
    assert_eq!(dig(&web.workload, AT, &["web", "+tcp"]).unwrap(), [web.address()]);
}

#[test]
fn ovlctl_dns_explains_answers_and_the_host_resolves_full_names() {
    let listen = "dns_listen = [\"127.0.0.1:5300\"]\nresolv_conf = \"/nonexistent\"\n";
    let lab = start_lab_with(LabConfig::hosts(2).config(listen)).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let [h1, h2] = lab.hosts() else { panic!() };
    let web = attach(h2, "web", "blue", &[]).unwrap();
    let api = attach(h1, "api", "blue", &[]).unwrap();
    wait_name(&api.workload, "web", &[web.address()]).unwrap();
    let answer = h1.ctl_json(&["dns", "web", "--from", "api"]).unwrap();
    assert_eq!(text(&answer["status"]), "NOERROR");
    assert_eq!(text(&answer["answers"][0]["data"]), web.address());
    assert_contains(&text(&answer["why"]), &["network blue", &format!("web on {}", h2.name())]);
    let answer = h1.ctl_json(&["dns", &web.address(), "--from", "api"]).unwrap();
    assert_eq!(text(&answer["answers"][0]["data"]), "web.blue");
    let answer = h1.ctl_json(&["dns", "example.org", "--from", "api"]).unwrap();
    assert_eq!(text(&answer["status"]), "SERVFAIL");
    assert_contains(&text(&answer["why"]), &["/nonexistent"]);
    // The host resolves names of all networks, but only full ones.
    let answer = h1.ctl_json(&["dns", "web.blue.ovl.internal"]).unwrap();
    assert_eq!(text(&answer["answers"][0]["data"]), web.address());
    assert_eq!(text(&h1.ctl_json(&["dns", "nobody.blue.ovl.internal"]).unwrap()["status"]), "NXDOMAIN");
    assert_eq!(text(&h1.ctl_json(&["dns", "web"]).unwrap()["status"]), "REFUSED");
    let port = ["-p", "5300", "web.blue.ovl.internal"];
    assert_eq!(dig(h1, "127.0.0.1", &port).unwrap(), [web.address()]);
    assert_eq!(
        dig(h1, "127.0.0.1", &["-p", "5300", "-x", &web.address()]).unwrap(),
        ["web.blue.ovl.internal."]
    );
    assert_contains(
        &ctl_error(h1, &["dns", "web", "--from", "web"]).unwrap(),
        &["no endpoint web on this host"],
    );
    assert_contains(&ctl_error(h1, &["dns", "a..b"]).unwrap(), &["cannot be a name"]);
}
