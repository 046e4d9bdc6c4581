//! The data plane of the tunnel: WireGuard interfaces, peers, addresses and routes.
//!
//! One tunnel carries all encrypted networks. Each host has an address in it, which is its VTEP for switched networks;
//! blocks of routed networks are routed into it without VXLAN. The allowed IPs of a peer are its address and its
//! blocks. The module owns no state. Begin to read at [`peers`] and `part`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use ipnet::{IpNet, Ipv6Net};
use ovl_proto::SEALED_VXLAN_PORT;
use ovl_proto::id::NodeId;
use ovl_proto::object::{Backend, Encrypt, Mode, Network};
use ovl_proto::record;

use crate::local::epochs::{self, KeyEpochs, PeerRoute};
use crate::local::{Detours, Local};
use crate::mtu::{self, MIN_MTU_V6, wireguard_overhead};
use ovl_cluster::view::{Node, View};
use ovl_dataplane::device::Device;
use ovl_dataplane::state::{Dataplane, Hop, Link, Remote, Tunnel, TunnelKind, TunnelPeer};

/// The length of the prefix that the tunnel addresses of all hosts of a cluster share.
const PREFIX_LENGTH: u8 = 48;

/// Returns a host's address in the tunnel: a unique local address (RFC 4193) whose global id is the cluster's number
/// and whose last bits are the host's id. So it needs no allocation, and it identifies its host.
pub fn address(cluster: u64, node: NodeId) -> Ipv6Addr {
    let mut bytes = [0; 16];
    let [_, _, _, global @ ..] = cluster.to_be_bytes();
    bytes[0] = 0xfd;
    bytes[1..6].copy_from_slice(&global);
    bytes[6..].copy_from_slice(&node.0);
    bytes.into()
}

/// Returns the prefix of all tunnel addresses of a cluster.
pub fn prefix(cluster: u64) -> IpNet {
    let any = address(cluster, NodeId::default());
    IpNet::V6(Ipv6Net::new_assert(any, PREFIX_LENGTH).trunc())
}

/// Whether any network of the cluster needs the tunnel.
pub fn is_wanted(view: &View) -> bool {
    view.networks.values().any(|state| state.network.may_be_sealed())
}

/// Whether packets of a network to a host go through the tunnel: all of an encrypted network, and those with
/// [`Encrypt::Auto`] to a host to which there is no path in plain text.
///
/// There is none across NAT and between hosts of which one is not reached at its main address, where a detour stands in for the host (through members, which could read them, or over TCP), and where
/// packets in VXLAN are lost.
pub fn is_sealed(view: &View, local: &Local, network: &Network, peer: &Node) -> bool {
    match network.encrypt() {
        Encrypt::No => false,
        Encrypt::Yes => true,
        Encrypt::Auto => {
            let id = peer.record.id;
            view.is_framed(peer)
                || local.detours.contains(id)
                || (local.lost_vxlan.contains(id) && is_in_vxlan(local, network, peer))
        }
    }
}

/// Whether packets of a network in plain text are sent to a host in VXLAN.
fn is_in_vxlan(local: &Local, network: &Network, peer: &Node) -> bool {
    network.mode == Mode::L2
        || match network.backend {
            Backend::Vxlan => true,
            Backend::Auto => !local.underlay.is_near(peer.record.vtep),
            Backend::Direct => false,
        }
}

/// Returns the VXLAN device of a switched network whose packets are in the tunnel.
pub(crate) fn vxlan(network: &Network) -> Device {
    if network.encrypted { Device::vxlan(network.id) } else { Device::sealed_vxlan(network.id) }
}

/// Returns the local host and its tunnel. `None` if it is not a member or has no tunnel.
pub fn own(view: &View) -> Option<(&Node, record::Tunnel)> {
    let own = view.own().filter(|own| view.alloc.members.contains(&own.record.id))?;
    Some((own, own.record.tunnel?))
}

/// Returns the hosts that publish a key which a host with a smaller id publishes too. They are not used as peers: only
/// one host can have the private key.
pub fn copies(view: &View) -> BTreeSet<NodeId> {
    let mut seen = BTreeSet::new();
    let hosts = view.nodes.values().filter(|node| node.record.id == view.me || view.counts(node));
    hosts
        .filter_map(|node| Some((node.record.id, node.record.tunnel?.key)))
        .filter(|(_, key)| !seen.insert(*key))
        .map(|(id, _)| id)
        .collect()
}

/// Returns the hosts that are reached through the tunnel: members that are alive or suspect, and publish a tunnel key of
/// their own. Empty if the local host has no tunnel.
pub fn peers(view: &View) -> BTreeMap<NodeId, (&Node, record::Tunnel)> {
    let Some((_, own_tunnel)) = own(view) else { return BTreeMap::new() };
    let copies = copies(view);
    view.nodes
        .iter()
        .filter(|(id, node)| **id != view.me && view.counts(node) && !copies.contains(id))
        .filter_map(|(id, node)| Some((*id, (node, node.record.tunnel?))))
        .filter(|(_, (_, tunnel))| tunnel.key != own_tunnel.key)
        .collect()
}

/// Returns the VTEP of each peer for encrypted switched networks.
pub(crate) fn remotes(view: &View) -> BTreeMap<NodeId, Remote> {
    let remote = |id| Remote { vtep: address(view.alloc.origin(), id).into(), port: SEALED_VXLAN_PORT };
    peers(view).into_keys().map(|id| (id, remote(id))).collect()
}

