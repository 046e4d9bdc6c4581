//! The data plane of one endpoint of a switched network: a bridge port on its own host, FDB entries on the others.
//!
//! If two endpoints claim one MAC address, all hosts choose the same one ([`rank`]). The module owns no state. Begin to
//! read at [`MacClaim`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_cluster::addresses;
use ovl_cluster::view::{Node, Placed, View};
use ovl_dataplane::device::Device;
use ovl_dataplane::state::{Dataplane, Link, Remote, Source};
use ovl_proto::id::{EndpointId, Mac, NetworkId, NodeId};
use ovl_proto::object::Network;
use ovl_proto::table::Endpoint;

use super::hairpin;
use super::silent::silent;
use crate::encryption::tunnel;
use crate::local::Local;

/// How a switched network's frames leave for a remote host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Exit {
    /// The VXLAN device of the network.
    pub(crate) device: Device,
    /// The VTEP of the host.
    pub(crate) remote: Remote,
}

/// How a switched network's frames leave for remote hosts.
#[derive(Debug)]
pub(crate) struct FrameRoutes {
    network: NetworkId,
    /// The hosts to whose VTEPs on the underlay frames may be sent.
    plain: BTreeSet<NodeId>,
    /// The device in the tunnel.
    sealed: Device,
    /// The VTEPs inside the tunnel, of the hosts from which frames are accepted there.
    inside: BTreeMap<NodeId, Remote>,
    /// The hosts to which all is sent through the tunnel.
    through: BTreeSet<NodeId>,
}

impl FrameRoutes {
    /// Returns the routes of a network's frames.
    pub(crate) fn of(view: &View, local: &Local, network: &Network) -> Self {
        let is_plain = |node: &&Node| !network.encrypted && view.is_plainly_reached(node);
        let plain = view.nodes.values().filter(is_plain).map(|node| node.record.id);
        let is_sealed = |node: &&Node| tunnel::is_sealed(view, local, network, node);
        let sealed = view.nodes.values().filter(is_sealed).map(|node| node.record.id);
        Self {
            network: network.id,
            plain: plain.collect(),
            sealed: tunnel::vxlan(network),
            inside: if network.may_be_sealed() { tunnel::remotes(view) } else { BTreeMap::new() },
            through: sealed.collect(),
        }
    }

    /// Returns how frames leave for a host. `None` if it cannot be reached.
    pub(crate) fn to(&self, node: &Node) -> Option<Exit> {
        if self.through.contains(&node.record.id) { self.inside(node) } else { self.outside(node) }
    }

    /// Returns the way to a host on the underlay. `None` if there is none.
    fn outside(&self, node: &Node) -> Option<Exit> {
        let remote = Remote { vtep: node.record.vtep, port: node.record.vxlan_port };
        self.plain.contains(&node.record.id).then_some(Exit { device: Device::vxlan(self.network), remote })
    }

    /// Returns the way to a host inside the tunnel, by which its frames are accepted whether or not those to it go there. `None` if
    /// there is none.
    fn inside(&self, node: &Node) -> Option<Exit> {
        let remote = *self.inside.get(&node.record.id)?;
        Some(Exit { device: self.sealed, remote })
    }

    /// The devices by which frames may leave.
    pub(crate) fn devices(&self) -> impl Iterator<Item = Device> {
        let plain = Device::vxlan(self.network);
        [plain].into_iter().chain(Some(self.sealed).filter(|sealed| *sealed != plain))
    }
}

/// An endpoint that holds its MAC address, so that frames are sent to it.
#[derive(Debug)]
pub(crate) struct MacClaim<'a> {
    endpoint: &'a Endpoint,
    exit: Option<Exit>,
    /// The device and the VTEP from which alone frames from its MAC address are accepted in the tunnel. `None` if none are.
    inside: Option<Exit>,
}

impl<'a> MacClaim<'a> {
    /// Returns the claim of an endpoint. `None` if it is outside the network's subnets, does not win its MAC address,
    /// is isolated, or its host cannot be reached.
    pub(crate) fn of(
        view: &View,
        local: &Local,
        network: &Network,
        routes: &FrameRoutes,
        placed: Placed<'a>,
        wins: impl Fn(&Placed<'_>) -> bool,
    ) -> Option<Self> {
        let Placed { node, endpoint } = placed;
        let usable =
            |address: IpAddr| network.subnets.iter().any(|subnet| addresses::is_usable(address, subnet));
        if !endpoint.addresses.iter().all(|net| usable(net.addr())) || !wins(&placed) {
            return None;
        }
        let mine = node.record.id == view.me;
        let exit = if mine { None } else { Some(routes.to(node)?) };
        if mine && local.isolation.contains(endpoint.id) {
            return None;
        }
        let inside = routes.inside(node).filter(|_| !mine);
        Some(Self { endpoint, exit, inside })
    }

    /// Returns the endpoint.
    pub(crate) fn endpoint(&self) -> &'a Endpoint {
        self.endpoint
    }

    /// Returns how frames leave for its host. `None` if it is on this host.
    pub(crate) fn exit(&self) -> Option<Exit> {
        self.exit
    }

