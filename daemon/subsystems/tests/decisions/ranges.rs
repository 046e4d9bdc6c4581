//! Tests of which networks a host refuses to build, and of what is left of them.

use std::collections::BTreeMap;

use ovl_cluster::addresses;
use ovl_cluster::view::{NetworkState, View};
use ovl_dataplane::device::Device;
use ovl_dataplane::state::Link;
use ovl_proto::id::{EndpointId, NetworkId};
use ovl_proto::object::{Backend, Mode};
use ovl_subsystems::local::Local;
use ovl_subsystems::local::ranges::{Conflict, Needed};
use ovl_subsystems::networks::ranges::{HostRanges, NeededRanges, overlapped, refused};

use super::host::desired;
use super::world::{NET, endpoint, give, id, net, switched, view_of};

/// The view of a cluster whose only network has this subnet.
fn view_with(subnet: &str) -> View {
    let mut view = switched();
    let network = &mut view.networks.get_mut(&NET).unwrap().network;
    network.subnets = vec![addresses::new_subnet(net(subnet)).unwrap()];
    view
}

/// What host h1 is connected to: one prefix of each family and a router without a prefix.
fn host() -> HostRanges {
    let connected = ["10.50.0.17/24", "fd50::17/64", "10.51.0.9/32"].map(|at| net(at).trunc());
    let connected = connected.into_iter().map(|prefix| (prefix, "lan0".to_owned())).collect();
    let mut host = HostRanges::default();
    host.set_connections(connected, ["100.64.0.1", "2001:db8::1"].map(|at| at.parse().unwrap()).into());
    host.set_resolvers(["203.0.113.53", "2001:db8:53::53"].map(|at| at.parse().unwrap()).into());
    host
}

fn reason(view: &View) -> Option<Needed> {
    let needed = NeededRanges::new(view, &host(), &[net("10.96.0.0/16")]);
    refused(view, &needed).remove(&NET).map(|conflict| conflict.needed)
}

#[test]
fn network_over_what_the_host_needs_is_refused() {
    let member = |n: u8| Needed::Member { address: [192, 168, 77, n].into(), host: format!("h{n}") };
    let connected = |at| Needed::Connected { prefix: net(at), device: "lan0".to_owned() };
    let gateway = |at: &str| Needed::Gateway(at.parse().unwrap());
    let resolver = |at: &str| Needed::Resolver(at.parse().unwrap());
    for (subnet, expected) in [
        ("192.168.77.2/31", None),
        ("192.168.77.0/30", Some(member(1))),
        ("192.0.0.0/8", Some(member(1))),
        ("10.50.0.0/16", Some(connected("10.50.0.0/24"))),
        ("10.50.0.128/25", Some(connected("10.50.0.0/24"))),
        ("10.51.0.0/24", Some(connected("10.51.0.9/32"))),
        ("fd50::/48", Some(connected("fd50::/64"))),
        ("100.64.0.0/16", Some(gateway("100.64.0.1"))),
        ("2001:db8::/64", Some(gateway("2001:db8::1"))),
        ("203.0.113.0/24", Some(resolver("203.0.113.53"))),
        ("2001:db8:53::/64", Some(resolver("2001:db8:53::53"))),
        ("10.96.5.0/24", Some(Needed::Services(net("10.96.0.0/16")))),
        ("10.49.0.0/16", None),
        ("fd51::/64", None),
    ] {
        let Ok(valid) = addresses::new_subnet(net(subnet)) else { continue };
        assert_eq!(reason(&view_with(&valid.prefix.to_string())), expected, "{subnet}");
    }
}

#[test]
fn chosen_subnet_avoids_what_the_host_needs() {
    let view = view_with("10.49.0.0/16");
    let needed = NeededRanges::new(&view, &host(), &[net("10.96.0.0/16")]);
    let all: Vec<_> = needed.prefixes().collect();
    for prefix in ["10.50.0.0/24", "100.64.0.1/32", "203.0.113.53/32", "192.168.77.2/32", "10.96.0.0/16"] {
        assert!(all.contains(&net(prefix)), "{prefix}");
    }
}

