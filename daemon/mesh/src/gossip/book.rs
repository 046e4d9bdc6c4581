//! The state of the path to each peer: its address, when it was heard, round-trip time and path MTU.

mod addresses;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::time::Duration;

use ovl_proto::id::NodeId;
use ovl_proto::record::named_by;
use ring::rand::{SecureRandom as _, SystemRandom};
use tokio::time::Instant;

use super::Contact;
use super::mtu::{PathMtu, Probe};
use super::pair::{Pair, PairId};
use super::statement::{Budget, Hints, Sequence};

/// A peer that has given an authentic answer within this time is alive. With many peers it is up to half a second longer.
const ALIVE_FOR: Duration = Duration::from_millis(2500);
/// The maximum of that time on a host that is late itself.
const MAX_ALIVE_FOR: Duration = Duration::from_secs(10);
/// Lateness of this host that does not count.
const PUNCTUAL: Duration = Duration::from_millis(100);
/// The minimum interval between pings that are answered.
const PING_EVERY: Duration = Duration::from_millis(600);
/// The interval grows by this for each peer beyond those that [`PING_EVERY`] is enough for: a host answers 30 pings a
/// second, and takes as many answers, whatever the number of peers up to 60.
const PING_EACH: Duration = Duration::from_micros(33_333);
/// The maximum of the interval. A peer that has become silent is pinged several times before it counts as such.
const MAX_PING_EVERY: Duration = Duration::from_secs(2);
/// The minimum time in which a peer can answer repeated pings before it counts as silent.
const TO_ANSWER: Duration = Duration::from_secs(1);
/// The minimum interval between the first pings to a live peer that are not answered. In the time after which it counts as silent it
/// gets some eight of them: if a third of all datagrams is lost, none is answered once in several hundred times.
const HURRY: Duration = Duration::from_millis(50);
/// The number of these pings.
const HURRIED: usize = 8;
/// The minimum interval between the later ones. A peer that has answered none of them is pinged no more often than one that answers:
/// it is dead, or reached through others.
const PING_AGAIN: Duration = Duration::from_millis(200);
/// The maximum number of pending pings to a peer. Older ones count as lost.
const MAX_PINGS: usize = 16;
/// The number of pending pings after which an answer to the next one has to be signed again.
const SIGNED_AFTER: usize = HURRIED;
/// The number of pings to a new peer that are sent with the record of the local host, in case the first one is lost.
const INTRODUCTIONS: u8 = 2;
/// The time after the next ping was due, after which a live peer that does not answer is pinged through others.
const RELAY_AFTER: Duration = Duration::from_millis(400);
const RELAY_EVERY: Duration = Duration::from_millis(500);
/// The same for one that counts as dead, while hosts are reached through others.
const MISSED_EVERY: Duration = Duration::from_secs(2);
/// The number of other peers through which a peer is pinged.
const RELAYS: usize = 3;
/// The maximum number of pings a second that are sent sooner than the interval, because earlier ones were not answered.
/// Where many peers are silent at once, this host or the network is overloaded, and more pings make that worse.
const EARLY_PINGS: u32 = 60;
/// The number of members that are asked at once to introduce two hosts.
const INTRODUCERS: usize = 2;
/// The maximum number of requests a second to ping a peer, beside those to the hosts on known ways. Each costs four datagrams
/// and a signature.
const RELAYED_PINGS: u32 = 10;
/// The time for which a peer that gossip has just named, or that was alive until now, is pinged without being dialled.
const EAGER: Duration = Duration::from_secs(3);
const DIAL_EVERY: Duration = Duration::from_secs(1);
/// The maximum number of concurrent path MTU searches: each sends a few dozen large packets.
const MAX_SEARCHES: usize = 16;

