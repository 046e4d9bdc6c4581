//! Routed networks: connectivity, data path, source addresses, and MTU.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Netns, PortMtu, Underlay, wait_until};
use ovl_tests::routed::{
    WATCH, attach_many, blocks, counted, create_routed_network, device_of, ensure_sees_own_address, routes,
    routes_to, seen_from, wait_routed,
};
use ovl_tests::{
    Attached, SOON, assert_contains, assert_no_reply, attach, create_network, ctl_error, ping_all_pairs,
    problems, rows, start_lab, start_lab_with, strings, text, wait_clean, wait_network,
};

const V4: &[&str] = &["--subnet", "10.60.0.0/16"];
const V6: &[&str] = &["--subnet", "fd60::/48"];
const BOTH: &[&str] = &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"];

/// Underlay addresses of the switch, which is not a host of the cluster.
const OUTSIDE_V4: &str = "192.168.77.250";
const OUTSIDE_V6: &str = "fd77::fa";

/// Assigns these addresses to the switch, which then acts as a machine on the underlay that is not a member.
fn outsider(lab: &Lab) -> Netns {
    let switch = lab.switch();
    for (prefix, more) in [("192.168.77.250/24", &[][..]), ("fd77::fa/64", &["nodad"][..])] {
        switch.exec_ok([&["ip", "addr", "add", prefix, "dev", "br0"], more].concat()).unwrap();
    }
    switch
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Attaches two endpoints on h1 and one on each other host.
fn pods(lab: &Lab) -> Vec<Attached> {
    let mut all = vec![attach(&lab["h1"], "a", "pods", &[]).unwrap()];
    for host in lab.hosts() {
        all.push(attach(host, &format!("b-{}", host.name()), "pods", &[]).unwrap());
    }
    all
}

/// Checks the rules of the Kubernetes network model, one by one.
fn assert_kubernetes_model(config: LabConfig, backend: &str, subnets: &[&str]) {
    let lab = start_lab_with(config).unwrap();
    create_routed_network(&lab, "pods", &[&["--backend", backend], subnets].concat()).unwrap();
    let all = pods(&lab);
    // Each pod has its own address, which is the one that it sees on its interface.
    let families = subnets.iter().filter(|word| word.contains('/')).count();
    let mut addresses: Vec<String> = all.iter().flat_map(Attached::addresses).collect();
    assert_eq!(addresses.len(), families * all.len(), "{addresses:?}");
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), families * all.len(), "{addresses:?}");
    for each in &all {
        let inside = each.workload.exec_ok(["ip", "addr", "show", "dev", "eth0"]).unwrap();
        for address in strings(&each.json["addresses"]) {
            assert!(address.ends_with("/32") || address.ends_with("/128"), "{address}");
            let prefix = address.trim_end_matches("/128");
            assert!(inside.contains(prefix), "{prefix}: {inside}");
        }
    }
    // All pods reach each other, on one host and across hosts, and are seen with their own address.
    ping_all_pairs(&all, SOON).unwrap();
    for from in &all {
        for to in all.iter().filter(|to| to.name != from.name) {
            ensure_sees_own_address(from, to).unwrap();
        }
    }
    // Programs on the hosts reach all pods, and pods reach their host.
    for host in lab.hosts() {
        for to in &all {
            for address in to.addresses() {
                let path = format!("from host {} to {} at {address}", host.name(), to.name);
                host.ping_until(&address, SOON).context(path.clone()).unwrap();
                seen_from(host, &to.workload, ip(&address)).context(path).unwrap();
            }
        }
    }
    for from in &all {
        let host = from.workload.host();
        let gateways = strings(&host.ctl_json(&["network", "inspect", "pods"]).unwrap()["gateways"]);
        assert_eq!(gateways.len(), families, "{gateways:?}");
        let own: Vec<IpAddr> = from.addresses().iter().map(|address| ip(address)).collect();
        for target in gateways.iter().map(|gateway| ip(gateway)).chain(host.addresses()) {
            let Some(own) = own.iter().find(|own| own.is_ipv4() == target.is_ipv4()) else { continue };
            let path = format!("from {} to its host at {target}", from.name);
            from.workload.ping_until(target, SOON).context(path.clone()).unwrap();
            assert_eq!(seen_from(&from.workload, host, target).context(path).unwrap(), (*own, *own));
        }
    }
    wait_clean(lab.hosts(), SOON).unwrap();
    for host in lab.hosts() {
        assert_eq!(problems(host).unwrap(), Vec::<String>::new(), "on {}", host.name());
    }
}

