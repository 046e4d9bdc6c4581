//! What ovl gives the interfaces of workloads: it is put back after a workload has set its interface down, and default
//! routes go to the next network when one is detached.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use netns_lab::{LabConfig, Netns, wait_until};
use ovl_tests::cni::{Conflist, Container, addresses};
use ovl_tests::ports::create_bridge_network;
use ovl_tests::resolver::dig;
use ovl_tests::routed::create_routed_network;
use ovl_tests::{
    Attached, SOON, attach, attach_workload, create_network, ping_all_pairs, start_lab, strings, text,
    wait_clean, wait_problem,
};
use serde_json::json;

/// The addresses, routes and permanent neighbours of a namespace, as `ip` prints them.
fn state(of: &Netns) -> Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    for command in [
        &["-o", "addr", "show", "scope", "global"][..],
        &["-4", "route", "show", "table", "all"],
        &["-6", "route", "show", "table", "all"],
        &["neigh", "show", "nud", "permanent"],
    ] {
        let output = of.exec_ok([&["ip"], command].concat())?;
        // Link-local addresses come a moment after the others, and are the kernel's own.
        let lines = output.lines().filter(|line| !line.contains("fe80:") && !line.contains("ff00:"));
        all.extend(lines.map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")));
    }
    Ok(all)
}

fn down_and_up(endpoint: &Attached) {
    for to in ["down", "up"] {
        endpoint.workload.exec_ok(["ip", "link", "set", "eth0", to]).unwrap();
    }
}

fn args(subnets: &[String; 2]) -> Vec<&str> {
    subnets.iter().map(String::as_str).collect()
}

#[test]
fn interface_that_was_set_down_and_up_gets_back_what_ovl_put_there() {
    let lab = start_lab(2).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let subnets = |number: u8| [format!("--subnet=10.{number}.0.0/16"), format!("--subnet=fd0{number}::/64")];
    create_network(&lab, "flat", &args(&subnets(1))).unwrap();
    create_network(&lab, "sealed", &[&args(&subnets(2))[..], &["--encrypted"]].concat()).unwrap();
    create_network(&lab, "inner", &[&args(&subnets(3))[..], &["--internal"]].concat()).unwrap();
    create_bridge_network(h1, "local", &args(&subnets(4))).unwrap();
    create_routed_network(&lab, "pods", &["--subnet=10.5.0.0/16", "--subnet=fd05::/48"]).unwrap();
    for network in ["flat", "sealed", "inner", "local", "pods"] {
        let a = attach(h1, &format!("a-{network}"), network, &[]).unwrap();
        let there = if network == "local" { h1 } else { h2 };
        let b = attach(there, &format!("b-{network}"), network, &[]).unwrap();
        ping_all_pairs(&[a.clone(), b.clone()], SOON).unwrap();
        let before = state(&a.workload).unwrap();
        // What the workload itself adds is not ovl's.
        a.workload.exec_ok(["ip", "route", "add", "198.51.100.0/24", "dev", "eth0"]).unwrap();
        down_and_up(&a);
        wait_until(SOON, &format!("the interface on {network} to be as before"), || {
            let now = state(&a.workload)?;
            let missing: Vec<&String> = before.difference(&now).collect();
            let more: Vec<&String> = now.difference(&before).collect();
            ensure!(missing.is_empty() && more.is_empty(), "missing: {missing:?}, more: {more:?}");
            Ok(())
        })
        .unwrap();
        ping_all_pairs(&[a.clone(), b.clone()], SOON).unwrap();
        let name = b.name.clone();
        assert_eq!(dig(&a.workload, "127.0.0.11", &[&name]).unwrap(), [b.address()], "{network}");
    }
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn interface_that_stays_down_is_left_alone() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    create_network(&lab, "flat", &["--subnet", "10.1.0.0/24", "--subnet", "fd01::/64"]).unwrap();
    let a = attach(host, "a", "flat", &[]).unwrap();
    let b = attach(host, "b", "flat", &[]).unwrap();
    ping_all_pairs(&[a.clone(), b.clone()], SOON).unwrap();
    a.workload.exec_ok(["ip", "link", "set", "eth0", "down"]).unwrap();
    // The same moments pass for another interface, which is put back.
    down_and_up(&b);
    b.workload.ping_until("fd01::1", SOON).unwrap();
    let links = a.workload.ip_json(&["link", "show", "eth0"]).unwrap();
    assert!(!strings(&links[0]["flags"]).contains(&"UP".to_owned()), "{links}");
    let routes = a.workload.exec_ok(["ip", "route", "show", "default"]).unwrap();
    assert_eq!(routes, "");
}

