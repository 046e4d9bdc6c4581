//! The frame of a path probe: encoding, and authentication with a key that is derived from the cluster key.
//!
//! After the Ethernet header, or as the payload of an ICMP echo request or a UDP datagram, in network byte order:
//!
//! ```text
//! version (1) | size (1) | key id (4) | sender (10) | receiver (10) | length (2) | run (8) | number (8)
//! | heard run (8) | heard trial (8) | report on small probes (15) | report on large probes (15)
//! | arrived | padding | tag (16)
//!
//! report: verdict (1) | number (8) | held (4) | lost (1) | of (1)
//! arrived: 1 (1) | partial (4) | complete (4)
//! ```
//!
//! `length` is the length from `version` to the tag. The tag is the first half of HMAC-SHA256 over all before it, padding
//! included. The module owns no state.

use std::time::Duration;

use ovl_mesh::keys::{ClusterKey, Keyring};
use ovl_proto::PROBE_ETHERTYPE;
use ovl_proto::id::{ClusterKeyId, Mac, NodeId};
use ring::hmac;

/// The version of path probes that this release speaks.
pub(crate) const VERSION: u8 = 1;
/// Length of an Ethernet header, in bytes.
const ETHERNET: usize = 14;
const TAG: usize = 16;
/// Says that what arrived follows. Padding begins with 0.
const HAS_ARRIVED: u8 = 1;
/// Length of what arrived, in bytes.
const ARRIVED: usize = 1 + 2 * 4;
/// Length of a probe without what arrived and without padding, from `version` to the tag, in bytes.
const LENGTH: usize = 1 + 1 + 4 + 10 + 10 + 2 + 8 + 8 + 8 + 8 + 2 * 15 + TAG;

/// The size of a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Size {
    /// As small as it can be.
    Small,
    /// As long as the longest packet of a workload on this path.
    Large,
    /// Of any length, in a search for the longest that passes.
    Trial,
    /// As small as it can be, on a directly routed path. It is a size of its own, so that no probe of a path can be repeated on
    /// another one.
    Direct,
    /// As small as it can be, in a UDP datagram whose checksum is left to the offload of the VXLAN device and of what is below.
    Partial,
    /// The same with its checksum.
    Complete,
}

impl Size {
    fn to_byte(self) -> u8 {
        match self {
            Self::Small => 0,
            Self::Large => 1,
            Self::Trial => 2,
            Self::Direct => 3,
            Self::Partial => 4,
            Self::Complete => 5,
        }
    }
}

/// Judgement of a host about the probes that arrive from another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Verdict {
    /// It is too early to judge.
    #[default]
    Unknown,
    /// They arrive.
    Works,
    /// The last ones are missing, or the first ones are back. The other host sends faster while this is said.
    Doubtful,
    /// None arrives.
    Broken,
}

impl Verdict {
    fn to_byte(self) -> u8 {
        match self {
            Self::Unknown => 0,
            Self::Works => 1,
            Self::Doubtful => 2,
            Self::Broken => 3,
        }
    }

    fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Unknown),
            1 => Some(Self::Works),
            2 => Some(Self::Doubtful),
            3 => Some(Self::Broken),
            _ => None,
        }
    }
}

/// Statement of a host about the probes of one size that arrive from another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Report {
    /// Its judgement.
    pub verdict: Verdict,
    /// The number of the last probe that arrived; 0 if none did.
    pub number: u64,
    /// The time from its arrival to this statement.
    pub held: Duration,
    /// Of the last `of` probes, those that did not arrive.
    pub lost: u8,
    /// See `lost`.
    pub of: u8,
}

/// How many probes of an offload have arrived from a run of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Arrived {
    /// Those whose checksum was left to the offload.
    pub partial: u32,
    /// Those that had their checksum.
    pub complete: u32,
}

/// The content of a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frame {
    /// The host that sends it.
    pub from: NodeId,
    /// The host that it is for.
    pub to: NodeId,
    /// The size of the probe.
    pub size: Size,
    /// The run of the sender, which grows with each start.
    pub run: u64,
    /// The number of the probe, counted from 1 for each size in each run.
    pub number: u64,
    /// The run of the receiver from which the last probe arrived; 0 if none did.
    pub heard_run: u64,
    /// The number of the last trial that arrived from the receiver; 0 if none did.
    pub heard_trial: u64,
    /// What the sender says of the receiver's small probes.
    pub small: Report,
    /// What the sender says of the receiver's large probes.
    pub large: Report,
    /// What arrived at the sender from that run of the receiver.
    pub arrived: Arrived,
}

