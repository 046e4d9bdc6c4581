//! Dumps the actual data plane from the kernel, and reads devices, addresses and routes of the host.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkMessage};
use netlink_packet_route::neighbour::NeighbourMessage;
use netlink_packet_route::route::{RouteMessage, RouteProtocol};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::libc::{self, RTM_NEWADDR, RTM_NEWLINK, RTM_NEWNEIGH, RTM_NEWROUTE};
use ovl_dataplane::device::{Device, Role};
use ovl_dataplane::state::{Dataplane, Hop, PROTOCOL};

use super::attribute::{attributes, ip, u8_at};
use super::error::{KernelError, Result};
use super::fact;
use super::{HostConnections, Underlay};

use super::link::{self, LinkView, Neighbour, Traffic};
use super::localnet;
use super::message;
use super::socket::{Batch, Dump, Route};
use super::sysctl;

/// The MTU of Ethernet in bytes.
const ETHERNET_MTU: u16 = 1500;

/// The devices of the host by index, as a dump found them.
#[derive(Debug, Default)]
pub(super) struct DeviceNames {
    /// The names of all devices.
    pub(super) all: HashMap<u32, Device>,
    /// The devices of ovl.
    pub(super) ours: HashMap<u32, Device>,
    /// The doomed devices: host interfaces of removed endpoints.
    pub(super) doomed: Vec<u32>,
    /// The MTU of each device of the host, and whether it is up.
    pub(super) others: HashMap<u32, (u32, bool)>,
}

/// Dumps everything except the nftables tables and the configuration of tunnels.
pub(super) fn kernel(route: &mut Route) -> Result<(Dataplane, DeviceNames)> {
    let mut kernel = Dataplane::default();
    let names = links(route, &mut kernel)?;
    for message in addresses(route)?.messages().filter(|message| message.kind == RTM_NEWADDR) {
        let Some((index, net)) = fact::address(message.payload) else { continue };
        match names.ours.get(&index) {
            Some(device) if fact::has_addresses(*device) => {
                kernel.addresses.insert((*device, net));
            }
            Some(_) => {}
            None if fact::is_announced(message.payload) => {
                kernel.announced.extend(names.all.get(&index).map(|device| (*device, net.addr())));
            }
            None => {}
        }
    }
    for family in [AddressFamily::Bridge, AddressFamily::Unspec] {
        let dump = neighbours(route, family)?;
        for message in dump.messages().filter(|message| message.kind == RTM_NEWNEIGH) {
            if let Some(entry) = Neighbour::parse(message.payload)
                && let Some(device) = names.ours.get(&entry.index)
                && let Some((key, value)) = fact::of_neighbour(&entry, *device, kernel.links.get(device))
            {
                fact::set(&mut kernel, key, value);
            }
        }
    }
    kernel.routes = routes(route, &names.ours)?;
    for name in sysctl::WATCHED {
        if let Some(value) = sysctl::read(name) {
            kernel.sysctls.insert(name.to_owned(), value);
        }
    }
    Ok((kernel, names))
}

fn links(route: &mut Route, kernel: &mut Dataplane) -> Result<DeviceNames> {
    let dump = all_links(route)?;
    let mut names = DeviceNames::default();
    let mut localnets = Vec::new();
    let views = || {
        dump.messages()
            .filter(|message| message.kind == RTM_NEWLINK)
            .filter_map(|message| LinkView::parse(message.payload))
    };
    for view in views() {
        if let Some(device) = view.device() {
            names.all.insert(view.index, device);
        }
    }
    for view in views() {
        match view.ours().zip(view.model(&names.all)) {
            Some((device, link)) => {
                kernel.links.insert(device, link);
                if view.localnet {
                    localnets.push((device, view.index));
                }
                names.ours.insert(view.index, device);
            }
            None if view.is_doomed() => names.doomed.push(view.index),
            None => {
                names.others.insert(view.index, (view.mtu, view.up));
            }
        }
    }
    for (device, index) in localnets {
        if localnet::is_filtered(route, index)? {
            kernel.localnets.insert(device);
        }
    }
    Ok(names)
}

