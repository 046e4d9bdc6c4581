//! Networks with `--encrypt auto`: in plain text where a pair of hosts has a path for that, through the tunnel where it has none.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Underlay, uninterrupted, wait_until};
use ovl_tests::routed::create_network_of_mode;
use ovl_tests::{
    Attached, Capture, Captured, Connection, Flow, SOON, attach, ctl_error, peer, ping_all_pairs,
    start_lab_with, strings, wait_clean,
};
use serde_json::Value;

/// Time in which traffic flows another way after a direct path is cut.
const TURNED: Duration = Duration::from_secs(2);
/// Texts on the networks of the same names.
const AUTO: &str = "the cat sat on the mat";
const SEALED: &str = "no fox may ever be seen";
const OPEN: &str = "any dog may read this";
/// Less than the number of frames with the text while [`echo`] sends it in plain text. TCP has few, because they are long.
const MANY: u64 = 20;
const TEXTS: [&str; 3] = [AUTO, SEALED, OPEN];

/// Hosts with three networks of one mode: one with `--encrypt auto`, one that is encrypted, and one in plain text.
struct World {
    lab: Lab,
    auto: Vec<Attached>,
    sealed: Vec<Attached>,
    open: Vec<Attached>,
}

impl World {
    fn new(config: LabConfig, mode: &str, more: &[&str]) -> Self {
        let lab = start_lab_with(config).unwrap();
        let create = |name, options: &[&str]| create_network_of_mode(&lab, mode, name, options).unwrap();
        let ranges = ["--subnet", "10.60.0.0/16", "--subnet", "fd60::/48", "--encrypt", "auto"];
        create("auto", &[&ranges, more].concat());
        create("sealed", &["--subnet", "10.61.0.0/16", "--encrypted"]);
        create("open", &["--subnet", "10.62.0.0/16", "--encrypt", "no"]);
        let on = |network: &str| attach_all(&lab, network);
        let (auto, sealed, open) = (on("auto"), on("sealed"), on("open"));
        Self { auto, sealed, open, lab }
    }

    /// Waits until the hosts agree that these pairs send through the tunnel, and no others.
    fn wait_sealed(&self, pairs: &[(&str, &str)]) {
        for host in self.lab.hosts() {
            let other = |(one, other): &(&str, &str)| match host.name() {
                name if name == *one => Some((*other).to_owned()),
                name if name == *other => Some((*one).to_owned()),
                _ => None,
            };
            let mut expected: Vec<String> = pairs.iter().filter_map(other).collect();
            expected.sort();
            wait_until(
                SOON,
                &format!("{} to seal what goes to {expected:?}", host.name()),
                || -> Result<()> {
                    let mut found = sealed_to(host)?;
                    found.sort();
                    ensure!(found == expected, "{found:?}");
                    Ok(())
                },
            )
            .unwrap();
        }
    }
}

fn attach_all(lab: &Lab, network: &str) -> Vec<Attached> {
    let hosts = lab.hosts().iter();
    hosts.map(|host| attach(host, &format!("{network}-{}", host.name()), network, &[]).unwrap()).collect()
}

/// The hosts to which a host sends through the tunnel on the network `auto`.
fn sealed_to(host: &Host) -> Result<Vec<String>> {
    Ok(strings(&host.ctl_json(&["network", "inspect", "auto"])?["sealed_to"]))
}

/// Echoes a text over UDP and TCP, both ways, and long enough for packets of the full size.
fn echo(one: &Attached, other: &Attached, text: &str) {
    for (from, to) in [(one, other), (other, one)] {
        for address in to.addresses() {
            let at = SocketAddr::new(address.parse().unwrap(), 0);
            let (tcp, udp) = (to.workload.tcp_echo_on(at).unwrap(), to.workload.udp_echo_on(at).unwrap());
            let what = format!("from {} to {} at {address}", from.name, to.name);
            from.workload.ping_until(&address, SOON).context(what.clone()).unwrap();
            let long = text.repeat(4000);
            let back = from.workload.tcp_roundtrip(&address, tcp.port(), long.as_bytes());
            assert!(back.context(what.clone()).unwrap() == long.as_bytes(), "TCP {what}");
            for times in [1, 200] {
                let sent = text.repeat(times);
                let back = from.workload.udp_roundtrip(&address, udp.port(), sent.as_bytes());
                assert!(back.context(what.clone()).unwrap() == sent.as_bytes(), "UDP {what}");
            }
        }
    }
}

