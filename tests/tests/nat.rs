//! Hosts behind NAT: each pair exchanges traffic, directly where both NATs allow it at all.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Access, Host, Lab, LabConfig, wait_until};
use ovl_tests::routed::create_routed_network;
use ovl_tests::{
    Attached, Connection, SOON, attach, create_network, peer, ping_all_pairs, start_lab_with, wait_clean,
};

/// Kinds of NAT, by the presets of the lab.
const KINDS: [&str; 8] = [
    "firewall",
    "full-cone",
    "restricted",
    "port-restricted",
    "address-dependent",
    "symmetric",
    "cgn",
    "cgn-symmetric",
];

/// A lab whose first host is public, and whose others are behind these kinds of NAT.
fn with_kinds(kinds: &[&str]) -> LabConfig {
    kinds.iter().enumerate().fold(LabConfig::hosts(kinds.len() + 1), |config, (index, kind)| {
        config.access(&format!("h{}", index + 2), kind.parse().unwrap())
    })
}

fn lab(kinds: &[&str]) -> Lab {
    start_lab_with(with_kinds(kinds)).unwrap()
}

fn attach_all(lab: &Lab, network: &str) -> Vec<Attached> {
    let hosts = lab.hosts().iter();
    hosts.map(|host| attach(host, &format!("{network}-{}", host.name()), network, &[]).unwrap()).collect()
}

/// The members through which a host reaches another one. Fails while it counts as dead.
fn via(host: &Host, other: &str) -> Result<Vec<String>> {
    let row = peer(host, other)?;
    ensure!(row["state"] == "alive" && row["nat"] == true, "{} says {row}", host.name());
    let via = row["via"].as_array().context("no path")?;
    Ok(via.iter().filter_map(|name| Some(name.as_str()?.to_owned())).collect())
}

/// Checks that each pair exchanges traffic, directly if both kinds allow it.
fn all_pairs_talk(kinds: &[&str]) {
    let lab = lab(kinds);
    let options = ["--encrypted", "--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"];
    create_routed_network(&lab, "pods", &options).unwrap();
    create_network(&lab, "blue", &["--encrypted", "--subnet", "10.99.0.0/24"]).unwrap();
    for network in ["pods", "blue"] {
        ping_all_pairs(&attach_all(&lab, network), SOON).unwrap();
    }
    let kind = |host: &Host| host.name()[1..].parse::<usize>().unwrap().checked_sub(2).map(|at| kinds[at]);
    wait_until(SOON, "each pair to be direct where that is possible", || -> Result<()> {
        for host in lab.hosts() {
            for other in lab.hosts().iter().filter(|other| other.name() != host.name()) {
                let via = via(host, other.name())?;
                let kinds = (kind(host), kind(other));
                let must_be_direct = match kinds {
                    (Some(one), Some(other)) => one.parse::<Access>()?.allows_direct(&other.parse()?),
                    _ => true,
                };
                // Where that is not certain, the first datagrams of both may still meet.
                let may_be_relayed = !must_be_direct && via == ["h1"];
                ensure!(
                    via.is_empty() || may_be_relayed,
                    "{kinds:?}: {} to {} via {via:?}",
                    host.name(),
                    other.name()
                );
            }
        }
        Ok(())
    })
    .unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn hosts_behind_each_kind_of_nat_talk_directly_where_rfc_4787_allows_it() {
    all_pairs_talk(&KINDS);
}

#[test]
fn hosts_behind_two_nats_of_one_kind_talk() {
    all_pairs_talk(&[
        "full-cone",
        "full-cone",
        "port-restricted",
        "port-restricted",
        "symmetric",
        "symmetric",
    ]);
}

/// What a connection may wait for after a host has another address: three seconds, and what TCP's backoff adds.
const MOVED: Duration = Duration::from_secs(7);

/// How long it takes until a ping arrives. The pods' addresses are those of the routed network.
fn time_to_ping(from: &Attached, to: &Attached) -> Duration {
    let start = Instant::now();
    from.workload.ping_until(to.address(), SOON).unwrap();
    start.elapsed()
}

#[test]
fn connections_outlive_another_address_and_mappings_that_are_forgotten() {
    let lab = lab(&["port-restricted", "full-cone", "symmetric"]);
    let options = ["--encrypted", "--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"];
    create_routed_network(&lab, "pods", &options).unwrap();
    let pods = attach_all(&lab, "pods");
    ping_all_pairs(&pods, SOON).unwrap();
    let pairs = [(0, 1), (1, 2), (1, 3), (3, 0)];
    let mut connections =
        pairs.map(|(one, other)| Connection::open(&pods[one], &pods[other], MOVED).unwrap());
    let mut all_carry = |what: &str| {
        for ((one, other), connection) in pairs.iter().zip(&mut connections) {
            connection
                .echo(2000)
                .with_context(|| format!("h{} to h{} after {what}", one + 1, other + 1))
                .unwrap();
        }
    };
    all_carry("the start");
    for host in ["h2", "h4"] {
        lab[host].renumber().unwrap();
        let took = time_to_ping(&pods[0], &pods[host[1..].parse::<usize>().unwrap() - 1]);
        assert!(took < Duration::from_secs(3), "{host} has another address since {took:?}");
        all_carry(&format!("{host} had another address"));
    }
    for host in ["h2", "h3", "h4"] {
        lab[host].forget_mappings().unwrap();
        all_carry(&format!("the NAT of {host} forgot its mappings"));
    }
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn hosts_behind_one_nat_reach_each_other_in_their_own_network() {
    let lab = lab(&["port-restricted", "h2", "symmetric", "h4"]);
    create_network(&lab, "blue", &["--encrypted", "--subnet", "10.99.0.0/24"]).unwrap();
    ping_all_pairs(&attach_all(&lab, "blue"), SOON).unwrap();
    wait_until(SOON, "neighbours to be direct", || -> Result<()> {
        for (one, other) in [("h2", "h3"), ("h4", "h5")] {
            for (from, to) in [(one, other), (other, one)] {
                let via = via(&lab[from], to)?;
                ensure!(via.is_empty(), "{from} reaches {to} via {via:?}");
            }
        }
        Ok(())
    })
    .unwrap();
}

#[test]
fn host_behind_nat_is_admitted_by_a_majority_that_is_behind_nat() {
    let kinds = ["port-restricted", "symmetric", "restricted", "symmetric", "firewall"];
    let lab = Lab::new(with_kinds(&kinds)).unwrap();
    let (last, first) = lab.hosts().split_last().unwrap();
    for host in first {
        host.start().unwrap();
        host.wait_ready(SOON).unwrap();
    }
    last.start().unwrap();
    last.wait_ready(SOON).unwrap();
    lab.wait_all_alive(SOON).unwrap();
}
