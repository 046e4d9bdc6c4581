//! Packets in words. What is in them comes from workloads: nothing here can fail, and control characters never get out.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;

use etherparse::{ArpOperation, LaxNetSlice, LaxSlicedPacket, TransportSlice};
use ovl_proto::capture::{LinkType, PacketKey, PointKind};
use ovl_proto::clock::timestamp;

use super::merge::Merged;
use crate::text::printable;

/// VXLAN's header follows that of UDP.
const VXLAN_HEADER: usize = 8;

/// What is shown of a packet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Decoded {
    /// Source and destination, with their ports.
    ends: Option<[(IpAddr, Option<u16>); 2]>,
    /// The protocol and what it says.
    says: String,
    /// The source and the destination of the VXLAN packet around it, and the VNI.
    outer: Option<(IpAddr, IpAddr, u32)>,
}

impl Decoded {
    /// All addresses.
    pub(super) fn addresses(&self) -> impl Iterator<Item = IpAddr> + use<> {
        let ends = self.ends.iter().flatten().map(|(address, _)| *address);
        let outer = self.outer.iter().flat_map(|(from, to, _)| [*from, *to]);
        ends.chain(outer).collect::<Vec<_>>().into_iter()
    }
}

fn slice(bytes: &[u8], link: LinkType) -> Option<LaxSlicedPacket<'_>> {
    match link {
        LinkType::Ethernet => LaxSlicedPacket::from_ethernet(bytes).ok(),
        LinkType::Ip => LaxSlicedPacket::from_ip(bytes).ok(),
    }
}

/// Returns the addresses, the identification of IPv4, the protocol and its header.
fn network<'a>(packet: &LaxSlicedPacket<'a>) -> Option<(IpAddr, IpAddr, u16, u8, &'a [u8])> {
    match packet.net.as_ref()? {
        LaxNetSlice::Ipv4(ip) => {
            let header = ip.header();
            let (from, to) = (header.source_addr().into(), header.destination_addr().into());
            let payload = ip.payload();
            Some((from, to, header.identification(), payload.ip_number.0, payload.payload))
        }
        LaxNetSlice::Ipv6(ip) => {
            let header = ip.header();
            let (from, to) = (header.source_addr().into(), header.destination_addr().into());
            let payload = ip.payload();
            Some((from, to, 0, payload.ip_number.0, payload.payload))
        }
        LaxNetSlice::Arp(_) => None,
    }
}

/// Returns the packet inside of a VXLAN packet with one of these ports, and its VNI. Without ports, any port that VXLAN may
/// have is taken.
fn inner<'a>(
    packet: &LaxSlicedPacket<'a>,
    ports: Option<&BTreeSet<u16>>,
) -> Option<(LaxSlicedPacket<'a>, u32)> {
    let Some(TransportSlice::Udp(udp)) = &packet.transport else { return None };
    let to = udp.destination_port();
    let is_vxlan = match ports {
        Some(ports) => ports.contains(&to),
        None => matches!(to, ovl_proto::DEFAULT_VXLAN_PORT | ovl_proto::SEALED_VXLAN_PORT),
    };
    let payload = udp.payload();
    let header = payload.get(..VXLAN_HEADER).filter(|_| is_vxlan)?;
    let &[flags, _, _, _, high, middle, low, _] = header else { return None };
    // The flag that says that there is a VNI (RFC 7348, section 5).
    if flags & 0x08 == 0 {
        return None;
    }
    let vni = u32::from_be_bytes([0, high, middle, low]);
    Some((slice(payload.get(VXLAN_HEADER..)?, LinkType::Ethernet)?, vni))
}

/// Returns what recognizes a packet elsewhere. `None` if it is none of IP.
pub(super) fn key(bytes: &[u8], link: LinkType) -> Option<PacketKey> {
    let outer = slice(bytes, link)?;
    let packet = inner(&outer, None).map_or(outer, |(packet, _)| packet);
    let (source, _, id, protocol, transport) = network(&packet)?;
    Some(PacketKey::new(source, protocol, id, transport))
}

