//! `diff` against a fake kernel that holds state and deletes as the real one does: applying the
//! operations reaches what is desired, and a second difference is empty.
#![cfg(test)]

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use ovl_dataplane::device::Device;
use ovl_dataplane::diff::{diff, lost_endpoints};
use ovl_dataplane::nft::{Chain, Data, Element, Field, Key, Set, Shape, Skeleton, Table, Type, Value};
use ovl_dataplane::op::{
    AddressOp, AnnouncedOp, FdbOp, LinkOp, NeighbourOp, NftOp, Op, RouteOp, SourceOp, SysctlOp, WireguardOp,
};
use ovl_dataplane::state::{Dataplane, Hop, Link, Remote, Source, Tunnel, TunnelKind, TunnelPeer};
use ovl_proto::id::{EndpointId, Mac, NetworkId, TunnelKey};
use proptest::prelude::*;

/// Applies one operation as the kernel would, and refuses what the kernel would refuse.
fn apply(kernel: &mut Dataplane, op: &Op) -> Result<(), String> {
    let there = |kernel: &Dataplane, device: &Device| {
        if kernel.links.contains_key(device) { Ok(()) } else { Err(format!("no device for: {op}")) }
    };
    if !matches!(op, Op::Link(LinkOp::Add(..)))
        && let Some(device) = op.device()
    {
        there(kernel, &device)?;
    }
    match op.clone() {
        Op::Sysctl(SysctlOp::AllowLocalnet(device)) => {
            kernel.localnets.insert(device);
        }
        Op::Sysctl(SysctlOp::ForbidLocalnet(device)) => {
            kernel.localnets.remove(&device);
        }
        Op::Sysctl(SysctlOp::Set { name, value }) => drop(kernel.sysctls.insert(name, value)),
        Op::Nft(NftOp::SetBase(text)) => kernel.filter = Some(text),
        Op::Nft(NftOp::DeleteBase) => kernel.filter = None,
        Op::Nft(NftOp::SetTable(table, skeleton)) => drop(kernel.tables.insert(table, skeleton)),
        Op::Nft(NftOp::DeleteTable(table)) => {
            kernel.tables.remove(&table);
            kernel.elements.forget(table);
        }
        Op::Nft(NftOp::SetElement(Element { set, key, value })) => {
            if !kernel.tables.contains_key(&set.table) {
                return Err(format!("no table for: {op}"));
            }
            if kernel.elements.insert(&set, key, value).is_some() {
                return Err(format!("exists: {op}"));
            }
        }
        // No difference has any.
        Op::EndFlows(_) => {}
        // They need no device but that which was asked for above.
        Op::Fast(op) => op.apply_to(kernel),
        Op::Nft(NftOp::DeleteElement(set, key)) => {
            if kernel.elements.remove(&set, &key).is_none() {
                return Err(format!("is not there: {op}"));
            }
        }
        Op::Link(LinkOp::Add(device, link)) => {
            if let Link::Vxlan { master: Some(master), .. }
            | Link::Tap { master: Some(master), .. }
            | Link::Endpoint { master: Some(master), .. } = link
            {
                there(kernel, &master)?;
            }
            if kernel.links.insert(device, link).is_some() {
                return Err(format!("exists: {op}"));
            }
        }
        Op::Link(LinkOp::Set(device, from, to)) => {
            if kernel.links.insert(device, to) != Some(from) {
                return Err(format!("not what was found: {op}"));
            }
        }
        Op::Link(LinkOp::Delete(device)) => kernel.forget_device(device),
        Op::Address(AddressOp::Add(device, address)) => drop(kernel.addresses.insert((device, address))),
        Op::Address(AddressOp::Delete(device, address)) => drop(kernel.addresses.remove(&(device, address))),
        Op::Announced(AnnouncedOp::Add(device, address)) => drop(kernel.announced.insert((device, address))),
        Op::Announced(AnnouncedOp::Delete(device, address)) => {
            kernel.announced.remove(&(device, address));
        }
        Op::Fdb(FdbOp::SetRemote(device, mac, remote)) => drop(kernel.remotes.insert((device, mac), remote)),
        Op::Fdb(FdbOp::DeleteRemote(device, mac)) => drop(kernel.remotes.remove(&(device, mac))),
        Op::Fdb(FdbOp::AddFlood(device, remote)) => drop(kernel.floods.insert((device, remote))),
        Op::Fdb(FdbOp::DeleteFlood(device, remote)) => drop(kernel.floods.remove(&(device, remote))),
        Op::Fdb(FdbOp::AddGroup(device, mac, remote)) => drop(kernel.groups.insert((device, mac, remote))),
        Op::Fdb(FdbOp::DeleteGroup(device, mac, remote)) => {
            kernel.groups.remove(&(device, mac, remote));
        }
        Op::Fdb(FdbOp::AddPort(device, mac)) => drop(kernel.ports.insert((device, mac))),
        Op::Fdb(FdbOp::DeletePort(device, mac)) => drop(kernel.ports.remove(&(device, mac))),
        Op::Neighbour(NeighbourOp::Set(device, address, mac)) => {
            kernel.neighbours.insert((device, address), mac);
        }
        Op::Neighbour(NeighbourOp::Delete(device, address)) => {
            kernel.neighbours.remove(&(device, address));
        }
        Op::Route(RouteOp::Set(to, hop)) => drop(kernel.routes.insert(to, hop)),
        Op::Route(RouteOp::Delete(to)) => drop(kernel.routes.remove(&to)),
        Op::Wireguard(WireguardOp::SetInterface(device, tunnel)) => {
            kernel.tunnels.insert(device, tunnel);
        }
        Op::Wireguard(WireguardOp::SetPeer(device, key, peer)) => {
            kernel.tunnel_peers.insert((device, key), peer);
        }
        Op::Wireguard(WireguardOp::DeletePeer(device, key)) => {
            kernel.tunnel_peers.remove(&(device, key));
        }
        Op::Source(SourceOp::Set(device, mac, source)) => drop(kernel.sources.insert((device, mac), source)),
        Op::Source(SourceOp::Delete(device, mac)) => drop(kernel.sources.remove(&(device, mac))),
    }
    Ok(())
}

