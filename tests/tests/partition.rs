//! Network partitions with changes on both sides, and the state after they heal.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use netns_lab::{Host, wait_until};
use ovl_tests::{
    SOON, assert_contains, assert_no_reply, attach, attach_workload, ctl_error, peer, ping_all_pairs,
    problems, rows, start_lab, strings, text, wait_clean, wait_endpoints, wait_network, wait_problem,
};

/// Time limit for traffic between the two sides to work again after a partition.
const HEALED: Duration = Duration::from_secs(10);

/// Waits until a host lists another one in this state.
fn wait_state(host: &Host, other: &str, state: &str) -> Result<()> {
    wait_until(SOON, &format!("{other} to be {state} on {}", host.name()), || {
        let row = peer(host, other)?;
        ensure!(row["state"] == state, "{row}");
        Ok(())
    })
}

/// Name, ID, VNI and removal state of all networks.
fn networks(host: &Host) -> Result<Vec<String>> {
    let all = rows(host, &["network", "ls"])?;
    Ok(all
        .iter()
        .map(|row| format!("{} {} {} {}", row["name"], row["id"], row["vni"], row["removing"]))
        .collect())
}

/// Waits until all hosts list the same networks, `count` of them.
fn wait_same_networks(hosts: &[Host], count: usize) -> Result<()> {
    wait_until(SOON, &format!("the same {count} networks on all hosts"), || {
        let lists = hosts.iter().map(networks).collect::<Result<Vec<_>>>()?;
        ensure!(lists.iter().all(|list| list.len() == count && *list == lists[0]), "{lists:#?}");
        Ok(())
    })
}

