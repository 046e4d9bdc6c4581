//! Tests of the desired data plane of a routed network, as the commands that would create it.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_cluster::addresses;
use ovl_cluster::table::Table;
use ovl_cluster::view::{Node, View};
use ovl_dataplane::diff::diff;
use ovl_dataplane::state::Dataplane;
use ovl_proto::alloc::Block;
use ovl_proto::id::EndpointId;
use ovl_proto::object::{Backend, Mode, Subnet};
use ovl_proto::record::PeerState;
use ovl_proto::table::Entry;
use ovl_subsystems::local::Local;
use proptest::prelude::*;

use super::host::{desired, isolation, underlay};
use super::world::{NET, endpoint, give, id, net, view_of};

/// Host n holds 10.60.n.0/24 of 10.60.0.0/16.
fn view(backend: Backend) -> View {
    let subnet = addresses::new_routed_subnet(net("10.60.0.0/16"), None).unwrap();
    view_of(Mode::L3, backend, subnet, |n| net(&format!("10.60.{n}.0/24")))
}

fn peer(view: &mut View, n: u8) -> &mut Node {
    view.nodes.get_mut(&id(n)).unwrap()
}

fn local() -> Local {
    Local { underlay: underlay(net("192.168.77.0/24")), ..Local::default() }
}

/// Returns the commands without those of the host as a whole, and with short names.
fn commands_of(view: &View, local: &Local) -> Vec<String> {
    let mac = |n: u8| addresses::mac_of_host(NET, id(n)).to_string();
    let desired = desired(view, local);
    // Attach creates the devices of endpoints.
    let found = Dataplane {
        links: desired
            .links
            .clone()
            .into_iter()
            .filter(|(device, _)| device.as_str().starts_with("ove-"))
            .collect(),
        ..Dataplane::default()
    };
    diff(&found, &desired, true)
        .iter()
        .map(ToString::to_string)
        .filter(|text| !text.starts_with("sysctl") && !text.starts_with("nft"))
        .map(|text| (1..=3).fold(text, |text, n| text.replace(&mac(n), &format!("MAC{n}"))))
        .map(|text| text.replace("-00000000", ""))
        .collect()
}

fn commands(view: &View) -> Vec<String> {
    commands_of(view, &local())
}

/// Returns the routes, without the words that all of them have.
fn routes(commands: &[String]) -> Vec<String> {
    let made = commands.iter().filter_map(|text| text.strip_prefix("ip route replace "));
    made.map(|text| text.strip_suffix(" proto 79 metric 79").unwrap().to_owned()).collect()
}

#[test]
fn with_vxlan_each_remote_host_has_a_route_a_neighbour_and_an_fdb_entry() {
    let mut view = view(Backend::Vxlan);
    // Whatever the number of its endpoints.
    give(&mut view, 2, (1..=20).map(|n| endpoint(n, &format!("10.60.2.{}/32", n + 1))).collect());
    let all = commands(&view);
    assert_eq!(
        routes(&all),
        [
            "unreachable 10.60.0.0/16",
            "unreachable 10.60.1.0/24",
            "10.60.2.0/24 via 10.60.2.1 dev ovx onlink src 10.60.1.1",
            "10.60.3.0/24 via 10.60.3.1 dev ovx onlink src 10.60.1.1",
        ]
    );
    let rest: Vec<&String> = all.iter().filter(|text| !text.contains("ip route")).collect();
    let with = |text: &str| rest.iter().filter(|line| line.contains(text)).count();
    assert_eq!(with("bridge fdb replace MAC2 dev ovx self static dst 192.168.77.2 port 4789"), 1, "{rest:?}");
    assert_eq!(with("bridge fdb replace MAC3 dev ovx self static dst 192.168.77.3 port 4789"), 1, "{rest:?}");
    assert_eq!(with("ip neigh replace 10.60.2.1 lladdr MAC2 dev ovx nud permanent"), 1, "{rest:?}");
    assert_eq!(with("ip neigh replace 10.60.3.1 lladdr MAC3 dev ovx nud permanent"), 1, "{rest:?}");
    assert_eq!(with("ip addr replace 10.60.1.1/32 dev ovb"), 1, "{rest:?}");
    assert_eq!(with("ip link add ovx address MAC1 mtu 1450 up type vxlan"), 1, "{rest:?}");
    assert_eq!((with("fdb"), with("neigh"), with("ip addr"), with("ip link add")), (2, 2, 1, 2), "{rest:?}");
}

