//! `idle`: resource usage of an idle daemon.

use std::fs;
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};
use netns_lab::Host;
use serde_json::json;

use super::Bench;
use super::cluster::Cluster;
use super::report::{Bar, Figure, Row};
use super::stats::{Samples, round};

const HOSTS: usize = 3;

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let cluster = Cluster::start(bench.lab(HOSTS)?)?;
    for index in 0..HOSTS {
        for name in ["a", "b"] {
            cluster.workload(index, &format!("h{}{name}", index + 1))?;
        }
    }
    thread::sleep(bench.plan.settle);

    let start = Instant::now();
    let before = cluster.hosts().iter().map(Use::of).collect::<Result<Vec<_>>>()?;
    thread::sleep(bench.plan.idle);
    let after = cluster.hosts().iter().map(Use::of).collect::<Result<Vec<_>>>()?;
    let window = start.elapsed().as_secs_f64();

    let pairs = || before.iter().zip(&after);
    let percent: Vec<f64> =
        pairs().map(|(before, after)| (after.cpu_s - before.cpu_s) / window * 100.0).collect();
    let wakeups: Vec<f64> =
        pairs().map(|(before, after)| (after.switches - before.switches) / window).collect();
    let resident = Samples::new(after.iter().map(|each| each.rss_mib).collect());
    let proportional = Samples::new(after.iter().map(|each| each.pss_mib).collect());
    let processor = Samples::new(percent.clone());
    Ok(Figure {
        setup: format!(
            "{HOSTS} hosts, one network, two endpoints on each host; {} s after the last attach, over {} s; the \
             worst of the {HOSTS} daemons. Pss counts shared pages of the binary once",
            bench.plan.settle.as_secs(),
            bench.plan.idle.as_secs()
        ),
        rows: vec![
            Row::with_bar("resident memory", resident.max(), "MiB", Bar::AtMost(16.0)),
            Row::with_bar("processor", processor.max(), "% of a core", Bar::AtMost(0.5)),
            Row::context("proportional memory (Pss)", proportional.max(), "MiB"),
            Row::context("voluntary context switches", Samples::new(wakeups.clone()).max(), "a second"),
        ],
        notes: Vec::new(),
        details: json!({
            "rss_mib": after.iter().map(|each| round(each.rss_mib)).collect::<Vec<_>>(),
            "pss_mib": after.iter().map(|each| round(each.pss_mib)).collect::<Vec<_>>(),
            "cpu_percent": percent,
            "waits_per_s": wakeups,
            "threads": after.iter().map(|each| each.threads).collect::<Vec<_>>(),
        }),
    })
}

/// The resource usage of a daemon so far.
pub(crate) struct Use {
    pub(crate) rss_mib: f64,
    pss_mib: f64,
    pub(crate) cpu_s: f64,
    switches: f64,
    threads: usize,
    pub(crate) descriptors: usize,
}

impl Use {
    pub(crate) fn of(host: &Host) -> Result<Self> {
        let pid = host.pid().with_context(|| format!("ovld is not running on {}", host.name()))?;
        let mut switches = 0.0;
        let mut threads = 0;
        for task in fs::read_dir(format!("/proc/{pid}/task"))? {
            switches += field(&task?.path().join("status"), "voluntary_ctxt_switches:")?;
            threads += 1;
        }
        Ok(Use {
            rss_mib: host.rss_kib()? as f64 / 1024.0,
            pss_mib: field(format!("/proc/{pid}/smaps_rollup").as_ref(), "Pss:")? / 1024.0,
            cpu_s: host.cpu_time()?.as_secs_f64(),
            switches,
            threads,
            descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
        })
    }
}

/// Reads the number after a field name at the start of a line of a file in /proc.
pub(crate) fn field(path: &std::path::Path, name: &str) -> Result<f64> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
        .with_context(|| format!("no {name} in {}", path.display()))
}
