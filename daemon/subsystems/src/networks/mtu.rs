//! The MTU of a network on this host.
//!
//! It follows from the link MTU, the encapsulation and, for a switched network, the path MTUs between its hosts. The
//! module owns no state. Begin to read at [`network_mtu`].

use std::collections::BTreeMap;
use std::net::IpAddr;

use ovl_cluster::view::{Node, View};
use ovl_proto::id::NodeId;
use ovl_proto::object::{Backend, Driver, Mode, Network};

use crate::mtu::{MIN_MTU_V6, min_mtu, padded_inside, vxlan_overhead, wireguard_overhead};

/// Returns the MTU of a network's endpoints on this host, in bytes, at least [`min_mtu`].
pub fn network_mtu(view: &View, network: &Network) -> u16 {
    match (network.driver, network.mode) {
        // A bridge network has no encapsulation.
        (Driver::Bridge, _) => {
            let link = view.own().map_or(MIN_MTU_V6, |own| own.record.link_mtu);
            link.min(network.mtu.unwrap_or(u16::MAX)).max(min_mtu(network))
        }
        (Driver::Overlay, Mode::L2) => switched_mtu(view, network),
        (Driver::Overlay, Mode::L3) => view.own().map_or(MIN_MTU_V6, |own| endpoint_mtu(network, own)),
    }
}

/// Returns the MTU that every path between two hosts of the network can carry, so that all hosts choose the same. A
/// smaller MTU that the user asked for wins.
fn switched_mtu(view: &View, network: &Network) -> u16 {
    let mut hosts: BTreeMap<NodeId, &Node> =
        view.hosts_on(network.id).map(|node| (node.record.id, node)).collect();
    if let Some(own) = view.own() {
        hosts.insert(view.me, own);
    }
    let widest = hosts.values().map(|node| node.record.link_mtu).max().unwrap_or_default();
    let carried = hosts
        .values()
        .map(|node| {
            let outer = node
                .table
                .path_mtus()
                .filter(|(peer, _)| hosts.contains_key(peer))
                .map(|(_, mtu)| mtu)
                .fold(node.record.link_mtu, u16::min);
            switched_inside(network, node.record.vtep, outer, widest)
        })
        .min()
        .unwrap_or(MIN_MTU_V6);
    carried.min(network.mtu.unwrap_or(u16::MAX)).max(min_mtu(network))
}

/// Returns how long a packet of a switched network may be, in bytes, for an outer packet of `outer` bytes. VXLAN is inside the
/// tunnel's IPv6 if the network is encrypted. `widest` is the largest link MTU of its hosts, to which they pad.
fn switched_inside(network: &Network, vtep: IpAddr, outer: u16, widest: u16) -> u16 {
    if !network.may_be_sealed() {
        return outer.saturating_sub(vxlan_overhead(vtep));
    }
    let inside = if outer < widest {
        padded_inside(outer, vtep)
    } else {
        outer.saturating_sub(wireguard_overhead(vtep))
    };
    inside.saturating_sub(14 + 8 + 8 + 40)
}

/// Returns the MTU of the local endpoints of a routed network: the link MTU without overhead. If the path to a host
/// carries less, its route has a smaller MTU, and the local kernel tells senders by ICMP.
pub(crate) fn endpoint_mtu(network: &Network, own: &Node) -> u16 {
    let around = match network.backend {
        // Packets that are not sealed now may be so in a moment.
        _ if network.may_be_sealed() => wireguard_overhead(own.record.vtep),
        Backend::Vxlan => vxlan_overhead(own.record.vtep),
        Backend::Direct | Backend::Auto => 0,
    };
    own.record.link_mtu.saturating_sub(around).min(network.mtu.unwrap_or(u16::MAX)).max(min_mtu(network))
}
