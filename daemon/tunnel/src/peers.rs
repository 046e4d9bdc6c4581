//! The peers of an interface and their allowed IPs.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use boringtun::noise::Tunn;
use ipnet::IpNet;
use ovl_udp::trial::Offload;

use crate::api::{PeerConfig, PeerStatus, PublicKey};
use crate::segments::SegmentTrial;

/// When the first handshake with a peer is begun again: WireGuard would wait for five seconds. The peer may not know this host yet, or
/// the path to it may not be there yet.
const FIRST_AGAIN: [Duration; 4] = [
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_millis(1000),
    Duration::from_millis(2000),
];

/// A peer of an interface.
pub(crate) struct WireguardPeer {
    pub(crate) key: PublicKey,
    /// The upper 24 bits of the receiver indexes of its sessions.
    pub(crate) slot: u32,
    session: Mutex<Session>,
    /// The kernel may divide datagrams to this peer (`UDP_SEGMENT`): they are not damaged on the way.
    pub(crate) has_segmentation: AtomicBool,
    pub(crate) sent: AtomicU64,
    pub(crate) received: AtomicU64,
    /// The number of its authenticated messages, with data or without.
    pub(crate) heard: AtomicU64,
}

/// The part of a peer that packets change.
pub(crate) struct Session {
    pub(crate) tunn: Tunn,
    pub(crate) endpoint: SocketAddr,
    /// The address of this interface.
    pub(crate) own: IpAddr,
    /// `tunn` has queued packets until there is a session.
    pub(crate) has_queued: bool,
    /// Since when there should be a session and was none yet, and how often its handshake was begun again.
    pub(crate) first: (Instant, usize),
    /// When a handshake was last begun because the peer's clock had gone back.
    pub(crate) turned_at: Option<Instant>,
    /// Whether datagrams that the kernel divides arrive.
    pub(crate) segments: SegmentTrial,
}

impl Session {
    /// Whether the first handshake is to be begun again now. Call it every tick.
    pub(crate) fn is_first_due(&mut self) -> bool {
        let (since, times) = &mut self.first;
        if self.tunn.stats().0.is_some() {
            *times = FIRST_AGAIN.len();
        }
        let is_due = FIRST_AGAIN.get(*times).is_some_and(|after| since.elapsed() >= *after);
        *times += usize::from(is_due);
        is_due
    }

    /// Takes that the peer is where an authentic datagram came from. A socket of this host that stands in for it, which is at the
    /// address of this interface, is taken and left by configuration alone: while one end has left such a detour, the other one
    /// still sends through it, and both would follow each other.
    pub(crate) fn follow(&mut self, from: SocketAddr) {
        if from.ip() != self.own && self.endpoint.ip() != self.own {
            self.endpoint = from;
        }
    }
}

impl WireguardPeer {
    pub(crate) fn new(key: PublicKey, slot: u32, tunn: Tunn, endpoint: SocketAddr, own: IpAddr) -> Self {
        Self {
            key,
            slot,
            session: Mutex::new(Session {
                tunn,
                endpoint,
                own,
                has_queued: false,
                first: (Instant::now(), 0),
                turned_at: None,
                segments: SegmentTrial::new(),
            }),
            has_segmentation: AtomicBool::new(true),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            heard: AtomicU64::new(0),
        }
    }

    pub(crate) fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn status(&self, config: PeerConfig) -> PeerStatus {
        let session = self.session();
        PeerStatus {
            key: self.key,
            config,
            endpoint: session.endpoint,
            last_handshake: session.tunn.stats().0,
            sent: self.sent.load(Ordering::Relaxed),
            received: self.received.load(Ordering::Relaxed),
            heard: self.heard.load(Ordering::Relaxed),
            segments: session.segments.verdict(),
        }
    }

    /// Takes the judgement of the trial, and sends accordingly from now on.
    pub(crate) fn follow_trial(&self, verdict: Offload) {
        self.has_segmentation.store(verdict != Offload::Damages, Ordering::Relaxed);
    }
}

