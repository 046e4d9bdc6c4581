//! Where the sockets of relayed datagrams of peers are, for pairs of hosts of which one is behind NAT, or not reached at its main
//! address.
//!
//! Such pairs exchange everything through these sockets, also what no third host passes on: so each NAT has one mapping to keep for
//! all, and it is known for the kernel's WireGuard too. Both send probes ([`ovl_mesh::gossip::Gossip::relay_probe`]), which keep the
//! mappings, say whether those of the other side arrive, and show by their source where the other host is.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ovl_proto::id::NodeId;
use tokio::time::Instant;

/// How long a peer must have been silent at the address that is known before another one is taken: see `gossip::ends`.
const STAYS: Duration = Duration::from_secs(1);
/// The number of knocks of which none must arrive for a firewall to be there.
const SILENT_KNOCKS: u32 = 5;
/// How long probes may take to pass both ways for the first time. Not between two hosts that are both behind NAT: they go through a
/// member until a path was found.
const FIRST: Duration = Duration::from_secs(1);
/// How long what a peer sends to the sockets of relayed datagrams is taken after both are reached at their main addresses again: it may
/// take longer to find that out.
const LINGER: Duration = Duration::from_secs(15);
/// How long a probe that has arrived is reported to its sender.
const RECENT: Duration = Duration::from_secs(2);

/// What is known of this host, and of the paths to peers.
#[derive(Debug, Default)]
pub(crate) struct Reach {
    /// Whether others cannot dial this host.
    behind_nat: bool,
    /// Where a host to join sees it.
    seen: Option<SocketAddr>,
    /// Whether that is not one of its own addresses.
    is_translated: bool,
    /// The number of knocks that were sent.
    knocks: u32,
    /// Whether one of them has arrived.
    is_open: bool,
    /// Whether a host has dialled this one by TCP, and whether there was time for it where UDP is blocked, so that knocks are.
    was_dialled: bool,
    had_time: bool,
    paths: BTreeMap<NodeId, Path>,
    /// Since when there has been no sign of a path to each peer to which none was ever there.
    tried: BTreeMap<NodeId, Instant>,
    /// The addresses of gossip at which peers are reached that are not reached at their main one.
    elsewhere: BTreeMap<NodeId, SocketAddr>,
    /// When peers last said that they need such a path, because they reach this host at another address.
    needed: BTreeMap<NodeId, Instant>,
    /// Peers of which one of the two was reached at another address lately, and when last.
    left: BTreeMap<NodeId, Instant>,
}

#[derive(Debug)]
struct Path {
    at: SocketAddr,
    /// When a probe of the peer last arrived from there.
    heard: Instant,
    /// When the peer last said that the probes of this host arrive.
    confirmed: Option<Instant>,
}

impl Reach {
    /// What was known when the last run ended, or what the configuration says.
    pub(crate) fn new(behind_nat: bool) -> Self {
        Self { behind_nat, ..Self::default() }
    }

    /// Whether others cannot dial this host.
    pub(crate) fn is_behind_nat(&self) -> bool {
        self.behind_nat
    }

    /// Where others see this host. `None` if it is not behind NAT.
    pub(crate) fn own(&self) -> Option<SocketAddr> {
        self.seen.filter(|_| self.behind_nat)
    }

    /// Where a host to join last saw this host. `None` if none has said it.
    pub(crate) fn seen_at(&self) -> Option<SocketAddr> {
        self.seen
    }

    /// Takes that a host to join sees this one, which has these addresses, at an address, and whether it has knocked there.
    pub(crate) fn seen(&mut self, at: SocketAddr, knocks: bool, own: &[IpAddr]) {
        self.seen = Some(at);
        self.is_translated = !own.contains(&at.ip());
        self.knocks = self.knocks.saturating_add(u32::from(knocks));
    }

    /// Takes that a knock has arrived. It may be one that is yet to be counted.
    pub(crate) fn knocked(&mut self) {
        self.is_open = true;
    }

    /// Takes that a host has dialled this one.
    pub(crate) fn dialled(&mut self) {
        self.was_dialled = true;
    }

    /// Takes that others would have dialled this host by now if they could. No knock can arrive, because UDP is blocked.
    pub(crate) fn had_time(&mut self) {
        self.had_time = true;
    }

    /// Whether this host is behind NAT, as far as that is known: others see another address than its own, or a firewall keeps out what
    /// was not asked for. Returns whether that has changed.
    pub(crate) fn judge(&mut self, configured: Option<bool>) -> bool {
        let is_hidden = match (self.is_translated, self.is_open) {
            (true, _) => true,
            (false, true) => false,
            (false, false) => {
                let is_undialled = self.had_time && !self.was_dialled;
                self.behind_nat || self.knocks >= SILENT_KNOCKS || is_undialled
            }
        };
        let behind_nat = configured.unwrap_or(is_hidden);
        std::mem::replace(&mut self.behind_nat, behind_nat) != behind_nat
    }

