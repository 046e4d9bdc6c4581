//! `fan-out`: one host that sends to seven others at once, relative to the same host sending to one.

use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::json;

use super::ovl::{self, Network};
use super::system::System;
use crate::Bench;
use crate::report::{Bar, Figure, Row};
use crate::stats::{Samples, round};
use crate::stream::{self, Speed};

const HOSTS: usize = 8;

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let lab = ovl::start(bench, HOSTS)?;
    stream::check(&lab["h1"])?;
    let workloads = ovl::network(&lab, Network::Routed)?;
    let ((from, _), others) = workloads.split_first().context("no workloads")?;
    let processes = ovl::processes(&lab, Network::Routed)?;
    let mut systems = others
        .iter()
        .map(|(to, target)| System::new(from, to, *target, processes.clone()))
        .collect::<Result<Vec<_>>>()?;

    let (length, turns) = (bench.plan.stream, bench.plan.tunnel_turns);
    let (mut single, mut sum) = (Vec::new(), Vec::new());
    for turn in 0..=turns {
        // Each peer is the single receiver in turn.
        let number = turn % systems.len();
        let alone = systems[number].stream(length)?.gbit_s;
        let together = thread::scope(|scope| {
            let streams: Vec<_> =
                systems.iter_mut().map(|system| scope.spawn(move || system.stream(length))).collect();
            let speeds = streams
                .into_iter()
                .map(|stream| stream.join().unwrap_or_else(|_| Err(anyhow!("a stream's thread panicked"))));
            speeds.collect::<Result<Vec<Speed>>>()
        })?;
        ensure!(together.len() == HOSTS - 1, "not {} streams", HOSTS - 1);
        // The first round is a warm-up.
        if turn > 0 {
            single.push(alone);
            sum.push(together.iter().map(|speed| speed.gbit_s).sum());
        }
    }
    let details = json!({
        "single_gbit_s": single.iter().copied().map(round).collect::<Vec<f64>>(),
        "sum_gbit_s": sum.iter().copied().map(round).collect::<Vec<f64>>(),
    });
    let (single, sum) = (Samples::new(single).median(), Samples::new(sum).median());
    Ok(Figure {
        setup: format!(
            "{HOSTS} hosts, underlay MTU 1500, one routed encrypted network, a workload on each host; from h1's one \
             iperf3 stream (cubic) of {} s to one of the others, then seven at once to all of them, in {turns} rounds; medians. \
             All {HOSTS} hosts share the machine's cores: receivers compete with senders",
            length.as_secs()
        ),
        rows: vec![
            Row::with_bar("to 7 at once : to one", sum / single, "", Bar::AtLeast(0.8)),
            Row::context("to 7 at once, sum", sum, "Gbit/s"),
            Row::context("to one", single, "Gbit/s"),
        ],
        notes: Vec::new(),
        details,
    })
}