/// The state of one peer.
#[derive(Debug)]
pub(super) struct Peer {
    addr: SocketAddr,
    /// Its address in its own network, if it is behind NAT.
    inside: Option<SocketAddr>,
    /// Whether it is in the state of chitchat.
    listed: bool,
    /// Whether this host can send to none of its addresses, so that members pass pings on.
    apart: bool,
    /// Whether the daemon wants it to be dialled.
    known: bool,
    alive: bool,
    /// Pinged until this time even if it is not alive: chitchat has heard of it.
    eager_until: Instant,
    link_mtu: u16,
    /// The time of its last answer to a ping of the local host.
    last_heard: Option<Instant>,
    /// The time of its last answer, through any path.
    proved: Option<Instant>,
    /// Its latest hints, and their position.
    hints: (Sequence, Hints),
    /// When it last signed that these are its hints.
    hinted: Option<Instant>,
    /// What its wall clock said in its last answer, in milliseconds since 1970, and when that arrived.
    clock: Option<(u64, Instant)>,
    rtt: Option<Duration>,
    /// The keys of the local host and its last run that has signed a public key.
    pair: Option<Pair>,
    /// The share of recent pings that were answered.
    answered: f64,
    /// The pending pings, the oldest first.
    pings: VecDeque<(u64, Instant)>,
    next_ping: Instant,
    /// The nonce of the pending ping through other peers.
    relayed: Option<u64>,
    /// The peer that last passed on its answer, and when.
    through: Option<(NodeId, Instant)>,
    next_relay: Instant,
    next_dial: Instant,
    mtu: Option<PathMtu>,
    reported_mtu: Option<u16>,
    /// A random part of the nonces of its probes.
    salt: u32,
    /// How many more pings are sent with the record of the local host.
    introductions: u8,
}

/// All peers.
#[derive(Debug)]
pub(super) struct PeerBook {
    peers: BTreeMap<NodeId, Peer>,
    link_mtu: u16,
    /// How long a peer is alive after an answer.
    alive_for: Duration,
    /// How much longer that is because this host was late: see [`Self::note_lateness`].
    late_for: Duration,
    /// The interval between pings that are answered.
    ping_every: Duration,
    early_pings: Budget,
    relayed_pings: Budget,
    random: SystemRandom,
    /// When a peer last passed on an answer of another one.
    last_relayed: Option<Instant>,
    /// The live peer that was last found at an address.
    last_at: HashMap<SocketAddr, NodeId>,
    /// The peer that is asked next to ping another one.
    next_relay: usize,
    /// The peer through which each one is reached that is not reached directly.
    hops: BTreeMap<NodeId, NodeId>,
    /// Counts the calls of [`Self::next_known`].
    turn: usize,
    /// Counts the calls of [`Self::introducers`].
    turn_of_introducers: usize,
    /// Counts the looks for pings that are due.
    turn_of_searches: usize,
}

/// A ping or probe to be sent now.
#[derive(Debug)]
pub(super) enum Due {
    Ping {
        to: SocketAddr,
        nonce: u64,
        /// The key with which it may be answered.
        pair: Option<PairId>,
        /// Whether the peer may not know the record of the local host yet.
        introduce: bool,
    },
    /// A request to another peer to ping `node`.
    PingFor {
        to: SocketAddr,
        node: NodeId,
        nonce: u64,
    },
    Probe {
        node: NodeId,
        to: SocketAddr,
        nonce: u64,
        size: u16,
    },
}

impl PeerBook {
    /// Creates an empty book.
    pub(super) fn new(link_mtu: u16, now: Instant) -> Self {
        Self {
            peers: BTreeMap::new(),
            link_mtu,
            alive_for: ALIVE_FOR,
            late_for: Duration::ZERO,
            ping_every: PING_EVERY,
            early_pings: Budget::new(EARLY_PINGS, now),
            relayed_pings: Budget::new(RELAYED_PINGS, now),
            random: SystemRandom::new(),
            last_relayed: None,
            last_at: HashMap::new(),
            next_relay: 0,
            hops: BTreeMap::new(),
            turn: 0,
            turn_of_introducers: 0,
            turn_of_searches: 0,
        }
    }

    /// The interval between pings to each live peer.
    pub(super) fn ping_every(&self) -> Duration {
        self.ping_every
    }

    /// How long a live peer may take for its next answer: the interval, and longer on a host that is late itself, which has sent few of
    /// the pings that it repeats.
    pub(super) fn patience(&self) -> Duration {
        self.ping_every + self.late_for / 4
    }

    /// The time after which a peer that has not answered directly is silent.
    fn silent_after(&self) -> Duration {
        self.patience() + RELAY_AFTER
    }

    /// The number of peers.
    pub(super) fn len(&self) -> usize {
        self.peers.len()
    }

    /// A new nonce, which cannot be guessed. `None` if the kernel returns no random numbers.
    pub(super) fn nonce(&self) -> Option<u64> {
        nonce(&self.random)
    }

