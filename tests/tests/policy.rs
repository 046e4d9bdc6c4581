//! Network policies: who connects to whom, by the tables of Kubernetes' own tests, and what changes do.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use netns_lab::{Lab, LabConfig, Netns, wait_until};
use ovl_tests::policy::{Proto, World, namespace, policy, port_name, wait_enforced};
use ovl_tests::routed::make_routed;
use ovl_tests::service::{Named, apply};
use ovl_tests::{
    Attached, SOON, assert_says, attach, attach_workload, make_network, rows, show_frames_to_firewall,
    started, strings, text, wait_clean,
};
use serde_json::{Value, json};

/// The example of the networking model that ovl is built after.
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

fn connects(from: &Attached, to: &Attached, port: u16, patience: Duration) -> bool {
    to.addresses().iter().all(|address| {
        let target = SocketAddr::new(address.parse().unwrap(), port);
        from.workload.run(|| TcpStream::connect_timeout(&target, patience).is_ok()).unwrap()
    })
}

/// The document's result: "api pod → database:5432 ✓ (allowed by policy)", "web pod → database:5432 ✗
/// (blocked!)", "api pod → database:6379 ✗ (wrong port!)".
fn assert_db_allow_api_only(make: impl Fn(&Lab)) {
    let lab = started(2).unwrap();
    make(&lab);
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
        wait_until(SOON, &format!("what {} reaches", from.name), || -> Result<()> {
            // Both ways: an answer that is late is no refusal.
            let patience = |passes| if passes { SOON } else { Duration::from_secs(1) };
            let found = (
                connects(from, &database, 5432, patience(expected.0)),
                connects(from, &database, 6379, patience(expected.1)),
            );
            ensure!(found == expected, "5432, 6379: {found:?} and not {expected:?}");
            Ok(())
        })
        .unwrap();
    }
    // Why, and what was refused.
    let explain = |from: &str, port: &str| {
        let found = rows(&lab["h2"], &["policy", "explain", from, &format!("database:{port}")]).unwrap();
        found.into_iter().next().unwrap()
    };
    let passes = explain("api-h2", "5432");
    assert_eq!((&passes["passes"], &passes["ingress"]["rule"]), (&json!(true), &json!(1)));
    assert_says(&text(&passes["ingress"]["why"]), &["default/db-allow-api-only", "app=api", "TCP 5432"]);
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
    assert_says(&metrics, &["ovl_policy_refused_packets_total{namespace=\"default\",endpoint=\"database\""]);
    wait_clean(lab.hosts(), SOON).unwrap();
}

const BOTH: &[&str] = &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"];
const FLAT: &[&str] = &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/64"];

#[test]
fn db_allow_api_only_on_a_routed_network() {
    assert_db_allow_api_only(|lab| make_routed(lab, "pods", BOTH).unwrap());
}

#[test]
fn db_allow_api_only_on_a_switched_network() {
    assert_db_allow_api_only(|lab| make_network(lab, "pods", FLAT).unwrap());
}

#[test]
fn db_allow_api_only_on_a_switched_network_without_a_gateway() {
    assert_db_allow_api_only(|lab| make_network(lab, "pods", &[FLAT, &["--internal"]].concat()).unwrap());
}

#[test]
fn db_allow_api_only_on_an_encrypted_switched_network() {
    assert_db_allow_api_only(|lab| make_network(lab, "pods", &[FLAT, &["--encrypted"]].concat()).unwrap());
}

#[test]
fn db_allow_api_only_on_an_encrypted_routed_network() {
    assert_db_allow_api_only(|lab| make_routed(lab, "pods", &[BOTH, &["--encrypted"]].concat()).unwrap());
}

fn selector(key: &str, value: &str) -> Value {
    json!({"matchLabels": {key: value}})
}