/// Says what a packet is.
pub(super) fn decode(bytes: &[u8], link: LinkType, vxlan_ports: &BTreeSet<u16>) -> Decoded {
    let Some(packet) = slice(bytes, link) else {
        return Decoded { says: format!("{} bytes that are no packet", bytes.len()), ..Decoded::default() };
    };
    if let Some((inside, vni)) = inner(&packet, Some(vxlan_ports))
        && let Some((from, to, ..)) = network(&packet)
    {
        return Decoded { outer: Some((from, to, vni)), ..plain(&inside) };
    }
    plain(&packet)
}

fn plain(packet: &LaxSlicedPacket<'_>) -> Decoded {
    if let Some(LaxNetSlice::Arp(arp)) = &packet.net {
        let address = |bytes: &[u8]| <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from);
        let ends = address(arp.sender_protocol_addr()).zip(address(arp.target_protocol_addr()));
        let says = match arp.operation() {
            ArpOperation::REQUEST => "arp who-has",
            ArpOperation::REPLY => "arp is-at",
            _ => "arp",
        };
        return Decoded {
            ends: ends.map(|(from, to)| [(from, None), (to, None)]),
            says: says.to_owned(),
            outer: None,
        };
    }
    let Some((from, to, _, protocol, bytes)) = network(packet) else {
        let kind = packet.ether_payload().map(|payload| payload.ether_type.0);
        let says = kind.map_or_else(|| "no IP".to_owned(), |kind| format!("ethertype {kind:#06x}"));
        return Decoded { says, ..Decoded::default() };
    };
    let (ports, says) = match &packet.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            let mut flags = String::new();
            for (is_set, letter) in
                [(tcp.syn(), 'S'), (tcp.fin(), 'F'), (tcp.rst(), 'R'), (tcp.psh(), 'P'), (tcp.ack(), '.')]
            {
                if is_set {
                    flags.push(letter);
                }
            }
            let length = tcp.payload().len();
            let says = format!("tcp {flags} seq {} length {length}", tcp.sequence_number());
            (Some([tcp.source_port(), tcp.destination_port()]), says)
        }
        Some(TransportSlice::Udp(udp)) => (
            Some([udp.source_port(), udp.destination_port()]),
            format!("udp length {}", udp.length().saturating_sub(8)),
        ),
        Some(TransportSlice::Icmpv4(icmp)) => {
            (None, icmp_says("icmp", icmp.type_u8(), icmp.code_u8(), bytes))
        }
        Some(TransportSlice::Icmpv6(icmp)) => {
            (None, icmp_says("icmp6", icmp.type_u8(), icmp.code_u8(), bytes))
        }
        _ => (None, format!("protocol {protocol}")),
    };
    let port = |n: usize| ports.and_then(|ports| ports.get(n).copied());
    Decoded { ends: Some([(from, port(0)), (to, port(1))]), says, outer: None }
}

fn icmp_says(name: &str, kind: u8, code: u8, bytes: &[u8]) -> String {
    let sequence = match bytes.get(6..8) {
        Some(&[high, low]) => u16::from_be_bytes([high, low]),
        _ => 0,
    };
    match (name, kind, code) {
        ("icmp", 8, _) | ("icmp6", 128, _) => format!("{name} echo request seq {sequence}"),
        ("icmp", 0, _) | ("icmp6", 129, _) => format!("{name} echo reply seq {sequence}"),
        ("icmp", 3, 4) | ("icmp6", 2, _) => format!("{name} packet too big"),
        ("icmp", 3, 3) | ("icmp6", 1, 4) => format!("{name} port unreachable"),
        ("icmp", 3, _) | ("icmp6", 1, _) => format!("{name} unreachable code {code}"),
        ("icmp6", 135, _) => "icmp6 neighbour solicitation".to_owned(),
        ("icmp6", 136, _) => "icmp6 neighbour advertisement".to_owned(),
        _ => format!("{name} type {kind} code {code}"),
    }
}

