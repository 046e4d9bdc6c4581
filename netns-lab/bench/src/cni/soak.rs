//! `soak`: ten thousand pods are added and deleted. Nothing may leak.

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use netns_lab::{Host, Workload, wait_until};
use serde_json::json;

use super::ground;
use super::plugin::{Plugin, Pod, Reply, Verb};
use super::standing::{DESCRIPTORS, NFT, Standing, VETHS};
use crate::Bench;
use crate::report::{Bar, Figure, Row};
use crate::stats::{Samples, ms, round};

/// The host with the pods, and one that receives the announcements.
const HOSTS: usize = 2;
const NETWORK: &str = "soak";
/// A small subnet that can be filled: the number of pods that fit before and after shows leaked addresses.
const SUBNET: &str = "10.63.0.0/24";
const BLOCK: &str = "26";
/// Number of workloads: more than there are addresses.
const PODS: usize = 256;
/// Number of namespaces that are reused in turn during the long run.
const TURNS: usize = 50;
/// Number of memory samples.
const MARKS: usize = 10;

/// Results of the long run.
struct Run {
    /// Resident memory after each tenth of the run.
    rss_kib: Vec<u64>,
    /// Median time of the ADD calls in each tenth of the run.
    add_ms: Vec<f64>,
    del_ms: Vec<f64>,
    pairs_a_second: f64,
}

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    bench.ovl_cni()?;
    let count = bench.plan.soak;
    let lab = bench.lab(HOSTS)?;
    lab.start_all()?;
    ground::network(&lab, NETWORK, &["--subnet", SUBNET, "--block", BLOCK])?;
    let host = &lab["h1"];
    let plugin = ground::plugin(bench, host, NETWORK)?;
    let workloads = host.bare_workloads("pod", PODS)?;
    let (turns, _) = workloads.split_at(TURNS);
    ground::resident(&plugin, host)?;

    let veths = ground::veths(host)?;
    let (room, refusal) = fill(&plugin, &workloads)?;
    ground::wait_veths(host, veths)?;
    let before = look(host, turns)?;
    let run = run(host, &plugin, turns, count)?;
    let left = left_since(host, turns, &before)?;
    let room_after = fill_again(&plugin, &workloads, room)?;

    let mib = |kib: u64| kib as f64 / 1024.0;
    let (first, last) = (run.rss_kib.first().copied(), run.rss_kib.last().copied());
    let (first, last) = first.zip(last).context("memory was never sampled")?;
    let tenth = count / MARKS;
    let leaked = |what| left.get(what) as f64;
    Ok(Figure {
        setup: format!(
            "{HOSTS} hosts, a routed network of {SUBNET}; {count} times on h1 a pod is added and deleted, one after \
             another in {TURNS} namespaces, each a container of its own, while one pod stays. Before and after, everything in the host's \
             and the pods' namespaces is counted, and what ovld has open; for addresses the network is filled until \
             it refuses ({refusal}), before and after"
        ),
        rows: vec![
            Row::with_bar("addresses leaked", room as f64 - room_after as f64, "", Bar::AtMost(0.0)),
            Row::with_bar("veths leaked", leaked(VETHS) + leaked(IN_PODS), "", Bar::AtMost(0.0)),
            Row::with_bar("file descriptors leaked", leaked(DESCRIPTORS), "", Bar::AtMost(0.0)),
            Row::with_bar("nft objects and elements leaked", leaked(NFT), "", Bar::AtMost(0.0)),
            Row::with_bar(
                &format!("memory that ovld grew by, from {tenth} to {count}"),
                mib(last) - mib(first),
                "MiB",
                Bar::AtMost(1.0),
            ),
            Row::context(&format!("resident memory after {tenth}"), mib(first), "MiB"),
            Row::context(&format!("resident memory after {count}"), mib(last), "MiB"),
            Row::context("ADD and DEL in a row", run.pairs_a_second, "a second"),
            Row::context(
                "ADD, p50 of the last tenth : of the first",
                ratio(&run.add_ms).unwrap_or(f64::NAN),
                "",
            ),
        ],
        notes: if left.is_empty() { Vec::new() } else { vec![format!("leaked: {}", left.text())] },
        details: json!({
            "times": count,
            "rss_kib_of_each_tenth": run.rss_kib,
            "add_p50_ms_of_each_tenth": run.add_ms,
            "del_p50_ms_of_each_tenth": run.del_ms,
            "room_before": room,
            "room_after": room_after,
            "refusal": refusal,
        }),
    })
}

