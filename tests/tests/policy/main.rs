//! Network policies: connectivity as in the truth tables of the Kubernetes tests, and changes of policies and pods.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

mod bypass;
mod services;

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use netns_lab::{Lab, LabConfig, wait_until};
use ovl_tests::policy::{PolicyLab, Proto, namespace, policy, port_name, wait_enforced};
use ovl_tests::routed::create_routed_network;
use ovl_tests::service::apply;
use ovl_tests::{
    Attached, SOON, assert_contains, attach, attach_workload, create_network, rows, start_lab, strings, text,
    wait_clean,
};
use serde_json::{Value, json};

/// A policy that lets only pods with `app: api` connect to the database.
const EXAMPLE: &str = "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: db-allow-api-only
  namespace: default
spec:
  podSelector:
    matchLabels:
      app: database
  policyTypes:
  - Ingress
  ingress:
  - from:
    - podSelector:
        matchLabels:
          app: api
    ports:
    - protocol: TCP
      port: 5432
";

fn labelled(lab: &Lab, host: &str, name: &str, app: &str) -> Attached {
    attach(&lab[host], name, "pods", &["--label", &format!("app={app}")]).unwrap()
}

fn connects(from: &Attached, to: &Attached, port: u16, timeout: Duration) -> bool {
    to.addresses().iter().all(|address| {
        let target = SocketAddr::new(address.parse().unwrap(), port);
        from.workload.run(|| TcpStream::connect_timeout(&target, timeout).is_ok()).unwrap()
    })
}

/// Checks [`EXAMPLE`]: api reaches database:5432, web does not reach it, and api does not reach database:6379.
fn assert_db_allow_api_only(create: impl Fn(&Lab)) {
    let lab = start_lab(2).unwrap();
    create(&lab);
    let database = labelled(&lab, "h1", "database", "database");
    let _servers = [5432, 6379].map(|port| database.workload.tcp_echo(port).unwrap());
    let others = [("h1", "api"), ("h2", "api"), ("h1", "web"), ("h2", "web")]
        .map(|(host, app)| (app, labelled(&lab, host, &format!("{app}-{host}"), app)));
    for (_, from) in &others {
        assert!(connects(from, &database, 5432, SOON) && connects(from, &database, 6379, SOON));
    }
    apply(&lab, &lab["h1"], EXAMPLE).unwrap();
    for (app, from) in &others {
        let expected = (*app == "api", false);
        wait_until(SOON, &format!("the expected connections of {}", from.name), || -> Result<()> {
            // Expected connections get the full timeout. For refused ones, a dropped SYN leaves no event to wait for,
            // so this tries for a second.
            let timeout = |passes| if passes { SOON } else { Duration::from_secs(1) };
            let found = (
                connects(from, &database, 5432, timeout(expected.0)),
                connects(from, &database, 6379, timeout(expected.1)),
            );
            ensure!(found == expected, "5432, 6379: {found:?} instead of {expected:?}");
            Ok(())
        })
        .unwrap();
    }
    // The explanation of the decisions, and the refused packets.
    let explain = |from: &str, port: &str| {
        let found = rows(&lab["h2"], &["policy", "explain", from, &format!("database:{port}")]).unwrap();
        found.into_iter().next().unwrap()
    };
    let passes = explain("api-h2", "5432");
    assert_eq!((&passes["passes"], &passes["ingress"]["rule"]), (&json!(true), &json!(1)));
    assert_contains(&text(&passes["ingress"]["why"]), &["default/db-allow-api-only", "app=api", "TCP 5432"]);
    for (from, port) in [("web-h2", "5432"), ("api-h2", "6379")] {
        let refused = explain(from, port);
        assert_eq!(refused["passes"], json!(false), "{refused}");
        assert_eq!(strings(&refused["ingress"]["policies"]), ["default/db-allow-api-only"]);
    }
    let drops = rows(&lab["h1"], &["policy", "drops"]).unwrap();
    let of = |from: &str, port: u64| {
        drops.iter().any(|drop| {
            text(&drop["from_endpoint"]) == format!("default/{from}")
                && text(&drop["to_endpoint"]) == "default/database"
                && drop["port"] == json!(port)
                && drop["packets"].as_u64() > Some(0)
                && strings(&drop["policies"]) == ["default/db-allow-api-only"]
        })
    };
    assert!(of("web-h1", 5432) && of("web-h2", 5432) && of("api-h2", 6379), "{drops:?}");
    assert!(!of("api-h1", 5432) && !of("api-h2", 5432), "{drops:?}");
    let listed = &rows(&lab["h1"], &["policy", "ls"]).unwrap()[0];
    assert_eq!((&listed["endpoints"], text(&listed["name"])), (&json!(1), "db-allow-api-only".to_owned()));
    assert!(listed["refused"].as_u64() > Some(2), "{listed}");
    let metrics = lab["h1"].ctl_ok(&["metrics"]).unwrap();
    assert_contains(
        &metrics,
        &["ovl_policy_refused_packets_total{namespace=\"default\",endpoint=\"database\""],
    );
    wait_clean(lab.hosts(), SOON).unwrap();
}

