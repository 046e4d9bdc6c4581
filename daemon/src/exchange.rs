//! Anti-entropy of cluster objects: which peer this host asks for objects that it lacks, and for which ones.
//!
//! A host that writes objects pushes them to all peers. If a push was lost, the digests that hosts announce stay
//! different, and each host fetches what it lacks:
//!
//! 1. this host sends the hashes of the parts of its digest (`ObjectParts`);
//! 2. the peer answers with its index of the parts that differ (`ObjectIndex`);
//! 3. this host names the objects that it lacks or has an older write of (`ObjectWant`);
//! 4. the peer sends them, and then an empty message as the end.
//!
//! Steps 3 and 4 are repeated until nothing is missing. Only one peer is asked at a time, and only when neither digest
//! is changing: while it changes, pushes are in flight. What a peer said of its digest before this host's came to rest
//! does not count, because the same pushes may have been on their way to it. So a burst of writes costs no exchange, and a
//! host that missed one fetches it once. The other direction is the peer's own business.

use std::collections::{BTreeMap, BTreeSet};

use ovl_cluster::digest::Hash;
use ovl_proto::clock::Stamp;
use ovl_proto::id::NodeId;
use ovl_proto::object::ObjectKey;

/// Time in milliseconds without a change after which a digest is settled.
const QUIET_MS: u64 = 300;
/// Time in milliseconds after which a digest that never rests counts as settled, too.
const RESTLESS_MS: u64 = 5_000;
/// Time in milliseconds without a message after which an exchange is given up.
const PATIENCE_MS: u64 = 2_000;
/// Time in milliseconds before a peer is asked again, if its digest is another one than when it was asked last.
const AGAIN_MS: u64 = 1_000;
/// The same if its digest is unchanged: its answer was lost, or its objects are not accepted here.
const UNCHANGED_AGAIN_MS: u64 = 5_000;
/// The maximum number of objects that are asked for in one message.
const WANT: usize = 500;

/// The exchanges of objects of one host.
#[derive(Debug)]
pub(crate) struct Exchanges {
    /// The digest of this host.
    own: Steady,
    /// The digests that peers announce, and when each was asked last.
    peers: BTreeMap<NodeId, Announced>,
    /// Peers to which a stream was opened since they were asked: they may have been away.
    greeted: BTreeSet<NodeId>,
    running: Option<Running>,
    /// Peers of which this host has once had everything, as far as it accepts it.
    level: BTreeSet<NodeId>,
    /// The peer that was asked last, at first this host. The next one follows it by id, so that hosts ask different peers.
    last: NodeId,
}

#[derive(Debug)]
struct Announced {
    digest: Steady,
    /// The digest that it had when it was asked last, and the time.
    asked: Option<(Hash, u64)>,
}

/// A digest and how long it has been unchanged. Times are in milliseconds of this run.
#[derive(Debug, Clone, Copy)]
struct Steady {
    digest: Hash,
    changed_at: u64,
    /// When it last changed after it had been settled.
    restless_since: u64,
}

/// The exchange that is in progress.
#[derive(Debug)]
struct Running {
    peer: NodeId,
    /// When it is given up, in milliseconds of this run.
    deadline: u64,
    /// What the peer has and this host lacks; `None` before the peer's index has arrived.
    missing: Option<BTreeMap<ObjectKey, Stamp>>,
}

impl Exchanges {
    /// No exchange, for the host `me`.
    pub(crate) fn new(me: NodeId) -> Self {
        Self {
            own: Steady { digest: [0; 32], changed_at: 0, restless_since: 0 },
            peers: BTreeMap::new(),
            greeted: BTreeSet::new(),
            running: None,
            level: BTreeSet::new(),
            last: me,
        }
    }

    /// Notes the digest that a peer announces.
    pub(crate) fn announce(&mut self, peer: NodeId, digest: Hash, now: u64) {
        let fresh =
            || Announced { digest: Steady { digest, changed_at: now, restless_since: now }, asked: None };
        self.peers.entry(peer).or_insert_with(fresh).digest.note(digest, now);
    }

    /// Notes that a stream to a peer was opened: it is asked soon, whatever it announces.
    pub(crate) fn greet(&mut self, peer: NodeId) {
        self.greeted.insert(peer);
    }

