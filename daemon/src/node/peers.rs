//! Peers: handles events of gossip and streams, and judges the liveness of each peer.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use ovl_cluster::liveness;
use ovl_cluster::view;
use ovl_control::PeerState;
use ovl_mesh::gossip::{GossipEvent, Hints};
use ovl_mesh::keys::{RecordError, open_record};
use ovl_mesh::streams::StreamEvent;
use ovl_proto::alloc::{AllocMessage, Change};
use ovl_proto::id::{ClusterKeyId, NodeId};
use ovl_proto::record::{NodeRecord, Presence, SignedRecord};
use ovl_proto::sync::Message;
use ovl_proto::table::{Entry, Key};
use tokio::time::Instant;

use super::asking::Topic;
use super::state::State;
use super::{Node, Stop, newer};
use crate::peers::Peer;
use crate::problems::Code;
use ovl_subsystems::Change as What;
use ovl_subsystems::mtu::vxlan_overhead;

/// Time without a direct packet after which a peer that gossip considers alive is reported as unreachable.
pub(super) const UNREACHABLE: Duration = Duration::from_secs(5);

/// Any IPv6 address, for the length of its header.
const V6: IpAddr = IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED);

/// Time in milliseconds after which a host is dropped that is neither a member nor alive.
const NEVER_ADMITTED_MS: u64 = 10 * 60 * 1000;
/// The maximum number of known hosts that are not members. The one that became known first is dropped.
const MAX_UNKNOWN: usize = 64;
/// The same while this host is not a member: it does not know who is one.
const MAX_HOSTS: usize = 4096;

impl Node {
    /// Handles an event of gossip.
    pub(super) fn on_gossip(self: &Rc<Self>, event: GossipEvent) {
        match event {
            GossipEvent::Peer { record, signed, hints, alive } => {
                let id = record.id;
                self.take_record(record, signed);
                self.take_signs(id, hints, alive);
            }
            GossipEvent::Announced { record, signed } => self.take_record(record, signed),
            GossipEvent::NotUnderstood { head, signed, why } => self.take_unread_record(*head, signed, why),
            GossipEvent::Gone(node) => {
                self.set_gossip_alive(node, false);
            }
            GossipEvent::Moved(node) => self.note_moved(node),
            GossipEvent::Seen(at, knocks) => self.note_seen(Some((at, knocks))),
            GossipEvent::Knocked => self.note_seen(None),
            GossipEvent::Knock { at, datagram } => {
                if let Some(relay) = self.relay.get() {
                    relay.knock(at, &datagram);
                }
            }
            GossipEvent::PathMtu { node, mtu } => self.note_path_mtu(node, mtu),
            GossipEvent::Clash { node, addresses, generations } => {
                self.on_clash(node, addresses, generations)
            }
        }
    }

    /// Handles a clash: two daemons run with one identity because a state directory was copied. The problem
    /// names both, and the daemon that was started later stops.
    fn on_clash(self: &Rc<Self>, node: NodeId, addresses: [SocketAddr; 2], generations: [u64; 2]) {
        let [(first, began), (second, later)] = {
            let mut both = [(addresses[0], generations[0]), (addresses[1], generations[1])];
            both.sort_by_key(|(_, generation)| *generation);
            both
        };
        let sentence = format!(
            "two hosts run with the identity {node}: at {first}, and since later at {second}. A state directory was \
             copied: on the second one stop ovld, remove its state directory, and start it again"
        );
        let mut state = self.state.borrow_mut();
        let now = state.now();
        state.problems.set(Code::IdentityClash, node.to_string(), Some(sentence));
        state.clashes.note(node, later, now);
        let own = state.record().map(|record| record.address);
        let mine = node == state.view.me && began != later;
        drop(state);
        if mine && own == Some(second) {
            // The ids in gossip are not signed, so any host with the cluster key could forge one.
            let node = Rc::clone(self);
            let proof = self.links().is_us(first);
            tokio::task::spawn_local(async move {
                if proof.await {
                    node.stop.set(Some(Stop::Aside));
                    node.stopping.notify_one();
                }
            });
        } else if mine && own == Some(first) {
            // Peers use the record with the highest generation, which is that of the copy until now.
            self.renew_generation(later);
        }
    }

