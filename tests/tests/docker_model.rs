//! Docker's network drivers host, none and overlay, as ovl implements them. Bridge networks and published ports have
//! tests of their own in `bridge` and `publish`.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, UdpSocket};

use anyhow::Result;
use netns_lab::{Host, Netns, Workload, wait_until};
use ovl_tests::ports::{create_bridge_network, outsider, seen_client, start_address_server};
use ovl_tests::{
    SOON, assert_contains, attach, attach_workload, create_network, ctl_error, rows, start_lab, strings,
    text, wait_clean, wait_endpoints,
};
use serde_json::Value;

/// Creates a sandbox on these networks.
fn sandbox(host: &Host, name: &str, networks: &[&str]) -> Result<Workload> {
    let workload = host.promised_workload(name)?;
    let args = ["sandbox", "create", workload.netns_name()];
    let networks = networks.iter().flat_map(|network| ["--network", network]);
    host.ctl_json(&args.into_iter().chain(networks).collect::<Vec<_>>())?;
    Ok(workload)
}

fn remove(workload: &Workload) {
    workload.host().ctl_ok(&["sandbox", "rm", workload.netns_name(), "--force"]).unwrap();
}

fn interfaces(netns: &Netns) -> Vec<String> {
    let links = netns.ip_json(&["link", "show"]).unwrap();
    links.as_array().unwrap().iter().map(|link| text(&link["ifname"])).collect()
}

#[test]
fn sandboxes_can_use_the_bridge_host_none_and_overlay_drivers() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    // Docker's four drivers.
    create_bridge_network(host, "virtual", &[]).unwrap();
    create_network(&lab, "stretched", &[]).unwrap();
    let drivers: Vec<Value> =
        rows(host, &["network", "ls"]).unwrap().iter().map(|network| network["driver"].clone()).collect();
    assert_eq!(drivers, ["overlay", "bridge"]);
    for (name, networks) in
        [("a", &["host"][..]), ("b", &["none"]), ("c", &["virtual"]), ("d", &["stretched"])]
    {
        let created = sandbox(host, name, networks).unwrap();
        let all = rows(host, &["sandbox", "ls"]).unwrap();
        let row = all.iter().find(|row| row["name"] == created.netns_name()).unwrap();
        assert_eq!(strings(&row["networks"]), networks);
        remove(&created);
    }
}

#[test]
fn host_network_shares_interfaces_rules_and_routes_with_the_host() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    let shared = sandbox(host, "a", &["host"]).unwrap();
    // No network isolation: the same interfaces, addresses and rules.
    assert_eq!(interfaces(&shared), interfaces(host));
    let own = host.address().unwrap().to_string();
    assert_contains(&shared.exec_ok(["ip", "addr"]).unwrap(), &[&own]);
    host.exec_ok(["iptables", "-A", "INPUT", "-s", "192.0.2.7", "-j", "DROP"]).unwrap();
    assert_contains(&shared.exec_ok(["iptables", "-S", "INPUT"]).unwrap(), &["192.0.2.7"]);
    shared.exec_ok(["ip", "route", "add", "blackhole", "192.0.2.0/24"]).unwrap();
    assert_contains(&host.exec_ok(["ip", "route"]).unwrap(), &["blackhole 192.0.2.0/24"]);
    // No bridge, no veth.
    assert!(!interfaces(host).iter().any(|name| name.starts_with("ovb-") || name.starts_with("ove-")));
    remove(&shared);
}

#[test]
fn host_network_shares_ports_with_the_host() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    let outside = outsider(&lab).unwrap();
    let (a, b) = (sandbox(host, "a", &["host"]).unwrap(), sandbox(host, "b", &["host"]).unwrap());
    let server = start_address_server(&a, 80).unwrap();
    // Neither NAT nor port mapping: the server sees the client's own address.
    let at = SocketAddr::new(host.address().unwrap(), 80);
    assert_eq!(seen_client(&outside, at).unwrap().to_string(), "192.168.77.250");
    // No port isolation.
    let second = b.run(|| TcpListener::bind("0.0.0.0:80")).unwrap();
    assert_eq!(second.unwrap_err().kind(), ErrorKind::AddrInUse);
    let words = ["sandbox", "create", "c", "--network", "host", "--publish", "80:80"];
    assert_contains(&ctl_error(host, &words).unwrap(), &["no port is published", "is the host's anyway"]);
    drop(server);
    remove(&a);
    remove(&b);
}

#[test]
fn none_network_has_only_a_loopback_interface() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    create_bridge_network(host, "blue", &["--subnet", "10.1.0.0/24"]).unwrap();
    let other = attach(host, "other", "blue", &[]).unwrap();
    let isolated = sandbox(host, "a", &["none"]).unwrap();
    assert_eq!(interfaces(&isolated), ["lo"]);
    isolated.ping_until("127.0.0.1", SOON).unwrap();
    // There is no route, so sending fails at once.
    for address in [other.address(), "10.1.0.1".to_owned(), host.address().unwrap().to_string()] {
        let socket = isolated.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
        let sent = socket.send_to(b"hello", format!("{address}:7"));
        assert_eq!(sent.unwrap_err().kind(), ErrorKind::NetworkUnreachable, "{address}");
    }
    // Interfaces can be attached later.
    let joined = attach_workload(isolated.clone(), "blue", &[]).unwrap();
    joined.workload.ping_until(other.address(), SOON).unwrap();
    assert_eq!(interfaces(&isolated), ["lo", "eth0"]);
    host.ctl_ok(&["detach", &joined.name]).unwrap();
    remove(&isolated);
}

#[test]
fn gossip_distributes_mac_to_vtep_mappings_without_multicast() {
    let lab = start_lab(2).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    create_network(&lab, "myoverlay", &["--subnet", "10.0.0.0/24", "--vni", "256"]).unwrap();
    let a = attach(h1, "a", "myoverlay", &[]).unwrap();
    let b = attach(h2, "b", "myoverlay", &[]).unwrap();
    for host in [h1, h2] {
        wait_endpoints(host, &["a on h1 is ready", "b on h2 is ready"], SOON).unwrap();
    }
    wait_clean(lab.hosts(), SOON).unwrap();
    // The mapping exists before any traffic.
    let fdb = rows(h1, &["fdb"]).unwrap();
    let entry = fdb.iter().find(|row| row["mac"] == b.mac().as_str()).unwrap();
    assert_eq!(text(&entry["destination"]), h2.address().unwrap().to_string());
    // On each host, a bridge with the endpoint and a VXLAN device with this VNI.
    let vxlan = h1.ip_json(&["-d", "link", "show", "type", "vxlan"]).unwrap();
    assert_eq!(vxlan[0]["linkinfo"]["info_data"]["id"], 256);
    let bridge = text(&h1.ctl_json(&["network", "inspect", "myoverlay"]).unwrap()["bridge"]);
    assert_eq!(vxlan[0]["master"], bridge.as_str());
    // Unicast flooding, not a multicast group.
    assert!(vxlan[0]["linkinfo"]["info_data"]["group"].is_null(), "{}", vxlan[0]);
    assert_eq!(h1.ip_json(&["link", "show", &a.device()]).unwrap()[0]["master"], bridge.as_str());
    a.workload.ping_until(b.address(), SOON).unwrap();
    b.workload.ping_until(a.address(), SOON).unwrap();
    // Docker's option `encrypted`; `encryption` tests how such networks behave.
    wait_until(SOON, "an encrypted network", || {
        h1.ctl_ok(&["network", "create", "sealed", "--encrypted"]).map(drop)
    })
    .unwrap();
}
