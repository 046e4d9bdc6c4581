//! `label` and `ready`: time from a change at the API server until the last of 8 kernels acts on it.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use netns_lab::wait_until;
use ovl_tests::kubernetes::{ApiServer, Kube};
use serde_json::{Value, json};

use super::{NAMESPACE, NETWORK, pod, service, slice};
use crate::Bench;
use crate::client;
use crate::cluster::{Cluster, address_of};
use crate::cni::ground::network;
use crate::commits::{Commits, POLICY, SERVICES};
use crate::report::{Bar, Figure, Row};
use crate::stats::{Samples, ms};

const HOSTS: usize = 8;
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause between two changes, so that no change is in flight.
const PAUSE: Duration = Duration::from_millis(100);
/// The longest time that a change may take, p99, in milliseconds.
const MOST: f64 = 150.0;

/// Eight nodes of an API server with an isolated pod on each, and a client on the first one.
struct World {
    cluster: Cluster,
    api: ApiServer,
    _kubes: Vec<Kube>,
    /// The addresses of the isolated pods.
    pods: Vec<IpAddr>,
}

impl World {
    fn start(bench: &Bench) -> Result<Self> {
        let cluster = Cluster { lab: bench.lab(HOSTS)? };
        cluster.lab.start_all()?;
        network(&cluster.lab, NETWORK, &["--subnet", "10.60.0.0/16"])?;
        let mut api = ApiServer::new();
        let program = bench.ovl_kube()?;
        let kubes = cluster.hosts().iter().map(|host| Kube::start_program(&program, &mut api, host, &[]));
        let kubes = kubes.collect::<Result<Vec<_>>>()?;
        api.put(&json!({ "kind": "Namespace", "metadata": { "name": NAMESPACE } }));
        api.put(&json!({
            "kind": "NetworkPolicy", "metadata": { "name": "db", "namespace": NAMESPACE },
            "spec": {
                "podSelector": { "matchLabels": { "app": "db" } }, "policyTypes": ["Ingress"],
                "ingress": [{ "from": [{ "podSelector": { "matchLabels": { "app": "api" } } }] }],
            },
        }));
        let mut pods = Vec::new();
        for (index, host) in cluster.hosts().iter().enumerate() {
            api.put(&pod(host.name(), &format!("db{index}"), "db"));
            pods.push(attach(&cluster, index, &format!("db{index}"))?);
        }
        attach(&cluster, 0, "client")?;
        let world = World { cluster, api, _kubes: kubes, pods };
        world.label("api");
        world.wait("db0", "db")?;
        world.wait("client", "api")?;
        Ok(world)
    }

    fn label(&self, app: &str) {
        self.api.put(&pod("h1", "client", app));
    }

    /// Waits until all hosts know the label of an endpoint of the first one.
    fn wait(&self, name: &str, app: &str) -> Result<()> {
        for host in self.cluster.hosts() {
            wait_until(PATIENCE, &format!("the label of {name} on {}", host.name()), || {
                let all = host.ctl_json(&["endpoints"])?;
                let found = all.as_array().into_iter().flatten().find(|it| it["name"] == name);
                let labels = found.context("no such endpoint")?["labels"].clone();
                ensure!(labels["app"] == app, "{labels}");
                Ok(())
            })?;
        }
        Ok(())
    }

    /// Takes the time from each change of `change` until the last kernel commits it to the table.
    fn take(&self, table: &'static [u8], rounds: usize, change: impl Fn(usize)) -> Result<[Samples; 2]> {
        let commits = Commits::watch(self.cluster.hosts(), table)?;
        let mut times = [Vec::new(), Vec::new()];
        for number in 0..rounds * 2 {
            std::thread::sleep(PAUSE);
            commits.drain()?;
            let start = Instant::now();
            change(number);
            times[number % 2].push(ms(commits.all(PATIENCE)?.saturating_duration_since(start)));
        }
        Ok(times.map(Samples::new))
    }
}

fn attach(cluster: &Cluster, host: usize, name: &str) -> Result<IpAddr> {
    let workload = cluster.host(host)?.workload(name)?;
    let mut request: Value = client::attach(name, NETWORK, workload.path(), None);
    request["namespace"] = NAMESPACE.into();
    address_of(&cluster.client(host)?.ask(&request)?)
}

pub(crate) fn measure_label(bench: &Bench) -> Result<Figure> {
    let world = World::start(bench)?;
    let [removed, added] = world.take(POLICY, bench.plan.service_changes, |number| {
        world.label(if number % 2 == 0 { "web" } else { "api" });
    })?;
    Ok(figure(
        "a pod's label is changed at the API server, so that policies of an isolated pod on each host let it in, or no \
         longer",
        ["label changed until policies follow on 8 hosts, p99", "the same, p50"],
        &added,
        ("until the pod is not let in any more, p99", &removed),
    ))
}

pub(crate) fn measure_ready(bench: &Bench) -> Result<Figure> {
    let world = World::start(bench)?;
    let set = |is_ready: bool| {
        let endpoints: Vec<_> = (world.pods.iter().enumerate())
            .map(|(n, address)| (*address, format!("h{}", n + 1), n != HOSTS - 1 || is_ready))
            .collect();
        world.api.put(&slice("web", &endpoints));
    };
    world.api.put(&service("web", "10.96.4.1".parse()?));
    set(true);
    for host in world.cluster.hosts() {
        wait_until(PATIENCE, "all backends on all hosts", || {
            let found = host.ctl_json(&["get", "endpoints", "web", "-n", NAMESPACE])?;
            let listed = found["ports"][0]["backends"].as_array().map_or(0, Vec::len);
            ensure!(listed == HOSTS, "{listed} of {HOSTS}");
            host.ctl_ok(&["verify"]).map(drop)
        })?;
    }
    let [removed, added] = world.take(SERVICES, bench.plan.service_changes, |number| set(number % 2 == 1))?;
    Ok(figure(
        "one of eight endpoints in the EndpointSlice of a Service becomes ready, or not ready",
        ["endpoint ready until the last of 8 hosts sends, p99", "the same, p50"],
        &added,
        ("endpoint not ready until no host sends to it, p99", &removed),
    ))
}

fn figure(what: &str, rows: [&str; 2], added: &Samples, (row, removed): (&str, &Samples)) -> Figure {
    Figure {
        setup: format!(
            "{HOSTS} hosts with ovl-kube each, an API server of the tests, a routed network; {} times {what}, {} ms after the \
             last change; from just before the change until the last of the {HOSTS} kernels notifies its commit",
            added.len(),
            PAUSE.as_millis()
        ),
        rows: vec![
            Row::with_bar(rows[0], added.percentile(99.0), "ms", Bar::AtMost(MOST)),
            Row::context(rows[1], added.percentile(50.0), "ms"),
            Row::with_bar(row, removed.percentile(99.0), "ms", Bar::AtMost(MOST)),
        ],
        notes: Vec::new(),
        details: json!({ "added_ms": added.to_json(), "removed_ms": removed.to_json() }),
    }
}
