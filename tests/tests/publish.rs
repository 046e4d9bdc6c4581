//! Published ports, which behave as Docker's do.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Netns, Spawned, Underlay, uninterrupted, wait_until};
use ovl_tests::frames::{FrameSocket, ipv4, mac, tagged};
use ovl_tests::ports::{create_bridge_network, outsider, seen_client, seen_client_udp, start_address_server};
use ovl_tests::resolver::dig;
use ovl_tests::routed::wait_routed;
use ovl_tests::{
    Attached, Capture, SOON, assert_contains, attach, ctl_error, endpoints, problems, rows,
    set_bridge_nf_call, start_lab, start_lab_with, strings, text, wait_clean, wait_problem,
};
use serde_json::json;

const OUTSIDE: [&str; 2] = ["192.168.77.250", "fd77::fa"];

/// Kinds of networks that ports are published on.
const KINDS: [&[&str]; 3] = [&["--driver", "bridge"], &["--mode", "l2"], &["--mode", "l3"]];

fn dual() -> Lab {
    start_lab_with(LabConfig::hosts(1).underlay(Underlay::Dual)).unwrap()
}

fn at(address: impl ToString, port: u16) -> SocketAddr {
    SocketAddr::new(address.to_string().parse().unwrap(), port)
}

/// Creates a dual-stack network on `h1`.
fn create(lab: &Lab, name: &str, kind: &[&str], number: u8) {
    let (v4, v6) = (format!("10.{number}.0.0/16"), format!("fd{number:02}::/48"));
    let args = [&["network", "create", name, "--subnet", &v4, "--subnet", &v6], kind].concat();
    lab["h1"].ctl_ok(&args).unwrap();
    if kind.contains(&"l3") {
        wait_routed(lab, name).unwrap();
    }
}

/// Attaches an endpoint with a server on port 80 and these published ports.
fn serve(host: &Host, name: &str, network: &str, publish: &[&str]) -> (Attached, Spawned) {
    let more: Vec<&str> = publish.iter().flat_map(|publish| ["--publish", publish]).collect();
    let endpoint = attach(host, name, network, &more).unwrap();
    let server = start_address_server(&endpoint.workload, 80).unwrap();
    (endpoint, server)
}

/// Client address that the server sees, which must be the same over TCP and UDP.
fn client_address(from: &Netns, to: SocketAddr) -> Result<IpAddr> {
    let seen = seen_client(from, to)?;
    ensure!(seen_client_udp(from, to)? == seen, "the address over UDP differs from {seen}");
    Ok(seen)
}

fn publish_error(host: &Host, name: &str, network: &str, publish: &[&str]) -> String {
    let workload = host.find_workload(name).or_else(|_| host.workload(name)).unwrap();
    let more = publish.iter().flat_map(|publish| ["--publish", publish]);
    let args: Vec<&str> = ["attach", name, "--network", network, "--netns", workload.path_str()]
        .into_iter()
        .chain(more)
        .collect();
    ctl_error(host, &args).unwrap()
}

/// Waits until a program on the host can bind port 8080.
fn wait_free(host: &Host) {
    let free = || -> Result<()> {
        host.run(|| TcpListener::bind("0.0.0.0:8080"))??;
        Ok(())
    };
    wait_until(SOON, "port 8080 to be free", free).unwrap();
}

#[test]
fn published_port_is_reachable_from_outside_and_at_any_address_of_the_host() {
    for kind in KINDS {
        let lab = dual();
        let host = &lab["h1"];
        let outside = outsider(&lab).unwrap();
        create(&lab, "blue", kind, 30);
        let (web, _server) = serve(host, "web", "blue", &["8080:80", "8080:80/udp"]);
        for (address, client) in host.addresses().iter().zip(OUTSIDE) {
            // The container sees the client's own address.
            assert_eq!(client_address(&outside, at(address, 8080)).unwrap().to_string(), client, "{kind:?}");
        }
        // At every address of the host, including the gateways.
        let gateways = strings(&host.ctl_json(&["network", "inspect", "blue"]).unwrap()["gateways"]);
        let own = host.addresses().into_iter().map(|address| address.to_string());
        for address in own.chain(gateways) {
            client_address(host, at(&address, 8080))
                .unwrap_or_else(|error| panic!("{kind:?} {address}: {error}"));
        }
        // At localhost, of both families.
        for address in ["127.0.0.1", "::1"] {
            client_address(host, at(address, 8080))
                .unwrap_or_else(|error| panic!("{kind:?} {address}: {error}"));
        }
        assert_eq!(web.json["publish"].as_array().unwrap().len(), 2, "{}", web.json);
        wait_clean(lab.hosts(), SOON).unwrap();
    }
}

