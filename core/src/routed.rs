//! Routed networks: each host answers for the addresses of its blocks, and the others need one
//! route for each of these, whatever the number of endpoints.
//!
//! Endpoints hang on pairs of interfaces of their own, each with a route for its address; there is
//! no bridging. The first host address of a block is the gateway of the endpoints in it. All
//! gateways of a host are addresses of the network's bridge, which has no ports: it is there to
//! carry them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::id::{Mac, NetworkId, NodeId};
use ovl_proto::object::{Backend, Network};
use ovl_proto::table::Endpoint;

use crate::desired::{self, MIN_MTU, overhead};
use crate::device::Device;
use crate::ipam;
use crate::kernel::{Hop, Kernel, Link, Remote};
use crate::publish;
use crate::tunnel;
use crate::view::{Local, Node, View};

/// How packets get to another host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Through this end of the tunnel, as they are.
    Sealed(Device),
    Vxlan,
    /// Over the segment.
    Direct,
    /// By routers that know where: nothing of ours stands in their way.
    Routers,
}

/// Whether this host answers for any addresses of the network.
pub fn has_block(view: &View, network: NetworkId) -> bool {
    blocks_of(view, network, view.me).next().is_some()
}

/// A host's blocks, in order.
pub fn blocks_of(view: &View, network: NetworkId, node: NodeId) -> impl Iterator<Item = IpNet> {
    blocks(view, network).filter(move |(_, holder)| *holder == node).map(|(block, _)| block)
}

/// The gateways on a host, by the block that each is in; of the first block of each family first.
pub fn gateways(view: &View, network: NetworkId, node: NodeId) -> impl Iterator<Item = IpAddr> {
    blocks_of(view, network, node).map(ipam::gateway)
}

/// All blocks of a network, with their holders.
pub(crate) fn blocks(view: &View, network: NetworkId) -> impl Iterator<Item = (IpNet, NodeId)> {
    let all = view.alloc.blocks.iter().filter(move |(block, _)| block.network == network);
    all.map(|(block, holder)| (block.prefix, *holder))
}

/// The first gateway of a family on a host: what it sends from, and its next hop for the others.
pub(crate) fn first_gateway(view: &View, network: NetworkId, node: NodeId, like: IpAddr) -> Option<IpAddr> {
    gateways(view, network, node).find(|gateway| gateway.is_ipv4() == like.is_ipv4())
}

fn way(network: &Network, local: &Local, own: &Node, peer: &Node, block: IpNet) -> Option<Way> {
    let (here, there) = (own.record.vtep, peer.record.vtep);
    // A VXLAN device sends to one address family only; `status` names such a host.
    if here.is_ipv4() != there.is_ipv4() {
        return None;
    }
    // A next hop is of the family of what it leads to.
    let is_near = local.segment.is_some_and(|segment| segment.contains(&there))
        && block.addr().is_ipv4() == there.is_ipv4();
    Some(match network.backend {
        Backend::Vxlan => Way::Vxlan,
        Backend::Auto if is_near => Way::Direct,
        Backend::Auto => Way::Vxlan,
        Backend::Direct if is_near => Way::Direct,
        Backend::Direct => Way::Routers,
    })
}

/// The MTU of the endpoints of this host: what its own link carries. Where the way to a host
/// carries less, the route says so, and senders are told by this host's kernel.
pub(crate) fn endpoint_mtu(network: &Network, own: &Node) -> u16 {
    let around = match network.backend {
        _ if network.encrypted => tunnel::overhead(own.record.vtep),
        Backend::Vxlan => overhead(own.record.vtep),
        Backend::Direct | Backend::Auto => 0,
    };
    own.record.link_mtu.saturating_sub(around).min(network.mtu.unwrap_or(u16::MAX)).max(MIN_MTU)
}

/// What the network needs on this host.
pub(crate) fn part(kernel: &mut Kernel, view: &View, local: &Local, network: &Network, own: &Node) {
    let mtu = endpoint_mtu(network, own);
    let bridge = Device::bridge(network.id);
    devices(kernel, network, own, mtu);
    for gateway in gateways(view, network.id, view.me) {
        kernel.addresses.insert((bridge, IpNet::from(gateway)));
    }
    // What nobody answers for: not by a default route. Where routers know more than we do, only
    // what we should answer for ourselves.
    for block in blocks_of(view, network.id, view.me) {
        kernel.routes.insert(block, Hop::UNREACHABLE);
    }
    if network.encrypted || network.backend != Backend::Direct {
        for subnet in &network.subnets {
            kernel.routes.insert(subnet.prefix, Hop::UNREACHABLE);
        }
    }
    let sealed = if network.encrypted { tunnel::ways(view, local) } else { BTreeMap::new() };
    let there = view.nodes.iter().filter(|(id, node)| **id != view.me && view.counts(node));
    let peers: BTreeMap<NodeId, &Node> = there.map(|(id, node)| (*id, node)).collect();
    for (block, holder) in blocks(view, network.id) {
        let Some(peer) = peers.get(&holder) else { continue };
        let way = match network.encrypted {
            true => sealed.get(&holder).and_then(|sealed| sealed.by).map(Way::Sealed),
            false => way(network, local, own, peer, block),
        };
        if let Some(way) = way {
            to_peer(kernel, view, network, own, peer, block, way, mtu);
        }
    }
    for endpoint in own.table.endpoints_on(network.id) {
        own_endpoint(kernel, view, local, network, endpoint, mtu);
        if !local.isolated.contains_key(&endpoint.id) {
            publish::elements(kernel, network, endpoint);
        }
    }
}

