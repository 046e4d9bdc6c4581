//! Tests of the tables and elements of Services.

use std::collections::BTreeMap;

use ovl_dataplane::nft::{Element, Elements, Set, Skeleton, Table};
use ovl_dataplane::op::{NftOp, Op, SysctlOp};
use ovl_proto::object::Mode;
use ovl_proto::record::PeerState;
use ovl_proto::resource::{Kind, Name};
use ovl_subsystems::services::{Client, Services, Translated, translate};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::sync::Arc;

use super::host::ranges;
use super::world::NET;
use super::world::{World, read};

/// A host that plans Services, and the tables and elements that it has sent.
struct Host {
    world: World,
    services: Services,
    tables: BTreeMap<Table, Arc<Skeleton>>,
    elements: Elements,
}

impl Host {
    fn new() -> Self {
        Self {
            world: World::new(),
            services: Services::new(ranges()),
            tables: BTreeMap::new(),
            elements: Elements::default(),
        }
    }

    fn service(&mut self, name: &str, spec: Value) {
        let manifest = json!({ "metadata": { "name": name, "namespace": "default" }, "spec": spec });
        self.world.put(read(Kind::Service, manifest));
    }

    /// Plans, applies the operations and returns them as text.
    fn plan(&mut self, context: bool) -> Vec<String> {
        let settled = self.world.settle();
        let World { view, backends } = &self.world;
        let ops = self.services.plan(view, backends, settled.services.iter(), context);
        let shown = ops.iter().map(Op::to_string).collect();
        for op in ops {
            match op {
                Op::Nft(NftOp::SetTable(table, skeleton)) => drop(self.tables.insert(table, skeleton)),
                Op::Nft(NftOp::DeleteTable(table)) => {
                    self.tables.remove(&table);
                    self.elements.forget(table);
                }
                Op::Nft(NftOp::DeleteElement(set, key)) => {
                    self.elements.remove(&set, &key).unwrap_or_else(|| panic!("not there: {key:?}"));
                }
                Op::Nft(NftOp::SetElement(Element { set, key, value })) => {
                    assert!(self.tables.contains_key(&set.table), "no table for {set:?}");
                    assert_eq!(self.elements.insert(&set, key, value), None, "there already");
                }
                Op::Sysctl(SysctlOp::Set { .. }) => {}
                other => panic!("{other}"),
            }
        }
        shown
    }

    fn assert_sent(&self) {
        let wanted = self.services.dataplane();
        assert_eq!((&self.tables, &self.elements), (&wanted.tables, &wanted.elements));
    }

    fn ended(&mut self) -> Vec<String> {
        self.services.ended().iter().map(Op::to_string).collect()
    }

    /// Returns all elements of a set.
    fn of(&self, name: &str) -> Vec<String> {
        let of = |set: &Set| set.table == Table::Services && set.name == name;
        let set = self.elements.sets().filter(|(set, _)| of(set));
        let shown = set.flat_map(|(set, contents)| {
            contents.iter().map(|(key, value)| {
                Element { set: set.clone(), key: key.clone(), value: value.clone() }.to_string()
            })
        });
        let mut shown: Vec<String> = shown.collect();
        shown.sort_unstable();
        shown
    }
}

const WEB: &[(&str, &str)] = &[("app", "web")];

fn web(more: Value) -> Value {
    let mut spec = json!({
        "selector": { "app": "web" },
        "clusterIPs": ["10.96.0.10"],
        "ipFamilies": ["IPv4"],
        "ports": [{ "port": 80, "targetPort": 8080 }],
    });
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    spec
}

