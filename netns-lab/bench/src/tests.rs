//! Tests of the measurements with a manually built overlay. Need root, but no daemon.

use std::thread;
use std::time::{Duration, Instant};

use netns_lab::{Lab, LabConfig};

use super::neigh::{Change, Watcher};
use super::stream::{Cores, Path};
use super::{by_hand, flow};

const SECOND: Duration = Duration::from_secs(1);
const MTU: u64 = 1450;

#[test]
fn traffic_passes_the_manually_built_overlay() {
    let lab = Lab::new(LabConfig::hosts(2)).unwrap();
    let [a, b] = by_hand::build(&lab, MTU).unwrap();
    a.0.ping_until(b.1, SECOND * 5).unwrap();

    let pause = Duration::from_millis(300);
    let (traffic, answer) = flow::run(&a, &b, || {
        thread::sleep(pause);
        Ok(42)
    })
    .unwrap();
    assert_eq!(answer, 42);
    assert!(traffic.there.sent > 300 && traffic.back.sent > 300 && traffic.stream.bytes > 100_000);
    assert_eq!((traffic.there.lost, traffic.back.lost, traffic.there.duplicates), (0, 0, 0));

    // Lost packets are counted.
    let (traffic, ()) = flow::run(&a, &b, || {
        lab.loss_udp_port(100.0, 4789)?;
        thread::sleep(pause);
        lab.clear_faults()
    })
    .unwrap();
    for lost in [traffic.there.lost, traffic.back.lost] {
        assert!((200..1000).contains(&lost), "{lost}");
    }
    assert!(traffic.stream.retransmits > 0 && traffic.stream.longest_gap > pause);
}

#[test]
fn iperf3_measures() {
    let lab = Lab::new(LabConfig::hosts(2)).unwrap();
    let [a, b] = by_hand::build(&lab, MTU).unwrap();
    let path = Path::new(&a.0, &b.0, b.1).unwrap();
    for cores in [Cores::One, Cores::Any] {
        let speed = path.run(SECOND, cores).unwrap();
        assert!(speed.gbit_s > 0.1, "{speed:?}");
    }
}

#[test]
fn watcher_reports_entries() {
    let lab = Lab::new(LabConfig::hosts(2)).unwrap();
    by_hand::build(&lab, MTU).unwrap();
    let hosts: Vec<_> = lab.hosts().iter().collect();
    let watcher = Watcher::start(&hosts).unwrap();
    let before = Instant::now();
    let entry = "02:00:00:00:00:07 dev vx1 dst 192.168.77.9";
    for verb in ["replace", "del"] {
        lab["h2"].exec_ok(format!("bridge fdb {verb} {entry}").split(' ')).unwrap();
    }
    for added in [true, false] {
        let seen = watcher.next(Instant::now() + SECOND * 5).unwrap().unwrap();
        let destination = "192.168.77.9".parse().unwrap();
        assert_eq!(seen.change, Change { added, mac: [2, 0, 0, 0, 0, 7], destination });
        assert!(seen.host == 1 && seen.at > before);
    }
    assert!(watcher.next(Instant::now() + SECOND / 10).unwrap().is_none());
}
