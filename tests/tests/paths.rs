//! Probes of the paths that packets of workloads take: what they find, and that nobody else can send them.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Underlay, wait_until};
use ovl_tests::{
    SOON, assert_no_reply, attach, create_network, peer, ping_all_pairs, problems, start_lab_with, text,
    wait_clean, wait_problem,
};
use serde_json::Value;

/// Time limit for a fault of a path to be shown, and for its end.
const WITHIN: Duration = Duration::from_secs(5);
/// The same for a fault of the tunnel.
const WITHIN_TUNNEL: Duration = Duration::from_secs(16);
/// The same for a fault of large packets, which are probed less often.
const WITHIN_LARGE: Duration = Duration::from_secs(15);
/// The same for the search of what passes instead.
const WITHIN_SEARCH: Duration = Duration::from_secs(60);

/// Drops VXLAN packets from one host to another one on the switch between them. `more` is a further condition of nft.
fn block(lab: &Lab, from: &str, to: &str, more: &str) {
    drop_on_switch(lab, &format!("iifname {from} oifname {to} udp dport 4789 {more}"));
}

fn unblock(lab: &Lab) {
    remove_table(lab, "security-group");
}

/// Drops what a rule of nft matches on the switch.
fn drop_on_switch(lab: &Lab, rule: &str) {
    add_table(lab, "security-group", &format!("{rule} drop"));
}

/// Adds a table with rules of nft for what the switch forwards.
fn add_table(lab: &Lab, name: &str, rules: &str) {
    let table = format!(
        "table bridge {name} {{ chain forward {{ type filter hook forward priority 0; {rules}; }}; }}"
    );
    lab.switch().exec_input(["nft", "-f", "-"], Some(&table)).unwrap();
}

fn remove_table(lab: &Lab, name: &str) {
    lab.switch().exec_ok(["nft", &format!("delete table bridge {name}")]).unwrap();
}

/// Damages datagrams of the tunnel from one host to another one that their sender left to the kernel to divide. Links of the lab
/// carry them undivided, so they are longer than any packet of a link.
fn damage_divided(lab: &Lab, from: &str, to: &str) {
    let rule = format!(
        "iifname {from} oifname {to} udp dport 51940 ip length > 1500 counter @th,1024,32 set 0xbadbad"
    );
    add_table(lab, "faulty-card", &rule);
}

/// The number of packets that [`damage_divided`] has damaged.
fn damaged(lab: &Lab) -> u64 {
    let rules = lab.switch().exec_ok(["nft", "list table bridge faulty-card"]).unwrap();
    let mut words = rules.split_whitespace().skip_while(|word| *word != "packets");
    words.nth(1).unwrap().parse().unwrap()
}

/// The sum of the pseudo-header of TCP between two addresses, for a segment of `length` bytes: what is in the place of a checksum
/// that is left to an offload.
fn pseudo_sum([from, to]: [Ipv4Addr; 2], length: u16) -> u16 {
    let halves = |address: Ipv4Addr| address.to_bits() / 0x1_0000 + address.to_bits() % 0x1_0000;
    let sum = halves(from) + halves(to) + 6 + u32::from(length);
    u16::try_from(sum % 0xffff).unwrap()
}

/// Drops packets in VXLAN from a host that left their checksums to an offload, as if one had left wrong ones: requests for a
/// connection between two addresses, and datagrams to all hosts of a link. Links of the lab carry them as they are.
fn drop_unfinished(lab: &Lab, from: &str, ends: [Ipv4Addr; 2]) {
    let sum = pseudo_sum(ends, 40);
    let rules = [
        format!("iifname {from} udp dport 4789 @th,312,8 6 @th,528,16 {sum} drop"),
        format!("iifname {from} udp dport 4789 @th,312,8 17 @th,368,32 0xffffffff @th,448,16 < 512 drop"),
    ]
    .join("; ");
    add_table(lab, "faulty-card", &rules);
}

/// The probed path from a host to another one.
fn path(host: &Host, other: &str) -> Result<Value> {
    let row = peer(host, other)?;
    row["paths"].get(0).cloned().with_context(|| format!("{other} has no probed path: {row}"))
}

/// Waits until a host says this of the two directions of its path to another one.
fn wait_path(host: &Host, other: &str, [sent, received]: [&str; 2], timeout: Duration) {
    let what = format!("{sent} to and {received} from {other} on {}", host.name());
    wait_until(timeout, &what, || {
        let path = path(host, other)?;
        ensure!(path["sent"]["state"] == sent && path["received"]["state"] == received, "{path}");
        Ok(())
    })
    .unwrap();
}

