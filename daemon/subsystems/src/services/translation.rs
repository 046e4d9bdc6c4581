//! The `Subsystem` implementation of Service translation.
//!
//! [`Translation`] owns the planned tables and elements ([`super::Services`]) and the Services that may have changed
//! since. Begin to read at its `plan`.

use std::collections::{BTreeMap, BTreeSet};

use ovl_dataplane::op::Op;
use ovl_dataplane::state::Dataplane;
use ovl_proto::resource::{Kind, Name};

use super::allocation::Ranges;
use super::permits::Denial;
use crate::subsystem::{Change, Cluster, Subsystem};

/// The Service tables that were last sent, and what may have changed since.
#[derive(Debug, Default)]
pub struct Translation {
    planned: super::Services,
    /// Services that were changed, or whose backends were.
    changed: BTreeSet<Name>,
    /// Whether networks, blocks, hosts or local endpoints may have changed.
    context_changed: bool,
}

impl Translation {
    /// Creates the subsystem. `ranges` are those that the host is configured with.
    pub fn new(ranges: Ranges) -> Self {
        Self { planned: super::Services::new(ranges), ..Self::default() }
    }

    /// Returns what Services name and this host does not translate, if that changed since the last call.
    pub fn take_denied(&mut self) -> Option<&BTreeMap<Name, Vec<Denial>>> {
        self.planned.take_denied()
    }

    fn replan(&mut self, cluster: &Cluster<'_>, context: bool) -> Vec<Op> {
        if !cluster.caught_up {
            return Vec::new();
        }
        let changed = std::mem::take(&mut self.changed);
        let context = std::mem::take(&mut self.context_changed) || context;
        self.planned.plan(cluster.view, cluster.backends, changed.iter(), context)
    }
}

impl Subsystem for Translation {
    fn changed(&mut self, change: &Change<'_>, cluster: &Cluster<'_>) {
        match *change {
            Change::Backends(settled) => self.changed.extend(settled.services.iter().cloned()),
            // Endpoints of other hosts are backends, of which `Backends` tells.
            Change::Entry { host, .. } => self.context_changed |= host == cluster.view.me,
            Change::Rights(_)
            | Change::Network(_)
            | Change::Built(_)
            | Change::Host(_)
            | Change::Tunnel
            | Change::ThisHost => self.context_changed = true,
            Change::Resources(keys) => {
                self.context_changed |= keys.iter().any(|key| key.kind == Kind::ServiceCidr);
            }
            // `Host` or `ThisHost` follows.
            Change::HostRights { .. }
            | Change::Attaching(_)
            | Change::Groups(_)
            | Change::FastPath
            | Change::Uplink => {}
        }
    }

    fn desired(&self, cluster: &Cluster<'_>) -> Dataplane {
        match cluster.caught_up {
            true => self.planned.desired(cluster.view, cluster.backends),
            false => self.planned.dataplane(),
        }
    }

    fn resync(&mut self, cluster: &Cluster<'_>) -> Dataplane {
        self.replan(cluster, true);
        self.planned.dataplane()
    }

    fn plan(&mut self, cluster: &Cluster<'_>) -> Vec<Op> {
        self.replan(cluster, false)
    }

    fn sent(&self) -> Option<Dataplane> {
        Some(self.planned.dataplane())
    }

    fn afterwards(&mut self) -> Vec<Op> {
        self.planned.ended()
    }

    fn withdraw(&mut self) {
        *self = Self::new(self.planned.ranges().clone());
    }
}
