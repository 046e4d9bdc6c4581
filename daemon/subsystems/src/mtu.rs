//! What packets need and what paths carry, in bytes: the arithmetic that subsystems share.

use std::net::IpAddr;

use ovl_cluster::view::Node;
use ovl_proto::id::NodeId;

/// The smallest MTU that IPv6 allows (RFC 8200, section 5), and what a network gets at the least.
pub const MIN_MTU: u16 = 1280;

/// Bytes that WireGuard puts around an IP packet, the outer IP header aside: UDP 8, its own header 16,
/// the tag 16.
pub const WIREGUARD_OVERHEAD: u16 = 8 + 16 + 16;

/// Bytes that VXLAN puts before an IP packet: inner Ethernet 14, VXLAN 8, UDP 8, outer IP.
pub(crate) fn vxlan_overhead(vtep: IpAddr) -> u16 {
    14 + 8 + 8 + if vtep.is_ipv4() { 20 } else { 40 }
}

/// Bytes around an IP packet in the tunnel, the outer IP header included.
pub(crate) fn wireguard_overhead(vtep: IpAddr) -> u16 {
    WIREGUARD_OVERHEAD + if vtep.is_ipv4() { 20 } else { 40 }
}

/// What the path between two hosts carries, outer IP header included.
pub(crate) fn path_mtu(own: &Node, peer: &Node) -> u16 {
    let links = own.record.link_mtu.min(peer.record.link_mtu);
    let found = |from: &Node, to: NodeId| {
        from.table.path_mtus().find(|(peer, _)| *peer == to).map_or(u16::MAX, |(_, mtu)| mtu)
    };
    links.min(found(own, peer.record.id)).min(found(peer, own.record.id))
}