    /// Updates a peer from the state of chitchat. `hinted` says whether chitchat considers it alive, which is not
    /// signed: it is only a reason to ping the peer. `inside` is the address of a host behind NAT in its own network.
    pub(super) fn list(
        &mut self,
        node: NodeId,
        (addr, inside): (SocketAddr, Option<SocketAddr>),
        link_mtu: u16,
        (alive, hinted): (bool, bool),
        now: Instant,
    ) {
        let own = self.link_mtu;
        let peer = self.entry(node, addr, now);
        if hinted || alive || !peer.listed || peer.addr != addr {
            peer.eager_until = now + EAGER;
        }
        (peer.addr, peer.inside) = (addr, inside);
        peer.listed = true;
        peer.alive = alive;
        peer.link_mtu = link_mtu;
        let limit = link_mtu.min(own);
        match &mut peer.mtu {
            Some(mtu) => mtu.set_limit(limit, now),
            none => *none = Some(PathMtu::new(limit, now)),
        }
    }

    /// Notes that chitchat has forgotten a peer.
    pub(super) fn unlist(&mut self, node: NodeId) {
        if let Some(peer) = self.peers.get_mut(&node) {
            (peer.listed, peer.alive) = (false, false);
            if !peer.known {
                self.peers.remove(&node);
            }
        }
    }

    /// Replaces the set of peers to dial.
    pub(super) fn set_known(&mut self, known: &[(NodeId, SocketAddr)], now: Instant) {
        for peer in self.peers.values_mut() {
            peer.known = false;
        }
        for &(node, addr) in known {
            let peer = self.entry(node, addr, now);
            peer.known = true;
            if !peer.listed {
                peer.addr = addr;
            }
        }
        self.peers.retain(|_, peer| peer.known || peer.listed);
    }

    pub(super) fn set_link_mtu(&mut self, mtu: u16, now: Instant) {
        self.link_mtu = mtu;
        for peer in self.peers.values_mut() {
            let limit = peer.link_mtu.min(mtu);
            if let Some(machine) = &mut peer.mtu {
                machine.set_limit(limit, now);
            }
        }
    }

    /// Returns when a pending ping to a peer with this nonce was sent. The ping is then no longer pending, so that each
    /// one costs at most one verification.
    pub(super) fn take_ping(&mut self, node: NodeId, nonce: u64) -> Option<Instant> {
        let peer = self.peers.get_mut(&node)?;
        let at = peer.pings.iter().position(|(sent, _)| *sent == nonce)?;
        peer.pings.remove(at).map(|(_, sent)| sent)
    }

    /// Whether this is the nonce of the pending ping to a peer through others. The ping is then no longer pending.
    pub(super) fn take_relayed(&mut self, node: NodeId, nonce: u64) -> bool {
        self.peers.get_mut(&node).and_then(|peer| peer.relayed.take_if(|sent| *sent == nonce)).is_some()
    }

    /// Notes that a peer has answered a ping of the local host, which was sent at this time.
    pub(super) fn answered(&mut self, node: NodeId, sent: Instant, now: Instant) {
        let ping_every = self.ping_every;
        let Some(peer) = self.peers.get_mut(&node) else { return };
        let sample = now.saturating_duration_since(sent);
        peer.rtt = Some(peer.rtt.map_or(sample, |rtt| (rtt * 7 + sample) / 8));
        peer.answered += (1.0 - peer.answered) / 16.0;
        peer.pings.retain(|(_, other)| *other > sent);
        peer.next_ping = peer.next_ping.max(sent + ping_every);
        (peer.last_heard, peer.proved) = (Some(now), Some(now));
    }

    /// The nonce of a ping to a live peer that is sent with the answer to its ping, in place of the next one. `None` if that is
    /// not due soon.
    pub(super) fn ping_along(&mut self, node: NodeId, now: Instant) -> Option<u64> {
        let (every, nonce) = (self.ping_every, self.nonce()?);
        let peer = self.peers.get_mut(&node)?;
        if !peer.alive || !peer.pings.is_empty() || peer.next_ping > now + every / 2 {
            return None;
        }
        peer.next_ping = now + peer.again(every);
        peer.pinged(nonce, now);
        Some(nonce)
    }

    /// The time of a peer's last answer to a ping of the local host.
    pub(super) fn last_heard(&self, node: NodeId) -> Option<Instant> {
        self.peers.get(&node)?.last_heard
    }

