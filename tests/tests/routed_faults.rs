//! Failures on routed networks: drift, concurrent claims of blocks, partitions, and dead hosts.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, wait_until};
use ovl_tests::routed::{
    attach_many, blocks, create_routed_network, device_of, ensure_sees_own_address, routes, routes_to,
    wait_routed,
};
use ovl_tests::{
    Attached, Flow, SOON, assert_contains, assert_no_reply, attach, attach_workload, create_network,
    ctl_error, ensure_settled, peer, ping_all_pairs, problems, rows, run_concurrently, start_lab, strings,
    text, wait_clean, wait_endpoints, wait_problem,
};

/// Time limit of a repair. It takes about a second; the rest is for the load of other labs.
const REPAIRED: Duration = Duration::from_secs(5);

const BOTH: &[&str] = &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"];
const DIRECT: &[&str] = &["--subnet", "10.61.0.0/16", "--backend", "direct"];

fn wait_state(host: &Host, other: &str, state: &str) {
    wait_until(SOON, &format!("{other} to be {state} on {}", host.name()), || {
        let row = peer(host, other)?;
        ensure!(row["state"] == state, "{row}");
        Ok(())
    })
    .unwrap();
}

fn pair(network: &str, lab: &Lab) -> [Attached; 2] {
    ["h1", "h2"].map(|host| attach(&lab[host], &format!("{network}-{host}"), network, &[]).unwrap())
}

/// All kernel objects of ovl on a host, as `ip`, `bridge` and `nft` print them.
fn fingerprint(host: &Host, devices: &[String]) -> Result<String> {
    let mut lines: Vec<String> = routes(host)?.into_iter().map(|route| format!("route {route}")).collect();
    for family in ["-4", "-6"] {
        let ours = host.exec_ok(["ip", "-d", family, "route", "show", "proto", "79"])?;
        lines.extend(ours.lines().map(|line| line.trim().to_owned()));
    }
    for device in devices {
        let link = host.ip_json(&["-d", "link", "show", "dev", device])?;
        let link = &link[0];
        let up = strings(&link["flags"]).contains(&"UP".to_owned());
        let mac = if device.starts_with("ove-") { String::new() } else { text(&link["address"]) };
        lines.push(format!("{device} up={up} mtu={} mac={mac}", link["mtu"]));
        let addresses = host.ip_json(&["addr", "show", "dev", device])?;
        let addresses = addresses[0]["addr_info"].as_array().into_iter().flatten();
        lines.extend(addresses.map(|each| format!("{device} has {}/{}", each["local"], each["prefixlen"])));
        let fdb = host.exec_ok(["bridge", "fdb", "show", "dev", device])?;
        lines.extend(fdb.lines().filter(|line| line.contains("dst")).map(|line| format!("{device} {line}")));
        let neighbours = host.exec_ok(["ip", "neigh", "show", "dev", device, "nud", "permanent"])?;
        lines.extend(neighbours.lines().map(|line| format!("{device} neigh {line}")));
    }
    lines.push(host.exec_ok(["nft", "-s", "list", "table", "inet", "ovl"])?);
    for setting in ["net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"] {
        lines.push(host.exec_ok(["sysctl", setting])?);
    }
    lines.sort();
    Ok(lines.join("\n"))
}

/// Lines that only one of two texts contains.
fn difference(found: &str, expected: &str) -> String {
    let mut out = String::new();
    for line in found.lines().filter(|line| !expected.contains(line)) {
        let _ = writeln!(out, "+ {line}");
    }
    for line in expected.lines().filter(|line| !found.contains(line)) {
        let _ = writeln!(out, "- {line}");
    }
    out
}