#[test]
fn a_service_chooses_its_backends_with_equal_probability() {
    let mut host = Host::new();
    host.world.attach(1, 1, WEB, true);
    host.world.attach(2, 2, WEB, true);
    host.world.attach(2, 3, WEB, false);
    host.service("web", web(json!({})));
    host.plan(false);
    host.assert_sent();
    assert_eq!(host.of("inside4"), ["10.96.0.10 . tcp . 80 : 0:2"]);
    assert_eq!(
        host.of("backends4"),
        [
            "10.96.0.10 . tcp . 80 . 0:0 : 10.9.0.9 . 8080",
            "10.96.0.10 . tcp . 80 . 0:1 : 10.9.0.18 . 8080",
            "10.96.0.10 . tcp . 80 . 1:0 : 10.9.0.9 . 8080"
        ]
    );
    // On a switched network, clients that are no endpoints reach only the backends of this host.
    assert_eq!(host.of("outside4"), ["10.96.0.10 . tcp . 80 : 1:1"]);
    assert_eq!(host.of("hairpin4"), ["10.9.0.9 . 10.9.0.9"]);
    // Frames that are diverted to the host's IP stack.
    let diverted: Vec<String> = host
        .elements
        .sets()
        .filter(|(set, _)| set.table == Table::Divert)
        .map(|(s, _)| s.name.to_string())
        .collect();
    assert_eq!(diverted, ["backends4", "gateways4", "local", "macs4"]);
    // On a routed network, all clients reach all backends.
    host.world.view.networks.get_mut(&NET).unwrap().network.mode = Mode::L3;
    host.plan(true);
    host.assert_sent();
    assert_eq!(host.of("outside4"), [""; 0]);
    assert!(!host.tables.contains_key(&Table::Divert));
    host.world.drop(Kind::Service, "web");
    assert_eq!(host.plan(false), ["nft delete table inet ovl-services"]);
    host.assert_sent();
}

#[test]
fn lookup_finds_what_the_chains_of_the_table_do() {
    let mut host = Host::new();
    host.world.view.networks.get_mut(&NET).unwrap().network.mode = Mode::L3;
    let spec = json!({
        "type": "NodePort",
        "externalIPs": ["192.0.2.7"],
        "externalTrafficPolicy": "Local",
        "ports": [{ "port": 80, "targetPort": 8080, "nodePort": 30080 }],
    });
    host.service("web", web(spec));
    host.service("sticky", web(json!({ "clusterIPs": ["10.96.0.11"], "sessionAffinity": "ClientIP" })));
    host.plan(true);
    let ip = |text: &str| text.parse::<std::net::IpAddr>().unwrap();
    let look = |host: &Host, client, to: &str, port, own| {
        translate(&host.elements, client, ip("203.0.113.9"), (ip(to), 6, port), own)
    };
    let outside = Client::Remote(ip("198.51.100.1"));
    assert_eq!(look(&host, Client::Endpoint, "10.96.0.10", 80, false), Some(Translated::Refused));
    assert_eq!(look(&host, Client::Endpoint, "10.96.0.10", 81, false), None);
    host.world.attach(2, 2, WEB, true);
    host.plan(false);
    let to = |all: &[&str]| Some(Translated::To(all.iter().map(|each| (ip(each), 8080)).collect()));
    for at in ["10.96.0.10", "10.96.0.11", "192.0.2.7"] {
        assert_eq!(look(&host, Client::Endpoint, at, 80, false), to(&["10.9.0.18"]), "{at}");
    }
    assert_eq!(look(&host, outside, "192.0.2.7", 80, false), Some(Translated::Dropped));
    assert_eq!(look(&host, Client::Host, "192.0.2.7", 80, false), to(&["10.9.0.18"]));
    // A node port is at the addresses of the host alone, and what comes from the host reaches all backends.
    assert_eq!(look(&host, outside, "198.51.100.9", 30080, true), Some(Translated::Dropped));
    assert_eq!(look(&host, Client::Host, "198.51.100.9", 30080, true), to(&["10.9.0.18"]));
    assert_eq!(look(&host, outside, "198.51.100.9", 30080, false), None);
    host.world.attach(1, 1, WEB, true);
    host.plan(false);
    assert_eq!(look(&host, outside, "192.0.2.7", 80, false), to(&["10.9.0.9"]));
    let Some(Translated::To(mut all)) = look(&host, Client::Endpoint, "10.96.0.11", 80, false) else {
        panic!()
    };
    all.sort_unstable();
    assert_eq!(Some(Translated::To(all)), to(&["10.9.0.9", "10.9.0.18"]));
}