const BOTH: &[&str] = &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"];
const FLAT: &[&str] = &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/64"];

#[test]
fn db_allow_api_only_on_a_routed_network() {
    assert_db_allow_api_only(|lab| create_routed_network(lab, "pods", BOTH).unwrap());
}

#[test]
fn db_allow_api_only_on_a_switched_network() {
    assert_db_allow_api_only(|lab| create_network(lab, "pods", FLAT).unwrap());
}

#[test]
fn db_allow_api_only_on_a_switched_network_without_a_gateway() {
    assert_db_allow_api_only(|lab| create_network(lab, "pods", &[FLAT, &["--internal"]].concat()).unwrap());
}

#[test]
fn db_allow_api_only_on_an_encrypted_switched_network() {
    assert_db_allow_api_only(|lab| create_network(lab, "pods", &[FLAT, &["--encrypted"]].concat()).unwrap());
}

#[test]
fn db_allow_api_only_on_an_encrypted_routed_network() {
    assert_db_allow_api_only(|lab| {
        create_routed_network(lab, "pods", &[BOTH, &["--encrypted"]].concat()).unwrap()
    });
}

fn selector(key: &str, value: &str) -> Value {
    json!({"matchLabels": {key: value}})
}

/// Kinds of policies, with a name and the objects of each.
fn kinds(world: &PolicyLab) -> Vec<(&'static str, Vec<Value>)> {
    let x = |name: &str, spec: Value| policy("x", name, spec);
    let address = |namespace: &str, name: &str, v4: bool| {
        let found = world.pod(namespace, name).unwrap().address(v4).unwrap();
        format!("{found}/{}", if v4 { 32 } else { 128 })
    };
    let a = selector("pod", "a");
    vec![
        ("deny all ingress", vec![x("p", json!({"podSelector": {}, "policyTypes": ["Ingress"]}))]),
        ("deny all egress", vec![x("p", json!({"podSelector": {}, "policyTypes": ["Egress"]}))]),
        ("allow all ingress", vec![x("p", json!({"podSelector": {}, "ingress": [{}]}))]),
        (
            "allow all egress",
            vec![x("p", json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{}]}))],
        ),
        (
            "from pods of the same namespace",
            vec![x(
                "p",
                json!({"podSelector": a,
            "ingress": [{"from": [{"podSelector": selector("pod", "b")}]}]}),
            )],
        ),
        (
            "from a namespace by its label",
            vec![x(
                "p",
                json!({"podSelector": a,
            "ingress": [{"from": [{"namespaceSelector": selector("ns", "y")}]}]}),
            )],
        ),
        (
            "from a namespace by its name",
            vec![x(
                "p",
                json!({"podSelector": a,
            "ingress": [{"from": [{"namespaceSelector": selector("kubernetes.io/metadata.name", "z")}]}]}),
            )],
        ),
        (
            "from pods of a namespace",
            vec![x(
                "p",
                json!({"podSelector": a,
            "ingress": [{"from": [{"namespaceSelector": selector("ns", "y"), "podSelector": selector("pod", "b")}]}]}),
            )],
        ),
        (
            "from pods or a namespace",
            vec![x(
                "p",
                json!({"podSelector": a,
            "ingress": [{"from": [{"namespaceSelector": selector("ns", "y")}, {"podSelector": selector("pod", "b")}]}]}),
            )],
        ),
        (
            "by expressions",
            vec![x(
                "p",
                json!({
                "podSelector": {"matchExpressions": [{"key": "pod", "operator": "In", "values": ["a", "c"]}]},
                "ingress": [{"from": [{
                    "namespaceSelector": {"matchExpressions": [{"key": "ns", "operator": "NotIn", "values": ["x"]}]},
                    "podSelector": {"matchExpressions": [{"key": "pod", "operator": "Exists"},
                        {"key": "gone", "operator": "DoesNotExist"}]},
                }]}]}),
            )],
        ),
        ("at a port", vec![x("p", json!({"podSelector": a, "ingress": [{"ports": [{"port": 81}]}]}))]),
        (
            "at a named port",
            vec![x(
                "p",
                json!({"podSelector": a,
            "ingress": [{"ports": [{"port": port_name(81, Proto::Tcp)},
                {"port": port_name(80, Proto::Udp), "protocol": "UDP"}]}]}),
            )],
        ),
        (
            "to a named port",
            vec![x(
                "p",
                json!({"podSelector": a, "policyTypes": ["Egress"],
            "egress": [{"ports": [{"port": port_name(80, Proto::Tcp)}]}]}),
            )],
        ),
        (
            "at a range of ports",
            vec![x(
                "p",
                json!({"podSelector": a,
            "ingress": [{"ports": [{"port": 81, "endPort": 90}, {"port": 1, "endPort": 80, "protocol": "UDP"}]}]}),
            )],
        ),
        (
            "of a protocol",
            vec![x("p", json!({"podSelector": a, "ingress": [{"ports": [{"protocol": "UDP"}]}]}))],
        ),
        (
            "of SCTP",
            vec![
                x(
                    "p1",
                    json!({"podSelector": a,
                "ingress": [{"from": [{"podSelector": {}}], "ports": [{"port": 80, "endPort": 81, "protocol": "SCTP"}]}]}),
                ),
                x(
                    "p2",
                    json!({"podSelector": a, "policyTypes": ["Egress"],
                "egress": [{"ports": [{"port": port_name(81, Proto::Sctp), "protocol": "SCTP"}, {"port": 80, "protocol": "SCTP"}]}]}),
                ),
            ],
        ),
        (
            "egress without policyTypes isolates in both directions",
            vec![x(
                "p",
                json!({"podSelector": a,
            "egress": [{"to": [{"namespaceSelector": {}, "podSelector": selector("pod", "b")}]}]}),
            )],
        ),
        (
            "to an address",
            vec![x(
                "p",
                json!({"podSelector": a, "policyTypes": ["Egress"],
            "egress": [{"to": [{"ipBlock": {"cidr": address("y", "b", true)}}, {"ipBlock": {"cidr": address("z", "c", false)}}]}]}),
            )],
        ),
        (
            "from addresses with an exception",
            vec![x(
                "p",
                json!({"podSelector": a,
                "ingress": [{"from": [
                    {"ipBlock": {"cidr": "10.60.0.0/16", "except": [address("x", "b", true)]}},
                    {"ipBlock": {"cidr": "::/0", "except": [address("y", "a", false)]}},
                ]}]}),
            )],
        ),
        (
            "policies add up",
            vec![
                x(
                    "p1",
                    json!({"podSelector": a, "ingress": [{"from": [{"podSelector": selector("pod", "b")}]}]}),
                ),
                x(
                    "p2",
                    json!({"podSelector": a, "ingress": [{"from": [{"namespaceSelector": selector("ns", "z")}]}]}),
                ),
                x("p3", json!({"podSelector": {}, "policyTypes": ["Ingress"]})),
            ],
        ),
        (
            "egress and ingress policies both apply",
            vec![
                x(
                    "p",
                    json!({"podSelector": {}, "policyTypes": ["Egress"],
                "egress": [{"to": [{"namespaceSelector": selector("ns", "y")}]}]}),
                ),
                policy(
                    "y",
                    "p",
                    json!({"podSelector": {},
                "ingress": [{"from": [{"namespaceSelector": {}, "podSelector": selector("pod", "a")}]}]}),
                ),
            ],
        ),
        (
            "more policies than slots",
            (0..7)
                .map(|n| {
                    x(&format!("p{n}"), json!({"podSelector": a, "ingress": [{"ports": [{"port": 75 + n}]}]}))
                })
                .collect(),
        ),
    ]
}

