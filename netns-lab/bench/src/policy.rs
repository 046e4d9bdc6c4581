//! `policies`: the cost of one more pod, and of a connection, with a thousand network policies and ten
//! thousand pods.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use netns_lab::{Host, Workload, wait_until};
use serde_json::{Value, json};

use super::bulk::without_ipv6;
use super::client::{self, Client};
use super::cluster::{Cluster, address_of};
use super::cni::ground::network;
use super::report::{Bar, Figure, Row};
use super::stats::{Samples, ms};
use super::{Bench, connect};

const HOSTS: usize = 8;
const NETWORK: &str = "pods";
const SUBNET: &str = "10.64.0.0/14";
/// Prefix length of each host's block: 2,046 pods.
const BLOCK: &str = "21";
const NAMESPACES: usize = 10;
/// Number of policies that select each pod.
const POLICIES_EACH: usize = 3;
const PORT: u16 = 8080;
const AT_ONCE: usize = 16;
const PATIENCE: Duration = Duration::from_secs(180);

/// Times with or without policies.
#[derive(Default)]
struct Times {
    attach: Vec<f64>,
    connect: Vec<f64>,
}

pub(crate) fn measure(bench: &Bench) -> Result<Figure> {
    let (groups, each) = (bench.plan.policy_groups, bench.plan.policy_pods / HOSTS);
    let cluster = Cluster { lab: bench.lab(HOSTS)? };
    cluster.lab.start_all()?;
    network(&cluster.lab, NETWORK, &["--subnet", SUBNET, "--block", BLOCK])?;
    let (client, server) = ends(&cluster)?;
    let start = Instant::now();
    for index in 0..HOSTS {
        let workloads = cluster.host(index)?.bare_workloads("p", each)?;
        workloads.iter().try_for_each(without_ipv6)?;
        cluster.ask_all(index, each, AT_ONCE, |number| {
            let name = format!("p{number}-{index}");
            pod(&name, &workloads[number], (number * HOSTS + index) % groups)
        })?;
    }
    let rate = (each * HOSTS) as f64 / start.elapsed().as_secs_f64();
    settle(&cluster, 0)?;

    let file = cluster.lab.dir().join("policies.yaml");
    let policies: Vec<String> = (0..groups * POLICIES_EACH).map(|n| policy(n, groups).to_string()).collect();
    fs::write(&file, policies.join("\n---\n"))?;
    let first = cluster.host(0)?;
    let spare = first.bare_workloads("more", 1)?.pop().context("no workload")?;
    let (mut without, mut with, mut enforced) = (Times::default(), Times::default(), Vec::new());
    for _ in 0..bench.plan.policy_rounds {
        take(bench, first, &spare, (&client, server), &mut without)?;
        let start = Instant::now();
        first.ctl_ok(&["apply", "-f", &file.to_string_lossy()])?;
        settle(&cluster, policies.len())?;
        enforced.push(start.elapsed().as_secs_f64());
        take(bench, first, &spare, (&client, server), &mut with)?;
        first.ctl_ok(&["delete", "-f", &file.to_string_lossy()])?;
        settle(&cluster, 0)?;
    }
    Ok(figure((policies.len(), each * HOSTS, rate), &Samples::new(enforced), without, with))
}

fn figure(
    (policies, pods, rate): (usize, usize, f64),
    enforced: &Samples,
    without: Times,
    with: Times,
) -> Figure {
    let [attach, attach_without] = [with.attach, without.attach].map(Samples::new);
    let [connect, connect_without] = [with.connect, without.connect].map(Samples::new);
    Figure {
        setup: format!(
            "{HOSTS} hosts, a routed network, {pods} pods with a separate network namespace each, {policies} policies; each pod \
             selected by {POLICIES_EACH} (two of ingress, one of egress), each with two selectors of peers and an ipBlock. \
             {} attaches on h1 with the policies and as many without them, {} connections from a pod of h1 to one \
             of h2 that policies of both select, in alternating rounds",
            attach.len(),
            connect.len()
        ),
        rows: vec![
            Row::with_bar(
                "a pod added (an attach with the policies minus one without), p50",
                attach.median() - attach_without.median(),
                "ms",
                Bar::AtMost(2.0),
            ),
            Row::context("an attach with the policies, p50", attach.median(), "ms"),
            Row::context("an attach without, p50", attach_without.median(), "ms"),
            Row::with_bar(
                "connecting, relative to connecting without policies, p50",
                connect.median() / connect_without.median(),
                "",
                Bar::AtMost(1.2),
            ),
            Row::context("connecting with the policies, p50", connect.median() * 1000.0, "µs"),
            Row::context("connecting without, p50", connect_without.median() * 1000.0, "µs"),
            Row::context(
                "all policies applied until the last of 8 hosts enforces them",
                enforced.median(),
                "s",
            ),
            Row::context("pods attached, on all hosts one after another", rate, "a second"),
        ],
        notes: Vec::new(),
        details: json!({
            "attach_with_ms": attach.to_json(),
            "attach_without_ms": attach_without.to_json(),
            "connect_with_ms": connect.to_json(),
            "connect_without_ms": connect_without.to_json(),
        }),
    }
}

