//! Changes that others make to ovl's kernel objects are repaired, and foreign objects are left alone.

use std::fmt::Write as _;
use std::net::UdpSocket;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Signal, wait_until};
use ovl_tests::{
    Attached, SOON, assert_contains, attach, attach_workload, ctl_error, ensure_settled, ping_all_pairs,
    problems, rows, start_lab, strings, text, verify, wait_clean, wait_network, wait_problem,
};

/// Time limit of a repair. It takes about a second; the rest is for the load of other labs.
const REPAIRED: Duration = Duration::from_secs(5);

/// Two hosts with one endpoint each on one network.
struct Pair {
    lab: Lab,
    a: Attached,
    b: Attached,
    bridge: String,
    vxlan: String,
}

fn pair() -> Result<Pair> {
    let lab = start_lab(2)?;
    lab["h1"].ctl_ok(&["network", "create", "demo", "--subnet", "10.1.0.0/24", "--subnet", "fd10::/64"])?;
    wait_network(&lab["h2"], "demo")?;
    let a = attach(&lab["h1"], "a", "demo", &[])?;
    let b = attach(&lab["h2"], "b", "demo", &[])?;
    ping_all_pairs(&[a.clone(), b.clone()], SOON)?;
    let bridge = text(&lab["h1"].ctl_json(&["network", "inspect", "demo"])?["bridge"]);
    let vxlan = bridge.replace("ovb-", "ovx-");
    wait_clean(lab.hosts(), SOON)?;
    Ok(Pair { lab, a, b, bridge, vxlan })
}

