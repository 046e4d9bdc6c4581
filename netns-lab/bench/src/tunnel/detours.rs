//! `detours`: one TCP stream between hosts that do not reach each other, through members that do, and over TCP where UDP is blocked.

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
    /// Whether UDP is blocked between the two.
    is_blocked: bool,
}

const CHAIN: &[(&str, &str)] =
    &[("h1", "h3"), ("h1", "h4"), ("h1", "h5"), ("h2", "h4"), ("h2", "h5"), ("h3", "h5")];

const fn way(
    name: &'static str,
    cut: &'static [(&'static str, &'static str)],
    to: usize,
    relays: usize,
) -> Way {
    Way { name, cut, to, relays, is_blocked: false }
}

const WAYS: [Way; 5] = [
    way("direct", &[], 1, 0),
    way("through one member", &[("h1", "h2")], 1, 1),
    way("chain, through one member", CHAIN, 2, 1),
    way("chain, through three members", CHAIN, 4, 3),
    Way { is_blocked: true, ..way("over TCP", &[], 1, 0) },
];

/// Blocks UDP between the first two hosts.
fn block(lab: &Lab) -> Result<()> {
    let hosts = lab.hosts();
    let (one, other) = (hosts.first().context("no host")?, hosts.get(1).context("no host")?);
    let address = other.address()?;
    let script = format!(
        "add table inet block\nadd chain inet block in {{ type filter hook input priority -150; }}\n\
         add chain inet block out {{ type filter hook output priority -150; }}\n\
         add rule inet block in ip saddr {address} meta l4proto udp drop\n\
         add rule inet block out ip daddr {address} meta l4proto udp drop\n"
    );
    one.exec_input(["nft", "-f", "-"], Some(&script)).map(drop)
}

fn unblock(lab: &Lab) -> Result<()> {
    let one = lab.hosts().first().context("no host")?;
    one.exec_input(["nft", "-f", "-"], Some("delete table inet block\n")).map(drop)
}

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
            if way.is_blocked {
                block(&lab)?;
            }
            wait(&lab, way)?;
            speeds.push(path.run(bench.plan.stream, Cores::Any)?);
            if way.is_blocked {
                unblock(&lab)?;
            }
        }
    }
    let medians = speeds.each_ref().map(|speeds| gbit_s(speeds).median());
    let [direct, one, chain, three, tcp] = medians;
    let mut rows = vec![
        Row::with_bar("through one member : direct", one / direct, "", Bar::AtLeast(0.6)),
        Row::with_bar("chain, two hops : direct", chain / direct, "", Bar::AtLeast(0.5)),
        Row::context("chain, four hops : direct", three / direct, ""),
        Row::context("over TCP : direct", tcp / direct, ""),
    ];
    rows.extend(WAYS.iter().zip(medians).map(|(way, median)| Row::context(way.name, median, "Gbit/s")));
    let details = WAYS.iter().zip(&speeds).map(|(way, speeds)| {
        let samples: Samples = gbit_s(speeds);
        (way.name.to_owned(), json!({ "runs": to_json(speeds), "summary": samples.to_json() }))
    });
    Ok(Figure {
        setup: format!(
            "5 hosts on one machine, encrypted routed network, underlay MTU 1500, one iperf3 stream (cubic) of {} s between workloads, \
             {} rounds, medians; links are cut between them, or UDP is blocked",
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
            let is_so = via == way.relays && row["tcp"] == way.is_blocked;
            ensure!(is_so && row["state"] == "alive", "{row}");
            Ok(())
        })?;
    }
    Ok(())
}