/// Builds the request that attaches a workload as a pod of a group.
fn pod(name: &str, workload: &Workload, group: usize) -> Value {
    let mut request = client::attach(name, NETWORK, workload.path(), None);
    request["namespace"] = namespace(group).into();
    request["labels"] = json!({ "app": app(group) });
    request
}

fn namespace(group: usize) -> String {
    format!("ns{}", group % NAMESPACES)
}

fn app(group: usize) -> String {
    format!("app{group}")
}

/// Builds the policy with this number. Each group has [`POLICIES_EACH`] policies. Pods of a group accept
/// connections from some of the next groups, and may connect to some of the previous ones.
fn policy(number: usize, groups: usize) -> Value {
    let (group, turn) = (number / POLICIES_EACH, number % POLICIES_EACH);
    let egress = turn == POLICIES_EACH - 1;
    let other = |distance: usize| (group + if egress { groups - distance } else { distance }) % groups;
    // The first peer is in the same namespace.
    let near = other(NAMESPACES * if egress { 1 } else { turn + 1 });
    let far = other(NAMESPACES * turn + 1);
    let selects = |group: usize| json!({ "matchLabels": { "app": app(group) } });
    let peers = json!([
        { "podSelector": selects(near) },
        {
            "namespaceSelector": { "matchLabels": { "kubernetes.io/metadata.name": namespace(far) } },
            "podSelector": selects(far),
        },
        { "ipBlock": {
            "cidr": format!("172.{}.{}.0/24", 16 + turn, group % 256),
            "except": [format!("172.{}.{}.128/28", 16 + turn, group % 256)],
        } },
    ]);
    let ports = json!([{ "protocol": "TCP", "port": PORT }]);
    let (kind, rules) = match egress {
        true => ("Egress", json!({ "to": peers, "ports": ports })),
        false => ("Ingress", json!({ "from": peers, "ports": ports })),
    };
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": { "name": format!("policy{number}"), "namespace": namespace(group) },
        "spec": {
            "podSelector": selects(group),
            "policyTypes": [kind],
            kind.to_lowercase(): [rules],
        },
    })
}

/// Creates a client pod on h1, and a server pod on h2 that the policies allow it to reach.
fn ends(cluster: &Cluster) -> Result<(Workload, SocketAddr)> {
    let make = |index: usize, name: &str, group: usize| -> Result<(Workload, IpAddr)> {
        let workload = cluster.host(index)?.workload(name)?;
        let address = address_of(&cluster.client(index)?.ask(&pod(name, &workload, group))?)?;
        Ok((workload, address))
    };
    let (client, _) = make(0, "client", NAMESPACES)?;
    let (server, address) = make(1, "server", 0)?;
    connect::serve(&server, PORT)?;
    Ok((client, SocketAddr::new(address, PORT)))
}

/// Waits until all hosts and their kernels have this number of policies.
fn settle(cluster: &Cluster, policies: usize) -> Result<()> {
    for host in cluster.hosts() {
        wait_until(PATIENCE, &format!("{policies} policies on {}", host.name()), || {
            let listed = host.ctl_json(&["policy", "ls"])?;
            let count = listed.as_array().map_or(0, Vec::len);
            ensure!(count == policies, "{count} policies");
            host.ctl_ok(&["verify"]).map(drop)
        })?;
    }
    Ok(())
}

fn take(
    bench: &Bench,
    host: &Host,
    spare: &Workload,
    (from, to): (&Workload, SocketAddr),
    times: &mut Times,
) -> Result<()> {
    let mut client = Client::connect(&host.socket())?;
    for number in 0..bench.plan.policy_attaches {
        let name = format!("more{number}");
        let request = pod(&name, spare, 0);
        let start = Instant::now();
        client.ask(&request)?;
        times.attach.push(ms(start.elapsed()));
        let mut detach = client::detach(&name);
        detach["namespace"] = request["namespace"].clone();
        client.ask(&detach)?;
    }
    let count = bench.plan.connects;
    let connects = from.run(move || {
        let once =
            |_| connect::connect(to, Duration::from_secs(5)).context("a connection that the policies allow");
        (0..count).map(once).collect::<Result<Vec<f64>>>()
    })?;
    times.connect.extend(connects?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn policies_allow_the_client_to_reach_the_server() {
        for groups in [30, 340] {
            // A policy of the server's group, and one of the client's group.
            let (ingress, egress) = (policy(0, groups), policy(NAMESPACES * POLICIES_EACH + 2, groups));
            assert_eq!(ingress["spec"]["podSelector"]["matchLabels"]["app"], app(0));
            assert_eq!(
                ingress["spec"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"]["app"],
                app(NAMESPACES)
            );
            assert_eq!(egress["spec"]["podSelector"]["matchLabels"]["app"], app(NAMESPACES));
            assert_eq!(egress["spec"]["egress"][0]["to"][0]["podSelector"]["matchLabels"]["app"], app(0));
            assert_eq!(ingress["metadata"]["namespace"], egress["metadata"]["namespace"]);
        }
    }
}