#[test]
fn a_backend_costs_a_few_elements_and_the_others_keep_their_numbers() {
    let mut host = Host::new();
    for n in 1..=5 {
        host.world.attach(1, n, WEB, true);
    }
    host.world.view.networks.get_mut(&NET).unwrap().network.mode = Mode::L3;
    host.service("web", web(json!({})));
    host.plan(true);
    host.world.detach(1, 2);
    assert_eq!(
        host.plan(false),
        [
            "nft delete element inet ovl-services backends4 '{ 10.96.0.10 . tcp . 80 . 0:1 }'",
            "nft delete element inet ovl-services backends4 '{ 10.96.0.10 . tcp . 80 . 0:4 }'",
            "nft delete element inet ovl-services hairpin4 '{ 10.9.0.10 . 10.9.0.10 }'",
            "nft delete element inet ovl-services inside4 '{ 10.96.0.10 . tcp . 80 }'",
            "nft add element inet ovl-services backends4 '{ 10.96.0.10 . tcp . 80 . 0:1 : 10.9.0.13 . 8080 }'",
            "nft add element inet ovl-services inside4 '{ 10.96.0.10 . tcp . 80 : 0:4 }'"
        ]
    );
    host.assert_sent();
    host.world.attach(1, 6, WEB, true);
    let ops = host.plan(false);
    assert_eq!(ops.len(), 4, "{ops:#?}");
    host.assert_sent();
    // With more backends than there are chains for, the skeleton grows.
    let endpoints: Vec<Value> =
        (1..=20).map(|n| json!({ "addresses": [format!("203.0.113.{n}")] })).collect();
    host.world.put(read(
        Kind::EndpointSlice,
        json!({
            "metadata": { "name": "s", "namespace": "default", "labels": { "kubernetes.io/service-name": "web" } },
            "addressType": "IPv4", "endpoints": endpoints, "ports": [{ "name": "", "port": 8080 }],
        }),
    ));
    assert_eq!(host.plan(false)[0], "nft -f - # table inet ovl-services");
    host.assert_sent();
}

#[test]
fn the_backends_follow_from_the_traffic_policies() {
    let one = |element: &str| vec![element.to_owned()];
    let mut host = Host::new();
    host.world.view.networks.get_mut(&NET).unwrap().network.mode = Mode::L3;
    let both = json!({
        "type": "NodePort",
        "externalIPs": ["192.0.2.7"],
        "externalTrafficPolicy": "Local",
        "internalTrafficPolicy": "Local",
        "ports": [{ "port": 80, "targetPort": 8080, "nodePort": 30080 }],
    });
    host.service("web", web(both));
    host.plan(true);
    // Without backends, connections are refused.
    assert_eq!(host.of("inside4"), ["10.96.0.10 . tcp . 80 : 10:0", "192.0.2.7 . tcp . 80 : 10:0"]);
    assert_eq!((host.of("outside4"), host.of("ports4")), (vec![], vec!["tcp . 30080 : 10:0".to_owned()]));
    // With a backend on a remote host only, connections from outside are dropped here.
    host.world.attach(2, 2, WEB, true);
    host.plan(false);
    assert_eq!(host.of("inside4"), ["10.96.0.10 . tcp . 80 : 10:0", "192.0.2.7 . tcp . 80 : 0:1"]);
    assert_eq!(host.of("outside4"), ["192.0.2.7 . tcp . 80 : 20:0"]);
    assert_eq!(host.of("ports4"), ["tcp . 30080 : 20:0"]);
    // What comes from this host reaches it.
    assert_eq!(
        (host.of("own4"), host.of("own_ports4")),
        (one("192.0.2.7 . tcp . 80 : 0:1"), one("tcp . 30080 : 3:1"))
    );
    assert_eq!(host.of("nodes4"), ["tcp . 30080 . 1:0 : 10.9.0.18 . 8080"]);
    // With a local backend too.
    host.world.attach(1, 1, WEB, true);
    host.plan(false);
    assert_eq!(host.of("inside4"), ["10.96.0.10 . tcp . 80 : 0:1", "192.0.2.7 . tcp . 80 : 0:2"]);
    assert_eq!(host.of("outside4"), ["192.0.2.7 . tcp . 80 : 1:1"]);
    assert_eq!(host.of("ports4"), ["tcp . 30080 : 2:1"]);
    assert_eq!(
        (host.of("own4"), host.of("own_ports4")),
        (one("192.0.2.7 . tcp . 80 : 0:2"), one("tcp . 30080 : 3:2"))
    );
    assert_eq!(host.of("nodes4").len(), 3);
    assert!(host.of("nodes4").contains(&"tcp . 30080 . 0:0 : 10.9.0.9 . 8080".to_owned()));
    host.assert_sent();
    // Endpoints of a dead host are no backends.
    host.world.host(2, PeerState::Dead);
    host.plan(false);
    assert_eq!(host.of("inside4"), ["10.96.0.10 . tcp . 80 : 0:1", "192.0.2.7 . tcp . 80 : 0:1"]);
    host.assert_sent();
}

