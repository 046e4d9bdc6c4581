//! `attach`: the time that a caller waits, over the socket and with `ovlctl`.

use std::time::Instant;

use anyhow::{Result, ensure};
use netns_lab::Workload;
use serde_json::json;

use super::Bench;
use super::client::{self, Client};
use super::cluster::{Cluster, NETWORK};
use super::report::{Bar, Figure, Row};
use super::stats::{Samples, ms};

const HOSTS: usize = 3;
/// Group size for medians, which show whether the time grows with the number of endpoints.
const GROUP: usize = 100;

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let cluster = Cluster::start(bench.lab(HOSTS)?)?;
    cluster.one_workload_each()?;
    let host = cluster.host(0)?;
    let (count, by_process) = (bench.plan.attaches, bench.plan.attach_processes);
    let workloads = host.bare_workloads("e", count + by_process)?;
    let (by_socket, by_process) = workloads.split_at(count);

    let mut times = Vec::new();
    for workload in by_socket {
        let request = client::attach(workload.name(), NETWORK, workload.path(), None);
        // Each call opens a connection, as ovlctl and a CNI plugin do.
        let start = Instant::now();
        Client::connect(&host.socket())?.ask(&request)?;
        times.push(ms(start.elapsed()));
    }
    let groups: Vec<f64> = times.chunks(GROUP).map(|group| Samples::new(group.to_vec()).median()).collect();
    let first = times.first().copied().unwrap_or(f64::NAN);
    let processes = by_ovlctl(&cluster, by_process)?;
    // Check that the endpoints exist in the kernels.
    cluster.wait_each_holds(&[1, 2], 0, 1 + count + by_process.len())?;

    let times = Samples::new(times);
    let last_group = groups.last().copied().unwrap_or(f64::NAN);
    Ok(Figure {
        setup: format!(
            "{HOSTS} otherwise idle hosts, one network with an endpoint on each; {count} attaches on h1, one after \
             another into new namespaces, each on its own connection (including connect), then {} by \
             `ovlctl`. Bridge and host-local CNI plugins: 7.6 ms",
            by_process.len()
        ),
        rows: vec![
            Row::with_bar("over the socket, p50", times.percentile(50.0), "ms", Bar::AtMost(4.0)),
            Row::context("over the socket, p99", times.percentile(99.0), "ms"),
            Row::context("over the socket, p50 of the last hundred", last_group, "ms"),
            Row::context("by `ovlctl attach`, including its start, p50", processes.percentile(50.0), "ms"),
        ],
        notes: Vec::new(),
        details: json!({
            "socket_ms": times.to_json(),
            "first_ms": first,
            "p50_of_each_hundred_ms": groups,
            "ovlctl_ms": processes.to_json(),
        }),
    })
}

/// Measures `ovlctl attach` from before its start until its exit.
fn by_ovlctl(cluster: &Cluster, workloads: &[Workload]) -> Result<Samples> {
    let mut times = Vec::new();
    for workload in workloads {
        let args = ["attach", workload.name(), "--network", NETWORK, "--netns", workload.path_str()];
        let mut command = cluster.host(0)?.ctl_command(&args)?;
        let start = Instant::now();
        let output = command.output()?;
        times.push(ms(start.elapsed()));
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "`ovlctl attach` failed: {}", said.trim());
    }
    Ok(Samples::new(times))
}
