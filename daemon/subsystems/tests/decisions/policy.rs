//! Tests of network policies: the tables agree with the explanation, and single changes with a full plan.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use ovl_cluster::view::View;
use ovl_dataplane::nft::{Element, Table};
use ovl_dataplane::op::{NftOp, Op};
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::{EndpointId, NetworkId};
use ovl_proto::object::Mode;
use ovl_proto::record::Signature;
use ovl_proto::resource::{
    ClusterEgressRule, ClusterIngressRule, ClusterNetworkPolicy, ClusterPeer, ClusterPolicySpec, ClusterPort,
    ClusterPorts, ClusterProtocol, Container, ContainerPort, EgressRule, IngressRule, IntOrString, IpBlock,
    LabelSelector, Labels, Meta, Name, Namespace, NamespacedPod, NetworkPolicy, NodeAddress, NodeObject,
    NodeStatus, Operator, Pod, PodSpec, PolicyPeer, PolicyPort, PolicySpec, PolicySubject, PolicyType,
    PortRange, Protocol, Requirement, Resource, RuleAction, Tier,
};
use ovl_proto::table::{Endpoint, Entry, Key, PodIdentity};
use ovl_proto::wire::fields::Unknown;
use ovl_subsystems::local::Local;
use ovl_subsystems::policy::admitted::{Admitted, AdmittedAt};
use ovl_subsystems::policy::explain::{ConnectionEnd, Side, explain};
use ovl_subsystems::policy::names::NameKey;
use ovl_subsystems::policy::resolver::ResolverPeer;
use ovl_subsystems::policy::{Policies, PolicyLedger, part, protocol_number};
use ovl_zone::NamePattern;
use proptest::prelude::*;

use super::nft::{Packet, Told, passes};
use super::world::{NET, id, net, switched};

/// Patterns of domain names.
const ONE: &str = "www.ovl.test";
const ALL: &str = "*.ovl.test";

fn none(admitted: &Admitted) -> AdmittedAt<'_> {
    AdmittedAt { admitted, now: Duration::ZERO }
}

