//! Routed networks: who reaches whom, how, and with which address.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Netns, PortMtu, Underlay, wait_until};
use ovl_tests::routed::{
    WATCH, attach_many, blocks, counted, device_of, ensure_sees_own_address, make_routed, routes, routes_to,
    seen_from, wait_routed,
};
use ovl_tests::{
    Attached, SOON, assert_says, attach, make_network, ping_all_pairs, problems, refused, rows, started,
    started_with, strings, text, wait_clean, wait_network,
};

const V4: &[&str] = &["--subnet", "10.60.0.0/16"];
const V6: &[&str] = &["--subnet", "fd60::/48"];
const BOTH: &[&str] = &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"];

/// An address of the underlay that belongs to no host of the cluster: the switch's own.
const OUTSIDE_V4: &str = "192.168.77.250";
const OUTSIDE_V6: &str = "fd77::fa";

/// A machine on the underlay that is no member.
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

/// Two endpoints on h1, one on each other host.
fn pods(lab: &Lab) -> Vec<Attached> {
    let mut all = vec![attach(&lab["h1"], "a", "pods", &[]).unwrap()];
    for host in lab.hosts() {
        all.push(attach(host, &format!("b-{}", host.name()), "pods", &[]).unwrap());
    }
    all
}

/// The rules of the Kubernetes model, one by one.
fn assert_four_rules(config: LabConfig, backend: &str, subnets: &[&str]) {
    let lab = started_with(config).unwrap();
    make_routed(&lab, "pods", &[&["--backend", backend], subnets].concat()).unwrap();
    let all = pods(&lab);
    // Each has its own address, which is the one that it sees on its interface.
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
    // All reach all, on one host and across, and are seen as who they are.
    ping_all_pairs(&all, SOON).unwrap();
    for from in &all {
        for to in all.iter().filter(|to| to.name != from.name) {
            ensure_sees_own_address(from, to).unwrap();
        }
    }
    // The hosts' own programs reach all of them, and they their host.
    for host in lab.hosts() {
        for to in &all {
            for address in to.addresses() {
                let way = format!("from host {} to {} at {address}", host.name(), to.name);
                host.ping_until(&address, SOON).context(way.clone()).unwrap();
                seen_from(host, &to.workload, ip(&address)).context(way).unwrap();
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
            let way = format!("from {} to its host at {target}", from.name);
            from.workload.ping_until(target, SOON).context(way.clone()).unwrap();
            assert_eq!(seen_from(&from.workload, host, target).context(way).unwrap(), (*own, *own));
        }
    }
    wait_clean(lab.hosts(), SOON).unwrap();
    for host in lab.hosts() {
        assert_eq!(problems(host).unwrap(), Vec::<String>::new(), "on {}", host.name());
    }
}

#[test]
fn the_four_rules_in_vxlan() {
    assert_four_rules(LabConfig::hosts(3), "vxlan", BOTH);
}

#[test]
fn the_four_rules_in_vxlan_on_an_ipv6_underlay() {
    assert_four_rules(LabConfig::hosts(2).underlay(Underlay::V6), "vxlan", BOTH);
}

#[test]
fn the_four_rules_directly() {
    assert_four_rules(LabConfig::hosts(2), "direct", V4);
}

#[test]
fn the_four_rules_directly_on_an_ipv6_underlay() {
    assert_four_rules(LabConfig::hosts(2).underlay(Underlay::V6), "direct", V6);
}

#[test]
fn the_four_rules_with_the_way_chosen_by_itself() {
    assert_four_rules(LabConfig::hosts(2).underlay(Underlay::Dual), "auto", BOTH);
}

#[test]
fn peers_need_one_route_one_neighbour_and_one_fdb_entry_for_any_number_of_pods() {
    let lab = started(2).unwrap();
    make_routed(&lab, "pods", V4).unwrap();
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
    // Its own endpoint has one of its own.
    found.retain(|route| !route.starts_with(&near.address()));
    assert_eq!((&found, &neighbours, &fdb), (&before.0, &before.1, &before.2));
    assert_eq!((neighbours.lines().count(), fdb.lines().count()), (1, 1), "{neighbours}\n{fdb}");
    assert_eq!(routes_to(h2, &blocks(h2, "pods", "h1").unwrap()).unwrap().len(), 1);
    near.workload.ping_until(all[0].address(), SOON).unwrap();
}

#[test]
fn a_full_pod_subnet_takes_another_block_and_peers_one_more_route() {
    let lab = started(2).unwrap();
    make_routed(&lab, "pods", &["--subnet", "10.60.0.0/16", "--block", "29"]).unwrap();
    let [h1, h2] = [&lab["h1"], &lab["h2"]];
    // 8 less the network's, the gateway's and the broadcast address.
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
fn what_is_routed_directly_is_not_encapsulated() {
    let lab = started(2).unwrap();
    lab.switch().exec_input(["nft", "-f", "-"], Some(WATCH)).unwrap();
    make_routed(&lab, "pods", &[V4, &["--backend", "direct"]].concat()).unwrap();
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
fn auto_is_direct_on_the_segment_and_vxlan_beyond_it() {
    let lab = Lab::new(LabConfig::hosts(3)).unwrap();
    // h3 is on a segment of its own; as if a router knew the way.
    lab["h3"].set_address(ip("192.168.78.3")).unwrap();
    for (host, to) in [("h1", "192.168.78.0/24"), ("h2", "192.168.78.0/24"), ("h3", "192.168.77.0/24")] {
        lab[host].exec_ok(["ip", "route", "add", to, "dev", "eth0"]).unwrap();
    }
    lab.start_all().unwrap();
    lab.switch().exec_input(["nft", "-f", "-"], Some(WATCH)).unwrap();
    make_routed(&lab, "pods", &[V4, &["--backend", "auto"]].concat()).unwrap();
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
    // One MTU inside, though; where the way is narrower the route says so.
    let narrow = routes_to(&lab["h1"], &blocks(&lab["h1"], "pods", "h3").unwrap()).unwrap();
    assert!(narrow[0].contains("dev ovx-") && narrow[0].ends_with("mtu 1450"), "{narrow:?}");
    let near = routes_to(&lab["h1"], &blocks(&lab["h1"], "pods", "h2").unwrap()).unwrap();
    assert!(near[0].contains("via 192.168.77.2 dev eth0") && !near[0].contains("mtu"), "{near:?}");
    large_transfers(&all);
    // Beyond the segment `direct` leaves the way to routers, and puts nothing into their way.
    make_routed(&lab, "flat", &["--subnet", "10.61.0.0/16", "--backend", "direct"]).unwrap();
    assert!(routes_to(&lab["h1"], &blocks(&lab["h1"], "flat", "h3").unwrap()).unwrap().is_empty());
    assert_eq!(routes_to(&lab["h1"], &blocks(&lab["h1"], "flat", "h2").unwrap()).unwrap().len(), 1);
}

/// 2 MB over TCP between every two, each way, over each address.
fn large_transfers(all: &[Attached]) {
    let bulk: Vec<u8> = (0..2_000_000_u32).map(|number| (number % 251) as u8).collect();
    for to in all {
        for address in to.addresses() {
            let echo = to.workload.tcp_echo_on(SocketAddr::new(ip(&address), 0)).unwrap();
            for from in all.iter().filter(|from| from.name != to.name) {
                let way = format!("from {} to {} at {address}", from.name, to.name);
                let back = from.workload.tcp_roundtrip(&address, echo.port(), &bulk).context(way.clone());
                assert!(back.unwrap() == bulk, "{way}");
            }
        }
    }
}

#[test]
fn what_leaves_the_cluster_has_the_hosts_address_and_what_stays_its_own() {
    let lab = started_with(LabConfig::hosts(2).underlay(Underlay::Dual)).unwrap();
    let outside = outsider(&lab);
    make_routed(&lab, "pods", BOTH).unwrap();
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
    // Another host's own address is outside of the network too.
    let there = lab["h2"].address().unwrap();
    let here = lab["h1"].address().unwrap();
    assert_eq!(seen_from(&all[0].workload, &lab["h2"], there).unwrap(), (here, here));
}

#[test]
fn without_masquerade_the_outside_sees_the_pods_address() {
    let lab = started_with(LabConfig::hosts(2).config("masquerade = false")).unwrap();
    let outside = outsider(&lab);
    make_routed(&lab, "pods", V4).unwrap();
    for each in &pods(&lab) {
        let block = blocks(&lab["h1"], "pods", each.workload.host().name()).unwrap();
        let via = each.workload.host().address().unwrap().to_string();
        // What the outside has to know then.
        outside.exec_ok(["ip", "route", "replace", &block[0], "via", &via]).unwrap();
        let own = ip(&each.address());
        assert_eq!(seen_from(&each.workload, &outside, ip(OUTSIDE_V4)).unwrap(), (own, own));
    }
}

/// Checks that a sender is told at once that there is no way.
#[track_caller]
fn assert_told_at_once(from: &Netns, to: &str) {
    let start = Instant::now();
    let output = from.exec(["ping", "-n", "-c1", "-W5", to]).unwrap();
    let (told, took) = (format!("{}{}", output.stdout, output.stderr), start.elapsed());
    let words = ["nreachable", "No route to host", "filtered", "prohibited"];
    assert!(
        words.iter().any(|word| told.contains(word)) && took < Duration::from_secs(2),
        "{to} from {}: after {took:?} {told}",
        from.netns_name()
    );
}

/// The addresses that a host answers under as a network's gateway.
fn gateways_of(host: &Host, network: &str) -> Vec<String> {
    strings(&host.ctl_json(&["network", "inspect", network]).unwrap()["gateways"])
}

#[test]
fn networks_do_not_reach_each_other_and_an_internal_one_has_no_way_out() {
    let lab = started(2).unwrap();
    let outside = outsider(&lab);
    make_routed(&lab, "pods", BOTH).unwrap();
    make_routed(&lab, "others", &["--subnet", "10.61.0.0/16", "--subnet", "fd61::/48"]).unwrap();
    make_routed(&lab, "inner", &["--subnet", "10.62.0.0/16", "--subnet", "fd62::/48", "--internal"]).unwrap();
    make_network(&lab, "flat", &["--subnet", "10.63.0.0/16", "--subnet", "fd63::/64"]).unwrap();
    let on = |network: &str| -> Vec<Attached> {
        let name = |host: &Host| format!("{network}-{}", host.name());
        lab.hosts().iter().map(|host| attach(host, &name(host), network, &[]).unwrap()).collect()
    };
    let all: Vec<Vec<Attached>> = ["pods", "others", "inner", "flat"].map(on).into();
    for network in &all {
        ping_all_pairs(network, SOON).unwrap();
        ensure_sees_own_address(&network[0], &network[1]).unwrap();
    }
    let quarter = Duration::from_millis(250);
    for (number, network) in all.iter().enumerate() {
        for other in all.iter().enumerate().filter(|(index, _)| *index != number).map(|(_, other)| other) {
            for to in other {
                for address in to.addresses() {
                    let from = &network[0];
                    assert!(
                        !from.workload.ping(&address, quarter),
                        "{} reaches {} at {address}",
                        from.name,
                        to.name
                    );
                }
            }
        }
    }
    // The refusal is told at once where there is a way out.
    for to in all[1].iter().chain(&all[3]).flat_map(Attached::addresses) {
        assert_told_at_once(&all[0][0].workload, &to);
    }
    let inner = &all[2][0].workload;
    assert!(!inner.ping(OUTSIDE_V4, quarter));
    // A workload may write its own routes.
    let gateway = blocks(&lab["h1"], "inner", "h1").unwrap()[0].replace(".0/24", ".1");
    inner.exec_ok(["ip", "route", "add", "default", "via", &gateway]).unwrap();
    let all_blocks = blocks(&lab["h1"], "inner", "h1").unwrap();
    let block6 = all_blocks.iter().find(|block| block.contains(':')).unwrap();
    let gateway6 = format!("{}1", block6.split('/').next().unwrap());
    inner.exec_ok(["ip", "-6", "route", "add", "default", "via", &gateway6]).unwrap();
    for target in [OUTSIDE_V4, "192.168.77.2"] {
        assert!(!inner.ping(target, quarter), "{target} answers");
    }
    // Nothing of the hosts either: neither their own addresses nor those of gateways.
    assert!(
        ![&gateway, &gateway6].into_iter().any(|gateway| inner.ping(gateway, quarter)),
        "a gateway answers"
    );
    for host in lab.hosts() {
        let gateways = ["pods", "flat"].into_iter().flat_map(|network| gateways_of(host, network));
        for target in host.addresses().into_iter().map(|address| address.to_string()).chain(gateways) {
            assert!(!inner.ping(&target, quarter), "{target} of {} answers", host.name());
        }
    }
    // But the host reaches who is there, and they their resolver.
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
fn an_address_that_nobody_has_is_unreachable_at_once_and_goes_nowhere() {
    let lab = started(2).unwrap();
    let outside = outsider(&lab);
    for host in lab.hosts() {
        host.exec_ok(["ip", "route", "add", "default", "via", OUTSIDE_V4]).unwrap();
        host.exec_ok(["ip", "route", "add", "default", "via", OUTSIDE_V6]).ok();
    }
    make_routed(&lab, "pods", BOTH).unwrap();
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
    // In no block, in the other host's, and in the own one.
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
            assert_told_at_once(from, &target);
        }
    }
    let strayed = outside.exec_ok(["nft", "list", "counter", "inet", "watch", "strayed"]).unwrap();
    assert_says(&strayed, &["packets 0 "]);
}

/// The MTU at both ends of an endpoint, if it is one.
fn pod_mtu(each: &Attached) -> Result<u64> {
    let outer = each.workload.host().ip_json(&["link", "show", "dev", &each.device()])?;
    let inner = each.workload.ip_json(&["link", "show", "dev", "eth0"])?;
    ensure!(outer[0]["mtu"] == inner[0]["mtu"], "{} and {}", outer[0]["mtu"], inner[0]["mtu"]);
    inner[0]["mtu"].as_u64().context("no MTU")
}

fn wait_pod_mtu(each: &Attached, wanted: u64) {
    wait_until(SOON, &format!("an MTU of {wanted} for {}", each.name), || {
        let mtu = pod_mtu(each)?;
        ensure!(mtu == wanted, "it is {mtu}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_change_of_the_underlays_mtu_is_followed_and_unequal_ones_carry_all() {
    for (backend, around) in [("vxlan", 50), ("direct", 0)] {
        let lab = started(2).unwrap();
        make_routed(&lab, "pods", &[V4, &["--backend", backend]].concat()).unwrap();
        let all =
            [attach(&lab["h1"], "a", "pods", &[]).unwrap(), attach(&lab["h2"], "b", "pods", &[]).unwrap()];
        all.iter().for_each(|each| wait_pod_mtu(each, 1500 - around));
        large_transfers(&all);
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
        // The wide host's endpoints keep their width; what is too large is told to the sender.
        assert_eq!(pod_mtu(&all[0]).unwrap(), 1500 - around);
        large_transfers(&all);
        lab["h2"].set_mtu(1500, PortMtu::Follow).unwrap();
        wait_pod_mtu(&all[1], 1500 - around);
        wait_until(SOON, "the full width", || -> Result<bool> {
            Ok(!routes_to(&lab["h1"], &to_h2)?[0].contains("mtu"))
        })
        .unwrap();
        large_transfers(&all);
    }
}

#[test]
fn a_pod_reaches_itself_through_a_port_that_its_host_publishes() {
    let lab = started(2).unwrap();
    make_routed(&lab, "pods", V4).unwrap();
    let pod = attach(&lab["h1"], "a", "pods", &[]).unwrap();
    let near = attach(&lab["h1"], "n", "pods", &[]).unwrap();
    let far = attach(&lab["h2"], "f", "pods", &[]).unwrap();
    let echo = pod.workload.tcp_echo_on(SocketAddr::new(ip(&pod.address()), 0)).unwrap();
    // What a runtime does for a published port: translated, and from itself with another source.
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
fn what_cannot_be_is_refused_with_the_reason() {
    let lab = started(2).unwrap();
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
        let error = refused(h1, &[&["network", "create", "bad"], more].concat()).unwrap();
        assert_says(&error, words);
    }
    assert!(rows(h1, &["network", "ls"]).unwrap().is_empty());

    make_routed(&lab, "pods", V4).unwrap();
    let overlap = ["network", "create", "bad", "--mode", "l3", "--subnet", "10.60.8.0/24"];
    assert_says(&refused(h1, &overlap).unwrap(), &["10.60.8.0/24", "overlaps", "pods"]);
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
        assert_says(&refused(h1, &args).unwrap(), &[&[address.as_str()], words].concat());
        assert_eq!(pod.ip_json(&["link", "show"]).unwrap().as_array().map(Vec::len), Some(1));
    }
    let wanted = at("h1", ".77");
    let args = ["attach", "a", "--network", "pods", "--netns", pod.path_str(), "--ip", &wanted];
    assert_eq!(text(&h1.ctl_json(&args).unwrap()["addresses"][0]), format!("{wanted}/32"));
    wait_network(&lab["h2"], "pods").unwrap();
    lab["h2"].ping_until(&wanted, SOON).unwrap();
    wait_routed(&lab, "pods").unwrap();
}
