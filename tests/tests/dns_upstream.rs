//! External names, which are forwarded to the host's resolvers, however these behave.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::ensure;
use netns_lab::{Lab, wait_until};
use ovl_tests::resolver::{Behaviour, FakeResolver, ResolvConf, config, dig, dnsmasq, status};
use ovl_tests::{Attached, SOON, assert_contains, attach, create_network, problems, start_lab_with, text};

const AT: &str = "127.0.0.11";
const FIRST: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 1);
const SECOND: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// A lab of one host, whose resolv.conf names these servers, and an endpoint that sends queries.
fn lab_with_endpoint(servers: &[&str]) -> (Lab, ResolvConf, Attached) {
    lab_with_config(servers, "")
}

/// [`lab_with_endpoint`] with further lines of configuration.
fn lab_with_config(servers: &[&str], more: &str) -> (Lab, ResolvConf, Attached) {
    let (config, file) = config(1, servers, more).unwrap();
    let lab = start_lab_with(config).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let asker = attach(&lab.hosts()[0], "asker", "blue", &[]).unwrap();
    (lab, file, asker)
}

#[test]
fn external_names_are_forwarded_once_and_cached() {
    let (lab, file, asker) = lab_with_endpoint(&["127.0.0.1"]);
    let upstream = FakeResolver::start(&lab.hosts()[0], FIRST, Behaviour::Answers).unwrap();
    let other = FakeResolver::start(&lab.hosts()[0], SECOND, Behaviour::NxDomain).unwrap();
    for how in ["+notcp", "+tcp", "+noedns"] {
        assert_eq!(dig(&asker.workload, AT, &["example.org", how]).unwrap(), ["192.0.2.7"], "{how}");
    }
    assert_eq!(upstream.udp_queries(), 1);
    // The name in the answer is spelled as in the query.
    let line = asker.workload.exec_ok(["dig", "+noall", "+answer", "@127.0.0.11", "Example.ORG"]).unwrap();
    assert!(line.starts_with("Example.ORG."), "{line}");
    // Names of the cluster are not forwarded.
    assert_eq!(status(&asker.workload, AT, &["nobody.blue.ovl.internal"]).unwrap(), "NXDOMAIN");
    assert_eq!(dig(&asker.workload, AT, &["asker"]).unwrap(), [asker.address()]);
    assert_eq!(upstream.udp_queries(), 1);
    // A change of the file is followed, and the cache is flushed.
    file.set(&["127.0.0.2"]).unwrap();
    wait_until(SOON, "the other resolver to be queried", || {
        ensure!(status(&asker.workload, AT, &["example.org"])? == "NXDOMAIN");
        Ok(())
    })
    .unwrap();
    // NXDOMAIN is cached as well (RFC 2308).
    let before = other.udp_queries();
    assert_eq!(status(&asker.workload, AT, &["example.org"]).unwrap(), "NXDOMAIN");
    assert_eq!(status(&asker.workload, AT, &["example.org", "+tcp"]).unwrap(), "NXDOMAIN");
    assert_eq!(other.udp_queries(), before);
}

#[test]
fn spoofed_answers_are_ignored() {
    let (lab, _file, asker) = lab_with_endpoint(&["127.0.0.1"]);
    let _upstream = FakeResolver::start(&lab.hosts()[0], FIRST, Behaviour::Spoofed).unwrap();
    for name in ["a.example.org", "b.example.org", "c.example.org"] {
        assert_eq!(dig(&asker.workload, AT, &[name]).unwrap(), ["192.0.2.7"]);
    }
}

#[test]
fn truncated_answers_are_queried_again_over_tcp() {
    let (lab, _file, asker) = lab_with_endpoint(&["127.0.0.1"]);
    let upstream = FakeResolver::start(&lab.hosts()[0], FIRST, Behaviour::Truncated).unwrap();
    assert_eq!(dig(&asker.workload, AT, &["example.org"]).unwrap(), ["192.0.2.7"]);
    assert_eq!(upstream.tcp_connections(), 1);
}