fn assert_truth_tables(mode: &str, more: &[&str]) {
    let mut world = PolicyLab::new(mode, more).unwrap();
    world.wait_settled("full connectivity without policies").unwrap();
    for (kind, policies) in kinds(&world) {
        world.apply(&policies).unwrap();
        world.wait_settled(kind).unwrap();
        for policy in &policies {
            let meta = &policy["metadata"];
            world.delete("networkpolicy", &text(&meta["namespace"]), &text(&meta["name"])).unwrap();
        }
    }
    world.wait_settled("full connectivity again").unwrap();
    wait_clean(world.lab.hosts(), SOON).unwrap();
}

#[test]
fn truth_tables_on_a_routed_network() {
    assert_truth_tables("l3", &[]);
}

#[test]
fn truth_tables_on_a_switched_network() {
    assert_truth_tables("l2", &[]);
}

#[test]
fn changes_are_enforced_on_all_hosts() {
    let mut world = PolicyLab::new("l3", &[]).unwrap();
    let allow = json!({"podSelector": selector("pod", "a"), "ingress": [
        {"from": [{"namespaceSelector": selector("ns", "y"), "podSelector": selector("pod", "b")}]}]});
    world.apply(&[policy("x", "p", allow)]).unwrap();
    world.wait_settled("a policy").unwrap();
    // Labels of pods: of a peer in a rule, and of a selected pod.
    world.relabel("y", "c", &[("pod", "b")]).unwrap();
    world.wait_settled("a relabelled pod is a peer").unwrap();
    world.relabel("y", "c", &[("pod", "c")]).unwrap();
    world.relabel("x", "b", &[("pod", "a"), ("more", "1")]).unwrap();
    world.wait_settled("a relabelled pod is isolated").unwrap();
    world.relabel("x", "b", &[("pod", "b")]).unwrap();
    world.wait_settled("the pod is no longer isolated").unwrap();
    // Labels of namespaces.
    world.apply(&[namespace("z", &[("ns", "y")])]).unwrap();
    world.wait_settled("a relabelled namespace is a peer").unwrap();
    world.apply(&[namespace("z", &[("ns", "z")])]).unwrap();
    world.wait_settled("the namespace is no longer a peer").unwrap();
    // Pods that are deleted and created on another host.
    world.remove("y", "b").unwrap();
    let host = world.lab.hosts()[2].clone();
    world.add(&host, "y", "b").unwrap();
    world.remove("x", "a").unwrap();
    let host = world.lab.hosts()[1].clone();
    world.add(&host, "x", "a").unwrap();
    world.wait_settled("pods on other hosts").unwrap();
    // A change of the policy itself.
    let deny = json!({"podSelector": selector("pod", "a"), "policyTypes": ["Ingress", "Egress"]});
    world.apply(&[policy("x", "p", deny)]).unwrap();
    world.wait_settled("a changed policy").unwrap();
    world.delete("networkpolicy", "x", "p").unwrap();
    world.wait_settled("no policy").unwrap();
    wait_clean(world.lab.hosts(), SOON).unwrap();
}

