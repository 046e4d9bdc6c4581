//! What Services cannot take: addresses of hosts, ports of ovl, and addresses outside the configured ranges.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Netns, wait_until};
use ovl_tests::ports::outsider;
use ovl_tests::routed::create_routed_network;
use ovl_tests::service::{NamedServer, apply, ask, wait_answers};
use ovl_tests::{SOON, assert_contains, attach, ctl_error, start_lab_with, text, wait_clean};
use serde_json::{Value, json};

/// Ranges that contain the addresses of all hosts, which no operator should configure.
const WIDE: &str = "external_ranges = ['192.168.77.0/24', '203.0.113.0/24']";
/// An address that no host has.
const EXTERNAL: &str = "203.0.113.7";

/// A Service for pods with `app: web` at external addresses: SSH, ovl's own port, and port 80.
fn service(name: &str, addresses: &[String]) -> String {
    let port = |name: &str, port: u16, protocol: &str| json!({ "name": name, "port": port, "targetPort": 8080, "protocol": protocol });
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": name },
        "spec": {
            "selector": { "app": "web" },
            "externalIPs": addresses,
            "ports": [
                port("ssh", 2222, "TCP"), port("web", 80, "TCP"), port("stream", 7940, "TCP"),
                port("gossip", 7940, "UDP"),
            ],
        },
    })
    .to_string()
}

fn manifest(lab: &Lab, text: &str) -> String {
    let path = lab.dir().join("refused.yaml");
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), port)
}

/// Waits until a host has this problem about a Service, and returns its message.
fn wait_denied(host: &Host, service: &str) -> String {
    let mut message = String::new();
    wait_until(SOON, "the Service to be denied", || -> Result<()> {
        let status = host.ctl_json(&["status"])?;
        let problems = status["problems"].as_array().cloned().unwrap_or_default();
        let about = |problem: &&Value| {
            problem["code"] == "OVL-E063" && text(&problem["object"]) == format!("Service default/{service}")
        };
        let found = problems.iter().find(about);
        ensure!(found.is_some(), "{problems:?}");
        message = found.map(|problem| text(&problem["message"])).unwrap_or_default();
        Ok(())
    })
    .unwrap();
    message
}

/// Checks that everybody reaches SSH of a host.
fn assert_ssh(clients: &[&Netns], address: &str) {
    for client in clients {
        for _ in 0..4 {
            assert_eq!(ask(client, at(address, 2222)).unwrap().name, "ssh", "{address}");
        }
    }
}

