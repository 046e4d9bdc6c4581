//! ClusterNetworkPolicies with `domainNames`: what a pod was told for a name can be reached, for as long as it was told.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use netns_lab::{EchoServer, Host, Lab, Netns, Spawned, Underlay, wait_until};
use ovl_tests::kubernetes::{ApiServer, Kube};
use ovl_tests::ports::outsider;
use ovl_tests::resolver::{ResolvConf, config, dig, dnsmasq};
use ovl_tests::routed::create_network_of_mode;
use ovl_tests::{Attached, SOON, assert_contains, attach, rows, start_lab_with, strings, text, wait_clean};
use serde_json::{Value, json};

const AT: &str = "127.0.0.11";
/// The host's own resolver.
const UPSTREAM: &str = "127.0.0.1";
/// Less than the second after which a client repeats its first packet: only if that passes, a connection is made in time.
const FIRST_PACKET: Duration = Duration::from_millis(900);
/// Time to live that lasts longer than a test, in seconds.
const LONG: u32 = 600;
/// How long an address is admitted of which the time to live is 0 or 1 s.
const SHORT_LIFE: Duration = Duration::from_secs(15);

/// Names of the host's resolver: an address for both families, and the time to live.
const NAMES: [(&str, u8, u32); 12] = [
    ("www.ovl.test", 1, LONG),
    ("wild.test", 2, LONG),
    ("a.wild.test", 3, LONG),
    ("b.a.wild.test", 4, LONG),
    ("www.other.test", 5, LONG),
    ("target.other.test", 6, LONG),
    ("trusted.ovl.test", 7, LONG),
    ("short.ovl.test", 8, 1),
    ("kept.ovl.test", 9, 1),
    ("long.ovl.test", 10, LONG),
    ("walk.ovl.test", 11, LONG),
    ("late.ovl.test", 12, LONG),
];

fn v4(n: u8) -> IpAddr {
    [203, 0, 113, n].into()
}

fn v6(n: u8) -> IpAddr {
    format!("2001:db8::{n:x}").parse().unwrap()
}

/// A host with pods, and machines outside whose names its resolver knows.
struct World {
    lab: Lab,
    _file: ResolvConf,
    _servers: Vec<EchoServer>,
    _upstream: Spawned,
    outside: Netns,
}

impl World {
    fn new(mode: &str) -> Result<Self> {
        let (config, file) = config(1, &[UPSTREAM], "")?;
        let lab = start_lab_with(config.underlay(Underlay::Dual))?;
        let subnets = ["--subnet", "10.60.0.0/16", "--subnet", "fd60::/64"];
        create_network_of_mode(&lab, mode, "pods", &subnets)?;
        let host = &lab["h1"];
        let outside = outsider(&lab)?;
        for n in NAMES.map(|(_, n, _)| n) {
            outside.exec_ok(["ip", "addr", "add", &format!("{}/32", v4(n)), "dev", "br0"])?;
            outside.exec_ok(["ip", "addr", "add", &format!("{}/128", v6(n)), "dev", "br0", "nodad"])?;
        }
        host.exec_ok(["ip", "route", "add", "203.0.113.0/24", "via", "192.168.77.250"])?;
        host.exec_ok(["ip", "route", "add", "2001:db8::/32", "via", "fd77::fa"])?;
        let servers = [80, 81].map(|port| outside.tcp_echo(port).unwrap()).into();
        let records: Vec<String> = NAMES
            .iter()
            .map(|(name, n, ttl)| format!("--host-record={name},{},{},{ttl}", v4(*n), v6(*n)))
            .chain([
                format!("--cname=alias.ovl.test,target.other.test,{LONG}"),
                format!("--cname=evil.other.test,trusted.ovl.test,{LONG}"),
            ])
            .collect();
        let records: Vec<&str> = records.iter().map(String::as_str).collect();
        let upstream = dnsmasq(host, UPSTREAM, 53, &records)?;
        Ok(Self { lab, _file: file, _servers: servers, _upstream: upstream, outside })
    }

    fn host(&self) -> &Host {
        &self.lab["h1"]
    }
}

