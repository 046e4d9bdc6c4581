//! Tests of the choice of Service addresses and ports.

use std::collections::BTreeSet;

use ovl_proto::alloc::AllocMap;
use ovl_proto::clock::Stamp;
use ovl_proto::id::NodeId;
use ovl_proto::resource::{Created, Kind, Resource, ResourceKey, Source, TrafficPolicy};
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn ranges() -> Ranges {
    Ranges {
        services: vec!["10.96.0.0/16".parse().unwrap(), "fd00:10:96::/112".parse().unwrap()],
        dns: ClusterDns::Own,
        follows_cidrs: false,
        load_balancers: vec!["192.0.2.0/29".parse().unwrap()],
        external: Vec::new(),
        node_ports: NodePortRange::default(),
    }
}

fn service_at(name: &str, made: u64, spec: Value) -> Service {
    let mut service: Service =
        serde_json::from_value(json!({ "metadata": { "name": name, "namespace": "default" }, "spec": spec }))
            .unwrap();
    service.metadata.creation_timestamp = Created(Stamp { wall_ms: made, ..Stamp::default() });
    service
}

fn service(name: &str, spec: Value) -> Service {
    service_at(name, 1, spec)
}

fn view(resources: &Resources) -> View {
    View {
        me: NodeId([1; 10]),
        nodes: BTreeMap::new(),
        networks: BTreeMap::new(),
        alloc: AllocMap::default(),
        resources: resources.clone(),
        elsewhere: BTreeSet::new(),
    }
}

fn allocate(resources: &Resources, service: &mut Service, ranges: &Ranges) -> Result<(), Vec<FieldProblem>> {
    ServiceAllocator::new(&view(resources), ranges, &mut ReservedClaims::default()).allocate(service)
}

fn allocated(resources: &Resources, mut service: Service) -> Service {
    allocate(resources, &mut service, &ranges()).unwrap();
    service
}

fn put(resources: &mut Resources, service: Service) -> Vec<String> {
    let changed = resources.insert(Resource::Service(Box::new(service)));
    changed.into_iter().map(|key| key.name.name).collect()
}

fn refused(resources: &Resources, mut service: Service) -> String {
    let problems = allocate(resources, &mut service, &ranges()).unwrap_err();
    problems.iter().map(|it| format!("{} {}", it.field, it.reason)).collect::<Vec<_>>().join("; ")
}

fn one(kind: &str) -> Value {
    json!({ "type": kind, "ports": [{ "port": 80 }] })
}

#[test]
fn service_cidrs_are_ranges_if_they_are_followed() {
    let mut resources = Resources::default();
    // The second one is within a range that is configured, the third one is too wide.
    for (name, cidr) in [("a", "10.97.0.0/24"), ("b", "10.96.4.0/24"), ("wide", "128.0.0.0/1")] {
        let manifest = json!({ "metadata": { "name": name }, "spec": { "cidrs": [cidr] } });
        resources.insert(Resource::ServiceCidr(serde_json::from_value(manifest).unwrap()));
    }
    let follows = Ranges { follows_cidrs: true, ..ranges() };
    let texts = |ranges: &Ranges| -> BTreeSet<String> {
        ranges.of_services(&view(&resources)).iter().map(IpNet::to_string).collect()
    };
    let configured = BTreeSet::from(["10.96.0.0/16".to_owned(), "fd00:10:96::/112".to_owned()]);
    assert_eq!(texts(&ranges()), configured);
    assert_eq!(texts(&follows), &configured | &BTreeSet::from(["10.97.0.0/24".to_owned()]));
    // Chosen by hand only: others may not follow them.
    let web = |spec| service("web", spec);
    let given =
        web(json!({ "clusterIP": "10.97.0.9", "clusterIPs": ["10.97.0.9"], "ports": [{ "port": 80 }] }));
    assert!(allocate(&resources, &mut given.clone(), &ranges()).is_err());
    allocate(&resources, &mut given.clone(), &follows).unwrap();
    let mut chosen = web(one("ClusterIP"));
    allocate(&resources, &mut chosen, &follows).unwrap();
    assert!(
        chosen
            .cluster_addresses()
            .all(|address| ranges().services.iter().any(|range| range.contains(&address)))
    );
}

