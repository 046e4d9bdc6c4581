//! Published ports. Names of tests quote what the document says of Docker's.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Netns, Spawned, Underlay, wait_until};
use ovl_tests::ports::{asked, asked_udp, make_bridge, outsider, who_asks};
use ovl_tests::routed::wait_routed;
use ovl_tests::{
    Attached, Capture, SOON, assert_says, attach, endpoints, problems, refused, rows,
    show_frames_to_firewall, started, started_with, strings, text, wait_clean, wait_problem,
};
use serde_json::json;

const OUTSIDE: [&str; 2] = ["192.168.77.250", "fd77::fa"];

/// The kinds of network that ports are published on.
const KINDS: [&[&str]; 3] = [&["--driver", "bridge"], &["--mode", "l2"], &["--mode", "l3"]];

fn dual() -> Lab {
    started_with(LabConfig::hosts(1).underlay(Underlay::Dual)).unwrap()
}

fn at(address: impl ToString, port: u16) -> SocketAddr {
    SocketAddr::new(address.to_string().parse().unwrap(), port)
}

/// A network with both families on one host.
fn make(lab: &Lab, name: &str, kind: &[&str], number: u8) {
    let (v4, v6) = (format!("10.{number}.0.0/16"), format!("fd{number:02}::/48"));
    let args = [&["network", "create", name, "--subnet", &v4, "--subnet", &v6], kind].concat();
    lab["h1"].ctl_ok(&args).unwrap();
    if kind.contains(&"l3") {
        wait_routed(lab, name).unwrap();
    }
}

/// An endpoint with a server at port 80, and these ports published.
fn serve(host: &Host, name: &str, network: &str, publish: &[&str]) -> (Attached, Spawned) {
    let more: Vec<&str> = publish.iter().flat_map(|publish| ["--publish", publish]).collect();
    let endpoint = attach(host, name, network, &more).unwrap();
    let server = who_asks(&endpoint.workload, 80).unwrap();
    (endpoint, server)
}

/// Whom the server takes us for, over TCP and over UDP, which must be the same.
fn who(from: &Netns, to: SocketAddr) -> Result<IpAddr> {
    let seen = asked(from, to)?;
    ensure!(asked_udp(from, to)? == seen, "over UDP it is another than {seen}");
    Ok(seen)
}

fn publish_attach(host: &Host, name: &str, network: &str, publish: &[&str]) -> String {
    let workload = host.find_workload(name).or_else(|_| host.workload(name)).unwrap();
    let more = publish.iter().flat_map(|publish| ["--publish", publish]);
    let args: Vec<&str> = ["attach", name, "--network", network, "--netns", workload.path_str()]
        .into_iter()
        .chain(more)
        .collect();
    refused(host, &args).unwrap()
}

/// Until a program of the host can have the port 8080.
fn wait_free(host: &Host) {
    let free = || -> Result<()> {
        host.run(|| TcpListener::bind("0.0.0.0:8080"))??;
        Ok(())
    };
    wait_until(SOON, "the port to be free", free).unwrap();
}

#[test]
fn dnat_for_p_8080_80_from_outside_and_from_the_host_by_any_of_its_addresses() {
    for kind in KINDS {
        let lab = dual();
        let host = &lab["h1"];
        let outside = outsider(&lab).unwrap();
        make(&lab, "blue", kind, 30);
        let (web, _server) = serve(host, "web", "blue", &["8080:80", "8080:80/udp"]);
        for (address, client) in host.addresses().iter().zip(OUTSIDE) {
            // The client's own address is what the container sees.
            assert_eq!(who(&outside, at(address, 8080)).unwrap().to_string(), client, "{kind:?}");
        }
        // Of the host's own addresses, the gateways' among them.
        let gateways = strings(&host.ctl_json(&["network", "inspect", "blue"]).unwrap()["gateways"]);
        let own = host.addresses().into_iter().map(|address| address.to_string());
        for address in own.chain(gateways) {
            who(host, at(&address, 8080)).unwrap_or_else(|error| panic!("{kind:?} {address}: {error}"));
        }
        // And localhost, of either family.
        for address in ["127.0.0.1", "::1"] {
            who(host, at(address, 8080)).unwrap_or_else(|error| panic!("{kind:?} {address}: {error}"));
        }
        assert_eq!(web.json["publish"].as_array().unwrap().len(), 2, "{}", web.json);
        wait_clean(lab.hosts(), SOON).unwrap();
    }
}