#[test]
fn the_direct_backend_has_on_link_routes_and_nothing_else() {
    let all = commands(&view(Backend::Direct));
    // Blocks that no host holds have no route: routers may know them.
    assert_eq!(
        routes(&all),
        [
            "unreachable 10.60.1.0/24",
            "10.60.2.0/24 via 192.168.77.2 src 10.60.1.1",
            "10.60.3.0/24 via 192.168.77.3 src 10.60.1.1",
        ]
    );
    assert!(!all.iter().any(|text| text.contains("ovx") || text.contains("neigh")), "{all:?}");
}

#[test]
fn a_host_that_is_not_on_link_is_left_to_routers_or_reached_by_vxlan() {
    for (backend, expected) in [
        (Backend::Direct, &[][..]),
        (Backend::Auto, &["10.60.3.0/24 via 10.60.3.1 dev ovx onlink src 10.60.1.1 mtu 1450"][..]),
    ] {
        let mut view = view(backend);
        peer(&mut view, 3).record.vtep = [192, 168, 78, 3].into();
        let all = commands(&view);
        let to = |block: &str| -> Vec<String> {
            routes(&all).into_iter().filter(|text| text.starts_with(block)).collect()
        };
        assert_eq!(to("10.60.2.0/24"), ["10.60.2.0/24 via 192.168.77.2 src 10.60.1.1"]);
        assert_eq!(to("10.60.3.0/24"), expected);
        let entries = all.iter().filter(|text| text.contains("MAC3")).count();
        assert_eq!(entries, 2 * expected.len(), "{all:?}");
        assert!(!all.iter().any(|text| text.contains("MAC2")), "{all:?}");
    }
}

#[test]
fn auto_uses_vxlan_for_the_other_address_family() {
    let mut view = view(Backend::Auto);
    let network = &mut view.networks.get_mut(&NET).unwrap().network;
    network.subnets.push(addresses::new_routed_subnet(net("fd60::/48"), None).unwrap());
    for n in 1..=2 {
        let block = Block { network: NET, prefix: net(&format!("fd60:0:0:{n}::/64")) };
        view.alloc.blocks.insert(block, id(n));
    }
    let all = routes(&commands(&view));
    assert!(all.contains(&"10.60.2.0/24 via 192.168.77.2 src 10.60.1.1".to_owned()), "{all:?}");
    let in_vxlan = "fd60:0:0:2::/64 via fd60:0:0:2::1 dev ovx onlink src fd60:0:0:1::1 mtu 1450";
    assert!(all.contains(&in_vxlan.to_owned()), "{all:?}");
    // A host with an underlay address of the other family is not reached at all.
    peer(&mut view, 2).record.vtep = "fd77::2".parse().unwrap();
    let all = routes(&commands(&view));
    assert!(
        !all.iter().any(|text| text.contains("10.60.2.0/24") || text.contains("fd60:0:0:2::")),
        "{all:?}"
    );
}

#[test]
fn an_endpoint_has_a_route_and_a_neighbour_on_its_own_device() {
    let mut view = view(Backend::Vxlan);
    give(&mut view, 1, vec![endpoint(7, "10.60.1.9/32")]);
    let device = ovl_dataplane::device::Device::endpoint(EndpointId([7; 5]));
    let all = commands(&view);
    assert!(
        all.contains(&format!(
            "ip neigh replace 10.60.1.9 lladdr {} dev {device} nud permanent",
            addresses::mac_of(NET, "10.60.1.9".parse().unwrap())
        )),
        "{all:?}"
    );
    assert!(routes(&all).contains(&format!("10.60.1.9/32 dev {device} scope link src 10.60.1.1")), "{all:?}");
    // For answers to queries of clients that are bound to 127.0.0.1.
    assert!(all.iter().any(|text| text.starts_with("ip neigh replace 127.0.0.1 lladdr ")), "{all:?}");
    // An isolated endpoint keeps only its device.
    let isolated = Local { isolation: isolation([EndpointId([7; 5])]), ..local() };
    let mut taken = view.clone();
    taken.alloc.blocks.insert(Block { network: NET, prefix: net("10.60.1.0/24") }, id(2));
    for (view, local) in [(&view, &isolated), (&taken, &local())] {
        let all = commands_of(view, local);
        let device = device.to_string();
        assert!(desired(view, local).links.keys().any(|link| link.to_string() == device));
        assert!(!all.iter().any(|text| text.contains("10.60.1.9") || text.contains("127.0.0.1")), "{all:?}");
    }
}

