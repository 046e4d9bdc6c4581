//! Random packets through the fast path and through the stack: the same ones must arrive.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::thread;

use anyhow::{Context as _, Result, bail, ensure};
use netns_lab::{Host, LabConfig, Netns, wait_until};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};
use ovl_tests::frames::FrameSocket;
use ovl_tests::inject::mac_bytes;
use ovl_tests::random::Random;
use ovl_tests::routed::create_routed_network;
use ovl_tests::{Attached, SOON, attach, create_network, ping_all_pairs, start_lab_with};

/// The number of packets, unless `OVL_FAST_PACKETS` says otherwise.
const PACKETS: usize = 20_000;
/// Packets between two that are waited for.
const BATCH: usize = 64;
/// In the payload of packets of these tests.
const MAGIC: &[u8; 6] = b"agree:";
/// In the payload of a packet that is waited for.
const SYNC: &[u8; 6] = b"synch:";

/// The packets that arrive at an interface of a namespace.
struct Arrivals {
    seen: Arc<Mutex<BTreeSet<Vec<u8>>>>,
    syncs: Receiver<u32>,
}

impl Arrivals {
    fn listen(at: &Netns, own: Vec<IpAddr>) -> Result<Self> {
        let fd: OwnedFd = at.run(|| {
            socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
        })??;
        setsockopt(&fd, sockopt::RcvBufForce, &(32 << 20))?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::milliseconds(200))?;
        let seen = Arc::new(Mutex::new(BTreeSet::new()));
        let (tell, syncs) = channel();
        let all = Arc::downgrade(&seen);
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let Some(all) = all.upgrade() else { return };
                let Ok(length) = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::empty()) else { continue };
                let Some(packet) = buffer.get(14..length) else { continue };
                let at = |word: &[u8]| packet.windows(word.len()).position(|part| part == word);
                if let Some(place) = at(SYNC) {
                    let number = packet.get(place + SYNC.len()..).and_then(|rest| rest.first_chunk());
                    let _ = number.map(|number| tell.send(u32::from_be_bytes(*number)));
                } else if at(MAGIC).is_some() && source_of(packet).is_none_or(|from| !own.contains(&from)) {
                    // What was sent, not what the receiver answers with it (echo replies, errors).
                    all.lock().unwrap().insert(buffer[..length].to_vec());
                }
            }
        });
        Ok(Self { seen, syncs })
    }

    fn wait_sync(&self, number: u32) -> Result<()> {
        loop {
            match self.syncs.recv_timeout(SOON) {
                Ok(seen) if seen >= number => return Ok(()),
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => bail!("the packet {number} did not arrive"),
                Err(RecvTimeoutError::Disconnected) => bail!("the listener has ended"),
            }
        }
    }

    fn take(&self) -> BTreeSet<Vec<u8>> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

/// The source address of a packet.
fn source_of(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => Some(IpAddr::from(*packet.get(12..)?.first_chunk::<4>()?)),
        _ => Some(IpAddr::from(*packet.get(8..)?.first_chunk::<16>()?)),
    }
}