#[test]
fn published_port_at_localhost_is_reachable_from_another_address_of_the_host() {
    let lab = dual();
    let host = &lab["h1"];
    create(&lab, "blue", &["--mode", "l3"], 30);
    let (_web, _server) = serve(host, "web", "blue", &["[::1]:8080:80", "8081:80"]);
    // The kernel chooses ::1, unless the program binds another address.
    let own = host.addresses().into_iter().find_map(|address| match address {
        IpAddr::V6(address) => Some(address),
        IpAddr::V4(_) => None,
    });
    for port in [8080, 8081] {
        let said = host.run(|| said_to(own.unwrap(), SocketAddrV6::new(Ipv6Addr::LOCALHOST, port, 0, 0)));
        let said = said.unwrap().unwrap_or_else(|error| panic!("{port}: {error:#}"));
        assert!(said.parse::<IpAddr>().is_ok(), "{port}: {said}");
    }
    wait_clean(lab.hosts(), SOON).unwrap();
}

/// Connects from an address, and returns what the server says.
fn said_to(from: Ipv6Addr, to: SocketAddrV6) -> Result<String> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn6, bind, connect, socket};
    let fd = socket(AddressFamily::Inet6, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(fd.as_raw_fd(), &SockaddrIn6::from(SocketAddrV6::new(from, 0, 0, 0)))?;
    connect(fd.as_raw_fd(), &SockaddrIn6::from(to))?;
    let mut stream = TcpStream::from(fd);
    stream.set_read_timeout(Some(SOON))?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    Ok(said)
}

#[test]
fn published_ports_work_on_encrypted_networks() {
    for mode in ["l2", "l3"] {
        let lab = dual();
        let host = &lab["h1"];
        let outside = outsider(&lab).unwrap();
        create(&lab, "blue", &["--mode", mode, "--encrypted"], 30);
        let (_web, _server) = serve(host, "web", "blue", &["8080:80", "8080:80/udp"]);
        let neighbour = attach(host, "neighbour", "blue", &[]).unwrap();
        for (address, client) in host.addresses().iter().zip(OUTSIDE) {
            let seen =
                client_address(&outside, at(address, 8080)).unwrap_or_else(|error| panic!("{mode}: {error}"));
            assert_eq!(seen.to_string(), client, "{mode}");
            client_address(&neighbour.workload, at(address, 8080))
                .unwrap_or_else(|error| panic!("{mode}: {error}"));
        }
        for address in ["127.0.0.1", "::1"] {
            client_address(host, at(address, 8080))
                .unwrap_or_else(|error| panic!("{mode} {address}: {error}"));
        }
        wait_clean(lab.hosts(), SOON).unwrap();
    }
}

#[test]
fn published_port_is_reachable_from_a_container_on_the_same_host() {
    check_from_a_container(false);
}

/// With the setting that Docker enables, under which iptables sees bridged frames.
#[test]
fn published_port_is_reachable_from_a_container_where_bridges_call_iptables() {
    check_from_a_container(true);
}