/// All kernel objects of the network on a host, as `ip`, `bridge` and `nft` print them, without parts that change by
/// themselves such as counters and indexes.
fn fingerprint(host: &Host, devices: &[&str]) -> Result<String> {
    let mut lines = Vec::new();
    for device in devices {
        let link = host.ip_json(&["-d", "link", "show", "dev", device])?;
        let link = &link[0];
        let up = strings(&link["flags"]).contains(&"UP".to_owned());
        // Only bridges have a MAC address that is not random.
        let mac = if device.starts_with("ovb-") { text(&link["address"]) } else { String::new() };
        lines.push(format!("{device} up={up} mtu={} mac={mac} in {}", link["mtu"], link["master"]));
        let (info, port) = (&link["linkinfo"]["info_data"], &link["linkinfo"]["info_slave_data"]);
        for key in ["stp_state", "mcast_snooping", "id", "port", "local", "learning"] {
            lines.push(format!("{device} {key}={}", info[key]));
        }
        for key in ["learning", "neigh_suppress", "state"] {
            lines.push(format!("{device} port {key}={}", port[key]));
        }
        for address in
            host.ip_json(&["addr", "show", "dev", device])?[0]["addr_info"].as_array().into_iter().flatten()
        {
            lines.push(format!("{device} has {}/{}", address["local"], address["prefixlen"]));
        }
        let fdb = host.exec_ok(["bridge", "fdb", "show", "dev", device])?;
        // Without the MAC addresses of the ports themselves, and without multicast groups that the kernel joins.
        let is_ignored = |line: &&str| {
            line.starts_with("33:33")
                || line.starts_with("01:00:5e")
                || line.ends_with("permanent") && !line.contains("self")
        };
        lines.extend(
            fdb.lines().filter(|line| !is_ignored(line)).map(|line| format!("{device} fdb {}", line.trim())),
        );
        let neighbours = host.exec_ok(["ip", "neigh", "show", "dev", device, "nud", "permanent"])?;
        lines.extend(neighbours.lines().map(|line| format!("{device} neigh {line}")));
    }
    let rules = host.exec_ok(["nft", "-s", "list", "table", "inet", "ovl"])?;
    lines.push(rules);
    lines.push(host.run(|| std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward"))??);
    lines.sort();
    Ok(lines.join("\n"))
}

/// Number of repairs that a host has counted.
fn repairs(host: &Host) -> Result<u64> {
    let status = host.ctl_json(&["status"])?;
    status["reconcile"]["repairs"].as_u64().with_context(|| format!("no repairs in {status}"))
}

/// Lines that only one of two texts contains.
fn difference(found: &str, expected: &str) -> String {
    let mut out = String::new();
    for line in found.lines().filter(|line| !expected.contains(line)) {
        let _ = writeln!(out, "+ {line}");
    }
    for line in expected.lines().filter(|line| !found.contains(line)) {
        let _ = writeln!(out, "- {line}");
    }
    out
}

#[test]
fn manual_changes_are_repaired_at_once() {
    let Pair { lab, a, b, bridge, vxlan } = pair().unwrap();
    let (h1, b_mac, b_v4, device) = (&lab["h1"], b.mac(), b.address(), a.device());
    let b_v6 = b.addresses()[1].clone();
    let devices = [bridge.as_str(), vxlan.as_str(), device.as_str()];
    let expected = fingerprint(h1, &devices).unwrap();
    assert_contains(
        &expected,
        &[&format!("{b_mac} dst 192.168.77.2 self"), &format!("{b_v4} lladdr {b_mac}"), "fd10::1"],
    );

    let drifts = [
        format!("ip link del {bridge}"),
        format!("ip link del {vxlan}"),
        format!("ip link set {vxlan} nomaster"),
        format!("ip link set {device} nomaster"),
        format!("bridge fdb del {b_mac} dev {vxlan} dst 192.168.77.2 self"),
        format!("bridge fdb del {b_mac} dev {vxlan} master"),
        format!("bridge fdb del 00:00:00:00:00:00 dev {vxlan} dst 192.168.77.2 self"),
        format!("bridge fdb replace {b_mac} dev {vxlan} dst 192.168.77.99 self static"),
        format!("bridge fdb append 00:00:00:00:00:00 dev {vxlan} dst 192.168.77.99 self static"),
        format!("bridge fdb add 02:99:99:99:99:99 dev {vxlan} dst 192.168.77.99 self static"),
        format!("bridge fdb del {} dev {device} master", a.mac()),
        format!("ip neigh del {b_v4} dev {bridge}"),
        format!("ip neigh del {b_v6} dev {bridge}"),
        format!("ip neigh replace {b_v4} lladdr 02:99:99:99:99:99 dev {bridge} nud permanent"),
        format!("ip neigh add 10.1.0.200 lladdr 02:99:99:99:99:99 dev {bridge} nud permanent"),
        format!("ip addr del 10.1.0.1/24 dev {bridge}"),
        format!("ip addr del fd10::1/64 dev {bridge}"),
        format!("ip addr add 10.1.0.99/24 dev {bridge}"),
        format!("ip link set {bridge} mtu 1300"),
        format!("ip link set {vxlan} mtu 1300"),
        format!("ip link set {device} mtu 1300"),
        format!("ip link set {bridge} down"),
        format!("ip link set {vxlan} down"),
        format!("ip link set {device} down"),
        format!("ip link set {bridge} address 02:99:99:99:99:99"),
        format!("ip link set {bridge} type bridge stp_state 1"),
        format!("ip link set {vxlan} type vxlan learning"),
        format!("bridge link set dev {vxlan} neigh_suppress on"),
        format!("bridge link set dev {vxlan} learning on"),
        "nft flush table inet ovl".to_owned(),
        "nft delete table inet ovl".to_owned(),
        "nft add rule inet ovl postrouting counter".to_owned(),
        "RULE".to_owned(),
        "FORWARDING".to_owned(),
    ];
    let mut durations = Vec::new();
    let before = repairs(h1).unwrap();
    for drift in &drifts {
        match drift.as_str() {
            // Delete one rule by its handle.
            "RULE" => {
                let list = h1.exec_ok(["nft", "-a", "list", "chain", "inet", "ovl", "prerouting"]).unwrap();
                let rule =
                    list.lines().find(|line| line.contains("drop")).unwrap_or_else(|| panic!("{list}"));
                let handle = rule.rsplit("handle ").next().unwrap().trim();
                h1.exec_ok(["nft", "delete", "rule", "inet", "ovl", "prerouting", "handle", handle]).unwrap();
            }
            "FORWARDING" => {
                h1.run(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "0")).unwrap().unwrap();
            }
            command => {
                h1.exec_ok(command.split(' ')).unwrap();
            }
        }
        let start = Instant::now();
        wait_until(REPAIRED, &format!("the repair of `{drift}`"), || -> Result<()> {
            let found = fingerprint(h1, &devices)?;
            ensure!(found == expected, "\n{}", difference(&found, &expected));
            Ok(())
        })
        .unwrap();
        durations.push((start.elapsed(), drift.clone()));
        wait_clean(&lab.hosts()[..1], REPAIRED).unwrap();
        // Two subsystems that undo each other's repairs would still look clean from time to time.
        ensure_settled(h1).unwrap();
        a.workload.ping_until(&b_v4, SOON).with_context(|| format!("after `{drift}`")).unwrap();
    }
    durations.sort();
    println!("slowest repairs: {:?}", &durations[durations.len() - 3..]);
    a.workload.ping_until(&b_v6, SOON).unwrap();
    b.workload.ping_until(a.address(), SOON).unwrap();
    for gateway in ["10.1.0.1", "fd10::1"] {
        a.workload.ping_until(gateway, SOON).unwrap();
    }
    // Each repair is counted, shortly after it is applied.
    wait_until(SOON, "all repairs to be counted", || {
        let counted = repairs(h1)? - before;
        ensure!(counted >= drifts.len() as u64, "{counted} of at least {}", drifts.len());
        Ok(())
    })
    .unwrap();
    let events = rows(h1, &["events"]).unwrap();
    assert!(events.iter().any(|event| event["kind"] == "kernel" && event["object"] == *bridge), "{events:?}");
    assert_eq!(problems(h1).unwrap(), Vec::<String>::new());
}

/// Names of the devices that [`make_foreign`] creates.
const FOREIGN: [&str; 8] =
    ["br0", "fv0", "fv1", "fvx", "ovb-00000000", "ovx-00000000", "ove-00000000", "ovl0"];

fn create_foreign(host: &Host) -> Result<()> {
    let lines = "
        ip link add br0 type bridge
        ip link add fv0 type veth peer name fv1
        ip link set fv1 master br0
        ip link set br0 up
        ip link set fv1 up
        ip addr add 10.77.0.1/24 dev br0
        ip neigh add 10.77.0.9 lladdr 02:77:00:00:00:09 dev br0 nud permanent
        bridge fdb add 02:77:00:00:00:09 dev fv1 master static
        ip link set fv0 up
        ip link add fvx type vxlan id 999 dstport 4789 nolearning
        bridge fdb append 00:00:00:00:00:00 dev fvx dst 192.168.77.99
        bridge fdb add 02:77:00:00:00:08 dev fvx dst 192.168.77.99
        ip link set fvx up
        ip link add ovb-00000000 type bridge
        ip link set ovb-00000000 alias mine
        ip addr add 10.78.0.1/24 dev ovb-00000000
        ip link add ovx-00000000 type vxlan id 998 dstport 4789 nolearning
        bridge fdb add 02:77:00:00:00:07 dev ovx-00000000 dst 192.168.77.99
        ip link add ove-00000000 type bridge
        ip link add ovl0 type bridge
        nft add table inet foreign
        nft add chain inet foreign input { type filter hook input priority 0 ; policy accept ; }
        nft add rule inet foreign input tcp dport 9 drop
        nft add table ip ovl
        nft add chain ip ovl some
        nft add rule ip ovl some ip saddr 10.99.99.99 drop";
    for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
        host.exec_ok(line.split(' '))?;
    }
    Ok(())
}

