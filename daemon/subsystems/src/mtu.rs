//! Encapsulation overhead and path MTUs, in bytes, shared by several subsystems.
//!
//! This module owns no state. Begin to read at `path_mtu`; the MTU of a network is in
//! [`crate::networks::mtu`].

use std::net::IpAddr;

use ipnet::IpNet;
use ovl_cluster::view::Node;
use ovl_proto::id::NodeId;
use ovl_proto::object::Network;

/// The smallest MTU of a network with an IPv6 subnet, in bytes: the minimum link MTU of IPv6 (RFC 8200, section 5). If a
/// link carries less with its encapsulation, the outer packets are fragmented.
pub const MIN_MTU_V6: u16 = 1280;
/// The smallest MTU of a network without, in bytes: what every host accepts (RFC 1122, section 3.3.2).
pub const MIN_MTU_V4: u16 = 576;

/// Overhead of WireGuard without the outer IP header, in bytes: UDP 8, WireGuard header 16, authentication tag 16.
pub const WIREGUARD_OVERHEAD: u16 = 8 + 16 + 16;

/// Returns the smallest MTU of a network, in bytes.
pub fn min_mtu(network: &Network) -> u16 {
    network.subnets.iter().map(|subnet| least(subnet.prefix)).max().unwrap_or(MIN_MTU_V4)
}

/// Returns the smallest MTU of a link or route for packets to a prefix, in bytes.
pub(crate) fn least(prefix: IpNet) -> u16 {
    if prefix.addr().is_ipv6() { MIN_MTU_V6 } else { MIN_MTU_V4 }
}

/// Returns the overhead of VXLAN, in bytes: inner Ethernet 14, VXLAN 8, UDP 8, outer IP header 20 or 40.
pub fn vxlan_overhead(vtep: IpAddr) -> u16 {
    14 + 8 + 8 + if vtep.is_ipv4() { 20 } else { 40 }
}

/// Returns the overhead of the tunnel, in bytes, including the outer IP header.
pub(crate) fn wireguard_overhead(vtep: IpAddr) -> u16 {
    WIREGUARD_OVERHEAD + if vtep.is_ipv4() { 20 } else { 40 }
}

/// Returns how long a packet inside the tunnel may be, in bytes, for an outer packet of `outer` bytes: WireGuard pads it to a
/// multiple of 16 (the white paper, section 5.4.6), up to the MTU of its interface alone.
pub(crate) fn padded_inside(outer: u16, vtep: IpAddr) -> u16 {
    outer.saturating_sub(wireguard_overhead(vtep)) / 16 * 16
}

/// Returns the MTU of the path between two hosts, in bytes, including the outer IP header.
pub(crate) fn path_mtu(own: &Node, peer: &Node) -> u16 {
    let links = own.record.link_mtu.min(peer.record.link_mtu);
    let found = |from: &Node, to: NodeId| {
        from.table.path_mtus().find(|(peer, _)| *peer == to).map_or(u16::MAX, |(_, mtu)| mtu)
    };
    links.min(found(own, peer.record.id)).min(found(peer, own.record.id))
}