impl Merged {
    /// Whether the workload sent it or, elsewhere, the host. The host's interface of an endpoint sends what the endpoint
    /// receives.
    pub(super) fn is_sent(&self) -> bool {
        self.packet.outgoing != (self.point.kind == PointKind::Endpoint)
    }
}

/// Returns the line of a packet.
pub(super) fn line(merged: &Merged, decoded: &Decoded, name: impl Fn(IpAddr) -> String) -> String {
    let Merged { host, point, packet, dropped, .. } = merged;
    let at = timestamp(packet.at_ns / 1_000_000);
    // The date and the zone are the same on each line.
    let time = at.get(11..19).unwrap_or_default();
    let micros = packet.at_ns / 1000 % 1_000_000;
    let direction = if merged.is_sent() { "out" } else { "in" };
    let place = match point.kind {
        PointKind::Endpoint => point.name.clone(),
        PointKind::Vxlan => format!("vxlan:{}", point.name),
        PointKind::Tunnel | PointKind::Underlay => point.name.clone(),
    };
    let end = |(address, port): (IpAddr, Option<u16>)| {
        let name = name(address);
        match port {
            Some(port) if name.contains(':') => format!("[{name}]:{port}"),
            Some(port) => format!("{name}:{port}"),
            None => name,
        }
    };
    let mut text = format!("{time}.{micros:06} {host} {place} {direction} ");
    if let Some([from, to]) = decoded.ends {
        let _ = write!(text, "{} > {} ", end(from), end(to));
    }
    text += &decoded.says;
    if let Some((from, to, vni)) = decoded.outer {
        let _ = write!(text, " (in VXLAN {vni} {} > {})", name(from), name(to));
    }
    if let Some(reason) = dropped {
        let _ = write!(text, " *** {reason}");
    }
    format!("{}\n", printable(&text))
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    fn syn() -> Vec<u8> {
        let mut packet = Vec::new();
        let builder = PacketBuilder::ethernet2([1; 6], [2; 6]).ipv4([10, 1, 0, 1], [10, 1, 0, 2], 9);
        builder.tcp(1000, 80, 7, 1024).syn().write(&mut packet, &[]).unwrap();
        packet
    }

    #[test]
    fn packets_are_decoded_in_and_out_of_vxlan() {
        let ports = BTreeSet::from([4789]);
        let shown = decode(&syn(), LinkType::Ethernet, &ports);
        assert_eq!(shown.says, "tcp S seq 7 length 0");
        assert_eq!(shown.ends.unwrap()[1], ([10, 1, 0, 2].into(), Some(80)));
        let mut outer = Vec::new();
        let vxlan = [&[8, 0, 0, 0, 0, 1, 2, 0][..], &syn()].concat();
        PacketBuilder::ipv6([1; 16], [2; 16], 9).udp(5000, 4789).write(&mut outer, &vxlan).unwrap();
        let inside = decode(&outer, LinkType::Ip, &ports);
        assert_eq!((inside.says.clone(), inside.ends), (shown.says, shown.ends));
        assert_eq!(inside.outer.unwrap().2, 258);
        assert_eq!(key(&outer, LinkType::Ip), key(&syn(), LinkType::Ethernet));
        assert_eq!(inside.addresses().count(), 4);
    }

    #[test]
    fn other_packets_are_named() {
        let ports = BTreeSet::new();
        assert_eq!(decode(&[1, 2, 3], LinkType::Ethernet, &ports).says, "3 bytes that are no packet");
        let probe = [&[0; 12][..], &[0x88, 0xb6], &[0; 40]].concat();
        assert_eq!(decode(&probe, LinkType::Ethernet, &ports).says, "ethertype 0x88b6");
        assert!(key(&probe, LinkType::Ethernet).is_none());
        assert_eq!(icmp_says("icmp6", 129, 0, &[0, 0, 0, 0, 0, 0, 0, 5]), "icmp6 echo reply seq 5");
    }
}
