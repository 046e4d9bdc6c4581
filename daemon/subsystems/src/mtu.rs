//! Encapsulation overhead and path MTUs, in bytes, shared by several subsystems.
//!
//! This module owns no state. Begin to read at `path_mtu`; the MTU of a network is in
//! [`crate::networks::mtu`].

use std::net::IpAddr;

use ovl_cluster::view::Node;
use ovl_proto::id::NodeId;

/// The smallest MTU of a network, in bytes: the minimum link MTU of IPv6 (RFC 8200, section 5).
pub const MIN_MTU: u16 = 1280;

/// Overhead of WireGuard without the outer IP header, in bytes: UDP 8, WireGuard header 16, authentication tag 16.
pub const WIREGUARD_OVERHEAD: u16 = 8 + 16 + 16;

/// Returns the overhead of VXLAN, in bytes: inner Ethernet 14, VXLAN 8, UDP 8, outer IP header 20 or 40.
pub(crate) fn vxlan_overhead(vtep: IpAddr) -> u16 {
    14 + 8 + 8 + if vtep.is_ipv4() { 20 } else { 40 }
}

/// Returns the overhead of the tunnel, in bytes, including the outer IP header.
pub(crate) fn wireguard_overhead(vtep: IpAddr) -> u16 {
    WIREGUARD_OVERHEAD + if vtep.is_ipv4() { 20 } else { 40 }
}

/// Returns the MTU of the path between two hosts, in bytes, including the outer IP header.
pub(crate) fn path_mtu(own: &Node, peer: &Node) -> u16 {
    let links = own.record.link_mtu.min(peer.record.link_mtu);
    let found = |from: &Node, to: NodeId| {
        from.table.path_mtus().find(|(peer, _)| *peer == to).map_or(u16::MAX, |(_, mtu)| mtu)
    };
    links.min(found(own, peer.record.id)).min(found(peer, own.record.id))
}
