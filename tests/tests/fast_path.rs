//! The fast path: packets that pass the host's IP stack by, and those that must not.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::collections::BTreeMap;
use std::net::UdpSocket;
use std::time::Duration;

use anyhow::{Result, ensure};
use netns_lab::{Host, LabConfig, PortMtu, Underlay, wait_until};
use ovl_tests::Flow;
use ovl_tests::fast::{
    BOTH, BOTH_SWITCHED, ON, PORT, Pods, SWITCHED, ask_udp, at, counted, lab, talk, transfer, wait_fast,
};
use ovl_tests::inject::{listener, receive, spoofing_socket};
use ovl_tests::routed::{create_routed_network, device_of};
use ovl_tests::service::{Answer, Connection, NamedServer, apply, wait_answers};
use ovl_tests::{
    Attached, SOON, attach, create_network, ping_all_pairs, start_lab, start_lab_with, text, wait_clean,
    wait_no_problem, wait_problem,
};
use serde_json::json;

fn assert_connected(config: LabConfig, backend: &str, subnets: &[&str], ways: [&str; 2]) {
    let pods = Pods::start(start_lab_with(config).unwrap(), backend, subnets).unwrap();
    pods.wait_fast(ways).unwrap();
    pods.ensure_transferred().unwrap();
    pods.ensure_well().unwrap();
}

#[test]
fn endpoints_connect_by_direct_routes() {
    let config = lab(2).underlay(Underlay::Dual);
    assert_connected(config, "auto", &["--subnet", "10.60.0.0/16"], ["direct_out", "direct_in"]);
}

#[test]
fn endpoints_connect_by_direct_routes_over_ipv6() {
    let config = lab(2).underlay(Underlay::V6);
    assert_connected(config, "direct", &["--subnet", "fd60::/48"], ["direct_out", "direct_in"]);
}

#[test]
fn endpoints_connect_in_vxlan() {
    assert_connected(lab(2), "vxlan", BOTH, ["vxlan_out", "vxlan_in"]);
}

#[test]
fn endpoints_connect_on_a_switched_network() {
    assert_connected(lab(2), SWITCHED, BOTH_SWITCHED, ["vxlan_out", "vxlan_in"]);
}

#[test]
fn vxlan_over_ipv6_is_left_to_the_kernel() {
    let Pods { lab, a, b, c, .. } =
        &Pods::start(start_lab_with(lab(2).underlay(Underlay::V6)).unwrap(), "vxlan", BOTH).unwrap();
    wait_fast(&lab["h1"], &["local"], || talk(a, b)).unwrap();
    talk(a, c).unwrap();
    transfer(&a.workload, &c.workload, c.address().parse().unwrap()).unwrap();
    assert_eq!(counted(&lab["h1"], "fast")["vxlan_out"], 0);
}

#[test]
fn hosts_with_and_without_it_mix() {
    let lab = start_lab(2).unwrap();
    lab["h1"].set_config(ON).unwrap();
    lab["h1"].restart().unwrap();
    lab["h1"].wait_ready(SOON).unwrap();
    for (backend, ways) in [
        ("vxlan", ["vxlan_out", "vxlan_in"]),
        ("direct", ["direct_out", "direct_in"]),
        (SWITCHED, ["vxlan_out", "vxlan_in"]),
    ] {
        match backend {
            SWITCHED => create_network(&lab, backend, &[]).unwrap(),
            _ => create_routed_network(&lab, backend, &["--backend", backend]).unwrap(),
        }
        let [a, c] = [("h1", "a"), ("h2", "c")]
            .map(|(host, name)| attach(&lab[host], &format!("{name}-{backend}"), backend, &[]).unwrap());
        let _servers = [&a, &c].map(|each| NamedServer::start(&each.workload, &each.name, PORT).unwrap());
        ping_all_pairs(&[a.clone(), c.clone()], SOON).unwrap();
        wait_fast(&lab["h1"], &ways, || talk(&a, &c).and_then(|()| talk(&c, &a))).unwrap();
        transfer(&a.workload, &c.workload, c.address().parse().unwrap()).unwrap();
        transfer(&c.workload, &a.workload, a.address().parse().unwrap()).unwrap();
    }
    assert_eq!(counted(&lab["h2"], "fast"), BTreeMap::new());
    let why = lab["h2"].ctl_json(&["status"]).unwrap()["fast_path"]["why_not"].clone();
    assert_eq!(text(&why), "it is off, as configured");
}