    /// Clears clashes that are over. If one was about this host, its record needs a generation above that of
    /// the copy.
    pub(super) fn end_clashes(&self) {
        let ended: Vec<(NodeId, u64)> = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let now = state.now();
            let ended = state.clashes.end(now);
            for (node, _) in &ended {
                state.problems.set(Code::IdentityClash, node.to_string(), None);
            }
            ended
        };
        for (node, later) in ended {
            if node == self.identity.id() {
                self.renew_generation(later);
            }
        }
    }

    /// Handles an event of the streams.
    pub(super) fn on_link(self: &Rc<Self>, event: StreamEvent) {
        match event {
            StreamEvent::Up(peer) => self.greet(peer),
            StreamEvent::Down(peer) => tracing::debug!(%peer, "stream down"),
            StreamEvent::Record { record, signed } => {
                let (peer, generation) = (record.id, record.generation);
                // A host behind NAT has lent that connection.
                if !self.state.borrow().reach.is_behind_nat() {
                    self.note_dialled(true);
                }
                self.take_record(record, signed);
                self.note_proved(peer);
                self.links().met(peer, generation);
                // The peer has just connected to this host, so it can be reached again.
                self.links().kick(peer);
            }
            StreamEvent::Message { from, key, message } => self.on_message(from, key, message),
            StreamEvent::NotUnderstood { from, what } => self.ignore_message(from, what),
            StreamEvent::Datagrams(stream) => self.accept_datagram_stream(*stream),
        }
    }

    fn on_message(self: &Rc<Self>, from: NodeId, key: ClusterKeyId, message: Message) {
        if !self.may_say(from, key, &message) {
            tracing::debug!(%from, "not from a member: passed over");
            return;
        }
        match message {
            Message::Record(signed) => match open_record(&signed) {
                Ok(record) => self.take_record(record, signed),
                Err(RecordError::NotUnderstood { head, why }) => self.take_unread_record(*head, signed, why),
                Err(error) => tracing::warn!(%from, %error, "refused a record"),
            },
            Message::Table(update) => self.receive_table(from, update),
            Message::TablePull(owner) => self.send_table(from, owner),
            Message::TableUnknown(owner) => tracing::debug!(%from, %owner, "has not that table either"),
            Message::Objects(objects) => self.take_objects(from, objects),
            Message::ObjectParts(parts) => self.send_index(from, &parts),
            Message::ObjectIndex(index) => self.take_index(from, index),
            Message::ObjectWant(wanted) => self.send_objects(from, wanted),
            Message::Alloc(message) => self.on_alloc(from, message),
            Message::LeaseRequest { id, network, wish } => self.grant_lease(from, id, network, wish),
            Message::TraceAsk { id, ask } => self.take_trace_ask(from, id, ask),
            Message::TraceReply { id, result } => {
                self.state.borrow_mut().traces.asked.answer(id, from, result);
            }
            Message::TimeRequest { id } => self.send_time(from, id),
            Message::TimeReply { id, now_ns } => {
                self.state.borrow_mut().captures.times.answer(id, from, now_ns)
            }
            Message::CaptureStart { id, ask } => self.take_capture_start(from, id, ask),
            Message::CaptureBatch { id, batch } => self.take_capture_batch(from, id, &batch),
            Message::CaptureTaken { id, batches } => {
                self.state.borrow().captures.taken(from, id, batches);
            }
            Message::CaptureStop { id } => self.state.borrow_mut().captures.stop(from, id),
            Message::FlowsRequest { id } => {
                self.answer_member((from, id), Topic::Flows, async |node| node.flows_or_error().await);
            }
            Message::FlowsFollow { id, most } => self.take_flows_follow(from, id, most),
            Message::FlowsSecond { id, flows } => self.take_flows_second(from, id, &flows),
            Message::FlowsTaken { id } => self.state.borrow().flow_followers.taken(from, id),
            Message::FlowsStop { id } => self.state.borrow_mut().flow_followers.stop(from, id),
            // A host that is not a member cannot know which key a majority has chosen.
            Message::ClusterKey(secret) => {
                if self.state.borrow().is_member() {
                    self.take_key(&secret);
                }
            }
            Message::DoctorRequest { id } => {
                self.answer_member((from, id), Topic::Diagnosis, async |node| node.diagnosis().await);
            }
            Message::ReportRequest { id } => {
                self.answer_member((from, id), Topic::Report, async |node| node.report().await);
            }
            Message::DoctorReply { id, diagnosis: answer }
            | Message::ReportReply { id, report: answer }
            | Message::FlowsReply { id, flows: answer } => {
                self.take_answer(from, id, answer);
            }
            Message::LeaseReply { id, result } => {
                self.state.borrow_mut().leases.answer(id, from, result);
            }
        }
    }

    /// Whether a message from a peer is accepted.
    ///
    /// A member may send any message. A host that is not a member only has the cluster key: it may ask, request its
    /// admission, vote for it, and pass on a map that carries its proof. While the local host is not a member, it accepts all
    /// messages, since it cannot know the members. Messages of another cluster are rejected.
    fn may_say(&self, from: NodeId, key: ClusterKeyId, message: &Message) -> bool {
        let state = self.state.borrow();
        let foreign = state.view.nodes.get(&from).is_some_and(|node| is_foreign(&state, &node.record));
        let member = state.view.alloc.members.contains(&from) || !state.is_member();
        match message {
            Message::Record(_) => true,
            // Of hosts of an earlier cluster, and of those that were recovered without this one: the replica verifies it.
            Message::Alloc(AllocMessage::AskRecovery { .. }) => true,
            Message::Alloc(AllocMessage::Learn(_)) if state.view.alloc.members.contains(&from) => true,
            _ if foreign => false,
            _ if member => true,
            Message::TablePull(_) | Message::ObjectParts(_) | Message::ObjectWant(_) => true,
            Message::Alloc(message) => match message {
                // The replica itself judges these: it learns only what is proved, answers only a host that is behind,
                // and counts only votes for the admission of the sender.
                AllocMessage::Ask { .. }
                | AllocMessage::Learn(_)
                | AllocMessage::Accepted { .. }
                | AllocMessage::Prepare { .. }
                | AllocMessage::Accept { .. }
                | AllocMessage::AcceptStep { .. }
                | AllocMessage::Decided { .. } => true,
                // The host was forgotten and the key was rotated afterwards, so it must not get the new key.
                AllocMessage::Request { change: Change::Admit(node), .. } => {
                    let alloc = &state.view.alloc;
                    let last = alloc.key.is_none_or(|agreed| agreed.id == key);
                    *node == from && (last || !alloc.forgotten.contains(node))
                }
                AllocMessage::AskRecovery { .. } => true,
                AllocMessage::Recover(_)
                | AllocMessage::Consent { .. }
                | AllocMessage::Recovered(_)
                | AllocMessage::GoesOn { .. }
                | AllocMessage::Request { .. }
                | AllocMessage::Promise { .. }
                | AllocMessage::Nack { .. }
                | AllocMessage::Reply { .. } => false,
            },
            Message::Table(_)
            | Message::TableUnknown(_)
            | Message::Objects(_)
            | Message::ObjectIndex(_)
            | Message::LeaseRequest { .. }
            | Message::LeaseReply { .. }
            | Message::ClusterKey(_)
            | Message::DoctorRequest { .. }
            | Message::DoctorReply { .. }
            | Message::ReportRequest { .. }
            | Message::ReportReply { .. }
            | Message::FlowsRequest { .. }
            | Message::FlowsReply { .. }
            | Message::FlowsFollow { .. }
            | Message::FlowsSecond { .. }
            | Message::FlowsTaken { .. }
            | Message::FlowsStop { .. }
            | Message::TraceAsk { .. }
            | Message::TraceReply { .. }
            | Message::TimeRequest { .. }
            | Message::TimeReply { .. }
            | Message::CaptureStart { .. }
            | Message::CaptureBatch { .. }
            | Message::CaptureTaken { .. }
            | Message::CaptureStop { .. } => false,
        }
    }

    /// Sends this host's table on a new stream, and starts the comparison of the rest.
    pub(super) fn greet(&self, peer: NodeId) {
        let whole = self.state.borrow().view.own().and_then(|own| own.table.whole());
        if let Some(whole) = whole {
            self.links().send(peer, &Message::Table(whole));
        }
        self.tell_of_unreached(peer);
        let offers = {
            let mut state = self.state.borrow_mut();
            state.exchanges.greet(peer);
            // A member learns of a later map by hints.
            state.view.alloc.cluster == 0 && state.has_map(peer)
        };
        self.ask_missing_objects();
        if offers {
            self.ask_map(peer);
        }
        self.pull_missing();
    }

    /// Stores a verified record if it is later than the stored one.
    pub(super) fn take_record(&self, record: NodeRecord, signed: SignedRecord) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let (id, now) = (record.id, state.now());
        if id == state.view.me || !is_elsewhere(state, &record) {
            return;
        }
        let old = state.view.nodes.get(&id).map(|node| node.record.clone());
        if old.as_ref().is_some_and(|old| old.order() >= record.order()) {
            return;
        }
        let wall_ms = state.wall_ms();
        state.peers.set_record(id, signed, now, wall_ms);
        let moved = old.as_ref().is_none_or(|old| {
            (old.address, &old.further, old.vtep, old.vxlan_port, old.link_mtu, old.presence, &old.zone)
                != (
                    record.address,
                    &record.further,
                    record.vtep,
                    record.vxlan_port,
                    record.link_mtu,
                    record.presence,
                    &record.zone,
                )
        });
        if old.as_ref().is_none_or(|old| old.keys != record.keys) {
            self.keys.notify_one();
        }
        let rekeyed = old.as_ref().is_none_or(|old| old.tunnel != record.tunnel);
        if state.view.set_record(record.clone()) {
            state.uncached.note(id);
        }
        if let Some(old) = &old
            && old.vtep != record.vtep
        {
            self.event("peer", &record.name, &format!("moved from {} to {}", old.vtep, record.vtep));
        }
        self.bound_unknown(state, Some(id));
        note_names(state);
        note_cluster(state, &record);
        newer::note_record(state, &record, old.as_ref());
        state.save.want();
        if rekeyed {
            let before = old.as_ref().and_then(|old| old.tunnel);
            state.local.key_epochs.note_peer(record.id, before, record.tunnel);
            self.tunnel_turn.notify_one();
            // Which peer a key belongs to affects the routes to other hosts, too.
            state.changed(What::Tunnel);
        }
        if moved && state.local.underlay.by_peers() {
            self.underlay.notify_one();
        }
        if moved || rekeyed {
            state.changed(What::Host(id));
            self.work.notify_one();
            self.saver.notify_one();
        }
        self.judge_all(state);
        self.point_links(state);
    }

    /// Updates the liveness and the hints of a peer, and requests the state that this host lacks.
    fn take_signs(&self, id: NodeId, hints: Hints, alive: bool) {
        self.set_gossip_alive(id, alive);
        let behind = {
            let mut state = self.state.borrow_mut();
            if !state.peers.announce(id, hints) {
                return;
            }
            let now = state.now();
            // Before its first hints, it has announced nothing.
            if hints.table != ovl_proto::table::Revision::default() {
                state.exchanges.announce(id, hints.objects, now);
            }
            // Otherwise the map is on its way to this host as well: see `ask_later_map`.
            hints.alloc > 0 && state.view.alloc.cluster == 0
        };
        self.ask_missing_objects();
        if behind {
            self.ask_map(id);
        }
        self.pull_missing();
    }

    /// Notes that a peer has proved to be at its address, so that it may be dialled.
    pub(super) fn note_proved(&self, id: NodeId) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        if state.peers.prove(id) {
            self.point_links(state);
        }
    }

    /// Drops hosts that are not members if there are too many: anybody with the cluster key can invent them. Those that
    /// have proved nothing go first, the oldest first. `latest` is the one that has just become known.
    fn bound_unknown(&self, state: &mut State, latest: Option<NodeId>) {
        let unknown = state.peers.unknown(&state.view.alloc.members);
        if unknown.len() <= MAX_UNKNOWN / 2 {
            state.problems.set(Code::UnknownHosts, "", None);
        }
        // A host that is not a member itself may not know the members yet.
        let most = if state.is_member() { MAX_UNKNOWN } else { MAX_HOSTS };
        let surplus = unknown.len().saturating_sub(most);
        if surplus == 0 {
            return;
        }
        for id in unknown.into_iter().filter(|id| Some(*id) != latest).take(surplus) {
            state.changed(What::Host(id));
            state.view.forget(id);
            state.peers.remove(id);
            state.exchanges.forget(id);
            state.problems.set(Code::ForeignCluster, id.to_string(), None);
            newer::drop_host(state, id);
            state.uncached.note(id);
        }
        let latest = latest.and_then(|id| state.view.nodes.get(&id));
        let sentence = latest.map(|node| {
            format!(
                "more than {most} hosts that are not members announce themselves, and the oldest are dropped. One of \
                 them is {} at {}: a program there has the cluster key. Stop it, and rotate the key with 'ovlctl key \
                 rotate --cluster'",
                node.record.name, node.record.address
            )
        });
        // One message, however many names there are.
        if sentence.is_some() && state.problems.get(Code::UnknownHosts, "").is_none() {
            state.problems.set(Code::UnknownHosts, "", sentence);
        }
    }

    fn set_gossip_alive(&self, node: NodeId, alive: bool) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let now = state.now();
        if state.peers.hear(node, alive, now) {
            self.point_links(state);
        }
        self.judge_all(state);
    }

    /// Judges the liveness of every peer again. Called on every event and several times a second, for
    /// verdicts that depend on time.
    pub(super) fn judge_all(&self, state: &mut State) {
        let (now, keep) = (state.now(), millis(self.config.keep));
        let wall_ms = state.wall_ms();
        let changed = state.peers.judge(&state.view, now, wall_ms, keep);
        // All of them before the first is told: what follows from one depends on the others.
        let changed: Vec<_> =
            changed.into_iter().filter_map(|(id, is)| Some((id, state.view.judge(id, is)?, is))).collect();
        for (id, was, is) in changed {
            self.event("peer", &state.view.name_of(id), &format!("{was} -> {is}"));
            self.detour_turn.notify_one();
            if is == PeerState::Alive {
                self.links().kick(id);
            }
            state.changed(What::Host(id));
            self.work.notify_one();
            self.keys.notify_one();
        }
        self.take_mirror_turn(state);
    }

    /// Gives gossip and streams the addresses of all members and of all hosts that have proved to be at their address, so
    /// that they never stop trying to reach them.
    pub(super) fn point_links(&self, state: &State) {
        let known: BTreeMap<NodeId, SocketAddr> = state
            .view
            .nodes
            .values()
            .filter(|node| node.record.id != state.view.me && node.record.presence != Presence::Left)
            .filter(|node| {
                let id = &node.record.id;
                state.view.alloc.members.contains(id) || state.peers.get(*id).is_some_and(Peer::is_proved)
            })
            .map(|node| (node.record.id, node.record.address))
            .collect();
        if *self.pointed.borrow() == known {
            return;
        }
        self.gossip().set_known(known.iter().map(|(id, address)| (*id, *address)).collect());
        for node in known.keys().filter_map(|id| state.view.nodes.get(id)) {
            self.gossip().set_further(node.record.id, node.record.address, &node.record.further);
        }
        self.links().set_peers(known.clone());
        *self.pointed.borrow_mut() = known;
    }

    /// Sends ICMP probes to hosts that have been silent for a while.
    pub(super) fn probe_silent(self: &Rc<Self>) {
        let gossip = self.gossip();
        let ping_every = millis(gossip.ping_every());
        let targets: Vec<_> = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let now = state.now();
            let mut due = Vec::new();
            for (id, peer) in state.peers.iter() {
                let Some(node) = state.view.nodes.get(&id) else { continue };
                let signs = peer.signs();
                let is_heard = |heard: Instant| !liveness::is_late(millis(heard.elapsed()), ping_every);
                let heard = gossip.last_heard(id).is_some_and(is_heard);
                let expired =
                    !signs.gossip && now.saturating_sub(signs.silent_since) > millis(self.config.keep);
                let quiet = signs.gossip && heard && node.record.presence == Presence::Running;
                // No kernel answers at an address that NAT hides, or of a family that this host lacks.
                let hidden = state.view.crosses_nat(node) || state.view.is_apart(node);
                if quiet || expired || hidden || node.record.presence == Presence::Left {
                    continue;
                }
                if now.saturating_sub(peer.probe_sent_at()) >= liveness::PROBE_INTERVAL_MS {
                    due.push((peer.probe_sent_at(), id, node.record.vtep));
                }
            }
            due.sort_unstable();
            due.truncate(liveness::MAX_PROBES);
            state.peers.probe(due.iter().map(|(_, id, _)| *id), now);
            due.into_iter().map(|(_, id, vtep)| (id, vtep)).collect()
        };
        for (id, vtep) in targets {
            let node = Rc::clone(self);
            tokio::task::spawn_local(async move {
                if !node.prober.probe(vtep, Duration::from_millis(liveness::PROBE_VALID_MS)).await {
                    return;
                }
                let mut guard = node.state.borrow_mut();
                let now = guard.now();
                guard.peers.note_probe_reply(id, now);
            });
        }
    }

    /// Publishes the path MTU to a peer after what limits it has changed.
    pub(super) fn renew_path_mtu(&self, peer: NodeId) {
        self.note_path_mtu(peer, self.gossip().path_mtu(peer).unwrap_or(u16::MAX));
    }

    /// Publishes the path MTU to a peer if it is smaller than the MTU of the underlay device. `mtu` is what gossip found; a
    /// limit that path probes found may be smaller, and so may be what a detour carries.
    pub(super) fn note_path_mtu(&self, peer: NodeId, mut mtu: u16) {
        let key = Key::PathMtu(peer);
        let (known, link) = {
            let state = self.state.borrow();
            let Some(own) = state.view.own() else { return };
            if let Some(limit) = state.path_faults.limit_to(peer) {
                mtu = mtu.min(limit.saturating_add(vxlan_overhead(own.record.vtep)));
            }
            let is_framed = state.tcp.is_used(peer)
                || state.view.nodes.get(&peer).is_some_and(|node| state.view.is_framed(node));
            if let Some(relay) = state.detours.relay(peer).or(is_framed.then_some(peer)) {
                let on_the_way = state.detours.path(peer).into_iter().chain([peer]);
                let on_the_way: Vec<&view::Node> =
                    on_the_way.filter_map(|id| state.view.nodes.get(&id)).collect();
                let links = on_the_way.iter().map(|node| node.record.link_mtu);
                let first = self.gossip().path_mtu(relay).unwrap_or(u16::MAX);
                let carried = links.chain([first]).fold(own.record.link_mtu, u16::min);
                mtu = mtu.min(carried.saturating_sub(ovl_relay::OVERHEAD));
                // The headers of IPv6 are longer than those that the MTU of the tunnel is made for.
                let elsewhere = |node: &&view::Node| state.reach.elsewhere(node.record.id);
                let is_ipv6 = |node: &&view::Node| elsewhere(node).unwrap_or(node.record.vtep).is_ipv6();
                if own.record.vtep.is_ipv4() && on_the_way.iter().any(is_ipv6) {
                    mtu = mtu.saturating_sub(vxlan_overhead(V6) - vxlan_overhead(own.record.vtep));
                }
            }
            let known = match own.table.get(&key) {
                Some(Entry::PathMtu { mtu, .. }) => Some(*mtu),
                Some(
                    Entry::Endpoint(_)
                    | Entry::Lease { .. }
                    | Entry::Held(_)
                    | Entry::Announced(_)
                    | Entry::Unreached(_)
                    | Entry::Opaque(_),
                )
                | None => None,
            };
            (known, own.record.link_mtu)
        };
        let wanted = (mtu < link).then_some(mtu);
        if wanted == known {
            return;
        }
        let name = self.state.borrow().view.name_of(peer);
        self.event("peer", &name, &format!("the path carries {mtu} bytes"));
        match wanted {
            Some(mtu) => self.write_table(vec![Entry::PathMtu { peer, mtu }], Vec::new()),
            None => self.write_table(Vec::new(), vec![key]),
        }
        let mut state = self.state.borrow_mut();
        state.changed(What::ThisHost);
        self.work.notify_one();
    }

    /// Drops the state of hosts that a majority has forgotten, unless they are back.
    pub(super) fn drop_forgotten(&self, state: &mut State) {
        let forgotten = |id: &NodeId| {
            let alloc = &state.view.alloc;
            // A host that is not a member is kept for a while, because it may come back or be admitted.
            let never = state.is_member()
                && !alloc.members.contains(id)
                && state.peers.get(*id).is_some_and(|peer| {
                    state.wall_ms().saturating_sub(peer.last_alive_ms()) > NEVER_ADMITTED_MS
                });
            alloc.forgotten.contains(id) || never
        };
        let gone: Vec<NodeId> = state
            .view
            .nodes
            .values()
            .filter(|node| node.state != PeerState::Alive && node.record.id != state.view.me)
            .map(|node| node.record.id)
            .filter(forgotten)
            .collect();
        for id in gone {
            state.changed(What::Host(id));
            if let Some(node) = state.view.forget(id) {
                self.event("peer", &node.record.name, "forgotten; its blocks are free");
            }
            state.peers.remove(id);
            state.exchanges.forget(id);
            state.problems.set(Code::ForeignCluster, id.to_string(), None);
            state.uncached.note(id);
            state.save.want();
            state.problems.set(Code::TableRefused, id.to_string(), None);
            newer::drop_host(state, id);
        }
        self.bound_unknown(state, None);
        note_names(state);
        self.point_links(state);
    }
}

