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
use ovl_proto::id::{EndpointId, Mac, NodeId};
use ovl_proto::object::Network;
use ovl_proto::table::Endpoint;

use super::hairpin;
use super::silent::silent;
use crate::encryption::tunnel;
use crate::local::Local;

/// The VTEPs to which a switched network's frames for remote hosts are sent.
#[derive(Debug)]
pub(crate) enum FrameRoutes {
    /// VTEPs on the underlay, of one address family: a VXLAN device sends to one family only. `status` reports hosts of
    /// the other family.
    Underlay {
        /// IPv4.
        v4: Option<bool>,
    },
    /// VTEPs inside the tunnel, of these hosts only.
    Tunnel(BTreeMap<NodeId, Remote>),
}

impl FrameRoutes {
    /// Returns the routes of a network's frames.
    pub(crate) fn of(view: &View, network: &Network) -> Self {
        match network.encrypted {
            true => Self::Tunnel(tunnel::remotes(view)),
            false => {
                // A host behind NAT reaches no other one with what is not sealed.
                let own = view.own().filter(|own| !own.record.is_behind_nat());
                Self::Underlay { v4: own.map(|own| own.record.vtep.is_ipv4()) }
            }
        }
    }

    /// Returns the VTEP of a host. `None` if it cannot be reached.
    pub(crate) fn to(&self, node: &Node) -> Option<Remote> {
        let Remote { vtep, port } = Remote { vtep: node.record.vtep, port: node.record.vxlan_port };
        match self {
            Self::Underlay { v4 } => {
                let is_reached = Some(vtep.is_ipv4()) == *v4 && !node.record.is_behind_nat();
                is_reached.then_some(Remote { vtep, port })
            }
            Self::Tunnel(remotes) => remotes.get(&node.record.id).copied(),
        }
    }
}

/// An endpoint that holds its MAC address, so that frames are sent to it.
#[derive(Debug)]
pub(crate) struct MacClaim<'a> {
    endpoint: &'a Endpoint,
    remote: Option<Remote>,
    /// Whether frames from its MAC address are accepted only from that VTEP: the network is encrypted.
    checks_source: bool,
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
        let remote = if mine { None } else { Some(routes.to(node)?) };
        if mine && local.isolation.contains(endpoint.id) {
            return None;
        }
        Some(Self { endpoint, remote, checks_source: network.encrypted })
    }

    /// Returns the endpoint.
    pub(crate) fn endpoint(&self) -> &'a Endpoint {
        self.endpoint
    }

    /// Returns the VTEP of its host. `None` if it is on this host.
    pub(crate) fn remote(&self) -> Option<Remote> {
        self.remote
    }

    /// Adds the FDB entries of the endpoint's MAC address.
    pub(crate) fn mac(&self, dataplane: &mut Dataplane, view: &View) {
        let Endpoint { id, network, mac, .. } = *self.endpoint;
        let vxlan = Device::vxlan(network);
        dataplane.remotes.extend(self.remote.map(|remote| ((vxlan, mac), remote)));
        dataplane.ports.insert((if self.remote.is_some() { vxlan } else { Device::endpoint(id) }, mac));
        if let Some(remote) = self.remote.filter(|_| self.checks_source) {
            let (from, addresses) = ([remote.vtep].into(), source_addresses(view, self.endpoint));
            dataplane.sources.insert((vxlan, mac), Source { from, addresses });
        }
    }
}

/// Adds the entries of a remote host with endpoints on the network: its flood entry and, if the network is unencrypted, the
/// FDB entry of its VXLAN device, to which path probes are sent. The tunnel has probes of its own.
pub(crate) fn host(dataplane: &mut Dataplane, network: &Network, node: &Node, remote: Remote) {
    let vxlan = Device::vxlan(network.id);
    dataplane.floods.insert((vxlan, remote));
    if !network.encrypted {
        dataplane.remotes.insert((vxlan, addresses::mac_of_host(network.id, node.record.id)), remote);
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

/// Returns who may send from a MAC address of an encrypted network that no endpoint has as its own: the remote endpoints
/// that are allowed to. `None` if there are none.
pub(crate) fn shared_source(
    view: &View,
    network: &Network,
    routes: &FrameRoutes,
    mac: Mac,
) -> Option<Source> {
    if !network.encrypted || view.all_with_mac(network.id, mac).any(|placed| view.is_counted(&placed)) {
        return None;
    }
    let mut source = Source { from: BTreeSet::new(), addresses: BTreeSet::new() };
    let placed = view.all_allowing_mac(network.id, mac);
    for placed in placed.filter(|placed| placed.node.record.id != view.me && view.is_counted(placed)) {
        if let Some(remote) = routes.to(placed.node) {
            source.from.insert(remote.vtep);
            source.addresses.extend(source_addresses(view, placed.endpoint));
        }
    }
    (!source.from.is_empty()).then_some(source)
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
