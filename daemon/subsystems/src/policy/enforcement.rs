//! The `Subsystem` implementation of network policies.
//!
//! [`Enforcement`] owns the [`PolicyLedger`] (the policies that were last sent) and the addresses that may have changed
//! since. Begin to read at its `plan`.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::{Direction, Policies, PolicyLedger, part};
use ovl_cluster::resources::Resources;
use ovl_cluster::view::View;
use ovl_dataplane::op::Op;
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::NetworkId;
use ovl_proto::object::Network;
use ovl_proto::resource::{Kind, Name};
use ovl_proto::table::{Endpoint, Entry};

use crate::rejected::Rejected;
use crate::subsystem::{Change, Cluster, Outcome, Part, Subsystem};

/// The network policies that were last sent, and the addresses that may have changed since.
#[derive(Debug)]
pub struct Enforcement {
    ledger: PolicyLedger,
    /// Whether all endpoints may have changed.
    all_changed: bool,
    /// Addresses whose endpoints may have changed.
    touched: BTreeSet<(NetworkId, IpAddr)>,
    /// The first reason since the last full pass why policies may not be in force.
    refused: Rejected,
}

impl Enforcement {
    /// Begins with a generation. Connections that an earlier run marked with another generation are judged again.
    pub fn new(generation: u32) -> Self {
        Self {
            ledger: PolicyLedger::new(generation),
            all_changed: false,
            touched: BTreeSet::new(),
            refused: Rejected::default(),
        }
    }

    /// Returns the policies that were last sent.
    pub fn policies(&self) -> &Policies {
        self.ledger.policies()
    }

    /// Returns the directions in which an endpoint of a namespace is isolated while its labels are not known.
    pub fn undecided(&self, resources: &Resources, namespace: &str) -> Vec<String> {
        let policies = self.ledger.policies();
        let isolated = |direction: &Direction| {
            !policies.deciding(resources, namespace, None, *direction).undecided.is_empty()
        };
        Direction::ALL.into_iter().filter(isolated).map(|direction| direction.name().to_owned()).collect()
    }

    fn touch(&mut self, endpoint: &Endpoint) {
        self.touched.extend(endpoint.addresses.iter().map(|net| (endpoint.network, net.addr())));
    }

    /// Records that the labels of a pod's endpoints may have changed.
    fn touch_pod(&mut self, view: &View, pod: &Name) {
        view.all_of_pod(pod).for_each(|placed| self.touch(placed.endpoint));
    }
}

impl Subsystem for Enforcement {
    fn changed(&mut self, change: &Change<'_>, cluster: &Cluster<'_>) {
        match *change {
            Change::Entry { entry: Entry::Endpoint(endpoint), .. } | Change::Attaching(endpoint) => {
                self.touch(endpoint);
                // It may have become, or ceased to be, the one that stands for its pod.
                if endpoint.pod.is_some() {
                    self.touch_pod(cluster.view, &endpoint.pod_name());
                }
            }
            Change::Resources(keys) => {
                for key in keys {
                    match key.kind {
                        Kind::NetworkPolicy | Kind::ClusterNetworkPolicy | Kind::Namespace | Kind::Node => {
                            self.all_changed = true;
                        }
                        Kind::Pod => self.touch_pod(cluster.view, &key.name),
                        Kind::Service | Kind::EndpointSlice | Kind::ServiceCidr => {}
                    }
                }
            }
            // With a network or a host, the right to many addresses may change.
            Change::Rights(_)
            | Change::HostRights { .. }
            | Change::Network(_)
            | Change::Built(_)
            | Change::Host(_)
            | Change::Tunnel
            | Change::ThisHost => self.all_changed = true,
            Change::Entry { .. }
            | Change::Backends(_)
            | Change::Groups(_)
            | Change::FastPath
            | Change::Uplink => {}
        }
    }

    fn desired(&self, cluster: &Cluster<'_>) -> Dataplane {
        part(cluster.view, cluster.local, self.ledger.generation())
    }

    fn resync(&mut self, cluster: &Cluster<'_>) -> Dataplane {
        self.all_changed = false;
        self.touched.clear();
        self.ledger.resync(cluster.view, cluster.local, cluster.caught_up)
    }

    fn plan(&mut self, cluster: &Cluster<'_>) -> Vec<Op> {
        let touched = std::mem::take(&mut self.touched);
        let all = std::mem::take(&mut self.all_changed) || !cluster.caught_up;
        if !all && let Some(ops) = self.ledger.plan_touched(cluster.view, cluster.local, &touched) {
            return ops;
        }
        self.ledger.plan(cluster.view, cluster.local, cluster.caught_up)
    }

    fn sent(&self) -> Option<Dataplane> {
        self.refused.reason().is_none().then(|| self.ledger.sent().clone())
    }

    fn prepare(&mut self, _: &Endpoint, _: &Network, cluster: &Cluster<'_>) -> Part {
        Part { before: self.plan(cluster), wants: Dataplane::default() }
    }

    fn outcome(&mut self, outcome: Outcome<'_>) {
        if let Some(reason) = outcome.refusal.filter(|_| outcome.op.is_policy()) {
            self.refused.note(reason);
        }
    }

    fn batch_done(&mut self, full: bool) {
        self.refused.batch_done(full);
    }

    fn refusal(&self, _: NetworkId) -> Option<&str> {
        self.refused.reason()
    }

    fn withdraw(&mut self) {
        *self = Self::new(self.ledger.generation());
    }
}
