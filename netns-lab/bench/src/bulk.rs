//! `bulk`: time until all other hosts have a thousand endpoints of one host.
//!
//! A thousand attaches cannot happen at once: each creates a veth pair, which takes more time than to
//! announce it. So there are two measurements.
//!
//! The one with the bar uses a daemon that creates its endpoints while it is disconnected, is killed, and is
//! started again with the network healed: it announces all of them together, in one table. (Without the
//! restart, the other hosts would notice the healing hundreds of milliseconds apart, and that would be
//! measured.)
//!
//! The other measurement shows what callers see that attach a thousand endpoints as fast as they can.

use std::collections::BTreeSet;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use netns_lab::{Host, Workload, wait_until};
use serde_json::json;

use super::Bench;
use super::announce::HOSTS;
use super::client::{Client, Mac};
use super::cluster::Cluster;
use super::neigh::Watcher;
use super::report::{Bar, Figure, Row};
use super::stats::{Samples, ms, round};

/// Index of the host with the endpoints.
const SENDER: usize = 0;
const AT_ONCE: usize = 32;
const TIMEOUT: Duration = Duration::from_secs(60);

/// Arrival times of entries, in milliseconds.
struct Arrival {
    first: f64,
    last: f64,
    /// Longest time from the first to the last entry in one kernel.
    slowest: f64,
}

/// Result of a thousand attaches by callers.
struct Attached {
    rate: f64,
    p50: f64,
    lag: f64,
}

/// Result of a thousand endpoints announced by a daemon that has just started.
struct Announced {
    /// Arrival since the start of its process.
    arrival: Arrival,
    /// Time at which it answered on its socket.
    up: f64,
}

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let count = bench.plan.bulk;
    let cluster = Cluster::start(bench.lab(HOSTS)?)?;
    cluster.one_workload_each()?;
    let workloads = cluster.host(SENDER)?.bare_workloads("e", count)?;
    workloads.iter().try_for_each(without_ipv6)?;
    let (mut attached, mut announced) = (Vec::new(), Vec::new());
    for _ in 0..bench.plan.bulk_rounds {
        // In this order: the attaches give the sender its address blocks, which it cannot claim while
        // disconnected.
        attached.push(attach(&cluster, &workloads)?);
        detach(&cluster, &workloads)?;
        announced.push(announce(&cluster, &workloads)?);
        detach(&cluster, &workloads)?;
    }
    Ok(figure(count, &attached, &announced))
}

fn figure(count: usize, attached: &[Attached], announced: &[Announced]) -> Figure {
    let median = |values: &[f64]| Samples::new(values.to_vec()).median();
    let of_attached = |of: fn(&Attached) -> f64| attached.iter().map(of).map(round).collect::<Vec<_>>();
    let of_announced = |of: fn(&Announced) -> f64| announced.iter().map(of).map(round).collect::<Vec<_>>();
    let spans = of_announced(|each| each.arrival.last - each.arrival.first);
    let slowest = of_announced(|each| each.arrival.slowest);
    let since_up = of_announced(|each| each.arrival.last - each.up);
    let since_start = of_announced(|each| each.arrival.last);
    let rates = of_attached(|each| each.rate);
    let lags = of_attached(|each| each.lag);
    Figure {
        setup: format!(
            "{HOSTS} hosts, one network with an endpoint on each, {count} more on h1 (namespaces without IPv6, as \
             Docker's are), {} rounds, medians. Announced together: h1 is disconnected until the other hosts have declared it \
             dead, creates the endpoints, its daemon is killed, h1 is reconnected, and its daemon starts; from the first \
             entry in any other kernel until the last one in the last of the {}. By attaches: {AT_ONCE} at a time. \
             FRR 8.4 EVPN with a route reflector, 1,000 MACs: 276 ms",
            announced.len(),
            HOSTS - 1
        ),
        rows: vec![
            Row::with_bar(
                &format!("{count} announced together, first entry to last"),
                median(&spans),
                "ms",
                Bar::AtMost(150.0),
            ),
            Row::context("the slowest of 7 kernels, first to last entry", median(&slowest), "ms"),
            Row::context("from when h1's socket answers to the last entry", median(&since_up), "ms"),
            Row::context("from the start of h1's process to the last entry", median(&since_start), "ms"),
            Row::context("by attaches: attached", median(&rates), "a second"),
            Row::context("by attaches: last reply to last entry", median(&lags), "ms"),
        ],
        notes: Vec::new(),
        details: json!({
            "announced_ms": spans,
            "slowest_kernel_ms": slowest,
            "since_socket_ms": since_up,
            "since_start_ms": since_start,
            "attaches_a_second": rates,
            "attach_p50_ms": of_attached(|each| each.p50),
            "lag_ms": lags,
        }),
    }
}

