//! Parsing and writing of packet headers. Received packets are parsed here alone, and every length in them is
//! checked.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::api::Mac;
use crate::checksum;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMPV6: u8 = 58;
/// The type of an ICMPv6 neighbor advertisement (RFC 4861, section 4.4).
const NEIGHBOR_ADVERTISEMENT: u8 = 136;
/// The types of ICMPv6 router advertisements and redirects (RFC 4861, sections 4.2 and 4.5).
const FROM_ROUTERS: [u8; 2] = [134, 137];
/// The types of ICMPv6 multicast listener messages (RFC 2710, RFC 3810).
const MULTICAST_LISTENER: [u8; 4] = [130, 131, 132, 143];
/// The EtherTypes of VLAN tags (IEEE 802.1Q).
const VLAN_TAGS: [u16; 2] = [0x8100, 0x88a8];
/// The length of an Ethernet header without VLAN tag, in bytes.
pub(crate) const ETHERNET_HEADER: usize = 14;
/// The length of the IPv6, UDP and VXLAN headers around a frame in the tunnel, in bytes.
pub(crate) const VXLAN_HEADERS: usize = 40 + 8 + 8;

/// Flags and segmentation types of `struct virtio_net_hdr` (`linux/virtio_net.h`; libc does not have them).
const NEEDS_CHECKSUM: u8 = 1;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

#[inline]
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[inline]
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[inline]
pub(crate) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    if let Some(place) = bytes.get_mut(at..at + value.len()) {
        place.copy_from_slice(value);
    }
}

/// The header that precedes each packet of a device: `struct virtio_net_hdr`, in native byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct VnetHeader {
    pub(crate) needs_checksum: bool,
    pub(crate) gso: Gso,
    pub(crate) header_length: u16,
    pub(crate) gso_size: u16,
    pub(crate) checksum_start: u16,
    pub(crate) checksum_offset: u16,
}

/// The segmentation that a packet needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Gso {
    #[default]
    None,
    TcpV4,
    TcpV6,
    /// UDP datagrams, each with a header of its own (USO).
    Udp,
}

impl VnetHeader {
    /// Parses a header. `None` if it is too short or has a kind of segmentation that the device does not
    /// offer.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let half = |at: usize| Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        // Segmentation keeps CWR on the first segment, which is all that GSO_ECN asks for.
        let gso = match bytes.get(1)? & !GSO_ECN {
            GSO_NONE => Gso::None,
            GSO_TCPV4 => Gso::TcpV4,
            GSO_TCPV6 => Gso::TcpV6,
            GSO_UDP_L4 => Gso::Udp,
            _ => return None,
        };
        Some(Self {
            needs_checksum: bytes.first()? & NEEDS_CHECKSUM != 0,
            gso,
            header_length: half(2)?,
            gso_size: half(4)?,
            checksum_start: half(6)?,
            checksum_offset: half(8)?,
        })
    }

    pub(crate) fn to_bytes(self) -> [u8; crate::sys::VNET_HEADER] {
        let mut bytes = [0; crate::sys::VNET_HEADER];
        bytes[0] = if self.needs_checksum { NEEDS_CHECKSUM } else { 0 };
        bytes[1] = match self.gso {
            Gso::None => GSO_NONE,
            Gso::TcpV4 => GSO_TCPV4,
            Gso::TcpV6 => GSO_TCPV6,
            Gso::Udp => GSO_UDP_L4,
        };
        for (at, value) in
            [(2, self.header_length), (4, self.gso_size), (6, self.checksum_start), (8, self.checksum_offset)]
        {
            put(&mut bytes, at, &value.to_ne_bytes());
        }
        bytes
    }
}

/// The header of an IP packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ip {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    /// The protocol number of the payload. IPv6 extension headers are not skipped.
    pub(crate) protocol: u8,
    /// The offset of the payload.
    pub(crate) payload: usize,
    /// The end of the packet. Bytes after it are padding.
    pub(crate) end: usize,
    pub(crate) is_fragment: bool,
}