#[test]
fn a_block_of_a_dead_host_is_unreachable() {
    let mut dead = view(Backend::Vxlan);
    peer(&mut dead, 2).state = PeerState::Dead;
    let mut left = view(Backend::Vxlan);
    peer(&mut left, 2).state = PeerState::Left;
    let mut no_member = view(Backend::Vxlan);
    no_member.alloc.members.remove(&id(2));
    for view in [dead, left, no_member] {
        let all = commands(&view);
        assert!(!all.iter().any(|text| text.contains("10.60.2.") || text.contains("MAC2")), "{all:?}");
        assert!(all.iter().any(|text| text.contains("MAC3")), "{all:?}");
    }
    // The block of a suspect host keeps its route.
    let mut suspect = view(Backend::Vxlan);
    peer(&mut suspect, 2).state = PeerState::Suspect;
    assert_eq!(commands(&suspect), commands(&view(Backend::Vxlan)));
}

#[test]
fn a_host_without_a_block_has_nothing_of_the_network() {
    let mut view = view(Backend::Vxlan);
    view.alloc.blocks.retain(|_, holder| *holder != id(1));
    let desired = Dataplane { filter: None, ..desired(&view, &local()) };
    assert_eq!(desired, Dataplane::default());
}

#[test]
fn a_route_has_an_mtu_if_the_path_carries_less() {
    for (backend, narrow, narrower, small) in [
        (Backend::Vxlan, " mtu 1350", " mtu 1300", " mtu 850"),
        (Backend::Direct, " mtu 1400", " mtu 1350", " mtu 900"),
        (Backend::Auto, " mtu 1400", " mtu 1350", " mtu 900"),
    ] {
        let mut view = view(backend);
        let to_h2 = |view: &View| -> String {
            routes(&commands(view)).into_iter().find(|text| text.starts_with("10.60.2.0/24 via")).unwrap()
        };
        assert!(!to_h2(&view).contains("mtu"), "{}", to_h2(&view));
        peer(&mut view, 2).record.link_mtu = 1400;
        assert!(to_h2(&view).ends_with(narrow), "{}", to_h2(&view));
        // The path MTU that either of the two hosts found counts.
        give(&mut view, 2, vec![Entry::PathMtu { peer: id(1), mtu: 1350 }]);
        assert!(to_h2(&view).ends_with(narrower), "{}", to_h2(&view));
        // A route for IPv4 may carry less than IPv6 allows, down to what every host accepts.
        peer(&mut view, 2).record.link_mtu = 900;
        assert!(to_h2(&view).ends_with(small), "{}", to_h2(&view));
        peer(&mut view, 2).record.link_mtu = 577;
        assert!(to_h2(&view).contains(" mtu 57"), "{}", to_h2(&view));
        // A larger path MTU changes nothing.
        peer(&mut view, 2).table = Table::new(id(2));
        peer(&mut view, 2).record.link_mtu = 9000;
        assert!(!to_h2(&view).contains("mtu"), "{}", to_h2(&view));
    }
}

#[test]
fn each_block_has_a_gateway_and_the_first_is_the_next_hop() {
    let mut view = view(Backend::Vxlan);
    for (n, block) in [(1, "10.60.8.0/24"), (2, "10.60.9.0/24")] {
        view.alloc.blocks.insert(Block { network: NET, prefix: net(block) }, id(n));
    }
    let all = commands(&view);
    let found = routes(&all);
    for expected in [
        "unreachable 10.60.8.0/24",
        "10.60.2.0/24 via 10.60.2.1 dev ovx onlink src 10.60.1.1",
        "10.60.9.0/24 via 10.60.2.1 dev ovx onlink src 10.60.1.1",
    ] {
        assert!(found.contains(&expected.to_owned()), "{expected}: {found:?}");
    }
    assert_eq!(all.iter().filter(|text| text.contains("lladdr MAC2")).count(), 1, "{all:?}");
    assert_eq!(all.iter().filter(|text| text.contains("ip addr")).count(), 2, "{all:?}");
}

