//! Probes of the paths that packets of workloads take between hosts.
//!
//! Each host sends small and large frames through its VXLAN device to the VXLAN device of each watched host, which
//! does the same, or echo requests by the direct route to it ([`Carrier`]). So each host knows what arrives, and each frame says it to the other side ([`frame::Report`]): both know
//! both directions. A direction is broken if nothing arrives for [`Pace::broken`] while the sender is known to be alive and
//! to be sending. Before that, missing probes are asked for faster, so that a path that loses some packets is not
//! taken for one that carries none.
//!
//! [`Paths`] owns what was sent and heard. It has no clock and no socket; times are since the start of the daemon. Begin to
//! read at [`Paths::tick`] and [`Paths::take`].

mod choice;
mod faults;
pub(crate) mod frame;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod search;

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;
use ovl_proto::id::NodeId;
use ovl_udp::trial::{Offload, Trial};

use self::choice::{Watched, choose};
pub(crate) use self::faults::PathFaults;
use self::frame::{Arrived, Frame, Report, Size, Verdict};
use self::search::{Search, Step};

/// Interval in which [`Paths::tick`] is to be called.
pub(crate) const TICK: Duration = Duration::from_millis(200);
/// The longest time between two calls of [`Paths::tick`] that counts as silence of others.
const MAX_BETWEEN: Duration = Duration::from_millis(600);
/// Time for which what the other side said last is used.
const REPORT_VALID: Duration = Duration::from_secs(4);
/// Time for which a host is watched because it sends probes to this one.
const ASKED: Duration = Duration::from_secs(10);
/// The maximum number of hosts that are watched because they send probes to this one.
const MAX_ASKED: usize = 32;
/// The number of probes over which loss is measured.
const WINDOW: u32 = 32;
/// The number of sent probes whose round trip can be measured.
const REMEMBERED: usize = 16;
/// Time after a search for the longest packets that pass until the next one.
const SEARCH_AGAIN: Duration = Duration::from_secs(60);
/// Time in which the other host begins to send, after this one does.
const GRACE: Duration = Duration::from_secs(3);
/// The number of answers to probes of an offload that one probe brings at most.
const MOST_ANSWERS: u32 = 16;
/// The arrivals after which a broken direction works again.
const BACK: u8 = 2;

/// How often probes of one size are sent, and when a missing one counts.
#[derive(Debug, Clone, Copy)]
struct Pace {
    /// The interval while they arrive.
    calm: Duration,
    /// The interval while the other side misses them.
    hurry: Duration,
    /// Time without an arrival after which the direction is in doubt.
    doubt: Duration,
    /// Time without an arrival after which the direction is broken.
    broken: Duration,
}

/// How packets of workloads are carried on the paths.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Carrier {
    /// In VXLAN.
    Vxlan,
    /// As they are, by a route to the other host.
    Direct,
}

impl Carrier {
    /// The size of the small probes.
    const fn small(self) -> Size {
        match self {
            Self::Vxlan => Size::Small,
            Self::Direct => Size::Direct,
        }
    }

    /// Whether there are large probes. Direct routes carry packets of workloads as those of the host itself.
    const fn has_large(self) -> bool {
        matches!(self, Self::Vxlan)
    }
}

impl Pace {
    const fn of(size: Size) -> Self {
        let ms = Duration::from_millis;
        match size {
            // The other host's kernel answers each of them, which costs as much as the probe.
            Size::Direct => Self { calm: ms(2000), hurry: ms(200), doubt: ms(2400), broken: ms(4000) },
            Size::Small => Self { calm: ms(1000), hurry: ms(200), doubt: ms(1300), broken: ms(3600) },
            Size::Large | Size::Trial | Size::Partial | Size::Complete => {
                Self { calm: ms(5000), hurry: ms(500), doubt: ms(6000), broken: ms(9000) }
            }
        }
    }
}

/// The state of all watched paths.
#[derive(Debug)]
pub(crate) struct Paths {
    me: NodeId,
    carrier: Carrier,
    paths: BTreeMap<NodeId, Path>,
    /// Hosts that can be probed.
    candidates: BTreeMap<NodeId, Candidate>,
    /// Those of them that are watched by choice.
    watched: Watched,
}

/// A host that can be probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// Its run, as its record says.
    pub run: u64,
    /// The length of the longest packet of a workload to it, in bytes.
    pub mtu: u16,
    /// Whether it answers probes of the offload of checksums, and this host uses the offload.
    pub tries_offload: bool,
}