/// Returns a duration in milliseconds.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Reports hosts that have the same name as a problem.
fn note_names(state: &mut State) {
    let mut by_name: BTreeMap<&str, Vec<&view::Node>> = BTreeMap::new();
    for node in state.view.nodes.values() {
        if node.record.presence != Presence::Left && node.state != PeerState::Dead {
            by_name.entry(&node.record.name).or_default().push(node);
        }
    }
    let sentences: Vec<(String, String)> = by_name
        .into_iter()
        .filter(|(_, nodes)| nodes.len() > 1)
        .map(|(name, nodes)| {
            let all: Vec<String> =
                nodes.iter().map(|node| format!("{} at {}", node.record.id, node.record.address)).collect();
            (
                name.to_owned(),
                format!(
                    "several hosts are named {name}: {}. Give each its own name with --node",
                    all.join(", ")
                ),
            )
        })
        .collect();
    state.problems.replace(Code::HostName, sentences);
}

/// Whether the addresses in a record can be those of another host: a loopback address would be this host itself.
fn is_elsewhere(state: &State, record: &NodeRecord) -> bool {
    let here = state.record().is_some_and(|own| own.address.ip().is_loopback());
    here || !(record.address.ip().is_loopback() || record.vtep.is_loopback())
}

/// Whether a host is of another cluster, or of an earlier or later one than this host's.
pub(super) fn is_foreign(state: &State, record: &NodeRecord) -> bool {
    let ours = state.view.alloc.cluster;
    ours != 0 && record.cluster != 0 && record.cluster != ours
}

/// Reports a host that has the cluster key and was bootstrapped into another cluster. It can never join this
/// one.
fn note_cluster(state: &mut State, record: &NodeRecord) {
    let sentence = is_foreign(state, record).then(|| {
        format!(
            "host {} at {} has our cluster key and belongs to another cluster: both were started with --bootstrap, \
             or without --join. Stop ovld on the side that is to join, remove its state directory, and start it \
             with --join",
            record.name, record.address
        )
    });
    state.problems.set(Code::ForeignCluster, record.id.to_string(), sentence);
}
