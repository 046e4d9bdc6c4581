//! The elements of `inet ovl-services` and `bridge ovl-divert`, updated Service by Service.
//!
//! A backend that is added or removed costs a few elements, whatever the number of Services and backends. [`Services`]
//! owns the elements that were last planned and the numbers of backends. Begin to read at [`Services::plan`], and then
//! at [`resolve::resolve`] for one Service.

mod context;
mod lookup;
mod resolve;
mod skeleton;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use ovl_proto::id::{EndpointId, Mac};
use ovl_proto::object::{Mode, Network, Subnet};
use ovl_proto::resource::Name;
use ovl_proto::table::Endpoint;

use super::allocation::Ranges;
use super::divert;
use super::permits::Denial;
use ovl_cluster::backends::Backends;
use ovl_cluster::view::View;
use ovl_dataplane::flows::Flows;
use ovl_dataplane::ledger::{Entries, Ledger};
use ovl_dataplane::nft::{Element, Field, Key, Set, Skeleton, Table, Value};
use ovl_dataplane::op::{NftOp, Op, SysctlOp};
use ovl_dataplane::state::Dataplane;

use self::context::{At, NetworkContext, of_family};
use self::resolve::{Resolved, Slots};
use self::skeleton::Sticky;

pub use self::lookup::{Client, Translated, translate};

/// Makes connection tracking take a TCP segment outside of the window for one of its connection. Otherwise such a segment
/// of a backend is not translated back, and the client, who knows of no connection with the backend's address, resets it:
/// the reset closes the connection, whose own address the backend has for it.
const LIBERAL: &str = "net.netfilter.nf_conntrack_tcp_be_liberal";

/// The owner of elements in the ledger.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum ElementOwner {
    Host,
    Endpoint(EndpointId),
    Service(Name),
}

/// The tables and elements of all Services on one host.
#[derive(Debug, Clone, Default)]
pub struct Services {
    ranges: Ranges,
    ledger: Ledger<ElementOwner>,
    context: NetworkContext,
    slots: Slots,
    /// The backends of each Service's UDP ports.
    flows: BTreeMap<Name, resolve::UdpPorts>,
    counts: BTreeSet<u32>,
    sticky: BTreeSet<Sticky>,
    /// Whether there are, or were, ports that let only some sources in.
    guarded: bool,
    /// The sizes of `counts` and `sticky`, and `guarded`, when the skeleton was built.
    chains: (usize, usize, bool),
    /// The tables that were planned last.
    tables: BTreeMap<Table, Arc<Skeleton>>,
    ended: Vec<Flows>,
    started: bool,
    /// Whether there are Services at all.
    any: bool,
    /// The addresses of the cluster DNS at which ovl answers.
    own_dns: BTreeSet<IpAddr>,
    /// Services with connections from outside that are forwarded to the underlay, with the address families (`true` for
    /// IPv4).
    forwarding: BTreeMap<Name, BTreeSet<bool>>,
    /// What Services name and this host does not translate.
    denied: BTreeMap<Name, Vec<Denial>>,
    denied_changed: bool,
}

impl Services {
    /// Creates the tables of a host without Services. `ranges` are those that the host is configured with.
    pub fn new(ranges: Ranges) -> Self {
        Self { ranges, ..Self::default() }
    }

    /// Returns the ranges that the host is configured with.
    pub fn ranges(&self) -> &Ranges {
        &self.ranges
    }

    /// Returns what Services name and this host does not translate, if that changed since the last call.
    pub fn take_denied(&mut self) -> Option<&BTreeMap<Name, Vec<Denial>>> {
        std::mem::take(&mut self.denied_changed).then_some(&self.denied)
    }

    /// Returns the desired data plane, computed anew for all Services. Backends keep the numbers that they have.
    ///
    /// It must not be called before gossip has caught up.
    pub fn desired(&self, view: &View, backends: &Backends) -> Dataplane {
        let known = self.ledger.parts().filter_map(|part| match part {
            ElementOwner::Service(name) => Some(name),
            ElementOwner::Host | ElementOwner::Endpoint(_) => None,
        });
        let all: BTreeSet<&Name> = known.chain(view.resources.services().keys()).collect();
        let mut anew = self.clone();
        anew.plan(view, backends, all.into_iter(), true);
        anew.dataplane()
    }

