//! `at-once`: pods that a host adds and deletes per second with eight concurrent calls.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use netns_lab::{Host, Workload};
use serde_json::{Value, json};

use super::plugin::{Caller, Plugin, Pod, Verb};
use super::{ground, reference};
use crate::Bench;
use crate::report::{Bar, Figure, Row};
use crate::stats::{Samples, ms};

const HOSTS: usize = 3;
const AT_ONCE: usize = 8;

/// The rates of each round.
#[derive(Default)]
pub(crate) struct Rates {
    /// Calls answered per second.
    pub(crate) add: Vec<f64>,
    pub(crate) del: Vec<f64>,
    /// Deletions completed by the kernel per second.
    gone: Vec<f64>,
    /// The time that each caller waited.
    add_ms: Vec<f64>,
    del_ms: Vec<f64>,
}

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    bench.ovl_cni()?;
    let version = reference::check()?;
    let lab = bench.lab(HOSTS)?;
    let host = lab.hosts().first().context("a lab without hosts")?;
    let pods = host.bare_workloads("pod", bench.plan.at_once_pods)?;
    // Before any daemon runs: the devices of the reference would wake it.
    let plain = rounds(&reference::plugin(host, false), host, &pods, bench.plan.reference_rounds)?;
    let masquerading = rounds(&reference::plugin(host, true), host, &pods, bench.plan.reference_rounds)?;
    reference::clear(host)?;

    ground::start(&lab)?;
    let plugin = ground::plugin(bench, host, ground::NETWORK)?;
    ground::resident(&plugin, host)?;
    let ours = rounds(&plugin, host, &pods, bench.plan.at_once_rounds)?;
    let median = |rates: &[f64]| Samples::new(rates.to_vec()).median();
    Ok(Figure {
        setup: format!(
            "{HOSTS} hosts; on h1 {} pods are added, then deleted, by {AT_ONCE} threads that each run one process \
             of the plugin after another, in {} rounds ({} for the reference: {version}, with host-local); the \
             median of the rounds. The reference ran first, in the same namespace, before ovld was started there. One pod of ovl's \
             stays on h1 all the time",
            bench.plan.at_once_pods, bench.plan.at_once_rounds, bench.plan.reference_rounds
        ),
        rows: vec![
            Row::with_bar("ADD", median(&ours.add), "a second", Bar::AtLeast(600.0)),
            Row::with_bar("DEL", median(&ours.del), "a second", Bar::AtLeast(600.0)),
            Row::context("DEL until the last veth is deleted", median(&ours.gone), "a second"),
            Row::context("bridge + host-local, ADD", median(&plain.add), "a second"),
            Row::context("bridge + host-local, DEL", median(&plain.del), "a second"),
            Row::context("bridge + host-local, ipMasq, ADD", median(&masquerading.add), "a second"),
            Row::context("bridge + host-local, ipMasq, DEL", median(&masquerading.del), "a second"),
        ],
        notes: Vec::new(),
        details: json!({
            "ovl": ours.to_json(),
            "reference": plain.to_json(),
            "reference_ipmasq": masquerading.to_json(),
            "reference_version": version,
        }),
    })
}

/// Adds all pods and deletes all pods, `rounds` times.
pub(crate) fn rounds(plugin: &Plugin, host: &Host, workloads: &[Workload], rounds: usize) -> Result<Rates> {
    let veths = ground::veths(host)?;
    let mut rates = Rates::default();
    let a_second = |since: Instant| workloads.len() as f64 / since.elapsed().as_secs_f64();
    for _ in 0..rounds {
        let pods = Pod::all(workloads);
        plugin.on_host(|caller| {
            let start = Instant::now();
            rates.add_ms.extend(all(caller, Verb::Add, &pods)?);
            rates.add.push(a_second(start));
            Ok(())
        })?;
        let start = plugin.on_host(|caller| {
            let start = Instant::now();
            rates.del_ms.extend(all(caller, Verb::Del, &pods)?);
            rates.del.push(a_second(start));
            Ok(start)
        })?;
        ground::wait_veths(host, veths)?;
        rates.gone.push(a_second(start));
    }
    Ok(rates)
}

/// Makes the same call for all pods, each as soon as a thread is free. Returns the callers' times.
fn all(caller: &Caller, verb: Verb, pods: &[Pod]) -> Result<Vec<f64>> {
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<f64>> {
        let mut times = Vec::new();
        while let Some(pod) = pods.get(next.fetch_add(1, Ordering::Relaxed)) {
            times.push(ms(caller.call(verb, pod)?.took));
        }
        Ok(times)
    };
    // A thread inherits the namespace of the thread that starts it.
    thread::scope(|scope| {
        let threads: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        let times = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("a caller panicked"))));
        times.collect::<Result<Vec<_>>>().map(|times| times.concat())
    })
}

impl Rates {
    fn to_json(&self) -> Value {
        let summary = |values: &[f64]| Samples::new(values.to_vec()).to_json();
        json!({
            "adds_a_second": summary(&self.add),
            "dels_a_second": summary(&self.del),
            "veths_gone_a_second": summary(&self.gone),
            "add_ms": summary(&self.add_ms),
            "del_ms": summary(&self.del_ms),
        })
    }
}
