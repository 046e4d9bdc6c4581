//! Tests of the desired data plane of a switched network, as the commands that would create it.

use ovl_cluster::addresses;
use ovl_cluster::view::View;
use ovl_dataplane::diff::diff;
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::EndpointId;
use ovl_proto::record::PeerState;
use ovl_proto::table::Entry;
use ovl_subsystems::local::Local;
use ovl_subsystems::networks::mtu::network_mtu;

use super::host::{desired, isolation};
use super::world::{NET, endpoint, give, id, switched};

/// Returns the commands without those of the host as a whole, and with short names for the MAC addresses of hosts.
fn commands(view: &View) -> Vec<String> {
    let mac = |n: u8| addresses::mac_of_host(NET, id(n)).to_string();
    diff(&Dataplane::default(), &desired(view, &Local::default()), true)
        .iter()
        .map(ToString::to_string)
        .filter(|text| !text.starts_with("sysctl") && !text.starts_with("nft"))
        .map(|text| (1..=3).fold(text, |text, n| text.replace(&mac(n), &format!("MAC{n}"))))
        .collect()
}

#[test]
fn a_network_without_a_local_endpoint_has_no_devices() {
    let mut view = switched();
    give(&mut view, 2, vec![endpoint(2, "10.9.0.17/24")]);
    let Dataplane { filter, .. } = desired(&view, &Local::default());
    // Nothing on this host may send to the VXLAN port of the other host.
    let filter = filter.expect("a packet filter");
    assert!(filter.contains("192.168.77.2 . 4789") && !filter.contains("10.9.0."), "{filter}");
    assert_eq!(Dataplane { filter: None, ..desired(&view, &Local::default()) }, Dataplane::default());
}

#[test]
fn a_network_with_local_and_remote_endpoints() {
    let mut view = switched();
    give(&mut view, 1, vec![endpoint(1, "10.9.0.9/24")]);
    give(&mut view, 2, vec![endpoint(2, "10.9.0.17/24")]);
    assert_eq!(
        commands(&view),
        [
            "ip link add ovb-00000000 address 0a:00:00:00:00:00 mtu 1450 up type bridge stp_state 0 \
             mcast_snooping 1 mcast_querier 1 mcast_router 2 mcast_igmp_version 3 mcast_mld_version 2 \
             mcast_query_response_interval 100 mcast_hash_max 65536 nf_call_iptables 0 nf_call_ip6tables 0",
            "ip link add ovx-00000000 address MAC1 mtu 1450 master ovb-00000000 up type vxlan id 5000 local 192.168.77.1 \
             dstport 4789 nolearning && bridge link set dev ovx-00000000 learning off neigh_suppress off \
             isolated on mcast_router 2",
            "ip addr replace 10.9.0.1/24 dev ovb-00000000",
            "bridge fdb replace 02:f1:0a:09:00:11 dev ovx-00000000 master static",
            "bridge fdb replace 02:f1:0a:09:00:11 dev ovx-00000000 self static dst 192.168.77.2 port 4789",
            "bridge fdb replace MAC2 dev ovx-00000000 self static dst 192.168.77.2 port 4789",
            "ip neigh replace 10.9.0.9 lladdr 02:f1:0a:09:00:09 dev ovb-00000000 nud permanent",
            "ip neigh replace 10.9.0.17 lladdr 02:f1:0a:09:00:11 dev ovb-00000000 nud permanent",
            "bridge fdb append 00:00:00:00:00:00 dev ovx-00000000 self static dst 192.168.77.2 port 4789",
        ]
    );
}

#[test]
fn flood_entries_exist_only_for_hosts_with_endpoints() {
    let mut view = switched();
    give(&mut view, 1, vec![endpoint(1, "10.9.0.9/24")]);
    give(&mut view, 3, vec![endpoint(3, "10.9.0.25/24")]);
    let floods: Vec<String> =
        desired(&view, &Local::default()).floods.iter().map(|(_, remote)| remote.vtep.to_string()).collect();
    assert_eq!(floods, ["192.168.77.3"]);
}

#[test]
fn only_live_members_have_entries() {
    let mut view = switched();
    give(&mut view, 1, vec![endpoint(1, "10.9.0.9/24")]);
    give(&mut view, 2, vec![endpoint(2, "10.9.0.17/24")]);
    // One of the endpoint, and one of its host.
    let remotes = |view: &View| desired(view, &Local::default()).remotes.len();
    for (state, expected) in
        [(PeerState::Alive, 2), (PeerState::Suspect, 2), (PeerState::Dead, 0), (PeerState::Left, 0)]
    {
        view.nodes.get_mut(&id(2)).unwrap().state = state;
        assert_eq!(remotes(&view), expected, "{state}");
    }
    view.nodes.get_mut(&id(2)).unwrap().state = PeerState::Alive;
    view.alloc.members.remove(&id(2));
    assert_eq!(remotes(&view), 0, "not a member");
}

