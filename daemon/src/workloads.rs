//! An index of the endpoints that labels select and of the backends of each Service, updated change by
//! change.

use std::collections::BTreeSet;

use ovl_cluster::backends::{Backends, Settled};
use ovl_cluster::view::View;
use ovl_proto::id::{EndpointId, NetworkId, NodeId};
use ovl_proto::table::Entry;

use ovl_subsystems::Change;

/// The index, with the changes since its last update.
#[derive(Default)]
pub(crate) struct Workloads {
    backends: Backends,
    /// Networks whose endpoints may all have become, or ceased to be, eligible.
    networks: BTreeSet<NetworkId>,
    endpoints: BTreeSet<(NodeId, EndpointId)>,
    /// Hosts that died or came back.
    hosts: BTreeSet<NodeId>,
}

impl Workloads {
    /// Returns the index as of the last [`Self::settle`].
    pub(crate) fn backends(&self) -> &Backends {
        &self.backends
    }

    /// Records a change for the next [`Self::settle`].
    pub(crate) fn changed(&mut self, change: &Change<'_>, view: &View) {
        match *change {
            Change::Entry { host, entry: Entry::Endpoint(endpoint) } => {
                self.endpoints.insert((host, endpoint.id));
            }
            Change::Rights(network) => {
                self.networks.insert(network);
            }
            Change::HostRights { host, network } => {
                let node = view.nodes.get(&host);
                let all = node.into_iter().flat_map(|node| node.table.endpoints_on(network));
                self.endpoints.extend(all.map(|endpoint| (host, endpoint.id)));
            }
            Change::Host(host) => {
                self.hosts.insert(host);
            }
            Change::Resources(keys) => keys.iter().for_each(|key| self.backends.touch_resource(view, key)),
            Change::Entry { .. }
            | Change::Network(_)
            | Change::Built(_)
            | Change::Tunnel
            | Change::ThisHost
            | Change::Attaching(_)
            | Change::Backends(_)
            | Change::Groups(_)
            | Change::FastPath
            | Change::Uplink => {}
        }
    }

    /// Applies all recorded changes to the index. Returns their effect on Services and members.
    pub(crate) fn settle(&mut self, view: &View) -> Settled {
        for network in std::mem::take(&mut self.networks) {
            self.backends.touch_network(view, network);
        }
        for (host, id) in std::mem::take(&mut self.endpoints) {
            self.backends.touch_endpoint(view, host, id);
        }
        for host in std::mem::take(&mut self.hosts) {
            self.backends.touch_host(view, host);
        }
        self.backends.settle(view)
    }

    /// Clears the index, for teardown.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}
