//! `ovlctl netcheck` names what is between a host and the others.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, wait_until};
use ovl_tests::{SOON, start_lab_with};
use serde_json::Value;

/// Hosts without NAT, which the others ask.
const PUBLIC: usize = 3;

/// The answer of a host, which has an exit status in any case.
fn netcheck(host: &Host) -> Result<(Value, bool)> {
    let output = host.ctl(&["netcheck", "-o", "json"])?;
    let is_clear = output.status.success();
    let found = serde_json::from_str(&output.stdout).with_context(|| output.stderr.clone())?;
    Ok((found, is_clear))
}

/// Checks the kind of NAT in front of a host, and whether it hairpins. `None`: that is not known.
fn expect(host: &Host, kind: &str, hairpin: Option<bool>) -> Value {
    let mut last = Value::Null;
    // A machine with little time loses a probe now and then.
    wait_until(SOON, &format!("{kind} on {}", host.name()), || -> Result<()> {
        let (found, is_clear) = netcheck(host)?;
        ensure!(found["nat"]["kind"] == kind && found["nat"]["hairpin"].as_bool() == hairpin, "{found}");
        ensure!(found["clear"] == is_clear, "{found}");
        last = found;
        Ok(())
    })
    .unwrap();
    last
}

fn lab(kinds: &[&str]) -> Lab {
    let config =
        kinds.iter().enumerate().fold(LabConfig::hosts(PUBLIC + kinds.len()), |config, (index, kind)| {
            config.access(&format!("h{}", PUBLIC + index + 1), kind.parse().unwrap())
        });
    start_lab_with(config).unwrap()
}

/// Checks hosts behind these presets, each with the kind that others see, and whether it hairpins.
fn each_is_named(presets: &[(&str, &str, Option<bool>)]) {
    let kinds: Vec<&str> = presets.iter().map(|(preset, ..)| *preset).collect();
    let lab = lab(&kinds);
    for (host, (preset, kind, hairpin)) in lab.hosts().iter().skip(PUBLIC).zip(presets) {
        let found = expect(host, kind, *hairpin);
        let outer: Vec<String> = host.outer_addresses().iter().map(ToString::to_string).collect();
        let seen = found["outer"].as_array().unwrap();
        let is_outer =
            |at: &Value| outer.iter().any(|outer| at.as_str().is_some_and(|at| at.starts_with(outer)));
        assert!(!seen.is_empty() && (seen.iter().all(is_outer) || *kind == "firewall"), "{preset}: {found}");
        let members = found["members"].as_array().unwrap();
        assert!(members.len() == PUBLIC && members.iter().all(|member| member["tcp"] == true), "{found}");
        assert_eq!(found["clear"] == true, *kind != "udp-blocked", "{preset}: {found}");
    }
}

#[test]
fn kinds_of_nat_with_one_port_for_all_destinations_are_told_apart() {
    each_is_named(&[
        ("full-cone", "full-cone", Some(false)),
        ("full-cone-hairpin", "full-cone", Some(true)),
        ("restricted", "restricted", Some(false)),
        ("port-restricted", "port-restricted", Some(false)),
        ("port-restricted-hairpin", "port-restricted", Some(true)),
        ("short", "port-restricted", Some(false)),
    ]);
}

#[test]
fn other_kinds_of_nat_firewalls_and_blocked_udp_are_told_apart() {
    each_is_named(&[
        ("address-dependent", "address-dependent", Some(false)),
        ("symmetric", "symmetric", Some(false)),
        // A carrier's box lets its hosts meet.
        ("cgn", "port-restricted", Some(true)),
        ("cgn-symmetric", "symmetric", Some(false)),
        ("firewall", "firewall", None),
        ("udp-blocked", "udp-blocked", None),
    ]);
}

#[test]
fn host_without_nat_is_told_so_and_that_one_member_is_not_enough() {
    let lab = start_lab_with(LabConfig::hosts(3)).unwrap();
    let found = expect(&lab["h3"], "none", None);
    assert!(found["clear"] == true && found["outer"][0].as_str().is_some(), "{found}");
    let text = lab["h3"].ctl_ok(&["netcheck"]).unwrap();
    assert!(text.lines().all(|line| line.len() <= 120) && text.contains("MEMBER"), "{text}");
    lab["h2"].kill9().unwrap();
    wait_until(SOON, "the kind to be unknown", || -> Result<()> {
        let (found, _) = netcheck(&lab["h3"])?;
        ensure!(
            found["nat"]["kind"] == "unknown" && found["members"].as_array().map(Vec::len) == Some(1),
            "{found}"
        );
        Ok(())
    })
    .unwrap();
    lab["h1"].kill9().unwrap();
    wait_until(SOON, "no member to be asked", || -> Result<()> {
        let (found, is_clear) = netcheck(&lab["h3"])?;
        ensure!(!is_clear && found["findings"].to_string().contains("no member can be asked"), "{found}");
        Ok(())
    })
    .unwrap();
}