/// Whether a pod reaches port 80 of an address with its first packet.
fn reaches(from: &Attached, to: IpAddr) -> bool {
    reaches_at(from, to, 80)
}

fn reaches_at(from: &Attached, to: IpAddr, port: u16) -> bool {
    let to = SocketAddr::new(to, port);
    from.workload.run(|| TcpStream::connect_timeout(&to, FIRST_PACKET).is_ok()).unwrap()
}

/// Whether a pod reaches both addresses of a name.
fn reaches_both(from: &Attached, n: u8) -> [bool; 2] {
    [v4(n), v6(n)].map(|to| reaches(from, to))
}

fn ask(from: &Attached, question: &[&str]) -> Vec<String> {
    dig(&from.workload, AT, question).unwrap()
}

/// Asks for both addresses of a name, and expects them.
fn ask_both(from: &Attached, name: &str, n: u8) {
    for (kind, address) in [("A", v4(n)), ("AAAA", v6(n))] {
        let found = ask(from, &[name, kind]);
        assert!(found.contains(&address.to_string()), "{name} {kind}: {found:?}");
    }
}

fn wait_for(what: &str, within: Duration, condition: impl Fn() -> bool) {
    wait_until(within, what, || -> Result<()> {
        ensure!(condition());
        Ok(())
    })
    .unwrap();
}

/// A policy about pods `app=client`: they may ask the cluster DNS, connect to port 80 of these names, and to nothing else.
fn policy(names: &[&str]) -> Value {
    let dns = json!({"namespaces": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}});
    let port = |number: u16| json!({"tcp": {"destinationPort": {"number": number}}});
    let subject = json!({"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "client"}}});
    json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": {"name": "sites"},
        "spec": {"tier": "Admin", "priority": 10, "subject": {"pods": subject}, "egress": [
            {"name": "dns", "action": "Accept", "to": [dns],
             "protocols": [{"udp": {"destinationPort": {"number": 53}}}, port(53)]},
            {"name": "sites", "action": "Accept", "to": [{"domainNames": names}], "protocols": [port(80)]},
            {"name": "rest", "action": "Deny", "to": [{"networks": ["0.0.0.0/0", "::/0"]}]},
        ]},
    })
}

const PATTERNS: [&str; 9] = [
    "www.ovl.test",
    "*.Wild.test.",
    "alias.ovl.test",
    "trusted.ovl.test",
    "short.ovl.test",
    "kept.ovl.test",
    "long.ovl.test",
    "*.svc.cluster.local",
    "*.pods.ovl.internal",
];

/// How many elements the sets with a prefix have.
fn elements(host: &Host, prefix: &str) -> Result<usize> {
    let found = host.exec_ok(["nft", "-j", "list", "table", "inet", "ovl-policy"])?;
    let found: Value = serde_json::from_str(&found)?;
    let sets = found["nftables"].as_array().unwrap().iter().map(|it| &it["set"]);
    let sets = sets.filter(|set| set["name"].as_str().is_some_and(|name| name.starts_with(prefix)));
    Ok(sets.filter_map(|set| set["elem"].as_array()).map(Vec::len).sum())
}

fn problems(host: &Host, code: &str) -> Vec<String> {
    let status = host.ctl_json(&["status"]).unwrap();
    let all = status["problems"].as_array().unwrap().iter().filter(|it| it["code"] == code);
    all.map(|it| format!("{}: {}", text(&it["object"]), text(&it["message"]))).collect()
}

/// Deletes the elements of all sets whose names begin and end so.
fn flush_sets(host: &Host, prefix: &str, suffix: &str) {
    let found = host.exec_ok(["nft", "-j", "list", "table", "inet", "ovl-policy"]).unwrap();
    let found: Value = serde_json::from_str(&found).unwrap();
    let names = found["nftables"].as_array().unwrap().iter().filter_map(|it| it["set"]["name"].as_str());
    for name in names.filter(|name| name.starts_with(prefix) && name.ends_with(suffix)) {
        host.exec_ok(["nft", "flush", "set", "inet", "ovl-policy", name]).unwrap();
    }
}