#[test]
fn kubernetes_model_with_vxlan() {
    assert_kubernetes_model(LabConfig::hosts(3), "vxlan", BOTH);
}

#[test]
fn kubernetes_model_with_vxlan_on_an_ipv6_underlay() {
    assert_kubernetes_model(LabConfig::hosts(2).underlay(Underlay::V6), "vxlan", BOTH);
}

#[test]
fn kubernetes_model_with_direct_routing() {
    assert_kubernetes_model(LabConfig::hosts(2), "direct", V4);
}

#[test]
fn kubernetes_model_with_direct_routing_on_an_ipv6_underlay() {
    assert_kubernetes_model(LabConfig::hosts(2).underlay(Underlay::V6), "direct", V6);
}

#[test]
fn kubernetes_model_with_the_automatic_backend() {
    assert_kubernetes_model(LabConfig::hosts(2).underlay(Underlay::Dual), "auto", BOTH);
}

#[test]
fn peers_need_one_route_neighbour_and_fdb_entry_for_any_number_of_pods() {
    let lab = start_lab(2).unwrap();
    create_routed_network(&lab, "pods", V4).unwrap();
    let [h1, h2] = [&lab["h1"], &lab["h2"]];
    let vxlan = device_of(h2, "pods", "ovx-").unwrap();
    let state = || -> Result<(Vec<String>, String, String)> {
        let neighbours = h2.exec_ok(["ip", "neigh", "show", "dev", &vxlan, "nud", "permanent"])?;
        let fdb = h2.exec_ok(["bridge", "fdb", "show", "dev", &vxlan])?;
        Ok((routes(h2)?, neighbours, fdb))
    };
    let before = state().unwrap();
    let all = attach_many(h1, "w", 20, "pods").unwrap();
    let near = attach(h2, "near", "pods", &[]).unwrap();
    ping_all_pairs(&[all[19].clone(), near.clone()], SOON).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    let (mut found, neighbours, fdb) = state().unwrap();
    // The local endpoint has a route of its own.
    found.retain(|route| !route.starts_with(&near.address()));
    assert_eq!((&found, &neighbours, &fdb), (&before.0, &before.1, &before.2));
    assert_eq!((neighbours.lines().count(), fdb.lines().count()), (1, 1), "{neighbours}\n{fdb}");
    assert_eq!(routes_to(h2, &blocks(h2, "pods", "h1").unwrap()).unwrap().len(), 1);
    near.workload.ping_until(all[0].address(), SOON).unwrap();
}

