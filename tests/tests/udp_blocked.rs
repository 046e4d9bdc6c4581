//! Hosts between which UDP does not pass: they are full members over TCP.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Underlay, wait_until};
use ovl_tests::routed::create_routed_network;
use ovl_tests::{
    Attached, Connection, Flow, SOON, Traffic, attach, create_network, peer, ping_all_pairs, start_lab_with,
    wait_clean,
};
use serde_json::Value;

/// Time in which traffic flows another way after UDP is cut.
const TURNED: Duration = Duration::from_secs(2);

fn create_networks(lab: &Lab) {
    create_network(lab, "blue", &["--encrypted", "--subnet", "10.99.0.0/24", "--subnet", "fd99::/64"])
        .unwrap();
    let options = ["--encrypted", "--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"];
    create_routed_network(lab, "pods", &options).unwrap();
}

fn attach_all(lab: &Lab, network: &str) -> Vec<Attached> {
    let hosts = lab.hosts().iter();
    hosts.map(|host| attach(host, &format!("{network}-{}", host.name()), network, &[]).unwrap()).collect()
}

/// How a host reaches another one, as in the column PATH: `tcp`, `via h1`, `tcp via h1`, or nothing.
fn path(row: &Value) -> String {
    let via: Vec<&str> =
        row["via"].as_array().into_iter().flatten().filter_map(|name| name.as_str()).collect();
    let tcp = (row["tcp"] == true).then_some("tcp".to_owned());
    let via = (!via.is_empty()).then(|| format!("via {}", via.join(" ")));
    tcp.into_iter().chain(via).collect::<Vec<_>>().join(" ")
}

fn wait_path(host: &Host, other: &str, wanted: &str) {
    wait_until(SOON, &format!("{other} to be reached by '{wanted}' on {}", host.name()), || -> Result<()> {
        let row = peer(host, other)?;
        ensure!(path(&row) == wanted && row["state"] == "alive", "{row}");
        Ok(())
    })
    .unwrap();
}

/// A firewall on a host that lets no UDP pass from and to another one.
struct Block<'a>(&'a Host);

impl<'a> Block<'a> {
    fn new(host: &'a Host, other: &Host) -> Self {
        let rules: String = other
            .addresses()
            .iter()
            .map(|address| {
                let family = if address.is_ipv4() { "ip" } else { "ip6" };
                format!(
                    "add rule inet block in {family} saddr {address} meta l4proto udp drop\n\
                     add rule inet block out {family} daddr {address} meta l4proto udp drop\n"
                )
            })
            .collect();
        let script = format!(
            "add table inet block\nadd chain inet block in {{ type filter hook input priority -150; }}\n\
             add chain inet block out {{ type filter hook output priority -150; }}\n{rules}"
        );
        host.exec_input(["nft", "-f", "-"], Some(&script)).unwrap();
        Self(host)
    }

    fn lift(self) {
        self.0.exec_input(["nft", "-f", "-"], Some("delete table inet block\n")).unwrap();
    }
}

