//! Recovery from the loss of a majority: what an operator is told before it, the recovery itself, and what hosts of the
//! earlier and of the recovered cluster report of each other. The rules are in the documentation of `ovl-consensus`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ovl_consensus::{LOST_MS, RecoveryEnd, majority};
use ovl_control::{PeerState, RecoverStep, RecoveryInfo, RecoveryMember, RecoveryPlan, RecoveryState};
use ovl_proto::alloc::{Dissent, RecoveryProof};
use ovl_proto::clock::timestamp;
use ovl_proto::id::NodeId;
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::peers::is_foreign;
use super::state::State;
use super::{Failed, Node};
use crate::peers::Peer;
use crate::problems::Code;
use ovl_subsystems::Change;

/// How long a requested recovery may take: the survivors have 5 s to consent, and the disk the rest.
const RECOVER_WITHIN: Duration = Duration::from_secs(15);
/// How long a host that accepts a recovery waits for the map of the recovered cluster.
const OFFER_WITHIN: Duration = Duration::from_secs(5);
/// How often it asks for it.
const LOOK_EVERY: Duration = Duration::from_millis(500);

impl Node {
    /// Answers [`ovl_control::Request::Recover`].
    pub(super) async fn recover(&self, step: RecoverStep) -> Result<RecoveryPlan, Failed> {
        // So that the answer is about what `ovlctl peers` shows now.
        self.look_for_recoveries(false);
        match step {
            RecoverStep::Plan => {}
            RecoverStep::Confirm { version, survivors } => {
                self.recover_from_loss(version, &survivors.into_iter().collect()).await?;
            }
            RecoverStep::Accept => self.accept_recovery().await?,
            RecoverStep::Reject => self.reject_recovery().await?,
        }
        Ok(self.recovery_plan())
    }

    pub(super) fn recovery_plan(&self) -> RecoveryPlan {
        let state = self.state.borrow();
        let alloc = &state.view.alloc;
        let mut members: Vec<RecoveryMember> = alloc.members.iter().map(|id| member(&state, *id)).collect();
        members.sort_by(|a, b| (!a.own, &a.name, a.id).cmp(&(!b.own, &b.name, b.id)));
        let last = state.allocator.recoveries().last().map(|proof| info(&state, proof));
        let left_out = state.allocator.held().map(|proof| info(&state, proof));
        let refused = self.no_recovery_because(&state, &members);
        let has_majority = state.allocator.majority_lost_for(state.now()).is_none();
        let costs = if refused.is_none() { costs(&members) } else { Vec::new() };
        RecoveryPlan {
            state: match &refused {
                _ if left_out.is_some() => RecoveryState::LeftOut,
                Some(_) if has_majority && state.is_member() && last.is_some() => RecoveryState::Recovered,
                Some(_) => RecoveryState::Refused,
                None => RecoveryState::Possible,
            },
            version: alloc.version,
            needed: u32::try_from(majority(alloc.members.len())).unwrap_or(u32::MAX),
            members,
            refused,
            costs,
            last,
            left_out,
        }
    }

    /// Returns why there can be no recovery on this host now. `None` if there can be one.
    fn no_recovery_because(&self, state: &State, members: &[RecoveryMember]) -> Option<String> {
        if let Some(held) = state.allocator.held() {
            return Some(self.left_out_sentence(state, held));
        }
        if !state.is_member() {
            return Some(
                "this host is not a member of the cluster: run the command on a member that survived, or see `ovlctl \
                 status` for what this host waits for"
                    .to_owned(),
            );
        }
        let names = |which: PeerState| -> Vec<&str> {
            let found = members.iter().filter(|member| !member.own && member.state == which);
            found.map(|member| member.name.as_str()).collect()
        };
        let Some(lost_ms) = state.allocator.majority_lost_for(state.now()) else {
            let (alive, suspect) = (names(PeerState::Alive), names(PeerState::Suspect));
            if suspect.is_empty() {
                return Some(format!(
                    "a majority of the {} members is alive ({}), so nothing is lost for good: `ovlctl peers forget NODE` \
                     takes out single dead hosts",
                    members.len(),
                    if alive.is_empty() { "this host".to_owned() } else { alive.join(", ") }
                ));
            }
            return Some(format!(
                "a majority of the members is there: {} does not gossip, but its kernel answers. Start ovld there. If it \
                 is lost for good, wait until `ovlctl peers` lists it as dead (at most {} s)",
                suspect.join(", "),
                self.config.keep.as_secs()
            ));
        };
        if lost_ms < LOST_MS {
            return Some(format!(
                "a majority of the members answered less than {} s ago, or ovld has just started: wait {} s, and run the \
                 command again",
                LOST_MS / 1000,
                (LOST_MS - lost_ms).div_ceil(1000)
            ));
        }
        if let Some(other) =
            members.iter().find(|member| !member.survives && member.state == PeerState::Alive)
        {
            return Some(format!(
                "host {} is alive and belongs to another cluster, which may be a recovery of this one that was made there. \
                 Wait until `ovlctl status` here says so",
                other.name
            ));
        }
        let suspect = names(PeerState::Suspect);
        (!suspect.is_empty()).then(|| {
            format!(
                "{} does not gossip, but its kernel answers, so it is not lost and cannot agree either. Start ovld there, \
                 or wait until `ovlctl peers` lists it as dead (at most {} s)",
                suspect.join(", "),
                self.config.keep.as_secs()
            )
        })
    }