#[test]
fn block_lengths_have_bounds_and_defaults() {
    for (prefix, length) in [
        ("10.0.0.0/8", 24),
        ("10.60.0.0/16", 24),
        ("10.60.0.0/20", 24),
        ("10.60.0.0/22", 26),
        ("10.60.0.0/28", 30),
        ("10.60.0.0/30", 30),
        ("fd60::/48", 64),
        ("fd60::/62", 66),
        ("fd60::/112", 116),
        ("fd60::/126", 126),
    ] {
        assert_eq!(addresses::new_routed_subnet(net(prefix), None).unwrap().block_length, length, "{prefix}");
    }
    for (prefix, length, fits) in [
        ("10.60.0.0/16", 15, false),
        ("10.60.0.0/16", 16, true),
        ("10.60.0.0/16", 30, true),
        ("10.60.0.0/16", 31, false),
        ("fd60::/48", 47, false),
        ("fd60::/48", 126, true),
        ("fd60::/48", 127, false),
        ("fd60::/48", 255, false),
    ] {
        let made = addresses::new_routed_subnet(net(prefix), Some(length));
        assert_eq!(made.is_ok(), fits, "{prefix} {length}");
        if let Err(error) = made {
            let text = error.to_string();
            assert!(text.contains(&format!("/{length}")) && text.contains(prefix), "{text}");
        }
    }
}

/// Returns all addresses of a small block.
fn addresses(block: IpNet) -> Vec<IpAddr> {
    match block {
        IpNet::V4(block) => (0..1_u32 << (32 - block.prefix_len()))
            .map(|n| IpAddr::from((u32::from(block.network()) + n).to_be_bytes()))
            .collect(),
        IpNet::V6(block) => (0..1_u128 << (128 - block.prefix_len()))
            .map(|n| IpAddr::from((u128::from(block.network()) + n).to_be_bytes()))
            .collect(),
    }
}

proptest! {
    #[test]
    fn every_usable_address_is_allocated_once_and_no_reserved_one(
        v6: bool, host_bits in 4_u8..=9, block_bits in 2_u8..=5, at: u16, held in 1_usize..6, skip in 1_usize..4, behind: u16,
    ) {
        let block_bits = block_bits.min(host_bits);
        let prefix: IpNet = if v6 {
            format!("fd60::{at:x}:0/{}", 128 - host_bits).parse().unwrap()
        } else {
            format!("10.{}.{}.0/{}", at >> 8, at & 0xff, 32 - host_bits).parse().unwrap()
        };
        let prefix = prefix.trunc();
        let length = prefix.max_prefix_len() - block_bits;
        let subnet: Subnet = addresses::new_routed_subnet(prefix, Some(length)).unwrap();
        let blocks: Vec<IpNet> = prefix.subnets(length).unwrap().step_by(skip).take(held).collect();
        let all = addresses(prefix);
        let mut cursor = Some(all[usize::from(behind) % all.len()]);
        let mut given = BTreeSet::new();
        while let Some(address) = addresses::allocate(&blocks, &subnet, |at| given.contains(&at), cursor) {
            prop_assert!(given.insert(address), "{address} twice");
            cursor = Some(address);
        }
        let mut expected = BTreeSet::new();
        for block in &blocks {
            let mut of_block = addresses(*block);
            // The network address, the gateway and, for IPv4, the broadcast address.
            prop_assert_eq!(of_block.remove(0), block.network());
            prop_assert_eq!(of_block.remove(0), addresses::gateway(*block));
            if !v6 {
                prop_assert_eq!(of_block.pop(), Some(block.broadcast()));
            }
            prop_assert_eq!(of_block.len() as u128, addresses::usable_in_block(*block, &subnet));
            expected.extend(of_block);
        }
        prop_assert_eq!(&given, &expected);
        let usable = all.iter().filter(|address| addresses::is_usable(**address, &subnet)).count() as u128;
        prop_assert_eq!(usable, addresses::usable(&subnet));
        prop_assert!(given.iter().all(|address| addresses::is_usable(*address, &subnet)));
    }
}
