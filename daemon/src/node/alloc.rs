//! The consensus replica's I/O: its messages, its promises on disk, and the requests that wait for it. Also leases:
//! addresses from a block of another host.

use std::collections::HashMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use ovl_cluster::view::View;
use ovl_consensus::{Event, Output};
use ovl_control::PeerState;
use ovl_proto::alloc::{AllocMessage, Block, Change, Refusal};
use ovl_proto::id::{NetworkId, NodeId};
use ovl_proto::sync::{LeaseWish, Message};
use ovl_proto::table::Entry;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::ready::{READY_WITHIN, Waits};
use super::state::{Durable, State};
use super::{Failed, Node};
use crate::addresses::block_of;
use crate::problems::Code;
use crate::store;
use ovl_subsystems::Change as What;

/// How long a host has to answer a lease request.
const LEASE_TIMEOUT: Duration = Duration::from_secs(3);
/// How many times a change is requested while a majority is alive but does not answer in time.
const AGREE_TRIES: u32 = 4;
/// How long a write to the state file may take before the disk is reported as stuck.
const DISK_TIMEOUT: Duration = Duration::from_secs(10);
/// Time between two attempts to reclaim this host's addresses. The streams to other hosts may not be up yet.
const RECLAIM_RETRY: Duration = Duration::from_secs(2);
/// Time between two attempts to become a member.
const ADMISSION_RETRY: Duration = Duration::from_millis(200);
/// How long a host looks for a cluster before it reports that there is none.
const NOBODY_AFTER: Duration = Duration::from_secs(3);
/// How many peers a host without a map asks for it at a time.
const FIRST_ASKED: usize = 3;
/// How long a new host waits for the records of all members before it requests admission.
const RECORDS_WITHIN: Duration = Duration::from_secs(2);

/// Time without a verified map after which a map that cannot be verified is reported, in milliseconds.
const UNPROVED_MS: u64 = 10_000;
/// How many ids of hosts an error lists.
const SHOWN_IDS: usize = 5;

/// What this host waits for in the agreement on the allocation map.
#[derive(Debug, Default)]
pub(crate) struct Maps {
    /// Requests for changes that are in flight.
    changes: HashMap<u64, oneshot::Sender<Result<u64, Refusal>>>,
    /// The version of the map at the last tick, if peers announced a later one.
    behind_since: Option<u64>,
    /// A later map that could not be verified: its version, and the time of the first try, in milliseconds of this run.
    unproved: Option<(u64, u64)>,
}

/// Whether an address satisfies a lease request.
fn fits(wish: LeaseWish, address: IpAddr) -> bool {
    match wish {
        LeaseWish::Exact(wanted) => wanted == address,
        LeaseWish::AnyOf(prefix) => prefix.contains(&address),
    }
}

/// Reports a map that this host cannot verify, unless it learns another one soon.
fn note_unproved(state: &mut State, now: u64) {
    let Some((version, since)) = state.maps.unproved else { return };
    if now.saturating_sub(since) < UNPROVED_MS {
        return;
    }
    let known = state.view.alloc.version;
    let sentence = format!(
        "peers have version {version} of the allocation map, and this host, which has version {known}, cannot verify it: \
         the members changed too often while it was down, or a peer lies. If it was down for long, run `ovlctl peers \
         forget` for it on another host, remove its state directory, and start it again"
    );
    state.problems.set(Code::MapNotVerified, "", Some(sentence));
}

