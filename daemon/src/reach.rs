//! Where the sockets of relayed datagrams of peers are, for pairs of hosts of which one is behind NAT.
//!
//! Such pairs exchange everything through these sockets, also what no third host passes on: so each NAT has one mapping to keep for
//! all, and it is known for the kernel's WireGuard too. Both send probes ([`ovl_mesh::gossip::Gossip::relay_probe`]), which keep the
//! mappings, say whether those of the other side arrive, and show by their source where the other host is.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use ovl_proto::id::NodeId;
use tokio::time::Instant;

/// How long a peer must have been silent at the address that is known before another one is taken: see `gossip::ends`.
const STAYS: Duration = Duration::from_secs(1);
/// How long a probe that has arrived is reported to its sender.
const RECENT: Duration = Duration::from_secs(2);

/// What is known of the peers.
#[derive(Debug, Default)]
pub(crate) struct Reach(BTreeMap<NodeId, Path>);

#[derive(Debug)]
struct Path {
    at: SocketAddr,
    /// When a probe of the peer last arrived from there.
    heard: Instant,
    /// When the peer last said that the probes of this host arrive.
    confirmed: Option<Instant>,
}

impl Reach {
    /// Takes an authentic probe of a peer, which says whether those of this host arrive. Returns whether the peer is elsewhere now.
    pub(crate) fn heard(&mut self, peer: NodeId, from: SocketAddr, confirms: bool, now: Instant) -> bool {
        let path = self
            .0
            .get_mut(&peer)
            .filter(|path| path.at == from || now.saturating_duration_since(path.heard) < STAYS);
        let Some(path) = path else {
            let confirmed = confirms.then_some(now);
            let before = self.0.insert(peer, Path { at: from, heard: now, confirmed });
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

    /// The address that a peer's probes come from. `None` if none came yet.
    pub(crate) fn at(&self, peer: NodeId) -> Option<SocketAddr> {
        self.0.get(&peer).map(|path| path.at)
    }

    /// All addresses.
    pub(crate) fn all(&self) -> BTreeMap<NodeId, SocketAddr> {
        self.0.iter().map(|(peer, path)| (*peer, path.at)).collect()
    }

    /// Whether probes of a peer arrive.
    pub(crate) fn is_heard(&self, peer: NodeId, now: Instant) -> bool {
        self.0.get(&peer).is_some_and(|path| now.saturating_duration_since(path.heard) < RECENT)
    }

    /// For how long there has been no sign that datagrams pass both ways. `None` if there was none yet.
    pub(crate) fn silence(&self, peer: NodeId, now: Instant) -> Option<Duration> {
        let path = self.0.get(&peer)?;
        Some(now.saturating_duration_since(path.heard.min(path.confirmed?)))
    }

    /// Forgets all peers but these.
    pub(crate) fn retain(&mut self, is_wanted: impl Fn(NodeId) -> bool) {
        self.0.retain(|peer, _| is_wanted(*peer));
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
        assert_eq!((reach.at(PEER), reach.silence(PEER, start)), (None, None));
        assert!(reach.heard(PEER, at("192.0.2.1:7942"), false, start));
        assert_eq!((reach.silence(PEER, start), reach.is_heard(PEER, start)), (None, true));
        let later = start + Duration::from_millis(500);
        assert!(!reach.heard(PEER, at("192.0.2.1:7942"), true, later));
        assert_eq!(reach.silence(PEER, later + STAYS), Some(STAYS));
        assert!(!reach.heard(PEER, at("192.0.2.1:7942"), false, later + STAYS));
        assert_eq!(reach.silence(PEER, later + STAYS), Some(STAYS), "not confirmed since");
        assert!(!reach.is_heard(PEER, later + STAYS + RECENT));
        reach.retain(|_| false);
        assert!(reach.all().is_empty());
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
            (reach.at(PEER), reach.silence(PEER, start + STAYS)),
            (Some(new), None),
            "not confirmed there"
        );
    }
}
