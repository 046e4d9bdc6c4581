//! The fast path on a stock kernel, by the packaged unit.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, ensure};
use netns_lab::without_prefix_length;
use serde_json::Value;

use crate::machine::Machine;
use crate::scenario::service;
use crate::world::{Undo, Workload, World};

const CONFIG: &str = "/etc/ovl/ovld.toml";
/// A filter of another program, which lets packets on.
const FOREIGN: &str = "protocol all prio 7 handle 1 bpf da bytecode '1,6 0 0 4294967295,'";
/// The priority of ovl's filters.
const PRIORITY: &str = "pref 50000";

/// Packets between machines take the fast path, with both ways of sending them and both families. A killed daemon loses none.
/// When it is turned off, everything of it is gone, and what another program has set stays.
pub(super) fn fast_path(world: &World<'_>) -> Result<String> {
    let last = world.last();
    let undo = Undo::on(
        world.machines.clone(),
        format!(
            "if grep -q ^fast_path {CONFIG}; then sed -i /^fast_path/d {CONFIG}; systemctl restart ovld; fi; \
             tc qdisc del dev {} clsact 2>/dev/null || true",
            last.link()
        ),
    );
    let link = last.link();
    last.ok(&format!("tc qdisc add dev {link} clsact; tc filter add dev {link} ingress {FOREIGN}"))?;
    world.on_all(|machine| {
        machine.ok(&format!("sed -i '1i fast_path = \"on\"' {CONFIG}; systemctl restart ovld")).map(drop)
    })?;
    world.wait_settled()?;
    world.network("boxed", "--mode l3 --backend vxlan --subnet 10.77.0.0/16 --subnet fd77::/48")?;
    world.network("straight", super::network::DIRECT)?;
    let (boxed, straight) = (world.workloads("boxed")?, world.workloads("straight")?);
    let (Some(boxed_last), Some(straight_last)) = (boxed.last(), straight.last()) else {
        anyhow::bail!("no workloads")
    };
    world.ping_all(&boxed)?;
    world.ping_all(&straight)?;
    let mut attached = String::new();
    for machine in &world.machines {
        attached = machine.wait_ctl("status", "the fast path", |status| {
            let fast = &status["fast_path"];
            fast["attached_by"].as_str().filter(|_| fast["in_use"] == true).map(str::to_owned)
        })?;
        let has_tcx = has_tcx(&machine.ok("uname -r")?)?;
        ensure!((attached == "tcx") == has_tcx, "attached by {attached} on {}", machine.name());
    }

    let verified = last.ok(
        "grep -h verified_insns /proc/$(systemctl show -P MainPID ovld)/fdinfo/* | cut -f2 | sort -nu | paste -sd' '",
    )?;

    let mut rates = Vec::new();
    for (to, from, ways) in [
        (boxed_last, &boxed[0], ["vxlan_out", "vxlan_in"]),
        (&over_ipv6(boxed_last)?, &over_ipv6(&boxed[0])?, ["vxlan_out", "vxlan_in"]),
        (straight_last, &straight[0], ["direct_out", "direct_in"]),
    ] {
        let before = [counted(from.machine)?, counted(to.machine)?];
        rates.push(from.tcp(to, 2)?);
        let after = [counted(from.machine)?, counted(to.machine)?];
        let [out, into] = ways;
        for (way, side) in [(out, 0), (into, 0), (out, 1), (into, 1)] {
            let taken = after[side][way].saturating_sub(before[side][way]);
            ensure!(taken > 100, "{way} to {}: {taken}; {after:?}", to.address);
        }
    }

    let lost = lost_while_killed(&straight[0], straight_last)?;
    ensure!(lost == 0, "{lost} packets were lost");
    world.wait_settled()?;

    world.on_all(|machine| {
        machine.ok(&format!("sed -i /^fast_path/d {CONFIG}; systemctl restart ovld"))?;
        machine.wait("ovlctl verify")?;
        ensure_nothing_left(machine)
    })?;
    let kept = last.ok(&format!("tc filter show dev {link} ingress"))?;
    ensure!(kept.contains("pref 7 bpf"), "the filter of another program is gone: {kept}");
    world.ping_all(&boxed)?;
    drop(undo);
    Ok(format!(
        "attached by {attached}, {verified} instructions verified; TCP in VXLAN {:.0}, over IPv6 {:.0}, direct {:.0} Mbit/s; daemons killed: 0 lost",
        rates[0], rates[1], rates[2]
    ))
}

