//! TCP paths to hosts to which UDP is blocked: when they are opened, when they are used, and when UDP is used again.
//!
//! A host to which UDP works answers pings. If one does not although streams to it are open, this host dials it for two more: one
//! carries gossip, the other relayed datagrams ([`ovl_relay::TcpPath`]). [`TcpPaths`] decides; `node::tcp_paths` dials. Each host
//! decides for what it sends itself. It takes what comes by either way.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use ovl_mesh::streams::Datagrams;
use ovl_proto::id::NodeId;
use tokio::time::Instant;

/// Time beyond that of the next answer after which UDP is blocked to a host that has not answered by UDP.
const SILENT: Duration = Duration::from_millis(400);
/// The same if one of the two is behind NAT: when a NAT forgets a mapping, it takes a moment until it is known where the host is now.
const SILENT_NAT: Duration = Duration::from_millis(1000);
/// How much longer it may not answer while something comes from it by UDP: datagrams are lost then, for which TCP is no remedy, or blocked
/// in one direction.
const LOSSY: Duration = Duration::from_secs(2);
/// How long nothing may have come by a path that works. The other end sends something every 0.4 s.
const FRESH: Duration = Duration::from_millis(1200);
/// How long a path that does not work is kept.
pub(crate) const LOST: Duration = Duration::from_secs(3);
/// How much longer the host with the greater id waits before it dials, if both can.
const SECOND: Duration = Duration::from_secs(2);
/// How long a host answers by UDP before UDP is used again.
const STEADY: Duration = Duration::from_secs(3);
/// The maximum of that time: it doubles when UDP fails again within [`LATELY`].
const MAX_STEADY: Duration = Duration::from_secs(60);
const LATELY: Duration = Duration::from_secs(120);
/// How long paths stay open that are not used any more. The host that dialled closes them.
const LINGER: Duration = Duration::from_secs(15);
/// The time between attempts to dial: it doubles with each that fails.
const MIN_BACKOFF: Duration = Duration::from_millis(250);
const MAX_BACKOFF: Duration = Duration::from_secs(30);
/// How often UDP is tried to a host that answers by it, or does not at all.
const TRY_EVERY: Duration = Duration::from_millis(600);
/// How long UDP is tried at each decision, with two datagrams, after a host has last answered by it: if some are lost, it is not blocked.
const HURRY: Duration = Duration::from_secs(3);
/// How long a host to join may take to answer by UDP before it is dialled.
const SEED_SILENT: Duration = Duration::from_millis(500);
/// How long others have to dial this host, once they know it.
const TO_BE_DIALLED: Duration = Duration::from_secs(2);
/// The maximum number of hosts to which there are paths.
const MAX_HOSTS: usize = 256;

/// What is known of the way to a host.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Evidence {
    /// The time since it last answered by UDP. `None` if it never did.
    pub udp: Option<Duration>,
    /// The time since anything last came from it by UDP. `None` if nothing did.
    pub heard: Option<Duration>,
    /// Whether this host can dial it.
    pub may_dial: bool,
    /// Whether there is a stream of messages to it, so that it is there.
    pub has_stream: bool,
    /// Whether this host dials first if both can.
    pub is_first: bool,
    /// Whether one of the two is behind NAT.
    pub is_nat: bool,
    /// Whether relayed datagrams are exchanged with it.
    pub relayed: bool,
}

/// An open path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Open {
    /// The local socket that stands in for the host.
    pub local: SocketAddr,
    /// Whether this host dialled.
    pub is_dialled: bool,
    /// When something last came by it.
    pub heard: Instant,
}

impl Open {
    fn works(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.heard) < FRESH
    }
}

/// A change of the way to a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Datagrams are sent by TCP from now on.
    Tcp,
    /// By UDP again.
    Udp,
}

/// What is to be done.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Work {
    pub turns: Vec<(NodeId, Turn)>,
    /// Hosts to be dialled.
    pub dial: Vec<(NodeId, Datagrams)>,
    /// Hosts whose paths are to be closed.
    pub close: Vec<NodeId>,
    /// Hosts to which UDP is to be tried, each with the number of datagrams.
    pub tries: Vec<(NodeId, u32)>,
}

