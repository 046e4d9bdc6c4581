//! What a host runs out of is named before it is gone.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::fs;
use std::net::UdpSocket;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::ensure;
use netns_lab::{Lab, LabConfig, wait_until};
use ovl_tests::{attach, create_network, problems, wait_no_problem, wait_problem};

/// The checks run every 30 seconds.
const CHECKED: Duration = Duration::from_secs(60);

/// A small file system, unmounted when it is dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: PathBuf) -> Self {
        fs::create_dir_all(&at).unwrap();
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=96m,mode=700", "small"]).arg(&at).status();
        assert!(mounted.unwrap().success());
        Self(at)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l"]).arg(&self.0).status();
    }
}

#[test]
fn connections_files_and_space_that_run_out_are_named() {
    let lab = Lab::new(LabConfig::hosts(1)).unwrap();
    let h1 = &lab["h1"];
    let disk = SmallDisk::mount(h1.state_dir());
    lab.start_all().unwrap();
    // From then on connections are tracked.
    create_network(&lab, "blue", &["--subnet", "10.1.0.0/24"]).unwrap();
    attach(h1, "web", "blue", &[]).unwrap();
    wait_no_problem(h1, CHECKED).unwrap();

    let ballast = disk.0.join("ballast");
    fs::write(&ballast, vec![7; 48 << 20]).unwrap();
    let pid = h1.pid().unwrap().to_string();
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let limit = |count: usize| {
        let status =
            Command::new("prlimit").args(["--pid", &pid, &format!("--nofile={count}:4096")]).status();
        assert!(status.unwrap().success());
    };
    limit(open + open / 8);
    // Connections that no one answers, as many as the kernel tracks, almost.
    h1.exec_ok(["sysctl", "-qw", "net.netfilter.nf_conntrack_udp_timeout=300"]).unwrap();
    let most: u32 =
        h1.exec_ok(["sysctl", "-n", "net.netfilter.nf_conntrack_max"]).unwrap().trim().parse().unwrap();
    let sockets: Vec<UdpSocket> =
        (0..=most / 40_000).map(|_| h1.run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap()).collect();
    // At the host itself, so that nothing waits for an answer of a neighbour.
    let own = h1.address().unwrap();
    for n in 0..most / 100 * 85 {
        // A source for each few thousand, because ports are numbers of 16 bits.
        let socket = &sockets[(n / 40_000) as usize];
        socket.send_to(b"x", (own, 10_000 + (n % 40_000) as u16)).unwrap();
    }
    let tracked: u32 =
        h1.exec_ok(["sysctl", "-n", "net.netfilter.nf_conntrack_count"]).unwrap().trim().parse().unwrap();
    assert!(tracked > most / 100 * 80, "{tracked} of {most}");
    wait_problem(h1, &["the kernel tracks", "nf_conntrack_max"], CHECKED).unwrap();
    wait_problem(h1, &["open files", "LimitNOFILE"], CHECKED).unwrap();
    wait_problem(h1, &["the file system of", "MiB left"], CHECKED).unwrap();

    fs::remove_file(&ballast).unwrap();
    limit(4096);
    // The connections last for a while.
    wait_until(CHECKED, "the other problems to be gone", || {
        let left = problems(h1)?;
        ensure!(left.len() == 1 && left[0].contains("the kernel tracks"), "{left:?}");
        Ok(())
    })
    .unwrap();
}
