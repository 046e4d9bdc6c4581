//! DNS names of endpoints in the zone: the addresses of a name, the names of an address, and the clients of the
//! resolver.
//!
//! The module owns no state: it looks everything up in the view and sets it in the zone that it is given. Begin to read
//! at [`set`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use ovl_proto::id::{EndpointId, NetworkId};
use ovl_proto::table::{Endpoint, canonical_name, is_same_name};
use ovl_zone::{ClientContext, Name, NamePattern, NetworkKey, Records, Zone};

use ovl_cluster::view::{NetworkState, Placed, View};

/// Where an endpoint of this host is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The inode of its network namespace. 0 if it is unknown: the endpoint then counts as the only one in it.
    pub namespace: u64,
    /// The name of its interface there. A client searches its networks in the order of these names.
    pub interface: String,
}

/// Names and addresses of one network that may have changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Marks {
    /// Names, in their canonical form.
    names: BTreeSet<String>,
    /// Addresses whose names may have changed.
    addresses: BTreeSet<IpAddr>,
}

impl Marks {
    /// Records the old or the new value of an endpoint.
    pub(super) fn note(&mut self, endpoint: &Endpoint) {
        self.names.extend(endpoint.canonical_names());
        self.addresses.extend(endpoint.addresses.iter().map(IpNet::addr));
    }

    /// Returns the addresses whose names may have changed.
    pub(super) fn addresses(&self) -> &BTreeSet<IpAddr> {
        &self.addresses
    }

    /// Returns the names and addresses of all endpoints that any host has on a network.
    fn of_network(view: &View, network: NetworkId) -> Self {
        let mut marks = Self::default();
        view.all_endpoints_on(network).for_each(|placed| marks.note(placed.endpoint));
        marks
    }
}

/// Returns the key of a network in the zone.
pub(super) fn key(network: NetworkId) -> NetworkKey {
    network.0.iter().fold(0, |key, byte| key << 8 | u64::from(*byte))
}

/// Returns the records of A and AAAA of these addresses.
pub(super) fn records_of(addresses: BTreeSet<IpAddr>) -> Records {
    let (mut v4, mut v6) = (Vec::new(), Vec::new());
    for address in addresses {
        match address {
            IpAddr::V4(address) => v4.push(address),
            IpAddr::V6(address) => v6.push(address),
        }
    }
    Records { v4: v4.into(), v6: v6.into(), ..Records::default() }
}

/// Sets the label, the subnets and all names of a network. Names that no endpoint has any more are removed.
pub(super) fn set_network(zone: &mut Zone, view: &View, network: NetworkId) {
    let Some(found) = view.networks.get(&network) else { return };
    let label = label(found).unwrap_or(Name::ROOT);
    let subnets = found.network.subnets.iter().map(|subnet| subnet.prefix).collect();
    zone.set_network(key(network), label, subnets);
    let there = Marks::of_network(view, network);
    for name in zone.names(key(network)) {
        let is_there = match name.reversed() {
            Some(address) => there.addresses.contains(&address),
            None => there.names.contains(&name.to_string()),
        };
        if !is_there {
            zone.set(key(network), &name, Records::default());
        }
    }
    set(zone, view, network, &there);
}

/// Sets the current records of the marked names and addresses.
pub(super) fn set(zone: &mut Zone, view: &View, network: NetworkId, marks: &Marks) {
    for text in &marks.names {
        let Some(name) = name_of(text) else { continue };
        zone.set(key(network), &name, records_of(addresses(view, network, text)));
    }
    for address in &marks.addresses {
        let names = names_of(view, network, *address);
        let names = names.iter().filter_map(|name| name_of(name)).map(Into::into).collect();
        zone.set(key(network), &Name::reverse_of(*address), Records { names, ..Records::default() });
    }
}

/// Returns the name in DNS for a canonical name. `None` if it is not valid there, or is the name of an address, whose
/// records do not depend on what an endpoint is called.
fn name_of(text: &str) -> Option<Name> {
    Name::parse(text).filter(|name| name.reversed().is_none())
}

/// Returns the name below which the names of a network are. `None` if it is not valid in DNS.
fn label(state: &NetworkState) -> Option<Name> {
    Name::parse(&canonical_name(&state.network.name))
}

/// Sets the clients of the zone by their addresses. `place` returns where an endpoint of this host is; `None` leaves the
/// endpoint out. `may_ask` returns whether policies allow an endpoint to query the resolver, and `watched` the names that they admit
/// connections to.
pub(super) fn set_clients(
    zone: &mut Zone,
    view: &View,
    place: impl Fn(EndpointId) -> Option<Place>,
    may_ask: impl Fn(&Endpoint) -> bool,
    watched: impl Fn(&Endpoint) -> Vec<NamePattern>,
) {
    let clients = clients(view, place, may_ask, watched).into_iter().map(|(address, client)| {
        let networks = client.networks.into_iter().map(key).collect();
        let search = Name::parse(&format!("{}.svc", client.namespace));
        (address, ClientContext { networks, search, external: client.external, watched: client.watched })
    });
    zone.set_clients(clients.collect());
}