fn sum(bytes: &[u8], seed: u32) -> u16 {
    let words =
        bytes.chunks(2).map(|two| u32::from(two[0]) << 8 | two.get(1).map_or(0, |low| u32::from(*low)));
    let mut sum = words.fold(seed, |sum, word| sum + word);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// What packets are made of.
struct Maker {
    random: Random,
    mac: [u8; 6],
    /// The MAC address that each destination is reached by.
    next_hops: BTreeMap<IpAddr, [u8; 6]>,
    own: Vec<IpAddr>,
    others: Vec<IpAddr>,
}

impl Maker {
    /// Returns a header from one of a few ports from `first` on, and the payload.
    fn transport(&mut self, number: u8, [from, to]: [IpAddr; 2], first: u16, payload: &[u8]) -> Vec<u8> {
        let r = &mut self.random;
        let mut bytes = Vec::new();
        match number {
            6 => {
                let flags = *r.pick(&[0x02, 0x10, 0x10, 0x18, 0x12, 0x04, 0x11, 0x00, 0xff]);
                let offset = *r.pick(&[0x50, 0x50, 0x50, 0x50, 0xf0, 0x00]);
                bytes.extend((first + r.below(4) as u16).to_be_bytes());
                bytes.extend((80 + r.below(2) as u16).to_be_bytes());
                bytes.extend([0, 0, 0, 1, 0, 0, 0, 1, offset, flags, 0xff, 0xff, 0, 0, 0, 0]);
            }
            17 => {
                bytes.extend((first + r.below(4) as u16).to_be_bytes());
                bytes.extend((53 + r.below(3) as u16).to_be_bytes());
                bytes.extend((8 + payload.len() as u16).to_be_bytes());
                bytes.extend([0, 0]);
            }
            1 => bytes.extend([8, 0, 0, 0, 0, 1, 0, 1]),
            58 => bytes.extend([128, 0, 0, 0, 0, 1, 0, 1]),
            _ => {}
        }
        bytes.extend(payload);
        let mut pseudo = match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => [from.octets(), to.octets()].concat(),
            (IpAddr::V6(from), IpAddr::V6(to)) => [from.octets(), to.octets()].concat(),
            _ => unreachable!(),
        };
        pseudo.extend((bytes.len() as u32).to_be_bytes());
        pseudo.extend([0, 0, 0, number]);
        let seed = u32::from(!sum(&pseudo, 0));
        if self.random.below(12) > 0 {
            let place = match number {
                6 => Some((16, seed)),
                17 => Some((6, seed)),
                1 => Some((2, 0)),
                58 => Some((2, seed)),
                _ => None,
            };
            if let Some((place, seed)) = place {
                let sum = sum(&bytes, seed);
                bytes[place..place + 2].copy_from_slice(&sum.to_be_bytes());
            }
        }
        bytes
    }

    fn frame(&mut self, number: u32) -> Vec<u8> {
        let to = *self.random.pick(&self.others);
        let own = *self.own.iter().find(|own| own.is_ipv4() == to.is_ipv4()).unwrap();
        let forged: IpAddr =
            if to.is_ipv4() { "10.60.99.1".parse().unwrap() } else { "fd60::99:1".parse().unwrap() };
        let from = if self.random.below(16) == 0 { forged } else { own };
        let mut payload = [MAGIC.as_slice(), &number.to_be_bytes()].concat();
        payload.resize(payload.len() + *self.random.pick(&[0, 0, 1, 100, 1300]), b'.');
        let icmp = if to.is_ipv4() { 1 } else { 58 };
        let transport = *self.random.pick(&[6, 6, 6, 17, 17, 17, icmp, 253]);
        // Frames for other MAC addresses have ports of their own: a flow of which the stack forwards a packet that the programs
        // have not prepared counts as translated.
        let is_astray = self.random.below(24) == 0;
        let body = self.transport(transport, [from, to], if is_astray { 2000 } else { 1000 }, &payload);
        let ttl = *self.random.pick(&[64, 64, 64, 64, 255, 2, 1, 0]);
        let tos = *self.random.pick(&[0, 0, 0, 1, 2, 3, 0xb8]);
        let (kind, packet) = match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => (0x0800, self.ipv4(from, to, transport, ttl, tos, &body)),
            (IpAddr::V6(from), IpAddr::V6(to)) => (0x86dd, self.ipv6(from, to, transport, ttl, tos, &body)),
            _ => unreachable!(),
        };
        let r = &mut self.random;
        let other = [2, 0, 0, 0, 0, 9];
        let target = if is_astray {
            let any = self.next_hops.values().nth(r.below(self.next_hops.len())).copied();
            *r.pick(&[[0xff; 6], other, any.unwrap_or(other)])
        } else {
            self.next_hops.get(&to).copied().unwrap_or(other)
        };
        let source = if r.below(24) == 0 { other } else { self.mac };
        let mut frame = [target.as_slice(), &source].concat();
        if r.below(32) == 0 {
            frame.extend([0x81, 0, 0, 5]);
        }
        frame.extend(u16::to_be_bytes(kind));
        frame.extend(packet);
        frame
    }

    fn ipv4(&mut self, from: Ipv4Addr, to: Ipv4Addr, next: u8, ttl: u8, tos: u8, body: &[u8]) -> Vec<u8> {
        let r = &mut self.random;
        let options = if r.below(16) == 0 { 4 } else { 0 };
        let fragment =
            if r.below(12) == 0 { *r.pick(&[0x2000, 0x0001, 0x2001, 0x8000]) } else { *r.pick(&[0, 0x4000]) };
        let mut length = (20 + options + body.len()) as u16;
        let wrong = r.below(24);
        length = match wrong {
            0 => length + 4,
            1 => length.saturating_sub(4),
            _ => length,
        };
        let mut header = vec![0x45 + (options / 4) as u8, tos];
        header.extend(length.to_be_bytes());
        header.extend((r.below(0xffff) as u16).to_be_bytes());
        header.extend(u16::to_be_bytes(fragment));
        header.extend([ttl, next, 0, 0]);
        header.extend(from.octets());
        header.extend(to.octets());
        header.extend(vec![1; options]);
        let check = sum(&header, 0) ^ u16::from(r.below(24) == 0);
        header[10..12].copy_from_slice(&check.to_be_bytes());
        [&header, body].concat()
    }

    fn ipv6(&mut self, from: Ipv6Addr, to: Ipv6Addr, next: u8, ttl: u8, tos: u8, body: &[u8]) -> Vec<u8> {
        let r = &mut self.random;
        let extension: &[u8] = match r.below(20) {
            // Destination options, and the first fragment of two.
            0 => &[next, 0, 1, 4, 0, 0, 0, 0],
            1 => &[next, 0, 0, 1, 0, 0, 0, 7],
            _ => &[],
        };
        let first = match extension {
            [] => next,
            [_, _, 1, ..] => 60,
            _ => 44,
        };
        let length = (extension.len() + body.len()) as u16;
        let length = match r.below(24) {
            0 => length + 4,
            1 => length.saturating_sub(4),
            _ => length,
        };
        let mut packet = vec![0x60 | tos >> 4, tos << 4, 0, 0];
        packet.extend(length.to_be_bytes());
        packet.extend([first, ttl]);
        packet.extend(from.octets());
        packet.extend(to.octets());
        packet.extend(extension);
        packet.extend(body);
        packet
    }

    /// A packet that certainly arrives.
    fn sync(&mut self, to: IpAddr, number: u32) -> Vec<u8> {
        let (IpAddr::V4(from), IpAddr::V4(to)) = (*self.own.iter().find(|own| own.is_ipv4()).unwrap(), to)
        else {
            unreachable!()
        };
        let next_hop = self.next_hops[&IpAddr::V4(to)];
        let payload = [SYNC.as_slice(), &number.to_be_bytes()].concat();
        let mut body = [9_u16, 9, 8 + payload.len() as u16, 0].map(u16::to_be_bytes).concat();
        body.extend(payload);
        let mut header = vec![0x45, 0];
        header.extend((20 + body.len() as u16).to_be_bytes());
        header.extend([0, 0, 0, 0, 64, 17, 0, 0]);
        header.extend(from.octets());
        header.extend(to.octets());
        let check = sum(&header, 0);
        header[10..12].copy_from_slice(&check.to_be_bytes());
        [next_hop.as_slice(), &self.mac, &[8, 0], &header, &body].concat()
    }
}

