//! The CNI plugin with a daemon that is stopped, frozen, or killed during a call.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use netns_lab::{Lab, Signal, wait_until};
use ovl_tests::cni::{Conflist, Container, assert_refused, interfaces, wait_nothing_left};
use ovl_tests::{SOON, create_network, endpoints, start_lab, wait_endpoints};
use serde_json::{Value, json};

/// A lab with a routed network of both address families.
fn lab(hosts: usize) -> Lab {
    let lab = start_lab(hosts).unwrap();
    create_network(&lab, "pods", &["--mode", "l3", "--subnet", "10.99.0.0/16", "--subnet", "fd99::/48"])
        .unwrap();
    lab
}

#[test]
fn without_ovld_add_fails_at_once_and_del_is_queued() {
    let lab = lab(1);
    let host = &lab["h1"];
    let list = Conflist::new(host, "pods");
    let [a, b] = ["a", "b"].map(|name| Container::for_workload(&host.workload(name).unwrap()));
    for container in [&a, &b] {
        list.add(host, container).unwrap();
    }
    host.kill9().unwrap();
    let start = Instant::now();
    assert_refused(list.call_ovl(host, "ADD", &a).unwrap(), 11, &["systemctl start ovld"]);
    assert_refused(list.call_ovl(host, "STATUS", &a).unwrap(), 50, &["systemctl start ovld"]);
    assert_refused(list.call_ovl(host, "CHECK", &a).unwrap(), 11, &["systemctl start ovld"]);
    assert_refused(list.call_ovl(host, "GC", &a).unwrap(), 11, &["systemctl start ovld"]);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    // A DEL that does not identify an attachment cannot be queued.
    assert_refused(list.call_ovl(host, "DEL", &Container::new("", "")).unwrap(), 4, &["CNI_CONTAINERID"]);
    assert_refused(
        list.call_ovl(host, "DEL", &Container::new("../../x", "")).unwrap(),
        4,
        &["CNI_CONTAINERID"],
    );
    for container in [&a, &a.without_netns(), &a.interface("net9")] {
        list.del(host, container, None).unwrap();
    }
    let spool = host.run_dir().join("cni-deleted");
    let mut files: Vec<_> =
        fs::read_dir(&spool).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    assert_eq!(files, ["a-container:eth0:pods", "a-container:net9:pods"]);
    // Files of an earlier boot, with damaged content, or with another's name are dropped and do not affect the others.
    let del_of_b = fs::read_to_string(spool.join("a-container:eth0:pods"))
        .unwrap()
        .replace("a-container", "b-container");
    let mut earlier: Value = serde_json::from_str(&del_of_b).unwrap();
    earlier["boot_id"] = json!("another");
    fs::write(spool.join("b-container:eth0:pods"), earlier.to_string()).unwrap();
    fs::write(spool.join("nonsense"), "nonsense").unwrap();
    fs::write(spool.join("misnamed"), del_of_b).unwrap();
    host.start().unwrap();
    // Queued DELs are executed before the first answer.
    let first = wait_until(SOON, "an answer of ovld", || endpoints(host).map(Some)).unwrap();
    assert_eq!(first, ["b-container on h1 is ready"]);
    assert!(interfaces(&host.find_workload("a").unwrap()).unwrap().is_empty());
    assert_eq!(fs::read_dir(&spool).unwrap().count(), 0);
    host.wait_ready(SOON).unwrap();
    let result = list.add(host, &a).unwrap();
    list.check(host, &a, &result).unwrap();
    // A DEL that is queued while ovld runs is executed too, at the latest before the next ADD.
    let file = json!({ "boot_id": fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap().trim(),
        "call": { "command": "DEL", "container_id": a.id, "ifname": "eth0", "config": { "cniVersion": "1.1.0", "name": "pods" } } });
    fs::write(spool.join("a-container:eth0:pods"), file.to_string()).unwrap();
    let again = list.add(host, &a).unwrap();
    list.check(host, &a, &again).unwrap();
    fs::write(spool.join("a-container:eth0:pods"), file.to_string()).unwrap();
    wait_endpoints(host, &["b-container on h1 is ready"], SOON).unwrap();
    list.del(host, &b, None).unwrap();
    wait_nothing_left(host).unwrap();
}