fn network(n: u8) -> NetworkId {
    NetworkId([n; 5])
}

fn mac() -> impl Strategy<Value = Mac> {
    (0u8..6).prop_map(|n| Mac([2, 0, 0, 0, 0, n]))
}

fn ip() -> impl Strategy<Value = IpAddr> {
    prop_oneof![
        (1u8..6).prop_map(|n| IpAddr::from([10, 0, 0, n])),
        (1u16..4).prop_map(|n| IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, n])),
    ]
}

fn remote() -> impl Strategy<Value = Remote> {
    ((1u8..4).prop_map(|n| IpAddr::from([192, 168, 0, n])), prop_oneof![Just(4789u16), Just(8472)])
        .prop_map(|(vtep, port)| Remote { vtep, port })
}

/// What may stand in the kernel for one network. What hangs on a device is there only with it.
fn part(n: u8) -> impl Strategy<Value = Dataplane> {
    let links = (any::<(bool, bool, bool, bool, bool)>(), 0u32..2, prop_oneof![Just(1450u16), Just(1400)]);
    let entries = (
        proptest::collection::btree_set(
            (1u8..4).prop_map(|n| format!("10.0.{n}.1/24").parse().unwrap()),
            0..3,
        ),
        proptest::collection::btree_map(mac(), remote(), 0..5),
        (
            proptest::collection::btree_set(remote(), 0..3),
            proptest::collection::btree_set((1u8..4, remote()), 0..4),
        ),
        proptest::collection::btree_set(mac(), 0..5),
        proptest::collection::btree_map(ip(), mac(), 0..5),
        (proptest::option::of(ip()), proptest::option::of(ip()), proptest::option::of(1300u16..1302)),
        any::<bool>(),
    );
    (links, entries).prop_map(
        move |(
            (flags, vni, mtu),
            (addresses, remotes, (floods, groups), ports, neighbours, hop, nowhere),
        )| {
            let (has_bridge, has_vxlan, has_endpoint, up, tuned) = flags;
            let (bridge, vxlan) = (Device::bridge(network(n)), Device::vxlan(network(n)));
            let endpoint = Device::endpoint(EndpointId([n; 5]));
            let mut kernel = Dataplane::default();
            let (gateway, source, route_mtu) = hop;
            let mut route = |to: String, device| {
                let hop = Hop { device, gateway, source, mtu: route_mtu };
                kernel.routes.insert(to.parse().unwrap(), hop);
            };
            if nowhere {
                route(format!("10.7.{n}.0/24"), None);
            }
            if has_vxlan {
                route(format!("10.8.{n}.0/24"), Some(vxlan));
            }
            if has_endpoint {
                route(format!("10.9.{n}.1/32"), Some(endpoint));
            }
            let master = has_bridge.then_some(bridge);
            let neighbours_of = neighbours.clone();
            if has_bridge {
                kernel.links.insert(bridge, Link::Bridge { mac: Mac([10, n, 0, 0, 0, 0]), mtu, up, tuned });
                kernel.addresses.extend(addresses.into_iter().map(|address| (bridge, address)));
                kernel
                    .neighbours
                    .extend(neighbours.into_iter().map(|(address, mac)| ((bridge, address), mac)));
            }
            if has_vxlan {
                let local = IpAddr::from([192, 168, 0, 9]);
                let mac = Mac([14, vni as u8, 0, 0, 0, 0]);
                let link = Link::Vxlan {
                    vni: 4096 + vni,
                    local,
                    port: 4789,
                    mtu,
                    master,
                    mac,
                    up,
                    tuned,
                    sealed: false,
                };
                kernel.links.insert(vxlan, link);
                kernel.remotes.extend(remotes.into_iter().map(|(mac, remote)| ((vxlan, mac), remote)));
                kernel.floods.extend(floods.into_iter().map(|remote| (vxlan, remote)));
                let group = |n: u8| Mac([1, 0, 0x5e, 1, 2, n]);
                kernel.groups.extend(groups.into_iter().map(|(n, remote)| (vxlan, group(n), remote)));
                kernel.ports.extend(ports.iter().map(|mac| (vxlan, *mac)));
            }
            if has_bridge && !has_vxlan {
                // The same in a tunnel.
                let vni = 4096 + vni;
                kernel.links.insert(vxlan, Link::Tap { vni, mtu, master, up, tuned });
                let from = BTreeSet::from([IpAddr::from([0xfd01, 0, 0, 0, 0, 0, 0, 1])]);
                let sources = neighbours_of.iter().map(|(address, mac)| {
                    ((vxlan, *mac), Source { from: from.clone(), addresses: [*address].into() })
                });
                kernel.sources.extend(sources);
            }
            if has_endpoint {
                kernel.links.insert(endpoint, Link::Endpoint { mtu, master, up, tuned, hairpin: up });
                kernel.ports.extend(ports.iter().take(1).map(|mac| (endpoint, *mac)));
            }
            kernel
        },
    )
}

