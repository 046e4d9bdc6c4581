//! Hosts that are reached by TCP where UDP is blocked.
//!
//! A local socket stands in for such a host, and carries what is sent to it over TCP. So a datagram goes there in place of the host's
//! address, and what comes from there counts as if it had come from that address. Whether UDP works again is tried meanwhile.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::SocketAddr;

use ovl_proto::id::NodeId;
use ovl_proto::wire;
use tokio::time::Instant;
use tracing::debug;

use super::super::TcpEnd;
use super::super::packet::Packet;
use super::super::seal::Sender;
use super::{Hub, State};
use crate::transport::Datagrams;

/// The hosts to which there are TCP paths, and when UDP last worked.
#[derive(Debug, Default)]
pub(super) struct TcpEnds {
    /// By each address that a host is known by.
    by_name: HashMap<SocketAddr, TcpEnd>,
    /// By the address of the local socket.
    by_local: HashMap<SocketAddr, TcpEnd>,
    /// When a host last answered by UDP.
    udp: BTreeMap<NodeId, Instant>,
    /// When anything last came from a host by UDP.
    heard: BTreeMap<NodeId, Instant>,
    /// The last trial of each host.
    tries: BTreeMap<NodeId, u64>,
}

impl TcpEnds {
    fn set(&mut self, ends: Vec<TcpEnd>) {
        self.by_name = ends.iter().flat_map(|end| end.known_as.iter().map(|at| (*at, end.clone()))).collect();
        self.by_local = ends.into_iter().map(|end| (end.local, end)).collect();
    }

    /// The address that the host is known by for which this local socket stands in. `None` if it is no such socket.
    pub(super) fn known_as(&self, local: SocketAddr) -> Option<SocketAddr> {
        self.by_local.get(&local).map(|end| end.known_as.first().copied().unwrap_or(local))
    }

    /// Where the other end of a TCP path is, as this host sees it. `None` if the address is not that of such a socket.
    pub(super) fn remote(&self, local: SocketAddr) -> Option<SocketAddr> {
        self.by_local.get(&local).map(|end| end.remote)
    }

    /// Whether what comes from an address is from the host that is known as this one.
    pub(super) fn is(&self, known_as: SocketAddr, from: SocketAddr) -> bool {
        from == known_as || self.by_local.get(&from).is_some_and(|end| end.known_as.contains(&known_as))
    }

    /// The local socket to which datagrams for the host are sent that is known by an address. `None` if they are sent by UDP.
    fn used(&self, known_as: SocketAddr) -> Option<SocketAddr> {
        self.by_name.get(&known_as).filter(|end| end.is_used).map(|end| end.local)
    }

    /// Where a host is seen to which there is a TCP path.
    pub(super) fn seen_as(&self, known_as: SocketAddr) -> Option<SocketAddr> {
        self.by_name.get(&known_as).map(|end| end.remote)
    }

    /// Takes that a host has just answered by UDP.
    pub(super) fn note_answer(&mut self, node: NodeId, now: Instant) {
        self.udp.insert(node, now);
    }

    /// Forgets all hosts but these.
    pub(super) fn retain(&mut self, is_known: impl Fn(NodeId) -> bool) {
        self.udp.retain(|host, _| is_known(*host));
        self.heard.retain(|host, _| is_known(*host));
        self.tries.retain(|host, _| is_known(*host));
    }
}

impl State {
    /// Where a datagram is sent to that is for the host which is known by an address. `None` if it is behind NAT and was not heard.
    pub(super) fn way_to(&self, known_as: SocketAddr) -> Option<SocketAddr> {
        let unused = || self.tcp.by_name.get(&known_as).map(|end| end.local);
        self.tcp.used(known_as).or_else(|| self.ends.of(known_as)).or_else(unused)
    }

    /// Takes a datagram of a host, if it came by UDP, and that the host has just answered a ping, if it has.
    pub(super) fn note_udp(&mut self, sender: Sender, at: SocketAddr, now: Instant) {
        if let Sender::Proved(node) = sender
            && self.tcp.remote(at).is_none()
        {
            self.tcp.heard.insert(node, now);
            if self.book.last_heard(node) == Some(now) {
                self.tcp.note_answer(node, now);
                self.note_answer(node, at, now);
            }
        }
    }

    /// Handles a trial of UDP by a host that is known at `from`, and whose datagram came from `at`.
    pub(super) fn answer_try(
        &mut self,
        socket: &dyn Datagrams,
        packet: Packet,
        (node, from, at): (NodeId, SocketAddr, SocketAddr),
        now: Instant,
    ) {
        if self.tcp.remote(at).is_some() {
            return;
        }
        match packet {
            Packet::Try { nonce } => self.send_to_end(socket, (from, at), &Packet::Tried { nonce }),
            Packet::Tried { nonce } if self.tcp.tries.get(&node) == Some(&nonce) => {
                self.tcp.note_answer(node, now);
            }
            Packet::Tried { nonce } => self.note_tried(node, nonce, now),
            _ => {}
        }
    }

    /// Answers a host that is known by the first address, and whose datagram came from the second one: it may not be known yet that it is
    /// there.
    pub(super) fn reply(
        &mut self,
        socket: &dyn Datagrams,
        (known_as, at): (SocketAddr, SocketAddr),
        packet: &Packet,
    ) {
        self.send_to_end(socket, (known_as, self.tcp.used(known_as).unwrap_or(at)), packet);
    }

    /// Sends a packet to a host that is known by the first address to the second one.
    pub(super) fn send_to_end(
        &mut self,
        socket: &dyn Datagrams,
        (to, at): (SocketAddr, SocketAddr),
        packet: &Packet,
    ) {
        let receiver = self.book.live_at(to);
        let plain = packet.encode().map_err(io::Error::other);
        let sent =
            plain.and_then(|plain| self.send_sealed(socket, (to, at), (wire::version(), &plain), receiver));
        if let Err(error) = sent {
            debug!(%at, %error, "cannot send a packet");
        }
    }

    pub(in crate::gossip) fn set_tcp_ends(&mut self, ends: Vec<TcpEnd>) {
        self.tcp.set(ends);
    }

    pub(in crate::gossip) fn udp_answers(&self) -> BTreeMap<NodeId, Instant> {
        self.tcp.udp.clone()
    }

    pub(in crate::gossip) fn udp_heard(&self) -> BTreeMap<NodeId, Instant> {
        self.tcp.heard.clone()
    }
}

impl Hub {
    /// Tries whether UDP works to a host, with so many datagrams.
    pub(in crate::gossip) fn try_udp(&self, node: NodeId, copies: u32) {
        let mut state = self.lock();
        let (Some(to), Some(nonce)) = (state.book.address(node), state.book.nonce()) else { return };
        let Some(at) = state.ends.of(to) else { return };
        state.tcp.tries.insert(node, nonce);
        for _ in 0..copies {
            state.send_to_end(&*self.socket, (to, at), &Packet::Try { nonce });
        }
    }
}
