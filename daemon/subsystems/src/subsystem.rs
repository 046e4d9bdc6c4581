//! The trait behind which each part of ovl stands that wants something in the kernel, and what it is told.

use ovl_cluster::backends::{Backends, Settled};
use ovl_cluster::view::View;
use ovl_dataplane::op::Op;
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::{NetworkId, NodeId};
use ovl_proto::object::Network;
use ovl_proto::resource::ResourceKey;
use ovl_proto::table::{Endpoint, Entry, Key};

use crate::local::Local;

/// What subsystems read: the cluster as this host sees it, and this host's own part.
#[derive(Clone, Copy)]
pub struct Cluster<'a> {
    /// Hosts, networks, blocks, Kubernetes objects.
    pub view: &'a View,
    /// Who can be selected, and what stands behind each Service.
    pub backends: &'a Backends,
    /// This host's own part, beside its owner table.
    pub local: &'a Local,
    /// Gossip has told all there is to know: what nobody wants may be removed.
    pub caught_up: bool,
}

impl Cluster<'_> {
    /// Whether what a network does not need any more may be removed. A bridge network is local to this host, so
    /// there is no peer state to wait for.
    pub fn may_prune(&self, network: NetworkId) -> bool {
        self.caught_up || self.view.is_own(network)
    }
}

/// Something that changed in the cluster or on this host.
#[derive(Debug, Clone, Copy)]
pub enum Change<'a> {
    /// An entry of a host's owner table, as it was before or as it is now. Each is told once.
    Entry {
        /// Whose table it is.
        host: NodeId,
        /// The entry.
        entry: &'a Entry,
    },
    /// Which endpoints of this network count may have changed: blocks, leases, liveness, whole tables.
    Rights(NetworkId),
    /// A network was added, changed or removed.
    Network(NetworkId),
    /// Whether this host builds a network's devices may have changed.
    Built(NetworkId),
    /// The record or the liveness of another host. [`Change::Rights`] of its networks come first.
    Host(NodeId),
    /// Keys, sessions or routes of the tunnel.
    Tunnel,
    /// Something of this host that each network may depend on: its address, its MTU, its segment, the allocation
    /// map. [`Change::Rights`] of all networks come first.
    ThisHost,
    /// An endpoint of this host that is about to be created, or is not any more.
    Attaching(&'a Endpoint),
    /// Ports are about to be published on this host for the first time.
    Publishing,
    /// Kubernetes objects that were added, changed or removed.
    Resources(&'a [ResourceKey]),
    /// What stands behind Services, and who can be selected.
    Backends(&'a Settled),
    /// The hosts that announce addresses of LoadBalancers.
    Announcers,
    /// The device on which this host announces addresses.
    Uplink,
}

/// What became of an operation.
#[derive(Debug, Clone, Copy)]
pub struct Outcome<'a> {
    /// The operation.
    pub op: &'a Op,
    /// Why the kernel refused it. `None` if it was carried out.
    pub refusal: Option<&'a str>,
}

/// A subsystem's part of an endpoint that is about to be created.
#[derive(Debug, Default)]
pub struct Part {
    /// What must be in place before the endpoint's interfaces are created.
    pub before: Vec<Op>,
    /// All that the endpoint wants for itself. Operations for what is not there yet are in `before`, too.
    pub wants: Dataplane,
}

/// Entries that this host's owner table should have, and those that it should lose.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct TableChange {
    /// Added or replaced.
    pub set: Vec<Entry>,
    /// Removed.
    pub unset: Vec<Key>,
}

/// A part of ovl that wants something in the kernel.
pub trait Subsystem {
    /// Records a change, at the cost of that change.
    fn changed(&mut self, change: &Change<'_>, cluster: &Cluster<'_>);

    /// All that it wants, without recording anything: for `plan` and `verify`.
    fn desired(&self, cluster: &Cluster<'_>) -> Dataplane;

    /// All that it wants, which counts as sent from here on: for a pass that compares with a dump. Nothing stays
    /// marked as changed.
    fn resync(&mut self, cluster: &Cluster<'_>) -> Dataplane;

    /// The operations that bring the kernel from what counts as sent to what it wants now, which counts as sent then.
    fn plan(&mut self, cluster: &Cluster<'_>) -> Vec<Op>;

    /// What counts as sent. After a plan it is what [`Self::desired`] gives, once gossip has caught up. `None` while
    /// something that was sent is known to have been refused.
    fn sent(&self) -> Option<Dataplane>;

    /// Its part of an endpoint of this host that is about to be created.
    fn prepare(&mut self, endpoint: &Endpoint, network: &Network, cluster: &Cluster<'_>) -> Part {
        let _ = (endpoint, network, cluster);
        Part::default()
    }

    /// The operations that belong to endpoints that were detached from a network, as far as they are cheap. The rest
    /// stays marked for the next [`Self::plan`].
    fn detached(&mut self, network: NetworkId, cluster: &Cluster<'_>) -> Vec<Op> {
        let _ = (network, cluster);
        Vec::new()
    }

    /// An endpoint was created with the parts that all subsystems gave.
    fn attached(&mut self, endpoint: &Endpoint, wants: &Dataplane) {
        let _ = (endpoint, wants);
    }

    /// Operations that wait until everything planned was carried out. Each is given once.
    fn afterwards(&mut self) -> Vec<Op> {
        Vec::new()
    }

    /// The kernel's answer to an operation, of whichever subsystem.
    fn outcome(&mut self, outcome: Outcome<'_>) {
        let _ = outcome;
    }

    /// The answers to one batch have all been told. A batch of a full pass, which sent everything, is `full`.
    fn batch_done(&mut self, full: bool) {
        let _ = full;
    }

    /// Why an endpoint cannot be attached to this network: something that it needs was refused.
    fn refusal(&self, network: NetworkId) -> Option<&str> {
        let _ = network;
        None
    }

    /// What this host's owner table should say because of what is in the kernel. `None` if nothing changed.
    fn table_change(&mut self, cluster: &Cluster<'_>) -> Option<TableChange> {
        let _ = cluster;
        None
    }

    /// Wants nothing any more: teardown.
    fn withdraw(&mut self);
}
