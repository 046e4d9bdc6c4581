//! The real binary against a daemon that answers what it is told to.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests, and helpers of tests")]
#![allow(unreachable_pub, reason = "the helpers are a module of this one test")]

mod fake;

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;

use fake::{Dir, Fake, ovlctl, run};
use ovl_control::{
    Event, Failure, FailureKind, KeyRotation, KeyStatus, NetnsRef, Reply, Request, SubnetUse, Verify,
};
use ovl_proto::secret::Secret;
use serde_json::json;

fn block() -> Reply {
    Reply::Subnets(vec![SubnetUse {
        network: "blue".into(),
        prefix: "10.1.0.0/28".parse().unwrap(),
        node: "host1".into(),
        used: 3,
        size: 15,
    }])
}

fn event(number: u64) -> Event {
    Event {
        time_ms: number,
        kind: "peer".into(),
        object: "host2".into(),
        message: format!("is number {number}"),
    }
}

#[test]
fn a_list_is_a_table_or_an_array() {
    let fake = Fake::new(&[block()]);
    fake.run("subnets")
        .prints("NETWORK  PREFIX       NODE   USED  SIZE\nblue     10.1.0.0/28  host1  3     15\n");
    fake.run("subnets -o json").prints_json(
        &json!([{ "network": "blue", "prefix": "10.1.0.0/28", "node": "host1", "used": 3, "size": 15 }]),
    );
    assert_eq!(fake.asked(), [Request::Subnets, Request::Subnets]);
}

#[test]
fn json_is_for_reading_too() {
    Fake::new(&[Reply::Verify(Verify { clean: true, settled_ms: Some(3), differences: Vec::new() })])
        .run("verify -o json")
        .prints("{\n  \"clean\": true,\n  \"differences\": []\n}\n");
}

#[test]
fn what_is_done_is_done_in_silence() {
    let fake = Fake::new(&[Reply::Done]);
    let lines = ["leave", "teardown", "network rm blue", "detach web --network blue", "sandbox rm web"];
    for line in lines {
        fake.run(line).prints("");
        fake.run(&format!("{line} -o json")).prints("{\n  \"done\": true\n}\n");
    }
    let network_rm = Request::NetworkRm { name: "blue".into() };
    let detach = Request::Detach { name: "web".into(), network: Some("blue".into()), namespace: None };
    let sandbox_rm = Request::SandboxRm { name: "web".into(), force: false };
    let mut asked = fake.asked();
    asked.dedup();
    assert_eq!(asked, [Request::Leave, Request::Teardown, network_rm, detach, sandbox_rm]);
}

#[test]
fn forgetting_a_host_ends_with_what_to_do_about_the_key() {
    let fake = Fake::new(&[Reply::Done]);
    let ran = fake.run("peers forget host3");
    assert_eq!((ran.code, ran.out.as_str()), (Some(0), ""));
    assert!(
        ran.err.contains("still knows the cluster key") && ran.err.ends_with("key rotate --cluster FILE\n")
    );
    fake.run("peers forget host3 -o json").prints("{\n  \"done\": true\n}\n");
    let forget = Request::PeersForget { node: "host3".into() };
    assert_eq!(fake.asked(), [forget.clone(), forget]);
}

#[test]
fn a_rotation_is_waited_for_or_not_and_the_key_is_read_from_a_private_file() {
    let status = |rotation: Option<KeyRotation>| {
        Reply::Keys(Box::new(KeyStatus { rotation, tunnel_waits_for: None, hosts: Vec::new() }))
    };
    let under_way = KeyRotation {
        key: "0410c3g".parse().unwrap(),
        since_ms: 0,
        hosts: 3,
        have: 2,
        seal: 0,
        majority: true,
        waits_for: vec!["host3".into()],
    };
    let dir = Dir::new();
    let file = dir.0.join("new.key");
    std::fs::write(&file, "secret\n").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let line = format!("key rotate --cluster {}", file.display());

    let fake = Fake::new(&[status(Some(under_way))]);
    let ran = fake.run(&format!("{line} --no-wait"));
    assert_eq!(ran.code, Some(0));
    assert!(ran.out.starts_with("Changing to 0410c3g since") && ran.out.contains("host3"), "{}", ran.out);
    let done = Fake::new(&[status(None)]);
    assert!(done.run(&line).out.starts_with("No rotation is under way"));
    assert_eq!(done.asked(), [Request::KeyRotateCluster { key: Secret("secret\n".into()) }]);
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
    done.run(&line).fails(1, &format!("{} can be read", file.display()));
    assert_eq!(done.asked().len(), 1);
}