impl Ip {
    /// Parses the header. `None` if the packet is incomplete or not IP.
    pub(crate) fn parse(packet: &[u8]) -> Option<Self> {
        match packet.first()? >> 4 {
            4 => {
                let payload = usize::from(packet.first()? & 15) * 4;
                let end = usize::from(u16_at(packet, 2)?);
                let found = Self {
                    source: Ipv4Addr::from_bits(u32_at(packet, 12)?).into(),
                    destination: Ipv4Addr::from_bits(u32_at(packet, 16)?).into(),
                    protocol: *packet.get(9)?,
                    payload,
                    end,
                    is_fragment: u16_at(packet, 6)? & 0x3fff != 0,
                };
                (payload >= 20 && payload <= end && end <= packet.len()).then_some(found)
            }
            6 => {
                let address = |at: usize| {
                    let bytes: [u8; 16] = *packet.get(at..)?.first_chunk()?;
                    Some(IpAddr::V6(Ipv6Addr::from(bytes)))
                };
                let end = 40 + usize::from(u16_at(packet, 4)?);
                let found = Self {
                    source: address(8)?,
                    destination: address(24)?,
                    protocol: *packet.get(6)?,
                    payload: 40,
                    end,
                    is_fragment: false,
                };
                (end <= packet.len()).then_some(found)
            }
            _ => None,
        }
    }
}

/// Sums the pseudo-header of TCP and UDP, without the length (RFC 9293, section 3.1).
pub(crate) fn pseudo_header_sum(source: IpAddr, destination: IpAddr, protocol: u8) -> u64 {
    let sum = u64::from(protocol);
    match (source, destination) {
        (IpAddr::V4(a), IpAddr::V4(b)) => checksum::add(checksum::add(sum, &a.octets()), &b.octets()),
        (IpAddr::V6(a), IpAddr::V6(b)) => checksum::add(checksum::add(sum, &a.octets()), &b.octets()),
        _ => sum,
    }
}

/// An Ethernet frame in VXLAN in IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct VxlanFrame {
    pub(crate) vni: u32,
    /// The outer source address.
    pub(crate) from: Ipv6Addr,
    /// The offset of the frame in the packet.
    pub(crate) start: usize,
    pub(crate) end: usize,
}

impl VxlanFrame {
    /// Finds the frame in a packet. `None` if the packet is not VXLAN for this address and port.
    pub(crate) fn parse(packet: &[u8], ip: &Ip, address: Ipv6Addr, port: u16) -> Option<Self> {
        let IpAddr::V6(from) = ip.source else { return None };
        let is_for_address = ip.protocol == UDP && ip.destination == IpAddr::V6(address);
        if !is_for_address || u16_at(packet, ip.payload + 2)? != port {
            return None;
        }
        let start = ip.payload + 16;
        let end = ip.payload + usize::from(u16_at(packet, ip.payload + 4)?);
        // The I flag: the VNI is valid (RFC 7348, section 5).
        let has_vni = packet.get(ip.payload + 8)? & 0x08 != 0;
        let vni = u32_at(packet, ip.payload + 12)? >> 8;
        (has_vni && start + ETHERNET_HEADER <= end && end <= ip.end).then_some(Self { vni, from, start, end })
    }
}

/// Writes the headers in front of a frame of `frame` bytes. The outer UDP checksum is zero (RFC 6935),
/// because the tunnel authenticates the packet.
pub(crate) fn put_vxlan(
    place: &mut [u8],
    from: Ipv6Addr,
    to: Ipv6Addr,
    ports: (u16, u16),
    vni: u32,
    frame: usize,
) {
    let length = (16 + frame) as u16;
    put(place, 0, &0x6000_0000_u32.to_be_bytes());
    put(place, 4, &length.to_be_bytes());
    put(place, 6, &[UDP, 64]);
    put(place, 8, &from.octets());
    put(place, 24, &to.octets());
    put(place, 40, &ports.0.to_be_bytes());
    put(place, 42, &ports.1.to_be_bytes());
    put(place, 44, &length.to_be_bytes());
    put(place, 46, &[0, 0, 0x08, 0, 0, 0]);
    put(place, 52, &(vni << 8).to_be_bytes());
}

/// Changes the lengths in the outer headers to those of a frame of `frame` bytes.
pub(crate) fn put_vxlan_length(place: &mut [u8], frame: usize) {
    let length = ((16 + frame) as u16).to_be_bytes();
    put(place, 4, &length);
    put(place, 44, &length);
}

/// Returns the destination and source addresses of a frame.
pub(crate) fn macs(frame: &[u8]) -> Option<(Mac, Mac)> {
    Some((*frame.first_chunk()?, *frame.get(6..)?.first_chunk()?))
}

/// What a frame says about its source MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Claim {
    /// It has this IP address: the source of an IP packet, the sender of an ARP message, or the target of a neighbor
    /// advertisement (RFC 4861, section 4.4).
    Address(IpAddr),
    /// Nothing: the frame is neither IP nor ARP.
    Nothing,
}