/// A Service of all endpoints with a label, for TCP and UDP, with a port on every host.
fn service(label: &str) -> String {
    let port = |name: &str, protocol: &str| json!({ "name": name, "port": 8000, "targetPort": PORT, "nodePort": 30080, "protocol": protocol });
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "shop" },
        "spec": { "type": "NodePort", "selector": { "name": label }, "ports": [port("tcp", "TCP"), port("udp", "UDP")] },
    })
    .to_string()
}

#[test]
fn what_the_stack_translates_is_answered_through_it() {
    for backend in ["direct", "vxlan", SWITCHED] {
        let Pods { lab, a, b, c, .. } =
            &Pods::start(start_lab_with(lab(2)).unwrap(), backend, &["--subnet", "10.60.0.0/16"]).unwrap();
        let h1 = &lab["h1"];
        let all: Vec<Attached> = [("h1", "near"), ("h2", "far")]
            .map(|(host, name)| {
                attach(
                    &lab[host],
                    name,
                    "pods",
                    &["--label", &format!("name={name}"), "--publish", "8080:80", "--publish", "8080:80/udp"],
                )
                .unwrap()
            })
            .into();
        let _more: Vec<_> =
            all.iter().map(|each| NamedServer::start(&each.workload, &each.name, PORT).unwrap()).collect();
        for server in &all {
            // Both paths at once, from the same ports: one connection after another, of each kind.
            apply(lab, h1, &service(&server.name)).unwrap();
            let shown = h1.ctl_json(&["get", "service", "shop"]).unwrap();
            let cluster_ip = text(&shown["spec"]["clusterIP"]);
            let hosts: Vec<String> =
                lab.hosts().iter().map(|host| host.address().unwrap().to_string()).collect();
            let published =
                lab.hosts().iter().find(|host| host.name() == server.workload.host().name()).unwrap();
            let published = published.address().unwrap().to_string();
            let ways = [
                (cluster_ip.clone(), 8000),
                (hosts[0].clone(), 30080),
                (hosts[1].clone(), 30080),
                (published, 8080),
            ];
            for client in [a, c] {
                for (address, port) in &ways {
                    wait_answers(&client.workload, at(address, *port), &[&server.name]).unwrap();
                }
                let mut open = Vec::new();
                for (address, port) in &ways {
                    open.push(Connection::open(&client.workload, at(address, *port)).unwrap().unwrap());
                    open.push(
                        Connection::open(&client.workload, at(&server.address(), PORT)).unwrap().unwrap(),
                    );
                    ask_udp(&client.workload, at(address, *port), 5).unwrap();
                    ask_udp(&client.workload, at(&server.address(), PORT), 5).unwrap();
                }
                for connection in &mut open {
                    let Answer { name, .. } = connection.read_answer().unwrap();
                    assert_eq!(name, server.name);
                }
                for _ in 0..3 {
                    open.iter_mut()
                        .for_each(|connection| assert_eq!(connection.ask().unwrap().name, server.name));
                }
                // One port for a direct flow, then for a translated one, and back.
                let socket = client.workload.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
                socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
                for round in 0..6 {
                    let to = if round % 2 == 0 { at(&server.address(), PORT) } else { at(&cluster_ip, 8000) };
                    for _ in 0..4 {
                        socket.send_to(b"?", to).unwrap();
                        let (_, from) = socket.recv_from(&mut [0; 64]).unwrap();
                        assert_eq!(from, to, "round {round} from {}", client.name);
                    }
                }
                // The Service's own address as its client: the source is translated as well.
                let own =
                    Connection::open(&server.workload, at(&cluster_ip, 8000)).unwrap().unwrap().read_answer();
                assert_eq!(own.unwrap().name, server.name);
            }
            h1.ctl_ok(&["delete", "service", "shop"]).unwrap();
        }
        wait_fast(h1, &["local"], || talk(a, b)).unwrap();
    }
}