/// Reads what passed the host interfaces of all endpoints.
pub(super) fn traffic(route: &mut Route) -> Result<BTreeMap<Device, Traffic>> {
    let dump = route.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()))?;
    let endpoints = dump
        .messages()
        .filter(|message| message.kind == RTM_NEWLINK)
        .filter_map(|message| Some((LinkView::parse(message.payload)?, message.payload)))
        .filter_map(|(view, payload)| Some((view.device()?, link::traffic(payload)?)))
        .filter(|(device, _)| matches!(device.role(), Some(Role::Endpoint(_))));
    Ok(endpoints.collect())
}

/// Dumps all devices, without their statistics.
pub(super) fn all_links(route: &mut Route) -> Result<Dump> {
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])];
    route.dump(&RouteNetlinkMessage::GetLink(message))
}

fn addresses(route: &mut Route) -> Result<Dump> {
    route.dump(&RouteNetlinkMessage::GetAddress(AddressMessage::default()))
}

fn neighbours(route: &mut Route, family: AddressFamily) -> Result<Dump> {
    let mut message = NeighbourMessage::default();
    message.header.family = family;
    route.dump(&RouteNetlinkMessage::GetNeighbour(message))
}

/// Lists the announced addresses of this host, with the indexes of their devices.
pub(super) fn announced(route: &mut Route) -> Result<BTreeSet<(u32, IpAddr)>> {
    let dump = addresses(route)?;
    let ours = dump.messages().filter(|message| message.kind == RTM_NEWADDR);
    let ours = ours.filter(|message| fact::is_announced(message.payload));
    Ok(ours
        .filter_map(|message| fact::address(message.payload))
        .map(|(index, net)| (index, net.addr()))
        .collect())
}

/// Looks up the device that has an address, or by which these peers are reached from there.
pub(super) fn underlay(route: &mut Route, vtep: IpAddr, peers: &[IpAddr]) -> Result<Underlay> {
    let dump = addresses(route)?;
    let (index, prefix) = dump
        .messages()
        .filter(|message| message.kind == RTM_NEWADDR)
        .filter_map(|message| fact::address(message.payload))
        .find(|(_, net)| net.addr() == vtep)
        .ok_or_else(|| KernelError::Other(format!("no device of this host has the address {vtep}")))?;
    let links = all_links(route)?;
    let views = || links.messages().filter_map(|message| LinkView::parse(message.payload));
    let holder = views()
        .find(|view| view.index == index)
        .ok_or_else(|| KernelError::Other(format!("the device with the address {vtep} was deleted")))?;
    let mtu = |view: &LinkView<'_>| view.mtu.try_into().unwrap_or(u16::MAX);
    let by_peers = holder.only_holds_addresses();
    let mut ways = BTreeSet::new();
    if by_peers {
        for peer in peers {
            // A peer without a route says nothing about the others.
            ways.extend(output_interface(route, *peer).ok().flatten());
        }
    }
    let way = views()
        .filter(|view| ways.contains(&view.index) && !view.only_holds_addresses())
        .min_by_key(|view| (view.mtu, view.index));
    let found = way.as_ref().unwrap_or(&holder);
    Ok(Underlay {
        device: found.name.to_owned(),
        index: found.index,
        // Nothing says how large packets may be, as long as there is no way to a peer.
        mtu: if by_peers && way.is_none() { mtu(found).min(ETHERNET_MTU) } else { mtu(found) },
        prefix,
        by_peers,
    })
}

/// Looks up the output interface of packets to an address. `None` if there is no route.
pub(super) fn output_interface(route: &mut Route, address: IpAddr) -> Result<Option<u32>> {
    let mut batch = Batch::default();
    batch.push(message::get_route(address), 0);
    let (_, answers) = route.execute(batch)?;
    Ok(answers.first().and_then(|answer| destination_device(&answer.payload)))
}

/// Dumps the routes of ovl.
pub(super) fn routes(route: &mut Route, ours: &HashMap<u32, Device>) -> Result<BTreeMap<IpNet, Hop>> {
    let mut routes = BTreeMap::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        // The kernel filters by protocol: a host may have a full routing table.
        message.header.protocol = RouteProtocol::Other(PROTOCOL);
        let dump = route.dump(&RouteNetlinkMessage::GetRoute(message))?;
        for message in dump.messages().filter(|message| message.kind == RTM_NEWROUTE) {
            routes.extend(fact::route(message.payload, ours));
        }
    }
    Ok(routes)
}

