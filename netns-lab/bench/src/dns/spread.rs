//! `new-name`: time from an attach on one of 8 hosts until the last of the other hosts resolves its name.

use std::net::UdpSocket;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use netns_lab::Host;
use serde_json::json;

use super::super::Bench;
use super::super::client;
use super::super::cluster::{Cluster, NETWORK};
use super::super::report::{Bar, Figure, Row};
use super::super::stats::{Samples, ms};
use super::{LISTEN, toml};

const HOSTS: usize = 8;
const TIMEOUT: Duration = Duration::from_secs(10);
/// Interval between two queries of a host.
const PACE: Duration = Duration::from_millis(1);

/// Measures the figure of this module.
pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let cluster = Cluster::start(bench.lab_with(HOSTS, &toml())?)?;
    cluster.one_workload_each()?;
    let workloads = cluster.hosts().iter().map(|host| host.workload("named")).collect::<Result<Vec<_>>>()?;
    let mut last = Vec::new();
    for number in 0..bench.plan.announces {
        let index = number % HOSTS;
        let name = format!("e{number}");
        let request = client::attach(&name, NETWORK, workloads[index].path(), None);
        let mut client = cluster.client(index)?;
        let others = cluster.hosts().iter().enumerate().filter(|(other, _)| *other != index);
        let (start, name) = (Instant::now(), &name);
        let found: Result<Vec<f64>> = thread::scope(|scope| {
            let waiting: Vec<_> =
                others.map(|(_, host)| scope.spawn(move || wait_name(host, name, start))).collect();
            client.ask(&request)?;
            let joined = waiting
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            joined.collect()
        });
        last.push(Samples::new(found?).max());
        client.ask(&client::detach(name))?;
    }
    let last = Samples::new(last);
    Ok(Figure {
        setup: format!(
            "{HOSTS} hosts, one network with an endpoint on each; {} attaches one after another on all hosts in turn; from \
             just before the request is written until each of the {} other hosts' resolvers, queried every {} ms, has answered \
             the name",
            bench.plan.announces,
            HOSTS - 1,
            PACE.as_millis()
        ),
        rows: vec![
            Row::with_bar("last of 7 resolvers, p99", last.percentile(99.0), "ms", Bar::AtMost(60.0)),
            Row::context("last of 7 resolvers, p50", last.median(), "ms"),
        ],
        notes: Vec::new(),
        details: json!({ "last_ms": last.to_json() }),
    })
}

/// Returns the milliseconds until this host resolves the name.
fn wait_name(host: &Host, name: &str, start: Instant) -> Result<f64> {
    let question = question(&format!("{name}.{NETWORK}.ovl.internal"));
    host.run(|| {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        socket.connect(LISTEN)?;
        socket.set_read_timeout(Some(TIMEOUT))?;
        let mut buffer = [0; 512];
        loop {
            socket.send(&question)?;
            let length = socket.recv(&mut buffer)?;
            // NOERROR, with one answer.
            if length > 12 && buffer[3] & 15 == 0 && buffer[7] == 1 {
                return Ok(ms(start.elapsed()));
            }
            ensure!(start.elapsed() < TIMEOUT, "{} did not resolve {name} in time", host.name());
            thread::sleep(PACE);
        }
    })?
}

/// Builds a query for the A records of a name.
fn question(name: &str) -> Vec<u8> {
    let mut message = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend_from_slice(label.as_bytes());
    }
    message.extend_from_slice(&[0, 0, 1, 0, 1]);
    message
}
