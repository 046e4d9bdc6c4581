//! The `Subsystem` implementation that announces LoadBalancer addresses and answers health checks.
//!
//! [`Announcements`] owns the announcements that were last planned and the Services that may have changed since. Begin
//! to read at its `plan`; the choice of the host is in [`super::ingress`].

use std::collections::BTreeSet;
use std::net::IpAddr;

use ovl_dataplane::device::Device;
use ovl_dataplane::op::{AnnouncedOp, Op};
use ovl_dataplane::state::Dataplane;
use ovl_proto::resource::Name;
use ovl_proto::table::{Entry, Key};

use super::allocation::Ranges;
use super::ingress;
use crate::subsystem::{Change, Cluster, Outcome, Subsystem, TableChange};

/// The LoadBalancer addresses that were last planned, and what may have changed since.
#[derive(Debug, Default)]
pub struct Announcements {
    planned: ingress::Ingress,
    /// Services that were changed, or whose backends were.
    changed: BTreeSet<Name>,
    /// Whether hosts, or the addresses that they announce, may have changed.
    hosts_changed: bool,
    /// The device on which addresses are announced. `None` if there is none, or if this host leaves the cluster.
    uplink: Option<Device>,
    /// Whether other hosts recovered the cluster without this one. They announce the addresses too.
    is_left_out: bool,
}

impl Announcements {
    /// Creates the subsystem. `ranges` are those that the host is configured with.
    pub fn new(ranges: Ranges) -> Self {
        Self { planned: ingress::Ingress::new(ranges), ..Self::default() }
    }

    /// Sets the device on which addresses are announced, and returns whether it changed.
    pub fn set_uplink(&mut self, uplink: Option<Device>) -> bool {
        std::mem::replace(&mut self.uplink, uplink) != uplink
    }

    /// Sets whether other hosts recovered the cluster from the loss of its majority without this one, which then announces
    /// nothing. Returns whether it changed.
    pub fn set_left_out(&mut self, is_left_out: bool) -> bool {
        std::mem::replace(&mut self.is_left_out, is_left_out) != is_left_out
    }

    /// Returns the device on which this host may announce addresses.
    fn device(&self) -> Option<Device> {
        self.uplink.filter(|_| !self.is_left_out)
    }

    /// Returns the addresses that this host's owner table should name as announced.
    pub fn claimed(&self) -> BTreeSet<IpAddr> {
        self.planned.claimed()
    }

    /// Returns at most `max` addresses that must be announced once more.
    pub fn again(&mut self, max: usize) -> Vec<(Device, IpAddr)> {
        self.planned.again(max)
    }

    /// Returns the Services with a health check port, and the answers to their health checks.
    pub fn health(&self) -> impl Iterator<Item = (&Name, &ingress::Health)> {
        self.planned.health()
    }

    fn replan(&mut self, cluster: &Cluster<'_>, all: bool) -> Vec<Op> {
        if !cluster.caught_up {
            return Vec::new();
        }
        let changed = std::mem::take(&mut self.changed);
        let all = std::mem::take(&mut self.hosts_changed) || all;
        let device = self.device();
        self.planned.plan(cluster.view, cluster.backends, changed.iter(), all, device)
    }
}

impl Subsystem for Announcements {
    fn changed(&mut self, change: &Change<'_>, _: &Cluster<'_>) {
        match *change {
            Change::Backends(settled) => self.changed.extend(settled.services.iter().cloned()),
            Change::Entry { entry: Entry::Announced(_), .. }
            | Change::FastPath
            | Change::Uplink
            | Change::Network(_)
            | Change::Built(_)
            | Change::Host(_)
            | Change::Tunnel
            | Change::ThisHost => self.hosts_changed = true,
            Change::Groups(_)
            | Change::Entry { .. }
            | Change::Rights(_)
            | Change::HostRights { .. }
            | Change::Attaching(_)
            | Change::Resources(_) => {}
        }
    }

    fn desired(&self, cluster: &Cluster<'_>) -> Dataplane {
        match cluster.caught_up {
            true => self.planned.desired(cluster.view, cluster.backends, self.device()),
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

    fn outcome(&mut self, outcome: Outcome<'_>) {
        if let Op::Announced(AnnouncedOp::Add(_, address)) = outcome.op {
            self.planned.record_outcome(*address, outcome.refusal.is_none());
        }
    }

    fn table_change(&mut self, cluster: &Cluster<'_>) -> Option<TableChange> {
        let own = cluster.view.own().filter(|_| cluster.caught_up)?;
        if !self.planned.take_changed() {
            return None;
        }
        let (claimed, is) = (own.table.announced().collect::<BTreeSet<IpAddr>>(), self.planned.claimed());
        Some(TableChange {
            set: is.difference(&claimed).copied().map(Entry::Announced).collect(),
            unset: claimed.difference(&is).copied().map(Key::Announced).collect(),
        })
    }

    fn withdraw(&mut self) {
        let Self { uplink, is_left_out, .. } = *self;
        *self = Self { uplink, is_left_out, ..Self::new(self.planned.ranges().clone()) };
    }
}
