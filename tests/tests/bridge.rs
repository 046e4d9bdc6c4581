//! Bridge networks, which are local to one host. They behave as Docker's bridge networks do.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::{IpAddr, SocketAddr, UdpSocket};

use anyhow::{Result, ensure};
use netns_lab::{Lab, LabConfig, Netns, Underlay, uninterrupted, wait_until};
use ovl_tests::ports::{create_bridge_network, outsider};
use ovl_tests::{
    Attached, SOON, assert_contains, attach, create_network, ctl_error, endpoints, problems, rows, start_lab,
    start_lab_with, strings, text, wait_clean, wait_network, wait_problem,
};
use serde_json::json;

/// An underlay address of the switch, which is not a host of the cluster.
const OUTSIDE: &str = "192.168.77.250";

/// Source address with which a datagram of a workload arrives in a namespace.
fn source_of_datagram(from: &Attached, at: &Netns, address: &str) -> Result<IpAddr> {
    let address: IpAddr = address.parse()?;
    let listener = at.run(|| UdpSocket::bind(SocketAddr::new(address, 0)))??;
    listener.set_read_timeout(Some(SOON))?;
    let to = listener.local_addr()?;
    let any: SocketAddr = if to.is_ipv4() { "0.0.0.0:0".parse()? } else { "[::]:0".parse()? };
    from.workload.run(|| UdpSocket::bind(any)?.send_to(b"hello", to))??;
    let (_, seen) = uninterrupted(|| listener.recv_from(&mut [0; 16]))?;
    Ok(seen.ip())
}

fn assert_unreachable(from: &Attached, address: &str) {
    let output = from.workload.exec(["ping", "-n", "-c", "1", "-W", "1", address]).unwrap();
    assert!(!output.status.success(), "{} reaches {address}: {}", from.name, output.stdout);
}

#[test]
fn bridge_endpoint_has_a_veth_an_address_of_the_subnet_and_a_default_route() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    let bridge =
        create_bridge_network(host, "mynet", &["--subnet", "172.30.0.0/16", "--subnet", "fd30::/64"])
            .unwrap();
    let web = attach(host, "web", "mynet", &[]).unwrap();
    // One side of the veth pair is in the container, the other one is a port of the bridge.
    let inside = web.workload.ip_json(&["-d", "link", "show", "eth0"]).unwrap();
    assert_eq!(inside[0]["linkinfo"]["info_kind"], "veth");
    let outside = host.ip_json(&["link", "show", &web.device()]).unwrap();
    assert_eq!(outside[0]["master"], bridge.as_str());
    // An address of the subnet, and a default route to the address of the bridge.
    assert_eq!(strings(&web.json["addresses"]), ["172.30.0.2/16", "fd30::2/64"]);
    let addresses = host.ip_json(&["addr", "show", &bridge]).unwrap().to_string();
    assert_contains(&addresses, &["\"172.30.0.1\"", "\"fd30::1\""]);
    let ranges: Vec<_> = rows(host, &["subnets"])
        .unwrap()
        .iter()
        .map(|row| (text(&row["prefix"]), text(&row["node"]), row["used"].as_u64().unwrap()))
        .collect();
    let expected = ["172.30.0.0/16", "fd30::/64"].map(|prefix| (prefix.to_owned(), "h1".to_owned(), 1));
    assert_eq!(ranges, expected);
    for (family, gateway) in [("-4", "172.30.0.1"), ("-6", "fd30::1")] {
        let routes = web.workload.ip_json(&[family, "route", "show", "default"]).unwrap();
        assert_eq!(routes[0]["gateway"], gateway);
    }
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn bridge_switches_frames_without_nat_or_iptables() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    // The FORWARD policy of iptables does not apply to bridged frames.
    host.exec_ok(["iptables", "-P", "FORWARD", "DROP"]).unwrap();
    create_bridge_network(host, "mynet", &["--subnet", "172.30.0.0/24", "--subnet", "fd30::/64"]).unwrap();
    let (a, b) = (attach(host, "a", "mynet", &[]).unwrap(), attach(host, "b", "mynet", &[]).unwrap());
    for (own, other) in a.addresses().into_iter().zip(b.addresses()) {
        a.workload.ping_until(&other, SOON).unwrap();
        assert_eq!(source_of_datagram(&a, &b.workload, &other).unwrap().to_string(), own);
    }
    // The neighbour itself answers ARP, not the gateway for it.
    let neighbours = a.workload.ip_json(&["neigh", "show", &b.address()]).unwrap();
    assert_eq!(neighbours[0]["lladdr"], b.mac().as_str());
}

