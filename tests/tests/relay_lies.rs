//! A relay that lies: it sends again what it passed on, changes it, makes up frames of its own, and floods.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::collections::BTreeMap;
use std::net::{SocketAddr, UdpSocket};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Signal, wait_until};
use ovl_tests::inject::{PORT, listener, receive};
use ovl_tests::routed::create_routed_network;
use ovl_tests::{Attached, Connection, SOON, attach, peer, start_lab_with, wait_clean};

/// The UDP port of relayed datagrams.
const RELAY_PORT: u16 = 7942;
/// The length of the header of a frame, and how much of its payload its tag covers.
const HEADER: usize = 36;
const COVERED: usize = 32;
/// The headers before the payload of a UDP datagram over IPv4 in a captured frame.
const BEFORE: usize = 14 + 20 + 8;
/// The number of forged frames of the flood.
const FLOOD: usize = 100_000;

/// Three hosts, of which the first two reach each other through the third one alone, and a workload on each of the two.
fn cut_lab() -> (Lab, Attached, Attached) {
    let lab = start_lab_with(LabConfig::hosts(3)).unwrap();
    let options = ["--encrypted", "--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"];
    create_routed_network(&lab, "pods", &options).unwrap();
    let [one, two] = ["h1", "h2"].map(|name| attach(&lab[name], &format!("p{name}"), "pods", &[]).unwrap());
    lab.cut(&[("h1", "h2")], false).unwrap();
    wait_until(SOON, "h3 to be the relay", || -> Result<()> {
        for (from, to) in [("h1", "h2"), ("h2", "h1")] {
            let row = peer(&lab[from], to)?;
            ensure!(row["via"][0] == "h3", "{row}");
        }
        Ok(())
    })
    .unwrap();
    one.workload.ping_until(two.address(), SOON).unwrap();
    (lab, one, two)
}

/// Sends numbered datagrams between two workloads, and returns how often each number has arrived.
fn send_numbers(from: &Attached, to: &Attached, socket: &UdpSocket, count: usize) -> BTreeMap<String, usize> {
    let address = SocketAddr::new(to.address().parse().unwrap(), PORT);
    let sender = from.workload.run(|| UdpSocket::bind(("0.0.0.0", 0))).unwrap().unwrap();
    for number in 0..count {
        sender.send_to(format!("number {number}").as_bytes(), address).unwrap();
    }
    let mut seen = BTreeMap::new();
    while seen.len() < count {
        let Some(text) = receive(socket) else { break };
        *seen.entry(text).or_default() += 1;
    }
    seen
}

/// Runs `work` while the relay keeps what it sends to another host, and returns the frames.
fn frames_to(relay: &Host, other: &Host, work: impl FnOnce()) -> Vec<Vec<u8>> {
    let file = relay.dir().join("frames.pcap");
    let filter = format!("udp dst port {RELAY_PORT} and dst host {}", other.address().unwrap());
    let path = file.to_str().unwrap();
    let mut tcpdump = relay
        .spawn(["tcpdump", "-i", "eth0", "-Z", "root", "--immediate-mode", "-U", "-w", path, &filter])
        .unwrap();
    wait_until(SOON, "tcpdump to listen", || {
        ensure!(tcpdump.stderr().contains("listening"), "{}", tcpdump.stderr());
        Ok(())
    })
    .unwrap();
    work();
    tcpdump.signal(Signal::SIGINT).unwrap();
    tcpdump.finish(SOON).unwrap();
    let frames = payloads(&std::fs::read(&file).unwrap());
    assert!(frames.len() >= 10 && frames.iter().all(|frame| frame.len() > HEADER), "{} frames", frames.len());
    frames
}

/// The payloads of the UDP datagrams in a file of tcpdump.
fn payloads(file: &[u8]) -> Vec<Vec<u8>> {
    let mut rest = file.get(24..).unwrap_or_default();
    let mut all = Vec::new();
    while let Some(header) = rest.get(..16) {
        let length = u32::from_le_bytes(header[8..12].try_into().unwrap()) as usize;
        let Some(packet) = rest.get(16..16 + length) else { break };
        all.extend(packet.get(BEFORE..).map(<[u8]>::to_vec));
        rest = &rest[16 + length..];
    }
    all
}

/// A frame with one bit changed.
fn flipped(frame: &[u8], at: usize) -> Vec<u8> {
    let mut frame = frame.to_vec();
    if let Some(byte) = frame.get_mut(at) {
        *byte ^= 1;
    }
    frame
}

