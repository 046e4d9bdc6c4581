//! Addresses that move from one endpoint to another (VRRP, keepalived), and duplicate address detection, on switched
//! networks with and without encryption.

#![allow(clippy::unwrap_used, reason = "tests, and helpers of tests")]

use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use netns_lab::{Host, Lab, wait_until};
use ovl_tests::frames::{
    ArpReplies, Bytes, EVERYONE, FrameSocket, ICMPV6, arp, ethernet, ipv6, mac, tagged,
    unsolicited_advertisement,
};
use ovl_tests::{
    Attached, Capture, SOON, attach, create_network, ping_all_pairs, rows, start_lab, wait_clean,
};

/// The addresses that move.
const SHARED4: &str = "10.1.0.200";
const SHARED6: &str = "fd01::200";
/// The longest time until another host sees a move.
const MOVE: Duration = Duration::from_secs(1);
/// EtherType for local experiments (IEEE 802).
const EXPERIMENT: u16 = 0x88b5;

fn shared4() -> Ipv4Addr {
    SHARED4.parse().unwrap()
}

fn shared6() -> Ipv6Addr {
    SHARED6.parse().unwrap()
}

/// Two endpoints that share the addresses, on different hosts, and one that only talks to them on each host.
struct Group {
    lab: Lab,
    routers: [Attached; 2],
    clients: Vec<Attached>,
}

fn group(options: &[&str]) -> Group {
    let lab = start_lab(3).unwrap();
    let subnets = ["--subnet", "10.1.0.0/24", "--subnet", "fd01::/64"];
    create_network(&lab, "flat", &[&subnets[..], options].concat()).unwrap();
    let more = ["--allow-address", SHARED4, "--allow-address", SHARED6];
    let router = |host: &str, name: &str| attach(&lab[host], name, "flat", &more).unwrap();
    let routers = [router("h1", "r1"), router("h2", "r2")];
    let clients: Vec<Attached> = lab
        .hosts()
        .iter()
        .map(|host| attach(host, &format!("c-{}", host.name()), "flat", &[]).unwrap())
        .collect();
    ping_all_pairs(&[&routers[..], &clients].concat(), SOON).unwrap();
    Group { lab, routers, clients }
}

fn add(router: &Attached) {
    for address in [format!("{SHARED4}/24"), format!("{SHARED6}/64")] {
        router.workload.exec_ok(["ip", "addr", "add", &address, "dev", "eth0", "nodad"]).unwrap();
    }
}

fn delete(router: &Attached) {
    for address in [format!("{SHARED4}/24"), format!("{SHARED6}/64")] {
        router.workload.exec_ok(["ip", "addr", "del", &address, "dev", "eth0"]).unwrap();
    }
}

/// Announces the addresses as keepalived and the kernel do: gratuitous ARP, and unsolicited advertisements.
fn announce(router: &Attached) {
    let own = mac(&router.mac());
    let socket = FrameSocket::open(&router.workload, "eth0").unwrap();
    socket.send(&arp(own, 1, (own, shared4()), shared4(), "")).unwrap();
    socket.send(&ipv6(own, shared6(), ICMPV6, &unsolicited_advertisement(shared6(), own))).unwrap();
}

/// Waits until a client gets an answer from an address, and returns how long that took.
fn answered_after(client: &Attached, address: &str) -> Duration {
    let start = Instant::now();
    wait_until(SOON, &format!("{} to reach {address}", client.name), || {
        client.workload.exec_ok(["ping", "-c1", "-W0.2", address]).map(drop)
    })
    .unwrap();
    start.elapsed()
}

/// The number of frames of an endpoint that were refused, as its host lists it.
fn refused(host: &Host, endpoint: &Attached) -> u64 {
    let all = rows(host, &["endpoints"]).unwrap();
    let row = all.iter().find(|row| row["name"] == endpoint.name.as_str()).unwrap();
    row["refused"].as_u64().unwrap()
}

