//! `many`: 10,000 Services of three endpoints on a host, compared with the reference layouts.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use netns_lab::{Host, Workload, wait_until};
use serde_json::{Map, Value, json};

use super::reference::{self, Shown};
use super::{NETWORK, PORT, apply, backend, endpoint_addresses, ready, service, service_address, slice};
use crate::client::{self, Client};
use crate::commits::{Commits, SERVICES};
use crate::report::{Bar, Figure, Row};
use crate::stats::{Samples, ms};
use crate::{Bench, connect};

/// Number of Services when changes are first measured.
const FEW: usize = 100;
const BACKENDS: [&str; 3] = ["one", "two", "three"];
/// Timeout for loading all Services with an unoptimised build.
const PATIENCE: Duration = Duration::from_secs(120);
/// Timeout for the commit of one change.
const COMMIT: Duration = Duration::from_secs(5);

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let count = bench.plan.services;
    ensure!(count > FEW, "fewer than {FEW} Services");
    let lab = bench.lab(1)?;
    lab.start_all()?;
    let host = lab.host("h1")?;
    host.ctl_ok(&["network", "create", NETWORK, "--mode", "l3", "--subnet", "10.99.0.0/16"])?;
    let backends: Vec<SocketAddr> =
        BACKENDS.into_iter().map(|name| backend(host, name)).collect::<Result<_>>()?;
    let client = host.workload("client")?;
    Client::connect(&host.socket())?.ask(&client::attach("client", NETWORK, client.path(), None))?;
    // The measured Service is the last one, by its name and by its address.
    let last = service_address(count - 1)?;
    fill(host, 0..FEW - 1)?;
    apply(host, &[service("z", last, Some(super::LABEL))])?;
    let to = SocketAddr::from((last, PORT));
    settled(host, &client, to)?;
    let few = changes(bench, host)?;
    fill(host, FEW - 1..count - 1)?;
    settled(host, &client, to)?;
    let loads = loads(bench, host, &client, to)?;
    let many = changes(bench, host)?;
    let direct = *backends.first().context("no backend")?;
    let (there, past) = connect::in_turns(&client, direct, to, bench.plan.connects)?;
    drop(lab);
    let references = reference::measure(bench)?;
    Ok(figure(bench, &loads, (&few, &many), (&there, &past), &references))
}

fn fill(host: &Host, numbers: std::ops::Range<usize>) -> Result<()> {
    let numbers: Vec<usize> = numbers.collect();
    for some in numbers.chunks(1000) {
        let mut objects = Vec::new();
        for number in some {
            let name = format!("s{number}");
            objects.push(service(&name, service_address(*number)?, None));
            objects.push(slice(&name, endpoint_addresses(*number)?));
        }
        apply(host, &objects)?;
    }
    Ok(())
}

/// Waits until the kernel has all Services.
fn settled(host: &Host, client: &Workload, last: SocketAddr) -> Result<()> {
    wait_until(PATIENCE, "all Services in the kernel", || host.ctl_ok(&["verify"]).map(drop))?;
    wait_until(PATIENCE, "the last Service", || {
        client.run(|| connect::connect(last, Duration::from_secs(1)).map(drop))?
    })
}

/// Measures loading in seconds: from the deletion of the table by another program until a connection to the
/// last Service is answered, which is when all are committed.
fn loads(bench: &Bench, host: &Host, client: &Workload, last: SocketAddr) -> Result<Samples> {
    let mut seconds = Vec::new();
    for _ in 0..bench.plan.service_loads {
        host.exec_ok(["nft", "delete", "table", "inet", "ovl-services"])?;
        let start = Instant::now();
        client.run(|| {
            while connect::connect(last, Duration::from_millis(20)).is_err() {
                ensure!(start.elapsed() < PATIENCE, "the Services did not come back");
                std::thread::sleep(Duration::from_micros(200));
            }
            Ok(())
        })??;
        seconds.push(start.elapsed().as_secs_f64());
        settled(host, client, last)?;
    }
    Ok(Samples::new(seconds))
}

/// Measures changes: from just before the request that marks a backend unready or ready until the kernel's
/// notification of the commit.
fn changes(bench: &Bench, host: &Host) -> Result<Samples> {
    let commits = Commits::watch([host], SERVICES)?;
    let mut client = Client::connect(&host.socket())?;
    let mut times = Vec::new();
    for number in 0..bench.plan.service_changes {
        let name = BACKENDS.get(number / 2 % BACKENDS.len()).context("no backend")?;
        commits.drain()?;
        let start = Instant::now();
        client.ask(&ready(name, number % 2 == 1))?;
        times.push(ms(commits.all(COMMIT)?.saturating_duration_since(start)));
    }
    Ok(Samples::new(times))
}

fn figure(
    bench: &Bench,
    loads: &Samples,
    (few, many): (&Samples, &Samples),
    (there, past): (&Samples, &Samples),
    references: &[Shown],
) -> Figure {
    let count = bench.plan.services;
    let ratio = |through: &Samples, direct: &Samples| through.percentile(50.0) / direct.percentile(50.0);
    let named = |what: &str, layout: &Shown| format!("{what}: {}", layout.layout.text());
    let mut rows = vec![Row::with_bar(
        &format!("{count} Services of 3 endpoints loaded, median"),
        loads.median(),
        "s",
        Bar::AtMost(0.5),
    )];
    rows.extend(references.iter().map(|it| Row::context(&named("loaded", it), it.load, "s")));
    rows.push(Row::with_bar(
        &format!("one endpoint added or removed among {count}, request to commit, p50"),
        many.percentile(50.0),
        "ms",
        Bar::AtMost(1.0),
    ));
    rows.push(Row::context(&format!("the same among {FEW}, p50"), few.percentile(50.0), "ms"));
    rows.extend(references.iter().map(|it| {
        Row::context(&named(&format!("the same among {count}, p50"), it), it.change.percentile(50.0), "ms")
    }));
    rows.push(Row::with_bar(
        "connecting through the last one, relative to a direct connection, p50",
        ratio(past, there),
        "",
        Bar::AtMost(1.2),
    ));
    rows.extend(references.iter().map(|it| {
        Row::context(&named("relative to a direct connection", it), ratio(&it.through, &it.direct), "")
    }));
    rows.push(Row::context("connecting directly, p50", there.percentile(50.0) * 1000.0, "µs"));
    let references: Map<String, Value> = references
        .iter()
        .map(|it| {
            let shown = json!({
                "load_s": it.load,
                "change_ms": it.change.to_json(),
                "direct_ms": it.direct.to_json(),
                "through_ms": it.through.to_json(),
            });
            (it.layout.text().to_owned(), shown)
        })
        .collect();
    Figure {
        setup: format!(
            "one host, a routed network, {count} Services of three endpoints each. Loaded: from the deletion of the \
             table by another program until a connection through the last Service is answered, {} \
             times. Changed: {} requests over the socket that mark a backend of the last Service unready and ready, \
             until the kernel's notification of the commit. Connected: {} times each, alternating, from a workload to one \
             on the same host. Reference layouts: the same Services between two namespaces behind a router, loaded \
             with `iptables-legacy-restore --noflush` and `nft -f`",
            loads.len(),
            many.len(),
            there.len(),
        ),
        rows,
        notes: Vec::new(),
        details: json!({
            "load_s": loads.to_json(),
            "change_ms": many.to_json(),
            "change_among_few_ms": few.to_json(),
            "connect_direct_ms": there.to_json(),
            "connect_through_ms": past.to_json(),
            "references": references,
        }),
    }
}
