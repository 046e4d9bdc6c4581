//! `bulk`: a thousand endpoints.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use netns_lab::{Signal, Workload};
use serde_json::json;

use super::announce::HOSTS;
use super::client::Mac;
use super::cluster::Cluster;
use super::neigh::Watcher;
use super::report::{Bar, Figure, Row};
use super::stats::ms;
use super::Bench;

const TIMEOUT: Duration = Duration::from_secs(60);
const AT_ONCE: usize = 32;

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let cluster = Cluster::start(bench.lab(HOSTS)?)?;
    cluster.one_workload_each()?;
    let workloads = cluster.host(0)?.bare_workloads("e", bench.plan.bulk)?;
    let mut lines = Vec::new();
    for round in 0..bench.plan.bulk_rounds {
        for freeze in [false, true] {
            let start = Instant::now();
            let text = one(&cluster, &workloads, freeze)?;
            eprintln!("round {round} freeze {freeze}: {text}; attached in all {:?}", start.elapsed());
            lines.push(text);
            let start = Instant::now();
            cluster.detach_all(0, &workloads, AT_ONCE)?;
            cluster.wait_each_holds(&(1..HOSTS).collect::<Vec<_>>(), 0, 1)?;
            eprintln!("detached in {:?}", start.elapsed());
        }
    }
    Ok(Figure { setup: String::new(), rows: vec![Row::with_bar("x", 0.0, "", Bar::AtMost(1.0))], notes: lines, details: json!({}) })
}

fn one(cluster: &Cluster, workloads: &[Workload], freeze: bool) -> Result<String> {
    let watcher = cluster.watch_others(0)?;
    if freeze {
        for host in &cluster.hosts()[1..] { host.signal(Signal::SIGSTOP)?; }
    }
    let start = Instant::now();
    let times = cluster.attach_all(0, workloads, mac, AT_ONCE)?;
    let attached = start.elapsed();
    let mut zero = start;
    if freeze {
        zero = Instant::now();
        for host in &cluster.hosts()[1..] { host.signal(Signal::SIGCONT)?; }
    }
    let (first, each) = wait(&watcher, workloads.len(), zero)?;
    Ok(format!("attached {} in {attached:?}, first entry {first:.1} ms, last of each host {each:.1?}", times.len()))
}

fn wait(watcher: &Watcher, count: usize, zero: Instant) -> Result<(f64, Vec<f64>)> {
    let mut missing: Vec<BTreeSet<Mac>> = vec![(0..count).map(mac).collect(); HOSTS - 1];
    let mut first = f64::NAN;
    let mut last = vec![f64::NAN; HOSTS - 1];
    while missing.iter().any(|each| !each.is_empty()) {
        let seen = watcher.next(zero + TIMEOUT)?;
        let Some(seen) = seen else { break };
        if seen.change.added && missing[seen.host].remove(&seen.change.mac) {
            let at = ms(seen.at.saturating_duration_since(zero));
            if first.is_nan() { first = at; }
            last[seen.host] = at;
        }
    }
    let left: Vec<usize> = missing.iter().map(BTreeSet::len).collect();
    ensure!(left.iter().all(|left| *left == 0), "{left:?} missing after {TIMEOUT:?}");
    Ok((first, last))
}

fn mac(number: usize) -> Mac {
    let [.., high, low] = (number as u64).to_be_bytes();
    [2, 0xbf, 0, 0, high, low]
}
