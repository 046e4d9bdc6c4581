//! The subsystem of names: it records which DNS names may have changed.
//!
//! [`NameTracker`] owns these marks; it wants nothing in the kernel. The daemon's resolver takes the marks and updates
//! its zone from [`zone`] (endpoints) and [`cluster_names`] (Services and pods); [`resolver`] redirects queries to it.
//! Begin to read at the `Subsystem` implementation of [`NameTracker`].

pub mod cluster_names;
pub mod resolver;
pub mod zone;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ovl_cluster::backends::Settled;
use ovl_cluster::selectables::SelectableChange;
use ovl_dataplane::op::Op;
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::NetworkId;
use ovl_proto::resource::Name;
use ovl_proto::table::Entry;

use crate::subsystem::{Change, Cluster, Subsystem};

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

/// Tracks the names that may have changed.
#[derive(Debug, Default)]
pub struct NameTracker {
    marks: NameMarks,
}

impl NameTracker {
    /// Returns the names that may have changed since the last call.
    pub fn take_marks(&mut self) -> NameMarks {
        std::mem::take(&mut self.marks)
    }
}

impl Subsystem for NameTracker {
    fn changed(&mut self, change: &Change<'_>, _: &Cluster<'_>) {
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
            | Change::Publishing
            | Change::Resources(_)
            | Change::Announcers
            | Change::Uplink => {}
        }
    }

    fn desired(&self, _: &Cluster<'_>) -> Dataplane {
        Dataplane::default()
    }

    fn resync(&mut self, _: &Cluster<'_>) -> Dataplane {
        Dataplane::default()
    }

    fn plan(&mut self, _: &Cluster<'_>) -> Vec<Op> {
        Vec::new()
    }

    fn sent(&self) -> Option<Dataplane> {
        Some(Dataplane::default())
    }

    fn withdraw(&mut self) {}
}
