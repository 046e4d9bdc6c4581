//! Addresses and MAC addresses are unique, and a requested one is assigned or refused by name.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, wait_until};
use ovl_tests::{
    Attached, SOON, assert_contains, assert_no_reply, attach, attach_workload, ctl_error, peer,
    ping_all_pairs, rows, run_concurrently, start_lab, strings, text, wait_clean, wait_endpoints,
    wait_network, wait_problem,
};
use serde_json::Value;

/// Waits until all hosts list the same networks, `count` of them, and returns them.
fn agreed_networks(hosts: &[Host], count: usize) -> Result<Vec<Value>> {
    wait_until(SOON, &format!("all hosts to list the same {count} networks"), || {
        let mut lists = Vec::new();
        for host in hosts {
            let list: Vec<String> = rows(host, &["network", "ls"])?
                .iter()
                .map(|row| format!("{} {} {} {}", row["name"], row["id"], row["vni"], row["subnets"]))
                .collect();
            ensure!(list.len() == count, "{} networks on {}", list.len(), host.name());
            lists.push(list);
        }
        ensure!(lists.windows(2).all(|pair| pair[0] == pair[1]), "{lists:?}");
        rows(&hosts[0], &["network", "ls"]).map(Some)
    })
}

#[test]
fn reassigned_address_updates_neighbour_entries_with_the_new_mac() {
    let lab = start_lab(2).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    h1.ctl_ok(&["network", "create", "demo", "--subnet", "10.1.0.0/24", "--subnet", "fd01::/64"]).unwrap();
    wait_network(h2, "demo").unwrap();
    let near = attach(h1, "near", "demo", &[]).unwrap();
    let far = attach(h2, "far", "demo", &[]).unwrap();
    let web = |name: &str, mac: &str| {
        attach(h1, name, "demo", &["--ip", "10.1.0.6", "--ip", "fd01::6", "--mac", mac]).unwrap()
    };
    let first = web("first", "02:00:5e:00:00:01");
    for (each, address) in [(&near, "10.1.0.6"), (&far, "10.1.0.6"), (&near, "fd01::6"), (&far, "fd01::6")] {
        each.workload.ping_until(address, SOON).unwrap();
    }
    h1.ctl_ok(&["detach", &first.name]).unwrap();
    let second = web("second", "02:00:5e:00:00:02");
    for each in [&near, &far] {
        for address in second.addresses() {
            wait_until(SOON, &format!("{} to learn the new MAC address of {address}", each.name), || {
                let known = each.workload.ip_json(&["neigh", "show", "to", &address])?;
                ensure!(known[0]["lladdr"] == "02:00:5e:00:00:02", "{known}");
                Ok(())
            })
            .unwrap();
        }
    }
}

