//! Our nftables table, as text for `nft -f -`: one transaction replaces all of it.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::SEALED_VXLAN_PORT;
use ovl_proto::id::Mac;
use ovl_proto::object::{Backend, Driver, Mode, Network};

use crate::names::resolver::{ADDRESS_V4, ADDRESS_V6, CLUSTER_V4, CLUSTER_V6};
use ovl_dataplane::device::Device;
use ovl_dataplane::nft::BASE_TABLE;

/// Devices of ours that packets come from.
const OURS: [&str; 3] = ["ovb-*", "ovx-*", "ove-*"];

/// Neither of these: packets are in plain there, whoever made the device. What comes by a VXLAN device of ours
/// is of some plain network.
const FROM_UNDERLAY: &str =
    "iifname != \"ove-*\" iifname != \"ovb-*\" iifname != \"ovt-*\" iifname != \"lo\"";
const TO_UNDERLAY: &str = "oifname != \"ove-*\" oifname != \"ovb-*\" oifname != \"ovt-*\" oifname != \"lo\"";

/// This host's end of the tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FilterTunnel {
    /// Its UDP port.
    pub port: u16,
    /// Where the tunnel's addresses are.
    pub prefix: IpNet,
    /// The kernel's devices do it, VXLAN included; else nothing but ovld puts VXLAN into the tunnel.
    pub kernel: bool,
}

/// Not to an endpoint of this host, on whichever network.
const TO_OTHER_HOSTS: &str = "oifname != \"ovb-*\" oifname != \"ove-*\"";

const REJECT: &str = "reject with icmpx admin-prohibited";

/// The table for a host that has these networks.
///
/// * `prerouting`: the VXLAN socket listens on every address of the host and takes packets from
///   anybody; only members' VTEPs may use it. What passes through this host to another one is let alone.
///   To and from encrypted networks nothing comes in plain: see [`sealed_in`].
/// * `prerouting`, `output`: neither the tunnels' own packets nor what stays within a network need
///   connection tracking, which the translation below would switch on for them too (a seventh of
///   the throughput). What goes to or from a gateway is tracked: the host's own rules may look at it. So is
///   what was diverted to the host, which has the gateway's MAC address.
///   So is what is routed: an endpoint may answer a packet that was translated on its way to it.
/// * `output`, `forward`: nothing for an encrypted network leaves in plain, should a route be missing.
/// * `forward`: networks do not reach each other, and an internal one reaches nothing.
/// * `input`: nor does it reach a host.
/// * `postrouting`: what leaves the cluster gets the host's address. What goes to another endpoint of this host, at a
///   published port, keeps its own.
pub fn render(
    networks: &[&Network],
    vteps: &BTreeSet<IpAddr>,
    vxlan_port: u16,
    tunnel: Option<FilterTunnel>,
    masquerade: bool,
) -> String {
    let mut text = String::new();
    // Adding before deleting makes the deletion succeed where there is no table yet.
    let _ =
        writeln!(text, "table inet {BASE_TABLE}\ndelete table inet {BASE_TABLE}\ntable inet {BASE_TABLE} {{");
    // What has no work is left out: each chain that a packet passes costs a twentieth of the throughput.
    let sealed = tunnel.is_some() || networks.iter().any(|network| network.encrypted);
    if sealed || networks.iter().any(|network| has_vxlan(network) || network.mode == Mode::L2) {
        raw(&mut text, networks, vteps, vxlan_port, sealed.then_some(tunnel));
    }
    if networks.len() > 1 || networks.iter().any(|network| network.internal || network.encrypted) {
        forward(&mut text, networks, masquerade);
    }
    if networks.iter().any(|network| network.internal) {
        input(&mut text, networks);
    }
    let translated: Vec<&Network> =
        networks.iter().copied().filter(|n| is_translated(n, masquerade)).collect();
    if !translated.is_empty() {
        postrouting(&mut text, &translated);
    }
    let _ = writeln!(text, "}}");
    text
}