/// The TCP paths of this host.
#[derive(Debug, Default)]
pub(crate) struct TcpPaths {
    hosts: BTreeMap<NodeId, Host>,
    seeds: BTreeMap<SocketAddr, Dialling>,
    /// Whether nothing was ever heard by UDP while TCP works: then no host is waited for.
    is_blocked_here: bool,
}

#[derive(Debug)]
struct Host {
    known_since: Instant,
    /// Since when there is a stream of messages to it.
    stream_since: Option<Instant>,
    open: BTreeMap<Datagrams, Open>,
    dialling: BTreeMap<Datagrams, Dialling>,
    /// Since when TCP is used.
    used_since: Option<Instant>,
    /// Since when it has been answering by UDP, while TCP is used.
    steady_since: Option<Instant>,
    /// How long it must do so.
    steady: Duration,
    /// When TCP was last in use, or a path was opened.
    last_used: Instant,
    /// When UDP was last used again.
    ended: Option<Instant>,
    last_try: Option<Instant>,
}

#[derive(Debug)]
struct Dialling {
    is_running: bool,
    next: Instant,
    backoff: Duration,
}

impl Dialling {
    fn new(next: Instant) -> Self {
        Self { is_running: false, next, backoff: MIN_BACKOFF }
    }

    /// Whether to dial now. If so, it counts as running.
    fn begins(&mut self, now: Instant) -> bool {
        let is_due = !self.is_running && now >= self.next;
        self.is_running |= is_due;
        is_due
    }

    fn ended(&mut self, is_open: bool, now: Instant) {
        self.is_running = false;
        self.next = now + self.backoff;
        self.backoff = if is_open { MIN_BACKOFF } else { (self.backoff * 2).min(MAX_BACKOFF) };
    }
}

impl Host {
    fn new(now: Instant) -> Self {
        Self {
            known_since: now,
            stream_since: None,
            open: BTreeMap::new(),
            dialling: BTreeMap::new(),
            used_since: None,
            steady_since: None,
            steady: STEADY,
            last_used: now,
            ended: None,
            last_try: None,
        }
    }

    /// Whether a path works.
    fn works(&self, kind: Datagrams, now: Instant) -> bool {
        self.open.get(&kind).is_some_and(|open| open.works(now))
    }

    /// Whether UDP or TCP is to be used, of which only a change is told.
    fn judge(&mut self, is_silent: bool, now: Instant) -> Option<Turn> {
        if self.used_since.is_none() {
            if !is_silent || !self.works(Datagrams::Gossip, now) {
                return None;
            }
            let is_late = |at: Instant| now.saturating_duration_since(at) < LATELY;
            self.steady =
                if self.ended.is_some_and(is_late) { (self.steady * 2).min(MAX_STEADY) } else { STEADY };
            (self.used_since, self.steady_since, self.last_used) = (Some(now), None, now);
            return Some(Turn::Tcp);
        }
        self.last_used = now;
        if is_silent {
            self.steady_since = None;
            return None;
        }
        let steady_since = *self.steady_since.get_or_insert(now);
        if self.works(Datagrams::Gossip, now) && now.saturating_duration_since(steady_since) < self.steady {
            return None;
        }
        (self.used_since, self.steady_since, self.ended) = (None, None, Some(now));
        Some(Turn::Udp)
    }
}

impl TcpPaths {
    /// Whether there is no path, and none is wanted.
    pub(crate) fn is_empty(&self) -> bool {
        self.hosts.values().all(|host| host.open.is_empty() && host.used_since.is_none())
    }

    /// Whether datagrams to a host are sent by TCP.
    pub(crate) fn is_used(&self, host: NodeId) -> bool {
        self.hosts.get(&host).is_some_and(|host| host.used_since.is_some())
    }

    /// Since when. `None` if they are sent by UDP.
    pub(crate) fn used_since(&self, host: NodeId) -> Option<Instant> {
        self.hosts.get(&host)?.used_since
    }

    /// All hosts to which datagrams are sent by TCP.
    pub(crate) fn used(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.hosts.iter().filter(|(_, host)| host.used_since.is_some()).map(|(id, _)| *id)
    }

    /// The socket for relayed datagrams that stands in for a host. `None` if they are sent to it by UDP.
    pub(crate) fn relayed(&self, host: NodeId) -> Option<SocketAddr> {
        let host = self.hosts.get(&host).filter(|host| host.used_since.is_some())?;
        host.open.get(&Datagrams::Relayed).map(|open| open.local)
    }