/// Adds pods until one is rejected, and deletes all of them, including the rejected one as runtimes do.
/// Returns the number that fitted, and the error.
fn fill(plugin: &Plugin, workloads: &[Workload]) -> Result<(usize, String)> {
    let pods = Pod::all(workloads);
    plugin.on_host(|caller| {
        let mut asked = 0;
        let mut refusal = None;
        for pod in &pods {
            asked += 1;
            if let Reply::Refused(error) = caller.ask(Verb::Add, pod)? {
                refusal = Some(error);
                break;
            }
        }
        for pod in pods.iter().take(asked) {
            caller.call(Verb::Del, pod)?;
        }
        let refusal = refusal.with_context(|| format!("{asked} pods fit into {SUBNET}"))?;
        ensure!(asked > 1, "no pod fits into an empty network: {refusal}");
        Ok((asked - 1, refusal))
    })
}

/// Returns how many pods fit now. Released addresses may be quarantined for a while.
fn fill_again(plugin: &Plugin, workloads: &[Workload], room: usize) -> Result<usize> {
    let mut most = 0;
    let filled = wait_until(ground::SETTLE_TIMEOUT, "room for as many pods as before", || {
        let (found, _) = fill(plugin, workloads)?;
        most = most.max(found);
        Ok::<_, anyhow::Error>(found >= room)
    });
    match filled {
        Ok(()) => Ok(most),
        Err(_) if most > 0 => Ok(most),
        Err(error) => Err(error),
    }
}

fn run(host: &Host, plugin: &Plugin, workloads: &[Workload], count: usize) -> Result<Run> {
    let mut run =
        Run { rss_kib: Vec::new(), add_ms: Vec::new(), del_ms: Vec::new(), pairs_a_second: f64::NAN };
    let start = Instant::now();
    let mut done = 0;
    for mark in 1..=MARKS {
        let target = count * mark / MARKS;
        let (mut adds, mut dels) = (Vec::new(), Vec::new());
        plugin.on_host(|caller| {
            for workload in workloads.iter().cycle().skip(done % TURNS).take(target - done) {
                let pod = Pod::new(workload);
                adds.push(ms(caller.call(Verb::Add, &pod)?.took));
                dels.push(ms(caller.call(Verb::Del, &pod)?.took));
            }
            Ok(())
        })?;
        done = target;
        run.rss_kib.push(host.rss_kib()?);
        run.add_ms.push(round(Samples::new(adds).median()));
        run.del_ms.push(round(Samples::new(dels).median()));
    }
    run.pairs_a_second = count as f64 / start.elapsed().as_secs_f64();
    Ok(run)
}

/// Returns the objects that exist now and did not before, after pending deletions are complete.
fn left_since(host: &Host, pods: &[Workload], before: &Standing) -> Result<Standing> {
    let mut left = None;
    let settled = wait_until(ground::SETTLE_TIMEOUT, "the host to return to its previous state", || {
        let now = left.insert(look(host, pods)?.since(before));
        if !now.is_empty() {
            bail!("{}", now.text());
        }
        Ok(())
    });
    match (settled, left) {
        // The remaining difference is the figure.
        (_, Some(left)) => Ok(left),
        (Err(error), None) => Err(error),
        (Ok(()), None) => bail!("the host was never inspected"),
    }
}

const IN_PODS: &str = "links in pods' namespaces";

fn look(host: &Host, pods: &[Workload]) -> Result<Standing> {
    let mut links = 0;
    for pod in pods {
        links += pod.ip_json(&["link", "show"])?.as_array().map_or(0, Vec::len);
    }
    Ok(Standing::of_host(host)?.with(IN_PODS, links))
}

/// Returns the ratio of the last value to the first. `None` if there are no values.
fn ratio(values: &[f64]) -> Option<f64> {
    Some(values.last()? / values.first()?)
}
