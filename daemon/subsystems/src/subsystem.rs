//! The trait that all subsystems implement, and the types of its arguments and results.
//!
//! This module owns no state. Begin to read at [`Subsystem`]; [`Change`] lists the events that a subsystem hears of,
//! and [`Cluster`] is what it may read.

use ovl_cluster::backends::{Backends, Settled};
use ovl_cluster::view::View;
use ovl_dataplane::op::Op;
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::{NetworkId, NodeId};
use ovl_proto::object::Network;
use ovl_proto::resource::ResourceKey;
use ovl_proto::table::{Endpoint, Entry, Key};

use crate::local::Local;

/// The state that subsystems read: the local host's view of the cluster, and the local state of the host.
#[derive(Clone, Copy)]
pub struct Cluster<'a> {
    /// Hosts, networks, blocks and Kubernetes objects.
    pub view: &'a View,
    /// The endpoints that selectors can select, and the backends of each Service.
    pub backends: &'a Backends,
    /// Local state of the host that is not in its owner table.
    pub local: &'a Local,
    /// Whether the view is complete after a start. Before that, kernel objects that are not wanted must be kept: the
    /// entry that wants them may not have arrived yet.
    pub caught_up: bool,
}

impl Cluster<'_> {
    /// Whether kernel objects that a network does not need may be deleted. A bridge network is local to this host, so
    /// there is no peer state to wait for. A network that this host refuses must not stay, whatever peers say.
    pub fn may_prune(&self, network: NetworkId) -> bool {
        self.caught_up || self.view.is_own(network) || self.local.refused.contains(network)
    }
}

/// A change in the cluster or on the local host.
#[derive(Debug, Clone, Copy)]
pub enum Change<'a> {
    /// An entry of a host's owner table: the old value or the new one. Each value is reported once. An endpoint is reported
    /// again if its right to an address may have changed by a lease.
    Entry {
        /// The owner of the table.
        host: NodeId,
        /// The entry.
        entry: &'a Entry,
    },
    /// The set of endpoints of this network with a valid address may have changed.
    Rights(NetworkId),
    /// The endpoints of one host on a network may all have become valid, or no longer be valid: its liveness or its
    /// membership changed.
    HostRights {
        /// The host.
        host: NodeId,
        /// The network.
        network: NetworkId,
    },
    /// A network was added, changed or removed.
    Network(NetworkId),
    /// The local host may have to create or delete the devices of this network.
    Built(NetworkId),
    /// The record or the liveness of a remote host changed. [`Change::HostRights`] of its networks are reported first.
    Host(NodeId),
    /// Endpoints on this network have joined or left multicast groups, and are the same otherwise.
    Groups(NetworkId),
    /// Keys, sessions or routes of the tunnel changed.
    Tunnel,
    /// A property of the local host that each network may depend on changed: its address, its MTU, its segment, or
    /// whether it is a member. [`Change::Rights`] of all networks are reported first.
    ThisHost,
    /// An attach of this endpoint of the local host began or ended.
    Attaching(&'a Endpoint),
    /// Kubernetes objects were added, changed or removed.
    Resources(&'a [ResourceKey]),
    /// Backends of Services or the set of selectable endpoints changed.
    Backends(&'a Settled),
    /// The device on which the local host announces addresses changed, or whether it may announce any.
    Uplink,
    /// What stands in the way of the fast path changed, or the device of the underlay, or whether packets are to be seen in
    /// the stack.
    FastPath,
}

/// The result of an operation.
#[derive(Debug, Clone, Copy)]
pub struct Outcome<'a> {
    /// The operation.
    pub op: &'a Op,
    /// The reason why the kernel rejected it. `None` if it was applied.
    pub refusal: Option<&'a str>,
}

/// A subsystem's part of an endpoint that is about to be created.
#[derive(Debug, Default)]
pub struct Part {
    /// Operations that must be applied before the endpoint's interfaces are created.
    pub before: Vec<Op>,
    /// The endpoint's own part of the data plane. Operations that create missing objects of it are also in `before`.
    pub wants: Dataplane,
}

/// A change of the local host's owner table.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct TableChange {
    /// Entries to add or replace.
    pub set: Vec<Entry>,
    /// Keys of entries to remove.
    pub unset: Vec<Key>,
}

/// A part of ovld that contributes to the desired data plane.
///
/// A subsystem remembers what it last sent to the kernel. *Sent* below means: planned, and taken as applied until a
/// rejection is reported.
pub trait Subsystem {
    /// Records a change, at the cost of that change.
    fn changed(&mut self, change: &Change<'_>, cluster: &Cluster<'_>);

    /// Returns its part of the desired data plane and records nothing. `plan` and `verify` use it.
    fn desired(&self, cluster: &Cluster<'_>) -> Dataplane;

    /// Returns its part of the desired data plane and records it as sent. A full pass, which compares it with a dump,
    /// uses it. All marks of changes are cleared.
    fn resync(&mut self, cluster: &Cluster<'_>) -> Dataplane;

    /// Returns the operations that lead from what was sent to what is wanted now, and records the latter as sent.
    fn plan(&mut self, cluster: &Cluster<'_>) -> Vec<Op>;

    /// Returns what was sent. After a plan it equals [`Self::desired`], once gossip has caught up. `None` while a
    /// rejected operation has not been repaired.
    fn sent(&self) -> Option<Dataplane>;

    /// Returns its part of an endpoint of the local host that is about to be created.
    fn prepare(&mut self, endpoint: &Endpoint, network: &Network, cluster: &Cluster<'_>) -> Part {
        let _ = (endpoint, network, cluster);
        Part::default()
    }

    /// Returns the operations for endpoints that were detached from a network, if they are cheap to compute. The rest
    /// stays marked for the next [`Self::plan`].
    fn detached(&mut self, network: NetworkId, cluster: &Cluster<'_>) -> Vec<Op> {
        let _ = (network, cluster);
        Vec::new()
    }

    /// Records that an endpoint was created with the merged parts of all subsystems.
    fn attached(&mut self, endpoint: &Endpoint, wants: &Dataplane) {
        let _ = (endpoint, wants);
    }

    /// Returns the operations that must follow everything that was planned. Each is returned once.
    fn afterwards(&mut self) -> Vec<Op> {
        Vec::new()
    }

    /// Records the kernel's answer to an operation of any subsystem.
    fn outcome(&mut self, outcome: Outcome<'_>) {
        let _ = outcome;
    }

    /// Records that all answers to one batch were reported. `full` is set for the batch of a full pass, which compared
    /// everything.
    fn batch_done(&mut self, full: bool) {
        let _ = full;
    }

    /// Returns why an endpoint cannot be attached to this network: the kernel rejected an operation that it depends
    /// on. `None` if it can.
    fn refusal(&self, network: NetworkId) -> Option<&str> {
        let _ = network;
        None
    }

    /// Returns the change of the local host's owner table that follows from the kernel's state. `None` if nothing
    /// changed.
    fn table_change(&mut self, cluster: &Cluster<'_>) -> Option<TableChange> {
        let _ = cluster;
        None
    }

    /// Drops all wishes, at teardown.
    fn withdraw(&mut self);
}