/// What is to be done now.
#[derive(Debug, Default)]
pub(crate) struct Due {
    /// Probes to send, each with its length as an IP packet, in bytes; 0: as short as it can be.
    pub probes: Vec<(Frame, u16)>,
    /// Hosts to which only packets up to this length pass, in bytes.
    pub limits: Vec<(NodeId, u16)>,
}

/// What is known of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct PathState {
    /// What arrives here.
    pub received: Direction,
    /// What arrives there, as the other side says.
    pub sent: Direction,
    /// The smoothed round-trip time. `None` before the first.
    pub round_trip: Option<Duration>,
    /// Whether packets arrive there whose checksums are left to the offload.
    pub offload: Offload,
    /// Whether the other host is known to send probes without being asked.
    pub is_mutual: bool,
}

/// The directions in which nothing arrives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failing {
    Both,
    Outbound,
    Inbound,
    /// In one of them at least. The other host sends only when it is asked.
    Unanswered,
}

impl PathState {
    /// Returns the directions in which no small probe arrives. `None` if some arrive both ways.
    fn failing(&self) -> Option<Failing> {
        match (self.received.small, self.sent.small) {
            (Verdict::Broken, Verdict::Broken) => Some(Failing::Both),
            (_, Verdict::Broken) => Some(Failing::Outbound),
            (Verdict::Broken, _) if self.is_mutual => Some(Failing::Inbound),
            (Verdict::Broken, _) => Some(Failing::Unanswered),
            _ => None,
        }
    }

    /// Whether small probes are missing in some direction, and it is not yet judged.
    pub(crate) fn is_in_doubt(&self) -> bool {
        [self.received.small, self.sent.small].contains(&Verdict::Doubtful)
    }

    /// Whether no probe of some size arrives in some direction.
    pub(crate) fn is_broken(&self) -> bool {
        let Self { received, sent, .. } = self;
        [received.small, received.large, sent.small, sent.large].contains(&Verdict::Broken)
    }
}

/// The ends of a path, as users know them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ends<'a> {
    /// The name of the other host.
    pub name: &'a str,
    /// The VTEP and the VXLAN port of this host.
    pub here: SocketAddr,
    /// The VTEP and the VXLAN port of the other host.
    pub there: SocketAddr,
    /// The length of large probes, as IP packets of workloads, in bytes.
    pub mtu: u16,
}

impl Ends<'_> {
    /// Returns the sentence that says in which direction no VXLAN packet passes, and what to do. `None` if some pass both
    /// ways.
    pub(crate) fn broken(&self, path: &PathState) -> Option<String> {
        let Self { name, here, there, .. } = self;
        let allow = |from: SocketAddr, to: SocketAddr| {
            format!("UDP port {} from {} to {}", to.port(), from.ip(), to.ip())
        };
        let (inbound, outbound) = (allow(*there, *here), allow(*here, *there));
        let (what, open) = match path.failing()? {
            Failing::Both => (
                format!("no VXLAN packet passes between this host and host {name}, in neither direction"),
                format!("{inbound}, and {outbound}"),
            ),
            Failing::Outbound => {
                (format!("no VXLAN packet from this host arrives at host {name}, as it says"), outbound)
            }
            Failing::Inbound => (format!("no VXLAN packet from host {name} arrives at this host"), inbound),
            Failing::Unanswered => (
                format!("host {name} answers no probe in VXLAN: packets are lost on the way there or back"),
                format!("{outbound}, and {inbound}"),
            ),
        };
        Some(format!(
            "{what}, and host {name} is alive: allow {open} in the firewalls and security groups of the two hosts and \
             between them"
        ))
    }

    /// Returns the sentence that says in which direction only small packets pass, and what to do. `None` if large ones pass
    /// both ways, or none does.
    pub(crate) fn narrow(&self, path: &PathState) -> Option<String> {
        let Self { name, mtu, .. } = self;
        let is_narrow =
            |direction: Direction| direction.large == Verdict::Broken && direction.small != Verdict::Broken;
        let direction = match (is_narrow(path.received), is_narrow(path.sent)) {
            (true, true) => format!("between this host and host {name}, in both directions"),
            (true, false) => format!("from host {name} to this host"),
            (false, true) => format!("from this host to host {name}"),
            (false, false) => return None,
        };
        Some(format!(
            "packets of {mtu} bytes are lost in VXLAN {direction}, and small ones pass: a device on the path carries less \
             than its links say, or damages large packets. Set the MTU of the hosts' links to what the path carries, or \
             that of the networks with 'ovlctl network update --mtu'. ovld looks for the length that passes, and uses it"
        ))
    }
}

