//! Daemons that are stopped, killed and started again, while what they built goes on.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Signal, Workload, wait_until};
use ovl_tests::{
    Attached, Flow, SOON, attach, attach_workload, endpoints, make_network, peer, ping_all_pairs, rows,
    started, started_with, text, wait_clean, wait_endpoints,
};

const SECOND: Duration = Duration::from_secs(1);

/// Two hosts, a network, and an endpoint on each.
fn pair(config: LabConfig) -> (Lab, [Attached; 2]) {
    let lab = started_with(config).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    let all = [("h1", "a"), ("h2", "b")].map(|(host, name)| attach(&lab[host], name, "blue", &[]).unwrap());
    ping_all_pairs(&all, SOON).unwrap();
    (lab, all)
}

const BOTH_READY: [&str; 2] = ["a on h1 is ready", "b on h2 is ready"];

fn wait_state(host: &Host, other: &str, state: &str) {
    wait_until(SOON, &format!("{other} to be {state} on {}", host.name()), || {
        let row = peer(host, other)?;
        ensure!(row["state"] == state, "{row}");
        Ok(())
    })
    .unwrap();
}

/// Every host ready, seen alive by all others, and with nothing to repair.
fn wait_settled(lab: &Lab) {
    for host in lab.hosts().iter().filter(|host| host.is_running()) {
        host.wait_ready(SOON).unwrap();
    }
    lab.wait_all_alive(SOON).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

/// The host's ends of endpoints that are there; not those that a detach has left to be swept, which
/// a group of their own tells.
fn endpoint_devices(host: &Host) -> Result<BTreeSet<String>> {
    let links = host.ip_json(&["link", "show"])?;
    let links = links.as_array().into_iter().flatten().filter(|link| link["group"] == "default");
    let names = links.map(|link| text(&link["ifname"]));
    Ok(names.filter(|name| name.starts_with("ove-")).collect())
}

/// Whether a workload has an interface beside its loopback and what a detach has left to be swept.
fn is_connected(workload: &Workload) -> Result<bool> {
    let links = workload.ip_json(&["link", "show"])?;
    let mut names = links.as_array().into_iter().flatten().map(|link| text(&link["ifname"]));
    Ok(names.any(|name| name != "lo" && !name.starts_with("ovd-")))
}

#[test]
fn a_killed_daemon_costs_no_packet_and_its_entries_stay() {
    let (lab, [a, b]) = pair(LabConfig::hosts(2));
    let flows = [Flow::start(&a, &b).unwrap(), Flow::start(&b, &a).unwrap()];
    lab["h2"].kill9().unwrap();
    wait_state(&lab["h1"], "h2", "suspect");
    assert_eq!(endpoints(&lab["h1"]).unwrap(), BOTH_READY);
    wait_clean(&[lab["h1"].clone()], SOON).unwrap();
    lab["h2"].start().unwrap();
    wait_settled(&lab);
    for host in lab.hosts() {
        wait_endpoints(host, &BOTH_READY, SOON).unwrap();
    }
    for flow in flows {
        flow.finish_without_loss().unwrap();
    }
    // It has taken over what it finds, and can give it up.
    lab["h2"].ctl_ok(&["detach", "b"]).unwrap();
    assert!(!is_connected(&b.workload).unwrap() && endpoint_devices(&lab["h2"]).unwrap().is_empty());
}

#[test]
fn a_detach_frees_the_name_at_once_and_leaves_nothing_for_long_whoever_is_killed() {
    let (lab, [a, b]) = pair(LabConfig::hosts(2));
    let h2 = &lab["h2"];
    let only_lo = |workload: &Workload| -> Result<()> {
        let links = workload.ip_json(&["link", "show"])?;
        ensure!(links.as_array().is_some_and(|links| links.len() == 1), "{links}");
        Ok(())
    };
    // Again and again: the name is free each time, and the pairs of before are in nobody's way.
    for _ in 0..5 {
        h2.ctl_ok(&["detach", "b"]).unwrap();
        let links = b.workload.ip_json(&["link", "show"]).unwrap();
        let up = links.as_array().unwrap().iter().filter(|link| link["flags"].to_string().contains("\"UP\""));
        assert_eq!(up.map(|link| text(&link["ifname"])).collect::<Vec<_>>(), ["lo"], "{links}");
        wait_clean(std::slice::from_ref(h2), SOON).unwrap();
        let more = ["--ifname", "eth0"];
        let again = attach_workload(b.workload.clone(), "blue", &more).unwrap();
        again.workload.ping_until(a.address(), SOON).unwrap();
    }
    h2.ctl_ok(&["detach", "b"]).unwrap();
    h2.kill9().unwrap();
    h2.start().unwrap();
    wait_settled(&lab);
    wait_until(SOON, "the next daemon sweeps", || only_lo(&b.workload)).unwrap();
    assert!(
        h2.ip_json(&["link", "show"])
            .unwrap()
            .as_array()
            .is_some_and(|links| { links.iter().all(|link| !text(&link["ifname"]).starts_with("ove-")) })
    );
}

#[test]
fn a_stopped_daemon_ends_soon_says_that_it_restarts_and_costs_no_packet() {
    let (lab, [a, b]) = pair(LabConfig::hosts(2));
    let flows = [Flow::start(&a, &b).unwrap(), Flow::start(&b, &a).unwrap()];
    let took = lab["h2"].stop().unwrap();
    assert!(took < SECOND * 2, "{took:?}");
    assert!(lab["h2"].exit_status().unwrap().success());
    // It was announced: nobody has to miss it first.
    let announced = Instant::now();
    wait_state(&lab["h1"], "h2", "suspect");
    assert!(announced.elapsed() < SECOND, "{:?}", announced.elapsed());
    assert_eq!(endpoints(&lab["h1"]).unwrap(), BOTH_READY);
    lab["h2"].start().unwrap();
    wait_settled(&lab);
    for flow in flows {
        flow.finish_without_loss().unwrap();
    }
}

#[test]
fn a_daemon_started_while_its_peers_is_down_keeps_what_that_peer_owns() {
    let (lab, [a, b]) = pair(LabConfig::hosts(2));
    let flow = Flow::start(&a, &b).unwrap();
    // What was learnt less than a moment ago may be lost with the daemon.
    flow.go_on().unwrap();
    for host in lab.hosts() {
        host.kill9().unwrap();
    }
    lab["h1"].start().unwrap();
    // Ready: from here on it removes what should not be there.
    lab["h1"].wait_ready(SOON).unwrap();
    wait_state(&lab["h1"], "h2", "suspect");
    assert_eq!(endpoints(&lab["h1"]).unwrap(), BOTH_READY);
    wait_clean(lab.hosts(), SOON).unwrap();
    lab["h2"].start().unwrap();
    wait_settled(&lab);
    flow.finish_without_loss().unwrap();
}

#[test]
fn a_frozen_daemon_costs_no_packet_and_is_back_when_it_thaws() {
    let (lab, [a, b]) = pair(LabConfig::hosts(2));
    let flow = Flow::start(&a, &b).unwrap();
    lab["h2"].signal(Signal::SIGSTOP).unwrap();
    wait_state(&lab["h1"], "h2", "suspect");
    assert_eq!(endpoints(&lab["h1"]).unwrap(), BOTH_READY);
    let fresh = attach(&lab["h1"], "c", "blue", &[]).unwrap();
    lab["h2"].signal(Signal::SIGCONT).unwrap();
    wait_settled(&lab);
    wait_endpoints(&lab["h2"], &["a on h1 is ready", "b on h2 is ready", "c on h1 is ready"], SOON).unwrap();
    ping_all_pairs(&[fresh, b], SOON).unwrap();
    flow.finish_without_loss().unwrap();
}

#[test]
fn a_connection_to_the_outside_outlives_the_daemon() {
    let (lab, [a, _]) = pair(LabConfig::hosts(2));
    let outside = lab.switch();
    outside.exec_ok(["ip", "addr", "add", "192.168.77.250/24", "dev", "br0"]).unwrap();
    let echo = outside.tcp_echo(0).unwrap();
    a.workload.ping_until("192.168.77.250", SOON).unwrap();
    let connect = || TcpStream::connect(("192.168.77.250", echo.port()));
    let mut stream = a.workload.run(connect).unwrap().unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    let mut exchange = |text: &[u8]| -> std::io::Result<bool> {
        stream.write_all(text)?;
        let mut back = vec![0; text.len()];
        stream.read_exact(&mut back)?;
        Ok(back == text)
    };
    assert!(exchange(b"before").unwrap());
    lab["h1"].kill9().unwrap();
    assert!(exchange(b"between").unwrap());
    lab["h1"].start().unwrap();
    wait_settled(&lab);
    assert!(exchange(b"after").unwrap());
}

#[test]
fn all_daemons_restarted_at_once_keep_networks_endpoints_and_traffic() {
    let lab = started(3).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    make_network(&lab, "unused", &[]).unwrap();
    let all =
        [("h1", "a"), ("h2", "b"), ("h3", "c")].map(|(h, name)| attach(&lab[h], name, "blue", &[]).unwrap());
    ping_all_pairs(&all, SOON).unwrap();
    let before = rows(&lab["h2"], &["network", "ls"]).unwrap();
    let flows = [Flow::start(&all[0], &all[1]).unwrap(), Flow::start(&all[1], &all[2]).unwrap()];
    for host in lab.hosts() {
        host.kill9().unwrap();
    }
    for host in lab.hosts() {
        host.start().unwrap();
    }
    wait_settled(&lab);
    let expected = ["a on h1 is ready", "b on h2 is ready", "c on h3 is ready"];
    for host in lab.hosts() {
        wait_endpoints(host, &expected, SOON).unwrap();
        assert_eq!(rows(host, &["network", "ls"]).unwrap(), before);
    }
    for flow in flows {
        flow.finish_without_loss().unwrap();
    }
    let fresh = attach(&lab["h1"], "d", "blue", &[]).unwrap();
    assert!(all.iter().all(|each| each.address() != fresh.address()));
    ping_all_pairs(&[fresh, all[2].clone()], SOON).unwrap();
}

#[test]
fn networks_outlive_the_reboot_of_all_hosts_at_once() {
    let (lab, _all) = pair(LabConfig::hosts(2));
    let networks = |host: &Host| -> Vec<(String, String)> {
        let all = rows(host, &["network", "ls"]).unwrap();
        all.iter().map(|row| (text(&row["id"]), row["vni"].to_string())).collect()
    };
    let before = networks(&lab["h1"]);
    for host in lab.hosts() {
        host.destroy().unwrap();
    }
    for host in lab.hosts() {
        host.restore().unwrap();
        host.start().unwrap();
    }
    wait_settled(&lab);
    for host in lab.hosts() {
        assert_eq!(networks(host), before);
        // Endpoints end with the kernel that held them.
        wait_endpoints(host, &[], SOON).unwrap();
    }
    let again = [("h1", "a"), ("h2", "b")].map(|(h, name)| attach(&lab[h], name, "blue", &[]).unwrap());
    ping_all_pairs(&again, SOON).unwrap();
}

/// A sequence that looks random and is the same in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

#[test]
fn killed_at_any_moment_of_attaching_and_detaching_it_leaves_nothing_half_done() {
    let lab = started(2).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    let host = &lab["h1"];
    let far = attach(&lab["h2"], "far", "blue", &[]).unwrap();
    let workloads: Vec<Workload> =
        (0..6).map(|number| host.workload(&format!("w{number}")).unwrap()).collect();
    let mut random = Random(7);
    let mut left = 0;
    for round in 0..8 {
        // So many attaches and detaches, and then somewhere in the next ones.
        let (count, more) = (random.below(12), Duration::from_micros(random.below(8_000)));
        let done = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for each in &workloads {
                let done = &done;
                scope.spawn(move || {
                    let attach = ["attach", each.name(), "--network", "blue", "--netns", each.path_str()];
                    let detach = ["detach", each.name()];
                    let mut turn = is_connected(each).unwrap();
                    // Until the daemon is gone: what fails then is what this is about.
                    while host.is_running() {
                        let output = host.ctl(if turn { &detach } else { &attach }).unwrap();
                        done.fetch_add(u64::from(output.success()), Ordering::Relaxed);
                        turn = !turn;
                    }
                });
            }
            wait_until(SOON, "some attaches", || done.load(Ordering::Relaxed) >= count).unwrap();
            let begun = Instant::now();
            wait_until(SOON, "the moment", || begun.elapsed() >= more).unwrap();
            host.kill9().unwrap();
        });
        let moment = format!("in round {round}, killed {more:?} after {count} of them");
        host.start().unwrap();
        wait_settled(&lab);
        // What the daemon lists, the host's ends and the workloads' interfaces are the same.
        let listed = rows(host, &["endpoints", "--node", "h1"]).unwrap();
        let devices: BTreeSet<String> = listed.iter().map(|row| text(&row["device"])).collect();
        let names: BTreeSet<String> = listed.iter().map(|row| text(&row["name"])).collect();
        assert_eq!(endpoint_devices(host).unwrap(), devices, "{moment}");
        for each in &workloads {
            let connected = is_connected(each).unwrap();
            assert_eq!(connected, names.contains(each.name()), "{} {moment}", each.name());
        }
        let addresses: BTreeSet<String> = listed.iter().map(|row| row["addresses"].to_string()).collect();
        assert_eq!(addresses.len(), listed.len(), "{listed:?}");
        let expected: Vec<String> = endpoints(host).unwrap();
        let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
        wait_endpoints(&lab["h2"], &expected, SOON).unwrap();
        left += names.len();
        for each in workloads.iter().filter(|each| names.contains(each.name())) {
            each.ping_until(far.address(), SOON).unwrap();
        }
    }
    assert!(left > 0, "no endpoint was ever there when it was killed");
}