#[test]
fn node_ports_are_of_the_configured_range() {
    let none = Resources::default();
    let ranges = Ranges { node_ports: "20000-20031".parse().unwrap(), ..ranges() };
    let ported = |port| {
        let mut service =
            service("web", json!({ "type": "NodePort", "ports": [{ "port": 80, "nodePort": port }] }));
        let allocated = allocate(&none, &mut service, &ranges);
        allocated.map(|()| service.spec.ports[0].node_port).map_err(|problems| problems[0].reason.clone())
    };
    assert_eq!(ported(json!(20_031)), Ok(Some(20_031)));
    // Ports at the start of the range are left to those who ask for them.
    assert!(matches!(ported(json!(null)), Ok(Some(20_016..=20_031))));
    assert_eq!(ported(json!(30_000)), Err("30000 is not in the node_port_range 20000-20031".to_owned()));
    assert!(ported(json!(22)).is_err());
    // A port of an earlier range is replaced.
    let mut before = Resources::default();
    put(&mut before, allocated(&none, service("web", one("NodePort"))));
    let mut again = service("web", one("NodePort"));
    allocate(&before, &mut again, &ranges).unwrap();
    assert!(ranges.node_ports.contains(again.spec.ports[0].node_port.unwrap()));
}

#[test]
fn a_load_balancer_of_another_program_has_the_addresses_that_it_gave() {
    let given = |class: Option<&str>, address: &str| {
        let mut service = service("web", one("LoadBalancer"));
        service.spec.load_balancer_class = class.map(str::to_owned);
        let ingress = LoadBalancerIngress { ip: address.parse().unwrap() };
        service.status.load_balancer.ingress = vec![ingress];
        service
    };
    let addresses = |service: &Service| -> Vec<String> {
        service.load_balancer_addresses().map(|address| address.to_string()).collect()
    };
    let mut resources = Resources::default();
    let other = allocated(&resources, given(Some("metallb.io/l2"), "203.0.113.7"));
    assert_eq!(addresses(&other), ["203.0.113.7"]);
    put(&mut resources, other);
    // It follows the program, also if that takes it away.
    assert_eq!(
        addresses(&allocated(&resources, given(Some("metallb.io/l2"), "203.0.113.8"))),
        ["203.0.113.8"]
    );
    let mut none = given(Some("metallb.io/l2"), "203.0.113.7");
    none.status.load_balancer.ingress.clear();
    let none = allocated(&resources, none);
    assert_eq!(addresses(&none), [""; 0]);
    assert!(
        families_waited_for(&none, &ranges()).is_empty() && waiting(&resources, &ranges()).next().is_none()
    );
    // What is in the status of a Service of this cluster's own pool was another cluster's.
    for class in [None, Some(ovl_proto::resource::LOAD_BALANCER_CLASS)] {
        let own = allocated(&Resources::default(), given(class, "203.0.113.7"));
        assert!(addresses(&own)[0].starts_with("192.0.2."), "{class:?}");
    }
    // Without a pool, whatever has an address got it from another program.
    let mut bare = given(None, "203.0.113.7");
    allocate(&Resources::default(), &mut bare, &Ranges { load_balancers: Vec::new(), ..ranges() }).unwrap();
    assert_eq!(addresses(&bare), ["203.0.113.7"]);
}

#[test]
fn a_range_of_node_ports_is_read_strictly() {
    let range = |text: &str| text.parse::<NodePortRange>().map(|range| range.to_string()).ok();
    assert_eq!(range("20000-20031").as_deref(), Some("20000-20031"));
    assert_eq!(range("80-80").as_deref(), Some("80-80"));
    for wrong in ["", "20000", "0-10", "10-9", "1-70000", "a-b", "-", "1-2-3"] {
        assert_eq!(range(wrong), None, "{wrong}");
    }
    // As with the API server: min(max(16, size / 32), 128), and none of a small range.
    for (text, first) in [("30000-32767", 30_086), ("100-115", 100), ("100-116", 116), ("1-65535", 129)] {
        assert_eq!(text.parse::<NodePortRange>().unwrap().first_automatic(), first, "{text}");
    }
}

