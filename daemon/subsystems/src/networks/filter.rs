//! The base nftables table of ovld, as text for `nft -f -`: one transaction replaces all of it.
//!
//! It isolates networks from each other, admits VXLAN only from members, keeps encrypted networks off the underlay, and
//! masquerades traffic that leaves the cluster. The module owns no state. Begin to read at [`render`].

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use ovl_proto::SEALED_VXLAN_PORT;
use ovl_proto::id::Mac;
use ovl_proto::object::{Backend, Driver, Mode, Network};

use crate::encryption::tunnel::Gate;
use crate::marks::FROM_HOST;
use ovl_dataplane::device::Device;
use ovl_dataplane::nft::BASE_TABLE;

/// Devices of ovld from which packets arrive.
const OURS: [&str; 3] = ["ovb-*", "ovx-*", "ove-*"];

/// Matches packets that arrive unencrypted, by any device that is not listed here. VXLAN devices of ovld carry only
/// unencrypted networks, so they are not listed.
const FROM_UNDERLAY: &str =
    "iifname != \"ove-*\" iifname != \"ovb-*\" iifname != \"ovt-*\" iifname != \"lo\"";
/// Matches packets that leave unencrypted.
const TO_UNDERLAY: &str = "oifname != \"ove-*\" oifname != \"ovb-*\" oifname != \"ovt-*\" oifname != \"lo\"";

/// The underlay as the packet filter sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilterUnderlay {
    /// This host's VTEP and VXLAN port.
    pub own: SocketAddr,
    /// The VTEPs and VXLAN ports of the other members.
    pub members: BTreeSet<SocketAddr>,
    /// Whether a network of the cluster sends unencrypted VXLAN. It need not have devices on this host: its processes
    /// and workloads must not reach the VXLAN ports of other hosts either.
    pub has_vxlan: bool,
}

/// Matches packets whose output interface leads to no endpoint of this host.
const TO_OTHER_HOSTS: &str = "oifname != \"ovb-*\" oifname != \"ove-*\"";

const REJECT: &str = "reject with icmpx admin-prohibited";

/// Returns the table for a host that has these networks. It has these chains:
///
/// * `prerouting`: the kernel's VXLAN socket listens on every address of the host and accepts packets from any source;
///   this chain admits only packets from the VTEP of a member to this host's VTEP, and none of a workload. Packets that
///   are forwarded to the VXLAN port of a member must be a member's, too: to the receiver, what a workload sends there
///   and this host masquerades looks like VXLAN of this host. Unencrypted packets to and from encrypted networks are
///   dropped: see `encrypted_in`.
/// * `output`: a process of this host does not send to the VXLAN port of a member: see `local_vxlan`.
/// * `prerouting`, `output`: packets of the tunnel itself and packets within one network need no connection tracking,
///   which the address translation below would enable for them too; it costs a seventh of the throughput. Packets to
///   or from a gateway are tracked, because the host's own rules may match them. So are packets that were diverted to
///   the host, which have the gateway's MAC address, and routed packets: an endpoint may answer a packet whose address
///   was translated.
/// * `output`, `forward`: packets to an encrypted network do not leave unencrypted if a route is missing.
/// * `forward`: networks cannot reach each other, and an internal network reaches nothing else.
/// * `input`: an internal network does not reach the host, except at the addresses in `open`.
/// * `postrouting`: packets that leave the cluster are masqueraded. Packets to another endpoint of this host, at a
///   published port, keep their source address.
pub fn render(
    networks: &[&Network],
    underlay: &FilterUnderlay,
    tunnel: Option<Gate>,
    masquerade: bool,
    open: &[IpAddr],
) -> String {
    let mut text = String::new();
    // Adding before deleting makes the deletion succeed where there is no table yet.
    let _ =
        writeln!(text, "table inet {BASE_TABLE}\ndelete table inet {BASE_TABLE}\ntable inet {BASE_TABLE} {{");
    // Unneeded chains are left out: each chain that a packet passes costs a twentieth of the throughput.
    let encryption = tunnel.is_some() || networks.iter().any(|network| network.encrypted);
    if encryption || underlay.has_vxlan || networks.iter().any(|network| network.mode == Mode::L2) {
        raw(&mut text, networks, underlay, encryption.then_some(tunnel));
    }
    if networks.len() > 1 || networks.iter().any(|network| network.internal || network.encrypted) {
        forward(&mut text, networks, masquerade);
    }
    if networks.iter().any(|network| network.internal) {
        input(&mut text, networks, open);
    }
    let translated: Vec<&Network> =
        networks.iter().copied().filter(|n| is_translated(n, masquerade)).collect();
    if !translated.is_empty() {
        postrouting(&mut text, &translated);
    }
    let _ = writeln!(text, "}}");
    text
}

