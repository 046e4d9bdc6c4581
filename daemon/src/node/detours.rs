//! Opens detours to hosts that are not reached directly, as [`crate::detours`] decides, and relays for others.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use ovl_control::{PeerState, RelayCounters};
use ovl_mesh::streams::Ways;
use ovl_mesh::transport::SOCKET_MARK;
use ovl_proto::id::{ClusterKeyId, NodeId};
use ovl_proto::table::{Entry, Key};
use ovl_relay::{Channel, HostId, Relay, RelayConfig, RelayKey};
use ovl_subsystems::Change;
use ovl_subsystems::encryption::tunnel;
use ovl_subsystems::local::epochs;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::Node;
use super::reach::{Probing, are_hidden, dialled_relay_end, framed_pairs, live_members, relay_at};
use super::state::State;
use crate::detours::{Evidence, Turn};
use crate::links::Links;
use crate::problems::Code;

/// Interval of the decisions while a peer may need a detour, or has one.
const EVERY: Duration = Duration::from_millis(200);
/// Interval at which the next hops are looked at otherwise: for which hosts this one relays.
const SELDOM: Duration = Duration::from_secs(2);
/// Time since an answer was last passed on to this host, after which no peer needs a detour.
const CALM: Duration = Duration::from_secs(10);
/// Number of hosts that may wait for an answer through a relay.
const INBOX: usize = 64;
/// Interval of the attempts to open the port.
const AGAIN: Duration = Duration::from_secs(5);
/// Number of probes that may wait.
const PROBES: usize = 256;

/// A host that sends through another one, and where that is.
type Sender = (HostId, SocketAddr);
/// Where a probe came from, and the probe.
type Received = (SocketAddr, Vec<u8>);

