//! Where things are in packets and frames. Whatever comes from outside is looked at here, and nothing
//! here takes a length on trust.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::api::Mac;
use crate::checksum;

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
const ICMPV6: u8 = 58;
/// Of a neighbour.
const ADVERTISEMENT: u8 = 136;
/// Messages of multicast listeners.
const LISTENER: [u8; 4] = [130, 131, 132, 143];
/// Destination, source, type.
pub(crate) const ETHERNET: usize = 14;
/// Outer IPv6, UDP and VXLAN headers of a frame on its way through the tunnel.
pub(crate) const VXLAN: usize = 40 + 8 + 8;

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

/// The header that the kernel puts before packets of a device (`struct virtio_net_hdr`, legacy, in the
/// machine's byte order).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Vnet {
    pub(crate) needs_checksum: bool,
    pub(crate) gso: Gso,
    pub(crate) header_length: u16,
    pub(crate) gso_size: u16,
    pub(crate) checksum_start: u16,
    pub(crate) checksum_offset: u16,
}

/// What a packet is to be cut into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Gso {
    #[default]
    None,
    TcpV4,
    TcpV6,
    /// Datagrams of UDP, each with a header of its own.
    Udp,
}

impl Vnet {
    /// None for kinds of segmentation that we did not ask for.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let half = |at: usize| Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        /// VIRTIO_NET_HDR_GSO_ECN: cutting keeps CWR on the first segment, which is all it asks for.
        const ECN: u8 = 0x80;
        let gso = match bytes.get(1)? & !ECN {
            0 => Gso::None,
            1 => Gso::TcpV4,
            4 => Gso::TcpV6,
            5 => Gso::Udp,
            _ => return None,
        };
        Some(Self {
            needs_checksum: bytes.first()? & 1 != 0,
            gso,
            header_length: half(2)?,
            gso_size: half(4)?,
            checksum_start: half(6)?,
            checksum_offset: half(8)?,
        })
    }

    pub(crate) fn to_bytes(self) -> [u8; crate::sys::VNET] {
        let mut bytes = [0; crate::sys::VNET];
        bytes[0] = u8::from(self.needs_checksum);
        bytes[1] = match self.gso {
            Gso::None => 0,
            Gso::TcpV4 => 1,
            Gso::TcpV6 => 4,
            Gso::Udp => 5,
        };
        for (at, value) in
            [(2, self.header_length), (4, self.gso_size), (6, self.checksum_start), (8, self.checksum_offset)]
        {
            put(&mut bytes, at, &value.to_ne_bytes());
        }
        bytes
    }
}

/// An IP packet's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ip {
    pub(crate) source: IpAddr,
    pub(crate) destination: IpAddr,
    /// Of what follows; of IPv6 extension headers their own number.
    pub(crate) protocol: u8,
    /// Where that begins.
    pub(crate) payload: usize,
    /// Where the packet ends: what comes after it is padding.
    pub(crate) end: usize,
    /// A part of a packet.
    pub(crate) is_fragment: bool,
}

impl Ip {
    /// None if it is no whole IP packet.
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

/// The sum of the pseudo-header of TCP and UDP, without the length (RFC 9293, section 3.1).
pub(crate) fn pseudo(source: IpAddr, destination: IpAddr, protocol: u8) -> u64 {
    let sum = u64::from(protocol);
    match (source, destination) {
        (IpAddr::V4(a), IpAddr::V4(b)) => checksum::add(checksum::add(sum, &a.octets()), &b.octets()),
        (IpAddr::V6(a), IpAddr::V6(b)) => checksum::add(checksum::add(sum, &a.octets()), &b.octets()),
        _ => sum,
    }
}

/// A frame inside of VXLAN inside of IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Inner {
    pub(crate) vni: u32,
    pub(crate) from: Ipv6Addr,
    /// Where the frame is.
    pub(crate) start: usize,
    pub(crate) end: usize,
}

