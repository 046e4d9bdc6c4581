//! The underlay: namespaces, the switch's bridge, and each host's link to it.

use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::netns::{NETNS_DIR, Netns};
use crate::state::{HostState, LabState};
use crate::tool::{self, ip_batch};
use crate::wait::wait_until;

/// Name of the host's side of its link.
pub(crate) const NIC: &str = "eth0";

const BRIDGE: &str = "br0";

/// Maximum time until a new carrier is noticed; usually some milliseconds.
const CARRIER_TIMEOUT: Duration = Duration::from_secs(5);

/// The kernel's default for `gso_max_segs`.
const SEGMENTS_WITH_OFFLOAD: u32 = 65535;

pub(crate) fn switch_namespace(lab: &str) -> String {
    format!("{lab}-sw")
}

pub(crate) fn host_namespace(lab: &str, host: &str) -> String {
    format!("{lab}-{host}")
}

pub(crate) fn workload_namespace(lab: &str, host: &str, workload: &str) -> String {
    format!("{lab}-{host}-{workload}")
}

/// Returns the existing namespaces of a lab.
pub(crate) fn namespaces_of(lab: &str) -> Result<Vec<String>> {
    if !Path::new(NETNS_DIR).exists() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(NETNS_DIR).with_context(|| format!("cannot list {NETNS_DIR}"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if belongs_to(&name, lab) {
            names.push(name);
        }
    }
    Ok(names)
}

/// Returns whether a namespace belongs to a lab. Foreign namespaces may have the same prefix, so the whole
/// name is checked.
fn belongs_to(namespace: &str, lab: &str) -> bool {
    let Some(rest) = namespace.strip_prefix(lab).and_then(|rest| rest.strip_prefix('-')) else {
        return false;
    };
    let host = rest.split('-').next().unwrap_or(rest);
    let is_host = host.strip_prefix('h').is_some_and(|number| number.parse::<u8>().is_ok());
    rest == "sw" || is_host
}

/// Creates the switch and all hosts. Uses a few processes regardless of the number of hosts, because starting
/// a process costs more than its work.
pub(crate) fn build(lab: &LabState) -> Result<()> {
    let switch = switch_namespace(&lab.name);
    let namespaces: Vec<String> = std::iter::once(switch.clone())
        .chain(lab.hosts.iter().map(|host| host_namespace(&lab.name, &host.name)))
        .collect();
    add_namespaces(&namespaces)?;
    Netns::new(switch.clone()).run(plain_bridges)??;

    let mut lines = vec![
        "link set lo up".to_owned(),
        format!("link add {BRIDGE} type bridge forward_delay 0 stp_state 0 mcast_snooping 0"),
        format!("link set {BRIDGE} up"),
    ];
    lines.extend(lab.hosts.iter().flat_map(|host| port_lines(lab, host)));
    ip_batch(Some(&switch), &lines)?;
    lab.hosts.iter().try_for_each(|host| configure_host(lab, host))?;
    wait_connected(lab, &lab.hosts.iter().collect::<Vec<_>>())
}

/// Creates one host again from its saved state.
pub(crate) fn rebuild_host(lab: &LabState, host: &HostState) -> Result<()> {
    add_namespaces(&[host_namespace(&lab.name, &host.name)])?;
    ip_batch(Some(&switch_namespace(&lab.name)), &port_lines(lab, host))?;
    configure_host(lab, host)?;
    wait_connected(lab, &[host])
}

/// Waits until these hosts' links carry frames. The kernel notifies the bridge, the queues and IPv6 of a new
/// carrier with a delay, and until then they drop packets. A dropped neighbour solicitation would be repeated
/// only after a second.
pub(crate) fn wait_connected(lab: &LabState, hosts: &[&HostState]) -> Result<()> {
    let linked: Vec<&HostState> = hosts.iter().copied().filter(|host| host.present && host.link_up).collect();
    let switch = Netns::new(switch_namespace(&lab.name));
    wait_until(CARRIER_TIMEOUT, "the switch's ports to forward", || -> Result<()> {
        let ports = switch.bridge_json(&["link", "show"])?;
        for host in &linked {
            let port =
                ports.as_array().into_iter().flatten().find(|port| port["ifname"] == host.name.as_str());
            ensure!(port.is_some_and(|port| port["state"] == "forwarding"), "{}: {ports}", host.name);
        }
        Ok(())
    })?;
    for host in linked {
        let what = format!("the carrier of {}", host.name);
        let netns = Netns::new(host_namespace(&lab.name, &host.name));
        wait_until(CARRIER_TIMEOUT, &what, || netns.run(nic_is_ready)?)?;
    }
    Ok(())
}

/// Returns whether IPv6 in the calling thread's namespace has noticed the carrier: the link-local address
/// exists and is not tentative.
fn nic_is_ready() -> Result<bool> {
    const TENTATIVE: u32 = 0x40;
    let text = fs::read_to_string("/proc/thread-self/net/if_inet6")?;
    for line in text.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let &[address, _, _, _, flags, NIC] = fields.as_slice()
            && address.starts_with("fe80")
        {
            return Ok(u32::from_str_radix(flags, 16)? & TENTATIVE == 0);
        }
    }
    Ok(false)
}

pub(crate) fn add_namespaces(names: &[String]) -> Result<()> {
    ip_batch(None, &names.iter().map(|name| format!("netns add {name}")).collect::<Vec<_>>())
}

