//! Detours to hosts that are not reached directly: which member relays for which host, and when the direct path is used again.
//!
//! A peer that answers no ping directly, while a member passes its answers on, is reached through that member. The member that
//! reached it first is the nearest one. If that one does not reach the peer directly either, the path that all members' links
//! allow counts. [`Detours`] decides from what gossip knows; `node::detours` opens the sockets.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ovl_proto::id::NodeId;
use tokio::time::Instant;

use crate::links::Links;

/// Time beyond that of the next answer after which a peer that does not answer is not reached directly.
const SILENT: Duration = Duration::from_millis(400);
/// Time beyond that of the next answer after which a member that does not answer relays no more.
const RELAY_SILENT: Duration = Duration::from_secs(1);
/// How long the answer that a member passed on shows that it reaches the peer.
const FRESH: Duration = Duration::from_secs(3);
/// How long a peer answers directly before the detour ends.
const STEADY: Duration = Duration::from_secs(3);
/// The maximum of that time: it doubles when a peer falls silent again within [`LATELY`].
const MAX_STEADY: Duration = Duration::from_secs(60);
const LATELY: Duration = Duration::from_secs(120);
/// How long the answer that the relay passed on shows that it reaches a peer that answers directly as well.
const CONFIRMED: Duration = Duration::from_millis(1500);
/// How long a member relays before it is left because nothing passes: until then what was lost may have been lost before.
const TRIED: Duration = Duration::from_secs(6);
/// How long a member through which nothing passed is not used for that peer.
const REFUSED: Duration = Duration::from_secs(60);
/// How long what a peer sends through a member is taken after the detour has ended: it may end it later.
const LINGER: Duration = Duration::from_secs(15);

/// What gossip knows of the way to a live peer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Evidence {
    /// The time since its last direct answer to a ping. `None` if it never gave one.
    pub heard: Option<Duration>,
    /// The member that last passed on an answer, and how long ago.
    pub through: Option<(NodeId, Duration)>,
    /// Whether nothing passes through the tunnel to it.
    pub lost: bool,
}

impl Evidence {
    /// Whether the peer does not answer directly, which may take so long for its next answer.
    pub(crate) fn is_silent(&self, patience: Duration) -> bool {
        self.heard.is_none_or(|heard| heard > patience + SILENT)
    }
}

/// A change of the way to a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// It is now reached through this member.
    Through(NodeId),
    /// It is reached directly again.
    Direct,
    /// No member leads to it.
    Nowhere,
}

/// The detours of this host.
#[derive(Debug, Default)]
pub(crate) struct Detours {
    open: BTreeMap<NodeId, Detour>,
    /// Peers whose detour has ended: when, and for how long they had to answer directly before.
    ended: BTreeMap<NodeId, (Instant, Duration)>,
    /// Peers and members through which nothing passed to them although they answer pings, and since when: their port is blocked,
    /// or they drop what they are to pass on.
    refused: BTreeMap<(NodeId, NodeId), Instant>,
}

#[derive(Debug)]
struct Detour {
    relay: NodeId,
    /// The members after it, as far as links tell.
    further: Vec<NodeId>,
    since: Instant,
    /// Since when the peer answers directly.
    direct: Option<Instant>,
    /// How long it must do so.
    steady: Duration,
}

impl Detours {
    /// The member through which a peer is reached. `None` if it is reached directly.
    pub(crate) fn relay(&self, peer: NodeId) -> Option<NodeId> {
        self.open.get(&peer).map(|detour| detour.relay)
    }

    /// The members through which a peer is reached, in order. Empty if it is reached directly.
    pub(crate) fn path(&self, peer: NodeId) -> Vec<NodeId> {
        let path =
            |detour: &Detour| [detour.relay].into_iter().chain(detour.further.iter().copied()).collect();
        self.open.get(&peer).map(path).unwrap_or_default()
    }

