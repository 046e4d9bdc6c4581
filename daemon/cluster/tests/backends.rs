//! The backends of Services.
#![cfg(test)]

mod world;

use std::collections::BTreeSet;

use ovl_cluster::backends::{Backend, Backends, Position, Readiness, Settled, Target, targets, targets_for};
use ovl_cluster::selectables::SelectableId;
use ovl_cluster::view::View;
use ovl_proto::id::{EndpointId, NodeId};
use ovl_proto::record::PeerState;
use ovl_proto::resource::{Kind, Name, Resource, ResourceKey, Source};
use ovl_proto::table::{Endpoint, Entry};
use proptest::prelude::*;
use serde_json::{Value, json};

use self::world::{NET, WEB, World, give, id, pod_identity, read};

fn names(all: &[&str]) -> BTreeSet<Name> {
    all.iter().map(|name| Name::new("default", *name)).collect()
}

#[test]
fn endpoints_are_selected_by_their_labels() {
    let mut world = World::new();
    world.attach(1, 1, WEB, true);
    world.attach(2, 2, &[("app", "web"), ("tier", "front")], true);
    world.attach(3, 3, &[("app", "db")], true);
    world.service("web", json!({ "app": "web" }));
    world.service("front", json!({ "app": "web", "tier": "front" }));
    world.service("none", json!({}));
    world.settle();
    assert_eq!(world.names("web"), ["w1", "w2"]);
    assert_eq!(world.names("front"), ["w2"]);
    assert!(world.of("none").is_empty());
    let first = Target { address: "10.9.0.9".parse().unwrap(), port: 8080, host: Some(id(1)) };
    assert_eq!(targets(world.of("web"), 0, true, Some(id(1))), [first]);
    assert_eq!(targets(world.of("web"), 0, true, None).len(), 2);
    assert!(targets(world.of("web"), 0, false, None).is_empty());
    // The named port needs a Pod, and there is none.
    assert!(targets(world.of("web"), 1, true, None).is_empty());
}

#[test]
fn change_touches_only_the_services_that_select_it() {
    let mut world = World::new();
    for n in 0..100 {
        world.service(&format!("s{n}"), json!({ "app": format!("a{n}"), "part-of": "shop" }));
    }
    world.settle();
    world.attach(1, 1, &[("app", "a7"), ("part-of", "shop")], true);
    let settled = world.settle();
    assert_eq!(settled.services, names(&["s7"]));
    assert_eq!(settled.selectables.len(), 1);
    assert_eq!(settled.selectables[0].before, None);
    assert_eq!(world.settle(), Settled::default());
    world.detach(1, 1);
    let settled = world.settle();
    assert_eq!(settled.services, names(&["s7"]));
    assert_eq!(settled.selectables[0].id, SelectableId::Endpoint(id(1), EndpointId([1; 5])));
    assert_eq!(settled.selectables[0].after, None);
}

#[test]
fn pod_adds_labels_and_named_ports() {
    let mut world = World::new();
    world.service("web", json!({ "app": "web" }));
    world.attach(1, 1, &[], true);
    world.settle();
    assert!(world.of("web").is_empty());
    let pod = |port: u16| {
        read(
            Kind::Pod,
            json!({
                "metadata": { "name": "w1", "namespace": "default", "labels": { "app": "web" } },
                "spec": { "hostname": "one", "subdomain": "web", "containers": [
                    { "ports": [{ "name": "web", "containerPort": port }] },
                ] },
            }),
        )
    };
    world.put(pod(7000));
    assert_eq!(world.settle().services, names(&["web"]));
    assert_eq!(world.of("web")[0].ports, [Some(8080), Some(7000)]);
    assert_eq!(world.of("web")[0].hostname, "one");
    world.put(pod(7001));
    assert_eq!(world.settle().services, names(&["web"]));
    assert_eq!(world.of("web")[0].ports, [Some(8080), Some(7001)]);
    world.drop(Kind::Pod, "w1");
    world.settle();
    assert!(world.of("web").is_empty());
}

