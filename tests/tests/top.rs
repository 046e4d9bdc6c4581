//! `ovlctl top` in a terminal, and once for scripts.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::num::NonZero;
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use anyhow::{Result, ensure};
use netns_lab::{Host, wait_until};
use nix::pty::{Winsize, openpty};
use ovl_tests::policy::ONLY_API;
use ovl_tests::service::apply;
use ovl_tests::{SOON, assert_contains, attach, create_network, ping_all_pairs, start_lab, wait_clean};
use serde_json::Value;

/// A program in a terminal of 80 columns and 24 lines.
struct Terminal {
    keys: File,
    screen: Arc<Mutex<vt100::Parser>>,
    program: Child,
}

impl Terminal {
    fn start(host: &Host, args: &[&str]) -> Result<Self> {
        let (lines, columns) = (NonZero::new(24).unwrap(), NonZero::new(80).unwrap());
        let size = Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 };
        let pair = openpty(&size, None)?;
        let mut command = host.ctl_command(args)?;
        command.env("TERM", "xterm-256color");
        command.stdin(pair.slave.try_clone()?).stdout(pair.slave.try_clone()?).stderr(pair.slave);
        let program = command.spawn()?;
        // The command holds copies of the other end, which would keep this one from its end of file.
        drop(command);
        let keys = File::from(pair.master);
        let screen = Arc::new(Mutex::new(vt100::Parser::new(lines, columns, 0)));
        let (mut output, written) = (keys.try_clone()?, Arc::clone(&screen));
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            // The end of the program is an error (EIO).
            while let Ok(length @ 1..) = output.read(&mut bytes) {
                written.lock().unwrap().process(&bytes[..length]);
            }
        });
        Ok(Self { keys, screen, program })
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    fn text(&self) -> String {
        self.screen.lock().unwrap().screen().contents()
    }

    #[track_caller]
    fn wait(&self, what: &str, is_there: impl Fn(&str) -> bool) {
        wait_until(SOON, what, || {
            let text = self.text();
            ensure!(is_there(&text), "{text}");
            Ok(())
        })
        .unwrap();
    }
}

#[test]
fn top_shows_flows_of_all_hosts_while_they_are_listed() {
    let lab = start_lab(2).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    create_network(&lab, "blue", &["--subnet", "10.1.0.0/24", "--subnet", "fd01::/64"]).unwrap();
    let web = attach(h2, "web", "blue", &["--label", "app=web"]).unwrap();
    let api = attach(h2, "api", "blue", &["--label", "app=api"]).unwrap();
    let other = attach(h2, "other", "blue", &[]).unwrap();
    let _server = web.workload.tcp_echo(80).unwrap();
    apply(&lab, h1, ONLY_API).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    let connect = || {
        for address in web.addresses() {
            // They may be refused: one of them always is.
            let _ = api.workload.tcp_roundtrip(&address, 80, b"hello");
            let _ = other.workload.tcp_roundtrip(&address, 80, b"hello");
        }
    };
    let is_counted =
        |host: &Host| host.exec_ok(["nft", "list", "tables"]).unwrap().contains("ovl-trace-flows-");
    assert!(!lab.hosts().iter().any(is_counted));

    // Once, for scripts: what is seen within the interval, in which there are connections.
    let stop = AtomicBool::new(false);
    let flow = thread::scope(|scope| {
        let connecting = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // Without those that are refused, which take seconds.
                for address in web.addresses() {
                    let _ = api.workload.tcp_roundtrip(&address, 80, b"hello");
                }
            }
        });
        let found = wait_until(SOON, "a flow in JSON", || {
            let rows: Value = h1.ctl_json(&["top", "flows"])?;
            let flows = rows["flows"].as_array().unwrap().clone();
            let is_meant = |flow: &Value| flow["from"] == "default/api" && flow["verdict"] == "passed";
            anyhow::Ok(flows.into_iter().find(is_meant))
        });
        stop.store(true, Ordering::Relaxed);
        connecting.join().unwrap();
        found.unwrap()
    });
    assert_eq!((flow["to"].as_str(), flow["port"].as_str()), (Some("default/web"), Some("80/tcp")));
    assert_eq!(flow["hosts"], serde_json::json!(["h2"]));

    let mut top = Terminal::start(h1, &["top"]).unwrap();
    top.wait("hosts", |text| text.contains("top: hosts"));
    top.press("f");
    top.wait("flows of the other host", |text| {
        connect();
        let has = |parts: &[&str]| text.lines().any(|line| parts.iter().all(|part| line.contains(part)));
        text.contains("top: flows")
            && has(&["default/api", "default/web", "80/tcp", "passed"])
            && has(&["default/other", "default/web", "80/tcp", "dropped"])
    });
    assert!(lab.hosts().iter().all(is_counted));
    // By a filter of what decides, and what is known of that flow.
    top.press("/no ingress\r");
    top.wait("the filter", |text| text.contains("default/other") && !text.contains("default/api"));
    top.press("\r");
    top.wait("the details", |text| {
        text.contains("decided   no ingress rule of default/only-api") && text.contains("seen by   h2")
    });
    top.press("\u{7f}\u{7f}");
    top.wait("all flows", |text| text.contains("default/api") && text.contains("default/other"));
    // Nothing is counted for other views.
    top.press("e");
    top.wait("endpoints", |text| text.contains("top: endpoints") && text.contains("other"));
    wait_until(SOON, "nothing to be counted", || {
        ensure!(!lab.hosts().iter().any(is_counted));
        Ok(())
    })
    .unwrap();
    // Those of one endpoint: the first in the order of names is `api`.
    top.press("\r");
    top.wait("the flows of an endpoint", |text| {
        connect();
        text.contains("flows of default/api") && text.contains("passed") && !text.contains("default/other")
    });
    top.press("q");
    wait_until(SOON, "the end", || {
        ensure!(top.program.try_wait()?.is_some());
        Ok(())
    })
    .unwrap();
    wait_until(SOON, "nothing to be counted", || {
        ensure!(!lab.hosts().iter().any(is_counted));
        Ok(())
    })
    .unwrap();
}

