//! A userspace WireGuard on each of two hosts, configured as peers of each other.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use netns_lab::{Host, Lab, Workload, wait_until};

use super::MTU;
use super::peers::{End, Peer};
use super::uapi::{self, Interface, KEYS};

const PORT: u16 = 51820;
const START_TIMEOUT: Duration = Duration::from_secs(10);
const PREFIX: [u8; 2] = [10, 90];
/// Gateway of the workloads.
const GATEWAY: &str = "169.254.1.1";

/// Returns a host's address in the tunnel. The whole /24 belongs to that host.
pub(crate) fn address(host: usize) -> IpAddr {
    let [first, second] = PREFIX;
    IpAddr::from([first, second, host as u8 + 1, 1])
}

pub(crate) fn start(peer: Peer, program: &Path, lab: &Lab) -> Result<Vec<End>> {
    let hosts = lab.hosts();
    (0..2)
        .map(|host| end(peer, program, lab, host).with_context(|| format!("on {}", hosts[host].name())))
        .collect()
}

fn end(peer: Peer, program: &Path, lab: &Lab, index: usize) -> Result<End> {
    let (host, other): (&Host, &Host) = (&lab.hosts()[index], &lab.hosts()[1 - index]);
    // The lab's name is unique, so the interface's name is too; at most 15 characters.
    let name = format!("{}w{}", lab.name(), index + 1);
    let mut args = vec![program.as_os_str(), "--foreground".as_ref()];
    if peer != Peer::WireguardGo {
        // Dropping privileges needs a login session; they stay root, as ovld does.
        args.push("--disable-drop-privileges".as_ref());
    }
    args.push(name.as_ref());
    let mut end = End { process: host.spawn(args)?, socket: Some(uapi::socket(&name)) };

    let interface = Interface {
        private_key: KEYS[index].private,
        listen_port: PORT,
        peer_key: KEYS[1 - index].public,
        endpoint: (other.address()?, PORT).into(),
        allowed_ip: (network(1 - index), 24),
    };
    let configured =
        wait_until(START_TIMEOUT, &format!("{} to be configured", peer.name()), || interface.set(&name));
    configured.with_context(|| {
        let state = if end.process.is_running() { "it is running" } else { "it has exited" };
        format!("{state}; its output: {}{}", end.process.stdout(), end.process.stderr())
    })?;
    let lines = format!(
        "addr add {}/32 dev {name}\nlink set {name} mtu {MTU} up\nroute add {}/24 dev {name}\n",
        address(index),
        network(1 - index)
    );
    host.exec_input(["ip", "-batch", "-"], Some(&lines))?;
    Ok(end)
}

fn network(host: usize) -> IpAddr {
    let [first, second] = PREFIX;
    IpAddr::from([first, second, host as u8 + 1, 0])
}

/// Returns the address of the workload that [`workload`] creates.
pub(crate) fn workload_address(host: usize) -> IpAddr {
    let [first, second] = PREFIX;
    IpAddr::from([first, second, host as u8 + 1, 2])
}

/// Creates a workload behind the tunnel: a veth pair, a route on its host, and a gateway address that no host
/// has.
pub(crate) fn workload(host: &Host, index: usize) -> Result<Workload> {
    let workload = host.workload("behind")?;
    let (namespace, address) = (workload.netns_name(), workload_address(index));
    let outside = format!(
        "link add behind mtu {MTU} type veth peer name eth0 mtu {MTU} netns {namespace}\n\
         addr add {GATEWAY}/32 dev behind\n\
         link set behind up\n\
         route add {address}/32 dev behind\n"
    );
    let inside = format!(
        "addr add {address}/32 dev eth0\n\
         link set eth0 up\n\
         route add {GATEWAY} dev eth0 scope link\n\
         route add default via {GATEWAY} dev eth0\n"
    );
    host.exec_ok(["sysctl", "-qw", "net.ipv4.ip_forward=1"])?;
    host.exec_input(["ip", "-batch", "-"], Some(&outside))?;
    workload.exec_input(["ip", "-batch", "-"], Some(&inside))?;
    Ok(workload)
}
