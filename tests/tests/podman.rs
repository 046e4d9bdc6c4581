//! Podman as root with its CNI back end, on the lab's hosts.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::{IpAddr, Ipv4Addr};

use ovl_tests::runtime::{
    Before, NETWORK, PORT, Place, Podman, answered, lab, reaches, traces, wait_endpoint_count,
};
use ovl_tests::{SOON, assert_says, text};

#[test]
fn containers_on_two_hosts_talk_under_their_own_addresses() {
    let lab = lab().unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let (podman1, podman2) = (Podman::new(h1).unwrap(), Podman::new(h2).unwrap());
    let before = [Before::of(h1).unwrap(), Before::of(h2).unwrap()];

    let web = podman1.run("web", &[]).unwrap();
    // Each host has names of its own.
    let far = podman2.run("web", &[]).unwrap();
    reaches(&web, &far).unwrap();
    reaches(&far, &web).unwrap();
    wait_endpoint_count(h1, 2).unwrap();

    // Podman tells the address that the container has.
    let told = web.inspect().unwrap();
    let own = web.addresses().unwrap();
    assert_eq!(text(&told["IPAddress"]).parse(), Ok(own[0]), "{told}");
    assert_eq!(text(&told["GlobalIPv6Address"]).parse(), Ok(own[1]), "{told}");

    // Two of one host talk as well.
    let cache = podman1.run("cache", &[]).unwrap();
    reaches(&cache, &web).unwrap();
    reaches(&web, &cache).unwrap();

    // Without a command of Podman's: its own watcher of the container tells the plugin.
    let mut gone = cache.addresses().unwrap();
    podman1.call(&["kill", "cache"]).unwrap();
    wait_endpoint_count(h1, 2).unwrap();

    podman1.call(&["restart", "--time", "0", "web"]).unwrap();
    reaches(&web, &far).unwrap();
    reaches(&far, &web).unwrap();

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
    answered(&web, localhost, 9090).unwrap();
    assert_eq!(side.seen_from(localhost, PORT).unwrap(), localhost);

    let other = podman2.run("other", &[]).unwrap();
    reaches(&other, &web).unwrap();
    reaches(&side, &other).unwrap();
    let [v4, ..] = web.addresses().unwrap()[..] else { panic!("no address") };
    other.seen_from(v4, 9090).expect("the second container is reached under the pod's address");
}

#[test]
fn a_published_port_is_reached_from_another_host() {
    let lab = lab().unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    let podman = Podman::new(h1).unwrap();
    let before = Before::of(h1).unwrap();
    let web = podman.run("web", &["--publish", "18080:8080"]).unwrap();
    for (server, client) in h1.addresses().into_iter().zip(h2.addresses()) {
        let seen = answered(h2, server, 18080).unwrap();
        assert_eq!(seen, client, "the client's own address arrives");
    }
    // Under the host's address also from the host itself, from a neighbour and from the very container.
    let near = podman.run("near", &[]).unwrap();
    for server in h1.addresses() {
        answered(h1, server, 18080).unwrap();
        answered(&near, server, 18080).unwrap();
        answered(&web, server, 18080).unwrap();
    }
    answered(h1, IpAddr::V4(Ipv4Addr::LOCALHOST), 18080).unwrap();
    let rules = traces(h1, &web.addresses().unwrap()).unwrap();
    assert!(rules.iter().any(|rule| rule.contains("dnat")), "what is looked for afterwards: {rules:?}");

    let gone = [web.remove().unwrap(), near.remove().unwrap()].concat();
    before.wait_nothing_left(&gone).unwrap();
    h2.seen_from(h1.addresses()[0], 18080).expect_err("a port of nobody");
}

#[test]
fn addresses_asked_for_are_given_and_refused_while_taken() {
    let lab = lab().unwrap();
    let h1 = &lab["h1"];
    let podman = Podman::new(h1).unwrap();
    let before = Before::of(h1).unwrap();
    let first = podman.run("any", &[]).unwrap();
    let IpAddr::V4(near) = first.addresses().unwrap()[0] else { panic!("no IPv4 address") };
    // One of the same block, which is this host's.
    let wanted = Ipv4Addr::from(u32::from(near) ^ 8).to_string();
    let mac = "02:00:5e:10:20:30";

    let fixed = podman.run("fixed", &["--ip", &wanted, "--mac-address", mac]).unwrap();
    assert_eq!(fixed.addresses().unwrap()[0].to_string(), wanted);
    let told = fixed.inspect().unwrap();
    assert_eq!((text(&told["IPAddress"]), text(&told["MacAddress"])), (wanted.clone(), mac.to_owned()));
    assert_says(&fixed.command(&["busybox", "ip", "link", "show", "dev", "eth0"]).unwrap(), &[mac]);
    reaches(&first, &fixed).unwrap();

    let refused = podman
        .try_call(&[
            "run",
            "--rm",
            "--name",
            "late",
            "--network",
            NETWORK,
            "--ip",
            &wanted,
            "localhost/ovl-test",
        ])
        .unwrap();
    assert!(!refused.success(), "{}", refused.stdout);
    assert_says(&refused.stderr, &[&wanted]);
    wait_endpoint_count(h1, 2).unwrap();

    let gone = [first.remove().unwrap(), fixed.remove().unwrap()].concat();
    before.wait_nothing_left(&gone).unwrap();
}

#[test]
fn without_ovld_containers_are_refused_at_once_and_removed_all_the_same() {
    let lab = lab().unwrap();
    let h1 = &lab["h1"];
    let podman = Podman::new(h1).unwrap();
    let before = Before::of(h1).unwrap();
    let web = podman.run("web", &[]).unwrap();
    let addresses = web.addresses().unwrap();
    h1.kill9().unwrap();

    let refused = podman
        .try_call(&["run", "--rm", "--name", "late", "--network", NETWORK, "localhost/ovl-test"])
        .unwrap();
    assert!(!refused.success(), "{}", refused.stdout);
    assert_says(&refused.stderr, &["ovld is not running", "systemctl start ovld"]);
    podman.call(&["rm", "--force", "--time", "0", "web"]).unwrap();

    h1.start().unwrap();
    h1.wait_ready(SOON).unwrap();
    before.wait_nothing_left(&addresses).unwrap();
}
