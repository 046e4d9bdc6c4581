//! Tests of the desired data plane of encrypted networks and of the tunnel.

use std::net::IpAddr;

use ovl_cluster::addresses;
use ovl_cluster::view::View;
use ovl_dataplane::device::Device;
use ovl_dataplane::diff::diff;
use ovl_dataplane::state::{Dataplane, Hop, Link, TunnelKind};
use ovl_proto::alloc::Block;
use ovl_proto::object::{Backend, Mode};
use ovl_proto::record::{PeerState, name_address};
use ovl_proto::table::{Endpoint, Entry};
use ovl_subsystems::Settings;
use ovl_subsystems::encryption::tunnel;
use ovl_subsystems::local::Local;
use ovl_subsystems::networks::mtu::network_mtu;

use super::host::{desired, desired_with, settings};
use super::world::{NET, encrypt, encrypt_if_needed, endpoint, give, id, net, switched, tunnel_key, view_of};

fn here(n: u8) -> String {
    tunnel::address(1, id(n)).to_string()
}

/// Returns the commands of networks and the tunnel, with short names.
fn commands(view: &View) -> Vec<String> {
    diff(&Dataplane::default(), &desired(view, &Local::default()), true)
        .iter()
        .map(ToString::to_string)
        .filter(|text| !text.starts_with("sysctl") && !text.starts_with("nft"))
        .map(|text| (1..=3).fold(text, |text, n| text.replace(&here(n), &format!("T{n}"))))
        .map(|text| {
            (1..=3).fold(text, |text, n| text.replace(&tunnel_key(n).to_string(), &format!("KEY{n}")))
        })
        .map(|text| text.replace("-00000000", "").replace(&tunnel::prefix(1).to_string(), "CLUSTER"))
        .collect()
}

fn with(commands: &[String], part: &str) -> Vec<String> {
    commands.iter().filter(|text| text.contains(part)).cloned().collect()
}

fn encrypted_switched(kernel: bool) -> View {
    let mut view = switched();
    encrypt(&mut view, kernel);
    give(&mut view, 1, vec![endpoint(1, "10.9.0.9/24")]);
    give(&mut view, 2, vec![endpoint(2, "10.9.0.17/24")]);
    view
}

fn encrypted_routed() -> View {
    let subnet = addresses::new_routed_subnet(net("10.60.0.0/16"), None).unwrap();
    let mut view = view_of(Mode::L3, Backend::Vxlan, subnet, |n| net(&format!("10.60.{n}.0/24")));
    encrypt(&mut view, false);
    view
}

#[test]
fn the_tunnel_has_an_address_a_peer_and_a_route_for_each_member() {
    let all = commands(&encrypted_switched(false));
    assert_eq!(
        with(&all, "ovt"),
        [
            "ip tuntap add ovt-0 mode tun vnet_hdr && ip link set ovt-0 mtu 1440 up",
            "ip addr replace T1/128 dev ovt-0",
            "wg set ovt-0 listen-port 51940 private-key FILE # of KEY1",
            "wg set ovt-0 peer KEY2 endpoint 192.168.77.2:51940 allowed-ips T2/128",
            "wg set ovt-0 peer KEY3 endpoint 192.168.77.3:51940 allowed-ips T3/128",
            "ip route replace T2/128 dev ovt-0 scope link src T1 proto 79 metric 79",
            "ip route replace T3/128 dev ovt-0 scope link src T1 proto 79 metric 79",
        ]
    );
    assert_eq!(with(&all, "unreachable"), ["ip route replace unreachable CLUSTER proto 79 metric 79"]);
    let dataplane = desired(&encrypted_switched(true), &Local::default());
    let device = Device::tunnel(false);
    assert_eq!(dataplane.links[&device], Link::Tunnel { kind: TunnelKind::Kernel, mtu: 1440, up: true });
    assert_eq!(dataplane.tunnels[&device].local, None);
}

/// Local state of a host that reaches host 3 by a detour.
fn with_a_detour() -> Local {
    let mut local = Local::default();
    local.detours.replace([((id(3), false), ([192, 0, 2, 1], 40_000).into())].into());
    local
}