#[test]
fn each_bridge_network_has_a_bridge_and_a_subnet_of_its_own() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    let bridges = || -> Vec<String> {
        let links = host.ip_json(&["link", "show", "type", "bridge"]).unwrap();
        links.as_array().unwrap().iter().map(|link| text(&link["ifname"])).collect()
    };
    assert_eq!(bridges(), Vec::<String>::new());
    let one = create_bridge_network(host, "one", &[]).unwrap();
    let two = create_bridge_network(host, "two", &[]).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    let mut found = bridges();
    let mut expected = vec![one, two];
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
    // Each network gets a subnet of its own from the configured pool.
    let ranges: Vec<String> =
        rows(host, &["network", "ls"]).unwrap().iter().map(|row| row["subnets"].to_string()).collect();
    assert_ne!(ranges[0], ranges[1]);
    host.ctl_ok(&["network", "rm", "one"]).unwrap();
    host.ctl_ok(&["network", "rm", "two"]).unwrap();
    wait_until(SOON, "no bridge", || {
        ensure!(bridges().is_empty(), "{:?}", bridges());
        Ok(())
    })
    .unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    assert_contains(&ctl_error(host, &["network", "inspect", "one"]).unwrap(), &["no network one"]);
}

#[test]
fn endpoints_on_different_bridge_networks_cannot_communicate() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    create_bridge_network(host, "one", &["--subnet", "172.30.0.0/24", "--subnet", "fd30::/64"]).unwrap();
    create_bridge_network(host, "two", &["--subnet", "172.31.0.0/24", "--subnet", "fd31::/64"]).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.1.0.0/24", "--subnet", "fd01::/64"]).unwrap();
    let all: Vec<Attached> = ["one", "two", "blue"]
        .map(|network| attach(host, &format!("on-{network}"), network, &[]).unwrap())
        .into();
    for (from, to) in all.iter().flat_map(|from| all.iter().map(move |to| (from, to))) {
        if from.name != to.name {
            to.addresses().iter().for_each(|address| assert_unreachable(from, address));
        }
    }
    // A workload on both networks is reachable from both, and does not forward between them.
    let both = host.workload("both").unwrap();
    for network in ["one", "two"] {
        let address = {
            let args = ["attach", "both", "--network", network, "--netns", both.path_str()];
            strings(&host.ctl_json(&args).unwrap()["addresses"])[0].split('/').next().unwrap().to_owned()
        };
        let index = usize::from(network == "two");
        all[index].workload.ping_until(&address, SOON).unwrap();
    }
}

#[test]
fn bridge_network_masquerades_and_internal_bridge_network_has_no_egress() {
    let lab =
        start_lab_with(LabConfig::hosts(1).underlay(Underlay::Dual).config("masquerade = false")).unwrap();
    let host = &lab["h1"];
    let outside = outsider(&lab).unwrap();
    create_bridge_network(host, "open", &["--subnet", "172.30.0.0/24", "--subnet", "fd30::/64"]).unwrap();
    create_bridge_network(
        host,
        "shut",
        &["--internal", "--subnet", "172.31.0.0/24", "--subnet", "fd31::/64"],
    )
    .unwrap();
    let open = attach(host, "open", "open", &[]).unwrap();
    // `masquerade = false` does not apply: hosts outside have no route to a bridge network, so it needs NAT.
    for (address, own) in [OUTSIDE, "fd77::fa"].iter().zip(host.addresses()) {
        open.workload.ping_until(address, SOON).unwrap();
        assert_eq!(source_of_datagram(&open, &outside, address).unwrap(), own);
    }
    let (a, b) = (attach(host, "a", "shut", &[]).unwrap(), attach(host, "b", "shut", &[]).unwrap());
    a.workload.ping_until(b.address(), SOON).unwrap();
    for family in ["-4", "-6"] {
        assert_eq!(a.workload.ip_json(&[family, "route", "show", "default"]).unwrap(), json!([]));
    }
    // Not even with a default route of its own through the MAC address of the bridge.
    let bridge = text(&host.ctl_json(&["network", "inspect", "shut"]).unwrap()["bridge"]);
    let mac = text(&host.ip_json(&["link", "show", &bridge]).unwrap()[0]["address"]);
    for line in [
        "neigh add 172.31.0.1 lladdr MAC dev eth0 nud permanent",
        "route add default via 172.31.0.1",
        "-6 neigh add fd31::1 lladdr MAC dev eth0 nud permanent",
        "-6 route add default via fd31::1",
    ] {
        let line = line.replace("MAC", &mac);
        a.workload.exec_ok(["ip"].into_iter().chain(line.split(' '))).unwrap();
    }
    for address in [OUTSIDE, "fd77::fa", "192.168.77.1", &open.address()] {
        assert_unreachable(&a, address);
    }
}