/// An open connection through which bytes pass as long as it lives.
struct Open(TcpStream);

impl Open {
    fn to(from: &Attached, to: IpAddr) -> Self {
        let to = SocketAddr::new(to, 80);
        let stream = from.workload.run(|| TcpStream::connect_timeout(&to, FIRST_PACKET)).unwrap().unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        Self(stream)
    }

    fn assert_alive(&mut self) {
        self.0.write_all(b"here").unwrap();
        let mut back = [0; 4];
        self.0.read_exact(&mut back).unwrap();
        assert_eq!(&back, b"here");
    }

    fn wait_cut(&mut self) {
        wait_until(SOON, "a connection to be cut", || -> Result<()> {
            let passes = self.0.write_all(b"late").and_then(|()| self.0.read_exact(&mut [0; 4]));
            ensure!(passes.is_err());
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn pod_reaches_what_it_was_told_for_a_name_that_a_policy_admits() {
    assert_names_are_admitted("l3");
}

#[test]
fn endpoint_of_a_switched_network_reaches_what_it_was_told_for_a_name() {
    assert_names_are_admitted("l2");
}

fn assert_names_are_admitted(mode: &str) {
    let world = World::new(mode).unwrap();
    let host = world.host();
    let mut api = ApiServer::new();
    let _kube = Kube::start(&mut api, host).unwrap();
    let client = attach(host, "client", "pods", &["--label", "app=client"]).unwrap();
    let other = attach(host, "other", "pods", &[]).unwrap();
    let db = attach(host, "db", "pods", &["--alias", "www.trap.test"]).unwrap();
    let _db = db.workload.tcp_echo(80).unwrap();
    assert!(reaches(&client, v4(1)) && reaches(&client, v6(1)));
    // It is in the resolver's cache before there is a policy.
    ask_both(&client, "www.ovl.test", 1);
    let names: Vec<&str> = PATTERNS.into_iter().chain(["www.trap.test"]).collect();
    api.put(&policy(&names));
    wait_for("the policy to be in force", SOON, || !reaches(&client, v4(1)) && !reaches(&client, v6(1)));
    assert!(problems(host, "OVL-E090").is_empty() && problems(host, "OVL-E096").is_empty());
    assert!(!reaches(&client, db.address().parse().unwrap()));
    assert_eq!(reaches_both(&other, 1), [true, true]);

    // Each name is reached with the first packet: from the resolver's cache, from another resolver, over TCP.
    ask_both(&client, "WWW.ovl.test", 1);
    assert_eq!(reaches_both(&client, 1), [true, true]);
    assert!(!reaches_at(&client, v4(1), 81), "the rule is about port 80");
    for (name, n) in [("a.wild.test", 3), ("b.a.wild.test", 4)] {
        assert_eq!(reaches_both(&client, n), [false, false], "{name} before it was asked for");
        for (kind, to) in [("A", v4(n)), ("AAAA", v6(n))] {
            ask(&client, &[name, kind, if n == 3 { "+tcp" } else { "+notcp" }]);
            assert!(reaches(&client, to), "{name} {kind}");
        }
    }
    // A name of the cluster, and one that the search list of a pod leads to.
    ask(&client, &["db.pods.ovl.internal"]);
    assert!(reaches(&client, db.address().parse().unwrap()));
    ask_both(&client, "long.ovl.test.default.svc.cluster.local", 10);
    assert_eq!(reaches_both(&client, 10), [true, true]);
    // The asked name counts, wherever another resolver's CNAME record leads.
    ask_both(&client, "alias.ovl.test", 6);
    assert_eq!(reaches_both(&client, 6), [true, true]);

    // Everything else is refused: other names, the name above, one that names a trusted one, one that a search list leads to.
    for (name, n) in [
        ("www.other.test", 5),
        ("wild.test", 2),
        ("evil.other.test", 7),
        ("walk.ovl.test.default.svc.cluster.local", 11),
    ] {
        ask_both(&client, name, n);
        assert_eq!(reaches_both(&client, n), [false, false], "{name}");
    }
    ask(&other, &["trusted.ovl.test"]);
    assert_eq!(reaches_both(&client, 7), [false, false], "what others are told is no matter");
    let trapped = attach(host, "trap", "pods", &["--alias", "late.ovl.test"]).unwrap();
    let _trap = trapped.workload.tcp_echo(80).unwrap();
    assert_eq!(ask(&client, &["www.trap.test"]), [db.address()]);
    assert_eq!(ask(&client, &["late.ovl.test"]), [trapped.address()]);
    assert!(!reaches(&client, trapped.address().parse().unwrap()));

    // The reasons.
    let explain = |to: &str| rows(host, &["policy", "explain", "client", to]).unwrap()[0]["egress"].clone();
    let why = explain("203.0.113.4:80");
    assert_eq!((&why["passes"], &why["rule"]), (&json!(true), &json!(2)), "{why}");
    assert_contains(&text(&why["why"]), &["sites", "*.wild.test", "was answered for b.a.wild.test"]);
    let why = explain("203.0.113.5:80");
    assert_eq!((&why["passes"], &why["rule"]), (&json!(false), &json!(3)), "{why}");
    let drops = rows(host, &["policy", "drops"]).unwrap();
    let dropped = drops.iter().find(|drop| drop["to"] == "203.0.113.5").unwrap();
    assert_eq!(strings(&dropped["policies"]), ["sites"], "{dropped}");
    let traced = host.ctl(&["trace", "client", "203.0.113.4:80"]).unwrap();
    assert_contains(
        &traced.stdout,
        &["egress rule 2 of ClusterNetworkPolicy sites", "(203.0.113.4 was answered for"],
    );
    let listed = host.ctl_ok(&["policy", "ls", "-o", "json"]).unwrap();
    assert_contains(&listed, &["*.wild.test"]);
    let metrics = host.ctl_ok(&["metrics"]).unwrap();
    assert_contains(&metrics, &["ovl_policy_name_addresses 1", "ovl_policy_name_displaced_total 0"]);

    api.delete("clusternetworkpolicies", "", "sites").unwrap();
    wait_for("no policy", SOON, || reaches(&client, v4(5)) && reaches(&client, v6(5)));
    assert!(!host.exec_ok(["nft", "list", "tables"]).unwrap().contains("ovl-policy"));
    wait_clean(world.lab.hosts(), SOON).unwrap();
    drop(world.outside);
}

#[test]
fn what_a_pod_was_told_outlasts_restarts_and_ends_with_its_time() {
    let world = World::new("l3").unwrap();
    let host = world.host();
    let client = attach(host, "client", "pods", &["--label", "app=client"]).unwrap();
    let apply = |names: &[&str]| {
        let made = world.lab.dir().join("policy.json");
        std::fs::write(&made, policy(names).to_string()).unwrap();
        host.ctl_ok(&["apply", "-f", made.to_str().unwrap()]).unwrap();
    };
    apply(&PATTERNS);
    wait_for("the policy to be in force", SOON, || !reaches(&client, v4(5)));
    ask_both(&client, "long.ovl.test", 10);
    ask_both(&client, "kept.ovl.test", 9);
    let told = Instant::now();
    ask_both(&client, "short.ovl.test", 8);
    assert_eq!(reaches_both(&client, 8), [true, true]);
    let mut open = [v4(9), v6(9)].map(|to| Open::to(&client, to));
    let before = elements(host, "name.").unwrap();
    assert_eq!(before, 6);

    // While ovld is down, the kernel goes on.
    host.kill9().unwrap();
    assert_eq!(reaches_both(&client, 10), [true, true]);
    open.iter_mut().for_each(Open::assert_alive);
    host.start().unwrap();
    host.wait_ready(SOON).unwrap();
    assert_eq!(reaches_both(&client, 10), [true, true]);
    open.iter_mut().for_each(Open::assert_alive);
    wait_clean(world.lab.hosts(), SOON).unwrap();
    let why = rows(host, &["policy", "explain", "client", "203.0.113.10:80"]).unwrap();
    assert_contains(&text(&why[0]["egress"]["why"]), &["was answered for long.ovl.test"]);
    // A change of the policy writes the table anew.
    apply(&[&PATTERNS[..], &["more.ovl.test"]].concat());
    assert_eq!(reaches_both(&client, 10), [true, true]);

    // The time is over: no new connection, and the open ones go on, also when they are judged again.
    for to in [v4(8), v6(8), v4(9), v6(9)] {
        wait_for("an address to end", SHORT_LIFE + SOON, || !reaches(&client, to));
    }
    assert!(told.elapsed() >= SHORT_LIFE - Duration::from_secs(1), "after {:?}", told.elapsed());
    open.iter_mut().for_each(Open::assert_alive);
    apply(&PATTERNS);
    open.iter_mut().for_each(Open::assert_alive);
    host.kill9().unwrap();
    host.start().unwrap();
    host.wait_ready(SOON).unwrap();
    open.iter_mut().for_each(Open::assert_alive);
    assert_eq!(reaches_both(&client, 10), [true, true]);
    assert_eq!(elements(host, "name.").unwrap(), 2);
    // They go on because they were remembered, and for nothing else.
    flush_sets(host, "kept.", ".6");
    apply(&[&PATTERNS[..], &["more.ovl.test"]].concat());
    let [v4_open, v6_open] = &mut open;
    v6_open.wait_cut();
    v4_open.assert_alive();
    // It may ask again.
    ask_both(&client, "short.ovl.test", 8);
    assert_eq!(reaches_both(&client, 8), [true, true]);

    // Another program deletes the table.
    host.exec_ok(["nft", "delete", "table", "inet", "ovl-policy"]).unwrap();
    wait_for("the table to be written again", SOON, || elements(host, "name.").is_ok_and(|count| count == 4));
    assert_eq!(reaches_both(&client, 10), [true, true]);
    assert!(!reaches(&client, v4(5)));

    // Without the name, what it admitted is cut.
    apply(&["www.ovl.test"]);
    wait_for("the connections to be cut", SOON, || !reaches(&client, v4(10)));
    v4_open.wait_cut();
    wait_clean(world.lab.hosts(), SOON).unwrap();
}

#[test]
fn names_are_not_admitted_while_another_program_is_the_cluster_dns() {
    let world = World::new("l3").unwrap();
    let host = world.host();
    let mut api = ApiServer::new();
    api.put(&json!({
        "kind": "Service", "metadata": {"name": "kube-dns", "namespace": "kube-system"},
        "spec": {
            "type": "ClusterIP", "clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"],
            "ports": [{"name": "dns", "port": 53, "protocol": "UDP"}],
        },
    }));
    let slice = |ready: bool| {
        json!({
            "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {
                "name": "kube-dns-1", "namespace": "kube-system",
                "labels": {"kubernetes.io/service-name": "kube-dns"},
            },
            "ports": [{"name": "dns", "port": 53, "protocol": "UDP"}],
            "endpoints": [{"addresses": ["203.0.113.1"], "conditions": {"ready": ready}}],
        })
    };
    api.put(&slice(true));
    api.put(&policy(&["www.ovl.test"]));
    let _kube = Kube::start(&mut api, host).unwrap();
    let client = attach(host, "client", "pods", &["--label", "app=client"]).unwrap();
    wait_for("the policy to be in force", SOON, || !reaches(&client, v4(1)));
    let named = || {
        let found = problems(host, "OVL-E096");
        found.iter().any(|it| it.starts_with("sites: ") && it.contains("queries to the cluster DNS"))
    };
    wait_for("the problem", SOON, named);
    wait_for("an Event", SOON, || {
        api.all("events").iter().any(|event| {
            event["regarding"]["kind"] == "ClusterNetworkPolicy" && event.to_string().contains("domainNames")
        })
    });
    // ovl still answers at its own addresses.
    ask_both(&client, "www.ovl.test", 1);
    assert_eq!(reaches_both(&client, 1), [true, true]);
    api.put(&slice(false));
    wait_for("no problem", Duration::from_secs(30), || !named() && problems(host, "OVL-E090").is_empty());
}