/// An endpoint of this host; one that must not talk is silent, and not swept away.
pub(crate) fn own_endpoint(
    kernel: &mut Kernel,
    view: &View,
    local: &Local,
    network: &Network,
    endpoint: &Endpoint,
    mtu: u16,
) {
    if local.isolated.contains_key(&endpoint.id) || view.address_conflict(view.me, endpoint).is_some() {
        desired::silent(kernel, endpoint, mtu);
    } else {
        endpoint_part(kernel, view, local, network, endpoint, mtu);
    }
}

/// The network's bridge, and its VXLAN device if it has one.
pub(crate) fn devices(kernel: &mut Kernel, network: &Network, own: &Node, mtu: u16) {
    let mac = Mac::of_gateway(network.id);
    kernel.links.insert(Device::bridge(network.id), Link::Bridge { mac, mtu, up: true, tuned: true });
    if !network.encrypted && network.backend != Backend::Direct {
        kernel.links.insert(Device::vxlan(network.id), vxlan(network, own));
    }
}

fn vxlan(network: &Network, own: &Node) -> Link {
    let carried = own.record.link_mtu.saturating_sub(overhead(own.record.vtep));
    Link::Vxlan {
        vni: network.vni,
        local: own.record.vtep,
        port: own.record.vxlan_port,
        mtu: carried.min(network.mtu.unwrap_or(u16::MAX)).max(MIN_MTU),
        master: None,
        mac: ipam::mac_of_host(network.id, own.record.id),
        up: true,
        tuned: true,
        sealed: false,
    }
}

#[expect(clippy::too_many_arguments, reason = "they are what a route is made of")]
fn to_peer(
    kernel: &mut Kernel,
    view: &View,
    network: &Network,
    own: &Node,
    peer: &Node,
    block: IpNet,
    way: Way,
    mtu: u16,
) {
    let id = peer.record.id;
    let source = first_gateway(view, network.id, view.me, block.addr());
    let outer = path_mtu(own, peer);
    let narrower = |carried: u16| Some(carried.max(MIN_MTU)).filter(|carried| *carried < mtu);
    match way {
        Way::Routers => {}
        Way::Sealed(device) => {
            // The endpoints' MTU is what the own link carries in the tunnel, unless the user asked for less.
            let mtu = tunnel::path_mtu(own, peer, mtu);
            kernel.routes.insert(block, Hop { device: Some(device), gateway: None, source, mtu });
        }
        Way::Direct => {
            let gateway = Some(peer.record.vtep);
            kernel.routes.insert(block, Hop { device: None, gateway, source, mtu: narrower(outer) });
        }
        Way::Vxlan => {
            let Some(gateway) = first_gateway(view, network.id, id, block.addr()) else { return };
            let (device, mac) = (Device::vxlan(network.id), ipam::mac_of_host(network.id, id));
            let remote = Remote { vtep: peer.record.vtep, port: peer.record.vxlan_port };
            kernel.remotes.insert((device, mac), remote);
            kernel.neighbours.insert((device, gateway), mac);
            let mtu = narrower(outer.saturating_sub(overhead(own.record.vtep)));
            kernel.routes.insert(block, Hop { device: Some(device), gateway: Some(gateway), source, mtu });
        }
    }
}

/// What the path between two hosts carries, outer IP header included.
pub(crate) fn path_mtu(own: &Node, peer: &Node) -> u16 {
    let links = own.record.link_mtu.min(peer.record.link_mtu);
    let found = |from: &Node, to: NodeId| {
        from.table.path_mtus().find(|(peer, _)| *peer == to).map_or(u16::MAX, |(_, mtu)| mtu)
    };
    links.min(found(own, peer.record.id)).min(found(peer, own.record.id))
}

/// An endpoint of this host: routes and neighbours on its device.
pub(crate) fn endpoint_part(
    kernel: &mut Kernel,
    view: &View,
    local: &Local,
    network: &Network,
    endpoint: &Endpoint,
    mtu: u16,
) {
    let device = Device::endpoint(endpoint.id);
    kernel.links.insert(device, Link::Endpoint { mtu, master: None, up: true, tuned: false, hairpin: false });
    for net in &endpoint.addresses {
        let address = net.addr();
        kernel.neighbours.insert((device, address), endpoint.mac);
        // The host speaks to its endpoints as their gateway. While an attach is under way its block
        // may be too new for the bridge to have the address.
        let source = ipam::gateway_on(network, address)
            .filter(|at| gateways(view, network.id, view.me).any(|g| g == *at));
        let hop = Hop { device: Some(device), gateway: None, source, mtu: None };
        kernel.routes.insert(IpNet::from(address), hop);
        if address.is_ipv6() && local.fetched.contains(&endpoint.id) {
            // An Engine sets no neighbour for the gateway, and who asks for an IPv6 address is answered only where the
            // device has it.
            let gateway = ipam::gateway_on(network, address);
            kernel.addresses.extend(gateway.map(|gateway| (device, IpNet::from(gateway))));
        }
    }
}