#[test]
fn copies_and_forgeries_of_a_relay_change_nothing() {
    let (lab, one, two) = cut_lab();
    let (relay, target) = (&lab["h3"], &lab["h2"]);
    let mut connection = Connection::open(&one, &two, SOON).unwrap();
    let socket = listener(&two, &two.address(), Duration::from_secs(2));
    let frames = frames_to(relay, target, || {
        let seen = send_numbers(&one, &two, &socket, 50);
        assert_eq!(seen.len(), 50, "{seen:?}");
        connection.echo(100_000).unwrap();
    });

    // The engine takes frames from any address: only its tag counts, and what WireGuard says of the payload.
    let liar = relay.run(|| UdpSocket::bind(("0.0.0.0", 0))).unwrap().unwrap();
    let to = SocketAddr::new(target.address().unwrap(), RELAY_PORT);
    let counters = || -> Result<(u64, u64)> {
        let relayed = &target.ctl_json(&["status"])?["relayed"];
        let number = |key: &str| relayed[key].as_u64().with_context(|| relayed.to_string());
        Ok((number("received")?, number("dropped_unauthenticated")?))
    };
    let before = counters().unwrap();
    let mut forged = 0;
    for frame in &frames {
        // Copies, also with another hop limit: the tag does not cover it.
        for limit in [0, 1, 255] {
            let mut copy = frame.clone();
            copy[1] = limit;
            liar.send_to(&copy, to).unwrap();
        }
        // What is sealed changed, which only WireGuard can find.
        liar.send_to(&flipped(frame, frame.len() - 1), to).unwrap();
        // The sender, the receiver, the tag, and the beginning of the payload changed.
        for at in [4, 14, HEADER - 1, HEADER + 4, HEADER + COVERED - 1] {
            if at < frame.len() {
                liar.send_to(&flipped(frame, at), to).unwrap();
                forged += 1;
            }
        }
        // Too short.
        for length in [0, 1, HEADER - 1, HEADER] {
            liar.send_to(&frame[..length], to).unwrap();
        }
    }
    wait_until(SOON, "the forgeries to be counted", || {
        let (_, unauthenticated) = counters()?;
        ensure!(unauthenticated >= before.1 + forged / 2, "{unauthenticated} of {forged}");
        Ok(())
    })
    .unwrap();
    // No datagram of a copy has arrived: the first one of the listener's is the one that is sent now.
    let seen = send_numbers(&one, &two, &socket, 50);
    assert!(seen.len() == 50 && seen.values().all(|times| *times == 1), "{seen:?}");
    connection.echo(100_000).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn flood_of_a_relay_takes_no_memory_and_ends_no_connection() {
    let (lab, one, two) = cut_lab();
    let (relay, target) = (&lab["h3"], &lab["h2"]);
    let mut connection = Connection::open(&one, &two, SOON).unwrap();
    let frames = frames_to(relay, target, || {
        connection.echo(100_000).unwrap();
    });
    let liar = relay.run(|| UdpSocket::bind(("0.0.0.0", 0))).unwrap().unwrap();
    let to = SocketAddr::new(target.address().unwrap(), RELAY_PORT);
    let before = target.rss_kib().unwrap();
    thread::scope(|scope| {
        let flood = scope.spawn(|| {
            for (number, frame) in frames.iter().cycle().take(FLOOD).enumerate() {
                // Copies, changed payloads, and other hosts' ids by turns. A full queue of the device is no error here.
                let frame = match number % 3 {
                    0 => frame.clone(),
                    1 => flipped(frame, frame.len() - 1 - number % 16),
                    _ => flipped(frame, 4 + number % 20),
                };
                let _ = liar.send_to(&frame, to);
            }
        });
        while !flood.is_finished() {
            connection.echo(10_000).unwrap();
        }
        flood.join().unwrap();
    });
    connection.echo(100_000).unwrap();
    let grown = target.rss_kib().unwrap().saturating_sub(before);
    println!("{grown} KiB more after {FLOOD} frames");
    assert!(grown < 8 * 1024, "{grown} KiB more");
    wait_until(SOON, "h3 to be the relay as before", || -> Result<()> {
        let row = peer(&lab["h1"], "h2")?;
        ensure!(row["via"][0] == "h3" && row["state"] == "alive", "{row}");
        Ok(())
    })
    .unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
}