fn labels(all: &[(&str, &str)]) -> Labels {
    all.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn selector(all: &[(&str, &str)]) -> LabelSelector {
    LabelSelector { match_labels: labels(all), match_expressions: Vec::new(), unknown: Unknown::default() }
}

fn meta(namespace: &str, name: &str, all: Labels) -> Meta {
    Meta { name: name.to_owned(), namespace: namespace.to_owned(), labels: all, ..Meta::default() }
}

fn policy(namespace: &str, name: &str, spec: PolicySpec) -> Resource {
    Resource::NetworkPolicy(NetworkPolicy {
        metadata: meta(namespace, name, Labels::new()),
        spec,
        unknown: Unknown::default(),
    })
}

/// Returns an endpoint with the address 10.9.0.n, of the host that holds its block: h1 to h3.
fn endpoint(n: u8, namespace: &str, all: Labels) -> Endpoint {
    Endpoint {
        id: EndpointId([n; 5]),
        name: format!("w{n}"),
        namespace: namespace.to_owned(),
        network: NET,
        mac: ovl_cluster::addresses::mac_of(NET, net(&format!("10.9.0.{n}/24")).addr()),
        addresses: vec![net(&format!("10.9.0.{n}/24"))],
        aliases: Vec::new(),
        labels: all,
        ready: true,
        publish: Vec::new(),
        allowed: Vec::new(),
        allowed_macs: Vec::new(),
        groups: None,
        described: None,
        pod: None,
        unknown: Unknown::default(),
    }
}

fn host_of(n: u8) -> u8 {
    n / 8
}

fn put(view: &mut View, endpoint: Endpoint) {
    let IpAddr::V4(address) = endpoint.addresses[0].addr() else { panic!("IPv4") };
    let host = id(host_of(address.octets()[3]));
    let table = &mut view.nodes.get_mut(&host).unwrap().table;
    table.write(1, vec![Entry::Endpoint(endpoint)], vec![], |_| Signature([0; 64]));
}

fn take(view: &mut View, n: u8) {
    let table = &mut view.nodes.get_mut(&id(host_of(n))).unwrap().table;
    table.write(1, vec![], vec![Key::Endpoint(EndpointId([n; 5]))], |_| Signature([0; 64]));
}

fn address(n: u8) -> IpAddr {
    IpAddr::from([10, 9, 0, n])
}

/// Returns a view with the policy `db-allow-api-only`.
fn example() -> View {
    let mut view = switched();
    for (n, app) in [(9, "database"), (10, "api"), (17, "web"), (18, "api")] {
        put(&mut view, endpoint(n, "default", labels(&[("app", app)])));
    }
    let from = PolicyPeer { pod_selector: Some(selector(&[("app", "api")])), ..PolicyPeer::default() };
    let port = PolicyPort { port: Some(IntOrString::Int(5432)), ..PolicyPort::default() };
    view.resources.insert(policy(
        "default",
        "db-allow-api-only",
        PolicySpec {
            pod_selector: selector(&[("app", "database")]),
            policy_types: vec![PolicyType::Ingress],
            ingress: vec![IngressRule { ports: vec![port], from: vec![from], unknown: Unknown::default() }],
            egress: vec![],
            unknown: Unknown::default(),
        },
    ));
    view
}

#[test]
fn a_policy_becomes_a_chain_and_a_pod_an_element_of_each_set() {
    let mut view = example();
    let mut ledger = PolicyLedger::new(7);
    let local = Local::default();
    ledger.plan(&view, &local, true);
    let dataplane = part(&view, &local, ledger.generation());
    let skeleton = &dataplane.tables[&Table::Policy];
    let chain = skeleton.chains.iter().find(|chain| chain.name == "default/db-allow-api-only/ingress");
    let [v4, v6] = &chain.unwrap().rules[..] else { panic!("two rules") };
    let set = v4.split('@').nth(1).unwrap().split(' ').next().unwrap().to_owned();
    assert_eq!(
        *v4,
        format!("ct original ip saddr @{set} meta l4proto tcp ct reply proto-src 5432 goto pass.in")
    );
    assert!(v6.starts_with("ct original ip6 saddr @pods."), "{v6}");
    // Another endpoint with the label, on a remote host, costs one element.
    put(&mut view, endpoint(25, "default", labels(&[("app", "api")])));
    let touched = BTreeSet::from([(NET, address(25))]);
    let ops = ledger.plan_touched(&view, &local, &touched).unwrap();
    let texts: Vec<String> = ops.iter().map(ToString::to_string).collect();
    assert_eq!(texts, [format!("nft add element inet ovl-policy {set} '{{ 10.9.0.25 }}'")]);
    assert!(!ops.iter().any(Op::judges_again));
    // Its removal begins a new generation: connections are judged again.
    take(&mut view, 25);
    let ops = ledger.plan_touched(&view, &local, &touched).unwrap();
    let texts: Vec<String> = ops.iter().map(ToString::to_string).collect();
    assert_eq!(texts[0], format!("nft delete element inet ovl-policy {set} '{{ 10.9.0.25 }}'"));
    assert!(
        texts.len() > 1 && texts[1..].iter().all(|op| op.contains("generation") || op.contains("current"))
    );
    assert!(ops.iter().any(Op::judges_again));
    assert_eq!(ledger.plan(&view, &local, true), []);
}

#[test]
fn an_endpoint_is_isolated_before_its_attach_completes() {
    let mut view = example();
    let mut local = Local::default();
    let mut ledger = PolicyLedger::new(1);
    ledger.plan(&view, &local, true);
    let generation = ledger.generation();
    let second = endpoint(11, "default", labels(&[("app", "database")]));
    local.attaches.begin(second.clone());
    let touched = BTreeSet::from([(NET, address(11))]);
    let ops = ledger.plan_touched(&view, &local, &touched).unwrap();
    let texts: Vec<String> = ops.iter().map(ToString::to_string).collect();
    assert!(texts.iter().any(|op| op.starts_with("nft add element inet ovl-policy in4.1 '{ 10.9.0.11 : ")));
    assert!(
        texts.iter().any(|op| op.starts_with("nft add element bridge ovl-policy diverted.4 '{ 10.9.0.11 : "))
    );
    // It has no connections yet, so no new generation begins.
    assert_eq!(ledger.generation(), generation);
    // A full plan meanwhile keeps it.
    assert_eq!(ledger.plan(&view, &local, true), []);
    local.attaches.end(second.id);
    put(&mut view, second);
    assert_eq!(ledger.plan_touched(&view, &local, &touched).unwrap(), []);
    assert_eq!(ledger.plan(&view, &local, true), []);
    // A failed attach leaves nothing.
    take(&mut view, 11);
    assert!(!ledger.plan_touched(&view, &local, &touched).unwrap().is_empty());
    assert_eq!(ledger.plan(&view, &local, true), []);
}

#[test]
fn the_explanation_names_the_policy_and_the_rule() {
    let view = example();
    let policies = Policies::new(&view.resources);
    let judge = |from: u8, port: u16| {
        let [from, to] = [from, 9].map(|n| ConnectionEnd::of(&view, address(n)));
        explain(&view, &policies, none(&Admitted::default()), &from, &to, Some((Protocol::Tcp, port)))
    };
    let name = Name::new("default", "db-allow-api-only");
    let says = "from pods with app=api of namespace default, TCP 5432".to_owned();
    let passes = judge(10, 5432);
    assert_eq!(passes.ingress, Side::Passes { policy: name.clone(), rule: 1, says });
    assert_eq!(passes.egress, Side::NotIsolated);
    assert_eq!(judge(17, 5432).ingress, Side::Refused(vec![name.clone()]));
    assert_eq!(judge(10, 6379).ingress, Side::Refused(vec![name]));
    // Programs of its own host always reach it.
    let host = ConnectionEnd::of(&view, "10.9.0.1".parse().unwrap());
    let judged = explain(
        &view,
        &policies,
        none(&Admitted::default()),
        &host,
        &ConnectionEnd::of(&view, address(9)),
        None,
    );
    assert_eq!((judged.egress, judged.ingress), (Side::Outside, Side::AtHome));
    // On a routed network the first address of the subnet is a gateway of the host alone that holds the first block.
    let mut routed = example();
    routed.networks.get_mut(&NET).unwrap().network.mode = Mode::L3;
    let [host, own] = ["10.9.0.1".parse().unwrap(), address(9)].map(|at| ConnectionEnd::of(&routed, at));
    let judged =
        explain(&routed, &Policies::new(&routed.resources), none(&Admitted::default()), &host, &own, None);
    assert!(matches!(judged.ingress, Side::Refused(_)), "{judged:?}");
}

/// Without a v1 Pod, a pod is isolated by the policies that select some pods, and the rules of those that select all
/// pods hold.
#[test]
fn a_pod_of_unknown_labels_is_isolated() {
    let mut view = example();
    let identity = PodIdentity { name: "db-0".to_owned(), uid: "u1".to_owned(), created: 1 };
    put(
        &mut view,
        Endpoint {
            name: "db-0-1".to_owned(),
            pod: Some(Box::new(identity)),
            ..endpoint(11, "default", labels(&[]))
        },
    );
    let judge = |view: &View, from: u8, to: u8| {
        let policies = Policies::new(&view.resources);
        let [from, to] = [from, to].map(|n| ConnectionEnd::of(view, address(n)));
        explain(view, &policies, none(&Admitted::default()), &from, &to, Some((Protocol::Tcp, 5432)))
    };
    let example = Name::new("default", "db-allow-api-only");
    assert_eq!(judge(&view, 10, 11).ingress, Side::Undecided(vec![example]));
    assert_eq!(judge(&view, 11, 10).egress, Side::NotIsolated, "no policy isolates for egress");
    // One that selects all pods decides, whatever the labels are.
    let from = PolicyPeer { pod_selector: Some(selector(&[("app", "api")])), ..PolicyPeer::default() };
    view.resources.insert(policy(
        "default",
        "all",
        PolicySpec {
            policy_types: vec![PolicyType::Ingress],
            ingress: vec![IngressRule { from: vec![from], ports: vec![], unknown: Unknown::default() }],
            ..PolicySpec::default()
        },
    ));
    assert!(matches!(judge(&view, 10, 11).ingress, Side::Passes { .. }));
    assert!(matches!(judge(&view, 17, 11).ingress, Side::Refused(_)));
    // No selector with requirements takes it for a peer, whatever they are.
    let others = Requirement { key: "app".to_owned(), operator: Operator::DoesNotExist, values: vec![] };
    let others = LabelSelector { match_expressions: vec![others], ..LabelSelector::default() };
    let from = PolicyPeer { pod_selector: Some(others), ..PolicyPeer::default() };
    view.resources.insert(policy(
        "default",
        "all",
        PolicySpec {
            policy_types: vec![PolicyType::Ingress],
            ingress: vec![IngressRule { from: vec![from], ports: vec![], unknown: Unknown::default() }],
            ..PolicySpec::default()
        },
    ));
    assert!(matches!(judge(&view, 11, 17).ingress, Side::Refused(_)));
    // Its v1 Pod comes.
    let pod = |uid: &str| {
        Resource::Pod(Pod {
            metadata: Meta { uid: uid.to_owned(), ..meta("default", "db-0", labels(&[("app", "database")])) },
            ..Pod::default()
        })
    };
    view.resources.insert(pod("u2"));
    assert!(matches!(judge(&view, 10, 11).ingress, Side::Refused(_)), "that of another pod");
    view.resources.insert(pod("u1"));
    assert!(matches!(judge(&view, 10, 11).ingress, Side::Passes { .. }));
}

fn few_labels() -> impl Strategy<Value = Labels> {
    let label = prop::option::of(prop::sample::select(vec!["1", "2"]));
    (label.clone(), label).prop_map(|(a, b)| {
        let all = [("a", a), ("b", b)].into_iter();
        all.filter_map(|(key, value)| Some((key.to_owned(), value?.to_owned()))).collect()
    })
}

fn selectors() -> impl Strategy<Value = LabelSelector> {
    let requirement = (
        prop::sample::select(vec!["a", "b"]),
        prop::sample::select(vec![Operator::In, Operator::NotIn, Operator::Exists, Operator::DoesNotExist]),
        prop::sample::select(vec!["1", "2"]),
    );
    let requirement = requirement.prop_map(|(key, operator, value)| Requirement {
        key: key.to_owned(),
        operator,
        values: match operator {
            Operator::In | Operator::NotIn => vec![value.to_owned()],
            Operator::Exists | Operator::DoesNotExist => Vec::new(),
        },
    });
    (few_labels(), prop::collection::vec(requirement, 0..2)).prop_map(|(match_labels, match_expressions)| {
        LabelSelector { match_labels, match_expressions, unknown: Unknown::default() }
    })
}

fn peers() -> impl Strategy<Value = PolicyPeer> {
    let block = (
        prop::sample::select(vec!["0.0.0.0/0", "10.9.0.0/24", "10.9.0.8/29", "10.9.0.16/30", "fd00::/8"]),
        8..30_u8,
    )
        .prop_map(|(cidr, except)| PolicyPeer {
            ip_block: Some(IpBlock {
                cidr: net(cidr),
                except: if cidr.contains(':') {
                    vec![]
                } else {
                    vec![net(&format!("10.9.0.{except}/32")), net("10.9.0.24/31")]
                },
            }),
            ..PolicyPeer::default()
        });
    let pods =
        (prop::option::of(selectors()), prop::option::of(selectors())).prop_map(|(pods, namespaces)| {
            let pod_selector = pods.or_else(|| namespaces.is_none().then(LabelSelector::default));
            PolicyPeer {
                pod_selector,
                namespace_selector: namespaces,
                ip_block: None,
                unknown: Unknown::default(),
            }
        });
    prop_oneof![1 => block, 3 => pods]
}

fn ports() -> impl Strategy<Value = PolicyPort> {
    let protocol = prop::sample::select(vec![Protocol::Tcp, Protocol::Udp, Protocol::Sctp]);
    let port = prop_oneof![
        Just((None, None)),
        (80..83_u16).prop_map(|port| (Some(IntOrString::Int(port)), None)),
        (80..83_u16).prop_map(|port| (Some(IntOrString::Int(port)), Some(port + 1))),
        Just((Some(IntOrString::String("web".to_owned())), None)),
    ];
    (protocol, port).prop_map(|(protocol, (port, end_port))| PolicyPort {
        protocol,
        port,
        end_port,
        unknown: Unknown::default(),
    })
}

fn specs() -> impl Strategy<Value = PolicySpec> {
    let rules = || {
        let rule = (prop::collection::vec(peers(), 0..3), prop::collection::vec(ports(), 0..3));
        prop::collection::vec(rule, 0..3)
    };
    let types = prop::sample::select(vec![
        vec![PolicyType::Ingress],
        vec![PolicyType::Egress],
        vec![PolicyType::Ingress, PolicyType::Egress],
    ]);
    (selectors(), types, rules(), rules()).prop_map(|(pod_selector, policy_types, ingress, egress)| {
        PolicySpec {
            pod_selector,
            policy_types,
            ingress: ingress
                .into_iter()
                .map(|(from, ports)| IngressRule { ports, from, unknown: Unknown::default() })
                .collect(),
            egress: egress
                .into_iter()
                .map(|(to, ports)| EgressRule { ports, to, unknown: Unknown::default() })
                .collect(),
            unknown: Unknown::default(),
        }
    })
}

fn cluster_peers(is_egress: bool) -> impl Strategy<Value = ClusterPeer> {
    let named = |namespace_selector, pod_selector| NamespacedPod {
        namespace_selector,
        pod_selector,
        unknown: Unknown::default(),
    };
    let namespaces =
        selectors().prop_map(|it| ClusterPeer { namespaces: Some(it), ..ClusterPeer::default() });
    let pods = (selectors(), selectors())
        .prop_map(move |(of, it)| ClusterPeer { pods: Some(named(of, it)), ..ClusterPeer::default() });
    let nets = prop::sample::select(vec!["0.0.0.0/0", "10.9.0.8/29", "10.9.0.16/30", "::/0"]);
    let nets = prop::collection::vec(nets, 1..3).prop_map(move |all| match is_egress {
        true => ClusterPeer { networks: all.into_iter().map(net).collect(), ..ClusterPeer::default() },
        false => ClusterPeer { namespaces: Some(LabelSelector::default()), ..ClusterPeer::default() },
    });
    let nodes = selectors().prop_map(move |it| match is_egress {
        true => ClusterPeer { nodes: Some(it), ..ClusterPeer::default() },
        false => ClusterPeer { namespaces: Some(it), ..ClusterPeer::default() },
    });
    // Also with an action other than Accept: then they fail closed.
    let names = prop::sample::subsequence(vec![ONE, ALL, "no..name"], 1..3).prop_map(|names| ClusterPeer {
        domain_names: names.into_iter().map(str::to_owned).collect(),
        ..ClusterPeer::default()
    });
    prop_oneof![4 => namespaces, 4 => pods, 2 => nets, 2 => nodes, 2 => names]
}

fn cluster_protocols() -> impl Strategy<Value = ClusterProtocol> {
    let port = prop_oneof![
        (80..84_u16).prop_map(|number| ClusterPort { number, ..ClusterPort::default() }),
        (80..83_u16).prop_map(|start| ClusterPort {
            range: Some(PortRange { start, end: start + 1 }),
            ..ClusterPort::default()
        }),
    ];
    let ports =
        port.prop_map(|port| Some(ClusterPorts { destination_port: Some(port), ..ClusterPorts::default() }));
    prop_oneof![
        2 => ports.clone().prop_map(|tcp| ClusterProtocol { tcp, ..ClusterProtocol::default() }),
        1 => ports.clone().prop_map(|udp| ClusterProtocol { udp, ..ClusterProtocol::default() }),
        1 => ports.prop_map(|sctp| ClusterProtocol { sctp, ..ClusterProtocol::default() }),
        1 => Just(ClusterProtocol { destination_named_port: "web".to_owned(), ..ClusterProtocol::default() }),
    ]
}

fn cluster_specs() -> impl Strategy<Value = ClusterPolicySpec> {
    let rules = |is_egress| {
        let action = prop::sample::select(vec![RuleAction::Accept, RuleAction::Deny, RuleAction::Pass]);
        let peers = prop::collection::vec(cluster_peers(is_egress), 1..3);
        prop::collection::vec((action, peers, prop::collection::vec(cluster_protocols(), 0..3)), 0..4)
    };
    let tier = prop::sample::select(vec![Tier::Admin, Tier::Baseline]);
    (tier, 0..3_u16, selectors(), selectors(), rules(false), rules(true)).prop_map(
        |(tier, priority, of, pods, ingress, egress)| ClusterPolicySpec {
            tier: Some(tier),
            priority: Some(priority),
            subject: PolicySubject {
                pods: Some(NamespacedPod {
                    namespace_selector: of,
                    pod_selector: pods,
                    unknown: Unknown::default(),
                }),
                ..PolicySubject::default()
            },
            ingress: ingress
                .into_iter()
                .map(|(action, from, protocols)| ClusterIngressRule {
                    action: Some(action),
                    from,
                    protocols,
                    ..ClusterIngressRule::default()
                })
                .collect(),
            egress: egress
                .into_iter()
                .map(|(action, to, protocols)| ClusterEgressRule {
                    action: Some(action),
                    to,
                    protocols,
                    ..ClusterEgressRule::default()
                })
                .collect(),
            unknown: Unknown::default(),
        },
    )
}

fn cluster_policy(n: u8, spec: ClusterPolicySpec) -> Resource {
    Resource::ClusterNetworkPolicy(ClusterNetworkPolicy {
        metadata: meta("", &format!("c{n}"), Labels::new()),
        spec,
        unknown: Unknown::default(),
    })
}

/// Returns a Node with the address of an endpoint, and one of no endpoint.
fn node(n: u8, all: Labels) -> Resource {
    let addresses = [address(n).to_string(), "n1".to_owned(), "10.9.0.77".to_owned()];
    let addresses =
        addresses.map(|address| NodeAddress { kind: String::new(), address, unknown: Unknown::default() });
    Resource::Node(NodeObject {
        metadata: meta("", &format!("n{n}"), all),
        status: NodeStatus { addresses: addresses.into(), unknown: Unknown::default() },
        unknown: Unknown::default(),
    })
}

fn namespace_of(choice: bool) -> &'static str {
    if choice { "x" } else { "y" }
}