/// The ends of a directly routed path, as users know them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DirectEnds<'a> {
    /// The name of the other host.
    pub name: &'a str,
    /// The name of the network whose packets take the path.
    pub network: &'a str,
    /// The subnet of the network.
    pub subnet: IpNet,
    /// The underlay address of this host.
    pub here: IpAddr,
    /// The underlay address of the other host.
    pub there: IpAddr,
}

impl DirectEnds<'_> {
    /// Returns the sentence that says in which direction no packet passes, and what to do. `None` if some pass both ways.
    pub(crate) fn broken(&self, path: &PathState) -> Option<String> {
        let Self { name, network, subnet, here, there } = self;
        let allow = |from: &IpAddr, to: &IpAddr| {
            format!("packets with source and destination addresses in {subnet} from {from} to {to}")
        };
        let (inbound, outbound) = (allow(there, here), allow(here, there));
        let (what, open) = match path.failing()? {
            Failing::Both => (
                format!(
                    "no packet of network {network} passes between this host and host {name}, in neither direction"
                ),
                format!("{inbound}, and {outbound}"),
            ),
            Failing::Outbound => (
                format!("no packet of network {network} from this host arrives at host {name}, as it says"),
                outbound,
            ),
            Failing::Inbound => {
                (format!("no packet of network {network} from host {name} arrives at this host"), inbound)
            }
            Failing::Unanswered => (
                format!(
                    "host {name} answers no probe on network {network}: packets are lost on the way there or back"
                ),
                format!("{outbound}, and {inbound}"),
            ),
        };
        Some(format!(
            "{what}, and host {name} is alive. The network is routed without VXLAN: allow {open} (a cloud's \
             source/destination check, a security group, or a firewall of the two hosts or between them drops them), or \
             create the network with '--backend vxlan'"
        ))
    }
}

/// Returns the sentence that says that networks use a smaller MTU, because longer packets do not pass to a host.
pub(crate) fn limited(name: &str, limit: u16) -> String {
    format!(
        "packets of more than {limit} bytes were lost in VXLAN from this host to host {name}, so the networks of both use no \
         longer ones: a device on the path carries less than its links say, or damages large packets. Set the MTU of the \
         hosts' links to what the path carries, or repair the path; then restart ovld on this host"
    )
}

/// Returns the sentence that says that packets to a host are lost if their checksums are left to the offload.
pub(crate) fn unfinished(name: &str) -> String {
    format!(
        "TCP and UDP packets in VXLAN from this host to host {name} are lost if the kernel or a network card is left to compute \
         their checksums, and others arrive: the driver, or address translation of VXLAN packets, leaves wrong checksums. ovld \
         computes them before VXLAN now, as 'ethtool -K DEVICE tx off' does on the VXLAN devices, which works and is slower. \
         Update the kernel or the driver of this host's link, then restart ovld on this host"
    )
}

/// What is known of one direction of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Direction {
    /// The judgement of small probes.
    pub small: Verdict,
    /// The judgement of large probes.
    pub large: Verdict,
    /// The percentage of recent small probes that did not arrive. `None` if it is not known.
    pub loss_percent: Option<u8>,
}

impl Paths {
    /// Creates the state of a host that watches no path.
    pub(crate) fn new(me: NodeId, carrier: Carrier) -> Self {
        let (paths, candidates) = (BTreeMap::new(), BTreeMap::new());
        Self { me, carrier, paths, candidates, watched: Watched::default() }
    }

    /// Takes the hosts that can be probed now, and chooses those that are watched. A host that was started again is judged
    /// anew: it has to find its paths first.
    pub(crate) fn follow(&mut self, candidates: BTreeMap<NodeId, Candidate>, now: Duration) {
        let broken = self.paths.iter().filter(|(_, path)| path.is_broken(now)).map(|(id, _)| *id);
        self.watched = choose(self.me, &candidates.keys().copied().collect(), broken.collect(), now);
        self.candidates = candidates;
        let (watched, candidates) = (&self.watched, &self.candidates);
        self.paths.retain(|id, path| {
            let is_same = candidates.get(id).is_some_and(|found| found.run == path.announced_run);
            is_same && (watched.contains(*id) || path.is_asked(now))
        });
        for id in self.watched.all().collect::<Vec<_>>() {
            self.watch(id, now);
        }
    }