fn ips(of: &Attached) -> Vec<IpAddr> {
    of.addresses().iter().map(|address| address.parse().unwrap()).collect()
}

/// Returns the MAC addresses that destinations are reached by: the gateway's on a routed network, their own on a switched one.
fn next_hops(from: &Attached, to: [&Attached; 2], others: &[IpAddr]) -> Result<BTreeMap<IpAddr, [u8; 6]>> {
    let gateway = from.workload.ip_json(&["neigh", "show", "dev", "eth0", "nud", "permanent"])?;
    Ok(match gateway[0]["lladdr"].as_str().map(mac_bytes) {
        Some(gateway) => others.iter().map(|other| (*other, gateway)).collect(),
        None => {
            to.iter().flat_map(|each| ips(each).into_iter().map(|ip| (ip, mac_bytes(&each.mac())))).collect()
        }
    })
}

/// Sends the packets of a seed, and returns those that arrive at each of the others.
fn run(from: &Attached, to: [&Attached; 2], packets: usize) -> Result<[BTreeSet<Vec<u8>>; 2]> {
    let arrivals =
        [Arrivals::listen(&to[0].workload, ips(to[0]))?, Arrivals::listen(&to[1].workload, ips(to[1]))?];
    let socket = FrameSocket::open(&from.workload, "eth0")?;
    let mut others: Vec<IpAddr> =
        to.iter().flat_map(|each| [ips(each), ips(each), ips(each)]).flatten().collect();
    others.extend(
        ["10.60.200.200", "224.0.0.9", "fd60::aaaa:1", "192.0.2.1"]
            .map(|text| text.parse::<IpAddr>().unwrap()),
    );
    let own = ips(from);
    others.retain(|other| own.iter().any(|own| own.is_ipv4() == other.is_ipv4()));
    let mut maker = Maker {
        random: Random::new(7),
        mac: mac_bytes(&from.mac()),
        next_hops: next_hops(from, to, &others)?,
        own,
        others,
    };
    let mut sync = 0;
    let mut wait_all = |maker: &mut Maker| -> Result<()> {
        sync += 1;
        for (target, arrivals) in to.iter().zip(&arrivals) {
            let v4 = ips(target).into_iter().find(IpAddr::is_ipv4).context("no IPv4 address")?;
            socket.send(&maker.sync(v4, sync))?;
            arrivals.wait_sync(sync)?;
        }
        Ok(())
    };
    for number in 0..packets {
        let frame = maker.frame(number as u32);
        socket.send(&frame)?;
        if number % BATCH == 0 {
            wait_all(&mut maker)?;
        }
    }
    wait_all(&mut maker)?;
    wait_all(&mut maker)?;
    Ok([arrivals[0].take(), arrivals[1].take()])
}