/// Returns the length of the Ethernet header of a frame, with one VLAN tag if it has any, in bytes.
#[inline]
pub(crate) fn ethernet_header(frame: &[u8]) -> usize {
    match u16_at(frame, 12) {
        Some(kind) if VLAN_TAGS.contains(&kind) => ETHERNET_HEADER + 4,
        Some(_) | None => ETHERNET_HEADER,
    }
}

/// Finds what a frame says about its source MAC address. Receivers ignore a tag of VLAN 0, so a packet behind one tag
/// is looked at like one without.
///
/// `None` if the frame is too short, if only a router sends it, if the sender's MAC address in an ARP message is not
/// that of the frame, if extension headers hide what the packet is, or if it has two VLAN tags.
pub(crate) fn claim(frame: &[u8]) -> Option<Claim> {
    let header = ethernet_header(frame);
    let payload = frame.get(header..)?;
    let v4 = |at| u32_at(payload, at).map(|bits| IpAddr::from(Ipv4Addr::from_bits(bits)));
    let v6 = |at: usize| Some(IpAddr::from(Ipv6Addr::from(*payload.get(at..)?.first_chunk::<16>()?)));
    let address = match u16_at(frame, header - 2)? {
        0x0800 => v4(12),
        0x0806 => {
            let is_own = payload.get(8..14) == frame.get(6..12);
            v4(14).filter(|_| is_own)
        }
        0x86dd => {
            let after = *payload.get(40)?;
            match *payload.get(6)? {
                ICMPV6 if FROM_ROUTERS.contains(&after) => None,
                ICMPV6 if after == NEIGHBOR_ADVERTISEMENT => v6(48),
                // Hop-by-hop options: only multicast listener messages have them (RFC 3810, section 5).
                0 if after == ICMPV6 => {
                    let length = 8 + 8 * usize::from(*payload.get(41)?);
                    let kind = payload.get(40 + length)?;
                    v6(8).filter(|_| MULTICAST_LISTENER.contains(kind))
                }
                // Hop-by-hop options, routing, and destination options.
                0 | 43 | 60 => None,
                _ => v6(8),
            }
        }
        kind if VLAN_TAGS.contains(&kind) => None,
        _ => return Some(Claim::Nothing),
    };
    address.map(Claim::Address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vnet_header_survives_a_round_trip() {
        let header = VnetHeader {
            needs_checksum: true,
            gso: Gso::TcpV6,
            header_length: 74,
            gso_size: 1368,
            checksum_start: 54,
            checksum_offset: 16,
        };
        assert_eq!(VnetHeader::parse(&header.to_bytes()), Some(header));
        assert_eq!(VnetHeader::parse(&[0; 9]), None);
        assert_eq!(VnetHeader::parse(&[0, 3, 0, 0, 0, 0, 0, 0, 0, 0]), None);
    }

    #[test]
    fn packets_with_wrong_lengths_are_rejected() {
        let mut v4 = [0_u8; 40];
        v4[0] = 0x45;
        v4[3] = 40;
        assert_eq!(Ip::parse(&v4).map(|ip| (ip.payload, ip.end)), Some((20, 40)));
        v4[3] = 41;
        assert_eq!(Ip::parse(&v4), None);
        v4[3] = 19;
        assert_eq!(Ip::parse(&v4), None);
        (v4[0], v4[3]) = (0x44, 40);
        assert_eq!(Ip::parse(&v4), None);
        let mut v6 = [0_u8; 48];
        v6[0] = 0x60;
        v6[5] = 8;
        assert_eq!(Ip::parse(&v6).map(|ip| ip.end), Some(48));
        v6[5] = 9;
        assert_eq!(Ip::parse(&v6), None);
        for length in 0..20 {
            assert_eq!(Ip::parse(&[0x45; 20][..length]), None);
        }
    }

    #[test]
    fn a_frame_is_found_behind_its_headers() {
        let (a, b) = (Ipv6Addr::from_bits(1), Ipv6Addr::from_bits(2));
        let mut packet = [0; VXLAN_HEADERS + 60];
        put_vxlan(&mut packet, a, b, (50_000, 51_942), 4711, 60);
        let ip = Ip::parse(&packet).unwrap();
        let inner = VxlanFrame::parse(&packet, &ip, b, 51_942).unwrap();
        assert_eq!(inner, VxlanFrame { vni: 4711, from: a, start: VXLAN_HEADERS, end: VXLAN_HEADERS + 60 });
        assert_eq!(VxlanFrame::parse(&packet, &ip, a, 51_942), None);
        assert_eq!(VxlanFrame::parse(&packet, &ip, b, 4789), None);
        put_vxlan_length(&mut packet, 61);
        assert_eq!(Ip::parse(&packet), None);
    }
}
