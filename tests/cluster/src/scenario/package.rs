//! Installation, upgrade and removal of the package.

use anyhow::{Result, ensure};

use crate::flow::none_lost;
use crate::machine::Machine;
use crate::packages::{FIRST, NEXT};
use crate::world::{World, ensure_contains};

pub(super) fn install(world: &World<'_>) -> Result<String> {
    let said = world.on_all(|machine| {
        let said = dpkg(machine, FIRST)?;
        // Without a key ovld cannot run, so the package prints what to do.
        ensure_contains(&said, &["ovlctl key generate", "/etc/ovl/ovld.toml"])?;
        ensure!(machine.run("systemctl is-active ovld")?.out.trim() == "inactive", "ovld runs without a key");
        ensure_contains(&machine.ok("systemctl is-enabled ovld")?, &["enabled"])?;
        machine.ok("dpkg --verify ovl && ovlctl completions bash | cmp - /usr/share/bash-completion/completions/ovlctl")?;
        // A manual page for each command and for each program.
        let pages = machine.ok("mkdir /run/pages && ovlctl man /run/pages && cd /run/pages && for each in * ../ovld.8 ../ovl-docker.8 ../ovl-kube.8; do \
             test -s /usr/share/man/man${each##*.}/${each##*/}.gz || echo $each; done; rm -r /run/pages")?;
        ensure!(pages.is_empty(), "missing manual pages: {pages}");
        for unit in ["ovl-docker", "ovl-kube"] {
            let enabled = machine.run(&format!("systemctl is-enabled {unit}"))?.out;
            ensure!(enabled.trim() == "disabled", "{unit} must not be enabled by default");
        }
        // ovld exits with 78 for an invalid configuration, so systemd does not restart it again and again.
        let wrong = machine.run("echo nonsense = 1 >/tmp/wrong; ovld --config /tmp/wrong")?;
        ensure!(wrong.code == 78, "{wrong}");
        ensure_contains(&wrong.err, &["nonsense"])?;
        machine.ok("for each in ovld ovlctl ovl-docker ovl-kube /usr/lib/cni/ovl-cni; do $each --version; done")
    })?;
    for part in ["commit: ", "features: switched, routed, bridge, encrypted, "] {
        ensure!(said[0].matches(part).count() == 5, "{}", said[0]);
    }
    Ok(said[0].lines().take(2).collect::<Vec<_>>().join(", "))
}

/// Upgrades one machine after the other, under load.
pub(super) fn upgrade(world: &World<'_>) -> Result<String> {
    world.last().ok("systemctl enable --now ovl-docker")?;
    let load = world.load()?;
    let first = if world.brief { world.machines.len() - 1 } else { 0 };
    for machine in &world.machines[first..] {
        let before = machine.ok("systemctl show -P MainPID ovld")?;
        dpkg(*machine, NEXT)?;
        machine.ok("systemctl is-active ovld")?;
        ensure!(machine.ok("systemctl show -P MainPID ovld")? != before, "the old daemon still runs");
        // The configuration is still there.
        machine.ok("grep -q ^advertise /etc/ovl/ovld.toml")?;
        machine.ok("[ ! -e /opt/cni/bin/ovl-cni ] || cmp /usr/lib/cni/ovl-cni /opt/cni/bin/ovl-cni")?;
    }
    world.last().ok("systemctl is-active ovl-docker && test -S /run/docker/plugins/ovl.sock")?;
    world.wait_settled()?;
    none_lost(load)
}

/// Removes the package: the daemon is stopped, the data plane stays, and the package prints what it leaves.
pub(super) fn remove(world: &World<'_>) -> Result<String> {
    let last = world.last();
    last.ok("systemctl enable --now ovl-docker")?;
    let load = world.load()?;
    let output = last.ok("apt-get remove -y ovl 2>&1")?;
    ensure_contains(&output, &["still exist", "ovlctl teardown"])?;
    for unit in ["ovld", "ovl-docker"] {
        ensure!(last.run(&format!("systemctl is-active {unit}"))?.code != 0, "{unit} still runs");
    }
    last.ok("test -e /etc/ovl/ovld.toml && test ! -e /usr/sbin/ovld")?;
    let lost = none_lost(load)?;
    // Installed again, everything works as before.
    dpkg(last, NEXT)?;
    last.ok("systemctl is-active ovld && systemctl is-active ovl-docker")?;
    world.wait_settled()?;
    Ok(lost)
}

/// Script that prints what a purge should not leave. The packages themselves are in `/opt/ovl`.
const LEFT: &str = r"
find / -xdev \( -path /proc -o -path /sys -o -path /opt/ovl -o -path /var/log -o -path /tmp \) -prune \
    -o \( -name 'ovl*' -o -name '*-ovl*' -o -name '_ovl*' \) -print
find /run -path /run/netns -prune -o -name 'ovl*' -print
nft list tables | grep ovl
ip -o link | grep -E ' ov[a-z]-'
ip route show table all proto 79
ip -6 route show table all proto 79
systemctl list-units --all --plain --no-legend 'ovl*'
dpkg-query -W -f '${db:Status-Abbrev}' ovl 2>/dev/null
";

/// Purges the package, on one machine after a teardown and on the others without one: nothing is left.
pub(super) fn purge(world: &World<'_>) -> Result<String> {
    world.machines[0].ok("ovlctl teardown --yes")?;
    world.on_all(|machine| {
        machine.ok("apt-get purge -y ovl 2>&1")?;
        let left = machine.run(LEFT)?.text();
        ensure!(left.is_empty(), "left on {}: {left}", machine.name());
        Ok(())
    })?;
    Ok(String::new())
}

/// Installs a package without a network, so its dependencies must be installed already.
fn dpkg(machine: &dyn Machine, package: &str) -> Result<String> {
    machine.ok(&format!(
        "DEBIAN_FRONTEND=noninteractive dpkg --force-unsafe-io -i {}/{package} 2>&1",
        machine.files()
    ))
}
