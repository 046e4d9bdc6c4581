//! Machines that do not reach each other directly, or not from outside, with the kernel's WireGuard.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::machine::Machine;
use crate::world::{Undo, Workload, World};

/// The networks of [`super::encryption`], a switched one and a routed one, and two that are encrypted only where they must be.
fn workloads<'a>(world: &World<'a>) -> Result<[Vec<Workload<'a>>; 4]> {
    world.network("secret", "--subnet 10.73.0.0/16 --encrypted")?;
    world.network("secret-pods", "--mode l3 --subnet 10.74.0.0/16 --encrypted")?;
    world.network("either", "--subnet 10.78.0.0/16 --encrypt auto")?;
    world.network("either-pods", "--mode l3 --subnet 10.79.0.0/16 --encrypt auto")?;
    let of = |network| world.workloads(network);
    Ok([of("secret")?, of("secret-pods")?, of("either")?, of("either-pods")?])
}

/// Waits until a machine sends through the tunnel to just these others on networks that are encrypted only where they must be.
fn wait_sealed(on: &dyn Machine, others: &[&str]) -> Result<()> {
    for network in ["either", "either-pods"] {
        on.wait_ctl(&format!("network inspect {network}"), &format!("sealed to {others:?}"), |network| {
            (network["sealed_to"] == serde_json::json!(others)).then_some(())
        })?;
    }
    Ok(())
}

/// The row of a machine in `peers` of another one.
fn row<'a>(peers: &'a Value, name: &str) -> Option<&'a Value> {
    peers.as_array()?.iter().find(|peer| peer["name"] == name)
}

/// Waits until the row of a machine in `peers` of another one is as it should be.
fn wait_row(on: &dyn Machine, of: &str, what: &str, is_so: impl Fn(&Value) -> bool) -> Result<()> {
    on.wait_ctl("peers", &format!("{of} {what}"), |peers| row(peers, of).filter(|row| is_so(row)).map(drop))
}

/// Where the kernel's WireGuard of a machine sends what is for another one.
fn endpoint_of(on: &dyn Machine, other: &dyn Machine) -> Result<String> {
    let key = other.ok("wg show ovt-0 public-key")?;
    let shown = on.ok("wg show ovt-0 endpoints")?;
    let line = shown.lines().find(|line| line.starts_with(key.trim())).context("no such peer")?;
    Ok(line.rsplit('\t').next().unwrap_or_default().to_owned())
}

/// The first two machines are cut off from each other: the third one passes on what they send.
pub(super) fn detour(world: &World<'_>) -> Result<String> {
    let both = [world.machines[0], world.machines[1]];
    let third = world.machines[2].name();
    let networks = workloads(world)?;
    for all in &networks {
        world.ping_all(all)?;
    }
    ensure!(
        row(&both[0].ctl("peers")?, both[0].name())
            .is_some_and(|own| own["encryption"] == "wireguard (kernel)")
    );
    let undo = Undo::on(both.to_vec(), "nft delete table inet cut 2>/dev/null || true".to_owned());
    for (one, other) in [(both[0], both[1]), (both[1], both[0])] {
        let address = other.address();
        one.ok(&format!(
            "nft 'add table inet cut; add chain inet cut in {{ type filter hook prerouting priority raw; }}; \
             add rule inet cut in ip saddr {address} drop'"
        ))?;
    }
    for (one, other) in [(both[0], both[1]), (both[1], both[0])] {
        wait_row(one, other.name(), "through the third one", |row| row["via"] == serde_json::json!([third]))?;
        wait_sealed(one, &[other.name()])?;
    }
    for all in &networks {
        world.ping_all(all)?;
    }
    let at = endpoint_of(both[0], both[1])?;
    ensure!(!at.contains(&both[1].address().to_string()), "WireGuard sends to {at}, not to ovld");
    let rates = [networks[0][0].tcp(&networks[0][1], 2)?, networks[1][0].tcp(&networks[1][1], 2)?];
    drop(undo);
    for (one, other) in [(both[0], both[1]), (both[1], both[0])] {
        wait_row(one, other.name(), "directly", |row| row["via"] == serde_json::json!([]))?;
        wait_sealed(one, &[])?;
    }
    for all in &networks {
        world.ping_all(all)?;
    }
    world.wait_settled()?;
    Ok(format!("TCP through the third one {:.0} and {:.0} Mbit/s", rates[0], rates[1]))
}

/// The last machine is behind a firewall that lets in only what it asked for: it finds out by itself.
pub(super) fn nat(world: &World<'_>) -> Result<String> {
    let (first, last) = (world.machines[0], world.last());
    let networks = workloads(world)?;
    let undo = Undo::on(
        vec![last],
        "nft delete table inet firewall 2>/dev/null && systemctl restart ovld || true".to_owned(),
    );
    last.ok(&format!(
        "nft 'add table inet firewall; add chain inet firewall in {{ type filter hook input priority -10; }}; \
         add rule inet firewall in iifname {} ct state new drop'; systemctl restart ovld",
        last.link()
    ))?;
    wait_row(last, last.name(), "behind NAT", |own| own["nat"] == true)?;
    for other in world.machines.iter().filter(|other| other.name() != last.name()) {
        wait_row(*other, last.name(), "directly across NAT", |row| {
            row["state"] == "alive" && row["nat"] == true && row["via"] == serde_json::json!([])
        })?;
        wait_sealed(*other, &[last.name()])?;
    }
    for all in &networks {
        world.ping_all(all)?;
    }
    let at = endpoint_of(first, last)?;
    ensure!(!at.contains(&last.address().to_string()), "WireGuard sends to {at}, not to ovld");
    let at = networks[0].len() - 1;
    let rates = [networks[0][0].tcp(&networks[0][at], 2)?, networks[1][at].tcp(&networks[1][0], 2)?];
    drop(undo);
    wait_row(last, last.name(), "not behind NAT", |own| own["nat"] != true)?;
    world.wait_settled()?;
    for network in ["flat", "pods"] {
        world.ping_all(&world.workloads(network)?)?;
    }
    Ok(format!("TCP across it {:.0} and {:.0} Mbit/s", rates[0], rates[1]))
}

/// A capture says why the kernel drops a packet, under the restrictions of the unit.
pub(super) fn drops(world: &World<'_>) -> Result<String> {
    let flat = world.workloads("flat")?;
    let (from, to) = (&flat[0], &flat[1]);
    let machine = from.machine;
    machine.ok(&format!(
        "ovlctl capture endpoint:{} udp port 999 --duration 30s >/run/drops 2>/run/drops.log </dev/null & echo $! >/run/drops.pid; \
         while ! grep -q '{}: began' /run/drops.log; do sleep 0.1; done",
        to.name,
        to.machine.name()
    ))?;
    let _undo = Undo::on(vec![machine], "kill $(cat /run/drops.pid) 2>/dev/null || true".to_owned());
    machine.wait(&format!(
        "ip netns exec {} bash -c 'echo x >/dev/udp/{}/999'; grep -q 'by the kernel: NO_SOCKET' /run/drops",
        from.name, to.address
    ))?;
    Ok(String::new())
}