#[test]
fn bridge_network_is_local_to_its_host() {
    let lab = start_lab(2).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    // The same name and subnet on two hosts: neither host knows the other's network.
    for host in [h1, h2] {
        create_bridge_network(host, "local", &["--subnet", "172.30.0.0/24"]).unwrap();
    }
    let a = attach(h1, "web", "local", &[]).unwrap();
    assert_eq!(attach(h2, "web", "local", &[]).unwrap().address(), a.address());
    let info = h1.ctl_json(&["network", "inspect", "local"]).unwrap();
    let summary =
        json!([info["driver"], info["mode"], info["vni"], info["internal"], info["nodes"], info["dns"]]);
    assert_eq!(summary, json!(["bridge", "l2", 0, false, ["h1"], true]));
    create_network(&lab, "blue", &["--subnet", "10.1.0.0/24"]).unwrap();
    attach(h2, "shared", "blue", &[]).unwrap();
    wait_until(SOON, "the endpoint of the remote host", || {
        ensure!(endpoints(h1)? == ["shared on h2 is ready", "web on h1 is ready"], "{:?}", endpoints(h1)?);
        Ok(())
    })
    .unwrap();
    // A detach on h1 deletes only the endpoint of h1.
    h1.ctl_ok(&["detach", "web", "--network", "local"]).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    assert_eq!(endpoints(h2).unwrap(), ["shared on h2 is ready", "web on h2 is ready"]);
    assert_contains(&ctl_error(h2, &["network", "rm", "local"]).unwrap(), &["has endpoints: web on h2"]);
}

#[test]
fn bridge_network_works_without_admission_and_survives_restarts() {
    // The second host joins a host that does not answer, so it is never admitted.
    let lab = Lab::new(LabConfig::hosts(2)).unwrap();
    let host = &lab["h2"];
    host.start().unwrap();
    wait_until(SOON, "the control socket to answer", || host.ctl_ok(&["status"]).map(drop)).unwrap();
    assert_contains(&ctl_error(host, &["network", "create", "blue"]).unwrap(), &["admitted"]);
    create_bridge_network(host, "local", &["--subnet", "172.30.0.0/24"]).unwrap();
    let (a, b) = (attach(host, "a", "local", &[]).unwrap(), attach(host, "b", "local", &[]).unwrap());
    a.workload.ping_until(b.address(), SOON).unwrap();
    assert_contains(
        &ctl_error(
            host,
            &["attach", "c", "--network", "local", "--netns", a.workload.path_str(), "--ip", &b.address()],
        )
        .unwrap(),
        &["is in use by endpoint b"],
    );
    host.kill9().unwrap();
    a.workload.ping_until(b.address(), SOON).unwrap();
    host.start().unwrap();
    wait_until(SOON, "both endpoints to be ready", || {
        ensure!(endpoints(host)? == ["a on h2 is ready", "b on h2 is ready"], "{:?}", endpoints(host)?);
        Ok(())
    })
    .unwrap();
    a.workload.ping_until(b.address(), SOON).unwrap();
    // A detach takes effect although gossip has never caught up.
    host.ctl_ok(&["detach", "b"]).unwrap();
    let neighbours = host.ip_json(&["neigh", "show", &b.address()]).unwrap();
    assert_eq!(neighbours, json!([]));
}

