//! `ovlctl capture` and `ovlctl trace --follow`: real packets on all kinds of networks, in files that tshark reads.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, Signal, Spawned, wait_until};
use ovl_tests::policy::ONLY_API;
use ovl_tests::routed::create_routed_network;
use ovl_tests::service::{SHOP, apply};
use ovl_tests::{Attached, SOON, attach, create_network, ctl_error, start_lab, wait_clean};

const FLAT: &[&str] = &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/64"];
const BLOCKS: &[&str] = &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"];

/// A capture into a file.
struct Running {
    process: Spawned,
    file: PathBuf,
}

impl Running {
    /// Starts a capture into a file of its own, and waits until these hosts capture.
    fn start(lab: &Lab, on: &Host, args: &[&str], hosts: &[&str]) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let file = lab.dir().join(format!("captured-{}.pcapng", NEXT.fetch_add(1, Ordering::Relaxed)));
        let path = file.to_str().context("a path that is no text")?;
        let args = [&["capture"], args, &["-w", path]].concat();
        let process = on.ctl_spawn(&args)?;
        wait_until(SOON, "the capture to begin", || {
            let said = process.stderr();
            let began = |host: &&str| said.contains(&format!("{host}: began"));
            ensure!(hosts.iter().all(began), "{args:?}: {said}");
            Ok(())
        })?;
        Ok(Self { process, file })
    }

    /// Ends it as Ctrl-C does, and returns these fields of all packets, as tshark reads them.
    fn finish(mut self, fields: &[&str]) -> Result<Vec<Vec<String>>> {
        self.process.signal(Signal::SIGINT)?;
        let output = self.process.finish(SOON)?;
        ensure!(output.code() == Some(0), "{output:?}");
        tshark(&self.file, fields)
    }
}

/// Reads fields of a file, and checks that its packets are in the order of their times.
fn tshark(file: &Path, fields: &[&str]) -> Result<Vec<Vec<String>>> {
    let mut command = Command::new("tshark");
    // VXLAN in the tunnel has a port of its own.
    command.args(["-n", "-d", "udp.port==51942,vxlan", "-r"]).arg(file).args([
        "-T",
        "fields",
        "-E",
        "occurrence=l",
        "-e",
        "frame.time_delta",
    ]);
    for field in fields {
        command.args(["-e", field]);
    }
    let output = command.output().context("tshark")?;
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success() && !errors.contains("cut short"), "{errors}");
    let text = String::from_utf8(output.stdout)?;
    text.lines()
        .map(|line| {
            let mut found = line.split('\t').map(str::to_owned);
            let delta: f64 = found.next().unwrap_or_default().parse()?;
            ensure!(delta >= 0.0, "not in order: {text}");
            Ok(found.collect())
        })
        .collect()
}

/// A workload on each of two hosts, that reach each other.
fn pair(lab: &Lab, network: &str, names: [&str; 2]) -> [Attached; 2] {
    let [a, b] = [("h1", names[0]), ("h2", names[1])]
        .map(|(host, name)| attach(&lab[host], name, network, &[]).unwrap());
    for to in b.addresses() {
        a.workload.ping_until(&to, SOON).unwrap();
    }
    [a, b]
}

type Create = fn(&Lab) -> Result<()>;

/// Networks of all kinds.
const KINDS: [(&str, Create); 4] = [
    ("switched", |lab| create_network(lab, "net", FLAT)),
    ("routed", |lab| create_routed_network(lab, "net", BLOCKS)),
    ("switched, encrypted", |lab| create_network(lab, "net", &[FLAT, &["--encrypted"]].concat())),
    ("routed, encrypted", |lab| create_routed_network(lab, "net", &[BLOCKS, &["--encrypted"]].concat())),
];

/// Each packet is seen at each place of its way, on both hosts, in plain text, in the order of time; from any host.
#[test]
fn networks_and_pairs_are_captured_on_both_hosts() {
    for (kind, create) in KINDS {
        let lab = start_lab(2).unwrap();
        create(&lab).unwrap();
        let [a, b] = pair(&lab, "net", ["a", "b"]);
        let capture =
            Running::start(&lab, &lab["h2"], &["network:net", "icmp or icmp6"], &["h1", "h2"]).unwrap();
        let pair =
            Running::start(&lab, &lab["h1"], &["h1,h2", "icmp", "or", "icmp6"], &["h1", "h2"]).unwrap();
        for to in b.addresses() {
            a.workload.ping_until(&to, SOON).unwrap();
        }
        let found = capture
            .finish(&["frame.interface_name", "icmp.type", "icmpv6.type", "ip.src", "ipv6.src"])
            .unwrap();
        for (field, request, family) in [(1, "8", 0), (2, "128", 1)] {
            let source = &a.addresses()[family];
            let at: Vec<&str> = found
                .iter()
                .filter(|packet| packet[field] == request && &packet[3 + family] == source)
                .map(|packet| &*packet[0])
                .collect();
            assert!(at.contains(&"h1:default/a") && at.contains(&"h2:default/b"), "{kind}: {found:?}");
            assert_eq!(at[0], "h1:default/a", "{kind}: {found:?}");
            if !kind.contains("routed") {
                assert!(at.contains(&"h1:net") && at.contains(&"h2:net"), "{kind}: {found:?}");
            }
        }
        let found =
            pair.finish(&["frame.interface_name", "frame.protocols", "icmp.type", "icmpv6.type"]).unwrap();
        // Frames of switched networks do not pass the device of a tunnel that is in ovld itself.
        if kind == "switched, encrypted" {
            continue;
        }
        let place = if kind.contains("encrypted") { "tunnel" } else { "underlay" };
        for host in ["h1", "h2"] {
            let name = format!("{host}:{place}");
            for (field, request) in [(2, "8"), (3, "128")] {
                let is_found = found.iter().any(|packet| packet[0] == name && packet[field] == request);
                assert!(is_found, "{kind}: {name} {request}: {found:?}");
            }
        }
        // The filter holds for what is inside of VXLAN, and gossip is left out.
        assert!(found.iter().all(|packet| packet[1].contains("icmp")), "{kind}: {found:?}");
        wait_nothing_left(&lab);
    }
}

