//! Runs: consecutive datagrams of equal length with the same ids, which are sent with one system call.

use std::io;
use std::net::{SocketAddr, UdpSocket};

use crate::frame::{Channel, HostId};

/// The most that one call sends: IP's limit on a packet, with room for its headers.
pub(crate) const MOST_SENT: usize = 65_000;
/// The kernel divides at most so many datagrams (`UDP_MAX_SEGMENTS`).
const MOST_SEGMENTS: usize = 64;

/// Sends datagrams that lie one after the other, each of them `segment` bytes long but the last one. Returns how many were sent, and
/// how many the socket refused.
pub(crate) fn send(socket: &UdpSocket, to: SocketAddr, bytes: &[u8], segment: usize) -> (usize, usize) {
    let (mut all_sent, mut all) = (0, 0);
    for piece in bytes.chunks(segment * MOST_SEGMENTS) {
        let number = piece.len().div_ceil(segment);
        let sent = match ovl_udp::send(socket, to, piece, segment) {
            // The kernel divides only what it need not fragment as well, and only for devices that compute checksums.
            Err(error) if number > 1 && error.kind() != io::ErrorKind::WouldBlock => {
                piece.chunks(segment).filter(|one| ovl_udp::send(socket, to, one, segment).is_ok()).count()
            }
            Err(_) => 0,
            Ok(_) => number,
        };
        (all_sent, all) = (all_sent + sent, all + number);
    }
    (all_sent, all - all_sent)
}

/// What the datagrams of a run have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kind {
    pub(crate) channel: Channel,
    pub(crate) from: HostId,
    pub(crate) to: HostId,
}

/// Memory for a run. Only the last datagram may be shorter than the others.
pub(crate) struct Run {
    bytes: Box<[u8]>,
    length: usize,
    segment: usize,
    kind: Option<Kind>,
}

impl Run {
    /// Allocates a run of up to so many bytes.
    pub(crate) fn new(most: usize) -> Self {
        Self { bytes: vec![0; most].into(), length: 0, segment: 0, kind: None }
    }

    /// Whether a datagram of this kind and length can be added.
    pub(crate) fn takes(&self, kind: Kind, length: usize) -> bool {
        if self.length == 0 {
            return length <= self.bytes.len();
        }
        let whole = self.length.is_multiple_of(self.segment);
        self.kind == Some(kind) && whole && length <= self.segment && self.length + length <= self.bytes.len()
    }

    /// The memory for a datagram that [`Self::takes`] allows. `None` if it is full.
    pub(crate) fn add(&mut self, kind: Kind, length: usize) -> Option<&mut [u8]> {
        let place = self.bytes.get_mut(self.length..self.length + length)?;
        if self.length == 0 {
            (self.kind, self.segment) = (Some(kind), length.max(1));
        }
        self.length += length;
        Some(place)
    }

    /// Takes the run: what its datagrams have in common, their bytes, and the length of each.
    pub(crate) fn take(&mut self) -> Option<(Kind, &[u8], usize)> {
        let length = std::mem::take(&mut self.length);
        let kind = self.kind.take().filter(|_| length > 0)?;
        Some((kind, self.bytes.get(..length)?, self.segment))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: Kind = Kind { channel: 0, from: [1; 10], to: [2; 10] };

    #[test]
    fn run_has_equal_datagrams_and_one_shorter_at_its_end() {
        let mut run = Run::new(100);
        for byte in 1..=2 {
            assert!(run.takes(KIND, 40));
            run.add(KIND, 40).unwrap().fill(byte);
        }
        assert!(!run.takes(KIND, 40), "full");
        assert!(!run.takes(Kind { channel: 1, ..KIND }, 10) && !run.takes(KIND, 50));
        assert!(run.takes(KIND, 20));
        run.add(KIND, 20).unwrap().fill(3);
        assert!(!run.takes(KIND, 0), "a shorter one is the last");
        let (kind, bytes, segment) = run.take().unwrap();
        assert_eq!((kind, bytes.len(), segment), (KIND, 100, 40));
        assert_eq!((bytes[0], bytes[40], bytes[80]), (1, 2, 3));
        assert!(run.take().is_none());
        assert!(!run.takes(KIND, 101) && run.takes(KIND, 100));
    }
}