#[test]
fn plan_is_what_a_shell_can_read() {
    let command = "bridge fdb replace 02:00:0a:01:00:12 dev ovlx1 dst 192.0.2.2".to_owned();
    let fake = Fake::new(&[Reply::Plan(vec![command.clone()])]);
    fake.run("plan").prints(&format!("{command}\n"));
    fake.run("plan -o json").prints_json(&json!([command]));
    Fake::new(&[Reply::Plan(Vec::new())]).run("plan").prints("");
}

#[test]
fn metrics_are_printed_as_they_are() {
    let fake = Fake::new(&[Reply::Text("ovl_peers 3\n".into())]);
    fake.run("metrics").prints("ovl_peers 3\n");
    fake.run("metrics -o json").prints_json(&json!({ "text": "ovl_peers 3\n" }));
}

#[test]
fn verify_fails_on_a_difference_and_names_it() {
    let difference = "fdb entry 02:00:0a:01:00:12 of blue is missing".to_owned();
    let fake = Fake::new(&[Reply::Verify(Verify {
        clean: false,
        settled_ms: None,
        differences: vec![difference.clone()],
    })]);
    let ran = fake.run("verify");
    assert_eq!((ran.code, ran.out, ran.err), (Some(1), format!("{difference}\n"), String::new()));
    let ran = fake.run("verify -o json");
    let value: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!((ran.code, value), (Some(1), json!({ "clean": false, "differences": [difference] })));
    Fake::new(&[Reply::Verify(Verify { clean: true, settled_ms: Some(3), differences: Vec::new() })])
        .run("verify")
        .prints("clean: the kernel holds what it should\n");
}

#[test]
fn a_missing_socket_says_what_to_do() {
    let dir = Dir::new();
    for line in ["status", "events --follow", "status -o json"] {
        let ran = run(ovlctl(line).env("OVL_SOCKET", dir.0.join("none")));
        ran.fails(1, "cannot reach ovld at /");
        assert!(ran.err.contains("Is it running?"), "{}", ran.err);
    }
    // The option goes before the environment.
    let fake =
        Fake::new(&[Reply::Verify(Verify { clean: true, settled_ms: Some(3), differences: Vec::new() })]);
    let mut command = fake.command("verify");
    run(command.arg("--socket").arg(dir.0.join("none"))).fails(1, "cannot reach ovld");
}

#[test]
fn what_ovld_refuses_is_told_as_it_says() {
    let message = "there is no network 'blue'.\nMake it: \u{1b}[31m`ovlctl network create blue`".to_owned();
    let fake = Fake::new(&[Reply::Error(Failure { kind: FailureKind::NotFound, message })]);
    for line in ["network inspect blue", "network inspect blue -o json", "events --follow"] {
        fake.run(line)
            .fails(1, "there is no network 'blue'.\nMake it: \\u{1b}[31m`ovlctl network create blue`\n");
    }
}

#[test]
fn an_answer_that_makes_no_sense_is_an_error() {
    Fake::new(&[Reply::Done]).run("status").fails(1, "ovld gave an answer that does not belong");
    Fake::raw("{}\n".into()).run("status").fails(1, "ovld answered with something");
    Fake::raw(String::new()).run("status").fails(1, "lost the connection to ovld");
}

#[test]
fn wrong_usage_is_status_2() {
    ovlctl_fails("stauts", "unrecognized subcommand 'stauts'");
    ovlctl_fails("attach web --network blue", "the following required arguments");
    ovlctl_fails("network create blue --subnet 10.1.0.0", "'10.1.0.0' is not a range of addresses.");
    let ran = run(&mut ovlctl(""));
    assert_eq!((ran.code, ran.out.as_str()), (Some(2), ""));
    assert!(ran.err.contains("Usage: ovlctl"), "{}", ran.err);
}

