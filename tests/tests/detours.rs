//! Hosts that do not reach each other directly, and the members through which they do.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Underlay, wait_until};
use ovl_tests::routed::create_routed_network;
use ovl_tests::{
    Attached, Connection, Flow, SOON, Traffic, attach, create_network, peer, ping_all_pairs, start_lab_with,
    wait_clean,
};

/// Time in which traffic flows another way after a direct path is cut.
const TURNED: Duration = Duration::from_secs(2);

/// Hosts with an encrypted switched and an encrypted routed network.
struct World {
    lab: Lab,
    blue: Vec<Attached>,
    pods: Vec<Attached>,
}

fn world(hosts: usize, underlay: Underlay) -> World {
    let lab = start_lab_with(LabConfig::hosts(hosts).underlay(underlay)).unwrap();
    create_network(&lab, "blue", &["--encrypted", "--subnet", "10.99.0.0/24", "--subnet", "fd99::/64"])
        .unwrap();
    let options = ["--encrypted", "--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"];
    create_routed_network(&lab, "pods", &options).unwrap();
    let on = |network: &str, stem: &str| -> Vec<Attached> {
        let hosts = lab.hosts().iter();
        hosts.map(|host| attach(host, &format!("{stem}{}", host.name()), network, &[]).unwrap()).collect()
    };
    let (blue, pods) = (on("blue", "b"), on("pods", "p"));
    for all in [&blue, &pods] {
        ping_all_pairs(all, SOON).unwrap();
    }
    wait_clean(lab.hosts(), SOON).unwrap();
    World { lab, blue, pods }
}

/// Waits until a host reaches another one through just these members.
fn wait_via(host: &Host, other: &str, relays: &[&str]) {
    wait_until(
        SOON,
        &format!("{other} to be reached via {relays:?} on {}", host.name()),
        || -> Result<()> {
            let row = peer(host, other)?;
            let via: Vec<&str> =
                row["via"].as_array().into_iter().flatten().filter_map(|at| at.as_str()).collect();
            ensure!(via == relays && row["state"] == "alive", "{row}");
            Ok(())
        },
    )
    .unwrap();
}

/// Checks that a connection carries data.
fn carries(connection: &mut Connection) {
    connection.echo(100 * 1024).unwrap();
}

