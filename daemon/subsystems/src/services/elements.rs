//! Services in the kernel: what the elements of `inet ovl-services` and `bridge ovl-divert` should be, kept up
//! Service by Service. A backend that comes or goes costs a few elements, however many Services and backends
//! there are.

mod resolve;
mod skeleton;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use ovl_proto::id::{EndpointId, Mac, NodeId};
use ovl_proto::object::{Mode, Network, Subnet};
use ovl_proto::resource::Name;
use ovl_proto::table::Endpoint;

use super::divert;
use ovl_cluster::backends::{Backends, Target};
use ovl_cluster::view::View;
use ovl_dataplane::flows::Flows;
use ovl_dataplane::ledger::{Entries, Ledger};
use ovl_dataplane::nft::{Element, Field, Key, Set, Skeleton, Table, Value};
use ovl_dataplane::op::Op;
use ovl_dataplane::state::Dataplane;

use self::resolve::{Resolved, Slots};
use self::skeleton::Sticky;

/// What wants elements.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum ElementOwner {
    Host,
    Endpoint(EndpointId),
    Service(Name),
}

/// A Service's port as packets find it: with an address, or a node port.
type At = (Option<IpAddr>, u8, u16);

/// What a whole look at networks decides for all Services.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct NetworkContext {
    /// This host.
    pub(crate) me: Option<NodeId>,
    /// Its underlay address.
    pub(crate) vtep: Option<IpAddr>,
    /// Prefixes of switched networks: their endpoints on other hosts answer to nobody outside.
    pub(crate) switched: Vec<IpNet>,
    /// Those of them whose packets may not cross the underlay in plain.
    pub(crate) sealed: Vec<IpNet>,
    /// Underlay addresses of the other hosts that are there: connections are passed on to their node ports.
    pub(crate) hosts: BTreeMap<NodeId, IpAddr>,
}

impl NetworkContext {
    /// Whether it is the address of an endpoint of a switched network.
    fn is_switched(&self, address: IpAddr) -> bool {
        self.switched.iter().any(|prefix| prefix.contains(&address))
    }

    /// Whether what comes from outside for an endpoint may cross the underlay to its host.
    fn is_relayed(&self, address: IpAddr) -> bool {
        self.is_switched(address) && !self.sealed.iter().any(|prefix| prefix.contains(&address))
    }

    /// The host that what comes from outside for an endpoint is passed on to; nothing where that has no address of
    /// the family.
    fn relay(&self, target: &Target) -> Option<IpAddr> {
        let host = *self.hosts.get(&target.host?)?;
        let fits = |address: &IpAddr| address.is_ipv4() == target.address.is_ipv4();
        (self.is_relayed(target.address) && self.vtep.is_some_and(|own| fits(&own)))
            .then_some(host)
            .filter(fits)
    }
}

/// All Services of the cluster, for one host.
#[derive(Debug, Clone, Default)]
pub struct Services {
    ledger: Ledger<ElementOwner>,
    context: NetworkContext,
    slots: Slots,
    /// Where each Service's UDP ports lead.
    flows: BTreeMap<Name, resolve::UdpPorts>,
    counts: BTreeSet<u32>,
    sticky: BTreeSet<Sticky>,
    /// How many there were of the two when the skeleton was made.
    chains: (usize, usize),
    /// What was planned last.
    tables: BTreeMap<Table, Arc<Skeleton>>,
    ended: Vec<Flows>,
    started: bool,
    /// Whether there are Services at all.
    any: bool,
    /// Services of which something is passed on to other hosts.
    relaying: BTreeSet<Name>,
}

impl Services {
    /// What belongs into the desired state.
    pub fn dataplane(&self) -> Dataplane {
        let (tables, elements) = (self.tables.clone(), self.ledger.wanted().clone());
        let sysctls = self.forwarding().into_iter().map(|name| (name.to_owned(), "1".to_owned())).collect();
        let mut dataplane = Dataplane { tables, elements, sysctls, ..Dataplane::default() };
        for table in Table::ALL.into_iter().filter(|table| !self.tables.contains_key(table)) {
            dataplane.elements.forget(table);
        }
        dataplane
    }

