//! The consensus replica's I/O: its messages, and the requests that wait for it. Also leases: addresses from a block of
//! another host.

use std::net::IpAddr;
use std::time::Duration;

use ovl_consensus::{Event, Output};
use ovl_proto::alloc::{AllocMessage, Change, Refusal};
use ovl_proto::id::{NetworkId, NodeId};
use ovl_proto::sync::{LeaseWish, Message};
use ovl_proto::table::Entry;
use tokio::sync::oneshot;

use super::saving::DISK_TIMEOUT;
use super::state::State;
use super::{Failed, Node};
use crate::problems::Code;
use crate::saving::AfterSave;

/// How long a host has to answer a lease request.
const LEASE_TIMEOUT: Duration = Duration::from_secs(3);
/// How many times a change is requested while a majority is alive but does not answer in time.
const AGREE_TRIES: u32 = 4;
/// Whether an address satisfies a lease request.
fn fits(wish: LeaseWish, address: IpAddr) -> bool {
    match wish {
        LeaseWish::Exact(wanted) => wanted == address,
        LeaseWish::AnyOf(prefix) => prefix.contains(&address),
    }
}

/// Reports a map that this host cannot verify, unless it learns another one soon.
fn note_unproved(state: &mut State, now: u64) {
    let Some(version) = state.maps.unproved(now) else { return };
    let known = state.view.alloc.version;
    let sentence = format!(
        "peers have version {version} of the allocation map, and this host, which has version {known}, cannot verify it: \
         the members changed too often while it was down, or a peer lies. If it was down for long, run `ovlctl peers \
         forget` for it on another host, remove its state directory, and start it again"
    );
    state.problems.set(Code::MapNotVerified, "", Some(sentence));
}

impl Node {
    /// Handles a message from the consensus replica of another host.
    pub(super) fn on_alloc(&self, from: NodeId, message: AllocMessage) {
        if let AllocMessage::Request { change: Change::DropNetwork(network), .. } = &message
            && self.state.borrow().view.networks.contains_key(network)
        {
            tracing::warn!(%from, %network, "asks to free the blocks of a network that is there");
            return;
        }
        let output = {
            let mut state = self.state.borrow_mut();
            let now = state.now();
            state.allocator.handle(now, from, message)
        };
        self.carry_out(output);
    }

    /// Asks a peer for a later allocation map than this host has.
    pub(super) fn ask_map(&self, peer: NodeId) {
        let output = self.state.borrow_mut().allocator.ask(peer);
        self.carry_out(output);
    }

    /// Returns up to this many connected peers that have a map, others each second.
    pub(super) fn peers_with_map(&self, most: usize) -> Vec<NodeId> {
        let connected = self.links().connected();
        let state = self.state.borrow();
        let having: Vec<NodeId> = connected.into_iter().filter(|id| state.has_map(*id)).collect();
        let turn = usize::try_from(state.now() / 1000).unwrap_or(0);
        let first = turn.wrapping_mul(most).checked_rem(having.len()).unwrap_or(0);
        having.iter().cycle().skip(first).take(most.min(having.len())).copied().collect()
    }