/// The reason why a received frame is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("no path probe of this version")]
    Malformed,
    #[error("for another host")]
    Elsewhere,
    #[error("authentication failed")]
    Unauthenticated,
}

impl Frame {
    /// Encodes the frame with its Ethernet header, as an IP packet of `mtu` bytes would be long; at least as long as it
    /// must be.
    pub(crate) fn encode(&self, [source, destination]: [Mac; 2], key: &ClusterKey, mtu: u16) -> Vec<u8> {
        let mut frame = Vec::with_capacity(ETHERNET + (LENGTH + ARRIVED).max(usize::from(mtu)));
        frame.extend(destination.0);
        frame.extend(source.0);
        frame.extend(PROBE_ETHERTYPE.to_be_bytes());
        self.write(&mut frame, key, mtu);
        frame
    }

    /// Encodes the frame as the payload of an echo request.
    pub(crate) fn encode_payload(&self, key: &ClusterKey) -> Vec<u8> {
        let mut payload = Vec::with_capacity(LENGTH + ARRIVED);
        self.write(&mut payload, key, 0);
        payload
    }

    /// Appends the frame without a header, of `mtu` bytes or as long as it must be.
    fn write(&self, frame: &mut Vec<u8>, key: &ClusterKey, mtu: u16) {
        let (start, length) = (frame.len(), (LENGTH + ARRIVED).max(usize::from(mtu)));
        frame.extend([VERSION, self.size.to_byte()]);
        frame.extend(key.id().0);
        frame.extend(self.from.0);
        frame.extend(self.to.0);
        frame.extend(u16::try_from(length).unwrap_or(u16::MAX).to_be_bytes());
        for number in [self.run, self.number, self.heard_run, self.heard_trial] {
            frame.extend(number.to_be_bytes());
        }
        for report in [self.small, self.large] {
            frame.push(report.verdict.to_byte());
            frame.extend(report.number.to_be_bytes());
            frame.extend(u32::try_from(report.held.as_micros()).unwrap_or(u32::MAX).to_be_bytes());
            frame.extend([report.lost, report.of]);
        }
        frame.push(HAS_ARRIVED);
        for count in [self.arrived.partial, self.arrived.complete] {
            frame.extend(count.to_be_bytes());
        }
        // Not all alike, so that damage of any byte changes the tag's input.
        let padding = (0u8..=u8::MAX).cycle().take((start + length - TAG).saturating_sub(frame.len()));
        frame.extend(padding);
        let tag = hmac::sign(key.probes(), frame.get(start..).unwrap_or_default());
        frame.extend(tag.as_ref().iter().take(TAG));
    }

    /// Decodes a frame with its Ethernet header and verifies its tag. What is cheap is checked first.
    ///
    /// # Errors
    ///
    /// It is malformed, for another host than `me`, or not authenticated by a key of the ring.
    pub(crate) fn decode(frame: &[u8], me: NodeId, ring: &Keyring) -> Result<Self, FrameError> {
        Self::decode_payload(frame.get(ETHERNET..).ok_or(FrameError::Malformed)?, me, ring)
    }

