//! The trial of the kernel's division of datagrams (`UDP_SEGMENT`) on the way to a peer. Some releases of Linux, with some
//! network devices, damage datagrams of equal length that were sent so, and the peer drops them.
//!
//! A round is a pair of ICMPv6 echo requests of equal length in one call, and in doubt a third one by itself. Any peer answers
//! them: its kernel does. [`SegmentTrial`] owns what was sent to one peer and answered. Begin to read at
//! [`SegmentTrial::next`].

use std::hash::BuildHasher as _;
use std::net::Ipv6Addr;
use std::time::{Duration, Instant};

use ovl_udp::trial::{Offload, Round, Trial};

use crate::checksum;
use crate::packet::{ICMPV6, Ip, pseudo_header_sum, put, u32_at};

/// The length of an echo request in bytes: what every path of IPv6 carries. It is a multiple of 16, so nothing is padded.
pub(crate) const LENGTH: usize = 1280;
/// The requests of a round that are sent in one call.
pub(crate) const PAIR: usize = 2;
/// Time from the creation of a peer to the first round.
const FIRST: Duration = Duration::from_secs(1);
/// The length of an IPv6 header, in bytes.
const IPV6_HEADER: usize = 40;
/// The types of ICMPv6 echo requests and replies (RFC 4443, section 4).
const REQUEST: u8 = 128;
const REPLY: u8 = 129;
/// Offsets in the payload of an echo request: a random number, the round and the place in the round.
const NONCE: usize = IPV6_HEADER + 8;
const ROUND: usize = NONCE + 8;
const PLACE: usize = ROUND + 4;

/// The trial with one peer.
#[derive(Debug)]
pub(crate) struct SegmentTrial {
    trial: Trial<PAIR>,
    /// The time from which the trial counts.
    since: Instant,
    /// Makes the requests known again among the echo requests of other programs.
    nonce: [u8; 8],
}

impl SegmentTrial {
    pub(crate) fn new() -> Self {
        let since = Instant::now();
        let nonce = std::hash::RandomState::new().hash_one(since).to_be_bytes();
        Self { trial: Trial::new(FIRST), since, nonce }
    }

    pub(crate) fn verdict(&self) -> Offload {
        self.trial.verdict()
    }

    /// Returns the round that is due, which then counts as sent. `None` if none is.
    pub(crate) fn next(&mut self) -> Option<Round> {
        self.trial.next(self.since.elapsed())
    }

    /// Returns an echo request of a round. Of the places, [`PAIR`] is that of the request by itself.
    pub(crate) fn request(&self, round: Round, place: usize, from: Ipv6Addr, to: Ipv6Addr) -> [u8; LENGTH] {
        // Not all alike, so that damage of any byte changes the checksum.
        let mut packet: [u8; LENGTH] = std::array::from_fn(|at| at as u8);
        let length = (LENGTH - IPV6_HEADER) as u16;
        put(&mut packet, 0, &0x6000_0000_u32.to_be_bytes());
        put(&mut packet, 4, &length.to_be_bytes());
        put(&mut packet, 6, &[ICMPV6, 64]);
        put(&mut packet, 8, &from.octets());
        put(&mut packet, 24, &to.octets());
        put(&mut packet, IPV6_HEADER, &[REQUEST, 0, 0, 0]);
        put(&mut packet, IPV6_HEADER + 4, &self.nonce[..4]);
        put(&mut packet, NONCE, &self.nonce);
        put(&mut packet, ROUND, &round.number.to_be_bytes());
        put(&mut packet, PLACE, &[place as u8]);
        let sum = pseudo_header_sum(from.into(), to.into(), ICMPV6) + u64::from(length);
        let sum = checksum::finish(checksum::add(sum, &packet[IPV6_HEADER..]));
        put(&mut packet, IPV6_HEADER + 2, &sum.to_be_bytes());
        packet
    }

    /// Takes an answer from the peer. Returns whether it was one.
    pub(crate) fn take(&mut self, packet: &[u8]) -> bool {
        if packet.get(NONCE..ROUND) != Some(&self.nonce) {
            return false;
        }
        match (u32_at(packet, ROUND), packet.get(PLACE)) {
            (Some(round), Some(place)) if usize::from(*place) < PAIR => {
                self.trial.answered(round, usize::from(*place));
            }
            (Some(round), Some(_)) => self.trial.control_answered(round),
            _ => {}
        }
        true
    }
}

/// Whether a packet may be an answer to [`SegmentTrial::take`]: quickly, because every received packet is asked.
#[inline]
pub(crate) fn may_be_answer(packet: &[u8], ip: &Ip) -> bool {
    ip.protocol == ICMPV6 && ip.end == LENGTH && packet.get(IPV6_HEADER) == Some(&REPLY)
}

/// Answers an echo request, as the kernel of a peer does. `None` if the packet is none.
#[cfg(test)]
pub(crate) fn answer(packet: &[u8]) -> Option<Vec<u8>> {
    let ip = Ip::parse(packet).filter(|ip| ip.protocol == ICMPV6 && ip.end == LENGTH)?;
    let sum = checksum::add(
        pseudo_header_sum(ip.source, ip.destination, ICMPV6) + (LENGTH - IPV6_HEADER) as u64,
        packet.get(IPV6_HEADER..)?,
    );
    assert_eq!(checksum::finish(sum), 0, "the checksum of an echo request");
    let mut reply = packet.to_vec();
    reply[8..24].copy_from_slice(&packet[24..40]);
    reply[24..40].copy_from_slice(&packet[8..24]);
    reply[IPV6_HEADER] = REPLY;
    (packet.get(IPV6_HEADER) == Some(&REQUEST)).then_some(reply)
}