/// All foreign objects, without the timers of bridges.
fn foreign_objects(host: &Host) -> Result<Vec<String>> {
    let mut all = Vec::new();
    for device in FOREIGN {
        let mut link = host.ip_json(&["-d", "link", "show", "dev", device])?[0].take();
        let info = link["linkinfo"]["info_data"].as_object_mut();
        info.into_iter().for_each(|info| info.retain(|key, _| !key.contains("timer")));
        let port = link["linkinfo"]["info_slave_data"].as_object_mut();
        port.into_iter().for_each(|port| port.retain(|key, _| !key.contains("timer")));
        all.push(link.to_string());
        all.push(host.exec_ok(["bridge", "fdb", "show", "dev", device])?);
        all.push(host.exec_ok(["ip", "neigh", "show", "dev", device, "nud", "permanent"])?);
        let addresses = host.ip_json(&["addr", "show", "dev", device])?[0]["addr_info"].take();
        all.extend(
            addresses.as_array().into_iter().flatten().map(|each| format!("{device} has {}", each["local"])),
        );
    }
    for table in ["inet foreign", "ip ovl"] {
        let (family, name) = table.split_once(' ').unwrap_or_default();
        all.push(host.exec_ok(["nft", "list", "table", family, name])?);
    }
    Ok(all)
}