impl Node {
    /// Relays, and opens detours, forever.
    pub(super) async fn detour_loop(self: Rc<Self>) {
        if self.config.relay_port == 0 {
            return std::future::pending().await;
        }
        let (tell, mut asked) = mpsc::channel(INBOX);
        let (tell_probe, mut probes) = mpsc::channel(PROBES);
        // A simulated host has no sockets, but its streams and signs of life go through members as well.
        let relay = match self.environment.owns_host() {
            true => Some(self.open_relay(tell, tell_probe).await),
            false => None,
        };
        let (mut known, mut probing) = (Known::default(), Probing::default());
        loop {
            self.note_elsewhere();
            if let Some(relay) = relay {
                self.send_relay_probes(relay, &mut probing);
            }
            self.turn_ways(relay, &mut known).await;
            let pause = if self.is_calm() { SELDOM } else { EVERY };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.detour_turn.notified() => {}
                Some((from, sender)) = asked.recv() => self.answer_through(NodeId(from), sender),
                Some((from, datagram)) = probes.recv() => self.take_relay_probe(from, datagram),
            }
        }
    }

    /// Opens the port of relayed datagrams. Waits until it is free.
    async fn open_relay(&self, tell: mpsc::Sender<Sender>, tell_probe: mpsc::Sender<Received>) -> &Relay {
        let relay = loop {
            let listen = SocketAddr::new(self.config.advertise.ip(), self.config.relay_port);
            let also = self.listen_also.get();
            let listen_also = also.map(|also| SocketAddr::new(also.ip(), self.config.relay_port));
            let (me, forwards) = (self.state.borrow().view.me.0, self.config.relay.is_on());
            let limit = self.config.relay.limit();
            let config = RelayConfig { listen, listen_also, mark: SOCKET_MARK, me, forwards, limit };
            let (tell, tell_probe) = (tell.clone(), tell_probe.clone());
            let heard = move |from, sender| {
                // One that is not told of now is named again.
                let _ = tell.try_send((from, sender));
            };
            let probed = move |from, payload: &[u8]| {
                // The next one is as good.
                let _ = tell_probe.try_send((from, payload.to_vec()));
            };
            match Relay::start(&config, heard, probed) {
                Ok(relay) => break relay,
                Err(error) => {
                    let sentence = format!(
                        "UDP port {} cannot be opened: {error}. No host is reached through this one, nor this one through \
                         others. Stop the program that has the port, or set relay_port",
                        config.listen.port()
                    );
                    self.state.borrow_mut().problems.set(Code::RelayPort, "", Some(sentence));
                    tokio::time::sleep(AGAIN).await;
                }
            }
        };
        self.state.borrow_mut().problems.set(Code::RelayPort, "", None);
        self.relay.get_or_init(|| relay)
    }

    /// What this host has relayed. `None` if it takes no part.
    pub(super) fn relayed(&self) -> Option<RelayCounters> {
        let counters = self.relay.get()?.counters();
        Some(RelayCounters {
            sent: counters.sent,
            received: counters.received,
            forwarded: counters.forwarded,
            dropped_unauthenticated: counters.unauthenticated,
            dropped_no_path: counters.no_path,
            dropped_limited: counters.limited,
            dropped_full: counters.full,
            streams: u32::try_from(self.links().passed_on()).unwrap_or(u32::MAX),
        })
    }

    /// Whether all peers were reached directly lately.
    fn is_calm(&self) -> bool {
        let state = self.state.borrow();
        state.detours.is_empty()
            && !state.record().is_some_and(|own| own.is_behind_nat())
            && framed_pairs(&state).next().is_none()
            && state.reach.lingering().next().is_none()
            && state.tcp.is_empty()
            && state.detours.lingering(Instant::now()).next().is_none()
            && self.gossip().last_relayed().is_none_or(|at| at.elapsed() > CALM)
    }

    /// Wakes the loop if a member has just passed on the answer of a peer. Called several times a second.
    pub(super) fn wake_detours(&self) {
        if self.gossip().last_relayed().is_some_and(|at| at.elapsed() < EVERY * 2) {
            self.detour_turn.notify_one();
        }
    }

    /// Notes that a peer sends through the host at this address.
    fn answer_through(&self, peer: NodeId, sender: SocketAddr) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        if !state.view.alloc.members.contains(&peer) {
            return;
        }
        let is_at = |node: &&ovl_cluster::view::Node| relay_end(state, node) == Some(sender);
        let by_tcp = state.tcp.all_relayed().find(|(_, local)| *local == sender).map(|(id, _)| id);
        let relay = by_tcp.or_else(|| state.view.nodes.values().find(is_at).map(|node| node.record.id));
        let Some(relay) = relay else { return };
        if relay == peer {
            // The kernel's WireGuard sends to where the last datagram came from, so it may not have left the detour.
            state.detours.linger(peer, Instant::now());
            self.detour_turn.notify_one();
            return;
        }
        let Some(turn) = state.detours.asked(peer, relay, Instant::now()) else { return };
        self.tell_turn(state, peer, turn);
        drop(guard);
        self.renew_path_mtu(peer);
    }

    /// Decides about all peers, and carries it out.
    async fn turn_ways(&self, relay: Option<&Relay>, known: &mut Known) {
        // It is another one after the host has another address.
        self.gossip().set_knocks(true);
        let (wanted, turned, hops, ways, silent) = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let (now, patience) = (Instant::now(), self.gossip().patience());
            let evidence = self.evidence(state, now);
            let relays = live_members(state).filter(|node| is_relay(node)).map(|node| node.record.id);
            let relays: BTreeSet<NodeId> = relays.filter(|id| *id != state.view.me).collect();
            let is_silent = |(_, peer): &(&NodeId, &Evidence)| peer.is_silent(patience);
            let silent: Vec<NodeId> = evidence.iter().filter(is_silent).map(|(id, _)| *id).collect();
            let links = links(state, silent.iter().copied());
            let paths = links.paths(state.view.me, |id| self.gossip().rtt(id).unwrap_or(Duration::MAX));
            let turns = state.detours.decide(&evidence, &relays, (&links, &paths), patience, now);
            for &(peer, turn) in &turns {
                self.tell_turn(state, peer, turn);
            }
            if let Some(relay) = relay {
                known.tell(relay, state);
            }
            let through = |(peer, relay)| Some((peer, state.view.nodes.get(&relay)?.record.address));
            let borrowed = self.hidden_from_each_other(state, &relays);
            let ways = Ways {
                relays: self.config.relay.is_on(),
                through: borrowed.into_iter().chain(state.detours.all()).filter_map(through).collect(),
            };
            (wanted_sockets(state, now), turns, state.detours.all().collect(), ways, silent)
        };
        if known.ways != ways {
            self.gossip().set_hops(hops);
            self.links().set_ways(ways.clone());
            known.ways = ways;
        }
        self.publish_unreached(&silent);
        for (peer, _) in turned {
            self.renew_path_mtu(peer);
        }
        let before = std::mem::take(&mut known.open);
        for (&(peer, channel), &wireguard) in &wanted {
            let Some(relay) = relay else { break };
            match relay.open_detour(peer.0, channel, wireguard) {
                Ok(local) => {
                    known.open.insert((peer, channel), local);
                }
                Err(error) => tracing::warn!(%peer, %error, "cannot open the detour to a host"),
            }
        }
        {
            let mut state = self.state.borrow_mut();
            let is_used = |peer: NodeId| {
                let is_framed = |node| state.view.is_framed(node);
                state.detours.relay(peer).is_some()
                    || state.tcp.is_used(peer)
                    || state.view.nodes.get(&peer).is_some_and(is_framed)
            };
            let open = known.open.iter().filter(|((peer, _), _)| is_used(*peer));
            let open = open.map(|((peer, channel), at)| ((*peer, *channel == 1), *at)).collect();
            if !state.local.detours.replace(open).is_empty() {
                state.changed(Change::Tunnel);
                self.work.notify_one();
            }
        }
        // WireGuard does not send to them any more: they ended a while ago.
        for (peer, channel) in before.into_keys().filter(|key| !known.open.contains_key(key)) {
            if let Some(relay) = relay {
                relay.close_detour(peer.0, channel);
            }
        }
    }

    /// Tells all hosts which ones this one does not reach directly. While any live host is not reached by another one, those count as
    /// well that may be dead, or others would take this host for a way to them.
    fn publish_unreached(&self, silent: &[NodeId]) {
        let (set, unset) = {
            let state = self.state.borrow();
            let Some(own) = state.view.own() else { return };
            let known: BTreeSet<NodeId> = own.table.unreached().collect();
            let mut wanted: BTreeSet<NodeId> = state.detours.unreached().collect();
            let alive: BTreeSet<NodeId> = live_members(&state).map(|node| node.record.id).collect();
            let mut others = live_members(&state).filter(|node| node.record.id != state.view.me);
            if !wanted.is_empty() || others.any(|node| node.table.unreached().any(|id| alive.contains(&id))) {
                let is_dead = |node: &&ovl_cluster::view::Node| node.state == PeerState::Dead;
                let members = &state.view.alloc.members;
                let dead = state.view.nodes.values().filter(is_dead).map(|node| node.record.id);
                wanted.extend(dead.filter(|id| members.contains(id)).chain(silent.iter().copied()));
            }
            let set: Vec<Entry> = wanted.difference(&known).copied().map(Entry::Unreached).collect();
            let unset: Vec<Key> = known.difference(&wanted).copied().map(Key::Unreached).collect();
            (set, unset)
        };
        if !set.is_empty() || !unset.is_empty() {
            self.write_table(set, unset);
        }
    }

    /// What gossip knows of the way to each live peer.
    fn evidence(&self, state: &State, now: Instant) -> BTreeMap<NodeId, Evidence> {
        let (gossip, tunnel) = (self.gossip(), self.tunnel.borrow());
        let since = |at: Instant| now.saturating_duration_since(at);
        live_members(state)
            .filter(|node| node.record.id != state.view.me)
            .map(|node| {
                let id = node.record.id;
                // What both exchange goes another way than gossip if it is framed, through the sockets of relayed datagrams.
                let is_framed = state.view.is_framed(node);
                let heard = match is_framed && self.relay.get().is_some() {
                    true if state.view.is_apart(node) => None,
                    true => state.reach.silence(id, now, are_hidden(state, node)),
                    false => gossip.last_heard(id).map(since),
                };
                let through = gossip.last_through(id).map(|(by, at)| (by, since(at)));
                // Its answers need not be passed on to show that it is there.
                let answers = || gossip.last_heard(id).map(|at| (id, since(at)));
                let through = if is_framed { through.or_else(answers) } else { through };
                (id, Evidence { heard, through, lost: tunnel.is_lost(id) })
            })
            .collect()
    }

    /// The member through which this host opens streams to each host that it cannot dial: both are behind NAT, or have no address family
    /// in common.
    fn hidden_from_each_other(&self, state: &State, relays: &BTreeSet<NodeId>) -> Vec<(NodeId, NodeId)> {
        let is_hidden =
            |node: &&ovl_cluster::view::Node| are_hidden(state, node) || state.view.is_apart(node);
        // One that is yet to be admitted needs the answers of members.
        let others = state.view.nodes.values().filter(|node| node.record.id != state.view.me);
        let mut hidden = others.filter(is_hidden).map(|node| node.record.id).peekable();
        if hidden.peek().is_none() {
            return Vec::new();
        }
        let is_dialled = |id: &&NodeId| {
            let node = state.view.nodes.get(id).filter(|node| !node.record.is_behind_nat());
            node.is_some_and(|node| !state.view.is_apart(node)) && state.detours.relay(**id).is_none()
        };
        let near = |id: &&NodeId| (self.gossip().rtt(**id).unwrap_or(Duration::MAX), **id);
        let Some(relay) = relays.iter().filter(is_dialled).min_by_key(near).copied() else {
            return Vec::new();
        };
        hidden.map(|hidden| (hidden, relay)).collect()
    }

    fn tell_turn(&self, state: &State, peer: NodeId, turn: Turn) {
        let name = state.view.name_of(peer);
        let message = match turn {
            Turn::Through(relay) => {
                format!("it does not answer directly, so it is reached through {}", state.view.name_of(relay))
            }
            Turn::Direct => "it is reached directly again".to_owned(),
            Turn::Nowhere => "it does not answer directly, and no member leads to it".to_owned(),
        };
        self.event("peer", &name, &message);
    }
}

