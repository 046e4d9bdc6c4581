//! Hosts with addresses of one family or of both, and hosts that are reached at an address that is not theirs.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::time::Duration;

use anyhow::{Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Underlay, wait_until};
use ovl_tests::routed::create_routed_network;
use ovl_tests::{
    Attached, Connection, SOON, Traffic, attach, create_network, peer, ping_all_pairs, start_lab_with,
    strings, wait_clean,
};

/// Time in which traffic flows another way after a path is cut.
const TURNED: Duration = Duration::from_secs(2);

fn create_networks(lab: &Lab) {
    let subnets = ["--subnet", "10.99.0.0/24", "--subnet", "fd99::/64"];
    create_network(lab, "blue", &[&["--encrypted"][..], &subnets].concat()).unwrap();
    let subnets = ["--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"];
    create_routed_network(lab, "pods", &[&["--encrypt", "auto"][..], &subnets].concat()).unwrap();
}

fn attach_all(lab: &Lab, network: &str) -> Vec<Attached> {
    let hosts = lab.hosts().iter();
    hosts.map(|host| attach(host, &format!("{network}-{}", host.name()), network, &[]).unwrap()).collect()
}

/// How a host reaches another one, as in the column PATH: `sealed`, `via h1`, or nothing.
fn path(host: &Host, other: &str) -> Result<String> {
    let row = peer(host, other)?;
    ensure!(row["state"] == "alive", "{row}");
    let via = strings(&row["via"]);
    let tcp = if row["tcp"] == true { "tcp " } else { "" };
    Ok(match (via.is_empty(), row["sealed"] == true) {
        (false, _) => format!("{tcp}via {}", via.join(" ")),
        (true, true) => format!("{tcp}sealed"),
        (true, false) => tcp.to_owned(),
    })
}

fn wait_path(host: &Host, other: &str, wanted: &str) {
    wait_until(SOON, &format!("{other} to be reached by '{wanted}' on {}", host.name()), || -> Result<()> {
        let is = path(host, other)?;
        ensure!(is == wanted, "it is '{is}': {}", peer(host, other)?);
        Ok(())
    })
    .unwrap();
}

/// Sends much on a connection between each of these pairs, so that packets as long as the path allows have to pass.
fn carry(all: &[Attached], pairs: &[(usize, usize)]) {
    for (from, to) in pairs {
        Connection::open(&all[*from], &all[*to], SOON).unwrap().echo(300 * 1024).unwrap();
    }
}

#[test]
fn hosts_without_a_common_address_family_reach_each_other_through_a_member_with_both() {
    let lab = start_lab_with(LabConfig::hosts(4).families()).unwrap();
    create_networks(&lab);
    for network in ["blue", "pods"] {
        let all = attach_all(&lab, network);
        ping_all_pairs(&all, SOON).unwrap();
        carry(&all, &[(1, 2), (2, 1), (0, 2), (1, 3)]);
    }
    let (h1, h2, h3) = (&lab["h1"], &lab["h2"], &lab["h3"]);
    // Both h1 and h4 have both families.
    for (host, other) in [(h2, "h3"), (h3, "h2")] {
        let via = path(host, other).unwrap();
        assert!(["via h1", "via h4"].contains(&via.as_str()), "{via}");
        let row = peer(host, other).unwrap();
        assert!(row["why"].as_str().is_some_and(|why| why.contains("address family")), "{row}");
        assert!(
            !host.ctl_ok(&["status"]).unwrap().contains("OVL-E0"),
            "{}",
            host.ctl_ok(&["status"]).unwrap()
        );
    }
    wait_path(h1, "h2", "");
    wait_path(h1, "h4", "");
    wait_path(h1, "h3", "sealed");
    wait_path(h3, "h1", "sealed");
    let row = peer(h3, "h1").unwrap();
    assert!(row["address"].as_str().is_some_and(|at| at.starts_with("[fd77::1]")), "{row}");
    assert!(h3.ctl_ok(&["peers"]).unwrap().contains("sealed"));
    wait_clean(lab.hosts(), SOON).unwrap();

    // One that only a member of the other family reaches takes part in agreement: without it there is no majority.
    lab["h4"].kill9().unwrap();
    h3.ctl_ok(&["network", "create", "late", "--encrypted"]).unwrap();
    wait_until(SOON, "the network on h2", || h2.ctl_ok(&["network", "inspect", "late"]).map(drop)).unwrap();
}

/// A firewall on a host that lets no packet of IPv4 pass from and to another one.
struct Cut<'a>(&'a Host);