#[test]
fn a_service_gets_the_addresses_and_ports_of_its_type() {
    let none = Resources::default();
    let plain = allocated(&none, service("web", one("ClusterIP")));
    assert_eq!(plain.spec.cluster_ips.len(), 1);
    assert_eq!(plain.spec.ip_families, [IpFamily::IPv4]);
    assert_eq!(plain.spec.ip_family_policy, Some(IpFamilyPolicy::SingleStack));
    assert_eq!(plain.spec.ports[0].node_port, None);
    // Every host chooses the same.
    assert_eq!(allocated(&none, service("web", one("ClusterIP"))), plain);
    assert_ne!(allocated(&none, service("other", one("ClusterIP"))).spec.cluster_ips, plain.spec.cluster_ips);

    let node = allocated(&none, service("web", one("NodePort")));
    assert!(ranges().node_ports.contains(node.spec.ports[0].node_port.unwrap()));
    let balanced = allocated(&none, service("web", one("LoadBalancer")));
    assert_eq!(balanced.status.load_balancer.ingress.len(), 1);
    assert!(balanced.spec.ports[0].node_port.is_some() && balanced.spec.health_check_node_port.is_none());
    let local = allocated(
        &none,
        service(
            "web",
            json!({ "type": "LoadBalancer", "externalTrafficPolicy": "Local",
            "allocateLoadBalancerNodePorts": false, "ports": [{ "port": 80 }] }),
        ),
    );
    assert_eq!(local.spec.external_traffic_policy, TrafficPolicy::Local);
    assert!(local.spec.health_check_node_port.is_some() && local.spec.ports[0].node_port.is_none());
    let external = allocated(&none, service("web", json!({ "type": "ExternalName", "externalName": "a.b" })));
    assert!(external.spec.cluster_ips.is_empty() && external.spec.ip_families.is_empty());
}

#[test]
fn families_follow_the_policy_and_the_given_addresses() {
    use IpFamily::{IPv4, IPv6};
    for (spec, families, addresses) in [
        (json!({}), vec![IPv4], 1),
        (json!({ "ipFamilyPolicy": "PreferDualStack" }), vec![IPv4, IPv6], 2),
        (json!({ "ipFamilyPolicy": "RequireDualStack" }), vec![IPv4, IPv6], 2),
        (json!({ "ipFamilies": ["IPv6"] }), vec![IPv6], 1),
        (json!({ "ipFamilies": ["IPv6", "IPv4"] }), vec![IPv6, IPv4], 2),
        (json!({ "ipFamilies": ["IPv6"], "ipFamilyPolicy": "PreferDualStack" }), vec![IPv6, IPv4], 2),
        (json!({ "clusterIP": "fd00:10:96::7", "clusterIPs": ["fd00:10:96::7"] }), vec![IPv6], 1),
        (json!({ "clusterIP": "None", "clusterIPs": ["None"], "selector": { "a": "b" } }), vec![IPv4], 0),
        // Without a selector, the families of its endpoints are unknown.
        (json!({ "clusterIP": "None", "clusterIPs": ["None"] }), vec![IPv4, IPv6], 0),
    ] {
        let mut spec = spec;
        spec["ports"] = json!([{ "port": 80 }]);
        let found = allocated(&Resources::default(), service("web", spec.clone()));
        assert_eq!(found.spec.ip_families, families, "{spec}");
        assert_eq!(found.cluster_addresses().count(), addresses, "{spec}");
        let of: Vec<IpFamily> = found.cluster_addresses().map(IpFamily::of).collect();
        assert!(of.iter().eq(families.iter().take(addresses)), "{spec}");
        assert_eq!(found.spec.cluster_ip, found.spec.cluster_ips.first().copied());
    }
    let v4 = Ranges {
        services: vec!["10.96.0.0/16".parse().unwrap()],
        load_balancers: Vec::new(),
        external: Vec::new(),
        ..Ranges::default()
    };
    let try_v4 = |spec| {
        let mut service = service("web", spec);
        allocate(&Resources::default(), &mut service, &v4).map(|()| service)
    };
    let prefer = try_v4(json!({ "ipFamilyPolicy": "PreferDualStack", "ports": [{ "port": 80 }] })).unwrap();
    assert_eq!(prefer.spec.ip_families, [IPv4]);
    let require = try_v4(json!({ "ipFamilyPolicy": "RequireDualStack", "ports": [{ "port": 80 }] }));
    assert_eq!(require.unwrap_err()[0].field, "spec.ipFamilyPolicy");
    assert_eq!(try_v4(json!({ "ipFamilies": ["IPv6"] })).unwrap_err()[0].field, "spec.ipFamilies[0]");
    // Without a pool, a LoadBalancer gets no address.
    assert!(try_v4(one("LoadBalancer")).unwrap().status.load_balancer.ingress.is_empty());
}