fn check_moves(options: &[&str]) {
    let Group { lab, routers, clients } = group(options);
    add(&routers[0]);
    for client in &clients {
        for address in [SHARED4, SHARED6] {
            answered_after(client, address);
        }
    }
    for (from, to) in [(0, 1), (1, 0)] {
        delete(&routers[from]);
        add(&routers[to]);
        announce(&routers[to]);
        std::thread::scope(|scope| {
            for client in &clients {
                for address in [SHARED4, SHARED6] {
                    scope.spawn(move || {
                        let took = answered_after(client, address);
                        println!("{options:?}: {} sees the move of {address} after {took:?}", client.name);
                        assert!(
                            took < MOVE,
                            "{options:?}: {} sees the move of {address} after {took:?}",
                            client.name
                        );
                    });
                }
            }
        });
    }
    // Whoever is not allowed to have the addresses moves nothing.
    let thief = &clients[1];
    announce(thief);
    let host = &lab["h2"];
    wait_until(SOON, "the announcements to be refused", || {
        ensure!(refused(host, thief) == 2, "{}", refused(host, thief));
        Ok(())
    })
    .unwrap();
    for client in [&clients[0], &clients[2]] {
        for address in [SHARED4, SHARED6] {
            assert!(answered_after(client, address) < MOVE);
        }
    }
    wait_clean(lab.hosts(), SOON).unwrap();
}

#[test]
fn moved_address_is_seen_on_all_hosts_within_a_second() {
    check_moves(&[]);
}

#[test]
fn moved_address_is_seen_on_all_hosts_within_a_second_in_an_encrypted_network() {
    check_moves(&["--encrypted"]);
}

/// Returns whether IPv6 duplicate address detection of an address fails on an endpoint that tries to use it.
fn is_duplicate(endpoint: &Attached, address: &str) -> Result<bool> {
    let state = || -> Result<Option<bool>> {
        let links = endpoint.workload.ip_json(&["addr", "show", "dev", "eth0"])?;
        let all = links[0]["addr_info"].as_array().into_iter().flatten();
        let found = all.into_iter().find(|info| info["local"] == address);
        let Some(info) = found else { return Ok(Some(true)) };
        if info["dadfailed"] == true {
            return Ok(Some(true));
        }
        Ok((info["tentative"] != true).then_some(false))
    };
    endpoint.workload.exec_ok(["ip", "addr", "add", &format!("{address}/64"), "dev", "eth0"])?;
    let mut failed = None;
    wait_until(SOON, "duplicate address detection", || {
        failed = state()?;
        ensure!(failed.is_some(), "tentative");
        Ok(())
    })?;
    endpoint.workload.exec_ok(["ip", "addr", "del", &format!("{address}/64"), "dev", "eth0"])?;
    Ok(failed == Some(true))
}

#[test]
fn duplicate_address_detection_finds_addresses_on_other_hosts() {
    for options in [&[][..], &["--encrypted"]] {
        let Group { lab, routers, clients } = group(options);
        // IPv4: an ARP probe (RFC 5227) from any endpoint, for the address of one on another host.
        let (asking, own) = (&clients[0], mac(&clients[0].mac()));
        let target: Ipv4Addr = clients[2].address().parse().unwrap();
        let free: Ipv4Addr = "10.1.0.222".parse().unwrap();
        let socket = FrameSocket::open(&asking.workload, "eth0").unwrap();
        for (address, is_used) in [(free, false), (target, true)] {
            let replies = ArpReplies::listen(&asking.workload, address).unwrap();
            socket.send(&arp(own, 1, (own, Ipv4Addr::UNSPECIFIED), address, "")).unwrap();
            let owner: Option<Bytes> = replies.wait(if is_used { SOON } else { Duration::from_millis(500) });
            assert_eq!(owner, is_used.then(|| mac(&clients[2].mac())), "{options:?}: {address}");
        }
        // IPv6: the kernel of an endpoint that may have the address.
        assert!(!is_duplicate(&routers[1], SHARED6).unwrap(), "{options:?}");
        add(&routers[0]);
        assert!(is_duplicate(&routers[1], SHARED6).unwrap(), "{options:?}");
        delete(&routers[0]);
        assert!(!is_duplicate(&routers[1], SHARED6).unwrap(), "{options:?}");
        wait_clean(lab.hosts(), SOON).unwrap();
    }
}