/// A kind of policy, each with the namespace that it is made in.
fn kinds(world: &World) -> Vec<(&'static str, Vec<Value>)> {
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
            "from pods of a namespace: both",
            vec![x(
                "p",
                json!({"podSelector": a,
            "ingress": [{"from": [{"namespaceSelector": selector("ns", "y"), "podSelector": selector("pod", "b")}]}]}),
            )],
        ),
        (
            "from pods or a namespace: either",
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
            "out to a named port",
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
            "egress without policyTypes isolates both ways",
            vec![x(
                "p",
                json!({"podSelector": a,
            "egress": [{"to": [{"namespaceSelector": {}, "podSelector": selector("pod", "b")}]}]}),
            )],
        ),
        (
            "out to an address",
            vec![x(
                "p",
                json!({"podSelector": a, "policyTypes": ["Egress"],
            "egress": [{"to": [{"ipBlock": {"cidr": address("y", "b", true)}}, {"ipBlock": {"cidr": address("z", "c", false)}}]}]}),
            )],
        ),
        (
            "from addresses but one",
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
            "both ends have a say",
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
    let mut world = World::new(mode, more).unwrap();
    world.settle("all reach all without policies").unwrap();
    for (kind, policies) in kinds(&world) {
        world.apply(&policies).unwrap();
        world.settle(kind).unwrap();
        for policy in &policies {
            let meta = &policy["metadata"];
            world.delete("networkpolicy", &text(&meta["namespace"]), &text(&meta["name"])).unwrap();
        }
    }
    world.settle("all reach all again").unwrap();
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
fn what_changes_is_enforced_on_all_hosts() {
    let mut world = World::new("l3", &[]).unwrap();
    let allow = json!({"podSelector": selector("pod", "a"), "ingress": [
        {"from": [{"namespaceSelector": selector("ns", "y"), "podSelector": selector("pod", "b")}]}]});
    world.apply(&[policy("x", "p", allow)]).unwrap();
    world.settle("a policy").unwrap();
    // Labels of pods: of whom the rule means, and of whom the policy selects.
    world.relabel("y", "c", &[("pod", "b")]).unwrap();
    world.settle("a pod with another label is meant").unwrap();
    world.relabel("y", "c", &[("pod", "c")]).unwrap();
    world.relabel("x", "b", &[("pod", "a"), ("more", "1")]).unwrap();
    world.settle("a pod with another label is isolated").unwrap();
    world.relabel("x", "b", &[("pod", "b")]).unwrap();
    world.settle("and no more").unwrap();
    // Labels of namespaces.
    world.apply(&[namespace("z", &[("ns", "y")])]).unwrap();
    world.settle("another namespace is meant").unwrap();
    world.apply(&[namespace("z", &[("ns", "z")])]).unwrap();
    world.settle("and no more, either").unwrap();
    // Pods that go and come.
    world.remove("y", "b").unwrap();
    let host = world.lab.hosts()[2].clone();
    world.add(&host, "y", "b").unwrap();
    world.remove("x", "a").unwrap();
    let host = world.lab.hosts()[1].clone();
    world.add(&host, "x", "a").unwrap();
    world.settle("pods on other hosts").unwrap();
    // The policy itself.
    let deny = json!({"podSelector": selector("pod", "a"), "policyTypes": ["Ingress", "Egress"]});
    world.apply(&[policy("x", "p", deny)]).unwrap();
    world.settle("a policy that says something else").unwrap();
    world.delete("networkpolicy", "x", "p").unwrap();
    world.settle("no policy").unwrap();
    wait_clean(world.lab.hosts(), SOON).unwrap();
}

#[test]
fn what_others_flush_is_put_back_and_what_is_killed_stays() {
    let mut world = World::new("l2", &[]).unwrap();
    let spec = json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]});
    world.apply(&[policy("y", "p", spec)]).unwrap();
    world.settle("a policy").unwrap();
    for host in world.lab.hosts() {
        host.kill9().unwrap();
    }
    world.settle("policies stand without daemons").unwrap();
    for host in world.lab.hosts() {
        host.start().unwrap();
    }
    for host in world.lab.hosts() {
        host.wait_ready(SOON).unwrap();
        host.exec_ok(["nft", "flush", "ruleset"]).unwrap();
        wait_enforced(host).unwrap();
    }
    world.settle("after a flush").unwrap();
    for table in ["inet", "bridge"] {
        world.lab["h2"].exec_ok(["nft", "delete", "table", table, "ovl-policy"]).unwrap();
    }
    wait_enforced(&world.lab["h2"]).unwrap();
    world.settle("after a deletion").unwrap();
}

/// A connection that goes on, a byte each way at a time.
fn talk(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(b"x")?;
    let mut byte = [0];
    if stream.read(&mut byte)? == 0 {
        bail!("closed");
    }
    Ok(())
}

fn opened(from: &Attached, to: &Attached, port: u16) -> TcpStream {
    let target = SocketAddr::new(to.address().parse().unwrap(), port);
    let stream = from.workload.run(|| TcpStream::connect_timeout(&target, SOON)).unwrap().unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
}

