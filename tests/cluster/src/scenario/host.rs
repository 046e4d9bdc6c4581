//! Machines that lack kernel modules, and machines with NetworkManager.

use anyhow::{Result, ensure};

use crate::flow::none_lost;
use crate::world::{Undo, World, ensure_contains};

/// File that forbids kernel modules.
const FORBIDDEN: &str = "/etc/modprobe.d/ovl-test.conf";
const CONFIG: &str = "/etc/ovl/ovld.toml";

/// Kernel modules, and the problem that is reported without each.
const FEATURES: [(&str, &str); 3] = [
    ("vxlan", "no VXLAN: install or allow its module `vxlan`"),
    ("nf_tables", "no nftables: install or allow its module `nf_tables`"),
    ("wireguard", "no WireGuard devices (`modprobe wireguard`)"),
];

/// A machine whose kernel lacks the modules reports each of them, and works as soon as it gets them.
pub(super) fn features(world: &World<'_>) -> Result<String> {
    let last = world.last();
    world.network("secret", "--subnet 10.73.0.0/16 --encrypted")?;
    let undo = Undo::on(
        vec![last],
        format!(
            "rm -f {FORBIDDEN}; [ ! -e /root/ovld.toml ] || mv /root/ovld.toml {CONFIG}; systemctl restart ovld"
        ),
    );
    for (module, _) in FEATURES {
        last.ok(&format!("echo install {module} /bin/false >>{FORBIDDEN}"))?;
    }
    last.ok(&format!("cp {CONFIG} /root/ovld.toml; sed -i '1i tunnel = \"kernel\"' {CONFIG}"))?;
    last.reboot()?;
    for (_, problem) in FEATURES {
        last.wait(&format!("ovlctl status | grep -F '{problem}'"))?;
    }
    ensure_contains(&last.ok("ovlctl status")?, &["degraded"])?;
    for (module, problem) in &FEATURES[..2] {
        ensure_contains(&last.ok("journalctl -u ovld -b -p warning -q --no-pager")?, &[problem])?;
        last.ok(&format!("sed -i '/ {module} /d' {FORBIDDEN}"))?;
    }
    // Without a restart.
    last.wait(&format!("! ovlctl status | grep -F -e '{}' -e '{}'", FEATURES[0].1, FEATURES[1].1))?;
    let flat = world.workloads("flat")?;
    world.ping_all(&flat)?;
    drop(undo);
    world.wait_settled()?;
    let secret = world.workloads("secret")?;
    world.ping_all(&secret)?;
    Ok("vxlan, nf_tables and wireguard reported when missing".to_owned())
}

/// NetworkManager leaves ovl's devices alone, existing and new ones.
pub(super) fn network_manager(world: &World<'_>) -> Result<String> {
    let last = world.last();
    let flat = world.workloads("flat")?;
    let load = world.load()?;
    let links = "for each in ovb- ovx- ove-; do grep -H . /sys/class/net/$each*/address; done";
    let before = last.ok(links)?;
    let conf = "/etc/NetworkManager/conf.d/underlay.conf";
    let undo = Undo::on(
        vec![last],
        format!("systemctl stop NetworkManager; systemctl --quiet mask NetworkManager; rm -f {conf}"),
    );
    last.ok(&format!(
        "printf '[keyfile]\\nunmanaged-devices+=interface-name:e[tn]*\\n' >{conf}; systemctl --quiet unmask NetworkManager; \
         systemctl start NetworkManager"
    ))?;
    let managed = "nmcli -t -f DEVICE,STATE device | grep '^ov' | grep -v ':unmanaged$'";
    let unmanaged = "nmcli -t -f DEVICE,STATE device | grep -c '^ov.*:unmanaged$'";
    last.wait(&format!("[ $({unmanaged}) -ge 4 ]"))?;
    last.ok("ovlctl sandbox create managed --network flat && systemctl restart NetworkManager")?;
    last.wait(&format!("ip netns exec managed ping -n -c 1 -W 2 {}", flat[0].address))?;
    last.wait(&format!("[ $({unmanaged}) -ge 5 ]"))?;
    let seen = last.run(managed)?;
    ensure!(seen.out.is_empty(), "NetworkManager manages {}", seen.out);
    last.ok("ovlctl sandbox rm managed")?;
    ensure!(last.wait(links)? == before, "MAC addresses or devices have changed");
    world.wait_settled()?;
    let lost = none_lost(load)?;
    drop(undo);
    Ok(lost)
}
