//! `link`: time from a container's link on one Engine until the other hosts' kernels have its entry.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Result, bail};
use serde_json::json;

use super::ground::{Ground, ms_between};
use super::links::{ENDPOINTS, Links};
use crate::Bench;
use crate::neigh::Watcher;
use crate::report::{Bar, Figure, Row};
use crate::stats::{Samples, ms};

const HOSTS: usize = 3;
const TIMEOUT: Duration = Duration::from_secs(20);

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let ground = Ground::start(bench, HOSTS)?;
    for index in 0..HOSTS {
        ground.run(index, "stays", &[])?;
    }
    let others: Vec<_> = ground.lab.hosts().iter().skip(1).collect();
    let destination = ground.host(0)?.address()?;
    let links = Links::start(ground.host(0)?, ENDPOINTS)?;
    let watcher = Watcher::start(&others)?;
    let (mut from_link, mut from_run) = (Vec::new(), Vec::new());
    for number in 0..bench.plan.docker_links {
        let name = format!("c{number}");
        watcher.drain()?;
        let called = (Instant::now(), SystemTime::now());
        ground.run(0, &name, &[])?;
        let link = links.wait_up(called.1)?;
        let deadline = Instant::now() + TIMEOUT;
        let mut last = None;
        let mut waiting: Vec<usize> = (0..others.len()).collect();
        while !waiting.is_empty() {
            let Some(seen) = watcher.next(deadline)? else {
                bail!("no entry of container {number} on hosts {waiting:?} within {TIMEOUT:?}")
            };
            if seen.change.added && seen.change.destination == destination && seen.change.mac != [0; 6] {
                waiting.retain(|host| *host != seen.host);
                last = last.max(Some(seen.at));
            }
        }
        let held = last.unwrap_or(called.0).saturating_duration_since(called.0);
        from_run.push(ms(held));
        from_link.push(ms_between(link.created, called.1 + held).unwrap_or(0.0));
        ground.remove(0, &name)?;
    }
    let (from_link, from_run) = (Samples::new(from_link), Samples::new(from_run));
    Ok(Figure {
        setup: format!(
            "{HOSTS} hosts with a Docker Engine and one container each; on h1 {} containers are started and removed one after another; \
             from the kernel's notification of the container's veth pair on h1 until the notification of the entry on \
             the last other host. Swarm's overlay: 108 to 117 ms, and 331 to 360 ms from the call",
            bench.plan.docker_links
        ),
        rows: vec![
            Row::with_bar(
                "link until the peers' kernels have its entry, p50",
                from_link.percentile(50.0),
                "ms",
                Bar::AtMost(15.0),
            ),
            Row::context("the same, p99", from_link.percentile(99.0), "ms"),
            Row::context(
                "call of `docker run` until the peers' kernels have its entry, p50",
                from_run.percentile(50.0),
                "ms",
            ),
        ],
        notes: Vec::new(),
        details: json!({"from_link_ms": from_link.to_json(), "from_call_ms": from_run.to_json()}),
    })
}
