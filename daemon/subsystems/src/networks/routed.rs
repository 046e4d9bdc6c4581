//! The data plane of a routed network on this host.
//!
//! Each host holds blocks of the subnet; every other host has one route for each block, whatever the number of
//! endpoints. Each endpoint has a veth pair and a route for its address; nothing is bridged. The first host address of
//! a block is the gateway of the endpoints in it; all gateways of a host are addresses of the network's bridge, which
//! has no ports. The module owns no state. Begin to read at [`part`].

use std::collections::BTreeMap;

use ipnet::IpNet;
use ovl_cluster::addresses;
use ovl_cluster::view::{Node, View};
use ovl_dataplane::device::Device;
use ovl_dataplane::state::{Dataplane, Hop, Link, Remote};
use ovl_proto::id::{Mac, NodeId};
use ovl_proto::object::{Backend, Network};

use super::mtu::endpoint_mtu;
use crate::encryption::tunnel;
use crate::endpoints::routed::own_endpoint;
use crate::local::Local;
use crate::local::epochs::PeerRoute;
use crate::mtu::{least, min_mtu, path_mtu, vxlan_overhead};

/// The path of packets to a remote host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PeerPath {
    /// Through this tunnel interface, without VXLAN.
    Tunnel(Device),
    /// Through the network's VXLAN device.
    Vxlan,
    /// By a route whose gateway is the remote host, which is on-link.
    Direct,
    /// By routers of the underlay that know the block: ovld adds no route.
    Routers,
}

/// Returns how packets to a block of a remote host are sent. `None` if they cannot be.
pub(crate) fn path_to(
    network: &Network,
    local: &Local,
    view: &View,
    peer: &Node,
    block: IpNet,
) -> Option<PeerPath> {
    if !view.is_plainly_reached(peer) {
        return None;
    }
    let there = peer.record.vtep;
    // The gateway of a route must be of the same address family as its destination.
    let is_near = local.underlay.is_near(there) && block.addr().is_ipv4() == there.is_ipv4();
    Some(match network.backend {
        Backend::Vxlan => PeerPath::Vxlan,
        Backend::Auto if is_near => PeerPath::Direct,
        Backend::Auto => PeerPath::Vxlan,
        Backend::Direct if is_near => PeerPath::Direct,
        Backend::Direct => PeerPath::Routers,
    })
}

/// Adds the data plane of a routed network on this host.
pub(super) fn part(dataplane: &mut Dataplane, view: &View, local: &Local, network: &Network, own: &Node) {
    let mtu = endpoint_mtu(network, own);
    let bridge = Device::bridge(network.id);
    devices(dataplane, network, own, mtu);
    for gateway in view.gateways(network.id, view.me) {
        dataplane.addresses.insert((bridge, IpNet::from(gateway)));
    }
    // Packets to free addresses must not follow a default route. With underlay routers, only the local blocks are
    // unreachable by default: the routers may know the rest of the subnet.
    for block in view.blocks_of(network.id, view.me) {
        dataplane.routes.insert(block, Hop::UNREACHABLE);
    }
    if network.encrypted || network.backend != Backend::Direct {
        for subnet in &network.subnets {
            dataplane.routes.insert(subnet.prefix, Hop::UNREACHABLE);
        }
    }
    let tunnel_routes =
        if network.may_be_sealed() { tunnel::peer_routes(view, &local.key_epochs) } else { BTreeMap::new() };
    let there = view.nodes.iter().filter(|(id, node)| **id != view.me && view.counts(node));
    let peers: BTreeMap<NodeId, &Node> = there.map(|(id, node)| (*id, node)).collect();
    for (block, holder) in view.blocks(network.id) {
        let Some(peer) = peers.get(&holder) else { continue };
        let path = match tunnel::is_sealed(view, local, network, peer) {
            true => tunnel_routes.get(&holder).and_then(PeerRoute::output).map(PeerPath::Tunnel),
            false => path_to(network, local, view, peer, block),
        };
        // Path probes find out when packets in plain text pass again.
        let is_probed = network.auto_encrypt && matches!(path, Some(PeerPath::Tunnel(_)));
        if is_probed && path_to(network, local, view, peer, block) == Some(PeerPath::Vxlan) {
            vxlan_remote(dataplane, network, peer);
        }
        if let Some(path) = path {
            to_peer(dataplane, view, network, own, peer, block, path, mtu);
        }
    }
    for endpoint in own.table.endpoints_on(network.id) {
        own_endpoint(dataplane, view, local, network, endpoint, mtu);
    }
}

/// Adds the network's bridge, and its VXLAN device if it has one.
pub(super) fn devices(dataplane: &mut Dataplane, network: &Network, own: &Node, mtu: u16) {
    let mac = Mac::of_gateway(network.id);
    dataplane.links.insert(Device::bridge(network.id), Link::Bridge { mac, mtu, up: true, tuned: true });
    if !network.encrypted && network.backend != Backend::Direct {
        dataplane.links.insert(Device::vxlan(network.id), vxlan(network, own));
    }
}

fn vxlan(network: &Network, own: &Node) -> Link {
    let carried = own.record.link_mtu.saturating_sub(vxlan_overhead(own.record.vtep));
    Link::Vxlan {
        vni: network.vni,
        local: own.record.vtep,
        port: own.record.vxlan_port,
        mtu: carried.min(network.mtu.unwrap_or(u16::MAX)).max(min_mtu(network)),
        master: None,
        mac: addresses::mac_of_host(network.id, own.record.id),
        up: true,
        tuned: true,
        sealed: false,
    }
}

/// Adds the FDB entry of a remote host's VXLAN device. Returns the local device and the MAC address of the remote one.
fn vxlan_remote(dataplane: &mut Dataplane, network: &Network, peer: &Node) -> (Device, Mac) {
    let key = (Device::vxlan(network.id), addresses::mac_of_host(network.id, peer.record.id));
    let remote = Remote { vtep: peer.record.vtep, port: peer.record.vxlan_port };
    dataplane.remotes.insert(key, remote);
    key
}

#[expect(clippy::too_many_arguments, reason = "they are what a route is made of")]
fn to_peer(
    dataplane: &mut Dataplane,
    view: &View,
    network: &Network,
    own: &Node,
    peer: &Node,
    block: IpNet,
    path: PeerPath,
    mtu: u16,
) {
    let id = peer.record.id;
    let source = view.first_gateway(network.id, view.me, block.addr());
    let outer = path_mtu(own, peer);
    let narrower = |carried: u16| Some(carried.max(least(block))).filter(|carried| *carried < mtu);
    match path {
        PeerPath::Routers => {}
        PeerPath::Tunnel(device) => {
            // The endpoints' MTU is what the local link carries in the tunnel, unless the user asked for less.
            let mtu = tunnel::path_mtu(own, peer, block, mtu);
            dataplane.routes.insert(block, Hop { device: Some(device), gateway: None, source, mtu });
        }
        PeerPath::Direct => {
            let gateway = Some(peer.record.vtep);
            dataplane.routes.insert(block, Hop { device: None, gateway, source, mtu: narrower(outer) });
        }
        PeerPath::Vxlan => {
            let Some(gateway) = view.first_gateway(network.id, id, block.addr()) else { return };
            let (device, mac) = vxlan_remote(dataplane, network, peer);
            dataplane.neighbours.insert((device, gateway), mac);
            let mtu = narrower(outer.saturating_sub(vxlan_overhead(own.record.vtep)));
            dataplane.routes.insert(block, Hop { device: Some(device), gateway: Some(gateway), source, mtu });
        }
    }
}