/// Returns the route to each peer.
pub fn peer_routes(view: &View, epochs: &KeyEpochs) -> BTreeMap<NodeId, PeerRoute> {
    let Some((_, own)) = own(view) else { return BTreeMap::new() };
    let route = |(id, (_, tunnel))| (id, epochs::route_to(own, epochs, id, tunnel));
    peers(view).into_iter().map(route).collect()
}

/// Adds the local WireGuard interface (two while keys are rotated), its peers, and the routes to them.
pub(crate) fn part(dataplane: &mut Dataplane, view: &View, epochs: &KeyEpochs, detours: &Detours) {
    let Some((own, tunnel)) = own(view).filter(|_| is_wanted(view)) else { return };
    let mtu = mtu(own);
    let (kind, listen) = match tunnel.kernel {
        true => (TunnelKind::Kernel, None),
        false => (TunnelKind::Userspace, Some(own.record.vtep)),
    };
    let cluster = view.alloc.origin();
    let here = IpAddr::V6(address(cluster, view.me));
    for port in [tunnel.port, epochs::other_port(tunnel.port)] {
        let device = epochs::interface_of(port);
        let Some(key) = epochs::key_of(tunnel, epochs, device) else { continue };
        dataplane.links.insert(device, Link::Tunnel { kind, mtu, up: true });
        dataplane.addresses.insert((device, IpNet::from(here)));
        dataplane.tunnels.insert(device, Tunnel { key, port, local: listen });
    }
    // Packets to a tunnel address without a host route must not follow a default route.
    dataplane.routes.insert(prefix(cluster), Hop::UNREACHABLE);
    let mut allowed: BTreeMap<NodeId, BTreeSet<IpNet>> = BTreeMap::new();
    for state in view.networks.values().filter(|s| s.network.may_be_sealed() && s.network.mode == Mode::L3) {
        for (block, holder) in view.blocks(state.network.id) {
            allowed.entry(holder).or_default().insert(block);
        }
    }
    for (id, route) in peer_routes(view, epochs) {
        let Some(peer) = view.nodes.get(&id) else { continue };
        let to = IpNet::from(IpAddr::V6(address(cluster, id)));
        if route.output().is_some() {
            let mtu = path_mtu(own, peer, to, mtu);
            dataplane
                .routes
                .insert(to, Hop { device: route.output(), gateway: None, source: Some(here), mtu });
        }
        let mut allowed = allowed.remove(&id).unwrap_or_default();
        allowed.insert(to);
        for (device, key, port) in route.interfaces().iter().copied() {
            // What crosses NAT has no other way, nor what goes to another address.
            let direct = view.is_plainly_reached(peer).then_some(SocketAddr::new(peer.record.vtep, port));
            let Some(endpoint) = detours.get(id, port).or(direct) else { continue };
            let allowed = allowed.clone();
            dataplane.tunnel_peers.insert((device, key), TunnelPeer { endpoint, allowed });
        }
    }
}

/// The local tunnel interface, as far as the packet filter depends on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gate {
    /// The UDP port.
    pub port: u16,
    /// The prefix of all addresses in the tunnel.
    pub prefix: IpNet,
    /// Whether the kernel implements WireGuard and VXLAN. Otherwise ovld itself sends VXLAN into the tunnel, and no
    /// local process may.
    pub kernel: bool,
}

/// Returns the local tunnel interface. `None` if this host has none.
pub fn gate(view: &View, epochs: &KeyEpochs) -> Option<Gate> {
    let (_, tunnel) = own(view).filter(|_| is_wanted(view))?;
    // Of two interfaces, the first.
    let mut ports = [tunnel.port, epochs::other_port(tunnel.port)];
    ports.sort_by_key(|port| epochs::interface_of(*port));
    let mut here = ports
        .into_iter()
        .filter(|port| epochs::key_of(tunnel, epochs, epochs::interface_of(*port)).is_some());
    Some(Gate { port: here.next()?, prefix: prefix(view.alloc.origin()), kernel: tunnel.kernel })
}

/// Returns the MTU of the WireGuard interface, in bytes: the link MTU without overhead.
pub(crate) fn mtu(own: &Node) -> u16 {
    own.record.link_mtu.saturating_sub(wireguard_overhead(own.record.vtep)).max(MIN_MTU_V6)
}

/// Returns the MTU inside the tunnel of the path to a prefix behind a host, in bytes. `None` if it is not less than `mtu`.
pub(crate) fn path_mtu(own: &Node, peer: &Node, to: IpNet, mtu: u16) -> Option<u16> {
    let (vtep, path) = (own.record.vtep, mtu::path_mtu(own, peer));
    let is_narrow = path.saturating_sub(wireguard_overhead(vtep)) < mtu;
    let carried = mtu::padded_inside(path, vtep).max(mtu::least(to));
    (is_narrow && carried < mtu).then_some(carried)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_contains_the_cluster_and_the_host() {
        let address = address(0x0102_0304_0506_0708, NodeId([9, 10, 11, 12, 13, 14, 15, 16, 17, 18]));
        assert_eq!(address.to_string(), "fd04:506:708:90a:b0c:d0e:f10:1112");
        assert_eq!(prefix(0x0102_0304_0506_0708).to_string(), "fd04:506:708::/48");
        assert!(prefix(0x0102_0304_0506_0708).contains(&IpAddr::V6(address)));
    }
}