#[test]
fn flushed_policies_are_restored_and_stay_without_daemons() {
    let mut world = PolicyLab::new("l2", &[]).unwrap();
    let spec = json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]});
    world.apply(&[policy("y", "p", spec)]).unwrap();
    world.wait_settled("a policy").unwrap();
    for host in world.lab.hosts() {
        host.kill9().unwrap();
    }
    world.wait_settled("policies without daemons").unwrap();
    for host in world.lab.hosts() {
        host.start().unwrap();
    }
    for host in world.lab.hosts() {
        host.wait_ready(SOON).unwrap();
        host.exec_ok(["nft", "flush", "ruleset"]).unwrap();
        wait_enforced(host).unwrap();
    }
    world.wait_settled("after a flush").unwrap();
    for table in ["inet", "bridge"] {
        world.lab["h2"].exec_ok(["nft", "delete", "table", table, "ovl-policy"]).unwrap();
    }
    wait_enforced(&world.lab["h2"]).unwrap();
    world.wait_settled("after a deletion").unwrap();
}

/// Sends one byte over a connection and reads one back.
fn exchange(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(b"x")?;
    let mut byte = [0];
    if stream.read(&mut byte)? == 0 {
        bail!("closed");
    }
    Ok(())
}

fn connected(from: &Attached, to: &Attached, port: u16) -> TcpStream {
    let target = SocketAddr::new(to.address().parse().unwrap(), port);
    let stream = from.workload.run(|| TcpStream::connect_timeout(&target, SOON)).unwrap().unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
}