    /// Returns the data plane that was last planned.
    pub fn dataplane(&self) -> Dataplane {
        let (tables, elements) = (self.tables.clone(), self.ledger.wanted().clone());
        let sysctls = self.settings().map(|name| (name.to_owned(), "1".to_owned())).collect();
        let mut dataplane = Dataplane { tables, elements, sysctls, ..Dataplane::default() };
        for table in Table::ALL.into_iter().filter(|table| !self.tables.contains_key(table)) {
            dataplane.elements.forget(table);
        }
        dataplane
    }

    /// Returns the sysctls that the tables need, in the order in which they must be set.
    fn settings(&self) -> impl Iterator<Item = &'static str> {
        let liberal = self.tables.contains_key(&Table::Services).then_some(LIBERAL);
        self.forwarding().chain(liberal)
    }

    /// Returns the sysctls that connections need which are forwarded to the underlay.
    fn forwarding(&self) -> impl Iterator<Item = &'static str> {
        let families: BTreeSet<bool> = self.forwarding.values().flatten().copied().collect();
        let sysctl = |ipv4| if ipv4 { "net.ipv4.ip_forward" } else { "net.ipv6.conf.all.forwarding" };
        families.into_iter().map(sysctl)
    }

    /// Returns the operations that end UDP flows. They must follow the planned operations. Each is returned once.
    pub fn ended(&mut self) -> Vec<Op> {
        std::mem::take(&mut self.ended).into_iter().map(Op::EndFlows).collect()
    }

    /// Returns the operations for these changed Services. With `context`, networks, blocks, hosts or local endpoints
    /// may have changed too.
    ///
    /// It must not be called before gossip has caught up: without the backends of hosts that are still unknown, a
    /// Service would refuse connections.
    pub fn plan<'a>(
        &mut self,
        view: &View,
        backends: &Backends,
        services: impl Iterator<Item = &'a Name>,
        context: bool,
    ) -> Vec<Op> {
        let mut names: BTreeSet<Name> = services.cloned().collect();
        let settings: Vec<&str> = self.settings().collect();
        let mut changes = Vec::new();
        let is_first = !std::mem::replace(&mut self.started, true);
        let any = view.has_services();
        let own_dns = self.ranges.answered_dns(&view.resources);
        let is_dns_moved = std::mem::replace(&mut self.own_dns, own_dns.clone()) != own_dns;
        if is_dns_moved {
            // The Service there is translated from now on, or not any more, whether its backends changed or not.
            names.extend(view.resources.services().keys().cloned());
        }
        let context = context || std::mem::replace(&mut self.any, any) != any || is_dns_moved;
        if context || is_first {
            let context = NetworkContext::of(view, &self.ranges);
            if context != self.context {
                self.context = context;
                names.extend(view.resources.services().keys().cloned());
            }
            let host = host(view, &self.context, &self.ranges);
            changes.extend(self.ledger.set(&ElementOwner::Host, host));
            changes.extend(self.endpoints(view));
        }
        for name in names {
            changes.extend(self.service(view, backends, &name));
        }
        if is_first {
            // End flows to backends that were removed while ovld was not running.
            self.ended = self
                .flows
                .values()
                .flatten()
                .map(|((at, ipv4), keep)| flows_of(*at, *ipv4, keep.clone()))
                .collect();
        }
        let now = self.skeletons();
        let was = std::mem::replace(&mut self.tables, now);
        let mut ops = Vec::new();
        for (table, skeleton) in &self.tables {
            if was.get(table) != Some(skeleton) {
                ops.push(Op::Nft(NftOp::SetTable(*table, Arc::clone(skeleton))));
            }
        }
        // After the tables: the settings of connection tracking exist once it is used.
        for name in self.settings().filter(|name| !settings.contains(name)) {
            ops.push(Op::Sysctl(SysctlOp::Set { name: name.to_owned(), value: "1".to_owned() }));
        }
        let (deleted, new): (Vec<Op>, Vec<Op>) =
            changes.into_iter().partition(|op| matches!(op, Op::Nft(NftOp::DeleteElement(..))));
        let stays = |op: &Op| match op {
            Op::Nft(NftOp::SetElement(Element { set, .. })) | Op::Nft(NftOp::DeleteElement(set, _)) => {
                self.tables.contains_key(&set.table) && was.contains_key(&set.table)
            }
            _ => true,
        };
        let dropped = was.keys().filter(|table| !self.tables.contains_key(table));
        ops.extend(dropped.map(|table| Op::Nft(NftOp::DeleteTable(*table))));
        ops.extend(deleted.into_iter().filter(stays));
        ops.extend(new.into_iter().filter(stays));
        // A new table gets all of its elements.
        for (set, contents) in self.ledger.wanted().sets() {
            if self.tables.contains_key(&set.table) && !was.contains_key(&set.table) {
                ops.extend(contents.iter().map(|(key, value)| {
                    Op::Nft(NftOp::SetElement(Element {
                        set: set.clone(),
                        key: key.clone(),
                        value: value.clone(),
                    }))
                }));
            }
        }
        ops
    }

    /// Returns the tables that are needed.
    fn skeletons(&mut self) -> BTreeMap<Table, Arc<Skeleton>> {
        let mut tables = BTreeMap::new();
        // Chains are only added, so an equal number of them means that they are the same.
        let chains = (self.counts.len(), self.sticky.len(), self.guarded);
        let same = std::mem::replace(&mut self.chains, chains) == chains;
        let mut need = |table: Table, same: bool, make: &dyn Fn() -> Skeleton| {
            let old = self.tables.get(&table).filter(|_| same).map(Arc::clone);
            tables.insert(table, old.unwrap_or_else(|| Arc::new(make())));
        };
        if self.ledger.parts().any(|part| matches!(part, ElementOwner::Service(_))) {
            need(Table::Services, same, &|| skeleton::skeleton(&self.counts, &self.sticky, self.guarded));
        }
        if divert::BACKENDS.iter().any(|set| self.ledger.wanted().of(set).is_some()) {
            need(Table::Divert, true, &divert::skeleton);
        }
        tables
    }

    /// Updates the elements of local endpoints on switched networks.
    fn endpoints(&mut self, view: &View) -> Vec<Op> {
        let mut wanted: BTreeMap<EndpointId, Entries> = BTreeMap::new();
        // Without Services, no frame is diverted.
        let own = view.own().filter(|_| view.has_services());
        for endpoint in own.into_iter().flat_map(|own| own.table.endpoints()) {
            let network = view.networks.get(&endpoint.network).map(|found| &found.network);
            if network.is_some_and(|network| network.mode == Mode::L2) {
                wanted.insert(endpoint.id, endpoint_part(endpoint));
            }
        }
        let there = self.ledger.parts().filter_map(|part| match part {
            ElementOwner::Endpoint(id) => Some(*id),
            ElementOwner::Host | ElementOwner::Service(_) => None,
        });
        let removed: Vec<EndpointId> = there.filter(|id| !wanted.contains_key(id)).collect();
        let all = removed.into_iter().map(|id| (id, Entries::new())).chain(wanted);
        all.flat_map(|(id, entries)| self.ledger.set(&ElementOwner::Endpoint(id), entries)).collect()
    }

    /// Updates the elements of one Service.
    fn service(&mut self, view: &View, backends: &Backends, name: &Name) -> Vec<Op> {
        let service = view.resources.services().get(name).filter(|service| service.is_translated());
        let resolved = service.map(|service| {
            let of = backends.of(name);
            resolve::resolve(&self.context, view.resources.claims(), (name, service), of, &mut self.slots)
        });
        let Resolved { entries, counts, sticky, flows, forwards, guards } = resolved.unwrap_or_default();
        if forwards.is_empty() {
            self.forwarding.remove(name);
        } else {
            self.forwarding.insert(name.clone(), forwards);
        }
        if service.is_none() {
            self.slots.forget(name);
        }
        let denials = service.map(|service| self.context.permits.denials(service)).unwrap_or_default();
        if self.denied.get(name).map_or(&[][..], Vec::as_slice) != denials {
            self.denied_changed = true;
            match denials.is_empty() {
                true => drop(self.denied.remove(name)),
                false => drop(self.denied.insert(name.clone(), denials)),
            }
        }
        // Chains are kept once they exist: the table is written before elements are removed that lead to them.
        self.sticky.extend(sticky);
        self.guarded |= guards;
        self.counts.extend(counts.into_iter().filter(|count| *count > skeleton::ALWAYS));
        let old = self.flows.remove(name).unwrap_or_default();
        let none = BTreeSet::new();
        for at in old.keys().chain(flows.keys()).collect::<BTreeSet<_>>() {
            let (was, is) = (old.get(at).unwrap_or(&none), flows.get(at).unwrap_or(&none));
            // Flows that began before there was a backend went elsewhere, so they end too.
            if !was.is_subset(is) || (was.is_empty() && !is.is_empty()) {
                self.ended.push(flows_of(at.0, at.1, is.clone()));
            }
        }
        if !flows.is_empty() {
            self.flows.insert(name.clone(), flows);
        }
        self.ledger.set(&ElementOwner::Service(name.clone()), entries)
    }
}

