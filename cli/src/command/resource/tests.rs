use serde_json::json;

use super::*;

fn document(bytes: usize) -> Document {
    Document { file: "a.yaml".into(), line: 1, within: String::new(), value: json!("x".repeat(bytes)) }
}

#[test]
fn documents_are_split_into_requests_within_the_size_limit() {
    let parts = split((0..100).map(|_| document(20_000)).chain([document(MAX_PART_BYTES)]).collect());
    assert_eq!(parts.iter().map(Vec::len).sum::<usize>(), 101);
    assert!(parts.len() > 3);
    for part in &parts {
        let length = serde_json::to_vec(&Request::Stage { documents: part.clone() }).unwrap().len();
        assert!(length < ovl_control::MAX_REQUEST, "{length}");
    }
}

#[test]
fn kinds_accept_the_names_of_kubectl() {
    for (word, kind) in [
        ("svc", Kind::Service),
        ("Services", Kind::Service),
        ("po", Kind::Pod),
        ("netpol", Kind::NetworkPolicy),
        ("networkpolicies.networking.k8s.io", Kind::NetworkPolicy),
        ("ns", Kind::Namespace),
        ("endpointslices", Kind::EndpointSlice),
    ] {
        assert_eq!(parse_kind(word).unwrap(), kind, "{word}");
    }
    assert!(matches!(parse_kind("deployment"), Err(Error::Usage(text)) if text.contains("networkpolicies")));
    assert_eq!(Shown::parse("svc,ep").unwrap(), [Shown::Objects(Kind::Service), Shown::Endpoints]);
}

#[test]
fn results_are_worded_like_kubectl() {
    let applied = |kind, action| Applied {
        kind,
        namespace: "default".into(),
        name: "web".into(),
        action,
        before: None,
        after: None,
    };
    let all = [
        applied(Kind::Service, Action::Created),
        applied(Kind::NetworkPolicy, Action::Configured),
        applied(Kind::Pod, Action::Unchanged),
        applied(Kind::Service, Action::Deleted),
        applied(Kind::Service, Action::Absent),
    ];
    assert_eq!(
        outcome(&all, false),
        "\
service/web created
networkpolicy.networking.k8s.io/web configured
pod/web unchanged
service \"web\" deleted
service \"web\" not found
"
    );
}

fn info(kind: Kind, manifest: Value) -> ResourceInfo {
    ResourceInfo {
        kind,
        namespace: "shop".into(),
        name: "web".into(),
        created_ms: u64::MAX,
        manifest,
        endpoints: Vec::new(),
        selects: vec!["db-1".into()],
        source: None,
    }
}

#[test]
fn services_are_listed_like_kubectl() {
    let service = info(
        Kind::Service,
        json!({ "spec": {
            "type": "LoadBalancer",
            "clusterIP": "10.96.0.7",
            "selector": { "app": "web" },
            "ports": [
                { "port": 80, "nodePort": 30080, "protocol": "TCP" },
                { "port": 53, "protocol": "UDP" },
            ],
        } }),
    );
    let show = table::Show { namespaces: true, wide: true };
    assert_eq!(
        table::render(&Found::Objects(Kind::Service, vec![service]), show),
        "\
NAMESPACE  NAME  TYPE          CLUSTER-IP  EXTERNAL-IP  PORT(S)              AGE  SELECTOR  SOURCE
shop       web   LoadBalancer  10.96.0.7   <pending>    80:30080/TCP,53/UDP  0s   app=web   ovl
"
    );
}

#[test]
fn policy_is_described_with_the_pods_it_selects() {
    let policy = info(
        Kind::NetworkPolicy,
        json!({ "spec": { "podSelector": { "matchExpressions": [
            { "key": "app", "operator": "In", "values": ["db", "cache"] },
            { "key": "old", "operator": "DoesNotExist" },
        ] }, "policyTypes": ["Ingress"] } }),
    );
    let text = describe::object(&policy, None);
    assert!(text.contains("Selects:       app in (db,cache),!old"), "{text}");
    assert!(text.contains("Selected now:  db-1"), "{text}");
    assert!(text.contains("  policyTypes:\n  - Ingress"), "{text}");
}
