//! Joining: consecutive segments of a TCP connection go back to the kernel as one packet of up to 64 KiB,
//! as its own GRO would make it, and with one call.
//!
//! Only what cutting would restore exactly is joined: all headers are the same but for lengths, sequence and
//! checksums, and these are right.

use std::io::IoSlice;
use std::net::IpAddr;
use std::ops::Range;

use crate::checksum;
use crate::packet::{ETHERNET, Gso, Ip, TCP, Vnet, pseudo, put, u16_at, u32_at};
use crate::sys::VNET;

/// Connections that are joined at the same time.
const GROUPS: usize = 8;
/// An IP packet has a length of 16 bits.
const MAX: usize = 65_535;
/// What one call of `writev` takes, less the two headers.
const PARTS: usize = 1_000;

const PSH: u8 = 0x08;
const ACK: u8 = 0x10;

/// Where packets go: a device, or a test.
pub(crate) trait Output {
    /// One packet in pieces, the device's header first.
    fn write(&self, pieces: &[IoSlice<'_>]);
}

/// Segments on their way to one device. They lie in a buffer that the caller owns and hands in each time;
/// before it is used anew, [`Joiner::flush`] must be called.
#[derive(Debug, Default)]
pub(crate) struct Joiner {
    groups: Vec<Group>,
    /// Lists that are not in use.
    spare: Vec<Vec<Range<usize>>>,
}

/// Where the parts of a TCP segment are, in the buffer.
#[derive(Debug, Clone)]
struct Segment {
    /// The IP packet, or the frame.
    start: usize,
    end: usize,
    /// The IP header.
    network: usize,
    transport: usize,
    payload: usize,
    source: IpAddr,
    destination: IpAddr,
    sequence: u32,
    flags: u8,
}

#[derive(Debug)]
struct Group {
    first: Segment,
    /// The payload of those after the first.
    parts: Vec<Range<usize>>,
    /// Of all but the last.
    size: usize,
    /// All payload together.
    total: usize,
    next: u32,
    identification: u16,
    pushed: bool,
}

impl Joiner {
    /// Takes one packet or frame, and writes what cannot wait.
    pub(crate) fn add(&mut self, buffer: &mut [u8], at: Range<usize>, is_frame: bool, output: &impl Output) {
        let Some(segment) = Segment::parse(buffer, at.clone(), is_frame) else {
            one(buffer, at, output);
            return;
        };
        let same = self.groups.iter().position(|group| group.first.is_same_flow(&segment, buffer));
        let joins = segment.can_join(buffer);
        if let Some(index) = same {
            if joins && self.groups[index].take(&segment, buffer) {
                if self.groups[index].is_full(&segment) {
                    self.write(index, buffer, output);
                }
                return;
            }
            // In order: what is waiting goes before it.
            self.write(index, buffer, output);
        }
        if !joins || segment.flags & PSH != 0 {
            one(buffer, at, output);
            return;
        }
        if self.groups.len() == GROUPS {
            self.write(0, buffer, output);
        }
        let size = segment.end - segment.payload;
        self.groups.push(Group {
            size,
            total: size,
            next: segment.sequence.wrapping_add(size as u32),
            identification: u16_at(buffer, segment.network + 4).unwrap_or(0),
            pushed: false,
            parts: self.spare.pop().unwrap_or_default(),
            first: segment,
        });
    }

    /// Writes all that is waiting.
    pub(crate) fn flush(&mut self, buffer: &mut [u8], output: &impl Output) {
        while !self.groups.is_empty() {
            self.write(0, buffer, output);
        }
    }

    fn write(&mut self, index: usize, buffer: &mut [u8], output: &impl Output) {
        let Group { first, mut parts, size, total, pushed, .. } = self.groups.remove(index);
        if parts.is_empty() {
            one(buffer, first.start..first.end, output);
        } else {
            let vnet = first.grow(buffer, size, total, pushed).to_bytes();
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

/// As it came.
fn one(buffer: &[u8], at: Range<usize>, output: &impl Output) {
    let vnet = [0; VNET];
    output.write(&[IoSlice::new(&vnet), IoSlice::new(buffer.get(at).unwrap_or_default())]);
}

impl Segment {
    /// None if it is not TCP in a whole IP packet.
    fn parse(buffer: &[u8], at: Range<usize>, is_frame: bool) -> Option<Self> {
        let network = at.start + if is_frame { ETHERNET } else { 0 };
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

    /// Plain data with a right checksum.
    fn can_join(&self, buffer: &[u8]) -> bool {
        let sum = pseudo(self.source, self.destination, TCP) + (self.end - self.transport) as u64;
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

    /// Whether the headers are the same, but for what differs from segment to segment.
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
            // Length and identification; checksum.
            IpAddr::V4(_) => [network + 2..network + 6, network + 10..network + 12],
            // Length.
            IpAddr::V6(_) => [network + 4..network + 6, network + 6..network + 6],
        };
        // Sequence; flags; checksum.
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

    /// Makes the first of several the header of all.
    fn grow(&self, buffer: &mut [u8], size: usize, total: usize, pushed: bool) -> Vnet {
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
        if let Some(flags) = buffer.get_mut(self.transport + 13).filter(|_| pushed) {
            *flags |= PSH;
        }
        // The rest of the sum is the kernel's, or its network card's.
        let tcp = self.payload - self.transport + total;
        let sum = pseudo(self.source, self.destination, TCP) + tcp as u64;
        put(buffer, self.transport + 16, &checksum::fold(sum).to_be_bytes());
        Vnet {
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
    /// Takes the next one; false if it is not the next one.
    fn take(&mut self, segment: &Segment, buffer: &[u8]) -> bool {
        let length = segment.end - segment.payload;
        let identification = u16_at(buffer, segment.network + 4).unwrap_or(0);
        // What may not be cut again needs no identification (RFC 6864).
        let is_numbered = segment.source.is_ipv6()
            || u16_at(buffer, segment.network + 6).is_some_and(|flags| flags & 0x4000 != 0)
            || identification == self.identification.wrapping_add(1);
        let fits = segment.sequence == self.next
            && length <= self.size
            && self.first.payload - self.first.network + self.total + length <= MAX
            && is_numbered
            && self.first.has_headers_of(segment, buffer);
        if fits {
            self.parts.push(segment.payload..segment.end);
            self.total += length;
            self.next = self.next.wrapping_add(length as u32);
            self.identification = identification;
            self.pushed = segment.flags & PSH != 0;
        }
        fits
    }

    /// After this one comes none.
    fn is_full(&self, last: &Segment) -> bool {
        self.pushed
            || last.end - last.payload < self.size
            || self.first.payload - self.first.network + self.total + self.size > MAX
            || self.parts.len() >= PARTS
    }
}