#[test]
fn an_endpoint_goes_with_its_namespace() {
    let (lab, [_, b]) = pair(LabConfig::hosts(2));
    b.workload.clone().destroy().unwrap();
    for host in lab.hosts() {
        wait_endpoints(host, &["a on h1 is ready"], SOON).unwrap();
    }
    assert!(endpoint_devices(&lab["h2"]).unwrap().is_empty());
    wait_clean(lab.hosts(), SOON).unwrap();
    let fdb = rows(&lab["h1"], &["fdb"]).unwrap();
    assert!(fdb.iter().all(|row| row["mac"] != b.json["mac"]), "{fdb:?}");
    // The detach that comes too late succeeds.
    lab["h2"].ctl_ok(&["detach", "b"]).unwrap();
}

#[test]
fn an_endpoint_whose_namespace_went_while_the_daemon_was_down_is_withdrawn() {
    let (lab, [a, b]) = pair(LabConfig::hosts(2));
    let second = attach(&lab["h2"], "c", "blue", &[]).unwrap();
    lab["h2"].kill9().unwrap();
    b.workload.clone().destroy().unwrap();
    // The device goes a moment later than the namespace's name.
    wait_until(SOON, "one device to be left", || {
        Ok::<_, anyhow::Error>(endpoint_devices(&lab["h2"])? == BTreeSet::from([second.device()]))
    })
    .unwrap();
    lab["h2"].start().unwrap();
    wait_settled(&lab);
    for host in lab.hosts() {
        wait_endpoints(host, &["a on h1 is ready", "c on h2 is ready"], SOON).unwrap();
    }
    ping_all_pairs(&[a, second], SOON).unwrap();
}

