//! Removal of endpoints, and the later deletion of their veth pairs.

use std::time::Duration;

use ovl_dataplane::op::{FdbOp, NeighbourOp, Op};
use ovl_dataplane::state::Link;

use super::lab::{Container, Lab, bridge, desired, endpoint, in_namespace, ip, mac, run};
use crate::link::DOOMED;
use crate::{Netns, PeerLocation, RetiredEndpoint};

fn retired(n: u8, netns: Option<Netns>) -> Vec<RetiredEndpoint> {
    vec![RetiredEndpoint {
        device: endpoint(n),
        other: netns.map_or(PeerLocation::Unknown, PeerLocation::Netns),
    }]
}

async fn wait_until_gone(n: u8) {
    let gone = async {
        while run("ip -o link").contains(&endpoint(n).to_string()) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(5), gone).await.expect("swept");
}

#[test]
fn retire_frees_the_name_at_once_and_the_pair_is_deleted_later() {
    in_namespace(async || {
        let mut lab = Lab::start();
        let mut wanted = desired(ip("192.0.2.1"), 3);
        lab.pass(&wanted).await;
        let container = Container::new();
        lab.create(container.spec(30)).await.expect("endpoint");
        let neighbour = Op::Neighbour(NeighbourOp::Set(bridge(), ip("10.1.0.30"), mac(30)));
        lab.kernel.apply(vec![neighbour]).await;

        let ops = vec![Op::Neighbour(NeighbourOp::Delete(bridge(), ip("10.1.0.30")))];
        let (outcomes, result) = lab.kernel.retire(retired(30, Some(container.open())), ops).await;
        assert_eq!(result, Ok(()));
        assert!(outcomes.iter().all(|outcome| outcome.result.is_ok()), "{outcomes:?}");
        assert!(!container.run("ip -o link").contains("eth0"));
        assert_eq!(container.run("ip -o link show up").lines().count(), 1, "only lo");
        assert_eq!(container.run("ip route; ip -6 route").trim(), "");
        // The rest of ovl treats it as absent: the plan is empty, and to retire it again is no error.
        lab.assert_settled(&wanted).await;
        lab.kernel.delete_links(vec![endpoint(30)]).await.expect("deleted");
        assert_eq!(lab.kernel.retire(retired(30, None), Vec::new()).await.1, Ok(()));

        // The next endpoint has the same name, addresses and MAC address.
        let mut next = container.spec(30);
        next.device = endpoint(31);
        next.ifname = Some("eth0".to_owned());
        let ops = vec![
            Op::Fdb(FdbOp::AddPort(endpoint(31), mac(30))),
            Op::Neighbour(NeighbourOp::Set(bridge(), ip("10.1.0.30"), mac(30))),
            Op::Neighbour(NeighbourOp::Set(bridge(), ip("fd00:1::1e"), mac(30))),
        ];
        lab.kernel.prepare_and_create(ops, next).await.1.expect("endpoint");
        container.run("ping -c1 -W1 10.1.0.1");
        container.run("ping -c1 -W1 fd00:1::1");
        wait_until_gone(30).await;
        container.run("ping -c1 -W1 10.1.0.1");
        assert_eq!(container.run("ip -o link").lines().count(), 2, "lo and eth0");
        assert_eq!(lab.events().await, [], "ovld made this change");
        let link =
            Link::Endpoint { mtu: 1400, master: Some(bridge()), up: true, tuned: true, hairpin: false };
        wanted.links.insert(endpoint(31), link);
        wanted.ports.insert((endpoint(31), mac(30)));
        wanted.neighbours.insert((bridge(), ip("10.1.0.30")), mac(30));
        wanted.neighbours.insert((bridge(), ip("fd00:1::1e")), mac(30));
        lab.assert_settled(&wanted).await;
    });
}

#[test]
fn sweep_deletes_many_pairs_at_once() {
    in_namespace(async || {
        let lab = Lab::start();
        lab.pass(&desired(ip("192.0.2.1"), 3)).await;
        let containers: Vec<Container> = (0..40).map(|_| Container::new()).collect();
        let all = || (30..).zip(&containers);
        for (n, container) in all() {
            lab.create(container.spec(n)).await.expect("endpoint");
        }
        let (before, vanished) = containers.split_at(39);
        for (n, container) in (30..).zip(before) {
            assert_eq!(lab.kernel.retire(retired(n, Some(container.open())), Vec::new()).await.1, Ok(()));
        }
        assert_eq!(vanished.len(), 1);
        lab.kernel.sweep().await.expect("swept");
        let left = run("ip -o link");
        assert!((30..69).all(|n| !left.contains(&endpoint(n).to_string())), "{left}");
        assert!(left.contains(&endpoint(69).to_string()), "{left}");
    });
}

#[test]
fn endpoint_with_unknown_namespace_is_deleted_at_once() {
    in_namespace(async || {
        let lab = Lab::start();
        lab.pass(&desired(ip("192.0.2.1"), 3)).await;
        let (container, other) = (Container::new(), Container::new());
        lab.create(container.spec(30)).await.expect("endpoint");
        lab.create(container.spec(31)).await.expect("endpoint");
        lab.create(other.spec(32)).await.expect("endpoint");
        assert_eq!(lab.kernel.retire(retired(30, None), Vec::new()).await.1, Ok(()));
        // Not the namespace of the peer interface: its index means another device there.
        assert_eq!(lab.kernel.retire(retired(31, Some(other.open())), Vec::new()).await.1, Ok(()));
        let left = run("ip -o link");
        assert!(
            !left.contains(&endpoint(30).to_string()) && !left.contains(&endpoint(31).to_string()),
            "{left}"
        );
        assert_eq!(container.run("ip -o link").lines().count(), 1);
        assert!(other.run("ip -o link show up").contains("eth0"));
        // Nor a namespace that was deleted.
        drop(other);
        assert_eq!(lab.kernel.retire(retired(32, None), Vec::new()).await.1, Ok(()));
    });
}

#[test]
fn new_worker_deletes_doomed_pairs_of_a_killed_daemon() {
    in_namespace(async || {
        let lab = Lab::start();
        let wanted = desired(ip("192.0.2.1"), 3);
        lab.pass(&wanted).await;
        let container = Container::new();
        lab.create(container.spec(30)).await.expect("endpoint");
        drop(lab);
        run(&format!("ip link set {} group {DOOMED}", endpoint(30)));
        // A device of another program in the same group.
        run(&format!("ip link add other type veth peer name another; ip link set other group {DOOMED}"));
        let next = Lab::start();
        next.assert_settled(&wanted).await;
        wait_until_gone(30).await;
        run("ip link show other");
    });
}