fn assert_cut(make: impl Fn(&Lab)) {
    let lab = started(2).unwrap();
    make(&lab);
    let database = labelled(&lab, "h1", "database", "database");
    let server = database.workload.tcp_echo(5432).unwrap();
    let mut allowed: Vec<TcpStream> = Vec::new();
    let mut forbidden: Vec<TcpStream> = Vec::new();
    for host in ["h1", "h2"] {
        allowed.push(opened(&labelled(&lab, host, &format!("api-{host}"), "api"), &database, server.port()));
        forbidden.push(opened(
            &labelled(&lab, host, &format!("web-{host}"), "web"),
            &database,
            server.port(),
        ));
    }
    allowed.iter_mut().chain(&mut forbidden).for_each(|stream| talk(stream).unwrap());
    apply(&lab, &lab["h1"], EXAMPLE).unwrap();
    for stream in &mut forbidden {
        wait_until(SOON, "the end of a forbidden connection", || talk(stream).is_err()).unwrap();
    }
    for stream in &mut allowed {
        talk(stream).unwrap();
    }
    // A policy that is replaced cuts what passed under the one before.
    apply(&lab, &lab["h1"], &EXAMPLE.replace("app: api", "app: nobody")).unwrap();
    for stream in &mut allowed {
        wait_until(SOON, "the end of a connection that was allowed", || talk(stream).is_err()).unwrap();
    }
}

#[test]
fn a_connection_that_a_new_policy_forbids_is_cut_on_a_routed_network() {
    assert_cut(|lab| make_routed(lab, "pods", BOTH).unwrap());
}

#[test]
fn a_connection_that_a_new_policy_forbids_is_cut_on_a_switched_network() {
    assert_cut(|lab| make_network(lab, "pods", FLAT).unwrap());
}