#[test]
fn clients_with_affinity_keep_the_identity_of_their_backend() {
    let mut host = Host::new();
    host.world.view.networks.get_mut(&NET).unwrap().network.mode = Mode::L3;
    host.service("web", web(json!({ "sessionAffinity": "ClientIP" })));
    for n in 1..=3 {
        host.world.attach(1, n, WEB, true);
    }
    host.plan(true);
    let before = host.of("stay4");
    assert_eq!((before.len(), host.of("ids4").len(), host.of("backends4").len()), (3, 3, 0));
    host.world.detach(1, 1);
    host.plan(false);
    let after = host.of("stay4");
    assert_eq!(after.len(), 2);
    assert!(after.iter().all(|element| before.contains(element)), "{before:?} {after:?}");
    host.assert_sent();
}

#[test]
fn udp_flows_end_with_their_backends() {
    let mut host = Host::new();
    host.world.view.networks.get_mut(&NET).unwrap().network.mode = Mode::L3;
    host.service(
        "dns",
        web(json!({ "ports": [
        { "name": "dns", "port": 53, "protocol": "UDP", "targetPort": 53 },
        { "name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": 53 },
    ] })),
    );
    host.plan(true);
    host.ended();
    let line = |n| {
        format!(
            "conntrack -D -f ipv4 -p udp --dst-nat --orig-dst 10.96.0.10 --orig-port-dst 53 # but for {n} backends"
        )
    };
    for (n, ended) in [(1, vec![line(1)]), (2, vec![])] {
        host.world.attach(1, n, WEB, true);
        host.plan(false);
        assert_eq!(host.ended(), ended, "flows from before the first backend went elsewhere");
    }
    for (n, left) in [(1, 1), (2, 0)] {
        host.world.detach(1, n);
        host.plan(false);
        assert_eq!(host.ended(), [line(left)]);
    }
}

#[test]
fn connections_from_outside_are_relayed_to_switched_endpoints_of_remote_hosts() {
    let mut host = Host::new();
    for (on, n) in [(1, 1), (2, 2), (2, 3)] {
        host.world.attach(on, n, WEB, true);
    }
    let ports = json!([{ "port": 80, "targetPort": 8080, "nodePort": 30080 }]);
    host.service("web", web(json!({ "type": "NodePort", "ports": ports })));
    let sent = host.plan(true);
    host.assert_sent();
    assert!(sent.contains(&"sysctl -w net.ipv4.ip_forward=1".to_owned()), "{sent:?}");
    // One element for each backend.
    let nodes = host.of("nodes4");
    let relayed = nodes.iter().filter(|line| line.ends_with(" : 192.168.77.2 . 30080")).count();
    assert_eq!((nodes.len(), relayed), (4, 2), "{nodes:?}");
    assert_eq!(host.of("ports4"), ["tcp . 30080 : 2:3"]);
    // Relayed connections go to local backends only.
    assert_eq!(host.of("relayed4"), ["tcp . 30080 : 3:1"]);
    assert!(nodes.contains(&"tcp . 30080 . 1:0 : 10.9.0.9 . 8080".to_owned()), "{nodes:?}");
    assert_eq!(host.of("hosts4"), ["192.168.77.2", "192.168.77.3"]);
    assert!(host.of("routed4").iter().any(|line| line.ends_with("192.168.77.1")), "{:?}", host.of("routed4"));
    // Connections to encrypted networks are not relayed unencrypted.
    host.world.view.networks.get_mut(&NET).unwrap().network.encrypted = true;
    host.plan(true);
    host.assert_sent();
    assert_eq!(host.of("nodes4"), ["tcp . 30080 . 0:0 : 10.9.0.9 . 8080"]);
    assert!(host.of("relayed4").is_empty());
}

