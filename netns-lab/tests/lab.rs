//! The lab itself, with real namespaces. Needs root, but no ovld.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use netns_lab::{Lab, LabConfig, Netns, PortMtu, Signal, Underlay, lab_names, wait_until};

const SECOND: Duration = Duration::from_secs(1);

/// Returns whether a packet of that size, including headers, passes from one host to another unfragmented.
fn fits(from: &Netns, address: &str, size: usize) -> bool {
    let payload = (size - 28).to_string();
    from.exec(["ping", "-c1", "-W0.3", "-Mdo", "-s", &payload, address]).unwrap().success()
}

fn lab_of(hosts: usize) -> Lab {
    Lab::new(LabConfig::hosts(hosts)).unwrap()
}

#[test]
fn hosts_reach_each_other_immediately() {
    let start = Instant::now();
    let lab = Lab::new(LabConfig::hosts(3).underlay(Underlay::Dual)).unwrap();
    println!("up in {:?}", start.elapsed());
    for (from, to) in [("h1", 2), ("h2", 3), ("h3", 1)] {
        assert!(lab[from].ping(format!("192.168.77.{to}"), SECOND));
        assert!(lab[from].ping(format!("fd77::{to}"), SECOND));
    }
    println!("reached after {:?}", start.elapsed());
    assert_eq!(lab["h3"].address().unwrap().to_string(), "192.168.77.3");
    assert!(lab["h1"].exec(["ip", "addr"]).unwrap().stdout.contains("192.168.77.1/24"));
}

#[test]
fn underlay_has_the_configured_address_family() {
    let lab = Lab::new(LabConfig::hosts(2).underlay(Underlay::V6)).unwrap();
    assert!(lab["h1"].ping("fd77::2", SECOND));
    assert_eq!(lab["h2"].address().unwrap().to_string(), "fd77::2");
    assert!(!lab["h1"].exec_ok(["ip", "-4", "addr", "show", "eth0"]).unwrap().contains("inet"));
}

