//! Property tests: joining restores what segmentation divided, and packets that cannot be joined pass
//! unchanged and in order.

use std::cell::RefCell;
use std::io::IoSlice;
use std::net::{IpAddr, Ipv6Addr};
use std::ops::Range;

use proptest::prelude::*;

use crate::checksum;
use crate::cut::{UncutPacket, cut};
use crate::join::{Joiner, Output};
use crate::packet::{
    ETHERNET_HEADER, Gso, Ip, TCP, UDP, VXLAN_HEADERS, VnetHeader, VxlanFrame, pseudo_header_sum, put,
    put_vxlan,
};
use crate::sys::VNET_HEADER;

const HEAD: usize = 64;

/// A super-packet, as a device with segmentation offload gives it: its checksum is not complete.
#[derive(Debug, Clone)]
struct SuperPacket {
    is_frame: bool,
    is_v4: bool,
    protocol: u8,
    options: usize,
    payload: Vec<u8>,
    size: usize,
    sequence: u32,
    flags: u8,
    identification: u16,
    port: u16,
}

impl SuperPacket {
    fn network(&self) -> usize {
        if self.is_frame { ETHERNET_HEADER } else { 0 }
    }

    fn transport(&self) -> usize {
        self.network() + if self.is_v4 { 20 } else { 40 }
    }

    fn headers(&self) -> usize {
        self.transport() + if self.protocol == TCP { 20 + self.options } else { 8 }
    }

    fn addresses(&self) -> (IpAddr, IpAddr) {
        if self.is_v4 {
            (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]))
        } else {
            (Ipv6Addr::from_bits(1 << 120 | 1).into(), Ipv6Addr::from_bits(1 << 120 | 2).into())
        }
    }

    /// Returns the packet, with a complete checksum or with the sum of the pseudo-header alone.
    fn bytes(&self, has_checksum: bool) -> Vec<u8> {
        let mut bytes = vec![0; self.headers()];
        let (network, transport) = (self.network(), self.transport());
        let (source, destination) = self.addresses();
        if self.is_frame {
            put(&mut bytes, 0, &[2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1]);
            put(&mut bytes, 12, &if self.is_v4 { [0x08, 0] } else { [0x86, 0xdd] });
        }
        bytes.extend_from_slice(&self.payload);
        let length = bytes.len();
        match (source, destination) {
            (IpAddr::V4(a), IpAddr::V4(b)) => {
                put(&mut bytes, network, &[0x45, 0]);
                put(&mut bytes, network + 2, &((length - network) as u16).to_be_bytes());
                put(&mut bytes, network + 4, &self.identification.to_be_bytes());
                put(&mut bytes, network + 8, &[64, self.protocol]);
                put(&mut bytes, network + 12, &[a.octets(), b.octets()].concat());
                let sum = checksum::finish(checksum::add(0, &bytes[network..transport]));
                put(&mut bytes, network + 10, &sum.to_be_bytes());
            }
            (IpAddr::V6(a), IpAddr::V6(b)) => {
                put(&mut bytes, network, &[0x60]);
                put(&mut bytes, network + 4, &((length - network - 40) as u16).to_be_bytes());
                put(&mut bytes, network + 6, &[self.protocol, 64]);
                put(&mut bytes, network + 8, &[a.octets(), b.octets()].concat());
            }
            _ => unreachable!(),
        }
        put(&mut bytes, transport, &self.port.to_be_bytes());
        put(&mut bytes, transport + 2, &[0, 80]);
        let field = if self.protocol == TCP {
            put(&mut bytes, transport + 4, &self.sequence.to_be_bytes());
            put(&mut bytes, transport + 8, &[1, 2, 3, 4]);
            put(&mut bytes, transport + 12, &[((20 + self.options) as u8 / 4) << 4, self.flags, 1, 0]);
            put(&mut bytes, transport + 20, &vec![1; self.options]);
            transport + 16
        } else {
            put(&mut bytes, transport + 4, &((length - transport) as u16).to_be_bytes());
            transport + 6
        };
        let sum = pseudo_header_sum(source, destination, self.protocol) + (length - transport) as u64;
        let sum = if has_checksum {
            checksum::finish(checksum::add(sum, &bytes[transport..]))
        } else {
            checksum::fold(sum)
        };
        put(&mut bytes, field, &sum.to_be_bytes());
        bytes
    }

    fn vnet(&self) -> VnetHeader {
        VnetHeader {
            needs_checksum: true,
            gso: match (self.payload.len() > self.size, self.protocol, self.is_v4) {
                (false, ..) => Gso::None,
                (true, UDP, _) => Gso::Udp,
                (true, _, true) => Gso::TcpV4,
                (true, _, false) => Gso::TcpV6,
            },
            header_length: self.headers() as u16,
            gso_size: self.size as u16,
            checksum_start: self.transport() as u16,
            checksum_offset: if self.protocol == TCP { 16 } else { 6 },
        }
    }

    /// Returns the segments without VXLAN headers, which are checked here.
    fn cut(&self) -> Vec<Vec<u8>> {
        self.cut_as(&self.bytes(false), self.vnet())
    }

    /// The same with a VLAN tag in the frame.
    fn cut_tagged(&self) -> Vec<Vec<u8>> {
        let vnet = self.vnet();
        let shifted = VnetHeader {
            header_length: vnet.header_length + 4,
            checksum_start: vnet.checksum_start + 4,
            ..vnet
        };
        self.cut_as(&tagged(&self.bytes(false)), shifted)
    }

    fn cut_as(&self, bytes: &[u8], vnet: VnetHeader) -> Vec<Vec<u8>> {
        let mut buffer = vec![0; HEAD];
        buffer.extend_from_slice(bytes);
        let end = buffer.len();
        let (a, b) = (Ipv6Addr::from_bits(1), Ipv6Addr::from_bits(2));
        if self.is_frame {
            put_vxlan(&mut buffer[HEAD - VXLAN_HEADERS..], a, b, (1, 9), 7, bytes.len());
        }
        let start = if self.is_frame { HEAD - VXLAN_HEADERS } else { HEAD };
        let whole = UncutPacket { start, given: HEAD, end, is_frame: self.is_frame, vnet };
        let mut parts = Vec::new();
        cut(&mut buffer, &whole, |buffer, at| {
            let part = &buffer[at];
            if self.is_frame {
                let ip = Ip::parse(part).unwrap();
                let inner = VxlanFrame::parse(part, &ip, b, 9).unwrap();
                assert_eq!((inner.vni, inner.from, inner.end), (7, a, part.len()));
                parts.push(part[inner.start..inner.end].to_vec());
            } else {
                parts.push(part.to_vec());
            }
        })
        .unwrap();
        parts
    }
}