impl Inner {
    /// None if it is not VXLAN for this address and port.
    pub(crate) fn parse(packet: &[u8], ip: &Ip, address: Ipv6Addr, port: u16) -> Option<Self> {
        let IpAddr::V6(from) = ip.source else { return None };
        let ours = ip.protocol == UDP && ip.destination == IpAddr::V6(address);
        if !ours || u16_at(packet, ip.payload + 2)? != port {
            return None;
        }
        let start = ip.payload + 16;
        let end = ip.payload + usize::from(u16_at(packet, ip.payload + 4)?);
        // The flag says that there is a VNI (RFC 7348, section 5).
        let has_vni = packet.get(ip.payload + 8)? & 0x08 != 0;
        let vni = u32_at(packet, ip.payload + 12)? >> 8;
        (has_vni && start + ETHERNET <= end && end <= ip.end).then_some(Self { vni, from, start, end })
    }
}

/// Writes the headers before a frame of so many bytes. The outer checksum is zero (RFC 6935): the
/// tunnel proves more.
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

/// The lengths of the outer headers, for another length of the frame.
pub(crate) fn put_vxlan_length(place: &mut [u8], frame: usize) {
    let length = ((16 + frame) as u16).to_be_bytes();
    put(place, 4, &length);
    put(place, 44, &length);
}

/// Destination and source of a frame.
pub(crate) fn macs(frame: &[u8]) -> Option<(Mac, Mac)> {
    Some((*frame.first_chunk()?, *frame.get(6..)?.first_chunk()?))
}

/// Looks for the sender's address: of an IP packet its source, of an ARP message the sender's, which must be
/// that of the frame too; of an advertisement of a neighbour the address that it is for (RFC 4861, section
/// 4.4). None if it is neither, contradicts itself, or hides what it is behind extension headers.
pub(crate) fn sender(frame: &[u8]) -> Option<IpAddr> {
    let v4 = |at| u32_at(frame, at).map(|bits| IpAddr::from(Ipv4Addr::from_bits(bits)));
    let v6 = |at: usize| Some(IpAddr::from(Ipv6Addr::from(*frame.get(at..)?.first_chunk::<16>()?)));
    match u16_at(frame, 12)? {
        0x0800 => v4(ETHERNET + 12),
        0x0806 => {
            let is_own = frame.get(ETHERNET + 8..ETHERNET + 14) == frame.get(6..12);
            v4(ETHERNET + 14).filter(|_| is_own)
        }
        0x86dd => {
            let after = *frame.get(ETHERNET + 40)?;
            match *frame.get(ETHERNET + 6)? {
                ICMPV6 if after == ADVERTISEMENT => v6(ETHERNET + 48),
                // Options for every hop: only multicast listeners' messages have them (RFC 3810).
                0 if after == ICMPV6 => {
                    let length = 8 + 8 * usize::from(*frame.get(ETHERNET + 41)?);
                    let kind = frame.get(ETHERNET + 40 + length)?;
                    v6(ETHERNET + 8).filter(|_| LISTENER.contains(kind))
                }
                // Those, options for the destination, and routing.
                0 | 43 | 60 => None,
                _ => v6(ETHERNET + 8),
            }
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vnet_header_reads_back() {
        let header = Vnet {
            needs_checksum: true,
            gso: Gso::TcpV6,
            header_length: 74,
            gso_size: 1368,
            checksum_start: 54,
            checksum_offset: 16,
        };
        assert_eq!(Vnet::parse(&header.to_bytes()), Some(header));
        assert_eq!(Vnet::parse(&[0; 9]), None);
        assert_eq!(Vnet::parse(&[0, 3, 0, 0, 0, 0, 0, 0, 0, 0]), None);
    }

    #[test]
    fn lengths_are_not_taken_on_trust() {
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
    fn a_frame_is_found_in_its_headers() {
        let (a, b) = (Ipv6Addr::from_bits(1), Ipv6Addr::from_bits(2));
        let mut packet = [0; VXLAN + 60];
        put_vxlan(&mut packet, a, b, (50_000, 51_942), 4711, 60);
        let ip = Ip::parse(&packet).unwrap();
        let inner = Inner::parse(&packet, &ip, b, 51_942).unwrap();
        assert_eq!(inner, Inner { vni: 4711, from: a, start: VXLAN, end: VXLAN + 60 });
        assert_eq!(Inner::parse(&packet, &ip, a, 51_942), None);
        assert_eq!(Inner::parse(&packet, &ip, b, 4789), None);
        put_vxlan_length(&mut packet, 61);
        assert_eq!(Ip::parse(&packet), None);
    }
}
