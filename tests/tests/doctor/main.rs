//! `ovlctl doctor` names faults that are injected into a lab, and finds nothing on healthy hosts.
//!
//! `OVL_DOCTOR_FAULTS=n` is the number of faults that are drawn (25), `OVL_DOCTOR_SEED=n` the seed of the draw (1),
//! `OVL_DOCTOR_ONLY=text` restricts the draw to faults whose description contains the text.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

mod faults;
mod world;

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use netns_lab::{Host, wait_until};
use ovl_tests::{ensure_status, text};
use serde_json::Value;

use faults::{FAULTS, Fault};
use world::World;

/// Time in which a fault must be named.
const NAMED_WITHIN: Duration = Duration::from_secs(5);
/// Time in which a host must be healthy again after a fault is undone. Some causes are looked at every 30 s, and refused
/// operations are repeated as rarely.
const HEALED_WITHIN: Duration = Duration::from_secs(90);
/// The share of faults that must be named first in time, in percent.
const SHARE: usize = 95;

/// Runs `ovlctl doctor` on a host. Its exit status must say whether something was found.
fn doctor(host: &Host, more: &[&str]) -> Result<Value> {
    let args = [&["doctor", "-o", "json"], more].concat();
    let output = host.ctl(&args)?;
    let value: Value = serde_json::from_str(&output.stdout)
        .with_context(|| format!("`ovlctl doctor`: {}{}", output.stdout, output.stderr))?;
    ensure_status(&output, &args, i32::from(value["healthy"] != true))?;
    Ok(value)
}

/// The findings of the host that was asked: code, object and cause of each.
fn findings(diagnosis: &Value) -> Vec<(String, String)> {
    let all = diagnosis["hosts"][0]["findings"].as_array().into_iter().flatten();
    all.map(|it| (text(&it["code"]), format!("{}: {}", text(&it["object"]), text(&it["cause"])))).collect()
}

fn wait_healthy(host: &Host) -> Result<()> {
    wait_until(HEALED_WITHIN, &format!("{} to be healthy", host.name()), || {
        let found = findings(&doctor(host, &[])?);
        ensure!(found.is_empty(), "{found:?}");
        Ok(())
    })
}

/// Injects a fault, and returns the time until it is named first. The fault is undone in any case.
fn try_fault(world: &World, fault: &Fault) -> Result<Duration> {
    let host = &world.lab["h1"];
    let names = world.fill(fault.names);
    let begun = Instant::now();
    let undo = fault.inject(world)?;
    let mut seen = Vec::new();
    // Of a restart of ovld, or of a flood, only what comes after it counts.
    let injected = if fault.is_long { Instant::now() } else { begun };
    let named = wait_until(fault.within, "the fault to be named", || {
        seen = findings(&doctor(host, &[])?);
        ensure!(seen.iter().any(|(code, said)| code == fault.code && said.contains(&names)), "{seen:?}");
        Ok(())
    });
    let took = injected.elapsed();
    undo().context("the fault cannot be undone")?;
    named?;
    match seen.first() {
        Some((code, said)) if code == fault.code && said.contains(&names) => Ok(took),
        _ => bail!("it is not named first: {seen:?}"),
    }
}

/// A generator of pseudo-random numbers (xorshift64*), so that a seed repeats a draw.
struct Draw(u64);

impl Draw {
    fn below(&mut self, count: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % count
    }
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().map_or(default, |text| text.parse().unwrap())
}

/// Draws this many faults: each once, before any comes again.
fn drawn(seed: u64, count: usize) -> Vec<&'static Fault> {
    let only = std::env::var("OVL_DOCTOR_ONLY").unwrap_or_default();
    let all: Vec<&Fault> = FAULTS.iter().filter(|fault| fault.what.contains(&only)).collect();
    assert!(!all.is_empty(), "no fault contains {only:?}");
    let mut draw = Draw(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut left = Vec::new();
    let mut drawn = Vec::new();
    while drawn.len() < count {
        if left.is_empty() {
            if !only.is_empty() && !drawn.is_empty() {
                break;
            }
            left.clone_from(&all);
        }
        drawn.push(left.swap_remove(draw.below(left.len())));
    }
    drawn
}

#[test]
fn injected_faults_are_named_first_within_five_seconds() {
    let count = number("OVL_DOCTOR_FAULTS", 25) as usize;
    let faults = drawn(number("OVL_DOCTOR_SEED", 1), count);
    let world = World::build().unwrap();
    wait_healthy(&world.lab["h1"]).unwrap();
    let mut named = 0;
    let mut missed = Vec::new();
    for fault in &faults {
        match try_fault(&world, fault) {
            Ok(took) if took <= NAMED_WITHIN.max(fault.within) => {
                named += 1;
                println!("named after {:.1} s: {}: {}", took.as_secs_f64(), fault.kind, fault.what);
            }
            Ok(took) => missed.push(format!("{}: only after {:.1} s", fault.what, took.as_secs_f64())),
            Err(error) => missed.push(format!("{}: {error:#}", fault.what)),
        }
        wait_healthy(&world.lab["h1"]).unwrap_or_else(|error| panic!("after {}: {error:#}", fault.what));
    }
    println!("{named} of {} faults were named first", faults.len());
    missed.iter().for_each(|line| println!("missed: {line}"));
    assert!(named * 100 >= faults.len() * SHARE, "{missed:#?}");
}

