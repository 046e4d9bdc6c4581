//! Probes between the sockets of relayed datagrams, for pairs of hosts of which one is behind NAT, or not reached at its main address:
//! see [`crate::reach`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use ovl_cluster::view::Node as Host;
use ovl_control::PeerState;
use ovl_mesh::gossip::{ProbeSigns, RelayProbe};
use ovl_proto::id::NodeId;
use ovl_relay::Relay;
use tokio::time::Instant;

use super::Node;
use super::state::State;
use ovl_subsystems::Change;

/// The interval of probes, at least. It follows that of pings.
const EVERY: Duration = Duration::from_millis(500);

/// How long no probes have passed both ways when members are asked to introduce the two hosts.
const LOST: Duration = Duration::from_millis(1500);
/// How often they are asked in vain before it is done seldom, and how often it is done then.
const EAGER: u32 = 10;
const SELDOM: Duration = Duration::from_secs(10);

/// A probe that is due.
struct Probe {
    peer: NodeId,
    signs: ProbeSigns,
    /// Where it may be.
    to: BTreeSet<SocketAddr>,
}

/// When pairs were last probed, and introduced.
#[derive(Debug, Default)]
pub(super) struct Probing {
    last: Option<Instant>,
    sought: BTreeMap<NodeId, (u32, Instant)>,
}

impl Probing {
    /// Of the hosts to which no path is known, those to which members are asked to introduce this host now.
    fn seek(&mut self, lost: &[NodeId], now: Instant) -> Vec<NodeId> {
        self.sought.retain(|peer, _| lost.contains(peer));
        let mut due = Vec::new();
        for peer in lost {
            let (times, last) = self.sought.entry(*peer).or_insert((0, now));
            if *times < EAGER || now.saturating_duration_since(*last) >= SELDOM {
                (*times, *last) = (times.saturating_add(1), now);
                due.push(*peer);
            }
        }
        due
    }
}

