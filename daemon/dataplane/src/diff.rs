//! `desired - actual = operations`.

mod fast;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::device::Device;
use crate::flows;
use crate::multicast;
use crate::nft::{Contents, Element, Key, Table, Value};
use crate::op::{
    AddressOp, AnnouncedOp, FdbOp, LinkOp, NeighbourOp, NftOp, Op, RouteOp, SourceOp, SysctlOp, WireguardOp,
};
use crate::state::{Dataplane, Link};

pub use self::fast::fast_changes;

/// What to do so that `actual` becomes `desired`.
///
/// Order: settings and the packet filter before any device that they protect; devices before what
/// hangs on them. With `prune` false nothing is taken away: before gossip has caught up, what the
/// last run left is better than nothing. A device that must be made anew is the exception.
///
/// An endpoint's link that is missing is not made: see [`lost_endpoints`].
pub fn diff(actual: &Dataplane, desired: &Dataplane, prune: bool) -> Vec<Op> {
    let (mut ops, fast) = fast_changes(&actual.fast, &desired.fast, prune);
    if prune {
        // Before the table goes that keeps workloads from using it.
        let closed = actual.localnets.difference(&desired.localnets);
        ops.extend(closed.map(|device| Op::Sysctl(SysctlOp::ForbidLocalnet(*device))));
    }
    let differing = desired.sysctls.iter().filter(|(name, value)| actual.sysctls.get(*name) != Some(*value));
    let setting = |(name, value): (&String, &String)| {
        Op::Sysctl(SysctlOp::Set { name: name.clone(), value: value.clone() })
    };
    let (tracking, settings): (Vec<_>, Vec<_>) =
        differing.partition(|(name, _)| name.starts_with("net.netfilter."));
    ops.extend(settings.into_iter().map(setting));
    // A chain that has moved from one table to another is there twice in between, rather than not at all.
    let (written, others): (Vec<Op>, Vec<Op>) =
        tables(actual, desired, prune).into_iter().partition(|op| matches!(op, Op::Nft(NftOp::SetTable(..))));
    ops.extend(written);
    // Settings of connection tracking exist once a table uses it.
    ops.extend(tracking.into_iter().map(setting));
    match &desired.filter {
        Some(filter) if actual.filter.as_ref() != Some(filter) => {
            ops.push(Op::Nft(NftOp::SetBase(filter.clone())))
        }
        None if prune && actual.filter.is_some() => ops.push(Op::Nft(NftOp::DeleteBase)),
        Some(_) | None => {}
    }
    let (guards, others): (Vec<Op>, Vec<Op>) = others.into_iter().partition(unguards);
    let (filters, others): (Vec<Op>, Vec<Op>) = others.into_iter().partition(multicast::is_filter);
    ops.extend(others);
    let (gone, last) = links(actual, desired, prune, &mut ops);
    ops.extend(guards);
    let there = |device: &Device| !gone.contains(device);
    let opened =
        desired.localnets.iter().filter(|device| !there(device) || !actual.localnets.contains(device));
    ops.extend(opened.map(|device| Op::Sysctl(SysctlOp::AllowLocalnet(*device))));

    let addresses = actual.addresses.iter().filter(|(device, _)| there(device)).copied().collect();
    set(
        &addresses,
        &desired.addresses,
        prune,
        &mut ops,
        |(d, a)| Op::Address(AddressOp::Add(d, a)),
        |(d, a)| Op::Address(AddressOp::Delete(d, a)),
    );
    set(
        &actual.announced,
        &desired.announced,
        prune,
        &mut ops,
        |(d, a)| Op::Announced(AnnouncedOp::Add(d, a)),
        |(d, a)| Op::Announced(AnnouncedOp::Delete(d, a)),
    );
    let ports = actual.ports.iter().filter(|(device, _)| there(device)).copied().collect();
    set(
        &ports,
        &desired.ports,
        prune,
        &mut ops,
        |(d, m)| Op::Fdb(FdbOp::AddPort(d, m)),
        |(d, m)| Op::Fdb(FdbOp::DeletePort(d, m)),
    );
    let remotes = actual.remotes.iter().filter(|((device, _), _)| there(device)).map(copied).collect();
    map(
        &remotes,
        &desired.remotes,
        prune,
        &mut ops,
        |(d, m), r| Op::Fdb(FdbOp::SetRemote(d, m, r)),
        |(d, m)| Op::Fdb(FdbOp::DeleteRemote(d, m)),
    );
    let neighbours = actual.neighbours.iter().filter(|((device, _), _)| there(device)).map(copied).collect();
    map(
        &neighbours,
        &desired.neighbours,
        prune,
        &mut ops,
        |(d, a), m| Op::Neighbour(NeighbourOp::Set(d, a, m)),
        |(d, a)| Op::Neighbour(NeighbourOp::Delete(d, a)),
    );
    let floods = actual.floods.iter().filter(|(device, _)| there(device)).copied().collect();
    set(
        &floods,
        &desired.floods,
        prune,
        &mut ops,
        |(d, r)| Op::Fdb(FdbOp::AddFlood(d, r)),
        |(d, r)| Op::Fdb(FdbOp::DeleteFlood(d, r)),
    );
    let groups: BTreeSet<_> = actual.groups.iter().filter(|(device, _, _)| there(device)).copied().collect();
    let added = desired.groups.difference(&groups);
    ops.extend(added.map(|(device, mac, remote)| Op::Fdb(FdbOp::AddGroup(*device, *mac, *remote))));
    let (opened, closed): (Vec<Op>, Vec<Op>) =
        filters.into_iter().partition(|op| matches!(op, Op::Nft(NftOp::SetElement(_))));
    ops.extend(opened);
    ops.extend(closed);
    if prune {
        let deleted = groups.difference(&desired.groups);
        ops.extend(deleted.map(|(device, mac, remote)| Op::Fdb(FdbOp::DeleteGroup(*device, *mac, *remote))));
    }
    // What may send is known before anything can come.
    let sources = actual.sources.iter().filter(|((device, _), _)| there(device)).map(cloned).collect();
    map(
        &sources,
        &desired.sources,
        prune,
        &mut ops,
        |(d, m), s| Op::Source(SourceOp::Set(d, m, s)),
        |(d, m)| Op::Source(SourceOp::Delete(d, m)),
    );
    let tunnels = actual.tunnels.iter().filter(|(device, _)| there(device)).map(copied).collect();
    // A tunnel goes with its device.
    map(
        &tunnels,
        &desired.tunnels,
        false,
        &mut ops,
        |d, t| Op::Wireguard(WireguardOp::SetInterface(d, t)),
        |d| Op::Link(LinkOp::Delete(d)),
    );
    let peers = actual.tunnel_peers.iter().filter(|((device, _), _)| there(device)).map(cloned).collect();
    // Members and their keys are on the disk: nothing that gossip has still to say makes one of them again,
    // and a host that was forgotten is out at once.
    map(
        &peers,
        &desired.tunnel_peers,
        true,
        &mut ops,
        |(d, k), p| Op::Wireguard(WireguardOp::SetPeer(d, k, p)),
        |(d, k)| Op::Wireguard(WireguardOp::DeletePeer(d, k)),
    );
    // After the addresses that they name as source, and the neighbours that they lead to.
    let routes = actual.routes.iter().filter(|(_, hop)| hop.device.is_none_or(|device| there(&device)));
    map(
        &routes.map(copied).collect(),
        &desired.routes,
        prune,
        &mut ops,
        |to, hop| Op::Route(RouteOp::Set(to, hop)),
        |to| Op::Route(RouteOp::Delete(to)),
    );
    ops.extend(last.into_iter().map(|device| Op::Link(LinkOp::Delete(device))));
    ops.extend(fast);
    // Entries of an endpoint whose namespace is gone would only fail.
    let missing: BTreeSet<Device> = lost_endpoints(actual, desired).collect();
    ops.retain(|op| op.device().is_none_or(|device| !missing.contains(&device)));
    ops
}