    /// For how long a peer has been reached through that member.
    pub(crate) fn since(&self, peer: NodeId) -> Option<Instant> {
        self.open.get(&peer).map(|detour| detour.since)
    }

    /// All peers that are reached through a member, with that member.
    pub(crate) fn all(&self) -> impl Iterator<Item = (NodeId, NodeId)> + '_ {
        self.open.iter().map(|(peer, detour)| (*peer, detour.relay))
    }

    /// The peers that do not answer directly. Others have a detour until the direct path has proved itself, and are a way for third
    /// hosts already.
    pub(crate) fn unreached(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.open.iter().filter(|(_, detour)| detour.direct.is_none()).map(|(peer, _)| *peer)
    }

    /// The peers whose detour has just ended, from which datagrams may still come through a member.
    pub(crate) fn lingering(&self, now: Instant) -> impl Iterator<Item = NodeId> + '_ {
        let recent = move |at: Instant| now.saturating_duration_since(at) < LINGER;
        self.ended.iter().filter(move |(_, (at, _))| recent(*at)).map(|(peer, _)| *peer)
    }

    /// Whether all peers are reached directly.
    pub(crate) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Takes that a peer still sends through the socket of an ended detour, without a member.
    pub(crate) fn linger(&mut self, peer: NodeId, now: Instant) {
        if let Some((at, _)) = self.ended.get_mut(&peer) {
            *at = now;
        }
    }

    /// Takes that a peer sends through a member: its answers to this host go the same way.
    pub(crate) fn asked(&mut self, peer: NodeId, relay: NodeId, now: Instant) -> Option<Turn> {
        (!self.open.contains_key(&peer)).then(|| self.begin(peer, relay, now))
    }

    /// Decides for all live peers, of which `relays` offer to relay. `paths` are those of `links` from this host. `patience` is
    /// how long a peer may take for its next answer.
    pub(crate) fn decide(
        &mut self,
        peers: &BTreeMap<NodeId, Evidence>,
        relays: &BTreeSet<NodeId>,
        (links, paths): (&Links, &BTreeMap<NodeId, Vec<NodeId>>),
        patience: Duration,
        now: Instant,
    ) -> Vec<(NodeId, Turn)> {
        let is_heard = |relay: &NodeId, silence: Duration| {
            let heard = peers.get(relay).and_then(|evidence| evidence.heard);
            relays.contains(relay) && heard.is_some_and(|heard| heard <= patience + silence)
        };
        let is_reached = |relay: &NodeId| is_heard(relay, RELAY_SILENT);
        let first = |peer: &NodeId| paths.get(peer).and_then(|path| path.first().copied());
        // The members after a relay. None where the relay is not nearer to the peer by the links that are known: it would send
        // datagrams in a circle.
        let from_relays: RefCell<BTreeMap<NodeId, BTreeMap<NodeId, Vec<NodeId>>>> = RefCell::default();
        let beyond = |relay: NodeId, peer: NodeId| -> Option<Vec<NodeId>> {
            if links.has(relay, peer) {
                return Some(Vec::new());
            }
            let mut from_relays = from_relays.borrow_mut();
            let from_relay = from_relays.entry(relay).or_insert_with(|| links.paths(relay, |_| 0));
            let (rest, whole) = (from_relay.get(&peer)?, paths.get(&peer)?);
            (rest.len() < whole.len()).then(|| rest.clone())
        };
        let leads = |relay: NodeId, peer: NodeId| beyond(relay, peer).is_some();
        for (peer, detour) in &self.open {
            let is_tried = now.saturating_duration_since(detour.since) >= TRIED;
            if is_tried && peers.get(peer).is_some_and(|evidence| evidence.lost) {
                self.refused.insert((*peer, detour.relay), now);
            }
        }
        self.refused
            .retain(|(peer, _), at| peers.contains_key(peer) && now.saturating_duration_since(*at) < REFUSED);
        let refused: BTreeSet<(NodeId, NodeId)> = self.refused.keys().copied().collect();
        let mut turns = Vec::new();
        self.open.retain(|peer, _| peers.contains_key(peer));
        self.ended.retain(|_, (at, _)| now.saturating_duration_since(*at) < LATELY);
        for (&peer, evidence) in peers {
            let is_silent = evidence.is_silent(patience);
            let answers = evidence.through.filter(|(_, ago)| *ago < FRESH);
            let is_tried_in_vain = |relay: NodeId| refused.contains(&(peer, relay));
            let pick = |is_usable: &dyn Fn(NodeId) -> bool| {
                let is_usable = |relay: &NodeId| *relay != peer && is_reached(relay) && is_usable(*relay);
                // Another one, if the peer answers at all.
                let other = |relay: &&NodeId| is_usable(relay) && links.has(**relay, peer);
                let (by, _) = answers?;
                let by = Some(by).filter(|by| leads(*by, peer)).filter(is_usable);
                by.or_else(|| first(&peer).filter(is_usable)).or_else(|| relays.iter().find(other).copied())
            };
            let works = |relay: NodeId| leads(relay, peer) && is_reached(&relay);
            let through = pick(&|relay| !is_tried_in_vain(relay)).or_else(|| {
                // What was tried in vain may work again, and is better than what leads nowhere.
                let has_one = self.open.get(&peer).is_some_and(|detour| works(detour.relay));
                pick(&|_| !has_one)
            });
            let Some(detour) = self.open.get_mut(&peer) else {
                if let Some(relay) = through.filter(|_| is_silent) {
                    turns.push((peer, self.begin(peer, relay, now)));
                }
                continue;
            };
            let has_links = leads(detour.relay, peer);
            let leads = has_links && !is_tried_in_vain(detour.relay);
            let is_passed_on =
                evidence.through.is_some_and(|(by, ago)| by == detour.relay && ago < CONFIRMED);
            let is_new = now.saturating_duration_since(detour.since) < CONFIRMED;
            if is_silent {
                detour.direct = None;
                // Members that reach the peer take turns in passing on its answers. One is as good as the other.
                let is_good = leads && is_reached(&detour.relay);
                if let Some(relay) = through.filter(|_| !is_good) {
                    (detour.relay, detour.since) = (relay, now);
                    turns.push((peer, Turn::Through(relay)));
                } else if !has_links && !is_passed_on && !is_new {
                    // Members would send datagrams in a circle.
                    self.ended.insert(peer, (now, detour.steady));
                    self.open.remove(&peer);
                    turns.push((peer, Turn::Nowhere));
                }
            } else {
                let since = *detour.direct.get_or_insert(now);
                // The direct path is better than a way that leads nowhere, however short it has been there.
                let is_good = leads && (is_new || is_passed_on) && is_heard(&detour.relay, SILENT);
                if !is_good || now.saturating_duration_since(since) >= detour.steady {
                    self.ended.insert(peer, (now, detour.steady));
                    self.open.remove(&peer);
                    turns.push((peer, Turn::Direct));
                }
            }
        }
        for (peer, detour) in &mut self.open {
            let shortest = beyond(detour.relay, *peer).unwrap_or_default();
            // Members keep to their ways as well while these are as short.
            let ends = [detour.relay].into_iter().chain(detour.further.iter().copied());
            let all: Vec<NodeId> = ends.chain([*peer]).collect();
            let is_link = |pair: &[NodeId]| matches!(pair, [one, other] if links.has(*one, *other));
            let is_there = all.windows(2).all(is_link);
            if !is_there || shortest.len() != detour.further.len() {
                detour.further = shortest;
            }
        }
        turns
    }

    fn begin(&mut self, peer: NodeId, relay: NodeId, now: Instant) -> Turn {
        let last = self.ended.remove(&peer).map(|(_, steady)| (steady * 2).min(MAX_STEADY));
        let steady = last.unwrap_or(STEADY);
        self.open.insert(peer, Detour { relay, further: Vec::new(), since: now, direct: None, steady });
        Turn::Through(relay)
    }
}