fn assert_connections_cut(create: impl Fn(&Lab)) {
    let lab = start_lab(2).unwrap();
    create(&lab);
    let database = labelled(&lab, "h1", "database", "database");
    let server = database.workload.tcp_echo(5432).unwrap();
    let mut allowed: Vec<TcpStream> = Vec::new();
    let mut forbidden: Vec<TcpStream> = Vec::new();
    for host in ["h1", "h2"] {
        allowed.push(connected(
            &labelled(&lab, host, &format!("api-{host}"), "api"),
            &database,
            server.port(),
        ));
        forbidden.push(connected(
            &labelled(&lab, host, &format!("web-{host}"), "web"),
            &database,
            server.port(),
        ));
    }
    allowed.iter_mut().chain(&mut forbidden).for_each(|stream| exchange(stream).unwrap());
    apply(&lab, &lab["h1"], EXAMPLE).unwrap();
    for stream in &mut forbidden {
        wait_until(SOON, "a forbidden connection to be cut", || exchange(stream).is_err()).unwrap();
    }
    for stream in &mut allowed {
        exchange(stream).unwrap();
    }
    // A replaced policy cuts connections that only the previous one allowed.
    apply(&lab, &lab["h1"], &EXAMPLE.replace("app: api", "app: nobody")).unwrap();
    for stream in &mut allowed {
        wait_until(SOON, "a previously allowed connection to be cut", || exchange(stream).is_err()).unwrap();
    }
}

#[test]
fn connections_that_a_new_policy_forbids_are_cut_on_a_routed_network() {
    assert_connections_cut(|lab| create_routed_network(lab, "pods", BOTH).unwrap());
}

#[test]
fn connections_that_a_new_policy_forbids_are_cut_on_a_switched_network() {
    assert_connections_cut(|lab| create_network(lab, "pods", FLAT).unwrap());
}

