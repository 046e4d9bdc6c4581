//! `ports`: the cost of one more published port, and of a connection through the last one, with a thousand
//! published ports.

use std::net::SocketAddr;
use std::time::Instant;

use anyhow::{Context, Result};
use netns_lab::{Host, Workload};
use serde_json::{Value, json};

use super::Bench;
use super::client::{self, Client};
use super::connect;
use super::report::{Bar, Figure, Row};
use super::stats::{Samples, ms};

const NETWORK: &str = "bench";
/// First published port of the host.
const FIRST: u16 = 20_000;
const SUBNET: &str = "10.77.0.0/16";
const GATEWAY: &str = "192.168.77.250";
const HOST: &str = "192.168.77.1";

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let lab = bench.lab(1)?;
    lab.start_all()?;
    let host = lab.host("h1")?;
    host.ctl_ok(&["network", "create", NETWORK, "--driver", "bridge", "--subnet", SUBNET])?;
    let outside = lab.switch();
    outside.exec_ok(["ip", "addr", "add", &format!("{GATEWAY}/24"), "dev", "br0"])?;
    outside.exec_ok(["ip", "route", "add", SUBNET, "via", HOST])?;
    let ports = bench.plan.published;

    let busy = host.workload("busy")?;
    let wishes: Vec<Value> = (0..ports).map(|number| wish(FIRST + number)).collect();
    let attached = ask(host, &busy, wishes)?;
    let address = attached["addresses"][0].as_str().and_then(|net| net.split('/').next());
    let direct: SocketAddr = format!("{}:80", address.context("no address")?).parse()?;
    let through: SocketAddr = format!("{HOST}:{}", FIRST + ports - 1).parse()?;

    let with_and_without = one_more(host, bench.plan.publishes, FIRST + ports)?;
    connect::serve(&busy, 80)?;
    let (there, past) = connect::in_turns(&outside, direct, through, bench.plan.connects)?;
    let (with, without) = &with_and_without;
    Ok(Figure {
        setup: format!(
            "one host, a bridge network, {ports} ports published for one endpoint; {} attaches with one more port and \
             as many without, alternating, over the socket; {} connections from outside to the endpoint's address through a \
             route and as many to the last port, alternating, on all cores",
            with.len(),
            there.len()
        ),
        rows: vec![
            Row::with_bar(
                "one more published port, p50 (an attach with it minus one without)",
                with.percentile(50.0) - without.percentile(50.0),
                "ms",
                Bar::AtMost(2.0),
            ),
            Row::context("an attach with a port, p50", with.percentile(50.0), "ms"),
            Row::context("an attach without, p50", without.percentile(50.0), "ms"),
            Row::with_bar(
                "connecting through the last port, relative to a direct connection, p50",
                past.percentile(50.0) / there.percentile(50.0),
                "",
                Bar::AtMost(1.15),
            ),
            Row::context("connecting through the last port, p50", past.percentile(50.0) * 1000.0, "µs"),
            Row::context("connecting directly, p50", there.percentile(50.0) * 1000.0, "µs"),
        ],
        notes: Vec::new(),
        details: json!({
            "attach_with_ms": with.to_json(),
            "attach_without_ms": without.to_json(),
            "connect_through_ms": past.to_json(),
            "connect_direct_ms": there.to_json(),
        }),
    })
}

fn wish(port: u16) -> Value {
    json!({ "host": { "first": port, "last": port }, "container": { "first": 80, "last": 80 }, "transport": "tcp" })
}

fn ask(host: &Host, workload: &Workload, publish: Vec<Value>) -> Result<Value> {
    let mut request = client::attach(workload.name(), NETWORK, workload.path(), None);
    request["publish"] = Value::Array(publish);
    Client::connect(&host.socket())?.ask(&request)
}

/// Attaches with a new port and without one, alternating.
fn one_more(host: &Host, count: usize, first: u16) -> Result<(Samples, Samples)> {
    let workloads = host.bare_workloads("more", 2 * count)?;
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for (number, pair) in workloads.chunks(2).enumerate() {
        let port = first + u16::try_from(number)?;
        for (workload, publish) in pair.iter().zip([vec![wish(port)], Vec::new()]) {
            let times = if publish.is_empty() { &mut without } else { &mut with };
            let start = Instant::now();
            ask(host, workload, publish)?;
            times.push(ms(start.elapsed()));
        }
    }
    Ok((Samples::new(with), Samples::new(without)))
}