impl Node {
    /// Sends the probes that are due.
    pub(super) fn send_relay_probes(&self, relay: &Relay, probing: &mut Probing) {
        let now = Instant::now();
        let every = EVERY.max(self.gossip().ping_every() * 4 / 5);
        // The loop that calls this is not exact.
        let is_due =
            probing.last.is_none_or(|last| now.saturating_duration_since(last) + EVERY / 10 >= every);
        let (due, sought) = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let pairs: BTreeSet<NodeId> = framed_pairs(state).map(|node| node.record.id).collect();
            state.reach.set_wanted(&pairs, now);
            if !is_due || pairs.is_empty() {
                return;
            }
            let locals: BTreeSet<SocketAddr> = state.tcp.all_relayed().map(|(_, local)| local).collect();
            let to = |node: &Host| {
                let id = node.record.id;
                let known = state.reach.at(id).filter(|_| state.reach.is_heard(id, now));
                // Where it was heard by TCP says nothing of UDP.
                let known = state.tcp.relayed(id).or(known.filter(|at| !locals.contains(at)));
                let fixed = dialled_relay_end(state, node);
                let to: BTreeSet<SocketAddr> = match known.or(fixed) {
                    Some(at) => [at].into(),
                    // Where members see it, and in its own network, which may be that of this host.
                    None => self.gossip().suggested_relay_end(id).into_iter().chain(relay_at(node)).collect(),
                };
                let needs = state.view.crosses_nat(node)
                    || state.view.has_other_family(node)
                    || state.reach.elsewhere(id).is_some();
                Probe { peer: id, signs: ProbeSigns { heard: state.reach.is_heard(id, now), needs }, to }
            };
            let due: Vec<Probe> = framed_pairs(state).map(to).collect();
            let hidden = framed_pairs(state).filter(|node| are_hidden(state, node));
            let is_lost =
                |peer: &NodeId| state.reach.silence(*peer, now, true).is_none_or(|silence| silence > LOST);
            let lost: Vec<NodeId> = hidden.map(|node| node.record.id).filter(is_lost).collect();
            (due, probing.seek(&lost, now))
        };
        probing.last = Some(now);
        for peer in sought {
            self.gossip().seek(peer);
        }
        for Probe { peer, signs, to } in due {
            let Some(probe) = self.gossip().relay_probe(peer, signs) else { continue };
            for at in to {
                relay.probe(peer.0, at, &probe);
            }
        }
        let ends = {
            let state = self.state.borrow();
            let mut ends = state.reach.all();
            ends.retain(|_, at| state.tcp.all_relayed().all(|(_, local)| local != *at));
            ends
        };
        self.gossip().set_relay_ends(ends);
    }

    /// Takes what arrived as a probe.
    pub(super) fn take_relay_probe(&self, from: SocketAddr, mut datagram: Vec<u8>) {
        let (peer, signs) = match self.gossip().open_relay_probe(&mut datagram, from) {
            Some(RelayProbe::Heard(peer, signs)) => (peer, signs),
            Some(RelayProbe::Answer(answer)) => {
                return self.relay.get().into_iter().for_each(|relay| relay.knock(from, &answer));
            }
            None => return,
        };
        let now = Instant::now();
        if signs.needs {
            self.note_needed(peer, now);
        }
        let mut state = self.state.borrow_mut();
        let is_pair = framed_pairs(&state).any(|node| node.record.id == peer);
        if is_pair && state.reach.heard(peer, from, signs.heard, now) {
            // Datagrams to it go there at once.
            self.detour_turn.notify_one();
        }
    }

    /// Takes that a peer needs a path through the sockets of relayed datagrams.
    fn note_needed(&self, peer: NodeId, now: Instant) {
        let is_new = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let has_several = |node: &Host| !node.record.further.is_empty();
            let own_has = state.view.own().is_some_and(has_several);
            let is_possible = |node: &&Host| !state.view.crosses_nat(node) && (own_has || has_several(node));
            let known = live_members(state).filter(|node| node.record.id == peer).find(is_possible);
            let is_new = known.map(|_| !state.view.elsewhere.contains(&peer));
            if is_new.is_some() {
                state.reach.needed(peer, now);
            }
            is_new == Some(true)
        };
        if is_new {
            self.note_elsewhere();
        }
    }

    /// Takes that a host is at another address now.
    pub(super) fn note_moved(&self, host: NodeId) {
        {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let crosses_nat = state.view.nodes.get(&host).is_some_and(|node| state.view.crosses_nat(node));
            // Where the sockets of hosts behind NAT are is found out for each socket alone.
            if !crosses_nat {
                state.reach.moved(host);
            }
        }
        self.note_elsewhere();
        self.links().moved(host);
        self.detour_turn.notify_one();
    }

    /// Records that a host is reached at another address now, or at its main one again.
    fn tell_elsewhere(&self, host: NodeId) {
        let (name, message) = {
            let state = self.state.borrow();
            let message = match (state.reach.elsewhere(host), state.view.elsewhere.contains(&host)) {
                (Some(at), _) => format!("it is reached at {at} now"),
                (None, true) => "it reaches this host at another address now".to_owned(),
                (None, false) => "it is reached at its main address again".to_owned(),
            };
            (state.view.name_of(host), message)
        };
        self.event("peer", &name, &message);
    }

    /// Takes which hosts are reached at another address than the main one.
    pub(super) fn note_elsewhere(&self) {
        let used = self.gossip().elsewhere();
        let changed = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let ends =
                used.iter().filter_map(|(id, at)| Some((state.view.nodes.get(id)?.record.address, *at)));
            self.links().set_ends(ends.collect());
            state.reach.set_elsewhere(used);
            let all = state.reach.all_elsewhere(Instant::now());
            let changed = state.view.set_elsewhere(all);
            for id in &changed {
                state.changed(Change::Host(*id));
                self.work.notify_one();
            }
            changed
        };
        for id in changed {
            self.tell_elsewhere(id);
            self.renew_path_mtu(id);
            self.detour_turn.notify_one();
        }
    }
}

/// The live peers to which all is sealed and goes through the sockets of relayed datagrams.
pub(super) fn framed_pairs(state: &State) -> impl Iterator<Item = &Host> {
    let others = live_members(state).filter(|node| node.record.id != state.view.me);
    others.filter(|node| state.view.is_framed(node) && !state.view.is_apart(node))
}

/// Whether both this host and that one are behind NAT, so that neither can send to the other before they are introduced.
pub(super) fn are_hidden(state: &State, node: &Host) -> bool {
    node.record.is_behind_nat() && state.record().is_some_and(|own| own.is_behind_nat())
}

/// The members that are alive, this host among them.
pub(super) fn live_members(state: &State) -> impl Iterator<Item = &Host> {
    let members = &state.view.alloc.members;
    let nodes = state.view.nodes.values();
    nodes.filter(|node| node.state == PeerState::Alive && members.contains(&node.record.id))
}

/// The socket of relayed datagrams of a host, at the address at which it is dialled from here. `None` if it has none, or is behind NAT.
pub(super) fn dialled_relay_end(state: &State, node: &Host) -> Option<SocketAddr> {
    let at = relay_at(node).filter(|_| !node.record.is_behind_nat())?;
    Some(SocketAddr::new(state.reach.elsewhere(node.record.id).unwrap_or(at.ip()), at.port()))
}

/// The socket of relayed datagrams of a host, in its own network. `None` if it has none.
pub(super) fn relay_at(node: &Host) -> Option<SocketAddr> {
    (node.record.relay_port != 0).then(|| SocketAddr::new(node.record.vtep, node.record.relay_port))
}