#[test]
fn manual_changes_are_repaired_at_once() {
    let lab = start_lab(2).unwrap();
    create_routed_network(&lab, "pods", BOTH).unwrap();
    create_routed_network(&lab, "flat", DIRECT).unwrap();
    let [a, b] = pair("pods", &lab);
    let [c, d] = pair("flat", &lab);
    ping_all_pairs(&[a.clone(), b.clone()], SOON).unwrap();
    ping_all_pairs(&[c.clone(), d.clone()], SOON).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    let h1 = &lab["h1"];
    let far = blocks(h1, "pods", "h2").unwrap();
    let own = blocks(h1, "pods", "h1").unwrap();
    let flat = blocks(h1, "flat", "h2").unwrap()[0].clone();
    let gateways = strings(&h1.ctl_json(&["network", "inspect", "pods"]).unwrap()["gateways"]);
    let far_gateway = strings(&lab["h2"].ctl_json(&["network", "inspect", "pods"]).unwrap()["gateways"]);
    let [bridge, vxlan] = ["ovb-", "ovx-"].map(|prefix| device_of(h1, "pods", prefix).unwrap());
    let (device, pod) = (a.device(), a.addresses());
    let fdb = h1.exec_ok(["bridge", "fdb", "show", "dev", &vxlan]).unwrap();
    let mac = fdb.split(' ').next().unwrap().to_owned();
    let devices = [bridge.clone(), vxlan.clone(), device.clone(), c.device()];
    let expected = fingerprint(h1, &devices).unwrap();
    assert_contains(
        &expected,
        &[&format!("{mac} dst 192.168.77.2 self"), &gateways[1], &flat, &far[0], &far[1]],
    );

    let ours = "proto 79 metric 79";
    let drifts = [
        format!("ip route del {} {ours}", far[0]),
        format!("ip -6 route del {} {ours}", far[1]),
        format!("ip route del {flat} {ours}"),
        format!("ip route del unreachable 10.60.0.0/16 {ours}"),
        format!("ip -6 route del unreachable fd60::/48 {ours}"),
        format!("ip route del unreachable {} {ours}", own[0]),
        format!("ip route del {}/32 {ours}", pod[0]),
        format!("ip -6 route del {}/128 {ours}", pod[1]),
        format!("ip route replace {flat} via 192.168.77.99 {ours}"),
        format!("ip route replace {} dev {bridge} {ours}", far[0]),
        format!("ip -6 route replace {} dev {bridge} {ours}", far[1]),
        format!("ip route replace unreachable {} {ours}", far[0]),
        format!("ip route replace prohibit {flat} {ours}"),
        format!("ip route change {} via {} dev {vxlan} onlink mtu 1300 {ours}", far[0], far_gateway[0]),
        format!("ip route add 10.60.250.0/24 dev {bridge} {ours}"),
        format!("ip -6 route add fd60:0:0:fff0::/64 dev {bridge} {ours}"),
        "ip route flush proto 79".to_owned(),
        "ip -6 route flush proto 79".to_owned(),
        format!("ip neigh del {} dev {vxlan}", far_gateway[0]),
        format!("ip neigh del {} dev {vxlan}", far_gateway[1]),
        format!("ip neigh replace {} lladdr 02:99:99:99:99:99 dev {vxlan} nud permanent", far_gateway[0]),
        format!("ip neigh add 10.60.250.1 lladdr 02:99:99:99:99:99 dev {vxlan} nud permanent"),
        format!("ip neigh del {} dev {device}", pod[0]),
        format!("ip neigh replace {} lladdr 02:99:99:99:99:99 dev {device} nud permanent", pod[1]),
        format!("bridge fdb del {mac} dev {vxlan} dst 192.168.77.2 self"),
        format!("bridge fdb replace {mac} dev {vxlan} dst 192.168.77.99 self static"),
        format!("bridge fdb add 02:99:99:99:99:99 dev {vxlan} dst 192.168.77.99 self static"),
        format!("ip addr del {}/32 dev {bridge}", gateways[0]),
        format!("ip addr del {}/128 dev {bridge}", gateways[1]),
        format!("ip addr add 10.60.250.1/32 dev {bridge}"),
        format!("ip link set {bridge} down"),
        format!("ip link set {vxlan} down"),
        format!("ip link set {device} down"),
        format!("ip link set {} down", c.device()),
        "ip link set eth0 down".to_owned(),
        format!("ip link del {bridge}"),
        format!("ip link del {vxlan}"),
        format!("ip link set {vxlan} mtu 1300"),
        format!("ip link set {device} mtu 1300"),
        format!("ip link set {vxlan} address 02:99:99:99:99:99"),
        "nft flush ruleset".to_owned(),
        "nft add rule inet ovl postrouting counter".to_owned(),
        "sysctl -qw net.ipv4.ip_forward=0".to_owned(),
        "sysctl -qw net.ipv6.conf.all.forwarding=0".to_owned(),
    ];
    let mut durations = Vec::new();
    for drift in drifts {
        h1.exec_ok(drift.split(' ')).unwrap();
        // The kernel deletes routes through the underlay interface with it; they return with the interface.
        if drift == "ip link set eth0 down" {
            h1.exec_ok("ip link set eth0 up".split(' ')).unwrap();
        }
        let start = Instant::now();
        wait_until(REPAIRED, &format!("the repair of `{drift}`"), || -> Result<()> {
            let found = fingerprint(h1, &devices)?;
            ensure!(found == expected, "\n{}", difference(&found, &expected));
            Ok(())
        })
        .unwrap();
        durations.push((start.elapsed(), drift.clone()));
        wait_clean(&lab.hosts()[..1], REPAIRED).unwrap();
        // Two subsystems that undo each other's repairs would still look clean from time to time.
        ensure_settled(h1).unwrap();
        a.workload.ping_until(b.address(), SOON).with_context(|| format!("after `{drift}`")).unwrap();
    }
    durations.sort();
    println!("slowest repairs: {:?}", &durations[durations.len() - 3..]);
    ensure_sees_own_address(&a, &b).unwrap();
    ensure_sees_own_address(&c, &d).unwrap();
    assert_eq!(problems(h1).unwrap(), Vec::<String>::new());
}