#[test]
fn foreign_objects_are_untouched_from_start_to_teardown() {
    let lab = Lab::new(LabConfig::hosts(2)).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    create_foreign(h1).unwrap();
    wait_until(SOON, "the foreign bridge to forward", || -> Result<bool> {
        let (bridge, port) = (
            h1.ip_json(&["link", "show", "dev", "br0"])?,
            h1.ip_json(&["-d", "link", "show", "dev", "fv1"])?,
        );
        Ok(bridge[0]["operstate"] == "UP" && port[0]["linkinfo"]["info_slave_data"]["state"] == "forwarding")
    })
    .unwrap();
    let before = foreign_objects(h1).unwrap();
    let assert_untouched = |when: &str| assert_eq!(foreign_objects(h1).unwrap(), before, "{when}");

    lab.start_all().unwrap();
    assert_untouched("after the start");
    h1.ctl_ok(&["network", "create", "demo", "--subnet", "10.1.0.0/24"]).unwrap();
    wait_network(h2, "demo").unwrap();
    let a = attach(h1, "a", "demo", &[]).unwrap();
    let b = attach(h2, "b", "demo", &[]).unwrap();
    ping_all_pairs(&[a, b.clone()], SOON).unwrap();
    assert_untouched("after an attach");
    // An automatic subnet does not overlap the addresses of the host.
    let auto = h1.ctl_json(&["network", "create", "auto"]).unwrap();
    assert!(!text(&auto["subnets"][0]).starts_with("10.7"), "{auto}");
    let bridge = text(&h1.ctl_json(&["network", "inspect", "demo"]).unwrap()["bridge"]);
    h1.exec_ok(["ip", "link", "del", &bridge]).unwrap();
    h1.exec_ok(["nft", "delete", "table", "inet", "ovl"]).unwrap();
    wait_until(REPAIRED, "the bridge to be recreated", || {
        h1.ip_json(&["link", "show", "dev", &bridge]).map(drop)
    })
    .unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    assert_untouched("after a repair");
    h1.restart().unwrap();
    h1.wait_ready(SOON).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    assert_untouched("after a restart");
    h1.ctl_ok(&["detach", "a"]).unwrap();
    wait_until(SOON, "the bridge to be deleted", || h1.ip_json(&["link", "show", "dev", &bridge]).is_err())
        .unwrap();
    assert_untouched("after the last detach");
    let again = attach_workload(h1.find_workload("a").unwrap(), "demo", &[]).unwrap();
    again.workload.ping_until(b.address(), SOON).unwrap();
    h1.ctl_ok(&["teardown", "--yes"]).unwrap();
    h1.wait_exit(SOON).unwrap();
    assert_untouched("after the teardown");
    let links = h1.ip_json(&["link", "show"]).unwrap();
    let left: Vec<String> = links.as_array().unwrap().iter().map(|link| text(&link["ifname"])).collect();
    let ours = left.iter().filter(|name| name.starts_with("ov") && !FOREIGN.contains(&name.as_str())).count();
    assert_eq!(ours, 0, "{left:?}");
    assert!(!h1.exec(["nft", "list", "table", "inet", "ovl"]).unwrap().success());
    let inside = again.workload.ip_json(&["link", "show"]).unwrap();
    assert_eq!(inside.as_array().map(Vec::len), Some(1), "{inside}");
}

