//! `load`: memory and retransmits during ten seconds of TCP.

use anyhow::{Context, Result};
use serde_json::json;

use super::ground::Ground;
use super::ovl::Network;
use crate::Bench;
use crate::report::{Bar, Figure, Row};
use crate::stats::{Samples, round};
use crate::stream::{self, Speed};

const MOST_MEMORY: f64 = 40.0;
/// The bar is fewer than 1,000.
const MOST_RETRANSMITS: f64 = 999.0;

/// The result of one run.
struct Load {
    speed: Speed,
    /// Peak resident memory of the larger of the two processes, in MiB.
    peak_mib: f64,
}

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let mut ground = Ground::default();
    ground.ovl(bench, &[Network::Routed, Network::Switched]);
    ground.peers(bench);
    stream::check(ground.hosts().next().context("no lab could be created")?)?;
    let (turns, length) = (bench.plan.load_turns, bench.plan.load);
    let results = ground.in_turns(turns, |system| {
        system.processes.reset_peaks()?;
        let speed = system.stream(length)?;
        Ok(Load { speed, peak_mib: system.processes.peak_mib()? })
    });
    let ours = |name: &str| [Network::Routed, Network::Switched].iter().any(|each| each.contender() == name);
    let bar = |name: &str, most| ours(name).then_some(Bar::AtMost(most));
    let memory = results.names().map(|name| {
        let what = format!("{name}, resident memory");
        Row::of(&what, results.of(name, |runs| most(runs, |run| run.peak_mib)), "MiB", bar(name, MOST_MEMORY))
    });
    let retransmits = results.names().map(|name| {
        let value = results.of(name, |runs| most(runs, |run| run.speed.retransmits as f64));
        Row::of(&format!("{name}, retransmits"), value, "", bar(name, MOST_RETRANSMITS))
    });
    Ok(Figure {
        setup: format!(
            "2 hosts in each lab, one iperf3 stream (cubic) of {} s, {turns} rounds; the worst round. Memory: the peak \
             during the stream (VmHWM, reset before it) of the larger of the tunnel's two processes, for ovld \
             including everything else that it does. ovl between workloads, the other systems between the hosts. {}",
            length.as_secs(),
            ground.setup()
        ),
        rows: memory.chain(retransmits).collect(),
        notes: results.notes(),
        details: results.to_json(|runs| {
            json!({
                "peak_mib": runs.iter().map(|run| round(run.peak_mib)).collect::<Vec<_>>(),
                "retransmits": runs.iter().map(|run| run.speed.retransmits).collect::<Vec<_>>(),
                "gbit_s": runs.iter().map(|run| round(run.speed.gbit_s)).collect::<Vec<_>>(),
            })
        }),
    })
}

fn most(runs: &[Load], of: impl Fn(&Load) -> f64) -> f64 {
    Samples::new(runs.iter().map(of).collect()).max()
}
