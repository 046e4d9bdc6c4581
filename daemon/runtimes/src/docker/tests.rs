use std::collections::BTreeMap;

use ovl_proto::clock::Stamp;
use ovl_proto::id::{Mac, NetworkId};
use ovl_proto::object::{Backend, Driver, Encrypt, Mode, Network};
use ovl_proto::publish::Publish;
use ovl_proto::wire::fields::Unknown;
use serde_json::{Value, json};

use super::*;
use ovl_cluster::addresses;
use ovl_cluster::view::NetworkState;

/// Every call of two real Engines: the command that was run, then the path and the body of each call. Only ovl's own
/// words differ from the recordings: the name of its address space, and an option.
const TRACES: [(&str, &str); 2] = [
    ("20.10", include_str!("../../tests/traces/docker-20.10.jsonl")),
    ("28", include_str!("../../tests/traces/docker-28.jsonl")),
];

/// Returns the calls, each with the command that was run before.
fn calls(trace: &'static str) -> Vec<(String, String, Value)> {
    let mut scenario = String::new();
    let mut calls = Vec::new();
    for line in trace.lines() {
        let line: Value = serde_json::from_str(line).unwrap();
        match line["scenario"].as_str() {
            Some(text) => text.clone_into(&mut scenario),
            None => {
                let path = line["path"].as_str().unwrap().trim_start_matches('/').to_owned();
                calls.push((scenario.clone(), path, line["request"].clone()));
            }
        }
    }
    calls
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn networks(all: &[(&str, &[&str])]) -> BTreeMap<NetworkId, NetworkState> {
    let network = |(n, (name, subnets)): (u8, &(&str, &[&str]))| {
        let network = Network {
            id: NetworkId([n; 5]),
            name: (*name).to_owned(),
            created: Stamp::default(),
            driver: Driver::Overlay,
            mode: Mode::L2,
            vni: 4096 + u32::from(n),
            subnets: subnets.iter().map(|subnet| addresses::new_subnet(net(subnet)).unwrap()).collect(),
            mtu: None,
            encrypted: false,
            auto_encrypt: false,
            internal: false,
            backend: Backend::Vxlan,
            names: true,
            on_demand: false,
            external_names: false,
            unknown: Unknown::default(),
        };
        (network.id, NetworkState { network, removing: false })
    };
    (1..).zip(all).map(network).collect()
}

const BLUE: NetworkId = NetworkId([1; 5]);

fn blue() -> BTreeMap<NetworkId, NetworkState> {
    networks(&[("blue", &["10.77.0.0/16", "fd00:77::/64"]), ("red", &["10.78.0.0/24"])])
}

fn wish(options: Value, v4: &str) -> NetworkWish {
    let body = json!({
        "NetworkID": "0123456789abcdef",
        "Options": { "com.docker.network.generic": options, "com.docker.network.enable_ipv6": false },
        "IPv4Data": [{ "AddressSpace": "ovl", "Gateway": "", "Pool": v4 }],
        "IPv6Data": [],
    });
    match parse("NetworkDriver.CreateNetwork", &body) {
        Ok(Call::CreateNetwork(wish)) => *wish,
        other => panic!("{other:?}"),
    }
}

fn plan(options: Value, v4: &str) -> Result<Plan, String> {
    plan_network(&wish(options, v4), &blue(), |_| false)
}

#[test]
fn every_recorded_call_is_parsed_or_rejected_with_a_reason() {
    for (version, trace) in TRACES {
        let calls = calls(trace);
        assert!(calls.len() > 100, "{version}: {} calls", calls.len());
        for (scenario, method, body) in calls {
            let refused = match parse(&method, &body) {
                Ok(_) => continue,
                Err(why) => why,
            };
            // The two options that a plugin with cluster-wide addresses does not support.
            let expected = match method.as_str() {
                "NetworkDriver.CreateNetwork" | "NetworkDriver.CreateEndpoint"
                    if scenario.contains("docker-ipam") =>
                {
                    ["--ipam-driver ovl", "MAC address"]
                }
                "IpamDriver.RequestPool" => ["--ip-range", "--ipam-opt"],
                "IpamDriver.RequestAddress" => ["--aux-address", "no pool"],
                _ => panic!("{version}, {scenario}: {method} {body}: {refused}"),
            };
            assert!(
                expected.iter().any(|part| refused.contains(part)),
                "{version}, {scenario}: {method} {body}: {refused}"
            );
        }
    }
}

#[test]
fn calls_of_a_container_are_the_same_from_both_engines() {
    for (version, trace) in TRACES {
        let run: Vec<Call> = calls(trace)
            .into_iter()
            .filter(|(scenario, ..)| scenario.contains("-p 8082:80"))
            .map(|(_, method, body)| parse(&method, &body).unwrap())
            .collect();
        let [Call::RequestAddress(address), Call::CreateEndpoint(endpoint), rest @ ..] = &run[..] else {
            panic!("{version}: {run:?}")
        };
        let pool: Pool = "10.77.0.0/16".parse().unwrap();
        assert_eq!(*address, AddressWish::Endpoint(pool, None), "{version}");
        assert_eq!(endpoint.addresses, ["10.77.0.5".parse::<IpAddr>().unwrap()], "{version}");
        assert_eq!(endpoint.name, endpoint.id.endpoint[..12], "{version}");
        assert!(endpoint.mac.is_unicast(), "{version}");
        let [Call::Join(joined), Call::Publish(published, ports), Call::Describe(_), ..] = rest else {
            panic!("{version}: {rest:?}")
        };
        assert_eq!((joined, published), (&endpoint.id, &endpoint.id), "{version}");
        let expected: Publish = "8082:80".parse().unwrap();
        assert_eq!(ports, &[expected], "{version}");
    }
}

#[test]
fn requested_addresses_and_macs_are_parsed() {
    for (version, trace) in TRACES {
        let wanted: Vec<Call> = calls(trace)
            .into_iter()
            .filter(|(scenario, method, _)| {
                scenario.contains("--ip 10.77.0.200") && !method.starts_with("NetworkDriver.E")
            })
            .map(|(_, method, body)| parse(&method, &body).unwrap())
            .collect();
        let ip: IpAddr = "10.77.0.200".parse().unwrap();
        let Some(Call::RequestAddress(AddressWish::Endpoint(_, Some(address)))) = wanted.first() else {
            panic!("{version}: {wanted:?}")
        };
        assert_eq!(*address, ip, "{version}");
        let Some(Call::CreateEndpoint(endpoint)) = wanted.get(1) else { panic!("{version}: {wanted:?}") };
        assert_eq!(endpoint.mac, Mac([0x02, 0xaa, 0xbb, 0xcc, 0xdd, 0xee]), "{version}");
    }
}

#[test]
fn dual_stack_internal_network_is_parsed() {
    for (version, trace) in TRACES {
        let made = calls(trace).into_iter().find_map(|(scenario, method, body)| {
            (scenario.contains("--internal") && method == "NetworkDriver.CreateNetwork").then_some(body)
        });
        let Ok(Call::CreateNetwork(wish)) = parse("NetworkDriver.CreateNetwork", &made.unwrap()) else {
            panic!("{version}")
        };
        assert!(wish.internal, "{version}");
        assert_eq!(wish.prefixes, [net("10.77.0.0/16"), net("fd00:77::/64")], "{version}");
    }
}

#[test]
fn options_of_networks_are_parsed() {
    let wish = wish(
        json!({ "ovl.network": "blue", "encrypted": "", "ovl.mode": "l3", "ovl.vni": "42", "ovl.backend": "auto",
                "com.docker.network.driver.mtu": "1400", "com.docker.network.bridge.name": "br0" }),
        "10.1.0.0/16",
    );
    assert_eq!(wish.name.as_deref(), Some("blue"));
    assert_eq!((wish.encrypt, wish.mode, wish.vni), (Some(Encrypt::Yes), Some(Mode::L3), Some(42)));
    assert_eq!((wish.mtu, wish.backend), (Some(1400), Some(Backend::Auto)));
    for (key, value) in [
        ("ovl.netwrok", "blue"),
        ("ovl.mode", "l4"),
        ("ovl.vni", "x"),
        ("encrypted", "maybe"),
        ("parent", "eth0"),
    ] {
        let body = json!({
            "NetworkID": "ab", "Options": { "com.docker.network.generic": { key: value } },
            "IPv4Data": [{ "AddressSpace": "ovl", "Pool": "10.1.0.0/16" }],
        });
        let error = parse("NetworkDriver.CreateNetwork", &body).unwrap_err();
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn options_of_dockers_drivers_are_carried_out_harmless_or_refused() {
    let with = |key: &str, value: Value| {
        let body = json!({
            "NetworkID": "ab", "Options": { "com.docker.network.generic": { key: value } },
            "IPv4Data": [{ "AddressSpace": "ovl", "Pool": "10.1.0.0/16" }],
        });
        parse("NetworkDriver.CreateNetwork", &body)
    };
    for (option, taken, refused) in [
        ("bridge.name", &["br0"][..], &[][..]),
        ("bridge.enable_icc", &["true", "1", "T"], &["false", "0", "False", "no"]),
        ("bridge.enable_ip_masquerade", &["true"], &["false"]),
        ("bridge.inhibit_ipv4", &["false"], &["true"]),
        ("bridge.host_binding_ipv4", &["", "0.0.0.0"], &["127.0.0.1", "192.0.2.1"]),
        ("bridge.host_binding_ipv6", &["", "::"], &["::1"]),
        ("bridge.gateway_mode_ipv4", &["", "nat"], &["routed", "nat-unprotected", "isolated"]),
        ("bridge.gateway_mode_ipv6", &["nat"], &["routed"]),
        ("bridge.trusted_host_interfaces", &[""], &["eth0:eth1"]),
        ("bridge.some_new_shield", &[], &["true"]),
        ("driver.overlay.vxlanid_list", &["4097"], &["4097,4098", "x"]),
        ("driver.overlay.some_new_shield", &[], &["true"]),
        ("host_ipv4", &[""], &["192.0.2.1"]),
        ("container_iface_prefix", &["net"], &[]),
        ("some_new_shield", &[], &["true"]),
    ] {
        let key = format!("com.docker.network.{option}");
        for value in taken {
            assert!(with(&key, json!(value)).is_ok(), "{key}={value}: {:?}", with(&key, json!(value)));
        }
        for value in refused {
            let error = with(&key, json!(value)).unwrap_err();
            assert!(error.contains(&format!("-o {key}={value}")), "{error}");
        }
    }
    // A value that is no text, as another client of the plugin may send it.
    assert!(with("com.docker.network.bridge.enable_icc", json!(false)).is_err());
    let Ok(Call::CreateNetwork(wish)) = with("com.docker.network.driver.overlay.vxlanid_list", json!("4097"))
    else {
        panic!()
    };
    assert_eq!(wish.vni, Some(4097));
}

#[test]
fn options_of_endpoints_are_parsed() {
    let endpoint = |options: Value| {
        let mut all = json!({ "com.docker.network.portmap": [] });
        all.as_object_mut().unwrap().extend(options.as_object().unwrap().clone());
        let body = json!({
            "NetworkID": "ab", "EndpointID": "cd", "Options": all,
            "Interface": { "Address": "10.1.0.2/16", "AddressIPv6": "fd00::2/64", "MacAddress": "02:00:00:00:00:01" },
        });
        parse("NetworkDriver.CreateEndpoint", &body)
    };
    let Ok(Call::CreateEndpoint(named)) = endpoint(
        json!({ "ovl.name": "web", "ovl.alias": "a,b", "ovl.namespace": "shop", "ovl.label.app.tier": "front" }),
    ) else {
        panic!()
    };
    assert_eq!((named.name.as_str(), named.aliases.join("+").as_str()), ("web", "a+b"));
    assert_eq!(
        (named.namespace.as_deref(), named.labels.get("app.tier")),
        (Some("shop"), Some(&"front".to_owned()))
    );
    assert_eq!(named.addresses.len(), 2);
    let Ok(Call::CreateEndpoint(router)) = endpoint(
        json!({ "ovl.allow-address": "10.1.0.200,fd00:9::/64", "ovl.allow-mac": "00:00:5e:00:01:07" }),
    ) else {
        panic!()
    };
    assert_eq!(router.allowed, [net("10.1.0.200/32"), net("fd00:9::/64")]);
    assert_eq!(router.allowed_macs, ["00:00:5e:00:01:07".parse().unwrap()]);
    assert!(endpoint(json!({ "ovl.allow-address": "10.1" })).unwrap_err().contains("\"10.1\""));
    assert!(endpoint(json!({ "ovl.nmae": "web" })).unwrap_err().contains("ovl.nmae"));
}

#[test]
fn invalid_calls_are_rejected() {
    for (method, body) in [
        ("NetworkDriver.Fly", json!({})),
        ("NetworkDriver.Join", json!({})),
        ("NetworkDriver.Join", json!({ "NetworkID": "ab", "EndpointID": "../x" })),
        ("NetworkDriver.CreateNetwork", json!([])),
        ("NetworkDriver.CreateNetwork", json!({ "NetworkID": "ab", "IPv4Data": [] })),
        ("NetworkDriver.CreateEndpoint", json!({ "NetworkID": "ab", "EndpointID": "cd" })),
        ("IpamDriver.RequestAddress", json!({ "PoolID": "x", "Address": "" })),
        ("IpamDriver.RequestPool", json!({ "AddressSpace": "LocalDefault" })),
    ] {
        parse(method, &body).expect_err(method);
    }
}

#[test]
fn pool_is_the_subnet_of_a_network_or_a_free_one() {
    let choose = |prefix: Option<&str>, network: Option<&str>, v6| {
        let wish = PoolWish { prefix: prefix.map(net), network: network.map(str::to_owned), v6 };
        choose_pool(&wish, &blue())
    };
    assert_eq!(choose(None, None, false), Ok(Choice::Free { v6: false }));
    assert_eq!(choose(None, Some("green"), true), Ok(Choice::Free { v6: true }));
    assert_eq!(choose(None, Some("blue"), false), Ok(Choice::Range(net("10.77.0.0/16"))));
    assert_eq!(choose(None, Some("blue"), true), Ok(Choice::Range(net("fd00:77::/64"))));
    assert_eq!(choose(Some("10.77.0.0/16"), None, false), Ok(Choice::Range(net("10.77.0.0/16"))));
    assert_eq!(choose(Some("10.5.0.0/16"), None, false), Ok(Choice::Range(net("10.5.0.0/16"))));
    for (prefix, network, v6, part) in [
        (Some("10.77.1.0/24"), None, false, "overlaps 10.77.0.0/16 of network blue"),
        (Some("10.5.0.0/16"), Some("blue"), false, "network blue has 10.77.0.0/16"),
        (None, Some("red"), true, "no IPv6 addresses"),
        (Some("10.5.0.1/16"), None, false, "host bits"),
        (Some("fd00:5::/64"), None, false, "other family"),
    ] {
        let error = choose(prefix, network, v6).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn network_is_joined_by_name_or_subnet_or_else_created() {
    assert_eq!(plan(json!({ "ovl.network": "blue" }), "10.77.0.0/16"), Ok(Plan::Join(BLUE)));
    assert_eq!(plan(json!({ "ovl.network": BLUE.to_string() }), "10.77.0.0/16"), Ok(Plan::Join(BLUE)));
    assert_eq!(plan(json!({}), "10.77.0.0/16"), Ok(Plan::Join(BLUE)));
    let Ok(Plan::Make(made)) = plan(json!({ "ovl.network": "green", "encrypted": "auto" }), "10.5.0.0/16")
    else {
        panic!()
    };
    assert_eq!((made.encrypted, made.auto_encrypt), (false, true));
    let Ok(Plan::Make(made)) = plan(json!({ "ovl.network": "green", "encrypted": "true" }), "10.5.0.0/16")
    else {
        panic!()
    };
    assert_eq!((made.name.as_str(), made.encrypted, made.mode), ("green", true, Mode::L2));
    assert_eq!(made.subnets, [net("10.5.0.0/16")]);
    let Ok(Plan::Make(made)) = plan(json!({}), "10.5.0.0/16") else { panic!() };
    assert_eq!(made.name, "docker-10.5.0.0-16");

    for (options, prefix, part) in [
        (
            json!({ "ovl.network": "blue" }),
            "10.5.0.0/16",
            "has 10.77.0.0/16 and fd00:77::/64, not 10.5.0.0/16",
        ),
        (json!({ "ovl.network": "green" }), "10.77.0.0/16", "is the subnet of network blue"),
        (json!({ "ovl.network": "red", "encrypted": "" }), "10.78.0.0/24", "is not encrypted"),
        (json!({ "ovl.network": "red", "ovl.mode": "l3" }), "10.78.0.0/24", "is switched"),
        (json!({ "ovl.network": "red", "ovl.vni": "9" }), "10.78.0.0/24", "VNI 4098, not 9"),
        (json!({ "ovl.network": "red", "ovl.mtu": "1300" }), "10.78.0.0/24", "ovlctl network update red"),
    ] {
        let error = plan(options, prefix).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
    let mut internal = wish(json!({}), "10.77.0.0/16");
    internal.internal = true;
    assert!(plan_network(&internal, &blue(), |_| false).unwrap_err().contains("is not internal"));
}

#[test]
fn chosen_subnet_yields_to_that_of_an_existing_network() {
    let chosen = net("10.128.0.0/20");
    let wish = wish(json!({ "ovl.network": "blue" }), "10.128.0.0/20");
    assert_eq!(plan_network(&wish, &blue(), |prefix| prefix == chosen), Ok(Plan::Join(BLUE)));
    plan_network(&wish, &blue(), |_| false).expect_err("the user's own range does not");

    let pool = Pool { prefix: chosen, chosen: Some(7) };
    let kept = EngineNetwork { network: BLUE, pools: vec![pool] };
    let all = blue();
    let (network, subnet) = subnet_of(pool, std::iter::once(&kept), &all).unwrap();
    assert_eq!((network.id, subnet.prefix), (BLUE, net("10.77.0.0/16")));
    subnet_of(Pool { chosen: Some(8), ..pool }, std::iter::once(&kept), &all).expect_err("another's");
    let given = Pool { prefix: net("10.78.0.0/24"), chosen: None };
    assert_eq!(subnet_of(given, std::iter::empty(), &all).unwrap().0.name, "red");
}

#[test]
fn pool_stands_for_a_subnet_that_has_grown() {
    let mut all = blue();
    let subnet = &mut all.get_mut(&BLUE).unwrap().network.subnets[0];
    *subnet = addresses::can_grow(subnet, net("10.76.0.0/15")).unwrap();
    let pool = "10.77.0.0/16".parse().unwrap();
    let (_, subnet) = subnet_of(pool, std::iter::empty(), &all).unwrap();
    assert_eq!(subnet.prefix, net("10.76.0.0/15"));
    assert_eq!(wanted_gateway(pool.prefix, Some(subnet), None), Ok(net("10.77.0.1/16")));
}

#[test]
fn network_id_is_the_same_on_all_hosts() {
    assert_eq!(network_id("blue", 0), network_id("blue", 0));
    let ids = [network_id("blue", 0), network_id("blue", 1), network_id("red", 0)];
    assert_eq!(ids.iter().collect::<std::collections::BTreeSet<_>>().len(), 3);
}

#[test]
fn other_gateway_is_rejected() {
    let prefix = net("10.77.0.0/16");
    let gateway = |wanted: &str| wanted_gateway(prefix, None, Some(wanted.parse().unwrap()));
    assert_eq!(wanted_gateway(prefix, None, None), Ok(net("10.77.0.1/16")));
    assert_eq!(gateway("10.77.0.1"), Ok(net("10.77.0.1/16")));
    assert!(gateway("10.77.0.254").unwrap_err().contains("is 10.77.0.1 on all hosts"));
}

#[test]
fn pools_round_trip_through_text() {
    for text in ["10.77.0.0/16", "fd00::/64", "10.128.0.0/20#0badcafe"] {
        assert_eq!(text.parse::<Pool>().unwrap().to_string(), text);
    }
    for text in ["", "blue", "10.0.0.0", "10.0.0.0/8#", "10.0.0.0/8#x"] {
        text.parse::<Pool>().expect_err(text);
    }
}

#[test]
fn join_response_has_gateways_and_routes() {
    let ip = |text: &str| text.parse::<IpAddr>().unwrap();
    let switched = Joined {
        device: "ovc-1".to_owned(),
        gateways: vec![ip("10.77.0.1"), ip("fd00:77::1")],
        ranges: vec![],
    };
    let answer = joined(&switched, false);
    assert_eq!(answer["InterfaceName"], json!({ "SrcName": "ovc-1", "DstPrefix": "eth" }));
    assert_eq!((&answer["Gateway"], &answer["GatewayIPv6"]), (&json!("10.77.0.1"), &json!("fd00:77::1")));
    assert_eq!((&answer["StaticRoutes"], &answer["DisableGatewayService"]), (&json!([]), &json!(false)));
    let inside = joined(&switched, true);
    assert_eq!((&inside["Gateway"], &inside["DisableGatewayService"]), (&json!(""), &json!(true)));

    let routed = Joined {
        device: "ovc-2".to_owned(),
        gateways: vec![ip("10.60.1.1")],
        ranges: vec![net("10.60.0.0/16"), net("fd60::/48")],
    };
    assert_eq!(
        joined(&routed, true)["StaticRoutes"],
        json!([
            { "Destination": "10.60.1.1/32", "RouteType": 1 },
            { "Destination": "10.60.0.0/16", "RouteType": 0, "NextHop": "10.60.1.1" },
        ])
    );
}