fn has_vxlan(network: &Network) -> bool {
    !network.encrypted
        && network.driver == Driver::Overlay
        && (network.mode == Mode::L2 || network.backend != Backend::Direct)
}

/// Whether what leaves the network gets the host's address. Nobody else knows the addresses of a bridge network.
fn is_translated(network: &Network, masquerade: bool) -> bool {
    !network.internal && (masquerade || network.driver == Driver::Bridge)
}

/// Whose packets are taken, and what is not tracked. `sealed`: there are encrypted networks, and maybe an end of
/// the tunnel here.
fn raw(
    text: &mut String,
    networks: &[&Network],
    vteps: &BTreeSet<IpAddr>,
    vxlan_port: u16,
    sealed: Option<Option<FilterTunnel>>,
) {
    let plain = networks.iter().any(|network| has_vxlan(network));
    if plain {
        set(text, "vteps4", "ipv4_addr", vteps.iter().filter(|vtep| vtep.is_ipv4()));
        set(text, "vteps6", "ipv6_addr", vteps.iter().filter(|vtep| vtep.is_ipv6()));
    }
    // One chain for all of it.
    let _ =
        writeln!(text, "\tchain prerouting {{\n\t\ttype filter hook prerouting priority raw; policy accept;");
    if let Some(tunnel) = sealed {
        sealed_in(text, networks, tunnel);
    }
    if plain {
        let _ = writeln!(
            text,
            "\t\tudp dport {vxlan_port} ip saddr @vteps4 notrack accept\n\
             \t\tudp dport {vxlan_port} ip6 saddr @vteps6 notrack accept\n\
             \t\tudp dport {vxlan_port} fib daddr type != unicast counter drop"
        );
    }
    for network in switched(networks) {
        let mac = Mac::of_gateway(network.id);
        for subnet in &network.subnets {
            let (family, prefix, gateway) = (family(subnet.prefix), subnet.prefix, subnet.gateway);
            let _ = writeln!(
                text,
                "\t\tether daddr != {mac} {family} saddr {prefix} {family} daddr {prefix} {family} saddr != {gateway} {family} daddr != {gateway} notrack"
            );
        }
    }
    let _ =
        writeln!(text, "\t}}\n\tchain output {{\n\t\ttype filter hook output priority raw; policy accept;");
    if let Some(tunnel) = sealed {
        sealed_out(text, networks, tunnel);
    }
    if plain {
        let _ = writeln!(text, "\t\tudp dport {vxlan_port} notrack");
    }
    let _ = writeln!(text, "\t}}");
}

/// What of encrypted networks is taken:
///
/// * VXLAN from the tunnel alone. The port is another one than outside, so a plain packet meets none of the
///   encrypted networks, whatever its identifier;
/// * nothing else for the hosts' addresses in the tunnel than echo and errors, and that from the tunnel; so no
///   workload gets its packets into the tunnel under this host's name;
/// * from the tunnel, packets within one encrypted routed network. WireGuard has checked that the source is
///   the sender's;
/// * from elsewhere, nothing whose source is an endpoint's unless it comes in where that endpoint is; and
///   nothing in plain to an endpoint. Answers to what was translated are for the host's address here.
///
/// ICMPv6 by its number: a minimal system has no /etc/protocols that nft could look into.
fn sealed_in(text: &mut String, networks: &[&Network], tunnel: Option<FilterTunnel>) {
    let port = SEALED_VXLAN_PORT;
    if let Some(FilterTunnel { port: outer, prefix, .. }) = tunnel {
        let _ = writeln!(
            text,
            "\t\tudp dport {outer} fib daddr type local notrack\n\
             \t\tiifname \"ovt-*\" ip6 saddr {prefix} ip6 daddr {prefix} udp dport {port} notrack accept\n\
             \t\tiifname \"ovt-*\" ip6 saddr {prefix} ip6 daddr {prefix} meta l4proto 58 accept"
        );
    }
    let _ = writeln!(text, "\t\tudp dport {port} fib daddr type != unicast counter drop");
    for subnet in encrypted(networks).filter(|network| network.mode == Mode::L3).flat_map(|n| &n.subnets) {
        let (family, prefix) = (family(subnet.prefix), subnet.prefix);
        let _ =
            writeln!(text, "\t\tiifname \"ovt-*\" {family} saddr {prefix} {family} daddr {prefix} accept");
    }
    let _ = writeln!(text, "\t\tiifname \"ovt-*\" counter drop");
    if let Some(FilterTunnel { prefix, .. }) = tunnel {
        for side in ["saddr", "daddr"] {
            let _ = writeln!(text, "\t\tip6 {side} {prefix} iifname != \"lo\" counter drop");
        }
    }
    for network in encrypted(networks) {
        let elsewhere = match network.mode {
            Mode::L2 => {
                format!("iifname != \"{}\" iifname != \"lo\"", Device::bridge(network.id))
            }
            Mode::L3 => "fib saddr . iif oif missing".to_owned(),
        };
        for subnet in &network.subnets {
            let (family, prefix) = (family(subnet.prefix), subnet.prefix);
            let _ = writeln!(
                text,
                "\t\t{family} daddr {prefix} {FROM_UNDERLAY} counter drop\n\
                 \t\t{family} saddr {prefix} {elsewhere} counter drop"
            );
        }
    }
}

