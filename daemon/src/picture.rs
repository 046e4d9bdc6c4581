//! The local host's picture of the cluster: every room reads it, and it is changed here alone.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;

use ovl_cluster::resources::Resources;
use ovl_cluster::table::Table;
use ovl_cluster::view::{NetworkState, Node, View};
use ovl_control::PeerState;
use ovl_proto::alloc::AllocMap;
use ovl_proto::id::{NetworkId, NodeId};
use ovl_proto::record::{NodeRecord, SignedRecord};

/// The local host's picture of the cluster, and the signed form of its own record.
#[derive(Debug)]
pub(crate) struct Picture {
    view: View,
    own_signed: SignedRecord,
}

impl Deref for Picture {
    type Target = View;

    fn deref(&self) -> &View {
        &self.view
    }
}

impl Picture {
    /// This host alone, with the allocation map of its last run.
    pub(crate) fn new(record: NodeRecord, signed: SignedRecord, alloc: AllocMap) -> Self {
        let me = record.id;
        let own = Node { record, state: PeerState::Alive, table: Table::new(me) };
        let view = View {
            me,
            nodes: BTreeMap::from([(me, own)]),
            networks: BTreeMap::new(),
            alloc,
            resources: Resources::default(),
            elsewhere: BTreeSet::new(),
        };
        Self { view, own_signed: signed }
    }

    /// Returns the signed form of this host's record.
    pub(crate) fn own_signed(&self) -> &SignedRecord {
        &self.own_signed
    }

    /// Takes the next record of this host.
    pub(crate) fn set_own(&mut self, record: NodeRecord, signed: SignedRecord) {
        if let Some(own) = self.view.nodes.get_mut(&self.view.me) {
            own.record = record;
        }
        self.own_signed = signed;
    }

    /// Takes the record of another host. One that was not known is suspect and has an empty table. Returns whether that is so.
    pub(crate) fn set_record(&mut self, record: NodeRecord) -> bool {
        let id = record.id;
        if let Some(node) = self.view.nodes.get_mut(&id) {
            node.record = record;
            return false;
        }
        let node = Node { record, state: PeerState::Suspect, table: Table::new(id) };
        self.view.nodes.insert(id, node);
        true
    }

    /// Takes the verdict about another host's liveness. Returns the verdict before; `None` if it is the same or no such host
    /// is known.
    pub(crate) fn judge(&mut self, id: NodeId, verdict: PeerState) -> Option<PeerState> {
        let node = self.view.nodes.get_mut(&id)?;
        let before = std::mem::replace(&mut node.state, verdict);
        (before != verdict).then_some(before)
    }

    /// Takes the hosts that are reached at another address than the main one, or reach this host so. Returns those for which that has
    /// changed.
    pub(crate) fn set_elsewhere(&mut self, hosts: BTreeSet<NodeId>) -> Vec<NodeId> {
        let before = std::mem::replace(&mut self.view.elsewhere, hosts);
        before.symmetric_difference(&self.view.elsewhere).copied().collect()
    }

    /// Forgets a host, and returns what was known of it.
    pub(crate) fn forget(&mut self, id: NodeId) -> Option<Node> {
        self.view.nodes.remove(&id)
    }

    /// Returns the table of a host, for a change that its owner made, with the owner's record.
    pub(crate) fn table_of(&mut self, owner: NodeId) -> Option<(&NodeRecord, &mut Table)> {
        let Node { record, table, .. } = self.view.nodes.get_mut(&owner)?;
        Some((record, table))
    }

    /// Takes a later allocation map, and returns the one before.
    pub(crate) fn learn(&mut self, alloc: AllocMap) -> AllocMap {
        std::mem::replace(&mut self.view.alloc, alloc)
    }

    /// Takes the networks after conflicts were resolved, and returns those before.
    pub(crate) fn set_networks(
        &mut self,
        networks: BTreeMap<NetworkId, NetworkState>,
    ) -> BTreeMap<NetworkId, NetworkState> {
        std::mem::replace(&mut self.view.networks, networks)
    }

    /// Returns the Kubernetes objects, for the store of cluster objects, which keeps them as its own.
    pub(crate) fn resources_mut(&mut self) -> &mut Resources {
        &mut self.view.resources
    }

    /// Forgets all networks and Kubernetes objects, because this host is torn down.
    pub(crate) fn clear(&mut self) {
        self.view.networks.clear();
        self.view.resources = Resources::default();
    }
}
