//! Fields that are refused, each with the reason.

use super::*;

#[test]
fn every_invalid_field_is_named_with_the_reason() {
    let long = "a".repeat(64);
    let service_rows = [
        ("apiVersion", json!("v2"), "apiVersion", "v2 Service is not supported: use v1 Service"),
        ("kind", json!("Deployment"), "kind", "v1 has no kind Deployment"),
        ("kind", json!(null), "kind", "is missing"),
        ("apiVersion", json!(7), "apiVersion", "is not a string"),
        ("metadata.name", json!(null), "metadata.name", "is missing"),
        ("metadata.name", json!("Web"), "metadata.name", "not a DNS label"),
        ("metadata.name", json!("-web"), "metadata.name", "not a DNS label"),
        ("metadata.name", json!(long), "metadata.name", "not a DNS label"),
        ("metadata.namespace", json!("a.b"), "metadata.namespace", "not a DNS label"),
        ("metadata.labels.a b", json!("x"), "metadata.labels.a b", "not a label key"),
        ("metadata.labels.a", json!("x y"), "metadata.labels.a", "not a label value"),
        ("metadata.labels.a", json!(1), "metadata.labels.a", "invalid type: integer"),
        ("metadata.labels", json!(["a"]), "metadata.labels", "invalid type: sequence"),
        ("metadata.annotations.-", json!("x"), "metadata.annotations", "not a label key"),
        (
            "metadata.annotations.a",
            json!("x".repeat(MAX_ANNOTATIONS)),
            "metadata.annotations",
            "larger than 256 KiB",
        ),
        ("metadata.finalisers", json!(["x"]), "metadata.finalisers", "is not a known field"),
        ("spec.selector", json!({ "app": "x y" }), "spec.selector.app", "not a label value"),
        ("spec.ports", json!([]), "spec.ports", "at least one port"),
        ("spec.ports", json!("80"), "spec.ports", "invalid type: string"),
        ("spec.ports.0.port", json!(0), "spec.ports[0].port", "between 1 and 65535"),
        ("spec.ports.0.port", json!(65_536), "spec.ports[0].port", "invalid value: integer `65536`"),
        ("spec.ports.0.port", json!("http"), "spec.ports[0].port", "invalid type: string"),
        ("spec.ports.0.protocol", json!("tcp"), "spec.ports[0].protocol", "unknown variant `tcp`"),
        ("spec.ports.0.nodePort", json!(""), "spec.ports[0].nodePort", "invalid type: string"),
        ("spec.internalTrafficPolicy", json!(""), "spec.internalTrafficPolicy", "unknown variant"),
        ("spec.ports.0.targetPort", json!("a--b"), "spec.ports[0].targetPort", "not a port name"),
        ("spec.ports.0.targetPort", json!("123"), "spec.ports[0].targetPort", "not a port name"),
        ("spec.ports.0.name", json!("Http"), "spec.ports[0].name", "not a DNS label"),
        ("spec.ports.0.nodePort", json!(30_000), "spec.ports[0].nodePort", "requires type NodePort"),
        ("spec.ports.0.nodeport", json!(30_000), "spec.ports[0].nodeport", "is not a known field"),
        ("spec.ports.1.port", json!(81), "spec.ports[0].name", "several ports need names"),
        (
            "spec.ports",
            json!([{ "name": "a", "port": 1 }, { "name": "a", "port": 2 }]),
            "spec.ports[1].name",
            "is a duplicate",
        ),
        (
            "spec.ports",
            json!([{ "name": "a", "port": 1 }, { "name": "b", "port": 1 }]),
            "spec.ports[1].port",
            "TCP 1 is a duplicate",
        ),
        ("spec.type", json!("Balancer"), "spec.type", "unknown variant `Balancer`"),
        ("spec.clusterIP", json!("10.0.0"), "spec.clusterIP", "None for a headless Service"),
        ("spec.clusterIP", json!("127.0.0.1"), "spec.clusterIPs[0]", "not the address of one host"),
        ("spec.clusterIPs", json!(["10.0.0.1", "10.0.0.2"]), "spec.clusterIPs", "one IPv4 and one IPv6"),
        ("spec.clusterIPs", json!(["None", "10.0.0.2"]), "spec.clusterIPs", "None must be the only entry"),
        (
            "spec",
            json!({ "clusterIP": "10.0.0.1", "clusterIPs": ["10.0.0.2"], "ports": [{ "port": 1 }] }),
            "spec.clusterIP",
            "not the first of clusterIPs",
        ),
        (
            "spec",
            json!({ "clusterIP": "fd00::1", "ipFamilies": ["IPv4"], "ports": [{ "port": 1 }] }),
            "spec.clusterIPs",
            "not of the ipFamilies",
        ),
        (
            "spec",
            json!({ "clusterIP": "None", "type": "NodePort", "ports": [{ "port": 1 }] }),
            "spec.clusterIP",
            "None requires type ClusterIP",
        ),
        ("spec.ipFamilies", json!(["IPv4", "IPv4"]), "spec.ipFamilies", "each once"),
        ("spec.ipFamilies", json!(["IPv5"]), "spec.ipFamilies[0]", "unknown variant `IPv5`"),
        (
            "spec",
            json!({ "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "SingleStack", "ports": [{ "port": 1 }] }),
            "spec.ipFamilyPolicy",
            "SingleStack allows only one family",
        ),
        ("spec.ipFamilyPolicy", json!("DualStack"), "spec.ipFamilyPolicy", "unknown variant"),
        ("spec.externalIPs", json!(["224.0.0.1"]), "spec.externalIPs[0]", "not the address of one host"),
        ("spec.externalIPs", json!(["x"]), "spec.externalIPs[0]", "invalid IP address"),
        ("spec", json!({ "type": "ExternalName" }), "spec.externalName", "not a subdomain name"),
        (
            "spec",
            json!({ "type": "ExternalName", "externalName": "a b" }),
            "spec.externalName",
            "not a subdomain name",
        ),
        (
            "spec",
            json!({ "type": "ExternalName", "externalName": "a.b", "clusterIP": "10.0.0.1" }),
            "spec.clusterIP",
            "an ExternalName has none",
        ),
        (
            "spec",
            json!({ "type": "ExternalName", "externalName": "a.b", "ipFamilyPolicy": "SingleStack" }),
            "spec.ipFamilyPolicy",
            "an ExternalName has none",
        ),
        (
            "spec",
            json!({ "type": "ExternalName", "externalName": "a.b", "ipFamilies": ["IPv4"] }),
            "spec.ipFamilies",
            "an ExternalName has none",
        ),
        ("spec.sessionAffinity", json!("Cookie"), "spec.sessionAffinity", "unknown variant"),
        ("spec.internalTrafficPolicy", json!("local"), "spec.internalTrafficPolicy", "unknown variant"),
        (
            "spec.externalTrafficPolicy",
            json!("Local"),
            "spec.externalTrafficPolicy",
            "requires type NodePort",
        ),
        (
            "spec.healthCheckNodePort",
            json!(30_001),
            "spec.healthCheckNodePort",
            "requires type LoadBalancer and",
        ),
        (
            "spec.publishNotReadyAddresses",
            json!("yes"),
            "spec.publishNotReadyAddresses",
            "invalid type: string",
        ),
        ("spec.loadBalancerIP", json!("192.0.2.1"), "spec.loadBalancerIP", "requires type LoadBalancer"),
        (
            "spec.allocateLoadBalancerNodePorts",
            json!(false),
            "spec.allocateLoadBalancerNodePorts",
            "requires type LoadBalancer",
        ),
        (
            "spec.loadBalancerSourceRanges",
            json!(["10.0.0.0/8"]),
            "spec.loadBalancerSourceRanges",
            "requires type LoadBalancer",
        ),
        ("spec", json!("none"), "spec", "invalid type: string"),
        ("more", json!(1), "more", "is not a known field"),
        ("spec.loadBalancerClass", json!("a/b"), "spec.loadBalancerClass", "requires type LoadBalancer"),
    ];
    wrong(service(), &service_rows);
    let mut balanced = service();
    set(&mut balanced, "spec.type", json!("LoadBalancer"));
    set(&mut balanced, "spec.externalTrafficPolicy", json!("Local"));
    set(&mut balanced, "spec.sessionAffinity", json!("ClientIP"));
    wrong(
        balanced,
        &[
            (
                "spec.healthCheckNodePort",
                json!(65_536),
                "spec.healthCheckNodePort",
                "invalid value: integer `65536`",
            ),
            ("spec.ports.0.nodePort", json!(-1), "spec.ports[0].nodePort", "invalid value: integer `-1`"),
            (
                "spec.ports",
                json!([{ "name": "a", "port": 1, "nodePort": 30_001 }, { "name": "b", "port": 2, "nodePort": 30_001 }]),
                "spec.ports[1].nodePort",
                "is a duplicate",
            ),
            (
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                json!(0),
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                "between 1 and 86400",
            ),
            (
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                json!(86_401),
                "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                "between 1 and 86400",
            ),
            ("spec.loadBalancerIP", json!("x"), "spec.loadBalancerIP", "invalid IP address"),
        ],
    );
    wrong(
        policy(),
        &[
            ("metadata.name", json!("a_b"), "metadata.name", "not a subdomain name"),
            (
                "spec.podSelector.matchLabels.app",
                json!("x y"),
                "spec.podSelector.matchLabels.app",
                "not a label value",
            ),
            (
                "spec.podSelector.matchExpressions",
                json!([{ "key": "a", "operator": "in", "values": ["b"] }]),
                "spec.podSelector.matchExpressions[0].operator",
                "unknown variant",
            ),
            (
                "spec.podSelector.matchExpressions",
                json!([{ "operator": "In", "values": ["b"] }]),
                "spec.podSelector.matchExpressions[0].key",
                "is missing",
            ),
            (
                "spec.podSelector.matchExpressions",
                json!([{ "key": "a b", "operator": "Exists" }]),
                "spec.podSelector.matchExpressions[0].key",
                "not a label key",
            ),
            (
                "spec.podSelector.matchExpressions",
                json!([{ "key": "a", "operator": "In" }]),
                "spec.podSelector.matchExpressions[0].values",
                "at least one value",
            ),
            (
                "spec.podSelector.matchExpressions",
                json!([{ "key": "a", "operator": "Exists", "values": ["b"] }]),
                "spec.podSelector.matchExpressions[0].values",
                "no values",
            ),
            (
                "spec.podSelector.matchExpressions",
                json!([{ "key": "a", "operator": "NotIn", "values": ["b c"] }]),
                "spec.podSelector.matchExpressions[0].values",
                "not a label value",
            ),
            ("spec.policyTypes", json!(["In"]), "spec.policyTypes[0]", "unknown variant"),
            ("spec.ingress.0.ports.0.port", json!(0), "spec.ingress[0].ports[0].port", "between 1 and 65535"),
            ("spec.ingress.0.ports.0.port", json!("A"), "spec.ingress[0].ports[0].port", "not a port name"),
            (
                "spec.ingress.0.ports.0.protocol",
                json!("ICMP"),
                "spec.ingress[0].ports[0].protocol",
                "unknown variant",
            ),
            (
                "spec.ingress.0.ports.0.endPort",
                json!(80),
                "spec.ingress[0].ports[0].endPort",
                "endPort requires a port",
            ),
            (
                "spec.ingress.0.ports.0",
                json!({ "port": "pg", "endPort": 80 }),
                "spec.ingress[0].ports[0].endPort",
                "endPort requires a port",
            ),
            (
                "spec.ingress.0.ports.0",
                json!({ "endPort": 80 }),
                "spec.ingress[0].ports[0].endPort",
                "endPort requires a port",
            ),
            ("spec.ingress.0.from.0", json!({}), "spec.ingress[0].from[0]", "selects nothing"),
            (
                "spec.ingress.0.from.0.ipBlock",
                json!({ "cidr": "10.0.0.0/8" }),
                "spec.ingress[0].from[0].ipBlock",
                "excludes a selector",
            ),
            (
                "spec.ingress.0.from.0",
                json!({ "ipBlock": { "cidr": "10.0.0.0" } }),
                "spec.ingress[0].from[0].ipBlock.cidr",
                "invalid IP address",
            ),
            (
                "spec.ingress.0.from.0",
                json!({ "ipBlock": {} }),
                "spec.ingress[0].from[0].ipBlock.cidr",
                "is missing",
            ),
            (
                "spec.ingress.0.from.0",
                json!({ "ipBlock": { "cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"] } }),
                "spec.ingress[0].from[0].ipBlock.except[0]",
                "not a part of",
            ),
            (
                "spec.ingress.0.from.0",
                json!({ "ipBlock": { "cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"] } }),
                "spec.ingress[0].from[0].ipBlock.except[0]",
                "not a part of",
            ),
            (
                "spec.ingress.0.from.0.namespaceSelector",
                json!({ "matchLabels": { "a b": "c" } }),
                "spec.ingress[0].from[0].namespaceSelector.matchLabels.a b",
                "not a label key",
            ),
            ("spec.ingress.0.to", json!([]), "spec.ingress[0].to", "is not a field"),
            ("spec.egress", json!([{ "to": [{}] }]), "spec.egress[0].to[0]", "selects nothing"),
            (
                "spec.egress",
                json!([{ "ports": [{ "port": 1, "endPort": 0 }] }]),
                "spec.egress[0].ports[0].endPort",
                "endPort requires a port",
            ),
            ("spec.egress", json!([{ "from": [] }]), "spec.egress[0].from", "is not a field"),
            ("spec.podSelectors", json!({}), "spec.podSelectors", "is not a field"),
        ],
    );
    wrong(
        pod(),
        &[
            ("metadata.name", json!("A"), "metadata.name", "not a subdomain name"),
            ("spec.hostname", json!("a.b"), "spec.hostname", "not a DNS label"),
            ("spec.subdomain", json!("a_b"), "spec.subdomain", "not a DNS label"),
            ("spec.containers.0.name", json!(""), "spec.containers[0].name", "not a DNS label"),
            ("spec.containers.0.img", json!("nginx"), "spec.containers[0].img", "is not a known field"),
            (
                "spec.containers.0.ports.0.containerPort",
                json!(0),
                "spec.containers[0].ports[0].containerPort",
                "between 1 and 65535",
            ),
            (
                "spec.containers.0.ports.0.containerPort",
                json!(70_000),
                "spec.containers[0].ports[0].containerPort",
                "invalid value",
            ),
            (
                "spec.containers.0.ports.0.name",
                json!("Http"),
                "spec.containers[0].ports[0].name",
                "not a port name",
            ),
            (
                "spec.containers.0.ports.0.protocol",
                json!("udp"),
                "spec.containers[0].ports[0].protocol",
                "unknown variant",
            ),
            (
                "spec.initContainers",
                json!([{ "name": "i", "restartPolicy": "Always", "ports": [{ "name": "a", "containerPort": 1 }] }]),
                "spec.initContainers",
                "list their ports in spec.containers",
            ),
            (
                "spec.containers.0.ports",
                json!([{ "name": "a", "containerPort": 1 }, { "name": "a", "containerPort": 2 }]),
                "spec.containers[0].ports[1].name",
                "is a duplicate",
            ),
            ("spec.hostNetworks", json!(true), "spec.hostNetworks", "is not a known field"),
            ("status.podIP", json!("10.0.0.0/8"), "status.podIP", "invalid IP address"),
            ("status.podIP", json!("127.0.0.1"), "status.podIPs[0].ip", "not the address of one host"),
            ("status.podIPs", json!([{ "ip": "10.0.0.2" }]), "status.podIP", "not the first of podIPs"),
            (
                "status.podIPs",
                json!([{ "ip": "10.0.0.1" }, { "ip": "10.0.0.2" }]),
                "status.podIPs",
                "one IPv4 and one IPv6",
            ),
            ("status.podIPs", json!([{}]), "status.podIPs[0].ip", "is missing"),
            ("status.phase", json!("Done"), "status.phase", "unknown variant"),
            ("status.conditions", json!([{ "type": "Ready" }]), "status.conditions[0].status", "is missing"),
        ],
    );
    wrong(
        slice(),
        &[
            (
                "metadata.labels.kubernetes|io/service-name",
                json!("a b"),
                "metadata.labels.kubernetes.io/service-name",
                "not a label value",
            ),
            ("addressType", json!(null), "addressType", "is missing"),
            ("addressType", json!("FQDN"), "addressType", "unknown variant"),
            ("addressType", json!("IPv6"), "endpoints[0].addresses[0]", "not of the slice's addressType"),
            ("endpoints.0.addresses", json!([]), "endpoints[0].addresses", "between 1 and 100"),
            (
                "endpoints.0.addresses",
                json!(["169.254.0.1"]),
                "endpoints[0].addresses[0]",
                "not the address of one host",
            ),
            ("endpoints.0.addresses", json!(["a"]), "endpoints[0].addresses[0]", "invalid IP address"),
            ("endpoints.0.hostname", json!("A"), "endpoints[0].hostname", "not a DNS label"),
            (
                "endpoints.0.hints",
                json!({ "forZones": [{ "name": "a b" }] }),
                "endpoints[0].hints.forZones",
                "not a label value",
            ),
            (
                "endpoints.0.hints",
                json!({ "forNodes": vec![json!({ "name": "h1" }); 9] }),
                "endpoints[0].hints.forNodes",
                "exceed the limit of 8",
            ),
            ("endpoints.0.conditions.ready", json!("true"), "endpoints[0].conditions.ready", "invalid type"),
            (
                "endpoints.0.conditions.dead",
                json!(true),
                "endpoints[0].conditions.dead",
                "is not a known field",
            ),
            ("endpoints.0.target", json!({ "kind": "Pod" }), "endpoints[0].target", "is not a known field"),
            ("ports.0.port", json!(0), "ports[0].port", "between 1 and 65535"),
            ("ports.0.name", json!("a b"), "ports[0].name", "not a DNS label"),
            ("ports.1.name", json!("http"), "ports[1].name", "is a duplicate"),
            ("ports.0.protocol", json!("X"), "ports[0].protocol", "unknown variant"),
        ],
    );
    wrong(
        namespace(),
        &[
            ("metadata.name", json!("a.b"), "metadata.name", "not a DNS label"),
            ("metadata.namespace", json!("x"), "metadata.namespace", "has no namespace"),
            ("metadata.labels.team", json!("-"), "metadata.labels.team", "not a label value"),
            ("specs", json!({ "finalizers": ["kubernetes"] }), "specs", "is not a known field"),
        ],
    );
    assert_eq!(
        read(json!("text"), None, Validation::Strict).unwrap_err()[0].reason,
        "not an object with apiVersion, kind and metadata"
    );
}