/// Foreign routes on a host, some with the same destinations as ovl's.
const FOREIGN: [&str; 6] = [
    "10.60.0.0/16 via 192.168.77.250 dev eth0 proto static metric 500",
    "10.60.0.0/16 via 192.168.77.250 dev eth0 proto 79 metric 500",
    "10.60.0.0/16 via 192.168.77.250 dev eth0 proto static metric 79",
    "10.77.0.0/16 via 192.168.77.250 dev eth0 proto bgp metric 79",
    "fd60::/48 via fd77::fa dev eth0 proto static metric 500",
    "fd61::/48 via fd77::fa dev eth0 proto bgp metric 79",
];

#[test]
fn foreign_routes_are_untouched_and_teardown_leaves_nothing() {
    let lab = Lab::new(LabConfig::hosts(2).underlay(netns_lab::Underlay::Dual)).unwrap();
    let h1 = &lab["h1"];
    for route in FOREIGN {
        let family = if route.starts_with("fd") { "-6" } else { "-4" };
        // `append` keeps both of two routes with the same destination and metric.
        h1.exec_ok(["ip", family, "route", "append"].into_iter().chain(route.split(' '))).unwrap();
    }
    let foreign = || -> Vec<String> {
        let all: Vec<String> = ["-4", "-6"]
            .iter()
            .map(|family| h1.exec_ok(["ip", "-N", family, "route", "show"]).unwrap())
            .collect();
        let ours = |line: &&str| line.contains("proto 79 ") && line.contains("metric 79");
        let kept = all.iter().flat_map(|text| text.lines()).filter(|line| !ours(line));
        kept.map(|line| line.trim().to_owned())
            .filter(|line| line.contains("77.250") || line.contains("77::fa"))
            .collect()
    };
    let before = foreign();
    assert_eq!(before.len(), FOREIGN.len(), "{before:?}");
    lab.start_all().unwrap();
    create_network(&lab, "pods", &[&["--mode", "l3"], BOTH].concat()).unwrap();
    // A route that conflicts with one of ovl's is reported.
    wait_problem(h1, &["another program", "10.60.0.0/16", "metric 79"], SOON).unwrap();
    assert_eq!(foreign(), before);
    let clash = FOREIGN[2];
    h1.exec_ok(["ip", "route", "del"].into_iter().chain(clash.split(' '))).unwrap();
    let before = foreign();
    wait_routed(&lab, "pods").unwrap();
    let [a, b] = pair("pods", &lab);
    ping_all_pairs(&[a, b.clone()], SOON).unwrap();
    assert_eq!(foreign(), before);
    h1.exec_ok("ip route flush proto 79 metric 79".split(' ')).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    assert_eq!(foreign(), before);
    h1.restart().unwrap();
    h1.wait_ready(SOON).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    assert_eq!(foreign(), before);
    // The routes of a network are deleted with it.
    h1.ctl_ok(&["network", "create", "short", "--mode", "l3", "--subnet", "10.62.0.0/16"]).unwrap();
    wait_routed(&lab, "short").unwrap();
    h1.ctl_ok(&["network", "rm", "short"]).unwrap();
    for host in lab.hosts() {
        wait_until(
            SOON,
            &format!("{} to have no route of the removed network", host.name()),
            || -> Result<()> {
                let left: Vec<_> =
                    routes(host)?.into_iter().filter(|route| route.starts_with("10.62.")).collect();
                ensure!(left.is_empty(), "{left:?}");
                Ok(())
            },
        )
        .unwrap();
    }
    h1.ctl_ok(&["teardown", "--yes"]).unwrap();
    h1.wait_exit(SOON).unwrap();
    assert_eq!(foreign(), before);
    assert_eq!(routes(h1).unwrap().len(), 0, "{:?}", routes(h1).unwrap());
    let links = h1.exec_ok(["ip", "-o", "link"]).unwrap();
    assert!(!links.contains("ov"), "{links}");
    assert!(!h1.exec(["nft", "list", "table", "inet", "ovl"]).unwrap().success());
    wait_until(SOON, "h2 to have no route to h1", || -> Result<()> {
        let found = routes(&lab["h2"])?;
        ensure!(found.iter().all(|route| !route.contains(" via ")), "{found:?}");
        Ok(())
    })
    .unwrap();
}