fn wait_ready(host: &Host, timeout: Duration) {
    wait_until(timeout, &format!("{} to be ready", host.name()), || {
        let status = host.ctl_json(&["status"])?;
        ensure!(status["state"] == "ready", "{status}");
        Ok(())
    })
    .unwrap();
}

/// Two hosts with one network and one workload each, whose path works.
fn two_hosts(underlay: Underlay, network: &[&str]) -> Lab {
    let lab = start_lab_with(LabConfig::hosts(2).underlay(underlay)).unwrap();
    create_network(&lab, "blue", network).unwrap();
    let all = [("h1", "a"), ("h2", "b")].map(|(host, name)| attach(&lab[host], name, "blue", &[]).unwrap());
    ping_all_pairs(&all, SOON).unwrap();
    for (host, other) in [("h1", "h2"), ("h2", "h1")] {
        wait_path(&lab[host], other, ["works"; 2], SOON);
        wait_ready(&lab[host], SOON);
    }
    lab
}

/// Blocks VXLAN from h1 to h2, and checks what both say of it while all else works.
fn assert_blocked_port_is_named(underlay: Underlay, network: &[&str]) {
    let lab = two_hosts(underlay, network);
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let (first, second) = (h1.address().unwrap().to_string(), h2.address().unwrap().to_string());
    block(&lab, "h1", "h2", "");
    let open = format!("allow UDP port 4789 from {first} to {second}");
    wait_problem(h1, &["no VXLAN packet from this host arrives at host h2", &open], WITHIN).unwrap();
    wait_problem(h2, &["no VXLAN packet from host h1 arrives at this host", &open], WITHIN).unwrap();
    wait_path(h1, "h2", ["broken", "works"], WITHIN);
    assert_eq!(path(h1, "h2").unwrap()["sent"]["loss_percent"], 100);
    let status = h2.ctl_json(&["status"]).unwrap();
    assert_eq!((text(&status["problems"][0]["code"]), text(&status["problems"][0]["object"])), {
        ("OVL-E034".to_owned(), "h1".to_owned())
    });
    let row = peer(h1, "h2").unwrap();
    assert_eq!((text(&row["state"]), &row["reachable"]), ("alive".to_owned(), &Value::Bool(true)));
    assert_no_reply(&h1.find_workload("a").unwrap(), &text(&address_of(h2, "b")));

    unblock(&lab);
    for (host, other) in [(h1, "h2"), (h2, "h1")] {
        wait_ready(host, WITHIN);
        wait_path(host, other, ["works"; 2], WITHIN);
    }
    wait_clean(lab.hosts(), SOON).unwrap();
}

/// The first address of an endpoint, without its prefix length.
fn address_of(host: &Host, name: &str) -> Value {
    let rows = ovl_tests::rows(host, &["endpoints"]).unwrap();
    let row = rows.iter().find(|row| row["name"] == name).unwrap();
    text(&row["addresses"][0]).split('/').next().unwrap().into()
}

#[test]
fn blocked_vxlan_port_is_named_by_both_hosts_of_a_switched_network() {
    assert_blocked_port_is_named(Underlay::V4, &["--subnet", "10.99.0.0/24"]);
}

#[test]
fn blocked_vxlan_port_is_named_by_both_hosts_of_a_routed_network_over_ipv6() {
    let network = ["--mode", "l3", "--backend", "vxlan", "--subnet", "10.60.0.0/16"];
    assert_blocked_port_is_named(Underlay::V6, &network);
}