/// Returns the set that maps ports at addresses to their number of backends, for clients that are endpoints.
pub fn inside(ipv4: bool) -> Set {
    of_family(&skeleton::INSIDE, ipv4).clone()
}

fn flows_of((address, _, port): At, ipv4: bool, keep: BTreeSet<(IpAddr, u16)>) -> Flows {
    Flows { address, port, keep, ipv4, held: false }
}

fn endpoint_part(endpoint: &Endpoint) -> Entries {
    let mut entries = Entries::new();
    entries.insert((divert::LOCAL, Key::of(&[Field::Mac(endpoint.mac)])), Value::None);
    for address in endpoint.addresses.iter().map(IpNet::addr) {
        let set = of_family(&divert::MACS, address.is_ipv4()).clone();
        let mac = Value::of(&[Field::Mac(endpoint.mac)]);
        entries.insert((set, Key::of(&[Field::Ip(address)])), mac);
    }
    entries
}

/// Returns the elements that follow from networks and hosts alone.
fn host(view: &View, context: &NetworkContext, ranges: &Ranges) -> Entries {
    let mut entries = Entries::new();
    for range in ranges.of_services(view) {
        let set = of_family(&skeleton::RANGES, range.addr().is_ipv4()).clone();
        entries.insert((set, Key::of(&[Field::Net(range)])), Value::None);
    }
    for address in context.hosts.values() {
        let set = of_family(&skeleton::HOSTS, address.is_ipv4()).clone();
        entries.insert((set, Key::of(&[Field::Ip(*address)])), Value::None);
    }
    for network in view.networks.values().map(|found| &found.network) {
        for subnet in &network.subnets {
            let ipv4 = subnet.prefix.addr().is_ipv4();
            let key = Key::of(&[Field::Net(subnet.prefix)]);
            let mut put = |sets: &[Set; 2], value| {
                entries.insert((of_family(sets, ipv4).clone(), key.clone()), value);
            };
            put(&skeleton::OURS, Value::None);
            if network.mode == Mode::L2 {
                put(&divert::GATEWAYS, Value::of(&[Field::Mac(Mac::of_gateway(network.id))]));
            }
            if let Some(gateway) = own_address(view, network, subnet).filter(|_| !network.internal) {
                let gateway = Value::of(&[Field::Ip(gateway)]);
                put(&skeleton::GATEWAYS, gateway.clone());
                if network.mode == Mode::L3 {
                    put(&skeleton::ROUTED, gateway);
                }
            }
        }
    }
    entries
}

/// Returns the local host's source address on a subnet.
fn own_address(view: &View, network: &Network, subnet: &Subnet) -> Option<IpAddr> {
    match network.mode {
        Mode::L2 => Some(subnet.gateway),
        Mode::L3 => view.first_gateway(network.id, view.me, subnet.prefix.addr()),
    }
}