    /// Decodes a frame without a header, as [`Self::decode`].
    ///
    /// # Errors
    ///
    /// As [`Self::decode`].
    pub(crate) fn decode_payload(probe: &[u8], me: NodeId, ring: &Keyring) -> Result<Self, FrameError> {
        let mut rest = Reader(probe);
        let [version, size] = rest.take()?;
        let size = match (version, size) {
            (VERSION, 0) => Size::Small,
            (VERSION, 1) => Size::Large,
            (VERSION, 2) => Size::Trial,
            (VERSION, 3) => Size::Direct,
            (VERSION, 4) => Size::Partial,
            (VERSION, 5) => Size::Complete,
            _ => return Err(FrameError::Malformed),
        };
        let key = ClusterKeyId(rest.take()?);
        let (from, to) = (NodeId(rest.take()?), NodeId(rest.take()?));
        if to != me || from == me {
            return Err(FrameError::Elsewhere);
        }
        let length = usize::from(u16::from_be_bytes(rest.take()?));
        let numbers = [rest.take()?, rest.take()?, rest.take()?, rest.take()?].map(u64::from_be_bytes);
        let [run, number, heard_run, heard_trial] = numbers;
        let (small, large) = (rest.report()?, rest.report()?);
        let arrived = match rest.take() {
            Ok([HAS_ARRIVED]) if length >= LENGTH + ARRIVED => {
                let [partial, complete] = [rest.take()?, rest.take()?].map(u32::from_be_bytes);
                Arrived { partial, complete }
            }
            // An earlier release sent it.
            _ => Arrived::default(),
        };
        let sealed = probe.get(..length).filter(|_| length >= LENGTH).ok_or(FrameError::Malformed)?;
        let (body, tag) = sealed.split_last_chunk::<TAG>().ok_or(FrameError::Malformed)?;
        let is_genuine = |key: &ClusterKey| {
            let whole = hmac::sign(key.probes(), body);
            // Without a comparison that leaks where the tags differ.
            let differs = whole.as_ref().iter().zip(tag).fold(0, |differs, (a, b)| differs | (a ^ b));
            differs == 0
        };
        if !ring.opening(key).any(is_genuine) {
            return Err(FrameError::Unauthenticated);
        }
        Ok(Self { from, to, size, run, number, heard_run, heard_trial, small, large, arrived })
    }
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(FrameError::Malformed)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn report(&mut self) -> Result<Report, FrameError> {
        let [verdict] = self.take()?;
        let verdict = Verdict::from_byte(verdict).ok_or(FrameError::Malformed)?;
        let number = u64::from_be_bytes(self.take()?);
        let held = Duration::from_micros(u32::from_be_bytes(self.take()?).into());
        let [lost, of] = self.take()?;
        Ok(Report { verdict, number, held, lost, of })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MACS: [Mac; 2] = [Mac([0x1a, 0, 0, 0, 0, 1]), Mac([0x1a, 0, 0, 0, 0, 2])];

    fn frame() -> Frame {
        Frame {
            from: NodeId([1; 10]),
            to: NodeId([2; 10]),
            size: Size::Large,
            run: 3,
            number: 4,
            heard_run: 5,
            heard_trial: 10,
            small: Report {
                verdict: Verdict::Broken,
                number: 6,
                held: Duration::from_micros(7),
                lost: 8,
                of: 9,
            },
            large: Report::default(),
            arrived: Arrived { partial: 11, complete: 12 },
        }
    }

    fn ring(key: u8) -> Keyring {
        Keyring::new(ClusterKey::new([key; 32]), vec![ClusterKey::new([9; 32])])
    }

    #[test]
    fn frame_is_read_back_with_any_padding_and_any_key_of_the_ring() {
        for (key, mtu) in [(1, 0), (1, 1450), (9, 1450)] {
            let bytes = frame().encode(MACS, &ClusterKey::new([key; 32]), mtu);
            assert_eq!(bytes.len(), 14 + (LENGTH + ARRIVED).max(mtu.into()));
            assert_eq!(Frame::decode(&bytes, NodeId([2; 10]), &ring(1)), Ok(frame()));
            // A device may pad short frames.
            let longer = [&bytes[..], &[0; 7]].concat();
            assert_eq!(Frame::decode(&longer, NodeId([2; 10]), &ring(1)), Ok(frame()));
        }
    }

    #[test]
    fn damaged_truncated_foreign_and_misdirected_frames_are_refused() {
        let bytes = frame().encode(MACS, &ClusterKey::new([1; 32]), 200);
        for at in ETHERNET..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            assert!(Frame::decode(&damaged, NodeId([2; 10]), &ring(1)).is_err(), "byte {at}");
            assert!(Frame::decode(&bytes[..at], NodeId([2; 10]), &ring(1)).is_err(), "{at} bytes");
        }
        let elsewhere = Frame::decode(&bytes, NodeId([3; 10]), &ring(1));
        assert_eq!(elsewhere, Err(FrameError::Elsewhere));
        let unknown = Frame::decode(&bytes, NodeId([2; 10]), &ring(3));
        assert_eq!(unknown, Err(FrameError::Unauthenticated));
    }
}
