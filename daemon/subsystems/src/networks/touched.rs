//! Plans the change of single endpoints of a network without a comparison of the whole network.
//!
//! [`plan`] returns what [`super::desired::network_part`] and [`ovl_dataplane::diff::diff`] return for the whole
//! network, as long as the network's devices are unchanged; a property test proves it. It looks only at the entries
//! that can have changed, and at the endpoints that influence them: those with the same MAC address or a common
//! address. The module owns no state: its caller keeps [`TouchedEndpoints`] and the data plane that was last sent.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use ovl_cluster::addresses;
use ovl_proto::id::{EndpointId, Mac, NetworkId, NodeId};
use ovl_proto::object::{Mode, Network};
use ovl_proto::table::Endpoint;

use super::mtu::network_mtu;
use super::{multicast, routed, switched as devices_of};
use crate::endpoints::switched::{Exit, FrameRoutes, MacClaim, own_endpoint, rank, shared_source};
use crate::endpoints::{self, hairpin};
use crate::local::Local;
use ovl_cluster::view::{Node, Placed, View};
use ovl_dataplane::device::Device;
use ovl_dataplane::diff::diff;
use ovl_dataplane::nft::{Key, Set};
use ovl_dataplane::op::Op;
use ovl_dataplane::state::Dataplane;

/// Endpoints of one network that were added, removed or changed, by their old and new properties.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TouchedEndpoints {
    own: BTreeSet<EndpointId>,
    hosts: BTreeSet<NodeId>,
    macs: BTreeSet<Mac>,
    addresses: BTreeSet<IpAddr>,
    /// Whether other hosts may get other multicast: their endpoints, or groups of them, have changed.
    groups: bool,
}

impl TouchedEndpoints {
    /// Records the old or the new value of an endpoint.
    pub fn note(&mut self, me: NodeId, host: NodeId, endpoint: &Endpoint) {
        if host == me {
            self.own.insert(endpoint.id);
        } else {
            self.groups = true;
        }
        self.hosts.insert(host);
        self.macs.insert(endpoint.mac);
        self.macs.extend(&endpoint.allowed_macs);
        self.addresses.extend(endpoint.addresses.iter().map(|net| net.addr()));
    }

    /// Records that an attach of an endpoint of this host began or ended.
    pub fn note_attach(&mut self, endpoint: EndpointId) {
        self.own.insert(endpoint);
    }

    /// Records that endpoints have joined or left multicast groups.
    pub fn note_groups(&mut self) {
        self.groups = true;
    }

    /// Adds the endpoints of another set.
    pub fn merge(&mut self, other: Self) {
        let Self { own, hosts, macs, addresses, groups } = other;
        self.groups |= groups;
        self.own.extend(own);
        self.hosts.extend(hosts);
        self.macs.extend(macs);
        self.addresses.extend(addresses);
    }
}

/// Returns the operations that bring the network up to date, and applies them to `applied`, the data plane that was
/// last sent for it. `None` if the network must be compared as a whole.
pub fn plan(
    view: &View,
    local: &Local,
    id: NetworkId,
    touched: TouchedEndpoints,
    applied: &mut Dataplane,
    prune: bool,
) -> Option<Vec<Op>> {
    let (network, own) = (&view.networks.get(&id)?.network, view.own()?);
    if !local.is_built(view, id) {
        return None;
    }
    let mtu = network_mtu(view, network);
    let mut devices = Dataplane::default();
    match network.mode {
        Mode::L2 => devices_of::devices(&mut devices, view, network, own, mtu),
        Mode::L3 => routed::devices(&mut devices, network, own, mtu),
    }
    if devices.links.iter().any(|(device, link)| applied.links.get(device) != Some(link)) {
        return None;
    }

    let (was, is) = match network.mode {
        Mode::L2 => switched(view, local, network, own, touched, applied, mtu),
        Mode::L3 => on_devices(view, local, network, own, &touched, applied, mtu),
    };
    let ops = diff(&was, &is, prune);
    if prune {
        take_out(applied, &was);
    }
    applied.merge(is);
    Some(ops)
}

/// Returns the sent and the desired data plane of the touched endpoints of a routed network. Only local endpoints
/// count: remote ones are covered by the route of their block.
fn on_devices(
    view: &View,
    local: &Local,
    network: &Network,
    own: &Node,
    touched: &TouchedEndpoints,
    applied: &Dataplane,
    mtu: u16,
) -> (Dataplane, Dataplane) {
    let (mut was, mut is) = (Dataplane::default(), Dataplane::default());
    for id in &touched.own {
        let device = Device::endpoint(*id);
        was.links.extend(applied.links.get(&device).map(|link| (device, *link)));
        was.addresses.extend(applied.addresses.iter().filter(|(on, _)| *on == device));
        let localhost = IpAddr::from(Ipv4Addr::LOCALHOST);
        for address in touched.addresses.iter().chain([&localhost]) {
            let key = (device, *address);
            was.neighbours.extend(applied.neighbours.get(&key).map(|mac| (key, *mac)));
            let to = IpNet::from(*address);
            let hop = applied.routes.get(&to).filter(|hop| hop.device == Some(device));
            was.routes.extend(hop.map(|hop| (to, *hop)));
        }
        if let Some(endpoint) = own.table.endpoint(*id).filter(|endpoint| endpoint.network == network.id) {
            endpoints::routed::own_endpoint(&mut is, view, local, network, endpoint, mtu);
        }
    }
    (was, is)
}

