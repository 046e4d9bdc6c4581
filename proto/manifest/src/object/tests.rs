mod refused;

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn service() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "name": "web", "namespace": "shop" },
        "spec": { "selector": { "app": "web" }, "ports": [{ "port": 80 }] },
    })
}

fn policy() -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": { "name": "db-allow-api-only" },
        "spec": {
            "podSelector": { "matchLabels": { "app": "db" } },
            "policyTypes": ["Ingress"],
            "ingress": [{
                "from": [{ "podSelector": { "matchLabels": { "app": "api" } } }],
                "ports": [{ "port": 5432 }],
            }],
        },
    })
}

fn pod() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": "web-1" },
        "spec": { "containers": [{ "name": "c", "ports": [{ "name": "http", "containerPort": 80 }] }] },
        "status": { "podIP": "10.0.0.1" },
    })
}

fn slice() -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": { "name": "web-x", "labels": { "kubernetes.io/service-name": "web" } },
        "addressType": "IPv4",
        "endpoints": [{ "addresses": ["192.0.2.1"], "conditions": { "ready": true } }],
        "ports": [{ "name": "http", "port": 80 }],
    })
}

fn namespace() -> Value {
    json!({ "apiVersion": "v1", "kind": "Namespace", "metadata": { "name": "shop", "labels": { "team": "a" } } })
}

fn accepted(manifest: Value) -> Resource {
    read(manifest.clone(), None, Validation::Strict)
        .unwrap_or_else(|problems| panic!("{manifest}: {problems:?}"))
        .resource
}

/// Sets a value at a path, and creates the path.
fn set(manifest: &mut Value, path: &str, value: Value) {
    let mut at = manifest;
    for part in path.split('.') {
        at = match part.parse::<usize>() {
            Ok(index) => {
                if !at.is_array() {
                    *at = json!([]);
                }
                let items = at.as_array_mut().unwrap();
                while items.len() <= index {
                    items.push(json!({}));
                }
                &mut items[index]
            }
            Err(_) => {
                if !at.is_object() {
                    *at = json!({});
                }
                // A '|' represents a dot.
                at.as_object_mut().unwrap().entry(part.replace('|', ".")).or_insert(json!({}))
            }
        };
    }
    *at = value;
}

#[test]
fn nodes_keep_labels_and_addresses() {
    let node = json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": "n1", "labels": { "role": "db" } },
        "spec": { "podCIDR": "10.0.0.0/24" },
        "status": {
            "capacity": { "cpu": "2" },
            "addresses": [
                { "type": "InternalIP", "address": "192.0.2.1" },
                { "type": "Hostname", "address": "n1" },
                { "type": "ExternalIP", "address": "2001:db8::1" },
            ],
        },
    });
    let Resource::Node(found) = accepted(node.clone()) else { panic!() };
    let addresses: Vec<&str> = found.status.addresses.iter().map(|it| it.address.as_str()).collect();
    assert_eq!(addresses, ["192.0.2.1", "2001:db8::1"]);
    assert_eq!(found.metadata.labels.len(), 1);
    let mut strange = node;
    set(&mut strange, "status", json!([]));
    assert!(read(strange, None, Validation::Ignore).is_err());
}

#[test]
fn valid_manifests_are_read_and_completed() {
    let Resource::Service(service) = accepted(service()) else { panic!() };
    assert_eq!(service.spec.ports[0].target_port, Some(IntOrString::Int(80)));
    let Resource::NetworkPolicy(found) = accepted(policy()) else { panic!() };
    assert_eq!(found.metadata.namespace, "default");
    assert_eq!(found.spec.policy_types, [PolicyType::Ingress]);
    let Resource::Pod(pod) = accepted(pod()) else { panic!() };
    assert_eq!(pod.status.pod_ips.len(), 1);
    accepted(slice());
    accepted(namespace());
    // Without types, ingress is isolated, and egress if there are egress rules.
    let mut egress = policy();
    set(&mut egress, "spec.policyTypes", json!(null));
    set(&mut egress, "spec.egress", json!([{}]));
    let Resource::NetworkPolicy(found) = accepted(egress) else { panic!() };
    assert_eq!(found.spec.policy_types, [PolicyType::Ingress, PolicyType::Egress]);
}

