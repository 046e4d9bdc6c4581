//! The ovlctl binary against a fake daemon with fixed replies.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests, and helpers of tests")]
#![allow(unreachable_pub, reason = "the helpers are a module of this one test")]

mod fake;

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Stdio;

use fake::{Dir, FakeDaemon, ovlctl, run};
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
fn list_is_printed_as_table_or_json_array() {
    let fake = FakeDaemon::new(&[block()]);
    fake.run("subnets")
        .prints("NETWORK  PREFIX       NODE   USED  SIZE\nblue     10.1.0.0/28  host1  3     15\n");
    fake.run("subnets -o json").prints_json(
        &json!([{ "network": "blue", "prefix": "10.1.0.0/28", "node": "host1", "used": 3, "size": 15 }]),
    );
    assert_eq!(fake.asked(), [Request::Subnets, Request::Subnets]);
}

#[test]
fn json_is_indented() {
    FakeDaemon::new(&[Reply::Verify(Verify { clean: true, settled_ms: Some(3), differences: Vec::new() })])
        .run("verify -o json")
        .prints("{\n  \"clean\": true,\n  \"settled_ms\": 3,\n  \"differences\": []\n}\n");
}

#[test]
fn commands_without_data_print_nothing() {
    let fake = FakeDaemon::new(&[Reply::Done]);
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
fn peers_forget_prints_how_to_rotate_the_key() {
    let fake = FakeDaemon::new(&[Reply::Done]);
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
fn key_rotate_waits_unless_told_not_to_and_rejects_readable_key_files() {
    let status = |rotation: Option<KeyRotation>| {
        Reply::Keys(Box::new(KeyStatus { rotation, tunnel_waits_for: None, hosts: Vec::new() }))
    };
    let in_progress = KeyRotation {
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

    let fake = FakeDaemon::new(&[status(Some(in_progress))]);
    let ran = fake.run(&format!("{line} --no-wait"));
    assert_eq!(ran.code, Some(0));
    assert!(ran.out.starts_with("Rotating to 0410c3g since") && ran.out.contains("host3"), "{}", ran.out);
    let done = FakeDaemon::new(&[status(None)]);
    assert!(done.run(&line).out.starts_with("No rotation in progress"));
    assert_eq!(done.asked(), [Request::KeyRotateCluster { key: Secret("secret\n".into()) }]);
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
    done.run(&line).fails(1, &format!("{} is accessible to other users", file.display()));
    assert_eq!(done.asked().len(), 1);
}

#[test]
fn plan_can_be_run_by_a_shell() {
    let command = "bridge fdb replace 02:00:0a:01:00:12 dev ovx-04gc3g8k self static dst 192.0.2.2 port 4789"
        .to_owned();
    let fake = FakeDaemon::new(&[Reply::Plan(vec![command.clone()])]);
    fake.run("plan").prints(&format!("{command}\n"));
    fake.run("plan -o json").prints_json(&json!([command]));
    FakeDaemon::new(&[Reply::Plan(Vec::new())]).run("plan").prints("");
}

#[test]
fn metrics_are_printed_unmodified() {
    let fake = FakeDaemon::new(&[Reply::Text("ovl_peers 3\n".into())]);
    fake.run("metrics").prints("ovl_peers 3\n");
    fake.run("metrics -o json").prints_json(&json!({ "text": "ovl_peers 3\n" }));
}

#[test]
fn verify_prints_differences_and_exits_with_status_1() {
    let difference =
        "kernel: needs `bridge fdb replace 02:00:0a:01:00:12 dev ovx-04gc3g8k self static dst 192.0.2.2 port 4789`".to_owned();
    let fake = FakeDaemon::new(&[Reply::Verify(Verify {
        clean: false,
        settled_ms: None,
        differences: vec![difference.clone()],
    })]);
    let ran = fake.run("verify");
    assert_eq!((ran.code, ran.out, ran.err), (Some(1), format!("{difference}\n"), String::new()));
    let ran = fake.run("verify -o json");
    let value: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!((ran.code, value), (Some(1), json!({ "clean": false, "differences": [difference] })));
    FakeDaemon::new(&[Reply::Verify(Verify { clean: true, settled_ms: Some(3), differences: Vec::new() })])
        .run("verify")
        .prints("clean: the kernel matches the desired state\n");
}

#[test]
fn unreachable_daemon_error_has_advice() {
    let dir = Dir::new();
    for line in ["status", "events --follow", "status -o json"] {
        let ran = run(ovlctl(line).env("OVL_SOCKET", dir.0.join("none")));
        ran.fails(1, "cannot reach ovld at /");
        assert!(ran.err.contains("Is it running?"), "{}", ran.err);
    }
    // The option overrides the environment variable.
    let fake = FakeDaemon::new(&[Reply::Verify(Verify {
        clean: true,
        settled_ms: Some(3),
        differences: Vec::new(),
    })]);
    let mut command = fake.command("verify");
    run(command.arg("--socket").arg(dir.0.join("none"))).fails(1, "cannot reach ovld");
}

#[test]
fn error_of_ovld_is_printed_with_control_characters_escaped() {
    let message = "there is no network 'blue'.\nMake it: \u{1b}[31m`ovlctl network create blue`".to_owned();
    let fake = FakeDaemon::new(&[Reply::Error(Failure { kind: FailureKind::NotFound, message })]);
    for line in ["network inspect blue", "network inspect blue -o json", "events --follow"] {
        fake.run(line)
            .fails(1, "there is no network 'blue'.\nMake it: \\u{1b}[31m`ovlctl network create blue`\n");
    }
}

#[test]
fn unexpected_reply_is_an_error() {
    FakeDaemon::new(&[Reply::Done]).run("status").fails(1, "ovld sent a reply of an unexpected type");
    FakeDaemon::raw("{}\n".into()).run("status").fails(1, "ovld sent a reply");
    FakeDaemon::raw(String::new()).run("status").fails(1, "lost the connection to ovld");
}

#[test]
fn misspelt_commands_do_not_suggest_to_leave() {
    for word in ["leav", "teardwn", "edit", "replace"] {
        let ran = run(&mut ovlctl(word));
        assert_eq!(ran.code, Some(2));
        assert!(ran.err.starts_with(&format!("ovlctl: unrecognized subcommand '{word}'")), "{}", ran.err);
        assert!(!ran.err.contains("'leave'") && !ran.err.contains("'teardown'"), "{}", ran.err);
    }
}

#[test]
fn formats_of_objects_are_refused_by_other_commands() {
    ovlctl_fails("status -o name", "`-o name` is only for");
    ovlctl_fails("apply -f a.yaml -o jsonpath={.a}", "`-o jsonpath` is only for get");
    ovlctl_fails("get svc -o jsonpath={.a", "invalid jsonpath template: a '{' without '}'");
    ovlctl_fails("status -o xml", "invalid value 'xml' for '--output <OUTPUT>'");
}

#[test]
fn items_of_a_list_are_staged_with_their_lines() {
    let dir = Dir::new();
    let file = dir.0.join("a.yaml");
    std::fs::write(&file, "kind: List\napiVersion: v1\nitems:\n- a: 1\n- b: 2\n").unwrap();
    let fake = FakeDaemon::new(&[Reply::Done]);
    // The fake daemon closes the connection after the first request.
    assert_eq!(fake.run(&format!("apply -f {}", file.display())).code, Some(1));
    let asked = fake.asked();
    let [Request::Stage { documents }] = asked.as_slice() else { panic!("{asked:?}") };
    let places: Vec<_> = documents.iter().map(|it| (it.line, it.within.as_str())).collect();
    assert_eq!(places, [(4, "items[0]."), (5, "items[1].")]);
}

#[test]
fn usage_error_exits_with_status_2() {
    ovlctl_fails("stauts", "unrecognized subcommand 'stauts'");
    ovlctl_fails("attach web --network blue", "the following required arguments");
    ovlctl_fails("network create blue --subnet 10.1.0.0", "'10.1.0.0' is not a subnet.");
    let ran = run(&mut ovlctl(""));
    assert_eq!((ran.code, ran.out.as_str()), (Some(2), ""));
    assert!(ran.err.contains("Usage: ovlctl"), "{}", ran.err);
}

fn ovlctl_fails(line: &str, message: &str) {
    run(&mut ovlctl(line)).fails(2, message);
}

#[test]
fn offline_commands_need_no_daemon() {
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
fn generated_key_file_is_readable_by_its_owner_only() {
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
fn attach_sends_the_netns_as_an_absolute_path() {
    let fake = FakeDaemon::new(&[Reply::Done]);
    fake.run("attach web --network blue --netns green").fails(1, "ovld sent a reply of an unexpected type");
    let asked = fake.asked();
    let [Request::Attach(attach)] = asked.as_slice() else { panic!("{asked:?}") };
    assert_eq!(attach.netns, NetnsRef::Path("/run/netns/green".into()));
}

#[test]
fn events_are_printed_as_list_or_stream() {
    let fake = FakeDaemon::new(&[Reply::Events(vec![event(0), event(1)]), Reply::Events(vec![event(2)])]);
    let lines: Vec<String> = (0..3)
        .map(|number| format!("1970-01-01T00:00:00.00{number}Z  peer      host2  is number {number}\n"))
        .collect();
    fake.run("events").prints(&lines[..2].concat());
    fake.run("events -o json").prints_json(&serde_json::to_value([event(0), event(1)]).unwrap());

    // The stream is printed as it arrives. Its end is an error, because a stream of events is endless.
    let ran = fake.run("events --follow");
    assert_eq!((ran.code, ran.out), (Some(1), lines.concat()));
    assert!(ran.err.starts_with("ovlctl: lost the connection to ovld"), "{}", ran.err);
    let ran = fake.run("events --follow -o json");
    let objects: Vec<Event> = ran.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(objects, [event(0), event(1), event(2)]);
    let follow = |follow| Request::Events { follow, since_ms: None, until_ms: None };
    assert_eq!(fake.asked(), [follow(false), follow(false), follow(true), follow(true)]);
}

#[test]
fn closed_output_pipe_is_not_an_error() {
    // More events than a pipe buffers, as a stream and as a list.
    let many = || (0..20_000).map(event).collect();
    let fake = FakeDaemon::new(&[Reply::Events(many()), Reply::Events(many())]);
    for line in ["events", "events --follow", "events -o json", "events --follow -o json"] {
        let mut child = fake.command(line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut first = String::new();
        // The statement drops the reader and closes the pipe.
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut first).unwrap();
        let code = child.wait().unwrap().code();
        let mut err = String::new();
        child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        assert_eq!((code, err.as_str(), first.is_empty()), (Some(0), "", false), "{line}");
    }
}

#[test]
fn failed_write_to_standard_output_is_an_error() {
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let fake = FakeDaemon::new(&[block()]);
    run(fake.command("subnets").stdout(full())).fails(1, "cannot write to standard output");
    // The exit status is set even if standard error cannot be written.
    assert_eq!(run(ovlctl("stauts").stderr(full())).code, Some(2));
    assert_eq!(run(ovlctl("status --socket /nowhere").stderr(full())).code, Some(1));
}