#[test]
fn hosts_without_a_path_in_plain_text_are_sent_to_through_the_tunnel() {
    for kernel in [true, false] {
        let mut view = switched();
        encrypt_if_needed(&mut view, kernel);
        give(&mut view, 1, vec![endpoint(1, "10.9.0.9/24")]);
        give(&mut view, 2, vec![endpoint(2, "10.9.0.17/24")]);
        give(&mut view, 3, vec![endpoint(3, "10.9.0.25/24")]);
        let (plain, sealed) = (Device::vxlan(NET), Device::sealed_vxlan(NET));
        let exits = |local: &Local| {
            let dataplane = desired(&view, local);
            assert_eq!(dataplane.sources.keys().filter(|(device, _)| *device == sealed).count(), 2);
            assert_eq!(dataplane.sources.len(), 2, "what comes in plain text is accepted as well");
            assert!(matches!(dataplane.links[&plain], Link::Vxlan { sealed: false, .. }));
            assert_eq!(matches!(dataplane.links[&sealed], Link::Vxlan { sealed: true, .. }), kernel);
            [2, 3].map(|n| {
                let mac = addresses::mac_of(NET, net(&format!("10.9.0.{}/24", 8 * n + 1)).addr());
                let on = |device: Device| {
                    let is_remote = dataplane.remotes.contains_key(&(device, mac));
                    let is_flooded = dataplane.floods.iter().filter(|(at, _)| *at == device).count();
                    (is_remote && dataplane.ports.contains(&(device, mac)), is_flooded)
                };
                (on(plain), on(sealed))
            })
        };
        assert_eq!(exits(&Local::default()), [((true, 2), (false, 0)); 2]);
        assert_eq!(exits(&with_a_detour()), [((true, 1), (false, 1)), ((false, 1), (true, 1))]);
        view.nodes.get_mut(&id(2)).unwrap().record.address = (name_address(id(2)), 7940).into();
        let mut through = desired(&view, &Local::default()).floods.into_iter().map(|(device, _)| device);
        assert!(through.any(|device| device == sealed), "there is NAT between");
    }
}

#[test]
fn blocks_of_hosts_without_a_path_in_plain_text_are_routed_into_the_tunnel() {
    let mut view = encrypted_routed();
    encrypt_if_needed(&mut view, false);
    give(&mut view, 1, vec![]);
    let dataplane = desired(&view, &with_a_detour());
    let device = |n: u8| dataplane.routes[&net(&format!("10.60.{n}.0/24"))].device;
    assert_eq!((device(2), device(3)), (Some(Device::vxlan(NET)), Some(Device::tunnel(false))));
    for n in [2, 3] {
        let peer = &dataplane.tunnel_peers[&(Device::tunnel(false), tunnel_key(n))];
        assert!(peer.allowed.contains(&net(&format!("10.60.{n}.0/24"))), "it may come either way");
    }
    let text = dataplane.filter.unwrap();
    assert!(text.contains("iifname \"ovt-*\" ip saddr 10.60.0.0/16 ip daddr 10.60.0.0/16 accept"), "{text}");
    assert!(!text.contains("daddr 10.60.0.0/16 oifname"), "it may leave in plain text: {text}");
    let mtus = [encrypted_routed(), view].map(|view| network_mtu(&view, &view.networks[&NET].network));
    assert_eq!(mtus[0], mtus[1], "what fits must fit either way");
}

#[test]
fn what_a_remote_endpoint_is_allowed_is_accepted_while_no_other_has_it() {
    let mut view = encrypted_switched(false);
    let allow = |n: u8, address: &str| {
        let Entry::Endpoint(bare) = endpoint(n, address) else { panic!() };
        let allowed = ["10.9.0.200/32", "10.9.0.1/32", "10.9.0.64/28", "192.0.2.1/32"].map(net).into();
        let allowed_macs = vec!["00:00:5e:00:01:07".parse().unwrap()];
        Entry::Endpoint(Endpoint { allowed, allowed_macs, ..bare })
    };
    let sources = |view: &View| with(&commands(view), "frames from");
    // Neither the gateway, nor prefixes, nor what is in no subnet.
    give(&mut view, 2, vec![allow(2, "10.9.0.17/24")]);
    give(&mut view, 3, vec![allow(3, "10.9.0.25/24")]);
    assert_eq!(
        sources(&view),
        [
            "# ovx: frames from 00:00:5e:00:01:07 are T2's T3's 10.9.0.17 10.9.0.25 10.9.0.200",
            "# ovx: frames from 02:f1:0a:09:00:11 are T2's 10.9.0.17 10.9.0.200",
            "# ovx: frames from 02:f1:0a:09:00:19 are T3's 10.9.0.25 10.9.0.200",
        ]
    );
    // An endpoint that has the address, and one that has the MAC address.
    let Entry::Endpoint(owner) = endpoint(4, "10.9.0.10/24") else { panic!() };
    let mut owner = Endpoint { mac: "00:00:5e:00:01:07".parse().unwrap(), ..owner };
    give(&mut view, 1, vec![Entry::Endpoint(owner.clone())]);
    assert_eq!(sources(&view).len(), 2);
    owner.mac = "02:00:00:00:00:01".parse().unwrap();
    owner.addresses = vec![net("10.9.0.200/24")];
    view.alloc.blocks.insert(Block { network: NET, prefix: net("10.9.0.200/29") }, id(1));
    give(&mut view, 1, vec![Entry::Endpoint(owner)]);
    assert_eq!(
        sources(&view),
        [
            "# ovx: frames from 00:00:5e:00:01:07 are T2's T3's 10.9.0.17 10.9.0.25",
            "# ovx: frames from 02:f1:0a:09:00:11 are T2's 10.9.0.17",
            "# ovx: frames from 02:f1:0a:09:00:19 are T3's 10.9.0.25",
        ]
    );
}