#[test]
fn top_shows_the_cluster_in_a_terminal_and_once_as_json() {
    let lab = start_lab(2).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    create_network(&lab, "blue", &["--subnet", "10.1.0.0/24", "--subnet", "fd01::/64"]).unwrap();
    let all = [attach(h1, "quiet", "blue", &[]).unwrap(), attach(h2, "busy", "blue", &[]).unwrap()];
    let third = attach(h1, "target", "blue", &[]).unwrap();
    ping_all_pairs(&[all[1].clone(), third.clone()], SOON).unwrap();
    let pings = ["ping", "-i", "0.02", "-s", "1000", "-q", &third.address()];
    let _pings = all[1].workload.spawn(pings).unwrap();

    let rows: Value = h1.ctl_json(&["top"]).unwrap();
    let busy =
        rows["endpoints"].as_array().unwrap().iter().find(|row| row["name"] == "busy").unwrap().clone();
    // Fifty packets of a thousand bytes each way, more or less.
    let sent = busy["per_second"]["sent_bytes"].as_f64().unwrap();
    assert!((10_000.0..100_000.0).contains(&sent), "{rows}");
    assert_eq!(rows["hosts"][1]["host"], "h2");
    assert!(rows["hosts"][1]["rtt_us"].is_u64() && rows["hosts"][1]["answered"] == true, "{rows}");
    let table = h1.ctl_ok(&["top", "endpoints", "--once", "--interval", "1"]).unwrap();
    assert_contains(&table, &["ENDPOINT", "SENT/S", "busy", "quiet"]);
    assert!(table.lines().all(|line| line.len() <= 80), "{table}");

    let mut top = Terminal::start(h1, &["top", "--interval", "1"]).unwrap();
    top.wait("hosts with rates", |text| {
        let is_rated = |line: &str| line.starts_with("h2") && line.contains('k');
        text.contains("seen from h1: 2/2 hosts, 3 endpoints") && text.lines().any(is_rated)
    });
    // The endpoints of the second host, and back.
    top.press("\u{1b}[B\r");
    top.wait("endpoints of h2", |text| {
        text.contains("endpoints of h2") && text.contains("busy") && !text.contains("quiet")
    });
    top.press("\u{7f}");
    top.wait("hosts", |text| text.contains("top: hosts"));
    // All endpoints, by what they sent: the busiest first. Then by a filter.
    top.press("e\u{1b}[C\u{1b}[C\u{1b}[C\u{1b}[C");
    top.wait("the busiest endpoint first", |text| {
        text.lines().nth(2).is_some_and(|line| line.starts_with("busy") || line.starts_with("target"))
    });
    top.press("/quiet\r");
    top.wait("the filter", |text| text.contains("filter: quiet") && !text.contains("busy"));
    // A daemon that is gone is said, and found again.
    h1.kill9().unwrap();
    top.wait("the error", |text| text.contains("ovld"));
    h1.restart().unwrap();
    top.wait("the daemon again", |text| text.contains("seen from h1"));
    top.press("q");
    let status = wait_until(SOON, "the end", || anyhow::Ok(top.program.try_wait()?.is_some())).map(drop);
    status.unwrap();
    assert!(top.program.wait().unwrap().success());
    // The terminal is as it was: the other screen is left, and the cursor is shown.
    let screen = top.screen.lock().unwrap();
    assert!(!screen.screen().alternate_screen() && !screen.screen().hide_cursor());
}