#[test]
fn full_block_is_followed_by_another_one_and_a_route_on_peers() {
    let lab = start_lab(2).unwrap();
    create_routed_network(&lab, "pods", &["--subnet", "10.60.0.0/16", "--block", "29"]).unwrap();
    let [h1, h2] = [&lab["h1"], &lab["h2"]];
    // 8 addresses, without the network address, the gateway and the broadcast address.
    let first = attach_many(h1, "w", 5, "pods").unwrap();
    assert_eq!(blocks(h1, "pods", "h1").unwrap().len(), 1);
    let more = attach_many(h1, "v", 3, "pods").unwrap();
    let held = blocks(h1, "pods", "h1").unwrap();
    assert_eq!(held.len(), 2, "{held:?}");
    wait_until(SOON, "two routes on h2", || -> Result<()> {
        let found = routes_to(h2, &held)?;
        ensure!(found.len() == 2, "{found:?}");
        Ok(())
    })
    .unwrap();
    let far = attach(h2, "far", "pods", &[]).unwrap();
    for each in first.iter().chain(&more) {
        far.workload.ping_until(each.address(), SOON).unwrap();
        ensure_sees_own_address(each, &far).unwrap();
        h2.ping_until(each.address(), SOON).unwrap();
    }
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn direct_routing_does_not_encapsulate() {
    let lab = start_lab(2).unwrap();
    lab.switch().exec_input(["nft", "-f", "-"], Some(WATCH)).unwrap();
    create_routed_network(&lab, "pods", &[V4, &["--backend", "direct"]].concat()).unwrap();
    let all = pods(&lab);
    ping_all_pairs(&all, SOON).unwrap();
    ensure_sees_own_address(&all[0], &all[2]).unwrap();
    let switch = lab.switch();
    assert_eq!(counted(&switch, "inside").unwrap(), 0);
    assert!(counted(&switch, "plain").unwrap() > 10);
    for host in lab.hosts() {
        assert!(!host.exec_ok(["ip", "-o", "link"]).unwrap().contains("ovx-"));
    }
}

#[test]
fn automatic_backend_routes_directly_on_the_segment_and_uses_vxlan_beyond() {
    let lab = Lab::new(LabConfig::hosts(3)).unwrap();
    // h3 is on a segment of its own, as behind a router.
    lab["h3"].set_address(ip("192.168.78.3")).unwrap();
    for (host, to) in [("h1", "192.168.78.0/24"), ("h2", "192.168.78.0/24"), ("h3", "192.168.77.0/24")] {
        lab[host].exec_ok(["ip", "route", "add", to, "dev", "eth0"]).unwrap();
    }
    lab.start_all().unwrap();
    lab.switch().exec_input(["nft", "-f", "-"], Some(WATCH)).unwrap();
    create_routed_network(&lab, "pods", &[V4, &["--backend", "auto"]].concat()).unwrap();
    let all = pods(&lab);
    ping_all_pairs(&all[1..3], SOON).unwrap();
    let switch = lab.switch();
    assert_eq!(counted(&switch, "inside").unwrap(), 0);
    assert!(counted(&switch, "plain").unwrap() >= 4);
    let plain = counted(&switch, "plain").unwrap();
    for near in &all[..3] {
        ensure_sees_own_address(near, &all[3]).unwrap();
        ensure_sees_own_address(&all[3], near).unwrap();
    }
    assert!(counted(&switch, "inside").unwrap() >= 12);
    assert_eq!(counted(&switch, "plain").unwrap(), plain);
    // The MTU of endpoints is the same for all; the route has the MTU of a narrower path.
    let narrow = routes_to(&lab["h1"], &blocks(&lab["h1"], "pods", "h3").unwrap()).unwrap();
    assert!(narrow[0].contains("dev ovx-") && narrow[0].ends_with("mtu 1450"), "{narrow:?}");
    let near = routes_to(&lab["h1"], &blocks(&lab["h1"], "pods", "h2").unwrap()).unwrap();
    assert!(near[0].contains("via 192.168.77.2 dev eth0") && !near[0].contains("mtu"), "{near:?}");
    check_large_transfers(&all);
    // `direct` leaves destinations beyond the segment to routers, and adds no route for them.
    create_routed_network(&lab, "flat", &["--subnet", "10.61.0.0/16", "--backend", "direct"]).unwrap();
    assert!(routes_to(&lab["h1"], &blocks(&lab["h1"], "flat", "h3").unwrap()).unwrap().is_empty());
    assert_eq!(routes_to(&lab["h1"], &blocks(&lab["h1"], "flat", "h2").unwrap()).unwrap().len(), 1);
}

/// Echoes 2 MB over TCP between every two endpoints, over each address.
fn check_large_transfers(all: &[Attached]) {
    let bulk: Vec<u8> = (0..2_000_000_u32).map(|number| (number % 251) as u8).collect();
    for to in all {
        for address in to.addresses() {
            let echo = to.workload.tcp_echo_on(SocketAddr::new(ip(&address), 0)).unwrap();
            for from in all.iter().filter(|from| from.name != to.name) {
                let path = format!("from {} to {} at {address}", from.name, to.name);
                let back = from.workload.tcp_roundtrip(&address, echo.port(), &bulk).context(path.clone());
                assert!(back.unwrap() == bulk, "{path}");
            }
        }
    }
}

#[test]
fn traffic_is_masqueraded_only_outside_the_cluster() {
    let lab = start_lab_with(LabConfig::hosts(2).underlay(Underlay::Dual)).unwrap();
    let outside = outsider(&lab);
    create_routed_network(&lab, "pods", BOTH).unwrap();
    let all = pods(&lab);
    ping_all_pairs(&all, SOON).unwrap();
    for each in &all {
        for target in [OUTSIDE_V4, OUTSIDE_V6] {
            let (udp, tcp) = seen_from(&each.workload, &outside, ip(target)).unwrap();
            let host = each.workload.host().addresses();
            assert!(host.contains(&udp) && host.contains(&tcp), "{udp} {tcp} {host:?}");
        }
    }
    ensure_sees_own_address(&all[0], &all[2]).unwrap();
    // The address of another host is outside of the network too.
    let there = lab["h2"].address().unwrap();
    let here = lab["h1"].address().unwrap();
    assert_eq!(seen_from(&all[0].workload, &lab["h2"], there).unwrap(), (here, here));
}

#[test]
fn without_masquerade_the_outside_sees_the_pods_address() {
    let lab = start_lab_with(LabConfig::hosts(2).config("masquerade = false")).unwrap();
    let outside = outsider(&lab);
    create_routed_network(&lab, "pods", V4).unwrap();
    for each in &pods(&lab) {
        let block = blocks(&lab["h1"], "pods", each.workload.host().name()).unwrap();
        let via = each.workload.host().address().unwrap().to_string();
        // Without NAT, the machine outside needs a route to the block.
        outside.exec_ok(["ip", "route", "replace", &block[0], "via", &via]).unwrap();
        let own = ip(&each.address());
        assert_eq!(seen_from(&each.workload, &outside, ip(OUTSIDE_V4)).unwrap(), (own, own));
    }
}

/// Checks that a ping fails at once with an ICMP error.
#[track_caller]
fn assert_unreachable_at_once(from: &Netns, to: &str) {
    let start = Instant::now();
    let output = from.exec(["ping", "-n", "-c1", "-W5", to]).unwrap();
    let (output, took) = (format!("{}{}", output.stdout, output.stderr), start.elapsed());
    let words = ["nreachable", "No route to host", "filtered", "prohibited"];
    assert!(
        words.iter().any(|word| output.contains(word)) && took < Duration::from_secs(2),
        "{to} from {}: after {took:?} {output}",
        from.netns_name()
    );
}

/// Gateway addresses of a network on a host.
fn gateways_of(host: &Host, network: &str) -> Vec<String> {
    strings(&host.ctl_json(&["network", "inspect", network]).unwrap()["gateways"])
}

#[test]
fn networks_are_isolated_and_an_internal_one_has_no_egress() {
    let lab = start_lab(2).unwrap();
    let outside = outsider(&lab);
    create_routed_network(&lab, "pods", BOTH).unwrap();
    create_routed_network(&lab, "others", &["--subnet", "10.61.0.0/16", "--subnet", "fd61::/48"]).unwrap();
    create_routed_network(
        &lab,
        "inner",
        &["--subnet", "10.62.0.0/16", "--subnet", "fd62::/48", "--internal"],
    )
    .unwrap();
    create_network(&lab, "flat", &["--subnet", "10.63.0.0/16", "--subnet", "fd63::/64"]).unwrap();
    let on = |network: &str| -> Vec<Attached> {
        let name = |host: &Host| format!("{network}-{}", host.name());
        lab.hosts().iter().map(|host| attach(host, &name(host), network, &[]).unwrap()).collect()
    };
    let all: Vec<Vec<Attached>> = ["pods", "others", "inner", "flat"].map(on).into();
    for network in &all {
        ping_all_pairs(network, SOON).unwrap();
        ensure_sees_own_address(&network[0], &network[1]).unwrap();
    }
    for (number, network) in all.iter().enumerate() {
        for other in all.iter().enumerate().filter(|(index, _)| *index != number).map(|(_, other)| other) {
            for to in other {
                for address in to.addresses() {
                    assert_no_reply(&network[0].workload, &address);
                }
            }
        }
    }
    // Networks with egress get an ICMP error at once.
    for to in all[1].iter().chain(&all[3]).flat_map(Attached::addresses) {
        assert_unreachable_at_once(&all[0][0].workload, &to);
    }
    let inner = &all[2][0].workload;
    assert_no_reply(inner, OUTSIDE_V4);
    // A workload can add its own routes.
    let gateway = blocks(&lab["h1"], "inner", "h1").unwrap()[0].replace(".0/24", ".1");
    inner.exec_ok(["ip", "route", "add", "default", "via", &gateway]).unwrap();
    let all_blocks = blocks(&lab["h1"], "inner", "h1").unwrap();
    let block6 = all_blocks.iter().find(|block| block.contains(':')).unwrap();
    let gateway6 = format!("{}1", block6.split('/').next().unwrap());
    inner.exec_ok(["ip", "-6", "route", "add", "default", "via", &gateway6]).unwrap();
    for target in [OUTSIDE_V4, "192.168.77.2"] {
        assert_no_reply(inner, target);
    }
    // No address of the hosts is reachable: neither gateways nor underlay addresses.
    [&gateway, &gateway6].into_iter().for_each(|gateway| assert_no_reply(inner, gateway));
    for host in lab.hosts() {
        let gateways = ["pods", "flat"].into_iter().flat_map(|network| gateways_of(host, network));
        for target in host.addresses().into_iter().map(|address| address.to_string()).chain(gateways) {
            assert_no_reply(inner, &target);
        }
    }
    // The host reaches its endpoints, and endpoints reach their resolver.
    for address in all[2][0].addresses() {
        lab["h1"].ping_until(&address, SOON).unwrap();
    }
    let name = all[2][1].name.clone();
    let found = inner.exec_ok(["dig", "@127.0.0.11", "+short", &name]).unwrap();
    assert_eq!(found.trim(), all[2][1].address());
    all[0][0].workload.ping_until(OUTSIDE_V4, SOON).unwrap();
    drop(outside);
}

#[test]
fn unassigned_address_is_unreachable_at_once_and_not_forwarded() {
    let lab = start_lab(2).unwrap();
    let outside = outsider(&lab);
    for host in lab.hosts() {
        host.exec_ok(["ip", "route", "add", "default", "via", OUTSIDE_V4]).unwrap();
        host.exec_ok(["ip", "route", "add", "default", "via", OUTSIDE_V6]).ok();
    }
    create_routed_network(&lab, "pods", BOTH).unwrap();
    let pod = attach(&lab["h1"], "a", "pods", &[]).unwrap();
    let far = attach(&lab["h2"], "b", "pods", &[]).unwrap();
    pod.workload.ping_until(far.address(), SOON).unwrap();
    let watch = "table inet watch {
        counter strayed {}
        chain in {
            type filter hook prerouting priority -300; policy accept;
            ip daddr 10.60.0.0/16 counter name strayed
            ip6 daddr fd60::/48 counter name strayed
        }
    }";
    outside.exec_input(["nft", "-f", "-"], Some(watch)).unwrap();
    // Addresses in no block, in the block of the remote host, and in the local block.
    let in_block = |block: &str, v6: &str, v4: &str| match block.split_once("::/") {
        Some((start, _)) => format!("{start}{v6}"),
        None => block.replace(".0/24", v4),
    };
    let mut targets = vec!["10.60.250.9".to_owned(), "fd60:0:0:ffff::9".to_owned()];
    for holder in ["h1", "h2"] {
        for block in blocks(&lab["h1"], "pods", holder).unwrap() {
            targets.push(in_block(&block, "::99", ".99"));
        }
    }
    for target in targets {
        for from in [&pod.workload as &Netns, &lab["h1"] as &Netns] {
            assert_unreachable_at_once(from, &target);
        }
    }
    let strayed = outside.exec_ok(["nft", "list", "counter", "inet", "watch", "strayed"]).unwrap();
    assert_contains(&strayed, &["packets 0 "]);
}