/// Nothing for a host in the tunnel, or for an endpoint of an encrypted network, leaves by another device.
fn sealed_out(text: &mut String, networks: &[&Network], tunnel: Option<FilterTunnel>) {
    if let Some(FilterTunnel { port, prefix, kernel }) = tunnel {
        let vxlan = if kernel { "notrack" } else { "counter drop" };
        let _ = writeln!(
            text,
            "\t\tudp sport {port} notrack\n\
             \t\tip6 daddr {prefix} oifname != \"ovt-*\" oifname != \"lo\" counter drop\n\
             \t\toifname \"ovt-*\" udp dport {SEALED_VXLAN_PORT} {vxlan}"
        );
    }
    for subnet in encrypted(networks).flat_map(|network| &network.subnets) {
        let (family, prefix) = (family(subnet.prefix), subnet.prefix);
        let _ = writeln!(text, "\t\t{family} daddr {prefix} {TO_UNDERLAY} counter drop");
    }
}

fn encrypted<'a>(networks: &'a [&'a Network]) -> impl Iterator<Item = &'a Network> {
    networks.iter().copied().filter(|network| network.encrypted)
}

fn switched<'a>(networks: &'a [&'a Network]) -> impl Iterator<Item = &'a Network> {
    networks.iter().copied().filter(|network| network.mode == Mode::L2)
}

fn routed<'a>(networks: &'a [&'a Network]) -> impl Iterator<Item = &'a Network> {
    networks.iter().copied().filter(|network| network.mode == Mode::L3)
}

/// A switched network is behind its bridge. An endpoint of a routed one has a device of its own, so
/// there addresses tell where a packet belongs.
fn forward(text: &mut String, networks: &[&Network], masquerade: bool) {
    let _ = writeln!(
        text,
        "\tchain forward {{\n\t\ttype filter hook forward priority filter - 10; policy accept;"
    );
    for subnet in encrypted(networks).flat_map(|network| &network.subnets) {
        let (family, prefix) = (family(subnet.prefix), subnet.prefix);
        let _ = writeln!(text, "\t\t{family} daddr {prefix} {TO_UNDERLAY} counter drop");
        // What is not translated would have an endpoint's address, and its answers would be dropped.
        // So may be an answer to what was sent to a published port.
        let untranslated = if masquerade {
            "ct state invalid counter drop".to_owned()
        } else {
            format!("ct status ! dnat {REJECT}")
        };
        let _ = writeln!(text, "\t\t{family} saddr {prefix} {TO_UNDERLAY} {untranslated}");
    }
    let internal: Vec<&Network> = networks.iter().copied().filter(|network| network.internal).collect();
    for bridge in switched(&internal).map(|network| Device::bridge(network.id)) {
        let _ = writeln!(text, "\t\tiifname \"{bridge}\" oifname != \"{bridge}\" counter drop");
        let _ = writeln!(text, "\t\toifname \"{bridge}\" iifname != \"{bridge}\" counter drop");
    }
    for subnet in routed(&internal).flat_map(|network| &network.subnets) {
        let (family, prefix) = (family(subnet.prefix), subnet.prefix);
        let _ = writeln!(text, "\t\t{family} daddr {prefix} {family} saddr != {prefix} counter drop");
        let _ = writeln!(text, "\t\t{family} saddr {prefix} {family} daddr != {prefix} counter drop");
    }
    let open: Vec<&Network> = networks.iter().copied().filter(|network| !network.internal).collect();
    if open.len() > 1 {
        // It was sent to an address that the other network's endpoints do not have: one of this host's, at which a
        // port is published, or a service's. Whoever translated it has decided.
        let _ = writeln!(text, "\t\tct status dnat accept");
    }
    for bridge in switched(&open).map(|network| Device::bridge(network.id)) {
        for from in OURS {
            let _ = writeln!(
                text,
                "\t\toifname \"{bridge}\" iifname \"{from}\" iifname != \"{bridge}\" counter {REJECT}"
            );
        }
    }
    for subnet in routed(&open).flat_map(|network| &network.subnets) {
        let (family, prefix) = (family(subnet.prefix), subnet.prefix);
        for from in OURS {
            let _ = writeln!(
                text,
                "\t\t{family} daddr {prefix} {family} saddr != {prefix} iifname \"{from}\" counter {REJECT}"
            );
        }
    }
    let _ = writeln!(text, "\t}}");
}

/// Who is on an internal network reaches nothing of a host either, but its resolver: the host has a way back to it. On a
/// routed network the host itself may begin, and is answered.
fn input(text: &mut String, networks: &[&Network]) {
    let _ =
        writeln!(text, "\tchain input {{\n\t\ttype filter hook input priority filter - 10; policy accept;");
    for bridge in
        switched(networks).filter(|network| network.internal).map(|network| Device::bridge(network.id))
    {
        // Neighbour solicitations and advertisements (RFC 4861), by their numbers.
        let _ = writeln!(
            text,
            "\t\tiifname \"{bridge}\" meta l4proto 58 @th,0,8 {{ 135, 136 }} accept\n\
             \t\tiifname \"{bridge}\" ip daddr != {{ {ADDRESS_V4}, {CLUSTER_V4} }} counter drop\n\
             \t\tiifname \"{bridge}\" ip6 daddr != {{ {ADDRESS_V6}, {CLUSTER_V6} }} counter drop"
        );
    }
    for subnet in routed(networks).filter(|network| network.internal).flat_map(|network| &network.subnets) {
        let (family, prefix) = (family(subnet.prefix), subnet.prefix);
        // What is for the resolver is not tracked, nor is neighbour discovery.
        let _ = writeln!(
            text,
            "\t\t{family} saddr {prefix} iifname != \"lo\" ct state {{ invalid, new }} counter drop"
        );
    }
    let _ = writeln!(text, "\t}}");
}

fn postrouting(text: &mut String, networks: &[&Network]) {
    let _ = writeln!(
        text,
        "\tchain postrouting {{\n\t\ttype nat hook postrouting priority srcnat; policy accept;"
    );
    for network in networks {
        for subnet in &network.subnets {
            let (family, prefix) = (family(subnet.prefix), subnet.prefix);
            let _ = match network.mode {
                Mode::L2 => {
                    writeln!(text, "\t\t{family} saddr {prefix} {TO_OTHER_HOSTS} masquerade")
                }
                Mode::L3 => {
                    writeln!(
                        text,
                        "\t\t{family} saddr {prefix} {family} daddr != {prefix} {TO_OTHER_HOSTS} masquerade"
                    )
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
