//! `dead`: time until the entries of a lost host are withdrawn on the other hosts.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;

use super::Bench;
use super::cluster::{Cluster, Entry};
use super::report::{Bar, Figure, Row};
use super::stats::{Samples, ms};

const HOSTS: usize = 3;
/// Number of endpoints on each host.
const ENDPOINTS: usize = 10;
/// Docker Swarm took up to 38 s.
const TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let cluster = Cluster::start(bench.lab(HOSTS)?)?;
    for index in 0..HOSTS {
        for number in 0..ENDPOINTS {
            cluster.workload(index, &format!("r0h{}e{number}", index + 1))?;
        }
    }
    let mut times = Vec::new();
    for round in 1..=bench.plan.deaths {
        // Lose each host in turn, including the one through which the others joined.
        let index = HOSTS - 1 - (round - 1) % HOSTS;
        times.push(lose(&cluster, index)?);
        if round < bench.plan.deaths {
            bring_back(&cluster, index, round)?;
        }
    }

    let seconds = Samples::new(times.iter().map(|time| time / 1000.0).collect());
    Ok(Figure {
        setup: format!(
            "{HOSTS} hosts with {ENDPOINTS} endpoints each, default settings; each host in turn loses its daemon \
             (SIGKILL), its link, its namespace and its workloads, {} times; from just before that until the last \
             entry to it is deleted from the last other kernel. Swarm: 5.2 to 6.0 s",
            bench.plan.deaths
        ),
        rows: vec![
            Row::with_bar("entries of a lost host withdrawn, max", seconds.max(), "s", Bar::AtMost(4.0)),
            Row::context("entries of a lost host withdrawn, median", seconds.median(), "s"),
        ],
        notes: Vec::new(),
        details: json!({"withdrawn_s": times.iter().map(|time| time / 1000.0).collect::<Vec<_>>()}),
    })
}

/// Returns the milliseconds until the other kernels hold no entry of the host.
fn lose(cluster: &Cluster, index: usize) -> Result<f64> {
    let host = cluster.host(index)?;
    let destination = host.address()?;
    let others: Vec<usize> = (0..HOSTS).filter(|other| *other != index).collect();
    cluster.wait_each_holds(&others, index, ENDPOINTS)?;
    let watcher = cluster.watch_others(index)?;
    let mut held: Vec<BTreeSet<Entry>> =
        others.iter().map(|other| cluster.entries(*other, destination)).collect::<Result<_>>()?;

    let start = Instant::now();
    host.destroy()?;
    let mut last = start;
    while held.iter().any(|entries| !entries.is_empty()) {
        let Some(seen) = watcher.next(start + TIMEOUT)? else {
            let left: Vec<usize> = held.iter().map(BTreeSet::len).collect();
            bail!(
                "{TIMEOUT:?} after the loss of {} the other kernels still hold {left:?} entries",
                host.name()
            );
        };
        let entry = (seen.change.mac, seen.change.destination);
        let entries = held.get_mut(seen.host).context("a notification of an unknown host")?;
        if seen.change.added {
            if entry.1 == destination {
                entries.insert(entry);
            }
        } else if entries.remove(&entry) {
            last = seen.at;
        }
    }
    for other in others {
        let left = cluster.entries(other, destination)?;
        ensure!(left.is_empty(), "{} entries of {} came back on h{}", left.len(), host.name(), other + 1);
    }
    Ok(ms(last.saturating_duration_since(start)))
}

/// Restores the host, with endpoints of new names: the previous ones are lost.
fn bring_back(cluster: &Cluster, index: usize, round: usize) -> Result<()> {
    cluster.host(index)?.restore()?;
    cluster.lab.start_all()?;
    for number in 0..ENDPOINTS {
        cluster.workload(index, &format!("r{round}h{}e{number}", index + 1))?;
    }
    Ok(())
}