    pub(super) async fn recover_from_loss(
        &self,
        version: u64,
        survivors: &BTreeSet<NodeId>,
    ) -> Result<(), Failed> {
        let plan = self.recovery_plan();
        match plan.state {
            RecoveryState::Recovered => return Ok(()),
            RecoveryState::Refused | RecoveryState::LeftOut => {
                return Err(Failed::conflict(plan.refused.unwrap_or_default()));
            }
            RecoveryState::Possible => {}
        }
        let now: BTreeSet<NodeId> =
            plan.members.iter().filter(|member| member.survives).map(|member| member.id).collect();
        if plan.version != version || now != *survivors {
            return Err(Failed::conflict(
                "what this host sees of the cluster changed since it was confirmed: look at it again with `ovlctl \
                 recover --from-majority-loss --dry-run`",
            ));
        }
        let cluster = u64::from_le_bytes(self.random()).max(1);
        let (tell, end) = oneshot::channel();
        let output = {
            let mut state = self.state.borrow_mut();
            if state.maps.is_recovering() {
                return Err(Failed::conflict("a recovery is under way on this host: wait for its end"));
            }
            let (now, wall) = (state.now(), state.wall_ms());
            let output = state.allocator.recover(now, cluster, wall);
            let output = output.map_err(|why| Failed::conflict(dissent(&state, None, &why)))?;
            state.maps.recover(tell);
            output
        };
        let lost: Vec<&str> =
            plan.members.iter().filter(|member| !member.survives).map(|member| &*member.name).collect();
        tracing::warn!(
            lost = lost.join(","),
            "recovers the cluster from the loss of its majority, by request"
        );
        self.carry_out(output);
        let end = match tokio::time::timeout(RECOVER_WITHIN, end).await {
            Ok(Ok(end)) => end,
            Ok(Err(_)) => return Err(Failed::unavailable("ovld is stopping")),
            Err(_) => return Err(self.disk_is_stuck()),
        };
        let state = self.state.borrow();
        match end {
            RecoveryEnd::Done => {}
            RecoveryEnd::Refused { by, why } => {
                return Err(Failed::conflict(dissent(&state, Some(by), &why)));
            }
            RecoveryEnd::Silent(silent) => {
                let silent: Vec<NodeId> = silent.into_iter().collect();
                return Err(Failed::unavailable(format!(
                    "nothing was changed: {} is alive and did not consent within 5 s. See `ovlctl status` there, and run \
                     the command again",
                    state.names_of(&silent)
                )));
            }
            RecoveryEnd::Changed => {
                return Err(Failed::conflict(
                    "nothing was changed: this host learned a later state of the cluster meanwhile. Run the command again",
                ));
            }
        }
        drop(state);
        let message = format!("cluster recovered from the loss of its majority, without {}", lost.join(", "));
        self.event("peer", &self.config.node, &message);
        Ok(())
    }

    async fn accept_recovery(&self) -> Result<(), Failed> {
        let until = Instant::now() + OFFER_WITHIN;
        let output = loop {
            let by = {
                let mut state = self.state.borrow_mut();
                let Some(held) = state.allocator.held().cloned() else { return Err(nothing_left_out()) };
                match state.allocator.accept_recovery() {
                    Some(output) => break output,
                    None => state.view.name_of(held.recovery.ballot.node),
                }
            };
            if Instant::now() >= until {
                return Err(Failed::unavailable(format!(
                    "the recovered cluster has not answered yet: it is asked through host {by} and the other hosts that \
                     this host knows. Check that they run and are reachable, and try again. If none of them is left, stop \
                     ovld here, remove its state directory, and start it again with --join"
                )));
            }
            // A host that has just started may not have asked yet.
            self.look_for_recoveries(true);
            tokio::time::sleep(LOOK_EVERY).await;
        };
        self.carry_out(output);
        self.saved().await?;
        self.event("peer", &self.config.node, "joins the recovered cluster, by request");
        Ok(())
    }