/// Whether the network sends unencrypted VXLAN.
pub fn has_vxlan(network: &Network) -> bool {
    !network.encrypted
        && network.driver == Driver::Overlay
        && (network.mode == Mode::L2 || network.backend != Backend::Direct)
}

/// Whether packets that leave the network are masqueraded. Always for a bridge network: other hosts have no route to
/// its addresses.
fn is_translated(network: &Network, masquerade: bool) -> bool {
    !network.internal && (masquerade || network.driver == Driver::Bridge)
}

/// Writes the chains that admit tunnel and VXLAN packets and exempt packets from connection tracking. `encryption` is
/// set if there are encrypted networks; its inner value is the local tunnel interface, if any.
fn raw(
    text: &mut String,
    networks: &[&Network],
    underlay: &FilterUnderlay,
    encryption: Option<Option<Gate>>,
) {
    if underlay.has_vxlan {
        underlay_sets(text, underlay);
    }
    // One chain for both purposes: each chain costs throughput.
    let _ =
        writeln!(text, "\tchain prerouting {{\n\t\ttype filter hook prerouting priority raw; policy accept;");
    if let Some(tunnel) = encryption {
        encrypted_in(text, networks, tunnel);
    }
    if underlay.has_vxlan {
        vxlan_in(text, underlay.own);
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
    if let Some(tunnel) = encryption {
        encrypted_out(text, networks, tunnel);
    }
    let marks = underlay.has_vxlan || encryption.flatten().is_some_and(|tunnel| tunnel.kernel);
    if marks {
        // The kernel's own packets and those of workloads have no socket here. They are nearly all.
        let _ = writeln!(text, "\t\tmeta skuid >= 0 goto from-processes");
    }
    if underlay.has_vxlan {
        let _ = writeln!(text, "\t\tudp dport {} notrack", underlay.own.port());
    }
    let _ = writeln!(text, "\t}}");
    if marks {
        from_processes(text, underlay);
    }
}

/// Kinds of device behind which workloads of other programs may be. A physical device has no kind.
const KINDS_OF_WORKLOADS: &str = "{ \"bridge\", \"veth\", \"netkit\", \"tun\" }";

/// How long VXLAN of a member is admitted by a device without being checked again.
const PATH_TIMEOUT: &str = "10s";

/// Writes the sets of members, and the chains of packets that may be forged VXLAN.
fn underlay_sets(text: &mut String, underlay: &FilterUnderlay) {
    let FilterUnderlay { own, members, .. } = underlay;
    for (n, family, kind) in [(4, "ip", "ipv4_addr"), (6, "ip6", "ipv6_addr")] {
        let of_family = |member: &&SocketAddr| member.is_ipv4() == (n == 4);
        set(text, &format!("vteps{n}"), kind, members.iter().filter(of_family).map(SocketAddr::ip));
        let _ = writeln!(
            text,
            "\tset paths{n} {{\n\t\ttypeof iif . {family} saddr\n\t\tsize 65535\n\t\tflags dynamic,timeout\n\t\ttimeout {PATH_TIMEOUT}\n\t}}"
        );
        let ports = members.iter().chain([own]).filter(of_family);
        let ports = ports.map(|member| format!("{} . {}", member.ip(), member.port()));
        set(text, &format!("members{n}"), &format!("{kind} . inet_service"), ports);
        let _ = writeln!(
            text,
            "\tchain forwarded{n} {{\n\t\tjump workloads\n\t\t{family} saddr @vteps{n} accept\n\t\tcounter drop\n\t}}"
        );
    }
    let _ = writeln!(
        text,
        "\tchain workloads {{\n\
         \t\tiifname {{ \"ovb-*\", \"ove-*\", \"lo\" }} counter drop\n\
         \t\tmeta iifkind {KINDS_OF_WORKLOADS} fib saddr . iif oif missing counter drop\n\t}}"
    );
    local_vxlan(text);
}

/// Writes the rules for VXLAN that arrives on the underlay, and for packets that are forwarded to VXLAN ports.
///
/// A packet may arrive by another device than the one by which its answer would leave: a host can have several links to
/// the underlay. Only by a device that may lead to workloads must it come from where it would be answered. The devices and
/// members that passed are remembered for a while, so that most packets read a single rule.
fn vxlan_in(text: &mut String, own: SocketAddr) {
    let (family, n) = if own.is_ipv4() { ("ip", 4) } else { ("ip6", 6) };
    let (address, port) = (own.ip(), own.port());
    let _ = writeln!(
        text,
        "\t\tudp dport {port} {family} daddr {address} iif . {family} saddr @paths{n} notrack accept\n\
         \t\tudp dport {port} {family} daddr {address} jump workloads\n\
         \t\tudp dport {port} {family} daddr {address} {family} saddr @vteps{n} add @paths{n} {{ iif . {family} saddr }} notrack accept\n\
         \t\tudp dport {port} fib daddr type != unicast counter drop\n\
         \t\tip daddr . udp dport @members4 goto forwarded4\n\
         \t\tip6 daddr . udp dport @members6 goto forwarded6"
    );
}

/// Writes the chain for packets of this host's processes. Those into overlay networks are marked: the VXLAN packet that the
/// kernel puts around such a packet has the same mark, and still belongs to the socket of the process.
fn from_processes(text: &mut String, underlay: &FilterUnderlay) {
    let _ = writeln!(text, "\tchain from-processes {{");
    for device in ["ovb-*", "ovx-*"] {
        let _ = writeln!(text, "\t\toifname \"{device}\" meta mark set meta mark | {FROM_HOST:#x} accept");
    }
    if underlay.has_vxlan {
        let ports: BTreeSet<u16> =
            underlay.members.iter().chain([&underlay.own]).map(SocketAddr::port).collect();
        let ports: Vec<String> = ports.iter().map(u16::to_string).collect();
        let _ = writeln!(text, "\t\tudp dport {{ {} }} goto local-vxlan", ports.join(", "));
    }
    let _ = writeln!(text, "\t}}");
}

/// Writes the chain for packets to a VXLAN port that belong to a socket of a process.
///
/// Such a packet is either VXLAN of the kernel around a packet of the process, which is marked, or the process itself
/// wrote what may look like VXLAN of this host. Without the capability `CAP_NET_ADMIN` no process can mark its packets.
fn local_vxlan(text: &mut String) {
    let rest = !FROM_HOST;
    let _ = writeln!(
        text,
        "\tchain local-vxlan {{\n\
         \t\tmeta mark & {FROM_HOST:#x} == {FROM_HOST:#x} meta mark set meta mark & {rest:#x} notrack accept\n\
         \t\tip daddr . udp dport @members4 counter drop\n\
         \t\tip6 daddr . udp dport @members6 counter drop\n\t}}"
    );
}

/// Writes the rules for packets of encrypted networks that arrive. They accept only:
///
/// * VXLAN from the tunnel. Its port differs from the VXLAN port on the underlay, so an unencrypted packet never
///   reaches an encrypted network, whatever its VNI;
/// * ICMPv6 from the tunnel to the hosts' addresses in it, and nothing else to these addresses. So no workload can
///   send packets into the tunnel with the host's source address;
/// * from the tunnel, packets within one routed network whose packets may be sealed. WireGuard has checked the source address;
/// * from other devices, a source address of an endpoint only by the device of that endpoint, and nothing unencrypted
///   to an endpoint. Answers to translated packets are not affected: here their destination is the host's address.
///
/// ICMPv6 is matched by its number: a minimal system has no /etc/protocols for nft to read.
fn encrypted_in(text: &mut String, networks: &[&Network], tunnel: Option<Gate>) {
    let port = SEALED_VXLAN_PORT;
    if let Some(Gate { port: outer, prefix, .. }) = tunnel {
        let _ = writeln!(
            text,
            "\t\tudp dport {outer} fib daddr type local notrack\n\
             \t\tiifname \"ovt-*\" ip6 saddr {prefix} ip6 daddr {prefix} udp dport {port} notrack accept\n\
             \t\tiifname \"ovt-*\" ip6 saddr {prefix} ip6 daddr {prefix} meta l4proto 58 accept"
        );
    }
    let _ = writeln!(text, "\t\tudp dport {port} fib daddr type != unicast counter drop");
    let through = routed(networks).filter(|network| network.may_be_sealed());
    for subnet in through.flat_map(|network| &network.subnets) {
        let (family, prefix) = (family(subnet.prefix), subnet.prefix);
        let _ =
            writeln!(text, "\t\tiifname \"ovt-*\" {family} saddr {prefix} {family} daddr {prefix} accept");
    }
    let _ = writeln!(text, "\t\tiifname \"ovt-*\" counter drop");
    if let Some(Gate { prefix, .. }) = tunnel {
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

/// Writes the rules that drop local packets to an address in the tunnel, or to an endpoint of an encrypted network,
/// whose output interface is another device.
fn encrypted_out(text: &mut String, networks: &[&Network], tunnel: Option<Gate>) {
    if let Some(Gate { port, prefix, kernel }) = tunnel {
        let rest = !FROM_HOST;
        let sealed = format!("oifname \"ovt-*\" udp dport {SEALED_VXLAN_PORT}");
        let _ = writeln!(
            text,
            "\t\tudp sport {port} notrack\n\
             \t\tip6 daddr {prefix} oifname != \"ovt-*\" oifname != \"lo\" counter drop"
        );
        let _ = match kernel {
            // As in `local_vxlan`: only the kernel sends VXLAN, also around packets of this host's processes.
            true => writeln!(
                text,
                "\t\t{sealed} meta skuid >= 0 meta mark & {FROM_HOST:#x} == 0 counter drop\n\
                 \t\t{sealed} meta mark set meta mark & {rest:#x} notrack accept"
            ),
            false => writeln!(text, "\t\t{sealed} counter drop"),
        };
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

/// Writes the chain that isolates networks from each other. Rules for a switched network match its bridge; rules for a
/// routed network match addresses, because each of its endpoints has its own device.
fn forward(text: &mut String, networks: &[&Network], masquerade: bool) {
    let _ = writeln!(
        text,
        "\tchain forward {{\n\t\ttype filter hook forward priority filter - 10; policy accept;"
    );
    for subnet in encrypted(networks).flat_map(|network| &network.subnets) {
        let (family, prefix) = (family(subnet.prefix), subnet.prefix);
        let _ = writeln!(text, "\t\t{family} daddr {prefix} {TO_UNDERLAY} counter drop");
        // A packet that is not masqueraded keeps an endpoint's address, so its answers would be dropped. Packets that
        // answer a connection to a published port are accepted: connection tracking restores the host's address.
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
        // The packet was sent to a published port of this host or to a Service, not to an endpoint of the other
        // network. The tables that translated it have decided about it.
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

/// Writes the chain that keeps endpoints of an internal network from the host, except from its addresses in `open`.
/// Without it the host would answer, since it has a route to them. On a routed network, connections that the host opens
/// are answered.
fn input(text: &mut String, networks: &[&Network], open: &[IpAddr]) {
    let others = |v4: bool, family: &str| -> String {
        let open = open.iter().filter(|address| address.is_ipv4() == v4).map(IpAddr::to_string);
        match open.collect::<Vec<_>>().join(", ") {
            none if none.is_empty() => format!("meta nfproto {}", if v4 { "ipv4" } else { "ipv6" }),
            open => format!("{family} daddr != {{ {open} }}"),
        }
    };
    let (others_v4, others_v6) = (others(true, "ip"), others(false, "ip6"));
    let _ =
        writeln!(text, "\tchain input {{\n\t\ttype filter hook input priority filter - 10; policy accept;");
    for bridge in
        switched(networks).filter(|network| network.internal).map(|network| Device::bridge(network.id))
    {
        // Neighbour solicitations and advertisements (RFC 4861), by their numbers.
        let _ = writeln!(
            text,
            "\t\tiifname \"{bridge}\" meta l4proto 58 @th,0,8 {{ 135, 136 }} accept\n\
             \t\tiifname \"{bridge}\" {others_v4} counter drop\n\
             \t\tiifname \"{bridge}\" {others_v6} counter drop"
        );
    }
    for subnet in routed(networks).filter(|network| network.internal).flat_map(|network| &network.subnets) {
        let (family, prefix) = (family(subnet.prefix), subnet.prefix);
        // Neighbour discovery and what other chains exempt from tracking is untracked, so this rule does not match them.
        let _ = writeln!(
            text,
            "\t\t{family} saddr {prefix} iifname != \"lo\" ct state {{ invalid, new }} counter drop"
        );
    }
    let _ = writeln!(text, "\t}}");
}

/// Writes the chain that masquerades packets that leave the cluster.
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

/// Returns the family's name in nft.
fn family(prefix: IpNet) -> &'static str {
    match prefix {
        IpNet::V4(_) => "ip",
        IpNet::V6(_) => "ip6",
    }
}

/// Writes a set with its elements.
fn set<T: ToString>(text: &mut String, name: &str, kind: &str, elements: impl Iterator<Item = T>) {
    let elements: Vec<String> = elements.map(|element| element.to_string()).collect();
    let _ = writeln!(text, "\tset {name} {{\n\t\ttype {kind}");
    if !elements.is_empty() {
        let _ = writeln!(text, "\t\telements = {{ {} }}", elements.join(", "));
    }
    let _ = writeln!(text, "\t}}");
}