fn is_used(host: &Host) -> Result<bool> {
    Ok(host.ctl_json(&["status"])?["fast_path"]["in_use"] == true)
}

fn fast_packets(host: &Host) -> u64 {
    let status = host.ctl_json(&["status"]).unwrap();
    let counters = status["fast_path"]["fast"].as_object().cloned().unwrap_or_default();
    counters.values().filter_map(serde_json::Value::as_u64).sum()
}

fn assert_same_packets_arrive(backend: &str) {
    let packets =
        std::env::var("OVL_FAST_PACKETS").ok().and_then(|text| text.parse().ok()).unwrap_or(PACKETS);
    let lab = start_lab_with(LabConfig::hosts(2).config("fast_path = \"on\"")).unwrap();
    match backend {
        "switched" => create_network(&lab, "pods", &["--subnet", "10.60.0.0/16", "--subnet", "fd60::/64"]),
        "vxlan" => create_routed_network(
            &lab,
            "pods",
            &["--backend", backend, "--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"],
        ),
        _ => create_routed_network(&lab, "pods", &["--backend", backend, "--subnet", "10.60.0.0/16"]),
    }
    .unwrap();
    let [a, b, c] = [("h1", "a"), ("h1", "b"), ("h2", "c")]
        .map(|(host, name)| attach(&lab[host], name, "pods", &[]).unwrap());
    ping_all_pairs(&[a.clone(), b.clone(), c.clone()], SOON).unwrap();
    wait_until(SOON, "the fast path", || -> Result<()> {
        for host in lab.hosts() {
            ensure!(is_used(host)?, "{}", host.name());
        }
        Ok(())
    })
    .unwrap();
    // A flow that passes only one of two programs counts as translated, so all must be attached: two at each endpoint and at the
    // underlay. Filters, in place of links, are attached in no time.
    let by_links = lab.hosts()[0].ctl_json(&["status"]).unwrap()["fast_path"]["attached_by"] == "tcx";
    wait_until(SOON, "all programs", || -> Result<()> {
        for (host, least) in lab.hosts().iter().zip([6, 4]).filter(|_| by_links) {
            let links = std::fs::read_dir(host.fast_path_pins().unwrap().join("links"))?.count();
            ensure!(links >= least, "{}: {links}", host.name());
        }
        Ok(())
    })
    .unwrap();
    let from_v6 = |packets: &BTreeSet<Vec<u8>>| packets.iter().filter(|frame| frame[14] >> 4 == 6).count();
    let before = lab.hosts().iter().map(fast_packets).sum::<u64>();
    let fast = run(&a, [&b, &c], packets).unwrap();
    let taken = lab.hosts().iter().map(fast_packets).sum::<u64>() - before;
    // Rules that change nothing, but that packets on the fast path would not pass.
    for host in lab.hosts() {
        let rules = "add table inet mine; add chain inet mine passing { type filter hook forward priority 0; }; \
                     add rule inet mine passing counter";
        host.exec_ok(["nft", rules]).unwrap();
    }
    wait_until(SOON, "the fast path to end", || -> Result<()> {
        for host in lab.hosts() {
            ensure!(!is_used(host)?, "{}", host.name());
        }
        Ok(())
    })
    .unwrap();
    let slow = run(&a, [&b, &c], packets).unwrap();
    for (name, fast, slow) in [("b", &fast[0], &slow[0]), ("c", &fast[1], &slow[1])] {
        println!(
            "{backend}: {} of {packets} packets arrive at {name}, {} of IPv6",
            slow.len(),
            from_v6(slow)
        );
        let only_fast: Vec<_> = fast.difference(slow).take(3).collect();
        let only_slow: Vec<_> = slow.difference(fast).take(3).collect();
        assert!(
            only_fast.is_empty() && only_slow.is_empty(),
            "{name}: fast {only_fast:x?}, slow {only_slow:x?}"
        );
        assert!(slow.len() > packets / 16, "{}", slow.len());
    }
    println!("{backend}: {taken} took the fast path");
    // On a switched network some of the odd frames make most flows count as translated, so few packets take it.
    let least = if backend == "switched" { 32 } else { packets as u64 / 8 };
    assert!(taken > least, "{taken}");
}

#[test]
fn same_packets_arrive_by_direct_routes() {
    assert_same_packets_arrive("direct");
}

#[test]
fn same_packets_arrive_in_vxlan() {
    assert_same_packets_arrive("vxlan");
}

#[test]
fn same_packets_arrive_on_a_switched_network() {
    assert_same_packets_arrive("switched");
}