    /// Takes an authentic probe of a peer, which says whether those of this host arrive. Returns whether the peer is elsewhere now.
    pub(crate) fn heard(&mut self, peer: NodeId, from: SocketAddr, confirms: bool, now: Instant) -> bool {
        let path = self
            .paths
            .get_mut(&peer)
            .filter(|path| path.at == from || now.saturating_duration_since(path.heard) < STAYS);
        let Some(path) = path else {
            let confirmed = confirms.then_some(now);
            let before = self.paths.insert(peer, Path { at: from, heard: now, confirmed });
            return before.is_none_or(|path| path.at != from);
        };
        if path.at == from {
            path.heard = now;
        }
        if confirms {
            path.confirmed = Some(now);
        }
        false
    }

    /// Takes where gossip reaches peers that are not reached at their main address.
    pub(crate) fn set_elsewhere(&mut self, at: BTreeMap<NodeId, SocketAddr>) {
        self.elsewhere = at;
    }

    /// The IP address at which a peer is reached that is not reached at its main one.
    pub(crate) fn elsewhere(&self, peer: NodeId) -> Option<IpAddr> {
        self.elsewhere.get(&peer).map(SocketAddr::ip)
    }

    /// Takes that a peer needs such a path.
    pub(crate) fn needed(&mut self, peer: NodeId, now: Instant) {
        self.needed.insert(peer, now);
    }

    /// The peers of which one of the two is reached at another address.
    pub(crate) fn all_elsewhere(&mut self, now: Instant) -> BTreeSet<NodeId> {
        self.needed.retain(|_, at| now.saturating_duration_since(*at) < RECENT);
        self.left.retain(|_, at| now.saturating_duration_since(*at) < LINGER);
        let all: BTreeSet<NodeId> = self.elsewhere.keys().chain(self.needed.keys()).copied().collect();
        self.left.extend(all.iter().map(|peer| (*peer, now)));
        all
    }

    /// The peers that are reached at another address, or were a moment ago, so that they may still send as if they were.
    pub(crate) fn lingering(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.left.keys().copied()
    }

    /// Takes that a peer is elsewhere now, so that its probes come from another address.
    pub(crate) fn moved(&mut self, peer: NodeId) {
        self.paths.remove(&peer);
        self.tried.remove(&peer);
    }

    /// The address that a peer's probes come from. `None` if none came yet.
    pub(crate) fn at(&self, peer: NodeId) -> Option<SocketAddr> {
        self.paths.get(&peer).map(|path| path.at)
    }

    /// All addresses.
    pub(crate) fn all(&self) -> BTreeMap<NodeId, SocketAddr> {
        self.paths.iter().map(|(peer, path)| (*peer, path.at)).collect()
    }

    /// Whether probes of a peer arrive.
    pub(crate) fn is_heard(&self, peer: NodeId, now: Instant) -> bool {
        self.paths.get(&peer).is_some_and(|path| now.saturating_duration_since(path.heard) < RECENT)
    }

    /// For how long there has been no sign that datagrams pass both ways. `None` if there was none although there was time; `hidden`
    /// says that both hosts are behind NAT.
    pub(crate) fn silence(&self, peer: NodeId, now: Instant, hidden: bool) -> Option<Duration> {
        let sign = self.paths.get(&peer).and_then(|path| Some(path.heard.min(path.confirmed?)));
        let has_time = |at: &Instant| !hidden && now.saturating_duration_since(*at) < FIRST;
        let first = || self.tried.get(&peer).copied().filter(has_time);
        Some(now.saturating_duration_since(sign.or_else(|| first().map(|_| now))?))
    }

