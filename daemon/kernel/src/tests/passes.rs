//! Full passes: the desired data plane is reached, and recognized once it is present.

use std::time::Instant;

use ovl_dataplane::device::Device;
use ovl_dataplane::op::{AddressOp, FdbOp, LinkOp, NeighbourOp, Op};
use ovl_dataplane::state::{Dataplane, Link};
use ovl_proto::id::NetworkId;

use super::lab::{Lab, PORT, bridge, desired, in_namespace, ip, net, run, vxlan};
use crate::{KernelError, KernelEvent};

#[test]
fn empty_host_has_an_empty_data_plane() {
    in_namespace(async || {
        let lab = Lab::start();
        let kernel = lab.dump().await;
        let sysctls = kernel.sysctls.clone();
        assert_eq!(kernel, Dataplane { sysctls, ..Dataplane::default() });
        assert_eq!(kernel.sysctls.get("net.ipv4.ip_forward").map(String::as_str), Some("0"));
    });
}

async fn reach(underlay: &str) {
    let mut lab = Lab::start();
    let mut desired = desired(ip(underlay), 1000);
    desired.sysctls.insert("net.ipv4.ip_forward".to_owned(), "1".to_owned());
    desired.sysctls.insert("net.ipv6.conf.all.forwarding".to_owned(), "1".to_owned());
    run("sysctl -qw net.ipv6.conf.up0.accept_ra=1");
    lab.pass(&desired).await;
    lab.assert_settled(&desired).await;
    assert_eq!(run("sysctl -n net.ipv6.conf.up0.accept_ra").trim(), "2", "still takes router advertisements");
    assert_eq!(lab.events().await, [], "ovld made the changes");
    lab.assert_settled(&desired).await;
    // All operations can be repeated.
    for outcome in lab.kernel.apply(ovl_dataplane::diff::diff(&Dataplane::default(), &desired, true)).await {
        outcome.result.unwrap_or_else(|error| panic!("{}: {error}", outcome.op));
    }
    lab.assert_settled(&desired).await;
    // A new worker finds the same data plane.
    Lab::start().assert_settled(&desired).await;
    // Delete all objects again.
    let nothing = Dataplane { sysctls: desired.sysctls.clone(), ..Dataplane::default() };
    let ops = lab.pass(&nothing).await;
    assert_eq!(ops.len(), 2, "{ops:?}");
    lab.assert_settled(&nothing).await;
    assert_eq!(lab.events().await, [], "ovld made the changes");
}

#[test]
fn network_over_ipv4_is_created_and_deleted() {
    in_namespace(async || reach("192.0.2.1").await);
}

#[test]
fn network_over_ipv6_is_created_and_deleted() {
    in_namespace(async || reach("2001:db8:ffff::1").await);
}

#[test]
fn deletion_of_absent_entries_succeeds() {
    in_namespace(async || {
        let mut lab = Lab::start();
        lab.pass(&desired(ip("192.0.2.1"), 100)).await;
        let fewer = desired(ip("192.0.2.1"), 3);
        let ops = lab.pass(&fewer).await;
        lab.assert_settled(&fewer).await;
        for outcome in lab.kernel.apply(ops).await {
            outcome.result.unwrap_or_else(|error| panic!("again, {}: {error}", outcome.op));
        }
        lab.assert_settled(&fewer).await;
        assert_eq!(lab.events().await, []);
    });
}

#[test]
fn network_is_changed_in_place() {
    in_namespace(async || {
        let lab = Lab::start();
        let mut wanted = desired(ip("192.0.2.1"), 10);
        lab.pass(&wanted).await;
        for link in wanted.links.values_mut() {
            match link {
                Link::Bridge { mtu, .. } | Link::Endpoint { mtu, .. } => *mtu = 1350,
                Link::Vxlan { vni, mtu, .. } | Link::Tap { vni, mtu, .. } => (*vni, *mtu) = (5000, 1350),
                Link::Tunnel { .. } => {}
            }
        }
        lab.pass(&wanted).await;
        // A bridge does not follow its ports' MTU.
        run(&format!("ip link add extra type veth && ip link set extra mtu 1300 master {}", bridge()));
        lab.assert_settled(&wanted).await;
    });
}

#[test]
fn foreign_devices_are_not_changed() {
    in_namespace(async || {
        let lab = Lab::start();
        run(&format!("ip link add {} type bridge", bridge()));
        let wanted = desired(ip("192.0.2.1"), 1);
        let link = wanted.links[&bridge()];
        assert_eq!(lab.dump().await.links, Default::default());
        let before = run(&format!("ip -d link show {}", bridge()));
        for op in [
            Op::Link(LinkOp::Add(bridge(), link)),
            Op::Link(LinkOp::Set(bridge(), link, link)),
            Op::Link(LinkOp::Delete(bridge())),
            Op::Address(AddressOp::Add(bridge(), net("10.1.0.1/16"))),
            Op::Neighbour(NeighbourOp::Set(bridge(), ip("10.1.0.9"), super::lab::mac(9))),
        ] {
            let outcome = lab.kernel.apply(vec![op]).await.remove(0);
            assert_eq!(outcome.result, Err(KernelError::Foreign(bridge())), "{}", outcome.op);
        }
        assert_eq!(lab.kernel.delete_links(vec![bridge()]).await, Err(KernelError::Foreign(bridge())));
        assert_eq!(run(&format!("ip -d link show {}", bridge())), before);
    });
}