/// The probe of `ovlctl trace` is small and arrives, and so does a ping: what is lost is said all the same.
#[test]
fn trace_names_a_path_that_loses_large_packets() {
    let world = World::build().unwrap();
    let host = &world.lab["h1"];
    wait_healthy(host).unwrap();
    let trace = || -> Result<Value> {
        let output = host.ctl(&["trace", "-o", "json", "a", "b"])?;
        ensure_status(&output, &["trace"], 0)?;
        Ok(serde_json::from_str(&output.stdout)?)
    };
    let before = trace().unwrap();
    assert!(before["arrived"] == true && before["limited"].is_null(), "{before:#}");
    let fault = FAULTS.iter().find(|fault| fault.what == "the network loses large VXLAN packets").unwrap();
    let undo = fault.inject(&world).unwrap();
    let named = wait_until(fault.within, "the limit to be named", || {
        let traced = trace()?;
        let limited = text(&traced["limited"]);
        ensure!(limited.contains("are lost in VXLAN from this host to host h2"), "{traced:#}");
        ensure!(traced["arrived"] == true && traced["agree"] == true, "{traced:#}");
        let shown = host.ctl(&["trace", "a", "b"])?.stdout;
        ensure!(shown.contains("\nbut        host h1: packets of "), "{shown}");
        Ok(())
    });
    undo().unwrap();
    named.unwrap();
    wait_healthy(host).unwrap();
}

#[test]
fn healthy_hosts_have_no_findings_with_and_without_traffic() {
    let world = World::build().unwrap();
    for host in world.lab.hosts() {
        wait_healthy(host).unwrap();
    }
    let traffic = world.traffic().unwrap();
    let end = Instant::now() + Duration::from_secs(number("OVL_DOCTOR_TRAFFIC_SECONDS", 20));
    let mut rounds = 0;
    while Instant::now() < end {
        let begun = Instant::now();
        let diagnosis = doctor(&world.lab["h2"], &["--all-hosts"]).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
        assert_eq!(diagnosis["healthy"], true, "{diagnosis:#}");
        let hosts = diagnosis["hosts"].as_array().unwrap();
        assert_eq!(hosts.iter().map(|host| text(&host["host"])).collect::<Vec<_>>(), ["h2", "h1", "h3"]);
        for check in hosts.iter().flat_map(|host| host["checks"].as_array().unwrap()) {
            assert_eq!(check["result"], "ok", "{check}");
        }
        // Endpoints come and go meanwhile.
        world.churn(rounds).unwrap();
        rounds += 1;
    }
    drop(traffic);
    assert!(rounds > 2);
}

#[test]
fn all_hosts_are_asked_and_those_that_do_not_answer_are_named() {
    let world = World::build().unwrap();
    let (h1, h2, h3) = (&world.lab["h1"], &world.lab["h2"], &world.lab["h3"]);
    wait_healthy(h1).unwrap();
    let setting = "net.ipv4.conf.eth0.forwarding";
    h2.exec_ok(["sysctl", "-qw", &format!("{setting}=0")]).unwrap();
    h3.signal(netns_lab::Signal::SIGSTOP).unwrap();
    let begun = Instant::now();
    let diagnosis = doctor(h1, &["--all-hosts"]).unwrap();
    let took = begun.elapsed();
    h3.signal(netns_lab::Signal::SIGCONT).unwrap();
    assert!(took < Duration::from_secs(6), "{took:?}");
    assert_eq!(diagnosis["unanswered"], serde_json::json!(["h3"]));
    let host = &diagnosis["hosts"][1];
    assert_eq!((text(&host["host"]), text(&host["findings"][0]["code"])), ("h2".into(), "OVL-E088".into()));
    let output = h1.ctl(&["doctor", "--all-hosts"]).unwrap();
    assert_eq!(output.code(), Some(1));
    for part in ["OVL-E088 error, host forwarding: eth0", "  cause: ", "  fix:   `sysctl -w "] {
        assert!(output.stdout.contains(part), "{part}: {}", output.stdout);
    }
    h2.exec_ok(["sysctl", "-qw", &format!("{setting}=1")]).unwrap();
    wait_healthy(h1).unwrap();
}

#[test]
fn faults_are_two_of_each_kind_and_documented() {
    let docs = include_str!("../../../docs/doctor.md");
    for fault in FAULTS {
        let row = format!("| {} | {} | {} |", fault.kind, fault.what, fault.code);
        assert!(docs.contains(&row), "docs/doctor.md lacks the line\n{row}");
        let of_kind = FAULTS.iter().filter(|other| other.kind == fault.kind).count();
        assert!(of_kind >= 2, "{} of the kind {}", of_kind, fault.kind);
    }
}
