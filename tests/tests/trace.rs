//! `ovlctl trace`: the model and a probe on all kinds of ways, and the cause of faults.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use netns_lab::{Host, Lab, wait_until};
use ovl_tests::policy::ONLY_API;
use ovl_tests::routed::create_routed_network;
use ovl_tests::service::apply;
use ovl_tests::{Attached, SOON, attach, create_network, start_lab, text, wait_clean};
use serde_json::Value;

/// The longest time that a trace may take, with the start of a program on a loaded machine.
const BOUND: Duration = Duration::from_secs(8);

const BOTH: &[&str] = &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"];
const FLAT: &[&str] = &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/64"];

/// A trace, as `ovlctl trace -o json` prints it.
#[derive(Debug)]
struct Traced(Value);

impl Traced {
    fn of(host: &Host, args: &[&str]) -> Result<Self> {
        let begun = Instant::now();
        let args = [&["trace", "-o", "json"], args].concat();
        let output = host.ctl(&args)?;
        ensure!(begun.elapsed() < BOUND, "took {:?}", begun.elapsed());
        let found: Value = serde_json::from_str(&output.stdout)
            .map_err(|error| anyhow::anyhow!("{error}: {}{}", output.stdout, output.stderr))?;
        let expected = i32::from(found["arrived"] != true);
        ensure!(output.code() == Some(expected), "status {:?}: {found:#}", output.code());
        Ok(Self(found))
    }

    fn arrived(&self) -> bool {
        self.0["arrived"] == true
    }

    /// The reason why the packet did not arrive.
    fn reason(&self) -> String {
        text(&self.0["reason"])
    }

    /// The stages of the hops on a host.
    fn stages(&self, host: &str) -> Vec<String> {
        let hops = self.0["hops"].as_array().unwrap().iter();
        hops.filter(|hop| hop["host"] == host).map(|hop| text(&hop["stage"])).collect()
    }

    /// Whether the probe was seen at a hop. `None` if it cannot be seen there.
    fn seen(&self, host: &str, stage: &str) -> Option<bool> {
        let hops = self.0["hops"].as_array().unwrap();
        hops.iter().find(|hop| hop["host"] == host && hop["stage"] == stage)?["probe"]["seen"].as_bool()
    }

    /// Checks that the packet arrived, that the model agrees, and that the probe was seen at each hop where it can be.
    fn assert_arrived(&self) {
        assert!(self.arrived(), "{:#}", self.0);
        assert_eq!(self.0["agree"], true, "{:#}", self.0);
        assert_eq!(self.0["model"]["arrives"], true, "{:#}", self.0);
        for hop in self.0["hops"].as_array().unwrap() {
            let unseen = hop["probe"]["seen"] == false;
            assert!(!unseen && hop["model"] == "passes", "{hop} of {:#}", self.0);
            assert!(!text(&hop["command"]).is_empty());
        }
    }

    /// Checks that the packet did not arrive, and that the reason has these parts.
    fn assert_stopped(&self, parts: &[&str]) {
        assert!(!self.arrived(), "{:#}", self.0);
        let reason = self.reason();
        assert!(parts.iter().all(|part| reason.contains(part)), "{reason:?} without {parts:?}: {:#}", self.0);
        assert!(!text(&self.0["advice"]).is_empty(), "{:#}", self.0);
    }
}

/// Two hosts with a workload each, `a` on h1 and `b` on h2, that reach each other.
fn pair(create: impl Fn(&Lab)) -> (Lab, Attached, Attached) {
    let lab = start_lab(2).unwrap();
    create(&lab);
    let a = attach(&lab["h1"], "a", "net", &[]).unwrap();
    let b = attach(&lab["h2"], "b", "net", &[]).unwrap();
    for (from, to) in [(&a, &b), (&b, &a)] {
        for address in to.addresses() {
            from.workload.ping_until(&address, SOON).unwrap();
        }
    }
    (lab, a, b)
}

fn switched(lab: &Lab) {
    create_network(lab, "net", FLAT).unwrap();
}

fn routed(lab: &Lab) {
    create_routed_network(lab, "net", BOTH).unwrap();
}

/// Fails unless no table of a trace is left on any host.
fn assert_nothing_left(lab: &Lab) {
    for host in lab.hosts() {
        let tables = host.exec_ok(["nft", "list", "tables"]).unwrap();
        assert!(!tables.contains("ovl-trace"), "{}: {tables}", host.name());
    }
}

