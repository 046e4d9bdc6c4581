//! Podman as root with its CNI backend, on the hosts of a lab.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::{IpAddr, Ipv4Addr};

use ovl_tests::runtime::{
    CommandTarget, HostSnapshot, NETWORK, PORT, Podman, ensure_reaches, lab, traces, wait_endpoint_count,
    wait_http_source,
};
use ovl_tests::{SOON, assert_contains, text};

#[test]
fn containers_on_two_hosts_communicate_with_their_own_addresses() {
    let lab = lab().unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let (podman1, podman2) = (Podman::new(h1).unwrap(), Podman::new(h2).unwrap());
    let before = [HostSnapshot::take(h1).unwrap(), HostSnapshot::take(h2).unwrap()];

    let web = podman1.run("web", &[]).unwrap();
    // Container names are unique only on their host.
    let far = podman2.run("web", &[]).unwrap();
    ensure_reaches(&web, &far).unwrap();
    ensure_reaches(&far, &web).unwrap();
    wait_endpoint_count(h1, 2).unwrap();

    // Podman reports the addresses that the container has.
    let inspected = web.inspect().unwrap();
    let own = web.addresses().unwrap();
    assert_eq!(text(&inspected["IPAddress"]).parse(), Ok(own[0]), "{inspected}");
    assert_eq!(text(&inspected["GlobalIPv6Address"]).parse(), Ok(own[1]), "{inspected}");

    // Two containers of one host.
    let cache = podman1.run("cache", &[]).unwrap();
    ensure_reaches(&cache, &web).unwrap();
    ensure_reaches(&web, &cache).unwrap();

    // The container exits without a Podman command. Its monitor (conmon) calls the plugin.
    let mut gone = cache.addresses().unwrap();
    podman1.call(&["kill", "cache"]).unwrap();
    wait_endpoint_count(h1, 2).unwrap();

    podman1.call(&["restart", "--time", "0", "web"]).unwrap();
    ensure_reaches(&web, &far).unwrap();
    ensure_reaches(&far, &web).unwrap();

    gone.extend([web, far].map(|container| container.remove().unwrap()).concat());
    gone.extend(own);
    for each in before {
        each.wait_nothing_left(&gone).unwrap();
    }
}

#[test]
fn containers_of_a_pod_share_localhost() {
    let lab = lab().unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let (podman1, podman2) = (Podman::new(h1).unwrap(), Podman::new(h2).unwrap());
    podman1.pod("pod", &[]).unwrap();
    let web = podman1.run_in_pod("pod", "web", PORT).unwrap();
    let side = podman1.run_in_pod("pod", "side", 9090).unwrap();
    wait_endpoint_count(h1, 1).unwrap();
    assert_eq!(web.addresses().unwrap(), side.addresses().unwrap());

    let localhost = IpAddr::V4(Ipv4Addr::LOCALHOST);
    wait_http_source(&web, localhost, 9090).unwrap();
    assert_eq!(side.http_source(localhost, PORT).unwrap(), localhost);

    let other = podman2.run("other", &[]).unwrap();
    ensure_reaches(&other, &web).unwrap();
    ensure_reaches(&side, &other).unwrap();
    let [v4, ..] = web.addresses().unwrap()[..] else { panic!("no address") };
    other.http_source(v4, 9090).expect("the second container must be reachable at the pod's address");
}

#[test]
fn published_port_is_reachable_from_another_host() {
    let lab = lab().unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let podman = Podman::new(h1).unwrap();
    let before = HostSnapshot::take(h1).unwrap();
    let web = podman.run("web", &["--publish", "18080:8080"]).unwrap();
    for (server, client) in h1.addresses().into_iter().zip(h2.addresses()) {
        let seen = wait_http_source(h2, server, 18080).unwrap();
        assert_eq!(seen, client, "the container sees the client's own address");
    }
    // Also from the host itself, from another container, and from the container itself (hairpin).
    let near = podman.run("near", &[]).unwrap();
    for server in h1.addresses() {
        wait_http_source(h1, server, 18080).unwrap();
        wait_http_source(&near, server, 18080).unwrap();
        wait_http_source(&web, server, 18080).unwrap();
    }
    wait_http_source(h1, IpAddr::V4(Ipv4Addr::LOCALHOST), 18080).unwrap();
    let rules = traces(h1, &web.addresses().unwrap()).unwrap();
    assert!(rules.iter().any(|rule| rule.contains("dnat")), "no DNAT rule to look for afterwards: {rules:?}");

    let gone = [web.remove().unwrap(), near.remove().unwrap()].concat();
    before.wait_nothing_left(&gone).unwrap();
    h2.http_source(h1.addresses()[0], 18080).expect_err("the port is not released");
}

#[test]
fn requested_addresses_are_assigned_and_refused_while_in_use() {
    let lab = lab().unwrap();
    let h1 = &lab["h1"];
    let podman = Podman::new(h1).unwrap();
    let before = HostSnapshot::take(h1).unwrap();
    let first = podman.run("any", &[]).unwrap();
    let IpAddr::V4(near) = first.addresses().unwrap()[0] else { panic!("no IPv4 address") };
    // An address of the same block, which this host holds.
    let requested = Ipv4Addr::from(u32::from(near) ^ 8).to_string();
    let mac = "02:00:5e:10:20:30";

    let fixed = podman.run("fixed", &["--ip", &requested, "--mac-address", mac]).unwrap();
    assert_eq!(fixed.addresses().unwrap()[0].to_string(), requested);
    let inspected = fixed.inspect().unwrap();
    assert_eq!(
        (text(&inspected["IPAddress"]), text(&inspected["MacAddress"])),
        (requested.clone(), mac.to_owned())
    );
    assert_contains(&fixed.command(&["busybox", "ip", "link", "show", "dev", "eth0"]).unwrap(), &[mac]);
    ensure_reaches(&first, &fixed).unwrap();

    let refused = podman
        .try_call(&[
            "run",
            "--rm",
            "--name",
            "late",
            "--network",
            NETWORK,
            "--ip",
            &requested,
            "localhost/ovl-test",
        ])
        .unwrap();
    assert!(!refused.success(), "{}", refused.stdout);
    assert_contains(&refused.stderr, &[&requested]);
    wait_endpoint_count(h1, 2).unwrap();

    let gone = [first.remove().unwrap(), fixed.remove().unwrap()].concat();
    before.wait_nothing_left(&gone).unwrap();
}

#[test]
fn without_ovld_containers_are_refused_at_once_and_can_be_removed() {
    let lab = lab().unwrap();
    let h1 = &lab["h1"];
    let podman = Podman::new(h1).unwrap();
    let before = HostSnapshot::take(h1).unwrap();
    let web = podman.run("web", &[]).unwrap();
    let addresses = web.addresses().unwrap();
    h1.kill9().unwrap();

    let refused = podman
        .try_call(&["run", "--rm", "--name", "late", "--network", NETWORK, "localhost/ovl-test"])
        .unwrap();
    assert!(!refused.success(), "{}", refused.stdout);
    assert_contains(&refused.stderr, &["ovld is not running", "systemctl start ovld"]);
    podman.call(&["rm", "--force", "--time", "0", "web"]).unwrap();

    h1.start().unwrap();
    h1.wait_ready(SOON).unwrap();
    before.wait_nothing_left(&addresses).unwrap();
}