#[test]
fn error_names_the_user_of_the_vni_or_port() {
    in_namespace(async || {
        let lab = Lab::start();
        let wanted = desired(ip("192.0.2.1"), 0);
        run("ip link add vx0 type vxlan id 4097 dstport 4789 local 192.0.2.1 nolearning");
        lab.kernel.apply(vec![Op::Link(LinkOp::Add(bridge(), wanted.links[&bridge()]))]).await;
        let add = Op::Link(LinkOp::Add(vxlan(), wanted.links[&vxlan()]));
        let error =
            async || lab.kernel.apply(vec![add.clone()]).await.remove(0).result.unwrap_err().to_string();
        assert_eq!(error().await, "VNI 4097 on port 4789 is in use by device vx0");
        run("ip link del vx0");
        let taken = std::net::UdpSocket::bind(("0.0.0.0", PORT)).expect("port");
        let text = error().await;
        assert!(text.starts_with("UDP port 4789 of VXLAN is in use by another program"), "{text}");
        assert!(!lab.dump().await.links.contains_key(&vxlan()), "no device remains");
        drop(taken);
        lab.pass(&wanted).await;
        lab.assert_settled(&wanted).await;
    });
}

#[test]
fn error_names_the_missing_device() {
    in_namespace(async || {
        let lab = Lab::start();
        let outcome =
            lab.kernel.apply(vec![Op::Address(AddressOp::Add(bridge(), net("10.1.0.1/16")))]).await.remove(0);
        assert_eq!(outcome.result, Err(KernelError::NoDevice(bridge())));
        let outcome = lab
            .kernel
            .apply(vec![Op::Address(AddressOp::Delete(bridge(), net("10.1.0.1/16")))])
            .await
            .remove(0);
        assert_eq!(outcome.result, Ok(()));
    });
}

#[test]
fn underlay_is_described_and_watched() {
    in_namespace(async || {
        let mut lab = Lab::start();
        let underlay = lab.kernel.underlay(ip("192.0.2.1"), Vec::new()).await.expect("underlay");
        assert_eq!(
            (underlay.device.as_str(), underlay.mtu, underlay.prefix),
            ("up0", 1500, net("192.0.2.1/24"))
        );
        let error = lab.kernel.underlay(ip("192.0.2.77"), Vec::new()).await.unwrap_err().to_string();
        assert_eq!(error, "no device of this host has the address 192.0.2.77");
        lab.events().await;
        run("ip link set up0 mtu 1450");
        assert_eq!(lab.events().await, [KernelEvent::Underlay]);
        run("ip addr add 192.0.2.9/24 dev up0");
        assert_eq!(lab.events().await, [KernelEvent::Underlay]);
        run("ip route add 10.99.0.0/16 via 192.0.2.7");
        lab.pass(&desired(ip("192.0.2.1"), 0)).await;
        let prefixes = lab.kernel.prefixes().await.expect("prefixes");
        assert_eq!(prefixes, [net("10.99.0.0/16"), net("192.0.2.0/24"), net("2001:db8:ffff::/64")]);
    });
}

#[test]
fn underlay_of_an_address_on_loopback_is_the_device_to_the_peers() {
    in_namespace(async || {
        let lab = Lab::start();
        run("ip link set lo up");
        run("ip link add wire mtu 1300 type veth peer name other");
        run("ip link set wire up; ip link set other up; ip addr add 198.51.100.1/24 dev wire");
        run("ip addr add 10.250.0.1/32 dev lo");
        let underlay = lab.kernel.underlay(ip("10.250.0.1"), vec![ip("10.250.0.2")]).await.expect("underlay");
        // There is no route to the peer.
        assert_eq!((underlay.device.as_str(), underlay.mtu, underlay.by_peers), ("lo", 1500, true));
        run("ip route add 10.250.0.2 via 198.51.100.2");
        let peers = vec![ip("10.250.0.2"), ip("10.250.0.3")];
        let underlay = lab.kernel.underlay(ip("10.250.0.1"), peers).await.expect("underlay");
        assert_eq!((underlay.device.as_str(), underlay.mtu, underlay.by_peers), ("wire", 1300, true));
        assert_eq!(underlay.prefix.addr(), ip("10.250.0.1"));
    });
}

#[test]
fn many_entries_are_fast() {
    in_namespace(async || {
        let mut lab = Lab::start();
        let wanted = desired(ip("192.0.2.1"), 10_000);
        let dump = lab.dump().await;
        let ops = ovl_dataplane::diff::diff(&dump, &wanted, true);
        let (count, start) = (ops.len(), Instant::now());
        assert!(lab.kernel.apply(ops).await.iter().all(|outcome| outcome.result.is_ok()));
        println!("{count} operations: {:?}", start.elapsed());
        let start = Instant::now();
        let dump = lab.dump().await;
        println!("a dump of them: {:?}", start.elapsed());
        let remotes: Vec<Op> = dump
            .remotes
            .iter()
            .map(|((device, mac), remote)| Op::Fdb(FdbOp::SetRemote(*device, *mac, *remote)))
            .collect();
        let start = Instant::now();
        lab.kernel.apply(remotes).await;
        println!("10000 FDB entries replaced by the same: {:?}", start.elapsed());
        assert_eq!(lab.events().await, []);
        let start = Instant::now();
        lab.kernel.delete_links(vec![vxlan(), bridge()]).await.expect("deleted");
        println!("all deleted: {:?}", start.elapsed());
        assert_eq!(lab.events().await, []);
        lab.kernel
            .delete_links(vec![vxlan(), bridge(), Device::bridge(NetworkId([7; 5]))])
            .await
            .expect("an absent object is no error");
    });
}