#[test]
fn written_manifests_can_be_applied_again() {
    let mut dual = service();
    for (path, value) in [
        ("spec.type", json!("LoadBalancer")),
        ("spec.clusterIPs", json!(["10.96.0.7", "fd00::7"])),
        ("spec.ipFamilies", json!(["IPv4", "IPv6"])),
        ("spec.ports.0.nodePort", json!(30_080)),
        ("spec.sessionAffinity", json!("ClientIP")),
        ("spec.externalTrafficPolicy", json!("Local")),
        ("spec.healthCheckNodePort", json!(30_081)),
    ] {
        set(&mut dual, path, value);
    }
    let mut valueless = pod();
    set(&mut valueless, "metadata.labels", json!({ "app": "", "labels": "" }));
    set(&mut valueless, "metadata.annotations", json!({ "note": "" }));
    let mut selecting = service();
    set(&mut selecting, "spec.selector", json!({ "app": "" }));
    let mut selected = policy();
    set(&mut selected, "spec.podSelector", json!({ "matchLabels": { "app": "" } }));
    for manifest in [service(), policy(), pod(), slice(), namespace(), dual, valueless, selecting, selected] {
        let resource = accepted(manifest);
        assert_eq!(check(&resource), Ok(()));
        assert_eq!(accepted(resource.to_manifest().unwrap()), resource);
    }
}

#[test]
fn server_fields_of_another_cluster_are_ignored() {
    let mut dumped = service();
    for (path, value) in [
        ("metadata.uid", json!("7f3")),
        ("metadata.resourceVersion", json!("17")),
        ("metadata.creationTimestamp", json!("2026-01-01T00:00:00Z")),
        ("metadata.generation", json!(3)),
        ("metadata.managedFields", json!([{ "manager": "x" }])),
        ("status.loadBalancer", json!({})),
        ("spec.clusterIP", json!("")),
        ("spec.externalName", json!(null)),
    ] {
        set(&mut dumped, path, value);
    }
    assert_eq!(accepted(dumped), accepted(service()));
}

