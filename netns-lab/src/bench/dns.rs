//! Names: how many answers a second beside dnsmasq, whether updates cost any, and how soon a new name is known.

mod load;
mod spread;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use netns_lab::{Host, Spawned, wait_until};
use serde_json::json;

use super::Bench;
use super::client::{self, Client};
use super::cluster::{Cluster, NETWORK};
use super::report::{Bar, Figure, Measured, Row};
use super::stats::Samples;

pub(crate) use spread::measure as measure_spread;

/// Where ovld answers the host.
const LISTEN: &str = "127.0.0.1:5300";
const PORT: u16 = 5300;
/// Where dnsmasq does.
const PEER_PORT: u16 = 5400;
/// Local names.
const NAMES: usize = 1000;
/// As many aliases as an endpoint may have, about.
const ALIASES: usize = 50;
/// The server's core, and that of who asks.
const SERVER: &str = "0";
const CLIENT: &str = "1";

fn toml() -> String {
    format!("dns_listen = [\"{LISTEN}\"]\n")
}

/// What dnsperf is told to ask, and what dnsmasq knows; removed when dropped.
struct Files(PathBuf);

impl Files {
    fn write(host: &Host) -> Result<Self> {
        let files = Self(host.dir());
        let all = |domain: &str| (0..NAMES).map(|i| format!("n{i}.{domain} A\n")).collect::<String>();
        fs::write(files.questions(PORT), all(&format!("{NETWORK}.ovl.internal")))?;
        fs::write(files.questions(PEER_PORT), all("bench.test"))?;
        let hosts = (0..NAMES).map(|i| format!("10.99.{}.{} n{i}.bench.test\n", i / 250, i % 250 + 1));
        fs::write(files.hosts(), hosts.collect::<String>())?;
        Ok(files)
    }

    fn questions(&self, port: u16) -> PathBuf {
        self.0.join(format!("questions-{port}"))
    }

    fn hosts(&self) -> PathBuf {
        self.0.join("hosts")
    }
}

/// `answers`: the rate, beside dnsmasq's, and what updates do to it.
pub(crate) fn measure_answers(bench: &Bench) -> Result<Figure> {
    let cluster = Cluster::start(bench.lab_with(2, &toml())?)?;
    let host = cluster.host(0)?;
    let files = Files::write(host)?;
    name_all(&cluster)?;
    // So that the network stays there when the others go.
    cluster.workload(1, "stays")?;
    let pid = host.pid().context("ovld does not run")?;
    host.exec_ok(["taskset", "-a", "-c", "-p", SERVER, &pid.to_string()])?;
    let peer = dnsmasq(host, &files)?;
    let seconds = bench.plan.stream.as_secs().max(1);
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..bench.plan.turns.div_ceil(4) {
        ours.push(load::run(host, &files.questions(PORT), PORT, seconds, None)?.rate);
        if peer.is_some() {
            theirs.push(load::run(host, &files.questions(PEER_PORT), PEER_PORT, seconds, None)?.rate);
        }
    }
    drop(peer);
    let ours = Samples::new(ours);
    let theirs = (!theirs.is_empty()).then(|| Samples::new(theirs));
    let (rate, theirs) =
        (ours.median(), theirs.map_or(Measured::NoPeer, |all| Measured::Value(all.median())));
    let updated = load::with_updates(&cluster, &files.questions(PORT), PORT, rate / 2.0, bench)?;
    Ok(Figure {
        setup: format!(
            "2 hosts; ovld of the first on core {SERVER}, dnsperf (8 clients, 200 queries under way) on core {CLIENT}, \
             over loopback; {NAMES} names of the network, {} s a turn, ovld and dnsmasq by turns. Then half of that \
             rate while endpoints come and go on the second host, 10,000 times a minute",
            seconds
        ),
        rows: vec![
            Row::of(
                "answers a second over dnsmasq's",
                Measured::Value(rate).over(theirs),
                "",
                Some(Bar::AtLeast(1.0)),
            ),
            Row::context("answers a second", rate, ""),
            Row::of("dnsmasq's", theirs, "", None),
            Row::with_bar("with updates: queries lost", updated.lost, "", Bar::AtMost(0.0)),
            Row::with_bar("with updates: p99", updated.p99_ms, "ms", Bar::AtMost(2.0)),
            Row::context("updates a minute", updated.updates_a_minute, ""),
        ],
        notes: Vec::new(),
        details: json!({ "answers": ours.to_json() }),
    })
}

/// Endpoints of the first host whose aliases are all names.
fn name_all(cluster: &Cluster) -> Result<()> {
    let host = cluster.host(0)?;
    let workloads = host.bare_workloads("n", NAMES / ALIASES)?;
    let mut client = Client::connect(&host.socket())?;
    for (number, workload) in workloads.iter().enumerate() {
        let mut request = client::attach(workload.name(), NETWORK, workload.path(), None);
        let names = number * ALIASES..(number + 1) * ALIASES;
        request["aliases"] = names.map(|i| format!("n{i}")).collect();
        client.ask(&request)?;
    }
    Ok(())
}

/// Nothing where there is none.
fn dnsmasq(host: &Host, files: &Files) -> Result<Option<Spawned>> {
    if !host.exec(["which", "dnsmasq"])?.success() {
        return Ok(None);
    }
    let hosts = format!("--addn-hosts={}", files.hosts().display());
    let port = format!("--port={PEER_PORT}");
    let fixed = ["taskset", "-c", SERVER, "dnsmasq", "-k", "--listen-address=127.0.0.1", "--bind-interfaces"];
    let rest = ["--no-resolv", "--no-hosts", "--pid-file=", "--conf-file=/dev/null", &port, &hosts];
    let server = host.spawn(fixed.into_iter().chain(rest))?;
    wait_until(std::time::Duration::from_secs(10), "dnsmasq to answer", || {
        let port = PEER_PORT.to_string();
        let found = host.exec_ok(["dig", "+short", "+time=1", "@127.0.0.1", "-p", &port, "n1.bench.test"])?;
        ensure!(found.trim() == "10.99.0.2", "{found}");
        Ok(())
    })?;
    Ok(Some(server))
}