/// Puts a VLAN tag (802.1Q) into a frame.
fn tagged(frame: &[u8]) -> Vec<u8> {
    [&frame[..12], &[0x81, 0, 0, 7], &frame[12..]].concat()
}

/// Returns whether all checksums and lengths are valid.
fn is_valid(packet: &[u8], is_frame: bool) -> bool {
    let packet = &packet[if is_frame { ETHERNET_HEADER } else { 0 }..];
    let ip = Ip::parse(packet).unwrap();
    let header = ip.source.is_ipv6() || checksum::fold(checksum::add(0, &packet[..ip.payload])) == 0xffff;
    let sum = pseudo_header_sum(ip.source, ip.destination, ip.protocol) + (ip.end - ip.payload) as u64;
    ip.end == packet.len()
        && header
        && checksum::fold(checksum::add(sum, &packet[ip.payload..ip.end])) == 0xffff
}

/// Records the written packets.
#[derive(Debug, Default)]
struct Written(RefCell<Vec<(VnetHeader, Vec<u8>)>>);

impl Output for Written {
    fn write(&self, pieces: &[IoSlice<'_>]) {
        let all: Vec<u8> = pieces.iter().flat_map(|piece| piece.iter().copied()).collect();
        let vnet = VnetHeader::parse(&all[..VNET_HEADER]).unwrap();
        self.0.borrow_mut().push((vnet, all[VNET_HEADER..].to_vec()));
    }
}

fn join(packets: &[Vec<u8>], is_frame: bool) -> Vec<(VnetHeader, Vec<u8>)> {
    let mut buffer = Vec::new();
    let ranges: Vec<Range<usize>> = packets
        .iter()
        .map(|packet| {
            buffer.extend_from_slice(packet);
            buffer.len() - packet.len()..buffer.len()
        })
        .collect();
    let (mut joiner, written) = (Joiner::default(), Written::default());
    for range in ranges {
        joiner.add(&mut buffer, range, is_frame, &written);
    }
    joiner.flush(&mut buffer, &written);
    written.0.into_inner()
}

fn super_packet() -> impl Strategy<Value = SuperPacket> {
    let shape = (any::<bool>(), any::<bool>(), any::<bool>(), 0_usize..=10);
    let content = (prop::collection::vec(any::<u8>(), 1..9000), 64_usize..1400);
    (shape, content, any::<u32>(), any::<bool>(), any::<u16>()).prop_map(
        |((is_frame, is_v4, is_tcp, options), (payload, size), sequence, push, identification)| SuperPacket {
            is_frame,
            is_v4,
            protocol: if is_tcp { TCP } else { UDP },
            options: options * 4,
            payload,
            size,
            sequence,
            flags: 0x10 | if push { 0x08 } else { 0 },
            identification,
            port: 1,
        },
    )
}

proptest! {
    #[test]
    fn segments_are_valid_and_have_the_whole_payload(it in super_packet()) {
        let parts = it.cut();
        prop_assert_eq!(parts.len(), it.payload.len().div_ceil(it.size));
        let mut payload = Vec::new();
        for part in &parts {
            prop_assert!(is_valid(part, it.is_frame));
            prop_assert!(part.len() <= it.headers() + it.size);
            payload.extend_from_slice(&part[it.headers()..]);
        }
        prop_assert_eq!(payload, it.payload);
    }

    #[test]
    fn segments_of_a_tagged_frame_are_those_without_a_tag(it in super_packet()) {
        let it = SuperPacket { is_frame: true, ..it };
        let plain: Vec<Vec<u8>> = it.cut().iter().map(|part| tagged(part)).collect();
        prop_assert_eq!(it.cut_tagged(), plain);
    }

    #[test]
    fn joined_tcp_segments_are_the_original(it in super_packet()) {
        prop_assume!(it.protocol == TCP && it.payload.len() > it.size);
        let joined = join(&it.cut(), it.is_frame);
        prop_assert_eq!(joined, vec![(it.vnet(), it.bytes(false))]);
    }

    #[test]
    fn no_packet_is_lost_or_reordered_within_its_connection(
        choices in prop::collection::vec((0_u16..12, any::<bool>(), 0_u8..10, 1_usize..300), 1..120),
        is_frame: bool,
        is_v4: bool,
    ) {
        let mut next = [0_u32; 12];
        let packets: Vec<Vec<u8>> = choices.iter().map(|(port, repeats, oddity, length)| {
            let sequence = &mut next[usize::from(*port)];
            let it = SuperPacket {
                is_frame,
                is_v4,
                protocol: TCP,
                options: if *oddity == 1 { 4 } else { 0 },
                payload: if *oddity == 2 { Vec::new() } else { vec![*port as u8; *length] },
                size: 2000,
                sequence: if *repeats { sequence.wrapping_sub(7) } else { *sequence },
                flags: match oddity { 3 => 0x11, 4 => 0x18, _ => 0x10 },
                identification: 0,
                port: *port,
            };
            *sequence = sequence.wrapping_add(it.payload.len() as u32);
            let mut bytes = it.bytes(true);
            if *oddity == 5 {
                // The receiver must see the wrong checksum.
                *bytes.last_mut().unwrap() ^= 1;
            }
            bytes
        }).collect();
        // Divided again, each connection has the packets that went in.
        let mut out: Vec<Vec<u8>> = Vec::new();
        for (vnet, bytes) in join(&packets, is_frame) {
            let mut buffer = vec![0; HEAD];
            buffer.extend_from_slice(&bytes);
            if is_frame {
                put_vxlan(&mut buffer[HEAD - VXLAN_HEADERS..], Ipv6Addr::LOCALHOST, Ipv6Addr::LOCALHOST, (1, 9), 7, bytes.len());
            }
            let skipped = if is_frame { VXLAN_HEADERS } else { 0 };
            let end = buffer.len();
            let whole = UncutPacket { start: HEAD - skipped, given: HEAD, end, is_frame, vnet };
            cut(&mut buffer, &whole, |buffer, at| out.push(buffer[at][skipped..].to_vec())).unwrap();
        }
        let transport = if is_frame { ETHERNET_HEADER } else { 0 } + if is_v4 { 20 } else { 40 };
        let network = transport - if is_v4 { 20 } else { 40 };
        for port in 0..12_u16 {
            let of = |all: &[Vec<u8>]| -> Vec<Vec<u8>> {
                all.iter()
                    .filter(|packet| packet[transport..transport + 2] == port.to_be_bytes())
                    .map(|packet| {
                        let mut packet = packet.clone();
                        if is_v4 {
                            // Segmentation increments the identification, which does not matter with DF.
                            put(&mut packet, network + 4, &[0; 2]);
                            put(&mut packet, network + 10, &[0; 2]);
                        }
                        packet
                    })
                    .collect()
            };
            prop_assert_eq!(of(&out), of(&packets));
        }
    }

    #[test]
    fn arbitrary_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        crate::fuzz::packet(&bytes);
    }
}
