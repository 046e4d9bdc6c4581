//! The zone follows endpoints, networks, Services and pods.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ovl_proto::id::{EndpointId, NetworkId};
use ovl_proto::object::Network;
use ovl_proto::record::PeerState;
use ovl_proto::resource::Kind;
use ovl_proto::table::{Endpoint, Entry, Key};
use ovl_subsystems::local::Local;
use ovl_subsystems::names::{Ambiguous, Names, Place, Sources, ambiguous};
use ovl_subsystems::{Change, Cluster, Subsystem as _};
use ovl_zone::{Client, Name, Resolution, Zone};
use proptest::prelude::*;
use serde_json::json;

use crate::world::{NET, World, endpoint, id, pod_identity, read};

const OTHER: NetworkId = NetworkId([9; 5]);
const DOMAIN: &str = "cluster.local";

fn name(text: &str) -> Name {
    Name::parse(text).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn named(n: u8, name: &str, address: &str) -> Endpoint {
    let Entry::Endpoint(endpoint) = endpoint(n, address) else { panic!() };
    Endpoint { name: name.to_owned(), ..endpoint }
}

/// Each endpoint is in a namespace of its own.
fn alone(id: EndpointId) -> Option<Place> {
    Some(Place { namespace: u64::from(id.0[0]), interface: "eth0".to_owned() })
}

/// A cluster, and the names that are kept up to date in it.
struct Town {
    world: World,
    names: Names,
    place: fn(EndpointId) -> Option<Place>,
}

impl Town {
    fn new() -> Self {
        let mut world = World::new();
        world.view.nodes.values_mut().for_each(|node| node.state = PeerState::Alive);
        let mut town = Self {
            world,
            names: Names::new("ovl.internal", "Cluster.Local.", true, Vec::new(), false),
            place: alone,
        };
        town.changed(Change::Network(NET));
        town.refresh();
        town
    }

    fn changed(&mut self, change: Change<'_>) {
        let local = Local::default();
        let World { view, backends } = &self.world;
        self.names.changed(&change, &Cluster { view, backends, local: &local, caught_up: true });
    }

    /// Whether endpoints of this host reach the resolver.
    fn leads_to_the_resolver(&self) -> bool {
        let local = Local::default();
        let World { view, backends } = &self.world;
        let cluster = Cluster { view, backends, local: &local, caught_up: true };
        !self.names.desired(&cluster).addresses.is_empty()
    }

    /// Writes the table of a host, and reports the values before and after.
    fn write(&mut self, host: u8, set: Vec<Endpoint>, unset: Vec<EndpointId>) {
        let table = &self.world.view.nodes[&id(host)].table;
        let ids = set.iter().map(|endpoint| endpoint.id).chain(unset.iter().copied());
        let mut values: Vec<Endpoint> = ids.filter_map(|id| table.endpoint(id).cloned()).collect();
        values.extend(set.iter().cloned());
        let keys = unset.iter().map(|id| Key::Endpoint(*id)).collect();
        let entries = set.into_iter().map(Entry::Endpoint).collect();
        let table = &mut self.world.view.nodes.get_mut(&id(host)).unwrap().table;
        table.write(1, entries, keys, |_| ovl_proto::record::Signature([0; 64]));
        for value in values {
            self.world.backends.touch_endpoint(&self.world.view, id(host), value.id);
            self.changed(Change::Entry { host: id(host), entry: &Entry::Endpoint(value) });
        }
    }

    fn refresh(&mut self) -> Option<Zone> {
        let settled = self.world.settle();
        self.changed(Change::Backends(&settled));
        let World { view, backends } = &self.world;
        self.names.refresh(Sources { view, backends, place: &self.place })
    }

    fn addresses(&self, client: Client, text: &str) -> BTreeSet<IpAddr> {
        match self.names.zone().find(client, &name(text)) {
            Resolution::Found(_, records) => {
                let v4 = records.v4.iter().copied().map(IpAddr::from);
                v4.chain(records.v6.iter().copied().map(IpAddr::from)).collect()
            }
            _ => BTreeSet::new(),
        }
    }

    /// Returns the addresses of a full name, as the host sees them.
    fn host(&self, text: &str) -> Vec<String> {
        self.addresses(Client::Host, text).iter().map(IpAddr::to_string).collect()
    }

    fn reverse(&self, address: &str) -> Vec<String> {
        match self.names.zone().find(Client::Host, &Name::reverse_of(ip(address))) {
            Resolution::Found(_, records) => {
                records.names.iter().map(|name| name.name().to_string()).collect()
            }
            _ => Vec::new(),
        }
    }
}

#[test]
fn endpoint_comes_is_renamed_and_goes() {
    let mut town = Town::new();
    assert!(town.refresh().is_none(), "nothing is marked");

    town.write(2, vec![named(1, "Web", "10.9.0.17/24")], vec![]);
    assert!(town.refresh().is_some());
    assert_eq!(town.host("web.blue.ovl.internal"), ["10.9.0.17"]);
    assert_eq!(town.reverse("10.9.0.17"), ["web"]);

    town.write(2, vec![named(1, "db", "10.9.0.17/24")], vec![]);
    town.refresh();
    assert!(town.host("web.blue.ovl.internal").is_empty());
    assert_eq!(town.host("db.blue.ovl.internal"), ["10.9.0.17"]);
    assert_eq!(town.reverse("10.9.0.17"), ["db"]);

    town.write(2, vec![], vec![EndpointId([1; 5])]);
    town.refresh();
    assert!(town.host("db.blue.ovl.internal").is_empty());
    assert!(town.reverse("10.9.0.17").is_empty());
}

#[test]
fn endpoints_of_one_name_are_one_name_with_all_addresses() {
    let mut town = Town::new();
    town.write(2, vec![named(1, "web", "10.9.0.17/24")], vec![]);
    town.write(3, vec![named(2, "web", "10.9.0.25/24")], vec![]);
    town.refresh();
    assert_eq!(town.host("web.blue.ovl.internal"), ["10.9.0.17", "10.9.0.25"]);
    town.write(3, vec![], vec![EndpointId([2; 5])]);
    town.refresh();
    assert_eq!(town.host("web.blue.ovl.internal"), ["10.9.0.17"]);
}

#[test]
fn clients_are_the_endpoints_of_this_host_and_see_their_networks() {
    let mut town = Town::new();
    town.write(1, vec![named(1, "own", "10.9.0.9/24")], vec![]);
    town.write(2, vec![named(2, "far", "10.9.0.17/24")], vec![]);
    town.refresh();
    let (own, far) = (Client::Endpoint(ip("10.9.0.9")), Client::Endpoint(ip("10.9.0.17")));
    assert_eq!(town.addresses(own, "far"), BTreeSet::from([ip("10.9.0.17")]));
    assert!(town.addresses(far, "own").is_empty(), "an endpoint of another host is no client");
    assert!(town.names.zone().has_client(ip("10.9.0.9")) && !town.names.zone().has_client(ip("10.9.0.17")));

    town.write(1, vec![], vec![EndpointId([1; 5])]);
    town.refresh();
    assert!(!town.names.zone().has_client(ip("10.9.0.9")));
}

/// Adds a second network whose endpoints share the addresses' rights of the first: `red`.
fn add_red(town: &mut Town) {
    let mut state = town.world.view.networks[&NET].clone();
    state.network = Network { id: OTHER, name: "red".to_owned(), ..state.network };
    town.world.view.networks.insert(OTHER, state);
    let blocks: Vec<_> = town.world.view.alloc.blocks.iter().map(|(block, host)| (*block, *host)).collect();
    for (mut block, host) in blocks {
        block.network = OTHER;
        town.world.view.alloc.blocks.insert(block, host);
    }
    town.changed(Change::Network(OTHER));
}

#[test]
fn namespace_with_two_networks_searches_them_in_the_order_of_its_interfaces() {
    let mut town = Town::new();
    add_red(&mut town);
    town.place = |id| {
        let interface = if id == EndpointId([1; 5]) { "eth1" } else { "eth0" };
        Some(Place { namespace: if id.0[0] < 3 { 1 } else { 0 }, interface: interface.to_owned() })
    };
    let red = |n, name, address| Endpoint { network: OTHER, ..named(n, name, address) };
    town.write(1, vec![named(1, "blue-1", "10.9.0.9/24"), red(2, "red-1", "10.9.0.10/24")], vec![]);
    town.write(2, vec![named(4, "web", "10.9.0.17/24"), red(5, "web", "10.9.0.18/24")], vec![]);
    town.refresh();
    let client = Client::Endpoint(ip("10.9.0.9"));
    assert_eq!(town.addresses(client, "web"), BTreeSet::from([ip("10.9.0.18")]), "eth0 is on red");
    assert_eq!(town.addresses(client, "web.blue"), BTreeSet::from([ip("10.9.0.17")]));

    // Endpoints whose namespaces are unknown do not share one.
    town.write(1, vec![named(6, "six", "10.9.0.11/24"), red(7, "seven", "10.9.0.12/24")], vec![]);
    town.place = |_| Some(Place { namespace: 0, interface: "eth0".to_owned() });
    town.changed(Change::Rights(NET));
    town.refresh();
    let six = Client::Endpoint(ip("10.9.0.11"));
    assert_eq!(town.addresses(six, "web"), BTreeSet::from([ip("10.9.0.17")]));
    assert!(town.addresses(six, "seven").is_empty());
}

#[test]
fn network_goes_with_its_names() {
    let mut town = Town::new();
    add_red(&mut town);
    town.write(2, vec![Endpoint { network: OTHER, ..named(1, "web", "10.9.0.17/24") }], vec![]);
    town.refresh();
    assert_eq!(town.host("web.red.ovl.internal"), ["10.9.0.17"]);
    town.world.view.networks.remove(&OTHER);
    town.changed(Change::Network(OTHER));
    town.refresh();
    assert!(town.host("web.red.ovl.internal").is_empty());
    assert_eq!(town.names.zone().networks(), 1);
}

#[test]
fn endpoints_of_a_dead_host_keep_their_names_only_while_they_count() {
    let mut town = Town::new();
    town.write(2, vec![named(1, "web", "10.9.0.17/24")], vec![]);
    town.refresh();
    // Another host takes over the block: the address is no longer this endpoint's.
    for holder in town.world.view.alloc.blocks.values_mut().filter(|holder| **holder == id(2)) {
        *holder = id(3);
    }
    town.changed(Change::Rights(NET));
    town.refresh();
    assert!(town.host("web.blue.ovl.internal").is_empty());
    assert!(town.reverse("10.9.0.17").is_empty());
}

#[test]
fn services_have_names_and_pods_of_this_host_need_the_resolver_then() {
    let mut town = Town::new();
    town.write(1, vec![named(1, "own", "10.9.0.9/24")], vec![]);
    town.refresh();
    assert!(!town.leads_to_the_resolver(), "there is no Service");

    town.world.put(read(
        Kind::Service,
        json!({
            "metadata": { "name": "db", "namespace": "default" },
            "spec": { "clusterIPs": ["10.96.0.7"], "ports": [{ "name": "pg", "port": 5432 }] },
        }),
    ));
    let settled = town.world.settle();
    town.changed(Change::Backends(&settled));
    assert!(!town.leads_to_the_resolver());
    assert!(town.refresh().is_some());
    assert!(town.leads_to_the_resolver());
    assert_eq!(town.host("db.default.svc.cluster.local"), ["10.96.0.7"]);
    assert_eq!(town.reverse("10.96.0.7"), ["db.default.svc.cluster.local"]);
    let above = town.names.zone().find(Client::Host, &name("default.svc.cluster.local"));
    assert!(matches!(above, Resolution::Found(_, records) if records.above));

    town.world.drop(Kind::Service, "db");
    town.refresh();
    assert!(town.host("db.default.svc.cluster.local").is_empty());
    assert!(town.reverse("10.96.0.7").is_empty());
    let above = town.names.zone().find(Client::Host, &name("default.svc.cluster.local"));
    assert!(matches!(above, Resolution::NotFound), "no Service is left in the namespace");
}

#[test]
fn pods_have_names_by_their_addresses() {
    let mut town = Town::new();
    town.write(2, vec![named(1, "web", "10.9.0.17/24")], vec![]);
    town.refresh();
    let pod = format!("10-9-0-17.default.pod.{DOMAIN}");
    assert_eq!(town.host(&pod), ["10.9.0.17"]);
    town.write(2, vec![], vec![EndpointId([1; 5])]);
    town.refresh();
    assert!(town.host(&pod).is_empty());
}

#[test]
fn the_name_of_a_pod_is_that_of_its_last_endpoint() {
    let mut town = Town::new();
    let of_pod = |n: u8, name: &str, address: &str, uid: &str, created| Endpoint {
        pod: Some(Box::new(pod_identity("db-0", uid, created))),
        ..named(n, name, address)
    };
    town.write(1, vec![of_pod(1, "db-0", "10.9.0.9/24", "old", 5)], vec![]);
    town.refresh();
    assert_eq!(town.host("db-0.blue.ovl.internal"), ["10.9.0.9"]);
    town.write(2, vec![of_pod(2, "db-0-1f", "10.9.0.17/24", "new", 6)], vec![]);
    town.refresh();
    assert_eq!(town.host("db-0.blue.ovl.internal"), ["10.9.0.17"]);
    assert_eq!(town.host("db-0-1f.blue.ovl.internal"), ["10.9.0.17"]);
    // Kubernetes knows no name of the network, so the address has none.
    assert!(town.reverse("10.9.0.17").is_empty() && town.reverse("10.9.0.9").is_empty());
    // Which one is meant follows the uid of the v1 Pod.
    for (uid, expected) in [("old", "10.9.0.9"), ("new", "10.9.0.17"), ("other", "10.9.0.17")] {
        let metadata = json!({ "name": "db-0", "namespace": "default", "uid": uid });
        let pod = read(Kind::Pod, json!({ "metadata": metadata }));
        let key = pod.key();
        town.world.put(pod);
        town.changed(Change::Resources(&[key]));
        town.refresh();
        assert_eq!(town.host("db-0.blue.ovl.internal"), [expected], "{uid}");
    }
    town.write(2, vec![], vec![EndpointId([2; 5])]);
    town.refresh();
    assert_eq!(town.host("db-0.blue.ovl.internal"), ["10.9.0.9"]);
    assert!(town.reverse("10.9.0.9").is_empty());
}

/// Section 2.4.3 of the specification of Kubernetes' DNS, for whoever asks.
#[test]
fn an_address_behind_a_headless_service_has_the_name_that_it_gives() {
    let mut town = Town::new();
    town.write(1, vec![named(1, "own", "10.9.0.9/24")], vec![]);
    let labelled = |pod| Endpoint {
        pod,
        labels: [("app".to_owned(), "db".to_owned())].into(),
        ..named(2, "db-0", "10.9.0.17/24")
    };
    let service = json!({ "metadata": { "name": "db", "namespace": "default" },
        "spec": { "clusterIPs": ["None"], "selector": { "app": "db" } } });
    town.world.put(read(Kind::Service, service));
    let of_runtime = Some(Box::new(pod_identity("db-0", "uid", 5)));
    for pod in [None, of_runtime] {
        town.write(2, vec![labelled(pod)], vec![]);
        town.refresh();
        for client in [Client::Host, Client::Endpoint(ip("10.9.0.9"))] {
            let zone = town.names.zone();
            let Resolution::Found(_, records) = zone.find(client, &Name::reverse_of(ip("10.9.0.17"))) else {
                panic!("{client:?}")
            };
            let names: Vec<String> = records.names.iter().map(|kept| kept.name().to_string()).collect();
            assert_eq!(names, ["10-9-0-17.db.default.svc.cluster.local"], "{client:?}");
        }
    }
}

#[test]
fn answers_are_explained() {
    let mut town = Town::new();
    town.write(2, vec![named(1, "web", "10.9.0.17/24")], vec![]);
    town.refresh();
    let explain = |text| town.names.explain(&town.world.view, Client::Host, &name(text));
    assert_eq!(explain("web.blue.ovl.internal"), "on network blue: web on h2");
    assert_eq!(explain("svc.cluster.local"), "of the cluster, under cluster.local");
    assert!(explain("no.blue.ovl.internal").starts_with("only ovl would know"));
    assert!(explain("example.org").starts_with("not under ovl.internal"));
}

/// Everything that a zone answers to the host and to each client, for names that the property test uses.
fn answers(names: &Names) -> BTreeMap<String, String> {
    let zone = names.zone();
    let clients = (8..32).map(|n| Client::Endpoint(IpAddr::from([10, 9, 0, n])));
    let mut all = BTreeMap::new();
    for client in clients.chain([Client::Host]) {
        let reverse = (8..32).map(|n| Name::reverse_of(IpAddr::from([10, 9, 0, n])));
        let forward = ["a", "b", "c"].into_iter().flat_map(|label| {
            [format!("{label}.blue.ovl.internal"), label.to_owned(), format!("{label}.blue")]
        });
        let pods = (8..32).map(|n| format!("10-9-0-{n}.default.pod.{DOMAIN}"));
        let forward = forward.chain(pods).map(|text| name(&text));
        for name in forward.chain(reverse) {
            all.insert(format!("{client:?} {name}"), format!("{:?}", zone.find(client, &name)));
        }
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// After any changes, the zone is what it would be if all names were looked up from the beginning.
    #[test]
    fn refresh_leaves_what_a_new_zone_has(
        steps in proptest::collection::vec(
            (1u8..=3, 1u8..6, 0u8..4, 0u8..8, any::<bool>(), proptest::option::of(0u64..3)),
            1..24,
        )
    ) {
        let mut town = Town::new();
        for (host, n, label, at, refresh, created) in steps {
            match ["a", "b", "c"].get(usize::from(label)) {
                Some(label) => {
                    let address = format!("10.9.0.{}/24", 8 * host + at);
                    // No host has an address twice.
                    let table = &town.world.view.nodes[&id(host)].table;
                    let has = |other: &Endpoint| other.addresses.iter().any(|net| net.to_string() == address);
                    if table.endpoints().any(|other| other.id != EndpointId([10 * host + n; 5]) && has(other)) {
                        continue;
                    }
                    // Each host has its own ids.
                    let pod = created.map(|created| Box::new(pod_identity("c", "", created)));
                    town.write(host, vec![Endpoint { pod, ..named(10 * host + n, label, &address) }], vec![]);
                }
                None => town.write(host, vec![], vec![EndpointId([10 * host + n; 5])]),
            }
            if refresh {
                town.refresh();
            }
        }
        town.refresh();
        let mut fresh = Names::new("ovl.internal", DOMAIN, true, Vec::new(), false);
        let quick = answers(&town.names);
        let World { view, backends } = &town.world;
        // Pods are known by their changes alone, so the new zone hears of them as the first settling does.
        let mut again = ovl_cluster::backends::Backends::default();
        view.networks.keys().for_each(|network| again.touch_network(view, *network));
        let settled = again.settle(view);
        let local = Local::default();
        fresh.changed(&Change::Backends(&settled), &Cluster { view, backends, local: &local, caught_up: true });
        fresh.refresh_all(Sources { view, backends, place: &alone });
        prop_assert_eq!(quick, answers(&fresh));
    }
}

#[test]
fn name_with_dots_at_its_end_is_the_name_without_them() {
    let mut town = Town::new();
    town.write(2, vec![named(1, "web", "10.9.0.17/24")], vec![]);
    // A host of an earlier release accepted such names.
    let aliases = vec!["web.".to_owned(), "WEB..".to_owned(), "a..b".to_owned()];
    town.write(3, vec![Endpoint { aliases, ..named(2, "other.", "10.9.0.25/24") }], vec![]);
    town.refresh();
    assert_eq!(town.host("web.blue.ovl.internal"), ["10.9.0.17", "10.9.0.25"]);
    assert_eq!(town.host("other.blue.ovl.internal"), ["10.9.0.25"]);
    assert_eq!(town.reverse("10.9.0.25"), ["other"]);
    town.write(3, vec![], vec![EndpointId([2; 5])]);
    town.refresh();
    assert_eq!(town.host("web.blue.ovl.internal"), ["10.9.0.17"]);
    assert!(town.host("other.blue.ovl.internal").is_empty());
}

#[test]
fn alias_does_not_take_the_name_of_an_address() {
    let mut town = Town::new();
    town.write(2, vec![named(1, "web", "10.9.0.17/24")], vec![]);
    town.refresh();
    let aliases = vec!["17.0.9.10.in-addr.arpa".to_owned()];
    town.write(3, vec![Endpoint { aliases, ..named(2, "other", "10.9.0.25/24") }], vec![]);
    town.refresh();
    assert_eq!(town.reverse("10.9.0.17"), ["web"]);
    town.write(3, vec![], vec![EndpointId([2; 5])]);
    town.refresh();
    assert_eq!(town.reverse("10.9.0.17"), ["web"]);
}

#[test]
fn endpoint_that_is_called_like_a_full_name_does_not_take_its_place_and_is_reported() {
    let mut town = Town::new();
    add_red(&mut town);
    // Both are in one namespace, which searches red first.
    town.place = |id| {
        let interface = if id == EndpointId([1; 5]) { "eth1" } else { "eth0" };
        Some(Place { namespace: 7, interface: interface.to_owned() })
    };
    let red = |n, name, address| Endpoint { network: OTHER, ..named(n, name, address) };
    town.write(1, vec![named(1, "own", "10.9.0.9/24"), red(2, "web.blue", "10.9.0.10/24")], vec![]);
    town.refresh();
    let client = Client::Endpoint(ip("10.9.0.9"));
    assert_eq!(town.addresses(client, "web.blue"), BTreeSet::from([ip("10.9.0.10")]));
    assert!(ambiguous(&town.world.view).is_empty());

    town.write(2, vec![named(3, "WEB", "10.9.0.17/24")], vec![]);
    town.refresh();
    assert_eq!(town.addresses(client, "web.blue"), BTreeSet::from([ip("10.9.0.17")]));
    assert_eq!(town.addresses(client, "web.blue.red"), BTreeSet::from([ip("10.9.0.10")]));
    let found = ambiguous(&town.world.view);
    let Ambiguous { called, qualified } = &found["web.blue"];
    assert_eq!((called.endpoint.as_str(), called.network.as_str()), ("web.blue", "red"));
    assert_eq!((qualified.endpoint.as_str(), qualified.network.as_str()), ("WEB", "blue"));

    // The host of the other endpoint reports it too; a third one does not.
    town.world.view.me = id(2);
    assert_eq!(ambiguous(&town.world.view), found);
    town.world.view.me = id(3);
    assert!(ambiguous(&town.world.view).is_empty());
}

#[test]
fn alias_of_an_endpoint_like_its_own_full_name_has_one_meaning() {
    let mut town = Town::new();
    let aliases = vec!["web.blue".to_owned()];
    town.write(1, vec![Endpoint { aliases, ..named(1, "web", "10.9.0.9/24") }], vec![]);
    assert!(ambiguous(&town.world.view).is_empty());
}
