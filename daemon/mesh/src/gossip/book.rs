//! The state of the path to each peer: its address, when it was heard, round-trip time and path MTU.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::time::Duration;

use ovl_proto::id::NodeId;
use tokio::time::Instant;

use super::Contact;
use super::mtu::{PathMtu, Probe};

/// A peer that was heard within this time is alive, even if chitchat says otherwise.
pub(super) const HEARD_LATELY: Duration = Duration::from_secs(2);
const PING_EVERY: Duration = Duration::from_secs(1);
const DIAL_EVERY: Duration = Duration::from_secs(1);
/// The maximum number of concurrent path MTU searches: each sends a few dozen large packets.
const MAX_SEARCHES: usize = 16;

/// The state of one peer.
#[derive(Debug)]
pub(super) struct Peer {
    addr: SocketAddr,
    /// Whether it is in the state of chitchat.
    listed: bool,
    /// Whether the daemon wants it to be dialled.
    known: bool,
    alive: bool,
    link_mtu: u16,
    last_heard: Option<Instant>,
    rtt: Option<Duration>,
    /// The share of recent pings that were answered.
    answered: f64,
    ping: Option<(u64, Instant)>,
    next_ping: Instant,
    next_dial: Instant,
    mtu: Option<PathMtu>,
    reported_mtu: Option<u16>,
    /// A random part of the nonces of its probes.
    salt: u32,
}

/// All peers.
#[derive(Debug)]
pub(super) struct PeerBook {
    peers: BTreeMap<NodeId, Peer>,
    link_mtu: u16,
    nonce: u64,
}

/// A ping or probe to be sent now.
#[derive(Debug)]
pub(super) enum Due {
    Ping { to: SocketAddr, nonce: u64 },
    Probe { node: NodeId, to: SocketAddr, nonce: u64, size: u16 },
}

impl PeerBook {
    /// Creates an empty book. `nonce` is the first nonce: it must be random, so that replies to an earlier process do
    /// not match.
    pub(super) fn new(link_mtu: u16, nonce: u64) -> Self {
        Self { peers: BTreeMap::new(), link_mtu, nonce }
    }

    /// A new nonce.
    pub(super) fn nonce(&mut self) -> u64 {
        self.nonce = self.nonce.wrapping_add(1);
        self.nonce
    }

    /// Updates a peer from the state of chitchat.
    pub(super) fn list(&mut self, node: NodeId, addr: SocketAddr, link_mtu: u16, alive: bool, now: Instant) {
        let own = self.link_mtu;
        let peer = self.entry(node, addr, now);
        peer.addr = addr;
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

    /// Notes an authenticated datagram from a peer.
    pub(super) fn heard(&mut self, node: NodeId, now: Instant) {
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.last_heard = Some(now);
        }
    }

    /// Notes a pong. Returns whether its nonce is that of the pending ping to the peer.
    pub(super) fn ponged(&mut self, node: NodeId, nonce: u64, now: Instant) -> bool {
        let Some(peer) = self.peers.get_mut(&node) else { return false };
        let Some((_, sent)) = peer.ping.take_if(|(sent, _)| *sent == nonce) else { return false };
        let sample = now.saturating_duration_since(sent);
        peer.rtt = Some(peer.rtt.map_or(sample, |rtt| (rtt * 7 + sample) / 8));
        peer.answered += (1.0 - peer.answered) / 16.0;
        true
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

    /// The pings and probes to send now.
    pub(super) fn due(&mut self, now: Instant) -> Vec<Due> {
        let mut due = Vec::new();
        let mut searches = self.peers.values().filter(|peer| peer.is_searching()).count();
        for (&node, peer) in &mut self.peers {
            if peer.alive && now >= peer.next_ping {
                peer.next_ping = now + PING_EVERY;
                self.nonce = self.nonce.wrapping_add(1);
                due.push(peer.pinged(self.nonce, now));
            }
            if !peer.was_heard_lately(now) {
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

    /// The peers to dial now: up to `most` that are not alive, those first that have waited longest.
    pub(super) fn dials(&mut self, now: Instant, most: usize) -> Vec<(SocketAddr, Due)> {
        let due = self.peers.iter().filter(|(_, peer)| !peer.alive && now >= peer.next_dial);
        let mut due: Vec<(Instant, NodeId)> = due.map(|(node, peer)| (peer.next_dial, *node)).collect();
        due.sort_unstable();
        due.truncate(most);
        let mut dials = Vec::new();
        for (_, node) in due {
            let nonce = self.nonce();
            if let Some(peer) = self.peers.get_mut(&node) {
                peer.next_dial = now + DIAL_EVERY;
                dials.push((peer.addr, peer.pinged(nonce, now)));
            }
        }
        dials
    }

    /// Whether a path MTU search is in progress.
    pub(super) fn is_searching(&self) -> bool {
        self.peers.values().any(Peer::is_searching)
    }

    pub(super) fn was_heard_lately(&self, node: NodeId, now: Instant) -> bool {
        self.peers.get(&node).is_some_and(|peer| peer.was_heard_lately(now))
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
        let nonce = self.nonce();
        // Pings are spread over the second, so that they are not a burst.
        let spread = PING_EVERY / 8 * (self.peers.len() % 8) as u32;
        self.peers.entry(node).or_insert_with(|| Peer {
            addr,
            listed: false,
            known: false,
            alive: false,
            link_mtu: u16::MAX,
            last_heard: None,
            rtt: None,
            answered: 1.0,
            ping: None,
            next_ping: now + spread,
            next_dial: now,
            mtu: None,
            reported_mtu: None,
            salt: (nonce ^ (nonce >> 32)) as u32,
        })
    }
}

impl Peer {
    fn pinged(&mut self, nonce: u64, now: Instant) -> Due {
        if self.ping.replace((nonce, now)).is_some() {
            self.answered -= self.answered / 16.0;
        }
        Due::Ping { to: self.addr, nonce }
    }

    fn was_heard_lately(&self, now: Instant) -> bool {
        self.last_heard.is_some_and(|heard| now.saturating_duration_since(heard) < HEARD_LATELY)
    }

    fn is_searching(&self) -> bool {
        self.mtu.as_ref().is_some_and(PathMtu::is_searching)
    }

    fn path_mtu(&self) -> Option<u16> {
        self.mtu.as_ref().and_then(PathMtu::current)
    }
}