    /// Forgets a peer.
    pub(crate) fn forget(&mut self, peer: NodeId) {
        self.peers.remove(&peer);
        self.greeted.remove(&peer);
        self.level.remove(&peer);
        self.running.take_if(|running| running.peer == peer);
    }

    /// Whether this host has once had everything that a peer had, as far as it accepts it.
    pub(crate) fn is_level(&self, peer: &NodeId) -> bool {
        self.level.contains(peer)
    }

    /// Begins an exchange if one is due, and returns the peer to send the parts to. `own` is the digest of this host.
    /// `said` tells when a peer last said that its digest is the announced one, in milliseconds of this run; peers for
    /// which it is `None` are not asked for what they announced.
    pub(crate) fn begin(
        &mut self,
        now: u64,
        own: Hash,
        said: impl Fn(&NodeId) -> Option<u64>,
    ) -> Option<NodeId> {
        self.own.note(own, now);
        let same = self.peers.iter().filter(|(_, peer)| peer.digest.digest == own);
        self.level.extend(same.map(|(peer, _)| *peer));
        if self.running.as_ref().is_some_and(|running| now < running.deadline) {
            return None;
        }
        if let Some(Running { peer, missing: None, .. }) = self.running.take()
            && let Some(announced) = self.peers.get_mut(&peer)
        {
            // Nothing was answered, so it has its turn again after the others.
            announced.asked = None;
        }
        let peers = &self.peers;
        let settled_at = self.own.settled_at();
        let due = |peer: &NodeId| {
            self.greeted.contains(peer)
                || now >= settled_at
                    && peers.get(peer).is_some_and(|it| it.is_due(now, &own))
                    && said(peer).is_some_and(|at| at >= settled_at)
        };
        let known = || peers.keys().chain(&self.greeted).copied().filter(|peer| due(peer));
        let peer = known().filter(|peer| *peer > self.last).min().or_else(|| known().min())?;
        self.greeted.remove(&peer);
        if let Some(announced) = self.peers.get_mut(&peer) {
            announced.asked = Some((announced.digest.digest, now));
        }
        self.last = peer;
        self.running = Some(Running { peer, deadline: now.saturating_add(PATIENCE_MS), missing: None });
        Some(peer)
    }

    /// Takes the index of a peer. `lacks` tells whether this host lacks an object, or has an older write than this one.
    /// Returns what to ask the peer for; empty if the exchange is over. `None` if this host has not asked the peer.
    pub(crate) fn on_index(
        &mut self,
        from: NodeId,
        index: Vec<(ObjectKey, Stamp)>,
        lacks: impl Fn(&ObjectKey, Stamp) -> bool,
        now: u64,
    ) -> Option<Vec<ObjectKey>> {
        let running = self.running.as_mut().filter(|it| it.peer == from && it.missing.is_none())?;
        running.deadline = now.saturating_add(PATIENCE_MS);
        running.missing = Some(index.into_iter().filter(|(key, stamp)| lacks(key, *stamp)).collect());
        Some(self.want())
    }

    /// Notes that objects of a peer were received. The last message of an answer is empty (`is_end`). Returns what to
    /// ask the peer for next; empty if nothing.
    pub(crate) fn on_objects(
        &mut self,
        from: NodeId,
        is_end: bool,
        lacks: impl Fn(&ObjectKey, Stamp) -> bool,
        now: u64,
    ) -> Vec<ObjectKey> {
        let Some(running) = self.running.as_mut().filter(|it| it.peer == from) else { return Vec::new() };
        running.deadline = now.saturating_add(PATIENCE_MS);
        let Some(missing) = running.missing.as_mut().filter(|_| is_end) else { return Vec::new() };
        let before = missing.len();
        missing.retain(|key, stamp| lacks(key, *stamp));
        if missing.len() == before {
            // The peer has nothing more that this host accepts.
            self.end();
            return Vec::new();
        }
        self.want()
    }

    /// Returns the next objects to ask for. Ends the exchange if there are none.
    fn want(&mut self) -> Vec<ObjectKey> {
        let missing = self.running.as_ref().and_then(|running| running.missing.as_ref());
        let keys: Vec<ObjectKey> =
            missing.into_iter().flatten().map(|(key, _)| key.clone()).take(WANT).collect();
        if keys.is_empty() {
            self.end();
        }
        keys
    }