    /// Takes that these peers are the ones to which there should be paths. Forgets all others.
    pub(crate) fn set_wanted(&mut self, peers: &BTreeSet<NodeId>, now: Instant) {
        self.paths.retain(|peer, _| peers.contains(peer));
        self.tried.retain(|peer, _| peers.contains(peer));
        for peer in peers {
            self.tried.entry(*peer).or_insert(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: NodeId = NodeId([1; 10]);

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn path_is_there_when_probes_pass_both_ways() {
        let (mut reach, start) = (Reach::default(), Instant::now());
        assert_eq!((reach.at(PEER), reach.silence(PEER, start, false)), (None, None));
        reach.set_wanted(&[PEER].into(), start);
        assert_eq!(reach.silence(PEER, start + FIRST / 2, false), Some(Duration::ZERO), "it had no time");
        assert_eq!(reach.silence(PEER, start, true), None, "it cannot be sent to");
        assert_eq!(reach.silence(PEER, start + FIRST, false), None);
        let start = start + FIRST;
        assert!(reach.heard(PEER, at("192.0.2.1:7942"), false, start));
        assert_eq!((reach.silence(PEER, start, false), reach.is_heard(PEER, start)), (None, true));
        let later = start + Duration::from_millis(500);
        assert!(!reach.heard(PEER, at("192.0.2.1:7942"), true, later));
        assert_eq!(reach.silence(PEER, later + STAYS, true), Some(STAYS));
        assert!(!reach.heard(PEER, at("192.0.2.1:7942"), false, later + STAYS));
        assert_eq!(reach.silence(PEER, later + STAYS, true), Some(STAYS), "not confirmed since");
        assert!(!reach.is_heard(PEER, later + STAYS + RECENT));
        reach.set_wanted(&BTreeSet::new(), later);
        assert!(reach.all().is_empty());
    }

    #[test]
    fn host_that_is_seen_elsewhere_is_behind_nat() {
        let own: Vec<IpAddr> = ["10.0.0.1", "fd00::1"].iter().map(|text| text.parse().unwrap()).collect();
        let mut reach = Reach::new(false);
        let mut is_hidden = |seen: &str, configured| {
            reach.seen(at(seen), true, &own);
            reach.knocked();
            reach.judge(configured);
            (reach.is_behind_nat(), reach.own())
        };
        assert_eq!(is_hidden("[fd00::1]:1", None), (false, None));
        assert_eq!(is_hidden("192.0.2.1:4000", None), (true, Some(at("192.0.2.1:4000"))));
        assert_eq!(is_hidden("10.0.0.1:7940", None), (false, None));
        assert_eq!(is_hidden("192.0.2.1:4000", Some(false)), (false, None));
        assert_eq!(is_hidden("10.0.0.1:7940", Some(true)), (true, Some(at("10.0.0.1:7940"))));
    }

    #[test]
    fn host_is_behind_a_firewall_if_no_knock_arrives() {
        let (own, seen) = (["10.0.0.1".parse().unwrap()], at("10.0.0.1:7940"));
        let mut reach = Reach::new(false);
        for _ in 0..10 {
            reach.seen(seen, false, &own);
            assert!(!reach.judge(None), "it does not knock");
        }
        for _ in 1..SILENT_KNOCKS {
            reach.seen(seen, true, &own);
            assert!(!reach.judge(None), "they may be lost");
        }
        reach.seen(seen, true, &own);
        assert!(reach.judge(None) && reach.is_behind_nat());
        let mut again = Reach::new(true);
        again.seen(seen, true, &own);
        assert!(!again.judge(None), "as in the last run, until a knock arrives");
        again.knocked();
        assert!(again.judge(None) && !again.is_behind_nat());
    }

    #[test]
    fn host_without_udp_is_behind_a_firewall_if_no_host_dials_it() {
        let (own, seen) = (["10.0.0.1".parse().unwrap()], at("10.0.0.1:7940"));
        for was_dialled in [false, true] {
            let mut reach = Reach::new(false);
            reach.seen(seen, false, &own);
            if was_dialled {
                reach.dialled();
            }
            assert!(!reach.judge(None));
            reach.had_time();
            reach.judge(None);
            assert_eq!(reach.is_behind_nat(), !was_dialled);
        }
    }

    #[test]
    fn pair_is_elsewhere_while_one_of_the_two_needs_it() {
        let (mut reach, start) = (Reach::default(), Instant::now());
        let other = NodeId([2; 10]);
        reach.set_elsewhere([(PEER, at("[2001:db8::1]:7940"))].into());
        reach.needed(other, start);
        assert_eq!(reach.all_elsewhere(start), [PEER, other].into());
        assert_eq!(reach.elsewhere(PEER), Some("2001:db8::1".parse().unwrap()));
        assert_eq!(reach.elsewhere(other), None);
        assert_eq!(
            reach.all_elsewhere(start + RECENT),
            [PEER].into(),
            "the other one does not need it any more"
        );
        reach.set_elsewhere(BTreeMap::new());
        assert!(reach.all_elsewhere(start + RECENT).is_empty());
        assert_eq!(reach.lingering().collect::<Vec<_>>(), [PEER, other], "they may still send");
        assert!(reach.all_elsewhere(start + RECENT + LINGER).is_empty());
        assert_eq!(reach.lingering().next(), None);
    }

    #[test]
    fn peer_moves_only_when_it_is_silent_where_it_was() {
        let (mut reach, start) = (Reach::default(), Instant::now());
        let (old, new) = (at("192.0.2.1:7942"), at("192.0.2.9:1024"));
        assert!(reach.heard(PEER, old, true, start));
        assert!(!reach.heard(PEER, new, true, start + STAYS / 2));
        assert_eq!(reach.at(PEER), Some(old));
        assert!(reach.heard(PEER, new, false, start + STAYS));
        assert_eq!(
            (reach.at(PEER), reach.silence(PEER, start + STAYS, false)),
            (Some(new), None),
            "not confirmed there"
        );
    }
}