#[test]
fn spoofed_source_address_does_not_bypass_a_policy() {
    for mode in ["l3", "l2"] {
        let lab = start_lab(2).unwrap();
        match mode {
            "l3" => create_routed_network(&lab, "pods", &["--subnet", "10.60.0.0/16"]).unwrap(),
            _ => create_network(&lab, "pods", &["--subnet", "10.60.0.0/16"]).unwrap(),
        }
        let database = labelled(&lab, "h1", "database", "database");
        let api = labelled(&lab, "h2", "api", "api");
        apply(&lab, &lab["h1"], &EXAMPLE.replace("protocol: TCP", "protocol: UDP")).unwrap();
        lab.hosts().iter().for_each(|host| wait_enforced(host).unwrap());
        let socket = database.workload.run(|| std::net::UdpSocket::bind("0.0.0.0:5432")).unwrap().unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let target = SocketAddr::new(database.address().parse().unwrap(), 5432);
        let stolen = api.address();
        for host in ["h1", "h2"] {
            let web = labelled(&lab, host, &format!("web-{host}"), "web");
            web.workload.exec_ok(["ip", "addr", "add", &format!("{stolen}/32"), "dev", "eth0"]).unwrap();
            let source: IpAddr = stolen.parse().unwrap();
            web.workload
                .run(|| -> std::io::Result<()> {
                    let socket = std::net::UdpSocket::bind((source, 0))?;
                    (0..20).try_for_each(|_| socket.send_to(b"forged", target).map(drop))
                })
                .unwrap()
                .unwrap();
            // Marker: the owner's datagram, sent last and over the same path, is the first one to arrive.
            wait_until(SOON, "the api's datagram", || -> Result<()> {
                api.workload.run(|| -> std::io::Result<()> {
                    std::net::UdpSocket::bind("0.0.0.0:0")?.send_to(b"own", target).map(drop)
                })??;
                let mut buffer = [0; 64];
                let (length, from) = socket.recv_from(&mut buffer)?;
                assert_eq!(&buffer[..length], b"own", "on {mode} from {host}: {from}");
                ensure!(from.ip().to_string() == stolen, "{from}");
                Ok(())
            })
            .unwrap();
        }
    }
}

#[test]
fn new_pod_is_isolated_from_its_first_packet_on_also_on_a_late_joiner() {
    let lab = Lab::new(LabConfig::hosts(3)).unwrap();
    for host in ["h1", "h2"] {
        lab[host].start().unwrap();
    }
    for host in ["h1", "h2"] {
        lab[host].wait_ready(SOON).unwrap();
    }
    lab.wait_all_alive(SOON).unwrap();
    create_routed_network(&lab, "pods", &["--subnet", "10.60.0.0/16"]).unwrap();
    let api = labelled(&lab, "h1", "api", "api");
    let web = labelled(&lab, "h1", "web", "web");
    apply(&lab, &lab["h1"], EXAMPLE).unwrap();
    wait_enforced(&lab["h1"]).unwrap();
    lab["h3"].start().unwrap();
    lab["h3"].wait_ready(SOON).unwrap();
    lab.wait_all_alive(SOON).unwrap();
    for (number, host) in ["h3", "h2", "h1", "h3"].into_iter().enumerate() {
        let name = format!("database{number}");
        let attach = |more: &[&str]| {
            let workload = lab[host].workload(&format!("{name}{}", more.len())).unwrap();
            let server = workload.tcp_echo(5432).unwrap();
            let args = [&["--label", "app=database"], more].concat();
            (attach_workload(workload, "pods", &args).unwrap(), server)
        };
        // Find out which address the pod will get.
        let (first, _) = attach(&[]);
        let address = first.address();
        lab[host].ctl_ok(&["detach", &first.name]).unwrap();
        let target = SocketAddr::new(address.parse().unwrap(), 5432);
        // A client that the policy forbids keeps trying, from before the pod exists until an allowed client reaches it.
        let done = AtomicBool::new(false);
        let connections = std::thread::scope(|scope| {
            let tries = scope.spawn(|| {
                web.workload.run(|| {
                    let mut connections = 0;
                    while !done.load(Ordering::Relaxed) {
                        let attempt = TcpStream::connect_timeout(&target, Duration::from_millis(20));
                        connections += usize::from(attempt.is_ok());
                    }
                    connections
                })
            });
            let (database, _server) = attach(&["--ip", &address]);
            wait_until(SOON, "the api's connection", || connects(&api, &database, 5432, SOON)).unwrap();
            done.store(true, Ordering::Relaxed);
            tries.join().unwrap().unwrap()
        });
        assert_eq!(connections, 0, "on {host}");
    }
}