/// Whether a kernel of this release has tcx.
fn has_tcx(release: &str) -> Result<bool> {
    let mut numbers = release.split(['.', '-']).map(str::parse::<u32>);
    let mut next = || numbers.next().context("no kernel release")?.context("an odd kernel release");
    Ok((next()?, next()?) >= (6, 6))
}

/// The packets that took the fast path on a machine, by their way.
fn counted(machine: &dyn Machine) -> Result<BTreeMap<String, u64>> {
    let status = machine.ctl("status")?;
    Ok(serde_json::from_value(status["fast_path"]["fast"].clone())?)
}

/// The workload by its IPv6 address.
fn over_ipv6<'a>(workload: &Workload<'a>) -> Result<Workload<'a>> {
    let endpoints = workload.machine.ctl("endpoints")?;
    let own = |each: &&Value| each["name"] == workload.name.as_str();
    let found = endpoints.as_array().and_then(|all| all.iter().find(own)).context("no endpoint")?;
    let address = found["addresses"][1].as_str().context("no IPv6 address")?;
    Ok(Workload { address: without_prefix_length(address).to_owned(), ..workload.clone() })
}

/// Sends 200 packets a second while the daemons of both machines are killed, and returns how many did not arrive.
fn lost_while_killed(from: &Workload<'_>, to: &Workload<'_>) -> Result<u64> {
    to.machine.ok(&format!(
        "ip netns exec {} sh -c 'iperf3 -s -1 -D -B {} >/dev/null 2>&1 </dev/null'",
        to.name, to.address
    ))?;
    to.machine.wait(&format!("ip netns exec {} ss -Hltn sport = :5201 | grep -q .", to.name))?;
    from.machine.ok(&format!(
        "{} iperf3 -J -u -l 200 -b 320K -t 40 -c {} >/run/fast.json 2>&1 </dev/null & echo $! >/run/fast.pid",
        from.exec(),
        to.address
    ))?;
    let before = counted(from.machine)?["direct_out"];
    for machine in [from.machine, to.machine] {
        let pid = machine.ok("systemctl show -P MainPID ovld")?;
        machine.ok(&format!("kill -9 {pid}"))?;
        service::wait_other_daemon(machine, &pid)?;
    }
    from.machine.wait("! kill -0 $(cat /run/fast.pid) 2>/dev/null")?;
    let report: Value = serde_json::from_str(&from.machine.ok("cat /run/fast.json")?)?;
    let sum = &report["end"]["sum"];
    let (sent, lost) = (sum["packets"].as_u64(), sum["lost_packets"].as_u64());
    let (sent, lost) = (sent.context("nothing was sent")?, lost.context("no loss is known")?);
    let taken = counted(from.machine)?["direct_out"].saturating_sub(before);
    ensure!(
        sent > 1000 && taken > sent / 2,
        "{taken} of {sent} packets took the fast path: {before} before, {}",
        from.machine.ctl("status")?["fast_path"]
    );
    Ok(lost)
}

fn ensure_nothing_left(machine: &dyn Machine) -> Result<()> {
    machine.ok("[ ! -e /sys/fs/bpf/ovl ] || [ -z \"$(ls /sys/fs/bpf/ovl)\" ]")?;
    let filters = machine.ok(
        "for each in $(ls /sys/class/net); do tc filter show dev $each ingress; tc filter show dev $each egress; done",
    )?;
    ensure!(!filters.contains(PRIORITY), "filters are left: {filters}");
    let own = machine.ok("tc qdisc show | grep clsact | grep -e ove- -e ovx- || true")?;
    ensure!(own.is_empty(), "clsact is left: {own}");
    Ok(())
}