#[test]
fn vni_or_port_conflicts_are_reported_and_resolve_once_free() {
    let lab = start_lab(2).unwrap();
    let (h1, h2) = (&lab["h1"], &lab["h2"]);
    h2.ctl_ok(&["network", "create", "demo", "--subnet", "10.1.0.0/24", "--vni", "5555"]).unwrap();
    wait_network(h1, "demo").unwrap();
    let b = attach(h2, "b", "demo", &[]).unwrap();
    let a = h1.workload("a").unwrap();
    let args = ["attach", "a", "--network", "demo", "--netns", a.path_str()];
    let assert_nothing_left = || {
        let devices = || -> Result<Vec<String>> {
            let links = h1.ip_json(&["link", "show"])?;
            Ok(links.as_array().into_iter().flatten().map(|link| text(&link["ifname"])).collect())
        };
        wait_until(SOON, "nothing to be left of the attach", || -> Result<()> {
            let left = devices()?;
            ensure!(!left.iter().any(|name| name.starts_with("ov")), "{left:?}");
            Ok(())
        })
        .unwrap();
        assert_eq!(a.ip_json(&["link", "show"]).unwrap().as_array().map(Vec::len), Some(1));
        assert_eq!(rows(h1, &["endpoints"]).unwrap().len(), 1);
    };

    // A program has bound the VXLAN port.
    let socket = h1.run(|| UdpSocket::bind("0.0.0.0:4789")).unwrap().unwrap();
    assert_contains(&ctl_error(h1, &args).unwrap(), &["4789", "in use", "ss -ulnp"]);
    assert_nothing_left();
    drop(socket);

    // Another device uses the VNI on the same port.
    h1.exec_ok("ip link add theirs type vxlan id 5555 dstport 4789".split(' ')).unwrap();
    assert_contains(&ctl_error(h1, &args).unwrap(), &["5555", "theirs"]);
    assert_nothing_left();
    h1.exec_ok(["ip", "link", "show", "theirs"]).unwrap();
    h1.exec_ok(["ip", "link", "del", "theirs"]).unwrap();
    h1.ctl_ok(&args).unwrap();
    a.ping_until(b.address(), SOON).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();

    // The device is replaced while ovld is frozen: a repair that fails is reported.
    let vxlan =
        text(&h1.ctl_json(&["network", "inspect", "demo"]).unwrap()["bridge"]).replace("ovb-", "ovx-");
    h1.signal(Signal::SIGSTOP).unwrap();
    h1.exec_ok(["ip", "link", "del", &vxlan]).unwrap();
    h1.exec_ok("ip link add theirs type vxlan id 5555 dstport 4789".split(' ')).unwrap();
    h1.signal(Signal::SIGCONT).unwrap();
    let problem = wait_problem(h1, &["theirs", "5555"], SOON).unwrap();
    assert_contains(&problem, &[&vxlan]);
    assert_eq!(h1.ctl_json(&["status"]).unwrap()["state"], "degraded");
    let verification = verify(h1).unwrap();
    assert!(!verification.clean && verification.settled.is_none(), "{verification:?}");
    assert!(verification.differences.iter().any(|each| each.contains(&vxlan)), "{verification:?}");
    // `plan` prints the operations that ovld keeps trying.
    let plan = strings(&h1.ctl_json(&["plan"]).unwrap());
    assert!(
        plan.iter()
            .any(|op| op.starts_with(&format!("ip link add {vxlan} ")) && op.contains("type vxlan id 5555")),
        "{plan:?}"
    );
    assert!(plan.iter().any(|op| op.contains("bridge fdb") && op.contains(&b.mac())), "{plan:?}");
    h1.exec_ok(["ip", "link", "show", "theirs"]).unwrap();
    h1.exec_ok(["ip", "link", "del", "theirs"]).unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    wait_until(SOON, "h1 to have no problem", || -> Result<bool> { Ok(problems(h1)?.is_empty()) }).unwrap();
    assert!(h1.ctl_json(&["plan"]).unwrap().as_array().is_some_and(Vec::is_empty));
    a.ping_until(b.address(), SOON).unwrap();
}