#[cfg(test)]
mod tests {
    mod network;

    use super::*;

    const PING: Duration = Duration::from_millis(600);
    const PEER: NodeId = NodeId([1; 10]);
    const RELAY: NodeId = NodeId([2; 10]);
    const OTHER: NodeId = NodeId([3; 10]);
    const ME: NodeId = NodeId([9; 10]);

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    struct World {
        detours: Detours,
        now: Instant,
        relays: BTreeSet<NodeId>,
        /// How long ago the relays answered.
        relays_heard: Duration,
        links: Links,
        lost: bool,
    }

    impl World {
        fn new() -> Self {
            Self {
                detours: Detours::default(),
                now: Instant::now(),
                relays: [RELAY, OTHER].into(),
                relays_heard: ms(100),
                links: Links::new([(PEER, true), (RELAY, true), (OTHER, true), (ME, true)], [(ME, PEER)]),
                lost: false,
            }
        }

        /// Decides after `ms` milliseconds.
        fn after(&mut self, wait: u64, heard: u64, through: Option<(NodeId, u64)>) -> Vec<(NodeId, Turn)> {
            self.now += ms(wait);
            let evidence = Evidence {
                heard: Some(ms(heard)),
                through: through.map(|(relay, ago)| (relay, ms(ago))),
                lost: self.lost,
            };
            let relay = Evidence { heard: Some(self.relays_heard), through: None, lost: false };
            let all = [(PEER, evidence), (RELAY, relay), (OTHER, relay)].into();
            let paths = self.links.paths(ME, |_| 0);
            self.detours.decide(&all, &self.relays, (&self.links, &paths), PING, self.now)
        }
    }