/// The number of frames from other hosts that a host refused in encrypted networks.
fn spoofed(host: &Host) -> Result<u64> {
    let metrics = host.ctl_ok(&["metrics"])?;
    let line = metrics.lines().find(|line| line.contains("reason=\"spoofed\"")).unwrap_or("0");
    Ok(line.rsplit(' ').next().unwrap_or_default().parse()?)
}

/// As [`spoofed`], once no more are refused: kernels of new endpoints send frames for a while, and the first ones arrive before
/// their addresses are known.
fn spoofed_at_rest(host: &Host) -> Result<u64> {
    let (mut last, mut since) = (spoofed(host)?, Instant::now());
    wait_until(SOON, "refusals to end", || {
        let now = spoofed(host)?;
        if now != last {
            (last, since) = (now, Instant::now());
        }
        ensure!(since.elapsed() > Duration::from_secs(2), "{now} refused");
        Ok(())
    })?;
    Ok(last)
}

/// Hosts answer requests for the gateway for their own endpoints alone, and announce neighbours to them alone.
#[test]
fn hosts_send_no_neighbour_discovery_of_their_own_to_other_hosts() {
    for options in [&[][..], &["--encrypted"]] {
        let Group { lab, clients, .. } = group(options);
        let host = &lab["h1"];
        let before = spoofed_at_rest(host).unwrap();
        let gateway: Ipv4Addr = "10.1.0.1".parse().unwrap();
        let bridge = lab["h3"].ctl_json(&["network", "inspect", "flat"]).unwrap();
        let gateway_mac =
            lab["h3"].ip_json(&["link", "show", "dev", bridge["bridge"].as_str().unwrap()]).unwrap();
        let gateway_mac = mac(gateway_mac[0]["address"].as_str().unwrap());
        let asking = &clients[0];
        let replies = ArpReplies::listen(&asking.workload, gateway).unwrap();
        let own = mac(&asking.mac());
        let socket = FrameSocket::open(&asking.workload, "eth0").unwrap();
        socket.send(&arp(own, 1, (own, asking.address().parse().unwrap()), gateway, "")).unwrap();
        assert_eq!(replies.wait(SOON), Some(gateway_mac));
        assert_eq!(replies.wait(Duration::from_millis(500)), None, "{options:?}: a second host answers");
        // A new endpoint is announced on each host, to its own endpoints. With encryption, announcements of other hosts
        // would be refused and counted, as answers for the gateway would be.
        let late = attach(host, "late", "flat", &[]).unwrap();
        for address in late.addresses() {
            clients[1].workload.ping_until(&address, SOON).unwrap();
            clients[2].workload.ping_until(&address, SOON).unwrap();
        }
        assert_eq!(spoofed_at_rest(host).unwrap(), before, "{options:?}");
    }
}