impl<'a> Cut<'a> {
    fn new(host: &'a Host, other: &Host) -> Self {
        let v4 = other.addresses().into_iter().find(std::net::IpAddr::is_ipv4).unwrap();
        let script = format!(
            "table inet cut {{\n\
             chain in {{ type filter hook input priority -150; ip saddr {v4} drop; }}\n\
             chain out {{ type filter hook output priority -150; ip daddr {v4} drop; }}\n}}\n"
        );
        host.exec_input(["nft", "-f", "-"], Some(&script)).unwrap();
        Self(host)
    }

    fn heal(self) {
        self.0.exec_input(["nft", "-f", "-"], Some("delete table inet cut\n")).unwrap();
    }
}

#[test]
fn pair_goes_on_at_its_other_addresses_when_one_family_is_cut_and_comes_back() {
    let config = LabConfig::hosts(2).underlay(Underlay::Dual).all_addresses();
    let lab = start_lab_with(config).unwrap();
    create_networks(&lab);
    let (blue, pods) = (attach_all(&lab, "blue"), attach_all(&lab, "pods"));
    for all in [&blue, &pods] {
        ping_all_pairs(all, SOON).unwrap();
    }
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    for (host, other) in [(h1, "h2"), (h2, "h1")] {
        wait_path(host, other, "");
    }
    let mut traffic = Traffic::start(&[&blue, &pods]).unwrap();

    let cut = Cut::new(h1, h2);
    for (host, other) in [(h1, "h2"), (h2, "h1")] {
        wait_path(host, other, "sealed");
        let row = peer(host, other).unwrap();
        assert!(row["address"].as_str().is_some_and(|at| at.starts_with("[fd77::")), "{row}");
    }
    traffic.ensure_turned("IPv4 was cut", TURNED).unwrap();

    traffic.watch().unwrap();
    cut.heal();
    for (host, other) in [(h1, "h2"), (h2, "h1")] {
        wait_path(host, other, "");
    }
    traffic.ensure_none_lost().unwrap();
    for host in [h1, h2] {
        let events = host.ctl_ok(&["events"]).unwrap();
        let count = |what: &str| events.lines().filter(|line| line.contains(what)).count();
        assert_eq!(count("main address again"), 1, "it went to and fro: {events}");
    }
    wait_clean(lab.hosts(), SOON).unwrap();
}

/// Has the NAT box of a host forward what is sent to the ports of gossip and relayed datagrams.
fn forward_ports(host: &Host) {
    let inner = host.address().unwrap();
    let script = format!(
        "table ip forwarded {{\n\
         chain in {{ type nat hook prerouting priority -110; iifname wan tcp dport 7940 dnat to {inner}\n\
         iifname wan udp dport {{ 7940, 7942 }} dnat to {inner}; }}\n}}\n\
         insert rule ip nat forward iifname wan ct status dnat accept\n\
         insert rule ip nat deliver meta l4proto udp ct original proto-dst {{ 7940, 7942 }} accept\n"
    );
    let nat_box = &host.nat_boxes()[0];
    nat_box.exec_input(["nft", "-f", "-"], Some(&script)).unwrap();
}

#[test]
fn member_behind_a_forwarded_port_is_joined_there() {
    let config = LabConfig::hosts(4)
        .access("h1", "port-restricted".parse().unwrap())
        .access("h4", "symmetric".parse().unwrap());
    let lab = Lab::new(config).unwrap();
    let [h1, h2, h3, h4] = ["h1", "h2", "h3", "h4"].map(|name| &lab[name]);
    forward_ports(h1);
    let outer = h1.outer_addresses()[0].to_string();
    h1.set_bootstrap(true).unwrap();
    h1.set_join(&[]).unwrap();
    h1.set_args(&["--advertise", &outer]).unwrap();
    for host in [h2, h3, h4] {
        host.set_bootstrap(false).unwrap();
        host.set_join(&[&outer]).unwrap();
    }
    lab.start_all().unwrap();
    create_networks(&lab);
    for network in ["blue", "pods"] {
        ping_all_pairs(&attach_all(&lab, network), SOON).unwrap();
    }
    for host in [h2, h3] {
        wait_path(host, "h1", "sealed");
        let row = peer(host, "h1").unwrap();
        assert!(row["address"].as_str().is_some_and(|at| at.starts_with(&outer)), "{row}");
        wait_path(h1, host.name(), "sealed");
    }
    wait_path(h2, "h3", "");
    let row = peer(h4, "h1").unwrap();
    assert!(row["nat"] == true && strings(&row["via"]).is_empty(), "{row}");
    wait_clean(lab.hosts(), SOON).unwrap();
}