/// Tables, and then their elements: those may name chains. An element with another value is deleted and
/// added, in one transaction.
fn tables(actual: &Dataplane, desired: &Dataplane, prune: bool) -> Vec<Op> {
    let mut ops = Vec::new();
    for (table, skeleton) in &desired.tables {
        if actual.tables.get(table) != Some(skeleton) {
            ops.push(Op::Nft(NftOp::SetTable(*table, Arc::clone(skeleton))));
        }
    }
    // A part of the whole has elements in tables that are not its own.
    let goes = |table: &Table| actual.tables.contains_key(table) && !desired.tables.contains_key(table);
    let stays = |table: &Table| !prune || !goes(table);
    ops.extend(
        actual.tables.keys().filter(|table| !stays(table)).map(|table| Op::Nft(NftOp::DeleteTable(*table))),
    );
    let none = Contents::new();
    for (set, held) in actual.elements.sets().filter(|(set, _)| stays(&set.table)) {
        let wanted = desired.elements.of(set).unwrap_or(&none);
        let goes = |(key, value): &(&Key, &Value)| match wanted.get(*key) {
            Some(wanted) => wanted != *value,
            None => prune,
        };
        ops.extend(
            held.iter().filter(goes).map(|(key, _)| Op::Nft(NftOp::DeleteElement(set.clone(), key.clone()))),
        );
    }
    for (set, wanted) in desired.elements.sets() {
        let held = actual.elements.of(set).unwrap_or(&none);
        let comes = |(key, value): &(&Key, &Value)| held.get(*key) != Some(*value);
        ops.extend(wanted.iter().filter(comes).map(|(key, value)| {
            Op::Nft(NftOp::SetElement(Element { set: set.clone(), key: key.clone(), value: value.clone() }))
        }));
    }
    ops.extend(flows::ended(&actual.elements, &desired.elements, prune).into_iter().map(Op::EndFlows));
    ops
}

