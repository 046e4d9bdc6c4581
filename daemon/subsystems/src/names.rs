//! The subsystem of names: it records which DNS names may have changed, and leads queries to the resolver.
//!
//! [`NameTracker`] owns both. The daemon's resolver takes the marks and updates its zone from [`zone`] (endpoints) and
//! [`cluster_names`] (Services and pods); `delivery` owns what the kernel needs for the queries. Begin to read at the
//! `Subsystem` implementation of [`NameTracker`].

pub mod cluster_names;
mod delivery;
pub mod resolver;
pub mod zone;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ovl_cluster::backends::Settled;
use ovl_cluster::selectables::SelectableChange;
use ovl_dataplane::op::Op;
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::NetworkId;
use ovl_proto::object::Network;
use ovl_proto::resource::Name;
use ovl_proto::table::{Endpoint, Entry};

use self::delivery::Delivery;
use crate::subsystem::{Change, Cluster, Outcome, Part, Subsystem};

/// Names that may have changed.
#[derive(Debug, Default)]
pub struct NameMarks {
    /// Single names and addresses, by network.
    pub single: BTreeMap<NetworkId, zone::Marks>,
    /// Networks whose names may all have changed.
    pub networks: BTreeSet<NetworkId>,
    /// Services whose names may have changed.
    pub services: BTreeSet<Name>,
    /// Changes of pods, in order: namespace, addresses, and whether the pod exists.
    pub pods: Vec<(String, Vec<IpAddr>, bool)>,
}

impl NameMarks {
    fn settled(&mut self, settled: &Settled) {
        self.services.extend(settled.services.iter().cloned());
        for SelectableChange { before, after, .. } in &settled.selectables {
            for (selectable, is_there) in [(before, false), (after, true)] {
                let pod =
                    selectable.as_ref().map(|it| (it.name.namespace.clone(), it.addresses.clone(), is_there));
                self.pods.extend(pod);
            }
        }
    }
}

/// Tracks the names that may have changed, and leads queries to the resolver.
#[derive(Debug, Default)]
pub struct NameTracker {
    marks: NameMarks,
    delivery: Delivery,
}

impl NameTracker {
    /// Begins with the addresses of the cluster DNS, at most one of each family.
    pub fn new(cluster_dns: Vec<IpAddr>) -> Self {
        Self { marks: NameMarks::default(), delivery: Delivery::new(cluster_dns) }
    }

    /// Records that endpoints of this host on a network use the resolver. The next plan sends what they need.
    pub fn resolve(&mut self, network: NetworkId) {
        self.delivery.resolve(network);
    }

    /// Returns the names that may have changed since the last call.
    pub fn take_marks(&mut self) -> NameMarks {
        std::mem::take(&mut self.marks)
    }
}

impl Subsystem for NameTracker {
    fn changed(&mut self, change: &Change<'_>, cluster: &Cluster<'_>) {
        self.delivery.changed(change, cluster);
        match *change {
            Change::Entry { entry: Entry::Endpoint(endpoint), .. } => {
                self.marks.single.entry(endpoint.network).or_default().note(endpoint);
            }
            Change::Rights(network) | Change::Network(network) => {
                self.marks.networks.insert(network);
            }
            Change::Backends(settled) => self.marks.settled(settled),
            Change::Entry { .. }
            | Change::Built(_)
            | Change::Host(_)
            // The rights of all networks come before it.
            | Change::ThisHost
            | Change::Tunnel
            | Change::Attaching(_)
            | Change::Resources(_)
            | Change::Announcers
            | Change::Uplink => {}
        }
    }

    fn desired(&self, cluster: &Cluster<'_>) -> Dataplane {
        self.delivery.desired(cluster)
    }

    fn resync(&mut self, cluster: &Cluster<'_>) -> Dataplane {
        self.delivery.resync(cluster)
    }

    fn plan(&mut self, cluster: &Cluster<'_>) -> Vec<Op> {
        self.delivery.plan(cluster)
    }

    fn sent(&self) -> Option<Dataplane> {
        self.delivery.sent()
    }

    fn prepare(&mut self, _: &Endpoint, network: &Network, cluster: &Cluster<'_>) -> Part {
        Part { before: self.delivery.prepare(network.id, cluster), wants: Dataplane::default() }
    }

    fn outcome(&mut self, outcome: Outcome<'_>) {
        self.delivery.outcome(outcome);
    }

    fn withdraw(&mut self) {
        self.delivery.withdraw();
    }
}
