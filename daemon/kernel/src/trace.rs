//! Sends a marked packet and watches where it passes, for `ovlctl trace`.
//!
//! | module | content |
//! | --- | --- |
//! | [`packet`] | which captured packets belong to a trace |
//! | [`rules`] | which rule of a packet filter drops them |
//! | [`drops`] | which packets of a capture filters drop |
//! | [`kernel`] | which packets the kernel drops, and why |
//! | [`dropped`] | both together |
//! | [`probe`] | sends the probe in the namespace of a workload |
//! | [`inside`] | what listens in the namespace of a workload |
//!
//! Begin to read at [`TraceWatch::start`].

mod dropped;
mod drops;
mod inside;
mod kernel;
mod packet;
mod probe;
mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ipnet::{Ipv4Net, Ipv6Net};
use nix::libc;
use nix::sys::socket::{setsockopt, sockopt};
use ovl_dataplane::passage::{PacketKind, Passage, Sighting};
use socket2::{Domain, Socket, Type};
use tokio::sync::oneshot;

use super::error::{KernelError, Result};
use super::netns::{Netns, own_inode};
use super::received::{Received, receive};
use super::sys;

use self::kernel::{KernelDrops, Why};
use self::rules::RuleTrace;

pub(super) use self::dropped::DroppedPackets;
pub use self::dropped::{DroppedBy, DroppedPacket};
pub use self::inside::listens;
pub(super) use self::kernel::PROGRAM as DROPS_OBJECT;
pub use self::probe::TraceProbe;
pub(super) use self::rules::{change as change_tables, deletion as deletion_of};

/// How long a watch lasts at most.
const LONGEST: Duration = Duration::from_secs(5);
/// How often it is looked whether a watch is to end.
const STEP: Duration = Duration::from_millis(10);
/// The maximum number of sightings that are kept.
const MOST: usize = 256;
/// The number of bytes of a packet that are read: all headers, and the cookie.
const READ: usize = 256;

/// What to watch for.
#[derive(Debug)]
pub struct WatchSpec {
    /// The cookie of the probe, an even number.
    pub cookie: u32,
    /// The namespace of the workload that sends or receives the probe.
    pub netns: Option<Netns>,
    /// The UDP ports of VXLAN.
    pub vxlan_ports: Vec<u16>,
}

/// Watches for a probe in the network namespace of this host, and in that of a workload.
#[derive(Debug)]
pub struct TraceWatch {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Passage>>,
    /// Completes when an answer, a reset or an ICMP error has arrived.
    pub answered: oneshot::Receiver<()>,
}

impl TraceWatch {
    /// Starts to watch. When it returns, packets are seen and dropped ones are traced. It blocks.
    ///
    /// # Errors
    ///
    /// A packet socket cannot be opened.
    pub fn start(spec: WatchSpec) -> Result<Self> {
        let WatchSpec { cookie, netns, vxlan_ports } = spec;
        let rules = RuleTrace::begin(cookie, &vxlan_ports);
        Self::watch(cookie, netns, Some(rules))
    }

    /// As [`Self::start`], without tracing the rules that drop packets.
    ///
    /// # Errors
    ///
    /// A packet socket cannot be opened.
    pub fn start_without_rules(cookie: u32, netns: Option<Netns>) -> Result<Self> {
        Self::watch(cookie, netns, None)
    }

    fn watch(cookie: u32, netns: Option<Netns>, rules: Option<Result<RuleTrace>>) -> Result<Self> {
        let error = |error| KernelError::io("cannot watch for a probe", &error);
        let host = Capture::open(cookie, false).map_err(error)?;
        let spaces: BTreeSet<u64> =
            [own_inode()?].into_iter().chain(netns.as_ref().map(|netns| netns.inode)).collect();
        let inside = match netns {
            Some(netns) => Some(inside::enter(netns, move || Capture::open(cookie, true))?.map_err(error)?),
            None => None,
        };
        let mut notes = Vec::new();
        let rules = match rules {
            None => None,
            Some(Ok(rules)) => Some(rules),
            Some(Err(error)) => {
                notes.push(format!("rules of packet filters are not traced: {error}"));
                None
            }
        };
        // The watch that traces rules also asks for the kernel's reasons: there is one on each host.
        let reasons = match &rules {
            None => None,
            Some(_) => {
                match KernelDrops::begin(&[Ipv4Net::default().into(), Ipv6Net::default().into()], &spaces) {
                    Ok(reasons) => Some(reasons),
                    Err(error) => {
                        notes.push(format!("the kernel's reasons for drops are not known: {error}"));
                        None
                    }
                }
            }
        };
        let stop = Arc::new(AtomicBool::new(false));
        let (tell, answered) = oneshot::channel();
        let watch = Watch {
            ends: Instant::now() + LONGEST,
            stop: Arc::clone(&stop),
            cookie,
            captures: [Some(host), inside],
            rules,
            kernel: reasons,
            reasons: BTreeSet::new(),
            tell: Some(tell),
            passage: Passage { notes, ..Passage::default() },
        };
        let thread =
            std::thread::Builder::new().name("trace".to_owned()).spawn(move || watch.run()).map_err(error)?;
        Ok(Self { stop, thread: Some(thread), answered })
    }

