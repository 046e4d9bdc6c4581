//! Membership of this host: it asks to be admitted, and reclaims what its endpoints had before. As the coordinator, it has
//! hosts forgotten that have been dead for long.

use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use ovl_cluster::view::View;
use ovl_control::PeerState;
use ovl_proto::alloc::{Block, Change};
use ovl_proto::id::{NetworkId, NodeId};
use ovl_proto::sync::LeaseWish;
use tokio::time::Instant;

use super::ready::{READY_WITHIN, Waits};
use super::state::State;
use super::{Failed, Node};
use crate::addresses::block_of;
use crate::problems::Code;
use ovl_subsystems::Change as What;

/// Time between two attempts to reclaim this host's addresses. The streams to other hosts may not be up yet.
const RECLAIM_RETRY: Duration = Duration::from_secs(2);
/// Time between two attempts to become a member.
const ADMISSION_RETRY: Duration = Duration::from_millis(200);
/// How long a host looks for a cluster before it reports that there is none.
const NONE_AFTER: Duration = Duration::from_secs(3);
/// How many peers a host without a map asks for it at a time.
const FIRST_ASKED: usize = 3;
/// How long a new host waits for the records of all members before it requests admission.
const RECORDS_WITHIN: Duration = Duration::from_secs(2);
/// How many ids of hosts an error lists.
const SHOWN_IDS: usize = 5;

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
            if state.phase.is_leaving() {
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
            if self.state.borrow().clock.elapsed() > NONE_AFTER {
                let sentence = self.none_found();
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
    fn none_found(&self) -> String {
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
                    !peer.signs().gossip
                        && state.view.alloc.members.contains(id)
                        && self.wall_ms().saturating_sub(peer.last_alive_ms()) > limit
                })
                .map(|(id, _)| id)
                .collect()
        };
        for node in over {
            tracing::info!(%node, "dead for longer than forget_after: asking to forget it");
            self.request_change(Change::Forget(node), None);
        }
    }
}
