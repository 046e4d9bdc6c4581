use ovl_control::{CniCall, CniCommand, PodRef};
use std::net::IpAddr;

use ovl_dataplane::observed::Inside;
use ovl_proto::bandwidth::{Bandwidth, Rate};
use ovl_proto::id::{EndpointId, Mac, NetworkId, NodeId};
use ovl_proto::publish::Publish;
use ovl_proto::table::Endpoint;
use ovl_proto::wire::fields::Unknown;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn call(command: CniCommand, config: Value) -> CniCall {
    CniCall {
        command,
        container_id: "0d0de92591a6f7d3e644c60cf7511dc1".into(),
        netns: "/var/run/netns/cni-1".into(),
        ifname: "eth0".into(),
        args: String::new(),
        path: "/opt/cni/bin".into(),
        config,
    }
}

/// Returns a configuration with these keys in addition to the common ones.
fn config(more: Value) -> Value {
    let mut config = json!({ "cniVersion": "1.1.0", "name": "pods", "type": "ovl-cni" });
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn add(args: &str, more: Value) -> Result<Add, CniError> {
    let call = CniCall { args: args.into(), ..call(CniCommand::Add, config(more)) };
    parse(&call).map(|parsed| match parsed {
        Call::Add(add) => *add,
        other => panic!("{other:?}"),
    })
}

#[track_caller]
fn assert_fails<T: std::fmt::Debug>(result: Result<T, CniError>, number: u32, part: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.code, number, "{error:?}");
    assert!(format!("{} {}", error.msg, error.details).contains(part), "{error:?} does not say {part:?}");
}

/// A recorded call of containerd, with the plugin type of ovl.
fn containerds() -> CniCall {
    CniCall {
        args: "K8S_POD_NAMESPACE=shop;K8S_POD_NAME=p1;K8S_POD_INFRA_CONTAINER_ID=0d0d;K8S_POD_UID=uid-p1;IgnoreUnknown=1".into(),
        ..call(
            CniCommand::Add,
            json!({
                "capabilities": { "bandwidth": true, "dns": true, "ips": true, "portMappings": true },
                "cniVersion": "0.4.0",
                "delegateType": "bridge",
                "hairpinMode": true,
                "name": "k8snet",
                "network": "blue",
                "runtimeConfig": { "io.kubernetes.cri.pod-annotations": { "ovl.labels": "app=shop, tier=front", "other": "x" } },
                "type": "ovl-cni",
            }),
        )
    }
}

#[test]
fn containerd_call_is_parsed() {
    let Call::Add(add) = parse(&containerds()).unwrap() else { panic!() };
    assert_eq!((add.version, add.network.as_str(), add.name.as_str()), (Version::V0_4_0, "blue", "p1"));
    assert_eq!(add.namespace.as_deref(), Some("shop"));
    assert_eq!(add.attachment.network, "k8snet");
    assert_eq!(add.pod, Some(PodRef { name: "p1".into(), uid: "uid-p1".into() }));
    let labels = [("app", "shop"), ("tier", "front")].map(|(key, value)| (key.to_owned(), value.to_owned()));
    assert_eq!(add.labels, labels.into());
    // Its second DEL has no namespace.
    let del = CniCall { command: CniCommand::Del, netns: String::new(), ..containerds() };
    assert_eq!(parse(&del), Ok(Call::Del(add.attachment)));
}

#[test]
fn annotation_names_more_networks_that_the_configuration_allows() {
    let read = |text: &str| {
        let annotations = json!({ "io.kubernetes.cri.pod-annotations": { "ovl.networks": text } });
        add("", json!({ "moreNetworks": ["blue", "green"], "runtimeConfig": annotations }))
            .map(|add| add.more)
    };
    let more = |all: &[(&str, &str)]| -> Vec<(String, String)> {
        all.iter().map(|(network, ifname)| ((*network).to_owned(), (*ifname).to_owned())).collect()
    };
    assert_eq!(read(""), Ok(Vec::new()));
    assert_eq!(read("blue, green@eth2"), Ok(more(&[("blue", "net1"), ("green", "eth2")])));
    assert_eq!(read("blue,blue"), Ok(more(&[("blue", "net1"), ("blue", "net2")])));
    for (wrong, why) in [
        ("secret", "moreNetworks"),
        ("blue@eth0", "names eth0"),
        ("blue@a,green@a", "twice"),
        ("blue@", "a list like"),
        ("blue@a/b", "a list like"),
        ("@x", "a list like"),
        (&["blue"; 9].join(","), "more than 8"),
    ] {
        let error = read(wrong).unwrap_err();
        assert!(error.details.contains(why), "{wrong}: {error:?}");
    }
}