#[test]
fn a_switched_network_has_a_tap_with_sources_or_a_vxlan_device_in_the_tunnel() {
    for (kernel, device) in [
        (
            false,
            "ip tuntap add ovx mode tap vnet_hdr && ip link set ovx mtu 1370 master ovb up && bridge link set dev ovx \
             learning off neigh_suppress off isolated on mcast_router 2",
        ),
        (
            true,
            "ip link add ovx address 0e:00:00:00:00:00 mtu 1370 master ovb up type vxlan id 5000 local T1 dstport 51942 \
             nolearning udp6zerocsumtx udp6zerocsumrx && bridge link set dev ovx learning off neigh_suppress off \
             isolated on mcast_router 2",
        ),
    ] {
        let all = commands(&encrypted_switched(kernel));
        assert_eq!(
            with(&all, "ovx"),
            [
                device,
                "bridge fdb replace 02:f1:0a:09:00:11 dev ovx master static",
                "bridge fdb replace 02:f1:0a:09:00:11 dev ovx self static dst T2 port 51942",
                "bridge fdb append 00:00:00:00:00:00 dev ovx self static dst T2 port 51942",
                "# ovx: frames from 02:f1:0a:09:00:11 are T2's 10.9.0.17",
            ]
        );
    }
}

#[test]
fn a_routed_network_uses_the_tunnel_without_vxlan() {
    let view = encrypted_routed();
    let all = commands(&view);
    assert!(with(&all, "ovx").is_empty(), "{all:?}");
    assert_eq!(
        with(&all, "10.60.2.0/24"),
        [
            "wg set ovt-0 peer KEY2 endpoint 192.168.77.2:51940 allowed-ips 10.60.2.0/24,T2/128",
            "ip route replace 10.60.2.0/24 dev ovt-0 scope link src 10.60.1.1 proto 79 metric 79",
        ]
    );
    assert_eq!(
        with(&all, "unreachable 10.60"),
        [
            "ip route replace unreachable 10.60.0.0/16 proto 79 metric 79",
            "ip route replace unreachable 10.60.1.0/24 proto 79 metric 79",
        ]
    );
}

#[test]
fn without_a_tunnel_there_is_no_route() {
    for mut view in [encrypted_switched(false), encrypted_routed()] {
        view.nodes.get_mut(&id(1)).unwrap().record.tunnel = None;
        let dataplane = desired(&view, &Local::default());
        let is_carrier =
            |link: &Link| matches!(link, Link::Tap { .. } | Link::Vxlan { .. } | Link::Tunnel { .. });
        assert!(!dataplane.links.values().any(is_carrier), "{:?}", dataplane.links);
        assert!(
            dataplane.remotes.is_empty() && dataplane.floods.is_empty() && dataplane.tunnel_peers.is_empty()
        );
        let own = |(to, _): &(&ipnet::IpNet, &Hop)| net("10.60.1.0/24").contains(&to.addr());
        let out = dataplane.routes.iter().filter(|route| !own(route)).map(|(_, hop)| hop);
        assert!(out.clone().all(|hop| *hop == Hop::UNREACHABLE), "{:?}", dataplane.routes);
        let filter = dataplane.filter.unwrap();
        assert!(filter.contains("udp dport 51942 fib daddr type != unicast counter drop"), "{filter}");
    }
}

