//! ovld under systemd.

use anyhow::{Context as _, Result, ensure};
use netns_lab::wait_until;

use crate::flow::none_lost;
use crate::machine::{Machine, SOON};
use crate::world::{World, ensure_contains};

/// Highest accepted exposure level. docs/operations.md explains each point of it.
const EXPOSURE: f64 = 3.1;

/// Forms a cluster of the machines: key, configuration, start.
pub(super) fn form(world: &World<'_>) -> Result<String> {
    let first = world.machines[0];
    // The commands that the package prints.
    first.ok("ovlctl key generate >/etc/ovl/cluster.key")?;
    let key = first.ok("cat /etc/ovl/cluster.key")?;
    world.on_all(|machine| {
        let join = match machine.name() == first.name() {
            true => String::new(),
            false => format!("join = [\"{}\"]\n", first.address()),
        };
        machine.ok(&format!(
            "[ -e /etc/ovl/cluster.key ] || (umask 077; echo {key} >/etc/ovl/cluster.key); \
             printf 'advertise = \"{}\"\\n{}' >>/etc/ovl/ovld.toml; systemctl start ovld",
            machine.address(),
            join.replace('\n', "\\n")
        ))
    })?;
    world.wait_settled()?;
    Ok(format!("{} members", world.machines.len()))
}

/// Checks the properties of the unit.
pub(super) fn unit(world: &World<'_>) -> Result<String> {
    world.on_all(|machine| {
        let shown = machine
            .ok("systemctl show ovld -p Type -p WatchdogUSec -p Restart -p NRestarts -p After -p Before")?;
        ensure_contains(&shown, &["Type=notify", "WatchdogUSec=30s", "Restart=always", "NRestarts=0"])?;
        ensure_contains(&shown, &["network-online.target", "containerd.service"])?;
        // Log levels are the journal's priorities, so `journalctl -p warning` finds problems.
        machine.ok("journalctl -u ovld -o json --no-pager PRIORITY=6 OVL_KIND=peer | grep -q OVL_OBJECT")?;
        let errors = machine.ok("journalctl -u ovld -p err -q --no-pager")?;
        ensure!(errors.is_empty(), "errors in the journal: {errors}");
        Ok(())
    })?;
    Ok(world.machines[0].ok("systemctl show -P MemoryCurrent ovld")? + " bytes of memory")
}

pub(super) fn security(world: &World<'_>) -> Result<String> {
    let machine = world.machines[0];
    let text = machine.ok("systemd-analyze security --no-pager ovld")?;
    let score: f64 = text
        .lines()
        .find_map(|line| {
            line.split_once("Overall exposure level for ovld.service:")?
                .1
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .with_context(|| format!("no score in {text}"))?;
    ensure!(score <= EXPOSURE, "the exposure is {score}: {text}");
    Ok(format!("exposure {score}"))
}

/// The restrictions of the unit do not get in the way: ovld mounts a namespace that the host sees, with DNS and a
/// published port, sees processes of other users in it, and attaches the namespace of a process of another user.
pub(super) fn sandbox(world: &World<'_>) -> Result<String> {
    let machine = world.machines[0];
    let flat = world.workloads("flat")?;
    machine.ok("ovlctl sandbox create box --network flat --publish 80:5201")?;
    machine.wait(&format!("ip netns exec box ping -n -c 1 -W 2 {}", flat[1].name))?;
    machine.ok("ip netns exec box iperf3 -s -1 -D >/dev/null 2>&1 </dev/null")?;
    world.machines[1].wait(&format!("iperf3 -t 1 -p 80 -c {}", machine.address()))?;
    let nobody =
        "setpriv --reuid 65534 --regid 65534 --clear-groups sleep 1000 >/dev/null 2>&1 </dev/null & echo $!";
    let inside = machine.ok(&format!("ip netns exec box {nobody}"))?;
    machine.wait(&format!("readlink /proc/{inside}/exe | grep -q sleep"))?;
    let refused = machine.run("ovlctl sandbox rm box")?;
    ensure!(refused.code == 1, "the sandbox was removed with a process in it: {refused}");
    ensure_contains(&refused.err, &[&inside])?;
    machine.ok(&format!("kill {inside}"))?;
    machine.wait("ovlctl sandbox rm box && [ ! -e /run/netns/box ]")?;

    let alone = machine.ok(&format!("unshare -n {nobody}"))?;
    machine.wait(&format!("readlink /proc/{alone}/exe | grep -q sleep"))?;
    machine.ok(&format!("ovlctl attach alone --network flat --pid {alone}"))?;
    machine.wait(&format!("nsenter -t {alone} -n ping -n -c 1 -W 2 {}", flat[2].address))?;
    machine.ok(&format!("ovlctl detach alone; kill {alone}"))?;
    Ok(String::new())
}

/// Restarts ovld gracefully, under load.
pub(super) fn restart(world: &World<'_>) -> Result<String> {
    let load = world.load()?;
    world.machines[1].ok("systemctl restart ovld")?;
    world.wait_settled()?;
    none_lost(load)
}

/// Kills ovld three times, under load.
pub(super) fn kill(world: &World<'_>) -> Result<String> {
    let load = world.load()?;
    let machine = world.machines[1];
    for _ in 0..3 {
        let pid = machine.ok("systemctl show -P MainPID ovld")?;
        machine.ok(&format!("kill -9 {pid}"))?;
        wait_other_daemon(machine, &pid)?;
    }
    world.wait_settled()?;
    none_lost(load)
}

/// systemd replaces a frozen ovld. The watchdog time is reduced so that this does not take half a minute.
pub(super) fn watchdog(world: &World<'_>) -> Result<String> {
    let machine = world.machines[1];
    let dir = "/run/systemd/system/ovld.service.d";
    machine.ok(&format!(
        "mkdir -p {dir}; printf '[Service]\\nWatchdogSec=5\\n' >{dir}/watchdog.conf; systemctl daemon-reload; \
         systemctl restart ovld"
    ))?;
    world.wait_settled()?;
    let load = world.load()?;
    let pid = machine.ok("systemctl show -P MainPID ovld")?;
    machine.ok(&format!("kill -STOP {pid}"))?;
    wait_other_daemon(machine, &pid)?;
    ensure_contains(&machine.ok("journalctl -u ovld -q --no-pager -n 50")?, &["atchdog"])?;
    machine.ok(&format!("rm -r {dir}; systemctl daemon-reload; systemctl restart ovld"))?;
    world.wait_settled()?;
    none_lost(load)
}

pub(super) fn wait_other_daemon(machine: &dyn Machine, last: &str) -> Result<()> {
    wait_until(SOON, "another ovld that is ready", || {
        let shown = machine.ok("systemctl show -P MainPID -P ActiveState ovld")?;
        ensure!(
            shown.contains("active") && !shown.lines().any(|line| line == last || line == "0"),
            "{shown}"
        );
        ensure!(!shown.contains("activating") && !shown.contains("inactive"), "{shown}");
        Ok(())
    })
}