/// Returns the host with this name or id that `ovlctl peers forget` took out. It may be known by its name later, if it
/// was not heard from yet.
fn banned_host(view: &View, host: &str) -> Result<NodeId, Waits> {
    let banned = &view.alloc.banned;
    let name = |id: &NodeId| view.nodes.get(id).map(|node| node.record.name.as_str());
    let by_id = host.parse::<NodeId>().ok().filter(|id| banned.contains(id));
    if let Some(id) = by_id.or_else(|| banned.iter().copied().find(|id| name(id) == Some(host))) {
        return Ok(id);
    }
    let unheard: Vec<String> =
        banned.iter().filter(|id| name(id).is_none()).take(SHOWN_IDS).map(ToString::to_string).collect();
    if unheard.is_empty() {
        return Err(Waits::InVain(Failed::not_found(format!(
            "no host {host} was taken out with `ovlctl peers forget`"
        ))));
    }
    Err(Waits::For(format!(
        "no host {host} is heard from that was taken out with `ovlctl peers forget`. A host that does not run is known by \
         its id only; not heard from: {}",
        unheard.join(", ")
    )))
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
    fn peers_with_map(&self, most: usize) -> Vec<NodeId> {
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
            let later = state.peers.iter().filter(|(_, peer)| peer.hints.alloc > version);
            let mut later: Vec<NodeId> = later.map(|(id, _)| *id).collect();
            if !later.is_empty() {
                let connected = self.links().connected();
                later.retain(|id| connected.contains(id));
            }
            let turn = usize::try_from(state.now() / 200).unwrap_or(0);
            let again = state.maps.behind_since.replace(version) == Some(version);
            if later.is_empty() {
                state.maps.behind_since = None;
            }
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
                state.maps.changes.insert(id, waiting);
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
        {
            let mut state = self.state.borrow_mut();
            if output.persist {
                self.save_then(&mut state, Durable::Alloc(output));
                return;
            }
            // Keep the order: an earlier output may still wait for the disk.
            let waiting = &mut state.save.waiting;
            let last = waiting.iter().rev().find(|(_, durable)| matches!(durable, Durable::Alloc(_)));
            if let Some(number) = last.map(|(number, _)| *number) {
                waiting.push((number, Durable::Alloc(output)));
                return;
            }
        }
        self.carry_out_now(output);
    }

    /// Sends the messages of an output and delivers its events.
    fn carry_out_now(&self, output: Output) {
        for (to, message) in output.send {
            self.links().send(to, &Message::Alloc(message));
        }
        for event in output.events {
            match event {
                Event::Learned => self.on_learned(),
                Event::Done { id, result } => {
                    if let Some(waiting) = self.state.borrow_mut().maps.changes.remove(&id) {
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
                    state.maps.unproved.get_or_insert((version, now));
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
            state.maps.unproved = None;
            state.problems.set(Code::MapNotVerified, "", None);
            let before = std::mem::replace(&mut state.view.alloc, state.allocator.map().clone());
            if before.members != state.view.alloc.members {
                state.keys.map_changed = state.now();
            }
            // Messages that arrived before both sides were members were ignored, so exchange them again.
            let all_new = state.is_member() && !was_member;
            let news = |id: &&NodeId| all_new || !before.members.contains(*id);
            let newly: Vec<NodeId> = state.view.alloc.members.iter().filter(news).copied().collect();
            for id in &newly {
                if let Some(peer) = state.peers.get_mut(id) {
                    peer.pulled_at = None;
                }
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

    /// Requests a write of the state file. `then` is carried out once the file is on disk.
    pub(super) fn save_then(&self, state: &mut State, then: Durable) {
        let number = state.save.handed + 1;
        state.save.waiting.push((number, then));
        state.save.wanted = true;
        self.saver.notify_one();
    }

    /// Requests a write of the state file, without waiting for it.
    pub(super) fn save_soon(&self) {
        self.state.borrow_mut().save.wanted = true;
        self.saver.notify_one();
    }

    /// Returns once the current state is on disk.
    ///
    /// # Errors
    ///
    /// The disk is stuck, or ovld is stopping.
    pub(super) async fn saved(&self) -> Result<(), Failed> {
        let (tell, done) = oneshot::channel();
        self.save_then(&mut self.state.borrow_mut(), Durable::Tell(tell));
        match tokio::time::timeout(DISK_TIMEOUT, done).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Failed::unavailable("ovld is stopping")),
            Err(_) => Err(self.disk_is_stuck()),
        }
    }

    /// Returns the content of the state file.
    pub(super) fn snapshot(&self) -> store::State {
        let state = self.state.borrow();
        store::State {
            saved_ms: self.wall_ms(),
            generation: state.record().map_or(0, |record| record.generation),
            clock: state.objects.clock(),
            objects: state.objects.signed().cloned().collect(),
            peers: {
                // In minutes, so that the state does not change in many places each time.
                let minute = |ms: u64| ms - ms % 60_000;
                let peers =
                    state.peers.values().map(|peer| (peer.signed.clone(), minute(peer.last_alive_ms)));
                peers.chain(state.newer.records()).collect()
            },
            leases: state.addresses.lent().collect(),
            alloc: Some(state.allocator.durable().clone()),
            bridges: state.bridges.iter().cloned().collect(),
            docker: state.engines.kept(),
            journal: false,
            unknown: state.file_unknown.clone(),
        }
    }

    /// Passes snapshots of the state to the writer, and carries out what waited for each. Runs forever.
    pub(super) async fn save_loop(
        self: Rc<Self>,
        mut done: tokio::sync::mpsc::UnboundedReceiver<(u64, anyhow::Result<()>)>,
    ) {
        // One write at a time: a snapshot of thousands of objects is not built again and again while the disk is
        // busy, and the next snapshot contains all changes up to then.
        let mut under_way = false;
        loop {
            let (wanted, whole) = {
                let mut state = self.state.borrow_mut();
                let wanted = !under_way && std::mem::take(&mut state.save.wanted);
                if wanted {
                    state.save.handed += 1;
                }
                (wanted.then_some(state.save.handed), state.save.whole)
            };
            if let Some(number) = wanted {
                match self.writer.save(number, self.snapshot(), whole) {
                    Ok(()) => under_way = true,
                    Err(error) => tracing::error!(%error, "cannot save the state"),
                }
            }
            tokio::select! {
                () = self.saver.notified() => {}
                result = done.recv() => {
                    under_way = false;
                    match result {
                    Some((number, Ok(()))) => {
                        self.state.borrow_mut().problems.set(Code::StateFile, "", None);
                        self.let_go(number);
                    }
                    Some((_, Err(error))) => {
                        // Keep everything waiting: nothing may be promised that is not on disk.
                        let sentence = format!("the state cannot be saved, and nothing new is promised: {error:#}");
                        self.state.borrow_mut().problems.set(Code::StateFile, "", Some(sentence));
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        self.state.borrow_mut().save.wanted = true;
                    }
                    None => return,
                    }
                },
            }
        }
    }

    /// Carries out everything that waited for a snapshot up to this number.
    fn let_go(&self, number: u64) {
        let ready: Vec<Durable> = {
            let mut state = self.state.borrow_mut();
            let waiting = std::mem::take(&mut state.save.waiting);
            let (ready, rest): (Vec<_>, Vec<_>) = waiting.into_iter().partition(|(at, _)| *at <= number);
            state.save.waiting = rest;
            ready.into_iter().map(|(_, durable)| durable).collect()
        };
        for durable in ready {
            match durable {
                Durable::Alloc(output) => self.carry_out_now(output),
                Durable::Send(to, message) => {
                    self.links().send(to, &message);
                }
                // The waiting task may have timed out.
                Durable::Tell(tell) => drop(tell.send(())),
            }
        }
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
                self.save_then(&mut state, Durable::Send(to, Box::new(reply)));
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

    /// Requests admission until this host is a member, then reclaims the addresses of its endpoints. Runs forever.
    pub(super) async fn admission_loop(self: Rc<Self>) {
        let mut known_since = None;
        loop {
            // Created before the map is read, so that no change of the map is missed.
            let news = self.membership.notified();
            if self.state.borrow().is_member() {
                self.state.borrow_mut().problems.set(Code::Admission, "", None);
                if self.reclaim().await {
                    // Wait for a change of the map: a later one may have forgotten this host.
                    news.await;
                } else {
                    tokio::time::timeout(RECLAIM_RETRY, news).await.ok();
                }
                continue;
            }
            self.seek_admission(&mut known_since).await;
            if !self.state.borrow().is_member() {
                tokio::time::timeout(ADMISSION_RETRY, news).await.ok();
            }
        }
    }

    /// Requests admission once the members are known, because one of them may have this host's name.
    async fn seek_admission(&self, known_since: &mut Option<Instant>) {
        let (me, fresh, strangers, blocked) = {
            let state = self.state.borrow();
            if state.leaving {
                return;
            }
            let alloc = &state.view.alloc;
            let strangers = alloc.members.iter().any(|member| !state.view.nodes.contains_key(member));
            let blocked = self.not_admitted_because(&state);
            (state.view.me, alloc.cluster == 0, strangers, blocked)
        };
        if fresh {
            for peer in self.peers_with_map(FIRST_ASKED) {
                self.ask_map(peer);
            }
            // It chooses among the answers of the last time.
            self.tick_alloc();
            if self.state.borrow().epoch.elapsed() > NOBODY_AFTER {
                let sentence = self.nobody_found();
                self.state.borrow_mut().problems.set(Code::Admission, "", Some(sentence));
            }
            return;
        }
        // No host has a record of members that have been dead for long, so the wait is limited.
        let known_since = known_since.get_or_insert_with(Instant::now);
        if let Some(reason) = blocked {
            self.state.borrow_mut().problems.set(Code::Admission, "", Some(reason));
        } else if (!strangers || known_since.elapsed() > RECORDS_WITHIN)
            && let Err(failed) = self.change(Change::Admit(me)).await
        {
            let sentence = format!("not admitted yet: {}", failed.0.message);
            self.state.borrow_mut().problems.set(Code::Admission, "", Some(sentence));
        }
    }

    /// Returns why this host must not request admission. `None` if it may.
    pub(super) fn not_admitted_because(&self, state: &State) -> Option<String> {
        self.stands_aside(state).or_else(|| self.shut_out(state))
    }

    /// Returns why this host must not request admission because of its name. `None` if it may.
    ///
    /// A host whose name is in use waits until it has another name. The name is in use if a member has it, or a live
    /// host with a smaller id that is waiting too.
    fn stands_aside(&self, state: &State) -> Option<String> {
        let double = state.view.nodes.values().find(|node| {
            let id = node.record.id;
            let before = state.view.alloc.members.contains(&id)
                || (node.state == PeerState::Alive && id < state.view.me);
            id != state.view.me && node.record.name == self.config.node && before
        })?;
        Some(format!(
            "not admitted: the host {} at {} is already named {}. Give this one another name with --node; or, if \
             that one is gone for good, run `ovlctl peers forget {}` on another host",
            double.record.id, double.record.address, self.config.node, double.record.id
        ))
    }

    /// Returns why this host must not request admission because of its cluster key. `None` if it may.
    ///
    /// A host that was removed from the cluster needs the latest cluster key to return, and one that `ovlctl peers
    /// forget` removed needs the consent of the cluster.
    fn shut_out(&self, state: &State) -> Option<String> {
        if state.view.alloc.banned.contains(&state.view.me) {
            return Some(format!(
                "not admitted: this host was taken out of the cluster, with `ovlctl peers forget` or by a recovery from the \
                 loss of a majority. To let it return, run `ovlctl peers admit {}` on a member",
                state.view.me
            ));
        }
        let file = self.config.cluster_key.as_ref()?;
        let key = state.view.alloc.key?.id;
        let out = state.view.alloc.forgotten.contains(&state.view.me)
            && !state.record().is_some_and(|record| record.keys.has(key));
        out.then(|| {
            format!(
                "not admitted: this host was taken out of the cluster, whose key is being changed to {key}. Put the \
                 new key into {}, mode 0600, and restart ovld",
                file.display()
            )
        })
    }

    /// Ends the ban of a host: `ovlctl peers admit`. The host then asks to be admitted by itself.
    ///
    /// A host that was just cut off or started again may have told its operator of the ban before this host hears its
    /// name. So a name that may be that of a banned host is waited for.
    pub(super) async fn end_ban(&self, name: &str) -> Result<(), Failed> {
        let node = self.wait_until(READY_WITHIN, |state| banned_host(&state.view, name)).await?;
        self.change(Change::Unban(node)).await?;
        self.event("peer", name, "may return, by request");
        Ok(())
    }

    /// Returns the problem to report if no member of a cluster was found.
    fn nobody_found(&self) -> String {
        let whom = match (self.config.join.join(", "), self.config.join_nodes) {
            (_, true) => "the Nodes of the API server, which ovl-kube of this host names".to_owned(),
            (join, false) if join.is_empty() => "peers".to_owned(),
            (join, false) => join,
        };
        format!(
            "not admitted: no member of a cluster was found at {whom}. Check that ovld runs there with the same \
             cluster key and that UDP and TCP port {} is open; to begin a new cluster start one host with --bootstrap",
            self.config.advertise.port()
        )
    }

    /// Reclaims the blocks and leases of endpoints that existed before this host became a member (again). Returns
    /// whether all of it is done.
    ///
    /// Endpoints whose addresses now belong to other hosts are isolated and reported.
    async fn reclaim(&self) -> bool {
        let wanted: Vec<(NetworkId, IpAddr)> = {
            let state = self.state.borrow();
            state
                .own_endpoints()
                .flat_map(|endpoint| endpoint.addresses.iter().map(|net| (endpoint.network, net.addr())))
                .filter(|(network, address)| !state.view.may_use(state.view.me, *network, *address))
                .collect()
        };
        let mut done = true;
        for (network, address) in wanted {
            let block = {
                let state = self.state.borrow();
                block_of(&state.view, network, address)
            };
            let Some(prefix) = block else { continue };
            let (me, held) = {
                let state = self.state.borrow();
                (state.view.me, state.view.holder_of(network, address))
            };
            match held {
                None => {
                    let claim = Change::ClaimExact { block: Block { network, prefix }, owner: me };
                    if let Err(failed) = self.change(claim).await {
                        done = false;
                        tracing::warn!(%address, error = failed.0.message, "cannot claim a block again");
                    }
                }
                Some(holder) if holder != me => {
                    let reply = self.lease(holder, network, LeaseWish::Exact(address)).await;
                    if let Err(error) = reply {
                        done = false;
                        tracing::warn!(%address, error, "cannot lease an address again");
                    }
                }
                Some(_) => {}
            }
        }
        self.note_isolated();
        done
    }

    /// Isolates local endpoints whose addresses belong to other hosts, and reports them as problems.
    pub(super) fn note_isolated(&self) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        if !state.is_member() {
            return;
        }
        let isolated: std::collections::BTreeMap<_, _> = state
            .own_endpoints()
            .filter_map(|endpoint| {
                let address = state.view.address_conflict(state.view.me, endpoint)?;
                // If no host holds the block, it is being reclaimed, or will be once there is a majority.
                let holder = state.view.name_of(state.view.holder_of(endpoint.network, address)?);
                let sentence = format!(
                    "endpoint {} is cut off: its address {address} is in a block of {holder} now. Detach it and attach \
                     it again to give it another one",
                    endpoint.name
                );
                Some((endpoint.id, sentence))
            })
            .collect();
        let sentences: Vec<_> =
            isolated.iter().map(|(id, sentence)| (id.to_string(), sentence.clone())).collect();
        if !state.local.isolation.replace(isolated) {
            return;
        }
        state.problems.replace(Code::EndpointIsolated, sentences);
        state.changed(What::ThisHost);
        self.work.notify_one();
    }

    /// Requests, as the coordinator, that members that have been dead for longer than `forget_after` are forgotten.
    pub(super) fn forget_long_dead(&self) {
        if self.config.forget_after.is_zero() {
            return;
        }
        let over: Vec<NodeId> = {
            let state = self.state.borrow();
            if !state.is_coordinator() {
                return;
            }
            let limit = super::peers::millis(self.config.forget_after);
            state
                .peers
                .iter()
                .filter(|(id, peer)| {
                    !peer.signs.gossip
                        && state.view.alloc.members.contains(id)
                        && self.wall_ms().saturating_sub(peer.last_alive_ms) > limit
                })
                .map(|(id, _)| *id)
                .collect()
        };
        for node in over {
            tracing::info!(%node, "dead for longer than forget_after: asking to forget it");
            self.request_change(Change::Forget(node), None);
        }
    }
}