/// What MetalLB or a cloud gave, as `kubectl get -o yaml` prints it.
#[test]
fn addresses_that_another_program_gave_a_load_balancer_are_kept() {
    let mut balanced = service();
    set(&mut balanced, "spec.type", json!("LoadBalancer"));
    set(&mut balanced, "spec.loadBalancerClass", json!("metallb.io/l2"));
    let ingress = json!([
        { "ip": "203.0.113.7", "ipMode": "VIP", "ports": [{ "port": 80, "protocol": "TCP" }] },
        { "ip": "2001:db8::7" },
        { "ip": "203.0.113.8", "ipMode": "Proxy" },
        { "hostname": "lb.example.org" },
        { "ip": "none" },
    ]);
    set(&mut balanced, "status", json!({ "loadBalancer": { "ingress": ingress }, "conditions": [] }));
    let addresses = |manifest: Value| {
        let Resource::Service(found) = accepted(manifest) else { panic!() };
        found.load_balancer_addresses().map(|address| address.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(addresses(balanced.clone()), ["203.0.113.7", "2001:db8::7"]);
    set(&mut balanced, "spec.loadBalancerClass", json!("not a class"));
    assert_eq!(
        read(balanced.clone(), None, Validation::Strict).unwrap_err()[0].field,
        "spec.loadBalancerClass"
    );
    let spec = balanced["spec"].as_object_mut().unwrap();
    spec.remove("loadBalancerClass");
    spec.insert("type".to_owned(), json!("NodePort"));
    assert_eq!(addresses(balanced), [""; 0]);
}

#[test]
fn the_uid_of_a_pod_is_kept() {
    let uid = |manifest: Value| accepted(manifest).meta().uid.clone();
    let mut dumped = pod();
    set(&mut dumped, "metadata.uid", json!("7f3-a"));
    assert_eq!(uid(dumped.clone()), "7f3-a");
    assert_eq!(accepted(dumped.clone()).to_manifest().unwrap()["metadata"]["uid"], json!("7f3-a"));
    // A mirror Pod stands for a static pod, whose uid its runtime names.
    set(&mut dumped, "metadata.annotations", json!({ "kubernetes.io/config.mirror": "0b1" }));
    assert_eq!(uid(dumped), "0b1");
    let mut resource = accepted(service());
    resource.meta_mut().uid = "7f3".to_owned();
    assert!(check(&resource).is_err());
    let mut resource = accepted(pod());
    resource.meta_mut().uid = "a\nb".to_owned();
    assert!(check(&resource).is_err());
}

/// Charts and exports write them, such as `nodePort: 0`.
#[test]
fn values_that_the_api_server_takes_for_absent_are_absent() {
    let mut balanced = service();
    set(&mut balanced, "spec.type", json!("LoadBalancer"));
    for good in [service(), balanced] {
        for (place, value) in [
            ("spec.clusterIP", json!("")),
            ("spec.sessionAffinity", json!("")),
            ("spec.externalTrafficPolicy", json!("")),
            ("spec.externalName", json!("")),
            ("spec.loadBalancerIP", json!("")),
            ("spec.loadBalancerClass", json!("")),
            ("spec.loadBalancerSourceRanges", json!([])),
            ("spec.healthCheckNodePort", json!(0)),
            ("spec.externalIPs", json!([])),
            ("spec.ipFamilies", json!([])),
            ("spec.publishNotReadyAddresses", json!(false)),
            ("spec.sessionAffinityConfig", json!({})),
            ("spec.sessionAffinityConfig", json!({ "clientIP": { "timeoutSeconds": 10800 } })),
            ("spec.ports.0.nodePort", json!(0)),
            ("spec.ports.0.targetPort", json!(0)),
            ("spec.ports.0.targetPort", json!("")),
            ("spec.ports.0.protocol", json!("")),
            ("spec.ports.0.name", json!("")),
            ("metadata.namespace", json!("shop")),
            ("metadata.ownerReferences", json!([])),
        ] {
            let mut manifest = good.clone();
            set(&mut manifest, place, value.clone());
            let found = read(manifest, None, Validation::Strict);
            let found = found.unwrap_or_else(|problems| panic!("{place} {value}: {problems:?}"));
            assert_eq!(found.resource, accepted(good.clone()), "{place} {value}");
            assert_eq!((found.warnings, found.ignored), (vec![], vec![]), "{place} {value}");
        }
    }
    let mut plain = service();
    set(&mut plain, "spec.type", json!(""));
    assert_eq!(accepted(plain), accepted(service()));
    let mut bare = pod();
    set(&mut bare, "status", json!(null));
    let mut empty = bare.clone();
    for (place, value) in [
        ("status.podIP", json!("")),
        ("status.podIPs", json!([])),
        ("status.phase", json!("")),
        ("spec.hostname", json!("")),
        ("spec.containers.0.ports.0.protocol", json!("")),
        ("spec.containers.0.ports.0.hostPort", json!(0)),
    ] {
        set(&mut empty, place, value);
    }
    assert_eq!(accepted(empty), accepted(bare));
    let mut twice = policy();
    set(&mut twice, "spec.policyTypes", json!(["Ingress", "Ingress"]));
    assert_eq!(accepted(twice), accepted(policy()));
}

/// What the API server lets in must not be refused: a pod without labels is not isolated, and a policy that is not there
/// forbids nothing.
#[test]
fn names_and_sizes_that_the_api_server_accepts_are_accepted() {
    let (label, subdomain) = ("x".repeat(95), format!("{}.{}", "a".repeat(126), "b".repeat(126)));
    for mut manifest in [pod(), policy(), slice()] {
        for name in [&label, &subdomain] {
            set(&mut manifest, "metadata.name", json!(name));
            assert_eq!(accepted(manifest.clone()).meta().name, *name);
        }
        set(&mut manifest, "metadata.name", json!(format!("{subdomain}b")));
        assert_eq!(read(manifest, None, Validation::Strict).unwrap_err()[0].field, "metadata.name");
    }
    let mut digit = service();
    set(&mut digit, "metadata.name", json!("1st"));
    set(&mut digit, "spec.type", json!("NodePort"));
    set(&mut digit, "spec.ports.0.nodePort", json!(20_000));
    set(&mut digit, "metadata.annotations", json!({ "a": "x".repeat(200 << 10) }));
    set(&mut digit, "metadata.labels", (0..100).map(|n| (format!("l{n}"), json!("x"))).collect());
    assert_eq!(accepted(digit).name(), ovl_proto::resource::Name::new("shop", "1st"));
    let mut external = service();
    set(
        &mut external,
        "spec",
        json!({ "type": "ExternalName", "externalName": format!("{label}.example.org") }),
    );
    accepted(external);
    let ports = |key: &str, count: usize| -> Value {
        (1..=count).map(|n| json!({ "name": format!("p{n}"), key: n })).collect()
    };
    let mut wide = slice();
    set(&mut wide, "ports", ports("port", 20_000));
    accepted(wide.clone());
    set(&mut wide, "ports", ports("port", 20_001));
    assert_eq!(read(wide, None, Validation::Strict).unwrap_err()[0].reason, "exceed the limit of 20000");
    let mut many = pod();
    set(&mut many, "spec.containers", json!([{ "name": "a", "ports": ports("containerPort", 200) }]));
    accepted(many);
}

#[test]
fn fields_that_the_api_accepts_without_effect_are_removed_with_a_warning() {
    for (good, place, value) in [
        (json!({ "ports": [{ "port": 80 }] }), "spec.externalName", json!("a.example")),
        (
            json!({ "type": "ExternalName", "externalName": "a.example" }),
            "spec.externalIPs",
            json!(["10.0.0.1"]),
        ),
    ] {
        let mut manifest = service();
        set(&mut manifest, "spec", good);
        let expected = accepted(manifest.clone());
        set(&mut manifest, place, value);
        let found = read(manifest, None, Validation::Strict).unwrap();
        assert_eq!(found.resource, expected);
        assert_eq!(found.warnings.iter().map(|it| it.field.as_str()).collect::<Vec<_>>(), [place]);
    }
}

#[test]
fn list_is_split_into_its_items() {
    let list = json!({ "apiVersion": "v1", "kind": "List", "items": [service(), policy()] });
    assert_eq!(paths(list), ["items[0].", "items[1]."]);
    assert_eq!(items(json!({ "apiVersion": "v1", "kind": "ServiceList", "items": [] })), []);
    assert_eq!(items(json!({ "apiVersion": "v1", "kind": "List", "items": null })), []);
    assert_eq!(items(service()), [Item { path: String::new(), index: None, value: service() }]);
    let nested = json!({ "apiVersion": "v1", "kind": "List", "items": [service(), {
        "apiVersion": "v1", "kind": "List", "items": [policy()],
    }] });
    assert_eq!(paths(nested), ["items[0].", "items[1].items[0]."]);
}

fn paths(list: Value) -> Vec<String> {
    items(list).into_iter().map(|item| item.path).collect()
}

/// `kubectl get --raw` prints lists whose items have no kind.
#[test]
fn items_of_a_list_of_one_kind_need_no_kind() {
    let mut bare = service();
    bare.as_object_mut().unwrap().retain(|key, _| key != "kind" && key != "apiVersion");
    let list =
        json!({ "apiVersion": "v1", "kind": "ServiceList", "metadata": {}, "items": [bare, service()] });
    let values: Vec<Value> = items(list).into_iter().map(|item| item.value).collect();
    assert_eq!(values, [service(), service()]);
}

#[test]
fn what_is_no_list_is_not_an_empty_one() {
    for (list, field, reason) in [
        (json!({ "apiVersion": "v1", "kind": "List" }), "items", "is missing or not a list"),
        (json!({ "apiVersion": "v1", "kind": "List", "items": {} }), "items", "is missing or not a list"),
        (json!({ "apiVersion": "v1", "kind": "ServiceList" }), "items", "is missing or not a list"),
        (
            json!({ "apiVersion": "v9", "kind": "NetworkPolicyList", "items": [] }),
            "apiVersion",
            "v9 NetworkPolicyList is not supported: use networking.k8s.io/v1 NetworkPolicy",
        ),
        (json!({ "kind": "ServiceList", "items": [] }), "apiVersion", "is missing"),
        (json!({ "apiVersion": "v1", "kind": "AllowList", "items": [] }), "kind", "v1 has no kind AllowList"),
    ] {
        let found = items(list.clone());
        assert_eq!(found.len(), 1, "{list}");
        let expected = FieldProblem { field: field.to_owned(), reason: reason.to_owned() };
        assert_eq!(identify(&found[0].value, None), Err(vec![expected]), "{list}");
    }
    let allowed = json!({ "apiVersion": "example.org/v1", "kind": "AllowList", "metadata": { "name": "x" } });
    let foreign = Identity::Foreign { kind: "example.org/v1 AllowList".to_owned(), is_policy: false };
    assert_eq!(identify(&items(allowed)[0].value, None), Ok(foreign));
}

#[test]
fn kinds_that_ovl_does_not_act_on_are_told_from_typing_errors() {
    let identity =
        |version: &str, kind: &str| identify(&json!({ "apiVersion": version, "kind": kind }), None);
    for (version, kind) in [
        ("apps/v1", "Deployment"),
        ("v1", "ConfigMap"),
        ("v1", "ConfigMapList"),
        ("v1", "Endpoints"),
        ("apiextensions.k8s.io/v1", "CustomResourceDefinition"),
        ("networking.k8s.io/v1", "Ingress"),
        ("serving.knative.dev/v1", "Service"),
        ("example.org/v1", "Namespace"),
        ("policy/v1", "PodDisruptionBudget"),
    ] {
        let expected = Identity::Foreign { kind: format!("{version} {kind}"), is_policy: false };
        assert_eq!(identity(version, kind), Ok(expected));
    }
    for (version, kind) in [
        ("cilium.io/v2", "CiliumNetworkPolicy"),
        ("crd.projectcalico.org/v1", "NetworkPolicy"),
        ("policy.networking.k8s.io/v1alpha1", "AdminNetworkPolicy"),
    ] {
        let expected = Identity::Foreign { kind: format!("{version} {kind}"), is_policy: true };
        assert_eq!(identity(version, kind), Ok(expected));
    }
    for (version, kind, field, reason) in [
        ("extensions/v1beta1", "NetworkPolicy", "apiVersion", "use networking.k8s.io/v1 NetworkPolicy"),
        ("v1", "NetworkPolicy", "apiVersion", "use networking.k8s.io/v1 NetworkPolicy"),
        ("discovery.k8s.io/v1beta1", "EndpointSlice", "apiVersion", "use discovery.k8s.io/v1 EndpointSlice"),
        ("v1", "service", "kind", "use v1 Service"),
        ("networking.k8s.io/v1", "NetworkPolicies", "kind", "use networking.k8s.io/v1 NetworkPolicy"),
        ("v1", "Servce", "kind", "v1 has no kind Servce"),
        ("networking.k8s.io/v1", "NetworkPolcy", "kind", "has no kind NetworkPolcy"),
        ("v1", "Deployment", "kind", "v1 has no kind Deployment"),
    ] {
        let problems = identity(version, kind).unwrap_err();
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].field, field, "{version} {kind}");
        assert!(problems[0].reason.contains(reason), "{version} {kind}: {problems:?}");
    }
}

