//! Hosts that are Nodes of a Kubernetes API server: through which hosts they join, and which members are forgotten because
//! their Node object was deleted. What is decided is in [`crate::kubernetes`].

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::rc::Rc;

use ovl_control::{Join, Nodes, OwnNode, PeerState, RecoveryState, Reply};
use ovl_proto::alloc::Change;
use ovl_proto::id::NodeId;
use ovl_proto::record::is_zone;
use ovl_subsystems::Change as What;
use tokio::task::spawn_local;

use super::state::State;
use super::{Failed, Node};
use crate::kubernetes::{NodeMember, deleted};

/// How many Nodes are known at most: twice what Kubernetes is made for.
const MOST_NODES: usize = 10_000;

impl Node {
    /// Takes over hosts to join through, and begins a cluster if this host is to.
    pub(super) fn join_nodes(&self, request: &Join) -> Result<Reply, Failed> {
        if !self.config.join_nodes {
            return Err(Failed::invalid(
                "this host does not join through the Nodes of an API server: set join = [\"kubernetes\"] in its \
                 configuration, and restart ovld",
            ));
        }
        if request.hosts.len() > Join::MOST {
            return Err(Failed::invalid(format!(
                "at most {} hosts can be named to join through",
                Join::MOST
            )));
        }
        let port = self.config.advertise.port();
        let hosts: Vec<SocketAddr> = request.hosts.iter().map(|host| SocketAddr::new(*host, port)).collect();
        self.gossip().set_joined(&hosts);
        if request.begin {
            self.begin_cluster();
        }
        self.follow_recovery();
        Ok(Reply::Done)
    }

    /// Begins a new cluster, unless this host knows of one.
    fn begin_cluster(&self) {
        let cluster = u64::from_le_bytes(self.random()).max(1);
        let output = {
            let mut state = self.state.borrow_mut();
            let others = state.view.nodes.values().filter(|node| node.record.id != state.view.me);
            let known =
                others.filter(|node| node.state == PeerState::Alive).any(|node| node.record.cluster != 0);
            if known || state.allocator.map().cluster != 0 {
                return;
            }
            state.allocator.bootstrap(cluster)
        };
        tracing::info!(cluster, "began a new cluster: the API server says that this host is the first one");
        self.carry_out(output);
    }

    /// Moves to the cluster that the members recovered while this host waited for its admission to the earlier one. It was no
    /// member, so no majority of the earlier cluster loses it, and it holds no blocks. Others that were left out decide for
    /// themselves: see [`ovl_control::RecoverStep::Accept`].
    fn follow_recovery(&self) {
        let output = {
            let mut state = self.state.borrow_mut();
            if state.is_member() {
                return;
            }
            state.allocator.accept_recovery()
        };
        if let Some(output) = output {
            self.carry_out(output);
            self.event(
                "peer",
                &self.config.node,
                "joins the recovered cluster: it was no member of the earlier one",
            );
        }
    }

    /// Returns the id of this host, if it needs hosts to join through.
    pub(super) fn seeks_nodes(&self, state: &State) -> Option<NodeId> {
        (self.config.join_nodes && !state.is_member()).then_some(state.view.me)
    }

    /// Takes over what the API server has of this host's Node. A zone in the configuration counts more than the Node's.
    pub(super) fn take_own_node(&self, own: OwnNode) -> Result<Reply, Failed> {
        let OwnNode { zone, pod_cidrs } = own;
        if !is_zone(&zone) {
            return Err(Failed::invalid(format!("the Node's zone '{zone}' is no name of a zone")));
        }
        self.state.borrow_mut().kubernetes.set_pod_cidrs(pod_cidrs);
        if self.config.zone.is_empty() && self.change_record(|record| record.zone.clone_from(&zone)) {
            self.event(
                "kubernetes",
                &self.config.node,
                &format!("this host is in the zone '{zone}', as its Node says"),
            );
            let mut state = self.state.borrow_mut();
            let me = state.view.me;
            state.changed(What::Host(me));
            self.work.notify_one();
        }
        Ok(Reply::Done)
    }

    /// Takes over which Nodes there are.
    pub(super) fn take_nodes(self: &Rc<Self>, nodes: Nodes) -> Result<Reply, Failed> {
        if nodes.names.len() > MOST_NODES {
            return Err(Failed::invalid(format!("at most {MOST_NODES} Nodes are taken over")));
        }
        {
            let mut state = self.state.borrow_mut();
            if !state.kubernetes.acts() {
                return Err(Failed::conflict("another host mirrors the objects of the API server"));
            }
            state.kubernetes.set_nodes(nodes.names);
        }
        self.forget_deleted_nodes();
        Ok(Reply::Done)
    }

    /// Forgets members that are lost and whose Node was deleted, on the host that knows the Nodes. If a majority of the
    /// members is lost that way, the others go on without it, as by `ovlctl recover`: who deletes a Node says that it does
    /// not come back.
    pub(super) fn forget_deleted_nodes(self: &Rc<Self>) {
        let (gone, majority) = {
            let state = self.state.borrow();
            let Some(nodes) = state.kubernetes.nodes().filter(|_| state.is_member()) else { return };
            let members = state.view.nodes.values().filter(|node| {
                state.view.alloc.members.contains(&node.record.id) && node.record.id != state.view.me
            });
            let members = members.map(|node| NodeMember {
                id: node.record.id,
                name: &node.record.name,
                is_node: node.record.is_node,
                is_lost: matches!(node.state, PeerState::Dead | PeerState::Left),
            });
            let gone = deleted(nodes, &self.config.node, members);
            (gone, state.allocator.majority_lost_for(state.now()).is_none())
        };
        if gone.is_empty() {
            return;
        }
        if majority {
            for node in gone {
                tracing::info!(%node, "its Node was deleted: asking to forget it");
                self.request_change(Change::Forget(node), None);
            }
            return;
        }
        let node = Rc::clone(self);
        spawn_local(async move { node.recover_from_deletion(&gone).await });
    }

    /// Goes on without members of which all that are lost were deleted.
    async fn recover_from_deletion(&self, gone: &BTreeSet<NodeId>) {
        let plan = self.recovery_plan();
        let (survivors, lost): (Vec<_>, Vec<_>) = plan.members.iter().partition(|member| member.survives);
        if plan.state != RecoveryState::Possible || !lost.iter().all(|member| gone.contains(&member.id)) {
            tracing::debug!(
                why = plan.refused.as_deref(),
                "a majority is lost, and not all of it was deleted, or not long ago"
            );
            return;
        }
        let survivors: BTreeSet<NodeId> = survivors.iter().map(|member| member.id).collect();
        if let Err(failed) = self.recover_from_loss(plan.version, &survivors).await {
            tracing::warn!(error = failed.0.message, "cannot go on without the Nodes that were deleted");
        }
    }
}