fn check_from_a_container(nf_call: bool) {
    for kind in KINDS {
        let lab = dual();
        let host = &lab["h1"];
        set_bridge_nf_call(host, nf_call).unwrap();
        create(&lab, "blue", kind, 30);
        create(&lab, "red", &[], 31);
        let (web, _server) = serve(host, "web", "blue", &["8080:80", "8080:80/udp"]);
        let neighbour = attach(host, "neighbour", "blue", &[]).unwrap();
        let unrelated = attach(host, "unrelated", "red", &[]).unwrap();
        for (family, address) in host.addresses().into_iter().enumerate() {
            let to = at(address, 8080);
            let seen = |from: &Attached| {
                let what = || format!("{kind:?} {} {to}", from.name);
                client_address(&from.workload, to).with_context(what).unwrap()
            };
            // A container of another network is isolated, but reaches published ports as any other client does.
            assert_eq!(seen(&unrelated).to_string(), unrelated.addresses()[family]);
            // On a bridge the reply must come back through the host, which takes source NAT (hairpin).
            let routed = kind.contains(&"l3");
            assert_eq!(seen(&neighbour).to_string() == neighbour.addresses()[family], routed, "{kind:?}");
            seen(&web);
        }
        if !kind.contains(&"l3") {
            assert_broadcasts_are_not_reflected(&web, &neighbour);
        }
        wait_clean(lab.hosts(), SOON).unwrap();
    }
}

/// Checks that broadcasts of an endpoint with published ports are not reflected to it.
fn assert_broadcasts_are_not_reflected(web: &Attached, neighbour: &Attached) {
    const TEXT: &str = "broadcast from web";
    const TIMES: u64 = 5;
    const MARKER: &str = "broadcast from neighbour";
    let captures = [web, neighbour].map(|each| Capture::start(&each.workload, &[TEXT, MARKER]).unwrap());
    let broadcast = |from: &Attached, text: &str, times: u64| {
        let send = || -> Result<()> {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.set_broadcast(true)?;
            (0..times).try_for_each(|_| socket.send_to(text.as_bytes(), "10.30.255.255:9").map(drop))?;
            Ok(())
        };
        from.workload.run(send).unwrap().unwrap();
    };
    broadcast(web, TEXT, TIMES);
    // The capture at the sender has each frame once, as it is sent.
    wait_until(SOON, "the broadcasts", || captures.iter().all(|each| each.count(TEXT) >= TIMES)).unwrap();
    // A reflected frame would pass the bridge before this marker.
    broadcast(neighbour, MARKER, 1);
    wait_until(SOON, "the marker", || captures.iter().all(|each| each.count(MARKER) > 0)).unwrap();
    assert_eq!(captures.map(|each| each.finish().unwrap().count(TEXT)), [TIMES, TIMES]);
}

#[test]
fn port_in_use_is_refused_with_its_holder() {
    let lab = dual();
    let host = &lab["h1"];
    create_bridge_network(host, "blue", &["--subnet", "10.1.0.0/24", "--subnet", "fd01::/64"]).unwrap();
    let (web, _server) = serve(host, "web", "blue", &["8080:80", "192.168.77.1:9000:80", "[::1]:9001:80"]);
    let name = "taken";
    assert_contains(
        &publish_error(host, name, "blue", &["8080:80"]),
        &["8080/tcp is published for endpoint web on network blue"],
    );
    assert_contains(
        &publish_error(host, name, "blue", &["8070-8090:8070-8090"]),
        &["8080/tcp", "endpoint web"],
    );
    assert_contains(&publish_error(host, name, "blue", &["9000:80"]), &["9000/tcp", "endpoint web"]);
    assert_contains(&publish_error(host, name, "blue", &["0.0.0.0:9000:80"]), &["9000/tcp", "endpoint web"]);
    assert_contains(&publish_error(host, name, "blue", &["7:1", "7:2"]), &["7/tcp is asked for twice"]);
    assert_contains(
        &publish_error(host, name, "blue", &["192.0.2.7:7:7"]),
        &["192.0.2.7 is not an address of this host"],
    );
    // A program on the host uses the port, on one address or on all.
    let listener = host.run(|| TcpListener::bind("127.0.0.1:7000")).unwrap().unwrap();
    let socket = host.run(|| UdpSocket::bind("0.0.0.0:7001")).unwrap().unwrap();
    let holder = format!("(process {})", std::process::id());
    assert_contains(
        &publish_error(host, name, "blue", &["7000:80"]),
        &["7000/tcp is in use on this host by", &holder],
    );
    assert_contains(
        &publish_error(host, name, "blue", &["7001:80/udp"]),
        &["7001/udp is in use on this host by", &holder],
    );
    assert_eq!(endpoints(host).unwrap(), ["web on h1 is ready"]);
    // The refused attaches left nothing behind.
    assert_eq!(rows(host, &["endpoints"]).unwrap()[0]["publish"], web.json["publish"]);
    drop(listener);
    drop(socket);
    // Other protocols and other addresses do not conflict, and the released ports are free.
    let more = ["8080:80/udp", "192.168.77.1:9001:80", "[fd77::1]:9000:80", "7000:80", "7001:80/udp"];
    let (other, _server) = serve(host, "other", "blue", &more);
    assert_eq!(other.json["publish"].as_array().unwrap().len(), more.len());
    // Conversely, no program on the host can bind a published port.
    for port in [8080, 7000] {
        let error = host.run(move || TcpListener::bind(("0.0.0.0", port))).unwrap().unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    }
    assert!(host.run(|| UdpSocket::bind("0.0.0.0:7001")).unwrap().is_err());
    // A detach frees the port.
    host.ctl_ok(&["detach", "web"]).unwrap();
    wait_free(host);
    serve(host, "again", "blue", &["8080:80"]);
    wait_clean(lab.hosts(), SOON).unwrap();
}

