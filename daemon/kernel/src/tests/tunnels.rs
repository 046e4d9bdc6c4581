//! TUN and TAP devices of the engine, and VXLAN devices in a tunnel.

use std::net::{IpAddr, SocketAddr};

use ovl_cluster::addresses as ipam;
use ovl_dataplane::device::Device;
use ovl_dataplane::op::{LinkOp, NftOp, Op};
use ovl_dataplane::state::{Dataplane, Hop, Link, Remote, Source, Tunnel, TunnelKind, TunnelPeer};
use ovl_proto::SEALED_VXLAN_PORT;
use ovl_proto::clock::Stamp;
use ovl_proto::id::{NetworkId, TunnelKey};
use ovl_proto::object::{Backend, Driver, Mode, Network};
use ovl_proto::wire::fields::Unknown;
use ovl_subsystems::encryption::tunnel::Gate;
use ovl_subsystems::networks::filter;
use ovl_tunnel::{PrivateKey, public_key};
use tokio::sync::mpsc;

use super::lab::{GROUP, Lab, bridge, desired, in_namespace, ip, mac, net, run, underlay, vxlan};
use crate::start;

const PRIVATE: [u8; 32] = [8; 32];

fn lab() -> Lab {
    let (sender, events) = mpsc::channel(16);
    Lab { kernel: start(sender, vec![PrivateKey(PRIVATE)]).expect("worker"), events }
}

fn end() -> Device {
    Device::tunnel(false)
}

/// The network of [`desired`] as an encrypted network, with two peers.
fn sealed() -> Dataplane {
    let plain = desired(ip("192.0.2.1"), 0);
    let mut kernel = Dataplane { addresses: plain.addresses, ..Dataplane::default() };
    let (here, bridge_link) = (ip("fd01::1"), plain.links[&bridge()]);
    kernel.links.insert(bridge(), bridge_link);
    let tap = Link::Tap { vni: 4097, mtu: 1300, master: Some(bridge()), up: true, tuned: true };
    kernel.links.insert(vxlan(), tap);
    kernel.links.insert(end(), Link::Tunnel { kind: TunnelKind::Userspace, mtu: 1420, up: true });
    kernel.addresses.insert((end(), here.into()));
    let key = TunnelKey(public_key(&PrivateKey(PRIVATE)));
    kernel.tunnels.insert(end(), Tunnel { key, port: 51940, local: Some(ip("192.0.2.1")) });
    kernel.routes.insert(net("fd01::/48"), Hop::UNREACHABLE);
    for n in 2..4_u8 {
        let there = ip(&format!("fd01::{n}"));
        let peer = TunnelPeer {
            endpoint: SocketAddr::new(IpAddr::from([192, 0, 2, n]), 51940),
            allowed: [there.into(), net(&format!("10.2.{n}.0/24"))].into(),
        };
        kernel.tunnel_peers.insert((end(), TunnelKey([n; 32])), peer);
        let hop = Hop { device: Some(end()), gateway: None, source: Some(here), mtu: None };
        kernel.routes.insert(there.into(), hop);
        let (remote, mac) = (Remote { vtep: there, port: SEALED_VXLAN_PORT }, mac(n.into()));
        kernel.remotes.insert((vxlan(), mac), remote);
        kernel.floods.insert((vxlan(), remote));
        kernel.groups.insert((vxlan(), GROUP, remote));
        kernel.ports.insert((vxlan(), mac));
        let addresses = [IpAddr::from([10, 1, 0, n])].into();
        kernel.sources.insert((vxlan(), mac), Source { from: [there].into(), addresses });
        kernel.neighbours.insert((bridge(), IpAddr::from([10, 1, 0, n])), mac);
    }
    kernel
}

#[test]
fn engine_devices_are_created_dumped_and_repaired() {
    in_namespace(async || {
        let mut lab = lab();
        let wanted = sealed();
        lab.pass(&wanted).await;
        lab.assert_settled(&wanted).await;
        assert_eq!(lab.events().await, [], "ovld made this change");
        let (end, tap) = (end(), vxlan());
        let m2 = mac(2);
        for line in [
            format!("ip link del {tap}"),
            format!("ip link del {end}"),
            format!("ip link set {tap} down"),
            format!("ip link set {end} down"),
            format!("ip link set {tap} mtu 1280"),
            format!("ip link set {end} mtu 1280"),
            format!("ip link set {tap} nomaster"),
            format!("bridge link set dev {tap} learning on"),
            format!("bridge fdb del {m2} dev {tap} master"),
            format!("ip addr del fd01::1/128 dev {end}"),
            format!("ip addr add fd01::9/128 dev {end}"),
            "ip route del fd01::2 proto 79".to_owned(),
            "ip route del fd01::/48 proto 79".to_owned(),
        ] {
            run(&line);
            assert!(!lab.events().await.is_empty(), "not noticed: {line}");
            assert!(!lab.pass(&wanted).await.is_empty(), "no operation after: {line}");
            lab.assert_settled(&wanted).await;
            lab.events().await;
        }
    });
}