    /// Ends the exchange in progress: nothing is missing.
    fn end(&mut self) {
        if let Some(Running { peer, .. }) = self.running.take() {
            self.level.insert(peer);
        }
    }
}

impl Announced {
    /// Whether the peer has something else than `own`, and it is time to ask it.
    fn is_due(&self, now: u64, own: &Hash) -> bool {
        let digest = &self.digest.digest;
        let wait = self.asked.map_or(0, |(then, at)| {
            at.saturating_add(if then == *digest { UNCHANGED_AGAIN_MS } else { AGAIN_MS })
        });
        digest != own && now >= wait && now >= self.digest.settled_at()
    }
}

impl Steady {
    fn note(&mut self, digest: Hash, now: u64) {
        if self.digest != digest {
            if now.saturating_sub(self.changed_at) >= QUIET_MS {
                self.restless_since = now;
            }
            (self.digest, self.changed_at) = (digest, now);
        }
    }

    /// Returns when it counts as settled, unless it changes before.
    fn settled_at(&self) -> u64 {
        self.changed_at.saturating_add(QUIET_MS).min(self.restless_since.saturating_add(RESTLESS_MS))
    }
}

#[cfg(test)]
mod tests {
    use ovl_proto::id::NetworkId;

    use super::*;

    const ME: NodeId = node(5);
    const OWN: Hash = [1; 32];
    const OTHER: Hash = [2; 32];

    /// Each peer has just said what its digest is.
    const ALWAYS: fn(&NodeId) -> Option<u64> = |_| Some(u64::MAX);

    const fn node(number: u8) -> NodeId {
        NodeId([number; 10])
    }

    fn key(number: u16) -> ObjectKey {
        let [high, low] = number.to_be_bytes();
        ObjectKey::Network(NetworkId([high, low, 0, 0, 0]))
    }

    fn stamp(number: u64) -> Stamp {
        Stamp { wall_ms: number, ..Stamp::default() }
    }

    /// Exchanges of a host at rest, whose peers announce `digest`.
    fn exchanges(peers: &[u8], digest: Hash) -> Exchanges {
        let mut exchanges = Exchanges::new(ME);
        assert_eq!(exchanges.begin(0, OWN, ALWAYS), None);
        peers.iter().for_each(|peer| exchanges.announce(node(*peer), digest, 0));
        exchanges
    }

    #[test]
    fn one_peer_at_a_time_is_asked_and_the_next_by_id_comes_first() {
        let mut exchanges = exchanges(&[2, 4, 7, 9], OTHER);
        let mut asked = Vec::new();
        for turn in 0..6 {
            let now = 1_000 + turn * PATIENCE_MS / 2;
            asked.extend(exchanges.begin(now, OWN, |peer| (*peer != node(9)).then_some(u64::MAX)));
        }
        // Each is silent, so the next one has to wait until its time is up.
        assert_eq!(asked, [node(7), node(2), node(4)]);
        assert_eq!(exchanges.begin(6_999, OWN, ALWAYS), None, "the last one may still answer");
        assert_eq!(exchanges.begin(7_000, OWN, ALWAYS), Some(node(7)), "its turn again");
    }

    #[test]
    fn no_peer_is_asked_while_pushes_are_in_flight_unless_they_never_end() {
        let mut exchanges = exchanges(&[7], OTHER);
        assert_eq!(exchanges.begin(QUIET_MS - 1, OWN, ALWAYS), None);
        let (mut now, mut number) = (QUIET_MS, 3);
        let asked_at = loop {
            let own = [number; 32];
            exchanges.announce(node(7), [number + 100; 32], now);
            if exchanges.begin(now, own, ALWAYS).is_some() {
                break now;
            }
            (now, number) = (now + 100, number + 1);
        };
        assert_eq!(asked_at, QUIET_MS + RESTLESS_MS);
    }

    #[test]
    fn what_a_peer_said_before_the_own_digest_came_to_rest_does_not_count() {
        let mut exchanges = exchanges(&[7], OTHER);
        // A push arrives here, and later at the peer, which says so with its next pong.
        assert_eq!(exchanges.begin(10_000, [3; 32], |_| Some(9_900)), None);
        assert_eq!(exchanges.begin(10_400, [3; 32], |_| Some(10_200)), None);
        exchanges.announce(node(7), [3; 32], 10_600);
        assert_eq!(exchanges.begin(12_000, [3; 32], |_| Some(10_600)), None);
        // One that the peer has missed.
        assert_eq!(exchanges.begin(20_000, [4; 32], |_| Some(19_900)), None);
        assert_eq!(exchanges.begin(20_400, [4; 32], |_| Some(20_300)), Some(node(7)));
    }

