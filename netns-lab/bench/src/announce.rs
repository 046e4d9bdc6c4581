//! `announce`: time from an attach on one of 8 hosts until the last of the other 7 kernels has the entry.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::Bench;
use super::client::{self, Client, Mac, mac_text};
use super::cluster::{Cluster, NETWORK};
use super::neigh::Watcher;
use super::report::{Bar, Figure, Row};
use super::stats::{Samples, ms};

pub(crate) const HOSTS: usize = 8;
/// Exceeded only in case of a fault.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Pause for the kernel's work after a detach (deleting a veth pair takes about 20 ms).
const PAUSE: Duration = Duration::from_millis(40);

/// Number of slowest attaches to list, so that their cause can be found in the daemons' logs.
const LISTED: usize = 5;

/// The times of one attach, in milliseconds since just before the request was written.
struct Sample {
    first: f64,
    last: f64,
    reply: f64,
}

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let cluster = Cluster::start(bench.lab(HOSTS)?)?;
    cluster.one_workload_each()?;
    // One namespace for each host is enough: a detach restores it.
    let namespaces =
        cluster.hosts().iter().map(|host| host.workload("announced")).collect::<Result<Vec<_>>>()?;
    let mut clients = (0..HOSTS).map(|index| cluster.client(index)).collect::<Result<Vec<_>>>()?;
    let addresses = cluster.hosts().iter().map(|host| host.address()).collect::<Result<Vec<IpAddr>>>()?;
    let watcher = Watcher::start(&cluster.hosts().iter().collect::<Vec<_>>())?;

    let mut samples = Vec::new();
    for number in 0..bench.plan.announces {
        let index = number % HOSTS;
        let run = Run {
            index,
            client: &mut clients[index],
            watcher: &watcher,
            mac: mac_of(number),
            destination: addresses[index],
        };
        let name = format!("e{number}");
        samples.push(run.attach_and_detach(&name, namespaces[index].path())?);
        thread::sleep(PAUSE);
        watcher.drain()?;
    }
    Ok(figure(&samples))
}

fn mac_of(number: usize) -> Mac {
    let [.., high, low] = (number as u64).to_be_bytes();
    [2, 0xbe, 0, 0, high, low]
}

/// One attach and its propagation to the other hosts.
struct Run<'a> {
    index: usize,
    client: &'a mut Client,
    watcher: &'a Watcher,
    mac: Mac,
    destination: IpAddr,
}

impl Run<'_> {
    fn attach_and_detach(mut self, name: &str, netns: &std::path::Path) -> Result<Sample> {
        let request = client::attach(name, NETWORK, netns, Some(self.mac));
        let start = Instant::now();
        self.client.ask(&request)?;
        let reply = ms(start.elapsed());
        let times = self.wait_for_all(start, true)?;
        self.client.ask(&client::detach(name))?;
        self.wait_for_all(Instant::now(), false)?;
        Ok(Sample { first: times.min(), last: times.max(), reply })
    }

    /// Returns when each of the other kernels had the entry, or no longer had it.
    fn wait_for_all(&mut self, start: Instant, added: bool) -> Result<Samples> {
        let mut times = BTreeMap::new();
        let deadline = start + TIMEOUT;
        while times.len() < HOSTS - 1 {
            let Some(seen) = self.watcher.next(deadline)? else { break };
            let change = seen.change;
            if change.mac == self.mac && change.destination == self.destination && change.added == added {
                times.entry(seen.host).or_insert_with(|| ms(seen.at.saturating_duration_since(start)));
            }
        }
        ensure!(
            times.len() == HOSTS - 1,
            "{TIMEOUT:?} after the {} of {} on h{}, only {} of {} other kernels had {}",
            if added { "attach" } else { "detach" },
            mac_text(self.mac),
            self.index + 1,
            times.len(),
            HOSTS - 1,
            if added { "its entry" } else { "removed its entry" },
        );
        Ok(Samples::new(times.into_values().collect()))
    }
}

fn figure(samples: &[Sample]) -> Figure {
    let all = |of: fn(&Sample) -> f64| Samples::new(samples.iter().map(of).collect());
    let mut slowest: Vec<(usize, &Sample)> = samples.iter().enumerate().collect();
    slowest.sort_by(|(_, a), (_, b)| b.last.total_cmp(&a.last));
    let listed = slowest.iter().take(LISTED).map(|(number, sample)| {
        let host = format!("h{}", number % HOSTS + 1);
        json!({"number": number, "host": host, "reply_ms": sample.reply, "first_ms": sample.first, "last_ms": sample.last})
    });
    let listed: Vec<Value> = listed.collect();
    let (first, last, reply) = (all(|each| each.first), all(|each| each.last), all(|each| each.reply));
    Figure {
        setup: format!(
            "{HOSTS} hosts, one network with an endpoint on each, underlay MTU 1500; {} attaches, one after \
             another on all hosts in turn, each detached again, {} ms apart; from just before the request is \
             written to ovld's socket until the last of the {} other kernels notifies its VXLAN entry. FRR 8.4 \
             EVPN with a route reflector: 113 ms",
            samples.len(),
            PAUSE.as_millis(),
            HOSTS - 1
        ),
        rows: vec![
            Row::with_bar("last of 7 kernels, p50", last.percentile(50.0), "ms", Bar::AtMost(15.0)),
            Row::with_bar("last of 7 kernels, p99", last.percentile(99.0), "ms", Bar::AtMost(50.0)),
            Row::context("first of 7 kernels, p50", first.percentile(50.0), "ms"),
            Row::context("reply to the caller, p50", reply.percentile(50.0), "ms"),
        ],
        notes: Vec::new(),
        details: json!({
            "last_ms": last.to_json(),
            "first_ms": first.to_json(),
            "reply_ms": reply.to_json(),
            "slowest": listed,
        }),
    }
}