/// Kills the daemon of the first host under traffic and starts it again: a connection goes on, and so do the counters of the
/// programs. Returns the flows.
fn kill_under_traffic(Pods { lab, a, b, c, .. }: &Pods) -> [Flow; 3] {
    let h1 = &lab["h1"];
    let flows = [Flow::start(a, b).unwrap(), Flow::start(a, c).unwrap(), Flow::start(c, b).unwrap()];
    let mut connection = Connection::open(&a.workload, at(&c.address(), PORT)).unwrap().unwrap();
    connection.read_answer().unwrap();
    // More than they count after the start, if that begins at zero.
    for _ in 0..4 {
        flows.iter().for_each(|flow| flow.run_for_a_second().unwrap());
    }
    let before = counted(h1, "fast");
    h1.kill9().unwrap();
    flows.iter().for_each(|flow| flow.run_for_a_second().unwrap());
    connection.ask().unwrap();
    h1.start().unwrap();
    h1.wait_ready(SOON).unwrap();
    flows.iter().for_each(|flow| flow.run_for_a_second().unwrap());
    connection.ask().unwrap();
    // The same maps: they went on counting.
    let after = counted(h1, "fast");
    for way in ["local", "vxlan_out", "vxlan_in"] {
        assert!(after[way] > before[way] + 300, "{way}: {before:?} {after:?}");
    }
    flows
}

#[test]
fn killed_daemon_loses_no_packet_and_the_next_one_goes_on() {
    ["vxlan", SWITCHED].into_iter().for_each(assert_killed_daemon_loses_nothing);
}

fn assert_killed_daemon_loses_nothing(backend: &str) {
    let pods = Pods::start(start_lab_with(lab(2)).unwrap(), backend, &["--subnet", "10.60.0.0/16"]).unwrap();
    wait_fast(&pods.lab["h1"], &["local"], || talk(&pods.a, &pods.b)).unwrap();
    wait_fast(&pods.lab["h1"], &["vxlan_out", "vxlan_in"], || talk(&pods.a, &pods.c)).unwrap();
    let flows = kill_under_traffic(&pods);
    for flow in flows {
        flow.finish_without_loss().unwrap();
    }
    wait_clean(pods.lab.hosts(), SOON).unwrap();
}

#[test]
fn other_sources_do_not_take_it() {
    assert_sources_are_checked("direct", "direct_out");
    assert_sources_are_checked(SWITCHED, "vxlan_out");
}

fn assert_sources_are_checked(backend: &str, out: &str) {
    let Pods { lab, a, b, c, .. } =
        &Pods::start(start_lab_with(lab(2)).unwrap(), backend, &["--subnet", "10.60.0.0/16"]).unwrap();
    let h1 = &lab["h1"];
    wait_fast(h1, &["local", out], || talk(a, b).and_then(|()| talk(a, c))).unwrap();
    for to in [b, c] {
        let server = listener(to, &to.address(), Duration::from_millis(500));
        let before = counted(h1, "slow")["source"];
        let forged = spoofing_socket(&a.workload, b.address().parse().unwrap());
        let from_elsewhere = spoofing_socket(&a.workload, "10.60.77.77".parse().unwrap());
        for socket in [&forged, &from_elsewhere] {
            for _ in 0..5 {
                socket.send_to(b"forged", at(&to.address(), ovl_tests::inject::PORT)).unwrap();
            }
        }
        assert_eq!(receive(&server), None, "to {}", to.name);
        assert!(counted(h1, "slow")["source"] >= before + 10);
    }
}

#[test]
fn packets_that_are_too_big_are_told_to_the_sender() {
    let Pods { lab, a, c, .. } =
        &Pods::start(start_lab_with(lab(2)).unwrap(), "direct", &["--subnet", "10.60.0.0/16"]).unwrap();
    wait_fast(&lab["h1"], &["direct_out"], || talk(a, c)).unwrap();
    lab["h2"].set_mtu(1400, PortMtu::Follow).unwrap();
    let route = format!("{} ", c.address());
    wait_until(SOON, "the endpoint to learn the smaller MTU", || {
        let socket = a.workload.run(|| UdpSocket::bind("0.0.0.0:0"))??;
        socket.connect(at(&c.address(), PORT))?;
        // Refused once the smaller MTU is known.
        let _ = socket.send(&[0; 1440]);
        let known = a.workload.exec_ok(["ip", "route", "get", &c.address()])?;
        ensure!(
            known.starts_with(&route) && known.contains("mtu 1400"),
            "{known}; {:?}",
            counted(&lab["h1"], "slow")
        );
        Ok(())
    })
    .unwrap();
    assert!(counted(&lab["h1"], "slow")["too_big"] > 0);
    transfer(&a.workload, &c.workload, c.address().parse().unwrap()).unwrap();
}