/// A policy that allows 3,000 IPv4 and 3,000 IPv6 blocks at 30 ports, with the blocks of both families that contain the
/// endpoints and an excluded prefix in each.
fn many_blocks() -> Value {
    let v4 =
        (0..3000).map(|n| json!({"ipBlock": {"cidr": format!("172.{}.{}.0/24", 32 + n / 200, n % 200)}}));
    let v6 = (0..3000).map(|n| json!({"ipBlock": {"cidr": format!("2001:db8:{:x}::/48", 2 * n)}}));
    let here = [
        json!({"ipBlock": {"cidr": "10.60.0.0/16", "except": ["10.60.0.6/32"]}}),
        json!({"ipBlock": {"cidr": "fd60::/64", "except": ["fd60::6/128"]}}),
    ];
    let from: Vec<Value> = v4.chain(v6).chain(here).collect();
    let ports: Vec<Value> = (0..30).map(|n| json!({"port": 5400 + 2 * n})).collect();
    let spec = json!({"podSelector": {"matchLabels": {"app": "database"}}, "ingress": [{"from": from, "ports": ports}]});
    policy("default", "many", spec)
}

#[test]
fn policy_of_thousands_of_blocks_and_many_ports_is_a_rule_for_each_address_family() {
    let lab = start_lab(1).unwrap();
    let host = &lab["h1"];
    create_network(&lab, "pods", FLAT).unwrap();
    let at = |n: u8| [format!("10.60.0.{n}"), format!("fd60::{n}")];
    let [database, allowed, excluded] =
        [("database", 4), ("allowed", 5), ("excluded", 6)].map(|(name, n)| {
            let [v4, v6] = at(n);
            attach(host, name, "pods", &["--ip", &v4, "--ip", &v6, "--label", &format!("app={name}")])
                .unwrap()
        });
    let _servers = [5400, 5458, 5401].map(|port| database.workload.tcp_echo(port).unwrap());
    apply(&lab, host, &many_blocks().to_string()).unwrap();
    // Expected connections get the full timeout; a refused one leaves no event to wait for.
    let short = Duration::from_millis(500);
    wait_until(SOON, "the policy to be in force", || {
        ensure!(!connects(&excluded, &database, 5400, short));
        Ok(())
    })
    .unwrap();
    assert!(connects(&allowed, &database, 5400, SOON) && connects(&allowed, &database, 5458, SOON));
    for address in database.addresses() {
        for (from, port) in [(&excluded, 5400), (&excluded, 5458), (&allowed, 5401)] {
            let target = SocketAddr::new(address.parse().unwrap(), port);
            let connected = from.workload.run(|| TcpStream::connect_timeout(&target, short).is_ok()).unwrap();
            assert!(!connected, "{} to {target}", from.name);
        }
    }
    let ruleset =
        host.exec_ok(["nft", "list", "chain", "inet", "ovl-policy", "default/many/ingress"]).unwrap();
    assert_eq!(ruleset.matches("goto pass.in").count(), 2, "a rule for each address family");
    // The explanation reads the policy itself, so it also tells that the merged blocks mean the same.
    let explained = rows(host, &["policy", "explain", "excluded", "database:5400"]).unwrap();
    assert!(explained.iter().all(|row| row["passes"] == json!(false)), "{explained:?}");
    wait_clean(lab.hosts(), SOON).unwrap();
}