#[test]
fn podman_call_is_parsed() {
    let args = "IgnoreUnknown=1;K8S_POD_NAME=elegant_blackburn;MAC=02:aa:00:00:00:01;IP=10.91.0.77";
    let add = add(args, json!({ "cniVersion": "0.4.0" })).unwrap();
    assert_eq!(add.name, "elegant_blackburn");
    assert_eq!(add.pod, Some(PodRef { name: add.name.clone(), uid: String::new() }));
    assert_eq!(add.addresses, ["10.91.0.77".parse::<IpAddr>().unwrap()]);
    assert_eq!(add.mac, Some(Mac([2, 0xaa, 0, 0, 0, 1])));
    assert_eq!((add.network.as_str(), add.namespace), ("pods", None));
}

#[test]
fn endpoint_is_named_after_the_container_without_a_pod() {
    let add = add("", json!({})).unwrap();
    assert_eq!((add.name.as_str(), add.pod), ("0d0de92591a6", None));
}

#[test]
fn any_pod_name_gives_a_valid_endpoint_name() {
    let name = |pod: &str| add(&format!("K8S_POD_NAME={pod}"), json!({})).unwrap().name;
    assert_eq!(name(&"p".repeat(253)), "p".repeat(253));
    for odd in ["-x", "a b", "ü", "...", &"p".repeat(300)] {
        let made = name(odd);
        assert_eq!(add(&format!("K8S_POD_NAME={odd}"), json!({})).unwrap().pod, None);
        assert!(made.len() <= MAX_NAME && made.starts_with(|c: char| c.is_ascii_alphanumeric()), "{made}");
    }
    let add = add("K8S_POD_NAME=web", json!({})).unwrap();
    let (here, there) = (NodeId([1; 10]), NodeId([2; 10]));
    let other = add.other_name(here);
    assert!(other.starts_with("web-") && other.len() == 14, "{other}");
    // Another container, or one with the same id on another host.
    assert_ne!(other, add.other_name(there));
    let attachment = Attachment { ifname: "eth1".into(), ..add.attachment.clone() };
    assert_ne!(other, Add { attachment, ..add }.other_name(here));
}