    async fn reject_recovery(&self) -> Result<(), Failed> {
        let output = self.state.borrow_mut().allocator.reject_recovery().ok_or_else(nothing_left_out)?;
        self.carry_out(output);
        self.saved().await?;
        self.event("peer", &self.config.node, "goes on in spite of a recovery by other hosts, by request");
        Ok(())
    }

    /// Tells the replica which members are there, and asks those of another cluster whether it is a recovery of this one.
    pub(super) fn look_for_recoveries(&self, ask: bool) {
        let (outputs, closed) = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let now = state.now();
            let (mut present, mut others) = (BTreeSet::new(), Vec::new());
            for node in state.view.nodes.values() {
                let id = node.record.id;
                if id == state.view.me || !state.view.alloc.members.contains(&id) {
                    continue;
                }
                if is_foreign(state, &node.record) {
                    let known = state.allocator.has_refused(node.record.cluster);
                    if node.state == PeerState::Alive && !known {
                        others.push(id);
                    }
                } else if matches!(node.state, PeerState::Alive | PeerState::Suspect) {
                    present.insert(id);
                }
            }
            state.allocator.note_present(now, present);
            let ask = ask && state.allocator.wants_recovery();
            let asked = others.into_iter().filter(|_| ask);
            let outputs: Vec<_> = asked.map(|id| state.allocator.ask_recovery(id)).collect();
            self.note_recoveries(state);
            let closed = state.allocator.held().is_some();
            if state.subsystems.announcements.set_left_out(closed) {
                state.changed(Change::Uplink);
                self.work.notify_one();
            }
            (outputs, closed)
        };
        outputs.into_iter().for_each(|output| self.carry_out(output));
        if closed {
            // Requests that wait for the start are refused now.
            self.membership.notify_waiters();
        }
    }

    /// Reports recoveries of which hosts of both sides are there.
    fn note_recoveries(&self, state: &mut State) {
        let mut sentences = BTreeMap::new();
        let mut related = Vec::new();
        if let Some(held) = state.allocator.held() {
            sentences.insert(String::new(), self.left_out_sentence(state, held));
        }
        for node in state.view.nodes.values() {
            let record = &node.record;
            if !is_foreign(state, record) {
                continue;
            }
            let ours =
                state.allocator.recoveries().iter().find(|proof| proof.recovery.from == record.cluster);
            let sentence = match ours {
                Some(proof) => Some(format!(
                    "host {} at {} is still in the cluster from which this one was recovered at {}. It is not a member, \
                     and its endpoints are not used. If it is to return, run `ovlctl recover --accept` there, and then \
                     `ovlctl peers admit {}` here; if not, stop ovld there, and remove its state directory",
                    record.name,
                    record.address,
                    timestamp(proof.recovery.at_ms),
                    record.id
                )),
                None if !state.view.alloc.members.contains(&record.id) => None,
                None if state.allocator.held().is_some() => {
                    related.push(record.id);
                    None
                }
                None if state.allocator.has_refused(record.cluster) => Some(format!(
                    "host {} at {} was recovered from the loss of a majority that is not lost: this host and others go \
                     on, so there are two clusters, which may hand out the same addresses. On that host, and on the hosts \
                     that followed it, stop ovld and remove its state directory; run `ovlctl peers forget {}` here, and \
                     start ovld there again with --join",
                    record.name, record.address, record.id
                )),
                None => None,
            };
            if let Some(sentence) = sentence {
                related.push(record.id);
                sentences.insert(record.id.to_string(), sentence);
            }
        }
        for id in related {
            state.problems.set(Code::ForeignCluster, id.to_string(), None);
        }
        state.problems.replace(Code::Recovered, sentences);
    }

    fn left_out_sentence(&self, state: &State, held: &RecoveryProof) -> String {
        let by = state.view.name_of(held.recovery.ballot.node);
        format!(
            "the cluster was recovered on host {by} at {} from the loss of its majority, without this host. So this host \
             takes part in no agreement, attaches nothing, and announces no addresses of LoadBalancers, and the members do \
             not use its endpoints. To return, run `ovlctl recover --accept` here, and then `ovlctl peers admit {}` on {by}. \
             If a majority of the old cluster was not lost and is to go on, run `ovlctl recover --reject` on each of its \
             hosts",
            timestamp(held.recovery.at_ms),
            state.view.me
        )
    }

    /// Returns why this host serves no request that needs the cluster, because of a recovery. `None` if it does.
    pub(super) fn left_out(&self, state: &State) -> Option<String> {
        state.allocator.held().map(|held| self.left_out_sentence(state, held))
    }

    /// Passes the end of a recovery on to the request that waits for it.
    pub(super) fn on_recovery_ended(&self, end: RecoveryEnd) {
        if let Some(waiting) = self.state.borrow_mut().maps.take_recovery() {
            // The requester may have timed out.
            waiting.send(end).ok();
        }
    }
}