/// The gateways of the default routes of a namespace: IPv4, then IPv6.
fn gateways(of: &Netns) -> Vec<String> {
    let family = |family: &str| of.ip_json(&[family, "route", "show", "default"]).unwrap();
    let all = ["-4", "-6"].map(family);
    let routes = all.iter().flat_map(|routes| routes.as_array().unwrap());
    routes.map(|route| text(&route["gateway"])).collect()
}

#[test]
fn default_route_moves_to_the_next_network_with_a_gateway() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    create_network(&lab, "blue", &["--subnet", "10.1.0.0/16", "--subnet", "fd01::/64"]).unwrap();
    create_network(&lab, "inner", &["--subnet", "10.2.0.0/16", "--subnet", "fd02::/64", "--internal"])
        .unwrap();
    create_network(&lab, "red", &["--subnet", "10.3.0.0/16", "--subnet", "fd03::/64"]).unwrap();
    create_routed_network(&lab, "pods", &["--subnet", "10.4.0.0/16", "--subnet", "fd04::/48"]).unwrap();
    let workload = host.workload("w").unwrap();
    let mut gateway_of = Vec::new();
    for network in ["blue", "inner", "red", "pods"] {
        let attached = attach_workload(workload.clone(), network, &[]).unwrap();
        gateway_of.push((network, attached));
    }
    assert_eq!(gateways(&workload), ["10.1.0.1", "fd01::1"]);
    // A default route that the workload chose itself stays.
    host.ctl_ok(&["detach", "w", "--network", "blue"]).unwrap();
    assert_eq!(gateways(&workload), ["10.3.0.1", "fd03::1"]);
    workload.ping_until("10.3.0.1", SOON).unwrap();
    workload.exec_ok(["ip", "-4", "route", "replace", "default", "dev", "eth1"]).unwrap();
    host.ctl_ok(&["detach", "w", "--network", "red"]).unwrap();
    let now = gateways(&workload);
    assert_eq!(now.len(), 2, "{now:?}");
    assert!(now[1].starts_with("fd04:"), "{now:?}");
    let v4 = workload.exec_ok(["ip", "-4", "route", "show", "default"]).unwrap();
    assert!(v4.starts_with("default dev eth1"), "{v4}");
    workload.exec_ok(["ip", "-4", "route", "del", "default"]).unwrap();
    host.ctl_ok(&["detach", "w", "--network", "inner"]).unwrap();
    let now = gateways(&workload);
    assert!(now[0].starts_with("10.4."), "{now:?}");
    workload.ping_until(&now[1], SOON).unwrap();
    host.ctl_ok(&["detach", "w"]).unwrap();
    assert_eq!(gateways(&workload), Vec::<String>::new());
}