#[test]
fn options_come_from_three_places_and_the_last_one_wins() {
    let cni = json!({ "cni": { "ips": ["10.0.0.2/24", "fd00::2"], "mac": "02-00-00-00-00-02", "labels": [{ "key": "a", "value": "b" }] } });
    let environment = "IP=10.0.0.1/24,fd00::1/64;MAC=02:00:00:00:00:01";
    let wish = |more| {
        let add = add(environment, more).unwrap();
        (add.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "), add.mac.unwrap().0[5])
    };
    assert_eq!(wish(json!({})), ("10.0.0.1 fd00::1".into(), 1));
    assert_eq!(wish(json!({ "args": cni })), ("10.0.0.2 fd00::2".into(), 2));
    let runtime = json!({ "ips": ["10.0.0.3"], "mac": "02:00:00:00:00:03" });
    assert_eq!(wish(json!({ "args": cni, "runtimeConfig": runtime })), ("10.0.0.3".into(), 3));
    // Empty values are no options.
    let nothing =
        json!({ "args": { "cni": { "ips": [], "mac": "" } }, "runtimeConfig": { "ips": null, "mac": null } });
    assert_eq!(wish(nothing), ("10.0.0.1 fd00::1".into(), 1));
    assert_eq!(add("", json!({ "args": cni })).unwrap().labels["a"], "b");
}

#[test]
fn capability_allows_more_addresses() {
    let allowed = json!({ "addresses": ["10.0.0.200", "fd00:9::/64"], "macs": ["00:00:5e:00:01:07"] });
    let add = add("", json!({ "runtimeConfig": { "ovl.allowed": allowed } })).unwrap();
    assert_eq!(add.allowed, ["10.0.0.200/32".parse().unwrap(), "fd00:9::/64".parse().unwrap()]);
    assert_eq!(add.allowed_macs, ["00:00:5e:00:01:07".parse().unwrap()]);
}

#[test]
fn ports_are_published_and_ranges_are_put_together_again() {
    let one = |host: u16, container: u16, more: Value| {
        let mut mapping = json!({ "hostPort": host, "containerPort": container, "protocol": "tcp" });
        mapping.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        mapping
    };
    let published = |mappings: Value| {
        let add = add("", json!({ "runtimeConfig": { "portMappings": mappings } })).unwrap();
        let text = |wish: &Publish| {
            let address = wish.address.map_or_else(String::new, |address| format!("{address} "));
            format!("{address}{} {} {}", wish.host.unwrap(), wish.container, wish.transport)
        };
        add.publish.iter().map(text).collect::<Vec<_>>()
    };
    assert_eq!(published(json!(null)), Vec::<String>::new());
    assert_eq!(published(json!([])), Vec::<String>::new());
    // A port of the host that is 0 is none.
    assert_eq!(published(json!([one(0, 80, json!({}))])), Vec::<String>::new());
    let range = [80, 81, 82].map(|port| one(8000 + port, port, json!({})));
    assert_eq!(published(json!(range)), ["8080-8082 80-82 tcp"]);
    let apart = json!([
        one(8080, 80, json!({})),
        one(8081, 80, json!({})),
        one(8082, 81, json!({ "protocol": "UDP" })),
        one(8083, 82, json!({ "protocol": "udp", "hostIP": "127.0.0.1" })),
        one(8084, 83, json!({ "protocol": null, "hostIP": "::" })),
        // As containerd writes it.
        { "HostPort": 65_535, "ContainerPort": 65_535, "Protocol": "tcp", "HostIP": "" },
    ]);
    let expected = [
        "8080 80 tcp",
        "8081 80 tcp",
        "8082 81 udp",
        "127.0.0.1 8083 82 udp",
        ":: 8084 83 tcp",
        "65535 65535 tcp",
    ];
    assert_eq!(published(apart), expected);
}

#[test]
fn bandwidth_is_limited_in_each_direction_that_has_a_rate() {
    let limits = |bandwidth: Value| {
        let Bandwidth { ingress, egress } =
            add("", json!({ "runtimeConfig": { "bandwidth": bandwidth } })).unwrap().bandwidth;
        [ingress, egress].map(|limit| limit.map(|Rate { rate, burst }| (rate, burst)))
    };
    assert_eq!(limits(json!(null)), [None, None]);
    assert_eq!(limits(json!({ "ingressRate": 0, "ingressBurst": 0 })), [None, None]);
    let both = json!({ "ingressRate": 1, "ingressBurst": 2, "egressRate": 3, "egressBurst": 4 });
    assert_eq!(limits(both), [Some((1, 2)), Some((3, 4))]);
    // As containerd writes it for the annotation kubernetes.io/egress-bandwidth.
    let egress =
        json!({ "IngressRate": 0, "IngressBurst": 0, "EgressRate": 1_000_000, "EgressBurst": u32::MAX });
    assert_eq!(limits(egress), [None, Some((1_000_000, u32::MAX.into()))]);
}

#[test]
fn dns_is_passed_on_and_the_capability_takes_precedence() {
    let given =
        json!({ "nameservers": ["10.0.0.10"], "domain": "x", "search": ["a"], "options": ["ndots:5"] });
    assert_eq!(Value::Object(add("", json!({ "dns": given })).unwrap().dns), given);
    let runtime = json!({ "dns": { "servers": ["10.0.0.11"], "searches": ["b"], "options": [] } });
    let dns = add("", json!({ "dns": given, "runtimeConfig": runtime })).unwrap().dns;
    assert_eq!(Value::Object(dns), json!({ "nameservers": ["10.0.0.11"], "search": ["b"] }));
}

#[test]
fn each_error_has_its_code() {
    assert_fails(add("", json!({ "ipam": { "type": "host-local" } })), code::UNSUPPORTED, "ipam");
    assert!(add("", json!({ "ipam": {} })).is_ok());
    for version in ["0.2.0", "0.3.0", "2.0.0", ""] {
        assert_fails(add("", json!({ "cniVersion": version })), code::VERSION, "0.3.1, 0.4.0, 1.0.0, 1.1.0");
    }
    assert_fails(parse(&call(CniCommand::Add, json!({ "name": "pods" }))), code::VERSION, "0.1.0");
    for (more, part) in [
        (json!({ "name": "" }), "name"),
        (json!({ "name": "a/b" }), "name"),
        (json!({ "name": 7 }), "name"),
        (json!({ "network": "" }), "network"),
        (json!({ "dns": [] }), "dns"),
        (json!({ "prevResult": [] }), "prevResult"),
        (json!({ "runtimeConfig": 1 }), "runtimeConfig"),
        (json!({ "runtimeConfig": { "ips": "10.0.0.1" } }), "runtimeConfig.ips"),
        (json!({ "runtimeConfig": { "ips": ["10.0.0"] } }), "10.0.0"),
        (json!({ "runtimeConfig": { "mac": "01:00:00:00:00:01" } }), "runtimeConfig.mac"),
        (json!({ "runtimeConfig": { "dns": { "servers": [1] } } }), "servers"),
        (json!({ "runtimeConfig": { "portMappings": {} } }), "portMappings"),
        (json!({ "runtimeConfig": { "portMappings": [8080] } }), "portMappings must be a list of"),
        (json!({ "runtimeConfig": { "portMappings": [{ "containerPort": 80 }] } }), "hostPort"),
        (
            json!({ "runtimeConfig": { "portMappings": [{ "hostPort": 65536, "containerPort": 80 }] } }),
            "hostPort",
        ),
        (
            json!({ "runtimeConfig": { "portMappings": [{ "hostPort": 80, "containerPort": 0 }] } }),
            "containerPort",
        ),
        (
            json!({ "runtimeConfig": { "portMappings": [{ "hostPort": 1, "containerPort": 1, "protocol": "icmp" }] } }),
            "tcp, udp or sctp",
        ),
        (
            json!({ "runtimeConfig": { "portMappings": [{ "hostPort": 1, "containerPort": 1, "hostIP": "host" }] } }),
            "\"host\" is not an address",
        ),
        (json!({ "runtimeConfig": { "bandwidth": 1 } }), "runtimeConfig.bandwidth"),
        (json!({ "runtimeConfig": { "bandwidth": { "ingressRate": "1M" } } }), "bandwidth.ingressRate"),
        (json!({ "runtimeConfig": { "bandwidth": { "egressRate": 1 } } }), "egressRate needs egressBurst"),
        (json!({ "runtimeConfig": { "ovl.allowed": [] } }), "ovl.allowed"),
        (json!({ "runtimeConfig": { "ovl.allowed": { "addresses": ["10.0.0.1/24"] } } }), "10.0.0.1/24"),
        (
            json!({ "runtimeConfig": { "ovl.allowed": { "macs": ["01:00:00:00:00:01"] } } }),
            "ovl.allowed.macs",
        ),
        (
            json!({ "runtimeConfig": { "io.kubernetes.cri.pod-annotations": { "ovl.labels": "app" } } }),
            "ovl.labels",
        ),
        (json!({ "args": { "cni": { "labels": [{ "key": "a" }] } } }), "args.cni.labels"),
    ] {
        assert_fails(add("", more), code::CONFIG, part);
    }
    for (args, part) in [
        ("IP", "KEY=VALUE"),
        ("IP=10.0.0", "10.0.0"),
        ("MAC=02", "MAC"),
        ("COLOR=red", "COLOR is unknown"),
        ("COLOR=red;IgnoreUnknown=0", "IgnoreUnknown=1"),
        ("IgnoreUnknown=maybe", "maybe"),
    ] {
        assert_fails(add(args, json!({})), code::ENVIRONMENT, part);
    }
    assert!(add("COLOR=red;IgnoreUnknown=true", json!({})).is_ok());
    type Change = fn(&mut CniCall);
    let changes: [(Change, &str); 6] = [
        (|call| call.container_id.clear(), "CNI_CONTAINERID"),
        (|call| call.container_id = "../x".into(), "CNI_CONTAINERID"),
        (|call| call.netns.clear(), "CNI_NETNS"),
        (|call| call.ifname.clear(), "CNI_IFNAME"),
        (|call| call.ifname = "a/b".into(), "CNI_IFNAME"),
        (|call| call.ifname = "a".repeat(16), "CNI_IFNAME"),
    ];
    for (change, part) in changes {
        let mut call = call(CniCommand::Add, config(json!({})));
        change(&mut call);
        assert_fails(parse(&call), code::ENVIRONMENT, part);
    }
    assert_fails(parse(&call(CniCommand::Add, json!([]))), code::DECODE, "object");
}

#[test]
fn commands_require_their_version() {
    let of = |command, version: &str| {
        parse(&call(
            command,
            config(json!({ "cniVersion": version, "prevResult": {}, "cni.dev/valid-attachments": [] })),
        ))
    };
    assert_fails(of(CniCommand::Check, "0.3.1"), code::VERSION, "CHECK");
    assert!(of(CniCommand::Check, "0.4.0").is_ok());
    for command in [CniCommand::Gc, CniCommand::Status] {
        assert_fails(of(command, "1.0.0"), code::VERSION, "1.1.0");
        assert!(of(command, "1.1.0").is_ok());
    }
}

#[test]
fn gc_requires_a_valid_list() {
    let gc = |more| {
        parse(&CniCall {
            container_id: String::new(),
            ifname: String::new(),
            ..call(CniCommand::Gc, config(more))
        })
    };
    assert_fails(gc(json!({})), code::CONFIG, "cni.dev/valid-attachments");
    assert_fails(
        gc(json!({ "cni.dev/valid-attachments": [{ "containerID": "a" }] })),
        code::CONFIG,
        "ifname",
    );
    assert_fails(gc(json!({ "cni.dev/valid-attachments": "all" })), code::CONFIG, "list");
    let list = json!([{ "containerID": "a", "ifname": "eth0" }]);
    for key in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
        let Call::Gc(gc) = gc(json!({ key: list })).unwrap() else { panic!() };
        let of = |id: &str, ifname: &str| {
            gc.keeps(&Attachment { network: "pods".into(), container_id: id.into(), ifname: ifname.into() })
        };
        assert!(of("a", "eth0") && !of("a", "eth1") && !of("b", "eth0"));
    }
    let Call::Gc(none) = gc(json!({ "cni.dev/valid-attachments": null })).unwrap() else { panic!() };
    assert!(none.valid.is_empty());
}

