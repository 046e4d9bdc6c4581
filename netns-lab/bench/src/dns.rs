//! DNS figures: answers per second compared with dnsmasq, the cost of updates, and the propagation of new
//! names.

mod load;
mod search;
mod spread;

use std::fs;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use netns_lab::{Host, Spawned, wait_until};
use serde_json::json;

use super::Bench;
use super::client::{self, Client};
use super::cluster::{Cluster, NETWORK};
use super::report::{Bar, Figure, Measured, Row};
use super::stats::Samples;
use super::tunnel::processes::pin_this_thread;
use load::Pace;

pub(crate) use search::measure as measure_search;
pub(crate) use spread::measure as measure_spread;

/// Address at which ovld answers queries of the host.
const LISTEN: &str = "127.0.0.1:5300";
const PORT: u16 = 5300;
/// Port of dnsmasq.
const PEER_PORT: u16 = 5400;
/// Number of names.
const NAMES: usize = 1000;
/// Aliases per endpoint, close to the maximum.
const ALIASES: usize = 50;
/// Name of the query file for endpoint names.
const NAMED: &str = "names";
const SERVICES: &str = "services";
const PEER: &str = "dnsmasq";
/// DNS suffix of the Services.
const SERVICE_DOMAIN: &str = "bench.svc.cluster.local";
/// Timeout of operations that should take milliseconds.
const TIMEOUT: Duration = Duration::from_secs(20);
/// CPU core of the server.
const SERVER: &str = "0";
const CLIENT: &str = "1";

fn toml() -> String {
    format!("dns_listen = [\"{LISTEN}\"]\n")
}

/// Files with the queries of dnsperf and the names of dnsmasq, deleted on drop.
struct Files(PathBuf);

impl Files {
    fn write(host: &Host) -> Result<Self> {
        let files = Self(host.dir());
        let all = |letter: &str, domain: &str| {
            (0..NAMES).map(|i| format!("{letter}{i}.{domain} A\n")).collect::<String>()
        };
        fs::write(files.questions(NAMED), all("n", &format!("{NETWORK}.ovl.internal")))?;
        fs::write(files.questions(SERVICES), all("s", SERVICE_DOMAIN))?;
        fs::write(files.questions(PEER), all("n", "bench.test"))?;
        let hosts = (0..NAMES).map(|i| format!("10.99.{}.{} n{i}.bench.test\n", i / 250, i % 250 + 1));
        fs::write(files.hosts(), hosts.collect::<String>())?;
        Ok(files)
    }

    fn questions(&self, what: &str) -> PathBuf {
        self.0.join(format!("questions-{what}"))
    }

    fn hosts(&self) -> PathBuf {
        self.0.join("hosts")
    }
}

