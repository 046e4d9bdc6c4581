//! Runs arbitrary bytes through all packet parsers, for the fuzzer in `tests/fuzz` and for a property test.

use std::cell::Cell;
use std::io::IoSlice;
use std::net::Ipv6Addr;

use crate::cut::{UncutPacket, cut};
use crate::join::{Joiner, Output};
use crate::packet::{Ip, VnetHeader, VxlanFrame, claim, macs};
use crate::sys::VNET_HEADER;

/// Counts the written bytes.
struct Count(Cell<usize>);

impl Output for Count {
    fn write(&self, pieces: &[IoSlice<'_>]) {
        self.0.set(self.0.get() + pieces.iter().map(|piece| piece.len()).sum::<usize>());
    }
}

/// Parses, joins and divides a packet or frame. The input is a byte of options, a `struct virtio_net_hdr` and
/// the packet.
pub fn packet(bytes: &[u8]) {
    const HEADROOM: usize = 64;
    let Some((choices, rest)) = bytes.split_first() else { return };
    let Some((header, content)) = rest.split_at_checked(VNET_HEADER) else { return };
    let is_frame = choices & 1 != 0;
    let mut packet = content.to_vec();
    // Random bytes are rarely an IP packet.
    if let Some(first) = packet.first_mut().filter(|_| !is_frame && choices & 2 != 0) {
        *first = *first & 0x0f | if choices & 4 != 0 { 0x40 } else { 0x60 };
    }
    if let Some(ip) = Ip::parse(&packet) {
        assert!(ip.payload <= ip.end && ip.end <= packet.len());
        let to = Ipv6Addr::UNSPECIFIED;
        if let Some(inner) = VxlanFrame::parse(&packet, &ip, to, 0) {
            assert!(inner.start < inner.end && inner.end <= packet.len());
        }
    }
    let _ = (macs(&packet), claim(&packet));

    // Joined with itself, joined or not: no payload byte is lost or added.
    let (mut joiner, count) = (Joiner::default(), Count(Cell::new(0)));
    let mut twice = [&packet[..], &packet[..]].concat();
    joiner.add(&mut twice, 0..packet.len(), is_frame, &count);
    joiner.add(&mut twice, packet.len()..2 * packet.len(), is_frame, &count);
    joiner.flush(&mut twice, &count);
    assert!(count.0.get() <= 2 * (VNET_HEADER + packet.len()));
    assert!(count.0.get() >= VNET_HEADER + packet.len());

    let Some(vnet) = VnetHeader::parse(header) else { return };
    let mut buffer = vec![0; HEADROOM];
    buffer.extend_from_slice(&packet);
    let start = if is_frame { HEADROOM - crate::packet::VXLAN_HEADERS } else { HEADROOM };
    let whole = UncutPacket { start, given: HEADROOM, end: buffer.len(), is_frame, vnet };
    let mut parts = 0;
    let result = cut(&mut buffer, &whole, |buffer, at| {
        assert!(at.end <= buffer.len() && at.start <= at.end);
        parts += 1;
    });
    assert_eq!(result.is_ok(), parts > 0);
}

#[cfg(test)]
mod tests {
    #[test]
    fn corpus_passes() {
        ovl_corpus::replay("packets", super::packet);
    }
}
