//! Hosts behind NAT: where they are, who introduces them to each other, and whether this host is one.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use ovl_proto::id::NodeId;
use ovl_proto::wire;
use tokio::time::Instant;
use tracing::debug;

use super::super::ends::{Heard, is_plausible};
use super::super::packet::{Answerer, Packet};
use super::super::seal::Sender;
use super::super::{GossipEvent, ProbeSigns, RelayProbe};
use super::{Hub, MAX_QUEUE, State};
use crate::transport::Datagrams;

/// The maximum number of questions for the own address that wait for an answer.
const MAX_ASKED: usize = 64;

impl Hub {
    /// Asks members to introduce this host and another one to each other, both of which are behind NAT.
    pub(in crate::gossip) fn seek(&self, node: NodeId) {
        let mut state = self.lock();
        for to in state.book.introducers(node, Instant::now()) {
            if let Err(error) = state.send(&*self.socket, to, &Packet::Seek { node }) {
                debug!(%to, %error, "cannot ask for an introduction");
            }
        }
    }

    /// Asks a host to join for the address at which it sees this host.
    pub(in crate::gossip) fn ask_where(&self, to: SocketAddr) {
        let mut state = self.lock();
        let Some(nonce) = state.book.nonce() else { return };
        if state.asked.len() >= MAX_ASKED {
            state.asked.clear();
        }
        state.asked.insert(nonce, to);
        if let Err(error) = state.send(&*self.socket, to, &Packet::WhereAmI { nonce }) {
            debug!(%to, %error, "cannot ask for the own address");
        }
    }

    /// Handles a packet about NAT, whose datagram came from `at`. Returns the reply.
    pub(super) fn answer_about_nat(
        &self,
        state: &mut State,
        packet: Packet,
        proved: Option<NodeId>,
        at: SocketAddr,
        now: Instant,
    ) -> Option<Packet> {
        match packet {
            Packet::Meet { node, at, relay_at } => {
                proved?;
                state.meet(&*self.socket, node, (at, relay_at), now);
                None
            }
            Packet::Seek { node } => {
                state.introduce_both(&*self.socket, (proved?, node), now);
                None
            }
            Packet::WhereAmI { nonce } => {
                if !state.strange_signatures.take(now) {
                    return None;
                }
                // Where only TCP arrives, a knock would not.
                let remote = state.tcp.remote(at);
                let knocks = state.knocks && remote.is_none();
                if knocks {
                    state.knock(nonce, at);
                    self.news.notify_one();
                }
                Some(Packet::SeenAt { nonce, at: remote.unwrap_or(at), knocks })
            }
            Packet::SeenAt { nonce, at: own, knocks } => {
                let is_asked = state.asked.get(&nonce).is_some_and(|asked| state.tcp.is(*asked, at));
                if is_asked {
                    state.tell(GossipEvent::Seen(own, knocks));
                    self.news.notify_one();
                }
                None
            }
            Packet::Knock { nonce } => {
                if state.asked.remove(&nonce).is_some() {
                    state.tell(GossipEvent::Knocked);
                    self.news.notify_one();
                }
                None
            }
            _ => None,
        }
    }
}

impl State {
    /// The address by which the sender of a datagram is known, which came from this one.
    pub(super) fn name_of(
        &mut self,
        socket: &dyn Datagrams,
        sender: Sender,
        at: SocketAddr,
        now: Instant,
    ) -> SocketAddr {
        if let Some(known_as) = self.tcp.known_as(at) {
            return known_as;
        }
        let Sender::Proved(node) = sender else { return at };
        if let Some(main) = self.ends.main_of(node) {
            return main;
        }
        let Some(name) = self.book.name(node) else { return at };
        match self.ends.heard(node, at, now) {
            Heard::There => {}
            Heard::Elsewhere => {
                for to in self.ends.of(name).into_iter().chain([at]) {
                    let Some(nonce) = self.book.nonce() else { break };
                    self.send_to_end(socket, (name, to), &Packet::Try { nonce });
                }
            }
            Heard::Moved => self.tell(GossipEvent::Moved(node)),
        }
        name
    }

    /// Queues an event for the daemon. It is lost if too many wait.
    pub(super) fn tell(&mut self, event: GossipEvent) {
        if self.queue.len() < MAX_QUEUE {
            self.queue.push_back(event);
        }
    }

    pub(in crate::gossip) fn set_knocks(&mut self, knocks: bool) {
        self.knocks = knocks;
    }

