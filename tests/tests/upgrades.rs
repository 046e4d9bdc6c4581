//! A rolling upgrade to a release with an added field, in either order, and the way back: no packet and no state is lost.
//! Debug builds play the later release: see `ovl_proto::wire::fields`.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, wait_until};
use ovl_proto::alloc::AllocMap;
use ovl_proto::object::{Body, SignedObject};
use ovl_proto::record::SignedRecord;
use ovl_proto::table::{Entry, Update};
use ovl_proto::wire;
use ovl_proto::wire::fields::{PLAYED_FIELD, Reader, Unknown};
use ovl_tests::{
    Attached, Flow, SOON, attach, create_network, ctl_error, ping_all_pairs, problems, start_lab_with,
    wait_clean, wait_endpoints, wait_network, wait_no_problem, wait_problem,
};

/// The part of the replica's state that is of interest here.
#[derive(Debug, PartialEq, Eq)]
struct Replica {
    learned: AllocMap,
}

ovl_proto::fields! { Replica { 3 learned } }

/// Makes the next start of a daemon one of the later release, or of the earlier one.
fn set_later(host: &Host, later: bool) {
    let added = [("OVL_TEST_ADDED_FIELD", "1")];
    host.set_env(if later { &added } else { &[] }).unwrap();
}

/// Restarts a daemon as another release.
fn change_release(lab: &Lab, name: &str, later: bool) {
    let host = &lab[name];
    host.stop().unwrap();
    set_later(host, later);
    host.start().unwrap();
    host.wait_ready(SOON).unwrap();
    lab.wait_all_alive(SOON).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

fn has_added(unknown: &Unknown) -> bool {
    unknown.get(PLAYED_FIELD) == Some(b"added")
}

/// Where the added field is in the state file of a host: the file itself, `map`, `network NAME` and `record of NAME`.
fn added_in_state(host: &Host) -> Result<BTreeSet<String>> {
    let bytes = fs::read(host.state_dir().join("state"))?;
    let body = bytes.get(b"ovl state 3\n".len() + 32..).context("no state")?;
    let mut reader = Reader::new("State", wire::fields_of(body)?)?;
    let _: u64 = reader.need(1, false)?;
    let _: u64 = reader.need(2, false)?;
    let objects: Vec<SignedObject> = reader.optional(4, false)?;
    let peers: Vec<(SignedRecord, u64)> = reader.optional(5, false)?;
    let replica: Option<Replica> = reader.optional(7, false)?;
    let mut found = BTreeSet::new();
    for signed in objects {
        if let Body::Network(network) = signed.object()?.body
            && has_added(&network.unknown)
        {
            found.insert(format!("network {}", network.name));
        }
    }
    for (signed, _) in peers {
        let record = signed.record()?;
        if has_added(&record.unknown) {
            found.insert(format!("record of {}", record.name));
        }
    }
    if replica.is_some_and(|replica| has_added(&replica.learned.unknown)) {
        found.insert("map".to_owned());
    }
    if has_added(&reader.finish()?) {
        found.insert("file".to_owned());
    }
    Ok(found)
}

/// Waits until the added field is in these places of a host's state file. The daemon writes that file whole when it stops,
/// so it is restarted for each look.
fn wait_added_in_state(lab: &Lab, name: &str, expected: &[&str]) {
    let host = &lab[name];
    wait_until(SOON, &format!("{expected:?} in the state file of {name}"), || {
        host.stop()?;
        let found = added_in_state(host);
        host.start()?;
        host.wait_ready(SOON)?;
        let found = found?;
        ensure!(expected.iter().all(|each| found.contains(*each)), "{found:?}");
        Ok(())
    })
    .unwrap();
    lab.wait_all_alive(SOON).unwrap();
}

/// Waits until a host has the added field in these endpoints of other hosts, and in no others.
fn wait_added_endpoints(host: &Host, expected: &[&str]) {
    wait_until(SOON, &format!("the field in {expected:?} on {}", host.name()), || {
        let mut found = BTreeSet::new();
        for file in fs::read_dir(host.run_dir().join("tables"))? {
            let update: Update = wire::decode_body(&fs::read(file?.path())?)?;
            for entry in update.set {
                if let Entry::Endpoint(endpoint) = entry
                    && has_added(&endpoint.unknown)
                {
                    found.insert(endpoint.name);
                }
            }
        }
        ensure!(found.iter().map(String::as_str).eq(expected.iter().copied()), "{found:?}");
        Ok(())
    })
    .unwrap();
}

/// Two hosts with an endpoint each.
fn pair() -> (Lab, Vec<Attached>) {
    let lab = start_lab_with(LabConfig::hosts(2)).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24", "--subnet", "fd00:99::/64"]).unwrap();
    let all = [("h1", "a"), ("h2", "b")].map(|(host, name)| attach(&lab[host], name, "blue", &[]).unwrap());
    ping_all_pairs(&all, SOON).unwrap();
    (lab, all.to_vec())
}

/// Upgrades two hosts in this order, and back, and again, with traffic all the time.
fn roll(first: &str, second: &str) {
    let (lab, mut all) = pair();
    let flows = [Flow::start(&all[0], &all[1]).unwrap(), Flow::start(&all[1], &all[0]).unwrap()];

    // One host has the added field, the other one does not know it and keeps it.
    change_release(&lab, first, true);
    lab[first].ctl_ok(&["network", "create", "red", "--subnet", "10.98.0.0/24"]).unwrap();
    wait_network(&lab[second], "red").unwrap();
    all.push(attach(&lab[first], "c", "blue", &[]).unwrap());
    all.push(attach(&lab[second], "d", "blue", &[]).unwrap());
    let (red, also_red) =
        (attach(&lab[first], "e", "red", &[]).unwrap(), attach(&lab[second], "f", "red", &[]).unwrap());
    ping_all_pairs(&all, SOON).unwrap();
    ping_all_pairs(&[red, also_red], SOON).unwrap();
    let record = format!("record of {first}");
    wait_added_endpoints(&lab[second], &["c", "e"]);
    wait_added_in_state(&lab, second, &["network red", &record]);
    wait_added_in_state(&lab, first, &["file", "network red"]);

    // Both have it. Either of them makes a map, as the coordinator.
    change_release(&lab, second, true);
    for host in [first, second] {
        let name = format!("of-{host}");
        let subnet = if host == first { "10.97.0.0/24" } else { "10.94.0.0/24" };
        lab[host].ctl_ok(&["network", "create", &name, "--subnet", subnet]).unwrap();
        attach(&lab[host], &format!("g-{host}"), &name, &[]).unwrap();
    }
    let everything =
        ["file", "map", "network red", &format!("network of-{first}"), &format!("network of-{second}")];
    for host in lab.hosts() {
        wait_added_in_state(&lab, host.name(), &everything);
    }

    // The way back: what is not known any more is still there, after changes too.
    change_release(&lab, second, false);
    change_release(&lab, first, false);
    lab[first].ctl_ok(&["network", "create", "green", "--subnet", "10.95.0.0/24"]).unwrap();
    wait_network(&lab[second], "green").unwrap();
    attach(&lab[second], "h", "green", &[]).unwrap();
    lab[first].ctl_ok(&["endpoint", "unready", "c"]).unwrap();
    lab[first].ctl_ok(&["endpoint", "ready", "c"]).unwrap();
    for host in lab.hosts() {
        wait_added_in_state(&lab, host.name(), &everything);
        let problems = problems(host).unwrap();
        assert!(!problems.iter().any(|each| each.contains("later release")), "{problems:?}");
    }
    wait_added_endpoints(&lab[second], &["c", "e", &format!("g-{first}")]);
    ping_all_pairs(&all, SOON).unwrap();

    // And the upgrade after it finds it again.
    change_release(&lab, first, true);
    change_release(&lab, second, true);
    for host in lab.hosts() {
        wait_added_in_state(&lab, host.name(), &everything);
        let on = |name: &str, host: &str| format!("{name} on {host} is ready");
        let endpoints = [
            on("a", "h1"),
            on("b", "h2"),
            on("c", first),
            on("d", second),
            on("e", first),
            on("f", second),
            on(&format!("g-{first}"), first),
            on(&format!("g-{second}"), second),
            on("h", second),
        ];
        wait_endpoints(host, &endpoints.iter().map(String::as_str).collect::<Vec<_>>(), SOON).unwrap();
    }
    wait_added_endpoints(&lab[second], &["c", "e", &format!("g-{first}")]);
    ping_all_pairs(&all, SOON).unwrap();
    for flow in flows {
        flow.finish_without_loss().unwrap();
    }
}

#[test]
fn upgrade_that_adds_a_field_loses_nothing_and_can_be_taken_back() {
    roll("h1", "h2");
}

#[test]
fn upgrade_in_the_other_order_loses_nothing_either() {
    roll("h2", "h1");
}

#[test]
fn network_with_a_marked_field_has_no_effect_where_it_is_not_understood() {
    let (lab, all) = pair();
    lab["h1"].stop().unwrap();
    lab["h1"].set_env(&[("OVL_TEST_ADDED_FIELD", "marked")]).unwrap();
    lab["h1"].start().unwrap();
    lab["h1"].wait_ready(SOON).unwrap();
    lab.wait_all_alive(SOON).unwrap();
    lab["h1"].ctl_ok(&["network", "create", "red", "--subnet", "10.98.0.0/24"]).unwrap();
    let sentence = wait_problem(&lab["h2"], &["host h1", "field 1000000 of Network"], SOON).unwrap();
    assert!(sentence.contains("Upgrade ovld on this host"), "{sentence}");
    assert!(ctl_error(&lab["h2"], &["network", "inspect", "red"]).is_ok());
    attach(&lab["h1"], "c", "red", &[]).unwrap();
    ping_all_pairs(&all, SOON).unwrap();
    // The host that does not understand it keeps it, also over a restart.
    lab["h2"].restart().unwrap();
    lab["h2"].wait_ready(SOON).unwrap();
    wait_problem(&lab["h2"], &["field 1000000 of Network"], SOON).unwrap();
    lab["h2"].stop().unwrap();
    lab["h2"].set_env(&[("OVL_TEST_ADDED_FIELD", "marked")]).unwrap();
    lab["h1"].stop().unwrap();
    lab["h2"].start().unwrap();
    lab["h2"].wait_ready(SOON).unwrap();
    wait_network(&lab["h2"], "red").unwrap();
}

#[test]
fn hosts_without_a_common_wire_version_name_each_other() {
    let (lab, all) = pair();
    let flow = Flow::start(&all[0], &all[1]).unwrap();
    lab["h2"].stop().unwrap();
    lab["h2"].set_env(&[("OVL_TEST_WIRE_VERSION", "9")]).unwrap();
    lab["h2"].start().unwrap();
    let on_h1 = wait_problem(&lab["h1"], &["host h2 runs ovld", "wire version 9", "speaks 1"], SOON).unwrap();
    assert!(on_h1.contains("Upgrade ovld on this host"), "{on_h1}");
    let on_h2 = wait_problem(&lab["h2"], &["host h1 runs ovld", "wire version 1", "speaks 9"], SOON).unwrap();
    assert!(on_h2.contains("Upgrade ovld on h1"), "{on_h2}");
    // The kernels go on.
    flow.finish_without_loss().unwrap();
    lab["h2"].stop().unwrap();
    lab["h2"].set_env(&[]).unwrap();
    lab["h2"].start().unwrap();
    lab["h2"].wait_ready(SOON).unwrap();
    lab.wait_all_alive(SOON).unwrap();
    for host in lab.hosts() {
        wait_no_problem(host, SOON).unwrap();
    }
}
