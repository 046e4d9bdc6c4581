//! `detours`: one TCP stream between hosts that do not reach each other, through members that do.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use netns_lab::{Lab, wait_until};
use ovl_tests::peer;
use serde_json::{Map, Value, json};

use super::ovl;
use crate::Bench;
use crate::report::{Bar, Figure, Row};
use crate::stats::Samples;
use crate::stream::{self, Cores, Path, Speed};
use crate::turns::{gbit_s, to_json};

const TIMEOUT: Duration = Duration::from_secs(60);

/// Links that are cut, and the hosts between which the stream then goes, with the number of members between them.
struct Way {
    name: &'static str,
    cut: &'static [(&'static str, &'static str)],
    to: usize,
    relays: usize,
}

const CHAIN: &[(&str, &str)] =
    &[("h1", "h3"), ("h1", "h4"), ("h1", "h5"), ("h2", "h4"), ("h2", "h5"), ("h3", "h5")];

const WAYS: [Way; 4] = [
    Way { name: "direct", cut: &[], to: 1, relays: 0 },
    Way { name: "through one member", cut: &[("h1", "h2")], to: 1, relays: 1 },
    Way { name: "chain, through one member", cut: CHAIN, to: 2, relays: 1 },
    Way { name: "chain, through three members", cut: CHAIN, to: 4, relays: 3 },
];

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    ensure!(bench.plan.tunnel_turns > 0, "no turns");
    let lab = ovl::start(bench, 5)?;
    let first = lab.hosts().first().context("no host")?;
    stream::check(first)?;
    let ends = ovl::network(&lab, ovl::Network::Routed)?;
    let (from, _) = ends.first().context("no workload")?;
    let paths = WAYS.iter().map(|way| {
        let (to, address) = ends.get(way.to).context("no workload")?;
        Path::new(from, to, *address)
    });
    let paths = paths.collect::<Result<Vec<Path>>>()?;
    let mut speeds: [Vec<Speed>; WAYS.len()] = Default::default();
    for _ in 0..bench.plan.tunnel_turns {
        for ((way, path), speeds) in WAYS.iter().zip(&paths).zip(&mut speeds) {
            lab.heal()?;
            lab.cut(way.cut, false)?;
            wait(&lab, way)?;
            speeds.push(path.run(bench.plan.stream, Cores::Any)?);
        }
    }
    let medians = speeds.each_ref().map(|speeds| gbit_s(speeds).median());
    let [direct, one, chain, three] = medians;
    let mut rows = vec![
        Row::with_bar("through one member : direct", one / direct, "", Bar::AtLeast(0.6)),
        Row::with_bar("chain, two hops : direct", chain / direct, "", Bar::AtLeast(0.5)),
        Row::context("chain, four hops : direct", three / direct, ""),
    ];
    rows.extend(WAYS.iter().zip(medians).map(|(way, median)| Row::context(way.name, median, "Gbit/s")));
    let details = WAYS.iter().zip(&speeds).map(|(way, speeds)| {
        let samples: Samples = gbit_s(speeds);
        (way.name.to_owned(), json!({ "runs": to_json(speeds), "summary": samples.to_json() }))
    });
    Ok(Figure {
        setup: format!(
            "5 hosts on one machine, encrypted routed network, underlay MTU 1500, one iperf3 stream (cubic) of {} s between workloads, \
             {} rounds, medians; links are cut between them",
            bench.plan.stream.as_secs(),
            bench.plan.tunnel_turns,
        ),
        rows,
        notes: Vec::new(),
        details: Value::Object(details.collect::<Map<String, Value>>()),
    })
}

/// Waits until both ends go this way.
fn wait(lab: &Lab, way: &Way) -> Result<()> {
    let hosts = lab.hosts();
    let (one, other) = (hosts.first().context("no host")?, hosts.get(way.to).context("no host")?);
    for (host, to) in [(one, other), (other, one)] {
        let what = format!("{} members between {} and {}", way.relays, host.name(), to.name());
        wait_until(TIMEOUT, &what, || -> Result<()> {
            let row = peer(host, to.name())?;
            let via = row["via"].as_array().map_or(0, Vec::len);
            ensure!(via == way.relays && row["state"] == "alive", "{row}");
            Ok(())
        })?;
    }
    Ok(())
}
