//! The way from flannel and kube-proxy, node by node, as docs/kubernetes.md describes it: ovld runs on all nodes first, and
//! one node after the other gets its pods from ovl. Pods of both kinds reach each other and the Services all the while.
//!
//! What flannel (backend `vxlan`, with its masquerading) and kube-proxy (mode nftables) have in a kernel is made by hand.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Netns, Workload, wait_until};
use ovl_tests::kubernetes::{ApiServer, Kube};
use ovl_tests::routed::create_routed_network;
use ovl_tests::service::{NamedServer, ask, wait_answers};
use ovl_tests::{SOON, attach, start_lab_with, wait_clean};
use serde_json::{Value, json};

const SERVICE: &str = "10.96.0.70";

/// The block of flannel on the n-th host is 10.244.n.0/24, and its own address 10.244.n.0.
fn flannel(lab: &Lab) {
    for (n, host) in (1..).zip(lab.hosts()) {
        let own = host.address().unwrap().to_string();
        let ip = |args: &str| drop(host.exec_ok(["ip"].into_iter().chain(args.split(' '))).unwrap());
        ip(&format!("link add flannel.1 type vxlan id 1 local {own} dstport 8472 nolearning"));
        ip(&format!("link set flannel.1 address 02:00:00:00:00:0{n} up"));
        ip(&format!("addr add 10.244.{n}.0/32 dev flannel.1"));
        ip("link add cni0 type bridge");
        ip(&format!("addr add 10.244.{n}.1/24 dev cni0"));
        ip("link set cni0 up");
        for (other, peer) in (1..).zip(lab.hosts()).filter(|(other, _)| *other != n) {
            let (mac, at) = (format!("02:00:00:00:00:0{other}"), peer.address().unwrap());
            ip(&format!("route add 10.244.{other}.0/24 via 10.244.{other}.0 dev flannel.1 onlink"));
            ip(&format!("neigh add 10.244.{other}.0 lladdr {mac} dev flannel.1 nud permanent"));
            host.exec_ok(["bridge", "fdb", "add", &mac, "dev", "flannel.1", "dst", &at.to_string()]).unwrap();
        }
        host.exec_ok(["sysctl", "-qw", "net.ipv4.ip_forward=1"]).unwrap();
        // As `--ip-masq`: what leaves the network of pods has the node's address.
        for rule in [
            "add table ip flannel-ipv4",
            "add chain ip flannel-ipv4 postrtg { type nat hook postrouting priority srcnat; policy accept; }",
            "add rule ip flannel-ipv4 postrtg ip saddr 10.244.0.0/16 ip daddr 10.244.0.0/16 return",
            "add rule ip flannel-ipv4 postrtg ip saddr 10.244.0.0/16 ip daddr != 224.0.0.0/4 masquerade fully-random",
            "add rule ip flannel-ipv4 postrtg ip saddr != 10.244.0.0/16 ip daddr 10.244.0.0/16 masquerade fully-random",
        ] {
            host.exec_ok(["nft", rule]).unwrap();
        }
    }
}

/// A pod of flannel with the last byte of its address.
fn flannel_pod(host: &Host, n: u8, last: u8) -> (Workload, String) {
    let name = format!("f{n}-{last}");
    let workload = host.workload(&name).unwrap();
    let address = format!("10.244.{n}.{last}");
    let run = |args: &[&str]| drop(host.exec_ok(args.iter().copied()).unwrap());
    run(&[
        "ip",
        "link",
        "add",
        &name,
        "mtu",
        "1450",
        "type",
        "veth",
        "peer",
        "name",
        "eth0",
        "netns",
        workload.netns_name(),
    ]);
    run(&["ip", "link", "set", &name, "master", "cni0", "up"]);
    let inside = |args: &str| drop(workload.exec_ok(["ip"].into_iter().chain(args.split(' '))).unwrap());
    inside("link set lo up");
    inside(&format!("addr add {address}/24 dev eth0"));
    inside("link set eth0 mtu 1450 up");
    inside(&format!("route add default via 10.244.{n}.1"));
    (workload, address)
}

/// What kube-proxy has for the Service: none on a host that has none.
fn kube_proxy(host: &Host, backends: &[&str]) {
    host.exec(["nft", "delete", "table", "ip", "kube-proxy"]).unwrap();
    if backends.is_empty() {
        return;
    }
    let map: Vec<String> = backends.iter().enumerate().map(|(n, at)| format!("{n} : {at}")).collect();
    let chosen = format!("numgen random mod {} map {{ {} }}", backends.len(), map.join(", "));
    for rule in [
        "add table ip kube-proxy".to_owned(),
        "add chain ip kube-proxy filter-forward { type filter hook forward priority filter; policy accept; }"
            .to_owned(),
        "add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority dstnat; policy accept; }"
            .to_owned(),
        // As `--masquerade-all`, so that a pod reaches itself through the Service.
        "add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority srcnat - 1; policy accept; }"
            .to_owned(),
        "add rule ip kube-proxy nat-postrouting ct status dnat masquerade".to_owned(),
        format!(
            "add rule ip kube-proxy nat-prerouting ip daddr {SERVICE} tcp dport 80 dnat to {chosen} : 8080"
        ),
    ] {
        host.exec_ok(["nft", &rule]).unwrap();
    }
}