#[test]
fn policy_takes_hold_at_once() {
    assert_policy_takes_hold("auto", "direct_in");
    assert_policy_takes_hold(SWITCHED, "vxlan_in");
}

fn assert_policy_takes_hold(backend: &str, into: &str) {
    let Pods { lab, a, b, c, .. } =
        &Pods::start(start_lab_with(lab(2)).unwrap(), backend, &["--subnet", "10.60.0.0/16"]).unwrap();
    let h1 = &lab["h1"];
    wait_fast(h1, &["local", into], || talk(a, b).and_then(|()| talk(c, b))).unwrap();
    let mut open =
        [a, c].map(|from| Connection::open(&from.workload, at(&b.address(), PORT)).unwrap().unwrap());
    open.iter_mut().for_each(|connection| assert_eq!(connection.read_answer().unwrap().name, "b"));
    let policy = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": { "name": "closed" },
        "spec": { "podSelector": { "matchLabels": { "app": "web" } }, "policyTypes": ["Ingress"] },
    });
    apply(lab, h1, &policy.to_string()).unwrap();
    wait_until(SOON, "the policy to be in force", || {
        let pods = h1.ctl_json(&["policy", "ls"])?;
        ensure!(pods.to_string().contains("closed"), "{pods}");
        Ok(())
    })
    .unwrap();
    for connection in &mut open {
        assert!(connection.ask().is_err(), "a connection goes on");
    }
    for from in [a, c] {
        assert!(Connection::open(&from.workload, at(&b.address(), PORT)).unwrap().is_err());
    }
    h1.ctl_ok(&["delete", "networkpolicy", "closed"]).unwrap();
    wait_until(SOON, "connections again", || talk(a, b).and_then(|()| talk(c, b))).unwrap();
    wait_fast(h1, &["local", into], || talk(a, b).and_then(|()| talk(c, b))).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

/// Connection tracking sees the beginning of a connection, then nothing of it, and then what comes next.
#[test]
fn connection_that_a_policy_allows_goes_on_in_the_stack() {
    for (backend, ways) in [("direct", ["local", "direct_in"]), (SWITCHED, ["local", "vxlan_in"])] {
        let Pods { lab, a, b, c, .. } =
            &Pods::start(start_lab_with(lab(2)).unwrap(), backend, &["--subnet", "10.60.0.0/16"]).unwrap();
        let h1 = &lab["h1"];
        wait_fast(h1, &ways, || talk(a, b).and_then(|()| talk(c, b))).unwrap();
        h1.ctl_ok(&["trace", "a", "b:80"]).unwrap();
        let is_paused = || h1.ctl_json(&["status"]).unwrap()["fast_path"]["paused"] == true;
        assert!(is_paused());
        let mut open =
            [a, c].map(|from| Connection::open(&from.workload, at(&b.address(), PORT)).unwrap().unwrap());
        open.iter_mut().for_each(|connection| assert_eq!(connection.read_answer().unwrap().name, "b"));
        wait_until(SOON, "the end of the pause", || -> Result<()> {
            ensure!(!is_paused());
            Ok(())
        })
        .unwrap();
        wait_fast(h1, &ways, || {
            open.iter_mut().try_for_each(|connection| connection.ask().map(drop))?;
            open.iter_mut().try_for_each(|connection| connection.ask().map(drop))
        })
        .unwrap();
        let policy = json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": { "name": "inside" },
            "spec": {
                "podSelector": { "matchLabels": { "app": "web" } }, "policyTypes": ["Ingress"],
                "ingress": [{ "from": [{ "podSelector": { "matchLabels": { "app": "web" } } }] }],
            },
        });
        apply(lab, h1, &policy.to_string()).unwrap();
        for connection in &mut open {
            connection.ask().unwrap();
        }
    }
}

