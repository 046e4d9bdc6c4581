//! `streams` and `no-offload`: one TCP stream, with the underlay's segmentation offloads on and off.

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::ground::{BEHIND, Ground, Results};
use super::ovl::Network;
use super::peers::Peer;
use crate::Bench;
use crate::report::{Bar, Figure, Measured, Row};
use crate::stats::Samples;
use crate::stream::{self, Speed};
use crate::turns::{gbit_s, to_json};

const NETWORKS: [Network; 3] = [Network::Routed, Network::Switched, Network::Plain];
/// Offload settings that resemble a real link, on which packets of many segments are split.
const OFFLOADS_OFF: [&str; 8] = ["tso", "off", "gso", "off", "tx-udp-segmentation", "off", "gro", "on"];

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let mut ground = ground(bench)?;
    ground.gotatun_workloads(bench);
    let results = ground.in_turns(bench.plan.tunnel_turns, |system| system.stream(bench.plan.stream));
    let routed = ratio(&results, Network::Routed, median);
    let mut rows = vec![
        Row::of("routed : gotatun", routed, "", Some(Bar::AtLeast(3.4))),
        Row::of(
            "switched : gotatun",
            ratio(&results, Network::Switched, median),
            "",
            Some(Bar::AtLeast(2.5)),
        ),
        Row::of("routed : gotatun, best rounds", ratio(&results, Network::Routed, best), "", None),
        Row::of("switched : gotatun, best rounds", ratio(&results, Network::Switched, best), "", None),
    ];
    let behind = results.of(Network::Routed.contender(), median).over(results.of(BEHIND, median));
    rows.push(Row::of("routed : gotatun with workloads behind it", behind, "", None));
    rows.extend(each(&results));
    Ok(figure(bench, &ground, rows, &results, "underlay MTU 1500"))
}

pub(crate) fn measure_no_offload(bench: &Bench) -> Result<Figure> {
    let mut ground = ground(bench)?;
    for host in ground.hosts() {
        let set = [&["ethtool", "-K", "eth0"], OFFLOADS_OFF.as_slice()].concat();
        host.exec_ok(set).context("ethtool is needed for this figure: apt-get install ethtool")?;
    }
    let results = ground.in_turns(bench.plan.tunnel_turns, |system| system.stream(bench.plan.stream));
    let routed = ratio(&results, Network::Routed, median);
    let mut rows = vec![
        Row::of("routed : gotatun", routed, "", Some(Bar::AtLeast(2.3))),
        Row::of("switched : gotatun", ratio(&results, Network::Switched, median), "", None),
        Row::of("routed : gotatun, best rounds", ratio(&results, Network::Routed, best), "", None),
    ];
    rows.extend(each(&results));
    let underlay =
        format!("underlay MTU 1500, on both hosts of each lab `ethtool -K eth0 {}`", OFFLOADS_OFF.join(" "));
    Ok(figure(bench, &ground, rows, &results, &underlay))
}

fn ground(bench: &Bench) -> Result<Ground> {
    let mut ground = Ground::default();
    ground.raw();
    ground.ovl(bench, &NETWORKS);
    ground.peers(bench);
    let host = ground.hosts().next().context("no lab could be created")?;
    stream::check(host)?;
    ensure!(bench.plan.tunnel_turns > 0, "no turns");
    Ok(ground)
}

fn median(speeds: &[Speed]) -> f64 {
    gbit_s(speeds).median()
}

fn best(speeds: &[Speed]) -> f64 {
    gbit_s(speeds).max()
}

/// Returns the ratio of one of ovl's networks to gotatun.
fn ratio(results: &Results<Speed>, network: Network, number: fn(&[Speed]) -> f64) -> Measured {
    results.of(network.contender(), number).over(results.of(Peer::Gotatun.name(), number))
}

fn each(results: &Results<Speed>) -> Vec<Row> {
    results.names().map(|name| Row::of(name, results.of(name, median), "Gbit/s", None)).collect()
}

fn figure(
    bench: &Bench,
    ground: &Ground,
    rows: Vec<Row>,
    results: &Results<Speed>,
    underlay: &str,
) -> Figure {
    let spread = |speeds: &[Speed]| {
        let samples: Samples = gbit_s(speeds);
        json!({"runs": to_json(speeds), "summary": samples.to_json()})
    };
    Figure {
        setup: format!(
            "2 hosts in each lab, {underlay}, one iperf3 stream (cubic) of {} s, {} rounds each in an order that \
             changes, medians; the scheduler chooses cores. ovl between workloads on both hosts; the other systems \
             between the hosts themselves, which is a shorter path, unless noted. {}",
            bench.plan.stream.as_secs(),
            bench.plan.tunnel_turns,
            ground.setup()
        ),
        rows,
        notes: results.notes(),
        details: results.to_json(spread),
    }
}