#[test]
fn del_succeeds_with_an_invalid_configuration() {
    let more =
        json!({ "ipam": { "type": "x" }, "network": 7, "runtimeConfig": 1, "prevResult": 1, "dns": 1 });
    let del = CniCall { args: "nonsense".into(), ..call(CniCommand::Del, config(more)) };
    assert!(matches!(parse(&del), Ok(Call::Del(_))));
    for version in [json!("0.2.0"), json!("2.0.0"), json!(""), json!(7), Value::Null] {
        let del = call(CniCommand::Del, config(json!({ "cniVersion": version })));
        assert!(matches!(parse(&del), Ok(Call::Del(_))), "{version}");
    }
    let mut none = call(CniCommand::Del, config(json!({})));
    none.config.as_object_mut().unwrap().remove("cniVersion");
    assert!(matches!(parse(&none), Ok(Call::Del(_))));
}

fn inside() -> Inside {
    Inside {
        mac: Mac([2, 0, 0, 0, 0, 5]),
        mtu: 1450,
        up: true,
        addresses: vec!["10.1.0.5/16".parse().unwrap(), "fd00::5/64".parse().unwrap()],
        gateways: vec!["10.1.0.1".parse().unwrap(), "fd00::1".parse().unwrap()],
    }
}

fn rendered(add: &Add) -> Value {
    let inside = inside();
    let gateways = inside.gateways.iter().copied().map(Some);
    render(
        add,
        &Made {
            host: vec![
                ("ovb-a".into(), Mac([10, 0, 0, 0, 0, 1])),
                ("ove-b".into(), Mac([18, 0, 0, 0, 0, 1])),
            ],
            addresses: inside.addresses.iter().copied().zip(gateways).collect(),
            inside: &inside,
        },
    )
}

