//! The host's resolv.conf, read as the C library reads it, and answers that are too large for a datagram.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::Ipv4Addr;

use anyhow::ensure;
use netns_lab::{Lab, wait_until};
use ovl_tests::resolver::{Behaviour, FakeResolver, ResolvConf, config, dig, dnsmasq, status};
use ovl_tests::{
    Attached, SOON, assert_contains, attach, create_network, start_lab_with, wait_no_problem, wait_problem,
};

const AT: &str = "127.0.0.11";
const LOCALHOST: Ipv4Addr = Ipv4Addr::LOCALHOST;
const OTHER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);

fn lab() -> (Lab, ResolvConf, Attached) {
    let (config, file) = config(1, &["127.0.0.9"], "").unwrap();
    let lab = start_lab_with(config).unwrap();
    create_network(&lab, "blue", &["--subnet", "10.70.0.0/24"]).unwrap();
    let asker = attach(&lab.hosts()[0], "asker", "blue", &[]).unwrap();
    (lab, file, asker)
}

/// Waits until a name that was never asked for before is answered.
fn wait_answer(asker: &Attached, what: &str) {
    let mut names = 0..;
    wait_until(SOON, &format!("an answer with {what}"), || {
        let name = format!("{}.{}.example.org", names.next().unwrap_or(0), what.replace('.', "-"));
        let found = dig(&asker.workload, AT, &[&name])?;
        ensure!(found == ["192.0.2.7"], "{found:?}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn resolv_conf_is_read_as_the_c_library_reads_it() {
    let (lab, file, asker) = lab();
    let host = &lab.hosts()[0];
    let localhost = FakeResolver::start(host, LOCALHOST, Behaviour::Answers).unwrap();
    let other = FakeResolver::start(host, OTHER, Behaviour::Answers).unwrap();
    for (what, text, server) in [
        ("latin-1", &b"# B\xfcro\nnameserver 127.0.0.2\n"[..], &other),
        ("comment", b"nameserver 127.0.0.2#53\n", &other),
        ("semicolon", b"nameserver 127.0.0.2;office\n", &other),
        ("short", b"nameserver 127.2\n", &other),
        ("hexadecimal", b"nameserver 0x7f000002\n", &other),
        ("none", b"search example.org\n", &localhost),
        ("empty", b"", &localhost),
    ] {
        let before = server.udp_queries();
        file.write(text).unwrap();
        wait_answer(&asker, what);
        wait_until(SOON, &format!("the server of {what} to be queried"), || {
            wait_answer(&asker, &format!("{what} again"));
            ensure!(server.udp_queries() > before);
            Ok(())
        })
        .unwrap();
        wait_no_problem(host, SOON).unwrap();
    }
    let before = localhost.udp_queries();
    file.write(b"nameserver 127.0.0.9\n").unwrap();
    file.remove().unwrap();
    wait_answer(&asker, "no-file");
    assert!(localhost.udp_queries() > before);
}

#[test]
fn status_names_lines_that_are_not_used_and_that_no_resolver_is_known() {
    let (lab, file, asker) = lab();
    let host = &lab.hosts()[0];
    let good = FakeResolver::start(host, OTHER, Behaviour::Answers).unwrap();
    file.write(b"# ok\nnameserver dns.example\n nameserver 127.0.0.9\nnameserver 127.0.0.2\n").unwrap();
    wait_problem(host, &["line 2 of", "`nameserver dns.example`", "not an address"], SOON).unwrap();
    wait_problem(host, &["line 3 of", "without a blank before it"], SOON).unwrap();
    wait_answer(&asker, "the rest");
    file.write(b"nameserver 127.0.0.2\n").unwrap();
    wait_no_problem(host, SOON).unwrap();
    drop(good);
    // Nobody has asked for anything yet.
    file.write(b"options ndots:1\n").unwrap();
    wait_problem(host, &["has no usable `nameserver` line", "127.0.0.1"], SOON).unwrap();
    assert_eq!(status(&asker.workload, AT, &["example.org"]).unwrap(), "SERVFAIL");
    let _localhost = FakeResolver::start(host, LOCALHOST, Behaviour::Answers).unwrap();
    wait_answer(&asker, "localhost");
    wait_no_problem(host, SOON).unwrap();
}

#[test]
fn server_on_a_device_that_comes_later_or_is_made_anew_is_queried() {
    let (lab, file, asker) = lab();
    let host = &lab.hosts()[0];
    file.write(b"nameserver fe80::53%wlan9\n").unwrap();
    wait_problem(host, &["has no device wlan9 at present"], SOON).unwrap();
    for round in 0..2 {
        host.exec_ok(["ip", "link", "add", "wlan9", "type", "veth", "peer", "name", "air9"]).unwrap();
        host.exec_ok(["ip", "link", "set", "air9", "up"]).unwrap();
        host.exec_ok(["ip", "link", "set", "wlan9", "up"]).unwrap();
        host.exec_ok(["ip", "addr", "add", "fe80::53/64", "dev", "wlan9", "nodad"]).unwrap();
        let listen = ["dnsmasq", "-k", "--no-resolv", "--no-hosts", "--pid-file=", "--conf-file=/dev/null"];
        let more = ["--interface=wlan9", "--bind-interfaces", "--address=/example.org/192.0.2.7"];
        let server = host.spawn([&listen[..], &more].concat()).unwrap();
        wait_answer(&asker, &format!("device {round}"));
        wait_no_problem(host, SOON).unwrap();
        drop(server);
        host.exec_ok(["ip", "link", "del", "wlan9"]).unwrap();
    }
}

#[test]
fn truncated_answer_carries_the_records_that_fit() {
    let (lab, file, asker) = lab();
    let host = &lab.hosts()[0];
    let records: Vec<String> = (1..=60).map(|i| format!("--host-record=big60.test,192.0.2.{i}")).collect();
    let records: Vec<&str> = records.iter().map(String::as_str).collect();
    let _server = dnsmasq(host, "127.0.0.1", 53, &records).unwrap();
    file.write(b"nameserver 127.0.0.1\n").unwrap();
    wait_until(SOON, "the whole answer over TCP", || {
        let found = dig(&asker.workload, AT, &["big60.test", "+noedns"])?;
        ensure!(found.len() == 60, "{found:?}");
        Ok(())
    })
    .unwrap();
    let cut = asker.workload.exec_ok(["dig", "+noedns", "+ignore", "@127.0.0.11", "big60.test"]).unwrap();
    // 512 bytes: 12 of the header, 16 of the question, 16 for each record.
    assert_contains(&cut, &[" tc", "ANSWER: 30"]);
}