/// Waits until no socket and no table of a capture is left on any host.
fn wait_nothing_left(lab: &Lab) {
    for host in lab.hosts() {
        wait_until(SOON, "the tables and sockets of captures to be gone", || {
            let tables = host.exec_ok(["nft", "list", "tables"])?;
            ensure!(!tables.contains("ovl-trace"), "{}: {tables}", host.name());
            // Packets of all EtherTypes: path probes have one of their own.
            let sockets = host.exec_ok(["cat", "/proc/net/packet"])?;
            let all = sockets.lines().filter(|line| line.split_ascii_whitespace().nth(3) == Some("0003"));
            ensure!(all.count() == 0, "{}: {sockets}", host.name());
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn dropped_packets_say_why_and_services_are_captured() {
    for create in [KINDS[0].1, KINDS[1].1] {
        let lab = start_lab(2).unwrap();
        create(&lab).unwrap();
        let [h1, h2] = lab.hosts() else { unreachable!() };
        let web = attach(h2, "web", "net", &["--label", "app=web"]).unwrap();
        let _server = web.workload.tcp_echo(80).unwrap();
        let api = attach(h1, "api", "net", &["--label", "app=api"]).unwrap();
        let other = attach(h1, "other", "net", &[]).unwrap();
        for from in [&api, &other] {
            from.workload.ping_until(web.address(), SOON).unwrap();
        }
        apply(&lab, h1, ONLY_API).unwrap();
        apply(&lab, h1, SHOP).unwrap();
        wait_clean(lab.hosts(), SOON).unwrap();

        // The sender is on another host than the policy that drops its packets.
        for family in 0..2 {
            let to = &web.addresses()[family];
            let capture = Running::start(&lab, h1, &["endpoint:other", "tcp"], &["h1", "h2"]).unwrap();
            assert!(other.workload.tcp_roundtrip(to, 80, b"hello").is_err());
            let found = capture.finish(&["frame.interface_name", "frame.comment", "tcp.flags.syn"]).unwrap();
            let is_dropped = |packet: &Vec<String>| {
                packet[0] == "h1:default/other"
                    && packet[1].contains("dropped on h2 by network policy")
                    && packet[1].contains("default/only-api")
            };
            assert!(found.iter().any(is_dropped), "{to}: {found:?}");
        }

        // A connection to the Service, at both of its ends.
        let service = h1.ctl_json(&["get", "svc", "shop"]).unwrap();
        let address = service["spec"]["clusterIP"].as_str().unwrap().to_owned();
        let capture = Running::start(&lab, h2, &["service:shop"], &["h1", "h2"]).unwrap();
        wait_until(SOON, "the Service to answer", || {
            api.workload.tcp_roundtrip(&address, 8000, b"hello").map(drop)
        })
        .unwrap();
        let found =
            capture.finish(&["frame.interface_name", "ip.dst", "tcp.dstport", "frame.comment"]).unwrap();
        let has = |place: &str, to: &str, port: &str| {
            found.iter().any(|packet| packet[0] == place && packet[1] == to && packet[2] == port)
        };
        assert!(has("h1:default/api", &address, "8000"), "{found:?}");
        assert!(has("h2:default/web", &web.address(), "80"), "{found:?}");
        assert!(found.iter().all(|packet| packet[3].is_empty()), "{found:?}");
        wait_nothing_left(&lab);
    }
}

#[test]
fn packets_that_the_kernel_drops_say_its_reason() {
    for create in [KINDS[0].1, KINDS[1].1] {
        let lab = start_lab(2).unwrap();
        create(&lab).unwrap();
        let [h1, h2] = lab.hosts() else { unreachable!() };
        let web = attach(h2, "web", "net", &[]).unwrap();
        let client = attach(h1, "client", "net", &[]).unwrap();
        client.workload.ping_until(web.address(), SOON).unwrap();

        // No program of the workload has the one port, and a packet filter in its namespace drops what is for the other one.
        web.workload
            .exec_ok([
                "nft",
                "add table inet own; add chain inet own in { type filter hook input priority 0; }",
            ])
            .unwrap();
        web.workload.exec_ok(["nft", "add rule inet own in udp dport 998 drop"]).unwrap();
        for to in web.addresses() {
            let capture = Running::start(&lab, h1, &["endpoint:web", "udp"], &["h1", "h2"]).unwrap();
            for port in [999, 998] {
                assert!(client.workload.udp_roundtrip(&to, port, b"hello").is_err());
            }
            let found = capture.finish(&["frame.interface_name", "frame.comment", "udp.dstport"]).unwrap();
            let is_dropped = |packet: &Vec<String>| {
                packet[0] == "h2:default/web" && packet[1] == "dropped on h2 by the kernel: NO_SOCKET"
            };
            assert!(found.iter().any(is_dropped), "{to}: {found:?}");
            let is_filtered = |packet: &Vec<String>| {
                packet[1].starts_with("dropped on h2 by a packet filter") && packet[2] == "998"
            };
            assert!(found.iter().any(is_filtered), "{to}: {found:?}");
        }
        wait_nothing_left(&lab);
    }
}

#[test]
fn live_view_has_names_and_captures_are_bounded() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "net", FLAT).unwrap();
    let [h1, h2] = lab.hosts() else { unreachable!() };
    let [a, b] = pair(&lab, "net", ["a", "b"]);
    let _server = b.workload.tcp_echo(80).unwrap();

    // trace --follow sees both ends; it ends with Ctrl-C.
    let mut follow = h1.ctl_spawn(&["trace", "a", "b:80", "--follow"]).unwrap();
    wait_until(SOON, "the trace to begin", || {
        let said = follow.stderr();
        ensure!(said.contains("h1: began") && said.contains("h2: began"), "{said}");
        Ok(())
    })
    .unwrap();
    a.workload.tcp_roundtrip(b.address(), 80, b"hello").unwrap();
    a.workload.ping_until(b.address(), SOON).unwrap();
    wait_until(SOON, "packets in words", || {
        let shown = follow.stdout();
        for part in [
            "h1 default/a out default/a:",
            "h2 default/b in default/a:",
            " > default/b:80 tcp S seq",
            "vxlan:net",
        ] {
            ensure!(shown.contains(part), "{part:?} is not in {shown}");
        }
        ensure!(!shown.contains("icmp"), "{shown}");
        Ok(())
    })
    .unwrap();
    follow.signal(Signal::SIGINT).unwrap();
    assert_eq!(follow.finish(SOON).unwrap().code(), Some(0));

    // A number of packets, to standard output.
    let mut counted = h2.ctl_spawn(&["capture", "a", "-c", "3", "-n", "icmp6 or icmp"]).unwrap();
    wait_until(SOON, "three packets", || {
        a.workload.ping_until(b.address(), SOON)?;
        ensure!(!counted.is_running(), "{}", counted.stderr());
        Ok(())
    })
    .unwrap();
    let output = counted.finish(SOON).unwrap();
    assert_eq!((output.code(), output.stdout.lines().count()), (Some(0), 3), "{output:?}");
    assert!(output.stdout.contains(&a.address()), "{output:?}");

    // What cannot be captured is said.
    assert!(ctl_error(h1, &["capture", "a", "tcp porrt 80"]).unwrap().contains("syntax"));
    assert!(
        ctl_error(h1, &["capture", "absent"]).unwrap().contains("no endpoint, network or Service absent")
    );
    assert!(ctl_error(h1, &["capture", "h1,a"]).unwrap().contains("a is no host"));

    // The fifth is refused. All end with their clients, however those end.
    let mut all: Vec<Spawned> = (0..4).map(|_| h1.ctl_spawn(&["capture", "b"]).unwrap()).collect();
    for capture in &all {
        wait_until(SOON, "a capture to begin", || {
            let said = capture.stderr();
            ensure!(said.contains("h2: began") && said.contains("h1: began"), "{said}");
            Ok(())
        })
        .unwrap();
    }
    assert!(ctl_error(h1, &["capture", "a"]).unwrap().contains("too many captures"));
    for capture in &mut all {
        capture.signal(Signal::SIGKILL).unwrap();
    }
    wait_nothing_left(&lab);

    // A daemon that is killed leaves no sockets, and its successor no tables. The other host notices.
    let survivor = h1.ctl_spawn(&["capture", "b"]).unwrap();
    wait_until(SOON, "the capture to begin", || {
        ensure!(survivor.stderr().contains("h2: began"), "{}", survivor.stderr());
        Ok(())
    })
    .unwrap();
    h1.kill9().unwrap();
    h1.start().unwrap();
    wait_nothing_left(&lab);
}