/// An end of the tunnel, or none.
fn tunnel() -> impl Strategy<Value = Dataplane> {
    let peer = (1u8..4, prop_oneof![Just(51940u16), Just(51941)], 0u8..3);
    let peers = proptest::collection::vec(peer, 0..4);
    (proptest::option::of((any::<bool>(), any::<bool>(), 1u8..3)), peers).prop_map(|(end, peers)| {
        let mut kernel = Dataplane::default();
        let Some((in_kernel, up, key)) = end else { return kernel };
        let device = Device::tunnel(false);
        let kind = if in_kernel { TunnelKind::Kernel } else { TunnelKind::Userspace };
        kernel.links.insert(device, Link::Tunnel { kind, mtu: 1420, up });
        let local = (!in_kernel).then_some(IpAddr::from([192, 168, 0, 9]));
        kernel.tunnels.insert(device, Tunnel { key: TunnelKey([key; 32]), port: 51940, local });
        for (n, port, blocks) in peers {
            let allowed = (0..blocks).map(|block| format!("10.{n}.{block}.0/24").parse().unwrap()).collect();
            let peer = TunnelPeer { endpoint: ([192, 168, 0, n], port).into(), allowed };
            kernel.tunnel_peers.insert((device, TunnelKey([n; 32])), peer);
            let hop = Hop { device: Some(device), gateway: None, source: None, mtu: None };
            kernel.routes.insert(format!("fd01::{n}/128").parse().unwrap(), hop);
        }
        kernel
    })
}

/// A table of ovl with elements, or none.
fn table(table: Table) -> impl Strategy<Value = Dataplane> {
    let shape = Shape { key: &[Type::Mark], data: Data::Fields(&[Type::Port]), ranges: false };
    let sets = [Set::new(table, "a", shape), Set::new(table, "b", shape)];
    let elements = proptest::collection::btree_map((0usize..2, 0u32..4), 0u16..3, 0..6);
    (proptest::option::of(0u8..3), elements).prop_map(move |(version, elements)| {
        let mut kernel = Dataplane::default();
        let Some(version) = version else { return kernel };
        let chain = Chain { name: format!("c{version}"), hook: None, rules: Vec::new() };
        let skeleton = Skeleton { sets: sets.to_vec(), objects: Vec::new(), chains: vec![chain] };
        kernel.tables.insert(table, Arc::new(skeleton));
        for ((set, key), value) in elements {
            let key = Key::of(&[Field::Number(key)]);
            kernel.elements.insert(&sets[set], key, Value::of(&[Field::Port(value)]));
        }
        kernel
    })
}