#[test]
fn an_address_of_another_hosts_block_needs_a_lease() {
    let mut view = switched();
    give(&mut view, 1, vec![endpoint(1, "10.9.0.9/24")]);
    give(&mut view, 2, vec![endpoint(2, "10.9.0.26/24")]);
    assert!(desired(&view, &Local::default()).remotes.is_empty());
    let lease = Entry::Lease { network: NET, address: "10.9.0.26".parse().unwrap(), to: id(2) };
    give(&mut view, 3, vec![lease]);
    assert_eq!(desired(&view, &Local::default()).remotes.len(), 2);
}

#[test]
fn a_claimed_mac_stays_with_the_endpoint_from_whose_address_it_is_derived() {
    let mut view = switched();
    give(&mut view, 1, vec![endpoint(1, "10.9.0.9/24")]);
    give(&mut view, 3, vec![endpoint(3, "10.9.0.25/24")]);
    let Entry::Endpoint(mut thief) = endpoint(2, "10.9.0.17/24") else { unreachable!() };
    thief.mac = addresses::mac_of(NET, "10.9.0.25".parse().unwrap());
    give(&mut view, 2, vec![Entry::Endpoint(thief)]);
    let dataplane = desired(&view, &Local::default());
    let vteps: Vec<String> = dataplane.remotes.values().map(|remote| remote.vtep.to_string()).collect();
    assert_eq!(vteps, ["192.168.77.3", "192.168.77.3"], "of the endpoint, and of its host");
}

#[test]
fn the_mtu_fits_the_path_between_every_pair_of_hosts() {
    let mut view = switched();
    for n in 1..=3 {
        give(&mut view, n, vec![endpoint(n, &format!("10.9.0.{}/24", 8 * n + 1))]);
    }
    let mtu = |view: &View| network_mtu(view, &view.networks[&NET].network);
    assert_eq!(mtu(&view), 1450);
    // A path between two remote hosts carries less: the MTU is the same here.
    give(&mut view, 2, vec![Entry::PathMtu { peer: id(3), mtu: 1400 }]);
    assert_eq!(mtu(&view), 1350);
    // Paths to hosts without endpoints on the network do not count.
    give(&mut view, 2, vec![Entry::PathMtu { peer: id(9), mtu: 1300 }]);
    assert_eq!(mtu(&view), 1350);
    view.networks.get_mut(&NET).unwrap().network.mtu = Some(1300);
    assert_eq!(mtu(&view), 1300);
    view.networks.get_mut(&NET).unwrap().network.mtu = Some(9000);
    assert_eq!(mtu(&view), 1350, "larger packets than the path carries would be lost");
}

#[test]
fn an_internal_network_has_no_gateway_and_is_not_forwarded() {
    let mut view = switched();
    give(&mut view, 1, vec![endpoint(1, "10.9.0.9/24")]);
    view.networks.get_mut(&NET).unwrap().network.internal = true;
    let dataplane = desired(&view, &Local::default());
    assert!(dataplane.addresses.is_empty());
    assert!(dataplane.sysctls.is_empty());
    let filter = dataplane.filter.unwrap();
    assert!(filter.contains("iifname \"ovb-00000000\" oifname != \"ovb-00000000\" counter drop"), "{filter}");
    assert!(!filter.contains("masquerade"), "{filter}");
}

#[test]
fn only_members_may_send_to_the_vxlan_port() {
    let mut view = switched();
    give(&mut view, 1, vec![endpoint(1, "10.9.0.9/24")]);
    let filter = desired(&view, &Local::default()).filter.unwrap();
    assert!(filter.contains("elements = { 192.168.77.2, 192.168.77.3 }"), "{filter}");
    assert!(filter.contains("udp dport 4789 fib daddr type != unicast counter drop"), "{filter}");
}

#[test]
fn an_isolated_endpoint_is_disconnected_and_kept() {
    let mut view = switched();
    give(&mut view, 1, vec![endpoint(1, "10.9.0.9/24")]);
    view.alloc.blocks.clear();
    let local = Local { isolation: isolation([EndpointId([1; 5])]), ..Local::default() };
    let dataplane = desired(&view, &local);
    let link = dataplane
        .links
        .values()
        .find(|link| matches!(link, ovl_dataplane::state::Link::Endpoint { .. }))
        .unwrap();
    assert!(matches!(link, ovl_dataplane::state::Link::Endpoint { master: None, up: false, .. }), "{link:?}");
    assert!(dataplane.neighbours.is_empty());
}