fn nothing_left_out() -> Failed {
    Failed::conflict(
        "this host was not left out of a recovery: there is nothing to accept or to reject. `ovlctl status` says what it is \
         part of",
    )
}

fn member(state: &State, id: NodeId) -> RecoveryMember {
    let own = id == state.view.me;
    let node = state.view.nodes.get(&id);
    let here = node.is_some_and(|node| !is_foreign(state, &node.record));
    let verdict = node.map_or(PeerState::Dead, |node| node.state);
    let endpoints = node.map_or(0, |node| node.table.endpoints().count());
    let blocks = state.view.alloc.blocks.values().filter(|holder| **holder == id).count();
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    RecoveryMember {
        name: state.view.name_of(id),
        id,
        own,
        state: if own { PeerState::Alive } else { verdict },
        survives: own || (verdict == PeerState::Alive && here),
        last_alive_ms: state.peers.get(id).map(Peer::last_alive_ms).filter(|_| !own),
        blocks: count(blocks),
        endpoints: count(endpoints),
    }
}

fn info(state: &State, proof: &RecoveryProof) -> RecoveryInfo {
    let recovery = &proof.recovery;
    RecoveryInfo {
        at_ms: recovery.at_ms,
        by: state.view.name_of(recovery.ballot.node),
        by_id: recovery.ballot.node,
        survivors: recovery.survivors.iter().map(|id| state.view.name_of(*id)).collect(),
    }
}

/// Returns what a recovery may cost.
fn costs(members: &[RecoveryMember]) -> Vec<String> {
    let lost: Vec<&RecoveryMember> = members.iter().filter(|member| !member.survives).collect();
    let names: Vec<&str> = lost.iter().map(|member| member.name.as_str()).collect();
    let (blocks, endpoints) = lost.iter().fold((0_u32, 0_u32), |sum, each| {
        (sum.0.saturating_add(each.blocks), sum.1.saturating_add(each.endpoints))
    });
    vec![
        "If a majority of the members lives where this host does not see it, there are two clusters afterwards: both hand \
         out addresses, also the same ones, and only one of them can be kept. Make sure that the lost hosts are off"
            .to_owned(),
        format!(
            "{} taken out, as by `ovlctl peers forget`: {blocks} address blocks become free, and {endpoints} endpoints are \
             gone",
            if names.len() == 1 { format!("{} is", names.join("")) } else { format!("{} are", names.join(", ")) }
        ),
        "What a majority agreed on last, and no survivor learned, is lost: blocks that it gave, hosts that it admitted or \
         forgot, a rotation of the cluster key that it started"
            .to_owned(),
        "A lost host that comes back stays apart until `ovlctl recover --accept` on it and `ovlctl peers admit` on a member"
            .to_owned(),
    ]
}

/// Returns why a host does not consent. `by` is `None` for this host.
fn dissent(state: &State, by: Option<NodeId>, why: &Dissent) -> String {
    let by = by.filter(|by| *by != state.view.me);
    let who = by.map_or("this host".to_owned(), |by| format!("host {}", state.view.name_of(by)));
    match why {
        Dissent::Majority { present } => {
            let present: Vec<NodeId> = present.iter().copied().collect();
            let seen = if present.is_empty() { "none now".to_owned() } else { state.names_of(&present) };
            format!(
                "nothing was changed: {who} saw a majority of the members within the last {} s ({seen}). If the majority is \
                 lost for good, wait as long, and run the command again",
                LOST_MS / 1000
            )
        }
        Dissent::Sees(node) => format!(
            "nothing was changed: {who} sees host {}, which this host does not see. Repair the path between the two, or \
             run the command on a host that sees all that are left",
            state.view.name_of(*node)
        ),
        Dissent::Busy => format!(
            "nothing was changed: a recovery was requested on {who} at the same time. `ovlctl peers` shows whether that one \
             was made; if not, run the command again on one host"
        ),
        Dissent::OtherMap => format!(
            "nothing was changed: {who} knows another state of the cluster. See `ovlctl status` there, and run the command \
             again"
        ),
    }
}
