//! The MTU of a network on this host.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ovl_cluster::view::{Node, View};
use ovl_proto::id::NodeId;
use ovl_proto::object::{Backend, Driver, Mode, Network};

use crate::mtu::{MIN_MTU, vxlan_overhead, wireguard_overhead};

/// The MTU of a network's endpoints on this host, in bytes.
pub fn network_mtu(view: &View, network: &Network) -> u16 {
    match (network.driver, network.mode) {
        // Nothing is put around its packets.
        (Driver::Bridge, _) => {
            let link = view.own().map_or(MIN_MTU, |own| own.record.link_mtu);
            link.min(network.mtu.unwrap_or(u16::MAX)).max(MIN_MTU)
        }
        (Driver::Overlay, Mode::L2) => switched_mtu(view, network),
        (Driver::Overlay, Mode::L3) => view.own().map_or(MIN_MTU, |own| endpoint_mtu(network, own)),
    }
}

/// What every pair of a network's hosts can carry, so that it is the same on all of them; less if
/// the user asked for less.
fn switched_mtu(view: &View, network: &Network) -> u16 {
    let mut hosts: BTreeMap<NodeId, &Node> =
        view.hosts_on(network.id).map(|node| (node.record.id, node)).collect();
    if let Some(own) = view.own() {
        hosts.insert(view.me, own);
    }
    let carried = hosts
        .values()
        .map(|node| {
            let outer = node
                .table
                .path_mtus()
                .filter(|(peer, _)| hosts.contains_key(peer))
                .map(|(_, mtu)| mtu)
                .fold(node.record.link_mtu, u16::min);
            outer.saturating_sub(switched_overhead(network, node.record.vtep))
        })
        .min()
        .unwrap_or(MIN_MTU);
    carried.min(network.mtu.unwrap_or(u16::MAX)).max(MIN_MTU)
}

/// What is put around the packets of a switched network: VXLAN, which is inside the tunnel's IPv6 if the
/// network is encrypted.
fn switched_overhead(network: &Network, vtep: IpAddr) -> u16 {
    if network.encrypted { 14 + 8 + 8 + 40 + wireguard_overhead(vtep) } else { vxlan_overhead(vtep) }
}

/// The MTU of the endpoints of this host: what its own link carries. Where the way to a host
/// carries less, the route says so, and senders are told by this host's kernel.
pub(crate) fn endpoint_mtu(network: &Network, own: &Node) -> u16 {
    let around = match network.backend {
        _ if network.encrypted => wireguard_overhead(own.record.vtep),
        Backend::Vxlan => vxlan_overhead(own.record.vtep),
        Backend::Direct | Backend::Auto => 0,
    };
    own.record.link_mtu.saturating_sub(around).min(network.mtu.unwrap_or(u16::MAX)).max(MIN_MTU)
}