    /// Adds the FDB entries of the endpoint's MAC address.
    pub(crate) fn mac(&self, dataplane: &mut Dataplane, view: &View) {
        let Endpoint { id, mac, .. } = *self.endpoint;
        dataplane.remotes.extend(self.exit.map(|exit| ((exit.device, mac), exit.remote)));
        dataplane.ports.insert((self.exit.map_or_else(|| Device::endpoint(id), |exit| exit.device), mac));
        if let Some(Exit { device, remote }) = self.inside {
            let (from, addresses) = ([remote.vtep].into(), source_addresses(view, self.endpoint));
            dataplane.sources.insert((device, mac), Source { from, addresses });
        }
    }
}

/// Adds the entries of a remote host with endpoints on the network: its flood entry and, unless the network is encrypted, the
/// FDB entry of its VXLAN device, to which path probes are sent. The tunnel has probes of its own.
pub(crate) fn host(dataplane: &mut Dataplane, routes: &FrameRoutes, node: &Node, exit: Exit) {
    dataplane.floods.insert((exit.device, exit.remote));
    // They also find out when what is sealed for their loss can be sent in plain text again.
    if let Some(Exit { device, remote }) = routes.outside(node) {
        let mac = addresses::mac_of_host(routes.network, node.record.id);
        dataplane.remotes.insert((device, mac), remote);
    }
}

/// Returns the addresses that hosts accept from an endpoint: its own, and those that it is allowed in addition and no
/// other endpoint has.
fn source_addresses(view: &View, endpoint: &Endpoint) -> BTreeSet<IpAddr> {
    let is_taken = |address: &IpAddr| {
        let mut holders = view.all_with_address(endpoint.network, *address);
        holders.any(|holder| holder.endpoint.id != endpoint.id && view.is_counted(&holder))
    };
    let subnets = view.networks.get(&endpoint.network).map(|found| &found.network.subnets);
    let is_usable =
        |address: &IpAddr| subnets.into_iter().flatten().any(|subnet| addresses::is_usable(*address, subnet));
    let allowed = endpoint.allowed_addresses().filter(|address| is_usable(address) && !is_taken(address));
    endpoint.addresses.iter().map(IpNet::addr).chain(allowed).collect()
}

/// Returns who may send in the tunnel from a MAC address of a network that no endpoint has as its own: the remote endpoints
/// that are allowed to. `None` if there are none.
pub(crate) fn shared_source(
    view: &View,
    network: &Network,
    routes: &FrameRoutes,
    mac: Mac,
) -> Option<((Device, Mac), Source)> {
    if !network.may_be_sealed() || view.all_with_mac(network.id, mac).any(|placed| view.is_counted(&placed)) {
        return None;
    }
    let mut source = Source { from: BTreeSet::new(), addresses: BTreeSet::new() };
    let placed = view.all_allowing_mac(network.id, mac);
    for placed in placed.filter(|placed| placed.node.record.id != view.me && view.is_counted(placed)) {
        if let Some(exit) = routes.inside(placed.node) {
            source.from.insert(exit.remote.vtep);
            source.addresses.extend(source_addresses(view, placed.endpoint));
        }
    }
    (!source.from.is_empty()).then_some(((routes.sealed, mac), source))
}

/// Adds the host interface of a local endpoint, which is down if the endpoint is isolated.
pub(crate) fn own_endpoint(
    dataplane: &mut Dataplane,
    view: &View,
    local: &Local,
    network: &Network,
    endpoint: &Endpoint,
    mtu: u16,
) {
    if local.isolation.contains(endpoint.id) {
        silent(dataplane, endpoint, mtu);
    } else {
        port(dataplane, view, network, endpoint, mtu);
    }
}

/// Adds a bridge port, with hairpin mode if the endpoint needs it.
fn port(dataplane: &mut Dataplane, view: &View, network: &Network, endpoint: &Endpoint, mtu: u16) {
    let hairpin = hairpin::is_needed(view, network, endpoint);
    let link =
        Link::Endpoint { mtu, master: Some(Device::bridge(network.id)), up: true, tuned: true, hairpin };
    dataplane.links.insert(Device::endpoint(endpoint.id), link);
    hairpin::guard(dataplane, view, network, endpoint);
}

/// Adds the bridge port of a local endpoint, and its FDB entry and neighbours.
pub(super) fn endpoint_part(
    dataplane: &mut Dataplane,
    view: &View,
    network: &Network,
    endpoint: &Endpoint,
    mtu: u16,
) {
    let (device, bridge) = (Device::endpoint(endpoint.id), Device::bridge(network.id));
    port(dataplane, view, network, endpoint, mtu);
    dataplane.ports.insert((device, endpoint.mac));
    for address in &endpoint.addresses {
        dataplane.neighbours.insert((bridge, address.addr()), endpoint.mac);
    }
}

/// Orders the endpoints that claim a MAC address; the smallest rank holds it.
///
/// The endpoint from whose IP address the MAC address is derived comes first (no other endpoint can hold that IP
/// address), then the one on the host with the smallest id. All hosts compute the same order, so a frame is never
/// forwarded between hosts that disagree.
pub(crate) fn rank(network: &Network, placed: &Placed<'_>) -> (bool, NodeId, EndpointId) {
    let makes = |net: &IpNet| addresses::mac_of(network.id, net.addr()) == placed.endpoint.mac;
    let by_right = placed.endpoint.addresses.iter().any(makes);
    (!by_right, placed.node.record.id, placed.endpoint.id)
}
