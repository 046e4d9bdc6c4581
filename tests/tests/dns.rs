//! Names of endpoints, as Docker's networks have them: the resolver at 127.0.0.11.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Result, ensure};
use netns_lab::{Host, LabConfig, Netns, wait_until};
use ovl_tests::resolver::{dig, status};
use ovl_tests::routed::make_routed;
use ovl_tests::{
    Attached, SOON, assert_says, attach, attach_workload, make_network, refused, rows, started, started_with,
    text, wait_clean,
};

/// Where the resolver is.
const AT: &str = "127.0.0.11";
/// And for who has no IPv4 address.
const AT_V6: &str = "fd6f:766c::53";

fn wait_name(from: &Netns, name: &str, expected: &[String]) -> Result<()> {
    let mut expected = expected.to_vec();
    expected.sort();
    wait_until(SOON, &format!("{name} to be {expected:?}"), || {
        let found = dig(from, AT, &[name])?;
        ensure!(found == expected, "{found:?}");
        Ok(())
    })
}

#[test]
fn custom_networks_get_dns_a_container_name_resolves_to_the_containers_ip_on_whichever_host() {
    let lab = started(2).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.70.0.0/24", "--subnet", "fd70::/64"]).unwrap();
    let [h1, h2] = lab.hosts() else { panic!() };
    let web = attach(h2, "web", "blue", &["--alias", "WWW"]).unwrap();
    let api = attach(h1, "api", "blue", &[]).unwrap();
    let addresses = web.addresses();
    wait_name(&api.workload, "web", &addresses[..1]).unwrap();
    // By UDP and TCP, in any case of letters, by alias, with the network's name behind, and in full.
    for name in ["web", "WEB", "web.", "www", "web.blue", "web.blue.ovl.internal"] {
        for more in ["+notcp", "+tcp"] {
            assert_eq!(dig(&api.workload, AT, &[name, more]).unwrap(), addresses[..1], "{name} {more}");
        }
        assert_eq!(dig(&api.workload, AT, &[name, "AAAA"]).unwrap(), addresses[1..], "{name}");
    }
    // The name of an address, of either family.
    for address in &addresses {
        assert_eq!(dig(&api.workload, AT, &["-x", address]).unwrap(), ["web.blue."]);
    }
    // What the name does not have is not asked of anybody else, and neither is an address of the network.
    assert_eq!(status(&api.workload, AT, &["web", "MX"]).unwrap(), "NOERROR");
    assert_eq!(status(&api.workload, AT, &["-x", "10.70.0.200"]).unwrap(), "NXDOMAIN");
    // The container itself has its name.
    assert_eq!(dig(&web.workload, AT, &["web"]).unwrap(), addresses[..1]);
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn a_name_is_gone_at_once_where_it_was_detached_and_soon_elsewhere() {
    let lab = started(2).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let [h1, h2] = lab.hosts() else { panic!() };
    let here = attach(h1, "here", "blue", &[]).unwrap();
    let there = attach(h2, "there", "blue", &[]).unwrap();
    let web = attach(h1, "web", "blue", &[]).unwrap();
    // Where it was attached its name is there when the command ends.
    assert_eq!(dig(&here.workload, AT, &["web"]).unwrap(), [web.address()]);
    wait_name(&there.workload, "web", &[web.address()]).unwrap();
    h1.ctl_ok(&["detach", "web"]).unwrap();
    // Nobody knows the name now: it goes to the host's resolvers, of which the lab has none.
    assert_eq!(dig(&here.workload, AT, &["web.blue.ovl.internal"]).unwrap(), Vec::<String>::new());
    assert_eq!(status(&here.workload, AT, &["web.blue.ovl.internal"]).unwrap(), "NXDOMAIN");
    wait_name(&there.workload, "web.blue.ovl.internal", &[]).unwrap();
}

#[test]
fn one_alias_on_several_endpoints_returns_ips_of_all_of_them_rotated() {
    let lab = started(2).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
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
    // More than a datagram holds: cut, and whole by TCP, which dig does by itself.
    let many: Vec<Attached> =
        (0..40).map(|i| attach(h1, &format!("m{i}"), "blue", &["--alias", "many"]).unwrap()).collect();
    let mut expected: Vec<String> = many.iter().map(Attached::address).collect();
    expected.sort();
    assert_eq!(dig(asker, AT, &["many", "+noedns"]).unwrap(), expected);
    let cut = asker.exec_ok(["dig", "@127.0.0.11", "many", "+noedns", "+ignore"]).unwrap();
    assert!(cut.contains(" tc ") || cut.contains(" tc;"), "{cut}");
}

#[test]
fn containers_see_only_names_of_networks_that_they_are_on() {
    let lab = started(2).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    make_network(&lab, "red", &["--subnet", "10.71.0.0/24"]).unwrap();
    let [h1, h2] = lab.hosts() else { panic!() };
    // One name on both networks.
    let blue = attach(h1, "db-blue", "blue", &["--alias", "db"]).unwrap();
    let red = attach(h2, "db-red", "red", &["--alias", "db"]).unwrap();
    let in_blue = attach(h2, "b", "blue", &[]).unwrap();
    let in_red = attach(h2, "r", "red", &[]).unwrap();
    wait_name(&in_blue.workload, "db", &[blue.address()]).unwrap();
    wait_name(&in_red.workload, "db", &[red.address()]).unwrap();
    // Not by the network's name either, and not by address.
    assert_ne!(status(&in_blue.workload, AT, &["db.red"]).unwrap(), "NOERROR");
    assert_ne!(status(&in_blue.workload, AT, &["db-red"]).unwrap(), "NOERROR");
    assert_eq!(status(&in_blue.workload, AT, &["db.red.ovl.internal"]).unwrap(), "NXDOMAIN");
    assert_ne!(status(&in_blue.workload, AT, &["-x", &red.address()]).unwrap(), "NOERROR");
    // On both: the first interface's network decides, and the network's name tells them apart.
    let both = attach(h1, "both-b", "blue", &[]).unwrap();
    let also = attach_workload(both.workload.clone(), "red", &[]).unwrap();
    wait_name(&also.workload, "db", &[blue.address()]).unwrap();
    wait_name(&also.workload, "db.red", &[red.address()]).unwrap();
    // When the first interface goes, the resolver stays.
    h1.ctl_ok(&["detach", &both.name, "--network", "blue"]).unwrap();
    wait_name(&also.workload, "db", &[red.address()]).unwrap();
}

#[test]
fn names_resolve_on_internal_routed_and_ipv6_networks_too() {
    let lab = started(2).unwrap();
    make_network(&lab, "inner", &["--subnet", "10.72.0.0/24", "--internal"]).unwrap();
    make_routed(&lab, "pods", &["--subnet", "10.73.0.0/16"]).unwrap();
    make_network(&lab, "six", &["--subnet", "fd74::/64"]).unwrap();
    make_network(&lab, "hidden", &["--subnet", "fd75::/64", "--internal"]).unwrap();
    make_routed(&lab, "pods6", &["--subnet", "fd76::/48"]).unwrap();
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
        assert_says(&conf, &[&format!("nameserver {at}\n"), "options ndots:0\n"]);
    }
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn that_there_is_nothing_may_be_kept_for_a_while() {
    let lab = started(1).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let web = attach(&lab.hosts()[0], "web", "blue", &[]).unwrap();
    // RFC 2308: a start of authority, of a domain that is above the name, whose minimum says for how long.
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
    // What there is has none.
    let found = web.workload.exec_ok(["dig", "+noall", "+authority", "@127.0.0.11", "web"]).unwrap();
    assert_eq!(found, "");
}

#[test]
fn a_containers_resolv_conf_has_nameserver_127_0_0_11_and_options_ndots_0() {
    let lab = started(2).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let [h1, h2] = lab.hosts() else { panic!() };
    let web = attach(h2, "web", "blue", &[]).unwrap();
    let sandbox = h1.promised_workload("box").unwrap();
    let name = sandbox.netns_name().to_owned();
    h1.ctl_ok(&["sandbox", "create", &name, "--network", "blue"]).unwrap();
    let path = format!("/etc/netns/{name}/resolv.conf");
    let conf = std::fs::read_to_string(&path).unwrap();
    assert_says(&conf, &["nameserver 127.0.0.11\n", "options ndots:0\n"]);
    // The C library of a program inside finds the name: `ip netns exec` shows it the file.
    wait_until(SOON, "getent to find web", || {
        let output = h1.exec(["ip", "netns", "exec", &name, "getent", "ahostsv4", "web"])?;
        ensure!(output.stdout.starts_with(&web.address()), "{}{}", output.stdout, output.stderr);
        Ok(())
    })
    .unwrap();
    h1.ctl_ok(&["sandbox", "rm", &name]).unwrap();
    assert!(!std::path::Path::new(&path).exists(), "{path} is left");
}

#[test]
fn the_resolver_takes_no_port_from_the_workload_and_keeps_no_namespace_alive() {
    let lab = started(1).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let host = &lab.hosts()[0];
    let web = attach(host, "web", "blue", &[]).unwrap();
    // A resolver of its own, on all addresses.
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
    assert_eq!(sockets, "", "somebody listens in the namespace");
    // With its last name the namespace ends, and the endpoint with it.
    web.workload.destroy().unwrap();
    wait_until(SOON, "the endpoint to be gone", || {
        let left = rows(host, &["endpoints"])?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn neighbours_do_not_reach_what_listens_on_loopback() {
    let lab = started(1).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let host = &lab.hosts()[0];
    let victim = attach(host, "victim", "blue", &[]).unwrap();
    let other = attach(host, "other", "blue", &[]).unwrap();
    let listener = victim.workload.run(|| TcpListener::bind("127.0.0.2:8080")).unwrap().unwrap();
    listener.set_nonblocking(true).unwrap();
    // The other one sends packets for 127.0.0.2 to the victim, and takes the answers.
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
    // Without what keeps it away, it would get there: so the attempt is a real one.
    victim.workload.exec_ok(["nft", "delete", "table", "ip", "ovl-dns"]).unwrap();
    assert!(attempt().is_ok());
}

#[test]
fn nobody_but_endpoints_is_answered() {
    let lab = started(2).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let [h1, h2] = lab.hosts() else { panic!() };
    let web = attach(h1, "web", "blue", &[]).unwrap();
    assert_eq!(dig(&web.workload, AT, &["web"]).unwrap(), [web.address()]);
    // From the underlay, by all addresses that lead there.
    let gateway = h1.address().unwrap().to_string();
    for address in ["169.254.79.53", "127.0.0.11"] {
        let args = ["ip", "route", "replace", address, "via", &gateway, "table", "local"];
        if h2.exec(args).unwrap().success() {
            let asked = h2.exec(["dig", "+time=1", "+tries=1", "-p", "7953", &format!("@{address}"), "web"]);
            assert!(!asked.unwrap().success(), "{address} answers the underlay");
        }
    }
    // Also the host itself, which is no endpoint.
    let own = ["dig", "+time=1", "+tries=1", "-p", "7953", "@169.254.79.53", "web"];
    assert!(!h1.exec(own).unwrap().success());
}

#[test]
fn names_survive_a_daemon_that_is_killed_and_updates_go_on_after_it() {
    let lab = started(2).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let [h1, h2] = lab.hosts() else { panic!() };
    let api = attach(h1, "api", "blue", &[]).unwrap();
    let web = attach(h2, "web", "blue", &[]).unwrap();
    wait_name(&api.workload, "web", &[web.address()]).unwrap();
    h1.kill9().unwrap();
    h1.start().unwrap();
    h1.wait_ready(SOON).unwrap();
    // What leads into the namespace was left as it was; the names are there at once, from what was cached.
    assert_eq!(dig(&api.workload, AT, &["web"]).unwrap(), [web.address()]);
    let new = attach(h2, "new", "blue", &[]).unwrap();
    wait_name(&api.workload, "new", &[new.address()]).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn names_of_a_host_that_is_gone_are_withdrawn_and_back_when_it_returns() {
    let lab = started(3).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let hosts: &[Host] = lab.hosts();
    let api = attach(&hosts[0], "api", "blue", &[]).unwrap();
    let web = attach(&hosts[1], "w1", "blue", &["--alias", "web"]).unwrap();
    let other = attach(&hosts[2], "w2", "blue", &["--alias", "web"]).unwrap();
    wait_name(&api.workload, "web", &[web.address(), other.address()]).unwrap();
    hosts[1].link_down().unwrap();
    wait_name(&api.workload, "web", &[other.address()]).unwrap();
    // Longer than any of ours remembers by itself.
    let back = std::time::Instant::now() + Duration::from_secs(30);
    wait_until(Duration::from_secs(60), "30 seconds without the host", || {
        let found = dig(&api.workload, AT, &["web"])?;
        assert_eq!(found, [other.address()]);
        ensure!(std::time::Instant::now() > back, "not yet");
        Ok(())
    })
    .unwrap();
    hosts[1].link_up().unwrap();
    wait_name(&api.workload, "web", &[web.address(), other.address()]).unwrap();
}

#[test]
fn malformed_queries_are_refused_or_passed_over_and_the_resolver_goes_on() {
    let lab = started(1).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
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
            let length = socket.recv(&mut buffer)?;
            // All others have another id or an error.
            if length > 30 && buffer[..2] == [0xab, 0xcd] {
                return Ok(buffer[..length].to_vec());
            }
        }
    };
    let mut last = good.clone();
    last[..2].copy_from_slice(&[0xab, 0xcd]);
    messages.push(last);
    web.workload.run(|| ask(&messages)).unwrap().unwrap();
    // And in a connection: a length that never comes, and garbage.
    for garbage in [&[0xff, 0xff, 0x00][..], &[0, 5, 1, 2, 3, 4, 5], &[0, 0]] {
        let send = || -> std::io::Result<()> {
            let mut stream = TcpStream::connect((AT, 53))?;
            stream.write_all(garbage)?;
            stream.shutdown(std::net::Shutdown::Write)?;
            stream.set_read_timeout(Some(SOON))?;
            stream.read_to_end(&mut Vec::new()).map(drop)
        };
        // How it is closed does not matter.
        let _ = web.workload.run(send).unwrap();
    }
    assert_eq!(dig(&web.workload, AT, &["web"]).unwrap(), [web.address()]);
    assert_eq!(dig(&web.workload, AT, &["web", "+tcp"]).unwrap(), [web.address()]);
}

#[test]
fn ovlctl_dns_shows_what_would_be_answered_and_why_and_the_host_finds_endpoints() {
    let listen = "dns_listen = [\"127.0.0.1:5300\"]\nresolv_conf = \"/nonexistent\"\n";
    let lab = started_with(LabConfig::hosts(2).config(listen)).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let [h1, h2] = lab.hosts() else { panic!() };
    let web = attach(h2, "web", "blue", &[]).unwrap();
    let api = attach(h1, "api", "blue", &[]).unwrap();
    wait_name(&api.workload, "web", &[web.address()]).unwrap();
    let answer = h1.ctl_json(&["dns", "web", "--from", "api"]).unwrap();
    assert_eq!(text(&answer["status"]), "NOERROR");
    assert_eq!(text(&answer["answers"][0]["data"]), web.address());
    assert_says(&text(&answer["why"]), &["network blue", &format!("web on {}", h2.name())]);
    let answer = h1.ctl_json(&["dns", &web.address(), "--from", "api"]).unwrap();
    assert_eq!(text(&answer["answers"][0]["data"]), "web.blue");
    let answer = h1.ctl_json(&["dns", "example.org", "--from", "api"]).unwrap();
    assert_eq!(text(&answer["status"]), "SERVFAIL");
    assert_says(&text(&answer["why"]), &["/nonexistent"]);
    // The host sees all networks, by full names alone.
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
    assert_says(&refused(h1, &["dns", "web", "--from", "web"]).unwrap(), &["no endpoint web on this host"]);
    assert_says(&refused(h1, &["dns", "a..b"]).unwrap(), &["cannot be a name"]);
}