    /// Notes that another peer passed on a valid answer.
    pub(super) fn reached_through(&mut self, node: NodeId, by: NodeId, now: Instant) {
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.through = Some((by, now));
            self.last_relayed = Some(now);
        }
    }

    /// Sets the peer through which each one is reached that is not reached directly.
    pub(super) fn set_hops(&mut self, hops: BTreeMap<NodeId, NodeId>) {
        self.hops = hops;
    }

    /// The live peers that a request of `asker` to ping a peer is passed on to: the peer itself, or the next one on the way to it,
    /// or some that may know more, where hosts do not reach each other anyway. Empty if there is none.
    pub(super) fn towards(&mut self, node: NodeId, asker: NodeId, now: Instant) -> Vec<(NodeId, SocketAddr)> {
        let silent_after = self.silent_after();
        let is_silent =
            |node: &NodeId| self.peers.get(node).is_none_or(|peer| peer.is_silent(now, silent_after));
        let hop = self.hops.get(&node).copied().filter(|hop| *hop != asker && is_silent(&node));
        let to: Vec<NodeId> = if hop.is_none() && is_silent(&node) && !self.hops.is_empty() {
            let others = self.peers.iter().filter(|(other, peer)| peer.alive && !is_silent(other));
            let others = others.map(|(other, _)| *other).filter(|other| ![asker, node].contains(other));
            let others = others.take(RELAYS).collect();
            // The asker will send what is for it to this host, which has no way to it yet.
            if let Some(peer) = self.peers.get_mut(&node) {
                peer.next_relay = peer.next_relay.min(now);
            }
            others
        } else {
            vec![hop.unwrap_or(node)]
        };
        to.into_iter().filter_map(|hop| Some((hop, self.address_of_live(hop)?))).collect()
    }

    /// When a peer last passed on an answer of another one. `None` if none did.
    pub(super) fn last_relayed(&self) -> Option<Instant> {
        self.last_relayed
    }

    /// The peer that last passed on an answer of a peer, and when. `None` if none did.
    pub(super) fn through(&self, node: NodeId) -> Option<(NodeId, Instant)> {
        self.peers.get(&node)?.through
    }

    /// The keys of the local host and a peer.
    pub(super) fn pair(&self, node: NodeId) -> Option<&Pair> {
        self.peers.get(&node)?.pair.as_ref()
    }

    /// Replaces the keys of the local host and a peer.
    pub(super) fn set_pair(&mut self, node: NodeId, pair: Option<Pair>) {
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.pair = pair;
        }
    }

    /// Notes that a peer has signed an answer, through any path: to a challenge, or to a ping through others. Returns
    /// whether it was not alive.
    pub(super) fn proved(&mut self, node: NodeId, now: Instant) -> bool {
        self.peers.get_mut(&node).is_some_and(|peer| {
            peer.proved = Some(now);
            !peer.alive
        })
    }

    /// Whether hints at this position are later than those of a peer.
    pub(super) fn is_later(&self, node: NodeId, sequence: Sequence) -> bool {
        self.peers.get(&node).is_some_and(|peer| sequence > peer.hints.0)
    }

    /// Takes hints that the peer has signed, if they are later. Returns whether they are.
    pub(super) fn take_hints(
        &mut self,
        node: NodeId,
        sequence: Sequence,
        hints: Hints,
        now: Instant,
    ) -> bool {
        let later = self.is_later(node, sequence);
        if let Some(peer) = self.peers.get_mut(&node)
            && sequence >= peer.hints.0
        {
            peer.hints = (sequence, hints);
            peer.hinted = Some(now);
        }
        later
    }

    /// When a peer last signed that its hints are what [`Self::hints`] returns.
    pub(super) fn hinted(&self, node: NodeId) -> Option<Instant> {
        self.peers.get(&node)?.hinted
    }

    /// Takes what the wall clock of a peer said in an answer that it has signed; 0 if it said nothing.
    pub(super) fn take_clock(&mut self, node: NodeId, wall_ms: u64, now: Instant) {
        if let Some(peer) = self.peers.get_mut(&node)
            && wall_ms > 0
        {
            peer.clock = Some((wall_ms, now));
        }
    }

    /// What the wall clock of each peer says now, in milliseconds since 1970, as far as its last answer tells.
    pub(super) fn clocks(&self, now: Instant) -> BTreeMap<NodeId, u64> {
        self.peers.keys().filter_map(|node| Some((*node, self.clock(*node, now)?))).collect()
    }

    /// The same of one peer.
    pub(super) fn clock(&self, node: NodeId, now: Instant) -> Option<u64> {
        let (wall_ms, at) = self.peers.get(&node)?.clock?;
        let passed = u64::try_from(now.saturating_duration_since(at).as_millis()).unwrap_or(u64::MAX);
        Some(wall_ms.saturating_add(passed))
    }

    /// The latest hints of a peer.
    pub(super) fn hints(&self, node: NodeId) -> Hints {
        self.peers.get(&node).map(|peer| peer.hints.1).unwrap_or_default()
    }

    /// The address of a live peer that answers the local host.
    pub(super) fn address_of_live(&self, node: NodeId) -> Option<SocketAddr> {
        self.peers.get(&node).filter(|peer| peer.alive).map(|peer| peer.addr)
    }

    /// The address of a peer.
    pub(super) fn address(&self, node: NodeId) -> Option<SocketAddr> {
        self.peers.get(&node).map(|peer| peer.addr)
    }

    /// The address that names a peer behind NAT. `None` if it is not, or not known.
    pub(super) fn name(&self, node: NodeId) -> Option<SocketAddr> {
        self.address(node).filter(|name| named_by(name.ip()).is_some())
    }

    /// A new ping to a peer behind NAT that does not answer, which is to be sent to where others see it, and the peer's address in
    /// its own network, where it is to be sent as well. `None` if there is no such peer.
    pub(super) fn meet(&mut self, node: NodeId, now: Instant) -> Option<(u64, Option<SocketAddr>)> {
        let (nonce, silent_after) = (self.nonce()?, self.silent_after());
        let peer = self.peers.get_mut(&node)?;
        if !peer.listed || !peer.is_silent(now, silent_after) || named_by(peer.addr.ip()).is_none() {
            return None;
        }
        peer.pinged(nonce, now);
        Some((nonce, peer.inside))
    }

    /// The members that are asked to introduce this host to a peer: some that answer, and are not behind NAT themselves.
    pub(super) fn introducers(&mut self, node: NodeId, now: Instant) -> Vec<SocketAddr> {
        let silent_after = self.silent_after();
        let answers = |peer: &&Peer| peer.alive && !peer.is_silent(now, silent_after);
        let others = self.peers.iter().filter(|(other, _)| **other != node).map(|(_, peer)| peer);
        let open: Vec<SocketAddr> = others
            .filter(|peer| named_by(peer.addr.ip()).is_none())
            .filter(answers)
            .map(|peer| peer.addr)
            .collect();
        self.turn_of_introducers = self.turn_of_introducers.wrapping_add(1);
        let first = self.turn_of_introducers % open.len().max(1);
        open.iter().cycle().skip(first).take(INTRODUCERS.min(open.len())).copied().collect()
    }

    /// The live peer at an address.
    pub(super) fn live_at(&mut self, addr: SocketAddr) -> Option<NodeId> {
        let is_there = |peer: &Peer| peer.alive && peer.addr == addr;
        if let Some(node) = self.last_at.get(&addr)
            && self.peers.get(node).is_some_and(is_there)
        {
            return Some(*node);
        }
        let found = self.peers.iter().find(|(_, peer)| is_there(peer)).map(|(node, _)| *node)?;
        if self.last_at.len() > self.peers.len() {
            self.last_at.clear();
        }
        self.last_at.insert(addr, found);
        Some(found)
    }

    /// Notes the acknowledgement of a path MTU probe.
    pub(super) fn probed(&mut self, node: NodeId, nonce: u64, now: Instant) {
        let Some(peer) = self.peers.get_mut(&node) else { return };
        let [a, b, c, d, r, s, t, u] = nonce.to_be_bytes();
        if let Some(mtu) = &mut peer.mtu
            && u32::from_be_bytes([a, b, c, d]) == peer.salt
        {
            let probe = Probe { round: u16::from_be_bytes([r, s]), size: u16::from_be_bytes([t, u]) };
            mtu.acked(probe, now);
        }
    }

    /// Notes that the kernel refused to send a probe of this size (EMSGSIZE).
    pub(super) fn too_big(&mut self, node: NodeId, size: u16) {
        if let Some(mtu) = self.peers.get_mut(&node).and_then(|peer| peer.mtu.as_mut()) {
            mtu.too_big(size);
        }
    }

    /// Notes by how much the timer of this host was late. A host without time for its own work must not give up others,
    /// whose answers it may not have read yet. That would cost it even more time: it closes their streams and dials them
    /// again. The idea is from Dadgar, Phillips, Currey, *Lifeguard: Local Health Awareness for More Accurate Failure
    /// Detection* (2018).
    pub(super) fn note_lateness(&mut self, late: Duration) {
        self.late_for = (late.saturating_sub(PUNCTUAL) * 8).max(self.late_for * 15 / 16).min(MAX_ALIVE_FOR);
        self.alive_for = (ALIVE_FOR.max(self.ping_every + TO_ANSWER) + self.late_for).min(MAX_ALIVE_FOR);
    }

    /// The pings and probes to send now.
    pub(super) fn due(&mut self, now: Instant) -> Vec<Due> {
        let mut due = Vec::new();
        let mut searches = self.peers.values().filter(|peer| peer.is_searching()).count();
        self.due_pings(now, &mut due);
        for (&node, peer) in &mut self.peers {
            if !peer.is_alive(now, self.alive_for) {
                continue;
            }
            let (rtt, answered) = (peer.rtt.unwrap_or_default(), peer.answered);
            let Some(mtu) = &mut peer.mtu else { continue };
            let before = mtu.is_searching();
            let probes = mtu.poll(now, rtt, answered, searches < MAX_SEARCHES);
            searches += usize::from(!before && mtu.is_searching());
            due.extend(probes.into_iter().map(|Probe { size, round }| Due::Probe {
                node,
                to: peer.addr,
                nonce: u64::from(peer.salt) << 32 | u64::from(round) << 16 | u64::from(size),
                size,
            }));
        }
        due
    }

    /// Adds the pings that are due: to peers, and through others to peers that have not answered for a while.
    fn due_pings(&mut self, now: Instant, due: &mut Vec<Due>) {
        let is_pinged = |peer: &Peer| peer.alive || now < peer.eager_until;
        // Silent ones count, or a host that has lost many would ping the others more often.
        self.ping_every = ping_every(self.peers.values().filter(|peer| is_pinged(peer)).count());
        let silent_after = self.silent_after();
        let is_silent = |peer: &Peer| peer.is_silent(now, silent_after);
        // One that does not answer itself is of no help.
        let helpers = self.peers.iter().filter(|(_, peer)| peer.alive && !is_silent(peer));
        let live: Vec<(NodeId, SocketAddr)> = helpers.map(|(node, peer)| (*node, peer.addr)).collect();
        // The more are reached through others, the rarer: as for peers that answer themselves.
        let silent =
            self.peers.values().filter(|peer| peer.listed && is_silent(peer)).count().max(self.hops.len());
        let relay_every = (PING_EACH * u32::try_from(silent).unwrap_or(u32::MAX)).max(RELAY_EVERY);
        let mut nodes: Vec<NodeId> = self.peers.keys().copied().collect();
        // Where many are silent, each has its turn to be searched for.
        self.turn_of_searches = self.turn_of_searches.wrapping_add(1);
        let first = self.turn_of_searches % nodes.len().max(1);
        nodes.rotate_left(first);
        for node in nodes {
            let Some(peer) = self.peers.get_mut(&node) else { continue };
            // The way through another one is tried also when the peer answers directly again.
            let is_silent = is_silent(peer);
            // One that passes its answers on is as good as one that is known to be on the way.
            let is_fresh = |at: Instant| now.saturating_duration_since(at) < relay_every * 2;
            let through = peer.through.filter(|(_, at)| is_silent && is_fresh(*at)).map(|(by, _)| by);
            let hop = self.hops.get(&node).copied().or(through);
            let is_relayed = (is_silent || hop.is_some()) && peer.listed && now >= peer.next_relay;
            let is_pinged = is_pinged(peer);
            // One that is reached through others alone is not dialled.
            let is_missed =
                peer.known && (!self.hops.is_empty() || peer.apart || named_by(peer.addr.ip()).is_some());
            let is_direct = is_pinged && !peer.apart && now >= peer.next_ping;
            let is_searched = is_relayed && (is_pinged || is_missed);
            if !is_direct && !is_searched {
                continue;
            }
            let Some(nonce) = nonce(&self.random) else { return };
            if is_direct {
                let last = peer.pings.back().map(|(_, sent)| *sent);
                let early = last.is_some_and(|sent| now < sent + self.ping_every);
                if !early || self.early_pings.take(now) {
                    peer.next_ping = now + if peer.alive { peer.again(self.ping_every) } else { PING_EVERY };
                    due.push(peer.pinged(nonce, now));
                }
            }
            if is_searched {
                peer.next_relay = now + if is_pinged { relay_every } else { MISSED_EVERY };
                // Unlike the nonce of the ping: the answers differ in what they prove.
                let nonce = nonce.wrapping_add(1);
                peer.relayed = Some(nonce);
                let first = self.next_relay;
                self.next_relay = first.wrapping_add(RELAYS) % live.len().max(1);
                // First the one on the way to it, or the one that reached it last time.
                let last = hop.or(peer.through.map(|(last, _)| last));
                let last = live.iter().find(|(other, _)| Some(*other) == last);
                // The others are asked where none passes its answers on.
                let is_lost = is_silent && through.is_none();
                let others = live.iter().cycle().skip(first).take(if is_lost { live.len() } else { 0 });
                let others = last.into_iter().chain(others.filter(|other| Some(*other) != last));
                let others = others.filter(|(other, _)| *other != node).take(RELAYS);
                let others = others.filter(|(other, _)| Some(*other) == hop || self.relayed_pings.take(now));
                due.extend(others.map(|(_, to)| Due::PingFor { to: *to, node, nonce }));
            }
        }
    }

    /// The pings to peers that are dialled now: up to `most` that are not alive, those first that have waited longest.
    /// Gossip with a peer waits for its answer.
    pub(super) fn dials(&mut self, now: Instant, most: usize) -> Vec<Due> {
        let due = self.peers.iter().filter(|(_, peer)| !peer.alive && !peer.apart && now >= peer.next_dial);
        let mut due: Vec<(Instant, NodeId)> = due.map(|(node, peer)| (peer.next_dial, *node)).collect();
        due.sort_unstable();
        due.truncate(most);
        let mut dials = Vec::new();
        for (_, node) in due {
            let Some(nonce) = self.nonce() else { break };
            if let Some(peer) = self.peers.get_mut(&node) {
                peer.next_dial = now + DIAL_EVERY;
                dials.push(peer.pinged(nonce, now));
            }
        }
        dials
    }

    /// The address of a live peer that the daemon knows: another one with every fifth call or, if there are more than 20
    /// peers, with one call for four of them, and otherwise none.
    pub(super) fn next_known(&mut self) -> Option<SocketAddr> {
        let known = self.peers.values().filter(|peer| peer.alive && peer.known);
        let known: Vec<SocketAddr> = known.map(|peer| peer.addr).collect();
        self.turn = self.turn.wrapping_add(1);
        let calls = (self.peers.len() / 4).max(5);
        let now = self.turn.is_multiple_of(calls);
        known.get(self.turn / calls % known.len().max(1)).copied().filter(|_| now)
    }

    /// When the next unanswered ping to a live peer is to be repeated. `None` if all were answered.
    pub(super) fn next_hurry(&self) -> Option<Instant> {
        let is_missed = |peer: &&Peer| peer.alive && (1..=HURRIED).contains(&peer.pings.len());
        self.peers.values().filter(is_missed).map(|peer| peer.next_ping).min()
    }

    /// Whether a path MTU search is in progress.
    pub(super) fn is_searching(&self) -> bool {
        self.peers.values().any(Peer::is_searching)
    }

    /// Whether a peer has signed an answer lately.
    pub(super) fn is_alive(&self, node: NodeId, now: Instant) -> bool {
        self.peers.get(&node).is_some_and(|peer| peer.is_alive(now, self.alive_for))
    }

    pub(super) fn is_alive_at(&self, addr: SocketAddr) -> bool {
        self.peers.values().any(|peer| peer.alive && peer.addr == addr)
    }

    /// The addresses of all peers, or of those that are alive.
    pub(super) fn addresses(&self, only_alive: bool) -> Vec<SocketAddr> {
        self.peers.values().filter(|peer| peer.alive || !only_alive).map(|peer| peer.addr).collect()
    }

    pub(super) fn contacts(&self) -> HashMap<NodeId, Contact> {
        let contact = |(node, peer): (&NodeId, &Peer)| {
            let last_heard = peer.last_heard?;
            Some((*node, Contact { last_heard, rtt: peer.rtt, addr: peer.addr, path_mtu: peer.path_mtu() }))
        };
        self.peers.iter().filter_map(contact).collect()
    }

    /// The round-trip time to a peer. `None` if it is not known.
    pub(super) fn rtt(&self, node: NodeId) -> Option<Duration> {
        self.peers.get(&node)?.rtt
    }

    /// The path MTU to a peer, in bytes. `None` if it is not known.
    pub(super) fn path_mtu(&self, node: NodeId) -> Option<u16> {
        self.peers.get(&node).and_then(Peer::path_mtu)
    }

    /// The path MTUs that have changed since the last call.
    pub(super) fn new_mtus(&mut self) -> Vec<(NodeId, u16)> {
        let mut news = Vec::new();
        for (node, peer) in &mut self.peers {
            let current = peer.path_mtu();
            if let Some(mtu) = current
                && current != peer.reported_mtu
            {
                peer.reported_mtu = current;
                news.push((*node, mtu));
            }
        }
        news
    }

    fn entry(&mut self, node: NodeId, addr: SocketAddr, now: Instant) -> &mut Peer {
        let Self { peers, random, .. } = self;
        // Pings are spread over the second, so that they are not a burst.
        let spread = PING_EVERY / 8 * (peers.len() % 8) as u32;
        peers.entry(node).or_insert_with(|| Peer {
            addr,
            inside: None,
            listed: false,
            apart: false,
            known: false,
            alive: false,
            eager_until: now,
            link_mtu: u16::MAX,
            last_heard: None,
            proved: None,
            hints: Default::default(),
            hinted: None,
            clock: None,
            rtt: None,
            pair: None,
            answered: 1.0,
            pings: VecDeque::new(),
            next_ping: now + spread,
            relayed: None,
            through: None,
            next_relay: now + PING_EVERY + RELAY_AFTER,
            next_dial: now,
            mtu: None,
            reported_mtu: None,
            salt: nonce(random).unwrap_or_default() as u32,
            introductions: INTRODUCTIONS,
        })
    }
}

