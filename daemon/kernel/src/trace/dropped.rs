//! Which packets of a capture are dropped, and by what: what nftables' tracing says ([`super::drops`]) and what the kernel says
//! ([`super::kernel`]) together. Of a packet that both name, nftables' word counts, because it names the rule.

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use ovl_dataplane::passage::FilterDrop;
use ovl_proto::capture::PacketKey;

use super::drops::{DropTrace, Headers};
use super::kernel::{KernelDrops, Why};
use super::wall_ns;

/// How long what the kernel says of a packet filter waits for what nftables says.
const WAITS: Duration = Duration::from_millis(100);
/// The maximum number of packets that wait, and that are remembered because nftables named them.
const MOST: usize = 1024;

/// A packet that was dropped.
#[derive(Debug, Clone)]
pub struct DroppedPacket {
    /// The time, in nanoseconds since 1970.
    pub at_ns: u64,
    /// Which packet it was.
    pub key: PacketKey,
    /// Its destination and its port; 0 for a protocol without ports.
    pub to: (IpAddr, u16),
    /// What dropped it.
    pub by: DroppedBy,
}

/// What dropped a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DroppedBy {
    /// A rule of nftables, or the policy of a chain.
    Rule(FilterDrop),
    /// A packet filter, and nftables did not say which rule: it is in the namespace of a workload or in iptables' legacy tables, or
    /// the packet was not traced.
    Filter,
    /// The kernel, for a reason that it names so (`enum skb_drop_reason`, without `SKB_DROP_REASON_`).
    Kernel(String),
}

/// Hears of packets that are dropped.
#[derive(Debug)]
pub(crate) struct DroppedPackets {
    rules: Option<DropTrace>,
    kernel: Option<KernelDrops>,
    held: Held,
}

impl DroppedPackets {
    /// Hears of packets from or to prefixes from now on, in network namespaces with these inodes. Returns also what it will not
    /// hear of, in sentences. It blocks.
    pub(crate) fn begin(watched: &[IpNet], spaces: &BTreeSet<u64>) -> (Self, Vec<String>) {
        let mut notes = Vec::new();
        let rules = match DropTrace::begin(watched) {
            Ok(rules) => Some(rules),
            Err(error) => {
                notes.push(format!("it is not known which packets filters drop: {error}"));
                None
            }
        };
        let kernel = match KernelDrops::begin(watched, spaces) {
            Ok(kernel) => Some(kernel),
            Err(error) => {
                notes.push(format!("it is not known which packets the kernel drops: {error}"));
                None
            }
        };
        (Self { rules, kernel, held: Held::default() }, notes)
    }

    /// The descriptors to be polled.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let rules = self.rules.as_ref().map(DropTrace::descriptor);
        rules.into_iter().chain(self.kernel.as_ref().map(KernelDrops::descriptor))
    }

    /// Reads what waits, and returns the packets that were dropped. It runs `nft` for each new rule.
    pub(crate) fn drain(&mut self) -> Vec<DroppedPacket> {
        let mut found = Vec::new();
        for (Headers { key, to }, by) in self.rules.as_mut().map(DropTrace::drain).unwrap_or_default() {
            self.held.named(key);
            found.push(DroppedPacket { at_ns: wall_ns(), key, to, by: DroppedBy::Rule(by) });
        }
        let read = |at_ns, packet: &[u8], why| Some((at_ns, Headers::of_packet(packet)?, why));
        let by_kernel = self.kernel.as_mut().map(|kernel| kernel.drain(read)).unwrap_or_default();
        for (at_ns, Headers { key, to }, why) in by_kernel {
            match why {
                Why::Reason(reason) => {
                    found.push(DroppedPacket { at_ns, key, to, by: DroppedBy::Kernel(reason) });
                }
                Why::Filter => {
                    self.held.hold(Instant::now(), DroppedPacket { at_ns, key, to, by: DroppedBy::Filter });
                }
            }
        }
        found.extend(self.held.due(Instant::now()));
        found
    }
}

/// Packets that a filter dropped, which wait for what nftables says of them.
#[derive(Debug, Default)]
struct Held {
    waiting: VecDeque<(Instant, DroppedPacket)>,
    named: VecDeque<PacketKey>,
}

impl Held {
    /// nftables named the rule that dropped a packet.
    fn named(&mut self, key: PacketKey) {
        self.named.push_back(key);
        if self.named.len() > MOST {
            self.named.pop_front();
        }
    }

    fn hold(&mut self, now: Instant, packet: DroppedPacket) {
        if self.waiting.len() < MOST {
            self.waiting.push_back((now, packet));
        }
    }

    /// Returns those that have waited long enough, and of which nftables said nothing.
    fn due(&mut self, now: Instant) -> Vec<DroppedPacket> {
        let waited = self.waiting.partition_point(|(since, _)| now.duration_since(*since) >= WAITS);
        let named = &self.named;
        let due = self.waiting.drain(..waited).map(|(_, packet)| packet);
        due.filter(|packet| !named.contains(&packet.key)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nftables_word_counts_also_when_it_comes_later() {
        let start = Instant::now();
        let packet = |id| {
            let key = PacketKey::new([10, 0, 0, 1].into(), 17, id, &[0; 8]);
            DroppedPacket { at_ns: 0, key, to: ([10, 0, 0, 2].into(), 53), by: DroppedBy::Filter }
        };
        let mut held = Held::default();
        held.hold(start, packet(1));
        held.hold(start, packet(2));
        held.hold(start + WAITS, packet(3));
        assert!(held.due(start).is_empty());
        held.named(packet(1).key);
        let due = held.due(start + WAITS);
        assert_eq!(due.iter().map(|packet| packet.key.id).collect::<Vec<_>>(), [2]);
        assert_eq!(held.due(start + 2 * WAITS).len(), 1);
    }
}
