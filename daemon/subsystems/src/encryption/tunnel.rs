//! The tunnel between hosts: what carries encrypted networks.
//!
//! There is one for all of them. Each host has an address in it, from and to which VXLAN goes; the blocks of
//! routed networks go through it as they are. A peer may send from its own address and from its blocks alone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv6Net};
use ovl_proto::SEALED_VXLAN_PORT;
use ovl_proto::id::NodeId;
use ovl_proto::object::Mode;
use ovl_proto::record;

use super::epochs::{self, KeyEpochs, PeerRoute};
use crate::mtu::{self, MIN_MTU, wireguard_overhead};
use ovl_cluster::view::{Node, View};
use ovl_dataplane::state::{Dataplane, Hop, Link, Remote, Tunnel, TunnelKind, TunnelPeer};

/// Of an address in the tunnel: what all hosts of a cluster have in common.
const PREFIX_LENGTH: u8 = 48;

/// A host's address inside the tunnel: a unique local one (RFC 4193) with the cluster's number as global
/// id and the host's id after it, so nobody has to hand it out and it says whose it is.
pub fn address(cluster: u64, node: NodeId) -> Ipv6Addr {
    let mut bytes = [0; 16];
    let [_, _, _, global @ ..] = cluster.to_be_bytes();
    bytes[0] = 0xfd;
    bytes[1..6].copy_from_slice(&global);
    bytes[6..].copy_from_slice(&node.0);
    bytes.into()
}

/// Where the addresses of all hosts of a cluster are.
pub fn prefix(cluster: u64) -> IpNet {
    let any = address(cluster, NodeId::default());
    IpNet::V6(Ipv6Net::new_assert(any, PREFIX_LENGTH).trunc())
}

/// Whether any network of the cluster needs the tunnel.
pub fn is_wanted(view: &View) -> bool {
    view.networks.values().any(|state| state.network.encrypted)
}

/// This host's end, if it is a member and has one.
pub fn own(view: &View) -> Option<(&Node, record::Tunnel)> {
    let own = view.own().filter(|own| view.alloc.members.contains(&own.record.id))?;
    Some((own, own.record.tunnel?))
}

/// Hosts that publish a key which one with a smaller id publishes too: they are not talked to. Only one of
/// them can have the other half of it.
pub fn copies(view: &View) -> BTreeSet<NodeId> {
    let mut seen = BTreeSet::new();
    let hosts = view.nodes.values().filter(|node| node.record.id == view.me || view.counts(node));
    hosts
        .filter_map(|node| Some((node.record.id, node.record.tunnel?.key)))
        .filter(|(_, key)| !seen.insert(*key))
        .map(|(id, _)| id)
        .collect()
}

/// Hosts that are reached through the tunnel, with their ends: members that are there, have an end, and an
/// underlay address of our family.
pub fn peers(view: &View) -> BTreeMap<NodeId, (&Node, record::Tunnel)> {
    let Some((own, own_end)) = own(view) else { return BTreeMap::new() };
    let copies = copies(view);
    view.nodes
        .iter()
        .filter(|(id, node)| **id != view.me && view.counts(node) && !copies.contains(id))
        .filter(|(_, node)| node.record.vtep.is_ipv4() == own.record.vtep.is_ipv4())
        .filter_map(|(id, node)| Some((*id, (node, node.record.tunnel?))))
        .filter(|(_, (_, end))| end.key != own_end.key)
        .collect()
}

/// Where each of them receives the frames of encrypted switched networks.
pub(crate) fn remotes(view: &View) -> BTreeMap<NodeId, Remote> {
    let remote = |id| Remote { vtep: address(view.alloc.cluster, id).into(), port: SEALED_VXLAN_PORT };
    peers(view).into_keys().map(|id| (id, remote(id))).collect()
}

/// The way to each of them.
pub fn peer_routes(view: &View, epochs: &KeyEpochs) -> BTreeMap<NodeId, PeerRoute> {
    let Some((_, own)) = own(view) else { return BTreeMap::new() };
    let route = |(id, (_, end))| (id, epochs::route_to(own, epochs, id, end));
    peers(view).into_iter().map(route).collect()
}

/// The end of the tunnel on this host, two while keys are rotated, and the ways into it.
pub(crate) fn part(dataplane: &mut Dataplane, view: &View, epochs: &KeyEpochs) {
    let Some((own, tunnel)) = own(view).filter(|_| is_wanted(view)) else { return };
    let mtu = mtu(own);
    let (kind, listen) = match tunnel.kernel {
        true => (TunnelKind::Kernel, None),
        false => (TunnelKind::Userspace, Some(own.record.vtep)),
    };
    let cluster = view.alloc.cluster;
    let here = IpAddr::V6(address(cluster, view.me));
    for port in [tunnel.port, epochs::other_port(tunnel.port)] {
        let device = epochs::interface_of(port);
        let Some(key) = epochs::key_of(tunnel, epochs, device) else { continue };
        dataplane.links.insert(device, Link::Tunnel { kind, mtu, up: true });
        dataplane.addresses.insert((device, IpNet::from(here)));
        dataplane.tunnels.insert(device, Tunnel { key, port, local: listen });
    }
    // What is not a host that we have a way to never leaves by a default route.
    dataplane.routes.insert(prefix(cluster), Hop::UNREACHABLE);
    let mut allowed: BTreeMap<NodeId, BTreeSet<IpNet>> = BTreeMap::new();
    for state in view.networks.values().filter(|s| s.network.encrypted && s.network.mode == Mode::L3) {
        for (block, holder) in view.blocks(state.network.id) {
            allowed.entry(holder).or_default().insert(block);
        }
    }
    for (id, route) in peer_routes(view, epochs) {
        let Some(peer) = view.nodes.get(&id) else { continue };
        let to = IpNet::from(IpAddr::V6(address(cluster, id)));
        if route.output.is_some() {
            let mtu = path_mtu(own, peer, mtu);
            dataplane.routes.insert(to, Hop { device: route.output, gateway: None, source: Some(here), mtu });
        }
        let mut allowed = allowed.remove(&id).unwrap_or_default();
        allowed.insert(to);
        for (device, key, port) in route.interfaces {
            let endpoint = SocketAddr::new(peer.record.vtep, port);
            let allowed = allowed.clone();
            dataplane.tunnel_peers.insert((device, key), TunnelPeer { endpoint, allowed });
        }
    }
}

/// Of the device: what the own link carries.
pub(crate) fn mtu(own: &Node) -> u16 {
    own.record.link_mtu.saturating_sub(wireguard_overhead(own.record.vtep)).max(MIN_MTU)
}

/// What the way to a host carries inside the tunnel, where that is less than `mtu`.
pub(crate) fn path_mtu(own: &Node, peer: &Node, mtu: u16) -> Option<u16> {
    let carried = mtu::path_mtu(own, peer).saturating_sub(wireguard_overhead(own.record.vtep)).max(MIN_MTU);
    (carried < mtu).then_some(carried)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_names_cluster_and_host() {
        let address = address(0x0102_0304_0506_0708, NodeId([9, 10, 11, 12, 13, 14, 15, 16, 17, 18]));
        assert_eq!(address.to_string(), "fd04:506:708:90a:b0c:d0e:f10:1112");
        assert_eq!(prefix(0x0102_0304_0506_0708).to_string(), "fd04:506:708::/48");
        assert!(prefix(0x0102_0304_0506_0708).contains(&IpAddr::V6(address)));
    }
}
