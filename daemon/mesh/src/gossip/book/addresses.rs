//! Peers with several addresses, and those that this host cannot send to.

use std::time::Duration;

use ovl_proto::id::NodeId;
use tokio::time::Instant;

use super::super::mtu::PathMtu;
use super::{PING_AGAIN, PeerBook};

impl PeerBook {
    /// Sets whether this host can send to none of a peer's addresses. Members are asked at once to pass pings on.
    pub(in crate::gossip) fn set_apart(&mut self, node: NodeId, apart: bool, now: Instant) {
        if let Some(peer) = self.peers.get_mut(&node)
            && std::mem::replace(&mut peer.apart, apart) != apart
        {
            peer.next_relay = now;
        }
    }

    /// Whether gossip has the record of a peer.
    pub(in crate::gossip) fn is_listed(&self, node: NodeId) -> bool {
        self.peers.get(&node).is_some_and(|peer| peer.listed)
    }

    /// Whether the addresses of a peer are tried.
    pub(in crate::gossip) fn is_tried(&self, node: NodeId, now: Instant) -> bool {
        self.peers.get(&node).is_some_and(|peer| peer.known || peer.alive || now < peer.eager_until)
    }

    /// The time after an answer of a peer after which it may be silent, so that its other addresses are tried.
    pub(in crate::gossip) fn silent_soon(&self) -> Duration {
        self.ping_every + PING_AGAIN
    }

    /// Searches for the path MTU of a peer anew.
    pub(in crate::gossip) fn search_again(&mut self, node: NodeId, now: Instant) {
        let own = self.link_mtu;
        if let Some(peer) = self.peers.get_mut(&node) {
            peer.mtu = Some(PathMtu::new(peer.link_mtu.min(own), now));
        }
    }
}
