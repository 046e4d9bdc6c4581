//! Which packets of a capture or a trace the kernel drops, and for which reasons, such as a port at which no program listens or an
//! address without a neighbour: a program of `daemon/bpf/drops.bpf.c` at the tracepoint `skb:kfree_skb` hands on their beginnings.
//!
//! It needs Linux 5.17, whose tracepoint has the reasons, and tracefs, which has their names.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::{AsRawFd as _, RawFd};

use aya::Ebpf;
use aya::maps::lpm_trie::Key;
use aya::maps::{HashMap, LpmTrie, MapData, RingBuf};
use aya::programs::{ProgramError, RawTracePoint};
use ipnet::IpNet;

use crate::sys;

use super::wall_ns;

/// Where tracefs is, on present and on older systems.
const PLACES: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

/// The program, compiled. `tests/bpf` compares it with its source.
pub(crate) static PROGRAM: &[u8] = aya::include_bytes_aligned!("../../../bpf/drops.bpf.o");
/// Where the parts of `struct dropped` are.
const REASON: usize = 8;
const PACKET: usize = 16;
/// The maximum number of packets that are read at once.
const AT_ONCE: usize = 1024;
/// Reasons that are no loss of the packet: there is none; another host's copy of a flooded frame; a copy for a packet socket that has
/// no room, or for a protocol that is not spoken.
const NO_LOSS: [&str; 6] =
    ["NOT_DROPPED_YET", "CONSUMED", "NOT_SPECIFIED", "OTHERHOST", "PACKET_SOCK_ERROR", "UNHANDLED_PROTO"];
/// The reason of what netfilter drops. nftables' tracing says it better.
const BY_FILTER: &str = "NETFILTER_DROP";

/// Why the kernel dropped a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Why {
    /// A packet filter, which nftables' tracing may know better.
    Filter,
    /// The kernel's name of the reason.
    Reason(String),
}

/// A program that hands on dropped packets. It ends when this is dropped, and with the process.
pub(super) struct KernelDrops {
    events: RingBuf<MapData>,
    names: BTreeMap<u32, String>,
    /// What is added to the kernel's time to get that since 1970, in nanoseconds.
    offset_ns: u64,
    /// The program and the other maps live as long as this.
    _program: Ebpf,
}

impl std::fmt::Debug for KernelDrops {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        to.debug_struct("KernelDrops").finish_non_exhaustive()
    }
}

impl KernelDrops {
    /// Hears of packets from or to prefixes that are dropped in network namespaces with these inodes. It blocks.
    ///
    /// # Errors
    ///
    /// What is missing for it, in words: tracefs, the reasons in the tracepoint, or the right to load a program.
    pub(super) fn begin(watched: &[IpNet], spaces: &BTreeSet<u64>) -> Result<Self, String> {
        let format = PLACES
            .iter()
            .find_map(|place| fs::read_to_string(format!("{place}/events/skb/kfree_skb/format")).ok())
            .ok_or("tracefs is not mounted at /sys/kernel/tracing")?;
        let names = names(&format);
        if names.is_empty() {
            return Err("the kernel is older than Linux 5.17".to_owned());
        }
        let loaded = load(watched, spaces);
        let (program, events) =
            loaded.map_err(|error| format!("a program at the tracepoint skb:kfree_skb: {error}"))?;
        let monotonic_ns = sys::monotonic_us().ok_or("there is no monotonic clock")?.saturating_mul(1_000);
        Ok(Self { events, names, offset_ns: wall_ns().saturating_sub(monotonic_ns), _program: program })
    }

    /// The descriptor that is readable when packets were dropped.
    pub(super) fn descriptor(&self) -> RawFd {
        self.events.as_raw_fd()
    }

    /// Reads the packets that were dropped, and returns what is made of each: `read` gets the time in nanoseconds since 1970, the
    /// beginning of the packet from its IP header on, and why it was dropped.
    pub(super) fn drain<T>(&mut self, mut read: impl FnMut(u64, &[u8], Why) -> Option<T>) -> Vec<T> {
        let mut all = Vec::new();
        for _ in 0..AT_ONCE {
            let Some(event) = self.events.next() else { break };
            let Some((at_ns, reason, packet)) = parts(&event) else { continue };
            let why = match self.names.get(&reason).map(String::as_str) {
                Some(name) if NO_LOSS.contains(&name) => continue,
                Some(BY_FILTER) => Why::Filter,
                Some(name) => Why::Reason(name.to_owned()),
                None => Why::Reason(format!("number {reason}")),
            };
            all.extend(read(at_ns.saturating_add(self.offset_ns), packet, why));
        }
        all
    }
}