/// Returns the addresses of all endpoints of a network with this name, alias or pod's name.
fn addresses(view: &View, network: NetworkId, name: &str) -> BTreeSet<IpAddr> {
    called(view, network, name).flat_map(|placed| &placed.endpoint.addresses).map(IpNet::addr).collect()
}

/// Returns the endpoints of a network with this name, alias or pod's name, given in its canonical form.
pub(super) fn called<'a>(
    view: &'a View,
    network: NetworkId,
    name: &'a str,
) -> impl Iterator<Item = Placed<'a>> {
    let called = view.all_called(name).filter(move |placed| counts(view, network, placed));
    called.filter(move |placed| {
        let aliases = placed.endpoint.aliases.iter().map(String::as_str);
        own_names(view, placed).chain(aliases).any(|own| is_same_name(own, name))
    })
}

/// Returns the names of the endpoints with this address: at most one, unless hosts disagree. A pod of a container runtime has
/// none on a network: in Kubernetes, an address has the names of Services alone, and programs do not know the network's.
fn names_of(view: &View, network: NetworkId, address: IpAddr) -> BTreeSet<String> {
    let there = view.all_with_address(network, address).filter(|placed| counts(view, network, placed));
    let there = there.filter(|placed| placed.endpoint.pod.is_none());
    there.filter_map(|placed| own_names(view, &placed).next().map(canonical_name)).collect()
}

/// Returns the names that an endpoint has besides its aliases, the one that people know first: the name of its pod, if
/// it stands for it, and its own name, unless that is the name of a pod for which another endpoint stands.
fn own_names<'a>(view: &View, placed: &Placed<'a>) -> impl Iterator<Item = &'a str> + use<'a> {
    let endpoint = placed.endpoint;
    let pod = endpoint.pod.as_ref().map(|pod| pod.name.as_str());
    let own = Some(endpoint.name.as_str()).filter(|name| Some(*name) != pod);
    let pod = pod.filter(|_| view.is_named_as_pod(placed.node.record.id, endpoint));
    pod.into_iter().chain(own)
}

/// Whether endpoints of a network get answers for names outside of the cluster. From an internal network, data could leave
/// in such names.
fn has_external_names(view: &View, network: NetworkId) -> bool {
    let found = view.networks.get(&network);
    found.is_some_and(|NetworkState { network, .. }| !network.internal || network.external_names)
}

fn counts(view: &View, network: NetworkId, placed: &Placed<'_>) -> bool {
    placed.endpoint.network == network && view.is_counted(placed)
}

/// A client of the resolver.
#[derive(Debug, Clone, PartialEq, Eq)]
struct DnsClient {
    /// The networks of the client, in the order of its interfaces.
    networks: Vec<NetworkId>,
    /// The Kubernetes namespace of the client.
    namespace: String,
    /// Whether it gets answers for names outside of the cluster.
    external: bool,
    /// The names that policies admit connections to.
    watched: Arc<[NamePattern]>,
}

/// Returns the clients of the resolver by source address: the local endpoints without an address conflict that may query
/// it.
fn clients(
    view: &View,
    place: impl Fn(EndpointId) -> Option<Place>,
    may_ask: impl Fn(&Endpoint) -> bool,
    watched: impl Fn(&Endpoint) -> Vec<NamePattern>,
) -> BTreeMap<IpAddr, DnsClient> {
    let mut namespaces: BTreeMap<(u64, Option<EndpointId>), BTreeMap<String, &Endpoint>> = BTreeMap::new();
    let own = view.own().into_iter().flat_map(|own| own.table.endpoints());
    for endpoint in own.filter(|endpoint| view.address_conflict(view.me, endpoint).is_none()) {
        if let Some(Place { namespace, interface }) = place(endpoint.id) {
            let alone = (namespace == 0).then_some(endpoint.id);
            namespaces.entry((namespace, alone)).or_default().insert(interface, endpoint);
        }
    }
    let mut clients = BTreeMap::new();
    for endpoints in namespaces.values() {
        let networks: Vec<NetworkId> = endpoints.values().map(|endpoint| endpoint.network).collect();
        let external = networks.iter().any(|network| has_external_names(view, *network));
        // A workload may be told at one interface and connect from another one.
        let mut patterns: Vec<NamePattern> = endpoints.values().flat_map(|it| watched(it)).collect();
        patterns.sort_unstable();
        patterns.dedup();
        let watched: Arc<[NamePattern]> = patterns.into();
        for endpoint in endpoints.values().filter(|endpoint| may_ask(endpoint)) {
            let namespace = endpoint.namespace.clone();
            let watched = Arc::clone(&watched);
            let client = DnsClient { networks: networks.clone(), namespace, external, watched };
            clients.extend(endpoint.addresses.iter().map(|net| (net.addr(), client.clone())));
        }
    }
    clients
}
