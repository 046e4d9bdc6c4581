//! The subsystem of source checks: what an endpoint of this host may send, whatever the network policies say.
//!
//! On a switched network only frames with the endpoint's own MAC and IP addresses pass its bridge port, ARP and
//! neighbour discovery included. On a routed network only packets with its own addresses pass its interface. Router
//! advertisements and redirects (RFC 4861), and on a switched network the answers of DHCP servers, never pass. What is
//! refused is counted by interface ([`REFUSED`]).
//!
//! [`Guard`] owns the tables and elements that were last sent, and the endpoints that may have changed since. Begin to
//! read at [`rules::frames`], and then at its `plan`.

mod allowed;
mod elements;
mod rules;

pub use allowed::check;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ovl_dataplane::device::{Device, Role};
use ovl_dataplane::ledger::{Entries, Ledger};
use ovl_dataplane::nft::{Skeleton, Table};
use ovl_dataplane::op::{NftOp, Op};
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::{EndpointId, NetworkId};
use ovl_proto::object::{Mode, Network};
use ovl_proto::table::{Endpoint, Entry};

use crate::rejected::Rejected;
use crate::subsystem::{Change, Cluster, Outcome, Part, Subsystem};

/// The name of the set that counts refused packets by interface, in both tables.
pub const REFUSED: &str = "refused";

/// Returns the tables with a set [`REFUSED`]: of bridged frames, and of routed packets.
pub const TABLES: [Table; 2] = [Table::GuardFrames, Table::Guard];

/// Decodes the key of an element of the set [`REFUSED`]. `None` if it is not an interface of an endpoint.
pub fn refused_endpoint(key: &[u8]) -> Option<EndpointId> {
    let name = key.split(|byte| *byte == 0).next()?;
    match Device::new(std::str::from_utf8(name).ok()?)?.role()? {
        Role::Endpoint(id) => Some(id),
        Role::Bridge(_) | Role::Vxlan(_) | Role::Tunnel(_) => None,
    }
}

type Tables = BTreeMap<Table, Arc<Skeleton>>;
/// An endpoint of this host.
type Own = (NetworkId, EndpointId);

/// The source checks that were last sent, and what may have changed since.
#[derive(Debug, Default)]
pub struct Guard {
    tables: Tables,
    elements: Ledger<Own>,
    /// Tables to delete once nothing can send any more.
    unused: BTreeSet<Table>,
    /// Whether the modes of the networks with devices on this host may have changed.
    tables_changed: bool,
    /// Endpoints that may have changed.
    touched: BTreeSet<Own>,
    /// Networks whose endpoints may all have changed.
    networks: BTreeSet<NetworkId>,
    /// The first reason since the last full pass why the checks may not be in force.
    refused: Rejected,
}

impl Guard {
    /// Returns the desired tables and elements, as if they were sent.
    fn wanted(cluster: &Cluster<'_>) -> Self {
        let mut elements = Ledger::default();
        for endpoint in endpoints(cluster) {
            elements.set(&(endpoint.network, endpoint.id), entries(cluster, endpoint));
        }
        Self { tables: tables(cluster), elements, ..Self::default() }
    }

    fn dataplane(&self) -> Dataplane {
        Dataplane {
            tables: self.tables.clone(),
            elements: self.elements.wanted().clone(),
            ..Dataplane::default()
        }
    }

    fn touch(&mut self, endpoint: &Endpoint) {
        self.touched.insert((endpoint.network, endpoint.id));
    }

    /// Marks the endpoints of the networks that are marked.
    fn touch_networks(&mut self, cluster: &Cluster<'_>) {
        let networks = std::mem::take(&mut self.networks);
        if !networks.is_empty() {
            let there = endpoints(cluster).map(|endpoint| (endpoint.network, endpoint.id));
            let all = self.elements.parts().copied().chain(there);
            self.touched.extend(all.filter(|(network, _)| networks.contains(network)));
        }
    }

    /// Returns the operations for the endpoints that are marked.
    fn plan_touched(&mut self, cluster: &Cluster<'_>) -> Vec<Op> {
        let mut ops = Vec::new();
        for own in std::mem::take(&mut self.touched) {
            let entries = endpoint(cluster, own).map(|endpoint| entries(cluster, endpoint));
            ops.extend(self.elements.set(&own, entries.unwrap_or_default()));
        }
        ops
    }