#[test]
fn connections_to_backends_that_are_no_endpoints_are_masqueraded() {
    let mut host = Host::new();
    let ports = json!([{ "port": 80, "targetPort": 8080, "nodePort": 30080 }]);
    host.world.attach(1, 1, WEB, true);
    host.service("web", web(json!({ "type": "NodePort", "ports": ports })));
    host.world.view.networks.get_mut(&NET).unwrap().network.mode = Mode::L3;
    let sent = host.plan(true);
    assert!(host.of("elsewhere4").is_empty() && !sent.iter().any(|op| op.contains("ip_forward")), "{sent:?}");
    let slice = json!({
        "metadata": { "name": "web-1", "namespace": "default", "labels": { "kubernetes.io/service-name": "web" } },
        "addressType": "IPv4",
        "endpoints": [{ "addresses": ["192.0.2.9"] }, { "addresses": ["10.9.0.77"] }],
        "ports": [{ "port": 5432 }],
    });
    host.world.put(read(Kind::EndpointSlice, slice));
    let sent = host.plan(false);
    host.assert_sent();
    assert_eq!(host.of("elsewhere4"), ["192.0.2.9 . tcp . 5432"]);
    assert!(sent.contains(&"sysctl -w net.ipv4.ip_forward=1".to_owned()), "{sent:?}");
}

#[test]
fn services_of_other_proxies_are_not_translated() {
    let mut host = Host::new();
    host.world.attach(1, 1, WEB, true);
    host.service("other", web(json!({ "clusterIPs": ["10.96.0.20"] })));
    let labelled = |host: &mut Host, label: &str| {
        let manifest = json!({
            "metadata": { "name": "web", "namespace": "default", "labels": { label: "" } }, "spec": web(json!({})),
        });
        host.world.put(read(Kind::Service, manifest));
        host.plan(true);
        host.assert_sent();
        host.of("inside4").len()
    };
    assert_eq!(labelled(&mut host, "app"), 2);
    assert_eq!(labelled(&mut host, "service.kubernetes.io/service-proxy-name"), 1);
    assert_eq!(labelled(&mut host, "app"), 2);
    assert_eq!(labelled(&mut host, "service.kubernetes.io/headless"), 1);
}

#[derive(Debug, Clone)]
enum Step {
    Attach(u8, u8, bool),
    Detach(u8, u8),
    Host(u8, bool),
    Service(u8, u8),
    Drop(u8),
    Mode(bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (1u8..4, 1u8..6, any::<bool>()).prop_map(|(host, n, ready)| Step::Attach(host, n + 6 * host, ready)),
        (1u8..4, 1u8..6).prop_map(|(host, n)| Step::Detach(host, n + 6 * host)),
        (2u8..4, any::<bool>()).prop_map(|(host, alive)| Step::Host(host, alive)),
        (0u8..4, 0u8..8).prop_map(|(n, kind)| Step::Service(n, kind)),
        (0u8..4).prop_map(Step::Drop),
        any::<bool>().prop_map(Step::Mode),
    ]
}

fn spec(n: u8, kind: u8) -> Value {
    let mut spec = json!({
        "clusterIPs": [format!("10.96.0.{n}")],
        "type": if kind & 1 == 0 { "ClusterIP" } else { "NodePort" },
        "externalTrafficPolicy": if kind & 2 == 0 { "Cluster" } else { "Local" },
        "sessionAffinity": if kind & 4 == 0 { "None" } else { "ClientIP" },
        // An address that two Services claim.
        "externalIPs": ["192.0.2.7"],
    });
    if kind & 1 == 1 {
        let port = json!([{ "port": 80, "targetPort": 8080, "nodePort": 30000 + u16::from(n) }]);
        spec.as_object_mut().unwrap().insert("ports".to_owned(), port);
    }
    web(spec)
}

