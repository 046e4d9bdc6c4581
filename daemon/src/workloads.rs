//! Who can be selected by labels and what stands behind each Service, kept up to date change by change.

use std::collections::BTreeSet;

use ovl_cluster::backends::{Backends, Settled};
use ovl_cluster::view::View;
use ovl_proto::id::{EndpointId, NetworkId, NodeId};
use ovl_proto::table::Entry;

use ovl_subsystems::Change;

/// The index, and what may have changed since it was last brought up to date.
#[derive(Default)]
pub(crate) struct Workloads {
    backends: Backends,
    /// Networks of which all endpoints may have begun or ceased to count.
    networks: BTreeSet<NetworkId>,
    endpoints: BTreeSet<(NodeId, EndpointId)>,
    /// Hosts that died or came back.
    hosts: BTreeSet<NodeId>,
}

impl Workloads {
    /// The index, as of the last [`Self::settle`].
    pub(crate) fn backends(&self) -> &Backends {
        &self.backends
    }

    /// Records a change.
    pub(crate) fn changed(&mut self, change: &Change<'_>, view: &View) {
        match *change {
            Change::Entry { host, entry: Entry::Endpoint(endpoint) } => {
                self.endpoints.insert((host, endpoint.id));
            }
            Change::Rights(network) => {
                self.networks.insert(network);
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
            | Change::Publishing
            | Change::Backends(_)
            | Change::Announcers
            | Change::Uplink => {}
        }
    }

    /// Works out what all recorded changes mean for Services and members.
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

    /// Forgets everything: teardown.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }
}