#[test]
fn result_has_the_requested_version() {
    let expected = |old: bool, new: bool| {
        let mut result = json!({
            "interfaces": [
                { "name": "ovb-a", "mac": "0a:00:00:00:00:01" },
                { "name": "ove-b", "mac": "12:00:00:00:00:01" },
                { "name": "eth0", "mac": "02:00:00:00:00:05", "sandbox": "/var/run/netns/cni-1" },
            ],
            "ips": [
                { "address": "10.1.0.5/16", "gateway": "10.1.0.1", "interface": 2 },
                { "address": "fd00::5/64", "gateway": "fd00::1", "interface": 2 },
            ],
            "routes": [{ "dst": "0.0.0.0/0", "gw": "10.1.0.1" }, { "dst": "::/0", "gw": "fd00::1" }],
            "dns": {},
        });
        if old {
            result["ips"][0]["version"] = "4".into();
            result["ips"][1]["version"] = "6".into();
        }
        if new {
            result["interfaces"][2]["mtu"] = 1450.into();
        }
        result
    };
    for (version, old, new) in
        [("0.3.1", true, false), ("0.4.0", true, false), ("1.0.0", false, false), ("1.1.0", false, true)]
    {
        let mut expected = expected(old, new);
        expected["cniVersion"] = version.into();
        assert_eq!(rendered(&add("", json!({ "cniVersion": version })).unwrap()), expected);
    }
}