#[test]
fn concurrent_attaches_on_all_hosts_get_unique_addresses_and_macs() {
    let lab = start_lab(3).unwrap();
    // A /24 is divided into blocks of 8 addresses, so each host needs several blocks at the same time.
    lab["h1"].ctl_ok(&["network", "create", "demo", "--subnet", "10.1.0.0/24"]).unwrap();
    for host in lab.hosts() {
        wait_network(host, "demo").unwrap();
    }
    let workloads: Vec<_> = lab
        .hosts()
        .iter()
        .flat_map(|host| host.bare_workloads(&format!("{}w", host.name()), 16).unwrap())
        .collect();
    let attached: Vec<Attached> =
        run_concurrently(workloads.into_iter().map(|each| || attach_workload(each, "demo", &[])).collect())
            .into_iter()
            .collect::<Result<_>>()
            .unwrap();

    let addresses: BTreeSet<String> = attached.iter().map(Attached::address).collect();
    let macs: BTreeSet<String> = attached.iter().map(Attached::mac).collect();
    assert_eq!((addresses.len(), macs.len()), (48, 48), "{addresses:?} {macs:?}");
    wait_clean(lab.hosts(), SOON).unwrap();
    for host in lab.hosts() {
        let listed = rows(host, &["endpoints"]).unwrap();
        let seen: BTreeSet<String> = listed
            .iter()
            .flat_map(|row| strings(&row["addresses"]))
            .map(|each| each.replace("/24", ""))
            .collect();
        assert_eq!(seen, addresses, "on {}", host.name());
        let used: u64 = rows(host, &["subnets"]).unwrap().iter().filter_map(|row| row["used"].as_u64()).sum();
        assert_eq!(used, 48, "on {}", host.name());
    }
    // Each block is inside the subnet, and has one holder.
    let blocks = rows(&lab["h2"], &["subnets"]).unwrap();
    let prefixes: BTreeSet<String> = blocks.iter().map(|row| text(&row["prefix"])).collect();
    assert_eq!(prefixes.len(), blocks.len(), "{blocks:?}");
    for row in &blocks {
        assert_eq!(
            (text(&row["network"]), text(&row["prefix"]).contains("10.1.0.")),
            ("demo".to_owned(), true),
            "{row}"
        );
        assert!(row["used"].as_u64() <= row["size"].as_u64(), "{row}");
    }
    // Spot checks of connectivity.
    let (first, last) = (attached.first().unwrap(), attached.last().unwrap());
    first.workload.ping_until(last.address(), SOON).unwrap();
    last.workload.ping_until(attached[20].address(), SOON).unwrap();
}