/// Returns the sent and the desired data plane of the touched endpoints of a switched network.
fn switched(
    view: &View,
    local: &Local,
    network: &Network,
    own: &Node,
    touched: TouchedEndpoints,
    applied: &Dataplane,
    mtu: u16,
) -> (Dataplane, Dataplane) {
    let id = network.id;
    let bridge = Device::bridge(id);
    let TouchedEndpoints { own: ids, mut hosts, mut macs, mut addresses, groups } = touched;
    // An endpoint that is allowed to send from one of the addresses may do so only while no other has it.
    for placed in addresses.iter().flat_map(|address| view.all_allowing_address(id, *address)) {
        macs.insert(placed.endpoint.mac);
        macs.extend(&placed.endpoint.allowed_macs);
    }
    // An endpoint with the same MAC address may have won or lost it, and with it all of its entries.
    for placed in macs.iter().flat_map(|mac| view.all_with_mac(id, *mac)) {
        hosts.insert(placed.node.record.id);
        addresses.extend(placed.endpoint.addresses.iter().map(|net| net.addr()));
    }
    let routes = FrameRoutes::of(view, local, network);
    let out: Vec<Device> = routes.devices().collect();
    let (mut was, mut is) = (Dataplane::default(), Dataplane::default());
    if groups {
        multicast::part(&mut is, view, network, &routes);
        multicast::sent(&mut was, applied);
    }
    let exits: BTreeSet<Exit> = hosts.iter().filter_map(|host| routes.to(view.nodes.get(host)?)).collect();

    let wins = |placed: &Placed<'_>| {
        let others = view.all_with_mac(id, placed.endpoint.mac).filter(|other| view.is_counted(other));
        others.map(|other| rank(network, &other)).min() == Some(rank(network, placed))
    };
    let claim = |placed| MacClaim::of(view, local, network, &routes, placed, wins);
    for mac in &macs {
        let placed = view.all_with_mac(id, *mac).filter(|placed| view.is_counted(placed));
        for claim in placed.filter_map(claim) {
            claim.mac(&mut is, view);
        }
        is.sources.extend(shared_source(view, network, &routes, *mac));
    }
    for address in &addresses {
        let placed = view.all_with_address(id, *address).filter(|placed| view.is_counted(placed));
        for claim in placed.filter_map(claim) {
            is.neighbours.insert((bridge, *address), claim.endpoint().mac);
        }
    }
    let at_remotes = || {
        let reached = |node: &&Node| routes.to(node).is_some_and(|exit| exits.contains(&exit));
        view.nodes.values().filter(reached)
    };
    for node in at_remotes() {
        let mut claims = node
            .table
            .endpoints_on(id)
            .map(|endpoint| Placed { node, endpoint })
            .filter(|placed| view.is_counted(placed))
            .filter_map(claim);
        if let Some(exit) = claims.next().and_then(|claim| claim.exit()) {
            endpoints::switched::host(&mut is, &routes, node, exit);
        }
    }
    for endpoint in ids.iter().filter_map(|id| own.table.endpoint(*id)).filter(|own| own.network == id) {
        own_endpoint(&mut is, view, local, network, endpoint, mtu);
    }

    for endpoint in ids.iter().filter_map(|id| local.attaches.get(*id)).filter(|own| own.network == id) {
        hairpin::guard(&mut is, view, network, endpoint);
    }

    for device in ids.iter().map(|id| Device::endpoint(*id)) {
        was.links.extend(applied.links.get(&device).map(|link| (device, *link)));
        take_over(&mut was, applied, hairpin::guard_of(device));
    }
    for mac in &macs {
        for key in out.iter().map(|device| (*device, *mac)) {
            was.remotes.extend(applied.remotes.get(&key).map(|remote| (key, *remote)));
            was.sources.extend(applied.sources.get(&key).map(|source| (key, source.clone())));
        }
        let ports = view.all_with_mac(id, *mac).map(|placed| placed.endpoint.id).chain(ids.iter().copied());
        let ports = ports.map(Device::endpoint).chain(out.iter().copied()).map(|port| (port, *mac));
        was.ports.extend(ports.filter(|port| applied.ports.contains(port)));
    }
    for key in addresses.iter().map(|address| (bridge, *address)) {
        was.neighbours.extend(applied.neighbours.get(&key).map(|mac| (key, *mac)));
    }
    for Exit { device, remote } in &exits {
        was.floods.extend(applied.floods.get(&(*device, *remote)));
    }
    for key in at_remotes().map(|node| (Device::vxlan(id), addresses::mac_of_host(id, node.record.id))) {
        was.remotes.extend(applied.remotes.get(&key).map(|remote| (key, *remote)));
    }
    (was, is)
}

/// Copies an element that was sent, if it was.
fn take_over(was: &mut Dataplane, applied: &Dataplane, (set, key): (&'static Set, Key)) {
    if let Some(value) = applied.elements.of(set).and_then(|held| held.get(&key)) {
        was.elements.insert(set, key, value.clone());
    }
}

/// Removes the entries of `part` from `applied`.
fn take_out(applied: &mut Dataplane, part: &Dataplane) {
    for device in part.links.keys() {
        applied.links.remove(device);
    }
    for address in &part.addresses {
        applied.addresses.remove(address);
    }
    for key in part.remotes.keys() {
        applied.remotes.remove(key);
    }
    for key in part.sources.keys() {
        applied.sources.remove(key);
    }
    for to in part.routes.keys() {
        applied.routes.remove(to);
    }
    for (set, held) in part.elements.sets() {
        for key in held.keys() {
            applied.elements.remove(set, key);
        }
    }
    for key in part.neighbours.keys() {
        applied.neighbours.remove(key);
    }
    for key in &part.ports {
        applied.ports.remove(key);
    }
    for key in &part.floods {
        applied.floods.remove(key);
    }
    for key in &part.groups {
        applied.groups.remove(key);
    }
}
