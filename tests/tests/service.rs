//! ovld as a systemd service: its notifications to the service manager.

use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use netns_lab::{Lab, LabConfig, Signal, find_binary, uninterrupted};
use ovl_tests::SOON;

/// Receives one datagram of sd_notify(3).
fn notification(manager: &UnixDatagram) -> Option<String> {
    let mut bytes = [0; 256];
    let length = uninterrupted(|| manager.recv(&mut bytes)).ok()?;
    String::from_utf8(bytes[..length].to_vec()).ok()
}

#[test]
fn service_manager_is_notified_of_ready_watchdog_and_stopping() {
    let lab = Lab::new(LabConfig::hosts(1)).unwrap();
    let host = &lab["h1"];
    let path = host.dir().join("notify");
    let manager = UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(SOON)).unwrap();
    let (binary, state, run) = (find_binary("ovld").unwrap(), host.state_dir(), host.run_dir());
    let notify = format!("NOTIFY_SOCKET={}", path.display());
    let address = host.address().unwrap().to_string();
    let mut ovld = host
        .spawn([
            "env",
            &notify,
            binary.to_str().unwrap(),
            "--config",
            "/dev/null",
            "--insecure",
            "--state-dir",
            state.to_str().unwrap(),
            "--run-dir",
            run.to_str().unwrap(),
            "--advertise",
            &address,
        ])
        .unwrap();
    assert_eq!(notification(&manager).unwrap().trim(), "READY=1");
    host.ctl_ok(&["status"]).expect("the control socket must answer once ovld is ready");
    for _ in 0..3 {
        assert_eq!(notification(&manager).unwrap().trim(), "WATCHDOG=1");
    }
    let signalled = Instant::now();
    ovld.signal(Signal::SIGTERM).unwrap();
    let stopping =
        std::iter::from_fn(|| notification(&manager)).take(3).any(|text| text.trim() == "STOPPING=1");
    assert!(stopping);
    let output = ovld.finish(SOON).unwrap();
    assert_eq!(output.code(), Some(0), "{}", output.stderr);
    assert!(signalled.elapsed() < Duration::from_secs(2), "{:?}", signalled.elapsed());
}