#[test]
fn path_for_small_packets_alone_is_named_and_networks_use_what_passes() {
    let lab = two_hosts(Underlay::V4, &["--subnet", "10.99.0.0/24"]);
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let mtu = |host: &Host| host.ctl_json(&["network", "inspect", "blue"]).unwrap()["mtu"].as_u64();
    assert_eq!(mtu(h1), Some(1450));
    // 1300 bytes of the outer packet are 1250 of the inner one.
    block(&lab, "h1", "h2", "ip length > 1300");
    wait_problem(h1, &["packets of 1450 bytes are lost", "from this host to host h2"], WITHIN_LARGE).unwrap();
    wait_problem(h2, &["packets of 1450 bytes are lost", "from host h1 to this host"], WITHIN_LARGE).unwrap();
    wait_path(h1, "h2", ["small-only", "works"], WITHIN_LARGE);

    wait_problem(h1, &["packets of more than 12", "restart ovld on this host"], WITHIN_SEARCH).unwrap();
    wait_until(SOON, "all hosts to use a smaller MTU", || {
        for host in lab.hosts() {
            let mtu = mtu(host).unwrap_or_default();
            ensure!((1242..=1250).contains(&mtu), "{mtu} on {}", host.name());
        }
        Ok(())
    })
    .unwrap();
    wait_ready(h2, WITHIN_LARGE);
    wait_path(h1, "h2", ["works"; 2], WITHIN_LARGE);
    let workload = h1.find_workload("a").unwrap();
    let largest = (mtu(h1).unwrap() - 28).to_string();
    let address = text(&address_of(h2, "b"));
    workload.exec_ok(["ping", "-n", "-c1", "-W5", "-Mdo", "-s", &largest, &address]).unwrap();

    unblock(&lab);
    h1.restart().unwrap();
    lab.hosts().iter().for_each(|host| wait_ready(host, SOON));
    wait_until(SOON, "the old MTU", || -> Result<bool> { Ok(mtu(h2) == Some(1450)) }).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn tunnel_divides_no_datagrams_while_that_damages_them() {
    let lab = start_lab_with(LabConfig::hosts(2)).unwrap();
    create_network(&lab, "red", &["--encrypted", "--subnet", "10.99.0.0/24"]).unwrap();
    let all = [("h1", "a"), ("h2", "b")].map(|(host, name)| attach(&lab[host], name, "red", &[]).unwrap());
    ping_all_pairs(&all, SOON).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    wait_ready(h1, SOON);
    damage_divided(&lab, "h1", "h2");
    let found =
        wait_problem(h1, &["to host h2", "UDP_SEGMENT", "ovld sends each one by itself"], WITHIN_SEARCH)
            .unwrap();
    assert!(!found.contains("h1"), "{found}");
    let status = h1.ctl_json(&["status"]).unwrap();
    assert_eq!(text(&status["problems"][0]["code"]), "OVL-E055");

    let (long, before) = (vec![7; 4_000_000], damaged(&lab));
    let [from, to] = &all;
    let echo = to.workload.tcp_echo(0).unwrap();
    let back = from.workload.tcp_roundtrip(to.address(), echo.port(), &long).unwrap();
    assert!(back == long);
    // Rounds of the trial itself go on.
    let more = damaged(&lab) - before;
    assert!(more < 5, "{more} datagrams of a connection were divided");
    wait_ready(h2, WITHIN);

    remove_table(&lab, "faulty-card");
    wait_ready(h1, WITHIN_SEARCH);
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn checksums_are_computed_before_vxlan_where_the_offload_leaves_wrong_ones() {
    let lab = two_hosts(Underlay::V4, &["--subnet", "10.99.0.0/24"]);
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let ends = [(h1, "a"), (h2, "b")].map(|(host, name)| text(&address_of(host, name)).parse().unwrap());
    let (from, to) = (h1.find_workload("a").unwrap(), h2.find_workload("b").unwrap());
    let echo = to.tcp_echo(0).unwrap();
    let at = SocketAddr::from((ends[1], echo.port()));
    let connect = || from.run(|| TcpStream::connect_timeout(&at, Duration::from_secs(2))).unwrap();
    connect().unwrap();
    drop_unfinished(&lab, "h1", ends);
    connect().unwrap_err();
    from.exec_ok(["ping", "-n", "-c1", "-W5", &ends[1].to_string()]).unwrap();

    wait_problem(h1, &["in VXLAN from this host to host h2 are lost", "ovld computes them"], WITHIN_SEARCH)
        .unwrap();
    let status = h1.ctl_json(&["status"]).unwrap();
    assert_eq!(text(&status["problems"][0]["code"]), "OVL-E039");
    wait_until(SOON, "connections to open", || -> Result<bool> { Ok(connect().is_ok()) }).unwrap();
    let long = vec![7; 1_000_000];
    assert!(from.tcp_roundtrip(ends[1], echo.port(), &long).unwrap() == long);
    wait_ready(h2, WITHIN);

    remove_table(&lab, "faulty-card");
    h1.restart().unwrap();
    lab.hosts().iter().for_each(|host| wait_ready(host, SOON));
    connect().unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

/// Lets the underlay drop packets with addresses of a directly routed network, and checks what both hosts say of it.
fn assert_foreign_sources_are_named(underlay: Underlay, subnet: &str, family: &str) {
    let network = ["--mode", "l3", "--backend", "direct", "--subnet", subnet];
    let lab = two_hosts(underlay, &network);
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let (first, second) = (h1.address().unwrap().to_string(), h2.address().unwrap().to_string());
    let row = path(h1, "h2").unwrap();
    assert_eq!(
        (text(&row["encapsulation"]), text(&row["network"])),
        ("direct".into(), "blue".into()),
        "{row}"
    );
    let pair = |from: &str, to: &str| format!("addresses in {subnet} from {from} to {to}");

    drop_on_switch(&lab, &format!("{family} saddr {subnet}"));
    for (host, other, there, here) in [(h1, "h2", &second, &first), (h2, "h1", &first, &second)] {
        let what = format!("from host {other} arrives at this host");
        let both = format!("between this host and host {other}, in neither direction");
        let found =
            wait_problem(host, &["network blue", "without VXLAN", &pair(there, here)], WITHIN).unwrap();
        assert!(found.contains(&what) || found.contains(&both), "{found}");
        let status = host.ctl_json(&["status"]).unwrap();
        assert_eq!(text(&status["problems"][0]["code"]), "OVL-E038");
    }
    unblock(&lab);
    lab.hosts().iter().for_each(|host| wait_ready(host, WITHIN));

    drop_on_switch(&lab, &format!("iifname h1 oifname h2 {family} saddr {subnet}"));
    let open = pair(&first, &second);
    wait_problem(h1, &["from this host arrives at host h2, as it says", &open], WITHIN).unwrap();
    wait_problem(h2, &["from host h1 arrives at this host", &open], WITHIN).unwrap();
    wait_path(h1, "h2", ["broken", "works"], WITHIN);
    unblock(&lab);
    lab.hosts().iter().for_each(|host| wait_ready(host, WITHIN));
    wait_path(h2, "h1", ["works"; 2], WITHIN);
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn filter_of_foreign_sources_is_named_on_a_direct_network() {
    assert_foreign_sources_are_named(Underlay::V4, "10.61.0.0/16", "ip");
}

#[test]
fn filter_of_foreign_sources_is_named_on_a_direct_network_over_ipv6() {
    assert_foreign_sources_are_named(Underlay::V6, "fd61::/48", "ip6");
}

#[test]
fn direction_in_which_the_tunnel_is_blocked_is_named_by_both_hosts() {
    let lab = start_lab_with(LabConfig::hosts(2)).unwrap();
    create_network(&lab, "red", &["--encrypted", "--subnet", "10.99.0.0/24"]).unwrap();
    let all = [("h1", "a"), ("h2", "b")].map(|(host, name)| attach(&lab[host], name, "red", &[]).unwrap());
    ping_all_pairs(&all, SOON).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    lab.hosts().iter().for_each(|host| wait_ready(host, SOON));
    let (first, second) = (h1.address().unwrap(), h2.address().unwrap());
    drop_on_switch(&lab, "iifname h1 oifname h2 udp dport 51940");
    let open = format!("Allow UDP port 51940 from {first} to {second}");
    wait_problem(h1, &["host h2 answers nothing that this host sends", &open], WITHIN_TUNNEL).unwrap();
    wait_problem(h2, &["no packet of the tunnel from host h1 arrives", &open], WITHIN_TUNNEL).unwrap();
    unblock(&lab);
    lab.hosts().iter().for_each(|host| wait_ready(host, WITHIN_TUNNEL));
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn host_that_is_down_restarts_or_leaves_is_no_fault_of_a_path() {
    let lab = two_hosts(Underlay::V4, &["--subnet", "10.99.0.0/24"]);
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let path_problems = |host: &Host| -> Result<Vec<String>> {
        Ok(problems(host)?.into_iter().filter(|problem| problem.contains("VXLAN")).collect())
    };
    for is_killed in [false, true] {
        if is_killed {
            h2.kill9().unwrap();
            h2.start().unwrap();
        } else {
            h2.restart().unwrap();
        }
        // The path is judged again, and never wrongly on the way.
        wait_until(SOON, "the path to work again", || {
            for host in [h1, h2] {
                let found = path_problems(host)?;
                assert!(found.is_empty(), "{found:?}");
            }
            let found = path(h1, "h2")?;
            ensure!(found["sent"]["state"] == "works" && found["received"]["state"] == "works", "{found}");
            Ok(())
        })
        .unwrap();
    }
    // Without an endpoint of its own, h2 has no VXLAN device.
    h2.ctl_ok(&["detach", "b"]).unwrap();
    wait_until(SOON, "no path to be probed", || {
        assert!(path_problems(h1)?.is_empty());
        ensure!(path(h1, "h2").is_err());
        Ok(())
    })
    .unwrap();
    wait_ready(h1, SOON);
}