/// What the relay was last told.
#[derive(Default)]
struct Known {
    next: HashMap<HostId, SocketAddr>,
    keys: Vec<ClusterKeyId>,
    open: BTreeMap<(NodeId, Channel), SocketAddr>,
    ways: Ways,
}

impl Known {
    /// Tells the relay the next hops and the cluster keys, if they have changed.
    fn tell(&mut self, relay: &Relay, state: &State) {
        let next = next_hops(state);
        if self.next != next {
            relay.set_next(next.clone());
            self.next = next;
        }
        let ring = state.keys.ring();
        let ids: Vec<ClusterKeyId> = ring.all().map(|key| key.id()).collect();
        if self.keys != ids {
            let key = |key: &ovl_mesh::keys::ClusterKey| {
                RelayKey::new(key.id().0, &key.derive(b"", b"ovl relay v1"))
            };
            relay.set_keys(ring.all().map(key).collect());
            self.keys = ids;
        }
    }
}

/// Where the socket of relayed datagrams of a host is reached. `None` if it has none, or is behind NAT and was not heard.
fn relay_end(state: &State, node: &ovl_cluster::view::Node) -> Option<SocketAddr> {
    relay_at(node)?;
    let id = node.record.id;
    if let Some(local) = state.tcp.relayed(id) {
        return Some(local);
    }
    if node.record.is_behind_nat() {
        return state.reach.at(id);
    }
    // One that this host reaches at its main address may need another one.
    let is_elsewhere = state.view.is_framed(node) && !state.view.crosses_nat(node);
    let is_heard = is_elsewhere && state.reach.is_heard(id, Instant::now());
    let is_by_udp = |at: &SocketAddr| state.tcp.all_relayed().all(|(_, local)| local != *at);
    let heard_at = state.reach.at(id).filter(|_| is_heard).filter(is_by_udp);
    heard_at.or_else(|| dialled_relay_end(state, node))
}

