//! How soon a host that has just been admitted exchanges packets with all others, across NAT.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use netns_lab::{Host, Lab, LabConfig, wait_until};
use ovl_tests::{Attached, SOON, attach};

/// Kinds of NAT, by the presets of the lab. The first host is public.
const KINDS: [&str; 6] =
    ["firewall", "full-cone", "port-restricted", "symmetric", "cgn-symmetric", "symmetric"];

/// Returns how long after `since` each of the others answered the first time.
fn first_answers(from: &Attached, others: &[Attached], since: Instant) -> Vec<Duration> {
    let first = |to: &Attached| {
        let ping = from.workload.spawn(["ping", "-n", "-i", "0.02", "-w", "10", &to.address()]).unwrap();
        wait_until(SOON, "an answer", || -> Result<()> {
            ensure!(ping.stdout().contains("bytes from"), "{}", ping.stdout());
            Ok(())
        })
        .unwrap();
        since.elapsed()
    };
    thread::scope(|scope| {
        let threads: Vec<_> = others.iter().map(|to| scope.spawn(move || first(to))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Starts a host, and returns when it was admitted.
fn admitted(host: &Host) -> Instant {
    host.start().unwrap();
    wait_until(SOON, "the host to be admitted", || host.log().contains("admitted to the cluster")).unwrap();
    Instant::now()
}

#[test]
#[ignore = "a measurement"]
fn time_from_admission_to_the_first_packet_of_each_pair() {
    for last in KINDS {
        let config = KINDS
            .iter()
            .chain([&last])
            .enumerate()
            .fold(LabConfig::hosts(KINDS.len() + 2), |config, (index, kind)| {
                config.access(&format!("h{}", index + 2), kind.parse().unwrap())
            });
        let lab = Lab::new(config).unwrap();
        let (new, old) = lab.hosts().split_last().unwrap();
        for host in old {
            host.start().unwrap();
        }
        for host in old {
            host.wait_ready(SOON).unwrap();
        }
        let create = ["network", "create", "pods", "--mode", "l3", "--encrypted", "--subnet", "10.60.0.0/16"];
        old[0].ctl_ok(&create).unwrap();
        for host in old {
            let known = || host.ctl_ok(&["network", "inspect", "pods"]).map(drop);
            wait_until(SOON, "the network to be known", known).unwrap();
        }
        let others: Vec<Attached> =
            old.iter().map(|host| attach(host, &format!("p{}", host.name()), "pods", &[]).unwrap()).collect();
        let since = admitted(new);
        let own = attach(new, "new", "pods", &[]).unwrap();
        let attached = since.elapsed();
        let answers = first_answers(&own, &others, since);
        let names = old.iter().zip(["public"].iter().chain(&KINDS)).map(|(_, kind)| kind);
        let shown: Vec<String> =
            names.zip(&answers).map(|(kind, took)| format!("{kind} {} ms", took.as_millis())).collect();
        println!("{last}: endpoint after {} ms; {}", attached.as_millis(), shown.join(", "));
    }
}