#[test]
fn rules_of_other_programs_are_not_bypassed() {
    assert_not_bypassed("auto", "inet");
    assert_not_bypassed(SWITCHED, "bridge");
}

fn assert_not_bypassed(backend: &str, family: &str) {
    let Pods { lab, a, b, .. } =
        &Pods::start(start_lab_with(lab(2)).unwrap(), backend, &["--subnet", "10.60.0.0/16"]).unwrap();
    let h1 = &lab["h1"];
    wait_fast(h1, &["local"], || talk(a, b)).unwrap();
    let rules = format!(
        "add table {family} mine; add chain {family} mine passing {{ type filter hook forward priority 0; }}; \
         add rule {family} mine passing tcp dport 80 drop"
    );
    h1.exec_ok(["nft", &rules]).unwrap();
    let chain = format!("chain passing of the nftables table {family} mine");
    let said = wait_problem(h1, &["fast path", &chain], SOON).unwrap();
    assert!(said.contains("bypass"), "{said}");
    wait_until(SOON, "the rule to be in force", || -> Result<()> {
        ensure!(Connection::open(&a.workload, at(&b.address(), PORT))?.is_err(), "a connection passes");
        Ok(())
    })
    .unwrap();
    h1.exec_ok(["nft", &format!("delete table {family} mine")]).unwrap();
    wait_no_problem(h1, SOON).unwrap();
    wait_fast(h1, &["local"], || talk(a, b)).unwrap();
}

#[test]
fn nothing_is_left_when_it_is_turned_off() {
    let config = LabConfig { tcx: true, ..lab(2) };
    let Pods { lab, a, b, .. } = &Pods::start(start_lab_with(config).unwrap(), "vxlan", BOTH).unwrap();
    let h1 = &lab["h1"];
    wait_fast(h1, &["local"], || talk(a, b)).unwrap();
    let folder = h1.fast_path_pins().unwrap();
    let links = || std::fs::read_dir(folder.join("links")).map(Iterator::count).unwrap_or_default();
    // Two endpoints and the underlay with two programs each, and the VXLAN device with one.
    wait_until(SOON, "all programs", || -> Result<()> {
        ensure!(links() == 7, "{}", links());
        Ok(())
    })
    .unwrap();
    let device = device_of(h1, "pods", "ovx-").unwrap();
    h1.ctl_ok(&["detach", "b"]).unwrap();
    wait_until(SOON, "the programs of an endpoint to be forgotten", || -> Result<()> {
        ensure!(links() == 5, "{}", links());
        Ok(())
    })
    .unwrap();
    assert!(h1.exec_ok(["ip", "link", "show", "dev", &device]).is_ok());
    h1.ctl_ok(&["teardown", "--yes"]).unwrap();
    assert!(!folder.exists(), "{}", folder.display());
}

/// How many programs are attached to a device as filters.
fn filters(host: &Host, device: &str) -> usize {
    let shown = ["ingress", "egress"]
        .map(|side| host.exec_ok(["tc", "filter", "show", "dev", device, side]).unwrap())
        .concat();
    shown.matches("pref 50000 bpf chain 0 handle").count()
}

