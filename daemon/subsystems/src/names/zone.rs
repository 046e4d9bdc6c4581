//! NameTracker of endpoints, as DNS has them: what there is of a name on a network, and of an address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::id::NetworkId;
use ovl_proto::table::Endpoint;

use ovl_cluster::view::{Placed, View};

/// What may have changed of a network's names.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Marks {
    /// In lower case.
    pub names: BTreeSet<String>,
    /// Of which the names may have changed.
    pub addresses: BTreeSet<IpAddr>,
}

impl Marks {
    /// Takes note of an endpoint as it was or as it is.
    pub fn note(&mut self, endpoint: &Endpoint) {
        self.names.extend(endpoint.canonical_names());
        self.addresses.extend(endpoint.addresses.iter().map(IpNet::addr));
    }

    /// All endpoints that any host has on a network.
    pub fn of_network(view: &View, network: NetworkId) -> Self {
        let mut marks = Self::default();
        view.all_endpoints_on(network).for_each(|placed| marks.note(placed.endpoint));
        marks
    }
}

/// The addresses of all endpoints of a network that are called so, each once and in order.
pub fn addresses(view: &View, network: NetworkId, name: &str) -> BTreeSet<IpAddr> {
    let called = view.all_called(name).filter(|placed| counts(view, network, placed));
    called.flat_map(|placed| &placed.endpoint.addresses).map(IpNet::addr).collect()
}

/// The names of the endpoints that have an address: one, unless hosts disagree.
pub fn names_of(view: &View, network: NetworkId, address: IpAddr) -> BTreeSet<String> {
    let there = view.all_with_address(network, address).filter(|placed| counts(view, network, placed));
    there.map(|placed| placed.endpoint.name.to_ascii_lowercase()).collect()
}

fn counts(view: &View, network: NetworkId, placed: &Placed<'_>) -> bool {
    placed.endpoint.network == network && view.is_counted(placed)
}

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asker {
    /// The networks that it is on, in the order of its interfaces.
    pub networks: Vec<NetworkId>,
    /// Its Kubernetes namespace.
    pub namespace: String,
}

/// Who asks from which address, of this host's endpoints. `place` tells endpoints that share a namespace, and their order there.
pub fn askers<P: Ord + Clone, O: Ord>(
    view: &View,
    place: impl Fn(&Endpoint) -> Option<(P, O)>,
) -> BTreeMap<IpAddr, Asker> {
    let mut places: BTreeMap<P, BTreeMap<O, &Endpoint>> = BTreeMap::new();
    let own = view.own().into_iter().flat_map(|own| own.table.endpoints());
    for endpoint in own.filter(|endpoint| view.address_conflict(view.me, endpoint).is_none()) {
        if let Some((at, order)) = place(endpoint) {
            places.entry(at).or_default().insert(order, endpoint);
        }
    }
    let mut askers = BTreeMap::new();
    for endpoints in places.values() {
        let networks: Vec<NetworkId> = endpoints.values().map(|endpoint| endpoint.network).collect();
        for endpoint in endpoints.values() {
            let asker = Asker { networks: networks.clone(), namespace: endpoint.namespace.clone() };
            askers.extend(endpoint.addresses.iter().map(|net| (net.addr(), asker.clone())));
        }
    }
    askers
}