#[test]
fn namespace_is_the_manifests_own_or_the_requested_one() {
    let name = |manifest: Value, namespace| {
        identify(&manifest, namespace).map(|identity| match identity {
            Identity::Object(key) => key.name.to_string(),
            Identity::Foreign { kind, .. } => panic!("{kind}"),
        })
    };
    assert_eq!(name(policy(), None).unwrap(), "default/db-allow-api-only");
    assert_eq!(name(policy(), Some("shop")).unwrap(), "shop/db-allow-api-only");
    assert_eq!(name(service(), Some("shop")).unwrap(), "shop/web");
    assert_eq!(name(service(), Some("other")).unwrap_err()[0].field, "metadata.namespace");
    assert_eq!(name(namespace(), Some("other")).unwrap(), "shop");
    // A value of another type is not an absent one: `delete` would take the object of another namespace.
    for (field, value) in [("namespace", json!(5)), ("namespace", json!(["shop"])), ("name", json!(5))] {
        let mut manifest = policy();
        set(&mut manifest, &format!("metadata.{field}"), value);
        let problems = name(manifest, None).unwrap_err();
        let expected = format!("metadata.{field}: is not a string: put it in quotation marks");
        assert_eq!(
            problems.iter().map(|it| format!("{}: {}", it.field, it.reason)).collect::<Vec<_>>(),
            [expected]
        );
    }
}