#[test]
fn result_of_earlier_plugins_is_kept() {
    let previous = json!({
        "cniVersion": "1.0.0",
        "interfaces": [{ "name": "lo", "sandbox": "/var/run/netns/cni-1" }],
        "ips": [{ "address": "127.0.0.1/8", "interface": 0 }],
        "dns": { "nameservers": ["1.1.1.1"] },
        "extra": true,
    });
    let more = json!({ "cniVersion": "1.0.0", "prevResult": previous });
    let result = rendered(&add("", more).unwrap());
    assert_eq!(result["interfaces"].as_array().unwrap().len(), 4);
    assert_eq!(result["ips"][0], previous["ips"][0]);
    assert_eq!(result["ips"][1]["interface"], 3);
    assert_eq!(result["interfaces"][3]["name"], "eth0");
    assert_eq!((&result["dns"], &result["extra"]), (&previous["dns"], &json!(true)));
    let dns = json!({ "cniVersion": "1.0.0", "prevResult": previous, "dns": { "domain": "x" } });
    assert_eq!(rendered(&add("", dns).unwrap())["dns"], json!({ "domain": "x" }));
}

fn checked(change: impl FnOnce(&mut Value, &mut Endpoint, &mut Inside)) -> Result<(), CniError> {
    let mut previous = rendered(&add("", json!({})).unwrap());
    let mut found = inside();
    let mut endpoint = Endpoint {
        id: EndpointId([1; 5]),
        name: "web".into(),
        namespace: "default".into(),
        network: NetworkId([1; 5]),
        mac: found.mac,
        addresses: found.addresses.clone(),
        aliases: Vec::new(),
        labels: Default::default(),
        ready: true,
        publish: Vec::new(),
        groups: None,
        described: None,
        allowed: Vec::new(),
        allowed_macs: Vec::new(),
        pod: None,
        unknown: Unknown::default(),
    };
    change(&mut previous, &mut endpoint, &mut found);
    let Call::Check(call) =
        parse(&call(CniCommand::Check, config(json!({ "prevResult": previous })))).unwrap()
    else {
        panic!()
    };
    check(&call, &endpoint, Some(&found))
}