#[test]
fn on_encrypted_networks_as_on_others() {
    for mode in ["l2", "l3"] {
        let lab = dual();
        let host = &lab["h1"];
        let outside = outsider(&lab).unwrap();
        make(&lab, "blue", &["--mode", mode, "--encrypted"], 30);
        let (_web, _server) = serve(host, "web", "blue", &["8080:80", "8080:80/udp"]);
        let neighbour = attach(host, "neighbour", "blue", &[]).unwrap();
        for (address, client) in host.addresses().iter().zip(OUTSIDE) {
            let seen = who(&outside, at(address, 8080)).unwrap_or_else(|error| panic!("{mode}: {error}"));
            assert_eq!(seen.to_string(), client, "{mode}");
            who(&neighbour.workload, at(address, 8080)).unwrap_or_else(|error| panic!("{mode}: {error}"));
        }
        for address in ["127.0.0.1", "::1"] {
            who(host, at(address, 8080)).unwrap_or_else(|error| panic!("{mode} {address}: {error}"));
        }
        wait_clean(lab.hosts(), SOON).unwrap();
    }
}

#[test]
fn from_a_container_on_the_same_host_by_the_hosts_address() {
    from_a_container(false);
}

/// As Docker sets it: the packet filter sees frames within bridges too.
#[test]
fn from_a_container_on_the_same_host_where_bridges_call_iptables() {
    from_a_container(true);
}

fn from_a_container(shown: bool) {
    for kind in KINDS {
        let lab = dual();
        let host = &lab["h1"];
        show_frames_to_firewall(host, shown).unwrap();
        make(&lab, "blue", kind, 30);
        make(&lab, "red", &[], 31);
        let (web, _server) = serve(host, "web", "blue", &["8080:80", "8080:80/udp"]);
        let neighbour = attach(host, "neighbour", "blue", &[]).unwrap();
        let stranger = attach(host, "stranger", "red", &[]).unwrap();
        for (family, address) in host.addresses().into_iter().enumerate() {
            let to = at(address, 8080);
            let seen = |from: &Attached| {
                let what = || format!("{kind:?} {} {to}", from.name);
                who(&from.workload, to).with_context(what).unwrap()
            };
            // Another network is not reached directly, but what is published there is, as by anybody.
            assert_eq!(seen(&stranger).to_string(), stranger.addresses()[family]);
            // The answer must come back through the host, which it would not by itself behind one bridge.
            let routed = kind.contains(&"l3");
            assert_eq!(seen(&neighbour).to_string() == neighbour.addresses()[family], routed, "{kind:?}");
            seen(&web);
        }
        if !kind.contains(&"l3") {
            groups_are_as_ever(&web, &neighbour);
        }
        wait_clean(lab.hosts(), SOON).unwrap();
    }
}

/// What an endpoint with published ports sends to all on its network does not come back to it.
fn groups_are_as_ever(web: &Attached, neighbour: &Attached) {
    const SHOUT: &str = "is anybody there?";
    const TIMES: u64 = 5;
    let captures = [web, neighbour].map(|each| Capture::start(&each.workload, &[SHOUT]).unwrap());
    let shouting = || -> Result<()> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_broadcast(true)?;
        (0..TIMES).try_for_each(|_| socket.send_to(SHOUT.as_bytes(), "10.30.255.255:9").map(drop))?;
        Ok(())
    };
    web.workload.run(shouting).unwrap().unwrap();
    // At the sender each is seen as it leaves.
    wait_until(SOON, "what was sent to all", || captures.iter().all(|each| each.count(SHOUT) >= TIMES))
        .unwrap();
    assert_eq!(captures.map(|each| each.count(SHOUT)), [TIMES, TIMES]);
}