fn nonce(random: &SystemRandom) -> Option<u64> {
    let mut bytes = [0; 8];
    random.fill(&mut bytes).ok()?;
    Some(u64::from_be_bytes(bytes))
}

/// The interval between answered pings to each of this many live peers.
fn ping_every(live: usize) -> Duration {
    let each = PING_EACH * u32::try_from(live).unwrap_or(u32::MAX);
    each.clamp(PING_EVERY, MAX_PING_EVERY)
}

impl Peer {
    fn pinged(&mut self, nonce: u64, now: Instant) -> Due {
        // A peer that has not answered the last ones may have been replaced by an earlier release. It is busy more often:
        // signatures would make that worse.
        let usual = self.pings.len() < SIGNED_AFTER;
        // One that has answered was heard, and asked who this host is.
        let introduce = self.introductions > 0 && self.proved.is_none();
        self.introductions = self.introductions.saturating_sub(u8::from(introduce));
        if !self.pings.is_empty() {
            self.answered -= self.answered / 16.0;
        }
        self.pings.push_back((nonce, now));
        if self.pings.len() > MAX_PINGS {
            self.pings.pop_front();
        }
        let pair = self.pair.as_ref().filter(|_| usual).map(Pair::id);
        Due::Ping { to: self.addr, nonce, pair, introduce }
    }

    /// The interval after which the next ping is repeated if it is not answered.
    fn again(&self, ping_every: Duration) -> Duration {
        match self.pings.len() {
            // It has its time to be answered.
            0 => HURRY.max(self.rtt.unwrap_or_default() * 5 / 4),
            1..HURRIED => HURRY,
            HURRIED..MAX_PINGS => PING_AGAIN,
            _ => ping_every,
        }
    }

    fn is_alive(&self, now: Instant, alive_for: Duration) -> bool {
        self.proved.is_some_and(|at| now.saturating_duration_since(at) < alive_for)
    }

    /// Whether it has not answered directly for so long.
    fn is_silent(&self, now: Instant, silent_after: Duration) -> bool {
        self.last_heard.is_none_or(|at| now.saturating_duration_since(at) > silent_after)
    }

    fn is_searching(&self) -> bool {
        self.mtu.as_ref().is_some_and(PathMtu::is_searching)
    }

    fn path_mtu(&self) -> Option<u16> {
        self.mtu.as_ref().and_then(PathMtu::current)
    }
}

#[cfg(test)]
mod tests;
