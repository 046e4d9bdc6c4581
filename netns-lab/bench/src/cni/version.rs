//! `version`: the cost of a plugin process that does not call ovld.

use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::plugin::{Plugin, Pod, Verb, timed};
use super::{ground, reference};
use crate::Bench;
use crate::report::{Bar, Figure, Row};
use crate::stats::{Samples, ms};

/// A program that does nothing, to measure the start of a process.
const NOTHING: &str = "/bin/true";

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    bench.ovl_cni()?;
    let version = reference::check()?;
    // A lab without daemons.
    let lab = bench.lab(1)?;
    let host = lab.hosts().first().context("a lab without hosts")?;
    let pod = Pod::new(&host.workload("pod")?);
    let count = bench.plan.versions;
    let ours = times(&ground::plugin(bench, host, ground::NETWORK)?, &pod, count)?;
    let theirs = times(&reference::plugin(host, false), &pod, count)?;
    let nothing = host.run(|| {
        let times = (0..count).map(|_| timed(Command::new(NOTHING), "").map(|(took, _)| ms(took)));
        times.collect::<Result<Vec<_>>>().map(Samples::new)
    })??;
    Ok(Figure {
        setup: format!(
            "a host without ovld, {count} calls one after another, from before the process starts until its exit; \
             the reference is {version}; {NOTHING} shows what the start of any program costs"
        ),
        rows: vec![
            Row::with_bar("ovl-cni VERSION, p50", ours.percentile(50.0), "ms", Bar::AtMost(1.0)),
            Row::context("ovl-cni VERSION, p99", ours.percentile(99.0), "ms"),
            Row::context("bridge VERSION, p50", theirs.percentile(50.0), "ms"),
            Row::context(&format!("{NOTHING}, p50"), nothing.percentile(50.0), "ms"),
        ],
        notes: Vec::new(),
        details: json!({
            "ovl_ms": ours.to_json(),
            "reference_ms": theirs.to_json(),
            "nothing_ms": nothing.to_json(),
        }),
    })
}

pub(crate) fn times(plugin: &Plugin, pod: &Pod, count: usize) -> Result<Samples> {
    plugin.on_host(|caller| {
        let mut times = Vec::new();
        for _ in 0..count {
            let answer = caller.call(Verb::Version, pod)?;
            ensure!(!answer.versions()?.is_empty(), "VERSION lists no version");
            times.push(ms(answer.took));
        }
        Ok(Samples::new(times))
    })
}