#[test]
fn both_sides_of_a_partition_work_and_converge_afterwards() {
    let lab = start_lab(3).unwrap();
    let (h1, h2, h3) = (&lab["h1"], &lab["h2"], &lab["h3"]);
    h1.ctl_ok(&["network", "create", "demo", "--subnet", "10.1.0.0/24"]).unwrap();
    h1.ctl_ok(&["network", "create", "going", "--subnet", "10.2.0.0/24"]).unwrap();
    for host in lab.hosts() {
        wait_network(host, "demo").unwrap();
        wait_network(host, "going").unwrap();
    }
    let a1 = attach(h1, "a1", "demo", &[]).unwrap();
    let a2 = attach(h2, "a2", "demo", &[]).unwrap();
    let a3 = attach(h3, "a3", "demo", &[]).unwrap();
    let old3 = attach(h3, "old3", "demo", &[]).unwrap();
    let g1 = attach(h1, "g1", "going", &[]).unwrap();
    attach(h3, "g3", "going", &[]).unwrap();
    ping_all_pairs(&[a1.clone(), a2.clone(), a3.clone()], SOON).unwrap();
    h3.ctl_ok(&["detach", "g3"]).unwrap();
    wait_until(SOON, "g3 to be gone on h1", || -> Result<bool> {
        Ok(!rows(h1, &["endpoints"])?.iter().any(|row| row["name"] == "g3"))
    })
    .unwrap();

    lab.partition(&[&["h1", "h2"], &["h3"]]).unwrap();
    for (host, other) in [(h1, "h3"), (h2, "h3"), (h3, "h1"), (h3, "h2")] {
        wait_state(host, other, "dead").unwrap();
    }
    // The majority can do everything, including new blocks (10 endpoints need two).
    let mut majority = Vec::new();
    for index in 0..10 {
        majority.push(attach(h1, &format!("m{index}"), "demo", &[]).unwrap());
    }
    h2.ctl_ok(&["detach", "a2"]).unwrap();
    h1.ctl_ok(&["detach", "g1"]).unwrap();
    drop(g1);
    h1.ctl_ok(&["network", "create", "twice", "--subnet", "10.3.0.0/24", "--vni", "7777"]).unwrap();
    wait_network(h2, "twice").unwrap();
    let t1 = attach(h2, "t1", "twice", &[]).unwrap();
    h2.ctl_ok(&["network", "rm", "going"]).unwrap();

    // The minority can use only the blocks that it holds.
    let mut minority = vec![a3.clone()];
    let error = loop {
        let workload = h3.workload(&format!("n{}", minority.len())).unwrap();
        let name = workload.name().to_owned();
        let args = ["attach", &name, "--network", "demo", "--netns", workload.path_str()];
        if minority.len() == 8 {
            break ctl_error(h3, &args).unwrap();
        }
        match attach_workload(workload.clone(), "demo", &[]) {
            Ok(more) => minority.push(more),
            Err(_) => break ctl_error(h3, &args).unwrap(),
        }
    };
    // One block of 8 addresses: one is used by `old3`, and the network address and the gateway may be in it.
    assert!((5..=7).contains(&minority.len()), "{} endpoints in a block of 8", minority.len());
    assert_contains(&error, &["majority", "1 of 3", "h1", "h2"]);
    h3.ctl_ok(&["detach", "old3"]).unwrap();
    drop(old3);
    let g4 = attach(h3, "g4", "going", &[]).unwrap();
    h3.ctl_ok(&["network", "create", "twice", "--subnet", "10.4.0.0/24", "--vni", "7777"]).unwrap();
    let refused_claim = {
        let workload = h3.workload("t3").unwrap();
        ctl_error(h3, &["attach", "t3", "--network", "twice", "--netns", workload.path_str()]).unwrap()
    };
    assert_contains(&refused_claim, &["majority"]);
    assert_no_reply(&a3.workload, &a1.address());
    ping_all_pairs(&minority[..3], SOON).unwrap();
    ping_all_pairs(&majority[..3], SOON).unwrap();

    lab.heal().unwrap();
    let healed = Instant::now();
    a3.workload.ping_until(majority[9].address(), HEALED).unwrap();
    majority[0].workload.ping_until(minority[2].address(), HEALED.saturating_sub(healed.elapsed())).unwrap();

    // Two networks have the same name and VNI. The older one keeps both, and the other one gets new ones.
    wait_same_networks(lab.hosts(), 4).unwrap();
    let all = rows(h2, &["network", "ls"]).unwrap();
    let of = |subnet: &str| {
        all.iter().find(|row| row["subnets"][0] == subnet).unwrap_or_else(|| panic!("{all:?}"))
    };
    let (older, younger) = (of("10.3.0.0/24"), of("10.4.0.0/24"));
    assert_eq!((&older["name"], &older["vni"]), (&"twice".into(), &7777.into()));
    assert!(text(&younger["name"]).starts_with("twice-") && younger["vni"] != 7777, "{younger}");
    let t4 = attach(h1, "t4", &text(&younger["name"]), &[]).unwrap();
    let t5 = attach(h3, "t5", &text(&younger["name"]), &[]).unwrap();
    ping_all_pairs(&[t4, t5], SOON).unwrap();
    let t6 = attach(h3, "t6", "twice", &[]).unwrap();
    ping_all_pairs(&[t1, t6], SOON).unwrap();

    // A network that was removed on one side and used on the other is removed once its last endpoint is detached, and
    // accepts no new one.
    for host in lab.hosts() {
        let row = host.ctl_json(&["network", "inspect", "going"]).unwrap();
        assert_eq!((&row["removing"], &row["endpoints"]), (&true.into(), &1.into()), "on {}", host.name());
        let late = host.workload(&format!("late-{}", host.name())).unwrap();
        let error =
            ctl_error(host, &["attach", "late", "--network", "going", "--netns", late.path_str()]).unwrap();
        assert_contains(&error, &["going", "removed"]);
    }
    g4.workload.ping_until("10.2.0.1", SOON).unwrap();

    // All hosts list the same endpoints, with unique addresses.
    let mut expected: Vec<String> =
        majority.iter().map(|each| format!("{} on h1 is ready", each.name)).collect();
    expected.extend(minority.iter().map(|each| format!("{} on h3 is ready", each.name)));
    let rest = ["a1 on h1", "t1 on h2", "t4 on h1", "t5 on h3", "t6 on h3", "g4 on h3"];
    expected.extend(rest.map(|each| format!("{each} is ready")));
    let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
    for host in lab.hosts() {
        wait_endpoints(host, &expected, SOON).unwrap();
    }
    let mut addresses: Vec<String> =
        rows(h2, &["endpoints"]).unwrap().iter().flat_map(|row| strings(&row["addresses"])).collect();
    let count = addresses.len();
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), count, "duplicate addresses");
    wait_clean(lab.hosts(), SOON).unwrap();
    let pairs = [&[a1], &majority[7..], &minority[..]].concat();
    ping_all_pairs(&pairs, SOON).unwrap();

    h3.ctl_ok(&["detach", "g4"]).unwrap();
    wait_same_networks(lab.hosts(), 3).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    for host in lab.hosts() {
        wait_until(SOON, "no problem", || -> Result<()> {
            let left = problems(host)?;
            ensure!(left.is_empty(), "on {}: {left:?}", host.name());
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn long_partition_with_the_only_seed_in_the_minority_heals() {
    // h1 is the only configured seed of h2 and h3.
    let lab = start_lab(3).unwrap();
    let (h1, h2, h3) = (&lab["h1"], &lab["h2"], &lab["h3"]);
    h2.ctl_ok(&["network", "create", "demo", "--subnet", "10.1.0.0/24"]).unwrap();
    for host in lab.hosts() {
        wait_network(host, "demo").unwrap();
    }
    let all: Vec<_> = lab
        .hosts()
        .iter()
        .map(|host| attach(host, &format!("w-{}", host.name()), "demo", &[]).unwrap())
        .collect();
    ping_all_pairs(&all, SOON).unwrap();

    lab.partition(&[&["h1"], &["h2", "h3"]]).unwrap();
    // A bounded window: longer than any timer of gossip that a partition could run into. The daemon's counter
    // measures it.
    wait_until(Duration::from_secs(60), "18 s without a message from h1", || -> Result<()> {
        let row = peer(h2, "h1")?;
        ensure!(row["last_heard_ms"].as_u64().is_some_and(|ms| ms >= 18_000), "{row}");
        Ok(())
    })
    .unwrap();
    for (host, other) in [(h2, "h1"), (h3, "h1"), (h1, "h2"), (h1, "h3")] {
        wait_state(host, other, "dead").unwrap();
    }
    let during = attach(h3, "during", "demo", &[]).unwrap();
    assert!(during.workload.ping(all[1].address(), Duration::from_secs(2)));
    for host in [h2, h3] {
        let suspended = rows(host, &["endpoints"]).unwrap();
        let row = suspended.iter().find(|row| row["node"] == "h1");
        assert_eq!(row.map(|row| row["state"] == "suspended"), Some(true), "{suspended:?}");
    }

    lab.heal().unwrap();
    all[0].workload.ping_until(all[1].address(), HEALED).unwrap();
    during.workload.ping_until(all[0].address(), HEALED).unwrap();
    lab.wait_all_alive(SOON).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    ping_all_pairs(&[all, vec![during]].concat(), SOON).unwrap();
}

#[test]
fn pair_without_a_direct_path_is_reported_and_gets_updates_through_a_third_host() {
    let lab = start_lab(3).unwrap();
    let (h1, h2, h3) = (&lab["h1"], &lab["h2"], &lab["h3"]);
    h1.ctl_ok(&["network", "create", "demo", "--subnet", "10.1.0.0/24"]).unwrap();
    for host in [h2, h3] {
        wait_network(host, "demo").unwrap();
    }
    let a1 = attach(h1, "a1", "demo", &[]).unwrap();
    let a2 = attach(h2, "a2", "demo", &[]).unwrap();
    let a3 = attach(h3, "a3", "demo", &[]).unwrap();
    ping_all_pairs(&[a1.clone(), a2.clone(), a3.clone()], SOON).unwrap();

    // h3 is in no group, so it reaches both.
    lab.partition(&[&["h1"], &["h2"]]).unwrap();
    for (host, other) in [(h1, "h2"), (h2, "h1")] {
        wait_until(SOON, "the peer to be alive and unreachable", || -> Result<()> {
            let row = peer(host, other)?;
            ensure!(row["state"] == "alive" && row["reachable"] == false, "{row}");
            Ok(())
        })
        .unwrap();
        let problem = wait_problem(host, &[other, "directly"], SOON).unwrap();
        assert_contains(
            &problem,
            &["alive", "7940", &peer(host, other).unwrap()["address"].as_str().unwrap_or("?")[..12]],
        );
        assert_eq!(host.ctl_json(&["status"]).unwrap()["state"], "degraded");
        let through = peer(host, "h3").unwrap();
        assert_eq!((&through["state"], &through["reachable"]), (&"alive".into(), &true.into()));
    }
    assert!(problems(h3).unwrap().is_empty(), "{:?}", problems(h3).unwrap());
    // Updates go through h3 in both directions, and networks and blocks can be allocated.
    let b1 = attach(h1, "b1", "demo", &[]).unwrap();
    let b2 = attach(h2, "b2", "demo", &[]).unwrap();
    for host in lab.hosts() {
        let all = ["a1 on h1", "a2 on h2", "a3 on h3", "b1 on h1", "b2 on h2"]
            .map(|each| format!("{each} is ready"));
        wait_endpoints(host, &all.each_ref().map(String::as_str), SOON).unwrap();
    }
    h1.ctl_ok(&["network", "create", "news", "--subnet", "10.2.0.0/24"]).unwrap();
    wait_network(h2, "news").unwrap();
    ping_all_pairs(&[a3.clone(), b1.clone()], SOON).unwrap();
    ping_all_pairs(&[a3, b2.clone()], SOON).unwrap();

    lab.heal().unwrap();
    b1.workload.ping_until(b2.address(), HEALED).unwrap();
    for (host, other) in [(h1, "h2"), (h2, "h1")] {
        wait_until(SOON, "the peer to be reachable and no problem", || -> Result<()> {
            let (row, left) = (peer(host, other)?, problems(host)?);
            ensure!(row["reachable"] == true && left.is_empty(), "{row} {left:?}");
            Ok(())
        })
        .unwrap();
    }
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn with_30_percent_packet_loss_no_host_is_declared_dead_and_updates_arrive() {
    let lab = start_lab(3).unwrap();
    let (h1, h2, h3) = (&lab["h1"], &lab["h2"], &lab["h3"]);
    h1.ctl_ok(&["network", "create", "demo", "--subnet", "10.1.0.0/24"]).unwrap();
    for host in [h2, h3] {
        wait_network(host, "demo").unwrap();
    }
    let before: Vec<usize> = lab.hosts().iter().map(|host| deaths(host).unwrap().len()).collect();
    lab.loss(30.0).unwrap();
    let start = Instant::now();
    let mut all = Vec::new();
    let mut longest = Duration::ZERO;
    // A bounded window of 20 s: false failure detection is a matter of probability, so there is no event to wait for.
    // As many rounds as fit, each of which waits for its update.
    for round in 0.. {
        let host = &lab.hosts()[round % 3];
        let name = format!("w{round}");
        let attached = attach(host, &name, "demo", &[]).unwrap();
        let attached_at = Instant::now();
        for other in lab.hosts() {
            wait_until(
                Duration::from_secs(15),
                &format!("{} to list {name}", other.name()),
                || -> Result<bool> {
                    Ok(rows(other, &["endpoints"])?
                        .iter()
                        .any(|row| row["name"] == *name && row["state"] == "ready"))
                },
            )
            .unwrap();
        }
        longest = longest.max(attached_at.elapsed());
        all.push(attached);
        if start.elapsed() > Duration::from_secs(20) {
            break;
        }
    }
    let changes: usize = lab.hosts().iter().map(|host| changes_of_ways(host).unwrap()).sum();
    println!(
        "{} attaches in {:?}; the slowest update took {longest:?}; {changes} changes of ways",
        all.len(),
        start.elapsed()
    );
    // Loss is not a cut: other ways lose as much.
    assert!(changes <= 24, "{changes} changes of ways");
    for (host, before) in lab.hosts().iter().zip(before) {
        let after = deaths(host).unwrap();
        assert_eq!(after.len(), before, "on {}: {after:?}", host.name());
    }
    lab.loss(0.0).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    let first = all[0].clone();
    ping_all_pairs(&[vec![first], all[all.len() - 2..].to_vec()].concat(), SOON).unwrap();
}

/// The number of events that report that a host is reached otherwise than before.
fn changes_of_ways(host: &Host) -> Result<usize> {
    let events = rows(host, &["events"])?;
    let is_change =
        |event: &&serde_json::Value| event["kind"] == "peer" && text(&event["message"]).contains("reached");
    Ok(events.iter().filter(is_change).count())
}

/// Events that report a host as dead.
fn deaths(host: &Host) -> Result<Vec<String>> {
    let events = rows(host, &["events"])?;
    let dead =
        events.iter().filter(|event| event["kind"] == "peer" && text(&event["message"]).ends_with("dead"));
    Ok(dead.map(|event| format!("{} {}", event["object"], event["message"])).collect())
}