/// A change of the cluster.
#[derive(Debug, Clone)]
enum Step {
    Put(u8, bool, Labels),
    Take(u8),
    Policy(u8, bool, PolicySpec),
    NoPolicy(u8, bool),
    Cluster(u8, ClusterPolicySpec),
    NoCluster(u8),
    Namespace(bool, Labels),
    Node(u8, Labels),
    NoNode(u8),
    Pod(u8, bool, Option<u16>, &'static str),
    Again(u8, bool, u8, &'static str, u64),
}

fn uid() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec!["", "u1", "u2"])
}

fn steps() -> impl Strategy<Value = Step> {
    // Addresses in the blocks of h1 and h2.
    let n = prop::sample::select(vec![9_u8, 10, 11, 17, 18, 19]);
    prop_oneof![
        4 => (n.clone(), any::<bool>(), few_labels()).prop_map(|(n, space, labels)| Step::Put(n, space, labels)),
        1 => n.clone().prop_map(Step::Take),
        3 => (0..3_u8, any::<bool>(), specs()).prop_map(|(n, space, spec)| Step::Policy(n, space, spec)),
        1 => (0..3_u8, any::<bool>()).prop_map(|(n, space)| Step::NoPolicy(n, space)),
        3 => (0..3_u8, cluster_specs()).prop_map(|(n, spec)| Step::Cluster(n, spec)),
        1 => (0..3_u8).prop_map(Step::NoCluster),
        1 => (any::<bool>(), few_labels()).prop_map(|(space, labels)| Step::Namespace(space, labels)),
        1 => (n.clone(), few_labels()).prop_map(|(n, labels)| Step::Node(n, labels)),
        1 => n.clone().prop_map(Step::NoNode),
        1 => (n.clone(), any::<bool>(), prop::option::of(80..83_u16), uid())
            .prop_map(|(n, space, port, uid)| Step::Pod(n, space, port, uid)),
        3 => (n.clone(), any::<bool>(), n, uid(), 0..3_u64)
            .prop_map(|(n, space, pod, uid, created)| Step::Again(n, space, pod, uid, created)),
    ]
}

