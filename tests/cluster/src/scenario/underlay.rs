//! Changes and limitations of the underlay: addresses, delay, loss and firewalls.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Result, bail, ensure};

use super::network::DIRECT;
use crate::flow::{Flow, PINGS_A_SECOND, at_most_lost, none_lost};
use crate::machine::SOON;
use crate::world::{Undo, World, ensure_contains};

/// Number of pings that may be lost until all machines have followed one to its new address: 15 s. ovld waits 2 s for
/// the old address to return, and the machines are slow.
const FOLLOWED: usize = 15 * PINGS_A_SECOND as usize;

/// Number of pings that may be lost while a firewall loads its rules: 20 s. At full speed it takes a fraction of a
/// second.
const RELOADED: usize = 20 * PINGS_A_SECOND as usize;

/// A machine's address changes while its daemon runs, and back again while it is stopped.
pub(super) fn address(world: &World<'_>) -> Result<String> {
    world.network("straight", DIRECT)?;
    world.network("secret", "--subnet 10.73.0.0/16 --encrypted")?;
    let networks = ["flat", "pods", "straight", "secret"];
    let all = networks.iter().map(|network| world.workloads(network)).collect::<Result<Vec<_>>>()?;
    for workloads in &all {
        world.ping_all(workloads)?;
    }
    let others = Flow::start(&[(&all[0][0], &all[0][1]), (&all[1][0], &all[1][1])])?;
    let last = world.last();
    let (old, new) = (last.address(), beside(last.address())?);
    let move_to = |from: IpAddr, to: IpAddr| {
        format!("ip address del {from}/24 dev {0} && ip address add {to}/24 dev {0}", last.link())
    };
    let _undo =
        Undo::on(vec![last], format!("ip address show | grep -q {old}/ || {{ {}; }}", move_to(new, old)));

    let moved = Flow::start(&[(&all[0][0], all[0].last().unwrap_or(&all[0][0]))])?;
    last.ok(&move_to(old, new))?;
    wait_vtep(world, new)?;
    for workloads in &all {
        world.ping_all(workloads)?;
    }
    world.wait_settled()?;
    ensure_contains(&last.ok("ovlctl events")?, &[&format!("follows its address to {new}")])?;
    let mut sent = 0;
    let lost = at_most_lost(moved, FOLLOWED, &mut sent)?;

    last.ok(&format!("systemctl stop ovld && {} && systemctl start ovld", move_to(new, old)))?;
    wait_vtep(world, old)?;
    for workloads in &all {
        world.ping_all(workloads)?;
    }
    world.wait_settled()?;
    let others = none_lost(others)?;
    Ok(format!(
        "to the machine {lost} of {sent} lost, at {PINGS_A_SECOND} a second; between the others {others}"
    ))
}

/// Another address of the same segment.
fn beside(address: IpAddr) -> Result<IpAddr> {
    let IpAddr::V4(v4) = address else { bail!("{address}: the underlay of these machines is IPv4") };
    let [a, b, c, d] = v4.octets();
    Ok(Ipv4Addr::new(a, b, c, d + 100).into())
}

/// Waits until all machines know the last one's address.
fn wait_vtep(world: &World<'_>, address: IpAddr) -> Result<()> {
    let name = world.last().name();
    world
        .on_all(|machine| {
            machine.wait_ctl("peers", &format!("{name} at {address}"), |peers| {
                let mut all = peers.as_array()?.iter();
                all.any(|peer| peer["name"] == name && peer["vtep"] == address.to_string()).then_some(())
            })
        })
        .map(drop)
}

/// Packets are delayed, reordered and duplicated, and then lost. No machine is declared dead, nothing is lost that the
/// underlay does not lose, and changes reach all machines.
pub(super) fn netem(world: &World<'_>) -> Result<String> {
    let deaths = "journalctl -u ovld -q --no-pager | grep -c -- '-> dead' || true";
    let before = world.on_all(|machine| machine.ok(deaths))?;
    let netem = |how: &str| {
        world.on_all(|machine| {
            machine.ok(&format!("tc qdisc replace dev {} root netem {how}", machine.link())).map(drop)
        })
    };
    let undo = Undo::on(
        world.machines.clone(),
        "tc qdisc show | sed -n 's/^qdisc netem .* dev \\([^ ]*\\) root.*/\\1/p' | xargs -r -n 1 sh -c 'tc qdisc del dev $0 root'"
            .to_owned(),
    );

    // The queue has room for all that TCP has in flight. Otherwise it would drop packets.
    netem("limit 20000 delay 20ms 8ms reorder 25% 50% duplicate 5%")?;
    let load = world.load()?;
    try_network(world, "late", "--subnet 10.75.0.0/16")?;
    world.on_all(|machine| {
        machine.ok(&format!("tc -s qdisc show dev {} | grep -q 'dropped 0,'", machine.link()))
    })?;
    let late = none_lost(load)?;

    netem("delay 10ms 3ms loss 10%")?;
    let load = world.load()?;
    let rate = try_network(world, "lossy", "--mode l3 --subnet 10.76.0.0/16")?;
    let mut sent = 0;
    let most = at_most_lost(load, usize::MAX, &mut sent)?;
    world.wait_settled()?;
    ensure!(before == world.on_all(|machine| machine.ok(deaths))?, "a machine was declared dead");
    drop(undo);
    world.wait_settled()?;
    Ok(format!(
        "delayed, reordered, duplicated: {late}; 10 % loss each way: no machine declared dead, TCP {rate:.1} Mbit/s, {most} \
         lost on the worst of 6 flows ({} pings each)",
        sent / 6
    ))
}

