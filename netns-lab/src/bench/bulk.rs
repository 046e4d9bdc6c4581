//! `bulk`: a thousand endpoints on one host, and how soon all others have them.
//!
//! A thousand attaches cannot be made at one moment: each makes a pair of devices, which takes the
//! kernel and the daemon more time than to announce it. So there are two numbers. What the bar is
//! for is measured with a host that is cut off while it makes its endpoints, so that all of them
//! are announced together, in one table, when the cut ends. The other is what a caller sees who
//! attaches a thousand as fast as he can.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use netns_lab::{Workload, wait_until};
use serde_json::json;

use super::Bench;
use super::announce::HOSTS;
use super::client::Mac;
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

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let count = bench.plan.bulk;
    let cluster = Cluster::start(bench.lab(HOSTS)?)?;
    cluster.one_workload_each()?;
    let workloads = cluster.host(SENDER)?.bare_workloads("e", count)?;
    workloads.iter().try_for_each(without_ipv6)?;
    let (mut attached, mut announced, mut healed) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.plan.bulk_rounds {
        // In this order: it leaves the sender the blocks of addresses, which it cannot claim alone.
        attached.push(attach(&cluster, &workloads)?);
        detach(&cluster, &workloads)?;
        let arrival = announce(&cluster, &workloads)?;
        announced.push(arrival.last - arrival.first);
        healed.push(arrival);
        detach(&cluster, &workloads)?;
    }

    let median = |values: Vec<f64>| Samples::new(values).median();
    let of_attached = |of: fn(&Attached) -> f64| attached.iter().map(of).collect::<Vec<_>>();
    let of_healed = |of: fn(&Arrival) -> f64| healed.iter().map(of).collect::<Vec<_>>();
    let rounded = |values: Vec<f64>| values.into_iter().map(round).collect::<Vec<_>>();
    Ok(Figure {
        setup: format!(
            "{HOSTS} hosts, one network with an endpoint on each, {count} more on h1 (namespaces without IPv6, as Docker's \
             are), {} rounds, medians. Announced \
             together: h1 is cut off from all others until they have declared it dead, makes the endpoints, and the \
             cut ends; from the first entry in any other kernel until the last one in the last of the {}. By \
             attaches: {AT_ONCE} at a time. FRR 8.4 EVPN with a route reflector, 1,000 MACs: 276 ms",
            bench.plan.bulk_rounds,
            HOSTS - 1
        ),
        rows: vec![
            Row::with_bar(
                &format!("{count} announced together, first entry to last"),
                median(announced.clone()),
                "ms",
                Bar::AtMost(150.0),
            ),
            Row::context(
                "the slowest of 7 kernels, its first to its last",
                median(of_healed(|each| each.slowest)),
                "ms",
            ),
            Row::context(
                "from the end of the cut, reunion included",
                median(of_healed(|each| each.last)),
                "ms",
            ),
            Row::context("by attaches: attached", median(of_attached(|each| each.rate)), "a second"),
            Row::context(
                "by attaches: last reply to last kernel",
                median(of_attached(|each| each.lag)),
                "ms",
            ),
        ],
        notes: Vec::new(),
        details: json!({
            "announced_ms": rounded(announced),
            "slowest_kernel_ms": rounded(of_healed(|each| each.slowest)),
            "from_end_of_cut_ms": rounded(of_healed(|each| each.last)),
            "attaches_a_second": rounded(of_attached(|each| each.rate)),
            "attach_p50_ms": rounded(of_attached(|each| each.p50)),
            "lag_ms": rounded(of_attached(|each| each.lag)),
        }),
    })
}

/// Docker's default. Else each interface sends half a dozen multicasts (address detection, MLD, router
/// solicitation), each of which the bridge copies to all the others: millions of packets.
fn without_ipv6(workload: &Workload) -> Result<()> {
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
        lag: arrival.last - ms(took),
    })
}

/// All at once, after a cut.
fn announce(cluster: &Cluster, workloads: &[Workload]) -> Result<Arrival> {
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
    let watcher = cluster.watch_others(SENDER)?;
    let start = Instant::now();
    cluster.lab.heal()?;
    wait_for_all(&watcher, workloads.len(), start)
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