#[test]
fn dropped_lab_removes_everything() {
    let lab = lab_of(2);
    let name = lab.name().to_owned();
    let workload = lab["h1"].workload("w").unwrap();
    let path = workload.path().to_owned();
    let mut sleeper = workload.spawn(["sleep", "600"]).unwrap();
    assert!(path.exists() && lab.dir().exists());
    drop(lab);
    assert!(!path.exists());
    assert!(!sleeper.is_running());
    assert!(!lab_names().unwrap().contains(&name));
    let left = fs::read_dir("/run/netns").unwrap().flatten();
    let left: Vec<_> =
        left.filter(|entry| entry.file_name().to_string_lossy().starts_with(&format!("{name}-"))).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn parallel_labs_do_not_interfere() {
    let names: Vec<String> = std::thread::scope(|scope| {
        let labs: Vec<_> = (0..3).map(|_| scope.spawn(|| lab_of(2))).collect();
        let labs: Vec<Lab> = labs.into_iter().map(|lab| lab.join().unwrap()).collect();
        labs[0]["h2"].link_down().unwrap();
        assert!(!labs[0]["h1"].ping("192.168.77.2", SECOND / 5));
        assert!(labs[1]["h1"].ping("192.168.77.2", SECOND));
        assert!(labs[2]["h1"].ping("192.168.77.2", SECOND));
        labs.iter().map(|lab| lab.name().to_owned()).collect()
    });
    assert!(names[0] != names[1] && names[1] != names[2] && names[0] != names[2]);
}

#[test]
fn lab_name_is_unique() {
    let lab = lab_of(1);
    let error = Lab::new(LabConfig::hosts(1).name(lab.name())).unwrap_err().to_string();
    assert!(error.contains("exists already"), "{error}");
    assert!(netns_lab::remove(lab.name()).unwrap_err().to_string().contains("running process"));
    assert!(lab["h1"].exists());
}

#[test]
fn partition_drops_traffic_until_healed() {
    let lab = Lab::new(LabConfig::hosts(4).underlay(Underlay::Dual)).unwrap();
    let reaches = |from: &str, to: usize| {
        let v4 = lab[from].ping(format!("192.168.77.{to}"), SECOND / 5);
        let v6 = lab[from].ping(format!("fd77::{to}"), SECOND / 5);
        assert_eq!(v4, v6, "{from} to h{to}");
        v4
    };
    assert!(reaches("h1", 3));
    lab.partition(&[&["h1", "h2"], &["h3"]]).unwrap();
    assert!(reaches("h1", 2) && !reaches("h1", 3) && !reaches("h3", 2));
    assert!(reaches("h4", 1) && reaches("h3", 4), "h4 is in no group");
    lab.loss_udp_port(50.0, 4789).unwrap();
    assert!(!reaches("h1", 3), "a second fault does not change the first");
    lab.heal().unwrap();
    assert!(lab["h1"].ping_until("192.168.77.3", SECOND * 3).is_ok());
    assert_eq!(lab.faults().to_string(), "loss 50 % to UDP port 4789");
    lab.clear_faults().unwrap();
    assert!(!lab.switch().exec_ok(["nft", "list", "ruleset"]).unwrap().contains("drop"));
    assert!(lab.partition(&[&["h1"], &["h9"]]).is_err() && lab.partition(&[&["h1"], &["h1"]]).is_err());
}

#[test]
fn loss_drops_the_configured_share() {
    let lab = lab_of(2);
    let received = |port: u16| {
        let _server = lab["h2"].udp_echo(port).unwrap();
        let sent = 1000;
        let received = lab["h1"].run(|| {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.connect(("192.168.77.2", port)).unwrap();
            socket.set_read_timeout(Some(SECOND / 10)).unwrap();
            // In small batches: the socket's buffer does not hold a thousand.
            (0..sent / 50)
                .map(|_| {
                    (0..50).for_each(|_| assert_eq!(socket.send(b"x").unwrap(), 1));
                    (0..50).take_while(|_| socket.recv(&mut [0; 8]).is_ok()).count()
                })
                .sum::<usize>()
        });
        received.unwrap()
    };
    assert_eq!(received(4000), 1000);
    lab.loss_udp_port(20.0, 4000).unwrap();
    assert_eq!(received(4001), 1000, "another port");
    let share = received(4000);
    assert!((700..900).contains(&share), "{share} of 1000 with 20 % loss one way");
    lab.loss_udp_port(0.0, 4000).unwrap();
    lab.loss(100.0).unwrap();
    assert!(!lab["h1"].ping("192.168.77.2", SECOND / 5));
    lab.loss(0.0).unwrap();
    assert!(lab["h1"].ping_until("192.168.77.2", SECOND * 3).is_ok());
}

#[test]
fn links_go_down_and_up() {
    let lab = lab_of(2);
    assert!(lab["h1"].ping("192.168.77.2", SECOND));
    lab["h2"].link_down().unwrap();
    assert!(!lab["h1"].ping("192.168.77.2", SECOND / 5));
    let eth0 = lab["h2"].ip_json(&["addr", "show", "dev", "eth0"]).unwrap();
    assert!(eth0[0]["flags"].to_string().contains("NO-CARRIER"), "{eth0}");
    assert_eq!(eth0[0]["addr_info"][0]["local"], "192.168.77.2");
    lab["h2"].link_up().unwrap();
    lab["h1"].ping_until("192.168.77.2", SECOND * 3).unwrap();
}

#[test]
fn mtu_applies_to_both_sides_of_a_link() {
    let lab = Lab::new(LabConfig::hosts(3).mtu(9000)).unwrap();
    assert!(fits(&lab["h1"], "192.168.77.2", 9000));
    lab["h2"].set_port_mtu(1400).unwrap();
    assert!(fits(&lab["h1"], "192.168.77.2", 1400) && !fits(&lab["h1"], "192.168.77.2", 1500));
    assert!(!fits(&lab["h2"], "192.168.77.1", 1500) && fits(&lab["h1"], "192.168.77.3", 9000));
    // Large segments do not pass the smaller MTU unsegmented.
    let _server = lab["h2"].tcp_echo(80).unwrap();
    let payload = vec![7; 100_000];
    assert!(lab["h1"].tcp_roundtrip("192.168.77.2", 80, &payload).is_err());
    lab["h2"].set_mtu(1400, PortMtu::Follow).unwrap();
    assert_eq!(lab["h1"].tcp_roundtrip("192.168.77.2", 80, &payload).unwrap(), payload);
    lab["h2"].set_mtu(9000, PortMtu::Follow).unwrap();
    assert!(fits(&lab["h2"], "192.168.77.1", 9000));
    lab["h1"].set_mtu(2000, PortMtu::Keep).unwrap();
    assert_eq!(lab["h1"].mtus(), (2000, 9000));
}

#[test]
fn addresses_can_be_replaced() {
    let lab = Lab::new(LabConfig::hosts(2).underlay(Underlay::Dual)).unwrap();
    lab["h2"].set_address("192.168.77.99".parse().unwrap()).unwrap();
    lab["h2"].set_address("fd77::99".parse().unwrap()).unwrap();
    assert!(lab["h1"].ping("192.168.77.99", SECOND) && lab["h1"].ping("fd77::99", SECOND));
    assert!(!lab["h1"].ping("192.168.77.2", SECOND / 5));
    assert_eq!(lab["h2"].address().unwrap().to_string(), "192.168.77.99");
}

#[test]
fn host_can_be_destroyed_and_restored() {
    let lab = lab_of(2);
    let workload = lab["h2"].workload("w").unwrap();
    let mut sleeper = lab["h2"].spawn(["sleep", "600"]).unwrap();
    fs::write(lab["h2"].run_dir().join("x"), "").unwrap();
    fs::write(lab["h2"].state_dir().join("x"), "").unwrap();
    lab["h2"].destroy().unwrap();
    assert!(!sleeper.is_running() && !workload.exists() && !lab["h2"].exists());
    assert!(!lab["h1"].ping("192.168.77.2", SECOND / 5));
    assert!(!lab["h2"].run_dir().join("x").exists() && lab["h2"].state_dir().join("x").exists());
    assert!(lab["h2"].destroy().is_err() && lab["h2"].start().is_err());
    lab["h2"].restore().unwrap();
    lab["h1"].ping_until("192.168.77.2", SECOND * 5).unwrap();
    lab["h2"].workload("w").unwrap();
}

#[test]
fn echo_helpers_support_both_protocols_and_families() {
    let lab = Lab::new(LabConfig::hosts(2).underlay(Underlay::Dual)).unwrap();
    let (client, server) = (&lab["h1"], &lab["h2"]);
    let tcp = server.tcp_echo(0).unwrap();
    let udp = server.udp_echo(0).unwrap();
    let large: Vec<u8> = (0..3_000_000_u32).map(|number| number.to_le_bytes()[0]).collect();
    for address in ["192.168.77.2/24", "fd77::2"] {
        assert_eq!(client.tcp_roundtrip(address, tcp.port(), &large).unwrap(), large);
        assert_eq!(client.udp_roundtrip(address, udp.port(), b"hello").unwrap(), b"hello");
    }
    let port = tcp.port();
    // A silent client does not keep the server alive.
    let idle = client.run(|| std::net::TcpStream::connect(("192.168.77.2", port)).unwrap()).unwrap();
    drop((tcp, udp));
    let error = format!("{:#}", client.tcp_roundtrip("192.168.77.2", port, b"x").unwrap_err());
    assert!(error.contains("refused"), "{error}");
    drop(idle);
}

#[test]
fn workloads_are_separate_namespaces() {
    let lab = lab_of(1);
    let workload = lab["h1"].workload("web-1").unwrap();
    assert_eq!(workload.path(), Path::new("/run/netns").join(format!("{}-h1-web-1", lab.name())));
    assert!(workload.ping("127.0.0.1", SECOND) && workload.ping("::1", SECOND));
    assert_eq!(workload.ip_json(&["link", "show"]).unwrap().as_array().unwrap().len(), 1);
    assert!(workload.bridge_json(&["fdb", "show"]).unwrap().is_array());
    assert!(lab["h1"].workload("web-1").is_err() && lab["h1"].workload("../x").is_err());
    // The same port is free in both namespaces.
    let first = workload.run(|| TcpListener::bind("127.0.0.1:7").unwrap()).unwrap();
    let second = lab["h1"].run(|| TcpListener::bind("127.0.0.1:7").unwrap()).unwrap();
    drop((first, second));
    workload.destroy().unwrap();
    assert!(lab["h1"].workloads().is_empty());
    lab["h1"].workload("web-1").unwrap();
}

#[test]
fn commands_return_output_and_errors() {
    let lab = lab_of(1);
    let output = lab["h1"].exec(["sh", "-c", "echo out; echo err >&2; exit 3"]).unwrap();
    assert_eq!((output.stdout.as_str(), output.stderr.as_str(), output.code()), ("out\n", "err\n", Some(3)));
    let error = format!("{:#}", lab["h1"].exec_ok(["sh", "-c", "echo no luck >&2; false"]).unwrap_err());
    assert!(error.contains("no luck"), "{error}");
    let error = lab["h1"].exec_for(SECOND / 10, ["sleep", "60"]).unwrap_err();
    assert!(format!("{error:#}").contains("sleep 60"), "{error:#}");
    assert!(lab["h1"].exec(["no-such-program"]).is_err());
    let mut ping = lab["h1"].spawn(["ping", "-i0.05", "127.0.0.1"]).unwrap();
    wait_until(SECOND, "two answers", || ping.stdout().matches("ttl=").count() >= 2).unwrap();
    ping.signal(Signal::SIGINT).unwrap();
    assert!(ping.finish(SECOND).unwrap().stdout.contains("0% packet loss"));
}

#[test]
fn lab_of_a_dead_process_is_swept() {
    // A process creates a lab and is killed: this test binary, running the ignored test.
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "leaves_a_lab_behind", "--nocapture"])
        .env("NETNS_LAB_LEAVE", "1")
        .spawn()
        .unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    let owned = || {
        let names = lab_names().unwrap();
        names.into_iter().find(|name| {
            Lab::open(name)
                .is_ok_and(|lab| lab.owner_pid() == Some(pid) && lab["h1"].find_workload("left").is_ok())
        })
    };
    let name = wait_until(SECOND * 10, "the other process's lab", owned).unwrap();
    let sleepers =
        || Command::new("ip").args(["netns", "pids", &format!("{name}-h1-left")]).output().unwrap().stdout;
    wait_until(SECOND * 5, "its process", || !sleepers().is_empty()).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    let _another = lab_of(1);
    assert!(!lab_names().unwrap().contains(&name));
    for part in ["sw", "h1-left", "n2", "c1"] {
        assert!(!Path::new("/run/netns").join(format!("{name}-{part}")).exists(), "{part}");
    }
}

/// Not a test: the process that the test above kills.
#[test]
#[ignore = "run by the test of the sweep"]
fn leaves_a_lab_behind() {
    if std::env::var_os("NETNS_LAB_LEAVE").is_none() {
        return;
    }
    let lab = Lab::new(LabConfig::hosts(2).access("h2", "cgn".parse().unwrap())).unwrap();
    let workload = lab["h1"].workload("left").unwrap();
    let _sleeper = workload.spawn(["sleep", "60"]).unwrap();
    wait_until(SECOND * 60, "to be killed", || false).unwrap();
}
