use serde_json::json;

use super::*;
use crate::clock::Stamp;
use crate::object::{Body, Object};
use crate::wire;

fn service() -> Service {
    serde_json::from_value(json!({
        "metadata": { "name": "web", "namespace": "shop", "labels": { "app": "web" } },
        "spec": {
            "type": "LoadBalancer",
            "selector": { "app": "web" },
            "clusterIP": "10.96.0.7",
            "clusterIPs": ["10.96.0.7", "fd00::7"],
            "ipFamilies": ["IPv4", "IPv6"],
            "ipFamilyPolicy": "PreferDualStack",
            "ports": [
                { "name": "http", "port": 80, "targetPort": "web", "nodePort": 30080 },
                { "name": "dns", "port": 53, "protocol": "UDP", "targetPort": 5353 },
            ],
            "sessionAffinity": "ClientIP",
        },
        "status": { "loadBalancer": { "ingress": [{ "ip": "192.0.2.1" }] } },
    }))
    .unwrap()
}

fn policy() -> NetworkPolicy {
    serde_json::from_value(json!({
        "metadata": { "name": "db", "namespace": "shop" },
        "spec": {
            "podSelector": {},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {},
                {
                    "from": [
                        { "namespaceSelector": {}, "podSelector": { "matchExpressions": [
                            { "key": "tier", "operator": "In", "values": ["a", "b"] },
                            { "key": "old", "operator": "DoesNotExist" },
                        ] } },
                        { "ipBlock": { "cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"] } },
                    ],
                    "ports": [{ "port": "pg" }, { "protocol": "UDP", "port": 1000, "endPort": 2000 }],
                },
            ],
        },
    }))
    .unwrap()
}

#[test]
fn resources_round_trip_through_the_wire_codec() {
    for resource in [
        Resource::Service(Box::new(service())),
        Resource::Service(Box::default()),
        Resource::NetworkPolicy(policy()),
        Resource::Pod(Pod::default()),
        Resource::Namespace(Namespace::default()),
        Resource::ServiceCidr(ServiceCidr {
            spec: ServiceCidrSpec {
                cidrs: vec!["10.97.0.0/16".parse().unwrap()],
                ..ServiceCidrSpec::default()
            },
            ..ServiceCidr::default()
        }),
        Resource::Node(NodeObject {
            status: serde_json::from_value(
                json!({ "addresses": [{ "type": "InternalIP", "address": "192.0.2.1" }] }),
            )
            .unwrap(),
            ..NodeObject::default()
        }),
    ] {
        let object = Object { stamp: Stamp::default(), deleted: false, body: Body::Resource(resource) };
        let bytes = wire::encode_body(&object).unwrap();
        assert_eq!(wire::decode_body::<Object>(&bytes).unwrap(), object);
    }
}

#[test]
fn manifest_omits_empty_fields_but_keeps_empty_selectors() {
    let manifest = Resource::NetworkPolicy(policy()).to_manifest().unwrap();
    assert_eq!(manifest["kind"], "NetworkPolicy");
    assert_eq!(manifest["apiVersion"], "networking.k8s.io/v1");
    assert_eq!(manifest["spec"]["podSelector"], json!({}));
    assert_eq!(manifest["spec"]["ingress"][0], json!({}));
    assert_eq!(manifest["spec"]["ingress"][1]["from"][0]["namespaceSelector"], json!({}));
    assert_eq!(manifest["spec"].get("egress"), None);
    assert_eq!(serde_json::from_value::<NetworkPolicy>(manifest).unwrap(), policy());

    let manifest = Resource::Service(Box::new(service())).to_manifest().unwrap();
    assert_eq!(manifest["spec"]["ports"][0]["targetPort"], "web");
    assert_eq!(manifest["spec"]["ports"][1]["targetPort"], 5353);
    assert_eq!(manifest["spec"].get("externalName"), None);
    assert_eq!(serde_json::from_value::<Service>(manifest).unwrap(), service());
}

#[test]
fn cluster_ip_is_an_address_or_none() {
    let spec =
        |ip| serde_json::from_value::<ServiceSpec>(json!({ "clusterIP": ip })).map(|spec| spec.cluster_ip);
    assert_eq!(spec("None").unwrap(), Some(ClusterIp::Headless));
    assert_eq!(spec("").unwrap(), None);
    assert_eq!(spec("fd00::1").unwrap(), Some(ClusterIp::Address("fd00::1".parse().unwrap())));
    assert!(spec("none").unwrap_err().to_string().contains("None for a headless Service"));
}

#[test]
fn a_port_is_a_number_or_a_name() {
    let port = |value| serde_json::from_value::<IntOrString>(value);
    assert_eq!(port(json!(80)).unwrap(), IntOrString::Int(80));
    assert_eq!(port(json!("http")).unwrap(), IntOrString::String("http".to_owned()));
    for wrong in [json!(65_536), json!(-1), json!(1.5), json!(true)] {
        assert!(port(wrong.clone()).is_err(), "{wrong}");
    }
}

#[test]
fn label_selectors_match_labels() {
    let labels = Labels::from([("app".to_owned(), "web".to_owned())]);
    let selects = |selector| serde_json::from_value::<LabelSelector>(selector).unwrap().matches(&labels);
    let expression = |key: &str, operator: &str, values: &[&str]| {
        selects(json!({ "matchExpressions": [{ "key": key, "operator": operator, "values": values }] }))
    };
    assert!(selects(json!({})));
    assert!(selects(json!({ "matchLabels": { "app": "web" } })));
    assert!(!selects(json!({ "matchLabels": { "app": "web", "tier": "front" } })));
    assert!(expression("app", "In", &["db", "web"]) && !expression("app", "In", &["db"]));
    assert!(!expression("tier", "In", &["web"]));
    assert!(expression("app", "NotIn", &["db"]) && !expression("app", "NotIn", &["web"]));
    assert!(expression("tier", "NotIn", &["web"]));
    assert!(expression("app", "Exists", &[]) && !expression("tier", "Exists", &[]));
    assert!(expression("tier", "DoesNotExist", &[]) && !expression("app", "DoesNotExist", &[]));
}
