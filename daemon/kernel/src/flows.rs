//! Who talks to whom: connection tracking, and what bridges pass on without it.
//!
//! Nothing is counted until somebody looks. Then the kernel tells of connections that begin and end, and tables of their own
//! count bytes, and the frames of switched networks, of which connection tracking does not know. Both are read once a second and
//! summed up by who talks to whom at which port, so that what is handed on does not grow with the number of connections. Begin to read
//! at [`FlowWatch::start`].

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use ipnet::IpNet;
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use tokio::sync::mpsc;

use super::attribute::{attributes, messages};
use super::conntrack::{self, Tuple};
use super::error::{KernelError, Result};
use super::nftables::{FIXED, Nftables};
use super::socket::{Batch, Netlink};
use super::trace::{change_tables, deletion_of};

/// How often what was seen is handed on.
const EVERY: Duration = Duration::from_secs(1);
/// How often it is looked whether a watch is to end.
const STEP: Duration = Duration::from_millis(100);
/// The room for messages of the kernel that wait for that long, in bytes.
const ROOM: usize = 16 << 20;
/// The maximum number of different flows in a second.
const MOST: usize = 4096;
/// The prefix of the names of tables that count frames. Those that a killed daemon leaves are deleted with those of traces.
const TABLE: &str = "ovl-trace-flows-";
/// Ports from here on are those of clients: Linux chooses them from 32768 to 60999.
const CLIENTS: u16 = 32_768;

/// The number of the next table of this process.
static NEXT: AtomicU32 = AtomicU32::new(1);

/// Who talks to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowKey {
    /// The source.
    pub from: IpAddr,
    /// The destination that the source knows.
    pub to: IpAddr,
    /// The port of the destination; 0 for a protocol without ports.
    pub port: u16,
    /// The IP protocol.
    pub protocol: u8,
    /// The destination and port after the translation for a Service or a published port.
    pub target: (IpAddr, u16),
}

/// What was counted of a flow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FlowCounts {
    /// The number of connections that began; of a dump: that there are.
    pub opened: u64,
    /// The number of connections that ended.
    pub closed: u64,
    /// Bytes from the source and back. `None`: the kernel did not count them.
    pub bytes: Option<[u64; 2]>,
}

impl FlowCounts {
    fn add(&mut self, other: Self) {
        self.opened += other.opened;
        self.closed += other.closed;
        self.bytes = match (self.bytes, other.bytes) {
            (Some([a, b]), Some([c, d])) => Some([a + c, b + d]),
            (some, None) | (None, some) => some,
        };
    }
}

/// Flows, of which each is listed once.
pub type SeenFlows = BTreeMap<FlowKey, FlowCounts>;

/// What was seen in a second.
#[derive(Debug, Default)]
pub struct FlowTick {
    /// The flows.
    pub flows: SeenFlows,
    /// Whether there were more than could be told.
    pub incomplete: bool,
}

/// Watches flows. It ends when this is dropped.
#[derive(Debug)]
pub struct FlowWatch(Arc<AtomicBool>);

impl FlowWatch {
    /// Starts to watch flows from or to prefixes. If the receiver does not keep up, seconds are passed over. It blocks.
    ///
    /// # Errors
    ///
    /// There is no socket, or no thread.
    pub fn start(networks: Vec<IpNet>, ticks: mpsc::Sender<FlowTick>) -> Result<Self> {
        let socket = events()?;
        let frames = Frames::begin()?;
        let stop = Arc::new(AtomicBool::new(false));
        let watch = Watch {
            stop: Arc::clone(&stop),
            networks,
            socket,
            frames,
            ticks,
            tick: FlowTick::default(),
            tracked: BTreeMap::new(),
        };
        std::thread::Builder::new()
            .name("flows".to_owned())
            .spawn(move || watch.run())
            .map_err(|error| KernelError::io("cannot start a thread that watches flows", &error))?;
        Ok(Self(stop))
    }
}

