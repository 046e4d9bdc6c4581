//! The veth pairs of endpoints.

use std::time::{Duration, Instant};

use ovl_dataplane::op::{FdbOp, LinkOp, NeighbourOp, Op};
use ovl_dataplane::state::Link;

use super::lab::{Container, Lab, add_endpoint, bridge, desired, endpoint, in_namespace, ip, mac, net, run};
use crate::{EndpointSpec, Goal, HostEnd, KernelEvent, Mended, PeerSpec, open_netns};

async fn network(lab: &Lab) -> ovl_dataplane::state::Dataplane {
    let wanted = desired(ip("192.0.2.1"), 3);
    lab.pass(&wanted).await;
    wanted
}

#[test]
fn endpoint_reaches_its_gateways() {
    in_namespace(async || {
        let mut lab = Lab::start();
        let mut wanted = network(&lab).await;
        let container = Container::new();
        let ops = vec![
            Op::Fdb(FdbOp::AddPort(endpoint(30), mac(30))),
            Op::Neighbour(NeighbourOp::Set(bridge(), ip("10.1.0.30"), mac(30))),
            Op::Neighbour(NeighbourOp::Set(bridge(), ip("fd00:1::1e"), mac(30))),
        ];
        let (outcomes, ifname) = lab.kernel.prepare_and_create(ops, container.spec(30)).await;
        assert_eq!(ifname.map(|made| made.ifname).as_deref(), Ok("eth0"));
        assert!(outcomes.iter().all(|outcome| outcome.result.is_ok()), "{outcomes:?}");
        add_endpoint(&mut wanted, 30);
        lab.assert_settled(&wanted).await;
        assert_eq!(lab.events().await, [], "ovld made this change");
        container.run("ping -c1 -W1 10.1.0.1");
        container.run("ping -c1 -W1 fd00:1::1");
        container.run("ping -c1 -W1 127.0.0.1");
        assert!(container.run("ip route").contains("default via 10.1.0.1 dev eth0"));
        assert!(container.run("ip -6 route").contains("default via fd00:1::1 dev eth0"));
        let link = container.run("ip link show eth0");
        assert!(link.contains("mtu 1400") && link.contains(&mac(30).to_string()), "{link}");
        let host = run(&format!("ip -d link show {}; ip addr show {0}", endpoint(30)));
        assert!(host.contains("alias ovl endpoint web-30") && !host.contains("inet6"), "{host}");
        // A second network's interface leaves the default routes alone.
        let mut second = container.spec(31);
        second.gateways = vec![ip("10.1.0.7"), ip("fd00:1::7")];
        assert_eq!(lab.create(second).await.as_deref(), Ok("eth1"));
        assert_eq!(container.run("ip route show default").trim(), "default via 10.1.0.1 dev eth0");
        assert_eq!(container.run("ip -6 route show default").lines().count(), 1);
    });
}

#[test]
fn failed_creation_leaves_no_interface() {
    in_namespace(async || {
        let mut lab = Lab::start();
        let wanted = network(&lab).await;
        let container = Container::new();
        container.run("ip link add eth7 type veth peer name other");
        let mut taken = container.spec(30);
        taken.ifname = Some("eth7".to_owned());
        let mut twice = container.spec(30);
        twice.addresses = vec![net("10.1.0.30/16"), net("10.1.0.30/16")];
        let mut nowhere = container.spec(30);
        nowhere.gateways = vec![ip("172.31.0.1")];
        let mut bad = container.spec(30);
        bad.ifname = Some("a/b".to_owned());
        let mut homeless = container.spec(30);
        homeless.host_end = HostEnd::Port(endpoint(200), false);
        for (spec, words) in [
            (taken, "the namespace already has an interface eth7"),
            (twice, "cannot add address 10.1.0.30/16 to eth0: File exists"),
            (nowhere, "cannot set the default route via 172.31.0.1 in the namespace"),
            (bad, "invalid interface name 'a/b'"),
            (homeless, "device ove-"),
        ] {
            let error = lab.create(spec).await.unwrap_err().to_string();
            assert!(error.starts_with(words), "{error}");
            assert_eq!(
                container.run("ls /sys/class/net | wc -l; ip -o link | wc -l").lines().last(),
                Some("3")
            );
            lab.assert_settled(&wanted).await;
        }
        assert_eq!(lab.events().await, [], "no event");
        lab.create(container.spec(30)).await.expect("endpoint");
        let error = lab.create(container.spec(30)).await.unwrap_err().to_string();
        assert_eq!(error, format!("device {} already exists", endpoint(30)));
    });
}