/// Whether it removes a check that must stay as long as the interfaces that it is about: of hairpin traffic, or of what
/// endpoints send.
fn unguards(op: &Op) -> bool {
    match op {
        Op::Nft(NftOp::DeleteTable(table)) => {
            matches!(table, Table::PublishFrames | Table::Guard | Table::GuardFrames)
        }
        Op::Nft(NftOp::DeleteElement(set, _)) => set.table == Table::PublishFrames,
        _ => false,
    }
}

/// Endpoints whose host's end is not in the kernel any more: their namespaces are gone, and they
/// are to be withdrawn.
pub fn lost_endpoints<'a>(
    actual: &'a Dataplane,
    desired: &'a Dataplane,
) -> impl Iterator<Item = Device> + 'a {
    desired
        .links
        .iter()
        .filter(|(device, link)| matches!(link, Link::Endpoint { .. }) && !actual.links.contains_key(device))
        .map(|(device, _)| *device)
}

fn cloned<K: Copy, V: Clone>((key, value): (&K, &V)) -> (K, V) {
    (*key, value.clone())
}

fn copied<K: Copy, V: Copy>((key, value): (&K, &V)) -> (K, V) {
    (*key, *value)
}

/// Adds the operations on links; returns the devices that are deleted, or made anew, and of these the ones that
/// are to be deleted in the end: an end of the tunnel goes when nothing leads through it any more.
fn links(
    actual: &Dataplane,
    desired: &Dataplane,
    prune: bool,
    ops: &mut Vec<Op>,
) -> (BTreeSet<Device>, Vec<Device>) {
    let (mut gone, mut last) = (BTreeSet::new(), Vec::new());
    for (device, link) in &actual.links {
        let remove = match desired.links.get(device) {
            None => prune,
            Some(wanted) => !can_become(link, wanted),
        };
        if remove {
            gone.insert(*device);
            match (desired.links.get(device), link) {
                (None, Link::Tunnel { .. }) => last.push(*device),
                _ => ops.push(Op::Link(LinkOp::Delete(*device))),
            }
        }
    }
    // Bridges first: they are the others' masters.
    let mut wanted: Vec<_> = desired.links.iter().collect();
    wanted.sort_by_key(|(_, link)| !matches!(link, Link::Bridge { .. }));
    for (device, link) in wanted {
        match actual.links.get(device).filter(|_| !gone.contains(device)) {
            None if matches!(link, Link::Endpoint { .. }) => {}
            None => ops.push(Op::Link(LinkOp::Add(*device, *link))),
            Some(found) => {
                let found = without_masters(*found, &gone);
                if found != *link {
                    ops.push(Op::Link(LinkOp::Set(*device, found, *link)));
                }
            }
        }
    }
    (gone, last)
}

/// A port whose bridge was deleted has none.
fn without_masters(mut link: Link, gone: &BTreeSet<Device>) -> Link {
    match &mut link {
        Link::Vxlan { master, .. } | Link::Tap { master, .. } | Link::Endpoint { master, .. } => {
            *master = master.filter(|bridge| !gone.contains(bridge));
        }
        Link::Bridge { .. } | Link::Tunnel { .. } => {}
    }
    link
}

/// Whether a device can be changed into what is wanted; else it must be made anew.
fn can_become(found: &Link, wanted: &Link) -> bool {
    match (found, wanted) {
        (
            Link::Vxlan { vni, local, port, sealed, .. },
            Link::Vxlan {
                vni: vni_wanted,
                local: local_wanted,
                port: port_wanted,
                sealed: sealed_wanted,
                ..
            },
        ) => (vni, local, port, sealed) == (vni_wanted, local_wanted, port_wanted, sealed_wanted),
        (Link::Tap { vni, .. }, Link::Tap { vni: wanted, .. }) => vni == wanted,
        (Link::Tunnel { kind, .. }, Link::Tunnel { kind: wanted, .. }) => kind == wanted,
        (Link::Bridge { .. }, Link::Bridge { .. }) | (Link::Endpoint { .. }, Link::Endpoint { .. }) => true,
        _ => false,
    }
}

fn set<T: Ord + Copy>(
    actual: &BTreeSet<T>,
    desired: &BTreeSet<T>,
    prune: bool,
    ops: &mut Vec<Op>,
    add: impl Fn(T) -> Op,
    del: impl Fn(T) -> Op,
) {
    if prune {
        ops.extend(actual.difference(desired).map(|item| del(*item)));
    }
    ops.extend(desired.difference(actual).map(|item| add(*item)));
}

fn map<K: Ord + Copy, V: PartialEq + Clone>(
    actual: &BTreeMap<K, V>,
    desired: &BTreeMap<K, V>,
    prune: bool,
    ops: &mut Vec<Op>,
    put: impl Fn(K, V) -> Op,
    del: impl Fn(K) -> Op,
) {
    if prune {
        ops.extend(actual.keys().filter(|key| !desired.contains_key(key)).map(|key| del(*key)));
    }
    ops.extend(
        desired
            .iter()
            .filter(|(key, value)| actual.get(key) != Some(value))
            .map(|(key, value)| put(*key, value.clone())),
    );
}
