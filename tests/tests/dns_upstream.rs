//! Names that are nobody's here: the resolvers of the host are asked, whatever they are like.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::ensure;
use netns_lab::{Lab, wait_until};
use ovl_tests::resolver::{FakeResolver, Mood, ResolvConf, config, dig, dnsmasq, status};
use ovl_tests::{Attached, SOON, assert_says, attach, make_network, problems, started_with, text};

const AT: &str = "127.0.0.11";
const FIRST: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 1);
const SECOND: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

/// One host, whose resolv.conf names these; and an endpoint that asks.
fn world(servers: &[&str]) -> (Lab, ResolvConf, Attached) {
    world_with(servers, "")
}

/// The same with further lines of configuration.
fn world_with(servers: &[&str], more: &str) -> (Lab, ResolvConf, Attached) {
    let (config, file) = config(1, servers, more).unwrap();
    let lab = started_with(config).unwrap();
    make_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let asker = attach(&lab.hosts()[0], "asker", "blue", &[]).unwrap();
    (lab, file, asker)
}

#[test]
fn unknown_names_are_forwarded_to_the_hosts_dns_once_and_kept() {
    let (lab, file, asker) = world(&["127.0.0.1"]);
    let upstream = FakeResolver::start(&lab.hosts()[0], FIRST, Mood::Answers).unwrap();
    let other = FakeResolver::start(&lab.hosts()[0], SECOND, Mood::Denies).unwrap();
    for how in ["+notcp", "+tcp", "+noedns"] {
        assert_eq!(dig(&asker.workload, AT, &["example.org", how]).unwrap(), ["192.0.2.7"], "{how}");
    }
    assert_eq!(upstream.asked(), 1);
    // Its time to live is counted down.
    let line = asker.workload.exec_ok(["dig", "+noall", "+answer", "@127.0.0.11", "Example.ORG"]).unwrap();
    assert!(line.starts_with("Example.ORG."), "{line}");
    // Names of ours are never told to others.
    assert_eq!(status(&asker.workload, AT, &["nobody.blue.ovl.internal"]).unwrap(), "NXDOMAIN");
    assert_eq!(dig(&asker.workload, AT, &["asker"]).unwrap(), [asker.address()]);
    assert_eq!(upstream.asked(), 1);
    // The file is followed when it changes, and what others said is forgotten.
    file.set(&["127.0.0.2"]).unwrap();
    wait_until(SOON, "the other resolver to be asked", || {
        ensure!(status(&asker.workload, AT, &["example.org"])? == "NXDOMAIN");
        Ok(())
    })
    .unwrap();
    // That there is no such name is kept as well (RFC 2308).
    let before = other.asked();
    assert_eq!(status(&asker.workload, AT, &["example.org"]).unwrap(), "NXDOMAIN");
    assert_eq!(status(&asker.workload, AT, &["example.org", "+tcp"]).unwrap(), "NXDOMAIN");
    assert_eq!(other.asked(), before);
}

#[test]
fn a_resolver_that_lies_is_not_believed() {
    let (lab, _file, asker) = world(&["127.0.0.1"]);
    let _upstream = FakeResolver::start(&lab.hosts()[0], FIRST, Mood::Lies).unwrap();
    for name in ["a.example.org", "b.example.org", "c.example.org"] {
        assert_eq!(dig(&asker.workload, AT, &[name]).unwrap(), ["192.0.2.7"]);
    }
}

#[test]
fn a_resolver_that_truncates_is_asked_by_tcp() {
    let (lab, _file, asker) = world(&["127.0.0.1"]);
    let upstream = FakeResolver::start(&lab.hosts()[0], FIRST, Mood::Truncates).unwrap();
    assert_eq!(dig(&asker.workload, AT, &["example.org"]).unwrap(), ["192.0.2.7"]);
    assert_eq!(upstream.streams(), 1);
}

#[test]
fn a_resolver_that_is_down_or_fails_is_passed_over() {
    // Nobody listens on the first, the second says that it cannot.
    let (lab, _file, asker) = world(&["127.0.0.1", "127.0.0.2", "127.0.0.3"]);
    let failing = FakeResolver::start(&lab.hosts()[0], SECOND, Mood::Fails).unwrap();
    let _good = FakeResolver::start(&lab.hosts()[0], Ipv4Addr::new(127, 0, 0, 3), Mood::Answers).unwrap();
    assert_eq!(dig(&asker.workload, AT, &["example.org"]).unwrap(), ["192.0.2.7"]);
    assert_eq!(failing.asked(), 1);
}