/// Kubernetes reads null as the zero value of the map's type. Without the entry, a selector would select everything.
#[test]
fn null_as_the_value_of_a_label_is_the_empty_string() {
    let mut manifest = policy();
    set(&mut manifest, "spec.podSelector.matchLabels.app", json!(null));
    set(&mut manifest, "spec.ingress.0.from.0.podSelector.matchLabels", json!({ "app": null }));
    set(&mut manifest, "metadata.labels", json!({ "labels": null }));
    let Resource::NetworkPolicy(found) = accepted(manifest) else { panic!() };
    let valueless = |key: &str| ovl_proto::resource::Labels::from([(key.to_owned(), String::new())]);
    assert_eq!(found.metadata.labels, valueless("labels"));
    assert_eq!(found.spec.pod_selector.match_labels, valueless("app"));
    let peer = found.spec.ingress[0].from[0].pod_selector.clone().unwrap();
    assert_eq!(peer.match_labels, valueless("app"));
    let mut manifest = service();
    set(&mut manifest, "spec.selector.app", json!(null));
    let Resource::Service(found) = accepted(manifest) else { panic!() };
    assert_eq!(found.spec.selector, valueless("app"));
}

#[test]
fn validation_decides_about_unknown_fields() {
    let mut manifest = pod();
    set(&mut manifest, "spec.containers.0.imgae", json!("nginx"));
    set(&mut manifest, "spec.colour", json!("red"));
    assert_eq!(read(manifest.clone(), None, Validation::Strict).unwrap_err().len(), 2);
    let found = read(manifest.clone(), None, Validation::Warn).unwrap();
    assert_eq!(found.resource, accepted(pod()));
    let fields: Vec<&str> = found.warnings.iter().map(|it| it.field.as_str()).collect();
    assert_eq!(fields, ["spec.colour", "spec.containers[0].imgae"]);
    assert_eq!(read(manifest.clone(), None, Validation::Ignore).unwrap().warnings, []);
    set(&mut manifest, "spec.hostname", json!("A"));
    assert!(read(manifest, None, Validation::Ignore).is_err());
    // A field that would change what ovl does is at least a warning.
    let mut with_sidecar = pod();
    set(
        &mut with_sidecar,
        "spec.initContainers",
        json!([{ "name": "s", "restartPolicy": "Always", "ports": [{ "name": "a", "containerPort": 1 }] }]),
    );
    assert_eq!(read(with_sidecar, None, Validation::Ignore).unwrap().warnings.len(), 1);
}

