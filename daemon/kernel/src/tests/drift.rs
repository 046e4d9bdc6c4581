//! Drift: changes of ovl's objects by other programs are noticed and repaired.

use std::time::Duration;

use super::lab::{
    Container, GROUP, Lab, add_endpoint, bridge, desired, endpoint, in_namespace, ip, mac, run, vxlan,
};
use crate::KernelEvent;

#[test]
fn every_kind_of_drift_is_repaired() {
    in_namespace(async || {
        let mut lab = Lab::start();
        let mut wanted = desired(ip("192.0.2.1"), 20);
        wanted.sysctls.insert("net.ipv4.ip_forward".to_owned(), "1".to_owned());
        lab.pass(&wanted).await;
        let container = Container::new();
        lab.create(container.spec(30)).await.expect("endpoint");
        add_endpoint(&mut wanted, 30);
        lab.pass(&wanted).await;
        lab.assert_settled(&wanted).await;
        lab.events().await;
        let (br, vx, ep) = (bridge(), vxlan(), endpoint(30));
        let (m3, m4, m30) = (mac(3), mac(4), mac(30));
        for line in [
            format!("ip link del {vx}"),
            format!("ip link del {br}"),
            format!("ip link set {br} down"),
            format!("ip link set {vx} down"),
            format!("ip link set {br} mtu 1300"),
            format!("ip link set {vx} mtu 1300"),
            format!("ip link set {br} address 02:00:00:00:00:99"),
            format!("ip link set {vx} nomaster"),
            format!("ip link add br1 type bridge && ip link set {vx} master br1"),
            format!("ip link set {br} type bridge stp_state 1"),
            format!("ip link set {br} type bridge mcast_snooping 0"),
            format!("ip link set {br} type bridge mcast_querier 0"),
            format!("ip link set {br} type bridge mcast_router 1"),
            format!("ip link set {br} type bridge mcast_igmp_version 2"),
            format!("ip link set {br} type bridge mcast_mld_version 1"),
            format!("ip link set {br} type bridge mcast_query_response_interval 1000"),
            format!("bridge link set dev {vx} mcast_router 1"),
            format!("bridge link set dev {ep} mcast_router 0"),
            format!("bridge fdb del {GROUP} dev {vx} self"),
            format!("bridge fdb del {GROUP} dev {vx} self dst 192.0.2.3"),
            format!("bridge fdb append {GROUP} dev {vx} self dst 192.0.2.250"),
            format!("bridge fdb append 33:33:00:00:77:77 dev {vx} self dst 192.0.2.3"),
            format!("ip link set {vx} type vxlan learning"),
            format!("bridge link set dev {vx} learning on"),
            format!("bridge link set dev {vx} neigh_suppress on"),
            format!("ip link set dev {vx} addrgenmode eui64"),
            format!("ip addr del 10.1.0.1/16 dev {br}"),
            format!("ip addr flush dev {br}"),
            format!("ip addr add 10.77.0.1/16 dev {br}"),
            format!("bridge fdb del {m3} dev {vx} self"),
            format!("bridge fdb replace {m3} dev {vx} self dst 192.0.2.250"),
            format!("bridge fdb replace {m3} dev {vx} self dst 192.0.2.5 vni 77"),
            format!("bridge fdb replace {m3} dev {vx} self dynamic dst 192.0.2.5"),
            format!("bridge fdb add 02:77:00:00:00:01 dev {vx} self dst 192.0.2.250"),
            format!("bridge fdb del 00:00:00:00:00:00 dev {vx} self"),
            format!("bridge fdb del 00:00:00:00:00:00 dev {vx} self dst 192.0.2.3"),
            format!("bridge fdb append 00:00:00:00:00:00 dev {vx} self dst 192.0.2.250"),
            format!("bridge fdb append 00:00:00:00:00:00 dev {vx} self dst 192.0.2.250 port 4799"),
            format!("bridge fdb del {m4} dev {vx} master"),
            format!("bridge fdb replace {m4} dev {vx} master dynamic"),
            format!("bridge fdb replace {m4} dev {ep} master static"),
            format!("bridge fdb add 02:77:00:00:00:02 dev {vx} master static"),
            format!("ip neigh del 10.1.1.3 dev {br}"),
            format!("ip neigh replace 10.1.1.3 lladdr 02:77:00:00:00:03 dev {br} nud permanent"),
            format!("ip neigh replace 10.1.1.3 lladdr {m3} dev {br} nud reachable"),
            format!("ip neigh add 10.1.77.3 lladdr {m3} dev {br} nud permanent"),
            format!("ip -6 neigh flush dev {br} nud permanent"),
            format!("ip link set {ep} down"),
            format!("ip link set {ep} mtu 1300"),
            format!("ip link set {ep} nomaster"),
            format!("bridge link set dev {ep} learning on"),
            format!("bridge fdb del {m30} dev {ep} master"),
            "sysctl -qw net.ipv4.ip_forward=0".to_owned(),
        ] {
            run(&line);
            let events = lab.events().await;
            assert!(events.contains(&KernelEvent::Changed), "{line}: {events:?}");
            assert!(!events.contains(&KernelEvent::Overrun), "{line}: {events:?}");
            let ops = lab.pass(&wanted).await;
            assert!(!ops.is_empty(), "{line}: nothing to repair?");
            // Entries of a deleted device may be missing without a notification, so a second pass may repair more.
            let more = lab.pass(&wanted).await;
            println!("{line}: {} operations, then {}", ops.len(), more.len());
            lab.assert_settled(&wanted).await;
            lab.events().await;
            run("ip link del br1 2>/dev/null || true");
            lab.events().await;
        }
    });
}

#[test]
fn learned_entries_are_not_drift() {
    in_namespace(async || {
        let mut lab = Lab::start();
        let wanted = desired(ip("192.0.2.1"), 20);
        lab.pass(&wanted).await;
        lab.events().await;
        // Neighbours that the kernel resolves or learns by itself, and ports of other programs.
        run("ping -c1 -W1 10.1.200.1 >/dev/null || true");
        run(&format!("ip neigh add 10.1.200.2 lladdr 02:00:00:00:00:77 dev {} nud reachable", bridge()));
        run(&format!("ip neigh del 10.1.200.2 dev {}", bridge()));
        assert_eq!(lab.events().await, []);
        lab.assert_settled(&wanted).await;
    });
}

#[test]
fn lost_notifications_are_reported() {
    in_namespace(async || {
        // A full event channel does not block the worker either.
        let (sender, mut events) = tokio::sync::mpsc::channel(1);
        let mut monitor = crate::monitor::Monitor::open().expect("monitor");
        monitor.shrink();
        let mut known = crate::known::KernelModel::default();
        let kernel = crate::start(sender, Vec::new()).expect("worker");
        let lab = Lab { kernel, events: tokio::sync::mpsc::channel(1).1 };
        lab.pass(&desired(ip("192.0.2.1"), 100)).await;
        assert!(monitor.drain(&mut known), "a small buffer overflows");
        for n in 0..5 {
            run(&format!("ip link add t{n} type veth && ip link del t{n}"));
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(events.recv().await, Some(KernelEvent::Underlay));
    });
}