/// `answers`: query rates compared with dnsmasq's, and the effect of updates.
pub(crate) fn measure_answers(bench: &Bench) -> Result<Figure> {
    let cluster = Cluster::start(bench.lab_with(2, &toml())?)?;
    let host = cluster.host(0)?;
    on_one_core(host)?;
    let files = Files::write(host)?;
    name_all(&cluster)?;
    serve_all(host)?;
    // Keeps the network on the host when the other endpoints are detached.
    cluster.workload(1, "stays")?;
    let peer = dnsmasq(host, &files)?;
    let seconds = bench.plan.stream.as_secs().max(1);
    let run =
        |what: &str, port: u16, pace: Pace| load::run(host, &files.questions(what), port, seconds, pace);
    let (mut names, mut services, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..bench.plan.turns.div_ceil(4) {
        names.push(run(NAMED, PORT, Pace::Full)?.rate);
        services.push(run(SERVICES, PORT, Pace::Full)?.rate);
        if peer.is_some() {
            theirs.push(run(PEER, PEER_PORT, Pace::Full)?.rate);
        }
    }
    let p99 = |what: &str, port: u16| -> Result<f64> {
        Ok(Samples::new(run(what, port, Pace::Told)?.latencies).percentile(99.0))
    };
    let our_p99 = p99(NAMED, PORT)?;
    let their_p99 = if peer.is_some() { Measured::Value(p99(PEER, PEER_PORT)?) } else { Measured::NoPeer };
    drop(peer);
    let (names, services) = (Samples::new(names), Samples::new(services));
    let theirs =
        if theirs.is_empty() { Measured::NoPeer } else { Measured::Value(Samples::new(theirs).median()) };
    let p99_at_theirs = match theirs {
        Measured::Value(rate) => {
            Measured::Value(Samples::new(run(NAMED, PORT, Pace::Rate(rate))?.latencies).percentile(99.0))
        }
        other => other,
    };
    let rate = names.median();
    let updated = load::with_updates(&cluster, &files.questions(NAMED), PORT, rate / 2.0, bench)?;
    let over = |samples: &Samples| Measured::Value(samples.median()).over(theirs);
    Ok(Figure {
        setup: format!(
            "2 hosts; ovld of the first on core {SERVER}, dnsperf (8 clients, 200 queries in flight) on core {CLIENT}, \
             over loopback; {NAMES} names of the network, {NAMES} Services, {seconds} s per round, ovld and dnsmasq in \
             alternating rounds; p99 of further rounds in which dnsperf reports each query's time. Then half of that rate while endpoints \
             are attached and detached on the second host, 10,000 times per minute"
        ),
        rows: vec![
            Row::of("answers a second over dnsmasq's", over(&names), "", Some(Bar::AtLeast(1.0))),
            Row::of("the same for Services", over(&services), "", Some(Bar::AtLeast(1.0))),
            Row::context("answers a second", rate, ""),
            Row::context("for Services", services.median(), ""),
            Row::of("dnsmasq's", theirs, "", None),
            Row::of("p99 at dnsmasq's rate", p99_at_theirs, "ms", Some(Bar::AtMost(2.0))),
            Row::with_bar("p99 with as many queries as can be", our_p99, "ms", Bar::AtMost(2.0)),
            Row::of("dnsmasq's", their_p99, "ms", None),
            Row::with_bar("with updates: queries lost", updated.lost, "", Bar::AtMost(0.0)),
            Row::with_bar("with updates: p99", updated.p99_ms, "ms", Bar::AtMost(2.0)),
            Row::context("updates a minute", updated.updates_a_minute, ""),
        ],
        notes: Vec::new(),
        details: json!({ "answers": names.to_json(), "services": services.to_json() }),
    })
}

/// Restarts the daemon with all threads on one core.
fn on_one_core(host: &Host) -> Result<()> {
    host.stop()?;
    let start = || -> Result<()> {
        pin_this_thread()?;
        host.start()
    };
    thread::scope(|scope| {
        scope.spawn(start).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    host.wait_ready(TIMEOUT)
}

/// Creates Services, each with a name and an address.
fn serve_all(host: &Host) -> Result<()> {
    let service = |i| {
        format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{i}, namespace: bench}}\n\
             spec: {{selector: {{app: s{i}}}, ports: [{{port: 80}}]}}\n"
        )
    };
    let path = host.dir().join("services.yaml");
    fs::write(&path, (0..NAMES).map(service).collect::<String>())?;
    host.ctl_ok(&["apply", "-f", path.to_str().context("a path that is not UTF-8")?])?;
    fs::remove_file(&path)?;
    let last = format!("s{}.{SERVICE_DOMAIN}", NAMES - 1);
    wait_until(TIMEOUT, "the last Service's name", || {
        let port = PORT.to_string();
        let found = host.exec_ok(["dig", "+short", "+time=1", "@127.0.0.1", "-p", &port, &last])?;
        ensure!(!found.trim().is_empty(), "no answer");
        Ok(())
    })
}

/// Attaches endpoints on the first host, whose aliases are the names.
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

/// Starts dnsmasq. `None` if it is not installed.
fn dnsmasq(host: &Host, files: &Files) -> Result<Option<Spawned>> {
    if !host.exec(["which", "dnsmasq"])?.success() {
        return Ok(None);
    }
    let hosts = format!("--addn-hosts={}", files.hosts().display());
    let port = format!("--port={PEER_PORT}");
    let fixed = ["taskset", "-c", SERVER, "dnsmasq", "-k", "--listen-address=127.0.0.1", "--bind-interfaces"];
    let rest = ["--no-resolv", "--no-hosts", "--pid-file=", "--conf-file=/dev/null", &port, &hosts];
    let server = host.spawn(fixed.into_iter().chain(rest))?;
    wait_until(TIMEOUT, "dnsmasq to answer", || {
        let port = PEER_PORT.to_string();
        let found = host.exec_ok(["dig", "+short", "+time=1", "@127.0.0.1", "-p", &port, "n1.bench.test"])?;
        ensure!(found.trim() == "10.99.0.2", "{found}");
        Ok(())
    })?;
    Ok(Some(server))
}