/// The fields of an ordinary Pod, as `kubectl get -o yaml` prints it.
#[test]
fn fields_that_do_not_change_what_ovl_does_are_ignored() {
    let mut full = pod();
    for (path, value) in [
        ("metadata.generateName", json!("web-")),
        ("metadata.ownerReferences", json!([{ "kind": "ReplicaSet", "name": "web" }])),
        ("spec.containers.0.image", json!("registry.example/web:1")),
        ("spec.containers.0.resources", json!({})),
        ("spec.containers.0.ports.0.hostPort", json!(80)),
        ("spec.containers.0.ports.0.hostIP", json!("")),
        ("spec.containers.0.volumeMounts", json!([{ "name": "v", "mountPath": "/v" }])),
        (
            "spec.initContainers",
            json!([{ "name": "i", "image": "i", "ports": [{ "name": "a", "containerPort": 1 }] }]),
        ),
        ("spec.hostNetwork", json!(false)),
        ("spec.nodeName", json!("h1")),
        ("spec.volumes", json!([{ "name": "v", "emptyDir": {} }])),
        ("status.phase", json!("Running")),
        (
            "status.conditions",
            json!([{ "type": "Ready", "status": "True", "lastProbeTime": null, "reason": "r" }]),
        ),
        ("status.qosClass", json!("Burstable")),
        ("status.containerStatuses", json!([{ "name": "c", "ready": true }])),
    ] {
        set(&mut full, path, value);
    }
    let found = read(full, None, Validation::Strict).unwrap();
    assert_eq!(found.warnings, []);
    let fields: Vec<&str> = found.ignored.iter().map(|it| it.field.as_str()).collect();
    assert_eq!(
        fields,
        [
            "metadata.ownerReferences",
            "spec.containers[0].image",
            "spec.containers[0].ports[0].hostPort",
            "spec.containers[0].volumeMounts",
            "spec.initContainers",
            "spec.nodeName",
            "spec.volumes",
        ]
    );
    assert_eq!(found.ignored[1].reason, "ovl runs no containers");
    assert_eq!(without_indices(fields[2]), "spec.containers[].ports[].hostPort");

    let mut full = slice();
    for (path, value) in [
        ("metadata.generateName", json!("web-")),
        ("metadata.ownerReferences", json!([{ "kind": "Service", "name": "web" }])),
        ("endpoints.0.targetRef", json!({ "kind": "Pod", "name": "web-1" })),
        ("endpoints.0.zone", json!("a")),
    ] {
        set(&mut full, path, value);
    }
    let found = read(full, None, Validation::Strict).unwrap();
    let fields: Vec<&str> = found.ignored.iter().map(|it| it.field.as_str()).collect();
    assert_eq!(fields, ["metadata.ownerReferences"]);

    let mut full = namespace();
    set(&mut full, "spec.finalizers", json!(["kubernetes"]));
    set(&mut full, "status.phase", json!("Active"));
    assert_eq!(read(full, None, Validation::Strict).unwrap().ignored.len(), 1);
}