/// Disables IPv6 in a workload, which is Docker's default. Otherwise each interface sends half a dozen
/// multicasts (duplicate address detection, MLD, router solicitation), and the bridge copies each to all
/// others: millions of packets.
pub(crate) fn without_ipv6(workload: &Workload) -> Result<()> {
    let written = workload.run(|| fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"))?;
    written.with_context(|| format!("cannot disable IPv6 in {}", workload.netns_name()))
}

/// Attaches all workloads as fast as concurrent callers can.
fn attach(cluster: &Cluster, workloads: &[Workload]) -> Result<Attached> {
    let watcher = cluster.watch_others(SENDER)?;
    let start = Instant::now();
    let times = cluster.attach_all(SENDER, workloads, mac, AT_ONCE)?;
    let took = start.elapsed();
    let arrival = wait_for_all(&watcher, workloads.len(), start)?;
    Ok(Attached {
        rate: workloads.len() as f64 / took.as_secs_f64(),
        p50: Samples::new(times.into_iter().map(ms).collect()).median(),
        // The last reply need not belong to the last entry.
        lag: (arrival.last - ms(took)).max(0.0),
    })
}

/// Announces all endpoints at once, from a restarted daemon.
fn announce(cluster: &Cluster, workloads: &[Workload]) -> Result<Announced> {
    let (sender, rest) = cluster.hosts().split_first().context("no hosts")?;
    let rest_names: Vec<&str> = rest.iter().map(|host| host.name()).collect();
    cluster.lab.partition(&[&[sender.name()], &rest_names])?;
    for host in rest {
        let what = format!("{} dead on {}", sender.name(), host.name());
        wait_until(TIMEOUT, &what, || -> Result<bool> {
            let peers = host.ctl_json(&["peers"])?;
            let found = peers.as_array().into_iter().flatten().find(|peer| peer["name"] == sender.name());
            Ok(found.is_some_and(|peer| peer["state"] == "dead"))
        })?;
    }
    cluster.attach_all(SENDER, workloads, mac, AT_ONCE)?;
    sender.kill9()?;
    cluster.lab.heal()?;

    let watcher = cluster.watch_others(SENDER)?;
    let start = Instant::now();
    sender.start()?;
    // The watcher buffers notifications meanwhile.
    let up = wait_for_socket(sender, start)?;
    Ok(Announced { up, arrival: wait_for_all(&watcher, workloads.len(), start)? })
}

/// Waits until the daemon answers. Polls more often than `wait_until`.
fn wait_for_socket(host: &Host, start: Instant) -> Result<f64> {
    while start.elapsed() < TIMEOUT {
        if Client::connect(&host.socket()).is_ok() {
            return Ok(ms(start.elapsed()));
        }
        thread::sleep(Duration::from_millis(1));
    }
    bail!("ovld on {} does not answer within {TIMEOUT:?} of its start", host.name())
}

fn detach(cluster: &Cluster, workloads: &[Workload]) -> Result<()> {
    cluster.detach_all(SENDER, workloads, AT_ONCE)?;
    cluster.wait_each_holds(&(1..HOSTS).collect::<Vec<_>>(), SENDER, 1)
}

/// Waits until every other kernel has received all entries.
fn wait_for_all(watcher: &Watcher, count: usize, start: Instant) -> Result<Arrival> {
    let mut missing: Vec<BTreeSet<Mac>> = vec![(0..count).map(mac).collect(); HOSTS - 1];
    let mut spans: Vec<Option<(Instant, Instant)>> = vec![None; HOSTS - 1];
    let deadline = Instant::now() + TIMEOUT;
    while missing.iter().any(|each| !each.is_empty()) {
        let Some(seen) = watcher.next(deadline)? else { break };
        if seen.change.added && missing[seen.host].remove(&seen.change.mac) {
            let (_, last) = spans[seen.host].get_or_insert((seen.at, seen.at));
            *last = seen.at;
        }
    }
    let left: Vec<usize> = missing.iter().map(BTreeSet::len).collect();
    ensure!(left.iter().all(|left| *left == 0), "of {count} entries, the other kernels still lack {left:?}");
    let since = |at: Instant| ms(at.saturating_duration_since(start));
    let spans: Vec<(f64, f64)> =
        spans.into_iter().flatten().map(|(first, last)| (since(first), since(last))).collect();
    let all = |of: fn(&(f64, f64)) -> f64| Samples::new(spans.iter().map(of).collect());
    Ok(Arrival {
        first: all(|span| span.0).min(),
        last: all(|span| span.1).max(),
        slowest: all(|span| span.1 - span.0).max(),
    })
}

fn mac(number: usize) -> Mac {
    let [.., high, low] = (number as u64).to_be_bytes();
    [2, 0xbf, 0, 0, high, low]
}
