//! `single`: sequential ADD and DEL, from the start of the plugin's process until its exit.

use anyhow::{Context, Result};
use netns_lab::{Host, Workload};
use serde_json::{Value, json};

use super::plugin::{Plugin, Pod, Verb};
use super::{ground, reference};
use crate::Bench;
use crate::report::{Bar, Figure, Row};
use crate::stats::{Samples, ms};

const HOSTS: usize = 3;

/// Times of all calls in milliseconds, in their order.
#[derive(Default)]
pub(crate) struct Times {
    pub(crate) add: Vec<f64>,
    pub(crate) del: Vec<f64>,
}

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    bench.ovl_cni()?;
    let version = reference::check()?;
    let lab = bench.lab(HOSTS)?;
    let host = lab.hosts().first().context("a lab without hosts")?;
    let pods = host.bare_workloads("pod", bench.plan.pods)?;
    // Before any daemon runs: the devices of the reference would wake it.
    let plain = rounds(&reference::plugin(host, false), host, &pods, bench.plan.reference_rounds)?;
    let masquerading = rounds(&reference::plugin(host, true), host, &pods, bench.plan.reference_rounds)?;
    reference::clear(host)?;

    ground::start(&lab)?;
    let plugin = ground::plugin(bench, host, ground::NETWORK)?;
    let first = ground::resident(&plugin, host)?;
    let ours = rounds(&plugin, host, &pods, bench.plan.pod_rounds)?;
    let [(add, del), (plain_add, plain_del), (masq_add, masq_del)] = [&ours, &plain, &masquerading]
        .map(|times| (Samples::new(times.add.clone()), Samples::new(times.del.clone())));
    Ok(Figure {
        setup: format!(
            "{HOSTS} hosts; on h1 {} pods are added one after another, then deleted, in {} rounds ({} for the \
             reference: {version}, with host-local); each call is a process of its own, made by posix_spawn in the \
             host's namespace, from before its start to its end with its output read; the pods' namespaces are made \
             beforehand and stay. Masquerading is on, for the reference where it says ipMasq. The reference ran \
             first, in the same namespace, before ovld was started there. One pod of ovl's stays on h1 all the time; \
             its ADD, the first on an empty host, has a row of its own",
            bench.plan.pods, bench.plan.pod_rounds, bench.plan.reference_rounds
        ),
        rows: vec![
            Row::with_bar("ADD, p50", add.percentile(50.0), "ms", Bar::AtMost(2.5)),
            Row::with_bar("ADD, p99", add.percentile(99.0), "ms", Bar::AtMost(6.0)),
            Row::with_bar("DEL, p50", del.percentile(50.0), "ms", Bar::AtMost(2.5)),
            Row::context("DEL, p99", del.percentile(99.0), "ms"),
            Row::context("the first ADD on an empty host", first, "ms"),
            Row::context("bridge + host-local, ADD, p50", plain_add.percentile(50.0), "ms"),
            Row::context("bridge + host-local, DEL, p50", plain_del.percentile(50.0), "ms"),
            Row::context("bridge + host-local, ipMasq, ADD, p50", masq_add.percentile(50.0), "ms"),
            Row::context("bridge + host-local, ipMasq, DEL, p50", masq_del.percentile(50.0), "ms"),
        ],
        notes: Vec::new(),
        details: json!({
            "ovl": to_json(&add, &del),
            "ovl_p50_of_each_round_ms": {
                "add": of_rounds(&ours.add, bench.plan.pods),
                "del": of_rounds(&ours.del, bench.plan.pods),
            },
            "reference": to_json(&plain_add, &plain_del),
            "reference_ipmasq": to_json(&masq_add, &masq_del),
            "reference_version": version,
        }),
    })
}

/// Adds all pods and deletes all pods, `rounds` times.
pub(crate) fn rounds(plugin: &Plugin, host: &Host, workloads: &[Workload], rounds: usize) -> Result<Times> {
    let veths = ground::veths(host)?;
    let mut times = Times::default();
    for _ in 0..rounds {
        let pods = Pod::all(workloads);
        plugin.on_host(|caller| {
            for (verb, list) in [(Verb::Add, &mut times.add), (Verb::Del, &mut times.del)] {
                for pod in &pods {
                    let answer = caller.call(verb, pod)?;
                    if verb == Verb::Add {
                        answer.address()?;
                    }
                    list.push(ms(answer.took));
                }
            }
            Ok(())
        })?;
        ground::wait_veths(host, veths)?;
    }
    Ok(times)
}

fn of_rounds(times: &[f64], pods: usize) -> Vec<f64> {
    times.chunks(pods.max(1)).map(|round| Samples::new(round.to_vec()).median()).collect()
}

fn to_json(add: &Samples, del: &Samples) -> Value {
    json!({"add_ms": add.to_json(), "del_ms": del.to_json()})
}