#[test]
fn pod_without_an_endpoint_is_a_backend_by_its_own_address() {
    let mut world = World::new();
    world.service("web", json!({ "app": "web" }));
    world.put(read(
        Kind::Pod,
        json!({
            "metadata": { "name": "w1", "namespace": "default", "labels": { "app": "web" } },
            "status": { "podIP": "192.0.2.9", "podIPs": [{ "ip": "192.0.2.9" }] },
        }),
    ));
    world.settle();
    assert_eq!(world.of("web")[0].addresses, ["192.0.2.9".parse::<std::net::IpAddr>().unwrap()]);
    assert_eq!(world.of("web")[0].host, None);
    // An endpoint of that name takes precedence.
    world.attach(2, 1, &[], true);
    world.settle();
    assert_eq!(world.of("web").len(), 1);
    assert_eq!(world.of("web")[0].host, Some(id(2)));
}

/// A pod of the Service `web`, with an address of its own and a status.
fn pod(name: &str, mut status: serde_json::Value) -> ovl_proto::resource::Resource {
    status["podIPs"] = json!([{ "ip": "192.0.2.9" }]);
    let metadata = json!({ "name": name, "namespace": "default", "labels": { "app": "web" } });
    read(Kind::Pod, json!({ "metadata": metadata, "status": status }))
}

#[test]
fn status_of_a_pod_decides_whether_it_is_a_backend() {
    let condition = |kind: &str, status: &str| json!([{ "type": kind, "status": status }]);
    let rows = [
        (json!({}), Some(Readiness::Ready)),
        (json!({ "phase": "Running" }), Some(Readiness::Ready)),
        (json!({ "phase": "Running", "conditions": condition("Ready", "True") }), Some(Readiness::Ready)),
        (json!({ "phase": "Running", "conditions": condition("Ready", "False") }), Some(Readiness::NotReady)),
        (json!({ "conditions": condition("Ready", "Unknown") }), Some(Readiness::NotReady)),
        (json!({ "phase": "Pending" }), Some(Readiness::NotReady)),
        (json!({ "phase": "Unknown" }), Some(Readiness::NotReady)),
        (json!({ "phase": "Failed", "conditions": condition("Ready", "True") }), None),
        (json!({ "phase": "Succeeded" }), None),
    ];
    for (status, expected) in rows {
        // A pod that is not an endpoint, and one that is.
        for attached in [false, true] {
            let mut world = World::new();
            world.service("web", json!({ "app": "web" }));
            if attached {
                world.attach(1, 1, WEB, true);
            }
            world.put(pod("w1", status.clone()));
            world.settle();
            let found: Vec<_> = world.of("web").iter().map(|backend| backend.readiness).collect();
            assert_eq!(found, Vec::from_iter(expected), "{status}, attached: {attached}");
            // Policies still isolate the endpoint.
            assert_eq!(
                world.backends.selectables().iter().count(),
                usize::from(attached || expected.is_some())
            );
        }
    }
}

#[test]
fn change_of_a_pods_status_reaches_its_services() {
    let mut world = World::new();
    world.service("web", json!({ "app": "web" }));
    world.attach(1, 1, WEB, true);
    world.attach(2, 2, WEB, false);
    world.settle();
    let ready = |world: &World| targets(world.of("web"), 0, true, None).len();
    let unready = json!({ "conditions": [{ "type": "Ready", "status": "False" }] });
    for (status, services, expected) in [
        (json!({}), false, 1),
        (unready.clone(), true, 0),
        (json!({ "phase": "Failed" }), true, 0),
        (unready, true, 0),
        (json!({ "phase": "Running" }), true, 1),
    ] {
        world.put(pod("w1", status.clone()));
        assert_eq!(world.settle().services.len(), usize::from(services), "{status}");
        assert_eq!(ready(&world), expected, "{status}");
    }
    // The endpoint's own mark counts as well.
    world.put(pod("w2", json!({ "phase": "Running" })));
    world.settle();
    assert_eq!(ready(&world), 1);
}

#[test]
fn unready_backends_are_targets_only_if_the_service_publishes_them() {
    let mut world = World::new();
    world.service("web", json!({ "app": "web" }));
    world.attach(1, 1, WEB, false);
    world.attach(2, 2, WEB, true);
    world.settle();
    assert_eq!(world.of("web").len(), 2);
    assert_eq!(targets(world.of("web"), 0, true, None).len(), 1);
    world.put(read(
        Kind::Service,
        json!({
            "metadata": { "name": "web", "namespace": "default" },
            "spec": { "selector": { "app": "web" }, "publishNotReadyAddresses": true, "ports": [{ "port": 80 }] },
        }),
    ));
    world.settle();
    assert_eq!(targets(world.of("web"), 0, true, None).len(), 2);
}

