//! An endpoint of a switched network: a port of the bridge on its own host, and on the others entries that lead to
//! that host.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_cluster::addresses;
use ovl_cluster::view::{Node, Placed, View};
use ovl_dataplane::device::Device;
use ovl_dataplane::state::{Dataplane, Link, Remote, Source};
use ovl_proto::id::{EndpointId, NodeId};
use ovl_proto::object::Network;
use ovl_proto::table::Endpoint;

use super::silent::silent;
use crate::encryption::tunnel;
use crate::local::Local;
use crate::publish;

/// Where a switched network's frames for other hosts go.
#[derive(Debug)]
pub(crate) enum FrameRoutes {
    /// To the VTEPs of this family: a VXLAN device sends to one only; `status` names other hosts.
    Underlay {
        /// IPv4.
        v4: bool,
    },
    /// Through the tunnel, to these hosts and no others.
    Tunnel(BTreeMap<NodeId, Remote>),
}

impl FrameRoutes {
    pub(crate) fn of(view: &View, network: &Network) -> Self {
        match network.encrypted {
            true => Self::Tunnel(tunnel::remotes(view)),
            false => Self::Underlay { v4: view.own().is_some_and(|own| own.record.vtep.is_ipv4()) },
        }
    }

    /// Where a host receives frames; nothing if it cannot be reached.
    pub(crate) fn to(&self, node: &Node) -> Option<Remote> {
        let Remote { vtep, port } = Remote { vtep: node.record.vtep, port: node.record.vxlan_port };
        match self {
            Self::Underlay { v4 } => (vtep.is_ipv4() == *v4).then_some(Remote { vtep, port }),
            Self::Tunnel(remotes) => remotes.get(&node.record.id).copied(),
        }
    }
}

/// An endpoint that frames are sent to.
#[derive(Debug)]
pub(crate) struct MacClaim<'a> {
    /// The endpoint.
    pub(crate) endpoint: &'a Endpoint,
    /// Where it is; nothing if it is here.
    pub(crate) remote: Option<Remote>,
    /// Whether frames from it must come from there.
    sealed: bool,
}

impl<'a> MacClaim<'a> {
    /// Nothing for one of those that count which has no business on the network after all.
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
        if mine && local.isolated.contains_key(&endpoint.id) {
            return None;
        }
        Some(Self { endpoint, remote, sealed: network.encrypted })
    }

    /// Where frames for its MAC address go.
    pub(crate) fn mac(&self, dataplane: &mut Dataplane) {
        let Endpoint { id, network, mac, .. } = *self.endpoint;
        let vxlan = Device::vxlan(network);
        dataplane.remotes.extend(self.remote.map(|remote| ((vxlan, mac), remote)));
        dataplane.ports.insert((if self.remote.is_some() { vxlan } else { Device::endpoint(id) }, mac));
        if let Some(remote) = self.remote.filter(|_| self.sealed) {
            let addresses = self.endpoint.addresses.iter().map(IpNet::addr).collect();
            dataplane.sources.insert((vxlan, mac), Source { from: remote.vtep, addresses });
        }
    }
}

/// The host's end of an endpoint's pair.
pub(crate) fn own_endpoint(
    dataplane: &mut Dataplane,
    local: &Local,
    network: &Network,
    endpoint: &Endpoint,
    mtu: u16,
) {
    if local.isolated.contains_key(&endpoint.id) {
        silent(dataplane, endpoint, mtu);
    } else {
        port(dataplane, local, network, endpoint, mtu);
    }
}

/// The port of a bridge.
fn port(dataplane: &mut Dataplane, local: &Local, network: &Network, endpoint: &Endpoint, mtu: u16) {
    let hairpin = publish::needs_hairpin(local, network, endpoint);
    let link =
        Link::Endpoint { mtu, master: Some(Device::bridge(network.id)), up: true, tuned: true, hairpin };
    dataplane.links.insert(Device::endpoint(endpoint.id), link);
    publish::guard(dataplane, local, network, endpoint);
}

/// A port of the bridge, and the entries that lead to it.
pub(super) fn endpoint_part(
    dataplane: &mut Dataplane,
    local: &Local,
    network: &Network,
    endpoint: &Endpoint,
    mtu: u16,
) {
    let (device, bridge) = (Device::endpoint(endpoint.id), Device::bridge(network.id));
    port(dataplane, local, network, endpoint, mtu);
    dataplane.ports.insert((device, endpoint.mac));
    for address in &endpoint.addresses {
        dataplane.neighbours.insert((bridge, address.addr()), endpoint.mac);
    }
}

/// Orders the endpoints that claim a MAC address; it belongs to the first: the one whose own address
/// makes it (nobody else can hold that), then the one on the host with the smaller id. The same on all
/// hosts, so that a frame never wanders.
pub(crate) fn rank(network: &Network, placed: &Placed<'_>) -> (bool, NodeId, EndpointId) {
    let makes = |net: &IpNet| addresses::mac_of(network.id, net.addr()) == placed.endpoint.mac;
    let by_right = placed.endpoint.addresses.iter().any(makes);
    (!by_right, placed.node.record.id, placed.endpoint.id)
}
