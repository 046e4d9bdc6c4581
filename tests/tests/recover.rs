//! Recovery from the loss of a majority: one and two survivors, the dead that return, and refusals.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use netns_lab::{Host, Lab, wait_until};
use ovl_tests::{
    SOON, assert_contains, attach, create_network, ctl_error, peer, ping_all_pairs, rows, start_lab, strings,
    text, wait_clean, wait_problem,
};
use serde_json::Value;

/// Time within which a majority that is gone counts as lost, with what the loss itself takes to be noticed.
const LOST: Duration = Duration::from_secs(60);
const RECOVER: [&str; 5] = ["recover", "--from-majority-loss", "--yes", "--lost", "2"];

fn plan(host: &Host) -> Result<Value> {
    host.ctl_json(&["recover", "--from-majority-loss", "--dry-run"])
}

fn lose(hosts: &[&Host]) {
    for host in hosts {
        host.kill9().unwrap();
        host.link_down().unwrap();
    }
}

fn bring_back(hosts: &[&Host]) {
    thread::scope(|scope| {
        for host in hosts {
            scope.spawn(|| {
                host.link_up().unwrap();
                host.start().unwrap();
            });
        }
    });
}

/// Waits until a recovery is possible on a host.
fn wait_possible(host: &Host) {
    wait_until(LOST, "a recovery to be possible", || {
        let plan = plan(host)?;
        ensure!(plan["state"] == "possible", "{plan}");
        Ok(())
    })
    .unwrap();
}

fn members(host: &Host) -> Result<Value> {
    Ok(host.ctl_json(&["status"])?["members"].clone())
}

fn wait_members(host: &Host, count: u32) {
    wait_until(SOON, &format!("{} to have {count} members", host.name()), || {
        let members = members(host)?;
        ensure!(members == count, "{members}");
        Ok(())
    })
    .unwrap();
}

fn id(host: &Host) -> String {
    text(&host.ctl_json(&["status"]).unwrap()["id"])
}

/// Waits until a host has a problem with the code of recoveries that contains these parts.
fn wait_recovered_problem(host: &Host, parts: &[&str]) -> String {
    let problem = wait_problem(host, parts, SOON).unwrap();
    let status = host.ctl_json(&["status"]).unwrap();
    let all = status["problems"].as_array().unwrap();
    let coded = all.iter().any(|each| each["code"] == "OVL-E037" && each["message"] == *problem);
    assert!(coded, "{all:?}");
    problem
}

/// A host that was left out attaches nothing, and can change nothing of the cluster.
fn assert_left_out(host: &Host, network: &str, name: &str) {
    let problem = wait_recovered_problem(host, &["was recovered on host h1", "without this host"]);
    assert_contains(&problem, &["ovlctl recover --accept", &format!("ovlctl peers admit {}", id(host))]);
    let workload = host.workload(name).unwrap();
    let args = ["attach", workload.name(), "--network", network, "--netns", workload.path_str()];
    assert_contains(&ctl_error(host, &args).unwrap(), &["was recovered on host h1"]);
    assert_contains(&ctl_error(host, &["peers", "forget", "h1"]).unwrap(), &["was recovered on host h1"]);
    assert_contains(&ctl_error(host, &RECOVER).unwrap(), &["was recovered on host h1"]);
    assert_eq!(plan(host).unwrap()["state"], "left-out");
}

fn is_used(host: &Host, endpoint: &str) -> Result<bool> {
    let all = rows(host, &["endpoints"])?;
    Ok(all.iter().any(|row| row["name"] == endpoint && row["state"] == "ready"))
}