#[test]
fn calls_to_a_frozen_ovld_time_out() {
    let lab = lab(1);
    let host = &lab["h1"];
    let list = Conflist::new(host, "pods");
    let [a, b] = ["a", "b"].map(|name| Container::for_workload(&host.workload(name).unwrap()));
    list.add(host, &a).unwrap();
    host.signal(Signal::SIGSTOP).unwrap();
    thread::scope(|scope| {
        let call = |command: &'static str, container| {
            let list = &list;
            scope.spawn(move || list.call_ovl(host, command, container).unwrap())
        };
        let (add, del, status) = (call("ADD", &b), call("DEL", &a), call("STATUS", &a));
        assert_refused(status.join().unwrap(), 50, &["did not reply within 5 s"]);
        del.join().unwrap().result().unwrap();
        assert_refused(add.join().unwrap(), 11, &["did not reply within 30 s"]);
    });
    assert!(host.run_dir().join("cni-deleted/a-container:eth0:pods").exists());
    host.signal(Signal::SIGCONT).unwrap();
    // The runtime rolls back the failed ADD.
    list.del(host, &b, None).unwrap();
    wait_nothing_left(host).unwrap();
}

#[test]
fn kill_of_ovld_during_calls_leaves_no_state() {
    let lab = lab(1);
    let host = &lab["h1"];
    let list = Conflist::new(host, "pods");
    let workloads = host.bare_workloads("w", 4).unwrap();
    let containers: Vec<_> = workloads.iter().map(Container::for_workload).collect();
    let mut interrupted = [0, 0];
    for round in 0..16u64 {
        let in_add = round % 2 == 0;
        if !in_add {
            for container in &containers {
                list.add(host, container).unwrap();
            }
        }
        thread::scope(|scope| {
            let calls: Vec<_> = containers
                .iter()
                .map(|container| {
                    scope
                        .spawn(|| list.call_ovl(host, if in_add { "ADD" } else { "DEL" }, container).unwrap())
                })
                .collect();
            // The time of the kill is the parameter under test, so this sleep waits for no condition.
            thread::sleep(Duration::from_millis(round));
            host.kill9().unwrap();
            for call in calls {
                let ran = call.join().unwrap();
                if in_add && ran.code != Some(0) {
                    interrupted[0] += 1;
                    assert_refused(ran, 11, &["ovld"]);
                } else if !in_add {
                    // A DEL succeeds whether or not ovld executes it.
                    ran.result().unwrap();
                }
            }
        });
        interrupted[1] += fs::read_dir(host.run_dir().join("cni-deleted")).map_or(0, Iterator::count);
        if round % 4 < 2 {
            host.start().unwrap();
            wait_until(SOON, "an answer of ovld", || endpoints(host).map(drop)).unwrap();
        }
        if in_add {
            for container in &containers {
                list.del(host, container, None).unwrap();
            }
        }
        if !host.is_running() {
            host.start().unwrap();
        }
        host.wait_ready(SOON).unwrap();
        wait_nothing_left(host).unwrap();
        for workload in &workloads {
            assert!(interfaces(workload).unwrap().is_empty());
        }
    }
    // The kill did interrupt calls, of both kinds.
    assert!(interrupted.iter().all(|count| *count > 0), "{interrupted:?}");
}

#[test]
fn unrecorded_interface_can_be_detached_and_attached_after_a_restart() {
    let lab = lab(1);
    let host = &lab["h1"];
    let list = Conflist::new(host, "pods");
    let workload = host.workload("a").unwrap();
    let container = Container::for_workload(&workload);
    list.add(host, &container).unwrap();
    host.kill9().unwrap();
    // As if ovld was killed before it wrote the endpoint's file.
    for file in fs::read_dir(host.run_dir().join("endpoints")).unwrap() {
        fs::remove_file(file.unwrap().path()).unwrap();
    }
    host.start().unwrap();
    wait_until(SOON, "an answer of ovld", || endpoints(host).map(drop)).unwrap();
    list.del(host, &container, None).unwrap();
    wait_until(SOON, "h1 to be a member", || list.call_ovl(host, "STATUS", &container)?.result().map(drop))
        .unwrap();
    list.add(host, &container).unwrap();
    list.del(host, &container, None).unwrap();
    wait_nothing_left(host).unwrap();
}
