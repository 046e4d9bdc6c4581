//! Endpoints that network policies select on the fast path: the stack judges their flows, and what it has let through takes it.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Underlay, wait_until};
use ovl_tests::fast::{BOTH, BOTH_SWITCHED, PORT, Pods, SWITCHED, at, counted, lab, talk, wait_fast};
use ovl_tests::policy::wait_enforced;
use ovl_tests::service::{Connection, UdpClient, apply};
use ovl_tests::{Attached, Flow, SOON, attach, ping_all_pairs, start_lab_with, wait_clean};
use serde_json::{Value, json};

const V4: &[&str] = &["--subnet", "10.60.0.0/16"];

/// A policy that selects `app=web` in both directions, and lets in and out only from and to these peers.
fn policy(name: &str, peer: &Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": { "name": name },
        "spec": {
            "podSelector": { "matchLabels": { "app": "web" } }, "policyTypes": ["Ingress", "Egress"],
            "ingress": [{ "from": [peer] }], "egress": [{ "to": [peer] }],
        },
    })
}

fn web() -> Value {
    json!({ "podSelector": { "matchLabels": { "app": "web" } } })
}

fn namespace(labels: &Value) -> String {
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "default", "labels": labels } })
        .to_string()
}

fn is_refused(from: &Attached, to: SocketAddr) -> bool {
    UdpClient::open(&from.workload, to).unwrap().ask().is_err()
}

/// Applies manifests, and waits until all hosts enforce them.
fn enforce(lab: &Lab, manifest: &str) {
    apply(lab, &lab["h1"], manifest).unwrap();
    lab.hosts().iter().for_each(|host| wait_enforced(host).unwrap());
}

fn delete(lab: &Lab, policy: &str) {
    lab["h1"].ctl_ok(&["delete", "networkpolicy", policy]).unwrap();
    lab.hosts().iter().for_each(|host| wait_enforced(host).unwrap());
}

/// Open flows to a server.
struct Flows {
    connection: Connection,
    datagrams: UdpClient,
}

impl Flows {
    fn open(from: &Attached, to: SocketAddr) -> Result<Self> {
        let mut connection = Connection::open(&from.workload, to)??;
        connection.read_answer()?;
        Ok(Self { connection, datagrams: UdpClient::open(&from.workload, to)? })
    }

    fn ask(&mut self) -> Result<()> {
        self.connection.ask()?;
        self.datagrams.ask()?;
        Ok(())
    }

    /// Uses the flows until they take the fast path on a host.
    fn wait_fast(&mut self, host: &Host, way: &str) -> Result<()> {
        wait_fast(host, &[way], || (0..3).try_for_each(|_| self.ask()))
    }

    fn ensure_cut(&mut self) -> Result<()> {
        ensure!(self.connection.ask().is_err(), "a connection goes on");
        ensure!(self.datagrams.ask().is_err(), "datagrams are answered");
        Ok(())
    }
}

fn assert_judged(config: LabConfig, backend: &str, subnets: &[&str], ways: [&str; 2]) {
    let pods = &Pods::start(start_lab_with(config).unwrap(), backend, subnets).unwrap();
    let Pods { lab, a, b, c, .. } = pods;
    let h1 = &lab["h1"];
    let strangers = [("h1", "near"), ("h2", "far")]
        .map(|(host, name)| attach(&lab[host], name, "pods", &["--label", "app=other"]).unwrap());
    ping_all_pairs(&[strangers[0].clone(), a.clone(), c.clone()], SOON).unwrap();
    enforce(lab, &policy("inside", &web()).to_string());
    pods.wait_fast(ways).unwrap();
    assert!(counted(h1, "slow")["policy"] > 0);
    pods.ensure_transferred().unwrap();
    for stranger in &strangers {
        for (to, address) in [b, c].iter().flat_map(|to| to.addresses().into_iter().map(move |it| (to, it))) {
            assert!(is_refused(stranger, at(&address, PORT)), "{} reaches {}", stranger.name, to.name);
        }
    }
    assert!(Connection::open(&strangers[0].workload, at(&b.address(), PORT)).unwrap().is_err());
    let drops = h1.ctl_ok(&["policy", "drops"]).unwrap();
    assert!(drops.contains("near") && drops.contains("far"), "{drops}");
    pods.ensure_well().unwrap();
}