    /// Ends the watch and returns what was seen. It blocks for some milliseconds.
    pub fn finish(mut self) -> Passage {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().and_then(|thread| thread.join().ok()).unwrap_or_default()
    }
}

impl Drop for TraceWatch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

struct Watch {
    ends: Instant,
    stop: Arc<AtomicBool>,
    cookie: u32,
    captures: [Option<Capture>; 2],
    rules: Option<RuleTrace>,
    kernel: Option<KernelDrops>,
    /// Why the kernel dropped the probe, or an answer to it.
    reasons: BTreeSet<String>,
    tell: Option<oneshot::Sender<()>>,
    passage: Passage,
}

impl Watch {
    fn run(mut self) -> Passage {
        loop {
            let is_last = self.stop.load(Ordering::Relaxed) || Instant::now() >= self.ends;
            let [host, inside] = self
                .captures
                .each_ref()
                .map(|capture| capture.as_ref().map(|capture| capture.socket.as_raw_fd()));
            let rules = self.rules.as_ref().map(RuleTrace::descriptor);
            let kernel = self.kernel.as_ref().map(KernelDrops::descriptor);
            if sys::poll([host, inside, rules, kernel], Some(STEP)).is_err() {
                break;
            }
            let now = now_us();
            for capture in self.captures.iter_mut().flatten() {
                capture.drain(now, &mut self.passage.sightings);
            }
            if let Some(rules) = &mut self.rules {
                rules.drain(now);
            }
            if let Some(kernel) = &mut self.kernel {
                let cookie = self.cookie;
                let reason = |_, packet: &[u8], why| {
                    let found = packet::parse(packet, cookie)?;
                    let what = if found.kind == PacketKind::Probe { "the probe" } else { "an answer to it" };
                    let why = match why {
                        Why::Filter => "a packet filter drops it (NETFILTER_DROP)".to_owned(),
                        Why::Reason(reason) => reason,
                    };
                    Some(format!("{what}: {why}"))
                };
                self.reasons.extend(kernel.drain(reason));
            }
            // An answer that a device sends is still on its way.
            let is_end = |seen: &Sighting| seen.kind != PacketKind::Probe && !seen.outgoing;
            if self.passage.sightings.iter().any(is_end)
                && let Some(tell) = self.tell.take()
            {
                let _ = tell.send(());
            }
            if is_last {
                break;
            }
        }
        self.passage.sightings.sort_by_key(|seen| seen.at_us);
        self.passage.reasons = self.reasons.into_iter().collect();
        self.passage.drops = self.rules.take().map(RuleTrace::finish).unwrap_or_default();
        self.passage
    }
}

/// Deletes what traces of a daemon that was killed have left. It blocks.
///
/// # Errors
///
/// `nft` fails.
pub fn remove_left_traces() -> Result<()> {
    rules::remove_left()
}

/// A packet socket that hears of all devices of a namespace.
#[derive(Debug)]
struct Capture {
    socket: Socket,
    cookie: u32,
    inside: bool,
    /// The names of the devices. Those that are created later are found by their index in the namespace of the host.
    names: BTreeMap<u32, String>,
    buffer: Vec<u8>,
}

impl Capture {
    /// Opens it in the network namespace of the calling thread.
    fn open(cookie: u32, inside: bool) -> io::Result<Self> {
        // Without a protocol it receives nothing until it has its filter.
        let socket = Socket::new(Domain::PACKET, Type::DGRAM, None)?;
        socket.attach_filter(&packet::filter(cookie))?;
        socket.set_nonblocking(true)?;
        setsockopt(&socket, sockopt::ReceiveTimestampns, &true)?;
        sys::bind_packet(socket.as_fd(), 0, libc::ETH_P_ALL as u16)?;
        let names = nix::net::if_::if_nameindex()?;
        let names = names.iter().map(|each| (each.index(), each.name().to_string_lossy().into_owned()));
        Ok(Self { socket, cookie, inside, names: names.collect(), buffer: vec![0; READ] })
    }

    /// Reads all waiting packets.
    fn drain(&mut self, at_us: u64, sightings: &mut Vec<Sighting>) {
        while let Ok(received) = receive(&self.socket, &mut self.buffer) {
            let Received { length, index, outgoing, at_ns, .. } = received;
            let bytes = self.buffer.get(..length).unwrap_or_default();
            let at_us = at_ns.map_or(at_us, |at_ns| at_ns / 1000);
            let Some(packet) = packet::parse(bytes, self.cookie) else { continue };
            if sightings.len() < MOST {
                sightings.push(Sighting {
                    at_us,
                    inside: self.inside,
                    device: self.names.get(&index).cloned().unwrap_or_else(|| format!("if{index}")),
                    outgoing,
                    source: packet.source,
                    destination: packet.destination,
                    kind: packet.kind,
                    outer: packet.outer,
                });
            }
        }
    }
}

/// Returns the time by the clock that stamps packets, in nanoseconds since 1970.
pub fn wall_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn now_us() -> u64 {
    wall_ns() / 1000
}
