//! Networks on a stock kernel, beside udev and networkd.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::flow::{Flow, at_most_lost, none_lost};
use crate::machine::Machine;
use crate::world::{World, ensure_contains};

/// Options of the network `straight`.
pub(super) const DIRECT: &str = "--mode l3 --backend direct --subnet 10.72.0.0/16";
/// Number of pings that may be lost until direct routes are repaired: 4 s.
const REPAIR: usize = 100;

pub(super) fn switched(world: &World<'_>) -> Result<String> {
    connected(world, "flat", "--subnet 10.70.0.0/16 --subnet fd70::/64")
}

pub(super) fn routed(world: &World<'_>) -> Result<String> {
    connected(world, "pods", "--mode l3 --subnet 10.71.0.0/16 --subnet fd71::/48")
}

/// Direct routes over the segment, which networkd manages, and whose foreign routes it may remove at any time.
pub(super) fn direct(world: &World<'_>) -> Result<String> {
    connected(world, "straight", DIRECT)
}

fn connected(world: &World<'_>, network: &str, options: &str) -> Result<String> {
    world.network(network, options)?;
    let all = world.workloads(network)?;
    world.ping_all(&all)?;
    if options.contains("fd7") {
        ping_ipv6(world, network)?;
    }
    let rate = all[0].tcp(&all[1], 2)?;
    world.wait_settled()?;
    Ok(format!("TCP {rate:.0} Mbit/s"))
}

/// Pings over IPv6 from the first machine to the others.
fn ping_ipv6(world: &World<'_>, network: &str) -> Result<()> {
    let endpoints = world.machines[0].ctl("endpoints")?;
    let addresses = endpoints.as_array().into_iter().flatten();
    for address in
        addresses.filter(|each| each["network"] == network).filter_map(|each| each["addresses"][1].as_str())
    {
        let address = address.split('/').next().unwrap_or_default();
        let from = format!("{network}-{}", world.machines[0].name());
        world.machines[0].wait(&format!("ip netns exec {from} ping -n -c 1 -W 2 {address}"))?;
    }
    Ok(())
}

/// Attaches pods as a runtime does: with the configuration of `ovlctl cni install`, and one process for each call.
pub(super) fn pods(world: &World<'_>) -> Result<String> {
    let addresses = world.on_all(|machine| {
        machine.ok("ovlctl cni install --network pods && ip netns add pod && ip -n pod link set lo up")?;
        let result = cni(machine, "ADD", &Value::Null)?;
        cni(machine, "CHECK", &result)?;
        let address = result["ips"][0]["address"].as_str().context("no address")?;
        Ok((address.split('/').next().unwrap_or_default().to_owned(), result))
    })?;
    world.on_all(|machine| {
        for (address, _) in &addresses {
            machine.wait(&format!("ip netns exec pod ping -n -c 1 -W 2 {address}"))?;
        }
        Ok(())
    })?;
    world.on_all(|machine| {
        cni(machine, "DEL", &Value::Null)?;
        machine.ok("ip netns del pod")?;
        machine.wait("! ovlctl endpoints | grep -q cni-pod")
    })?;
    world.wait_settled()?;
    Ok(String::new())
}

/// Calls the plugin once.
fn cni(machine: &dyn Machine, command: &str, previous: &Value) -> Result<Value> {
    let list: Value = serde_json::from_str(&machine.ok("cat /etc/cni/net.d/pods.conflist")?)?;
    let mut config = list["plugins"][0].clone();
    config["cniVersion"] = list["cniVersion"].clone();
    config["name"] = list["name"].clone();
    if !previous.is_null() {
        config["prevResult"] = previous.clone();
    }
    let text = machine.ok(&format!(
        "CNI_COMMAND={command} CNI_CONTAINERID=cni-pod CNI_NETNS=/run/netns/pod CNI_IFNAME=eth0 CNI_PATH=/opt/cni/bin \
         /opt/cni/bin/ovl-cni <<'END'\n{config}\nEND"
    ))?;
    Ok(if text.is_empty() { json!({}) } else { serde_json::from_str(&text)? })
}

/// udev and networkd process all devices again, and ovl's devices do not change.
pub(super) fn link_managers(world: &World<'_>) -> Result<String> {
    let machine = world.last();
    world.network("straight", DIRECT)?;
    let straight = world.workloads("straight")?;
    let links = "for each in ovb- ovx- ove-; do grep -H . /sys/class/net/$each*/address; done";
    let before = machine.ok(links)?;
    let load = world.load()?;
    machine.ok("udevadm trigger --action=add --subsystem-match=net && udevadm settle")?;
    let by_udev = none_lost(load)?;
    ensure_contains(&machine.ok("udevadm info /sys/class/net/ovb-*")?, &["10-ovl.link"])?;

    if !machine.ok("systemctl is-active systemd-networkd || true")?.starts_with("active") {
        return Ok(format!("udev: {by_udev}; networkd is not running"));
    }
    // When networkd is restarted, it removes eth0's address and sets it again. Networks on the underlay may lose what
    // the underlay loses then, and no more. Direct routes are deleted with the address, until ovld sets them again.
    let load = world.load()?;
    let hosts = world.hosts();
    let underlay = Flow::start(&[(&hosts[1], &hosts[2])])?;
    let direct = Flow::start(&[(&straight[1], &straight[2])])?;
    machine.ok("systemctl restart systemd-networkd")?;
    machine.wait(&format!("networkctl --no-legend list {} | grep -q configured", machine.link()))?;
    world.wait_settled()?;
    let mut sent = 0;
    let underlay = at_most_lost(underlay, usize::MAX, &mut sent)?;
    let direct = at_most_lost(direct, underlay + REPAIR, &mut sent)?;
    let networks = at_most_lost(load, underlay + 5, &mut sent)?;
    ensure!(machine.ok(links)? == before, "MAC addresses or devices have changed");
    let managed = machine.ok("networkctl --no-legend list 'ov*' | grep -v unmanaged || true")?;
    ensure!(managed.is_empty(), "networkd manages {managed}");
    Ok(format!(
        "udev: {by_udev}; networkd restarted: the underlay {underlay}, networks {networks}, direct routes {direct}"
    ))
}