#[test]
fn a_service_of_an_api_server_may_have_an_address_of_the_cluster_dns_and_another_one() {
    let spec = json!({ "clusterIPs": ["10.96.0.10", "fd00:10:96::7"], "ipFamilyPolicy": "PreferDualStack" });
    let mut mirrored = service("kube-dns", spec);
    mirrored.metadata.source = Some(Box::new(Source { cluster: "c".to_owned(), version: 1 }));
    let addresses: Vec<String> = allocated(&Resources::default(), mirrored)
        .cluster_addresses()
        .map(|address| address.to_string())
        .collect();
    assert_eq!(addresses, ["10.96.0.10", "fd00:10:96::7"]);
}

#[test]
fn given_values_must_be_free_and_in_range() {
    let mut resources = Resources::default();
    let first = allocated(&resources, service("first", one("LoadBalancer")));
    let (ip, port) = (first.cluster_addresses().next().unwrap(), first.spec.ports[0].node_port.unwrap());
    let balanced = first.status.load_balancer.ingress[0].ip;
    put(&mut resources, first.clone());
    let given = |spec| refused(&resources, service("second", spec));
    for (spec, says) in [
        (json!({ "clusterIP": ip, "clusterIPs": [ip] }), format!("{ip} is in use by Service default/first")),
        (
            json!({ "clusterIPs": ["10.97.0.1"] }),
            "10.97.0.1 is not in the service_range 10.96.0.0/16".to_owned(),
        ),
        (json!({ "clusterIPs": ["10.96.0.10"] }), "10.96.0.10 is reserved for the cluster DNS".to_owned()),
        (
            json!({ "type": "NodePort", "ports": [{ "port": 1, "nodePort": port }] }),
            format!("node port {port} is in use by Service default/first"),
        ),
        (
            json!({ "type": "LoadBalancer", "loadBalancerIP": balanced, "ports": [{ "port": 80 }] }),
            format!("{balanced} port 80/TCP is in use by Service default/first"),
        ),
        (
            json!({ "type": "LoadBalancer", "loadBalancerIP": "198.51.100.1" }),
            "is not in the load_balancer_pool".to_owned(),
        ),
        (
            json!({ "type": "LoadBalancer", "loadBalancerIP": "fd00::1" }),
            "is not of an address family in spec.ipFamilies".to_owned(),
        ),
        (
            json!({ "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": port }),
            format!("node port {port} is in use by Service"),
        ),
        (
            json!({ "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 30_007, "ports": [{ "port": 1, "nodePort": 30_007 }] }),
            "is a nodePort of the same Service".to_owned(),
        ),
    ] {
        let found = given(spec.clone());
        assert!(found.contains(&says), "{spec}: {found}");
    }
    // A Service may keep its own values.
    assert_eq!(allocated(&resources, first.clone()), first);
}

#[test]
fn a_change_keeps_what_was_allocated() {
    let mut resources = Resources::default();
    let first = allocated(
        &resources,
        service(
            "web",
            json!({ "type": "LoadBalancer", "ports": [
        { "name": "a", "port": 80 }, { "name": "b", "port": 81 },
    ] }),
        ),
    );
    put(&mut resources, first.clone());
    let changed = allocated(
        &resources,
        service(
            "web",
            json!({ "type": "LoadBalancer", "ports": [
        { "name": "b", "port": 82 }, { "name": "c", "port": 80 }, { "name": "d", "port": 90 },
    ] }),
        ),
    );
    assert_eq!(changed.spec.cluster_ips, first.spec.cluster_ips);
    assert_eq!(changed.status, first.status);
    let node_port = |service: &Service, n: usize| service.spec.ports[n].node_port;
    assert_eq!(node_port(&changed, 0), node_port(&first, 1));
    assert_eq!(node_port(&changed, 1), node_port(&first, 0));
    assert!(
        node_port(&changed, 2)
            .is_some_and(|port| ![node_port(&first, 0), node_port(&first, 1)].contains(&Some(port)))
    );
    // A change to ClusterIP releases the node ports and the pool's address.
    let plain = allocated(&resources, service("web", one("ClusterIP")));
    assert_eq!(plain.spec.cluster_ips, first.spec.cluster_ips);
    assert_eq!((node_port(&plain, 0), plain.status.load_balancer.ingress.len()), (None, 0));
    // To two families, and back to one.
    let dual = allocated(
        &resources,
        service("web", json!({ "ipFamilyPolicy": "PreferDualStack", "ports": [{ "port": 80 }] })),
    );
    assert_eq!((dual.spec.cluster_ips[0], dual.spec.cluster_ips.len()), (first.spec.cluster_ips[0], 2));
    put(&mut resources, dual);
    let single = allocated(
        &resources,
        service("web", json!({ "ipFamilyPolicy": "SingleStack", "ports": [{ "port": 80 }] })),
    );
    assert_eq!(single.spec.cluster_ips, first.spec.cluster_ips);
    let says = refused(
        &resources,
        service("web", json!({ "clusterIPs": ["10.96.0.77"], "ports": [{ "port": 80 }] })),
    );
    assert!(says.contains("cannot be changed"), "{says}");
}

#[test]
fn with_the_pool_used_up_a_service_waits_for_an_address() {
    let mut resources = Resources::default();
    let mut given = BTreeSet::new();
    for n in 0..6 {
        let found = allocated(&resources, service(&format!("s{n}"), one("LoadBalancer")));
        given.insert(found.status.load_balancer.ingress[0].ip);
        put(&mut resources, found);
    }
    assert_eq!(given.len(), 6);
    let late = allocated(&resources, service("late", one("LoadBalancer")));
    assert!(late.status.load_balancer.ingress.is_empty() && late.spec.cluster_ips.len() == 1);
    put(&mut resources, late.clone());
    let name = Name::new("default", "late");
    let ranges = ranges();
    let waits = |resources: &Resources, ranges: &Ranges| -> Vec<(Name, Vec<IpFamily>)> {
        waiting(resources, ranges).map(|(name, families)| (name.clone(), families)).collect()
    };
    assert_eq!(waits(&resources, &ranges), [(name.clone(), vec![IpFamily::IPv4])]);
    // Without a pool of the family, there is nothing to wait for.
    assert_eq!(waits(&resources, &Ranges { load_balancers: Vec::new(), ..ranges.clone() }), []);
    resources.remove(&ResourceKey { kind: Kind::Service, name: Name::new("default", "s3") });
    let found = allocated(&resources, late);
    assert_eq!(found.status.load_balancer.ingress.len(), 1);
    put(&mut resources, found);
    assert_eq!((waits(&resources, &ranges), resources.claims().lacking().count()), (vec![], 0));
}

#[test]
fn services_share_an_address_of_the_pool_at_different_ports() {
    let mut resources = Resources::default();
    let address = "192.0.2.3";
    let ports = |ports: &[(&str, u16)]| -> Value {
        let ports = ports.iter().enumerate();
        ports.map(|(n, (protocol, port))| json!({ "name": format!("p{n}"), "protocol": protocol, "port": port })).collect()
    };
    let asks = |all: &[(&str, u16)]| json!({ "type": "LoadBalancer", "loadBalancerIP": address, "ports": ports(all) });
    let has = |resources: &Resources, name: &str| {
        resources.services()[&Name::new("default", name)].load_balancer_addresses().next()
    };
    let shared: IpAddr = address.parse().unwrap();
    let of_pool = Some(shared);
    for (name, made, at) in [("tcp", 10, ("TCP", 53)), ("udp", 20, ("UDP", 53)), ("web", 30, ("TCP", 80))] {
        let found = allocated(&resources, service_at(name, made, asks(&[at])));
        put(&mut resources, found);
        assert_eq!(has(&resources, name), of_pool);
    }
    assert_eq!(resources.claims().lacking().count(), 0);
    // A port that another one has is refused, also as a further port of one that shares the address.
    let says = refused(&resources, service("other", asks(&[("UDP", 53)])));
    assert!(says.contains("192.0.2.3 port 53/UDP is in use by Service default/udp"), "{says}");
    let more = json!({ "type": "LoadBalancer", "ports": ports(&[("TCP", 53), ("UDP", 53)]) });
    let says = refused(&resources, service("tcp", more));
    assert!(says.contains("spec.ports 192.0.2.3 port 53/UDP is in use by Service default/udp"), "{says}");
    // None that asks for no address gets a shared one.
    let mut given = BTreeSet::new();
    for n in 0..5 {
        let found = allocated(&resources, service(&format!("s{n}"), one("LoadBalancer")));
        given.extend(found.load_balancer_addresses());
        put(&mut resources, found);
    }
    assert!(given.len() == 5 && !given.contains(&shared), "{given:?}");
    // Of two at one port, as after a partition, the older one keeps the address. The third one is not concerned.
    let mut late = service_at("late", 40, asks(&[("UDP", 53), ("TCP", 90)]));
    late.spec.ip_families = vec![IpFamily::IPv4];
    late.status.load_balancer.ingress = vec![LoadBalancerIngress { ip: shared }];
    put(&mut resources, late);
    assert_eq!(
        (has(&resources, "late"), has(&resources, "udp"), has(&resources, "web")),
        (None, of_pool, of_pool)
    );
    let changed = resources.remove(&ResourceKey { kind: Kind::Service, name: Name::new("default", "udp") });
    assert_eq!(has(&resources, "late"), of_pool);
    // All that share the address hear of the change: together they decide which host announces it.
    assert_eq!(changed.len(), 4, "{changed:?}");
}

#[test]
fn the_older_of_two_services_keeps_a_claim() {
    let mut resources = Resources::default();
    let same = json!({ "type": "NodePort", "clusterIP": "10.96.1.1", "clusterIPs": ["10.96.1.1"],
        "ports": [{ "port": 80, "nodePort": 30_100 }] });
    assert_eq!(put(&mut resources, service_at("young", 20, same.clone())), ["young"]);
    let name = |name: &str| Name::new("default", name);
    let has = |resources: &Resources, of: &str| {
        let service = &resources.services()[&name(of)];
        (service.cluster_addresses().count(), service.spec.ports[0].node_port)
    };
    assert_eq!(has(&resources, "young"), (1, Some(30_100)));
    // The older one arrives later, as after a partition.
    assert_eq!(put(&mut resources, service_at("old", 10, same.clone())), ["old", "young"]);
    assert_eq!(has(&resources, "old"), (1, Some(30_100)));
    assert_eq!(has(&resources, "young"), (0, None));
    assert_eq!(resources.claims().lacking().collect::<Vec<_>>(), [&name("young")]);
    // Allocation gives it other values.
    let mended = allocated(&resources, resources.services()[&name("young")].clone());
    let mut gone = resources.clone();
    put(&mut resources, mended);
    assert_eq!(resources.claims().lacking().count(), 0);
    assert_eq!(has(&resources, "young").0, 1);
    assert_ne!(has(&resources, "young").1, Some(30_100));
    // Or the older one is deleted first.
    let changed = gone.remove(&ResourceKey { kind: Kind::Service, name: name("old") });
    assert_eq!(changed.len(), 2);
    assert_eq!(has(&gone, "young"), (1, Some(30_100)));
    assert_eq!(gone.claims().lacking().count(), 0);
}

proptest! {
    #[test]
    fn no_two_services_hold_the_same_claim(
        steps in prop::collection::vec((0..5_u8, prop::option::of((0..4_u64, 1..4_u8, 0..3_u16)), any::<bool>()), 1..40),
    ) {
        let mut resources = Resources::default();
        for (n, claim, mend) in steps {
            let name = format!("s{n}");
            match claim {
                Some((made, ip, port)) => {
                    let ip = format!("10.96.1.{ip}");
                    put(&mut resources, service_at(&name, made, json!({
                        "type": "NodePort", "clusterIP": ip, "clusterIPs": [ip],
                        "ports": [{ "port": 80, "nodePort": 30_000 + port }],
                    })));
                }
                None => drop(resources.remove(&ResourceKey { kind: Kind::Service, name: Name::new("default", name) })),
            }
            if mend {
                let lacking: Vec<Name> = resources.claims().lacking().cloned().collect();
                for name in lacking {
                    let mended = allocated(&resources, resources.services()[&name].clone());
                    put(&mut resources, mended);
                }
                prop_assert_eq!(resources.claims().lacking().count(), 0);
            }
            let all: Vec<Claim> = resources.services().values().flat_map(claims_of).collect();
            prop_assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
            // The order of arrival does not matter.
            let mut fresh = Resources::default();
            for service in resources.services().values() {
                let raw = resources.claims().contested(&Name::new("default", &service.metadata.name));
                put(&mut fresh, raw.unwrap_or(service).clone());
            }
            prop_assert_eq!(&fresh, &resources);
        }
    }
}
