//! The subsystem of encryption: the tunnel between hosts that carries encrypted networks.
//!
//! [`Encryption`] owns the data plane of the tunnel that was last sent. [`tunnel`] computes the WireGuard interfaces,
//! peers and routes; [`crate::local::epochs`] chooses the interface for each peer while keys are rotated. Begin to read
//! at [`tunnel::peers`], and then at the `Subsystem` implementation of [`Encryption`].

pub mod tunnel;

use ovl_dataplane::diff::diff;
use ovl_dataplane::op::{LinkOp, Op};
use ovl_dataplane::state::Dataplane;
use ovl_proto::object::Network;
use ovl_proto::table::{Endpoint, Entry};

use crate::subsystem::{Change, Cluster, Part, Subsystem};

/// The tunnel that was last sent, and whether it may have changed since.
#[derive(Debug, Default)]
pub struct Encryption {
    sent: Dataplane,
    changed: bool,
    /// Deletions of interfaces. They wait until the routes of networks lead elsewhere.
    afterwards: Vec<Op>,
}

impl Encryption {
    fn part(cluster: &Cluster<'_>) -> Dataplane {
        let mut part = Dataplane::default();
        tunnel::part(&mut part, cluster.view, &cluster.local.key_epochs, &cluster.local.detours);
        part
    }
}

impl Subsystem for Encryption {
    fn changed(&mut self, change: &Change<'_>, _: &Cluster<'_>) {
        self.changed |= match *change {
            Change::Network(_) | Change::Host(_) | Change::Tunnel | Change::ThisHost => true,
            Change::Entry { entry: Entry::PathMtu { .. }, .. } => true,
            Change::Entry { .. }
            | Change::Rights(_)
            | Change::HostRights { .. }
            | Change::Built(_)
            | Change::Attaching(_)
            | Change::Resources(_)
            | Change::Backends(_)
            | Change::Groups(_)
            | Change::FastPath
            | Change::Uplink => false,
        };
    }

    fn desired(&self, cluster: &Cluster<'_>) -> Dataplane {
        Self::part(cluster)
    }

    fn resync(&mut self, cluster: &Cluster<'_>) -> Dataplane {
        self.changed = false;
        self.afterwards.clear();
        self.sent = Self::part(cluster);
        self.sent.clone()
    }

    fn plan(&mut self, cluster: &Cluster<'_>) -> Vec<Op> {
        if !std::mem::take(&mut self.changed) {
            return Vec::new();
        }
        let desired = Self::part(cluster);
        let ops = diff(&self.sent, &desired, cluster.caught_up);
        // An interface that is wanted again meanwhile stays.
        self.afterwards.retain(|op| op.device().is_none_or(|device| !desired.links.contains_key(&device)));
        let is_last =
            |op: &Op| matches!(op, Op::Link(LinkOp::Delete(device)) if !desired.links.contains_key(device));
        let (last, ops): (Vec<Op>, Vec<Op>) = ops.into_iter().partition(is_last);
        self.afterwards.extend(last);
        self.sent = desired;
        ops
    }

    fn sent(&self) -> Option<Dataplane> {
        Some(self.sent.clone())
    }

    fn prepare(&mut self, _: &Endpoint, _: &Network, cluster: &Cluster<'_>) -> Part {
        Part { before: self.plan(cluster), wants: Dataplane::default() }
    }

    fn afterwards(&mut self) -> Vec<Op> {
        std::mem::take(&mut self.afterwards)
    }

    fn withdraw(&mut self) {
        *self = Self::default();
    }
}