/// Makes the change, and returns the address of the endpoint that it adds, changes or removes. `None` for other
/// changes.
fn make(view: &mut View, step: &Step) -> Option<(NetworkId, IpAddr)> {
    // Without it, another endpoint may stand for its pod.
    let was_of_pod = |view: &View, n: u8| {
        view.all_with_address(NET, address(n)).any(|placed| placed.endpoint.pod.is_some())
    };
    match step {
        Step::Put(n, space, labels) => {
            let alone = !was_of_pod(view, *n);
            put(view, endpoint(*n, namespace_of(*space), labels.clone()));
            return alone.then_some((NET, address(*n)));
        }
        Step::Again(n, space, pod, uid, created) => {
            let pod = PodIdentity { name: format!("w{pod}"), uid: (*uid).to_owned(), created: *created };
            let bare = endpoint(*n, namespace_of(*space), Labels::new());
            put(view, Endpoint { pod: Some(Box::new(pod)), ..bare });
            // Others of the pod change with it.
        }
        Step::Take(n) => {
            let alone = !was_of_pod(view, *n);
            take(view, *n);
            return alone.then_some((NET, address(*n)));
        }
        Step::Policy(n, space, spec) => {
            view.resources.insert(policy(namespace_of(*space), &format!("p{n}"), spec.clone()));
        }
        Step::NoPolicy(n, space) => {
            view.resources
                .remove(&policy(namespace_of(*space), &format!("p{n}"), PolicySpec::default()).key());
        }
        Step::Cluster(n, spec) => drop(view.resources.insert(cluster_policy(*n, spec.clone()))),
        Step::NoCluster(n) => {
            view.resources.remove(&cluster_policy(*n, ClusterPolicySpec::default()).key());
        }
        Step::Namespace(space, labels) => {
            let metadata = meta("", namespace_of(*space), labels.clone());
            view.resources.insert(Resource::Namespace(Namespace { metadata, unknown: Unknown::default() }));
        }
        Step::Node(n, labels) => drop(view.resources.insert(node(*n, labels.clone()))),
        Step::NoNode(n) => drop(view.resources.remove(&node(*n, Labels::new()).key())),
        Step::Pod(n, space, port, uid) => {
            let ports = port.iter().map(|port| ContainerPort {
                name: "web".to_owned(),
                container_port: *port,
                protocol: Protocol::Tcp,
                unknown: Unknown::default(),
            });
            let container =
                Container { name: "c".to_owned(), ports: ports.collect(), unknown: Unknown::default() };
            view.resources.insert(Resource::Pod(Pod {
                metadata: Meta {
                    uid: (*uid).to_owned(),
                    ..meta(namespace_of(*space), &format!("w{n}"), Labels::new())
                },
                spec: PodSpec { containers: vec![container], ..PodSpec::default() },
                status: Default::default(),
                unknown: Unknown::default(),
            }));
        }
    }
    None
}