/// The peers of an interface, by key, by slot and by allowed IPs.
#[derive(Default)]
pub(crate) struct PeerTable {
    by_key: HashMap<PublicKey, (Arc<WireguardPeer>, PeerConfig)>,
    by_slot: HashMap<u32, Arc<WireguardPeer>>,
    v4: Prefixes,
    v6: Prefixes,
    next_slot: u32,
}

/// Prefixes of one address family by length, the longest first. There are few different lengths.
#[derive(Default)]
struct Prefixes(Vec<(u8, HashMap<u128, Arc<WireguardPeer>>)>);

impl PeerTable {
    pub(crate) fn by_key(&self, key: &PublicKey) -> Option<&Arc<WireguardPeer>> {
        self.by_key.get(key).map(|(peer, _)| peer)
    }

    pub(crate) fn by_slot(&self, slot: u32) -> Option<&Arc<WireguardPeer>> {
        self.by_slot.get(&slot)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<WireguardPeer>> {
        self.by_slot.values()
    }

    /// Returns all peers, each with its tunnel address: the allowed address in the /48 of the tunnel address `own`.
    pub(crate) fn all_with_addresses(
        &self,
        own: Ipv6Addr,
    ) -> impl Iterator<Item = (&Arc<WireguardPeer>, Ipv6Addr)> {
        self.by_key.values().filter_map(move |(peer, config)| {
            let address = config.allowed.iter().find_map(|net| match net {
                IpNet::V6(net) if net.prefix_len() == 128 => {
                    Some(net.addr()).filter(|to| to.to_bits() >> 80 == own.to_bits() >> 80)
                }
                _ => None,
            })?;
            Some((peer, address))
        })
    }

    /// Returns the peer with the longest allowed prefix that contains the address.
    pub(crate) fn holder(&self, address: IpAddr) -> Option<&Arc<WireguardPeer>> {
        match address {
            IpAddr::V4(v4) => self.v4.find(u128::from(v4.to_bits()) << 96),
            IpAddr::V6(v6) => self.v6.find(v6.to_bits()),
        }
    }

    /// Returns a slot of 24 bits that no peer has.
    pub(crate) fn free_slot(&mut self) -> u32 {
        loop {
            self.next_slot = (self.next_slot + 1) & 0xff_ffff;
            if !self.by_slot.contains_key(&self.next_slot) {
                return self.next_slot;
            }
        }
    }

    /// Adds a peer, or changes its allowed IPs. A prefix that another peer has moves to this one, as in the
    /// kernel.
    pub(crate) fn put(&mut self, peer: &Arc<WireguardPeer>, config: &PeerConfig) {
        self.release(&peer.key);
        for net in &config.allowed {
            let net = net.trunc();
            let (prefixes, bits) = self.place(net);
            if let Some(old) = prefixes.insert(net.prefix_len(), bits, Arc::clone(peer))
                && let Some((_, config)) = self.by_key.get_mut(&old.key).filter(|_| old.key != peer.key)
            {
                config.allowed.retain(|other| other.trunc() != net);
            }
        }
        self.by_slot.insert(peer.slot, Arc::clone(peer));
        self.by_key.insert(peer.key, (Arc::clone(peer), config.clone()));
    }

    pub(crate) fn remove(&mut self, key: &PublicKey) {
        self.release(key);
        if let Some((peer, _)) = self.by_key.remove(key) {
            self.by_slot.remove(&peer.slot);
        }
    }

    pub(crate) fn status(&self) -> Vec<PeerStatus> {
        let mut all: Vec<PeerStatus> =
            self.by_key.values().map(|(peer, config)| peer.status(config.clone())).collect();
        all.sort_by_key(|peer| peer.key);
        all
    }

    fn release(&mut self, key: &PublicKey) {
        let Some(held) = self.by_key.get_mut(key).map(|(_, config)| std::mem::take(&mut config.allowed))
        else {
            return;
        };
        for net in held {
            let (prefixes, bits) = self.place(net.trunc());
            prefixes.remove(net.prefix_len(), bits);
        }
    }

    fn place(&mut self, net: IpNet) -> (&mut Prefixes, u128) {
        match net {
            IpNet::V4(net) => (&mut self.v4, u128::from(net.addr().to_bits()) << 96),
            IpNet::V6(net) => (&mut self.v6, net.addr().to_bits()),
        }
    }
}

impl Prefixes {
    /// Returns the peer of the longest prefix of an address. IPv4 addresses are in the upper 32 bits.
    fn find(&self, bits: u128) -> Option<&Arc<WireguardPeer>> {
        self.0.iter().find_map(|(length, prefixes)| prefixes.get(&(bits & mask(*length))))
    }