#[test]
fn what_policies_allow_takes_it_by_direct_routes() {
    let config = lab(2).underlay(Underlay::Dual);
    assert_judged(config, "direct", V4, ["direct_out", "direct_in"]);
}

#[test]
fn what_policies_allow_takes_it_by_direct_routes_over_ipv6() {
    let config = lab(2).underlay(Underlay::V6);
    assert_judged(config, "direct", &["--subnet", "fd60::/48"], ["direct_out", "direct_in"]);
}

#[test]
fn what_policies_allow_takes_it_in_vxlan() {
    assert_judged(lab(2), "vxlan", BOTH, ["vxlan_out", "vxlan_in"]);
}

#[test]
fn what_policies_allow_takes_it_on_a_switched_network() {
    assert_judged(lab(2), SWITCHED, BOTH_SWITCHED, ["vxlan_out", "vxlan_in"]);
}

#[test]
fn what_policies_allow_takes_it_by_filters() {
    assert_judged(lab(2).without_tcx(), "vxlan", BOTH, ["vxlan_out", "vxlan_in"]);
}

#[test]
fn changes_cut_flows_on_it_with_their_next_packets() {
    assert_changes_cut("direct", V4, "direct_in");
    assert_changes_cut(SWITCHED, BOTH_SWITCHED, "vxlan_in");
}

fn assert_changes_cut(backend: &str, subnets: &[&str], into: &str) {
    let Pods { lab, a, b, c, .. } = &Pods::start(start_lab_with(lab(2)).unwrap(), backend, subnets).unwrap();
    let h1 = &lab["h1"];
    let nothing = json!({ "podSelector": { "matchLabels": { "app": "none" } } });
    let team = json!({ "namespaceSelector": { "matchLabels": { "team": "a" } } });
    let changes = [
        // A policy that is changed.
        (policy("first", &web()).to_string(), policy("first", &nothing).to_string()),
        // A label of a namespace.
        (
            format!("{}\n---\n{}", namespace(&json!({ "team": "a" })), policy("first", &team)),
            namespace(&json!({ "team": "b" })),
        ),
    ];
    for (allowing, forbidding) in changes {
        enforce(lab, &allowing);
        for address in b.addresses() {
            let to = at(&address, PORT);
            for (from, way) in [(a, "local"), (c, into)] {
                let mut flows = Flows::open(from, to).unwrap();
                flows.wait_fast(h1, way).unwrap();
                enforce(lab, &forbidding);
                flows.ensure_cut().unwrap();
                enforce(lab, &allowing);
            }
        }
    }
    // Without policies flows are not judged, and with the first one they are: those that nothing allows end.
    delete(lab, "first");
    for (from, way) in [(a, "local"), (c, into)] {
        let mut flows = Flows::open(from, at(&b.address(), PORT)).unwrap();
        flows.wait_fast(h1, way).unwrap();
        enforce(lab, &policy("closed", &nothing).to_string());
        flows.ensure_cut().unwrap();
        delete(lab, "closed");
    }
    wait_clean(lab.hosts(), SOON).unwrap();
}