fn udp_is_cut_and_let_through_again(underlay: Underlay) {
    let lab = start_lab_with(LabConfig::hosts(2).underlay(underlay)).unwrap();
    create_networks(&lab);
    let (blue, pods) = (attach_all(&lab, "blue"), attach_all(&lab, "pods"));
    for all in [&blue, &pods] {
        ping_all_pairs(all, SOON).unwrap();
    }
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let mut traffic = Traffic::start(&[&blue, &pods]).unwrap();

    let block = Block::new(h1, h2);
    wait_path(h1, "h2", "tcp");
    wait_path(h2, "h1", "tcp");
    traffic.ensure_turned("UDP was cut", TURNED).unwrap();
    let row = peer(h1, "h2").unwrap();
    assert!(row["why"].as_str().is_some_and(|why| why.contains("UDP")) && row["tcp_s"].is_u64(), "{row}");
    let problems = h1.ctl_json(&["status"]).unwrap()["problems"].to_string();
    assert!(problems.contains("OVL-E058") && problems.contains("h2"), "{problems}");
    assert!(h1.ctl_ok(&["peers"]).unwrap().contains("tcp"));

    traffic.watch().unwrap();
    block.lift();
    wait_path(h1, "h2", "");
    wait_path(h2, "h1", "");
    traffic.ensure_none_lost().unwrap();
    let problems = h1.ctl_json(&["status"]).unwrap()["problems"].to_string();
    assert!(!problems.contains("OVL-E058"), "{problems}");
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn connections_survive_that_udp_is_cut_between_two_hosts() {
    udp_is_cut_and_let_through_again(Underlay::V4);
}

#[test]
fn the_same_over_an_ipv6_underlay() {
    udp_is_cut_and_let_through_again(Underlay::V6);
}

#[test]
fn host_whose_udp_is_blocked_reaches_hosts_behind_all_kinds_of_nat() {
    let kinds = ["udp-blocked", "full-cone", "symmetric", "cgn-symmetric", "udp-blocked"];
    let config = kinds.iter().enumerate().fold(LabConfig::hosts(kinds.len() + 1), |config, (index, kind)| {
        config.access(&format!("h{}", index + 2), kind.parse().unwrap())
    });
    let lab = start_lab_with(config).unwrap();
    create_networks(&lab);
    for network in ["pods", "blue"] {
        ping_all_pairs(&attach_all(&lab, network), SOON).unwrap();
    }
    for blocked in ["h2", "h6"] {
        wait_path(&lab[blocked], "h1", "tcp");
        for hidden in lab.hosts().iter().map(Host::name).filter(|name| !["h1", blocked].contains(name)) {
            wait_path(&lab[blocked], hidden, "tcp via h1");
        }
    }
    wait_path(&lab["h1"], "h2", "tcp");
    wait_path(&lab["h3"], "h2", "via h1");
    wait_clean(lab.hosts(), SOON).unwrap();

    // Its only connections are lost, and it is back.
    lab["h2"].link_down().unwrap();
    wait_until(SOON, "h2 to be dead", || -> Result<()> {
        let row = peer(&lab["h1"], "h2")?;
        ensure!(row["state"] == "dead", "{row}");
        Ok(())
    })
    .unwrap();
    lab["h2"].link_up().unwrap();
    wait_path(&lab["h1"], "h2", "tcp");
    wait_path(&lab["h2"], "h1", "tcp");
}

/// What a connection may wait for after a NAT has forgotten it: three seconds, and what TCP's backoff adds.
const FORGOTTEN: Duration = Duration::from_secs(7);

#[test]
fn connections_survive_that_the_nat_forgets_those_that_carry_them() {
    let config = LabConfig::hosts(3)
        .access("h2", "udp-blocked".parse().unwrap())
        .access("h3", "symmetric".parse().unwrap());
    let lab = start_lab_with(config).unwrap();
    create_networks(&lab);
    let pods = attach_all(&lab, "pods");
    ping_all_pairs(&pods, SOON).unwrap();
    let (h1, h3) = (&lab["h1"], &lab["h3"]);
    for [other, to] in [["h2", "h1"], ["h1", "h2"]] {
        wait_path(&lab[other], to, "tcp");
    }
    // TCP paths to h3 stay open for a while after they were used.
    let block = Block::new(h3, h1);
    wait_path(h1, "h3", "tcp");
    wait_path(h3, "h1", "tcp");
    block.lift();
    wait_path(h1, "h3", "");
    wait_path(h3, "h1", "");

    for index in [1, 2] {
        let mut connection = Connection::open(&pods[0], &pods[index], FORGOTTEN).unwrap();
        connection.echo(2000).unwrap();
        let flow = Flow::start(&pods[0], &pods[index]).unwrap();
        let host = &lab.hosts()[index];
        host.renumber().unwrap();
        host.forget_mappings().unwrap();
        connection.echo(2000).unwrap();
        let gap = flow.finish().unwrap().longest_gap();
        println!("no replies for {gap:?} after {} was elsewhere", host.name());
        assert!(gap < FORGOTTEN, "{gap:?}");
        wait_clean(lab.hosts(), SOON).unwrap();
    }
}

#[test]
fn host_that_starts_with_udp_blocked_is_admitted_and_reached() {
    starts_with_udp_blocked(Underlay::V4);
}

/// Its addresses are not translated, so nothing but that no host dials it tells it that it is behind a firewall.
#[test]
fn the_same_behind_a_firewall_over_an_ipv6_underlay() {
    starts_with_udp_blocked(Underlay::V6);
}

fn starts_with_udp_blocked(underlay: Underlay) {
    let config = LabConfig::hosts(3).underlay(underlay).access("h3", "udp-blocked".parse().unwrap());
    let lab = Lab::new(config).unwrap();
    let (h1, h2, h3) = (&lab["h1"], &lab["h2"], &lab["h3"]);
    for host in [h1, h2] {
        host.start().unwrap();
        host.wait_ready(SOON).unwrap();
    }
    create_networks(&lab);
    let first = attach(h1, "first", "pods", &[]).unwrap();
    for round in ["first start", "restart"] {
        let start = Instant::now();
        h3.start().unwrap();
        h3.wait_ready(SOON).unwrap();
        let is_member = || -> Result<()> {
            let row = peer(h1, "h3")?;
            ensure!(row["member"] == true && row["state"] == "alive", "{row}");
            Ok(())
        };
        wait_until(SOON, "h3 to be admitted", is_member).unwrap();
        let admitted = start.elapsed();
        let last = attach(h3, &format!("last-{}", &round[..5]), "pods", &[]).unwrap();
        let attached = Instant::now();
        last.workload.ping_until(first.address(), SOON).unwrap();
        println!("{round}: admitted after {admitted:?}, first packet {:?} after attach", attached.elapsed());
        wait_path(h3, "h2", "tcp");
        wait_path(h2, "h3", "tcp");
        h3.stop().unwrap();
    }
    wait_clean(&lab.hosts()[..2], SOON).unwrap();
}