    fn insert(&mut self, length: u8, bits: u128, peer: Arc<WireguardPeer>) -> Option<Arc<WireguardPeer>> {
        let index = self.0.partition_point(|(other, _)| *other > length);
        if self.0.get(index).is_none_or(|(other, _)| *other != length) {
            self.0.insert(index, (length, HashMap::new()));
        }
        self.0.get_mut(index)?.1.insert(bits, peer)
    }

    fn remove(&mut self, length: u8, bits: u128) {
        if let Some((_, prefixes)) = self.0.iter_mut().find(|(other, _)| *other == length) {
            prefixes.remove(&bits);
        }
        self.0.retain(|(_, prefixes)| !prefixes.is_empty());
    }
}

fn mask(length: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use boringtun::x25519::{PublicKey as X25519PublicKey, StaticSecret};

    use super::*;

    fn peer(n: u8) -> Arc<WireguardPeer> {
        let tunn = Tunn::new(
            StaticSecret::from([9; 32]),
            X25519PublicKey::from([n; 32]),
            None,
            None,
            u32::from(n),
            None,
        );
        Arc::new(WireguardPeer::new(
            [n; 32],
            u32::from(n),
            tunn,
            "192.0.2.1:1".parse().unwrap(),
            [192, 0, 2, 9].into(),
        ))
    }

    fn config(allowed: &[&str]) -> PeerConfig {
        let allowed = allowed.iter().map(|net| net.parse().unwrap()).collect();
        PeerConfig { endpoint: "192.0.2.1:1".parse().unwrap(), allowed }
    }

    fn holder(peers: &PeerTable, address: &str) -> Option<u8> {
        peers.holder(address.parse().unwrap()).map(|peer| peer.key[0])
    }

    #[test]
    fn the_longest_prefix_wins() {
        let mut peers = PeerTable::default();
        peers.put(&peer(1), &config(&["10.0.0.0/8", "fd00::/16"]));
        peers.put(&peer(2), &config(&["10.1.0.0/16", "fd00::5/128"]));
        assert_eq!(holder(&peers, "10.2.3.4"), Some(1));
        assert_eq!(holder(&peers, "10.1.3.4"), Some(2));
        assert_eq!(holder(&peers, "11.1.3.4"), None);
        assert_eq!(holder(&peers, "fd00::4"), Some(1));
        assert_eq!(holder(&peers, "fd00::5"), Some(2));
        assert_eq!(holder(&peers, "::ffff:10.1.3.4"), None);
    }

    #[test]
    fn a_prefix_has_one_peer_and_is_deleted_with_it() {
        let mut peers = PeerTable::default();
        let (one, two) = (peer(1), peer(2));
        peers.put(&one, &config(&["10.0.0.0/24", "10.0.1.0/24"]));
        peers.put(&two, &config(&["10.0.0.0/24"]));
        assert_eq!(holder(&peers, "10.0.0.1"), Some(2));
        let allowed: Vec<_> = peers.status().into_iter().map(|peer| peer.config.allowed).collect();
        assert_eq!(allowed, [config(&["10.0.1.0/24"]).allowed, config(&["10.0.0.0/24"]).allowed]);
        // A change of the old peer does not take the prefix from the new one.
        peers.put(&one, &config(&["10.0.1.0/24"]));
        assert_eq!(holder(&peers, "10.0.0.1"), Some(2));
        peers.remove(&two.key);
        assert_eq!(holder(&peers, "10.0.0.1"), None);
        assert!(peers.by_slot(2).is_none());
        assert_eq!(holder(&peers, "10.0.1.1"), Some(1));
        peers.put(&one, &config(&["0.0.0.0/0"]));
        assert_eq!(holder(&peers, "10.0.0.1"), Some(1));
    }
}
