//! DNS names of endpoints: the addresses of a name, the names of an address, and the clients of the resolver.
//!
//! The module owns no state: it looks the answers up in the view. Begin to read at [`addresses`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::id::NetworkId;
use ovl_proto::table::Endpoint;

use ovl_cluster::view::{Placed, View};

/// Names and addresses of one network that may have changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Marks {
    /// Names, in lower case.
    names: BTreeSet<String>,
    /// Addresses whose names may have changed.
    addresses: BTreeSet<IpAddr>,
}

impl Marks {
    /// Records the old or the new value of an endpoint.
    pub fn note(&mut self, endpoint: &Endpoint) {
        self.names.extend(endpoint.canonical_names());
        self.addresses.extend(endpoint.addresses.iter().map(IpNet::addr));
    }

    /// Returns the names, in lower case.
    pub fn names(&self) -> &BTreeSet<String> {
        &self.names
    }

    /// Returns the addresses whose names may have changed.
    pub fn addresses(&self) -> &BTreeSet<IpAddr> {
        &self.addresses
    }

    /// Returns the names and addresses of all endpoints that any host has on a network.
    pub fn of_network(view: &View, network: NetworkId) -> Self {
        let mut marks = Self::default();
        view.all_endpoints_on(network).for_each(|placed| marks.note(placed.endpoint));
        marks
    }
}

/// Returns the addresses of all endpoints of a network with this name or alias.
pub fn addresses(view: &View, network: NetworkId, name: &str) -> BTreeSet<IpAddr> {
    let called = view.all_called(name).filter(|placed| counts(view, network, placed));
    called.flat_map(|placed| &placed.endpoint.addresses).map(IpNet::addr).collect()
}

/// Returns the names of the endpoints with this address: one, unless hosts disagree.
pub fn names_of(view: &View, network: NetworkId, address: IpAddr) -> BTreeSet<String> {
    let there = view.all_with_address(network, address).filter(|placed| counts(view, network, placed));
    there.map(|placed| placed.endpoint.name.to_ascii_lowercase()).collect()
}

fn counts(view: &View, network: NetworkId, placed: &Placed<'_>) -> bool {
    placed.endpoint.network == network && view.is_counted(placed)
}

/// A client of the resolver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsClient {
    /// The networks of the client, in the order of its interfaces.
    pub networks: Vec<NetworkId>,
    /// The Kubernetes namespace of the client.
    pub namespace: String,
}

/// Returns the clients of the resolver by source address: the local endpoints without an address conflict. `place`
/// returns the network namespace of an endpoint and its position there; `None` leaves the endpoint out.
pub fn dns_clients<P: Ord + Clone, O: Ord>(
    view: &View,
    place: impl Fn(&Endpoint) -> Option<(P, O)>,
) -> BTreeMap<IpAddr, DnsClient> {
    let mut namespaces: BTreeMap<P, BTreeMap<O, &Endpoint>> = BTreeMap::new();
    let own = view.own().into_iter().flat_map(|own| own.table.endpoints());
    for endpoint in own.filter(|endpoint| view.address_conflict(view.me, endpoint).is_none()) {
        if let Some((at, order)) = place(endpoint) {
            namespaces.entry(at).or_default().insert(order, endpoint);
        }
    }
    let mut clients = BTreeMap::new();
    for endpoints in namespaces.values() {
        let networks: Vec<NetworkId> = endpoints.values().map(|endpoint| endpoint.network).collect();
        for endpoint in endpoints.values() {
            let client = DnsClient { networks: networks.clone(), namespace: endpoint.namespace.clone() };
            clients.extend(endpoint.addresses.iter().map(|net| (net.addr(), client.clone())));
        }
    }
    clients
}