#[test]
fn one_survivor_of_three_recovers_and_the_dead_return_one_by_one() {
    let lab = start_lab(3).unwrap();
    let (h1, h2, h3) = (&lab["h1"], &lab["h2"], &lab["h3"]);
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24", "--encrypted"]).unwrap();
    let a = attach(h1, "a", "blue", &[]).unwrap();
    attach(h2, "b", "blue", &[]).unwrap();
    let c = attach(h3, "c", "blue", &[]).unwrap();
    // Nothing is lost.
    assert_contains(&ctl_error(h1, &RECOVER).unwrap(), &["a majority of the 3 members is alive"]);
    assert_eq!(plan(h1).unwrap()["state"], "refused");
    assert_contains(&ctl_error(h1, &["recover", "--accept"]).unwrap(), &["was not left out"]);

    lose(&[h2, h3]);
    wait_until(SOON, "h2 and h3 to be dead", || -> Result<bool> {
        Ok(peer(h1, "h2")?["state"] == "dead" && peer(h1, "h3")?["state"] == "dead")
    })
    .unwrap();
    assert_contains(&ctl_error(h1, &RECOVER).unwrap(), &["answered less than 30 s ago"]);
    wait_possible(h1);
    let seen = plan(h1).unwrap();
    assert_eq!(strings(&seen["costs"]).len(), 4, "{seen}");
    // Without a confirmation, or with a wrong one.
    let asked = h1.ctl(&["recover", "--from-majority-loss"]).unwrap();
    assert_eq!(asked.code(), Some(2));
    assert_contains(&asked.stderr, &["h2", "given up", "What it may cost", "--lost COUNT"]);
    let wrong = h1.ctl(&["recover", "--from-majority-loss", "--yes", "--lost", "1"]).unwrap();
    assert_eq!(wrong.code(), Some(1));
    assert_contains(&wrong.stderr, &["nothing was changed: 2 hosts"]);
    assert_eq!(members(h1).unwrap(), 3);

    let done = h1.ctl_json(&RECOVER).unwrap();
    assert_eq!((&done["state"], done["members"].as_array().unwrap().len()), (&Value::from("recovered"), 1));
    assert_eq!(strings(&done["last"]["survivors"]), ["h1"]);
    wait_members(h1, 1);
    // Once more changes nothing.
    let again = h1.ctl_json(&RECOVER).unwrap();
    assert_eq!((&again["state"], &again["version"]), (&done["state"], &done["version"]));
    // It agrees with itself: more addresses than its block had.
    for index in 0..9 {
        attach(h1, &format!("m{index}"), "blue", &[]).unwrap();
    }
    h1.restart().unwrap();
    h1.wait_ready(SOON).unwrap();
    assert_eq!(members(h1).unwrap(), 1);

    for host in [h2, h3] {
        bring_back(&[host]);
        assert_left_out(host, "blue", "late");
        let advice = format!("ovlctl peers admit {}", id(host));
        wait_recovered_problem(h1, &[host.name(), "is not a member", "ovlctl recover --accept", &advice]);
        host.restart().unwrap();
        assert_left_out(host, "blue", "later");
    }
    assert_eq!(members(h1).unwrap(), 1);
    assert!(!is_used(h1, "b").unwrap() && !is_used(h1, "c").unwrap());

    // They return when both sides say so.
    for (host, count) in [(h2, 2), (h3, 3)] {
        host.ctl_ok(&["recover", "--accept", "--yes"]).unwrap();
        wait_problem(host, &["not admitted", "ovlctl peers admit"], SOON).unwrap();
        h1.ctl_ok(&["peers", "admit", &id(host)]).unwrap();
        host.wait_ready(SOON).unwrap();
        wait_members(h1, count);
    }
    lab.wait_all_alive(SOON).unwrap();
    // h1 has the block of b now, and c has its block again.
    wait_problem(h2, &["endpoint b is cut off"], SOON).unwrap();
    ping_all_pairs(&[a.clone(), c], SOON).unwrap();
    h2.ctl_ok(&["detach", "b"]).unwrap();
    let d = attach(h2, "d", "blue", &[]).unwrap();
    let e = attach(h3, "e", "blue", &[]).unwrap();
    ping_all_pairs(&[a, d, e], SOON).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    // The records of those that returned say so.
    wait_until(SOON, "the problems of the recovery to end", || {
        let left = h1.ctl_json(&["status"])?["problems"].to_string();
        anyhow::ensure!(!left.contains("OVL-E037") && !left.contains("OVL-E022"), "{left}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn two_survivors_of_five_recover_through_a_crash_and_the_dead_return_together() {
    let lab = start_lab(5).unwrap();
    let [h1, h2, h3, h4, h5] = ["h1", "h2", "h3", "h4", "h5"].map(|name| &lab[name]);
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    let mut all = vec![attach(h1, "a", "blue", &[]).unwrap(), attach(h2, "b", "blue", &[]).unwrap()];
    attach(h3, "c", "blue", &[]).unwrap();
    lose(&[h3, h4, h5]);
    wait_possible(h1);
    wait_possible(h2);
    // The host that recovers is killed in the middle of it, at whatever point that is.
    let confirmed = ["recover", "--from-majority-loss", "--yes", "--lost", "3"];
    let command = h1.ctl_spawn(&confirmed).unwrap();
    thread::sleep(Duration::from_millis(30));
    h1.kill9().unwrap();
    drop(command);
    h1.start().unwrap();
    wait_until(LOST, "h1 to recover, now or before", || {
        let output = h1.ctl(&confirmed)?;
        ensure!(output.code() == Some(0), "{}", output.stderr);
        Ok(())
    })
    .unwrap();
    for host in [h1, h2] {
        wait_until(LOST, &format!("{} to have 2 members", host.name()), || -> Result<bool> {
            Ok(members(host)? == 2)
        })
        .unwrap();
    }
    for index in 0..9 {
        all.push(attach(if index % 2 == 0 { h1 } else { h2 }, &format!("m{index}"), "blue", &[]).unwrap());
    }
    ping_all_pairs(&all[..4], SOON).unwrap();

    bring_back(&[h3, h4, h5]);
    for host in [h3, h4, h5] {
        assert_left_out(host, "blue", "late");
        wait_recovered_problem(h2, &[host.name(), "is not a member"]);
    }
    for host in [h1, h2] {
        assert_eq!(members(host).unwrap(), 2);
        assert!(!is_used(host, "c").unwrap());
    }
    all.push(attach(h2, "z", "blue", &[]).unwrap());
    ping_all_pairs(&all[..3], SOON).unwrap();
}

#[test]
fn majority_that_was_only_cut_off_goes_on_and_both_sides_say_so() {
    let lab = start_lab(3).unwrap();
    let (h1, h2, h3) = (&lab["h1"], &lab["h2"], &lab["h3"]);
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    lab.partition(&[&["h1"], &["h2", "h3"]]).unwrap();
    wait_possible(h1);
    assert_eq!(plan(h2).unwrap()["state"], "refused");
    h1.ctl_ok(&RECOVER).unwrap();
    wait_members(h1, 1);
    lab.heal().unwrap();
    for host in [h2, h3] {
        wait_recovered_problem(host, &["host h1", "a majority that is not lost", "two clusters"]);
        wait_recovered_problem(h1, &[host.name(), "is not a member"]);
        assert_eq!(members(host).unwrap(), 3);
    }
    let all = [attach(h2, "b", "blue", &[]).unwrap(), attach(h3, "c", "blue", &[]).unwrap()];
    ping_all_pairs(&all, SOON).unwrap();
    // A host of the majority that restarts goes on with the others.
    h3.restart().unwrap();
    h3.wait_ready(LOST).unwrap();
    wait_until(SOON, "h3 to agree", || {
        let plan = plan(h3)?;
        ensure!(plan["left_out"].is_null(), "{plan}");
        Ok(())
    })
    .unwrap();
    // What the problem says to do.
    let old = id(h1);
    h1.kill9().unwrap();
    h1.link_down().unwrap();
    wait_until(SOON, "h1 to be forgotten", || h2.ctl_ok(&["peers", "forget", &old]).map(drop)).unwrap();
    h1.link_up().unwrap();
    std::fs::remove_dir_all(h1.state_dir()).unwrap();
    restart_as_new(&lab, h1);
    h1.wait_ready(SOON).unwrap();
    wait_members(h2, 3);
    h2.ctl_ok(&["network", "inspect", "blue"]).unwrap();
}

/// Starts a host without state, which joins.
fn restart_as_new(lab: &Lab, host: &Host) {
    let peers: Vec<String> = lab
        .hosts()
        .iter()
        .filter(|other| other.name() != host.name())
        .map(|other| other.address().unwrap().to_string())
        .collect();
    let peers: Vec<&str> = peers.iter().map(String::as_str).collect();
    host.set_bootstrap(false).unwrap();
    host.set_join(&peers).unwrap();
    host.start().unwrap();
}
