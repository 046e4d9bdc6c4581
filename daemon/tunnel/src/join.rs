//! Receive offload: joins consecutive segments of a TCP connection to one packet of up to 64 KiB, as the
//! kernel's GRO does, and writes it with one call.
//!
//! Segments are joined only if segmentation would restore them exactly: their headers are equal except for
//! lengths, sequence numbers and checksums, and these are valid.

use std::io::IoSlice;
use std::net::IpAddr;
use std::ops::Range;

use crate::checksum;
use crate::packet::{ETHERNET_HEADER, Gso, Ip, TCP, VnetHeader, pseudo_header_sum, put, u16_at, u32_at};
use crate::sys::VNET_HEADER;

/// The number of connections whose segments are joined at the same time.
const MAX_GROUPS: usize = 8;
/// The largest packet in bytes: the length field of IP has 16 bits.
const MAX_LENGTH: usize = 65_535;
/// The pieces of one `writev(2)` (`IOV_MAX` is 1024), less those for headers.
const MAX_PARTS: usize = 1_000;

const PSH: u8 = 0x08;
const ACK: u8 = 0x10;

/// Takes the packets that the joiner writes: a device, or a test.
pub(crate) trait Output {
    /// Writes one packet, given in pieces, of which the first is its `struct virtio_net_hdr`.
    fn write(&self, pieces: &[IoSlice<'_>]);
}

/// Joins the segments for one device.
///
/// The segments lie in a buffer of the caller, which is passed to each call. The caller must call
/// [`Joiner::flush`] before it overwrites them.
#[derive(Debug, Default)]
pub(crate) struct Joiner {
    groups: Vec<Group>,
    /// Empty lists, kept for their memory.
    spare: Vec<Vec<Range<usize>>>,
}

/// A TCP segment in the buffer. All offsets are from the start of the buffer.
#[derive(Debug, Clone)]
struct Segment {
    /// The start of the IP packet or frame.
    start: usize,
    end: usize,
    /// The start of the IP header.
    network: usize,
    /// The start of the TCP header.
    transport: usize,
    payload: usize,
    source: IpAddr,
    destination: IpAddr,
    sequence: u32,
    flags: u8,
}

/// Consecutive segments of one connection that wait to be written as one packet.
#[derive(Debug)]
struct Group {
    first: Segment,
    /// The payloads of the segments after the first.
    parts: Vec<Range<usize>>,
    /// The payload size of every segment but the last, in bytes.
    size: usize,
    /// The size of all payloads, in bytes.
    total: usize,
    /// The sequence number of the next segment.
    next: u32,
    identification: u16,
    /// The last segment has PSH.
    has_push: bool,
}

impl Joiner {
    /// Takes a packet or frame, and writes it at once unless it may be joined with later ones.
    pub(crate) fn add(&mut self, buffer: &mut [u8], at: Range<usize>, is_frame: bool, output: &impl Output) {
        let Some(segment) = Segment::parse(buffer, at.clone(), is_frame) else {
            write_one(buffer, at, output);
            return;
        };
        let same = self.groups.iter().position(|group| group.first.is_same_flow(&segment, buffer));
        let joins = segment.can_join(buffer);
        if let Some(index) = same {
            if joins && self.groups[index].append(&segment, buffer) {
                if self.groups[index].is_full(&segment) {
                    self.write(index, buffer, output);
                }
                return;
            }
            // Keep the order: the waiting segments come first.
            self.write(index, buffer, output);
        }
        if !joins || segment.flags & PSH != 0 {
            write_one(buffer, at, output);
            return;
        }
        if self.groups.len() == MAX_GROUPS {
            self.write(0, buffer, output);
        }
        let size = segment.end - segment.payload;
        self.groups.push(Group {
            size,
            total: size,
            next: segment.sequence.wrapping_add(size as u32),
            identification: u16_at(buffer, segment.network + 4).unwrap_or(0),
            has_push: false,
            parts: self.spare.pop().unwrap_or_default(),
            first: segment,
        });
    }

    /// Writes all waiting packets.
    pub(crate) fn flush(&mut self, buffer: &mut [u8], output: &impl Output) {
        while !self.groups.is_empty() {
            self.write(0, buffer, output);
        }
    }

    fn write(&mut self, index: usize, buffer: &mut [u8], output: &impl Output) {
        let Group { first, mut parts, size, total, has_push, .. } = self.groups.remove(index);
        if parts.is_empty() {
            write_one(buffer, first.start..first.end, output);
        } else {
            let vnet = first.join_headers(buffer, size, total, has_push).to_bytes();
            let mut pieces = Vec::with_capacity(parts.len() + 2);
            let slice = |range: Range<usize>| IoSlice::new(buffer.get(range).unwrap_or_default());
            pieces.push(IoSlice::new(&vnet));
            pieces.push(slice(first.start..first.end));
            pieces.extend(parts.iter().cloned().map(slice));
            output.write(&pieces);
        }
        parts.clear();
        self.spare.push(parts);
    }
}

/// Writes a packet as it was received.
fn write_one(buffer: &[u8], at: Range<usize>, output: &impl Output) {
    let vnet = [0; VNET_HEADER];
    output.write(&[IoSlice::new(&vnet), IoSlice::new(buffer.get(at).unwrap_or_default())]);
}

impl Segment {
    /// Finds the headers of a TCP segment. `None` if it is not TCP in an unfragmented IP packet without
    /// padding.
    fn parse(buffer: &[u8], at: Range<usize>, is_frame: bool) -> Option<Self> {
        let network = at.start + if is_frame { ETHERNET_HEADER } else { 0 };
        if is_frame && !matches!(u16_at(buffer, at.start + 12)?, 0x0800 | 0x86dd) {
            return None;
        }
        let packet = buffer.get(network..at.end)?;
        let ip = Ip::parse(packet)?;
        if ip.protocol != TCP || ip.is_fragment || ip.end != packet.len() {
            return None;
        }
        let length = usize::from(packet.get(ip.payload + 12)? >> 4) * 4;
        let payload = ip.payload + length;
        (length >= 20 && payload <= ip.end).then_some(Self {
            start: at.start,
            end: at.end,
            network,
            transport: network + ip.payload,
            payload: network + payload,
            source: ip.source,
            destination: ip.destination,
            sequence: u32_at(packet, ip.payload + 4)?,
            flags: *packet.get(ip.payload + 13)?,
        })
    }

    /// Returns whether it has data, no flags but ACK and PSH, and a valid checksum.
    fn can_join(&self, buffer: &[u8]) -> bool {
        let sum = pseudo_header_sum(self.source, self.destination, TCP) + (self.end - self.transport) as u64;
        self.flags & !PSH == ACK
            && self.payload < self.end
            && buffer
                .get(self.transport..self.end)
                .is_some_and(|bytes| checksum::fold(checksum::add(sum, bytes)) == 0xffff)
    }

    fn is_same_flow(&self, other: &Self, buffer: &[u8]) -> bool {
        let ports = |segment: &Self| u32_at(buffer, segment.transport);
        self.source == other.source && self.destination == other.destination && ports(self) == ports(other)
    }

    /// Returns whether the headers are equal, except for the fields that differ from segment to segment.
    fn has_headers_of(&self, other: &Self, buffer: &[u8]) -> bool {
        let (network, transport) = (self.network - self.start, self.transport - self.start);
        let header = self.payload - self.start;
        let of = |segment: &Self| buffer.get(segment.start..segment.start + header);
        let (Some(a), Some(b)) = (of(self), of(other)) else { return false };
        let lengths = |segment: &Self| {
            (
                segment.network - segment.start,
                segment.transport - segment.start,
                segment.payload - segment.start,
            )
        };
        let mut from = 0;
        let changing = match self.source {
            // Length and identification, and checksum.
            IpAddr::V4(_) => [network + 2..network + 6, network + 10..network + 12],
            // Length.
            IpAddr::V6(_) => [network + 4..network + 6, network + 6..network + 6],
        };
        // Sequence number, flags, and checksum.
        let tcp =
            [transport + 4..transport + 8, transport + 13..transport + 14, transport + 16..transport + 18];
        lengths(self) == lengths(other)
            && changing.iter().chain(&tcp).all(|skipped| {
                let equal = a.get(from..skipped.start) == b.get(from..skipped.start);
                from = skipped.end;
                equal
            })
            && a.get(from..) == b.get(from..)
    }

    /// Turns the headers of the first segment into those of the joined packet.
    fn join_headers(&self, buffer: &mut [u8], size: usize, total: usize, has_push: bool) -> VnetHeader {
        let length = self.payload - self.network + total;
        let gso = match self.source {
            IpAddr::V4(_) => {
                put(buffer, self.network + 2, &(length as u16).to_be_bytes());
                put(buffer, self.network + 10, &[0, 0]);
                let sum = checksum::add(0, buffer.get(self.network..self.transport).unwrap_or_default());
                put(buffer, self.network + 10, &checksum::finish(sum).to_be_bytes());
                Gso::TcpV4
            }
            IpAddr::V6(_) => {
                put(buffer, self.network + 4, &((length - 40) as u16).to_be_bytes());
                Gso::TcpV6
            }
        };
        if let Some(flags) = buffer.get_mut(self.transport + 13).filter(|_| has_push) {
            *flags |= PSH;
        }
        // The kernel or its network card completes the checksum from the sum of the pseudo-header.
        let tcp = self.payload - self.transport + total;
        let sum = pseudo_header_sum(self.source, self.destination, TCP) + tcp as u64;
        put(buffer, self.transport + 16, &checksum::fold(sum).to_be_bytes());
        VnetHeader {
            needs_checksum: true,
            gso,
            header_length: (self.payload - self.start) as u16,
            gso_size: size as u16,
            checksum_start: (self.transport - self.start) as u16,
            checksum_offset: 16,
        }
    }
}

impl Group {
    /// Appends a segment. Returns false if it does not follow the last one or does not fit.
    fn append(&mut self, segment: &Segment, buffer: &[u8]) -> bool {
        let length = segment.end - segment.payload;
        let identification = u16_at(buffer, segment.network + 4).unwrap_or(0);
        // Packets with DF need no identification (RFC 6864, section 4.1).
        let is_numbered = segment.source.is_ipv6()
            || u16_at(buffer, segment.network + 6).is_some_and(|flags| flags & 0x4000 != 0)
            || identification == self.identification.wrapping_add(1);
        let fits = segment.sequence == self.next
            && length <= self.size
            && self.first.payload - self.first.network + self.total + length <= MAX_LENGTH
            && is_numbered
            && self.first.has_headers_of(segment, buffer);
        if fits {
            self.parts.push(segment.payload..segment.end);
            self.total += length;
            self.next = self.next.wrapping_add(length as u32);
            self.identification = identification;
            self.has_push = segment.flags & PSH != 0;
        }
        fits
    }

    /// Returns whether no segment can follow `last`.
    fn is_full(&self, last: &Segment) -> bool {
        self.has_push
            || last.end - last.payload < self.size
            || self.first.payload - self.first.network + self.total + self.size > MAX_LENGTH
            || self.parts.len() >= MAX_PARTS
    }
}
