//! ovld as a service: what it tells its manager, and when it must not be started again.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use netns_lab::{Lab, LabConfig, Signal, find_binary, wait_until};
use ovl_tests::{SOON, problems, started, wait_clean};

/// The exit status that keeps the unit from starting ovld again.
const STOOD_ASIDE: i32 = 78;

/// One datagram of sd_notify(3).
fn told(manager: &UnixDatagram) -> Option<String> {
    let mut bytes = [0; 256];
    let length = manager.recv(&mut bytes).ok()?;
    String::from_utf8(bytes[..length].to_vec()).ok()
}

#[test]
fn the_service_manager_hears_of_readiness_of_life_and_of_the_end() {
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
    assert_eq!(told(&manager).unwrap().trim(), "READY=1");
    host.ctl_ok(&["status"]).expect("the socket answers once it is ready");
    for _ in 0..3 {
        assert_eq!(told(&manager).unwrap().trim(), "WATCHDOG=1");
    }
    let asked = Instant::now();
    ovld.signal(Signal::SIGTERM).unwrap();
    let stopping = std::iter::from_fn(|| told(&manager)).take(3).any(|text| text.trim() == "STOPPING=1");
    assert!(stopping);
    let output = ovld.finish(SOON).unwrap();
    assert_eq!(output.code(), Some(0), "{}", output.stderr);
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
}

#[test]
fn a_copied_state_directory_stands_aside_and_both_hosts_are_named() {
    let lab = started(3).unwrap();
    let (original, copy) = (&lab["h2"], &lab["h3"]);
    copy.stop().unwrap();
    fs::remove_dir_all(copy.state_dir()).unwrap();
    fs::create_dir(copy.state_dir()).unwrap();
    for file in fs::read_dir(original.state_dir()).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), copy.state_dir().join(file.file_name())).unwrap();
    }
    copy.start().unwrap();
    let ended = || copy.exit_status();
    let status = wait_until(Duration::from_secs(40), "the copy to end", ended).unwrap();
    assert_eq!(status.code(), Some(STOOD_ASIDE), "{}", copy.log());
    let log = copy.log();
    let addresses = [original.address().unwrap().to_string(), copy.address().unwrap().to_string()];
    let last = log.lines().last().unwrap();
    assert!(addresses.iter().all(|address| last.contains(address)), "{last}");
    assert!(original.is_running(), "the one that was there first stays");
    let named = problems(&lab["h1"]).unwrap();
    assert!(named.iter().any(|problem| addresses.iter().all(|a| problem.contains(a))), "{named:?}");
    // Once the copy is gone, the original is itself again.
    let id = original.ctl_json(&["status"]).unwrap()["id"].clone();
    wait_until(Duration::from_secs(60), "the first host to see the original again", || {
        let peers = lab["h1"].ctl_json(&["peers"]).unwrap_or_default();
        peers.as_array().is_some_and(|peers| {
            peers.iter().any(|peer| {
                peer["id"] == id && peer["address"].as_str().is_some_and(|a| a.starts_with(&addresses[0]))
            })
        })
    })
    .unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}