#[test]
fn probe_is_seen_at_each_hop_of_a_switched_network() {
    let (lab, a, b) = pair(switched);
    let _servers = [b.workload.tcp_echo(80).unwrap(), b.workload.udp_echo(53).unwrap()];
    for host in ["h1", "h2"] {
        for to in ["b", "b:80", "b:53/udp"] {
            Traced::of(&lab[host], &["a", to]).unwrap().assert_arrived();
        }
    }
    for address in b.addresses() {
        let traced = Traced::of(&lab["h2"], &["a", &address]).unwrap();
        traced.assert_arrived();
        for stage in ["sender", "source-check", "fdb", "leaves"] {
            assert_eq!(traced.seen("h1", stage), Some(true), "{stage}: {traced:?}");
        }
        for stage in ["enters", "decapsulated", "delivery", "destination"] {
            assert_eq!(traced.seen("h2", stage), Some(true), "{stage}: {traced:?}");
        }
    }
    let model = Traced::of(&lab["h1"], &["a", "b:80", "--no-probe"]).unwrap();
    assert!(model.arrived() && model.0.get("probe").is_none() && model.0["model"]["arrives"] == true);
    // Nothing listens there.
    Traced::of(&lab["h1"], &["a", "b:81"]).unwrap().assert_stopped(&["no program listens at TCP port 81"]);
    Traced::of(&lab["h1"], &["a", "b:81/udp"])
        .unwrap()
        .assert_stopped(&["no program listens at UDP port 81"]);
    // On one host.
    let c = attach(&lab["h1"], "c", "net", &[]).unwrap();
    a.workload.ping_until(c.address(), SOON).unwrap();
    let traced = Traced::of(&lab["h2"], &["a", "c"]).unwrap();
    traced.assert_arrived();
    assert!(traced.stages("h2").is_empty() && traced.seen("h1", "destination") == Some(true));
    let table = lab["h1"].ctl_ok(&["trace", "a", "b:80"]).unwrap();
    assert!(table.lines().all(|line| line.chars().count() <= 100), "{table}");
    assert_nothing_left(&lab);
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn probe_is_seen_on_routed_and_encrypted_networks_over_both_families() {
    for (mode, more) in [
        ("l3", &[][..]),
        ("l3", &["--backend", "direct"]),
        ("l3", &["--encrypted"]),
        ("l2", &["--encrypted"]),
    ] {
        let (lab, _a, b) = pair(|lab| match mode {
            // The gateway of a direct route is the other host, which has no address of IPv6 here.
            "l3" if more.contains(&"direct") => {
                create_routed_network(lab, "net", &[&BOTH[..2], more].concat()).unwrap();
            }
            "l3" => create_routed_network(lab, "net", &[BOTH, more].concat()).unwrap(),
            _ => create_network(lab, "net", &[FLAT, more].concat()).unwrap(),
        });
        let _server = b.workload.tcp_echo(80).unwrap();
        for address in b.addresses() {
            let traced = Traced::of(&lab["h2"], &["a", &address]).unwrap();
            traced.assert_arrived();
            let with_port =
                if address.contains(':') { format!("[{address}]:80") } else { format!("{address}:80") };
            Traced::of(&lab["h1"], &["a", &with_port]).unwrap().assert_arrived();
        }
        assert_nothing_left(&lab);
    }
}

/// A Service of this name for pods with the label `app`, and its port 80.
fn service(name: &str, app: &str) -> String {
    format!(
        "{{\"apiVersion\":\"v1\",\"kind\":\"Service\",\"metadata\":{{\"name\":\"{name}\"}},\"spec\":{{
            \"selector\":{{\"app\":\"{app}\"}},\"ports\":[{{\"port\":80,\"targetPort\":8080}}]}}}}"
    )
}

#[test]
fn services_names_hosts_and_published_ports_are_followed() {
    let lab = start_lab(2).unwrap();
    let [h1, h2] = lab.hosts() else { unreachable!() };
    routed(&lab);
    let a = attach(h1, "a", "net", &[]).unwrap();
    let b = attach(h2, "b", "net", &["--label", "app=web", "--publish", "9090:8080"]).unwrap();
    let _server = b.workload.tcp_echo(8080).unwrap();
    a.workload.ping_until(b.address(), SOON).unwrap();
    apply(&lab, h1, &service("web", "web")).unwrap();
    apply(&lab, h1, &service("none", "none")).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    for to in ["web:80", "web.default.svc.cluster.local:80"] {
        let traced = Traced::of(h2, &["a", to]).unwrap();
        traced.assert_arrived();
        assert_eq!(text(&traced.0["backend"]), b.address());
        assert!(traced.stages("h1").contains(&"service".to_owned()));
    }
    Traced::of(h1, &["a", "none:80"]).unwrap().assert_stopped(&["Service default/none", "no ready backend"]);
    Traced::of(h1, &["a", "web:81"]).unwrap().assert_stopped(&["no Service has TCP port 81"]);
    Traced::of(h1, &["a", "web"]).unwrap().assert_stopped(&["refuses ICMP"]);
    let nowhere = Traced::of(h1, &["a", "nowhere.default.svc.cluster.local:80"]).unwrap();
    nowhere.assert_stopped(&["nowhere"]);
    assert_eq!(nowhere.0["protocol"], "tcp/80");
    // A published port, at the address of the other host and at that of the own one.
    let address = h2.address().unwrap().to_string();
    let traced = Traced::of(h1, &["a", &format!("{address}:9090")]).unwrap();
    traced.assert_arrived();
    assert!(traced.stages("h2").contains(&"published-port".to_owned()), "{traced:?}");
    // Hosts, by ICMP and at a port where something listens or not.
    let _host_server = h2.tcp_echo(7777).unwrap();
    for (from, to) in [("a", "h1"), ("a", "h2"), ("host", "b"), ("host", "h2"), ("a", "h2:7777"), ("b", "h1")]
    {
        Traced::of(h1, &[from, to]).unwrap().assert_arrived();
    }
    Traced::of(h1, &["a", "h2:7778"]).unwrap().assert_stopped(&["no program listens at TCP port 7778"]);
    // Outside of the cluster.
    let outside = ovl_tests::ports::outsider(&lab).unwrap();
    let _outside_server = outside.tcp_echo(80).unwrap();
    for to in ["192.168.77.250", "192.168.77.250:80"] {
        let traced = Traced::of(h2, &["a", to]).unwrap();
        assert!(traced.arrived() && traced.seen("h1", "leaves") == Some(true), "{traced:?}");
        assert_eq!(traced.0["model"]["arrives"], Value::Null);
    }
    let traced = Traced::of(h1, &["a", "192.168.77.250:81"]).unwrap();
    assert!(!traced.arrived() && traced.seen("h1", "leaves") == Some(true), "{traced:?}");
    // An address that no endpoint has, and an endpoint that does not exist.
    Traced::of(h1, &["a", "10.60.250.9"]).unwrap().assert_stopped(&["10.60."]);
    let missing = ovl_tests::ctl_error(h1, &["trace", "nobody", "b"]).unwrap();
    assert!(missing.contains("no endpoint and no host nobody"), "{missing}");
    assert_nothing_left(&lab);
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn policies_are_named_on_switched_and_routed_networks() {
    for create in [switched as fn(&Lab), routed] {
        let lab = start_lab(2).unwrap();
        create(&lab);
        let web = attach(&lab["h2"], "web", "net", &["--label", "app=web"]).unwrap();
        let _servers = [web.workload.tcp_echo(80).unwrap(), web.workload.tcp_echo(81).unwrap()];
        let api = attach(&lab["h1"], "api", "net", &["--label", "app=api"]).unwrap();
        attach(&lab["h1"], "other", "net", &[]).unwrap();
        api.workload.ping_until(web.address(), SOON).unwrap();
        apply(&lab, &lab["h1"], ONLY_API).unwrap();
        wait_clean(lab.hosts(), SOON).unwrap();
        Traced::of(&lab["h2"], &["api", "web:80"]).unwrap().assert_arrived();
        for (from, to) in [("other", "web:80"), ("api", "web:81"), ("api", "web")] {
            let traced = Traced::of(&lab["h1"], &[from, to]).unwrap();
            traced.assert_stopped(&["default/only-api"]);
            assert_eq!(traced.0["agree"], true, "{traced:?}");
            assert!(text(&traced.0["probe"]["why"]).contains("ovl-policy"), "{traced:?}");
        }
    }
}

#[test]
fn causes_of_faults_are_named() {
    let (lab, a, b) = pair(switched);
    let [h1, h2] = lab.hosts() else { unreachable!() };
    let _server = b.workload.tcp_echo(80).unwrap();
    // A rule of another program, for bridged frames and for VXLAN packets.
    for (family, hook, rule) in [
        ("bridge", "forward", "ether type ip ip protocol tcp drop"),
        ("inet", "input", "udp dport 4789 drop"),
    ] {
        let table = format!(
            "add table {family} foreign; add chain {family} foreign c {{ type filter hook {hook} priority 10; }}; \
             add rule {family} foreign c {rule}"
        );
        h2.exec_ok(["nft", &table]).unwrap();
        let traced = Traced::of(h1, &["a", "b:80"]).unwrap();
        traced.assert_stopped(&["dropped on h2", &format!("chain {family} foreign c"), "drop"]);
        assert_eq!(traced.0["agree"], false, "{traced:?}");
        h2.exec_ok(["nft", "delete", "table", family, "foreign"]).unwrap();
        Traced::of(h1, &["a", "b:80"]).unwrap().assert_arrived();
    }
    // The policy of a chain, on the way out.
    let table = "add table inet foreign; add chain inet foreign c { type filter hook output priority 10; policy drop; }; \
                 add rule inet foreign c meta l4proto != udp accept; add rule inet foreign c udp dport != 4789 accept";
    h1.exec_ok(["nft", table]).unwrap();
    Traced::of(h1, &["a", "b"])
        .unwrap()
        .assert_stopped(&["dropped on h1", "the policy of chain inet foreign c"]);
    h1.exec_ok(["nft", "delete", "table", "inet", "foreign"]).unwrap();
    // The interface of the destination, and of the sender, is down.
    b.workload.exec_ok(["ip", "link", "set", "eth0", "down"]).unwrap();
    Traced::of(h1, &["a", "b"]).unwrap().assert_stopped(&["interface eth0 is down"]);
    b.workload.exec_ok(["ip", "link", "set", "eth0", "up"]).unwrap();
    a.workload.exec_ok(["ip", "link", "set", "eth0", "down"]).unwrap();
    Traced::of(h2, &["a", "b"]).unwrap().assert_stopped(&["interface eth0 is down"]);
    a.workload.exec_ok(["ip", "link", "set", "eth0", "up"]).unwrap();
    // A packet filter in the namespace of the destination.
    a.workload.ping_until(b.address(), SOON).unwrap();
    b.workload
        .exec_ok([
            "nft",
            "add table inet own; add chain inet own c { type filter hook input priority 0; policy drop; }",
        ])
        .unwrap();
    // The kernel says why.
    let reason = "the kernel of h2 dropped the probe: a packet filter drops it (NETFILTER_DROP)";
    wait_until(SOON, "the kernel's reason", || {
        let traced = Traced::of(h1, &["a", "b"])?;
        traced.assert_stopped(&["reached the destination on h2", "did not answer"]);
        ensure!(traced.reason().contains(reason), "{traced:?}");
        Ok(())
    })
    .unwrap();
    b.workload.exec_ok(["nft", "delete", "table", "inet", "own"]).unwrap();
    // The underlay drops VXLAN alone: at once, and when path probes have found it.
    lab.loss_udp_port(100.0, 4789).unwrap();
    Traced::of(h1, &["a", "b"]).unwrap().assert_stopped(&["h2"]);
    wait_until(SOON, "the broken path", || {
        let traced = Traced::of(h1, &["a", "b"])?;
        ensure!(traced.reason().contains("path probes are lost"), "{traced:?}");
        Ok(())
    })
    .unwrap();
    lab.clear_faults().unwrap();
    a.workload.ping_until(b.address(), SOON).unwrap();
    // The host of the destination is lost.
    h2.kill9().unwrap();
    h2.link_down().unwrap();
    wait_until(SOON, "h2 to be dead", || {
        let traced = Traced::of(h1, &["a", "b"])?;
        ensure!(traced.reason().contains("host h2 is dead"), "{traced:?}");
        Ok(())
    })
    .unwrap();
    assert_nothing_left(&lab);
}

/// A rule of another program on a host drops what is for each of these addresses. Each has a rule of its own.
fn drop_frames_for(host: &Host, addresses: &[&str]) {
    let rule = |address: &&str| {
        let family = if address.contains(':') { "ip6" } else { "ip" };
        format!(" add rule bridge foreign c {family} daddr {address} counter drop;")
    };
    let rules: String = addresses.iter().map(rule).collect();
    let chain = "add chain bridge foreign c { type filter hook forward priority 0; };";
    host.exec_ok(["nft", &format!("add table bridge foreign; {chain}{rules}")]).unwrap();
}

/// Each of them lasts a second: a datagram that is received and not answered, and an echo request that is dropped.
#[test]
fn traces_at_the_same_time_have_their_own_verdicts() {
    let lab = start_lab(2).unwrap();
    switched(&lab);
    let [h1, h2] = lab.hosts() else { unreachable!() };
    let (mut senders, mut receivers, mut sinks) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..4 {
        senders.push(attach(h1, &format!("a{n}"), "net", &[]).unwrap());
        let receiver = attach(h2, &format!("b{n}"), "net", &[]).unwrap();
        let bound = receiver.workload.run(|| std::net::UdpSocket::bind(("::", 53))).unwrap();
        sinks.push(bound);
        receivers.push(receiver);
    }
    for (from, to) in senders.iter().zip(&receivers) {
        for address in to.addresses() {
            from.workload.ping_until(&address, SOON).unwrap();
        }
    }
    let [b0, b1, b2, _] = [0, 1, 2, 3].map(|n: usize| receivers[n].addresses());
    drop_frames_for(h2, &[&b0[0], &b1[1]]);
    drop_frames_for(h1, &[&b2[1]]);
    // What is sent, and the rule that drops it.
    let traces = [
        ("a0", b0[0].clone(), Some("h2")),
        ("a0", format!("[{}]:53/udp", b0[1]), None),
        ("a1", b1[1].clone(), Some("h2")),
        ("a1", format!("{}:53/udp", b1[0]), None),
        ("a2", b2[1].clone(), Some("h1")),
        ("a2", format!("{}:53/udp", b2[0]), None),
        ("a3", "b3:53/udp".to_owned(), None),
        ("a3", "b3".to_owned(), None),
    ];
    for _ in 0..3 {
        std::thread::scope(|scope| {
            for (n, (from, to, dropped_on)) in traces.iter().enumerate() {
                let host = &lab.hosts()[n % 2];
                scope.spawn(move || {
                    let traced = Traced::of(host, &[from, to]).unwrap();
                    match dropped_on {
                        Some(on) => traced.assert_stopped(&[
                            &format!("dropped on {on} by"),
                            &format!("daddr {to} counter drop"),
                        ]),
                        None => assert!(traced.arrived() && traced.0["agree"] == true, "{to}: {traced:?}"),
                    }
                });
            }
        });
    }
    assert_nothing_left(&lab);
}

#[test]
fn tables_of_a_killed_daemon_are_deleted_and_traces_are_limited() {
    let (lab, _a, b) = pair(switched);
    let [h1, h2] = lab.hosts() else { unreachable!() };
    // The trace of a packet that is not answered lasts a second.
    b.workload
        .exec_ok([
            "nft",
            "add table inet own; add chain inet own c { type filter hook input priority 0; policy drop; }",
        ])
        .unwrap();
    let results = std::thread::scope(|scope| {
        let running: Vec<_> =
            (0..12).map(|_| scope.spawn(|| h1.ctl(&["trace", "a", "b"]).unwrap())).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    let refused = results.iter().filter(|output| output.stderr.contains("takes part in 8 traces")).count();
    assert!((4..12).contains(&refused), "{refused} of {results:?}");
    let left = |host: &Host| host.exec_ok(["nft", "list", "tables"]).unwrap().contains("ovl-trace-");
    std::thread::scope(|scope| {
        scope.spawn(|| h1.ctl(&["trace", "a", "b"]).unwrap());
        wait_until(SOON, "the tables of a trace", || -> Result<bool> { Ok(left(h1) && left(h2)) }).unwrap();
        h1.kill9().unwrap();
    });
    assert!(left(h1));
    h1.start().unwrap();
    wait_until(SOON, "no tables", || -> Result<bool> { Ok(!left(h1) && !left(h2)) }).unwrap();
}