#[test]
fn ipv6_is_turned_on_for_the_interface_if_disabled() {
    in_namespace(async || {
        let lab = Lab::start();
        network(&lab).await;
        let container = Container::new();
        container.run("sysctl -qw net.ipv6.conf.default.disable_ipv6=1");
        lab.create(container.spec(30)).await.expect("endpoint");
        container.run("ping -c1 -W1 fd00:1::1");
    });
}

#[test]
fn peer_that_is_set_up_again_is_reported_and_gets_back_what_it_lost() {
    in_namespace(async || {
        let mut lab = Lab::start();
        network(&lab).await;
        let container = Container::new();
        lab.create(container.spec(30)).await.expect("endpoint");
        let changed = KernelEvent::PeerChanged(endpoint(30));
        assert!(!lab.events().await.contains(&changed), "the creation itself is no change");
        container.run("ip link set eth0 down && ip link set eth0 up");
        assert!(lab.events().await.contains(&changed));
        let mend = async || {
            let EndpointSpec { device, addresses, gateways, host_end, resolver, .. } = container.spec(30);
            let spec = PeerSpec { device, addresses, gateways, host_end, resolver };
            lab.kernel.mend(container.open(), vec![spec]).await.expect("mended")
        };
        let found = |changed| Mended { device: endpoint(30), mac: Some(mac(30)), changed };
        assert_eq!(mend().await, [found(true)]);
        container.run("ping -c1 -W1 fd00:1::1 && ip route get 192.0.2.1 && ip -6 route get 2001:db8::1");
        assert_eq!(mend().await, [found(false)]);
        container.run("ip link set eth0 down");
        assert_eq!(mend().await, [found(false)], "what is down stays as it is");
        container.run("ip link set eth0 address 02:00:00:00:00:99 && ip link set eth0 up");
        assert!(lab.events().await.contains(&changed));
    });
}

#[test]
fn deleted_namespace_is_noticed_and_not_kept_alive() {
    in_namespace(async || {
        let mut lab = Lab::start();
        network(&lab).await;
        let container = Container::new();
        lab.create(container.spec(30)).await.expect("endpoint");
        lab.events().await;
        drop(container);
        let wait =
            async { while lab.events.recv().await != Some(KernelEvent::EndpointGone(endpoint(30))) {} };
        tokio::time::timeout(Duration::from_secs(5), wait).await.expect("event");
        lab.events().await;
        let other = Container::new();
        lab.create(other.spec(31)).await.expect("endpoint");
        run(&format!("ip link del {}", endpoint(31)));
        assert!(lab.events().await.contains(&KernelEvent::EndpointGone(endpoint(31))));
        lab.create(other.spec(32)).await.expect("endpoint");
        lab.kernel.delete_links(vec![endpoint(32)]).await.expect("deleted");
        assert_eq!(lab.events().await, [], "ovld made this change");
    });
}

#[test]
fn both_interfaces_of_a_pair_get_a_new_mtu() {
    in_namespace(async || {
        let lab = Lab::start();
        let mut wanted = network(&lab).await;
        let containers = [Container::new(), Container::new()];
        for (n, container) in (40..).zip(&containers) {
            lab.create(container.spec(n)).await.expect("endpoint");
            add_endpoint(&mut wanted, n);
        }
        lab.pass(&wanted).await;
        for link in wanted.links.values_mut() {
            match link {
                Link::Bridge { mtu, .. }
                | Link::Vxlan { mtu, .. }
                | Link::Tap { mtu, .. }
                | Link::Tunnel { mtu, .. }
                | Link::Endpoint { mtu, .. } => *mtu = 1380,
            }
        }
        let start = Instant::now();
        lab.pass(&wanted).await;
        println!("a new MTU for two endpoints: {:?}", start.elapsed());
        lab.assert_settled(&wanted).await;
        for container in &containers {
            assert!(container.run("ip link show eth0").contains("mtu 1380"));
        }
    });
}