#[test]
fn a_pod_does_not_get_around_a_policy_under_anothers_address() {
    for mode in ["l3", "l2"] {
        let lab = started(2).unwrap();
        match mode {
            "l3" => make_routed(&lab, "pods", &["--subnet", "10.60.0.0/16"]).unwrap(),
            _ => make_network(&lab, "pods", &["--subnet", "10.60.0.0/16"]).unwrap(),
        }
        let database = labelled(&lab, "h1", "database", "database");
        let api = labelled(&lab, "h2", "api", "api");
        apply(&lab, &lab["h1"], &EXAMPLE.replace("protocol: TCP", "protocol: UDP")).unwrap();
        lab.hosts().iter().for_each(|host| wait_enforced(host).unwrap());
        let hears = database.workload.run(|| std::net::UdpSocket::bind("0.0.0.0:5432")).unwrap().unwrap();
        hears.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        let stolen = api.address();
        for host in ["h1", "h2"] {
            let web = labelled(&lab, host, &format!("web-{host}"), "web");
            web.workload.exec_ok(["ip", "addr", "add", &format!("{stolen}/32"), "dev", "eth0"]).unwrap();
            let target = SocketAddr::new(database.address().parse().unwrap(), 5432);
            let source: IpAddr = stolen.parse().unwrap();
            web.workload
                .run(|| -> std::io::Result<()> {
                    let socket = std::net::UdpSocket::bind((source, 0))?;
                    (0..20).try_for_each(|_| socket.send_to(b"forged", target).map(drop))
                })
                .unwrap()
                .unwrap();
            let heard = hears.recv_from(&mut [0; 64]);
            assert!(heard.is_err(), "on {mode} from {host}: {heard:?}");
        }
        // The owner's own arrive.
        let target = SocketAddr::new(database.address().parse().unwrap(), 5432);
        wait_until(SOON, "the api's datagram", || -> Result<()> {
            api.workload.run(|| -> std::io::Result<()> {
                std::net::UdpSocket::bind("0.0.0.0:0")?.send_to(b"own", target).map(drop)
            })??;
            let (length, from) = hears.recv_from(&mut [0; 64])?;
            ensure!((length, from.ip().to_string()) == (3, stolen.clone()), "{length} {from}");
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn a_pod_is_isolated_from_its_first_packet_on_also_on_a_host_that_joins_late() {
    let lab = Lab::new(LabConfig::hosts(3)).unwrap();
    for host in ["h1", "h2"] {
        lab[host].start().unwrap();
    }
    for host in ["h1", "h2"] {
        lab[host].wait_ready(SOON).unwrap();
    }
    lab.wait_all_alive(SOON).unwrap();
    make_routed(&lab, "pods", &["--subnet", "10.60.0.0/16"]).unwrap();
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
        // The address that it will have.
        let (first, _) = attach(&[]);
        let address = first.address();
        lab[host].ctl_ok(&["detach", &first.name]).unwrap();
        let target = SocketAddr::new(address.parse().unwrap(), 5432);
        // Somebody who is not to reach it tries from before it is there until it is reached by who may.
        let done = AtomicBool::new(false);
        let reached = std::thread::scope(|scope| {
            let tries = scope.spawn(|| {
                web.workload.run(|| {
                    let mut reached = 0;
                    while !done.load(Ordering::Relaxed) {
                        let tried = TcpStream::connect_timeout(&target, Duration::from_millis(20));
                        reached += usize::from(tried.is_ok());
                    }
                    reached
                })
            });
            let (database, _server) = attach(&["--ip", &address]);
            wait_until(SOON, "the api's connection", || connects(&api, &database, 5432, SOON)).unwrap();
            done.store(true, Ordering::Relaxed);
            tries.join().unwrap().unwrap()
        });
        assert_eq!(reached, 0, "on {host}");
    }
}

#[test]
fn broadcasts_and_link_local_packets_reach_whom_no_policy_isolates() {
    for shown in [false, true] {
        assert_no_way_around(shown);
    }
}

fn assert_no_way_around(shown: bool) {
    let lab = started(2).unwrap();
    lab.hosts().iter().for_each(|host| show_frames_to_firewall(host, shown).unwrap());
    make_network(&lab, "pods", &["--subnet", "10.60.0.0/16"]).unwrap();
    let database = labelled(&lab, "h1", "database", "database");
    let other = labelled(&lab, "h1", "other", "other");
    let senders = ["h1", "h2"].map(|host| labelled(&lab, host, &format!("web-{host}"), "web"));
    apply(&lab, &lab["h1"], EXAMPLE).unwrap();
    lab.hosts().iter().for_each(|host| wait_enforced(host).unwrap());
    let hears = |at: &Attached| {
        let socket = at.workload.run(|| std::net::UdpSocket::bind("0.0.0.0:5432")).unwrap().unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
        socket
    };
    let (isolated, free) = (hears(&database), hears(&other));
    let _servers = [&database, &other].map(|at| at.workload.tcp_echo(5432).unwrap());
    for from in &senders {
        wait_until(SOON, &format!("a broadcast of {}", from.name), || -> Result<()> {
            from.workload.run(|| -> std::io::Result<()> {
                let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
                socket.set_broadcast(true)?;
                socket.send_to(b"all", "10.60.255.255:5432").map(drop)
            })??;
            free.recv_from(&mut [0; 8])?;
            Ok(())
        })
        .unwrap();
        let heard = isolated.recv_from(&mut [0; 8]);
        assert!(heard.is_err(), "frames shown: {shown}: {heard:?}");
        // Addresses that nobody gave out. An own one may be new, and not usable yet.
        let connects = |to: &Attached, patience| {
            let target = link_local(to, from);
            from.workload.run(|| TcpStream::connect_timeout(&target, patience)).unwrap()
        };
        let what = format!("{} to {}, frames shown: {shown}", from.name, other.name);
        wait_until(SOON, &what, || connects(&other, SOON).map(drop)).unwrap();
        let reached = connects(&database, Duration::from_secs(1));
        assert!(reached.is_err(), "{} to {}, frames shown: {shown}", from.name, database.name);
    }
    // ARP still works for it.
    let api = labelled(&lab, "h2", "api", "api");
    wait_until(SOON, "the api's connection", || connects(&api, &database, 5432, SOON)).unwrap();
}

/// The address that an interface gave itself, as another one reaches it.
fn link_local(of: &Attached, from: &Attached) -> SocketAddr {
    let found = wait_until(SOON, "a link-local address", || -> Result<Option<std::net::Ipv6Addr>> {
        let shown = of.workload.exec_ok([
            "ip",
            "-6",
            "-o",
            "addr",
            "show",
            "dev",
            "eth0",
            "scope",
            "link",
            "-tentative",
        ])?;
        let net = shown.split_whitespace().skip_while(|word| *word != "inet6").nth(1);
        Ok(net.and_then(|net| net.split('/').next()?.parse().ok()))
    })
    .unwrap();
    let index = from.workload.run(|| nix::net::if_::if_nametoindex("eth0")).unwrap().unwrap();
    std::net::SocketAddrV6::new(found, 5432, 0, index).into()
}

/// A Service is no way around a policy, and none in its way: what counts are the pods at both ends.
fn assert_services_judged(make: impl Fn(&Lab)) {
    let lab = started(2).unwrap();
    make(&lab);
    let database = labelled(&lab, "h2", "database", "database");
    let _server = Named::start(&database.workload, "database", 8080).unwrap();
    let [api, near, web] = [("h1", "api"), ("h2", "api"), ("h1", "web")]
        .map(|(host, app)| labelled(&lab, host, &format!("{app}-{host}"), app));
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "database"},
        "spec": {
            "type": "NodePort", "selector": {"app": "database"}, "ipFamilyPolicy": "PreferDualStack",
            "ports": [{"port": 80, "targetPort": 8080, "nodePort": 30080}],
        },
    });
    apply(&lab, &lab["h1"], &service.to_string()).unwrap();
    let service = lab["h1"].ctl_json(&["get", "svc", "database"]).unwrap();
    let addresses: Vec<IpAddr> =
        strings(&service["spec"]["clusterIPs"]).iter().map(|it| it.parse().unwrap()).collect();
    assert_eq!(addresses.len(), 2, "{service}");
    let node = SocketAddr::new(lab["h2"].address().unwrap(), 30080);
    // The pods by the Service; another host, which is none of the cluster's pods, by the port of the backend's.
    let expect = |what: &str, reaching: &[&Attached], outside: bool| {
        wait_until(SOON, what, || -> Result<()> {
            for from in [&api, &near, &web, &database] {
                let expected = reaching.iter().any(|each| each.name == from.name);
                for address in &addresses {
                    let found = reaches(&from.workload, SocketAddr::new(*address, 80), expected);
                    ensure!(found == expected, "{} to {address}: {found}", from.name);
                }
            }
            let found = reaches(&lab["h1"], node, outside);
            ensure!(found == outside, "from outside: {found}");
            Ok(())
        })
        .unwrap();
    };
    expect("all reach it", &[&api, &near, &web, &database], true);
    let ingress = |from: Value, port: u16| {
        let spec = json!({"podSelector": selector("app", "database"), "policyTypes": ["Ingress"],
            "ingress": [{"from": from, "ports": [{"port": port}]}]});
        apply(&lab, &lab["h1"], &policy("default", "in", spec).to_string()).unwrap();
    };
    let apis = json!({"podSelector": selector("app", "api")});
    ingress(json!([apis]), 8080);
    expect("those that the backend lets in, and itself", &[&api, &near, &database], false);
    ingress(json!([apis]), 80);
    expect("the port is the pod's, not the Service's", &[&database], false);
    ingress(json!([apis, {"ipBlock": {"cidr": "192.168.77.0/24"}}]), 8080);
    expect("one from outside has its own address", &[&api, &near, &database], true);
    let egress = |port: u16| {
        let spec = json!({"podSelector": selector("app", "api"), "policyTypes": ["Egress"],
            "egress": [{"to": [{"podSelector": selector("app", "database")}], "ports": [{"port": port}]}]});
        apply(&lab, &lab["h1"], &policy("default", "out", spec).to_string()).unwrap();
    };
    egress(80);
    expect("nor is it the Service's for the client", &[&database], true);
    egress(8080);
    expect("the client's policy means the backend", &[&api, &near, &database], true);
    // The same answer for who asks.
    let asked = rows(&lab["h1"], &["policy", "explain", "web-h1", "database:8080"]).unwrap();
    assert_eq!(asked[0]["passes"], json!(false), "{asked:?}");
    wait_clean(lab.hosts(), SOON).unwrap();
}

/// Whether a server answers; patient where it should.
fn reaches(from: &Netns, to: SocketAddr, expected: bool) -> bool {
    let patience = if expected { SOON } else { Duration::from_secs(1) };
    let said = from.run(|| -> Result<usize> {
        let mut stream = TcpStream::connect_timeout(&to, patience)?;
        stream.set_read_timeout(Some(patience))?;
        Ok(stream.read(&mut [0; 64])?)
    });
    said.unwrap().is_ok_and(|length| length > 0)
}

#[test]
fn what_a_service_leads_to_is_judged_on_a_routed_network() {
    assert_services_judged(|lab| make_routed(lab, "pods", BOTH).unwrap());
}

#[test]
fn what_a_service_leads_to_is_judged_on_a_switched_network() {
    assert_services_judged(|lab| make_network(lab, "pods", FLAT).unwrap());
}

#[test]
fn what_a_service_leads_to_is_judged_where_frames_are_translated_while_they_are_bridged() {
    assert_services_judged(|lab| {
        lab.hosts().iter().for_each(|host| show_frames_to_firewall(host, true).unwrap());
        make_network(lab, "pods", FLAT).unwrap();
    });
}