fn ovlctl_fails(line: &str, message: &str) {
    run(&mut ovlctl(line)).fails(2, message);
}

#[test]
fn what_needs_no_daemon_works_without() {
    let release = concat!("ovlctl ", env!("CARGO_PKG_VERSION"), "\n");
    run(&mut ovlctl("-V")).prints(release);
    let version = run(&mut ovlctl("--version"));
    assert!(version.out.starts_with(release) && version.out.contains("\ncommit: "), "{}", version.out);
    let key = run(&mut ovlctl("key generate"));
    assert_eq!((key.code, key.out.len(), key.err.as_str()), (Some(0), 45, ""));
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&mut ovlctl(&format!("completions {shell}")));
        assert!(script.code == Some(0) && script.out.contains("teardown"), "{shell}");
    }
}

#[test]
fn a_key_is_written_where_nobody_else_can_read_it() {
    let dir = Dir::new();
    let path = dir.0.join("key");
    for mode in [0o644, 0o666, 0o600] {
        let file = File::create(&path).unwrap();
        file.set_permissions(std::fs::Permissions::from_mode(mode)).unwrap();
        run(ovlctl("key generate").stdout(file)).prints("");
        let metadata = std::fs::metadata(&path).unwrap();
        assert_eq!((metadata.len(), metadata.permissions().mode() & 0o7777), (45, 0o600), "{mode:o}");
    }
}

#[test]
fn attach_sends_the_namespace_as_a_path() {
    let fake = Fake::new(&[Reply::Done]);
    fake.run("attach web --network blue --netns green").fails(1, "ovld gave an answer");
    let asked = fake.asked();
    let [Request::Attach(attach)] = asked.as_slice() else { panic!("{asked:?}") };
    assert_eq!(attach.netns, NetnsRef::Path("/run/netns/green".into()));
}

#[test]
fn events_are_a_list_or_a_stream() {
    let fake = Fake::new(&[Reply::Events(vec![event(0), event(1)]), Reply::Events(vec![event(2)])]);
    let lines: Vec<String> = (0..3)
        .map(|number| format!("1970-01-01T00:00:00.00{number}Z  peer      host2  is number {number}\n"))
        .collect();
    fake.run("events").prints(&lines[..2].concat());
    fake.run("events -o json").prints_json(&serde_json::to_value([event(0), event(1)]).unwrap());

    // The stream is printed as it comes, and its end is an error: it should have none.
    let ran = fake.run("events --follow");
    assert_eq!((ran.code, ran.out), (Some(1), lines.concat()));
    assert!(ran.err.starts_with("ovlctl: lost the connection to ovld"), "{}", ran.err);
    let ran = fake.run("events --follow -o json");
    let objects: Vec<Event> = ran.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(objects, [event(0), event(1), event(2)]);
    let follow = |follow| Request::Events { follow };
    assert_eq!(fake.asked(), [follow(false), follow(false), follow(true), follow(true)]);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    // More than a pipe holds, in many pieces and in one.
    let many = || (0..20_000).map(event).collect();
    let fake = Fake::new(&[Reply::Events(many()), Reply::Events(many())]);
    for line in ["events", "events --follow", "events -o json", "events --follow -o json"] {
        let mut child = fake.command(line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut first = String::new();
        // The reader is dropped at the end of the statement, and the pipe with it.
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
        let code = child.wait().unwrap().code();
        let mut err = String::new();
        child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        assert_eq!((code, err.as_str(), first.is_empty()), (Some(0), "", false), "{line}");
    }
}

#[test]
fn an_output_that_cannot_be_written_is_an_error() {
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let fake = Fake::new(&[block()]);
    run(fake.command("subnets").stdout(full())).fails(1, "cannot write to standard output");
    // Without a standard error there is nobody to tell, and the status still tells.
    assert_eq!(run(ovlctl("stauts").stderr(full())).code, Some(2));
    assert_eq!(run(ovlctl("status --socket /nowhere").stderr(full())).code, Some(1));
}