/// Loads the program, fills its maps, and lets it begin.
fn load(watched: &[IpNet], spaces: &BTreeSet<u64>) -> Result<(Ebpf, RingBuf<MapData>), String> {
    let said = |error: &dyn std::error::Error| {
        let cause = error.source().map(|cause| format!(": {cause}"));
        format!("{error}{}", cause.unwrap_or_default())
    };
    let mut program = Ebpf::load(PROGRAM).map_err(|error| said(&error))?;
    let missing = || "the program lacks a part".to_owned();
    let mut map = HashMap::<_, u32, u8>::try_from(program.map_mut("spaces").ok_or_else(missing)?)
        .map_err(|error| said(&error))?;
    for space in spaces.iter().filter_map(|space| u32::try_from(*space).ok()) {
        map.insert(space, 1, 0).map_err(|error| said(&error))?;
    }
    let mut map = LpmTrie::<_, [u8; 16], u8>::try_from(program.map_mut("watched").ok_or_else(missing)?)
        .map_err(|error| said(&error))?;
    for net in watched {
        map.insert(&key(*net), 1, 0).map_err(|error| said(&error))?;
    }
    let events =
        RingBuf::try_from(program.take_map("events").ok_or_else(missing)?).map_err(|error| said(&error))?;
    let hook = program.program_mut("dropped_packet").ok_or_else(missing)?;
    let hook: &mut RawTracePoint = hook.try_into().map_err(|error: ProgramError| said(&error))?;
    hook.load().map_err(|error| said(&error))?;
    hook.attach("kfree_skb").map_err(|error| said(&error))?;
    Ok((program, events))
}

/// Returns the key of a prefix: IPv4 as `::ffff:0:0/96`.
fn key(net: IpNet) -> Key<[u8; 16]> {
    match net {
        IpNet::V4(net) => Key::new(96 + u32::from(net.prefix_len()), net.addr().to_ipv6_mapped().octets()),
        IpNet::V6(net) => Key::new(net.prefix_len().into(), net.addr().octets()),
    }
}

/// Returns the parts of `struct dropped`: the kernel's time, the reason and the beginning of the packet.
fn parts(event: &[u8]) -> Option<(u64, u32, &[u8])> {
    let at_ns = u64::from_ne_bytes(event.get(..REASON)?.try_into().ok()?);
    let reason = u32::from_ne_bytes(event.get(REASON..REASON + 4)?.try_into().ok()?);
    Some((at_ns, reason, event.get(PACKET..)?))
}

/// Reads the names of reasons from the format of the tracepoint: `__print_symbolic(REC->reason, { 2, "NOT_SPECIFIED" }, ...)`.
fn names(format: &str) -> BTreeMap<u32, String> {
    let Some((_, list)) = format.split_once("REC->reason, ") else { return BTreeMap::new() };
    let pairs = list.split('{').filter_map(|pair| pair.split_once(", \""));
    pairs
        .filter_map(|(number, name)| Some((number.trim().parse().ok()?, name.split_once('"')?.0.to_owned())))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_from_the_format_of_the_tracepoint() {
        let format = r#"print fmt: "reason: %s", __print_symbolic(REC->reason, { 2, "NOT_SPECIFIED" }, { 3, "NO_SOCKET" })"#;
        let found = names(format);
        assert_eq!(found.get(&3).map(String::as_str), Some("NO_SOCKET"));
        assert_eq!(found.len(), 2);
        // Before Linux 5.17 the tracepoint had no reasons.
        assert!(names(r#"print fmt: "skbaddr=%p protocol=%u", REC->skbaddr, REC->protocol"#).is_empty());
    }

    #[test]
    fn parts_of_an_event_are_where_the_program_writes_them() {
        let event =
            [7u64.to_ne_bytes().as_slice(), &3u32.to_ne_bytes(), &9u32.to_ne_bytes(), &[0x45, 0]].concat();
        assert_eq!(parts(&event), Some((7, 3, [0x45, 0].as_slice())));
        assert_eq!(parts(&event[..15]), None);
        assert_eq!(parts(&event[..4]), None);
    }
}