#[test]
fn fields_whose_loss_takes_a_protection_away_are_refused_always() {
    let annotation = service::SOURCE_RANGES_ANNOTATION;
    let mut balanced = service();
    set(&mut balanced, "spec.type", json!("LoadBalancer"));
    for (good, place, value, field) in [
        (
            &balanced,
            format!("metadata.annotations.{}", annotation.replace('.', "|")).as_str(),
            json!("203.0.113.0/24, everywhere"),
            format!("metadata.annotations.{annotation}").as_str(),
        ),
        (&service(), "$patch", json!("delete"), "$patch"),
        (&service(), "spec.$retainKeys", json!(["ports"]), "spec.$retainKeys"),
        (&service(), "spec.ports.0.$patch", json!("replace"), "spec.ports[0].$patch"),
        (&policy(), "spec.ingress", json!([{ "form": [{ "podSelector": {} }] }]), "spec.ingress[0].form"),
        (
            &policy(),
            "spec.ingress.0.from.0.podSelector.matchLabel",
            json!({ "app": "api" }),
            "spec.ingress[0].from[0].podSelector.matchLabel",
        ),
    ] {
        let mut manifest = good.clone();
        set(&mut manifest, place, value.clone());
        for validation in [Validation::Strict, Validation::Warn, Validation::Ignore] {
            let problems = read(manifest.clone(), None, validation).expect_err(place);
            let fields: Vec<_> = problems.iter().map(|problem| problem.field.as_str()).collect();
            assert_eq!(fields, [field], "{place} {value}: {problems:?}");
        }
    }
}

#[test]
fn source_ranges_are_in_the_specification_or_in_an_annotation() {
    let annotation = format!("metadata.annotations.{}", service::SOURCE_RANGES_ANNOTATION.replace('.', "|"));
    let ranges = |given: Value, annotated: Value| -> Vec<String> {
        let mut manifest = service();
        set(&mut manifest, "spec.type", json!("LoadBalancer"));
        set(&mut manifest, "spec.loadBalancerSourceRanges", given);
        set(&mut manifest, &annotation, annotated);
        let Resource::Service(found) = accepted(manifest) else { panic!() };
        found.spec.load_balancer_source_ranges.iter().map(ToString::to_string).collect()
    };
    assert_eq!(
        ranges(json!(["203.0.113.7/24", "2001:db8::/32"]), json!("192.0.2.0/24")),
        ["203.0.113.0/24", "2001:db8::/32"]
    );
    assert_eq!(ranges(json!([]), json!("203.0.113.0/24, 192.0.2.0/28")), ["203.0.113.0/24", "192.0.2.0/28"]);
    assert!(ranges(json!([]), json!("")).is_empty());
    // Other Services have no addresses of a LoadBalancer.
    let mut other = service();
    set(&mut other, &annotation, json!("203.0.113.0/24"));
    let Resource::Service(found) = accepted(other) else { panic!() };
    assert!(found.spec.load_balancer_source_ranges.is_empty());
}