    /// Returns the state of a path, which is watched from now on if it was not. `None` if the host cannot be probed.
    fn watch(&mut self, id: NodeId, now: Duration) -> Option<&mut Path> {
        let run = self.candidates.get(&id)?.run;
        Some(self.paths.entry(id).or_insert_with(|| Path::new(self.carrier, self.me, id, run, now)))
    }

    /// Returns the probes that are due, and what was found. `vouches` says whether a host is known, by other means, to run at
    /// this moment, so that missing probes were lost on the path. `run` is the run of this host.
    pub(crate) fn tick(&mut self, now: Duration, run: u64, vouches: impl Fn(NodeId) -> bool) -> Due {
        let mut due = Due::default();
        for (id, path) in &mut self.paths {
            let Some(Candidate { mtu, tries_offload, .. }) = self.candidates.get(id).copied() else {
                continue;
            };
            path.judge(now, vouches(*id));
            let [small, large] = path.next_numbers(now).map(Option::into_iter);
            let size = self.carrier.small();
            let mut numbers: Vec<(Size, u64, u16)> = small.map(|number| (size, number, 0)).collect();
            numbers.extend(large.map(|number| (Size::Large, number, mtu)));
            match path.search(now, mtu) {
                Step::Wait => {}
                Step::Try(length) => numbers.push((Size::Trial, path.trials, length)),
                Step::Found(limit) => due.limits.extend(limit.map(|limit| (*id, limit))),
            }
            let tries_offload = tries_offload && self.carrier == Carrier::Vxlan;
            if tries_offload && let Some(round) = path.offload.next(now) {
                numbers.push((Size::Partial, round.number.into(), 0));
                numbers.extend(round.has_control.then_some((Size::Complete, round.number.into(), 0)));
            }
            let arrived = path.offload_probes.arrived;
            let (small, large) = (path.small.arrivals.report(now), path.large.arrivals.report(now));
            let (from, to, heard_run, heard_trial) = (self.me, *id, path.run, path.heard_trial);
            let frame = |size, number| Frame {
                from,
                to,
                size,
                run,
                number,
                heard_run,
                heard_trial,
                small,
                large,
                arrived,
            };
            due.probes.extend(numbers.into_iter().map(|(size, number, mtu)| (frame(size, number), mtu)));
        }
        due
    }

    /// Takes a probe that was received and authenticated. `run` is the run of this host. A probe of an unknown host, or
    /// one that was received before, is ignored.
    pub(crate) fn take(&mut self, frame: &Frame, run: u64, now: Duration) {
        if (frame.size == Size::Direct) != (self.carrier == Carrier::Direct) {
            return;
        }
        if !self.paths.contains_key(&frame.from)
            && self.paths.keys().filter(|id| !self.watched.contains(**id)).count() >= MAX_ASKED
        {
            return;
        }
        if let Some(path) = self.watch(frame.from, now) {
            path.take(frame, run, now);
        }
    }

    /// Returns what is known of each watched path.
    pub(crate) fn all(&self, now: Duration) -> impl Iterator<Item = (NodeId, PathState)> {
        self.paths.keys().filter_map(move |id| Some((*id, self.state(*id, now)?)))
    }

    /// Returns what is known of the path to a host. `None` if it is not watched.
    pub(crate) fn state(&self, host: NodeId, now: Duration) -> Option<PathState> {
        let path = self.paths.get(&host)?;
        Some(PathState { is_mutual: self.watched.is_mutual(host), ..path.state(now) })
    }
}