#[test]
fn only_members_count() {
    let mut view = view_with("192.168.77.0/30");
    view.alloc.members.remove(&id(2));
    view.nodes.retain(|of, _| *of == id(2));
    assert_eq!(reason(&view), None, "h2 is no member, and the others are unknown");
    view.alloc.members.insert(id(2));
    assert!(matches!(reason(&view), Some(Needed::Member { host, .. }) if host == "h2"));
}

#[test]
fn resolver_may_be_an_endpoint_of_this_host() {
    let mut view = view_with("203.0.113.0/24");
    give(&mut view, 2, vec![endpoint(1, "203.0.113.53/24")]);
    assert!(reason(&view).is_some(), "any host may claim the address");
    give(&mut view, 1, vec![endpoint(2, "203.0.113.53/24")]);
    assert_eq!(reason(&view), None);
}

#[test]
fn of_networks_that_overlap_the_one_with_endpoints_here_is_built() {
    const OTHER: NetworkId = NetworkId([9; 5]);
    let mut view = switched();
    let mut other = view.networks[&NET].network.clone();
    other.id = OTHER;
    other.name = "inside".to_owned();
    other.subnets = vec![addresses::new_routed_subnet(net("10.9.0.0/25"), None).unwrap()];
    view.networks.insert(OTHER, NetworkState { network: other, removing: false });
    let needed = NeededRanges::new(&view, &HostRanges::default(), &[]);
    assert!(refused(&view, &needed).is_empty(), "this host uses neither");
    give(&mut view, 1, vec![endpoint(1, "10.9.0.10/24")]);
    let expected = Conflict {
        subnet: net("10.9.0.0/25"),
        needed: Needed::Network { prefix: net("10.9.0.0/24"), name: "blue".to_owned() },
    };
    assert_eq!(refused(&view, &needed), BTreeMap::from([(OTHER, expected)]));
}

#[test]
fn refused_network_leaves_nothing_but_silent_interfaces_of_its_endpoints() {
    let routed = addresses::new_routed_subnet(net("10.50.0.0/16"), None).unwrap();
    let routed = view_of(Mode::L3, Backend::Vxlan, routed, |n| net(&format!("10.50.{n}.0/24")));
    for (mut view, address) in [(view_with("10.50.0.0/24"), "10.50.0.10/24"), (routed, "10.50.1.10/32")] {
        give(&mut view, 1, vec![endpoint(1, address)]);
        let mut local = Local::default();
        assert!(desired(&view, &local).links.len() > 1);
        let needed = NeededRanges::new(&view, &host(), &[]);
        assert_eq!(local.refused.replace(refused(&view, &needed)).len(), 1);
        let wanted = desired(&view, &local);
        assert!(wanted.addresses.is_empty() && wanted.routes.is_empty() && wanted.neighbours.is_empty());
        let links: Vec<_> = wanted.links.iter().collect();
        assert!(
            matches!(links[..], [(device, Link::Endpoint { up: false, master: None, .. })]
                if *device == Device::endpoint(EndpointId([1; 5]))),
            "{links:?}"
        );
        assert_eq!(local.refused.replace(BTreeMap::new()).len(), 1);
        assert!(desired(&view, &local).links.len() > 1);
    }
}

#[test]
fn a_pool_that_overlaps_a_network_is_reported_and_the_network_is_built() {
    let view = view_with("10.60.0.0/16");
    let (pools, external) = ([net("192.0.2.0/28"), net("10.60.9.0/28")], [net("10.61.0.0/24")]);
    let found = overlapped(&view, &pools, &external);
    let [(name, sentence)] = &found[..] else { panic!("{found:?}") };
    assert_eq!(*name, view.networks[&NET].network.name);
    assert!(sentence.contains("10.60.0.0/16 overlaps the load_balancer_pool 10.60.9.0/28"), "{sentence}");
    assert_eq!(reason(&view), None);
    assert_eq!(overlapped(&view, &pools[..1], &external), []);
    let found = overlapped(&view, &[], &[net("10.0.0.0/8")]);
    assert!(found[0].1.contains("external_ranges 10.0.0.0/8"), "{found:?}");
}
