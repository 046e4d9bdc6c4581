//! Hosts behind NAT whose addresses change, whose mappings are forgotten and whose links are cut at random: what can live, lives.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Lab, LabConfig, wait_until};
use ovl_tests::random::Random;
use ovl_tests::storm::{Way, Ways, connect_pairs, for_long, use_steadily, ways};
use ovl_tests::{SOON, start_lab_with, wait_clean};

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

/// How long paths stay as they are until nothing follows from what happened before.
const QUIET: Duration = Duration::from_secs(2);

/// Waits until each host has a path to each other one over links that are there, and has kept it for a while: when hosts have moved,
/// paths follow one after the other.
fn wait_for_ways(lab: &Lab, faults: &Faults) -> Ways {
    let (mut found, mut since) = (Ways::new(), Instant::now());
    wait_until(SOON, &format!("paths after {faults:?}"), || -> Result<()> {
        let now = ways(lab)?;
        if now != found {
            (found, since) = (now, Instant::now());
        }
        for ((from, to), Way { via, .. }) in &found {
            let hops: Vec<&String> = [from].into_iter().chain(via).chain([to]).collect();
            let is_there = hops.windows(2).all(|pair| !faults.cuts(pair[0], pair[1]));
            ensure!(is_there, "{from} reaches {to} via {via:?}");
            ensure!(
                via.iter().all(|name| PUBLIC.contains(&name.as_str())),
                "{from} reaches {to} via {via:?}"
            );
        }
        ensure!(since.elapsed() >= QUIET, "they changed {:?} ago", since.elapsed());
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
    let (_pods, mut connections) = connect_pairs(&lab, STALL).unwrap();
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
        use_steadily(&mut connections).unwrap();
        for (pair, way) in ways(&lab).unwrap() {
            let was = &before[&pair];
            let is_better = way.via.len() < was.via.len() || (was.tcp && !way.tcp);
            assert!(
                way == *was || is_better,
                "round {round} (seed {seed}), {faults:?}: {pair:?} had {was:?} and now has {way:?} without a cause"
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
    for_long(storm);
}