#[test]
fn only_live_members_with_a_key_of_their_own_are_peers() {
    let peers = |view: &View| desired(view, &Local::default()).tunnel_peers.len();
    let mut view = encrypted_switched(false);
    assert_eq!(peers(&view), 2);
    for (state, expected) in [(PeerState::Suspect, 2), (PeerState::Dead, 1), (PeerState::Left, 1)] {
        view.nodes.get_mut(&id(2)).unwrap().state = state;
        assert_eq!(peers(&view), expected, "{state}");
    }
    view.nodes.get_mut(&id(2)).unwrap().state = PeerState::Alive;
    view.alloc.members.remove(&id(2));
    assert_eq!(peers(&view), 1, "forgotten");
    assert!(desired(&view, &Local::default()).remotes.is_empty());
    view.alloc.members.insert(id(2));
    // The host publishes the key of another host.
    view.nodes.get_mut(&id(3)).unwrap().record.tunnel.as_mut().unwrap().key = tunnel_key(2);
    assert_eq!(tunnel::copies(&view), [id(3)].into());
    let dataplane = desired(&view, &Local::default());
    let endpoints: Vec<IpAddr> = dataplane.tunnel_peers.values().map(|peer| peer.endpoint.ip()).collect();
    assert_eq!(endpoints, [IpAddr::from([192, 168, 77, 2])]);
    // The same for the key of the local host.
    view.nodes.get_mut(&id(3)).unwrap().record.tunnel.as_mut().unwrap().key = tunnel_key(1);
    assert_eq!(peers(&view), 1);
    view.alloc.members.remove(&id(1));
    assert_eq!(peers(&view), 0, "the local host is no member");
}

#[test]
fn a_peer_is_deleted_even_before_gossip_has_caught_up() {
    let mut view = encrypted_switched(false);
    let before = desired(&view, &Local::default());
    view.alloc.members.remove(&id(3));
    let ops = diff(&before, &desired(&view, &Local::default()), false);
    let removed = format!("wg set ovt-0 peer {} remove", tunnel_key(3));
    assert!(ops.iter().any(|op| op.to_string() == removed), "{ops:?}");
}

#[test]
fn the_mtu_leaves_room_for_every_header() {
    let mtu = |view: &View| network_mtu(view, &view.networks[&NET].network);
    for (v6, switched_mtu, routed_mtu) in [(false, 1370, 1440), (true, 1350, 1420)] {
        for (mut view, expected) in
            [(encrypted_switched(false), switched_mtu), (encrypted_routed(), routed_mtu)]
        {
            if v6 {
                for (n, node) in (1..).zip(view.nodes.values_mut()) {
                    node.record.vtep = [0xfd77, 0, 0, 0, 0, 0, 0, n].into();
                }
            }
            assert_eq!(mtu(&view), expected);
        }
    }
    let mut view = encrypted_switched(false);
    give(&mut view, 2, vec![Entry::PathMtu { peer: id(1), mtu: 1450 }]);
    // WireGuard pads what is shorter than the interface's MTU to a multiple of 16: here to 1376.
    assert_eq!(mtu(&view), 1306);
    let to = net(&format!("{}/128", here(2)));
    assert_eq!(desired(&view, &Local::default()).routes[&to].mtu, Some(1376));
}

#[test]
fn no_unencrypted_packet_is_accepted_or_sent() {
    let mut view = encrypted_routed();
    let filter = desired(&view, &Local::default()).filter.unwrap();
    for rule in [
        "iifname \"ovt-*\" ip saddr 10.60.0.0/16 ip daddr 10.60.0.0/16 accept",
        "iifname \"ovt-*\" counter drop",
        "ip daddr 10.60.0.0/16 iifname != \"ove-*\" iifname != \"ovb-*\" iifname != \"ovt-*\" iifname != \"lo\" counter drop",
        "ip saddr 10.60.0.0/16 fib saddr . iif oif missing counter drop",
        "ip daddr 10.60.0.0/16 oifname != \"ove-*\" oifname != \"ovb-*\" oifname != \"ovt-*\" oifname != \"lo\" counter drop",
        "ip saddr 10.60.0.0/16 ip daddr != 10.60.0.0/16 oifname != \"ovb-*\" oifname != \"ove-*\" masquerade",
    ] {
        assert!(filter.contains(rule), "{rule}\n{filter}");
    }
    let place = |text: &str| filter.find(text).unwrap_or_else(|| panic!("{text}\n{filter}"));
    assert!(place("10.60.0.0/16 accept") < place("iifname \"ovt-*\" counter drop"));
    assert!(!filter.contains("vteps4") && !filter.contains("4789"), "unencrypted VXLAN: {filter}");
    let settings = Settings { masquerade: false, ..settings() };
    let unmasked = desired_with(&view, &Local::default(), settings).filter.unwrap();
    assert!(
        unmasked.contains("oifname != \"lo\" ct status ! dnat reject with icmpx admin-prohibited"),
        "{unmasked}"
    );
    // A network without encryption has none of this.
    view.networks.get_mut(&NET).unwrap().network.encrypted = false;
    let plain = desired(&view, &Local::default());
    assert!(plain.tunnels.is_empty());
    assert!(!plain.filter.unwrap().contains("51942"));
}