proptest! {
    #[test]
    fn plans_of_single_steps_lead_to_the_desired_elements(steps in proptest::collection::vec(step(), 1..30)) {
        let mut host = Host::new();
        for step in steps {
            let mut ground = false;
            match step {
                Step::Attach(on, n, ready) => host.world.attach(on, n, WEB, ready),
                Step::Detach(on, n) => host.world.detach(on, n),
                Step::Host(n, alive) => {
                    host.world.host(n, if alive { PeerState::Alive } else { PeerState::Dead });
                    ground = true;
                }
                Step::Service(n, kind) => host.service(&format!("s{n}"), spec(n, kind)),
                Step::Drop(n) => host.world.drop(Kind::Service, &format!("s{n}")),
                Step::Mode(routed) => {
                    let network = &mut host.world.view.networks.get_mut(&NET).unwrap().network;
                    network.mode = if routed { Mode::L3 } else { Mode::L2 };
                    ground = true;
                }
            }
            host.plan(ground);
            host.assert_sent();
        }
        // A plan from scratch gives the same number of backends everywhere.
        let mut anew = Services::new(ranges());
        let World { view, backends } = &host.world;
        let all: Vec<Name> = view.resources.services().keys().cloned().collect();
        anew.plan(view, backends, all.iter(), true);
        let counts = |elements: &Elements| -> Vec<(String, usize)> {
            let counted = elements.sets().filter(|(set, _)| set.table == Table::Services);
            counted.map(|(set, contents)| (set.name.to_string(), contents.len())).collect()
        };
        let local = |elements: &Elements| elements.of(&ovl_subsystems::services::inside(true)).cloned();
        prop_assert_eq!(counts(&anew.dataplane().elements), counts(&host.elements));
        prop_assert_eq!(local(&anew.dataplane().elements), local(&host.elements));
    }
}

#[test]
fn on_a_switched_network_the_host_is_relayed_past_the_policy_local() {
    let mut host = Host::new();
    host.world.attach(2, 2, WEB, true);
    let ports = json!([{ "port": 80, "targetPort": 8080, "nodePort": 30080 }]);
    host.service(
        "web",
        web(json!({ "type": "NodePort", "externalIPs": ["192.0.2.7"], "externalTrafficPolicy": "Local", "ports": ports })),
    );
    host.plan(true);
    host.assert_sent();
    // Endpoints reach the backend itself, the host the node port of the backend's host, and clients outside nothing.
    let has =
        |set: &str, element: &str| assert!(host.of(set).contains(&element.to_owned()), "{:?}", host.of(set));
    has("inside4", "192.0.2.7 . tcp . 80 : 0:1");
    has("outside4", "192.0.2.7 . tcp . 80 : 20:0");
    has("own4", "192.0.2.7 . tcp . 80 : 4:1");
    has("backends4", "192.0.2.7 . tcp . 80 . 2:0 : 192.168.77.2 . 30080");
    has("own_ports4", "tcp . 30080 : 3:1");
    has("nodes4", "tcp . 30080 . 1:0 : 192.168.77.2 . 30080");
    assert!(host.of("relayed4").is_empty());
}

#[test]
fn connection_tracking_is_liberal_while_there_are_services() {
    let mut host = Host::new();
    assert!(host.plan(true).is_empty());
    host.service("web", web(json!({})));
    let sent = host.plan(false);
    let at = |text: &str| sent.iter().position(|op| op.contains(text)).unwrap();
    assert!(at("table inet ovl-services") < at("sysctl -w net.netfilter.nf_conntrack_tcp_be_liberal=1"));
    assert_eq!(host.services.dataplane().sysctls.len(), 1);
    assert!(host.plan(false).is_empty());
}