    /// Has a datagram sent to an address from another socket.
    pub(super) fn knock(&mut self, nonce: u64, at: SocketAddr) {
        let Some(datagram) = self.sealed(at, &Packet::Knock { nonce }, None) else { return };
        self.tell(GossipEvent::Knock { at, datagram });
    }

    /// Seals a packet that another socket than that of gossip sends.
    pub(super) fn sealed(
        &mut self,
        to: SocketAddr,
        packet: &Packet,
        receiver: Option<NodeId>,
    ) -> Option<Vec<u8>> {
        let plain = packet.encode().ok()?;
        let mut datagram = Vec::new();
        self.sealing.seal(to, (wire::version(), &plain), receiver, &mut datagram).ok()?;
        Some(datagram)
    }

    /// Tells two hosts behind NAT where the other one is seen, if one looks for the other.
    pub(super) fn introduce_both(
        &mut self,
        socket: &dyn Datagrams,
        (one, other): (NodeId, NodeId),
        now: Instant,
    ) {
        let of = |state: &Self, host: NodeId| {
            let name = state.book.name(host)?;
            Some((name, state.ends.of(name)?, state.relay_ends.get(&host).copied()))
        };
        let (Some(first), Some(second)) = (of(self, one), of(self, other)) else { return };
        if !self.meetings.take(now) {
            return;
        }
        for (to, node, (_, at, relay_at)) in [(first.0, other, second), (second.0, one, first)] {
            if let Err(error) = self.send(socket, to, &Packet::Meet { node, at, relay_at }) {
                debug!(%to, %error, "cannot introduce a host");
            }
        }
    }

    /// Pings a host behind NAT where a member sees it, and in its own network, which may be that of this host.
    pub(super) fn meet(
        &mut self,
        socket: &dyn Datagrams,
        node: NodeId,
        (at, relay_at): (SocketAddr, Option<SocketAddr>),
        now: Instant,
    ) {
        if !self.meetings.take(now) {
            return;
        }
        if let Some(relay_at) = relay_at.filter(|at| is_plausible(*at) && self.book.address(node).is_some()) {
            self.suggested.insert(node, relay_at);
        }
        let Some((nonce, inside)) = self.book.meet(node, now) else { return };
        for to in [Some(at), inside].into_iter().flatten().filter(|to| is_plausible(*to)) {
            if let Err(error) = self.send(socket, to, &Packet::Ping { nonce }) {
                debug!(%to, %error, "cannot ping a host behind NAT");
            }
        }
    }

    pub(in crate::gossip) fn end(&self, known_as: SocketAddr) -> Option<SocketAddr> {
        self.ends.of(known_as).or_else(|| self.tcp.seen_as(known_as))
    }

    pub(in crate::gossip) fn set_relay_ends(&mut self, ends: BTreeMap<NodeId, SocketAddr>) {
        self.relay_ends = ends;
    }

    pub(in crate::gossip) fn suggested_relay_end(&self, host: NodeId) -> Option<SocketAddr> {
        self.suggested.get(&host).copied()
    }

    pub(in crate::gossip) fn relay_probe(&mut self, to: NodeId, signs: ProbeSigns) -> Option<Vec<u8>> {
        let address = self.book.address(to)?;
        let probe = match signs {
            ProbeSigns { heard, needs: true } => Packet::RelayProbe { heard },
            ProbeSigns { heard, needs: false } => Packet::RelayFollow { heard },
        };
        self.sealed(address, &probe, Some(to))
    }

    pub(in crate::gossip) fn open_relay_probe(
        &mut self,
        datagram: &mut [u8],
        from: SocketAddr,
        now: Instant,
    ) -> Option<RelayProbe> {
        let (run, plain) = self.opener.open(datagram).ok()?;
        let Sender::Proved(node) = self.opener.sender(&run) else { return None };
        match Packet::decode(plain).ok()? {
            Packet::RelayProbe { heard } => Some(RelayProbe::Heard(node, ProbeSigns { heard, needs: true })),
            Packet::RelayFollow { heard } => {
                Some(RelayProbe::Heard(node, ProbeSigns { heard, needs: false }))
            }
            Packet::Check { nonce, by: Answerer::SamePort } if self.checks.take(now) => {
                let address = self.book.address(node)?;
                self.sealed(address, &Packet::Checked { nonce, at: from }, Some(node)).map(RelayProbe::Answer)
            }
            _ => None,
        }
    }
}