fn detour_carries_traffic_and_ends(underlay: Underlay) {
    let World { lab, blue, pods } = world(3, underlay);
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let mut traffic = Traffic::start(&[&blue, &pods]).unwrap();

    lab.partition(&[&["h1"], &["h2"]]).unwrap();
    wait_via(h1, "h2", &["h3"]);
    wait_via(h2, "h1", &["h3"]);
    traffic.ensure_turned("the cut", TURNED).unwrap();

    traffic.watch().unwrap();
    lab.heal().unwrap();
    wait_via(h1, "h2", &[]);
    wait_via(h2, "h1", &[]);
    traffic.ensure_none_lost().unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn encrypted_traffic_of_two_hosts_that_do_not_reach_each_other_goes_through_a_third_one() {
    detour_carries_traffic_and_ends(Underlay::V4);
}

#[test]
fn the_same_over_an_ipv6_underlay() {
    detour_carries_traffic_and_ends(Underlay::V6);
}

#[test]
fn five_hosts_in_a_chain_that_reach_only_their_neighbours_are_one_cluster() {
    let World { lab, blue, pods } = world(5, Underlay::V4);
    let names = ["h1", "h2", "h3", "h4", "h5"];
    let cut: Vec<(&str, &str)> =
        (0..5).flat_map(|one| (one + 2..5).map(move |other| (names[one], names[other]))).collect();
    let mut connections = [&blue, &pods].map(|all| Connection::open(&all[0], &all[4], SOON).unwrap());
    connections.iter_mut().for_each(carries);
    lab.cut(&cut, false).unwrap();
    for one in 0..5 {
        for other in 0..5 {
            let mut between: Vec<&str> = names[one.min(other)..=one.max(other)].to_vec();
            if one > other {
                between.reverse();
            }
            let between = between.get(1..between.len().saturating_sub(1)).unwrap_or_default();
            if one != other {
                wait_via(&lab[names[one]], names[other], between);
            }
        }
    }
    connections.iter_mut().for_each(carries);
    for all in [&blue, &pods] {
        ping_all_pairs(all, SOON).unwrap();
    }
    wait_clean(lab.hosts(), SOON).unwrap();

    // Agreement needs three of them, and a host at the end has all changes.
    create_network(&lab, "green", &["--encrypted", "--subnet", "10.98.0.0/24"]).unwrap();
    let new: Vec<Attached> = ["h1", "h5"]
        .iter()
        .map(|name| attach(&lab[*name], &format!("g{name}"), "green", &[]).unwrap())
        .collect();
    ping_all_pairs(&new, SOON).unwrap();

    // What a killed daemon forgets, it learns again through the others.
    lab["h1"].kill9().unwrap();
    lab["h1"].start().unwrap();
    wait_via(&lab["h1"], "h5", &["h2", "h3", "h4"]);
    ping_all_pairs(&new, SOON).unwrap();

    lab.heal().unwrap();
    for one in names {
        for other in names.into_iter().filter(|other| *other != one) {
            wait_via(&lab[one], other, &[]);
        }
    }
    connections.iter_mut().for_each(carries);
    ping_all_pairs(&pods, SOON).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn relay_that_passes_nothing_on_is_left_for_another_one() {
    let World { lab, blue, pods } = world(4, Underlay::V4);
    lab.cut(&[("h1", "h2")], false).unwrap();
    let relay = |host: &Host, other: &str| -> Result<String> {
        let row = peer(host, other)?;
        Ok(row["via"][0].as_str().context("it is reached directly")?.to_owned())
    };
    wait_until(SOON, "a relay", || relay(&lab["h1"], "h2").map(drop)).unwrap();
    let first = relay(&lab["h1"], "h2").unwrap();
    ping_all_pairs(&pods, SOON).unwrap();
    // It answers pings, and drops what it is to pass on.
    let drop = "add table inet liar\nadd chain inet liar in { type filter hook input priority 0; }\n\
                add rule inet liar in udp dport 7942 drop\n";
    lab[&*first].exec_input(["nft", "-f", "-"], Some(drop)).unwrap();
    // Three probes of the tunnel, every three seconds, have to be lost.
    wait_until(2 * SOON, "another relay", || -> Result<()> {
        ensure!(relay(&lab["h1"], "h2")? != first && relay(&lab["h2"], "h1")? != first, "still {first}");
        Ok(())
    })
    .unwrap();
    for all in [&blue, &pods] {
        ping_all_pairs(all, SOON).unwrap();
    }
}

#[test]
fn what_is_lost_in_one_direction_goes_through_a_member() {
    let World { lab, blue, pods } = world(3, Underlay::V4);
    let flows: Vec<Flow> = [&blue, &pods].map(|all| Flow::start(&all[0], &all[1]).unwrap()).into();
    lab.cut(&[("h2", "h1")], true).unwrap();
    wait_via(&lab["h1"], "h2", &["h3"]);
    wait_via(&lab["h2"], "h1", &["h3"]);
    for all in [&blue, &pods] {
        ping_all_pairs(all, SOON).unwrap();
    }
    let gaps: Vec<Duration> = flows.into_iter().map(|flow| flow.finish().unwrap().longest_gap()).collect();
    println!("no replies for {gaps:?} after the cut");
    assert!(gaps.iter().all(|gap| *gap < TURNED), "{gaps:?}");
    lab.heal().unwrap();
    wait_via(&lab["h1"], "h2", &[]);
    wait_clean(lab.hosts(), SOON).unwrap();
}
