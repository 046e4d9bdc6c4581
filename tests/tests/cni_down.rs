//! The CNI plugin with a daemon that is down, frozen, or killed in the middle of a call.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use netns_lab::{Lab, Signal, wait_until};
use ovl_tests::cni::{Conflist, Container, assert_refused, interfaces, wait_nothing_left};
use ovl_tests::{SOON, endpoints, make_network, started, wait_endpoints};
use serde_json::{Value, json};

/// Hosts with a network of both address families.
fn lab(hosts: usize) -> Lab {
    let lab = started(hosts).unwrap();
    make_network(&lab, "pods", &["--mode", "l3", "--subnet", "10.99.0.0/16", "--subnet", "fd99::/48"])
        .unwrap();
    lab
}

#[test]
fn without_ovld_an_add_fails_at_once_and_a_del_is_remembered() {
    let lab = lab(1);
    let host = &lab["h1"];
    let list = Conflist::new(host, "pods");
    let [a, b] = ["a", "b"].map(|name| Container::of(&host.workload(name).unwrap()));
    for container in [&a, &b] {
        list.add(host, container).unwrap();
    }
    host.kill9().unwrap();
    let start = Instant::now();
    assert_refused(list.ask(host, "ADD", &a).unwrap(), 11, &["systemctl start ovld"]);
    assert_refused(list.ask(host, "STATUS", &a).unwrap(), 50, &["systemctl start ovld"]);
    assert_refused(list.ask(host, "CHECK", &a).unwrap(), 11, &["systemctl start ovld"]);
    assert_refused(list.ask(host, "GC", &a).unwrap(), 11, &["systemctl start ovld"]);
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());
    // A DEL that does not identify an attachment cannot be stored.
    assert_refused(list.ask(host, "DEL", &Container::new("", "")).unwrap(), 4, &["CNI_CONTAINERID"]);
    assert_refused(list.ask(host, "DEL", &Container::new("../../x", "")).unwrap(), 4, &["CNI_CONTAINERID"]);
    for container in [&a, &a.without_netns(), &a.interface("net9")] {
        list.del(host, container, None).unwrap();
    }
    let spool = host.run_dir().join("cni-deleted");
    let mut files: Vec<_> =
        fs::read_dir(&spool).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    files.sort();
    assert_eq!(files, ["a-container:eth0:pods", "a-container:net9:pods"]);
    // One of an earlier boot, one that is damaged, one that is for something else: no harm to others.
    let of_b = fs::read_to_string(spool.join("a-container:eth0:pods"))
        .unwrap()
        .replace("a-container", "b-container");
    let mut earlier: Value = serde_json::from_str(&of_b).unwrap();
    earlier["boot_id"] = json!("another");
    fs::write(spool.join("b-container:eth0:pods"), earlier.to_string()).unwrap();
    fs::write(spool.join("nonsense"), "nonsense").unwrap();
    fs::write(spool.join("misnamed"), of_b).unwrap();
    host.start().unwrap();
    // Carried out before the first answer.
    let first = wait_until(SOON, "an answer", || endpoints(host).map(Some)).unwrap();
    assert_eq!(first, ["b-container on h1 is ready"]);
    assert!(interfaces(&host.find_workload("a").unwrap()).unwrap().is_empty());
    assert_eq!(fs::read_dir(&spool).unwrap().count(), 0);
    host.wait_ready(SOON).unwrap();
    let result = list.add(host, &a).unwrap();
    list.check(host, &a, &result).unwrap();
    // One that comes to lie there while ovld runs is carried out too; before an ADD at the latest.
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
fn an_ovld_that_does_not_answer_holds_nobody_up_for_ever() {
    let lab = lab(1);
    let host = &lab["h1"];
    let list = Conflist::new(host, "pods");
    let [a, b] = ["a", "b"].map(|name| Container::of(&host.workload(name).unwrap()));
    list.add(host, &a).unwrap();
    host.signal(Signal::SIGSTOP).unwrap();
    thread::scope(|scope| {
        let ask = |command: &'static str, container| {
            let list = &list;
            scope.spawn(move || list.ask(host, command, container).unwrap())
        };
        let (add, del, status) = (ask("ADD", &b), ask("DEL", &a), ask("STATUS", &a));
        assert_refused(status.join().unwrap(), 50, &["did not reply within 5 s"]);
        del.join().unwrap().result().unwrap();
        assert_refused(add.join().unwrap(), 11, &["did not reply within 30 s"]);
    });
    assert!(host.run_dir().join("cni-deleted/a-container:eth0:pods").exists());
    host.signal(Signal::SIGCONT).unwrap();
    // The runtime takes back what failed.
    list.del(host, &b, None).unwrap();
    wait_nothing_left(host).unwrap();
}

#[test]
fn ovld_killed_in_the_middle_leaves_nothing() {
    let lab = lab(1);
    let host = &lab["h1"];
    let list = Conflist::new(host, "pods");
    let workloads = host.bare_workloads("w", 4).unwrap();
    let containers: Vec<_> = workloads.iter().map(Container::of).collect();
    let mut ended = [0, 0];
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
                    scope.spawn(|| list.ask(host, if in_add { "ADD" } else { "DEL" }, container).unwrap())
                })
                .collect();
            // The moment at which it ends is what is tried out here: nothing is waited for.
            thread::sleep(Duration::from_millis(round));
            host.kill9().unwrap();
            for call in calls {
                let ran = call.join().unwrap();
                if in_add && ran.code != Some(0) {
                    ended[0] += 1;
                    assert_refused(ran, 11, &["ovld"]);
                } else if !in_add {
                    // It succeeds whatever becomes of ovld.
                    ran.result().unwrap();
                }
            }
        });
        ended[1] += fs::read_dir(host.run_dir().join("cni-deleted")).map_or(0, Iterator::count);
        if round % 4 < 2 {
            host.start().unwrap();
            wait_until(SOON, "an answer", || endpoints(host).map(drop)).unwrap();
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
    // It did come in between, both ways.
    assert!(ended.iter().all(|count| *count > 0), "{ended:?}");
}

#[test]
fn a_half_made_interface_is_no_hindrance_after_a_restart() {
    let lab = lab(1);
    let host = &lab["h1"];
    let list = Conflist::new(host, "pods");
    let workload = host.workload("a").unwrap();
    let container = Container::of(&workload);
    list.add(host, &container).unwrap();
    host.kill9().unwrap();
    // As if it had ended before it could write down what it made.
    for file in fs::read_dir(host.run_dir().join("endpoints")).unwrap() {
        fs::remove_file(file.unwrap().path()).unwrap();
    }
    host.start().unwrap();
    wait_until(SOON, "an answer", || endpoints(host).map(drop)).unwrap();
    list.del(host, &container, None).unwrap();
    wait_until(SOON, "to be a member", || list.ask(host, "STATUS", &container)?.result().map(drop)).unwrap();
    list.add(host, &container).unwrap();
    list.del(host, &container, None).unwrap();
    wait_nothing_left(host).unwrap();
}
