//! `tcp`: one stream through ovl's overlay, against the same built by hand, in turns.

use anyhow::{Context, Result};
use netns_lab::Netns;
use serde_json::{Value, json};

use super::cluster::Cluster;
use super::report::{Bar, Figure, Row};
use super::stats::{Samples, round};
use super::stream::{self, Path, Speed};
use super::{Bench, by_hand};

const HOSTS: usize = 2;

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let cluster = Cluster::start(bench.lab(HOSTS)?)?;
    stream::check(cluster.host(0)?)?;
    let ours = cluster.one_workload_each()?;
    let [(from, _), (to, target)] = ours.as_slice() else { anyhow::bail!("not {HOSTS} workloads") };
    let mtu = mtu_of(from)?;
    // A lab without daemons, beside the other one: its hosts' kernels are alike.
    let other = bench.lab(HOSTS)?;
    let [(hand_from, _), (hand_to, hand_target)] = by_hand::build(&other, mtu)?;
    let [raw_from, raw_to] = other.hosts() else { anyhow::bail!("not {HOSTS} hosts") };

    let overlay = Path::new(from, to, *target)?;
    let hand = Path::new(&hand_from, &hand_to, hand_target)?;
    let raw = Path::new(raw_from, raw_to, raw_to.address()?)?;
    let (mut overlay_runs, mut hand_runs) = (Vec::new(), Vec::new());
    // One that does not count: the first to run finds a cold machine.
    hand.run(bench.plan.stream)?;
    for turn in 0..bench.plan.turns {
        // Each is as often the first as the second of a pair.
        if turn % 2 == 0 {
            overlay_runs.push(overlay.run(bench.plan.stream)?);
            hand_runs.push(hand.run(bench.plan.stream)?);
        } else {
            hand_runs.push(hand.run(bench.plan.stream)?);
            overlay_runs.push(overlay.run(bench.plan.stream)?);
        }
    }
    let raw_runs =
        (0..bench.plan.turns.div_ceil(3)).map(|_| raw.run(bench.plan.stream)).collect::<Result<Vec<_>>>()?;

    let [overlay, hand, raw] = [&overlay_runs, &hand_runs, &raw_runs].map(|runs| gbit_s(runs).median());
    let ratios =
        overlay_runs.iter().zip(&hand_runs).map(|(ours, theirs)| ours.gbit_s / theirs.gbit_s).collect();
    Ok(Figure {
        setup: format!(
            "2 hosts, underlay MTU 1500, overlay MTU {mtu}, one iperf3 stream (cubic) of {} s, {} turns each, ovl \
             and by hand alternating in two labs that stand side by side; medians. By hand: bridge, VXLAN \
             (nolearning), static FDB and neighbours, no daemon, no packet filter",
            bench.plan.stream.as_secs(),
            bench.plan.turns
        ),
        rows: vec![
            Row::with_bar("ovl's overlay : built by hand", overlay / hand, "", Bar::AtLeast(0.95)),
            Row::context("ovl's overlay", overlay, "Gbit/s"),
            Row::context("built by hand", hand, "Gbit/s"),
            Row::context("underlay alone", raw, "Gbit/s"),
        ],
        notes: Vec::new(),
        details: json!({
            "mtu": mtu,
            "overlay": to_json(&overlay_runs),
            "by_hand": to_json(&hand_runs),
            "underlay": to_json(&raw_runs),
            "ratio_of_each_turn": Samples::new(ratios).to_json(),
        }),
    })
}

fn mtu_of(workload: &Netns) -> Result<u64> {
    let link = workload.ip_json(&["link", "show", "eth0"])?;
    link[0]["mtu"].as_u64().with_context(|| format!("no MTU in {link}"))
}

fn gbit_s(runs: &[Speed]) -> Samples {
    Samples::new(runs.iter().map(|run| run.gbit_s).collect())
}

fn to_json(runs: &[Speed]) -> Value {
    json!({
        "gbit_s": runs.iter().map(|run| round(run.gbit_s)).collect::<Vec<_>>(),
        "retransmits": runs.iter().map(|run| run.retransmits).collect::<Vec<_>>(),
    })
}
