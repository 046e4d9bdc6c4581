//! The underlay: namespaces, the switch's bridge, and each host's link to it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::netns::{NETNS_DIR, Netns};
use crate::ruleset::LAN;
use crate::state::{HostState, LabState};
use crate::tool::{self, ip_batch};
use crate::topology::{self, NIC};
use crate::wait::wait_until;

const BRIDGE: &str = "br0";

/// Maximum time until a new carrier is noticed; usually some milliseconds.
const CARRIER_TIMEOUT: Duration = Duration::from_secs(5);

/// The kernel's default for `gso_max_segs`.
const SEGMENTS_WITH_OFFLOAD: u32 = 65535;

pub(crate) fn switch_namespace(lab: &str) -> String {
    format!("{lab}-sw")
}

pub(crate) fn box_namespace(lab: &str, nat_box: &str) -> String {
    format!("{lab}-{nat_box}")
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
    let is_numbered = |kind: char| host.strip_prefix(kind).is_some_and(|number| number.parse::<u8>().is_ok());
    rest == "sw" || is_numbered('h') || rest == host && (is_numbered('n') || is_numbered('c'))
}

/// The end of a cable: a bridge, and the namespace that it is in.
pub(crate) struct Socket {
    pub(crate) namespace: String,
    bridge: &'static str,
}

impl Socket {
    /// Returns the socket of a NAT box's LAN, or of the switch.
    pub(crate) fn of(lab: &str, nat_box: Option<&str>) -> Self {
        match nat_box {
            Some(name) => Socket { namespace: box_namespace(lab, name), bridge: LAN },
            None => Socket { namespace: switch_namespace(lab), bridge: BRIDGE },
        }
    }

    /// Returns the `ip` batch line that plugs a port in.
    pub(crate) fn plug_line(&self, port: &str, up: bool) -> String {
        format!("link set {port} master {} {}", self.bridge, if up { "up" } else { "down" })
    }
}

/// Returns the `ip` batch line that creates a bridge.
pub(crate) fn bridge_line(name: &str) -> String {
    format!("link add {name} type bridge forward_delay 0 stp_state 0 mcast_snooping 0")
}

/// Creates the switch.
pub(crate) fn build_switch(lab: &LabState) -> Result<()> {
    let namespace = switch_namespace(&lab.name);
    add_namespaces(std::slice::from_ref(&namespace))?;
    Netns::new(namespace.clone()).run(plain_bridges)??;
    let lines = ["link set lo up".to_owned(), bridge_line(BRIDGE), format!("link set {BRIDGE} up")];
    ip_batch(Some(&namespace), &lines)
}

/// Creates all hosts and their cables to the switch and to the NAT boxes. Uses a few processes regardless of the number of
/// hosts, because starting a process costs more than its work.
pub(crate) fn build_hosts(lab: &LabState) -> Result<()> {
    let namespaces: Vec<String> =
        lab.hosts.iter().map(|host| host_namespace(&lab.name, &host.name)).collect();
    add_namespaces(&namespaces)?;
    for nat_box in std::iter::once(None).chain(lab.boxes.iter().map(|each| Some(each.name.as_str()))) {
        ip_batch(Some(&Socket::of(&lab.name, nat_box).namespace), &ports_of(lab, nat_box))?;
    }
    lab.hosts.iter().try_for_each(|host| configure_host(lab, host))?;
    wait_connected(lab, &lab.hosts.iter().collect::<Vec<_>>())
}

/// Returns the `ip` batch lines that create the cables of the hosts behind a box, or on the switch.
fn ports_of(lab: &LabState, nat_box: Option<&str>) -> Vec<String> {
    let hosts = lab.hosts.iter().filter(|host| host.behind.as_deref() == nat_box);
    hosts.flat_map(|host| port_lines(lab, host)).collect()
}

/// Creates one host again from its saved state.
pub(crate) fn rebuild_host(lab: &LabState, host: &HostState) -> Result<()> {
    add_namespaces(&[host_namespace(&lab.name, &host.name)])?;
    ip_batch(Some(&host_socket(lab, host).namespace), &port_lines(lab, host))?;
    configure_host(lab, host)?;
    wait_connected(lab, &[host])
}