#[test]
fn external_addresses_need_a_configured_range() {
    let lab = start_lab_with(LabConfig::hosts(2)).unwrap();
    let [h1, h2] = lab.hosts() else { unreachable!() };
    create_routed_network(&lab, "blue", &["--subnet", "10.60.0.0/16"]).unwrap();
    let file = manifest(&lab, &service("web", &[EXTERNAL.to_owned()]));
    let refused = ctl_error(h1, &["apply", "-f", &file]).unwrap();
    assert_contains(&refused, &["spec.externalIPs[0]", EXTERNAL, "external_ranges", "ovld.toml"]);

    // A peer that allows it writes the Service, and each host goes by its own ranges.
    h2.set_config(WIDE).unwrap();
    h2.restart().unwrap();
    h2.wait_ready(SOON).unwrap();
    apply(&lab, h2, &service("web", &[EXTERNAL.to_owned()])).unwrap();
    let backend = attach(h1, "backend", "blue", &["--label", "app=web"]).unwrap();
    let _server = NamedServer::start(&backend.workload, "backend", 8080).unwrap();
    let [one, two] = [h1, h2].map(|host| attach(host, host.name(), "blue", &[]).unwrap().workload);
    wait_answers(&two, at(EXTERNAL, 80), &["backend"]).unwrap();
    assert_contains(&wait_denied(h1, "web"), &[EXTERNAL, "external_ranges"]);
    assert!(ask(&one, at(EXTERNAL, 80)).is_err());
    // Addresses of hosts are refused whatever the ranges are.
    let own = h1.address().unwrap().to_string();
    let file = manifest(&lab, &service("bad", &[own]));
    let refused = ctl_error(h2, &["apply", "-f", &file]).unwrap();
    assert_contains(&refused, &["spec.externalIPs[0]", "is the address of host h1"]);
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn addresses_of_hosts_and_ports_of_ovl_are_not_taken_over() {
    let lab = Lab::new(LabConfig::hosts(3).config(WIDE)).unwrap();
    let [h1, h2, h3] = lab.hosts() else { unreachable!() };
    for host in [h1, h2] {
        host.start().unwrap();
        host.wait_ready(SOON).unwrap();
    }
    create_routed_network(&lab, "blue", &["--subnet", "10.60.0.0/16"]).unwrap();
    let backend = attach(h2, "backend", "blue", &["--label", "app=web"]).unwrap();
    let _server = NamedServer::start(&backend.workload, "backend", 8080).unwrap();
    let second = "192.168.77.103";
    h3.exec_ok(["ip", "address", "add", &format!("{second}/24"), "dev", "eth0"]).unwrap();
    let third = h3.address().unwrap().to_string();
    let _ssh = NamedServer::start(h3, "ssh", 2222).unwrap();
    // h3 is no member yet, so nobody knows whose these addresses are.
    let all = [third.clone(), second.to_owned(), EXTERNAL.to_owned()];
    apply(&lab, h1, &service("grab", &all)).unwrap();
    let client = attach(h1, "client", "blue", &[]).unwrap().workload;
    wait_answers(&client, at(&third, 2222), &["backend"]).unwrap();

    // It joins all the same: the daemons' own sockets are not translated.
    h3.start().unwrap();
    h3.wait_ready(SOON).unwrap();
    for host in lab.hosts() {
        assert_contains(&wait_denied(host, "grab"), &[&third, "address of host h3"]);
    }
    let there = attach(h3, "there", "blue", &[]).unwrap().workload;
    let outside = outsider(&lab).unwrap();
    wait_until(SOON, "the address to be free", || -> Result<()> {
        ensure!(ask(&client, at(&third, 2222))?.name == "ssh");
        Ok(())
    })
    .unwrap();
    assert_ssh(&[&client, &there, &outside, h1, h2, h3], &third);
    // Another address of h3 is its own on h3 itself, which also those from outside reach.
    assert_ssh(&[&there, &outside, h3], second);
    // All hosts go on to hear each other directly, and the address that is nobody's works.
    for host in lab.hosts() {
        let peers = host.ctl_json(&["peers"]).unwrap();
        let all = peers.as_array().unwrap();
        assert_eq!(all.len(), 3);
        let is_well = |peer: &Value| peer["state"] == "alive" && peer["reachable"] != json!(false);
        assert!(all.iter().all(is_well), "{peers}");
    }
    for from in [&client, &there] {
        wait_answers(from, at(EXTERNAL, 80), &["backend"]).unwrap();
    }
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn cluster_addresses_of_peers_are_held_to_the_service_range() {
    let lab = Lab::new(LabConfig::hosts(2)).unwrap();
    let [h1, h2] = lab.hosts() else { unreachable!() };
    h2.set_config("service_range = ['192.0.2.0/24']").unwrap();
    lab.start_all().unwrap();
    create_routed_network(&lab, "blue", &["--subnet", "10.60.0.0/16"]).unwrap();
    let backend = attach(h1, "backend", "blue", &["--label", "app=web"]).unwrap();
    let _server = NamedServer::start(&backend.workload, "backend", 8080).unwrap();
    let [one, two] = [h1, h2].map(|host| attach(host, host.name(), "blue", &[]).unwrap().workload);
    let text = service("web", &[]).replace("\"externalIPs\":[],", "\"clusterIP\":\"192.0.2.80\",");
    apply(&lab, h2, &text).unwrap();
    wait_answers(&two, at("192.0.2.80", 80), &["backend"]).unwrap();
    assert_contains(&wait_denied(h1, "web"), &["192.0.2.80", "service_range"]);
    assert!(ask(&one, at("192.0.2.80", 80)).is_err());
    wait_clean(lab.hosts(), SOON).unwrap();
}