fn kernel() -> impl Strategy<Value = Dataplane> {
    let tables = (table(Table::Services), table(Table::Divert));
    let announced = proptest::collection::btree_set((prop_oneof![Just("eth0"), Just("eth1")], ip()), 0..3);
    let parts = (part(1), part(2), tunnel(), tables, announced);
    (parts, proptest::option::of("[ab]"), proptest::option::of("[01]")).prop_map(
        |((mut kernel, other, tunnel, tables, announced), filter, forward)| {
            kernel.announced = announced
                .into_iter()
                .filter_map(|(name, address)| Some((Device::new(name)?, address)))
                .collect();
            for more in [other, tunnel, tables.0, tables.1] {
                kernel.merge(more);
            }
            kernel.filter = filter;
            kernel.sysctls.extend(forward.map(|value| ("net.ipv4.ip_forward".to_owned(), value)));
            kernel
        },
    )
}

/// What the loop cannot make, and what it never takes back.
fn reachable(actual: &Dataplane, desired: &Dataplane) -> Dataplane {
    let mut reached = desired.clone();
    for device in lost_endpoints(actual, desired).collect::<BTreeSet<_>>() {
        reached.forget_device(device);
    }
    for (name, value) in &actual.sysctls {
        reached.sysctls.entry(name.clone()).or_insert_with(|| value.clone());
    }
    reached
}

/// A chain of the base table may have been moved to another table, or back: then it is in both for a moment.
#[test]
fn other_tables_are_written_before_the_base_table_and_deleted_after_it() {
    let with = |filter: &str, table: bool| {
        let tables = table.then(|| (Table::Resolver, Arc::new(Skeleton::default()))).into_iter().collect();
        Dataplane { filter: Some(filter.to_owned()), tables, ..Dataplane::default() }
    };
    let (before, after) = (with("with the chain", false), with("without it", true));
    let texts = |from: &Dataplane, to: &Dataplane| -> Vec<String> {
        diff(from, to, true).iter().map(ToString::to_string).collect()
    };
    let (base, other) = ("nft -f - # table inet ovl", "inet ovl-resolver");
    assert_eq!(texts(&before, &after), [format!("nft -f - # table {other}"), base.to_owned()]);
    assert_eq!(texts(&after, &before), [base.to_owned(), format!("nft delete table {other}")]);
}

proptest! {
    #[test]
    fn applying_the_difference_reaches_what_is_desired(actual in kernel(), desired in kernel()) {
        let mut after = actual.clone();
        for op in diff(&actual, &desired, true) {
            let mut said = after.clone();
            op.apply_to(&mut said);
            apply(&mut after, &op).map_err(TestCaseError::fail)?;
            prop_assert_eq!(&said, &after, "{}", op);
        }
        prop_assert_eq!(&after, &reachable(&actual, &desired));
        prop_assert_eq!(diff(&after, &desired, true), vec![]);
    }

    #[test]
    fn without_pruning_nothing_is_lost_and_all_that_is_desired_is_there(actual in kernel(), desired in kernel()) {
        let mut after = actual.clone();
        for op in diff(&actual, &desired, false) {
            if let Op::Link(LinkOp::Delete(device)) = &op {
                prop_assert!(desired.links.contains_key(device), "only to make it anew: {}", op);
            }
            apply(&mut after, &op).map_err(TestCaseError::fail)?;
        }
        let reached = reachable(&actual, &desired);
        for (device, link) in &reached.links {
            prop_assert_eq!(after.links.get(device), Some(link));
        }
        for (set, contents) in reached.elements.sets() {
            let there = after.elements.of(set);
            prop_assert!(contents.iter().all(|(key, value)| there.and_then(|t| t.get(key)) == Some(value)));
        }
        prop_assert!(reached.routes.iter().all(|(to, hop)| after.routes.get(to) == Some(hop)));
        prop_assert!(reached.addresses.is_subset(&after.addresses));
        prop_assert!(reached.announced.is_subset(&after.announced));
        prop_assert!(reached.ports.is_subset(&after.ports));
        prop_assert!(reached.floods.is_subset(&after.floods));
        prop_assert!(reached.groups.is_subset(&after.groups));
        prop_assert!(reached.remotes.iter().all(|(key, remote)| after.remotes.get(key) == Some(remote)));
        prop_assert!(actual.links.keys().all(|device| after.links.contains_key(device)));
    }

    #[test]
    fn every_operation_prints_as_a_command(actual in kernel(), desired in kernel()) {
        for op in diff(&actual, &desired, true) {
            let text = op.to_string();
            prop_assert!(
                ["ip ", "bridge ", "nft ", "sysctl ", "wg ", "# ovx-"].iter().any(|word| text.starts_with(word)),
                "{}", text
            );
        }
    }
}
