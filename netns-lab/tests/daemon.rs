//! Daemons in the lab, with the fake ovld and ovlctl of `tests/fake`. Needs root.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::path::{Path, PathBuf};
use std::time::Duration;

use netns_lab::{Lab, LabConfig, Signal, wait_until};

const SECOND: Duration = Duration::from_secs(1);

fn lab_of(hosts: usize, config: &str) -> Lab {
    let fake = |name: &str| Some(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fake").join(name));
    let mut config = LabConfig::hosts(hosts).config(config).args(["--log", "debug"]);
    config.ovld = fake("ovld");
    config.ovlctl = fake("ovlctl");
    Lab::new(config).unwrap()
}

fn lives(pid: u32) -> bool {
    Path::new(&format!("/proc/{pid}")).exists()
}

#[test]
fn daemons_start_with_their_arguments_and_stop() {
    let lab = lab_of(3, "");
    lab["h3"].set_args(&["--extra"]).unwrap();
    let took = lab.start_all().unwrap();
    assert!(took < SECOND * 10);
    let dir = lab["h2"].dir();
    let expected = format!(
        "started: --config {0}/ovld.toml --node h2 --state-dir {0}/state --run-dir {0}/run --advertise 192.168.77.2 \
         --join 192.168.77.1 --cluster-key {0}/cluster.key --log debug\n",
        dir.display()
    );
    assert_eq!(lab["h2"].log(), expected);
    assert!(lab["h1"].log().contains("--bootstrap") && !lab["h1"].log().contains("--join"));
    assert!(lab["h3"].log().contains("--log debug --extra"));
    assert!(lab["h1"].rss_kib().unwrap() > 100);
    lab["h1"].cpu_time().unwrap();

    assert!(lab["h1"].start().unwrap_err().to_string().contains("already"));
    assert!(lab["h1"].stop().unwrap() < SECOND * 5);
    assert!(lab["h1"].log().ends_with("stopped\n") && lab["h1"].exit_status().unwrap().success());
    assert!(!lab["h1"].is_running() && lab["h1"].stop().is_err());
    lab.wait_all_alive(SECOND * 5).unwrap();
    lab["h1"].start().unwrap();
    lab["h1"].wait_ready(SECOND * 5).unwrap();
}

#[test]
fn ovlctl_errors_name_the_host_and_the_reason() {
    let lab = lab_of(1, "");
    lab.start_all().unwrap();
    assert_eq!(lab["h1"].ctl_json(&["status"]).unwrap()["state"], "ready");
    assert_eq!(lab["h1"].ctl(&["nonsense"]).unwrap().code(), Some(2));
    let error = format!("{:#}", lab["h1"].ctl_ok(&["nonsense"]).unwrap_err());
    assert!(error.contains("unknown: nonsense") && error.contains("on h1"), "{error}");
    let error = format!("{:#}", lab["h1"].ctl_json(&["endpoints"]).unwrap_err());
    assert!(error.contains("no JSON"), "{error}");
}

#[test]
fn crash_error_contains_the_log() {
    let lab = lab_of(2, "");
    lab["h2"].set_config("crash = true").unwrap();
    let error = format!("{:#}", lab.start_all().unwrap_err());
    assert!(error.contains("h2 has exited (exit status: 7)") && error.contains("told to crash"), "{error}");
}

#[test]
fn killed_daemon_can_restart_and_dropped_lab_kills_daemons() {
    let lab = lab_of(2, "stubborn = true");
    lab.start_all().unwrap();
    let pid = lab["h2"].pid().unwrap();
    lab["h2"].kill9().unwrap();
    assert!(!lives(pid) && lab["h2"].pid().is_none() && lab["h2"].exit_status().is_some());
    lab["h2"].restart().unwrap();
    lab["h2"].wait_ready(SECOND * 5).unwrap();
    lab["h2"].signal(Signal::SIGSTOP).unwrap();
    let error = lab["h2"].stop().unwrap_err().to_string();
    assert!(error.contains("ovld on h2 to exit"), "{error}");
    let pids = [lab["h1"].pid().unwrap(), lab["h2"].pid().unwrap()];
    drop(lab);
    assert!(!pids.into_iter().any(lives));
}

#[test]
fn destroyed_host_loses_its_daemon() {
    let lab = lab_of(2, "");
    lab.start_all().unwrap();
    let pid = lab["h1"].pid().unwrap();
    lab["h1"].destroy().unwrap();
    assert!(!lives(pid) && !lab["h1"].is_running() && !lab["h1"].socket().exists());
    lab["h1"].restore().unwrap();
    lab["h1"].set_address("192.168.77.50".parse().unwrap()).unwrap();
    lab.start_all().unwrap();
    lab["h2"].restart().unwrap();
    wait_until(SECOND * 5, "the new address", || lab["h2"].log().contains("--join 192.168.77.50")).unwrap();
}