#[test]
fn lost_netlink_notifications_are_recovered_from() {
    let Pair { lab, a, b, bridge, vxlan } = pair().unwrap();
    let h1 = &lab["h1"];
    let devices = [bridge.as_str(), vxlan.as_str()];
    let expected = fingerprint(h1, &devices).unwrap();
    // More foreign changes than the netlink socket buffers while the daemon does not read.
    h1.exec_ok("ip link add busy type bridge".split(' ')).unwrap();
    h1.exec_ok("ip link add port type veth peer name port1".split(' ')).unwrap();
    h1.exec_ok("ip link set port master busy".split(' ')).unwrap();
    let mut lines = String::new();
    for number in 0..150_000_u32 {
        let [_, x, y, z] = number.to_be_bytes();
        let _ = writeln!(lines, "fdb add 02:66:00:{x:02x}:{y:02x}:{z:02x} dev port master static");
    }
    h1.signal(Signal::SIGSTOP).unwrap();
    let flooded = h1.exec_input(["bridge", "-batch", "-"], Some(&lines));
    h1.exec_ok(["bridge", "fdb", "del", &b.mac(), "dev", &vxlan, "dst", "192.168.77.2", "self"]).unwrap();
    h1.exec_ok(["ip", "neigh", "del", &b.address(), "dev", &bridge]).unwrap();
    h1.signal(Signal::SIGCONT).unwrap();
    flooded.unwrap();
    // `sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode`: at least one socket of the namespace dropped messages.
    let sockets = h1.run(|| std::fs::read_to_string("/proc/thread-self/net/netlink")).unwrap().unwrap();
    let drops =
        |line: &str| line.split_whitespace().nth(8).and_then(|drops| drops.parse::<u64>().ok()).unwrap_or(0);
    assert!(sockets.lines().any(|line| drops(line) > 0), "no notification was dropped:\n{sockets}");
    wait_until(SOON, "all drift to be repaired", || -> Result<()> {
        let found = fingerprint(h1, &devices)?;
        ensure!(found == expected, "\n{}", difference(&found, &expected));
        Ok(())
    })
    .unwrap();
    // The same while the flood continues and the daemon reads.
    let deletes = lines.replace("fdb add", "fdb del").replace(" static", "");
    std::thread::scope(|scope| {
        let flood = scope.spawn(|| h1.exec_input(["bridge", "-batch", "-"], Some(&deletes)));
        h1.exec_ok(["ip", "link", "del", &vxlan]).unwrap();
        h1.exec_ok(["ip", "addr", "del", "10.1.0.1/24", "dev", &bridge]).unwrap();
        flood.join().unwrap().unwrap();
    });
    wait_until(SOON, "all drift to be repaired again", || -> Result<()> {
        let found = fingerprint(h1, &devices)?;
        ensure!(found == expected, "\n{}", difference(&found, &expected));
        Ok(())
    })
    .unwrap();
    wait_clean(lab.hosts(), SOON).unwrap();
    a.workload.ping_until(b.address(), SOON).unwrap();
    b.workload.ping_until(a.address(), SOON).unwrap();
}