#[test]
fn a_port_in_use_is_refused_with_its_holder() {
    let lab = dual();
    let host = &lab["h1"];
    make_bridge(host, "blue", &["--subnet", "10.1.0.0/24", "--subnet", "fd01::/64"]).unwrap();
    let (web, _server) = serve(host, "web", "blue", &["8080:80", "192.168.77.1:9000:80", "[::1]:9001:80"]);
    let name = "taken";
    assert_says(
        &publish_attach(host, name, "blue", &["8080:80"]),
        &["8080/tcp is published for endpoint web on network blue"],
    );
    assert_says(&publish_attach(host, name, "blue", &["8070-8090:8070-8090"]), &["8080/tcp", "endpoint web"]);
    assert_says(&publish_attach(host, name, "blue", &["9000:80"]), &["9000/tcp", "endpoint web"]);
    assert_says(&publish_attach(host, name, "blue", &["0.0.0.0:9000:80"]), &["9000/tcp", "endpoint web"]);
    assert_says(&publish_attach(host, name, "blue", &["7:1", "7:2"]), &["7/tcp is asked for twice"]);
    assert_says(
        &publish_attach(host, name, "blue", &["192.0.2.7:7:7"]),
        &["192.0.2.7 is not an address of this host"],
    );
    // A program of the host has it, on one of its addresses or on all.
    let listener = host.run(|| TcpListener::bind("127.0.0.1:7000")).unwrap().unwrap();
    let socket = host.run(|| UdpSocket::bind("0.0.0.0:7001")).unwrap().unwrap();
    let own = format!("(process {})", std::process::id());
    assert_says(
        &publish_attach(host, name, "blue", &["7000:80"]),
        &["7000/tcp is in use on this host by", &own],
    );
    assert_says(
        &publish_attach(host, name, "blue", &["7001:80/udp"]),
        &["7001/udp is in use on this host by", &own],
    );
    assert_eq!(endpoints(host).unwrap(), ["web on h1 is ready"]);
    // Nothing that was refused has left anything.
    assert_eq!(rows(host, &["endpoints"]).unwrap()[0]["publish"], web.json["publish"]);
    drop(listener);
    drop(socket);
    // Other transports and other addresses are no conflict, and what was taken is free again.
    let more = ["8080:80/udp", "192.168.77.1:9001:80", "[fd77::1]:9000:80", "7000:80", "7001:80/udp"];
    let (other, _server) = serve(host, "other", "blue", &more);
    assert_eq!(other.json["publish"].as_array().unwrap().len(), more.len());
    // The other way round: no program of the host gets what is published.
    for port in [8080, 7000] {
        let error = host.run(move || TcpListener::bind(("0.0.0.0", port))).unwrap().unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    }
    assert!(host.run(|| UdpSocket::bind("0.0.0.0:7001")).unwrap().is_err());
    // Gone with the endpoint.
    host.ctl_ok(&["detach", "web"]).unwrap();
    wait_free(host);
    serve(host, "again", "blue", &["8080:80"]);
    wait_clean(lab.hosts(), SOON).unwrap();
}

/// Answers each datagram at port 80 with this word, until the process ends.
fn answer(at: &Attached, word: &'static str) {
    let socket = at.workload.run(|| UdpSocket::bind("[::]:80")).unwrap().unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            socket.send_to(word.as_bytes(), from).ok();
        }
    });
}

/// A flow of datagrams that goes on and on.
struct Talk(UdpSocket);

impl Talk {
    fn begin(from: &Netns, to: SocketAddr) -> Self {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let open = || -> Result<UdpSocket> {
            let socket = UdpSocket::bind(any)?;
            socket.connect(to)?;
            socket.set_read_timeout(Some(Duration::from_millis(300)))?;
            Ok(socket)
        };
        Self(from.run(open).unwrap().unwrap())
    }

    fn ask(&self) -> Result<String> {
        let mut buffer = [0; 64];
        self.0.send(b"?")?;
        let length = self.0.recv(&mut buffer)?;
        Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
    }