/// What the switch between the hosts sees of the texts meanwhile.
fn seen(lab: &Lab, work: impl FnOnce()) -> Captured {
    let capture = Capture::start(&lab.switch(), &TEXTS).unwrap();
    work();
    capture.finish().unwrap()
}

/// Checks that a broadcast datagram of the first endpoint arrives once at each other one.
fn ensure_broadcast_arrives_once(all: &[Attached]) {
    const PORT: u16 = 5001;
    let (first, others) = all.split_first().unwrap();
    let open = |at: &Attached| at.workload.run(|| UdpSocket::bind(("0.0.0.0", PORT))).unwrap().unwrap();
    let (sender, receivers) = (open(first), others.iter().map(open).collect::<Vec<_>>());
    sender.set_broadcast(true).unwrap();
    for text in ["first", "last"] {
        sender.send_to(text.as_bytes(), ("10.60.255.255", PORT)).unwrap();
    }
    for receiver in &receivers {
        receiver.set_read_timeout(Some(SOON)).unwrap();
        // A copy of the first one comes before the last one, or right after it.
        for expected in ["first", "last"] {
            let mut text = [0; 16];
            let length = uninterrupted(|| receiver.recv(&mut text)).unwrap();
            assert_eq!(&text[..length], expected.as_bytes());
        }
        receiver.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        assert!(uninterrupted(|| receiver.recv(&mut [0; 16])).is_err(), "a copy arrived");
    }
}

