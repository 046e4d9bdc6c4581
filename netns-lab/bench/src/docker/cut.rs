//! `cut`: a host with containers is disconnected and reconnected.

use std::collections::BTreeSet;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use netns_lab::wait_until;
use serde_json::json;

use super::ground::{Ground, Pings, ms_between};
use crate::Bench;
use crate::client::{Mac, parse_mac};
use crate::neigh::Watcher;
use crate::report::{Bar, Figure, Row};
use crate::stats::{Samples, ms};

const HOSTS: usize = 3;
const PERIOD: Duration = Duration::from_millis(5);
/// Docker Swarm took up to 38 s.
const TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let ground = Ground::start(bench, HOSTS)?;
    for index in 0..HOSTS {
        ground.run(index, "stays", &[])?;
    }
    let (pinger, _) = ground.workload(0, "pinger")?;
    let container = ground.engine(HOSTS - 1)?.inspect("container", "stays")?;
    let address = container["NetworkSettings"]["Networks"][super::ground::NETWORK]["IPAddress"]
        .as_str()
        .context("a container without an address")?
        .parse()?;
    let host = ground.host(HOSTS - 1)?;
    let (mut dropped, mut healed) = (Vec::new(), Vec::new());
    for _ in 0..bench.plan.docker_cuts {
        let pings = Pings::start(&pinger, address, PERIOD)?;
        pings.answered_after(SystemTime::now(), TIMEOUT)?;
        dropped.push(cut(&ground, host)? / 1000.0);
        let start = SystemTime::now();
        host.link_up()?;
        healed.push(ms_between(start, pings.answered_after(start, TIMEOUT)?)? / 1000.0);
        drop(pings);
        wait_until(TIMEOUT, "the hosts to return to their previous state", || {
            held(&ground, host).map(|all| all.iter().all(|each| !each.is_empty()))
        })?;
    }
    let (dropped, healed) = (Samples::new(dropped), Samples::new(healed));
    Ok(Figure {
        setup: format!(
            "{HOSTS} hosts with a Docker Engine and one container each; h3's link is unplugged until no other kernel has an entry to \
             it, and then plugged in again, {} times; a workload on h1 pings h3's container every {} ms meanwhile. Swarm's \
             overlay: 5.2 to 6.0 s, and 1.4 to 38.5 s",
            bench.plan.docker_cuts,
            PERIOD.as_millis()
        ),
        rows: vec![
            Row::with_bar(
                "a host disconnected until the peers withdraw it, max",
                dropped.max(),
                "s",
                Bar::AtMost(4.0),
            ),
            Row::context("the same, median", dropped.median(), "s"),
            Row::with_bar("healed until its container answers, max", healed.max(), "s", Bar::AtMost(2.0)),
            Row::context("the same, median", healed.median(), "s"),
        ],
        notes: Vec::new(),
        details: json!({"dropped_s": dropped.to_json(), "healed_s": healed.to_json()}),
    })
}

/// Returns the MAC addresses that each other kernel forwards to a host.
fn held(ground: &Ground, host: &netns_lab::Host) -> Result<Vec<BTreeSet<Mac>>> {
    let destination = host.address()?.to_string();
    let others = ground.lab.hosts().iter().filter(|other| other.name() != host.name());
    others
        .map(|other| {
            let dump = other.bridge_json(&["fdb", "show"])?;
            let to_host =
                dump.as_array().into_iter().flatten().filter(|entry| entry["dst"] == destination.as_str());
            to_host.filter_map(|entry| entry["mac"].as_str()).map(parse_mac_of).collect()
        })
        .collect()
}

fn parse_mac_of(text: &str) -> Result<Mac> {
    parse_mac(text).with_context(|| format!("invalid MAC address {text:?}"))
}

/// Returns the milliseconds until the other kernels hold no entry of the host.
fn cut(ground: &Ground, host: &netns_lab::Host) -> Result<f64> {
    let others: Vec<_> = ground.lab.hosts().iter().filter(|other| other.name() != host.name()).collect();
    let destination = host.address()?;
    let watcher = Watcher::start(&others)?;
    let mut held = held(ground, host)?;
    let start = Instant::now();
    host.link_down()?;
    let mut last = start;
    while held.iter().any(|entries| !entries.is_empty()) {
        let Some(seen) = watcher.next(start + TIMEOUT)? else {
            bail!("{TIMEOUT:?} after the disconnection the other kernels still hold {held:?}")
        };
        let entries = held.get_mut(seen.host).context("a notification of an unknown host")?;
        if seen.change.destination == destination {
            if seen.change.added {
                entries.insert(seen.change.mac);
            } else if entries.remove(&seen.change.mac) {
                last = seen.at;
            }
        }
    }
    Ok(ms(last.saturating_duration_since(start)))
}