    /// The hosts from which relayed datagrams may come by TCP, each with the socket that stands in for it.
    pub(crate) fn all_relayed(&self) -> impl Iterator<Item = (NodeId, SocketAddr)> + '_ {
        self.hosts.iter().filter_map(|(id, host)| Some((*id, host.open.get(&Datagrams::Relayed)?.local)))
    }

    /// Whether a path to a host may be opened that it has dialled.
    pub(crate) fn admits(&self, host: NodeId) -> bool {
        let has_paths = |host: &&Host| !host.open.is_empty();
        self.hosts.get(&host).as_ref().is_some_and(has_paths)
            || self.hosts.values().filter(has_paths).count() < MAX_HOSTS
    }

    /// Takes that a path was opened.
    pub(crate) fn opened(&mut self, host: NodeId, kind: Datagrams, open: Open, now: Instant) {
        let host = self.hosts.entry(host).or_insert_with(|| Host::new(now));
        host.open.insert(kind, open);
        host.last_used = now;
        if open.is_dialled {
            host.dialling.entry(kind).or_insert_with(|| Dialling::new(now)).ended(true, now);
        }
    }

    /// Takes when something last came by a path.
    pub(crate) fn heard(&mut self, host: NodeId, kind: Datagrams, at: Instant) {
        if let Some(open) = self.hosts.get_mut(&host).and_then(|host| host.open.get_mut(&kind)) {
            open.heard = at;
        }
    }

    /// Takes that a path has failed, or was closed.
    pub(crate) fn closed(&mut self, host: NodeId, kind: Datagrams) {
        if let Some(host) = self.hosts.get_mut(&host) {
            host.open.remove(&kind);
        }
    }

    /// Takes that a host could not be dialled.
    pub(crate) fn failed(&mut self, host: NodeId, kind: Datagrams, now: Instant) {
        if let Some(dialling) = self.hosts.get_mut(&host).and_then(|host| host.dialling.get_mut(&kind)) {
            dialling.ended(false, now);
        }
    }

    /// Takes that all paths were closed because this host begins anew at another address.
    pub(crate) fn begin_anew(&mut self) {
        self.hosts.clear();
        self.seeds.clear();
    }

    /// The hosts to join that are to be dialled now, of those from which nothing was heard.
    pub(crate) fn dial_seeds(&mut self, missing: &[SocketAddr], now: Instant) -> Vec<SocketAddr> {
        self.seeds.retain(|at, _| missing.contains(at));
        let first = if self.is_blocked_here { now } else { now + SEED_SILENT };
        let is_due =
            |at: &&SocketAddr| self.seeds.entry(**at).or_insert_with(|| Dialling::new(first)).begins(now);
        missing.iter().filter(is_due).copied().collect()
    }

    /// Takes that a host to join was dialled.
    pub(crate) fn dialled_seed(&mut self, at: SocketAddr, is_open: bool, now: Instant) {
        if let Some(dialling) = self.seeds.get_mut(&at) {
            dialling.ended(is_open, now);
            // It has as long to prove to be live as one that does not answer at all.
            dialling.next = if is_open { now + MAX_BACKOFF } else { dialling.next };
        }
    }

    /// Whether nothing was ever heard by UDP while TCP has been in use for a while.
    pub(crate) fn is_without_udp(&self, now: Instant) -> bool {
        let is_long = |at: Instant| now.saturating_duration_since(at) >= TO_BE_DIALLED;
        let is_long = |host: &Host| host.used_since.is_some_and(is_long);
        self.is_blocked_here && self.hosts.values().any(is_long)
    }

    /// Decides for all hosts. `patience` is how long a host may take for its next answer.
    pub(crate) fn decide(
        &mut self,
        hosts: &BTreeMap<NodeId, Evidence>,
        patience: Duration,
        now: Instant,
    ) -> Work {
        self.hosts.retain(|id, host| hosts.contains_key(id) || !host.open.is_empty());
        let was_heard = hosts.values().any(|evidence| evidence.udp.is_some());
        self.is_blocked_here = !was_heard
            && (self.is_blocked_here || self.hosts.values().any(|host| host.works(Datagrams::Gossip, now)));
        let mut work = Work::default();
        for (&id, evidence) in hosts {
            let host = self.hosts.entry(id).or_insert_with(|| Host::new(now));
            let is_new = now.saturating_duration_since(host.known_since);
            let silence = evidence.udp.unwrap_or(Duration::MAX);
            // One that has just become known has had no time to answer.
            let silence = if self.is_blocked_here { silence } else { silence.min(is_new) };
            let silent_after = patience + if evidence.is_nat { SILENT_NAT } else { SILENT };
            let is_heard = evidence.heard.is_some_and(|heard| heard <= silent_after);
            let silent_after = if is_heard { silent_after + LOSSY } else { silent_after };
            // The host that dialled found UDP blocked, so nothing is waited for where it never worked.
            let is_silent =
                silence > silent_after || (evidence.udp.is_none() && host.works(Datagrams::Gossip, now));
            if let Some(turn) = host.judge(is_silent, now) {
                work.turns.push((id, turn));
            }
            let is_used = host.used_since.is_some();
            let wait = if evidence.is_first { silent_after } else { silent_after + SECOND };
            // A host that was started again answers by UDP a moment after its streams are back.
            host.stream_since = host.stream_since.or(Some(now)).filter(|_| evidence.has_stream);
            let has_stream = host
                .stream_since
                .is_some_and(|since| self.is_blocked_here || now.saturating_duration_since(since) > wait);
            let is_wanted = is_used || (silence > wait && has_stream);
            let kinds = [Some(Datagrams::Gossip), evidence.relayed.then_some(Datagrams::Relayed)];
            for kind in kinds.into_iter().flatten().filter(|_| is_wanted && evidence.may_dial) {
                if !host.works(kind, now)
                    && host.dialling.entry(kind).or_insert_with(|| Dialling::new(now)).begins(now)
                {
                    work.dial.push((id, kind));
                }
            }
            // Where nothing comes by TCP either, all is lost alike.
            let is_stuck = is_used && !host.works(Datagrams::Gossip, now);
            let is_hurried = is_stuck || (TRY_EVERY / 2..HURRY).contains(&silence);
            let is_due = |at: Instant| is_hurried || now.saturating_duration_since(at) >= TRY_EVERY;
            // Also while UDP is used: the other host may still answer pings by TCP.
            if !host.open.is_empty() && host.last_try.is_none_or(is_due) {
                host.last_try = Some(now);
                work.tries.push((id, 1 + u32::from(is_hurried)));
            }
            let is_ours = host.open.values().all(|open| open.is_dialled);
            let linger = if is_ours { LINGER } else { LINGER * 2 };
            let unused = now.saturating_duration_since(host.last_used);
            if !is_used && !host.open.is_empty() && unused >= linger {
                work.close.push(id);
            }
        }
        work
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PING: Duration = Duration::from_millis(600);
    const PEER: NodeId = NodeId([1; 10]);
    const KINDS: [Datagrams; 2] = [Datagrams::Gossip, Datagrams::Relayed];

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    struct World {
        paths: TcpPaths,
        evidence: Evidence,
        now: Instant,
        /// When the peer last answered by UDP.
        heard: Option<Instant>,
        /// Whether nothing comes by open paths.
        is_cut: bool,
    }

    impl World {
        fn new() -> Self {
            let now = Instant::now();
            let evidence = Evidence {
                udp: None,
                heard: None,
                may_dial: true,
                has_stream: true,
                is_first: true,
                is_nat: false,
                relayed: true,
            };
            let mut world =
                Self { paths: TcpPaths::default(), evidence, now, heard: Some(now), is_cut: false };
            assert_eq!(world.after(0), Work::default());
            world
        }

        /// Decides after so many milliseconds.
        fn after(&mut self, wait: u64) -> Work {
            self.now += ms(wait);
            if !self.is_cut {
                KINDS.into_iter().for_each(|kind| self.paths.heard(PEER, kind, self.now));
            }
            let udp = self.heard.map(|at| self.now - at);
            self.paths.decide(&[(PEER, Evidence { udp, ..self.evidence })].into(), PING, self.now)
        }

        /// The same, with a peer that answers by UDP all the time. Returns all turns, each with when it was.
        fn answering(&mut self, ms: u64) -> Vec<(u64, Turn)> {
            let mut turns = Vec::new();
            for passed in (0..=ms).step_by(200) {
                self.heard = Some(self.now);
                turns.extend(self.after(200).turns.into_iter().map(|(_, turn)| (passed, turn)));
            }
            turns
        }

        fn open(&mut self, is_dialled: bool) {
            for (kind, port) in KINDS.into_iter().zip([1, 2]) {
                let open = Open { local: ([10, 0, 0, 1], port).into(), is_dialled, heard: self.now };
                self.paths.opened(PEER, kind, open, self.now);
            }
        }

        fn cut(&mut self) {
            self.after(1100);
            self.open(true);
            assert_eq!(self.after(0).turns, [(PEER, Turn::Tcp)]);
        }
    }

    #[test]
    fn host_that_answers_over_streams_only_is_dialled_and_reached_by_tcp() {
        let mut world = World::new();
        assert_eq!(world.after(1000), Work::default());
        assert_eq!(world.after(1).dial, KINDS.map(|kind| (PEER, kind)));
        assert_eq!(world.after(200).dial, [], "they are being dialled");
        assert!(!world.paths.is_used(PEER));
        world.open(true);
        assert_eq!(world.after(10).turns, [(PEER, Turn::Tcp)]);
        assert!(world.paths.is_used(PEER) && world.paths.relayed(PEER).is_some());
        assert_eq!(world.after(100).tries, [(PEER, 2)], "some may be lost");
        assert_eq!(world.after(2000).tries, [(PEER, 1)]);
        assert_eq!(world.after(500).tries, [], "it was tried just now");
        assert_eq!(world.after(100).tries, [(PEER, 1)]);
        world.paths.closed(PEER, Datagrams::Gossip);
        assert_eq!(world.after(0).dial, [(PEER, Datagrams::Gossip)], "again");
    }

    #[test]
    fn host_that_is_heard_by_udp_has_longer_to_answer() {
        let mut world = World::new();
        world.evidence.heard = Some(ms(900));
        assert_eq!(world.after(3000).dial, []);
        assert_eq!(world.after(1).dial, KINDS.map(|kind| (PEER, kind)), "it is blocked on the way there");
    }

    #[test]
    fn host_that_is_not_there_or_cannot_be_dialled_is_not() {
        for evidence in [
            Evidence { has_stream: false, ..World::new().evidence },
            Evidence { may_dial: false, ..World::new().evidence },
        ] {
            let mut world = World { evidence, ..World::new() };
            assert_eq!(world.after(60_000).dial, []);
        }
    }

    #[test]
    fn host_that_was_started_again_is_not_dialled() {
        let mut world = World::new();
        world.evidence.has_stream = false;
        assert_eq!(world.after(5000).dial, []);
        world.evidence.has_stream = true;
        assert_eq!(world.after(100).dial, []);
        assert_eq!(world.after(900).dial, [], "it may answer by UDP yet");
        world.heard = Some(world.now);
        assert_eq!(world.after(900).dial, []);
        assert_eq!(world.after(200).dial, KINDS.map(|kind| (PEER, kind)));
    }

    #[test]
    fn one_of_two_hosts_dials_first_and_failures_slow_it_down() {
        let mut world = World::new();
        world.evidence.is_first = false;
        world.evidence.relayed = false;
        assert_eq!(world.after(3000).dial, []);
        assert_eq!(world.after(1).dial, [(PEER, Datagrams::Gossip)]);
        let mut waits = Vec::new();
        for _ in 0..9 {
            world.paths.failed(PEER, Datagrams::Gossip, world.now);
            let start = world.now;
            while world.after(250).dial.is_empty() {}
            waits.push((world.now - start).as_millis());
        }
        assert_eq!(waits, [250, 500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]);
    }

    #[test]
    fn udp_is_used_again_when_it_has_worked_for_a_while_and_later_if_that_did_not_last() {
        let mut world = World::new();
        world.cut();
        assert_eq!(world.answering(3200), [(3000, Turn::Udp)]);
        assert!(!world.paths.is_used(PEER));
        assert_eq!(world.after(1100).turns, [(PEER, Turn::Tcp)], "the paths are still there");
        assert_eq!(world.answering(8000), [(6000, Turn::Udp)]);
        assert_eq!(world.after(1100).turns, [(PEER, Turn::Tcp)]);
        assert_eq!(world.answering(5000), []);
        assert_eq!(world.after(1100).turns, []);
        assert_eq!(world.answering(13_000), [(12_000, Turn::Udp)], "answers were missing meanwhile");
        world.answering(130_000);
        assert_eq!(world.after(1100).turns, [(PEER, Turn::Tcp)]);
        assert_eq!(world.answering(3200), [(3000, Turn::Udp)], "long ago");
    }

    #[test]
    fn paths_by_which_nothing_comes_are_not_used_but_dialled_again() {
        let mut world = World::new();
        world.evidence.is_nat = true;
        world.after(1601);
        world.open(true);
        assert_eq!(world.after(0).turns, [(PEER, Turn::Tcp)]);
        world.answering(3200);
        // A NAT forgets all connections: neither UDP nor the paths that are open still work.
        world.is_cut = true;
        assert_eq!(world.after(1400), Work { tries: vec![(PEER, 2)], ..Work::default() });
        let work = world.after(1);
        assert_eq!((work.turns, work.dial), (vec![], KINDS.map(|kind| (PEER, kind)).to_vec()));
        world.open(true);
        world.is_cut = false;
        assert_eq!(world.after(1).turns, [(PEER, Turn::Tcp)]);
        world.is_cut = true;
        assert_eq!(world.after(1200).dial, KINDS.map(|kind| (PEER, kind)), "while it is used as well");
        assert_eq!([world.after(1).tries, world.after(1).tries], [[(PEER, 2)], [(PEER, 2)]], "UDP may work");
        assert_eq!(world.answering(200), [(0, Turn::Udp)], "UDP is better than nothing");
    }

    #[test]
    fn hosts_behind_nat_have_time_to_be_found_where_they_are_now() {
        let mut world = World::new();
        world.evidence.is_nat = true;
        assert_eq!(world.after(1600).dial, []);
        assert_eq!(world.after(1).dial, KINDS.map(|kind| (PEER, kind)));
    }

    #[test]
    fn unused_paths_are_closed_by_the_host_that_dialled() {
        for (is_dialled, after) in [(true, LINGER), (false, LINGER * 2)] {
            let mut world = World::new();
            world.after(1100);
            world.open(is_dialled);
            world.after(0);
            world.answering(3200);
            let start = world.now;
            world.heard = Some(world.now);
            while world.after(200).close.is_empty() {
                world.heard = Some(world.now);
            }
            let took = world.now - start;
            assert!(took + ms(600) >= after && took <= after, "{took:?}");
        }
    }

    #[test]
    fn hosts_to_join_are_dialled_when_they_do_not_answer() {
        let (mut world, seed) = (World::new(), SocketAddr::from(([192, 0, 2, 1], 7940)));
        let paths = &mut world.paths;
        assert_eq!(paths.dial_seeds(&[seed], world.now), []);
        assert_eq!(paths.dial_seeds(&[seed], world.now + ms(499)), []);
        assert_eq!(paths.dial_seeds(&[seed], world.now + ms(500)), [seed]);
        assert_eq!(paths.dial_seeds(&[seed], world.now + ms(5000)), [], "it is being dialled");
        paths.dialled_seed(seed, false, world.now);
        assert_eq!(paths.dial_seeds(&[seed], world.now + MIN_BACKOFF), [seed]);
        paths.dialled_seed(seed, true, world.now);
        assert_eq!(paths.dial_seeds(&[seed], world.now + MIN_BACKOFF * 2), [], "it may need a moment");
        // Nothing was ever heard by UDP: after it has begun anew, this host waits for nothing.
        (world.heard, world.evidence.udp) = (None, None);
        world.open(true);
        assert_eq!(world.after(0).turns, [(PEER, Turn::Tcp)]);
        assert!(!world.paths.is_without_udp(world.now));
        assert!(world.paths.is_without_udp(world.now + TO_BE_DIALLED));
        world.paths.begin_anew();
        assert_eq!(world.after(0).dial, KINDS.map(|kind| (PEER, kind)));
        assert_eq!(world.paths.dial_seeds(&[seed], world.now), [seed]);
    }
}