/// Lists the prefixes of the addresses and routes of the host, except those of ovl devices and those that every host
/// has, such as loopback.
pub(super) fn prefixes(route: &mut Route) -> Result<Vec<IpNet>> {
    let names = links(route, &mut Dataplane::default())?;
    let mut prefixes = Vec::new();
    let dump = addresses(route)?;
    for message in dump.messages().filter(|message| message.kind == RTM_NEWADDR) {
        if let Some((index, net)) = fact::address(message.payload)
            && !names.ours.contains_key(&index)
        {
            prefixes.push(net.trunc());
        }
    }
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        let dump = route.dump(&RouteNetlinkMessage::GetRoute(message))?;
        for message in dump.messages().filter(|message| message.kind == RTM_NEWROUTE) {
            if let Some((net, device)) = destination(message.payload)
                && device.is_none_or(|index| !names.ours.contains_key(&index))
            {
                prefixes.push(net);
            }
        }
    }
    prefixes.retain(|net| net.prefix_len() > 0 && !is_everywhere(net.addr()));
    prefixes.sort();
    prefixes.dedup();
    Ok(prefixes)
}

/// Reads the prefixes of the host's addresses and the gateways of its default routes, except those of ovl.
pub(super) fn host_connections(route: &mut Route) -> Result<HostConnections> {
    let names = links(route, &mut Dataplane::default())?;
    let is_foreign = |index: &u32| {
        let name = names.all.get(index);
        !names.ours.contains_key(index) && name.is_none_or(|name| name.role().is_none())
    };
    let mut found = HostConnections::default();
    let dump = addresses(route)?;
    for message in dump.messages().filter(|message| message.kind == RTM_NEWADDR) {
        if let Some((index, prefixes)) = fact::connected(message.payload)
            && is_foreign(&index)
            && !fact::is_announced(message.payload)
        {
            let device = names.all.get(&index).map_or_else(String::new, ToString::to_string);
            let prefixes = prefixes.into_iter().filter(|net| !is_everywhere(net.addr()));
            found.connected.extend(prefixes.map(|net| (net, device.clone())));
        }
    }
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        let dump = route.dump(&RouteNetlinkMessage::GetRoute(message))?;
        let routes = dump.messages().filter(|message| message.kind == RTM_NEWROUTE);
        let gateways =
            routes.filter(|it| fact::is_default_route(it.payload)).flat_map(|it| fact::gateways(it.payload));
        found.gateways.extend(gateways.filter(|gateway| !is_everywhere(*gateway)));
    }
    Ok(found)
}

/// Parses the destination of a route, and its output interface if it has a single one. `None` for a default route and
/// for routes that repeat addresses.
fn destination(payload: &[u8]) -> Option<(IpNet, Option<u32>)> {
    /// The types local, broadcast, anycast and multicast, which repeat the addresses of the host.
    const NOT_DESTINATIONS: std::ops::RangeInclusive<u8> = libc::RTN_LOCAL..=libc::RTN_MULTICAST;
    if NOT_DESTINATIONS.contains(&u8_at(payload, 7)?) {
        return None;
    }
    let (mut to, mut device) = (None, None);
    for (kind, value) in attributes(payload, 12) {
        match kind {
            libc::RTA_DST => to = ip(value),
            libc::RTA_OIF => device = super::attribute::u32_at(value, 0),
            _ => {}
        }
    }
    // A default route has no destination.
    Some((IpNet::new(to?, u8_at(payload, 1)?).ok()?, device))
}

fn destination_device(payload: &[u8]) -> Option<u32> {
    attributes(payload, 12)
        .find(|(kind, _)| *kind == libc::RTA_OIF)
        .and_then(|(_, value)| super::attribute::u32_at(value, 0))
}

/// Whether every host has an address like this: loopback, multicast or link-local.
fn is_everywhere(address: IpAddr) -> bool {
    address.is_loopback()
        || address.is_multicast()
        || matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}

/// Whether a namespace has a default route of an address family in its main table.
pub(super) fn has_default_route(route: &mut Route, family: AddressFamily) -> Result<bool> {
    let mut message = RouteMessage::default();
    message.header.address_family = family;
    message.header.table = libc::RT_TABLE_MAIN;
    let dump = route.dump(&RouteNetlinkMessage::GetRoute(message))?;
    Ok(dump.messages().any(|message| {
        message.kind == RTM_NEWROUTE
            && u8_at(message.payload, 1) == Some(0)
            && u8_at(message.payload, 7) == Some(libc::RTN_UNICAST)
    }))
}
