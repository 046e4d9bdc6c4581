//! Puts packets of several hosts in the order of their times, and finds the packets that were dropped.
//!
//! A host says with each message until when it has told everything, so a packet is given out when all hosts are past it. It is
//! held a little longer, because what dropped it is told later than the packet.

use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

use ovl_control::CapturedFrom;
use ovl_proto::capture::{CapturePoint, CapturedDrop, CapturedPacket, PacketKey};

use super::decode::key;
use crate::text::plural;

/// How long a packet is held for what dropped it, in nanoseconds.
const HELD_NS: u64 = 200_000_000;
/// How much earlier than the packet a drop may seem to be, because clocks differ.
const SLACK_NS: u64 = 20_000_000;
/// How long a drop waits for its packet.
const DROP_NS: u64 = 2_000_000_000;
/// The maximum length of packets that are held, in bytes. Beyond it they are given out as they are.
const MOST_BYTES: usize = 64 << 20;
/// The maximum number of drops that wait.
const MOST_DROPS: usize = 4096;

/// A packet in the order of all hosts.
#[derive(Debug)]
pub(super) struct Merged {
    /// The host.
    pub(super) host: Rc<str>,
    /// Where it was captured.
    pub(super) point: Rc<CapturePoint>,
    /// The packet. Its time is that of the host that was asked.
    pub(super) packet: CapturedPacket,
    /// What dropped it.
    pub(super) dropped: Option<String>,
    /// The number of packets that its host lost before it.
    pub(super) lost: u64,
    key: Option<PacketKey>,
}

#[derive(Debug, Default)]
struct Source {
    until_ns: u64,
    began: bool,
    ended: bool,
    points: Vec<Rc<CapturePoint>>,
    lost: u64,
}

/// Packets of several hosts.
#[derive(Debug, Default)]
pub(super) struct Merge {
    sources: BTreeMap<Rc<str>, Source>,
    /// Packets that are held, by their time and the order in which they came.
    held: BTreeMap<(u64, u64), Merged>,
    bytes: usize,
    came: u64,
    drops: VecDeque<CapturedDrop>,
    lost: u64,
}

impl Merge {
    /// Begins with the hosts that take part.
    pub(super) fn new(hosts: &[String]) -> Self {
        let sources = hosts.iter().map(|host| (Rc::from(&**host), Source::default()));
        Self { sources: sources.collect(), ..Self::default() }
    }

    /// Takes what a host said. Returns notes for the user.
    pub(super) fn push(&mut self, from: CapturedFrom) -> Vec<String> {
        let CapturedFrom { host, offset_ns, batch } = from;
        let host: Rc<str> = host.into();
        let here = |at_ns: u64| at_ns.saturating_add_signed(offset_ns);
        let source = self.sources.entry(Rc::clone(&host)).or_default();
        let mut notes = Vec::new();
        if !source.began && batch.ended.is_none() {
            source.began = true;
            source.points = batch.points.into_iter().map(Rc::new).collect();
            notes.push(format!("{host}: began at {}", plural(source.points.len() as u64, "device")));
        }
        source.until_ns = source.until_ns.max(here(batch.until_ns));
        source.lost += batch.lost;
        self.lost += batch.lost;
        notes.extend(batch.notes.into_iter().map(|note| format!("{host}: {note}")));
        if let Some(why) = batch.ended {
            source.ended = true;
            notes.push(format!("{host}: ended: {why}"));
        }
        for packet in batch.packets {
            let Some(point) = source.points.get(usize::from(packet.point)).map(Rc::clone) else { continue };
            let packet = CapturedPacket { at_ns: here(packet.at_ns), ..packet };
            self.bytes += packet.bytes.len();
            self.came += 1;
            let key = key(&packet.bytes, point.link);
            let lost = std::mem::take(&mut source.lost);
            let merged = Merged { host: Rc::clone(&host), point, packet, dropped: None, lost, key };
            self.held.insert((merged.packet.at_ns, self.came), merged);
        }
        self.drops
            .extend(batch.drops.into_iter().map(|drop| CapturedDrop { at_ns: here(drop.at_ns), ..drop }));
        let too_many = self.drops.len().saturating_sub(MOST_DROPS);
        self.drops.drain(..too_many);
        notes
    }

    /// Returns the packets that no other one precedes any more.
    pub(super) fn ready(&mut self) -> Vec<Merged> {
        let waiting = self.sources.values().filter(|source| !source.ended).map(|source| source.until_ns);
        let until = waiting.min().unwrap_or(u64::MAX).saturating_sub(HELD_NS);
        let mut ready = Vec::new();
        while let Some(first) = self.held.first_entry() {
            if first.key().0 > until && self.bytes <= MOST_BYTES {
                break;
            }
            let merged = first.remove();
            self.bytes -= merged.packet.bytes.len();
            ready.push(self.with_drop(merged));
        }
        self.drops.retain(|drop| drop.at_ns.saturating_add(DROP_NS) > until);
        ready
    }