#[test]
fn a_resolver_that_is_silent_or_slow_holds_nobody_up() {
    let (lab, file, asker) = world(&["127.0.0.1", "127.0.0.2"]);
    let silent = FakeResolver::start(&lab.hosts()[0], FIRST, Mood::Silent).unwrap();
    let _good = FakeResolver::start(&lab.hosts()[0], SECOND, Mood::Answers).unwrap();
    assert_eq!(dig(&asker.workload, AT, &["one.example.org"]).unwrap(), ["192.0.2.7"]);
    assert_eq!(silent.asked(), 1);
    // It is asked first no more, but for a try now and then. When it fails again, it is named.
    let host = &lab.hosts()[0];
    let mut names = 0..;
    let mut ask = || {
        let name = format!("{}.example.org", names.next().unwrap_or(0));
        assert_eq!(dig(&asker.workload, AT, &[&name]).unwrap(), ["192.0.2.7"]);
    };
    wait_until(SOON, "the silent resolver to be named", || {
        ask();
        let all = problems(host)?;
        ensure!(
            all.iter().any(|each| each.contains("resolver 127.0.0.1:53 did not answer in time")),
            "{all:?}"
        );
        Ok(())
    })
    .unwrap();
    let before = silent.asked();
    (0..6).for_each(|_| ask());
    assert!(silent.asked() < before + 6, "{} of 6", silent.asked() - before);
    drop(silent);
    let back = FakeResolver::start(host, FIRST, Mood::Answers).unwrap();
    wait_until(SOON, "the resolver that is back to be asked", || {
        ask();
        ensure!(back.asked() > 0, "it is not");
        ensure!(problems(host)?.is_empty(), "{:?}", problems(host)?);
        Ok(())
    })
    .unwrap();
    drop((back, _good));
    // Alone, a slow one is waited for, and names of ours are answered meanwhile.
    file.set(&["127.0.0.3"]).unwrap();
    let slow = Mood::Slow(Duration::from_millis(2500));
    let _slow = FakeResolver::start(&lab.hosts()[0], Ipv4Addr::new(127, 0, 0, 3), slow).unwrap();
    wait_until(SOON, "the slow resolver to be the one", || {
        ensure!(dig(&asker.workload, AT, &["two.example.org"])? == ["192.0.2.7"]);
        Ok(())
    })
    .unwrap();
    let asking =
        asker.workload.spawn(["dig", "+short", "+time=5", "@127.0.0.11", "three.example.org"]).unwrap();
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(500) {
        assert_eq!(dig(&asker.workload, AT, &["asker"]).unwrap(), [asker.address()]);
    }
    let output = asking.finish(SOON).unwrap();
    assert_eq!(output.stdout, "192.0.2.7\n");
}

#[test]
fn without_any_resolver_the_answer_is_a_failure_and_comes() {
    let (_lab, _file, asker) = world(&[]);
    assert_eq!(status(&asker.workload, AT, &["example.org"]).unwrap(), "SERVFAIL");
    assert_eq!(status(&asker.workload, AT, &["example.org", "+tcp"]).unwrap(), "SERVFAIL");
}

#[test]
fn stub_domains_have_resolvers_of_their_own_and_nobody_else_hears_of_their_names() {
    // The first resolver of the one is down.
    let stubs = "stub_domains.\"corp.example\" = [\"127.0.0.9\", \"127.0.0.3:5353\"]\n\
                 stub_domains.\"lab.corp.example\" = [\"127.0.0.4\"]\n";
    let (lab, _file, asker) = world_with(&["127.0.0.1"], stubs);
    let host = &lab.hosts()[0];
    let others = FakeResolver::start(host, FIRST, Mood::Answers).unwrap();
    // Texts that no datagram holds.
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
    // At the end of a walk through a search list too.
    assert_eq!(ask(&["www.corp.example.default.svc.cluster.local"]), ["192.0.2.31", "www.corp.example."]);
    let answer = host.ctl_json(&["dns", "www.corp.example", "--from", "asker"]).unwrap();
    assert_says(&text(&answer["why"]), &["of the stub domain corp.example"]);
    assert_eq!(others.asked(), 0);
    assert_eq!(ask(&["example.org"]), ["192.0.2.7"]);
    assert_eq!(ask(&["notcorp.example"]), ["192.0.2.7"]);
    assert_eq!(others.asked(), 2);
    // Down, it is not replaced by others; and it is asked again when it is back.
    drop(corp);
    assert_eq!(status(&asker.workload, AT, &["later.corp.example"]).unwrap(), "SERVFAIL");
    let answer = host.ctl_json(&["dns", "later.corp.example", "--from", "asker"]).unwrap();
    assert_says(&text(&answer["why"]), &["none of the resolvers of the stub domain corp.example answered"]);
    let _corp = dnsmasq(host, "127.0.0.3", 5353, &["--host-record=later.corp.example,192.0.2.32"]).unwrap();
    assert_eq!(ask(&["later.corp.example"]), ["192.0.2.32"]);
    assert_eq!(others.asked(), 2);
}

#[test]
fn of_two_real_resolvers_one_may_go_at_any_time() {
    let (lab, _file, asker) = world(&["127.0.0.1", "127.0.0.2"]);
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
    // What was said before is kept while nobody answers.
    drop(first);
    ask("c.example.org");
    assert_eq!(status(&asker.workload, AT, &["d.example.org"]).unwrap(), "SERVFAIL");
}
