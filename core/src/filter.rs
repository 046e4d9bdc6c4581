//! Our nftables table, as text for `nft -f -`: one transaction replaces all of it.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::object::{Backend, Mode, Network};

use crate::device::Device;

/// The name of our table, in the family `inet`. No other table is ever touched.
pub const TABLE: &str = "ovl";

/// Devices of ours that packets come from.
const OURS: [&str; 3] = ["ovb-*", "ovx-*", "ove-*"];

const REJECT: &str = "reject with icmpx admin-prohibited";

/// The table for a host that has these networks.
///
/// * `prerouting`: the VXLAN socket listens on every address of the host and takes packets from
///   anybody; only members' VTEPs may use it. What passes through this host to another one is let alone.
/// * `prerouting`, `output`: neither the tunnels' own packets nor what stays within a network need
///   connection tracking, which the translation below would switch on for them too (a seventh of
///   the throughput). What goes to or from a gateway is tracked: the host's own rules may look at it.
///   So is what is routed: an endpoint may answer a packet that was translated on its way to it.
/// * `forward`: networks do not reach each other, and an internal one reaches nothing.
/// * `postrouting`: what leaves the cluster gets the host's address.
pub fn render(networks: &[&Network], vteps: &BTreeSet<IpAddr>, vxlan_port: u16, masquerade: bool) -> String {
    let mut text = String::new();
    // Adding before deleting makes the deletion succeed where there is no table yet.
    let _ = writeln!(text, "table inet {TABLE}\ndelete table inet {TABLE}\ntable inet {TABLE} {{");
    // What has no work is left out: each chain that a packet passes costs a twentieth of the throughput.
    if networks.iter().any(|network| network.mode == Mode::L2 || network.backend != Backend::Direct) {
        tunnels(&mut text, networks, vteps, vxlan_port);
    }
    if networks.len() > 1 || networks.iter().any(|network| network.internal) {
        forward(&mut text, networks);
    }
    if masquerade && networks.iter().any(|network| !network.internal) {
        postrouting(&mut text, networks);
    }
    let _ = writeln!(text, "}}");
    text
}

/// Whose VXLAN packets are taken, and what is not tracked.
fn tunnels(text: &mut String, networks: &[&Network], vteps: &BTreeSet<IpAddr>, vxlan_port: u16) {
    set(text, "vteps4", "ipv4_addr", vteps.iter().filter(|vtep| vtep.is_ipv4()));
    set(text, "vteps6", "ipv6_addr", vteps.iter().filter(|vtep| vtep.is_ipv6()));
    // One chain for both.
    let _ = writeln!(
        text,
        "\tchain prerouting {{\n\t\ttype filter hook prerouting priority raw; policy accept;\n\
         \t\tudp dport {vxlan_port} ip saddr @vteps4 notrack accept\n\
         \t\tudp dport {vxlan_port} ip6 saddr @vteps6 notrack accept\n\
         \t\tudp dport {vxlan_port} fib daddr type != unicast counter drop"
    );
    for subnet in switched(networks).flat_map(|network| &network.subnets) {
        let (family, prefix, gateway) = (family(subnet.prefix), subnet.prefix, subnet.gateway);
        let _ = writeln!(
            text,
            "\t\t{family} saddr {prefix} {family} daddr {prefix} {family} saddr != {gateway} {family} daddr != {gateway} notrack"
        );
    }
    let _ = writeln!(
        text,
        "\t}}\n\tchain output {{\n\t\ttype filter hook output priority raw; policy accept;\n\
         \t\tudp dport {vxlan_port} notrack\n\t}}"
    );
}

fn switched<'a>(networks: &'a [&'a Network]) -> impl Iterator<Item = &'a Network> {
    networks.iter().copied().filter(|network| network.mode == Mode::L2)
}

fn routed<'a>(networks: &'a [&'a Network]) -> impl Iterator<Item = &'a Network> {
    networks.iter().copied().filter(|network| network.mode == Mode::L3)
}

/// A switched network is behind its bridge. An endpoint of a routed one has a device of its own, so
/// there addresses tell where a packet belongs.
fn forward(text: &mut String, networks: &[&Network]) {
    let _ = writeln!(
        text,
        "\tchain forward {{\n\t\ttype filter hook forward priority filter - 10; policy accept;"
    );
    for network in switched(networks) {
        let bridge = Device::bridge(network.id);
        if network.internal {
            let _ = writeln!(text, "\t\tiifname \"{bridge}\" oifname != \"{bridge}\" counter drop");
            let _ = writeln!(text, "\t\toifname \"{bridge}\" iifname != \"{bridge}\" counter drop");
        } else {
            for from in OURS {
                let _ = writeln!(
                    text,
                    "\t\toifname \"{bridge}\" iifname \"{from}\" iifname != \"{bridge}\" counter {REJECT}"
                );
            }
        }
    }
    for network in routed(networks) {
        for subnet in &network.subnets {
            let (family, prefix) = (family(subnet.prefix), subnet.prefix);
            if network.internal {
                let _ = writeln!(text, "\t\t{family} daddr {prefix} {family} saddr != {prefix} counter drop");
                let _ = writeln!(text, "\t\t{family} saddr {prefix} {family} daddr != {prefix} counter drop");
            } else {
                for from in OURS {
                    let _ = writeln!(
                        text,
                        "\t\t{family} daddr {prefix} {family} saddr != {prefix} iifname \"{from}\" counter {REJECT}"
                    );
                }
            }
        }
    }
    let _ = writeln!(text, "\t}}");
}

fn postrouting(text: &mut String, networks: &[&Network]) {
    let _ = writeln!(
        text,
        "\tchain postrouting {{\n\t\ttype nat hook postrouting priority srcnat; policy accept;"
    );
    for network in networks.iter().filter(|network| !network.internal) {
        for subnet in &network.subnets {
            let (family, prefix) = (family(subnet.prefix), subnet.prefix);
            let _ = match network.mode {
                Mode::L2 => {
                    let bridge = Device::bridge(network.id);
                    writeln!(text, "\t\t{family} saddr {prefix} oifname != \"{bridge}\" masquerade")
                }
                Mode::L3 => {
                    writeln!(text, "\t\t{family} saddr {prefix} {family} daddr != {prefix} masquerade")
                }
            };
        }
    }
    let _ = writeln!(text, "\t}}");
}

fn family(prefix: IpNet) -> &'static str {
    match prefix {
        IpNet::V4(_) => "ip",
        IpNet::V6(_) => "ip6",
    }
}

fn set<'a>(text: &mut String, name: &str, kind: &str, elements: impl Iterator<Item = &'a IpAddr>) {
    let elements: Vec<String> = elements.map(IpAddr::to_string).collect();
    let _ = writeln!(text, "\tset {name} {{\n\t\ttype {kind}");
    if !elements.is_empty() {
        let _ = writeln!(text, "\t\telements = {{ {} }}", elements.join(", "));
    }
    let _ = writeln!(text, "\t}}");
}