/// Checks that each block has one holder, each address one endpoint, and each address is in a block of its host.
fn assert_unique_assignment(lab: &Lab, network: &str, attached: &[Attached]) {
    let addresses: BTreeSet<String> = attached.iter().flat_map(Attached::addresses).collect();
    let count: usize = attached.iter().map(|each| each.addresses().len()).sum();
    assert_eq!(addresses.len(), count, "{addresses:?}");
    for host in lab.hosts() {
        let all: Vec<_> =
            rows(host, &["subnets"]).unwrap().into_iter().filter(|row| row["network"] == network).collect();
        let prefixes: BTreeSet<String> = all.iter().map(|row| text(&row["prefix"])).collect();
        assert_eq!(prefixes.len(), all.len(), "{all:?}");
        for holder in lab.hosts() {
            let own = blocks(host, network, holder.name()).unwrap();
            let own: Vec<ipnet::IpNet> = own.iter().map(|block| block.parse().unwrap()).collect();
            for each in attached.iter().filter(|each| each.workload.host().name() == holder.name()) {
                for address in each.addresses() {
                    let address: IpAddr = address.parse().unwrap();
                    assert!(own.iter().any(|block| block.contains(&address)), "{address} in {own:?}");
                }
            }
        }
    }
}

#[test]
fn concurrent_claims_assign_each_block_and_address_once() {
    let lab = start_lab(3).unwrap();
    let create = |host: Host, number: usize| {
        move || {
            let (name, subnet) = (format!("net{number}"), format!("10.{}.0.0/20", 60 + number));
            host.ctl_ok(&["network", "create", &name, "--mode", "l3", "--subnet", &subnet, "--block", "29"])
        }
    };
    let work: Vec<_> = (0..6).map(|number| create(lab.hosts()[number % 3].clone(), number)).collect();
    run_concurrently(work).into_iter().collect::<Result<Vec<_>>>().unwrap();
    for number in 0..6 {
        wait_routed(&lab, &format!("net{number}")).unwrap();
    }
    // A block has 5 usable addresses, so each host needs three blocks.
    let workloads: Vec<_> = lab
        .hosts()
        .iter()
        .flat_map(|host| host.bare_workloads(&format!("{}w", host.name()), 12).unwrap())
        .collect();
    let work = workloads.into_iter().map(|each| || attach_workload(each, "net0", &[]));
    let all: Vec<Attached> = run_concurrently(work.collect()).into_iter().collect::<Result<_>>().unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    assert_unique_assignment(&lab, "net0", &all);
    ping_all_pairs(&[all[0].clone(), all[11].clone(), all[23].clone(), all[35].clone()], SOON).unwrap();
    for host in lab.hosts() {
        assert_eq!(problems(host).unwrap(), Vec::<String>::new(), "on {}", host.name());
    }
}

