//! Hosts behind NAT: each pair exchanges traffic, directly where both NATs allow it at all.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Access, Behavior, Nat};
use netns_lab::{Host, Lab, LabConfig, wait_until};
use ovl_tests::routed::create_routed_network;
use ovl_tests::{Attached, SOON, attach, create_network, peer, ping_all_pairs, start_lab_with, wait_clean};

/// Kinds of NAT, by the presets of the lab.
const KINDS: [&str; 7] =
    ["full-cone", "restricted", "port-restricted", "address-dependent", "symmetric", "cgn", "cgn-symmetric"];

/// A lab whose first host is public, and whose others are behind these kinds of NAT.
fn lab(kinds: &[&str]) -> Lab {
    let config = kinds.iter().enumerate().fold(LabConfig::hosts(kinds.len() + 1), |config, (index, kind)| {
        config.access(&format!("h{}", index + 2), kind.parse().unwrap())
    });
    start_lab_with(config).unwrap()
}

fn attach_all(lab: &Lab, network: &str) -> Vec<Attached> {
    let hosts = lab.hosts().iter();
    hosts.map(|host| attach(host, &format!("{network}-{}", host.name()), network, &[]).unwrap()).collect()
}

/// The mapping and filtering of what a host is behind, as others see it: the strictest of both boxes.
fn behaviors(kind: &str) -> (Behavior, Behavior) {
    let of = |nat: &Nat| (nat.mapping, nat.filtering);
    match kind.parse().unwrap() {
        Access::Nat(nat) => of(&nat),
        Access::Carrier { home, carrier } => {
            let (home, carrier) = (of(&home), of(&carrier));
            let strict = |behavior: Behavior| match behavior {
                Behavior::EndpointIndependent => 0,
                Behavior::AddressDependent => 1,
                Behavior::AddressAndPortDependent => 2,
            };
            let stricter = |one, other| if strict(one) < strict(other) { other } else { one };
            (stricter(home.0, carrier.0), stricter(home.1, carrier.1))
        }
        Access::Switch(_) | Access::With(_) => (Behavior::EndpointIndependent, Behavior::EndpointIndependent),
    }
}

/// Whether two hosts reach each other when each sends to where a third one sees the other: see RFC 4787, sections 4.1 and 5.
/// `None`: that depends on which datagram is the first one.
fn is_direct(one: &str, other: &str) -> Option<bool> {
    let (one, other) = (behaviors(one), behaviors(other));
    let is_fixed = |(mapping, _): (Behavior, Behavior)| mapping == Behavior::EndpointIndependent;
    let is_lax = |(_, filtering): (Behavior, Behavior)| filtering != Behavior::AddressAndPortDependent;
    // A datagram of one without endpoint-independent mapping comes from a port that the other one has not sent to.
    let passes = |from, to| is_fixed(from) || is_lax(to);
    match (passes(one, other), passes(other, one)) {
        (true, true) if is_fixed(one) || is_fixed(other) => Some(true),
        (false, false) => Some(false),
        // What passes one way finds a port that belongs to another destination. Some NATs answer from there.
        _ => None,
    }
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
                let is_direct = match (kind(host), kind(other)) {
                    (Some(one), Some(other)) => is_direct(one, other),
                    _ => Some(true),
                };
                let is_right = is_direct.is_none_or(|is_direct| is_direct == via.is_empty());
                ensure!(is_right, "{:?} to {:?} goes via {via:?}", kind(host), kind(other));
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