impl Drop for FlowWatch {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Returns the connections that the kernel tracks from or to prefixes. It blocks.
///
/// # Errors
///
/// The kernel refuses to list them.
pub fn flows_now(networks: &[IpNet]) -> Result<SeenFlows> {
    let mut netlink = Netlink::open(NETLINK_NETFILTER)?;
    let mut flows = SeenFlows::new();
    for family in [libc::AF_INET, libc::AF_INET6] {
        let mut batch = Batch::default();
        batch.push_built(conntrack::GET, 0, &[family as u8, 0, 0, 0]);
        let dump =
            netlink.dump(batch)?.map_err(|refusal| refusal.into_error("cannot dump connection tracking"))?;
        for message in dump.messages().filter(|message| message.kind >> 8 == conntrack::SUBSYSTEM) {
            let Some((key, bytes)) = entry(message.payload).filter(|(key, _)| is_about(key, networks)) else {
                continue;
            };
            add(&mut flows, key, FlowCounts { opened: 1, closed: 0, bytes });
        }
    }
    Ok(flows)
}

/// Adds to a flow. Returns false if there are too many.
fn add(flows: &mut SeenFlows, key: FlowKey, counts: FlowCounts) -> bool {
    let is_free = flows.len() < MOST || flows.contains_key(&key);
    if is_free {
        flows.entry(key).or_default().add(counts);
    }
    is_free
}

fn is_about(key: &FlowKey, networks: &[IpNet]) -> bool {
    let has = |address: &IpAddr| networks.iter().any(|net| net.contains(address));
    has(&key.from) || has(&key.to) || has(&key.target.0)
}

/// Reads an entry of connection tracking: the flow and its bytes.
fn entry(payload: &[u8]) -> Option<(FlowKey, Option<[u64; 2]>)> {
    /// `CTA_COUNTERS_ORIG`, `CTA_COUNTERS_REPLY` and in them `CTA_COUNTERS_BYTES`.
    const COUNTERS: [u16; 2] = [9, 10];
    const BYTES: u16 = 2;
    let (mut original, mut reply, mut bytes) = (None, None, [None; 2]);
    for (kind, value) in attributes(payload, FIXED) {
        match kind {
            conntrack::TUPLE_ORIGINAL => original = Tuple::of(value),
            conntrack::TUPLE_REPLY => reply = Tuple::of(value),
            kind => {
                if let Some(place) = COUNTERS.iter().position(|counters| *counters == kind)
                    && let Some(slot) = bytes.get_mut(place)
                {
                    let found = attributes(value, 0).find(|(kind, _)| *kind == BYTES);
                    *slot = found.and_then(|(_, value)| value.try_into().ok()).map(u64::from_be_bytes);
                }
            }
        }
    }
    let (original, reply) = (original?, reply?);
    let key = FlowKey {
        from: original.source.0,
        to: original.destination.0,
        port: original.destination.1,
        protocol: original.protocol,
        target: reply.source,
    };
    let [sent, back] = bytes;
    Some((key, sent.zip(back).map(|(sent, back)| [sent, back])))
}

/// Opens a socket that hears of connections that begin and end.
fn events() -> Result<Socket> {
    /// `NFNLGRP_CONNTRACK_NEW` and `NFNLGRP_CONNTRACK_DESTROY`.
    const GROUPS: [u32; 2] = [1, 3];
    let open = || -> io::Result<Socket> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        // The limit of the host is passed over: messages of a second wait here.
        setsockopt(&socket, sockopt::RcvBufForce, &ROOM)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        for group in GROUPS {
            socket.add_membership(group)?;
        }
        Ok(socket)
    };
    open().map_err(|error| KernelError::io("cannot hear of connections", &error))
}

/// Source, destination, protocol and port.
type Ends = (IpAddr, IpAddr, u8, u16);

/// A flow that connection tracking knows: its frames on bridges are not counted again.
#[derive(Debug, Clone, Copy)]
struct Tracked {
    /// The ticks since it was seen.
    age: u32,
    target: (IpAddr, u16),
}

impl FlowKey {
    fn ends(&self) -> Ends {
        (self.from, self.to, self.protocol, self.port)
    }
}

struct Watch {
    stop: Arc<AtomicBool>,
    networks: Vec<IpNet>,
    socket: Socket,
    frames: Frames,
    ticks: mpsc::Sender<FlowTick>,
    tick: FlowTick,
    tracked: BTreeMap<Ends, Tracked>,
}

impl Watch {
    fn run(mut self) {
        loop {
            for _ in 0..EVERY.as_millis() / STEP.as_millis() {
                if self.stop.load(Ordering::Relaxed) {
                    return;
                }
                std::thread::sleep(STEP);
            }
            self.drain();
            self.count_frames();
            match self.ticks.try_send(std::mem::take(&mut self.tick)) {
                Ok(()) => {}
                // What the receiver has no time for is told with the next second.
                Err(mpsc::error::TrySendError::Full(tick)) => {
                    self.tick = FlowTick { incomplete: true, ..tick };
                }
                Err(mpsc::error::TrySendError::Closed(_)) => return,
            }
        }
    }