/// The path to one host.
#[derive(Debug)]
struct Path {
    carrier: Carrier,
    /// The run of the other host, as its record says.
    announced_run: u64,
    /// The run of the other host from which the last probe arrived; 0 before the first.
    run: u64,
    small: Side,
    large: Side,
    /// What the other host said last, and when.
    said: Option<(Report, Report, Duration)>,
    round_trip: Option<Duration>,
    /// The number of the last trial that was sent; 0 before the first.
    trials: u64,
    /// The number of the last trial that arrived there, as the other host says.
    arrived_trial: u64,
    /// The number of the last trial that arrived here; 0 before the first.
    heard_trial: u64,
    /// The search for the longest packets that pass. `None` if there is none.
    search: Option<Search>,
    /// The time of the end of the last search.
    searched_at: Option<Duration>,
    /// The trial of the offload of checksums.
    offload: Trial<1>,
    /// What arrived there of it, as the other host said last.
    offload_answered: Arrived,
    /// The other host's probes of its offload.
    offload_probes: OffloadProbes,
}

/// The probes of the other host's offload that arrive here.
#[derive(Debug, Clone, Copy, Default)]
struct OffloadProbes {
    arrived: Arrived,
    /// The highest numbers that arrived.
    partial: u64,
    /// See `partial`.
    complete: u64,
}

impl OffloadProbes {
    /// Takes a probe. Returns whether it is new.
    fn take(&mut self, is_complete: bool, number: u64) -> bool {
        let (last, count) = match is_complete {
            true => (&mut self.complete, &mut self.arrived.complete),
            false => (&mut self.partial, &mut self.arrived.partial),
        };
        let is_new = number > *last;
        *last = number.max(*last);
        *count = count.saturating_add(u32::from(is_new));
        is_new
    }
}

/// The probes of one size, in both directions.
#[derive(Debug)]
struct Side {
    pace: Pace,
    /// The time of the last probe that was sent, or before the first, the time from which the interval counts.
    last_at: Duration,
    /// Whether a probe is due at once, because the judgement changed.
    is_due: bool,
    /// The number of the last probe that was sent.
    number: u64,
    /// The last probes that were sent, with their times.
    sent: VecDeque<(u64, Duration)>,
    arrivals: Arrivals,
}

/// What arrives of one size.
#[derive(Debug)]
struct Arrivals {
    pace: Pace,
    /// The time from which silence counts. It may be in the future.
    silent_since: Duration,
    judged_at: Duration,
    heard_at: Option<Duration>,
    /// The highest number that arrived; 0 before the first.
    number: u64,
    /// The last numbers that arrived: bit 0 is the highest.
    window: u32,
    /// The numbers in the window that were sent, at most [`WINDOW`].
    of: u32,
    verdict: Verdict,
    /// The arrivals since the direction was broken.
    back: u8,
}

impl Path {
    fn new(carrier: Carrier, me: NodeId, to: NodeId, announced_run: u64, now: Duration) -> Self {
        // A host does not send to all others at once.
        let spread = me.0.iter().chain(&to.0).fold(0, |sum, byte| sum ^ u32::from(*byte));
        Self {
            carrier,
            announced_run,
            run: 0,
            small: Side::new(carrier.small(), now, spread),
            large: Side::new(Size::Large, now, spread),
            said: None,
            round_trip: None,
            trials: 0,
            arrived_trial: 0,
            heard_trial: 0,
            search: None,
            searched_at: None,
            offload: Trial::new(now + GRACE),
            offload_answered: Arrived::default(),
            offload_probes: OffloadProbes::default(),
        }
    }

    /// What the other side says of this host's probes. `None` if that is too old.
    fn report(&self, now: Duration) -> Option<(Report, Report)> {
        let (small, large, at) = self.said?;
        (now.saturating_sub(at) < REPORT_VALID).then_some((small, large))
    }

    fn is_asked(&self, now: Duration) -> bool {
        self.small.arrivals.heard_at.is_some_and(|at| now.saturating_sub(at) < ASKED)
    }

    fn is_broken(&self, now: Duration) -> bool {
        self.state(now).is_broken()
    }

    fn judge(&mut self, now: Duration, is_vouched: bool) {
        let before = self.small.arrivals.verdict;
        self.small.arrivals.judge(now, is_vouched);
        self.small.is_due |= self.small.arrivals.verdict != before;
        // Large ones say something only while small ones arrive.
        let is_vouched = is_vouched && self.carrier.has_large();
        self.large.arrivals.judge(now, is_vouched && self.small.arrivals.verdict == Verdict::Works);
    }

