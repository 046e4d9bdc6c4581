//! Daemons that are stopped, killed, frozen and started again while the data plane keeps working.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Signal, Workload, wait_until};
use ovl_tests::{
    Attached, Flow, SOON, assert_no_reply, attach, attach_workload, create_network, endpoints, peer,
    ping_all_pairs, rows, start_lab, start_lab_with, text, wait_clean, wait_endpoints,
};

const SECOND: Duration = Duration::from_secs(1);

/// Two hosts, a network, and an endpoint on each host.
fn pair(config: LabConfig) -> (Lab, [Attached; 2]) {
    let lab = start_lab_with(config).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    let all = [("h1", "a"), ("h2", "b")].map(|(host, name)| attach(&lab[host], name, "blue", &[]).unwrap());
    ping_all_pairs(&all, SOON).unwrap();
    (lab, all)
}

/// Waits until a host has cached a peer's endpoint on disk: the cached table contains its MAC address.
fn wait_cached(host: &Host, endpoint: &Attached) -> Result<()> {
    let bytes =
        endpoint.mac().split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<Vec<_>, _>>()?;
    wait_until(SOON, &format!("{} to cache endpoint {}", host.name(), endpoint.name), || -> Result<bool> {
        let mut tables = std::fs::read_dir(host.run_dir().join("tables"))?;
        Ok(tables.any(|file| {
            let table = file.and_then(|file| std::fs::read(file.path())).unwrap_or_default();
            table.windows(bytes.len()).any(|part| part == bytes)
        }))
    })
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

/// Waits until every running host is ready, seen alive by all others, and clean.
fn wait_settled(lab: &Lab) {
    for host in lab.hosts().iter().filter(|host| host.is_running()) {
        host.wait_ready(SOON).unwrap();
    }
    lab.wait_all_alive(SOON).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

/// Host side interfaces of endpoints, without those of detached endpoints, which are in an interface group of their own
/// until they are deleted.
fn endpoint_devices(host: &Host) -> Result<BTreeSet<String>> {
    let links = host.ip_json(&["link", "show"])?;
    let links = links.as_array().into_iter().flatten().filter(|link| link["group"] == "default");
    let names = links.map(|link| text(&link["ifname"]));
    Ok(names.filter(|name| name.starts_with("ove-")).collect())
}

/// Whether a workload has an interface, apart from its loopback and interfaces of detached endpoints.
fn is_connected(workload: &Workload) -> Result<bool> {
    let links = workload.ip_json(&["link", "show"])?;
    let mut names = links.as_array().into_iter().flatten().map(|link| text(&link["ifname"]));
    Ok(names.any(|name| name != "lo" && !name.starts_with("ovd-")))
}

#[test]
fn kill_of_a_daemon_loses_no_packet_and_keeps_its_entries() {
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
    // The new daemon has taken over the endpoint, and can detach it.
    lab["h2"].ctl_ok(&["detach", "b"]).unwrap();
    assert!(!is_connected(&b.workload).unwrap() && endpoint_devices(&lab["h2"]).unwrap().is_empty());
}

#[test]
fn detach_frees_the_name_at_once_and_is_completed_after_a_kill() {
    let (lab, [a, b]) = pair(LabConfig::hosts(2));
    let h2 = &lab["h2"];
    let only_lo = |workload: &Workload| -> Result<()> {
        let links = workload.ip_json(&["link", "show"])?;
        ensure!(links.as_array().is_some_and(|links| links.len() == 1), "{links}");
        Ok(())
    };
    // The name is free each time, and interfaces of previous attaches do not conflict.
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
    wait_until(SOON, "the next daemon to delete the interface", || only_lo(&b.workload)).unwrap();
    assert!(
        h2.ip_json(&["link", "show"])
            .unwrap()
            .as_array()
            .is_some_and(|links| { links.iter().all(|link| !text(&link["ifname"]).starts_with("ove-")) })
    );
}

#[test]
fn stop_of_a_daemon_is_quick_and_announced_and_loses_no_packet() {
    let (lab, [a, b]) = pair(LabConfig::hosts(2));
    let flows = [Flow::start(&a, &b).unwrap(), Flow::start(&b, &a).unwrap()];
    let took = lab["h2"].stop().unwrap();
    assert!(took < SECOND * 2, "{took:?}");
    assert!(lab["h2"].exit_status().unwrap().success());
    // The bound proves that the stop was announced: failure detection alone takes longer.
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
fn daemon_started_while_its_peer_is_down_keeps_the_peers_endpoints() {
    let (lab, [a, b]) = pair(LabConfig::hosts(2));
    let flow = Flow::start(&a, &b).unwrap();
    // The tables of peers are cached shortly after they arrive.
    wait_cached(&lab["h1"], &b).unwrap();
    wait_cached(&lab["h2"], &a).unwrap();
    for host in lab.hosts() {
        host.kill9().unwrap();
    }
    lab["h1"].start().unwrap();
    // From here on, it deletes unwanted objects.
    lab["h1"].wait_ready(SOON).unwrap();
    wait_state(&lab["h1"], "h2", "suspect");
    assert_eq!(endpoints(&lab["h1"]).unwrap(), BOTH_READY);
    wait_clean(lab.hosts(), SOON).unwrap();
    lab["h2"].start().unwrap();
    wait_settled(&lab);
    flow.finish_without_loss().unwrap();
}

#[test]
fn freeze_of_a_daemon_loses_no_packet_and_it_recovers() {
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
fn connection_to_the_outside_survives_a_kill_of_the_daemon() {
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
    assert!(exchange(b"during").unwrap());
    lab["h1"].start().unwrap();
    wait_settled(&lab);
    assert!(exchange(b"after").unwrap());
}

#[test]
fn kill_of_all_daemons_at_once_keeps_networks_endpoints_and_traffic() {
    let lab = start_lab(3).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    create_network(&lab, "unused", &[]).unwrap();
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
        // Until members of multicast groups had time to answer, all of it goes to all hosts.
        wait_until(SOON, "the networks of before", || {
            let networks = rows(host, &["network", "ls"])?;
            ensure!(networks == before, "{networks:?}");
            Ok(())
        })
        .unwrap();
    }
    for flow in flows {
        flow.finish_without_loss().unwrap();
    }
    let fresh = attach(&lab["h1"], "d", "blue", &[]).unwrap();
    assert!(all.iter().all(|each| each.address() != fresh.address()));
    ping_all_pairs(&[fresh, all[2].clone()], SOON).unwrap();
}

#[test]
fn networks_survive_a_reboot_of_all_hosts_at_once() {
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
        // Endpoints do not survive a reboot.
        wait_endpoints(host, &[], SOON).unwrap();
    }
    let again = [("h1", "a"), ("h2", "b")].map(|(h, name)| attach(&lab[h], name, "blue", &[]).unwrap());
    ping_all_pairs(&again, SOON).unwrap();
}

/// A pseudorandom sequence, the same in every run.
struct Pseudorandom(u64);

impl Pseudorandom {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

#[test]
fn kill_during_attaches_and_detaches_leaves_nothing_half_done() {
    let lab = start_lab(2).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    let host = &lab["h1"];
    let far = attach(&lab["h2"], "far", "blue", &[]).unwrap();
    let workloads: Vec<Workload> =
        (0..6).map(|number| host.workload(&format!("w{number}")).unwrap()).collect();
    let mut random = Pseudorandom(7);
    let mut left = 0;
    for round in 0..8 {
        // Kill the daemon after this many attaches and detaches, and this much later.
        let (count, more) = (random.below(12), Duration::from_micros(random.below(8_000)));
        let done = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for each in &workloads {
                let done = &done;
                scope.spawn(move || {
                    let attach = ["attach", each.name(), "--network", "blue", "--netns", each.path_str()];
                    let detach = ["detach", each.name()];
                    let mut attached = is_connected(each).unwrap();
                    // Until the daemon is gone: calls that fail during the kill are what this test is about.
                    while host.is_running() {
                        let output = host.ctl(if attached { &detach } else { &attach }).unwrap();
                        done.fetch_add(u64::from(output.success()), Ordering::Relaxed);
                        attached = !attached;
                    }
                });
            }
            wait_until(SOON, "some attaches", || done.load(Ordering::Relaxed) >= count).unwrap();
            // The time of the kill is the parameter under test, so this sleep waits for no condition.
            std::thread::sleep(more);
            host.kill9().unwrap();
        });
        let moment = format!("round {round}, kill {more:?} after {count} calls");
        host.start().unwrap();
        wait_settled(&lab);
        // The daemon's list, the host's interfaces and the workloads' interfaces agree.
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
    assert!(left > 0, "no kill left an endpoint");
}

#[test]
fn endpoint_is_deleted_with_its_namespace() {
    let (lab, [_, b]) = pair(LabConfig::hosts(2));
    b.workload.clone().destroy().unwrap();
    for host in lab.hosts() {
        wait_endpoints(host, &["a on h1 is ready"], SOON).unwrap();
    }
    assert!(endpoint_devices(&lab["h2"]).unwrap().is_empty());
    wait_clean(lab.hosts(), SOON).unwrap();
    let fdb = rows(&lab["h1"], &["fdb"]).unwrap();
    assert!(fdb.iter().all(|row| row["mac"] != b.json["mac"]), "{fdb:?}");
    // A late detach succeeds.
    lab["h2"].ctl_ok(&["detach", "b"]).unwrap();
}

#[test]
fn endpoint_whose_namespace_was_deleted_while_the_daemon_was_down_is_withdrawn() {
    let (lab, [a, b]) = pair(LabConfig::hosts(2));
    let second = attach(&lab["h2"], "c", "blue", &[]).unwrap();
    lab["h2"].kill9().unwrap();
    b.workload.clone().destroy().unwrap();
    // The kernel deletes the device shortly after the namespace.
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
fn network_removed_while_its_creator_is_dead_stays_removed() {
    let lab = start_lab(3).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.99.0.0/24"]).unwrap();
    create_network(&lab, "red", &["--subnet", "10.98.0.0/24"]).unwrap();
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
        wait_until(SOON, &format!("{} to list only red", host.name()), || {
            Ok::<_, anyhow::Error>(names(host)? == ["red"])
        })
        .unwrap();
    }
    // The subnet is free for another network.
    create_network(&lab, "green", &["--subnet", "10.99.0.0/24"]).unwrap();
}

#[test]
fn stopped_daemon_is_declared_dead_after_the_configured_time() {
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
    wait_until(SOON, "the FDB entry to be withdrawn", || Ok::<_, anyhow::Error>(!has_entry()?)).unwrap();
    assert_no_reply(&a.workload, &b.address());
    lab["h2"].start().unwrap();
    wait_settled(&lab);
    for host in lab.hosts() {
        wait_endpoints(host, &BOTH_READY, SOON).unwrap();
    }
    a.workload.ping_until(b.address(), SOON).context("after its return").unwrap();
}