#[test]
fn conflicts_of_bridge_networks_are_refused_or_reported() {
    let lab = start_lab(2).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    create_network(&lab, "blue", &["--subnet", "10.1.0.0/24"]).unwrap();
    let create = |more: &[&str]| {
        ctl_error(h1, &[&["network", "create", "b", "--driver", "bridge"], more].concat()).unwrap()
    };
    assert_contains(&create(&["--subnet", "10.1.0.128/25"]), &["overlaps 10.1.0.0/24 of network blue"]);
    assert_contains(&create(&["--subnet", "192.168.77.0/24"]), &["the underlay address of host h"]);
    assert_contains(&create(&["--vni", "7"]), &["--vni is for networks of several hosts"]);
    assert_contains(&create(&["--mode", "l3"]), &["--mode l3 is for networks of several hosts"]);
    assert_contains(&create(&["--encrypted"]), &["--encrypted is for networks of several hosts"]);
    create_bridge_network(h1, "local", &["--subnet", "172.30.0.0/24"]).unwrap();
    let again = ["network", "create", "local", "--driver", "bridge"];
    assert_contains(&ctl_error(h1, &again).unwrap(), &["network local exists already"]);
    assert_contains(
        &ctl_error(h1, &["network", "create", "other", "--subnet", "172.30.0.0/16"]).unwrap(),
        &["overlaps 172.30.0.0/24 of network local"],
    );
    // Another host cannot know the bridge network. h1 reports the conflict, and there the name keeps its meaning.
    h2.ctl_ok(&["network", "create", "local", "--subnet", "10.2.0.0/24"]).unwrap();
    h2.ctl_ok(&["network", "create", "wide", "--subnet", "172.30.0.0/16"]).unwrap();
    wait_problem(h1, &["local", "is called like one"], SOON).unwrap();
    wait_problem(h1, &["local", "overlaps wide"], SOON).unwrap();
    assert_eq!(problems(h2).unwrap(), Vec::<String>::new());
    assert_eq!(h1.ctl_json(&["network", "inspect", "local"]).unwrap()["driver"], "bridge");
    for name in ["local", "wide"] {
        h2.ctl_ok(&["network", "rm", name]).unwrap();
    }
    wait_until(SOON, "h1 to have no problem", || {
        ensure!(problems(h1)?.is_empty(), "{:?}", problems(h1)?);
        Ok(())
    })
    .unwrap();
}

#[test]
fn user_defined_bridge_networks_get_dns_and_the_default_bridge_does_not() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    for (name, more, dns) in [("mynet", &[][..], true), ("bridge", &[], false), ("default", &["--dns"], true)]
    {
        create_bridge_network(host, name, more).unwrap();
        assert_eq!(host.ctl_json(&["network", "inspect", name]).unwrap()["dns"], dns, "{name}");
    }
    // A cluster network named `bridge` was created on purpose, so it has DNS.
    host.ctl_ok(&["network", "rm", "bridge"]).unwrap();
    create_network(&lab, "bridge", &[]).unwrap();
    wait_network(host, "bridge").unwrap();
    assert_eq!(host.ctl_json(&["network", "inspect", "bridge"]).unwrap()["dns"], true);
}

#[test]
fn bridge_network_can_be_extended_and_is_deleted_by_teardown() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    let bridge = create_bridge_network(host, "local", &["--subnet", "172.30.0.0/30"]).unwrap();
    let a = attach(host, "a", "local", &[]).unwrap();
    let full = host.workload("b").unwrap();
    let args = ["attach", "b", "--network", "local", "--netns", full.path_str()];
    assert_contains(
        &ctl_error(host, &args).unwrap(),
        &["no address is free in 172.30.0.0/30", "network update local"],
    );
    host.ctl_ok(&["network", "update", "local", "--subnet", "172.30.0.0/24"]).unwrap();
    let b = host.ctl_json(&args).unwrap();
    let address = strings(&b["addresses"])[0].clone();
    assert!(address.ends_with("/24") && !address.starts_with(&a.address()), "{address}");
    wait_clean(lab.hosts(), SOON).unwrap();
    host.ctl_ok(&["teardown", "--yes"]).unwrap();
    let links = host.ip_json(&["link", "show"]).unwrap().to_string();
    assert!(!links.contains(&bridge) && !links.contains("ove-"), "{links}");
}