/// Returns where a host's cable leads to.
pub(crate) fn host_socket(lab: &LabState, host: &HostState) -> Socket {
    Socket::of(&lab.name, host.behind.as_deref())
}

/// Waits until these hosts' links carry frames. The kernel notifies the bridge, the queues and IPv6 of a new
/// carrier with a delay, and until then they drop packets. A dropped neighbour solicitation would be repeated
/// only after a second.
pub(crate) fn wait_connected(lab: &LabState, hosts: &[&HostState]) -> Result<()> {
    let linked: Vec<&HostState> = hosts.iter().copied().filter(|host| host.present && host.link_up).collect();
    // By socket: one call for all ports of a bridge.
    for nat_box in std::iter::once(None).chain(lab.boxes.iter().map(|each| Some(each.name.as_str()))) {
        let ports = linked.iter().filter(|host| host.behind.as_deref() == nat_box);
        let ports: Vec<&str> = ports.map(|host| host.name.as_str()).collect();
        wait_forwarding(&Socket::of(&lab.name, nat_box), &ports)?;
    }
    for host in linked {
        wait_ready(host_namespace(&lab.name, &host.name), NIC)?;
    }
    Ok(())
}

/// Waits until these ports of a bridge forward frames.
pub(crate) fn wait_forwarding(socket: &Socket, ports: &[&str]) -> Result<()> {
    if ports.is_empty() {
        return Ok(());
    }
    let netns = Netns::new(socket.namespace.clone());
    wait_until(CARRIER_TIMEOUT, &format!("ports of {} to forward", socket.namespace), || -> Result<()> {
        let seen = netns.bridge_json(&["link", "show"])?;
        for name in ports {
            let port = seen.as_array().into_iter().flatten().find(|port| port["ifname"] == *name);
            ensure!(port.is_some_and(|port| port["state"] == "forwarding"), "{name}: {seen}");
        }
        Ok(())
    })
}

/// Waits until IPv6 in a namespace has noticed the carrier of a device: the link-local address exists and is not
/// tentative.
pub(crate) fn wait_ready(namespace: String, device: &str) -> Result<()> {
    let what = format!("the carrier of {device} in {namespace}");
    let netns = Netns::new(namespace);
    wait_until(CARRIER_TIMEOUT, &what, || netns.run(|| is_ready(device))?)
}

fn is_ready(device: &str) -> Result<bool> {
    const TENTATIVE: u32 = 0x40;
    let text = fs::read_to_string("/proc/thread-self/net/if_inet6")?;
    for line in text.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if let &[address, _, _, _, flags, name] = fields.as_slice()
            && address.starts_with("fe80")
            && name == device
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
    [
        format!(
            "link add {name} mtu {port_mtu} type veth peer name {NIC} address {mac} mtu {mtu} netns {namespace}"
        ),
        host_socket(lab, host).plug_line(name, host.link_up),
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
    lines.extend(topology::change(&[], &lab.host_settings(host)).1);
    ip_batch(Some(&namespace), &lines)
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
        ip_batch(Some(&host_socket(lab, host).namespace), &[port])?;
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
pub(crate) fn plain_bridges() -> Result<()> {
    if !Path::new("/proc/sys/net/bridge").exists() {
        return Ok(());
    }
    ["arptables", "iptables", "ip6tables"]
        .iter()
        .try_for_each(|what| set_sysctl(&format!("net/bridge/bridge-nf-call-{what}"), "0"))
}

pub(crate) fn enable_ipv6() -> Result<()> {
    set_sysctl("net/ipv6/conf/all/disable_ipv6", "0")?;
    set_sysctl("net/ipv6/conf/default/disable_ipv6", "0")
}

/// Sets a sysctl of the calling thread's namespace. Reads it first, because most have the right value
/// already.
pub(crate) fn set_sysctl(key: &str, value: &str) -> Result<()> {
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
        for ours in ["lab-sw", "lab-h1", "lab-h250-web-1", "lab-n3", "lab-c1"] {
            assert!(belongs_to(ours, "lab"), "{ours}");
        }
        for foreign in [
            "lab",
            "lab-switch",
            "lab-host",
            "lab2-h1",
            "lab-h",
            "lab-h1x",
            "mylab-h1",
            "lab-n3-web",
            "lab-next",
        ] {
            assert!(!belongs_to(foreign, "lab"), "{foreign}");
        }
    }
}