#[test]
fn endpoints_of_a_dead_host_are_no_backends() {
    let mut world = World::new();
    world.service("web", json!({ "app": "web" }));
    world.attach(1, 1, WEB, true);
    world.attach(2, 2, WEB, true);
    world.settle();
    world.host(2, PeerState::Suspect);
    assert_eq!(world.settle(), Settled::default());
    world.host(2, PeerState::Dead);
    assert_eq!(world.settle().services, names(&["web"]));
    assert_eq!(world.names("web"), ["w1"]);
    world.host(2, PeerState::Alive);
    world.settle();
    assert_eq!(world.names("web"), ["w1", "w2"]);
}

#[test]
fn slices_add_backends() {
    let mut world = World::new();
    world.service("web", json!({}));
    world.put(read(
        Kind::EndpointSlice,
        json!({
            "metadata": { "name": "web-1", "namespace": "default", "labels": { "kubernetes.io/service-name": "web" } },
            "addressType": "IPv4",
            "ports": [{ "name": "http", "port": 9000 }],
            "endpoints": [
                { "addresses": ["192.0.2.1"], "nodeName": "h2", "hostname": "one" },
                { "addresses": ["192.0.2.2"], "conditions": { "ready": false } },
                { "addresses": ["192.0.2.3"], "conditions": { "ready": false, "serving": true, "terminating": true } },
            ],
        }),
    ));
    world.settle();
    let readiness: Vec<_> = world.of("web").iter().map(|backend| backend.readiness).collect();
    assert_eq!(readiness, [Readiness::Ready, Readiness::NotReady, Readiness::Draining]);
    let last = |world: &World| {
        let found = targets(world.of("web"), 0, true, None);
        found.iter().map(|target| target.address.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(last(&world), ["192.0.2.1"]);
    assert_eq!(world.of("web")[0].ports, [Some(9000), None]);
    // When its host dies, only the draining backend remains.
    world.host(2, PeerState::Dead);
    assert_eq!(world.settle().services, names(&["web"]));
    assert_eq!(last(&world), ["192.0.2.3"]);
    world.drop(Kind::EndpointSlice, "web-1");
    world.settle();
    assert!(world.of("web").is_empty());
}

#[test]
fn slice_for_names_alone_gets_no_connections() {
    for label in ["service.kubernetes.io/headless", "service.kubernetes.io/service-proxy-name"] {
        let mut world = World::new();
        world.service("web", json!({}));
        for (name, more, address) in [("web-1", "a", "192.0.2.1"), ("web-2", label, "192.0.2.2")] {
            world.put(read(
                Kind::EndpointSlice,
                json!({
                    "metadata": { "name": name, "namespace": "default",
                        "labels": { "kubernetes.io/service-name": "web", more: "" } },
                    "addressType": "IPv4",
                    "ports": [{ "name": "http", "port": 9000 }],
                    "endpoints": [{ "addresses": [address] }],
                }),
            ));
        }
        world.settle();
        // DNS has both.
        assert_eq!(world.of("web").len(), 2);
        let found = targets(world.of("web"), 0, true, None);
        assert_eq!(found.iter().map(|it| it.address.to_string()).collect::<Vec<_>>(), ["192.0.2.1"]);
    }
}

/// As kube-proxy takes hints: for the host first, then for the zone, if all ready endpoints have some.
#[test]
fn hints_choose_the_backends_for_a_position() {
    let at = |n: u8, hints: serde_json::Value, ready: bool| {
        json!({ "addresses": [format!("192.0.2.{n}")], "hints": hints,
            "conditions": { "ready": ready, "serving": true, "terminating": !ready } })
    };
    let hints = |zones: &[&str], hosts: &[&str]| {
        let names = |all: &[&str]| all.iter().map(|name| json!({ "name": name })).collect::<Vec<_>>();
        json!({ "forZones": names(zones), "forNodes": names(hosts) })
    };
    let chosen = |endpoints: serde_json::Value, zone: &str, host: &str| {
        let mut world = World::new();
        world.service("web", json!({}));
        world.put(read(
            Kind::EndpointSlice,
            json!({
                "metadata": { "name": "web-1", "namespace": "default", "labels": { "kubernetes.io/service-name": "web" } },
                "addressType": "IPv4", "ports": [{ "name": "http", "port": 9000 }], "endpoints": endpoints,
            }),
        ));
        world.settle();
        let found = targets_for(world.of("web"), 0, true, Position { zone, host });
        found.iter().filter_map(|target| target.address.to_string().chars().last()).collect::<String>()
    };
    let zoned = json!([
        at(1, hints(&["a"], &[]), true),
        at(2, hints(&["b"], &[]), true),
        at(3, hints(&["a", "b"], &[]), true)
    ]);
    assert_eq!(chosen(zoned.clone(), "a", "h1"), "13");
    assert_eq!(chosen(zoned.clone(), "b", "h1"), "23");
    // No endpoint for the zone, and a host without one.
    assert_eq!(chosen(zoned.clone(), "c", "h1"), "123");
    assert_eq!(chosen(zoned, "", "h1"), "123");
    // One endpoint has no hints.
    let partly = json!([at(1, hints(&["a"], &[]), true), at(2, json!({}), true)]);
    assert_eq!(chosen(partly, "a", "h1"), "12");
    // An endpoint that is not ready does not count.
    let unready =
        json!([at(1, hints(&["a"], &[]), true), at(2, json!({}), false), at(3, hints(&["b"], &[]), true)]);
    assert_eq!(chosen(unready, "a", "h1"), "1");
    let hosts = json!([
        at(1, hints(&["a"], &["h1"]), true),
        at(2, hints(&["a"], &["h2"]), true),
        at(3, hints(&["b"], &["h3"]), true),
    ]);
    assert_eq!(chosen(hosts.clone(), "a", "h1"), "1");
    assert_eq!(chosen(hosts.clone(), "a", "h9"), "12");
    assert_eq!(chosen(hosts, "c", "h9"), "123");
    // Draining backends are chosen regardless of hints.
    let draining = json!([at(1, hints(&["a"], &[]), false), at(2, hints(&["b"], &[]), false)]);
    assert_eq!(chosen(draining, "a", "h1"), "12");
}

#[test]
fn traffic_distribution_prefers_selected_backends_that_are_near() {
    let mut world = World::new();
    for (host, zone) in [(1, "a"), (2, "a"), (3, "b")] {
        world.view.nodes.get_mut(&id(host)).unwrap().record.zone = zone.to_owned();
        world.attach(host, host, WEB, true);
    }
    let chosen = |world: &mut World, prefers: serde_json::Value, zone: &str, host: &str| {
        let ports = json!([{ "port": 80 }]);
        let spec = json!({ "selector": { "app": "web" }, "ports": ports, "trafficDistribution": prefers });
        world.put(read(
            Kind::Service,
            json!({ "metadata": { "name": "web", "namespace": "default" }, "spec": spec }),
        ));
        world.settle();
        let found = targets_for(world.of("web"), 0, true, Position { zone, host });
        found.iter().filter_map(|target| target.host).map(|host| host.0[0]).collect::<Vec<_>>()
    };
    assert_eq!(chosen(&mut world, json!(null), "a", "h1"), [1, 2, 3]);
    for close in ["PreferClose", "PreferSameZone"] {
        assert_eq!(chosen(&mut world, json!(close), "a", "h1"), [1, 2]);
        assert_eq!(chosen(&mut world, json!(close), "b", "h3"), [3]);
        assert_eq!(chosen(&mut world, json!(close), "c", "h4"), [1, 2, 3]);
    }
    assert_eq!(chosen(&mut world, json!("PreferSameNode"), "a", "h1"), [1]);
    world.detach(1, 1);
    assert_eq!(chosen(&mut world, json!("PreferSameNode"), "a", "h1"), [2]);
    // A host without a zone: its backends have no hints, so all hosts use all backends.
    world.view.nodes.get_mut(&id(3)).unwrap().record.zone.clear();
    let view = world.view.clone();
    world.backends.touch_host(&view, id(3));
    assert_eq!(chosen(&mut world, json!("PreferClose"), "a", "h1"), [2, 3]);
}

/// Returns the backends of the Service web: host, and whether it has the Pod's named port.
fn web_of(world: &mut World) -> Vec<(NodeId, bool)> {
    world.settle();
    world.of("web").iter().map(|backend| (backend.host.unwrap(), backend.ports[1].is_some())).collect()
}

fn pod_with_uid(uid: &str) -> Resource {
    read(
        Kind::Pod,
        json!({
            "metadata": { "name": "db-0", "namespace": "default", "labels": { "app": "web" }, "uid": uid },
            "spec": { "containers": [{ "ports": [{ "name": "web", "containerPort": 8080 }] }] },
        }),
    )
}

#[test]
fn of_the_endpoints_of_a_pod_the_last_one_is_meant() {
    let mut world = World::new();
    world.service("web", json!({ "app": "web" }));
    world.put(pod_with_uid(""));
    world.attach_pod(1, 1, pod_identity("db-0", "old", 5));
    assert_eq!(web_of(&mut world), [(id(1), true)]);
    // The pod comes again on another host, and the old sandbox is still there.
    world.attach_pod(2, 2, pod_identity("db-0", "new", 6));
    assert_eq!(web_of(&mut world), [(id(2), true)]);
    // Another interface of the same sandbox on the network.
    world.attach_pod(2, 3, pod_identity("db-0", "new", 6));
    assert_eq!(web_of(&mut world), [(id(2), true), (id(2), true)]);
    world.detach(2, 3);
    // One whose host is dead is not meant.
    world.host(2, PeerState::Dead);
    assert_eq!(web_of(&mut world), [(id(1), true)]);
    world.host(2, PeerState::Alive);
    world.detach(1, 1);
    assert_eq!(web_of(&mut world), [(id(2), true)]);
    // Endpoints of another namespace or without a pod are not concerned.
    world.attach(3, 4, WEB, true);
    assert_eq!(web_of(&mut world).len(), 2);
}

#[test]
fn of_the_endpoints_of_a_pod_that_with_the_uid_is_meant() {
    let mut world = World::new();
    world.service("web", json!({ "app": "web" }));
    world.put(pod_with_uid("old"));
    world.attach_pod(1, 1, pod_identity("db-0", "old", 5));
    world.attach_pod(2, 2, pod_identity("db-0", "new", 6));
    assert_eq!(web_of(&mut world), [(id(1), true)]);
    let new = world.view.nodes[&id(2)].table.endpoint(EndpointId([2; 5])).unwrap();
    assert_eq!(world.view.known_labels(id(2), new), None, "its Pod is not known yet");
    world.put(pod_with_uid("new"));
    assert_eq!(web_of(&mut world), [(id(2), true)]);
    // The old one is deleted, and the Pod of yet another uid has no endpoint.
    world.detach(1, 1);
    world.put(pod_with_uid("newer"));
    assert_eq!(web_of(&mut world), []);
    // A runtime that says no uid.
    world.attach_pod(3, 3, pod_identity("db-0", "", 4));
    assert_eq!(web_of(&mut world), [(id(3), true)]);
}

#[test]
fn a_pod_is_what_its_own_host_says_of_it() {
    let mut world = World::new();
    world.service("web", json!({ "app": "web" }));
    world.attach_pod(1, 1, pod_identity("db-0", "u", 5));
    assert_eq!(web_of(&mut world), []);
    let describe = |world: &mut World, labels: Value, status: &str| {
        let pod = read(
            Kind::Pod,
            json!({
                "metadata": { "name": "db-0", "namespace": "default", "labels": labels, "uid": "u" },
                "spec": { "containers": [{ "ports": [{ "name": "web", "containerPort": 8080 }] }] },
                "status": { "conditions": [{ "type": "Ready", "status": status }] },
            }),
        );
        let Resource::Pod(pod) = pod else { panic!() };
        let known = world.view.nodes[&id(1)].table.endpoint(EndpointId([1; 5])).unwrap().clone();
        let described = Endpoint { described: Some(Box::new(pod)), ..known };
        give(&mut world.view, 1, vec![Entry::Endpoint(described)]);
        world.backends.touch_endpoint(&world.view, id(1), EndpointId([1; 5]));
    };
    describe(&mut world, json!({ "app": "web" }), "True");
    assert_eq!(web_of(&mut world), [(id(1), true)]);
    assert_eq!(world.of("web")[0].readiness, Readiness::Ready);
    // A v1 Pod among the cluster's objects does not contradict it.
    world.put(read(
        Kind::Pod,
        json!({ "metadata": { "name": "db-0", "namespace": "default", "labels": { "app": "x" } } }),
    ));
    assert_eq!(web_of(&mut world), [(id(1), true)]);
    describe(&mut world, json!({ "app": "web" }), "False");
    world.settle();
    assert_eq!(world.of("web")[0].readiness, Readiness::NotReady);
    describe(&mut world, json!({ "app": "other" }), "True");
    assert_eq!(web_of(&mut world), []);
    // A later sandbox of the name is the pod now.
    describe(&mut world, json!({ "app": "web" }), "True");
    world.attach_pod(2, 2, pod_identity("db-0", "v", 6));
    assert_eq!(web_of(&mut world), []);
}

#[test]
fn of_a_mirrored_service_the_slices_count_and_not_the_selector() {
    let mut world = World::new();
    world.attach(1, 1, WEB, true);
    let service = |mirrored: bool| {
        let spec = json!({ "selector": { "app": "web" }, "ports": [{ "name": "http", "port": 80 }] });
        let metadata = json!({ "name": "web", "namespace": "default" });
        let mut service = read(Kind::Service, json!({ "metadata": metadata, "spec": spec }));
        let source = Source { cluster: "c".to_owned(), version: 1 };
        service.meta_mut().source = mirrored.then(|| Box::new(source));
        service
    };
    world.put(service(false));
    world.settle();
    assert_eq!(world.names("web"), ["w1"]);
    world.put(service(true));
    world.settle();
    assert!(world.of("web").is_empty());
    world.put(read(
        Kind::EndpointSlice,
        json!({
            "metadata": { "name": "s", "namespace": "default", "labels": { "kubernetes.io/service-name": "web" } },
            "addressType": "IPv4",
            "ports": [{ "name": "http", "port": 9000 }],
            "endpoints": [{ "addresses": ["192.0.2.1"] }],
        }),
    ));
    world.settle();
    assert_eq!(world.of("web")[0].ports, [Some(9000)]);
    // A changed endpoint does not wake it.
    world.attach(1, 2, WEB, true);
    assert!(!world.settle().services.contains(&Name::new("default", "web")));
    world.put(service(false));
    world.settle();
    assert_eq!(world.of("web").len(), 3);
}

/// One event of a random test.
#[derive(Debug, Clone)]
enum Step {
    Attach { host: u8, n: u8, app: u8, tier: u8, ready: bool },
    Detach { host: u8, n: u8 },
    Service { n: u8, app: Option<u8>, tier: Option<u8> },
    NoService(u8),
    Pod { n: u8, app: u8, uid: u8 },
    AttachPod { host: u8, n: u8, pod: u8, uid: u8, created: u64 },
    NoPod(u8),
    Slice { n: u8, service: u8, host: u8 },
    NoSlice(u8),
    Host { host: u8, alive: bool },
    Settle,
}

fn step() -> impl Strategy<Value = Step> {
    let host = || 1..=3_u8;
    prop_oneof![
        4 => (host(), 1..5_u8, 0..3_u8, 0..2_u8, any::<bool>())
            .prop_map(|(host, n, app, tier, ready)| Step::Attach { host, n, app, tier, ready }),
        2 => (host(), 1..5_u8).prop_map(|(host, n)| Step::Detach { host, n }),
        3 => (0..4_u8, prop::option::of(0..3_u8), prop::option::of(0..2_u8))
            .prop_map(|(n, app, tier)| Step::Service { n, app, tier }),
        1 => (0..4_u8).prop_map(Step::NoService),
        3 => (host(), 1..5_u8, 1..5_u8, 0..3_u8, 0..3_u64)
            .prop_map(|(host, n, pod, uid, created)| Step::AttachPod { host, n, pod, uid, created }),
        2 => (1..5_u8, 0..3_u8, 0..3_u8).prop_map(|(n, app, uid)| Step::Pod { n, app, uid }),
        1 => (1..5_u8).prop_map(Step::NoPod),
        1 => (0..2_u8, 0..4_u8, host()).prop_map(|(n, service, host)| Step::Slice { n, service, host }),
        1 => (0..2_u8).prop_map(Step::NoSlice),
        1 => (2..=3_u8, any::<bool>()).prop_map(|(host, alive)| Step::Host { host, alive }),
        3 => Just(Step::Settle),
    ]
}

/// A unique id, empty for 0.
fn uid_of(n: u8) -> String {
    if n == 0 { String::new() } else { format!("u{n}") }
}

fn perform(world: &mut World, step: Step) {
    match step {
        Step::Attach { host, n, app, tier, ready } => {
            let (app, tier) = (format!("a{app}"), format!("t{tier}"));
            world.attach(host, n, &[("app", &app), ("tier", &tier)], ready);
        }
        Step::AttachPod { host, n, pod, uid, created } => {
            world.attach_pod(host, n, pod_identity(&format!("w{pod}"), &uid_of(uid), created));
        }
        Step::Detach { host, n } => world.detach(host, n),
        Step::Service { n, app, tier } => {
            let app = app.map(|app| ("app", format!("a{app}")));
            let tier = tier.map(|tier| ("tier", format!("t{tier}")));
            let selector: std::collections::BTreeMap<_, _> = app.into_iter().chain(tier).collect();
            world.service(&format!("s{n}"), json!(selector));
        }
        Step::NoService(n) => world.drop(Kind::Service, &format!("s{n}")),
        Step::Pod { n, app, uid } => world.put(read(
            Kind::Pod,
            json!({
                "metadata": {
                    "name": format!("w{n}"),
                    "namespace": "default",
                    "uid": uid_of(uid),
                    "labels": { "app": format!("a{app}") },
                },
                "spec": { "containers": [{ "ports": [{ "name": "web", "containerPort": 7000 + u16::from(app) }] }] },
                "status": { "podIPs": [{ "ip": format!("192.0.2.{n}") }] },
            }),
        )),
        Step::NoPod(n) => world.drop(Kind::Pod, &format!("w{n}")),
        Step::Slice { n, service, host } => world.put(read(
            Kind::EndpointSlice,
            json!({
                "metadata": {
                    "name": format!("e{n}"),
                    "namespace": "default",
                    "labels": { "kubernetes.io/service-name": format!("s{service}") },
                },
                "addressType": "IPv4",
                "ports": [{ "name": "http", "port": 9000 }],
                "endpoints": [{ "addresses": ["192.0.2.99"], "nodeName": format!("h{host}") }],
            }),
        )),
        Step::NoSlice(n) => world.drop(Kind::EndpointSlice, &format!("e{n}")),
        Step::Host { host, alive } => {
            world.host(host, if alive { PeerState::Alive } else { PeerState::Dead });
        }
        Step::Settle => {}
    }
}

/// Computes the backends of a view from scratch.
fn from_scratch(view: &View) -> Backends {
    let mut backends = Backends::default();
    backends.touch_network(view, NET);
    for kind in Kind::ALL {
        for name in view.resources.names(kind) {
            backends.touch_resource(view, &ResourceKey { kind, name });
        }
    }
    backends.settle(view);
    backends
}

proptest! {
    #[test]
    fn incremental_updates_equal_a_full_computation(steps in prop::collection::vec(step(), 1..60)) {
        let mut world = World::new();
        let all: Vec<Name> = (0..4).map(|n| Name::new("default", format!("s{n}"))).collect();
        for step in steps {
            let settle = matches!(step, Step::Settle);
            perform(&mut world, step);
            if !settle {
                continue;
            }
            let before: Vec<Vec<Backend>> = all.iter().map(|name| world.backends.of(name).to_vec()).collect();
            let settled = world.settle();
            let fresh = from_scratch(&world.view);
            for (name, before) in all.iter().zip(before) {
                let now = world.backends.of(name);
                prop_assert_eq!(now, fresh.of(name), "{}", name);
                prop_assert!(settled.services.contains(name) || now == before, "{} changed without a report", name);
            }
            let selectables = |backends: &Backends| {
                backends.selectables().iter().map(|(id, selectable)| (id.clone(), selectable.clone())).collect::<Vec<_>>()
            };
            prop_assert_eq!(selectables(&world.backends), selectables(&fresh));
            let hosts: BTreeSet<Option<NodeId>> = world.backends.selectables().iter().map(|(_, m)| m.host).collect();
            for dead in world.view.nodes.values().filter(|node| node.state == PeerState::Dead) {
                prop_assert!(!hosts.contains(&Some(dead.record.id)));
            }
        }
    }
}