    #[test]
    fn equal_digests_and_dead_peers_are_left_alone() {
        let mut exchanges = exchanges(&[7, 8], OWN);
        assert_eq!(exchanges.begin(1_000, OWN, ALWAYS), None);
        exchanges.announce(node(8), OTHER, 1_000);
        assert_eq!(exchanges.begin(2_000, OWN, |_| None), None);
        exchanges.forget(node(8));
        assert_eq!(exchanges.begin(2_000, OWN, ALWAYS), None);
    }

    #[test]
    fn greeted_peer_is_asked_at_once() {
        let mut exchanges = Exchanges::new(ME);
        exchanges.greet(node(3));
        assert_eq!(exchanges.begin(0, OWN, |_| None), Some(node(3)));
        assert_eq!(exchanges.on_index(node(3), Vec::new(), |_, _| true, 1), Some(Vec::new()));
        assert_eq!(exchanges.begin(2, OWN, |_| None), None);
    }

    #[test]
    fn all_that_is_missing_is_fetched_in_bounded_steps_and_nothing_else() {
        let mut exchanges = exchanges(&[7], OTHER);
        let peer = exchanges.begin(1_000, OWN, ALWAYS).unwrap();
        let mut stored: BTreeSet<ObjectKey> = (0..100).map(key).collect();
        let index: Vec<_> = (0..1_200).map(|number| (key(number), stamp(1))).collect();
        assert_eq!(exchanges.on_index(node(8), index.clone(), |_, _| true, 1_000), None, "it was not asked");
        let (mut now, mut fetched) = (1_000, 0);
        let mut want = exchanges.on_index(peer, index, |key, _| !stored.contains(key), now).unwrap();
        while !want.is_empty() {
            assert!(want.len() <= WANT);
            fetched += want.len();
            stored.extend(want);
            now += PATIENCE_MS / 2;
            assert_eq!(exchanges.on_objects(peer, false, |_, _| true, now), []);
            assert_eq!(exchanges.begin(now + 1, OWN, ALWAYS), None, "it goes on");
            want = exchanges.on_objects(peer, true, |key, _| !stored.contains(key), now);
        }
        assert_eq!((fetched, stored.len()), (1_100, 1_200));
        assert_eq!(exchanges.begin(now + 1, OTHER, ALWAYS), None);
    }

    #[test]
    fn host_is_level_with_a_peer_after_an_exchange_or_with_the_same_digest() {
        let mut exchanges = exchanges(&[7, 8], OTHER);
        exchanges.announce(node(9), OWN, 0);
        assert_eq!(exchanges.begin(1_000, OWN, ALWAYS), Some(node(7)));
        let level = |exchanges: &Exchanges| [7, 8, 9].map(|peer| exchanges.is_level(&node(peer)));
        assert_eq!(level(&exchanges), [false, false, true]);
        assert_eq!(exchanges.on_index(node(7), Vec::new(), |_, _| true, 1_000), Some(Vec::new()));
        assert_eq!(level(&exchanges), [true, false, true]);
        exchanges.begin(1_001, OTHER, ALWAYS);
        assert_eq!(level(&exchanges), [true, true, true]);
    }

    #[test]
    fn peer_whose_objects_are_not_accepted_is_left_alone_for_a_while() {
        let mut exchanges = exchanges(&[7], OTHER);
        let peer = exchanges.begin(1_000, OWN, ALWAYS).unwrap();
        let want = exchanges.on_index(peer, vec![(key(1), stamp(1))], |_, _| true, 1_000);
        assert_eq!(want, Some(vec![key(1)]));
        assert_eq!(exchanges.on_objects(peer, true, |_, _| true, 1_001), []);
        assert_eq!(exchanges.begin(5_999, OWN, ALWAYS), None);
        assert_eq!(exchanges.begin(6_000, OWN, ALWAYS), Some(peer));
    }
}
