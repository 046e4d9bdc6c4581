//! `ovlctl events`: what happened between two moments, also before a restart.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use netns_lab::wait_until;
use ovl_tests::{SOON, attach, create_network, rows, start_lab, text};

#[test]
fn events_of_a_period_survive_a_killed_daemon() {
    let lab = start_lab(1).unwrap();
    let h1 = &lab["h1"];
    create_network(&lab, "blue", &["--subnet", "10.1.0.0/24"]).unwrap();
    attach(h1, "first", "blue", &[]).unwrap();
    let attached = |name: &str, more: &[&str]| {
        let events = rows(h1, &[&["events"], more].concat()).unwrap();
        events.iter().find(|event| event["object"] == name && event["message"] == "attached").cloned()
    };
    // The thread that writes them answers this, so what it has is on disk.
    let first = attached("first", &["--since", "10m"]).unwrap();
    h1.kill9().unwrap();
    h1.restart().unwrap();
    h1.wait_ready(SOON).unwrap();
    attach(h1, "second", "blue", &[]).unwrap();
    let second = wait_until(SOON, "the second event", || attached("second", &[])).unwrap();
    assert_eq!(
        attached("first", &[]),
        Some(first.clone()),
        "the latest events include those of the last run"
    );
    let at = |event: &serde_json::Value| {
        let lines = h1.ctl_ok(&["events"]).unwrap();
        let name = text(&event["object"]);
        let line =
            lines.lines().find(|line| line.contains("attached") && line.contains(&name)).unwrap().to_owned();
        line.split(' ').next().unwrap().to_owned()
    };
    // The times that it prints can be given.
    let (from, to) = (at(&first), at(&second));
    let period = ["--since", &from, "--until", &to];
    assert!(attached("first", &period).is_some() && attached("second", &period).is_some(), "{period:?}");
    let ten_seconds_before_at_most = format!("{}0.000Z", &from[..18]);
    assert_eq!(attached("first", &["--until", &ten_seconds_before_at_most]), None);
    assert_eq!(attached("second", &["--until", &from]), None);
    assert_eq!(attached("first", &["--since", &to]), None);
    let state = h1.state_dir().join("events");
    let mode = h1.exec_ok(["stat", "-c", "%a", state.to_str().unwrap()]).unwrap();
    assert_eq!(mode.trim(), "600");
}