    /// Returns all packets that are held.
    pub(super) fn rest(&mut self) -> Vec<Merged> {
        self.sources.clear();
        self.ready()
    }

    /// Whether all hosts have told what they captured until a time, in nanoseconds since 1970.
    pub(super) fn is_past(&self, at_ns: u64) -> bool {
        self.sources.values().all(|source| source.ended || source.until_ns >= at_ns)
    }

    /// Whether all hosts have ended.
    pub(super) fn is_over(&self) -> bool {
        self.sources.values().all(|source| source.ended)
    }

    /// The number of packets that hosts have lost.
    pub(super) fn lost(&self) -> u64 {
        self.lost
    }

    /// Adds what dropped a packet, if this was the last place at which it was seen.
    fn with_drop(&mut self, mut merged: Merged) -> Merged {
        let Some(key) = merged.key else { return merged };
        let at = merged.packet.at_ns;
        let is_of = |drop: &CapturedDrop| {
            drop.key == key
                && at <= drop.at_ns.saturating_add(SLACK_NS)
                && drop.at_ns <= at.saturating_add(DROP_NS)
        };
        let Some(place) = self.drops.iter().position(is_of) else { return merged };
        let before = self.drops.get(place).map_or(at, |drop| drop.at_ns.saturating_add(SLACK_NS));
        let is_seen_later = self.held.range(..(before, u64::MAX)).any(|(_, later)| later.key == Some(key));
        if !is_seen_later {
            merged.dropped = self.drops.remove(place).map(|drop| drop.reason);
        }
        merged
    }
}

#[cfg(test)]
mod tests {
    use ovl_proto::capture::{CaptureBatch, LinkType, PointKind};

    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn packet(at_ns: u64, port: u8) -> CapturedPacket {
        let mut bytes = Vec::new();
        let builder =
            etherparse::PacketBuilder::ethernet2([1; 6], [2; 6]).ipv4([10, 1, 0, 1], [10, 1, 0, 2], 9);
        builder.udp(port.into(), 53).write(&mut bytes, &[]).unwrap();
        CapturedPacket { point: 0, at_ns, outgoing: false, length: 60, bytes }
    }

    fn from(host: &str, offset_ns: i64, until_ns: u64, packets: Vec<CapturedPacket>) -> CapturedFrom {
        let point = CapturePoint {
            kind: PointKind::Endpoint,
            name: "default/a".to_owned(),
            device: "x".to_owned(),
            link: LinkType::Ethernet,
        };
        let batch = CaptureBatch { points: vec![point], packets, until_ns, ..CaptureBatch::default() };
        CapturedFrom { host: host.to_owned(), offset_ns, batch }
    }

    fn ports(merged: &[Merged]) -> Vec<u16> {
        merged.iter().map(|merged| merged.key.unwrap().port).collect()
    }

    #[test]
    fn packets_come_in_the_order_of_all_hosts() {
        let mut merge = Merge::new(&["h1".to_owned(), "h2".to_owned()]);
        merge.push(from("h1", 0, 3 * SECOND, vec![packet(SECOND, 1), packet(SECOND + 20, 3)]));
        assert!(merge.ready().is_empty(), "h2 has said nothing");
        // The clock of h2 is five seconds ahead.
        let offset = -5 * i64::try_from(SECOND).unwrap();
        merge.push(from("h2", offset, 7 * SECOND, vec![packet(6 * SECOND + 10, 2)]));
        assert_eq!(ports(&merge.ready()), [1, 2, 3]);
        assert!(!merge.is_over());
        let mut last = from("h2", offset, 0, vec![packet(8 * SECOND, 4)]);
        last.batch.ended = Some("over".to_owned());
        last.batch.lost = 7;
        assert_eq!(merge.push(last), ["h2: ended: over"]);
        assert!(merge.ready().is_empty() && merge.lost() == 7);
        assert_eq!(merge.rest()[0].lost, 7);
    }

    #[test]
    fn last_place_of_a_dropped_packet_says_why() {
        let mut merge = Merge::new(&["h1".to_owned(), "h2".to_owned()]);
        merge.push(from("h1", 0, 3 * SECOND, vec![packet(SECOND, 1), packet(SECOND, 9)]));
        let mut second = from("h2", 0, 3 * SECOND, vec![packet(SECOND + 100, 1)]);
        let key = key(&packet(0, 1).bytes, LinkType::Ethernet).unwrap();
        second.batch.drops = vec![CapturedDrop { at_ns: SECOND + 200, key, reason: "a rule".to_owned() }];
        merge.push(second);
        let found: Vec<_> = merge.ready().into_iter().map(|merged| merged.dropped).collect();
        assert_eq!(found, [None, None, Some("a rule".to_owned())]);
    }
}