    #[test]
    fn silent_peer_is_reached_through_a_member_that_reaches_it() {
        let mut world = World::new();
        assert_eq!(world.after(0, 900, Some((RELAY, 100))), [], "not silent yet");
        assert_eq!(world.after(200, 1100, None), [], "dead, or nothing reaches it");
        assert_eq!(world.after(200, 1300, Some((RELAY, 3100))), [], "long ago");
        let relays = std::mem::take(&mut world.relays);
        assert_eq!(world.after(200, 1500, Some((PEER, 10))), [], "no relay");
        world.relays = relays;
        world.relays_heard = ms(1601);
        assert_eq!(world.after(0, 1500, Some((RELAY, 10))), [], "not reached itself");
        world.relays_heard = ms(1600);
        assert_eq!(world.after(200, 1700, Some((RELAY, 10))), [(PEER, Turn::Through(RELAY))]);
        assert_eq!(world.after(200, 1900, Some((OTHER, 10))), [], "as good as the first");
        world.relays.remove(&RELAY);
        assert_eq!(world.after(200, 2100, None), []);
        assert_eq!(world.after(200, 2300, Some((OTHER, 10))), [(PEER, Turn::Through(OTHER))]);
        assert_eq!(world.detours.relay(PEER), Some(OTHER));
        let links = (&world.links, &BTreeMap::new());
        assert_eq!(world.detours.decide(&BTreeMap::new(), &world.relays, links, PING, world.now), []);
        assert!(world.detours.is_empty(), "it is gone");
    }

    #[test]
    fn member_that_does_not_reach_the_peer_itself_is_used_only_if_it_is_on_the_path() {
        let mut world = World::new();
        let members = [(PEER, true), (RELAY, true), (OTHER, true), (ME, true)];
        world.links = Links::new(members, [(ME, PEER), (RELAY, PEER)]);
        assert_eq!(
            world.after(0, 1100, Some((RELAY, 10))),
            [(PEER, Turn::Through(OTHER))],
            "the shorter path"
        );
        world.links = Links::new(members, [(ME, PEER), (OTHER, PEER), (ME, OTHER)]);
        assert_eq!(world.after(200, 1300, None), [], "nothing has passed its answers on lately");
        assert_eq!(world.after(200, 1300, Some((RELAY, 10))), [(PEER, Turn::Through(RELAY))]);
        world.links = Links::new(members, [(ME, PEER), (RELAY, PEER), (ME, OTHER)]);
        assert_eq!(world.after(200, 1300, Some((RELAY, 10))), [], "and that one through the other");
        assert_eq!(world.detours.path(PEER), [RELAY, OTHER]);
        world.links = Links::new(members, [(ME, PEER), (RELAY, PEER), (OTHER, PEER)]);
        assert_eq!(world.after(200, 1300, Some((RELAY, 10))), [], "no path is known: it stays");
    }