/// Flows that policies allow go on while those change, and take the fast path again.
#[test]
fn changes_do_not_disturb_what_is_still_allowed() {
    for (backend, subnets, into) in [("direct", V4, "direct_in"), (SWITCHED, BOTH_SWITCHED, "vxlan_in")] {
        let Pods { lab, a, b, c, .. } =
            &Pods::start(start_lab_with(lab(2)).unwrap(), backend, subnets).unwrap();
        let h1 = &lab["h1"];
        enforce(lab, &policy("first", &web()).to_string());
        wait_fast(h1, &["local", into], || talk(a, b).and_then(|()| talk(c, b))).unwrap();
        let mut open = Flows::open(c, at(&b.address(), PORT)).unwrap();
        open.wait_fast(h1, into).unwrap();
        let running = [Flow::start(a, b).unwrap(), Flow::start(c, b).unwrap()];
        for round in 0..4 {
            let more = policy(&format!("more-{round}"), &json!({ "ipBlock": { "cidr": "192.0.2.0/24" } }));
            apply(lab, h1, &more.to_string()).unwrap();
            running.iter().for_each(|flow| flow.run_for_a_second().unwrap());
            open.wait_fast(h1, into).unwrap();
        }
        for round in 0..4 {
            h1.ctl_ok(&["delete", "networkpolicy", &format!("more-{round}")]).unwrap();
            running.iter().for_each(|flow| flow.run_for_a_second().unwrap());
            open.wait_fast(h1, into).unwrap();
        }
        // What is remembered of flows ends, as if the map had no more room for them.
        h1.ctl_ok(&["trace", "a", "b:80"]).unwrap();
        open.ask().unwrap();
        wait_until(SOON, "the end of the pause", || -> Result<()> {
            ensure!(h1.ctl_json(&["status"])?["fast_path"]["paused"] == false);
            Ok(())
        })
        .unwrap();
        open.wait_fast(h1, into).unwrap();
        // Another daemon has other marks of connections.
        h1.restart().unwrap();
        h1.wait_ready(SOON).unwrap();
        open.wait_fast(h1, into).unwrap();
        for flow in running {
            flow.finish_without_loss().unwrap();
        }
        wait_clean(lab.hosts(), SOON).unwrap();
    }
}

/// Answers pass only because connection tracking knows the flow, though nearly all of its packets bypass it.
#[test]
fn connection_tracking_goes_on_knowing_flows_on_it() {
    const TIMEOUT: u64 = 5;
    for (backend, subnets, into) in [("direct", V4, "direct_in"), (SWITCHED, BOTH_SWITCHED, "vxlan_in")] {
        let Pods { lab, a, b, c, .. } =
            &Pods::start(start_lab_with(lab(2)).unwrap(), backend, subnets).unwrap();
        let h1 = &lab["h1"];
        for (host, name) in lab.hosts().iter().flat_map(|host| ["", "_stream"].map(|name| (host, name))) {
            let setting = format!("net.netfilter.nf_conntrack_udp_timeout{name}={TIMEOUT}");
            host.exec_ok(["sysctl", "-qw", &setting]).unwrap();
        }
        let one_way = json!([
            { "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": { "name": "clients" },
              "spec": { "podSelector": {}, "policyTypes": ["Ingress"] } },
            { "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": { "name": "server" },
              "spec": { "podSelector": { "matchLabels": { "role": "server" } }, "policyTypes": ["Ingress"],
                        "ingress": [{}] } },
        ]);
        let server = attach(h1, "server", "pods", &["--label", "role=server"]).unwrap();
        ping_all_pairs(&[a.clone(), c.clone(), server.clone()], SOON).unwrap();
        for each in one_way.as_array().into_iter().flatten() {
            enforce(lab, &each.to_string());
        }
        assert!(is_refused(c, at(&b.address(), PORT)));
        let before = counted(h1, "fast");
        let flows = [Flow::start(a, &server).unwrap(), Flow::start(c, &server).unwrap()];
        for _ in 0..3 * TIMEOUT {
            flows.iter().for_each(|flow| flow.run_for_a_second().unwrap());
        }
        let after = counted(h1, "fast");
        for flow in flows {
            flow.finish_without_loss().unwrap();
        }
        // 200 packets a second in each direction, of which one took the stack.
        for (way, each_way) in [("local", 2), (into, 1)] {
            let taken = after[way] - before[way];
            assert!(taken >= each_way * 190 * 3 * TIMEOUT, "{way}: {before:?} {after:?}");
        }
    }
}
