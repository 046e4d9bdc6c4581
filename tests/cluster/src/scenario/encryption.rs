//! Encrypted networks by the kernel's WireGuard.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};

use crate::flow::Flow;
use crate::flow::none_lost;
use crate::machine::Machine;
use crate::world::{Workload, World};

/// What pings carry, and the wire must not: `ovlmark!`.
const MARKER: &str = "6f766c6d61726b21";
/// The first end of the tunnel.
const DEVICE: &str = "ovt-0";

/// A peer as `wg` shows it.
struct Peer {
    endpoint: String,
    allowed: BTreeSet<String>,
}

pub(super) fn kernel(world: &World<'_>) -> Result<String> {
    let first = world.machines[0];
    world.network("secret", "--subnet 10.73.0.0/16 --encrypted")?;
    world.network("secret-pods", "--mode l3 --subnet 10.74.0.0/16 --encrypted")?;
    world.on_all(|machine| capture(machine).map(drop))?;
    let (switched, routed) = (world.workloads("secret")?, world.workloads("secret-pods")?);
    for all in [&switched, &routed] {
        world.ping_all(all)?;
        marked(all)?;
    }
    world.wait_settled()?;
    keys(world)?;
    let rates = (switched[0].tcp(&switched[1], 2)?, routed[0].tcp(&routed[1], 2)?);
    world.on_all(nothing_plain)?;

    // The device is the kernel's: it goes on without the daemon.
    let flows = Flow::start(&[(&switched[0], &switched[1]), (&routed[0], &routed[1])])?;
    first.ok("systemctl kill -s KILL ovld")?;
    first.wait("ovlctl verify")?;
    let lost = none_lost(flows)?;
    Ok(format!("TCP {:.0} and {:.0} Mbit/s; daemon killed: {lost}", rates.0, rates.1))
}

/// One machine does it in ovld, the others in their kernels; then a key is rotated among them.
pub(super) fn mixed(world: &World<'_>) -> Result<String> {
    const CONFIG: &str = "/etc/ovl/ovld.toml";
    let (first, last) = (world.machines[0], world.last());
    last.ok(&format!(
        "cp {CONFIG} /run/ovld.toml; sed -i '1i tunnel = \"userspace\"' {CONFIG}; systemctl restart ovld"
    ))?;
    let encryption = |of: &dyn Machine| -> Result<String> {
        let peers = of.ctl("peers")?;
        let own = peers.as_array().into_iter().flatten().find(|peer| peer["self"] == true).cloned();
        Ok(own.context("no own row")?["encryption"].as_str().unwrap_or_default().to_owned())
    };
    ensure!(encryption(first)? == "wireguard (kernel)", "{}", encryption(first)?);
    ensure!(encryption(last)? == "wireguard (userspace)", "{}", encryption(last)?);
    world.on_all(|machine| capture(machine).map(drop))?;
    let (switched, routed) = (world.workloads("secret")?, world.workloads("secret-pods")?);
    for all in [&switched, &routed] {
        world.ping_all(all)?;
        marked(all)?;
    }
    world.wait_settled()?;
    let (Some(there), Some(routed_there)) = (switched.last(), routed.last()) else {
        anyhow::bail!("no workloads")
    };
    let rates = (switched[0].tcp(there, 2)?, there.tcp(&switched[0], 2)?);
    let flows =
        Flow::start(&[(&switched[0], &switched[1]), (&switched[0], there), (&routed[0], routed_there)])?;
    first.ok("timeout 120 ovlctl key rotate")?;
    last.ok("timeout 120 ovlctl key rotate || { sleep 20; timeout 120 ovlctl key rotate; }")?;
    let lost = none_lost(flows)?;
    world.on_all(nothing_plain)?;
    last.ok(&format!("cp /run/ovld.toml {CONFIG}; systemctl restart ovld"))?;
    world.ping_all(&switched)?;
    world.wait_settled()?;
    Ok(format!("TCP {:.0} and {:.0} Mbit/s; two keys rotated: {lost}", rates.0, rates.1))
}