    /// Returns the numbers of the small and of the large probe that are due.
    fn next_numbers(&mut self, now: Duration) -> [Option<u64>; 2] {
        let report = self.report(now);
        let is_missed = |report: Report| report.verdict == Verdict::Doubtful;
        let small = self.small.next_number(now, report.is_some_and(|(small, _)| is_missed(small)));
        let has_large = self.carrier.has_large();
        let large =
            has_large.then(|| self.large.next_number(now, report.is_some_and(|(_, large)| is_missed(large))));
        [small, large.flatten()]
    }

    /// Searches for the longest packets that pass to the other host, while it says that those of full length do not.
    fn search(&mut self, now: Duration, mtu: u16) -> Step {
        let is_narrow =
            self.report(now).filter(|_| self.carrier.has_large()).is_some_and(|(small, large)| {
                large.verdict == Verdict::Broken && small.verdict == Verdict::Works
            });
        let is_due = self.searched_at.is_none_or(|at| now.saturating_sub(at) >= SEARCH_AGAIN);
        if !is_narrow {
            self.search = None;
        } else if self.search.is_none() && is_due {
            self.search = Some(Search::new(mtu));
        }
        let Some(search) = &mut self.search else { return Step::Wait };
        let step = search.next(self.trials.saturating_add(1), self.arrived_trial, now);
        match step {
            Step::Wait => {}
            Step::Try(_) => self.trials = self.trials.saturating_add(1),
            Step::Found(_) => {
                self.search = None;
                self.searched_at = Some(now);
            }
        }
        step
    }

    fn take(&mut self, frame: &Frame, run: u64, now: Duration) {
        if frame.run < self.run {
            return;
        }
        if frame.run > self.run {
            self.run = frame.run;
            self.small.arrivals.restart();
            self.large.arrivals.restart();
            self.heard_trial = 0;
            (self.offload_answered, self.offload_probes) = (Arrived::default(), OffloadProbes::default());
        }
        let is_new = match frame.size {
            Size::Small | Size::Direct => self.small.arrivals.take(frame.number, now),
            Size::Large => self.large.arrivals.take(frame.number, now),
            Size::Trial => {
                let before = std::mem::replace(&mut self.heard_trial, frame.number);
                self.heard_trial = self.heard_trial.max(before);
                frame.number > before
            }
            Size::Partial => self.offload_probes.take(false, frame.number),
            Size::Complete => self.offload_probes.take(true, frame.number),
        };
        if !is_new {
            return;
        }
        if frame.heard_run == run {
            self.arrived_trial = self.arrived_trial.max(frame.heard_trial);
            self.take_answers(frame.arrived);
            if let Some(sent_at) = self.small.sent_at(frame.small.number) {
                let trip = now.saturating_sub(sent_at).saturating_sub(frame.small.held);
                self.round_trip = Some(self.round_trip.map_or(trip, |before| (before * 7 + trip) / 8));
            }
        }
        self.said = Some((frame.small, frame.large, now));
    }

    /// Takes what arrived at the other host of the probes of the offload.
    fn take_answers(&mut self, arrived: Arrived) {
        let before = std::mem::replace(&mut self.offload_answered, arrived);
        let round = self.offload.number();
        let more = |now: u32, before: u32| now.saturating_sub(before).min(round);
        for _ in 0..more(arrived.partial, before.partial).min(MOST_ANSWERS) {
            self.offload.answered(round, 0);
        }
        for _ in 0..more(arrived.complete, before.complete).min(MOST_ANSWERS) {
            self.offload.control_answered(round);
        }
    }

    fn state(&self, now: Duration) -> PathState {
        let (small, large) = (&self.small.arrivals, &self.large.arrivals);
        let received =
            Direction { small: small.verdict, large: large.verdict, loss_percent: loss(small.report(now)) };
        let sent = self.report(now).map_or_else(Direction::default, |(small, large)| Direction {
            small: small.verdict,
            large: large.verdict,
            loss_percent: loss(small),
        });
        let offload = self.offload.verdict();
        PathState { received, sent, round_trip: self.round_trip, offload, is_mutual: false }
    }
}

fn loss(report: Report) -> Option<u8> {
    match report.verdict {
        Verdict::Broken => Some(100),
        Verdict::Unknown | Verdict::Works | Verdict::Doubtful => {
            let percent = (u32::from(report.lost) * 100).checked_div(report.of.into())?;
            u8::try_from(percent.min(100)).ok()
        }
    }
}

