//! The subsystem of published ports.
//!
//! [`PublishedPorts`] owns the elements that were last sent, separately for each endpoint, so that a change costs only
//! the ports of its endpoint. Endpoints behind one bridge share elements, which stay until the last of them is gone.
//! The table and the elements are computed in `rules`. Begin to read at the `Subsystem` implementation of
//! [`PublishedPorts`].

mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ovl_dataplane::device::Device;
use ovl_dataplane::flows;
use ovl_dataplane::ledger::{Entries, Ledger};
use ovl_dataplane::nft::{Element, Elements, Table, Value};
use ovl_dataplane::op::{NftOp, Op, SysctlOp};
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::{EndpointId, NetworkId};
use ovl_proto::object::Network;
use ovl_proto::table::{Endpoint, Entry};

use crate::subsystem::{Change, Cluster, Part, Subsystem};

/// The maximum number of published ports of one endpoint: the daemon holds a socket for each.
pub const MOST_PORTS: u32 = 16_384;
/// The maximum number of published port ranges of one endpoint.
pub const MOST_RANGES: usize = 1_024;

/// Returns whether an endpoint's ports are not published if this operation is refused.
pub fn is_needed(op: &Op) -> bool {
    match op {
        Op::Nft(NftOp::SetTable(table, _)) => is_ours(*table),
        Op::Nft(NftOp::SetElement(element)) => is_ours(element.set.table),
        Op::Sysctl(SysctlOp::AllowLocalnet(_)) => true,
        _ => false,
    }
}

/// Returns the endpoint's address and port to which packets to an address and port of this host are translated, by a table
/// with these elements. `None` if the port is not published.
pub fn published(elements: &Elements, to: (IpAddr, u8, u16)) -> Option<(IpAddr, u16)> {
    rules::published(elements, to)
}

fn is_ours(table: Table) -> bool {
    matches!(table, Table::Publish | Table::PublishFrames)
}

/// The published ports that were last sent, and the endpoints whose ports may have changed since.
#[derive(Debug, Default)]
pub struct PublishedPorts {
    ledger: Ledger<EndpointId>,
    /// The devices by which packets from 127.0.0.1 may leave, each with the number of endpoints that need that.
    localnets: BTreeMap<Device, usize>,
    /// The device that each endpoint needs.
    devices: BTreeMap<EndpointId, Device>,
    /// Whether the table was sent. It stays until a full pass finds it without elements.
    has_table: bool,
    changed: BTreeSet<EndpointId>,
    /// Whether all endpoints may have changed.
    all_changed: bool,
}

impl PublishedPorts {
    fn mark(&mut self, endpoint: &Endpoint) {
        if !endpoint.publish.is_empty() {
            self.changed.insert(endpoint.id);
        }
    }

    /// Returns what one endpoint wants. Nothing if it is gone or disconnected.
    fn wanted(id: EndpointId, cluster: &Cluster<'_>) -> (Entries, Option<Device>) {
        let own = cluster.view.own().and_then(|own| own.table.endpoint(id));
        let own = own.filter(|endpoint| !cluster.local.is_disconnected(endpoint));
        let endpoint = own.or_else(|| cluster.local.attaches.get(id));
        let part = endpoint.and_then(|endpoint| {
            Some(rules::part(&cluster.view.networks.get(&endpoint.network)?.network, endpoint))
        });
        part.unwrap_or_default()
    }

    /// Returns the endpoints of this host that publish ports.
    fn publishers(cluster: &Cluster<'_>) -> BTreeSet<EndpointId> {
        let own = cluster.view.own().into_iter().flat_map(|own| own.table.endpoints());
        let all = own.chain(cluster.local.attaches.endpoints());
        all.filter(|endpoint| !endpoint.publish.is_empty()).map(|endpoint| endpoint.id).collect()
    }

    fn dataplane(elements: Elements, localnets: BTreeSet<Device>, has_table: bool) -> Dataplane {
        let tables = has_table.then(rules::table).into_iter().collect();
        Dataplane { tables, elements, localnets, ..Dataplane::default() }
    }

    fn all_sent(&self) -> Dataplane {
        let localnets = self.localnets.keys().copied().collect();
        Self::dataplane(self.ledger.wanted().clone(), localnets, self.has_table)
    }