/// MTU of an endpoint. Fails unless both sides of its veth pair have the same.
fn pod_mtu(each: &Attached) -> Result<u64> {
    let outer = each.workload.host().ip_json(&["link", "show", "dev", &each.device()])?;
    let inner = each.workload.ip_json(&["link", "show", "dev", "eth0"])?;
    ensure!(outer[0]["mtu"] == inner[0]["mtu"], "{} and {}", outer[0]["mtu"], inner[0]["mtu"]);
    inner[0]["mtu"].as_u64().context("no MTU")
}

fn wait_pod_mtu(each: &Attached, wanted: u64) {
    wait_until(SOON, &format!("{} to have an MTU of {wanted}", each.name), || {
        let mtu = pod_mtu(each)?;
        ensure!(mtu == wanted, "the MTU is {mtu}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn mtu_follows_the_underlay_and_large_transfers_work_between_unequal_hosts() {
    for (backend, around) in [("vxlan", 50), ("direct", 0)] {
        let lab = start_lab(2).unwrap();
        create_routed_network(&lab, "pods", &[V4, &["--backend", backend]].concat()).unwrap();
        let all =
            [attach(&lab["h1"], "a", "pods", &[]).unwrap(), attach(&lab["h2"], "b", "pods", &[]).unwrap()];
        all.iter().for_each(|each| wait_pod_mtu(each, 1500 - around));
        check_large_transfers(&all);
        lab["h2"].set_mtu(1400, PortMtu::Follow).unwrap();
        wait_pod_mtu(&all[1], 1400 - around);
        let to_h2 = blocks(&lab["h1"], "pods", "h2").unwrap();
        let narrow = format!("mtu {}", 1400 - around);
        wait_until(SOON, "a narrower route", || -> Result<()> {
            let found = routes_to(&lab["h1"], &to_h2)?;
            ensure!(found.len() == 1 && found[0].ends_with(&narrow), "{found:?}");
            Ok(())
        })
        .unwrap();
        wait_clean(lab.hosts(), SOON).unwrap();
        // Endpoints on the host with the larger MTU keep it, and path MTU discovery limits their packets.
        assert_eq!(pod_mtu(&all[0]).unwrap(), 1500 - around);
        check_large_transfers(&all);
        lab["h2"].set_mtu(1500, PortMtu::Follow).unwrap();
        wait_pod_mtu(&all[1], 1500 - around);
        wait_until(SOON, "the route to have the full MTU", || -> Result<bool> {
            Ok(!routes_to(&lab["h1"], &to_h2)?[0].contains("mtu"))
        })
        .unwrap();
        check_large_transfers(&all);
    }
}

#[test]
fn pod_reaches_itself_through_a_published_port() {
    let lab = start_lab(2).unwrap();
    create_routed_network(&lab, "pods", V4).unwrap();
    let pod = attach(&lab["h1"], "a", "pods", &[]).unwrap();
    let near = attach(&lab["h1"], "n", "pods", &[]).unwrap();
    let far = attach(&lab["h2"], "f", "pods", &[]).unwrap();
    let echo = pod.workload.tcp_echo_on(SocketAddr::new(ip(&pod.address()), 0)).unwrap();
    // Rules as a runtime adds them for a published port: DNAT, and masquerading for hairpin traffic.
    let (address, port) = (pod.address(), echo.port());
    let rules = format!(
        "table ip published {{
            chain in {{
                type nat hook prerouting priority dstnat; policy accept;
                ip daddr 192.168.77.1 tcp dport 8080 dnat to {address}:{port}
            }}
            chain out {{
                type nat hook output priority -100; policy accept;
                ip daddr 192.168.77.1 tcp dport 8080 dnat to {address}:{port}
            }}
            chain back {{
                type nat hook postrouting priority srcnat - 1; policy accept;
                ip saddr {address} ip daddr {address} masquerade
            }}
        }}"
    );
    lab["h1"].exec_input(["nft", "-f", "-"], Some(&rules)).unwrap();
    for from in [&pod.workload as &Netns, &near.workload, &far.workload, &lab["h2"], &lab["h1"]] {
        let back = from.tcp_roundtrip("192.168.77.1", 8080, b"published");
        assert_eq!(back.context(from.netns_name().to_owned()).unwrap(), b"published");
    }
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn invalid_options_are_refused_with_a_reason() {
    let lab = start_lab(2).unwrap();
    let h1 = &lab["h1"];
    let cases: [(&[&str], &[&str]); 9] = [
        (
            &["--mode", "l3", "--subnet", "10.60.0.0/16", "--block", "15"],
            &["/15", "10.60.0.0/16", "/16 to /30"],
        ),
        (&["--mode", "l3", "--subnet", "10.60.0.0/16", "--block", "31"], &["/31", "/16 to /30"]),
        (&["--mode", "l3", "--subnet", "fd60::/48", "--block", "127"], &["/127", "/48 to /126"]),
        (
            &["--mode", "l3", "--subnet", "10.60.0.0/16", "--subnet", "fd60::/48", "--block", "24"],
            &["1 lengths", "2 subnets", "one for each"],
        ),
        (&["--subnet", "10.60.0.0/16", "--backend", "direct"], &["--mode l3"]),
        (&["--subnet", "10.60.0.0/16", "--block", "24"], &["--mode l3"]),
        (
            &["--mode", "l3", "--subnet", "10.60.0.0/16", "--subnet", "10.60.4.0/24"],
            &["10.60.4.0/24", "overlaps 10.60.0.0/16"],
        ),
        (&["--mode", "l3", "--subnet", "192.168.0.0/16"], &["192.168.0.0/16", "underlay"]),
        (
            &["--mode", "l3", "--subnet", "fd60::/48", "--backend", "direct"],
            &["fd60::/48", "directly", "192.168.77.1", "--backend auto"],
        ),
    ];
    for (more, words) in cases {
        let error = ctl_error(h1, &[&["network", "create", "bad"], more].concat()).unwrap();
        assert_contains(&error, words);
    }
    assert!(rows(h1, &["network", "ls"]).unwrap().is_empty());

    create_routed_network(&lab, "pods", V4).unwrap();
    let overlap = ["network", "create", "bad", "--mode", "l3", "--subnet", "10.60.8.0/24"];
    assert_contains(&ctl_error(h1, &overlap).unwrap(), &["10.60.8.0/24", "overlaps", "pods"]);
    let pod = h1.workload("a").unwrap();
    let at = |holder: &str, last: &str| blocks(h1, "pods", holder).unwrap()[0].replace(".0/24", last);
    let cases = [
        (at("h2", ".7"), &["h2", "routed"][..]),
        (at("h1", ".1"), &["gateway"][..]),
        (at("h1", ".0"), &["set aside"][..]),
        (at("h1", ".255"), &["set aside"][..]),
        (at("h2", ".1"), &["gateway"][..]),
        ("10.61.0.9".to_owned(), &["not in network pods", "10.60.0.0/16"][..]),
    ];
    for (address, words) in cases {
        let args = ["attach", "a", "--network", "pods", "--netns", pod.path_str(), "--ip", &address];
        assert_contains(&ctl_error(h1, &args).unwrap(), &[&[address.as_str()], words].concat());
        assert_eq!(pod.ip_json(&["link", "show"]).unwrap().as_array().map(Vec::len), Some(1));
    }
    let free = at("h1", ".77");
    let args = ["attach", "a", "--network", "pods", "--netns", pod.path_str(), "--ip", &free];
    assert_eq!(text(&h1.ctl_json(&args).unwrap()["addresses"][0]), format!("{free}/32"));
    wait_network(&lab["h2"], "pods").unwrap();
    lab["h2"].ping_until(&free, SOON).unwrap();
    wait_routed(&lab, "pods").unwrap();
}