impl Side {
    fn new(size: Size, now: Duration, spread: u32) -> Self {
        let pace = Pace::of(size);
        Self {
            pace,
            last_at: now.saturating_sub(pace.calm * (spread % 4) / 4),
            is_due: false,
            number: 0,
            sent: VecDeque::new(),
            arrivals: Arrivals::new(pace, now),
        }
    }

    /// Returns the number of the probe that is due now, which then counts as sent. `None` if none is. `is_missed` says that
    /// the other side misses some.
    fn next_number(&mut self, now: Duration, is_missed: bool) -> Option<u64> {
        let in_doubt = is_missed || self.arrivals.said() == Verdict::Doubtful;
        let interval = if in_doubt { self.pace.hurry } else { self.pace.calm };
        if !self.is_due && now.saturating_sub(self.last_at) < interval {
            return None;
        }
        self.is_due = false;
        self.last_at = now;
        self.number = self.number.saturating_add(1);
        if self.sent.len() >= REMEMBERED {
            self.sent.pop_front();
        }
        self.sent.push_back((self.number, now));
        Some(self.number)
    }

    /// Returns the time when a probe was sent, once. `None` if that is not remembered.
    fn sent_at(&mut self, number: u64) -> Option<Duration> {
        let (_, at) = *self.sent.iter().find(|(sent, _)| *sent == number)?;
        self.sent.retain(|(sent, _)| *sent > number);
        Some(at)
    }
}

impl Arrivals {
    fn new(pace: Pace, now: Duration) -> Self {
        Self {
            pace,
            silent_since: now + GRACE,
            judged_at: now,
            heard_at: None,
            number: 0,
            window: 0,
            of: 0,
            verdict: Verdict::Unknown,
            back: 0,
        }
    }

    /// Forgets the numbers: the other side counts from 1 again.
    fn restart(&mut self) {
        (self.number, self.window, self.of) = (0, 0, 0);
    }

    /// Takes the number of a probe. Returns whether it is new.
    fn take(&mut self, number: u64, now: Duration) -> bool {
        if number <= self.number {
            return false;
        }
        let gap = u32::try_from(number - self.number).unwrap_or(u32::MAX);
        let is_first = self.number == 0 || (self.verdict == Verdict::Broken && self.back == 0);
        if is_first {
            (self.window, self.of) = (1, 1);
        } else {
            self.window = self.window.checked_shl(gap).unwrap_or_default() | 1;
            self.of = self.of.saturating_add(gap).min(WINDOW);
        }
        self.number = number;
        self.heard_at = Some(now);
        self.silent_since = now;
        self.back = self.back.saturating_add(1);
        true
    }

    /// Judges what arrived until now. Without `is_vouched`, the silence of this moment means nothing.
    fn judge(&mut self, now: Duration, is_vouched: bool) {
        let since = now.saturating_sub(std::mem::replace(&mut self.judged_at, now));
        if !is_vouched {
            self.silent_since += since;
            return;
        }
        // Nor does the silence of a time in which this daemon itself did not run.
        self.silent_since += since.saturating_sub(MAX_BETWEEN);
        let silence = now.saturating_sub(self.silent_since);
        self.verdict = match self.verdict {
            Verdict::Broken if silence >= self.pace.doubt => {
                self.back = 0;
                Verdict::Broken
            }
            Verdict::Broken if self.back < BACK => Verdict::Broken,
            _ if silence >= self.pace.broken => {
                self.back = 0;
                Verdict::Broken
            }
            _ if silence >= self.pace.doubt => Verdict::Doubtful,
            _ if self.heard_at.is_some() => Verdict::Works,
            _ => Verdict::Unknown,
        };
    }

    /// Returns the judgement that the other side is told.
    fn said(&self) -> Verdict {
        match self.verdict {
            // It may be back: more probes show it soon.
            Verdict::Broken if self.back > 0 => Verdict::Doubtful,
            verdict => verdict,
        }
    }

    fn report(&self, now: Duration) -> Report {
        let mask = 1u32.checked_shl(self.of).map_or(u32::MAX, |bit| bit - 1);
        let lost = self.of.saturating_sub((self.window & mask).count_ones());
        Report {
            verdict: self.said(),
            number: self.number,
            held: self.heard_at.map_or(Duration::ZERO, |at| now.saturating_sub(at)),
            lost: u8::try_from(lost).unwrap_or(u8::MAX),
            of: u8::try_from(self.of).unwrap_or(u8::MAX),
        }
    }
}

#[cfg(test)]
mod tests;