/// Answers each datagram to port 80 with this word, until the process exits.
fn answer(at: &Attached, word: &'static str) {
    let socket = at.workload.run(|| UdpSocket::bind("[::]:80")).unwrap().unwrap();
    thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            socket.send_to(word.as_bytes(), from).ok();
        }
    });
}

/// A UDP flow from one source port.
struct UdpFlow(UdpSocket);

impl UdpFlow {
    fn open(from: &Netns, to: SocketAddr) -> Self {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let connect = || -> Result<UdpSocket> {
            let socket = UdpSocket::bind(any)?;
            socket.connect(to)?;
            socket.set_read_timeout(Some(Duration::from_millis(300)))?;
            Ok(socket)
        };
        Self(from.run(connect).unwrap().unwrap())
    }

    fn ask(&self) -> Result<String> {
        let mut buffer = [0; 64];
        self.0.send(b"?")?;
        let length = uninterrupted(|| self.0.recv(&mut buffer))?;
        Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
    }

    fn wait_for(&self, word: &str) {
        wait_until(SOON, &format!("an answer from {word}"), || {
            let answer = self.ask()?;
            ensure!(answer == word, "{answer} answers");
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn udp_flows_follow_a_port_to_its_new_endpoint() {
    for kind in KINDS {
        let lab = dual();
        let host = &lab["h1"];
        let outside = outsider(&lab).unwrap();
        create(&lab, "blue", kind, 30);
        // These flows stay open all the time.
        let flows: Vec<UdpFlow> = host
            .addresses()
            .into_iter()
            .flat_map(|address| [(&outside, address), (&**host, address)])
            .map(|(from, address)| UdpFlow::open(from, at(address, 8080)))
            .collect();
        // The port is not published yet, so connection tracking has entries of these flows that lead to the host
        // itself.
        // Without an ICMP error, the absence of an answer can only be observed for the read timeout.
        flows.iter().for_each(|flow| drop(flow.ask().unwrap_err()));
        for word in ["first", "second"] {
            let endpoint = attach(host, word, "blue", &["--publish", "8080:80/udp"]).unwrap();
            answer(&endpoint, word);
            flows.iter().for_each(|flow| flow.wait_for(word));
            host.ctl_ok(&["detach", word]).unwrap();
            flows.iter().for_each(|flow| drop(flow.ask().unwrap_err()));
        }
        wait_clean(lab.hosts(), SOON).unwrap();
    }
}

#[test]
fn port_ranges_and_automatic_ports() {
    let lab = dual();
    let host = &lab["h1"];
    let outside = outsider(&lab).unwrap();
    create_bridge_network(host, "blue", &["--subnet", "10.1.0.0/24", "--subnet", "fd01::/64"]).unwrap();
    let a = attach(host, "a", "blue", &["--publish", "8000-8009:80-89", "--publish", "80"]).unwrap();
    assert_eq!(
        a.json["publish"][0],
        json!({ "transport": "tcp", "address": null, "host": 8000, "container": 80, "count": 10 })
    );
    let servers: Vec<Spawned> =
        (80..90).map(|port| start_address_server(&a.workload, port).unwrap()).collect();
    for port in 8000..8010 {
        assert_eq!(seen_client(&outside, at("192.168.77.1", port)).unwrap().to_string(), OUTSIDE[0]);
    }
    assert!(seen_client(&outside, at("192.168.77.1", 8010)).is_err());
    let free = a.json["publish"][1]["host"].as_u64().unwrap() as u16;
    assert!((32768..61000).contains(&free), "{free}");
    assert_eq!(seen_client(&outside, at("fd77::1", free)).unwrap().to_string(), OUTSIDE[1]);
    drop(servers);
    // One port of the endpoint on any port of a range: the first free one.
    let b = attach(host, "b", "blue", &["--publish", "8005-8012:80"]).unwrap();
    assert_eq!(b.json["publish"][0]["host"], 8010);
    assert_contains(
        &publish_error(host, "c", "blue", &["8000-8003:80"]),
        &["none of the ports 8000-8003/tcp is free"],
    );
    let table = host.ctl_ok(&["endpoints", "-o", "wide"]).unwrap();
    assert_contains(&table, &["PUBLISH", "8000-8009:80-89/tcp", "8010:80/tcp"]);
}

#[test]
fn sandboxes_can_publish_ports_on_networks_that_allow_it() {
    let lab = dual();
    let host = &lab["h1"];
    let outside = outsider(&lab).unwrap();
    create_bridge_network(host, "shut", &["--internal"]).unwrap();
    create_bridge_network(host, "open", &["--subnet", "10.1.0.0/24"]).unwrap();
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
    let error =
        |args: &[String]| ctl_error(host, &args.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    assert_contains(&error(&create(&["host"], "8080:80")), &["no port is published", "host"]);
    assert_contains(&error(&create(&[], "8080:80")), &["no port is published"]);
    assert_contains(&error(&create(&["shut"], "8080:80")), &["network shut is internal"]);
    assert_contains(
        &error(&create(&["open"], "[::1]:8080:80")),
        &["network open has no addresses of ::1's family"],
    );
    let args = create(&["shut", "open"], "8080:80");
    host.ctl_ok(&args.iter().map(String::as_str).collect::<Vec<_>>()).unwrap();
    let _server = start_address_server(&sandbox, 80).unwrap();
    assert_eq!(seen_client(&outside, at("192.168.77.1", 8080)).unwrap().to_string(), OUTSIDE[0]);
    // An endpoint without IPv6 is still reachable at localhost of both families.
    for address in ["127.0.0.1", "::1"] {
        seen_client(host, at(address, 8080)).unwrap();
    }
    host.ctl_ok(&["sandbox", "rm", &name, "--force"]).unwrap();
    wait_free(host);
}

#[test]
fn published_ports_survive_the_daemon_and_are_bound_again() {
    let lab = dual();
    let host = &lab["h1"];
    let outside = outsider(&lab).unwrap();
    create_bridge_network(host, "blue", &["--subnet", "10.1.0.0/24", "--subnet", "fd01::/64"]).unwrap();
    let (_web, _server) = serve(host, "web", "blue", &["8080:80", "8080:80/udp", "8090:80"]);
    host.kill9().unwrap();
    for address in host.addresses() {
        client_address(&outside, at(address, 8080)).unwrap();
    }
    client_address(host, at("127.0.0.1", 8080)).unwrap();
    // Another program binds one of the ports meanwhile.
    let other = host.run(|| TcpListener::bind("0.0.0.0:8090")).unwrap().unwrap();
    host.start().unwrap();
    host.wait_ready(SOON).ok();
    wait_problem(host, &["endpoint web has published 8090:80/tcp", "in use on this host by"], SOON).unwrap();
    client_address(host, at("::1", 8080)).unwrap();
    assert!(host.run(|| TcpListener::bind("0.0.0.0:8080")).unwrap().is_err());
    drop(other);
    wait_until(SOON, "no problem", || {
        ensure!(problems(host)?.is_empty(), "{:?}", problems(host)?);
        Ok(())
    })
    .unwrap();
    client_address(&outside, at("192.168.77.1", 8080)).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn detach_leaves_nothing_of_published_ports() {
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
        create(&lab, name, kind, 30 + u8::try_from(name.len()).unwrap());
        serve(host, name, name, &["8080:80", "192.168.77.1:8081:80"]);
        wait_clean(lab.hosts(), SOON).unwrap();
        assert_contains(
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

/// Sends from an endpoint to 127.0.0.0/8 of its host, and then to the host's own address. Only the latter may arrive.
fn assert_localhost_closed(host: &Host, listener: &UdpSocket, from: &Attached, stage: &str) {
    let routes = from.workload.ip_json(&["-4", "route", "show", "default"]).unwrap();
    let gateway = routes[0]["gateway"].as_str().unwrap();
    from.workload.exec_ok(["ping", "-c1", "-W2", gateway]).unwrap();
    let neighbours = from.workload.ip_json(&["neigh", "show", gateway]).unwrap();
    let macs = (mac(neighbours[0]["lladdr"].as_str().unwrap()), mac(from.json["mac"].as_str().unwrap()));
    let own: Ipv4Addr = from.addresses()[0].parse().unwrap();
    let frame = |to: Ipv4Addr, text: &str| ipv4(macs, (own, to), (5001, 5000), text);
    let socket = FrameSocket::open(&from.workload, "eth0").unwrap();
    let attack = frame(Ipv4Addr::LOCALHOST, "let me in");
    for sent in [&attack, &tagged(&attack, 1), &frame(Ipv4Addr::new(127, 8, 9, 10), "let me in")] {
        socket.send(sent).unwrap();
    }
    // It travels behind the others.
    let control = format!("from {}, {stage}", from.name);
    socket.send(&frame(host.address().unwrap().to_string().parse().unwrap(), &control)).unwrap();
    let mut buffer = [0; 64];
    let read = uninterrupted(|| listener.recv(&mut buffer)).unwrap();
    assert_eq!(String::from_utf8_lossy(&buffer[..read]), control);
}

#[test]
fn workloads_cannot_reach_the_hosts_localhost() {
    let lab = dual();
    let host = &lab["h1"];
    for (number, kind) in KINDS.iter().enumerate() {
        create(&lab, &format!("net{number}"), kind, 60 + u8::try_from(number).unwrap());
    }
    let publish = |number: usize| format!("{}:80", 8080 + number);
    let served: Vec<_> = (0..KINDS.len())
        .map(|number| serve(host, &format!("w{number}"), &format!("net{number}"), &[&publish(number)]))
        .collect();
    wait_clean(lab.hosts(), SOON).unwrap();
    // Where bridges call the packet filter, answers are translated before they enter by the bridge.
    for nf_call in [true, false] {
        set_bridge_nf_call(host, nf_call).unwrap();
        for (number, (web, _)) in served.iter().enumerate() {
            seen_client(host, at("127.0.0.1", 8080 + u16::try_from(number).unwrap())).unwrap();
            // The resolver of the host is not 127.0.0.1.
            assert_eq!(dig(&web.workload, "127.0.0.11", &[&web.name]).unwrap(), [web.addresses()[0].clone()]);
        }
    }
    let listener = host.run(|| UdpSocket::bind("0.0.0.0:5000")).unwrap().unwrap();
    listener.set_read_timeout(Some(SOON)).unwrap();
    let assert_closed = |stage: &str| {
        for (endpoint, _) in &served {
            assert_localhost_closed(host, &listener, endpoint, stage);
        }
    };
    assert_closed("with everything in place");
    host.kill9().unwrap();
    host.exec_ok(["nft", "flush", "ruleset"]).unwrap();
    assert_closed("without packet filter and daemon");

    host.start().unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    let bridge = text(&host.ctl_json(&["network", "inspect", "net0"]).unwrap()["bridge"]);
    host.exec_ok(["tc", "qdisc", "del", "dev", &bridge, "clsact"]).unwrap();
    assert_contains(&host.ctl(&["verify"]).unwrap().stdout, &["route_localnet"]);
    host.kill9().unwrap();
    host.start().unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    assert_closed("after the filter was deleted and restored");
}

#[test]
fn published_ports_are_listed_on_all_hosts_and_local_to_their_host() {
    let lab = start_lab(2).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    ovl_tests::create_network(&lab, "blue", &["--subnet", "10.1.0.0/16"]).unwrap();
    let (_a, _one) = serve(h1, "a", "blue", &["8080:80"]);
    let (b, _two) = serve(h2, "b", "blue", &["8080:80"]);
    wait_until(SOON, "h2 to list the ports of the remote endpoint", || {
        let rows = rows(h2, &["endpoints"])?;
        let a = rows.iter().find(|row| row["name"] == "a");
        ensure!(a.is_some_and(|a| a["publish"][0]["host"] == 8080), "{rows:?}");
        Ok(())
    })
    .unwrap();
    // From an endpoint on one host to a port of the other host, and between the hosts themselves.
    assert_eq!(seen_client(&b.workload, at("192.168.77.1", 8080)).unwrap().to_string(), "192.168.77.2");
    assert_eq!(seen_client(h2, at("192.168.77.1", 8080)).unwrap().to_string(), "192.168.77.2");
    assert_eq!(seen_client(h1, at("192.168.77.2", 8080)).unwrap().to_string(), "192.168.77.1");
    wait_clean(lab.hosts(), SOON).unwrap();
}

/// Resident memory of a host's daemon, in MiB.
fn resident(host: &Host) -> Result<u64> {
    let pid = host.pid().context("the daemon does not run")?;
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: u64 = line.split_whitespace().next().context("no number")?.parse()?;
    Ok(kib >> 10)
}

#[test]
fn memory_of_many_ports_is_given_back_when_they_go() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    create_bridge_network(host, "br", &["--subnet", "10.5.0.0/16"]).unwrap();
    let workload = host.workload("t").unwrap();
    let before = resident(host).unwrap();
    for _ in 0..3 {
        let ports = "49152-65535:49152-65535/udp";
        let args = ["attach", "t", "--network", "br", "--netns", workload.path_str(), "--publish", ports];
        host.ctl_ok(&args).unwrap();
        host.ctl_ok(&["detach", "t"]).unwrap();
    }
    wait_until(Duration::from_secs(20), "the memory to be given back", || {
        let now = resident(host)?;
        ensure!(now <= before + 40, "{before} MiB before, {now} MiB now");
        Ok(())
    })
    .unwrap();
}

#[test]
fn published_port_is_refused_at_once_at_link_local_addresses() {
    for (number, kind) in KINDS.iter().enumerate() {
        let lab = dual();
        let host = &lab["h1"];
        create(&lab, "net", kind, 70 + u8::try_from(number).unwrap());
        // In upper case as Kubernetes writes it.
        let (_web, _server) = serve(host, "web", "net", &["8005:80/TCP", "8006:80/UDP"]);
        let outside = outsider(&lab).unwrap();
        let link = host.exec_ok(["ip", "-6", "-o", "addr", "show", "dev", "eth0", "scope", "link"]).unwrap();
        let link_local = link.split_whitespace().find(|word| word.starts_with("fe80::")).unwrap();
        let address: std::net::Ipv6Addr = link_local.split('/').next().unwrap().parse().unwrap();
        for (from, device) in [(&outside, "br0"), (&**host, "eth0")] {
            let found = from.run(move || {
                let device = nix::net::if_::if_nametoindex(device)?;
                let to = std::net::SocketAddrV6::new(address, 8005, 0, device);
                let error = std::net::TcpStream::connect_timeout(&to.into(), SOON)
                    .and_then(|mut stream| std::io::Read::read(&mut stream, &mut [0]).map(drop))
                    .err();
                anyhow::Ok(error.map(|error| error.kind()))
            });
            let kind = found.unwrap().unwrap();
            use std::io::ErrorKind::{ConnectionRefused, ConnectionReset};
            assert!(matches!(kind, Some(ConnectionRefused | ConnectionReset)), "{kind:?}");
        }
        // The other addresses are served.
        for address in host.addresses() {
            seen_client(&outside, at(address, 8005)).unwrap();
        }
    }
}