    /// Returns the operations for the tables. Those that delete one are left to [`Subsystem::afterwards`].
    fn plan_tables(&mut self, cluster: &Cluster<'_>) -> Vec<Op> {
        if !std::mem::take(&mut self.tables_changed) {
            return Vec::new();
        }
        let wanted = tables(cluster);
        let mut ops = Vec::new();
        for (table, skeleton) in &wanted {
            self.unused.remove(table);
            if !self.tables.contains_key(table) {
                ops.push(Op::Nft(NftOp::SetTable(*table, Arc::clone(skeleton))));
                self.tables.insert(*table, Arc::clone(skeleton));
            }
        }
        if cluster.caught_up {
            self.unused.extend(self.tables.keys().filter(|table| !wanted.contains_key(table)));
            self.tables = wanted;
        }
        ops
    }
}

/// Returns the endpoints of this host, also those whose attach is in flight.
fn endpoints<'a>(cluster: &Cluster<'a>) -> impl Iterator<Item = &'a Endpoint> {
    let attached = cluster.view.own().into_iter().flat_map(|own| own.table.endpoints());
    attached.chain(cluster.local.attaches.endpoints())
}

/// Returns an endpoint of this host. `None` if it is absent.
fn endpoint<'a>(cluster: &Cluster<'a>, (network, id): Own) -> Option<&'a Endpoint> {
    let attached = cluster.view.own().and_then(|own| own.table.endpoint(id));
    attached.or_else(|| cluster.local.attaches.get(id)).filter(|endpoint| endpoint.network == network)
}

/// Returns the elements of an endpoint of this host. None if it is disconnected: its interface is down.
fn entries(cluster: &Cluster<'_>, endpoint: &Endpoint) -> Entries {
    let network = cluster.view.networks.get(&endpoint.network).map(|state| state.network.mode);
    match network {
        Some(mode) if !cluster.local.is_disconnected(endpoint) => elements::of(mode, endpoint),
        Some(_) | None => Entries::new(),
    }
}

/// Returns the tables for the modes of the networks that have devices on this host.
fn tables(cluster: &Cluster<'_>) -> Tables {
    let networks = cluster.view.networks.values().map(|state| &state.network);
    let built = networks.filter(|network| cluster.local.is_built(cluster.view, network.id));
    let of_mode = |network: &Network| match network.mode {
        Mode::L2 => (Table::GuardFrames, rules::frames()),
        Mode::L3 => (Table::Guard, rules::packets()),
    };
    built.map(of_mode).collect()
}

impl Subsystem for Guard {
    fn changed(&mut self, change: &Change<'_>, cluster: &Cluster<'_>) {
        match *change {
            Change::Entry { host, entry: Entry::Endpoint(endpoint) } if host == cluster.view.me => {
                self.touch(endpoint);
            }
            Change::Attaching(endpoint) => self.touch(endpoint),
            Change::Rights(network) | Change::HostRights { network, .. } => {
                self.networks.insert(network);
            }
            Change::Network(network) | Change::Built(network) => {
                self.networks.insert(network);
                self.tables_changed = true;
            }
            Change::ThisHost => self.tables_changed = true,
            Change::Entry { .. }
            | Change::Host(_)
            | Change::Tunnel
            | Change::Resources(_)
            | Change::Backends(_)
            | Change::Groups(_)
            | Change::FastPath
            | Change::Uplink => {}
        }
    }

    fn desired(&self, cluster: &Cluster<'_>) -> Dataplane {
        Self::wanted(cluster).dataplane()
    }

    fn resync(&mut self, cluster: &Cluster<'_>) -> Dataplane {
        let refused = std::mem::take(&mut self.refused);
        *self = Self { refused, ..Self::wanted(cluster) };
        self.dataplane()
    }

    fn plan(&mut self, cluster: &Cluster<'_>) -> Vec<Op> {
        let mut ops = self.plan_tables(cluster);
        self.touch_networks(cluster);
        ops.extend(self.plan_touched(cluster));
        ops
    }

    fn sent(&self) -> Option<Dataplane> {
        self.refused.reason().is_none().then(|| self.dataplane())
    }

    fn prepare(&mut self, _: &Endpoint, _: &Network, cluster: &Cluster<'_>) -> Part {
        Part { before: self.plan(cluster), wants: Dataplane::default() }
    }

    fn detached(&mut self, _: NetworkId, cluster: &Cluster<'_>) -> Vec<Op> {
        self.plan_touched(cluster)
    }

    fn afterwards(&mut self) -> Vec<Op> {
        let unused = std::mem::take(&mut self.unused);
        unused.into_iter().map(|table| Op::Nft(NftOp::DeleteTable(table))).collect()
    }

    fn outcome(&mut self, outcome: Outcome<'_>) {
        if let Some(reason) = outcome.refusal.filter(|_| outcome.op.is_guard()) {
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
        *self = Self::default();
    }
}