    fn wait_for(&self, word: &str) {
        wait_until(SOON, &format!("an answer from {word}"), || {
            let said = self.ask()?;
            ensure!(said == word, "{said} answers");
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn flows_of_udp_end_when_a_port_changes_hands() {
    for kind in KINDS {
        let lab = dual();
        let host = &lab["h1"];
        let outside = outsider(&lab).unwrap();
        make(&lab, "blue", kind, 30);
        // All of them go on all the time.
        let talks: Vec<Talk> = host
            .addresses()
            .into_iter()
            .flat_map(|address| [(&outside, address), (&**host, address)])
            .map(|(from, address)| Talk::begin(from, at(address, 8080)))
            .collect();
        // Nobody has the port: what is remembered of them leads to the host itself.
        talks.iter().for_each(|talk| drop(talk.ask().unwrap_err()));
        for word in ["first", "second"] {
            let endpoint = attach(host, word, "blue", &["--publish", "8080:80/udp"]).unwrap();
            answer(&endpoint, word);
            talks.iter().for_each(|talk| talk.wait_for(word));
            host.ctl_ok(&["detach", word]).unwrap();
            talks.iter().for_each(|talk| drop(talk.ask().unwrap_err()));
        }
        wait_clean(lab.hosts(), SOON).unwrap();
    }
}

#[test]
fn ranges_and_ports_that_nobody_named() {
    let lab = dual();
    let host = &lab["h1"];
    let outside = outsider(&lab).unwrap();
    make_bridge(host, "blue", &["--subnet", "10.1.0.0/24", "--subnet", "fd01::/64"]).unwrap();
    let a = attach(host, "a", "blue", &["--publish", "8000-8009:80-89", "--publish", "80"]).unwrap();
    assert_eq!(
        a.json["publish"][0],
        json!({ "transport": "tcp", "address": null, "host": 8000, "container": 80, "count": 10 })
    );
    let servers: Vec<Spawned> = (80..90).map(|port| who_asks(&a.workload, port).unwrap()).collect();
    for port in 8000..8010 {
        assert_eq!(asked(&outside, at("192.168.77.1", port)).unwrap().to_string(), OUTSIDE[0]);
    }
    assert!(asked(&outside, at("192.168.77.1", 8010)).is_err());
    let free = a.json["publish"][1]["host"].as_u64().unwrap() as u16;
    assert!((32768..61000).contains(&free), "{free}");
    assert_eq!(asked(&outside, at("fd77::1", free)).unwrap().to_string(), OUTSIDE[1]);
    drop(servers);
    // One of the endpoint's at any of several: the first that is free.
    let b = attach(host, "b", "blue", &["--publish", "8005-8012:80"]).unwrap();
    assert_eq!(b.json["publish"][0]["host"], 8010);
    assert_says(
        &publish_attach(host, "c", "blue", &["8000-8003:80"]),
        &["none of the ports 8000-8003/tcp is free"],
    );
    let table = host.ctl_ok(&["endpoints", "-o", "wide"]).unwrap();
    assert_says(&table, &["PUBLISH", "8000-8009:80-89/tcp", "8010:80/tcp"]);
}

#[test]
fn a_sandbox_has_published_ports_too_and_only_where_there_is_a_way() {
    let lab = dual();
    let host = &lab["h1"];
    let outside = outsider(&lab).unwrap();
    make_bridge(host, "shut", &["--internal"]).unwrap();
    make_bridge(host, "open", &["--subnet", "10.1.0.0/24"]).unwrap();
    let sandbox = host.promised_workload("box").unwrap();
    let name = sandbox.netns_name().to_owned();
    let create = |networks: &[&str], publish: &str| {
        let networks = networks.iter().flat_map(|network| ["--network", network]);
        ["sandbox", "create", &name]
            .into_iter()
            .chain(networks)
            .chain(["--publish", publish])
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let words =
        |args: &[String]| refused(host, &args.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    assert_says(&words(&create(&["host"], "8080:80")), &["no port is published", "host"]);
    assert_says(&words(&create(&[], "8080:80")), &["no port is published"]);
    assert_says(&words(&create(&["shut"], "8080:80")), &["network shut is internal"]);
    assert_says(
        &words(&create(&["open"], "[::1]:8080:80")),
        &["network open has no addresses of ::1's family"],
    );
    let args = create(&["shut", "open"], "8080:80");
    host.ctl_ok(&args.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    let _server = who_asks(&sandbox, 80).unwrap();
    assert_eq!(asked(&outside, at("192.168.77.1", 8080)).unwrap().to_string(), OUTSIDE[0]);
    // An endpoint without IPv6 answers at localhost of both families all the same.
    for address in ["127.0.0.1", "::1"] {
        asked(host, at(address, 8080)).unwrap();
    }
    host.ctl_ok(&["sandbox", "rm", &name, "--force"]).unwrap();
    wait_free(host);
}

#[test]
fn what_is_published_outlives_the_daemon_and_is_held_again() {
    let lab = dual();
    let host = &lab["h1"];
    let outside = outsider(&lab).unwrap();
    make_bridge(host, "blue", &["--subnet", "10.1.0.0/24", "--subnet", "fd01::/64"]).unwrap();
    let (_web, _server) = serve(host, "web", "blue", &["8080:80", "8080:80/udp", "8090:80"]);
    host.kill9().unwrap();
    for address in host.addresses() {
        who(&outside, at(address, 8080)).unwrap();
    }
    who(host, at("127.0.0.1", 8080)).unwrap();
    // Somebody takes one of the ports meanwhile.
    let thief = host.run(|| TcpListener::bind("0.0.0.0:8090")).unwrap().unwrap();
    host.start().unwrap();
    host.wait_ready(SOON).ok();
    wait_problem(host, &["endpoint web has published 8090:80/tcp", "in use on this host by"], SOON).unwrap();
    who(host, at("::1", 8080)).unwrap();
    assert!(host.run(|| TcpListener::bind("0.0.0.0:8080")).unwrap().is_err());
    drop(thief);
    wait_until(SOON, "no problem", || {
        ensure!(problems(host)?.is_empty(), "{:?}", problems(host)?);
        Ok(())
    })
    .unwrap();
    who(&outside, at("192.168.77.1", 8080)).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn nothing_published_leaves_nothing_behind() {
    let lab = dual();
    let host = &lab["h1"];
    for kind in KINDS {
        let name = if kind.contains(&"l3") {
            "routed"
        } else if kind.contains(&"l2") {
            "switched"
        } else {
            "local"
        };
        make(&lab, name, kind, 30 + u8::try_from(name.len()).unwrap());
        serve(host, name, name, &["8080:80", "192.168.77.1:8081:80"]);
        wait_clean(lab.hosts(), SOON).unwrap();
        assert_says(
            &host.exec_ok(["nft", "list", "table", "inet", "ovl-publish"]).unwrap(),
            &["8080", "8081"],
        );
        host.ctl_ok(&["detach", name]).unwrap();
        wait_clean(lab.hosts(), SOON).unwrap();
        let left = host.exec(["nft", "list", "table", "inet", "ovl-publish"]).unwrap().stdout;
        assert!(!left.contains("808"), "{left}");
        let bridge = text(&host.ctl_json(&["network", "inspect", name]).unwrap()["bridge"]);
        if !bridge.is_empty() {
            let path = format!("net.ipv4.conf.{bridge}.route_localnet");
            assert_eq!(host.exec_ok(["sysctl", "-n", &path]).unwrap().trim(), "0", "{name}");
        }
    }
}

#[test]
fn the_hosts_own_localhost_stays_its_own() {
    let lab = dual();
    let host = &lab["h1"];
    let bridge = make_bridge(host, "blue", &["--subnet", "10.1.0.0/24"]).unwrap();
    let (web, _server) = serve(host, "web", "blue", &["8080:80"]);
    let path = format!("net.ipv4.conf.{bridge}.route_localnet");
    assert_eq!(host.exec_ok(["sysctl", "-n", &path]).unwrap().trim(), "1");
    // A workload that does all it can to reach what listens there.
    let listener = host.run(|| UdpSocket::bind("127.0.0.1:5000")).unwrap().unwrap();
    for line in [
        "sysctl -qw net.ipv4.conf.all.route_localnet=1",
        "ip addr del 127.0.0.1/8 dev lo",
        "ip route add 127.0.0.0/8 via 10.1.0.1",
    ] {
        web.workload.exec_ok(line.split(' ')).unwrap();
    }
    let dropped = || -> Result<bool> {
        let listed = host.exec_ok(["nft", "list", "chain", "inet", "ovl-publish", "guard"])?;
        Ok(listed.contains("127.0.0.0/8 counter") && !listed.contains("packets 0 bytes 0"))
    };
    let sender = web.workload.run(|| UdpSocket::bind("10.1.0.2:0")).unwrap().unwrap();
    wait_until(SOON, "a packet to be dropped", || {
        sender.send_to(b"let me in", "127.0.0.1:5000")?;
        ensure!(dropped()?, "none");
        Ok(())
    })
    .unwrap();
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.recv_from(&mut [0; 16]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn the_cluster_sees_what_is_published_and_other_hosts_are_not_concerned() {
    let lab = started(2).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    ovl_tests::make_network(&lab, "blue", &["--subnet", "10.1.0.0/16"]).unwrap();
    let (_a, _one) = serve(h1, "a", "blue", &["8080:80"]);
    let (b, _two) = serve(h2, "b", "blue", &["8080:80"]);
    wait_until(SOON, "the other's ports", || {
        let rows = rows(h2, &["endpoints"])?;
        let a = rows.iter().find(|row| row["name"] == "a");
        ensure!(a.is_some_and(|a| a["publish"][0]["host"] == 8080), "{rows:?}");
        Ok(())
    })
    .unwrap();
    // From an endpoint of one host to the port of the other, and from the hosts themselves.
    assert_eq!(asked(&b.workload, at("192.168.77.1", 8080)).unwrap().to_string(), "192.168.77.2");
    assert_eq!(asked(h2, at("192.168.77.1", 8080)).unwrap().to_string(), "192.168.77.2");
    assert_eq!(asked(h1, at("192.168.77.2", 8080)).unwrap().to_string(), "192.168.77.1");
    wait_clean(lab.hosts(), SOON).unwrap();
}