#[test]
fn kernel_without_tcx_has_it_by_filters() {
    let config = LabConfig::hosts(2).config("fast_path = \"auto\"").without_tcx();
    let pods = &Pods::start(start_lab_with(config).unwrap(), "vxlan", &["--subnet", "10.60.0.0/16"]).unwrap();
    let Pods { lab, a, b, c, .. } = pods;
    let h1 = &lab["h1"];
    // Of another program, with a filter that lets everything on, before ovl's and after them.
    let foreign = |command: &str, number: u32| {
        h1.exec_ok([
            "sh",
            "-c",
            &format!(
                "tc filter {command} dev eth0 ingress prio {number} handle 1 protocol all bpf da bytecode '1,6 0 0 4294967295,'"
            ),
        ])
        .map(drop)
    };
    let shown = || {
        let links = h1.ip_json(&["link", "show"]).unwrap();
        let names = links.as_array().into_iter().flatten().map(|link| text(&link["ifname"]));
        names
            .filter(|name| ["ove-", "ovx-", "eth0"].iter().any(|kind| name.starts_with(kind)))
            .collect::<Vec<_>>()
    };
    let complete = || -> Result<()> {
        for device in shown() {
            let wanted = if device.starts_with("ovx-") { 1 } else { 2 };
            ensure!(filters(h1, &device) == wanted, "{device}: {}", filters(h1, &device));
        }
        Ok(())
    };
    wait_until(SOON, "all filters", complete).unwrap();
    [7, 60_000].into_iter().for_each(|number| foreign("add", number).unwrap());
    wait_fast(h1, &["local"], || talk(a, b)).unwrap();
    wait_fast(h1, &["vxlan_out", "vxlan_in"], || talk(a, c)).unwrap();
    assert_eq!(text(&h1.ctl_json(&["status"]).unwrap()["fast_path"]["attached_by"]), "clsact");

    // Without a daemon packets go on, and the next one takes over what is there.
    for flow in kill_under_traffic(pods) {
        flow.finish_without_loss().unwrap();
    }
    complete().unwrap();

    // What another program deletes is missed.
    let device = shown().into_iter().find(|name| name.starts_with("ove-")).unwrap();
    h1.exec_ok(["tc", "qdisc", "del", "dev", &device, "clsact"]).unwrap();
    let said = h1.ctl(&["verify"]).unwrap().stdout;
    assert!(said.contains(&format!("attach to {device}")), "{said}");
    h1.kill9().unwrap();
    h1.start().unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    wait_until(SOON, "all filters", complete).unwrap();

    h1.ctl_ok(&["detach", "b"]).unwrap();
    h1.ctl_ok(&["teardown", "--yes"]).unwrap();
    assert_eq!(filters(h1, "eth0"), 0);
    // Its queueing discipline has filters of another program by now.
    [7, 60_000].into_iter().for_each(|number| foreign("del", number).unwrap());
}

#[test]
fn queueing_disciplines_of_other_programs_are_left_alone() {
    let lab = start_lab_with(LabConfig::hosts(2).without_tcx()).unwrap();
    let disciplines = |host: &Host| host.exec_ok(["tc", "qdisc", "show", "dev", "eth0"]).unwrap();
    let [h1, h2] = [&lab["h1"], &lab["h2"]];
    // One that ovl creates, and one that it finds.
    h2.exec_ok(["tc", "qdisc", "add", "dev", "eth0", "clsact"]).unwrap();
    for host in [h1, h2] {
        host.set_config(ON).unwrap();
        host.restart().unwrap();
        host.wait_ready(SOON).unwrap();
        wait_until(SOON, "filters at the underlay", || -> Result<()> {
            ensure!(filters(host, "eth0") == 2, "{}", filters(host, "eth0"));
            Ok(())
        })
        .unwrap();
        host.set_config("fast_path = \"off\"").unwrap();
        host.restart().unwrap();
        host.wait_ready(SOON).unwrap();
        wait_clean(lab.hosts(), SOON).unwrap();
        assert_eq!(filters(host, "eth0"), 0);
    }
    assert!(!disciplines(h1).contains("clsact"), "{}", disciplines(h1));
    assert!(disciplines(h2).contains("clsact"), "{}", disciplines(h2));
}

#[test]
fn it_pauses_while_packets_are_followed() {
    let Pods { lab, a, b, .. } =
        &Pods::start(start_lab_with(lab(2)).unwrap(), "auto", &["--subnet", "10.60.0.0/16"]).unwrap();
    let h1 = &lab["h1"];
    wait_fast(h1, &["local"], || talk(a, b)).unwrap();
    let is_paused = || h1.ctl_json(&["status"]).unwrap()["fast_path"]["paused"] == true;
    assert!(!is_paused());
    let mut open = Connection::open(&a.workload, at(&b.address(), PORT)).unwrap().unwrap();
    open.read_answer().unwrap();
    let traced = h1.ctl_ok(&["trace", "a", "b:80"]).unwrap();
    assert!(traced.contains("arrives"), "{traced}");
    assert!(is_paused());
    // Connections survive both turns.
    open.ask().unwrap();
    wait_until(SOON, "the end of the pause", || -> Result<()> {
        ensure!(!is_paused());
        Ok(())
    })
    .unwrap();
    open.ask().unwrap();
    wait_fast(h1, &["local"], || talk(a, b)).unwrap();
}