#[test]
fn resolver_that_is_down_or_fails_is_skipped() {
    // The first resolver does not listen, the second one answers SERVFAIL.
    let (lab, _file, asker) = lab_with_endpoint(&["127.0.0.1", "127.0.0.2", "127.0.0.3"]);
    let failing = FakeResolver::start(&lab.hosts()[0], SECOND, Behaviour::ServFail).unwrap();
    let _good =
        FakeResolver::start(&lab.hosts()[0], Ipv4Addr::new(127, 0, 0, 3), Behaviour::Answers).unwrap();
    assert_eq!(dig(&asker.workload, AT, &["example.org"]).unwrap(), ["192.0.2.7"]);
    assert_eq!(failing.udp_queries(), 1);
}

#[test]
fn silent_or_slow_resolver_does_not_delay_other_queries() {
    let (lab, file, asker) = lab_with_endpoint(&["127.0.0.1", "127.0.0.2"]);
    let silent = FakeResolver::start(&lab.hosts()[0], FIRST, Behaviour::Silent).unwrap();
    let _good = FakeResolver::start(&lab.hosts()[0], SECOND, Behaviour::Answers).unwrap();
    assert_eq!(dig(&asker.workload, AT, &["one.example.org"]).unwrap(), ["192.0.2.7"]);
    assert_eq!(silent.udp_queries(), 1);
    // It is now queried last, except for a probe now and then. When a probe fails, the resolver is reported.
    let host = &lab.hosts()[0];
    let mut names = 0..;
    let mut ask = || {
        let name = format!("{}.example.org", names.next().unwrap_or(0));
        assert_eq!(dig(&asker.workload, AT, &[&name]).unwrap(), ["192.0.2.7"]);
    };
    wait_until(SOON, "the silent resolver to be reported", || {
        ask();
        let all = problems(host)?;
        ensure!(
            all.iter().any(|each| each.contains("resolver 127.0.0.1:53 did not answer in time")),
            "{all:?}"
        );
        Ok(())
    })
    .unwrap();
    let before = silent.udp_queries();
    (0..6).for_each(|_| ask());
    assert!(silent.udp_queries() < before + 6, "{} of 6", silent.udp_queries() - before);
    drop(silent);
    let back = FakeResolver::start(host, FIRST, Behaviour::Answers).unwrap();
    wait_until(SOON, "the recovered resolver to be queried", || {
        ask();
        ensure!(back.udp_queries() > 0, "it was not queried");
        ensure!(problems(host)?.is_empty(), "{:?}", problems(host)?);
        Ok(())
    })
    .unwrap();
    drop((back, _good));
    // A slow resolver that is the only one is waited for, and local names are answered meanwhile.
    file.set(&["127.0.0.3"]).unwrap();
    let slow = Behaviour::Delayed(Duration::from_millis(2500));
    let slow_resolver = FakeResolver::start(&lab.hosts()[0], Ipv4Addr::new(127, 0, 0, 3), slow).unwrap();
    wait_until(SOON, "the slow resolver to be queried", || {
        ensure!(dig(&asker.workload, AT, &["two.example.org"])? == ["192.0.2.7"]);
        Ok(())
    })
    .unwrap();
    // The query is pending for 2.5 s after it reached the resolver, so a local answer must come while dig still runs.
    let before = slow_resolver.udp_queries();
    let mut pending =
        asker.workload.spawn(["dig", "+short", "+time=5", "@127.0.0.11", "three.example.org"]).unwrap();
    wait_until(SOON, "the query to reach the slow resolver", || slow_resolver.udp_queries() > before)
        .unwrap();
    assert_eq!(dig(&asker.workload, AT, &["asker"]).unwrap(), [asker.address()]);
    assert!(pending.is_running(), "the local answer waited for the slow resolver");
    let output = pending.finish(SOON).unwrap();
    assert_eq!(output.stdout, "192.0.2.7\n");
}

#[test]
fn without_resolvers_external_names_get_servfail() {
    let (_lab, _file, asker) = lab_with_endpoint(&[]);
    assert_eq!(status(&asker.workload, AT, &["example.org"]).unwrap(), "SERVFAIL");
    assert_eq!(status(&asker.workload, AT, &["example.org", "+tcp"]).unwrap(), "SERVFAIL");
}

