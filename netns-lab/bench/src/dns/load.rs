//! Query load with dnsperf, and concurrent updates.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use netns_lab::{Host, Workload};

use super::super::Bench;
use super::super::client;
use super::super::cluster::{Cluster, NETWORK};
use super::super::stats::Samples;
use super::CLIENT;

/// Interval between two updates: 10,000 per minute.
const PACE: Duration = Duration::from_micros(6000);
/// Number of clients that make updates; each mostly waits for the kernel.
const CLIENTS: u32 = 4;

/// Results of dnsperf.
pub(super) struct Found {
    pub(super) rate: f64,
    pub(super) lost: f64,
    /// Latency of each query in milliseconds, if dnsperf reported it.
    pub(super) latencies: Vec<f64>,
}

/// The query rate of dnsperf.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Pace {
    /// As fast as answers arrive.
    Full,
    /// As fast as answers arrive, with a report for each query, which costs the client some time.
    Told,
    /// At this rate per second, with a report for each query.
    Rate(f64),
}

/// Runs dnsperf.
pub(super) fn run(host: &Host, questions: &Path, port: u16, seconds: u64, pace: Pace) -> Result<Found> {
    let told = host.dir().join("dnsperf");
    let questions = questions.display();
    let pace = match pace {
        Pace::Full => String::new(),
        Pace::Told => "-v".to_owned(),
        Pace::Rate(rate) => format!("-v -Q {rate:.0}"),
    };
    // Write to a file, because a reader of a pipe would need CPU time.
    let command = format!(
        "exec taskset -c {CLIENT} dnsperf -s 127.0.0.1 -p {port} -d {questions} -l {seconds} -c 8 -q 200 {pace} > {}",
        told.display()
    );
    host.exec_ok(["sh", "-c", &command])?;
    let text = fs::read_to_string(&told)?;
    fs::remove_file(&told)?;
    let number = |label: &str| {
        let line = text.lines().find(|line| line.trim_start().starts_with(label));
        let value = line.and_then(|line| line.rsplit_once(':')?.1.split_whitespace().next()?.parse().ok());
        value.with_context(|| format!("dnsperf did not print {label:?}: {text}"))
    };
    let told =
        text.lines().filter_map(|line| line.strip_prefix("> ")?.rsplit(' ').next()?.parse::<f64>().ok());
    let latencies = told.map(|seconds| seconds * 1000.0).collect();
    Ok(Found { rate: number("Queries per second")?, lost: number("Queries lost")?, latencies })
}

/// Results of a run with updates.
pub(super) struct Updated {
    pub(super) lost: f64,
    pub(super) p99_ms: f64,
    pub(super) updates_a_minute: f64,
}

/// Queries at this rate while endpoints of the second host are attached and detached.
pub(super) fn with_updates(
    cluster: &Cluster,
    questions: &Path,
    port: u16,
    rate: f64,
    bench: &Bench,
) -> Result<Updated> {
    let workloads = cluster.host(1)?.bare_workloads("u", CLIENTS as usize)?;
    let ending = AtomicBool::new(false);
    let seconds = bench.plan.settle.as_secs().max(1);
    let update = &|workload: &Workload| -> Result<u32> {
        let mut client = cluster.client(1)?;
        let (start, mut count) = (Instant::now(), 0);
        while !ending.load(Ordering::Relaxed) {
            let request = match count % 2 {
                0 => client::attach(workload.name(), NETWORK, workload.path(), None),
                _ => client::detach(workload.name()),
            };
            client.ask(&request)?;
            count += 1;
            let due = start + PACE * CLIENTS * count;
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        Ok(count)
    };
    thread::scope(|scope| {
        let start = Instant::now();
        let updates: Vec<_> =
            workloads.iter().map(|workload| scope.spawn(move || update(workload))).collect();
        let found = run(cluster.host(0)?, questions, port, seconds, Pace::Rate(rate));
        ending.store(true, Ordering::Relaxed);
        let mut count = 0;
        for thread in updates {
            count += thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        let found = found?;
        let p99_ms = Samples::new(found.latencies).percentile(99.0);
        let updates_a_minute = f64::from(count) / start.elapsed().as_secs_f64() * 60.0;
        Ok(Updated { lost: found.lost, p99_ms, updates_a_minute })
    })
}