fn cut_pair_is_sealed_and_healed_pair_is_plain_again(underlay: Underlay, mode: &str, more: &[&str]) {
    let world = World::new(LabConfig::hosts(3).underlay(underlay), mode, more);
    let World { lab, auto, sealed, open } = &world;
    for all in [auto, sealed, open] {
        ping_all_pairs(all, SOON).unwrap();
    }
    wait_clean(lab.hosts(), SOON).unwrap();
    world.wait_sealed(&[]);
    let direct = seen(lab, || {
        echo(&auto[0], &auto[1], AUTO);
        echo(&sealed[0], &sealed[1], SEALED);
        echo(&open[0], &open[1], OPEN);
    });
    assert!(direct.count(AUTO) > MANY && direct.count(OPEN) > MANY, "{direct:?}");
    assert_eq!(direct.count(SEALED), 0, "{direct:?}");

    let flow = Flow::start(&auto[0], &auto[1]).unwrap();
    let mut connections = [auto, sealed].map(|all| Connection::open(&all[0], &all[1], SOON).unwrap());
    let mut all_carry = || {
        for each in &mut connections {
            each.echo(300 * 1024).unwrap();
        }
    };
    all_carry();
    lab.cut(&[("h1", "h2")], false).unwrap();
    world.wait_sealed(&[("h1", "h2")]);
    let cut = seen(lab, || {
        all_carry();
        echo(&auto[0], &auto[1], AUTO);
        echo(&sealed[0], &sealed[1], SEALED);
    });
    assert_eq!((cut.count(AUTO), cut.count(SEALED)), (0, 0), "{cut:?}");
    let others = seen(lab, || {
        echo(&auto[0], &auto[2], AUTO);
        echo(&sealed[0], &sealed[2], SEALED);
        echo(&open[0], &open[2], OPEN);
    });
    assert!(others.count(AUTO) > MANY && others.count(OPEN) > MANY, "{others:?}");
    assert_eq!(others.count(SEALED), 0, "{others:?}");
    if mode == "l2" {
        ensure_broadcast_arrives_once(auto);
    }
    let gap = flow.finish().unwrap().longest_gap();
    println!("no replies for {gap:?} after the cut");
    assert!(gap < TURNED, "{gap:?}");
    wait_clean(lab.hosts(), SOON).unwrap();

    // What a killed daemon forgets, it learns again, and the kernel sends in plain text without it.
    let flow = Flow::start(&auto[0], &auto[2]).unwrap();
    lab["h1"].kill9().unwrap();
    lab["h1"].start().unwrap();
    lab["h1"].wait_ready(SOON).unwrap();
    world.wait_sealed(&[("h1", "h2")]);
    all_carry();
    flow.finish_without_loss().unwrap();

    let flow = Flow::start(&auto[0], &auto[1]).unwrap();
    lab.heal().unwrap();
    world.wait_sealed(&[]);
    all_carry();
    let healed = seen(lab, || {
        echo(&auto[0], &auto[1], AUTO);
        echo(&sealed[0], &sealed[1], SEALED);
        echo(&open[0], &open[1], OPEN);
    });
    assert!(healed.count(AUTO) > MANY && healed.count(OPEN) > MANY, "{healed:?}");
    assert_eq!(healed.count(SEALED), 0, "{healed:?}");
    if mode == "l2" {
        ensure_broadcast_arrives_once(auto);
    }
    let report = flow.finish().unwrap();
    assert!(report.lost.is_empty(), "nothing is lost on the way back: {:?}", report.lost);
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn pair_is_sealed_while_its_direct_path_is_cut() {
    cut_pair_is_sealed_and_healed_pair_is_plain_again(Underlay::V4, "l3", &[]);
}

#[test]
fn pair_is_sealed_while_its_direct_path_is_cut_over_an_ipv6_underlay() {
    cut_pair_is_sealed_and_healed_pair_is_plain_again(Underlay::V6, "l3", &[]);
}

#[test]
fn pair_with_direct_routes_is_sealed_while_its_direct_path_is_cut() {
    cut_pair_is_sealed_and_healed_pair_is_plain_again(Underlay::V4, "l3", &["--backend", "auto"]);
}

#[test]
fn pair_on_a_switched_network_is_sealed_while_its_direct_path_is_cut() {
    cut_pair_is_sealed_and_healed_pair_is_plain_again(Underlay::V4, "l2", &[]);
}

#[test]
fn pair_on_a_switched_network_is_sealed_while_its_direct_path_is_cut_over_an_ipv6_underlay() {
    cut_pair_is_sealed_and_healed_pair_is_plain_again(Underlay::V6, "l2", &[]);
}

fn sealed_across_nat_and_plain_elsewhere(mode: &str) {
    let config = LabConfig::hosts(4)
        .access("h2", "port-restricted".parse().unwrap())
        .access("h3", "symmetric".parse().unwrap());
    let world = World::new(config, mode, &[]);
    let World { lab, auto, open, .. } = &world;
    ping_all_pairs(auto, SOON).unwrap();
    world.wait_sealed(&[("h1", "h2"), ("h1", "h3"), ("h2", "h3"), ("h2", "h4"), ("h3", "h4")]);
    let across = seen(lab, || {
        for (one, other) in [(0, 1), (1, 2), (2, 3)] {
            echo(&auto[one], &auto[other], AUTO);
        }
    });
    assert!(across.frames() > 100, "{across:?}");
    assert_eq!(across.count(AUTO), 0, "{across:?}");
    let public = seen(lab, || {
        echo(&auto[0], &auto[3], AUTO);
        echo(&open[0], &open[3], OPEN);
    });
    assert!(public.count(AUTO) > MANY && public.count(OPEN) > MANY, "{public:?}");
    let problems = lab["h1"].ctl_json(&["status"]).unwrap()["problems"].to_string();
    assert!(
        problems.contains("network open on this host") && !problems.contains("network auto"),
        "{problems}"
    );

    let mut connection = Connection::open(&auto[0], &auto[1], SOON).unwrap();
    connection.echo(2000).unwrap();
    lab["h2"].renumber().unwrap();
    connection.echo(2000).unwrap();
    if mode == "l2" {
        ensure_broadcast_arrives_once(auto);
    }
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn what_crosses_nat_is_sealed_and_the_rest_is_plain() {
    sealed_across_nat_and_plain_elsewhere("l3");
}

#[test]
fn what_crosses_nat_on_a_switched_network_is_sealed_and_the_rest_is_plain() {
    sealed_across_nat_and_plain_elsewhere("l2");
}

fn over_tcp_while_udp_is_blocked(mode: &str) {
    let world = World::new(LabConfig::hosts(2), mode, &[]);
    let World { lab, auto, .. } = &world;
    ping_all_pairs(auto, SOON).unwrap();
    let mut connection = Connection::open(&auto[0], &auto[1], SOON).unwrap();
    connection.echo(300 * 1024).unwrap();
    let flow = Flow::start(&auto[0], &auto[1]).unwrap();
    let block = "add table inet block\nadd chain inet block in { type filter hook input priority -150; }\n\
                 add chain inet block out { type filter hook output priority -150; }\n\
                 add rule inet block in iifname eth0 meta l4proto udp drop\n\
                 add rule inet block out oifname eth0 meta l4proto udp drop\n";
    lab["h1"].exec_input(["nft", "-f", "-"], Some(block)).unwrap();
    world.wait_sealed(&[("h1", "h2")]);
    connection.echo(300 * 1024).unwrap();
    let blocked = seen(lab, || echo(&auto[0], &auto[1], AUTO));
    assert_eq!(blocked.count(AUTO), 0, "{blocked:?}");
    let gap = flow.finish().unwrap().longest_gap();
    println!("no replies for {gap:?} after UDP was blocked");
    assert!(gap < TURNED, "{gap:?}");
    lab["h1"].exec_input(["nft", "-f", "-"], Some("delete table inet block\n")).unwrap();
    world.wait_sealed(&[]);
    connection.echo(300 * 1024).unwrap();
    let plain = seen(lab, || echo(&auto[0], &auto[1], AUTO));
    assert!(plain.count(AUTO) > MANY, "{plain:?}");
}

fn sealed_while_vxlan_is_blocked(mode: &str) {
    let world = World::new(LabConfig::hosts(2), mode, &[]);
    let World { lab, auto, .. } = &world;
    ping_all_pairs(auto, SOON).unwrap();
    wait_probed(&lab["h1"], "h2");
    let mut connection = Connection::open(&auto[0], &auto[1], SOON).unwrap();
    connection.echo(300 * 1024).unwrap();
    let block = "add table bridge group\nadd chain bridge group in { type filter hook forward priority -10; }\n\
                 add rule bridge group in iifname h1 oifname h2 udp dport 4789 drop\n";
    lab.switch().exec_input(["nft", "-f", "-"], Some(block)).unwrap();
    world.wait_sealed(&[("h1", "h2")]);
    connection.echo(300 * 1024).unwrap();
    let blocked = seen(lab, || echo(&auto[0], &auto[1], AUTO));
    assert_eq!(blocked.count(AUTO), 0, "{blocked:?}");
    lab.switch().exec_input(["nft", "-f", "-"], Some("delete table bridge group\n")).unwrap();
    world.wait_sealed(&[]);
    connection.echo(300 * 1024).unwrap();
    let plain = seen(lab, || echo(&auto[0], &auto[1], AUTO));
    assert!(plain.count(AUTO) > MANY, "{plain:?}");
}

/// Waits until probes of the path to another host are answered.
fn wait_probed(host: &Host, other: &str) {
    wait_until(SOON, &format!("the path from {} to {other} to be probed", host.name()), || -> Result<()> {
        let row = peer(host, other)?;
        let is_probed = |path: &Value| path["encapsulation"] == "vxlan" && path["rtt_us"].is_u64();
        ensure!(row["paths"].as_array().is_some_and(|paths| paths.iter().any(is_probed)), "{row}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn pair_is_sealed_while_vxlan_is_blocked() {
    sealed_while_vxlan_is_blocked("l3");
}

#[test]
fn pair_on_a_switched_network_is_sealed_while_vxlan_is_blocked() {
    sealed_while_vxlan_is_blocked("l2");
}

#[test]
fn pair_goes_over_tcp_sealed_while_udp_is_blocked() {
    over_tcp_while_udp_is_blocked("l3");
}

#[test]
fn pair_on_a_switched_network_goes_over_tcp_sealed_while_udp_is_blocked() {
    over_tcp_while_udp_is_blocked("l2");
}

#[test]
fn networks_say_when_they_are_encrypted() {
    let lab = start_lab_with(LabConfig::hosts(1)).unwrap();
    let host = &lab["h1"];
    let create =
        |name: &str, more: &[&str]| host.ctl(&[&["network", "create", name], more].concat()).unwrap();
    for (name, more, encrypt) in [
        ("a", &["--mode", "l3", "--encrypt", "auto"][..], "auto"),
        ("f", &["--encrypt", "auto"], "auto"),
        ("b", &["--encrypt", "yes"], "yes"),
        ("c", &["--encrypted"], "yes"),
        ("d", &["--encrypt", "no"], "no"),
        ("e", &[], "no"),
    ] {
        assert!(create(name, more).status.success(), "{name}");
        let info = host.ctl_json(&["network", "inspect", name]).unwrap();
        assert_eq!(
            (&info["encrypt"], &info["encrypted"]),
            (&encrypt.into(), &(encrypt == "yes").into()),
            "{info}"
        );
    }
    assert!(host.ctl_ok(&["network", "ls"]).unwrap().contains("encrypt-auto"));
    let error =
        ctl_error(host, &["network", "create", "f", "--driver", "bridge", "--encrypt", "auto"]).unwrap();
    assert!(error.contains("--encrypt auto is for networks of several hosts"), "{error}");
    let output = create("g", &["--encrypted", "--encrypt", "auto"]);
    assert!(!output.status.success() && output.stderr.contains("cannot be used with"), "{}", output.stderr);
}