    /// Asks one of the peers that announce a later map than this host has, if they did so at the last call already. Called
    /// several times a second.
    ///
    /// Who decides a map sends it to all hosts. When all hosts took each hint for a reason to ask, a decision cost as many
    /// requests, and whole maps, as the square of the number of hosts.
    pub(super) fn ask_later_map(&self) {
        let peer = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let version = state.view.alloc.version;
            let later = state.peers.iter().filter(|(_, peer)| peer.hints().alloc > version);
            let mut later: Vec<NodeId> = later.map(|(id, _)| id).collect();
            if !later.is_empty() {
                let connected = self.links().connected();
                later.retain(|id| connected.contains(id));
            }
            let turn = usize::try_from(state.now() / 200).unwrap_or(0);
            let again = state.maps.is_behind(version, !later.is_empty());
            later.get(turn % later.len().max(1)).copied().filter(|_| again)
        };
        if let Some(peer) = peer {
            self.ask_map(peer);
        }
    }

    /// Advances the time of the consensus replica.
    pub(super) fn tick_alloc(&self) {
        let output = {
            let mut state = self.state.borrow_mut();
            let (now, alive) = (state.now(), state.alive());
            note_unproved(&mut state, now);
            state.allocator.tick(now, &alive)
        };
        self.carry_out(output);
    }

    /// Requests a change of the allocation map. The result is sent to `waiting`.
    pub(super) fn request_change(
        &self,
        change: Change,
        waiting: Option<oneshot::Sender<Result<u64, Refusal>>>,
    ) {
        let output = {
            let mut state = self.state.borrow_mut();
            let (now, alive) = (state.now(), state.alive());
            let (id, output) = state.allocator.request(now, change, &alive);
            if let Some(waiting) = waiting {
                state.maps.request(id, waiting);
            }
            output
        };
        self.carry_out(output);
    }

    /// Requests a change of the allocation map and waits for the result.
    pub(super) async fn change(&self, change: Change) -> Result<(), Failed> {
        self.agree(&change).await?.map_err(|refusal| self.explain(&refusal))
    }

    /// Requests a change of the allocation map and returns a refusal as it is.
    ///
    /// If too few members answer in time although a majority is alive, packets are being lost. The request is then
    /// repeated, which is safe because changes are idempotent.
    pub(super) async fn agree(&self, change: &Change) -> Result<Result<(), Refusal>, Failed> {
        let mut tries = 0;
        loop {
            let (tell, answer) = oneshot::channel();
            self.request_change(change.clone(), Some(tell));
            tries += 1;
            // The replica fails expired requests itself. Only a stuck disk can delay its answer for longer.
            match tokio::time::timeout(DISK_TIMEOUT, answer).await {
                Ok(Ok(Err(Refusal::NoMajority { .. })))
                    if tries < AGREE_TRIES && self.majority_is_alive() => {}
                Ok(Ok(result)) => return Ok(result.map(|_| ())),
                Ok(Err(_)) => return Err(Failed::unavailable("ovld is stopping")),
                Err(_) => return Err(self.disk_is_stuck()),
            }
        }
    }

    /// Whether a majority of the members is alive, as seen by this host.
    fn majority_is_alive(&self) -> bool {
        let state = self.state.borrow();
        let members = &state.view.alloc.members;
        state.alive().intersection(members).count() > members.len() / 2
    }

    /// Returns the error for a write to the state file that did not complete in time.
    pub(super) fn disk_is_stuck(&self) -> Failed {
        let state = self.state.borrow();
        let why = state.problems.get(Code::StateFile, "");
        Failed::unavailable(why.unwrap_or("the state cannot be saved in time: is the disk stuck?"))
    }

    /// Converts a refusal to an error for the user.
    pub(super) fn explain(&self, refusal: &Refusal) -> Failed {
        let state = self.state.borrow();
        let sentence = refusal.sentence(|node| state.view.name_of(node));
        match refusal {
            Refusal::NoMajority { .. } => {
                let members = state.view.alloc.members.iter().filter(|id| !state.alive().contains(id));
                let silent: Vec<String> = members.map(|id| state.view.name_of(*id)).collect();
                let silent = if silent.is_empty() {
                    String::new()
                } else {
                    format!(" Silent: {}.", silent.join(", "))
                };
                Failed::unavailable(format!(
                    "{sentence}.{silent} Bring hosts back, or take dead ones out with `ovlctl peers forget NODE` on the \
                     side that has a majority"
                ))
            }
            Refusal::NotMember(_) => {
                Failed::unavailable(format!("{sentence}; `ovlctl status` says what it waits for"))
            }
            Refusal::Recovered { .. } => Failed::conflict(self.left_out(&state).unwrap_or(sentence)),
            Refusal::AnotherKey(_) => {
                Failed::conflict(format!("{sentence}: wait until `ovlctl key status` says that it is done"))
            }
            Refusal::Banned(node) => {
                Failed::conflict(format!("{sentence}. If it is to return, run `ovlctl peers admit {node}`"))
            }
            Refusal::Held { .. } | Refusal::LastMember(_) => Failed::conflict(sentence),
            Refusal::Full { .. } | Refusal::NotABlock(_) => Failed::exhausted(sentence),
        }
    }

    /// Carries out the output of the consensus replica, once its promises are on disk.
    pub(super) fn carry_out(&self, output: Output) {
        let ready = {
            let mut state = self.state.borrow_mut();
            if output.persist {
                self.save_then(&mut state, AfterSave::Alloc(output));
                return;
            }
            // Keep the order: an earlier output may still wait for the disk.
            state.save.follow(output)
        };
        if let Some(output) = ready {
            self.carry_out_now(output);
        }
    }

    /// Sends the messages of an output and delivers its events.
    pub(super) fn carry_out_now(&self, output: Output) {
        for (to, message) in output.send {
            self.links().send(to, &Message::Alloc(message));
        }
        for event in output.events {
            match event {
                Event::Learned => self.on_learned(),
                Event::Done { id, result } => {
                    if let Some(waiting) = self.state.borrow_mut().maps.take_requester(id) {
                        // The requester may have timed out.
                        waiting.send(result).ok();
                    }
                }
                // The record of that host shows it too, with its name: see `note_cluster`.
                Event::ForeignCluster { from, cluster } => {
                    tracing::debug!(%from, cluster, "a map of another cluster");
                }
                Event::Fork { version } => {
                    tracing::error!(version, "two allocation maps of one version are signed by a majority");
                    let message = format!("a member signed two allocation maps of version {version}");
                    self.event("peer", &self.config.node, &message);
                }
                Event::RecoveryEnded(end) => self.on_recovery_ended(end),
                Event::Unproved { version } => {
                    let mut state = self.state.borrow_mut();
                    let now = state.now();
                    state.maps.note_unproved(version, now);
                    tracing::debug!(version, "refused an allocation map: it is not proved");
                }
            }
        }
    }

    /// Takes over a newer allocation map from the consensus replica.
    fn on_learned(&self) {
        let newly: Vec<NodeId> = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let was_member = state.is_member();
            state.maps.proved();
            state.problems.set(Code::MapNotVerified, "", None);
            let before = state.view.learn(state.allocator.map().clone());
            if before.members != state.view.alloc.members {
                let now = state.now();
                state.keys.note_members(now);
                // Members are reached and relayed for.
                self.detour_turn.notify_one();
            }
            // Messages that arrived before both sides were members were ignored, so exchange them again.
            let all_new = state.is_member() && !was_member;
            let news = |id: &&NodeId| all_new || !before.members.contains(*id);
            let newly: Vec<NodeId> = state.view.alloc.members.iter().filter(news).copied().collect();
            for id in &newly {
                state.peers.end_pull(*id);
            }
            if state.is_member() && !was_member {
                tracing::info!(cluster = state.view.alloc.cluster, "admitted to the cluster");
                self.event("peer", &self.config.node, "admitted to the cluster");
            }
            self.drop_forgotten(state);
            state.map_changed(&before);
            self.publish_hints(state);
            newly
        };
        for peer in newly {
            self.greet(peer);
        }
        let cluster = self.state.borrow().view.alloc.cluster;
        self.change_record(|record| record.cluster = cluster);
        self.recompute_networks();
        self.work.notify_one();
        self.keys.notify_one();
        self.membership.notify_waiters();
    }

    /// Requests an address from the holder of its block.
    ///
    /// # Errors
    ///
    /// The holder refuses, does not answer within 3 s, or offers an address that was not requested.
    pub(super) async fn lease(
        &self,
        holder: NodeId,
        network: NetworkId,
        wish: LeaseWish,
    ) -> Result<IpAddr, String> {
        let ((id, answer), name) = {
            let mut state = self.state.borrow_mut();
            (state.leases.ask(holder), state.view.name_of(holder))
        };
        let sent = self.links().send(holder, &Message::LeaseRequest { id, network, wish });
        let answer = if sent { tokio::time::timeout(LEASE_TIMEOUT, answer).await.ok() } else { None };
        self.state.borrow_mut().leases.give_up(id);
        match answer {
            Some(Ok(Ok(address))) if !fits(wish, address) => {
                Err(format!("host {name} offers {address}, which was not asked for"))
            }
            Some(Ok(result)) => result,
            Some(Err(_)) | None => Err(format!("host {name}, which holds the block, does not answer")),
        }
    }

    /// Answers [`Message::LeaseRequest`]. A lease is on disk before it is granted.
    pub(super) fn grant_lease(&self, to: NodeId, id: u64, network: NetworkId, wish: LeaseWish) {
        let result = self.find_lease(to, network, wish);
        let reply = Message::LeaseReply { id, result: result.clone() };
        match result {
            Ok(address) => {
                self.write_table(vec![Entry::Lease { network, address, to }], Vec::new());
                let mut state = self.state.borrow_mut();
                self.save_then(&mut state, AfterSave::Send(to, Box::new(reply)));
            }
            Err(_) => {
                self.links().send(to, &reply);
            }
        }
    }

    /// Chooses the address for a lease and records it as lent. Fails with the reason for the refusal.
    fn find_lease(&self, to: NodeId, network: NetworkId, wish: LeaseWish) -> Result<IpAddr, String> {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        if !state.view.alloc.members.contains(&to) {
            return Err("the host that asks is not a member of the cluster".to_owned());
        }
        let Some(spec) = state.view.networks.get(&network).map(|state| state.network.clone()) else {
            return Err("the holder of the block does not know the network yet".to_owned());
        };
        let address = match wish {
            LeaseWish::Exact(address) => {
                if state.view.holder_of(network, address) != Some(state.view.me) {
                    return Err(format!("{address} is not in a block of this host"));
                }
                if state.addresses.is_lent_to(network, address, to) {
                    return Ok(address);
                }
                if state.addresses.in_use(&state.view, network)(address) {
                    return Err(state.addresses.describe_use(&state.view, network, address));
                }
                if !spec.subnets.iter().any(|subnet| ovl_cluster::addresses::is_usable(address, subnet)) {
                    return Err(format!("{address} is no address for an endpoint"));
                }
                address
            }
            LeaseWish::AnyOf(prefix) => {
                let subnet = spec
                    .subnets
                    .iter()
                    .find(|subnet| subnet.prefix == prefix)
                    .ok_or("the holder of the block does not know the subnet yet")?;
                let found = state.addresses.pick(&state.view, network, subnet);
                found.ok_or("no address of its blocks is free")?
            }
        };
        let at = state.now();
        state.addresses.lend(network, address, to, at);
        Ok(address)
    }
}