    /// The setting without which nothing is passed on.
    fn forwarding(&self) -> Option<&'static str> {
        let ipv4 = self.context.vtep.filter(|_| !self.relaying.is_empty())?.is_ipv4();
        Some(if ipv4 { "net.ipv4.ip_forward" } else { "net.ipv6.conf.all.forwarding" })
    }

    /// Flows that are to end after what was planned is done; each is given once.
    pub fn ended(&mut self) -> Vec<Op> {
        std::mem::take(&mut self.ended).into_iter().map(Op::EndFlows).collect()
    }

    /// What these Services need beyond what was planned last; with `context`, networks, blocks or endpoints of
    /// this host may be others too. Not before gossip has caught up: a Service without the backends of hosts
    /// that were not heard yet would refuse connections.
    pub fn plan<'a>(
        &mut self,
        view: &View,
        backends: &Backends,
        services: impl Iterator<Item = &'a Name>,
        context: bool,
    ) -> Vec<Op> {
        let mut names: BTreeSet<Name> = services.cloned().collect();
        let forwarding = self.forwarding();
        let mut changes = Vec::new();
        let is_first = !std::mem::replace(&mut self.started, true);
        let any = view.has_services();
        let context = context || std::mem::replace(&mut self.any, any) != any;
        if context || is_first {
            let context = self::context(view);
            if context != self.context {
                self.context = context;
                names.extend(view.resources.services.keys().cloned());
            }
            changes.extend(self.ledger.set(&ElementOwner::Host, host(view, &self.context)));
            changes.extend(self.endpoints(view));
        }
        for name in names {
            changes.extend(self.service(view, backends, &name));
        }
        if is_first {
            // Whatever went while nobody looked.
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
        if let Some(name) = self.forwarding().filter(|name| Some(*name) != forwarding) {
            ops.push(Op::Sysctl { name: name.to_owned(), value: "1".to_owned() });
        }
        for (table, skeleton) in &self.tables {
            if was.get(table) != Some(skeleton) {
                ops.push(Op::Table(*table, Arc::clone(skeleton)));
            }
        }
        let (gone, new): (Vec<Op>, Vec<Op>) =
            changes.into_iter().partition(|op| matches!(op, Op::DelElement(..)));
        let stays = |op: &Op| match op {
            Op::SetElement(Element { set, .. }) | Op::DelElement(set, _) => {
                self.tables.contains_key(&set.table) && was.contains_key(&set.table)
            }
            _ => true,
        };
        let dropped = was.keys().filter(|table| !self.tables.contains_key(table));
        ops.extend(dropped.map(|table| Op::DelTable(*table)));
        ops.extend(gone.into_iter().filter(stays));
        ops.extend(new.into_iter().filter(stays));
        // A table that was not there before gets all that it should have.
        for (set, contents) in self.ledger.wanted().sets() {
            if self.tables.contains_key(&set.table) && !was.contains_key(&set.table) {
                ops.extend(contents.iter().map(|(key, value)| {
                    Op::SetElement(Element { set: set.clone(), key: key.clone(), value: value.clone() })
                }));
            }
        }
        ops
    }

    /// The tables that are needed.
    fn skeletons(&mut self) -> BTreeMap<Table, Arc<Skeleton>> {
        let mut tables = BTreeMap::new();
        // Chains only ever come: as many as before are the same.
        let chains = (self.counts.len(), self.sticky.len());
        let same = std::mem::replace(&mut self.chains, chains) == chains;
        let mut need = |table: Table, same: bool, make: &dyn Fn() -> Skeleton| {
            let old = self.tables.get(&table).filter(|_| same).map(Arc::clone);
            tables.insert(table, old.unwrap_or_else(|| Arc::new(make())));
        };
        if self.ledger.parts().any(|part| matches!(part, ElementOwner::Service(_))) {
            need(Table::Services, same, &|| skeleton::skeleton(&self.counts, &self.sticky));
        }
        if divert::BACKENDS.iter().any(|set| self.ledger.wanted().of(set).is_some()) {
            need(Table::Divert, true, &divert::skeleton);
        }
        tables
    }

    /// Endpoints of this host on switched networks.
    fn endpoints(&mut self, view: &View) -> Vec<Op> {
        let mut wanted: BTreeMap<EndpointId, Entries> = BTreeMap::new();
        // Without Services nothing is diverted.
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
        let gone: Vec<EndpointId> = there.filter(|id| !wanted.contains_key(id)).collect();
        let all = gone.into_iter().map(|id| (id, Entries::new())).chain(wanted);
        all.flat_map(|(id, entries)| self.ledger.set(&ElementOwner::Endpoint(id), entries)).collect()
    }

    /// One Service, looked at anew.
    fn service(&mut self, view: &View, backends: &Backends, name: &Name) -> Vec<Op> {
        let service = view.resources.services.get(name);
        let resolved = service.map(|service| {
            let of = backends.of(name);
            resolve::resolve(&self.context, &view.resources.claims, (name, service), of, &mut self.slots)
        });
        let Resolved { entries, counts, sticky, flows, relays } = resolved.unwrap_or_default();
        if relays {
            self.relaying.insert(name.clone());
        } else {
            self.relaying.remove(name);
        }
        if service.is_none() {
            self.slots.forget(name);
        }
        // Chains stay once they are there: they are written before the elements that lead to others.
        self.sticky.extend(sticky);
        self.counts.extend(counts.into_iter().filter(|count| *count > skeleton::ALWAYS));
        let old = self.flows.remove(name).unwrap_or_default();
        let none = BTreeSet::new();
        for at in old.keys().chain(flows.keys()).collect::<BTreeSet<_>>() {
            let (was, is) = (old.get(at).unwrap_or(&none), flows.get(at).unwrap_or(&none));
            // Also what came before there was a backend, and went elsewhere.
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

/// How many backends ports at addresses have for endpoints.
pub fn inside(ipv4: bool) -> Set {
    of_family(&skeleton::INSIDE, ipv4).clone()
}

fn flows_of((address, _, port): At, ipv4: bool, keep: BTreeSet<(IpAddr, u16)>) -> Flows {
    Flows { address, port, keep, ipv4, held: false }
}

fn context(view: &View) -> NetworkContext {
    let prefixes = |networks: Vec<&Network>| -> Vec<IpNet> {
        networks.into_iter().flat_map(|network| &network.subnets).map(|subnet| subnet.prefix).collect()
    };
    let switched: Vec<&Network> = view.switched().collect();
    let sealed = switched.iter().copied().filter(|network| network.encrypted).collect();
    // Who comes and goes concerns nobody where nothing is passed on.
    let others = view.nodes.values().filter(|node| !switched.is_empty() && node.record.id != view.me);
    let hosts = others.filter(|node| view.counts(node)).map(|node| (node.record.id, node.record.vtep));
    NetworkContext {
        me: Some(view.me),
        vtep: view.own().map(|own| own.record.vtep),
        hosts: hosts.collect(),
        sealed: prefixes(sealed),
        switched: prefixes(switched),
    }
}

/// The network's sets of the family of an address.
pub(crate) fn of_family(sets: &[Set; 2], ipv4: bool) -> &Set {
    let [v4, v6] = sets;
    if ipv4 { v4 } else { v6 }
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

/// What follows from networks alone.
fn host(view: &View, context: &NetworkContext) -> Entries {
    let mut entries = Entries::new();
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

/// What this host sends from on a network.
fn own_address(view: &View, network: &Network, subnet: &Subnet) -> Option<IpAddr> {
    match network.mode {
        Mode::L2 => Some(subnet.gateway),
        Mode::L3 => view.first_gateway(network.id, view.me, subnet.prefix.addr()),
    }
}
