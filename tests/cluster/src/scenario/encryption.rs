//! Encrypted networks with the kernel's WireGuard.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};

use crate::flow::Flow;
use crate::flow::none_lost;
use crate::machine::Machine;
use crate::world::{Workload, World};

/// Pattern in pings that must not be visible on the underlay, `ovlmark!`.
const MARKER: &str = "6f766c6d61726b21";
/// The WireGuard device of the first key epoch.
const DEVICE: &str = "ovt-0";

/// A peer in the output of `wg`.
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
        ping_marked(all)?;
    }
    world.wait_settled()?;
    ensure_keys(world)?;
    let rates = (switched[0].tcp(&switched[1], 2)?, routed[0].tcp(&routed[1], 2)?);
    world.on_all(ensure_nothing_unencrypted)?;

    // The device belongs to the kernel, so it works without the daemon.
    let flows = Flow::start(&[(&switched[0], &switched[1]), (&routed[0], &routed[1])])?;
    first.ok("systemctl kill -s KILL ovld")?;
    first.wait("ovlctl verify")?;
    let lost = none_lost(flows)?;
    Ok(format!("TCP {:.0} and {:.0} Mbit/s; daemon killed: {lost}", rates.0, rates.1))
}

/// One machine encrypts in ovld and the others in their kernels, and keys are rotated.
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
        ping_marked(all)?;
    }
    world.wait_settled()?;
    let (Some(there), Some(routed_there)) = (switched.last(), routed.last()) else {
        anyhow::bail!("no workloads")
    };
    let rates = (switched[0].tcp(there, 2)?, there.tcp(&switched[0], 2)?);
    let flows =
        Flow::start(&[(&switched[0], &switched[1]), (&switched[0], there), (&routed[0], routed_there)])?;
    first.ok("timeout 120 ovlctl key rotate")?;
    // Refused while the first machine's rotation is in progress.
    last.wait("timeout 120 ovlctl key rotate")?;
    let lost = none_lost(flows)?;
    world.on_all(ensure_nothing_unencrypted)?;
    last.ok(&format!("mv /run/ovld.toml {CONFIG}; systemctl restart ovld"))?;
    world.ping_all(&switched)?;
    world.wait_settled()?;
    Ok(format!("TCP {:.0} and {:.0} Mbit/s; two keys rotated: {lost}", rates.0, rates.1))
}

/// Checks that each machine's tunnel has exactly the other machines as peers, with their own keys and addresses, and
/// that no prefix is allowed for two of them.
fn ensure_keys(world: &World<'_>) -> Result<()> {
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
        ensure!(
            peers.keys().collect::<BTreeSet<_>>() == others,
            "the peers are not exactly the other members"
        );
        let mut seen = BTreeSet::new();
        for (key, peer) in peers {
            let (_, address, _) =
                shown.iter().find(|(each, _, _)| each == key).context("the key of an unknown host")?;
            ensure!(
                peer.endpoint.contains(address.as_str()),
                "{key} is at {} instead of {address}",
                peer.endpoint
            );
            ensure!(!peer.allowed.is_empty(), "no prefix is allowed for {key}");
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
            let mut next = || {
                fields.next().map(str::to_owned).with_context(|| format!("unexpected line of wg: {line:?}"))
            };
            let (key, endpoint, allowed) = (next()?, next()?, next()?);
            let allowed = allowed.split(',').filter(|each| *each != "(none)").map(str::to_owned).collect();
            Ok((key, Peer { endpoint, allowed }))
        })
        .collect()
}

/// Starts a capture on the underlay, which [`ensure_nothing_unencrypted`] stops.
fn capture(machine: &dyn Machine) -> Result<String> {
    machine.ok(
        &format!("tcpdump -i {} -s 200 -U -w /run/capture udp or icmp or icmp6 or ip proto 4 >/dev/null 2>/run/capture.log </dev/null & \
         echo $! >/run/capture.pid; while ! grep -q listening /run/capture.log; do sleep 0.1; done", machine.link()),
    )
}

fn ping_marked(all: &[Workload<'_>]) -> Result<()> {
    for (from, to) in all.iter().zip(all.iter().cycle().skip(1)) {
        from.ok(&format!("ping -n -c 3 -i 0.2 -p {MARKER} {}", to.address))?;
    }
    Ok(())
}

/// Stops the capture, and checks that it has tunnel packets and no marker.
fn ensure_nothing_unencrypted(machine: &dyn Machine) -> Result<()> {
    machine.ok(
        "kill -INT $(cat /run/capture.pid); while [ -e /proc/$(cat /run/capture.pid) ]; do sleep 0.1; done",
    )?;
    let marked = machine.ok("grep -c 'ovlmark!' /run/capture || true")?;
    ensure!(marked == "0", "the marker is visible on the underlay of {}", machine.name());
    let tunnel = machine
        .ok("tcpdump -r /run/capture -n udp portrange 51940-51941 2>/dev/null | wc -l; rm /run/capture")?;
    ensure!(tunnel != "0", "no packet went through the tunnel of {}", machine.name());
    Ok(())
}
