//! Hosts with wrong clocks.
//!
//! A namespace does not have a wall clock of its own. Debug builds of ovld add what a file says to the clock.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::fs;

use anyhow::ensure;
use netns_lab::{Host, Lab, LabConfig, wait_until};
use ovl_tests::{
    SOON, assert_contains, attach, ctl_error, ping_all_pairs, wait_network, wait_no_problem, wait_problem,
};

/// Milliseconds of a day.
const DAY: i64 = 24 * 60 * 60 * 1000;

/// Makes the clock of a host wrong by this many milliseconds.
fn set_clock(host: &Host, ahead_ms: i64) {
    fs::write(host.dir().join("clock"), ahead_ms.to_string()).unwrap();
}

/// Creates a lab whose hosts' clocks can be set.
fn lab(hosts: usize) -> Lab {
    let lab = Lab::new(LabConfig::hosts(hosts)).unwrap();
    for host in lab.hosts() {
        let file = host.dir().join("clock");
        host.set_env(&[("OVL_TEST_CLOCK", file.to_str().unwrap())]).unwrap();
    }
    lab
}

fn create(host: &Host, name: &str, subnet: &str) {
    host.ctl_ok(&["network", "create", name, "--subnet", subnet]).unwrap();
}

fn wait_no_problems(lab: &Lab) {
    lab.hosts().iter().for_each(|host| wait_no_problem(host, SOON).unwrap());
}

#[test]
fn what_a_host_wrote_with_its_clock_ahead_is_known_to_all_once_it_is_right() {
    let lab = lab(3);
    let h1 = &lab["h1"];
    set_clock(h1, 3 * DAY);
    h1.start().unwrap();
    h1.wait_ready(SOON).unwrap();
    create(h1, "early", "10.1.0.0/24");
    set_clock(h1, 0);
    create(h1, "late", "10.2.0.0/24");
    lab.start_all().unwrap();
    for host in lab.hosts() {
        wait_network(host, "early").unwrap();
        wait_network(host, "late").unwrap();
    }
    // Both directions, and with the traffic of the network that was unknown.
    lab["h2"].ctl_ok(&["network", "update", "early", "--mtu", "1400"]).unwrap();
    let all = [attach(h1, "a", "early", &[]).unwrap(), attach(&lab["h3"], "b", "early", &[]).unwrap()];
    ping_all_pairs(&all, SOON).unwrap();
    wait_no_problems(&lab);
}

#[test]
fn host_whose_clock_is_ahead_refuses_changes_and_all_say_by_how_much() {
    let lab = lab(3);
    lab.start_all().unwrap();
    let (h1, h3) = (&lab["h1"], &lab["h3"]);
    create(h1, "blue", "10.1.0.0/24");
    wait_network(h3, "blue").unwrap();
    set_clock(h3, 2 * DAY);
    let own = wait_problem(h3, &["the clock of this host is 2 days ahead of that of", "timedatectl"], SOON)
        .unwrap();
    assert_contains(&own, &["cannot be changed here"]);
    wait_problem(h1, &["the clock of h3 is 2 days ahead"], SOON).unwrap();
    for args in [
        &["network", "create", "red"][..],
        &["network", "update", "blue", "--mtu", "1400"],
        &["network", "rm", "blue"],
    ] {
        let error = ctl_error(h3, args).unwrap();
        assert_contains(&error, &["nothing was changed", "2 days ahead", "timedatectl", "try again"]);
    }
    // What the others change reaches it, and endpoints are not affected.
    h1.ctl_ok(&["network", "update", "blue", "--mtu", "1400"]).unwrap();
    wait_until(SOON, "the MTU on h3", || {
        let network = h3.ctl_json(&["network", "inspect", "blue"])?;
        ensure!(network["mtu"] == 1400, "{network}");
        Ok(())
    })
    .unwrap();
    let all = [attach(h1, "a", "blue", &[]).unwrap(), attach(h3, "b", "blue", &[]).unwrap()];
    ping_all_pairs(&all, SOON).unwrap();
    set_clock(h3, 0);
    wait_no_problems(&lab);
    create(h3, "red", "10.3.0.0/24");
    wait_network(h1, "red").unwrap();
}

#[test]
fn two_hosts_that_disagree_both_say_so_and_agree_again_without_a_restart() {
    let lab = lab(2);
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    set_clock(h1, 3650 * DAY);
    h1.start().unwrap();
    h1.wait_ready(SOON).unwrap();
    create(h1, "early", "10.1.0.0/24");
    h2.start().unwrap();
    wait_problem(h1, &["the clock of h2 is 10 years behind", "no majority"], SOON).unwrap();
    wait_problem(h2, &["the clock of h1 is 10 years ahead", "no majority"], SOON).unwrap();
    wait_problem(h2, &["network early of h1 is refused and unknown here", "10 years"], SOON).unwrap();
    wait_problem(h1, &["other hosts refuse", "10 years"], SOON).unwrap();
    assert_contains(&ctl_error(h1, &["network", "create", "no"]).unwrap(), &["10 years ahead of that of h2"]);
    create(h2, "second", "10.2.0.0/24");
    wait_network(h1, "second").unwrap();
    set_clock(h1, 0);
    wait_network(h2, "early").unwrap();
    wait_no_problems(&lab);
}

#[test]
fn host_that_starts_in_1970_takes_networks_and_writes_what_others_take() {
    let lab = lab(2);
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    h1.start().unwrap();
    h1.wait_ready(SOON).unwrap();
    create(h1, "blue", "10.1.0.0/24");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    set_clock(h2, -i64::try_from(now.as_millis()).unwrap());
    h2.start().unwrap();
    wait_network(h2, "blue").unwrap();
    wait_problem(h2, &["never set", "1970-01-01", "timedatectl"], SOON).unwrap();
    create(h2, "red", "10.2.0.0/24");
    wait_network(h1, "red").unwrap();
    h2.ctl_ok(&["network", "rm", "blue"]).unwrap();
    wait_until(SOON, "blue to be gone on h1", || ctl_error(h1, &["network", "inspect", "blue"]).map(drop))
        .unwrap();
    set_clock(h2, 0);
    wait_no_problems(&lab);
}