#[test]
fn mac_address_that_a_later_plugin_sets_is_followed() {
    for mode in ["l2", "l3"] {
        let lab = start_lab(2).unwrap();
        let (h1, h2) = (&lab["h1"], &lab["h2"]);
        let subnets = ["--subnet", "10.1.0.0/16", "--subnet", "fd01::/48"];
        if mode == "l2" {
            create_network(&lab, "pods", &["--subnet", "10.1.0.0/16", "--subnet", "fd01::/64"]).unwrap();
        } else {
            create_routed_network(&lab, "pods", &subnets).unwrap();
        }
        let list = Conflist::new(h1, "pods")
            .with_version("1.0.0")
            .with_last(json!({ "type": "tuning", "mac": "02:00:00:00:00:79" }));
        let workload = h1.workload("a").unwrap();
        let container = Container::for_workload(&workload);
        let result = list.add(h1, &container).unwrap();
        let others = [attach(h1, "near", "pods", &[]).unwrap(), attach(h2, "far", "pods", &[]).unwrap()];
        for address in addresses(&result) {
            for other in &others {
                other.workload.ping_until(&address, SOON).unwrap();
            }
        }
        list.check(h1, &container, &result).unwrap();
        // The address of another endpoint is not taken over.
        let stolen = others[1].mac();
        workload.exec_ok(["ip", "link", "set", "eth0", "address", &stolen]).unwrap();
        wait_problem(h1, &["has the MAC address", &stolen, "far"], SOON).unwrap();
        for address in others[1].addresses() {
            others[0].workload.ping_until(&address, SOON).unwrap();
        }
        workload.exec_ok(["ip", "link", "set", "eth0", "address", "02:00:00:00:00:79"]).unwrap();
        for address in addresses(&result) {
            others[1].workload.ping_until(&address, SOON).unwrap();
        }
        wait_until(SOON, "the problem to be gone", || {
            let status = h1.ctl_json(&["status"])?;
            ensure!(!status.to_string().contains("OVL-E045"), "{status}");
            Ok(())
        })
        .unwrap();
        wait_clean(lab.hosts(), SOON).unwrap();
        list.del(h1, &container, Some(&result)).unwrap();
    }
}

#[test]
fn changed_mac_address_of_another_workload_is_named() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    create_network(&lab, "flat", &["--subnet", "10.1.0.0/24"]).unwrap();
    let a = attach(host, "a", "flat", &[]).unwrap();
    a.workload.exec_ok(["ip", "link", "set", "eth0", "address", "02:00:00:00:00:79"]).unwrap();
    wait_problem(host, &["has the MAC address", "endpoint a", "02:00:00:00:00:79", &a.mac()], SOON).unwrap();
    a.workload.exec_ok(["ip", "link", "set", "eth0", "address", &a.mac()]).unwrap();
    wait_until(SOON, "the problem to be gone", || {
        let status = host.ctl_json(&["status"])?;
        ensure!(!status.to_string().contains("OVL-E045"), "{status}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn networks_have_ipv6_where_the_host_turns_it_off_by_sysctl() {
    for before in [true, false] {
        let lab = netns_lab::Lab::new(LabConfig::hosts(2)).unwrap();
        let turn_off = || {
            for host in lab.hosts() {
                for name in ["default", "all"] {
                    // On the underlay the hosts speak IPv4.
                    host.exec_ok(["sysctl", "-qw", &format!("net.ipv6.conf.{name}.disable_ipv6=1")]).unwrap();
                }
            }
        };
        if before {
            turn_off();
        }
        lab.start_all().unwrap();
        let (h1, h2) = (&lab["h1"], &lab["h2"]);
        create_network(&lab, "flat", &["--subnet", "10.1.0.0/16", "--subnet", "fd01::/64"]).unwrap();
        create_routed_network(&lab, "pods", &["--subnet", "10.2.0.0/16", "--subnet", "fd02::/48"]).unwrap();
        create_routed_network(
            &lab,
            "sealed",
            &["--subnet", "10.3.0.0/16", "--subnet", "fd03::/48", "--encrypted"],
        )
        .unwrap();
        for network in ["flat", "pods", "sealed"] {
            let all = [
                attach(h1, &format!("a-{network}"), network, &[]).unwrap(),
                attach(h1, &format!("b-{network}"), network, &[]).unwrap(),
                attach(h2, &format!("c-{network}"), network, &[]).unwrap(),
            ];
            ping_all_pairs(&all, SOON).unwrap();
            if !before {
                turn_off();
                // The devices of other networks have lost their addresses too.
                wait_clean(lab.hosts(), SOON * 3).unwrap();
                ping_all_pairs(&all, SOON * 3).unwrap();
            }
        }
        wait_clean(lab.hosts(), SOON).unwrap();
    }
}