#[test]
fn status_of_a_pod_is_read_as_far_as_it_counts() {
    let ready = |status: Value, deletion: Value| {
        let mut manifest = pod();
        set(&mut manifest, "status", status);
        set(&mut manifest, "metadata.deletionTimestamp", deletion);
        let Resource::Pod(pod) = read(manifest, None, Validation::Warn).unwrap().resource else { panic!() };
        assert_eq!(accepted(Resource::Pod(pod.clone()).to_manifest().unwrap()), Resource::Pod(pod.clone()));
        (pod.is_ready(), pod.is_finished())
    };
    let conditions = |status: &str| {
        json!({ "phase": "Running", "conditions": [
            { "type": "PodScheduled", "status": "True" },
            { "type": "Ready", "status": status, "reason": "x", "lastTransitionTime": "2026-01-01T00:00:00Z" },
        ] })
    };
    let none = || json!(null);
    assert_eq!(ready(json!({}), none()), (true, false));
    assert_eq!(ready(conditions("True"), none()), (true, false));
    assert_eq!(ready(conditions("False"), none()), (false, false));
    assert_eq!(ready(json!({ "phase": "Pending" }), none()), (false, false));
    assert_eq!(ready(json!({ "phase": "Failed" }), none()), (false, true));
    assert_eq!(ready(json!({ "phase": "Succeeded" }), none()), (false, true));
    assert_eq!(ready(conditions("True"), json!("2026-01-01T00:00:00Z")), (false, false));
    assert_eq!(ready(conditions("True"), json!("")), (true, false));
}

#[test]
fn all_problems_of_a_manifest_are_reported() {
    let mut manifest = service();
    set(&mut manifest, "metadata.name", json!("Web"));
    set(&mut manifest, "spec.ports.0.port", json!(0));
    set(&mut manifest, "spec.clusterIPs", json!(["127.0.0.1"]));
    set(&mut manifest, "spec.unknown", json!(1));
    assert_eq!(read(manifest, None, Validation::Strict).unwrap_err().len(), 4);
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-1..70_000_i64).prop_map(Value::from),
        "[a-z0-9./:-]{0,8}".prop_map(Value::from),
        prop_oneof!["None", "10.96.0.7", "fd00::7", "IPv4", "TCP", "LoadBalancer", "Local", "In"]
            .prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::btree_map("[a-z]{1,4}", inner, 0..3)
                .prop_map(|fields| Value::Object(fields.into_iter().collect())),
        ]
    })
}

fn places(value: &Value, at: String, all: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            fields
                .iter()
                .for_each(|(key, value)| places(value, format!("{at}/{}", key.replace('/', "~1")), all));
        }
        Value::Array(items) => {
            items.iter().enumerate().for_each(|(n, value)| places(value, format!("{at}/{n}"), all));
        }
        _ => {}
    }
    all.push(at);
}

proptest! {
    #[test]
    fn accepted_arbitrary_manifests_round_trip(
        which in 0..5_usize,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any_json()), 1..4),
        validation in prop_oneof![Just(Validation::Strict), Just(Validation::Warn), Just(Validation::Ignore)],
    ) {
        let mut manifest = [service(), policy(), pod(), slice(), namespace()][which].clone();
        for (index, value) in changes {
            let mut all = Vec::new();
            places(&manifest, String::new(), &mut all);
            let place: &String = index.get(&all);
            *manifest.pointer_mut(place).unwrap() = value;
        }
        if let Ok(found) = read(manifest, None, validation) {
            prop_assert_eq!(check(&found.resource), Ok(()));
            prop_assert_eq!(accepted(found.resource.to_manifest().unwrap()), found.resource);
        }
    }
}
