//! Which endpoints, blocks and devices the programs of the fast path know.
//!
//! The module owns no state. Begin to read at [`part`].

use std::net::IpAddr;

use ipnet::IpNet;
use ovl_cluster::addresses;
use ovl_cluster::view::Node;
use ovl_dataplane::device::Device;
use ovl_dataplane::fast::{Fast, FastHost, FastPod, FastRoute, FastVxlan};
use ovl_proto::object::{Backend, Driver, Mode, Network};
use ovl_proto::table::Endpoint;

use crate::encryption::tunnel;
use crate::mtu::{least, path_mtu, vxlan_overhead};
use crate::networks::mtu::network_mtu;
use crate::networks::{PeerPath, path_to};
use crate::policy::{Direction, Policies};
use crate::subsystem::Cluster;

/// What the entries depend on beside the cluster.
#[derive(Debug, Clone, Copy)]
pub(super) struct Context<'a> {
    /// The network policies. Empty on a host that does not enforce them.
    pub(super) policies: &'a Policies,
    /// The ranges of Service addresses, of whatever kind.
    pub(super) services: &'a [IpNet],
}

/// Returns everything that the programs know. Nothing if the fast path is not used.
pub(super) fn part(cluster: &Cluster<'_>, context: Context<'_>) -> Fast {
    let Some(host) = host(cluster) else { return Fast::default() };
    let mut fast = Fast { host: Some(host), ..Fast::default() };
    fast.hooks.insert(host.underlay);
    let Some(own) = cluster.view.own() else { return fast };
    let networks = cluster.view.networks.values().map(|state| &state.network);
    for network in networks.filter(|network| is_for(cluster, network)) {
        if network.backend != Backend::Direct {
            fast.hooks.insert(Device::vxlan(network.id));
        }
        add_paths(&mut fast, cluster, own, network);
    }
    for endpoint in own.table.endpoints() {
        fast.merge(of_endpoint(cluster, context, endpoint));
    }
    fast
}

/// Returns what the programs know of this host. `None` if the fast path is not used.
pub(super) fn host(cluster: &Cluster<'_>) -> Option<FastHost> {
    let underlay = cluster.local.fast.underlay()?;
    let record = &cluster.view.own()?.record;
    let vtep = match record.vtep {
        IpAddr::V4(vtep) => Some(vtep),
        // VXLAN over IPv6 needs a checksum over all of the packet.
        IpAddr::V6(_) => None,
    };
    Some(FastHost { on: !cluster.local.fast.is_paused(), underlay, vtep, port: record.vxlan_port })
}

/// Whether the programs are for a network: routed, unencrypted, and built on this host.
fn is_for(cluster: &Cluster<'_>, network: &Network) -> bool {
    network.mode == Mode::L3
        && network.driver == Driver::Overlay
        && !network.encrypted
        && cluster.local.is_built(cluster.view, network.id)
}

/// Returns the entries of an endpoint of this host, and its device.
///
/// An endpoint that the fast path is not for has entries too: its address may lie in a block of another host. Only one that
/// is disconnected has none, because its address is elsewhere.
pub(super) fn of_endpoint(cluster: &Cluster<'_>, context: Context<'_>, endpoint: &Endpoint) -> Fast {
    let view = cluster.view;
    let mut fast = Fast::default();
    let network = view.networks.get(&endpoint.network).map(|state| &state.network);
    let Some(network) = network.filter(|network| network.mode == Mode::L3) else { return fast };
    if cluster.local.is_disconnected(endpoint) || view.address_conflict(view.me, endpoint).is_some() {
        return fast;
    }
    let device = Device::endpoint(endpoint.id);
    let is_for = is_for(cluster, network);
    if is_for {
        // Also where a policy selects it: what the stack translates is noted all the same.
        fast.hooks.insert(device);
    }
    let [a, b, c, d, e] = endpoint.id.0;
    let pod = FastPod {
        device,
        epoch: u32::from_be_bytes([b, c, d, e]) ^ u32::from(a) << 12,
        network: network.id,
        mac: endpoint.mac,
        mtu: network_mtu(view, network),
        fast: is_for && !is_selected(cluster, context.policies, endpoint) && !has_services(context, network),
    };
    fast.pods.extend(endpoint.addresses.iter().map(|net| (net.addr(), pod)));
    fast
}

/// Whether a network policy selects an endpoint, or may do so as soon as its labels are known: packets are judged in the
/// stack then.
fn is_selected(cluster: &Cluster<'_>, policies: &Policies, endpoint: &Endpoint) -> bool {
    let view = cluster.view;
    if policies.is_empty() {
        return false;
    }
    let labels = view.known_labels(view.me, endpoint);
    let decides = |direction| {
        !policies.deciding(&view.resources, &endpoint.namespace, labels.as_deref(), direction).is_empty()
    };
    Direction::ALL.into_iter().any(decides)
}

/// Whether a Service may have an address of this network: packets to it are translated in the stack then.
fn has_services(context: Context<'_>, network: &Network) -> bool {
    let overlaps = |a: &IpNet, b: &IpNet| a.contains(b) || b.contains(a);
    network.subnets.iter().any(|subnet| context.services.iter().any(|range| overlaps(range, &subnet.prefix)))
}

/// Adds the blocks of other hosts on a network.
fn add_paths(fast: &mut Fast, cluster: &Cluster<'_>, own: &Node, network: &Network) {
    let view = cluster.view;
    let mtu = network_mtu(view, network);
    for (block, holder) in view.blocks(network.id) {
        let Some(peer) = view.nodes.get(&holder).filter(|node| holder != view.me && view.counts(node)) else {
            continue;
        };
        if tunnel::is_sealed(view, cluster.local, network, peer) {
            continue;
        }
        let outer = path_mtu(own, peer);
        let narrower = |carried: u16| carried.max(least(block)).min(mtu);
        let path = match path_to(network, cluster.local, own, peer, block) {
            // The programs ask the host's routes.
            Some(PeerPath::Direct | PeerPath::Routers) => {
                FastRoute { network: network.id, mtu: narrower(outer), vxlan: None }
            }
            Some(PeerPath::Vxlan) => {
                let (IpAddr::V4(vtep), IpAddr::V4(_)) = (peer.record.vtep, own.record.vtep) else { continue };
                let vxlan = FastVxlan {
                    vtep,
                    port: peer.record.vxlan_port,
                    vni: network.vni,
                    mac: addresses::mac_of_host(network.id, holder),
                    own_mac: addresses::mac_of_host(network.id, view.me),
                };
                let mtu = narrower(outer.saturating_sub(vxlan_overhead(own.record.vtep)));
                FastRoute { network: network.id, mtu, vxlan: Some(vxlan) }
            }
            Some(PeerPath::Tunnel(_)) | None => continue,
        };
        fast.paths.insert(block, path);
    }
}