#[test]
fn names_of_stub_domains_go_only_to_their_own_resolvers() {
    // The first resolver of corp.example is down.
    let stubs = "stub_domains.\"corp.example\" = [\"127.0.0.9\", \"127.0.0.3:5353\"]\n\
                 stub_domains.\"lab.corp.example\" = [\"127.0.0.4\"]\n";
    let (lab, _file, asker) = lab_with_config(&["127.0.0.1"], stubs);
    let host = &lab.hosts()[0];
    let default_resolver = FakeResolver::start(host, FIRST, Behaviour::Answers).unwrap();
    // TXT records that are too large for a datagram.
    let texts: Vec<String> =
        (0..10).map(|i| format!("--txt-record=big.corp.example,{i}{}", "x".repeat(200))).collect();
    let mut names = vec!["--local=/corp.example/", "--host-record=www.corp.example,192.0.2.31,2001:db8::31"];
    names.extend(texts.iter().map(String::as_str));
    let corp = dnsmasq(host, "127.0.0.3", 5353, &names).unwrap();
    let _inner = dnsmasq(host, "127.0.0.4", 53, &["--host-record=x.lab.corp.example,192.0.2.41"]).unwrap();
    let ask = |question: &[&str]| dig(&asker.workload, AT, question).unwrap();
    for how in ["+notcp", "+tcp", "+noedns", "+bufsize=512"] {
        assert_eq!(ask(&["www.corp.example", how]), ["192.0.2.31"], "{how}");
        assert_eq!(ask(&["WWW.Corp.Example", "AAAA", how]), ["2001:db8::31"], "{how}");
        assert_eq!(ask(&["x.lab.corp.example", how]), ["192.0.2.41"], "{how}");
        assert_eq!(ask(&["big.corp.example", "TXT", how]).len(), texts.len(), "{how}");
    }
    assert_eq!(status(&asker.workload, AT, &["nobody.corp.example"]).unwrap(), "NXDOMAIN");
    // At the end of a search list too.
    assert_eq!(ask(&["www.corp.example.default.svc.cluster.local"]), ["192.0.2.31", "www.corp.example."]);
    let answer = host.ctl_json(&["dns", "www.corp.example", "--from", "asker"]).unwrap();
    assert_contains(&text(&answer["why"]), &["of the stub domain corp.example"]);
    assert_eq!(default_resolver.udp_queries(), 0);
    assert_eq!(ask(&["example.org"]), ["192.0.2.7"]);
    assert_eq!(ask(&["notcorp.example"]), ["192.0.2.7"]);
    assert_eq!(default_resolver.udp_queries(), 2);
    // While the stub resolver is down, no other one replaces it. Once it is back, it is queried again.
    drop(corp);
    assert_eq!(status(&asker.workload, AT, &["later.corp.example"]).unwrap(), "SERVFAIL");
    let answer = host.ctl_json(&["dns", "later.corp.example", "--from", "asker"]).unwrap();
    assert_contains(
        &text(&answer["why"]),
        &["none of the resolvers of the stub domain corp.example answered"],
    );
    let _corp = dnsmasq(host, "127.0.0.3", 5353, &["--host-record=later.corp.example,192.0.2.32"]).unwrap();
    assert_eq!(ask(&["later.corp.example"]), ["192.0.2.32"]);
    assert_eq!(default_resolver.udp_queries(), 2);
}

#[test]
fn either_of_two_resolvers_may_fail() {
    let (lab, _file, asker) = lab_with_endpoint(&["127.0.0.1", "127.0.0.2"]);
    let host = &lab.hosts()[0];
    let names = ["--address=/example.org/192.0.2.9", "--local-ttl=60"];
    let first = dnsmasq(host, "127.0.0.1", 53, &names).unwrap();
    let second = dnsmasq(host, "127.0.0.2", 53, &names).unwrap();
    let ask = |name: &str| assert_eq!(dig(&asker.workload, AT, &[name]).unwrap(), ["192.0.2.9"], "{name}");
    ask("a.example.org");
    drop(first);
    ask("b.example.org");
    let first = dnsmasq(host, "127.0.0.1", 53, &names).unwrap();
    drop(second);
    ask("c.example.org");
    // The cache still answers while both are down.
    drop(first);
    ask("c.example.org");
    assert_eq!(status(&asker.workload, AT, &["d.example.org"]).unwrap(), "SERVFAIL");
}