/// Checks rows of a path, its new value, the named field, and a part of the reason.
fn wrong(good: Value, rows: &[(&str, Value, &str, &str)]) {
    accepted(good.clone());
    for (place, value, field, reason) in rows {
        let mut manifest = good.clone();
        set(&mut manifest, place, value.clone());
        let problems = read(manifest, None, Validation::Strict).expect_err(&format!("{place} {value}"));
        let named = problems.iter().any(|it| it.field == *field && it.reason.contains(reason));
        assert!(named, "{place} {value}: {problems:?}");
    }
}

/// A sequence in place of an object was read by position: `[]` became a rule or a peer without requirements.
#[test]
fn list_in_place_of_an_object_is_refused() {
    let peer = |peer: Value| json!([{ "from": [peer] }]);
    let rows = [
        (policy(), "spec", json!([]), "spec"),
        (policy(), "spec.podSelector", json!([]), "spec.podSelector"),
        (policy(), "spec.podSelector", json!([{ "app": "db" }]), "spec.podSelector"),
        (
            policy(),
            "spec.podSelector",
            json!({ "matchExpressions": [["app", "Exists", []]] }),
            "spec.podSelector.matchExpressions[0]",
        ),
        (policy(), "spec.ingress", json!([[]]), "spec.ingress[0]"),
        (policy(), "spec.ingress", json!([[[], []]]), "spec.ingress[0]"),
        (policy(), "spec.egress", json!([[]]), "spec.egress[0]"),
        (policy(), "spec.ingress", peer(json!([])), "spec.ingress[0].from[0]"),
        (policy(), "spec.ingress", peer(json!([{}])), "spec.ingress[0].from[0]"),
        (policy(), "spec.ingress", peer(json!({ "podSelector": [] })), "spec.ingress[0].from[0].podSelector"),
        (
            policy(),
            "spec.ingress",
            peer(json!({ "namespaceSelector": [] })),
            "spec.ingress[0].from[0].namespaceSelector",
        ),
        (
            policy(),
            "spec.ingress",
            peer(json!({ "ipBlock": ["10.0.0.0/8"] })),
            "spec.ingress[0].from[0].ipBlock",
        ),
        (policy(), "spec.ingress", json!([{ "ports": [["UDP", 53]] }]), "spec.ingress[0].ports[0]"),
        (service(), "spec", json!([]), "spec"),
        (service(), "spec.ports", json!([["http", "TCP", null, 80]]), "spec.ports[0]"),
        (service(), "spec.sessionAffinityConfig", json!([]), "spec.sessionAffinityConfig"),
        (slice(), "endpoints", json!([[["192.0.2.1"]]]), "endpoints[0]"),
        (slice(), "endpoints.0.conditions", json!([false]), "endpoints[0].conditions"),
        (slice(), "ports", json!([["http", "TCP", 80]]), "ports[0]"),
        (pod(), "spec.containers", json!([["c", []]]), "spec.containers[0]"),
        (pod(), "spec.containers.0.ports", json!([["http", 80]]), "spec.containers[0].ports[0]"),
        (pod(), "status", json!(["10.0.0.1"]), "status"),
        (pod(), "status.podIPs", json!([["10.0.0.1"]]), "status.podIPs[0]"),
    ];
    for (good, place, value, field) in rows {
        let mut manifest = good;
        set(&mut manifest, place, value.clone());
        for validation in [Validation::Strict, Validation::Warn, Validation::Ignore] {
            let problems = read(manifest.clone(), None, validation).expect_err(&format!("{place} {value}"));
            let expected = FieldProblem {
                field: field.to_owned(),
                reason: "invalid type: sequence, expected an object".to_owned(),
            };
            assert_eq!(problems, [expected], "{place} {value}");
        }
    }
}

#[test]
fn other_shapes_than_those_of_the_api_are_refused() {
    wrong(
        service(),
        &[
            ("spec.type", json!({ "NodePort": {} }), "spec.type", "invalid type: map, expected a string"),
            ("spec.type", json!(["NodePort"]), "spec.type", "invalid type: sequence, expected a string"),
            ("spec.ports", json!({ "port": 80 }), "spec.ports", "invalid type: map, expected a sequence"),
            ("spec.ports.0.port", json!(80.0), "spec.ports[0].port", "invalid type: floating point"),
            ("spec.selector", json!([]), "spec.selector", "invalid type: sequence, expected a map"),
            ("status", json!([]), "status", "not an object"),
        ],
    );
    wrong(
        policy(),
        &[
            ("spec.policyTypes", json!([{ "Egress": {} }]), "spec.policyTypes[0]", "expected a string"),
            ("spec.ingress", json!([null]), "spec.ingress[0]", "invalid type: null, expected an object"),
            ("spec.ingress", json!({}), "spec.ingress", "invalid type: map, expected a sequence"),
            ("spec.ingress", json!("all"), "spec.ingress", "expected a sequence"),
            ("spec.podSelector", json!("app=db"), "spec.podSelector", "expected an object"),
        ],
    );
}