#[test]
fn concurrent_network_creates_get_unique_vnis_subnets_and_names() {
    let lab = start_lab(3).unwrap();
    let create = |host: Host, name: String| move || host.ctl(&["network", "create", &name]);
    let mut work = Vec::new();
    for host in lab.hosts() {
        for index in 0..4 {
            work.push(create(host.clone(), format!("{}-{index}", host.name())));
        }
    }
    // All hosts create the same name: one network keeps it, the others are renamed or refused.
    for host in lab.hosts() {
        work.push(create(host.clone(), "same".to_owned()));
    }
    let outputs: Vec<_> = run_concurrently(work).into_iter().collect::<Result<_>>().unwrap();
    let created = outputs.iter().filter(|output| output.success()).count();
    for output in outputs.iter().filter(|output| !output.success()) {
        assert_contains(&output.stderr, &["same", "exists already"]);
    }
    assert!(outputs.iter().take(12).all(netns_lab::Output::success), "{outputs:?}");

    let networks = agreed_networks(lab.hosts(), created).unwrap();
    let vnis: BTreeSet<u64> = networks.iter().filter_map(|row| row["vni"].as_u64()).collect();
    let subnets: BTreeSet<String> = networks.iter().flat_map(|row| strings(&row["subnets"])).collect();
    let names: BTreeSet<String> = networks.iter().map(|row| text(&row["name"])).collect();
    assert_eq!((vnis.len(), subnets.len(), names.len()), (created, created, created), "{networks:?}");
    assert_eq!(networks.iter().filter(|row| row["name"] == "same").count(), 1, "{names:?}");
    for host in lab.hosts() {
        assert_eq!(
            host.ctl_json(&["status"]).unwrap()["problems"],
            serde_json::json!([]),
            "on {}",
            host.name()
        );
    }
    // Every network that was created under this name works on every host.
    let same_named: Vec<String> = names.into_iter().filter(|name| name.starts_with("same")).collect();
    let mut attached = Vec::new();
    for (index, network) in same_named.iter().enumerate() {
        attached.push(attach(&lab["h1"], &format!("a{index}"), network, &[]).unwrap());
        let other = attach(&lab["h3"], &format!("b{index}"), network, &[]).unwrap();
        other.workload.ping_until(attached[index].address(), SOON).unwrap();
    }
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn requested_addresses_and_macs_are_assigned_or_refused_with_their_holder() {
    let lab = start_lab(2).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    h1.ctl_ok(&["network", "create", "demo", "--subnet", "10.1.0.0/24"]).unwrap();
    let first = attach(h1, "first", "demo", &["--ip", "10.1.0.20", "--mac", "02:11:22:33:44:55"]).unwrap();
    assert_eq!((first.address(), first.mac()), ("10.1.0.20".to_owned(), "02:11:22:33:44:55".to_owned()));
    let inside = first.workload.exec_ok(["ip", "addr", "show", "eth0"]).unwrap();
    assert_contains(&inside, &["10.1.0.20/24", "02:11:22:33:44:55"]);
    wait_endpoints(h2, &["first on h1 is ready"], SOON).unwrap();

    // An address in use on the local or a remote host: the error names the endpoint and its host.
    for host in [h1, h2] {
        let second = host.workload("second").unwrap();
        let base = ["attach", "second", "--network", "demo", "--netns", second.path_str()];
        for more in [["--ip", "10.1.0.20"], ["--mac", "02:11:22:33:44:55"]] {
            let error = ctl_error(host, &[&base[..], &more[..]].concat()).unwrap();
            assert_contains(&error, &[more[1], "in use", "first", "h1"]);
        }
        // Reserved addresses.
        for address in ["10.1.0.0", "10.1.0.1", "10.1.0.255"] {
            let error = ctl_error(host, &[&base[..], &["--ip", address]].concat()).unwrap();
            assert_contains(&error, &[address, "10.1.0.0/24"]);
        }
        for address in ["10.1.1.1", "fd00::1", "192.168.77.1"] {
            let error = ctl_error(host, &[&base[..], &["--ip", address]].concat()).unwrap();
            assert_contains(&error, &[address, "not in network demo", "10.1.0.0/24"]);
        }
        let links = second.ip_json(&["link", "show"]).unwrap();
        assert_eq!(links.as_array().map(Vec::len), Some(1), "a failed attach left {links}");
    }

    // An address in another host's block is lent, used, and free again after the detach.
    let block = rows(h2, &["subnets"]).unwrap();
    assert!(block.iter().any(|row| row["node"] == "h1" && row["prefix"] == "10.1.0.16/29"), "{block:?}");
    let lent = attach(h2, "lent", "demo", &["--ip", "10.1.0.21"]).unwrap();
    assert_eq!(lent.address(), "10.1.0.21");
    lent.workload.ping_until("10.1.0.20", SOON).unwrap();
    first.workload.ping_until("10.1.0.21", SOON).unwrap();
    wait_endpoints(h1, &["first on h1 is ready", "lent on h2 is ready"], SOON).unwrap();
    let third = h1.workload("third").unwrap();
    let args = ["attach", "third", "--network", "demo", "--netns", third.path_str(), "--ip", "10.1.0.21"];
    assert_contains(&ctl_error(h1, &args).unwrap(), &["10.1.0.21", "in use", "lent", "h2"]);
    // The lender does not assign the lent address itself.
    for index in 0..8 {
        let other = attach(h1, &format!("more{index}"), "demo", &[]).unwrap();
        assert_ne!(other.address(), "10.1.0.21");
    }
    wait_clean(lab.hosts(), SOON).unwrap();
    h2.ctl_ok(&["detach", "lent"]).unwrap();
    wait_until(SOON, "the lent address to be free again", || h1.ctl_ok(&args).map(drop)).unwrap();
    third.ping_until("10.1.0.20", SOON).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn full_subnet_refuses_attaches_and_can_be_extended_in_use() {
    let lab = start_lab(3).unwrap();
    let create = ["network", "create", "small", "--subnet", "10.1.0.16/28"];
    let made = lab["h1"].ctl_json(&create).unwrap();
    assert_eq!(made["gateways"], serde_json::json!(["10.1.0.17"]));
    for host in lab.hosts() {
        wait_network(host, "small").unwrap();
    }
    // 16 addresses, without the network address, the gateway and the broadcast address.
    let work = (0..13).map(|index| {
        let host = lab.hosts()[index % 3].clone();
        move || attach(&host, &format!("w{index}"), "small", &[])
    });
    let old: Vec<Attached> = run_concurrently(work.collect()).into_iter().collect::<Result<_>>().unwrap();
    let addresses: BTreeSet<String> = old.iter().map(Attached::address).collect();
    let usable: BTreeSet<String> = (18..=30).map(|last| format!("10.1.0.{last}")).collect();
    assert_eq!(addresses, usable);
    wait_clean(lab.hosts(), SOON).unwrap();
    for host in lab.hosts() {
        let name = format!("extra-{}", host.name());
        let extra = host.workload(&name).unwrap();
        let error =
            ctl_error(host, &["attach", &name, "--network", "small", "--netns", extra.path_str()]).unwrap();
        assert_contains(&error, &["10.1.0.16/28", "13 of 13", "ovlctl network update small --subnet"]);
        assert_eq!(extra.ip_json(&["link", "show"]).unwrap().as_array().map(Vec::len), Some(1));
    }
    // A detach frees one address, on any host.
    lab["h1"].ctl_ok(&["detach", "w0"]).unwrap();
    let again = wait_until(SOON, "the freed address", || {
        let workload = lab["h2"].find_workload("again").or_else(|_| lab["h2"].workload("again"))?;
        attach_workload(workload, "small", &[]).map(Some)
    })
    .unwrap();
    assert_eq!(again.address(), old[0].address());

    for (larger, words) in [
        ("10.1.0.0/29", "10.1.0.16/28"),
        ("10.1.0.16/29", "10.1.0.16/28"),
        ("10.1.1.0/24", "10.1.0.16/28"),
        ("10.1.0.16/27", "host bits"),
    ] {
        assert_contains(
            &ctl_error(&lab["h2"], &["network", "update", "small", "--subnet", larger]).unwrap(),
            &[words],
        );
    }
    let grown = lab["h2"].ctl_json(&["network", "update", "small", "--subnet", "10.1.0.0/26"]).unwrap();
    assert_eq!(
        (&grown["subnets"], &grown["gateways"]),
        (&serde_json::json!(["10.1.0.0/26"]), &made["gateways"])
    );
    let mut new = Vec::new();
    for host in lab.hosts() {
        new.push(
            wait_until(SOON, "an address of the larger subnet", || {
                let workload = host.find_workload(&format!("extra-{}", host.name()))?;
                attach_workload(workload, "small", &[]).map(Some)
            })
            .with_context(|| host.name().to_owned())
            .unwrap(),
        );
    }
    for each in &new {
        assert!(!usable.contains(&each.address()), "{} was in use", each.address());
        assert!(strings(&each.json["addresses"])[0].ends_with("/26"), "{}", each.json);
    }
    wait_clean(lab.hosts(), SOON).unwrap();
    // Old with old, old with new in both directions, and both with the gateway.
    ping_all_pairs(&old[1..4], SOON).unwrap();
    ping_all_pairs(
        &[old[4].clone(), old[5].clone(), Attached { name: "new".to_owned(), ..new[0].clone() }],
        SOON,
    )
    .unwrap();
    new[1].workload.ping_until("10.1.0.17", SOON).unwrap();
    old[6].workload.ping_until("10.1.0.17", SOON).unwrap();
}

#[test]
fn overlapping_subnets_are_refused_and_ipv6_and_dual_stack_networks_work() {
    let lab = start_lab(2).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    h1.ctl_ok(&["network", "create", "four", "--subnet", "10.1.0.0/24"]).unwrap();
    wait_network(h2, "four").unwrap();
    for (subnet, words) in [
        ("10.1.0.0/24", "four"),
        ("10.1.0.128/25", "four"),
        ("10.0.0.0/8", "four"),
        // The underlay.
        ("192.168.77.0/24", "underlay"),
        ("192.168.0.0/16", "underlay"),
        ("10.2.0.1/24", "host bits"),
        ("10.2.0.0/31", "too small"),
        ("127.0.0.0/24", "loopback"),
        ("fe80::/64", "link-local"),
        ("224.0.0.0/24", "multicast"),
    ] {
        assert_contains(
            &ctl_error(h2, &["network", "create", "bad", "--subnet", subnet]).unwrap(),
            &[subnet, words],
        );
    }
    let overlapping = ["network", "create", "bad", "--subnet", "10.3.0.0/24", "--subnet", "10.3.0.0/25"];
    assert_contains(&ctl_error(h1, &overlapping).unwrap(), &["10.3.0.0/25", "overlaps"]);
    // An extended subnet must not overlap another network either.
    h1.ctl_ok(&["network", "create", "next", "--subnet", "10.1.1.0/24"]).unwrap();
    let extend = ["network", "update", "four", "--subnet", "10.1.0.0/23"];
    assert_contains(&ctl_error(h1, &extend).unwrap(), &["10.1.0.0/23", "next"]);
    assert_eq!(rows(h1, &["network", "ls"]).unwrap().len(), 2);

    h1.ctl_ok(&["network", "create", "six", "--subnet", "fd10::/64"]).unwrap();
    h2.ctl_ok(&["network", "create", "dual", "--subnet", "10.5.0.0/24", "--subnet", "fd11::/64"]).unwrap();
    for host in lab.hosts() {
        for network in ["six", "dual"] {
            wait_network(host, network).unwrap();
        }
    }
    let a6 = attach(h1, "a6", "six", &[]).unwrap();
    let b6 = attach(h2, "b6", "six", &["--ip", "fd10::beef"]).unwrap();
    assert_eq!(b6.address(), "fd10::beef");
    a6.workload.ping_until("fd10::beef", SOON).unwrap();
    b6.workload.ping_until(a6.address(), SOON).unwrap();
    a6.workload.ping_until("fd10::1", SOON).unwrap();

    let a = attach(h1, "a", "dual", &[]).unwrap();
    // One family is requested, the other one is chosen.
    let b = attach(h2, "b", "dual", &["--ip", "fd11::b"]).unwrap();
    let (from_a, from_b) = (a.addresses(), b.addresses());
    assert_eq!((from_a.len(), from_b.len()), (2, 2), "{from_a:?} {from_b:?}");
    assert!(from_b.contains(&"fd11::b".to_owned()), "{from_b:?}");
    for address in &from_b {
        a.workload.ping_until(address, SOON).unwrap();
    }
    for address in &from_a {
        b.workload.ping_until(address, SOON).unwrap();
    }
    let gateways = h1.ctl_json(&["network", "inspect", "dual"]).unwrap();
    for gateway in strings(&gateways["gateways"]) {
        a.workload.ping_until(&gateway, SOON).unwrap();
        b.workload.ping_until(&gateway, SOON).unwrap();
    }
    // At most one address of each family can be requested.
    let c = h1.workload("c").unwrap();
    let two = [
        "attach",
        "c",
        "--network",
        "dual",
        "--netns",
        c.path_str(),
        "--ip",
        "10.5.0.50",
        "--ip",
        "10.5.0.51",
    ];
    assert_contains(&ctl_error(h1, &two).unwrap(), &["10.5.0.51"]);
    // Each row of `subnets` has the fields that docs/cli.md names.
    for row in rows(h2, &["subnets"]).unwrap() {
        assert!(row["network"].is_string() && row["prefix"].is_string() && row["node"].is_string(), "{row}");
        assert!(row["used"].is_u64() && row["size"].is_u64(), "{row}");
    }
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn forgotten_host_loses_its_blocks_and_isolates_duplicate_addresses_on_return() {
    let lab = start_lab(3).unwrap();
    let (h1, h2, h3) = (&lab["h1"], &lab["h2"], &lab["h3"]);
    h1.ctl_ok(&["network", "create", "demo", "--subnet", "10.1.0.0/28"]).unwrap();
    wait_network(h3, "demo").unwrap();
    let other = attach(h2, "other", "demo", &["--ip", "10.1.0.4"]).unwrap();
    let doubled = attach(h3, "doubled", "demo", &["--ip", "10.1.0.5"]).unwrap();
    let kept = attach(h3, "kept", "demo", &["--ip", "10.1.0.6"]).unwrap();
    other.workload.ping_until("10.1.0.5", SOON).unwrap();
    assert_contains(&ctl_error(h1, &["peers", "forget", "h3"]).unwrap(), &["h3", "alive"]);

    lab.partition(&[&["h1", "h2"], &["h3"]]).unwrap();
    wait_until(SOON, "h3 to be dead", || -> Result<bool> { Ok(peer(h1, "h3")?["state"] == "dead") }).unwrap();
    // Until h3 is forgotten, its address stays reserved.
    let new = h1.workload("new").unwrap();
    let args = ["attach", "new", "--network", "demo", "--netns", new.path_str(), "--ip", "10.1.0.5"];
    assert_contains(&ctl_error(h1, &args).unwrap(), &["10.1.0.5", "h3"]);
    h1.ctl_ok(&["peers", "forget", "h3"]).unwrap();
    assert!(peer(h1, "h3").is_err(), "h1 still lists the forgotten host");
    wait_until(SOON, "h2 to forget h3 too", || peer(h2, "h3").is_err()).unwrap();
    let blocks = rows(h1, &["subnets"]).unwrap();
    assert!(blocks.iter().all(|row| row["node"] != "h3"), "{blocks:?}");
    h1.ctl_ok(&args).unwrap();
    new.ping_until("10.1.0.4", SOON).unwrap();

    lab.heal().unwrap();
    wait_problem(h3, &["not admitted", "peers admit"], SOON).unwrap();
    h1.ctl_ok(&["peers", "admit", "h3"]).unwrap();
    let problem = wait_problem(h3, &["doubled", "10.1.0.5", "cut off"], SOON).unwrap();
    assert_contains(&problem, &["h1", "Detach"]);
    wait_until(SOON, "h3 to be a member again", || -> Result<bool> {
        let row = peer(h1, "h3")?;
        Ok(row["state"] == "alive" && row["member"] == true)
    })
    .unwrap();
    // All hosts list the endpoint that lost its address as isolated.
    wait_until(SOON, "the duplicate to be isolated", || -> Result<()> {
        for host in [h1, h2, h3] {
            let all = rows(host, &["endpoints"])?;
            let found = all.iter().find(|row| row["name"] == "doubled");
            let found = found.with_context(|| format!("not listed on {}: {all:?}", host.name()))?;
            ensure!(found["state"] == "isolated", "on {}: {found}", host.name());
        }
        Ok(())
    })
    .unwrap();
    assert_no_reply(&doubled.workload, "10.1.0.4");
    other.workload.ping_until("10.1.0.5", SOON).unwrap();
    // The MAC address is derived from the address, so both endpoints have the same one. It must lead to h1 now.
    wait_until(SOON, "the FDB of h2 to lead 10.1.0.5 to h1", || -> Result<bool> {
        let fdb = rows(h2, &["fdb"])?;
        let row = fdb.iter().find(|row| strings(&row["addresses"]).contains(&"10.1.0.5".to_owned()));
        Ok(row.context("no entry")?["node"] == "h1")
    })
    .unwrap();
    // The endpoint whose address is still its own is not affected.
    other.workload.ping_until("10.1.0.6", SOON).unwrap();
    kept.workload.ping_until("10.1.0.5", SOON).unwrap();
    // As the problem advises, the user detaches and attaches the endpoint.
    h3.ctl_ok(&["detach", "doubled"]).unwrap();
    let again = attach_workload(h3.find_workload("doubled").unwrap(), "demo", &[]).unwrap();
    assert_ne!(again.address(), "10.1.0.5");
    again.workload.ping_until("10.1.0.4", SOON).unwrap();
    wait_until(SOON, "h3 to have no problem", || -> Result<bool> { Ok(ovl_tests::problems(h3)?.is_empty()) })
        .unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}
