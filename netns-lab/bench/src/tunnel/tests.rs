//! Tests of the measurements on the hosts' own link. Need root and iperf3, but no peer and no daemon.

use std::time::Duration;

use netns_lab::{Lab, LabConfig};

use super::processes::Processes;
use super::system::System;

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn systems_are_measured() {
    let lab = Lab::new(LabConfig::hosts(2)).unwrap();
    let (from, to) = (&lab["h1"], &lab["h2"]);
    let system = System::new(from, to, to.address().unwrap(), Processes::default()).unwrap();
    assert!(system.stream(SECOND).unwrap().gbit_s > 0.1);
    let rate = system.datagrams(SECOND).unwrap();
    assert!(rate.received_s > 1000.0 && (0.0..100.0).contains(&rate.lost_percent), "{rate:?}");
    let times = system.round_trips(100).unwrap();
    assert!(times.len() == 100 && times.min() > 0.5 && times.median() < 1e5, "{times:?}");
}

/// Packets that bypass the tunnel must be an error, because the figures would be of another path.
#[test]
fn packets_that_bypass_the_processes_are_an_error() {
    let lab = Lab::new(LabConfig::hosts(2)).unwrap();
    let idle = lab["h1"].spawn(["sleep", "60"]).unwrap();
    let to = &lab["h2"];
    let system = System::new(&lab["h1"], to, to.address().unwrap(), Processes(vec![idle.pid()])).unwrap();
    let error = system.stream(SECOND).unwrap_err().to_string();
    assert!(error.contains("did not pass them"), "{error}");
}