/// Kills the processes in namespaces, then deletes the namespaces.
pub(crate) fn remove_namespaces(names: &[String]) -> Result<()> {
    let killed = crate::procs::kill_all_in(names);
    if !names.is_empty() {
        let lines: String = names.iter().map(|name| format!("netns del {name}\n")).collect();
        // Unlike `ip_batch`, this continues after a failed line.
        tool::run(["ip", "-force", "-batch", "-"], Some(&lines))?;
    }
    killed
}

fn port_lines(lab: &LabState, host: &HostState) -> [String; 2] {
    let HostState { name, number, mtu, port_mtu, .. } = host;
    let namespace = host_namespace(&lab.name, name);
    // A restored host keeps its MAC address, as a real machine does.
    let mac = format!("02:4c:4e:00:00:{number:02x}");
    let state = if host.link_up { "up" } else { "down" };
    [
        format!(
            "link add {name} mtu {port_mtu} type veth peer name {NIC} address {mac} mtu {mtu} netns {namespace}"
        ),
        format!("link set {name} master {BRIDGE} {state}"),
    ]
}

fn configure_host(lab: &LabState, host: &HostState) -> Result<()> {
    let namespace = host_namespace(&lab.name, &host.name);
    // Nothing is preset for the daemon's own devices. Only the lab's link skips duplicate address detection,
    // and forwarding is off as after a boot (a namespace inherits it from the machine).
    Netns::new(namespace.clone()).run(|| -> Result<()> {
        set_sysctl("net/ipv4/ip_forward", "0")?;
        set_sysctl(&format!("net/ipv6/conf/{NIC}/accept_dad"), "0")?;
        plain_bridges()?;
        enable_ipv6()
    })??;

    let mut lines = vec!["link set lo up".to_owned(), format!("link set {NIC} up")];
    if lab.mtus_differ() {
        lines.push(offload_line(false));
    }
    let addresses = [host.v4.map(IpAddr::V4), host.v6.map(IpAddr::V6)];
    lines.extend(addresses.into_iter().flatten().map(address_line));
    ip_batch(Some(&namespace), &lines)
}

/// Returns the `ip` batch line that adds an address to a host.
pub(crate) fn address_line(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => format!("addr add {v4}/24 brd + dev {NIC}"),
        IpAddr::V6(v6) => format!("addr add {v6}/64 dev {NIC} nodad"),
    }
}

/// Returns the `ip` batch line that turns segmentation offload on or off. Between namespaces, a packet of
/// many segments stays unsegmented and passes links with a smaller MTU. If MTUs differ, hosts must segment
/// before they send.
fn offload_line(offload: bool) -> String {
    format!("link set {NIC} gso_max_segs {}", if offload { SEGMENTS_WITH_OFFLOAD } else { 1 })
}

/// Sets both sides of a host's link to the MTUs of the state, and segmentation offload on every host
/// accordingly.
pub(crate) fn apply_mtu(lab: &LabState, host: &HostState) -> Result<()> {
    if host.present {
        let HostState { name, mtu, port_mtu, .. } = host;
        let port = format!("link set {name} mtu {port_mtu}");
        // The bridge's own MTU would follow the smallest port; the bridge has no traffic of its own.
        ip_batch(Some(&switch_namespace(&lab.name)), &[port])?;
        ip_batch(Some(&host_namespace(&lab.name, name)), &[format!("link set {NIC} mtu {mtu}")])?;
    }
    let offload = offload_line(!lab.mtus_differ());
    lab.hosts.iter().filter(|host| host.present).try_for_each(|host| {
        ip_batch(Some(&host_namespace(&lab.name, &host.name)), std::slice::from_ref(&offload))
    })
}

/// Creates the namespace of a workload, with its loopback interface up.
pub(crate) fn build_workload(namespace: &str) -> Result<()> {
    add_namespaces(&[namespace.to_owned()])?;
    ip_batch(Some(namespace), &["link set lo up".to_owned()])?;
    Netns::new(namespace.to_owned()).run(enable_ipv6)?
}

/// Disables the packet filter for bridged frames, as on a host without `br_netfilter`. The machine may have
/// loaded it for other reasons, and it is on in a new namespace.
fn plain_bridges() -> Result<()> {
    if !Path::new("/proc/sys/net/bridge").exists() {
        return Ok(());
    }
    ["arptables", "iptables", "ip6tables"]
        .iter()
        .try_for_each(|what| set_sysctl(&format!("net/bridge/bridge-nf-call-{what}"), "0"))
}

fn enable_ipv6() -> Result<()> {
    set_sysctl("net/ipv6/conf/all/disable_ipv6", "0")?;
    set_sysctl("net/ipv6/conf/default/disable_ipv6", "0")
}

/// Sets a sysctl of the calling thread's namespace. Reads it first, because most have the right value
/// already.
fn set_sysctl(key: &str, value: &str) -> Result<()> {
    let path = Path::new("/proc/sys").join(key);
    let context = || format!("cannot set {} to {value}", path.display());
    if fs::read_to_string(&path).with_context(context)?.trim() != value {
        fs::write(&path, value).with_context(context)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_namespaces_do_not_belong_to_a_lab() {
        for ours in ["lab-sw", "lab-h1", "lab-h250-web-1"] {
            assert!(belongs_to(ours, "lab"), "{ours}");
        }
        for foreign in ["lab", "lab-switch", "lab-host", "lab2-h1", "lab-h", "lab-h1x", "mylab-h1"] {
            assert!(!belongs_to(foreign, "lab"), "{foreign}");
        }
    }
}
