//! `bulk`: a thousand endpoints on one host, and how soon all others have them.
//!
//! A thousand attaches cannot be made at one moment: each makes a pair of devices, which takes the
//! kernel and the daemon more time than to announce it. So there are two numbers. What the bar is
//! for is measured with a daemon that makes its endpoints while it is cut off, and is killed and
//! started again where it can reach the others: it announces all of them together, in one table.
//! (Without the new start each of the others notices the end of the cut at a moment of its own,
//! hundreds of milliseconds apart, and that would be measured.) The other is what callers see who
//! attach a thousand as fast as they can.

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

/// The host that they are on.
const SENDER: usize = 0;
const AT_ONCE: usize = 32;
const TIMEOUT: Duration = Duration::from_secs(60);

/// When the entries came, in milliseconds since something.
struct Arrival {
    first: f64,
    last: f64,
    /// The longest time that one kernel took from its first to its last.
    slowest: f64,
}

/// A thousand attaches by callers.
struct Attached {
    rate: f64,
    p50: f64,
    lag: f64,
}

/// A thousand announced by a daemon that has just started.
struct Announced {
    /// Since the start of its process.
    arrival: Arrival,
    /// When it answered on its socket.
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
        // In this order: it leaves the sender the blocks of addresses, which it cannot claim alone.
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
             Docker's are), {} rounds, medians. Announced together: h1 is cut off until the others have declared it \
             dead, makes the endpoints, its daemon is killed, the cut ends, and its daemon starts; from the first \
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
            Row::context("the slowest of 7 kernels, its first to its last", median(&slowest), "ms"),
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

/// Docker's default. Else each interface sends half a dozen multicasts (address detection, MLD, router
/// solicitation), each of which the bridge copies to all the others: millions of packets.
pub(crate) fn without_ipv6(workload: &Workload) -> Result<()> {
    let written = workload.run(|| fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"))?;
    written.with_context(|| format!("cannot turn IPv6 off in {}", workload.netns_name()))
}

/// As fast as callers can.
fn attach(cluster: &Cluster, workloads: &[Workload]) -> Result<Attached> {
    let watcher = cluster.watch_others(SENDER)?;
    let start = Instant::now();
    let times = cluster.attach_all(SENDER, workloads, mac, AT_ONCE)?;
    let took = start.elapsed();
    let arrival = wait_for_all(&watcher, workloads.len(), start)?;
    Ok(Attached {
        rate: workloads.len() as f64 / took.as_secs_f64(),
        p50: Samples::new(times.into_iter().map(ms).collect()).median(),
        // The last one to be answered need not be the last one to arrive.
        lag: (arrival.last - ms(took)).max(0.0),
    })
}

/// All at once, by a new daemon.
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
    // The watcher keeps what it sees meanwhile.
    let up = wait_for_socket(sender, start)?;
    Ok(Announced { up, arrival: wait_for_all(&watcher, workloads.len(), start)? })
}

/// Looks more often than `wait_until`.
fn wait_for_socket(host: &Host, start: Instant) -> Result<f64> {
    while start.elapsed() < TIMEOUT {
        if Client::connect(&host.socket()).is_ok() {
            return Ok(ms(start.elapsed()));
        }
        thread::sleep(Duration::from_millis(1));
    }
    bail!("{TIMEOUT:?} after its start ovld on {} does not answer", host.name())
}

fn detach(cluster: &Cluster, workloads: &[Workload]) -> Result<()> {
    cluster.detach_all(SENDER, workloads, AT_ONCE)?;
    cluster.wait_each_holds(&(1..HOSTS).collect::<Vec<_>>(), SENDER, 1)
}

/// Until every other kernel has had all of them.
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
    ensure!(left.iter().all(|left| *left == 0), "of {count} entries the other kernels lack {left:?} still");
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