#[test]
fn a_network_is_removed_though_its_maker_is_gone_and_stays_removed_when_that_is_back() {
    let lab = started(3).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    make_network(&lab, "red", &["--subnet", "10.98.0.0/24"]).unwrap();
    lab["h1"].destroy().unwrap();
    wait_state(&lab["h2"], "h1", "dead");
    let names = |host: &Host| -> Result<Vec<String>> {
        Ok(rows(host, &["network", "ls"])?.iter().map(|row| text(&row["name"])).collect())
    };
    lab["h2"].ctl_ok(&["network", "rm", "blue"]).unwrap();
    lab["h1"].restore().unwrap();
    lab["h1"].start().unwrap();
    wait_settled(&lab);
    for host in lab.hosts() {
        wait_until(SOON, &format!("red alone on {}", host.name()), || {
            Ok::<_, anyhow::Error>(names(host)? == ["red"])
        })
        .unwrap();
    }
    // Its range is free for another.
    make_network(&lab, "green", &["--subnet", "10.99.0.0/24"]).unwrap();
}

#[test]
fn a_daemon_that_stays_away_is_given_up_after_the_time_configured() {
    let (lab, [a, b]) = pair(LabConfig::hosts(2).config("keep = \"2s\""));
    lab["h2"].stop().unwrap();
    wait_state(&lab["h1"], "h2", "suspect");
    assert_eq!(endpoints(&lab["h1"]).unwrap(), BOTH_READY);
    wait_state(&lab["h1"], "h2", "dead");
    wait_endpoints(&lab["h1"], &["a on h1 is ready", "b on h2 is suspended"], SOON).unwrap();
    let has_entry = || -> Result<bool> {
        let fdb = rows(&lab["h1"], &["fdb"])?;
        Ok(fdb.iter().any(|row| row["mac"] == b.json["mac"]))
    };
    wait_until(SOON, "the entry to go", || Ok::<_, anyhow::Error>(!has_entry()?)).unwrap();
    assert!(!a.workload.ping(b.address(), SECOND / 4));
    lab["h2"].start().unwrap();
    wait_settled(&lab);
    for host in lab.hosts() {
        wait_endpoints(host, &BOTH_READY, SOON).unwrap();
    }
    a.workload.ping_until(b.address(), SOON).context("after its return").unwrap();
}