#[test]
fn vlan_tags_and_other_protocols_cross_with_the_own_mac_address_alone() {
    for options in [&[][..], &["--encrypted"]] {
        let Group { lab, clients, .. } = group(options);
        let (from, to) = (&clients[0], &clients[2]);
        let (own, theirs) = (mac(&from.mac()), mac(&to.mac()));
        let good = ["another protocol", "another protocol behind a tag", "own datagram behind a tag"];
        let bad = ["another's MAC address", "another's datagram behind a tag", "two tags"];
        let udp = |source: Ipv4Addr, text: &str| {
            ovl_tests::frames::datagram(own, source.into(), (4000, 4001), text)
        };
        let (address, other): (Ipv4Addr, Ipv4Addr) =
            (from.address().parse().unwrap(), to.address().parse().unwrap());
        let frames = [
            ethernet(EVERYONE, own, EXPERIMENT, good[0].as_bytes()),
            tagged(&ethernet(EVERYONE, own, EXPERIMENT, good[1].as_bytes()), 1),
            tagged(&udp(address, good[2]), 1),
            ethernet(EVERYONE, theirs, EXPERIMENT, bad[0].as_bytes()),
            tagged(&udp(other, bad[1]), 1),
            tagged(&udp(address, bad[2]), 2),
            udp(address, "the last one"),
        ];
        let texts = [&good[..], &bad, &["the last one"]].concat();
        let before = refused(&lab["h1"], from);
        let capture = Capture::start(&to.workload, &texts).unwrap();
        let socket = FrameSocket::open(&from.workload, "eth0").unwrap();
        frames.iter().for_each(|frame| socket.send(frame).unwrap());
        wait_until(SOON, "the last frame", || {
            ensure!(capture.count("the last one") > 0);
            Ok(())
        })
        .unwrap();
        let seen = capture.finish().unwrap();
        let arrived: Vec<&str> = texts.iter().copied().filter(|text| seen.count(text) > 0).collect();
        assert_eq!(arrived, [&good[..], &["the last one"]].concat(), "{options:?}");
        assert_eq!(refused(&lab["h1"], from) - before, 3, "{options:?}");
        wait_clean(lab.hosts(), SOON).unwrap();
    }
}

/// Asks a process to end, so that it can clean up.
fn terminate(process: &Child) {
    Command::new("kill").arg(process.id().to_string()).status().unwrap();
}

#[test]
fn keepalived_fails_over_to_another_host() {
    for options in [&[][..], &["--encrypted"]] {
        let Group { lab: _lab, routers, clients } = group(options);
        let mut running: Vec<_> = routers
            .iter()
            .zip([150, 100])
            .map(|(router, priority)| {
                let dir = router.workload.host().dir();
                let file = dir.join(format!("keepalived-{}.conf", router.name));
                std::fs::write(
                    &file,
                    format!(
                        "global_defs {{\n router_id {name}\n vrrp_garp_master_repeat 1\n}}\nvrrp_instance v {{\n interface eth0\n \
                         virtual_router_id 7\n priority {priority}\n advert_int 0.2\n version 3\n state BACKUP\n \
                         virtual_ipaddress {{ {SHARED4}/24 }}\n}}\n",
                        name = router.name
                    ),
                )
                .unwrap();
                let pid = |kind: &str| dir.join(format!("keepalived-{}.{kind}", router.name)).display().to_string();
                let mut command = Command::new("nsenter");
                command
                    .arg(format!("--net={}", router.workload.path_str()))
                    .args(["keepalived", "--dont-fork", "--log-console", "--vrrp", "--use-file"])
                    .arg(&file)
                    .args(["--pid", &pid("pid"), "--vrrp_pid", &pid("vrrp")])
                    .stdout(Stdio::null())
                    .stderr(Stdio::null());
                command.spawn().unwrap()
            })
            .collect();
        for client in &clients {
            answered_after(client, SHARED4);
        }
        let has_it = |router: &Attached| {
            let links = router.workload.ip_json(&["addr", "show", "dev", "eth0"]).unwrap();
            let all = links[0]["addr_info"].as_array().cloned().unwrap_or_default();
            all.iter().any(|info| info["local"] == SHARED4)
        };
        wait_until(SOON, "the first router to have the address", || {
            ensure!(has_it(&routers[0]) && !has_it(&routers[1]));
            Ok(())
        })
        .unwrap();
        for client in &clients {
            answered_after(client, SHARED4);
        }
        terminate(&running[0]);
        wait_until(SOON, "the second router to have the address", || {
            ensure!(has_it(&routers[1]));
            Ok(())
        })
        .unwrap();
        std::thread::scope(|scope| {
            for client in &clients {
                scope.spawn(move || {
                    let took = answered_after(client, SHARED4);
                    println!("{options:?}: keepalived moved, {} sees it after {took:?}", client.name);
                    assert!(took < MOVE, "{options:?}: {} after {took:?}", client.name);
                });
            }
        });
        for each in &mut running {
            terminate(each);
            each.wait().unwrap();
        }
    }
}
