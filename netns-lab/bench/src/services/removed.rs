//! `removed`: time from marking a backend unready until the last of 8 hosts sends it no new connections.

use std::time::{Duration, Instant};

use anyhow::Result;
use netns_lab::wait_until;
use serde_json::json;

use super::{LABEL, apply, backend, ready, service, service_address};
use crate::Bench;
use crate::cluster::Cluster;
use crate::commits::{Commits, SERVICES};
use crate::report::{Bar, Figure, Row};
use crate::stats::{Samples, ms};

const HOSTS: usize = 8;
const PATIENCE: Duration = Duration::from_secs(20);
/// Pause between two changes, so that no change is in flight.
const PAUSE: Duration = Duration::from_millis(40);

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let cluster = Cluster::start(bench.lab(HOSTS)?)?;
    cluster.one_workload_each()?;
    let name = |index: usize| format!("b{index}");
    for (index, host) in cluster.hosts().iter().enumerate() {
        backend(host, &name(index))?;
    }
    apply(cluster.host(0)?, &[service("web", service_address(0)?, Some(LABEL))])?;
    for host in cluster.hosts() {
        wait_until(PATIENCE, "all backends on all hosts", || {
            let found = host.ctl_json(&["get", "endpoints", "web"])?;
            let listed = found["ports"][0]["backends"].as_array().map_or(0, Vec::len);
            anyhow::ensure!(listed == HOSTS, "{listed} of {HOSTS}");
            host.ctl_ok(&["verify"]).map(drop)
        })?;
    }
    let commits = Commits::watch(cluster.hosts(), SERVICES)?;
    let mut clients = (0..HOSTS).map(|index| cluster.client(index)).collect::<Result<Vec<_>>>()?;
    let mut times = Vec::new();
    for number in 0..bench.plan.service_changes {
        let index = number % HOSTS;
        for is_ready in [false, true] {
            std::thread::sleep(PAUSE);
            commits.drain()?;
            let start = Instant::now();
            clients[index].ask(&ready(&name(index), is_ready))?;
            let took = commits.all(PATIENCE)?.saturating_duration_since(start);
            if !is_ready {
                times.push(ms(took));
            }
        }
    }
    let times = Samples::new(times);
    Ok(Figure {
        setup: format!(
            "{HOSTS} hosts, a switched network, a Service with a backend on each; {} times a backend on each host in \
             turn is marked unready, {} ms after the last change; from just before the request until the last of the \
             {HOSTS} kernels notifies its commit",
            times.len(),
            PAUSE.as_millis()
        ),
        rows: vec![
            Row::with_bar(
                "a backend removed until no host sends to it, p99",
                times.percentile(99.0),
                "ms",
                Bar::AtMost(60.0),
            ),
            Row::context("the same, p50", times.percentile(50.0), "ms"),
        ],
        notes: Vec::new(),
        details: json!({ "removed_ms": times.to_json() }),
    })
}
