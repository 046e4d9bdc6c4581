//! `failover`: time from the loss of the host that announces a LoadBalancer's address until another host
//! answers.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use netns_lab::{Lab, Netns, wait_until};
use serde_json::json;

use super::{BACKEND_PORT, LABEL, NETWORK, PORT, apply, backend};
use crate::report::{Bar, Figure, Row};
use crate::stats::Samples;
use crate::{Bench, connect};

const HOSTS: usize = 4;
const ADDRESS: &str = "192.168.77.225";
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let lab = bench.lab_with(HOSTS, &format!("load_balancer_pool = [\"{ADDRESS}/32\"]"))?;
    lab.start_all()?;
    let first = lab.host("h1")?;
    first.ctl_ok(&["network", "create", NETWORK, "--mode", "l3", "--subnet", "10.99.0.0/16"])?;
    for host in lab.hosts() {
        wait_until(PATIENCE, "the network", || backend(host, &format!("{}b", host.name())).map(drop))?;
    }
    apply(
        first,
        &[json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": { "name": "web" },
            "spec": {
                "type": "LoadBalancer",
                "selector": { "app": LABEL },
                "ports": [{ "port": PORT, "targetPort": BACKEND_PORT }],
            },
        })],
    )?;
    let client = lab.switch();
    client.exec_ok(["ip", "addr", "add", "192.168.77.250/24", "dev", "br0"])?;
    let at = SocketAddr::new(ADDRESS.parse()?, PORT);
    let mut times = Vec::new();
    for round in 0..bench.plan.deaths {
        let holder = announced(&lab, &client, at)?;
        times.push(lose(&lab, &client, &holder, at)?);
        if round + 1 < bench.plan.deaths {
            let host = lab.host(&holder)?;
            host.restore()?;
            lab.start_all()?;
            wait_until(PATIENCE, "the network", || backend(host, &format!("{holder}b{round}")).map(drop))?;
        }
    }
    let times = Samples::new(times);
    Ok(Figure {
        setup: format!(
            "{HOSTS} hosts, a routed network with a backend on each, default settings; the host that announces the \
             address loses its daemon (SIGKILL), its link and its namespace, {} times; a client on the underlay \
             connects repeatedly; from just before the loss until the first connection after it is accepted",
            times.len()
        ),
        rows: vec![
            Row::with_bar("an address taken over from a lost host, max", times.max(), "s", Bar::AtMost(5.0)),
            Row::context("the same, median", times.median(), "s"),
        ],
        notes: Vec::new(),
        details: json!({ "taken_over_s": times.to_json() }),
    })
}

/// Waits until all hosts agree on the announcing host and it answers, and returns its name.
fn announced(lab: &Lab, client: &Netns, at: SocketAddr) -> Result<String> {
    wait_until(PATIENCE, "exactly one host to announce the address", || {
        let mut all = Vec::new();
        for host in lab.hosts() {
            let found = host.ctl_json(&["get", "endpoints", "web"])?;
            let said = found["announced"][0]["nodes"].as_array().context("no announcement is listed")?;
            all.extend(said.iter().filter_map(|name| name.as_str()).map(str::to_owned));
        }
        all.dedup();
        ensure!(all.len() == 1, "{all:?}");
        client.run(|| connect::connect(at, Duration::from_secs(1)).map(drop))??;
        Ok(all.pop())
    })
}

/// Loses the announcing host, and returns the seconds until a connection succeeds again.
fn lose(lab: &Lab, client: &Netns, holder: &str, at: SocketAddr) -> Result<f64> {
    let host = lab.host(holder)?;
    let start = Instant::now();
    host.destroy()?;
    // A connection that was accepted during the loss was accepted by the lost host.
    let lost = Instant::now();
    client.run(|| {
        while connect::connect(at, Duration::from_millis(100)).is_err() {
            ensure!(lost.elapsed() < PATIENCE, "no host took the address over");
        }
        Ok(())
    })??;
    Ok(start.elapsed().as_secs_f64())
}
