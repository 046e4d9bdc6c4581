//! Hosts behind NAT whose addresses change, whose mappings are forgotten and whose links are cut at random: what can live, lives.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Lab, LabConfig, wait_until};
use ovl_tests::random::Random;
use ovl_tests::routed::create_routed_network;
use ovl_tests::{Attached, Connection, SOON, attach, ping_all_pairs, rows, start_lab_with, wait_clean};

/// The hosts that others can dial.
const PUBLIC: [&str; 2] = ["h1", "h2"];
/// The others, and how each reaches the underlay.
const HIDDEN: [(&str, &str); 4] =
    [("h3", "port-restricted"), ("h4", "symmetric"), ("h5", "full-cone"), ("h6", "udp-blocked")];
/// What a connection may wait for: three seconds until the host is found where it is now, or through another member, and what TCP's
/// backoff adds to that.
const STALL: Duration = Duration::from_secs(8);

/// What happens to the hosts behind NAT at one moment.
#[derive(Debug)]
struct Faults {
    /// The links to public hosts that are cut. Each host has one left.
    cut: BTreeSet<(&'static str, &'static str)>,
    renumbered: Vec<&'static str>,
    forgets: Vec<&'static str>,
}

impl Faults {
    fn random(random: &mut Random) -> Self {
        let mut faults = Self { cut: BTreeSet::new(), renumbered: Vec::new(), forgets: Vec::new() };
        for (host, _) in HIDDEN {
            match random.below(6) {
                0 => faults.renumbered.push(host),
                1 => faults.forgets.push(host),
                2 | 3 => {
                    faults.cut.insert((*random.pick(&PUBLIC), host));
                }
                _ => {}
            }
        }
        faults
    }

    fn apply(&self, lab: &Lab) -> Result<()> {
        lab.heal()?;
        lab.cut(&self.cut.iter().copied().collect::<Vec<_>>(), false)?;
        for host in &self.renumbered {
            lab[*host].renumber()?;
        }
        self.forgets.iter().try_for_each(|host| lab[*host].forget_mappings())
    }

    fn cuts(&self, one: &str, other: &str) -> bool {
        self.cut.iter().any(|cut| *cut == (one, other) || *cut == (other, one))
    }
}

/// How a host reaches another one: the members between them, and whether it begins with TCP.
type Way = (Vec<String>, bool);

/// The ways between all hosts, as they say themselves.
fn ways(lab: &Lab) -> Result<BTreeMap<(String, String), Way>> {
    let mut ways = BTreeMap::new();
    for host in lab.hosts() {
        for row in rows(host, &["peers"])?.iter().filter(|row| row["name"] != host.name()) {
            ensure!(row["state"] == "alive", "{} says {row}", host.name());
            let via = row["via"].as_array().context("no path")?;
            let via = via.iter().filter_map(|name| Some(name.as_str()?.to_owned())).collect();
            let name = row["name"].as_str().unwrap_or_default().to_owned();
            ways.insert((host.name().to_owned(), name), (via, row["tcp"] == true));
        }
    }
    let hosts = lab.hosts().len();
    ensure!(ways.len() == hosts * (hosts - 1), "{ways:?}");
    Ok(ways)
}

/// Waits until each host has a path to each other one over links that are there.
fn wait_for_ways(lab: &Lab, faults: &Faults) -> BTreeMap<(String, String), Way> {
    let mut found = BTreeMap::new();
    wait_until(SOON, &format!("paths after {faults:?}"), || -> Result<()> {
        found = ways(lab)?;
        for ((from, to), (via, _)) in &found {
            let hops: Vec<&String> = [from].into_iter().chain(via).chain([to]).collect();
            let is_there = hops.windows(2).all(|pair| !faults.cuts(pair[0], pair[1]));
            ensure!(is_there, "{from} reaches {to} via {via:?}");
            ensure!(
                via.iter().all(|name| PUBLIC.contains(&name.as_str())),
                "{from} reaches {to} via {via:?}"
            );
        }
        Ok(())
    })
    .unwrap();
    found
}

fn storm(length: Duration, least: usize, seed: u64) {
    let config = LabConfig::hosts(PUBLIC.len() + HIDDEN.len());
    let config =
        HIDDEN.iter().fold(config, |config, (host, kind)| config.access(host, kind.parse().unwrap()));
    let lab = start_lab_with(config).unwrap();
    let options = ["--encrypted", "--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"];
    create_routed_network(&lab, "pods", &options).unwrap();
    let pods: Vec<Attached> = lab
        .hosts()
        .iter()
        .map(|host| attach(host, &format!("p{}", host.name()), "pods", &[]).unwrap())
        .collect();
    ping_all_pairs(&pods, SOON).unwrap();
    let pairs = (0..pods.len()).flat_map(|one| (one + 1..pods.len()).map(move |other| (one, other)));
    let mut connections: Vec<((usize, usize), Connection)> = pairs
        .map(|(one, other)| ((one, other), Connection::open(&pods[one], &pods[other], STALL).unwrap()))
        .collect();
    let (mut random, start, mut round) = (Random::new(seed), Instant::now(), 0);
    let mut longest = Duration::ZERO;
    while start.elapsed() < length || round < least {
        round += 1;
        let faults = Faults::random(&mut random);
        faults.apply(&lab).unwrap();
        for ((one, other), connection) in &mut connections {
            let round = || {
                let ways = ways(&lab).map_or_else(|error| error.to_string(), |ways| format!("{ways:?}"));
                let (one, other) = (lab.hosts()[*one].name(), lab.hosts()[*other].name());
                format!("round {round} (seed {seed}), {faults:?}: {one} to {other}; {ways}")
            };
            longest = longest.max(connection.echo(2000).with_context(round).unwrap());
        }
        let before = wait_for_ways(&lab, &faults);
        // Nothing changes while nothing happens.
        let steady = Instant::now();
        while steady.elapsed() < Duration::from_secs(2) {
            for ((one, other), connection) in &mut connections {
                let took = connection.echo(2000).unwrap();
                assert!(took < Duration::from_secs(1), "{one} to {other}: {took:?} on a steady path");
            }
        }
        for (pair, (via, tcp)) in ways(&lab).unwrap() {
            let (was_via, was_tcp) = &before[&pair];
            let is_better = via.len() < was_via.len() || (*was_tcp && !tcp);
            assert!(
                (&via, tcp) == (was_via, *was_tcp) || is_better,
                "round {round} (seed {seed}), {faults:?}: {pair:?} had {was_via:?} (TCP: {was_tcp}) and now has {via:?} \
                 (TCP: {tcp}) without a cause"
            );
        }
    }
    println!("{round} rounds (seed {seed}), the longest wait of a connection was {longest:?}");
    lab.heal().unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn connections_survive_that_hosts_behind_nat_move_and_are_forgotten() {
    storm(Duration::ZERO, 3, 1);
}

#[test]
#[ignore = "takes OVL_STORM_MINUTES"]
fn connections_survive_that_for_long() {
    let number = |name: &str, default: u64| {
        std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
    };
    storm(Duration::from_secs(60 * number("OVL_STORM_MINUTES", 30)), 1, number("OVL_STORM_SEED", 1));
}