/// Whether a host passes on what others send each other. One behind NAT does not: others could not dial it for their streams.
fn is_relay(node: &ovl_cluster::view::Node) -> bool {
    node.record.relays && relay_at(node).is_some() && !node.record.is_behind_nat()
}

/// The links between live members, of which this host knows itself that these do not answer.
fn links(state: &State, silent: impl Iterator<Item = NodeId>) -> Links {
    let members = live_members(state).map(|node| (node.record.id, is_relay(node)));
    let said = live_members(state).flat_map(|node| node.table.unreached().map(|peer| (node.record.id, peer)));
    // Hosts of one family only do not reach those of the other one.
    let only = |ipv4: bool| {
        let single = live_members(state).filter(move |node| !node.record.has_family(!ipv4));
        single.map(|node| node.record.id).collect::<Vec<NodeId>>()
    };
    let (v4, v6) = (only(true), only(false));
    let apart = v4.iter().flat_map(|one| v6.iter().map(move |other| (*one, *other)));
    Links::new(members, said.chain(silent.map(|peer| (state.view.me, peer))).chain(apart))
}

/// The next hop to each member: the member that relays, or the host itself.
fn next_hops(state: &State) -> HashMap<HostId, SocketAddr> {
    let nodes = &state.view.nodes;
    let members = state.view.alloc.members.iter().filter(|id| **id != state.view.me);
    members
        .filter_map(|id| {
            let hop = state.detours.relay(*id).unwrap_or(*id);
            Some((id.0, relay_end(state, nodes.get(&hop)?)?))
        })
        .collect()
}

/// The detours that are to be open, each with the local WireGuard interface that uses it: also those that have just ended.
fn wanted_sockets(state: &State, now: Instant) -> BTreeMap<(NodeId, Channel), SocketAddr> {
    let Some((own, ours)) = tunnel::own(&state.view).filter(|_| tunnel::is_wanted(&state.view)) else {
        return BTreeMap::new();
    };
    let routes = tunnel::peer_routes(&state.view, &state.local.key_epochs);
    let mut wanted = BTreeMap::new();
    let in_use = state.detours.all().map(|(peer, _)| peer);
    let framed = framed_pairs(state).map(|node| node.record.id);
    let by_tcp = state.tcp.all_relayed().map(|(peer, _)| peer);
    for peer in
        in_use.chain(framed).chain(state.reach.lingering()).chain(by_tcp).chain(state.detours.lingering(now))
    {
        for (_, _, port) in routes.get(&peer).into_iter().flat_map(|route| route.interfaces()) {
            let odd = port & 1;
            let local = if ours.port & 1 == odd { ours.port } else { epochs::other_port(ours.port) };
            let channel = Channel::from(odd == 1);
            wanted.insert((peer, channel), SocketAddr::new(own.record.vtep, local));
        }
    }
    wanted
}