#[test]
fn isolated_endpoint_is_down_until_it_is_restored() {
    in_namespace(async || {
        let lab = Lab::start();
        let mut wanted = network(&lab).await;
        let container = Container::new();
        lab.create(container.spec(30)).await.expect("endpoint");
        add_endpoint(&mut wanted, 30);
        lab.pass(&wanted).await;
        let mut isolated = wanted.clone();
        isolated.links.insert(
            endpoint(30),
            Link::Endpoint { mtu: 1400, master: None, up: false, tuned: false, hairpin: false },
        );
        isolated.ports.remove(&(endpoint(30), mac(30)));
        lab.pass(&isolated).await;
        lab.assert_settled(&isolated).await;
        lab.pass(&wanted).await;
        lab.assert_settled(&wanted).await;
        // The kernel restores the carrier of the peer interface with a delay.
        container.run("ping -c5 -i0.3 -W1 10.1.0.1");
    });
}

#[test]
fn pass_skips_ignored_devices_and_can_be_a_dry_run() {
    in_namespace(async || {
        let lab = Lab::start();
        let desired = network(&lab).await;
        let container = Container::new();
        lab.create(container.spec(30)).await.expect("endpoint");
        let goal = |ignored: &[_], apply| Goal {
            desired: desired.clone(),
            prune: true,
            ignored: ignored.iter().copied().collect(),
            expected: Default::default(),
            apply,
        };
        let pass = lab.kernel.reconcile(goal(&[endpoint(30)], true)).await.expect("pass");
        assert!(pass.outcomes.is_empty() && pass.lost.is_empty(), "{pass:?}");
        for apply in [false, true] {
            let pass = lab.kernel.reconcile(goal(&[], apply)).await.expect("pass");
            let ops: Vec<Op> = pass.outcomes.into_iter().map(|outcome| outcome.op).collect();
            assert_eq!(ops, [Op::Link(LinkOp::Delete(endpoint(30)))]);
        }
        let mut wanted = desired.clone();
        add_endpoint(&mut wanted, 31);
        let goal = Goal {
            desired: wanted,
            prune: true,
            ignored: Default::default(),
            expected: Default::default(),
            apply: true,
        };
        assert_eq!(lab.kernel.reconcile(goal).await.expect("pass").lost, [endpoint(31)]);
    });
}

#[test]
fn open_netns_accepts_only_another_network_namespace() {
    in_namespace(async || {
        let error = |path: &str| open_netns(path.as_ref()).unwrap_err().to_string();
        assert_eq!(error("/run/netns/no-such"), "network namespace /run/netns/no-such does not exist");
        assert_eq!(error("/etc/hostname"), "/etc/hostname is not a network namespace");
        assert_eq!(error("/proc/self/ns/mnt"), "/proc/self/ns/mnt is not a network namespace");
        assert!(error("/proc/thread-self/ns/net").contains("is the network namespace of ovld itself"));
        assert!(Container::new().open().inode > 0);
    });
}

#[test]
fn attach_is_fast() {
    in_namespace(async || {
        let lab = Lab::start();
        network(&lab).await;
        let containers: Vec<Container> = (0..50).map(|_| Container::new()).collect();
        let mut times = Vec::new();
        for (n, container) in (100..).zip(&containers) {
            let spec = container.spec(n);
            let ops = vec![
                Op::Fdb(FdbOp::AddPort(endpoint(n), mac(n.into()))),
                Op::Neighbour(NeighbourOp::Set(bridge(), ip(&format!("10.1.0.{n}")), mac(n.into()))),
            ];
            let start = Instant::now();
            let (_, result) = lab.kernel.prepare_and_create(ops, spec).await;
            times.push(start.elapsed());
            result.expect("endpoint");
        }
        times.sort();
        println!("attach: median {:?}, most {:?}", times[25], times[49]);
        let start = Instant::now();
        lab.kernel.delete_links((100..149).map(endpoint).collect()).await.expect("deleted");
        println!("49 deleted together: {:?}", start.elapsed());
        let start = Instant::now();
        lab.kernel.delete_links(vec![endpoint(149)]).await.expect("deleted");
        println!("one deleted: {:?}", start.elapsed());
    });
}