#[test]
fn tunnel_entries_change_one_by_one_and_are_deleted_with_the_device() {
    in_namespace(async || {
        let mut lab = lab();
        let mut wanted = sealed();
        lab.pass(&wanted).await;
        wanted.tunnel_peers.retain(|(_, key), _| *key != TunnelKey([3; 32]));
        wanted.floods.retain(|(_, remote)| remote.vtep != ip("fd01::3"));
        wanted.groups.retain(|(_, _, remote)| remote.vtep != ip("fd01::3"));
        wanted.remotes.remove(&(vxlan(), mac(3)));
        wanted.sources.remove(&(vxlan(), mac(3)));
        wanted.routes.remove(&net("fd01::3/128"));
        let ops: Vec<String> = lab.pass(&wanted).await.iter().map(ToString::to_string).collect();
        assert_eq!(ops.len(), 6, "{ops:?}");
        lab.assert_settled(&wanted).await;
        let status = lab.kernel.tunnels().await.expect("status");
        assert_eq!(status.iter().flat_map(|end| &end.peers).count(), 1);
        // Another port and another VNI.
        wanted.tunnels.values_mut().for_each(|tunnel| tunnel.port = 51999);
        if let Some(Link::Tap { vni, .. }) = wanted.links.get_mut(&vxlan()) {
            *vni = 77;
        }
        lab.pass(&wanted).await;
        lab.assert_settled(&wanted).await;
        assert_eq!(lab.events().await, [], "ovld made this change");
        lab.pass(&Dataplane::default()).await;
        lab.assert_settled(&Dataplane::default()).await;
        assert_eq!(run("ip -br link show type tun"), "");
        assert!(lab.kernel.tunnels().await.expect("status").is_empty());
        // All devices are deleted with the worker.
        lab.pass(&wanted).await;
        assert_ne!(run("ip -br link show type tun"), "");
        drop(lab);
        while !run("ip -br link show type tun").is_empty() {
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn vxlan_device_in_a_tunnel_has_no_udp_checksums() {
    in_namespace(async || {
        let lab = Lab::start();
        let mut wanted = desired(ip("2001:db8:ffff::1"), 3);
        lab.pass(&wanted).await;
        if let Some(Link::Vxlan { sealed, .. }) = wanted.links.get_mut(&vxlan()) {
            *sealed = true;
        }
        let ops = lab.pass(&wanted).await;
        assert!(ops.contains(&Op::Link(LinkOp::Delete(vxlan()))), "{ops:?}");
        lab.assert_settled(&wanted).await;
        let shown = run(&format!("ip -d link show {}", vxlan()));
        assert!(shown.contains("udp6zerocsumtx udp6zerocsumrx"), "{shown}");
    });
}

#[test]
fn error_names_a_port_in_use_and_no_device_remains() {
    in_namespace(async || {
        let _taken = std::net::UdpSocket::bind("192.0.2.1:51940").expect("free");
        let lab = lab();
        let ops = ovl_dataplane::diff::diff(&lab.dump().await, &sealed(), true);
        let outcomes = lab.kernel.apply(ops).await;
        let error = outcomes.into_iter().find_map(|outcome| match outcome.op {
            Op::Link(LinkOp::Add(device, _)) if device == end() => outcome.result.err(),
            _ => None,
        });
        let error = error.expect("refused").to_string();
        assert!(error.contains("tunnel_port"), "{error}");
        assert!(!lab.dump().await.links.contains_key(&end()));
    });
}

#[test]
fn nft_accepts_the_filter_of_encrypted_networks() {
    in_namespace(async || {
        let lab = Lab::start();
        let network = |n: u8, mode, encrypted, internal, subnets: [&str; 2]| Network {
            id: NetworkId([n; 5]),
            name: format!("n{n}"),
            created: Stamp::default(),
            driver: Driver::Overlay,
            mode,
            vni: 4097 + u32::from(n),
            subnets: subnets.into_iter().map(|s| ipam::new_subnet(net(s)).expect("subnet")).collect(),
            mtu: None,
            encrypted,
            auto_encrypt: false,
            internal,
            backend: Backend::Vxlan,
            names: true,
            on_demand: false,
            external_names: false,
            unknown: Unknown::default(),
        };
        let all = [
            network(1, Mode::L2, true, false, ["10.1.0.0/16", "fd01::/64"]),
            network(2, Mode::L3, true, false, ["10.2.0.0/16", "fd02::/48"]),
            network(3, Mode::L2, true, true, ["10.3.0.0/16", "fd03::/64"]),
            network(4, Mode::L2, false, false, ["10.4.0.0/16", "fd04::/64"]),
        ];
        let prefix = net("fd99:1:2::/48");
        for kernel in [true, false] {
            for masquerade in [true, false] {
                for (tunnel, count) in [(true, 4), (true, 3), (true, 0), (false, 3)] {
                    let tunnel = tunnel.then_some(Gate { port: 51940, prefix, kernel });
                    let networks: Vec<&Network> = all.iter().take(count).collect();
                    let vxlan = networks.iter().any(|network| filter::has_vxlan(network));
                    let text =
                        filter::render(&networks, &underlay(&["192.0.2.2"], vxlan), tunnel, masquerade, &[]);
                    let op = Op::Nft(NftOp::SetBase(text.clone()));
                    lab.kernel
                        .apply(vec![op])
                        .await
                        .remove(0)
                        .result
                        .unwrap_or_else(|e| panic!("{e}\n{text}"));
                    assert_eq!(lab.dump().await.filter, Some(text));
                }
            }
        }
    });
}