/// Creates a network with workloads, measures TCP, and deletes it again. Returns Mbit/s.
fn try_network(world: &World<'_>, network: &str, options: &str) -> Result<f64> {
    world.network(network, options)?;
    let all = world.workloads(network)?;
    world.ping_all(&all)?;
    let rate = all[0].tcp(&all[1], 3)?;
    world.remove_network(network)?;
    Ok(rate)
}

/// A firewall of Debian that drops incoming and forwarded packets by default: how to turn it on and off, and how to
/// open it as docs/operations.md describes.
struct Firewall {
    /// Turns it on, and lets only ssh in, which the scenarios need.
    on: &'static str,
    off: &'static str,
    /// Lets a segment in. Parameters: segment, protocol, port or `FIRST:LAST`.
    open: fn(&str, &str, &str) -> String,
    /// Lets the routed network pass.
    pass: &'static str,
    reload: &'static str,
    /// Succeeds once it has loaded its rules.
    active: &'static str,
}

const UFW: Firewall = Firewall {
    on: "ufw default deny incoming && ufw allow 22/tcp && ufw --force enable",
    off: "ufw --force reset >/dev/null",
    open: |segment, protocol, port| format!("ufw allow proto {protocol} from {segment} to any port {port}"),
    pass: "ufw route allow from 10.71.0.0/16 && ufw route allow from fd71::/48",
    reload: "ufw reload",
    active: "ufw status | grep -q 'Status: active'",
};

const FIREWALLD: Firewall = Firewall {
    on: "systemctl --quiet unmask firewalld && systemctl start firewalld",
    off: "systemctl stop firewalld; systemctl --quiet mask firewalld; rm -f /etc/firewalld/zones/*",
    open: |segment, protocol, port| {
        format!(
            "firewall-cmd --permanent --add-rich-rule='rule family=ipv4 source address={segment} \
             port port={} protocol={protocol} accept'",
            port.replace(':', "-")
        )
    },
    pass: "firewall-cmd --permanent --zone=trusted --add-source=10.71.0.0/16 --add-source=fd71::/48 && systemctl reload firewalld",
    // `firewall-cmd --reload` gives up after the D-Bus timeout of 25 s, which these machines may exceed.
    reload: "systemctl reload firewalld",
    active: "firewall-cmd --state && ! nft list table inet firewalld_policy_drop",
};

pub(super) fn ufw(world: &World<'_>) -> Result<String> {
    behind(world, &UFW)
}

pub(super) fn firewalld(world: &World<'_>) -> Result<String> {
    behind(world, &FIREWALLD)
}

/// Activates a firewall on one machine, and opens it as docs/operations.md describes. Then everything works.
fn behind(world: &World<'_>, firewall: &Firewall) -> Result<String> {
    let machine = world.machines[1];
    let networks = ["flat", "pods"];
    let all = networks.iter().map(|network| world.workloads(network)).collect::<Result<Vec<_>>>()?;
    let undo = Undo::on(vec![machine], firewall.off.to_owned());
    // ufw and firewalld are slow here, because they are written in Python.
    let run = |script: &str| machine.ok_for(SOON * 4, script).map(drop);
    run(firewall.on)?;
    // Gossip passes, because this host sends first. VXLAN packets are no replies.
    let (from, to) = (&all[0][0], &all[0][1]);
    from.machine.wait(&format!("! {} ping -n -c 2 -W 2 {}", from.exec(), to.address))?;

    let segment = segment(machine.address())?;
    for (protocol, port) in [("tcp", "7940"), ("udp", "7940"), ("udp", "4789"), ("udp", "51940:51941")] {
        run(&(firewall.open)(&segment, protocol, port))?;
    }
    run(firewall.pass)?;
    world.wait_settled()?;
    for workloads in &all {
        world.ping_all(workloads)?;
    }
    // While the firewall loads its rules, it drops what belongs to no connection, such as VXLAN packets. Afterwards all
    // traffic recovers by itself.
    let load = world.load()?;
    run(firewall.reload)?;
    machine.wait(firewall.active)?;
    let reloaded = at_most_lost(load, RELOADED, &mut 0)?;
    world.wait_settled()?;
    // A restart of the daemon loses no packet.
    let load = world.load()?;
    machine.ok("systemctl restart ovld")?;
    world.wait_settled()?;
    let lost = none_lost(load)?;
    machine.wait(firewall.active)?;
    drop(undo);
    world.wait_settled()?;
    Ok(format!(
        "daemon restarted: {lost}; rules reloaded: {:.1} s without a reply",
        reloaded as f64 / f64::from(PINGS_A_SECOND)
    ))
}

/// The /24 that an address is in.
fn segment(address: IpAddr) -> Result<String> {
    let IpAddr::V4(v4) = address else { bail!("{address}: the underlay of these machines is IPv4") };
    let [a, b, c, _] = v4.octets();
    Ok(format!("{a}.{b}.{c}.0/24"))
}