    fn drain(&mut self) {
        let mut buffer = Vec::with_capacity(64 * 1024);
        loop {
            buffer.clear();
            match self.socket.recv(&mut buffer, libc::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    self.tick.incomplete = true;
                    continue;
                }
                Err(_) => break,
            }
            for message in messages(&buffer) {
                let Some((key, _)) = entry(message.payload) else { continue };
                if !is_about(&key, &self.networks) {
                    continue;
                }
                // Bytes are those of the tables: the kernel tells those of a connection minutes after it was closed.
                let is_end = message.kind == conntrack::DELETE;
                let counts =
                    FlowCounts { opened: u64::from(!is_end), closed: u64::from(is_end), bytes: None };
                if !add(&mut self.tick.flows, key, counts) {
                    self.tick.incomplete = true;
                }
                self.track(key.ends(), key.target);
            }
        }
    }

    fn track(&mut self, ends: Ends, target: (IpAddr, u16)) {
        if self.tracked.len() < MOST || self.tracked.contains_key(&ends) {
            self.tracked.insert(ends, Tracked { age: 0, target });
        }
    }

    fn count_frames(&mut self) {
        /// How long it is remembered that connection tracking knows a flow, in ticks.
        const REMEMBERED: u32 = 120;
        self.tracked.retain(|_, tracked| {
            tracked.age += 1;
            tracked.age < REMEMBERED
        });
        let (Ok(routed), Ok(bridged)) = (self.frames.counts("inet"), self.frames.counts("bridge")) else {
            self.tick.incomplete = true;
            return;
        };
        for (mut key, counts) in routed {
            let known = self.tracked.get(&key.ends()).map(|tracked| tracked.target);
            key.target = known.unwrap_or(key.target);
            self.track(key.ends(), key.target);
            self.count(key, counts);
        }
        for (key, counts) in bridged {
            if !self.tracked.contains_key(&key.ends()) {
                self.count(key, counts);
            }
        }
    }

    fn count(&mut self, key: FlowKey, counts: FlowCounts) {
        if is_about(&key, &self.networks) && !add(&mut self.tick.flows, key, counts) {
            self.tick.incomplete = true;
        }
    }
}

/// Where packets are counted: the family of the table, the set, and the key of the element.
type Place = (&'static str, &'static str, Box<[u8]>);

/// The tables that count packets, and what they had when they were last read.
#[derive(Debug)]
struct Frames {
    table: String,
    nftables: Nftables,
    last: BTreeMap<Place, (u64, u64)>,
}

/// The sets of a table: connections that begin, bytes to a port, bytes back from it. The first are only in that of bridges.
const SETS: [&str; 6] = ["opened4", "sent4", "back4", "opened6", "sent6", "back6"];

impl Frames {
    fn begin() -> Result<Self> {
        let table = format!("{TABLE}{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let frames = Self { nftables: Nftables::open()?, last: BTreeMap::new(), table };
        change_tables(&rules(&frames.table))?;
        Ok(frames)
    }

    /// Returns what was counted in the table of a family since the last call.
    fn counts(&mut self, family: &'static str) -> Result<SeenFlows> {
        let mut flows = SeenFlows::new();
        let mut now = BTreeMap::new();
        let is_bridge = family == "bridge";
        for set in SETS.into_iter().filter(|set| is_bridge || !set.starts_with("opened")) {
            for element in self.nftables.counts_of(is_bridge, &self.table, set)? {
                let counted = (element.packets, element.bytes);
                let place = (family, set, element.key);
                let before = self.last.get(&place).copied().unwrap_or_default();
                // An element that has ended and begun again counts from 0.
                let before = if before.0 > counted.0 { (0, 0) } else { before };
                let (packets, bytes) = (counted.0 - before.0, counted.1.saturating_sub(before.1));
                if packets > 0
                    && let Some(key) = key(set, is_bridge, &place.2)
                {
                    let counts = match set.trim_end_matches(['4', '6']) {
                        "opened" => FlowCounts { opened: packets, ..FlowCounts::default() },
                        "sent" => FlowCounts { bytes: Some([bytes, 0]), ..FlowCounts::default() },
                        _ => FlowCounts { bytes: Some([0, bytes]), ..FlowCounts::default() },
                    };
                    add(&mut flows, key, counts);
                }
                now.insert(place, counted);
            }
        }
        self.last.retain(|(of, ..), _| *of != family);
        self.last.extend(now);
        Ok(flows)
    }
}

impl Drop for Frames {
    fn drop(&mut self) {
        if let Err(error) = change_tables(&deletion_of(&self.table)) {
            tracing::warn!(%error, table = self.table, "cannot delete the table that counts frames");
        }
    }
}

/// Reads the key of an element: addresses, protocol and port, each padded to four bytes. Those of bridges are the packet's
/// own, and otherwise those of the connection.
fn key(set: &str, is_bridge: bool, bytes: &[u8]) -> Option<FlowKey> {
    let length = if set.ends_with('4') { 4 } else { 16 };
    let (from, rest) = bytes.split_at_checked(length)?;
    let (to, rest) = rest.split_at_checked(length)?;
    let address = |bytes: &[u8]| match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(IpAddr::from),
        _ => <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from),
    };
    let &[protocol, _, _, _, high, low, ..] = rest else { return None };
    let port = u16::from_be_bytes([high, low]);
    let (from, to) = (address(from)?, address(to)?);
    let (from, to) = if is_bridge && set.starts_with("back") { (to, from) } else { (from, to) };
    Some(FlowKey { from, to, port, protocol, target: (to, port) })
}