/// Applies operations to a data plane.
fn apply(dataplane: &mut Dataplane, ops: Vec<Op>) {
    for op in ops {
        match op {
            Op::Nft(NftOp::SetTable(table, skeleton)) => {
                let sets: BTreeSet<_> = skeleton.sets.iter().cloned().collect();
                let removed: Vec<_> = dataplane
                    .elements
                    .sets()
                    .filter(|(set, _)| set.table == table && !sets.contains(*set))
                    .map(|(set, _)| set.clone())
                    .collect();
                removed.iter().for_each(|set| dataplane.elements.set(set, Default::default()));
                dataplane.tables.insert(table, skeleton);
            }
            Op::Nft(NftOp::DeleteTable(table)) => {
                dataplane.tables.remove(&table);
                dataplane.elements.forget(table);
            }
            Op::Nft(NftOp::SetElement(Element { set, key, value })) => {
                drop(dataplane.elements.insert(&set, key, value))
            }
            Op::Nft(NftOp::DeleteElement(set, key)) => drop(dataplane.elements.remove(&set, &key)),
            other => panic!("{other}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn tables_and_explanation_agree(steps in prop::collection::vec(steps(), 1..25)) {
        let mut view = switched();
        for step in &steps {
            make(&mut view, step);
        }
        let policies = Policies::new(&view.resources);
        let dataplanes: BTreeMap<u8, Dataplane> = [1, 2].map(|host| {
            view.me = id(host);
            (host, part(&view, &Local::default(), 1))
        }).into();
        let ends = [9_u8, 10, 17, 18, 77];
        let (now, mut admitted, mut told) = (Duration::from_secs(1), Admitted::default(), Told::new());
        for (pattern, of) in [(ONE, address(17)), (ALL, address(77)), (ALL, address(10))] {
            let pattern = NamePattern::parse(pattern).unwrap();
            told.insert((NameKey::of(&pattern).set(true), of));
            admitted.admit(now, &[pattern], "www.ovl.test", &[(of, 60)]);
        }
        for from in ends {
            // What is admitted for names is known on the host of the source.
            view.me = id(if from == 77 { 1 } else { host_of(from) });
            for to in ends.into_iter().filter(|to| *to != from) {
                let [here, there] = [from, to].map(|n| ConnectionEnd::of(&view, address(n)));
                for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
                    for port in 80..84_u16 {
                        let judged = explain(&view, &policies, AdmittedAt { admitted: &admitted, now }, &here, &there, Some((protocol, port)));
                        let packet = Packet { from: address(from), to: address(to), protocol: protocol_number(protocol), port };
                        let by_tables = [from, to].iter().filter_map(|n| dataplanes.get(&host_of(*n))).all(|dataplane| passes(dataplane, &told, &packet));
                        prop_assert_eq!(judged.passes(), by_tables, "{:?}: {:?}", packet, judged);
                    }
                }
            }
        }
    }

    #[test]
    fn plans_of_single_changes_lead_to_the_desired_data_plane(steps in prop::collection::vec(steps(), 1..40)) {
        let mut view = switched();
        let local = Local::default();
        let mut ledger = PolicyLedger::new(1);
        let mut dataplane = Dataplane::default();
        for step in &steps {
            let touched = make(&mut view, step);
            let quick = touched.and_then(|at| ledger.plan_touched(&view, &local, &BTreeSet::from([at])));
            let ops = quick.unwrap_or_else(|| ledger.plan(&view, &local, true));
            apply(&mut dataplane, ops);
            let wanted = part(&view, &local, ledger.generation());
            prop_assert_eq!(&dataplane.tables, &wanted.tables);
            prop_assert_eq!(&dataplane.elements, &wanted.elements);
            prop_assert_eq!(ledger.plan(&view, &local, true), []);
        }
    }
}

#[test]
fn a_host_without_switched_networks_has_no_bridge_table() {
    let mut view = example();
    assert!(part(&view, &Local::default(), 1).tables.contains_key(&Table::PolicyFrames));
    view.networks.get_mut(&NET).unwrap().network.mode = Mode::L3;
    assert!(!part(&view, &Local::default(), 1).tables.contains_key(&Table::PolicyFrames));
}

#[test]
fn egress_rules_cover_the_resolver() {
    let port = |protocol, port| PolicyPort { protocol, port, end_port: None, unknown: Unknown::default() };
    let number = |protocol, at| port(protocol, Some(IntOrString::Int(at)));
    let named = |name: &str| port(Protocol::Udp, Some(IntOrString::String(name.to_owned())));
    let rule =
        |to: Vec<PolicyPeer>, ports: Vec<PolicyPort>| EgressRule { to, ports, unknown: Unknown::default() };
    let block = |cidr: &str, except: &[&str]| PolicyPeer {
        ip_block: Some(IpBlock { cidr: net(cidr), except: except.iter().map(|at| net(at)).collect() }),
        ..PolicyPeer::default()
    };
    let pods = |namespace: Option<LabelSelector>, pods: Option<LabelSelector>| PolicyPeer {
        namespace_selector: namespace,
        pod_selector: pods,
        ..PolicyPeer::default()
    };
    let any = || LabelSelector::default();
    let system = || selector(&[("kubernetes.io/metadata.name", "kube-system")]);
    let dns = || number(Protocol::Udp, 53);
    let cases = [
        (vec![], false),
        (vec![rule(vec![], vec![])], true),
        (vec![rule(vec![], vec![dns()])], true),
        (vec![rule(vec![], vec![number(Protocol::Tcp, 53)])], true),
        (vec![rule(vec![], vec![number(Protocol::Sctp, 53)])], false),
        (vec![rule(vec![], vec![number(Protocol::Udp, 443)])], false),
        (vec![rule(vec![], vec![port(Protocol::Udp, None)])], true),
        (vec![rule(vec![], vec![PolicyPort { end_port: Some(60), ..number(Protocol::Udp, 50) }])], true),
        (vec![rule(vec![], vec![named("dns")])], true),
        (vec![rule(vec![], vec![named("http")])], false),
        (vec![rule(vec![pods(None, Some(any()))], vec![dns()])], false),
        (vec![rule(vec![pods(Some(any()), None)], vec![dns()])], true),
        (vec![rule(vec![pods(Some(system()), None)], vec![dns()])], true),
        (vec![rule(vec![pods(Some(system()), Some(selector(&[("k8s-app", "kube-dns")])))], vec![])], true),
        (vec![rule(vec![pods(Some(system()), Some(selector(&[("k8s-app", "other")])))], vec![])], false),
        (vec![rule(vec![block("0.0.0.0/0", &["169.254.0.0/16"])], vec![dns()])], true),
        (vec![rule(vec![block("127.0.0.11/32", &[])], vec![])], true),
        (vec![rule(vec![block("10.0.0.0/8", &[])], vec![])], false),
        (vec![rule(vec![block("10.0.0.0/8", &[])], vec![]), rule(vec![], vec![dns()])], true),
    ];
    for (rules, expected) in cases {
        let mut view = switched();
        let spec = PolicySpec {
            pod_selector: selector(&[("app", "web")]),
            policy_types: vec![PolicyType::Egress],
            egress: rules.clone(),
            ..PolicySpec::default()
        };
        view.resources.insert(policy("default", "out", spec));
        let policies = Policies::new(&view.resources);
        let addresses = ["127.0.0.11", "169.254.79.53"].map(|at| at.parse().unwrap()).into();
        let resolver = ResolverPeer::new(&view.resources, addresses);
        let asks = |namespace: &str, app: &str| {
            policies.allow_resolver(&view.resources, namespace, Some(&labels(&[("app", app)])), &resolver)
        };
        assert_eq!(asks("default", "web"), expected, "{rules:?}");
        assert!(asks("default", "db") && asks("other", "web"), "no policy selects it");
    }
}