    #[test]
    fn path_is_kept_while_another_one_is_as_short() {
        const LAST: NodeId = NodeId([4; 10]);
        let mut world = World::new();
        let members = [(PEER, true), (RELAY, true), (OTHER, true), (LAST, true), (ME, true)];
        world.links = Links::new(members, [(ME, PEER), (RELAY, PEER), (OTHER, PEER), (ME, LAST)]);
        assert_eq!(world.after(0, 1100, Some((OTHER, 10))), [(PEER, Turn::Through(OTHER))]);
        assert_eq!(world.detours.path(PEER), [OTHER, LAST]);
        assert_eq!(world.links.paths(ME, |_| 0)[&PEER], [RELAY, LAST], "the other one is nearer now");
        assert_eq!(world.after(200, 1300, Some((RELAY, 10))), []);
        assert_eq!(world.detours.path(PEER), [OTHER, LAST]);
        world.links =
            Links::new(members, [(ME, PEER), (RELAY, PEER), (OTHER, PEER), (ME, LAST), (OTHER, LAST)]);
        assert_eq!(
            world.after(200, 1500, Some((RELAY, 10))),
            [(PEER, Turn::Through(RELAY))],
            "it leads nowhere"
        );
    }

    #[test]
    fn members_after_the_first_one_stay_while_others_are_as_near() {
        const LAST: NodeId = NodeId([4; 10]);
        const SECOND: NodeId = NodeId([5; 10]);
        let members = [(PEER, true), (RELAY, true), (LAST, true), (SECOND, true), (ME, true)];
        let cut = [(ME, PEER), (ME, LAST), (ME, SECOND), (RELAY, PEER)];
        let mut world = World::new();
        world.links = Links::new(members, cut.into_iter().chain([(LAST, PEER)]));
        assert_eq!(world.after(0, 1100, Some((RELAY, 10))), [(PEER, Turn::Through(RELAY))]);
        assert_eq!(world.detours.path(PEER), [RELAY, SECOND]);
        world.links = Links::new(members, cut);
        assert_eq!(world.after(200, 1300, Some((RELAY, 10))), []);
        assert_eq!(world.detours.path(PEER), [RELAY, SECOND]);
        world.links = Links::new(members, cut.into_iter().chain([(SECOND, PEER)]));
        assert_eq!(world.after(200, 1500, Some((RELAY, 10))), []);
        assert_eq!(world.detours.path(PEER), [RELAY, LAST]);
    }

    #[test]
    fn direct_path_is_used_at_once_when_the_way_through_the_member_is_cut() {
        let mut world = World::new();
        assert_eq!(world.after(0, 1100, Some((RELAY, 10))), [(PEER, Turn::Through(RELAY))]);
        assert_eq!(world.detours.unreached().collect::<Vec<_>>(), [PEER]);
        assert_eq!(world.after(200, 100, None), [], "not steady yet");
        assert_eq!(world.detours.unreached().next(), None);
        world.relays_heard = ms(1001);
        assert_eq!(world.after(200, 100, None), [(PEER, Turn::Direct)]);

        let mut world = World::new();
        assert_eq!(world.after(0, 1100, Some((RELAY, 10))), [(PEER, Turn::Through(RELAY))]);
        assert_eq!(world.after(1499, 100, None), [], "too early to judge");
        assert_eq!(world.after(1, 100, Some((RELAY, 1499))), []);
        assert_eq!(world.after(1, 100, Some((RELAY, 1500))), [(PEER, Turn::Direct)], "it passes nothing on");

        let mut world = World::new();
        assert_eq!(world.after(0, 1100, Some((RELAY, 10))), [(PEER, Turn::Through(RELAY))]);
        world.links = Links::new([(PEER, true), (RELAY, true), (ME, true)], [(ME, PEER), (RELAY, PEER)]);
        assert_eq!(
            world.after(200, 100, None),
            [(PEER, Turn::Direct)],
            "the member does not reach it any more"
        );
    }