#[test]
fn only_the_majority_of_a_partition_can_claim_blocks() {
    let lab = start_lab(3).unwrap();
    let (h1, h2, h3) = (&lab["h1"], &lab["h2"], &lab["h3"]);
    create_routed_network(&lab, "pods", &["--subnet", "10.60.0.0/16", "--block", "29"]).unwrap();
    let mut all: Vec<Attached> = ["a", "b"].map(|name| attach(h3, name, "pods", &[]).unwrap()).into();
    all.push(attach(h1, "c", "pods", &[]).unwrap());
    all.push(attach(h2, "d", "pods", &[]).unwrap());
    ping_all_pairs(&all, SOON).unwrap();

    lab.partition(&[&["h1", "h2"], &["h3"]]).unwrap();
    for (host, other) in [(h1, "h3"), (h2, "h3"), (h3, "h1"), (h3, "h2")] {
        wait_state(host, other, "dead");
    }
    let majority = attach_many(h1, "m", 7, "pods").unwrap();
    assert_eq!(blocks(h1, "pods", "h1").unwrap().len(), 2);
    let minority = attach_many(h3, "n", 3, "pods").unwrap();
    let late = h3.workload("late").unwrap();
    let args = ["attach", "late", "--network", "pods", "--netns", late.path_str()];
    assert_contains(&ctl_error(h3, &args).unwrap(), &["majority", "1 of 3", "h1", "h2"]);
    assert_eq!(late.ip_json(&["link", "show"]).unwrap().as_array().map(Vec::len), Some(1));
    // A network that is created in the minority has no block there, which is reported.
    h3.ctl_ok(&["network", "create", "lone", "--mode", "l3", "--subnet", "10.65.0.0/16"]).unwrap();
    wait_problem(h3, &["no block of 10.65.0.0/16", "lone", "majority"], SOON).unwrap();
    // Endpoints within a side reach each other, and those of the other side are unreachable.
    ping_all_pairs(&[all[0].clone(), all[1].clone(), minority[2].clone()], SOON).unwrap();
    ping_all_pairs(&[all[2].clone(), all[3].clone(), majority[6].clone()], SOON).unwrap();
    assert_no_reply(&all[0].workload, &all[2].address());
    assert!(routes_to(h1, &blocks(h1, "pods", "h3").unwrap()).unwrap().is_empty());

    lab.heal().unwrap();
    all.extend(majority);
    all.extend(minority);
    wait_until(SOON, "an attach on h3", || h3.ctl_ok(&args).map(drop)).unwrap();
    wait_routed(&lab, "pods").unwrap();
    wait_routed(&lab, "lone").unwrap();
    assert_unique_assignment(&lab, "pods", &all);
    ping_all_pairs(&[all[0].clone(), all[3].clone(), all[10].clone(), all[13].clone()], SOON).unwrap();
    for host in lab.hosts() {
        wait_until(SOON, &format!("{} to have no problem", host.name()), || -> Result<()> {
            let left = problems(host)?;
            ensure!(left.is_empty(), "{left:?}");
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn block_of_a_forgotten_host_is_reassigned_and_it_isolates_its_pods_on_return() {
    let lab = start_lab(3).unwrap();
    let (h1, h2, h3) = (&lab["h1"], &lab["h2"], &lab["h3"]);
    create_routed_network(&lab, "pods", &["--subnet", "10.60.0.0/16", "--block", "29"]).unwrap();
    let other = attach(h2, "other", "pods", &[]).unwrap();
    let doubled = attach(h3, "doubled", "pods", &["--ip", "10.60.200.3"]).unwrap();
    let kept = attach(h3, "kept", "pods", &["--ip", "10.60.210.3"]).unwrap();
    other.workload.ping_until("10.60.200.3", SOON).unwrap();

    lab.partition(&[&["h1", "h2"], &["h3"]]).unwrap();
    wait_state(h1, "h3", "dead");
    let new = h1.workload("new").unwrap();
    let args = ["attach", "new", "--network", "pods", "--netns", new.path_str(), "--ip", "10.60.200.3"];
    // The address stays reserved until h3 is forgotten.
    assert_contains(&ctl_error(h1, &args).unwrap(), &["10.60.200.3", "h3"]);
    h1.ctl_ok(&["peers", "forget", "h3"]).unwrap();
    h1.ctl_ok(&args).unwrap();
    new.ping_until(other.address(), SOON).unwrap();
    other.workload.ping_until("10.60.200.3", SOON).unwrap();

    lab.heal().unwrap();
    wait_problem(h3, &["not admitted", "peers admit"], SOON).unwrap();
    h1.ctl_ok(&["peers", "admit", "h3"]).unwrap();
    wait_problem(h3, &["doubled", "10.60.200.3", "cut off", "h1", "Detach"], SOON).unwrap();
    wait_until(SOON, "the duplicate to be isolated", || -> Result<()> {
        for host in lab.hosts() {
            let all = rows(host, &["endpoints"])?;
            let of = |name: &str| all.iter().find(|row| row["name"] == name).map(|row| text(&row["state"]));
            let found = (of("doubled"), of("kept"));
            ensure!(found == (Some("isolated".into()), Some("ready".into())), "{}: {found:?}", host.name());
        }
        Ok(())
    })
    .unwrap();
    assert_no_reply(&doubled.workload, &other.address());
    other.workload.ping_until(kept.address(), SOON).unwrap();
    // On all hosts, including h3, the address leads to the new endpoint.
    let echo = new.tcp_echo(7777).unwrap();
    for host in lab.hosts() {
        assert_eq!(host.tcp_roundtrip("10.60.200.3", echo.port(), b"who").unwrap(), b"who");
    }
    kept.workload.ping_until("10.60.200.3", SOON).unwrap();
    h3.ctl_ok(&["detach", "doubled"]).unwrap();
    let again = attach_workload(h3.find_workload("doubled").unwrap(), "pods", &[]).unwrap();
    ping_all_pairs(&[again, other, kept], SOON).unwrap();
    wait_until(SOON, "h3 to have no problem", || Ok::<_, anyhow::Error>(problems(h3)?.is_empty())).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn kill_of_a_daemon_loses_no_packet_with_any_backend() {
    let lab = start_lab(2).unwrap();
    create_routed_network(&lab, "pods", BOTH).unwrap();
    create_routed_network(&lab, "flat", DIRECT).unwrap();
    let [a, b] = pair("pods", &lab);
    let [c, d] = pair("flat", &lab);
    let mut flows = Vec::new();
    for (from, to) in [(&a, &b), (&b, &a), (&c, &d), (&d, &c)] {
        flows.push(Flow::start(from, to).unwrap());
    }
    let host = &lab["h2"];
    let before = routes(host).unwrap();
    host.kill9().unwrap();
    wait_state(&lab["h1"], "h2", "suspect");
    assert_eq!(routes(host).unwrap(), before);
    host.start().unwrap();
    host.wait_ready(SOON).unwrap();
    lab.wait_all_alive(SOON).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    for flow in flows {
        flow.finish_without_loss().unwrap();
    }
    assert_eq!(routes(host).unwrap(), before);
    // Both daemons at once.
    let flow = Flow::start(&a, &b).unwrap();
    lab.hosts().iter().for_each(|host| host.kill9().unwrap());
    lab.hosts().iter().for_each(|host| host.start().unwrap());
    lab.hosts().iter().for_each(|host| host.wait_ready(SOON).unwrap());
    lab.wait_all_alive(SOON).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    flow.finish_without_loss().unwrap();
    let fresh = attach(host, "fresh", "pods", &[]).unwrap();
    ping_all_pairs(&[fresh, a, b], SOON).unwrap();
}

/// A packet that meets no route is lost, however soon the route comes back.
#[test]
fn restart_deletes_no_route() {
    let lab = start_lab(2).unwrap();
    create_routed_network(&lab, "pods", BOTH).unwrap();
    create_routed_network(&lab, "flat", DIRECT).unwrap();
    for network in ["pods", "flat"] {
        let [a, b] = pair(network, &lab);
        ping_all_pairs(&[a, b], SOON).unwrap();
    }
    wait_clean(lab.hosts(), SOON).unwrap();
    let host = &lab["h2"];
    let monitor = host.spawn(["ip", "monitor", "route"]).unwrap();
    let wait_shown = |marker: &str| {
        wait_until(SOON, "`ip monitor` to show a route", || -> Result<bool> {
            for action in ["add", "del"] {
                host.exec_ok(["ip", "route", action, "blackhole", marker])?;
            }
            Ok(monitor.stdout().contains(marker))
        })
        .unwrap();
    };
    wait_shown("198.51.100.1");
    // What it needs to know arrives in another order each time.
    for _ in 0..8 {
        host.kill9().unwrap();
        host.start().unwrap();
        host.wait_ready(SOON).unwrap();
        wait_clean(lab.hosts(), SOON).unwrap();
    }
    wait_shown("198.51.100.2");
    let output = monitor.stdout();
    let deleted = output.lines().filter(|line| line.starts_with("Deleted") && !line.contains("blackhole"));
    assert_eq!(deleted.collect::<Vec<_>>(), Vec::<&str>::new());
}

#[test]
fn routes_are_deleted_with_a_pods_namespace_and_with_a_dead_host() {
    let lab = start_lab(3).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    create_routed_network(&lab, "pods", BOTH).unwrap();
    let [a, b] = pair("pods", &lab);
    ping_all_pairs(&[a.clone(), b.clone()], SOON).unwrap();
    let addresses = b.addresses();
    b.workload.clone().destroy().unwrap();
    for host in lab.hosts() {
        wait_endpoints(host, &["pods-h1 on h1 is ready"], SOON).unwrap();
    }
    wait_until(SOON, "no route to the pod", || -> Result<()> {
        let left = routes_to(h2, &addresses)?;
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .unwrap();
    assert_no_reply(&a.workload, &addresses[0]);
    wait_clean(lab.hosts(), SOON).unwrap();
    h2.ctl_ok(&["detach", "pods-h2"]).unwrap();
    let c = attach(h2, "c", "pods", &[]).unwrap();
    a.workload.ping_until(c.address(), SOON).unwrap();

    // The blocks of a dead host become unreachable at once, and are not routed elsewhere.
    let held = blocks(h1, "pods", "h2").unwrap();
    assert_eq!(routes_to(h1, &held).unwrap().len(), 2);
    h2.destroy().unwrap();
    wait_state(h1, "h2", "dead");
    let vxlan = device_of(h1, "pods", "ovx-").unwrap();
    wait_until(SOON, "no route or FDB entry to h2", || -> Result<()> {
        let (left, fdb) = (routes_to(h1, &held)?, h1.exec_ok(["bridge", "fdb", "show", "dev", &vxlan])?);
        ensure!(left.is_empty() && !fdb.contains("192.168.77.2 "), "{left:?} {fdb}");
        Ok(())
    })
    .unwrap();
    let output = a.workload.exec(["ping", "-n", "-c1", "-W2", &c.address()]).unwrap();
    assert_contains(&output.stdout, &["Unreachable"]);
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn concurrent_repair_does_not_undo_an_attach() {
    let lab = start_lab(2).unwrap();
    let h1 = &lab["h1"];
    create_routed_network(&lab, "pods", BOTH).unwrap();
    create_network(&lab, "flat", &["--subnet", "10.62.0.0/16"]).unwrap();
    attach(h1, "first", "flat", &[]).unwrap();
    let bridge = device_of(h1, "pods", "ovb-").unwrap();
    let attached = AtomicUsize::new(0);
    let all: Vec<Attached> = std::thread::scope(|scope| {
        // Each of these triggers a full pass. The last one comes while attaches are in progress, so no later pass
        // corrects what it would undo.
        scope.spawn(|| {
            let route = format!("10.60.250.0/24 dev {bridge} proto 79 metric 79");
            while attached.load(Ordering::Relaxed) < 60 {
                h1.exec_ok(["ip", "route", "replace"].into_iter().chain(route.split(' '))).unwrap();
            }
        });
        let many = |network: &'static str| {
            let workloads = h1.bare_workloads(network, 40).unwrap();
            let attached = &attached;
            workloads.into_iter().map(move |each| {
                move || {
                    let done = attach_workload(each, network, &[]);
                    attached.fetch_add(1, Ordering::Relaxed);
                    done
                }
            })
        };
        run_concurrently(many("pods").chain(many("flat")).collect()).into_iter().collect::<Result<_>>()
    })
    .unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    for each in &all {
        h1.ping_until(each.address(), SOON).unwrap();
    }
}