#[test]
fn check_names_the_difference() {
    assert_eq!(checked(|_, _, _| ()), Ok(()));
    // What other plugins add is ignored.
    assert_eq!(
        checked(|previous, _, found| {
            found.addresses.push("10.9.0.1/24".parse().unwrap());
            previous["interfaces"].as_array_mut().unwrap().push(json!({ "name": "ifb0", "mac": "x" }));
            previous["routes"].as_array_mut().unwrap().push(json!({ "dst": "0.0.0.0/0", "gw": "192.0.2.1" }));
        }),
        Ok(())
    );
    type Change = fn(&mut Value, &mut Endpoint, &mut Inside);
    let changes: [(Change, &str); 9] = [
        (|_, _, found| found.up = false, "eth0 is down"),
        (|_, _, found| found.mac = Mac([2, 0, 0, 0, 0, 6]), "MAC address 02:00:00:00:00:06"),
        (|_, _, found| found.addresses.truncate(0), "10.1.0.5/16"),
        (|_, _, found| found.gateways.truncate(1), "fd00::1"),
        (|previous, _, _| previous["interfaces"] = json!([]), "prevResult has no interface eth0"),
        (|previous, _, _| previous["interfaces"][2]["mac"] = json!(null), "prevResult has eth0 with"),
        (|previous, _, _| previous["ips"][0]["address"] = json!("10.1.0.6/16"), "10.1.0.5/16"),
        (|previous, _, _| previous["ips"] = json!(null), "10.1.0.5/16"),
        (
            |previous, _, _| {
                previous["ips"]
                    .as_array_mut()
                    .unwrap()
                    .push(json!({ "address": "10.1.0.7/16", "interface": 2 }))
            },
            "10.1.0.7/16",
        ),
    ];
    for (change, part) in changes {
        assert_fails(checked(change), code::DIFFERENCE, part);
    }
    let call = parse(&call(CniCommand::Check, config(json!({ "prevResult": {} }))));
    let Ok(Call::Check(call)) = call else { panic!() };
    let endpoint = Endpoint {
        id: EndpointId([1; 5]),
        name: "web".into(),
        namespace: "default".into(),
        network: NetworkId([1; 5]),
        mac: Mac::default(),
        addresses: Vec::new(),
        aliases: Vec::new(),
        labels: Default::default(),
        ready: true,
        publish: Vec::new(),
        groups: None,
        described: None,
        allowed: Vec::new(),
        allowed_macs: Vec::new(),
        pod: None,
        unknown: Unknown::default(),
    };
    assert_fails(check(&call, &endpoint, None), code::DIFFERENCE, "no interface eth0");
    assert_fails(parse(&self::call(CniCommand::Check, config(json!({})))), code::CONFIG, "prevResult");
}

/// Returns arbitrary JSON of limited depth.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        "\\PC{0,8}".prop_map(Value::from),
        Just(json!("10.0.0.1")),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key(), inner), 0..4)
                .prop_map(|pairs| pairs.into_iter().collect::<serde_json::Map<_, _>>().into()),
        ]
    })
}

/// Returns a key that the parser reads, more often than not.
fn key() -> impl Strategy<Value = String> {
    let known = prop::sample::select(vec![
        "args",
        "cni",
        "runtimeConfig",
        "ips",
        "mac",
        "dns",
        "servers",
        "labels",
        "key",
        "value",
        "prevResult",
        "interfaces",
        "routes",
        "ipam",
        "network",
        "portMappings",
        "io.kubernetes.cri.pod-annotations",
        "ovl.labels",
        "containerID",
        "ifname",
        "cni.dev/valid-attachments",
    ]);
    prop_oneof![4 => known.prop_map(str::to_owned), 1 => "\\PC{0,8}"]
}

proptest! {
    #[test]
    fn arbitrary_calls_do_not_panic(
        command in prop::sample::select(vec![CniCommand::Add, CniCommand::Del, CniCommand::Check, CniCommand::Gc, CniCommand::Status]),
        version in prop::sample::select(CNI_VERSIONS.to_vec()),
        more in prop::collection::vec((key(), any_json()), 0..6),
        args in "\\PC{0,40}",
    ) {
        let mut config = config(json!({ "cniVersion": version }));
        for (key, value) in more {
            config[key] = value;
        }
        if let Ok(Call::Add(add)) = parse(&CniCall { args, ..call(command, config) }) {
            let before = add.previous.as_ref().and_then(|result| result.get("interfaces")).and_then(Value::as_array).map_or(0, Vec::len);
            let result = rendered(&add);
            prop_assert_eq!(&result["interfaces"][before + 2]["name"], "eth0");
            prop_assert_eq!(result["cniVersion"].as_str(), Some(version));
        }
    }
}