    #[test]
    fn member_through_which_nothing_passes_is_left_for_another_one() {
        let mut world = World::new();
        assert_eq!(world.after(0, 1100, Some((RELAY, 10))), [(PEER, Turn::Through(RELAY))]);
        world.lost = true;
        assert_eq!(world.after(5000, 6100, Some((RELAY, 10))), [], "lost before, perhaps");
        assert_eq!(world.after(1000, 7100, Some((RELAY, 10))), [(PEER, Turn::Through(OTHER))]);
        assert_eq!(world.after(5000, 12_100, Some((RELAY, 10))), [], "the same for this one");
        assert_eq!(world.after(1000, 13_100, Some((RELAY, 10))), [], "there is no third one");
        world.lost = false;
        assert_eq!(
            world.after(54_001, 67_100, Some((OTHER, 10))),
            [(PEER, Turn::Through(RELAY))],
            "forgiven"
        );
    }

    #[test]
    fn member_that_was_tried_in_vain_is_better_than_one_that_leads_nowhere() {
        let mut world = World::new();
        assert_eq!(world.after(0, 1100, Some((RELAY, 10))), [(PEER, Turn::Through(RELAY))]);
        world.lost = true;
        assert_eq!(world.after(6000, 7100, Some((RELAY, 10))), [(PEER, Turn::Through(OTHER))]);
        world.lost = false;
        assert_eq!(world.after(200, 7300, Some((RELAY, 10))), [], "both lead to it");
        let members = [(PEER, true), (RELAY, true), (OTHER, true), (ME, true)];
        world.links = Links::new(members, [(ME, PEER), (OTHER, PEER)]);
        assert_eq!(world.after(200, 7500, Some((RELAY, 10))), [(PEER, Turn::Through(RELAY))]);
    }

    #[test]
    fn direct_path_is_used_again_when_it_is_steady_and_later_if_it_was_not() {
        let mut world = World::new();
        let mut steady = STEADY;
        for _ in 0..7 {
            assert_eq!(world.after(200, 1100, Some((RELAY, 10))), [(PEER, Turn::Through(RELAY))]);
            assert_eq!(world.after(200, 100, None), []);
            assert_eq!(world.after(1000, 1100, Some((RELAY, 10))), [], "it was an accident");
            assert_eq!(world.after(200, 100, None), []);
            let wait = u64::try_from(steady.as_millis()).unwrap();
            assert_eq!(world.after(wait - 1, 100, Some((RELAY, 10))), []);
            assert_eq!(world.after(1, 100, None), [(PEER, Turn::Direct)]);
            steady = (steady * 2).min(MAX_STEADY);
        }
        assert_eq!(steady, MAX_STEADY);
        world.after(120_000, 100, None);
        world.after(200, 1100, Some((RELAY, 10)));
        world.after(200, 100, None);
        assert_eq!(world.after(3000, 100, None), [(PEER, Turn::Direct)], "forgotten");
    }

    #[test]
    fn peer_that_sends_through_a_member_is_answered_through_it() {
        let mut world = World::new();
        assert_eq!(world.detours.asked(PEER, OTHER, world.now), Some(Turn::Through(OTHER)));
        assert_eq!(world.detours.asked(PEER, RELAY, world.now), None);
        assert_eq!(world.detours.all().collect::<Vec<_>>(), [(PEER, OTHER)]);
    }
}