/// Returns the tables that count: the frames of workloads, at the bridges that they come in by, and what the host forwards.
fn rules(table: &str) -> String {
    let mut text = String::new();
    for family in ["bridge", "inet"] {
        let is_bridge = family == "bridge";
        let _ = writeln!(text, "table {family} {table} {{");
        for set in SETS.into_iter().filter(|set| is_bridge || !set.starts_with("opened")) {
            let address = if set.ends_with('4') { "ipv4_addr" } else { "ipv6_addr" };
            let _ = writeln!(
                text,
                "\tset {set} {{ type {address} . {address} . inet_proto . inet_service; size {MOST}; flags dynamic,timeout; \
                 timeout 1m; counter; }}"
            );
        }
        let hook = if is_bridge { "prerouting" } else { "forward" };
        let _ =
            writeln!(text, "\tchain {hook} {{\n\t\ttype filter hook {hook} priority -190; policy accept;");
        for (n, ip, protocol) in [("4", "ip", "ipv4"), ("6", "ip6", "ipv6")] {
            if is_bridge {
                let only = format!("ether type {ip} meta l4proto {{ tcp, udp, sctp }}");
                let ends = format!("{ip} saddr . {ip} daddr . meta l4proto");
                let _ = writeln!(
                    text,
                    "\t\tether type {ip} tcp flags & (syn | ack) == syn update @opened{n} {{ {ends} . th dport }}\n\
                     \t\t{only} th dport < {CLIENTS} update @sent{n} {{ {ends} . th dport }}\n\
                     \t\t{only} th dport >= {CLIENTS} th sport < {CLIENTS} update @back{n} {{ {ends} . th sport }}"
                );
            } else {
                let only = format!("meta nfproto {protocol} meta l4proto {{ tcp, udp, sctp }}");
                let ends = format!(
                    "ct original {ip} saddr . ct original {ip} daddr . meta l4proto . ct original proto-dst"
                );
                let _ = writeln!(
                    text,
                    "\t\t{only} ct direction original update @sent{n} {{ {ends} }}\n\
                     \t\t{only} ct direction reply update @back{n} {{ {ends} }}"
                );
            }
        }
        text += "\t}\n}\n";
    }
    text
}

/// Runs bytes through the parsers of this module.
#[cfg(any(test, fuzzing))]
pub(super) fn fuzz(bytes: &[u8]) {
    let _ = entry(bytes);
    let _ = SETS.map(|set| key(set, true, bytes));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_elements_are_read_in_both_directions() {
        let bytes = [10, 1, 0, 1, 10, 1, 0, 2, 6, 0, 0, 0, 0, 80, 0, 0];
        let [a, b]: [IpAddr; 2] = [[10, 1, 0, 1].into(), [10, 1, 0, 2].into()];
        let sent = key("sent4", true, &bytes).unwrap();
        assert_eq!((sent.from, sent.to, sent.port, sent.protocol), (a, b, 80, 6));
        let back = key("back4", true, &bytes).unwrap();
        assert_eq!((back.from, back.to, back.target), (b, a, (a, 80)));
        // Of a connection, the ends are those of its beginning.
        assert_eq!(key("back4", false, &bytes), Some(sent));
        assert!(key("sent6", true, &bytes).is_none() && key("sent4", true, &bytes[..12]).is_none());
    }

    #[test]
    fn flows_are_summed_up_and_bounded() {
        let key = |port| FlowKey {
            from: [10, 1, 0, 1].into(),
            to: [10, 1, 0, 2].into(),
            port,
            protocol: 6,
            target: ([10, 1, 0, 2].into(), port),
        };
        let mut flows = SeenFlows::new();
        let once = FlowCounts { opened: 1, closed: 0, bytes: Some([3, 4]) };
        for _ in 0..2 {
            assert!(add(&mut flows, key(80), once));
        }
        assert_eq!(flows[&key(80)], FlowCounts { opened: 2, closed: 0, bytes: Some([6, 8]) });
        for port in 1000..1000 + MOST as u16 - 1 {
            assert!(add(&mut flows, key(port), once));
        }
        assert!(!add(&mut flows, key(9), once) && add(&mut flows, key(80), once));
        assert!(is_about(&key(80), &["10.1.0.2/32".parse().unwrap()]));
        assert!(!is_about(&key(80), &["10.2.0.0/16".parse().unwrap()]));
    }
}