/// Each machine's tunnel has exactly the others as peers, with the keys that these have themselves, at their
/// addresses, and no address is allowed to two of them.
fn keys(world: &World<'_>) -> Result<()> {
    let shown = world.on_all(|machine| {
        let differences = machine.ctl("plan")?;
        ensure!(differences.as_array().is_some_and(Vec::is_empty), "{}: {differences}", machine.name());
        let encryption = machine.ctl("peers")?;
        let others = encryption.as_array().into_iter().flatten().filter(|peer| peer["self"] != true);
        for peer in others {
            ensure!(peer["encryption"].as_str().is_some_and(|how| how != "none"), "{peer}");
        }
        let own = machine.ok(&format!("wg show {DEVICE} public-key"))?;
        let peers = peers(&machine.ok(&format!("wg show {DEVICE} dump | tail -n +2 | cut -f1,3,4"))?)?;
        Ok((own, machine.address().to_string(), peers))
    })?;
    for (own, _, peers) in &shown {
        let others: BTreeSet<&String> =
            shown.iter().map(|(key, _, _)| key).filter(|key| *key != own).collect();
        ensure!(peers.keys().collect::<BTreeSet<_>>() == others, "other peers than the members have keys");
        let mut seen = BTreeSet::new();
        for (key, peer) in peers {
            let (_, address, _) =
                shown.iter().find(|(each, _, _)| each == key).context("a stranger's key")?;
            ensure!(
                peer.endpoint.contains(address.as_str()),
                "{key} at {} and not at {address}",
                peer.endpoint
            );
            ensure!(!peer.allowed.is_empty(), "nothing is allowed to {key}");
            for prefix in &peer.allowed {
                ensure!(seen.insert(prefix), "{prefix} is allowed twice");
            }
        }
    }
    Ok(())
}

fn peers(dump: &str) -> Result<BTreeMap<String, Peer>> {
    dump.lines()
        .map(|line| {
            let mut fields = line.split('\t');
            let mut next = || fields.next().map(str::to_owned).with_context(|| format!("{line:?} of wg"));
            let (key, endpoint, allowed) = (next()?, next()?, next()?);
            let allowed = allowed.split(',').filter(|each| *each != "(none)").map(str::to_owned).collect();
            Ok((key, Peer { endpoint, allowed }))
        })
        .collect()
}

/// Listens on the underlay until [`nothing_plain`].
fn capture(machine: &dyn Machine) -> Result<String> {
    machine.ok(
        &format!("tcpdump -i {} -s 200 -U -w /run/capture udp or icmp or icmp6 or ip proto 4 >/dev/null 2>/run/capture.log </dev/null & \
         echo $! >/run/capture.pid; while ! grep -q listening /run/capture.log; do sleep 0.1; done", machine.link()),
    )
}

fn marked(all: &[Workload<'_>]) -> Result<()> {
    for (from, to) in all.iter().zip(all.iter().cycle().skip(1)) {
        from.ok(&format!("ping -n -c 3 -i 0.2 -p {MARKER} {}", to.address))?;
    }
    Ok(())
}

/// The capture has tunnel packets, no marker, and nothing at the VXLAN port that this scenario's networks sent.
fn nothing_plain(machine: &dyn Machine) -> Result<()> {
    machine.ok(
        "kill -INT $(cat /run/capture.pid); while [ -e /proc/$(cat /run/capture.pid) ]; do sleep 0.1; done",
    )?;
    let marked = machine.ok("grep -c 'ovlmark!' /run/capture || true")?;
    ensure!(marked == "0", "the marker is on the wire of {}", machine.name());
    let tunnel = machine
        .ok("tcpdump -r /run/capture -n udp portrange 51940-51941 2>/dev/null | wc -l; rm /run/capture")?;
    ensure!(tunnel != "0", "nothing went through the tunnel of {}", machine.name());
    Ok(())
}