fn slice(backends: &[(&str, &str)]) -> Value {
    let endpoints: Vec<Value> = backends
        .iter()
        .map(|(node, address)| json!({ "addresses": [address], "nodeName": node, "conditions": { "ready": true } }))
        .collect();
    json!({
        "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": { "name": "web-1", "namespace": "shop", "labels": { "kubernetes.io/service-name": "web" } },
        "endpoints": endpoints, "ports": [{ "name": "", "port": 8080, "protocol": "TCP" }],
    })
}

/// Checks that each client reaches each of these servers, and both by the Service.
fn all_reach(clients: &[(&str, &Netns)], servers: &[(&str, &str)]) {
    let mut names: Vec<&str> = servers.iter().map(|(name, _)| *name).collect();
    names.sort_unstable();
    for (client, netns) in clients {
        for (name, address) in servers {
            let to: SocketAddr = format!("{address}:8080").parse().unwrap();
            wait_until(SOON, &format!("{client} to reach {name} at {to}"), || -> Result<()> {
                ensure!(ask(netns, to)?.name == *name);
                Ok(())
            })
            .unwrap();
        }
        println!("{client} reaches {names:?}");
        wait_answers(netns, format!("{SERVICE}:80").parse().unwrap(), &names).unwrap();
    }
}

#[test]
fn nodes_go_from_flannel_and_kube_proxy_to_ovl_one_by_one() {
    let lab = start_lab_with(LabConfig::hosts(2)).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    flannel(&lab);
    let (f1, at1) = flannel_pod(h1, 1, 10);
    let (f2, at2) = flannel_pod(h2, 2, 10);
    let _servers = [(&f1, "f1"), (&f2, "f2")].map(|(pod, name)| NamedServer::start(pod, name, 8080).unwrap());
    let targets = |all: &[&str]| lab.hosts().iter().for_each(|host| kube_proxy(host, all));
    targets(&[&at1, &at2]);

    // ovld and ovl-kube on all nodes, beside what is there. Services stay kube-proxy's.
    create_routed_network(&lab, "pods", &["--subnet", "10.60.0.0/16"]).unwrap();
    let mut api = ApiServer::new();
    let _kubes: Vec<Kube> = lab.hosts().iter().map(|host| Kube::start(&mut api, host).unwrap()).collect();
    api.put(&json!({
        "kind": "Service", "metadata": { "name": "web", "namespace": "shop" },
        "spec": {
            "type": "ClusterIP", "clusterIP": SERVICE, "clusterIPs": [SERVICE], "ipFamilies": ["IPv4"],
            "ports": [{ "port": 80, "targetPort": 8080, "protocol": "TCP" }],
        },
    }));
    api.put(&slice(&[("h1", &at1), ("h2", &at2)]));
    all_reach(&[("f1", &f1), ("f2", &f2)], &[("f1", &at1), ("f2", &at2)]);
    wait_clean(lab.hosts(), SOON).unwrap();

    // h2 was drained: its new pods are ovl's, and its kube-proxy is gone.
    let o2 = attach(h2, "o2", "pods", &[]).unwrap();
    let at_o2 = o2.address();
    let _o2 = NamedServer::start(&o2.workload, "o2", 8080).unwrap();
    kube_proxy(h1, &[&at1, &at_o2]);
    kube_proxy(h2, &[]);
    api.put(&slice(&[("h1", &at1), ("h2", &at_o2)]));
    all_reach(&[("f1", &f1), ("o2", &o2.workload)], &[("f1", &at1), ("o2", &at_o2)]);

    // And h1.
    let o1 = attach(h1, "o1", "pods", &[]).unwrap();
    let at_o1 = o1.address();
    let _o1 = NamedServer::start(&o1.workload, "o1", 8080).unwrap();
    kube_proxy(h1, &[]);
    api.put(&slice(&[("h1", &at_o1), ("h2", &at_o2)]));
    let all = [("o1", &*at_o1), ("o2", &*at_o2)];
    all_reach(&[("o1", &o1.workload), ("o2", &o2.workload)], &all);
    // What flannel left is deleted, and nothing of ovl depends on it.
    for host in lab.hosts() {
        for device in ["flannel.1", "cni0"] {
            host.exec_ok(["ip", "link", "delete", device]).unwrap();
        }
        host.exec_ok(["nft", "delete", "table", "ip", "flannel-ipv4"]).unwrap();
    }
    all_reach(&[("o1", &o1.workload), ("o2", &o2.workload)], &all);
    wait_clean(lab.hosts(), SOON).unwrap();
}