    /// Records which device an endpoint needs. Returns the device that is closed with that, and the one that is opened.
    fn set_localnet(&mut self, id: EndpointId, device: Option<Device>) -> [Option<Device>; 2] {
        let before = match device {
            Some(device) => self.devices.insert(id, device),
            None => self.devices.remove(&id),
        };
        if before == device {
            return [None, None];
        }
        let closed = before.filter(|device| {
            let left = self.localnets.get(device).map_or(0, |users| users.saturating_sub(1));
            if left == 0 {
                self.localnets.remove(device);
            } else {
                self.localnets.insert(*device, left);
            }
            left == 0
        });
        let opened = device.filter(|device| {
            let users = self.localnets.entry(*device).or_default();
            *users += 1;
            *users == 1
        });
        [closed, opened]
    }
}

impl Subsystem for PublishedPorts {
    fn changed(&mut self, change: &Change<'_>, cluster: &Cluster<'_>) {
        match *change {
            Change::Entry { host, entry: Entry::Endpoint(endpoint) } if host == cluster.view.me => {
                self.mark(endpoint);
            }
            Change::Attaching(endpoint) => self.mark(endpoint),
            Change::Network(network) => {
                let own = cluster.view.own().into_iter().flat_map(|own| own.table.endpoints_on(network));
                own.for_each(|endpoint| self.mark(endpoint));
            }
            // Endpoints may have been disconnected.
            Change::ThisHost => self.all_changed = true,
            Change::Entry { .. }
            | Change::Rights(_)
            | Change::HostRights { .. }
            | Change::Built(_)
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
        let (mut elements, mut localnets) = (Elements::default(), BTreeSet::new());
        // Of two values of one element, the first endpoint's counts.
        for id in Self::publishers(cluster).into_iter().rev() {
            let (entries, device) = Self::wanted(id, cluster);
            localnets.extend(device);
            for ((set, key), value) in entries {
                elements.insert(&set, key, value);
            }
        }
        let has_table = self.has_table || !elements.is_empty();
        Self::dataplane(elements, localnets, has_table)
    }

    fn resync(&mut self, cluster: &Cluster<'_>) -> Dataplane {
        self.all_changed = true;
        self.plan(cluster);
        self.has_table = !self.ledger.wanted().is_empty();
        self.all_sent()
    }

    fn plan(&mut self, cluster: &Cluster<'_>) -> Vec<Op> {
        let mut changed = std::mem::take(&mut self.changed);
        if std::mem::take(&mut self.all_changed) {
            changed.extend(self.ledger.parts());
            changed.extend(Self::publishers(cluster));
        }
        let (mut closed, mut elements, mut opened) = (Vec::new(), Vec::new(), Vec::new());
        for id in changed {
            let (entries, device) = Self::wanted(id, cluster);
            elements.extend(self.ledger.set(&id, entries));
            let [close, open] = self.set_localnet(id, device);
            closed.extend(close.map(|device| Op::Sysctl(SysctlOp::ForbidLocalnet(device))));
            opened.extend(open.map(|device| Op::Sysctl(SysctlOp::AllowLocalnet(device))));
        }
        // The table keeps workloads from 127.0.0.1, so it is written before a device is opened.
        let mut ops = closed;
        if !self.has_table && !self.ledger.wanted().is_empty() {
            self.has_table = true;
            let (table, skeleton) = rules::table();
            ops.push(Op::Nft(NftOp::SetTable(table, skeleton)));
        }
        let ended = ended(&elements);
        ops.extend(elements);
        ops.extend(ended);
        ops.extend(opened);
        ops
    }

    fn sent(&self) -> Option<Dataplane> {
        Some(self.all_sent())
    }

    fn prepare(&mut self, _: &Endpoint, _: &Network, cluster: &Cluster<'_>) -> Part {
        Part { before: self.plan(cluster), wants: Dataplane::default() }
    }

    fn detached(&mut self, _: NetworkId, cluster: &Cluster<'_>) -> Vec<Op> {
        if self.all_changed { Vec::new() } else { self.plan(cluster) }
    }

    fn withdraw(&mut self) {
        *self = Self::default();
    }
}

/// Returns the operations that end the UDP flows of elements that changed.
fn ended(changes: &[Op]) -> Vec<Op> {
    let (mut was, mut is) = (Elements::default(), Elements::default());
    for change in changes {
        match change {
            Op::Nft(NftOp::DeleteElement(set, key)) => drop(was.insert(set, key.clone(), Value::None)),
            Op::Nft(NftOp::SetElement(Element { set, key, value })) => {
                drop(is.insert(set, key.clone(), value.clone()));
            }
            _ => {}
        }
    }
    flows::ended(&was, &is, true).into_iter().map(Op::EndFlows).collect()
}
