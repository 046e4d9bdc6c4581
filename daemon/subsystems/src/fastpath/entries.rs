//! Which endpoints, blocks and devices the programs of the fast path know.
//!
//! The module owns no state. Begin to read at [`part`].

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_cluster::addresses;
use ovl_cluster::view::{Node, Placed};
use ovl_dataplane::device::Device;
use ovl_dataplane::fast::{Fast, FastHost, FastPod, FastRoute, FastVxlan};
use ovl_proto::id::Mac;
use ovl_proto::object::{Backend, Driver, Mode, Network};
use ovl_proto::table::Endpoint;

use crate::encryption::tunnel;
use crate::endpoints::switched::{Exit, FrameRoutes};
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
    let view = cluster.view;
    let Some(own) = view.own() else { return fast };
    let networks = view.networks.values().map(|state| &state.network);
    for network in networks.filter(|network| is_for(cluster, network)) {
        if network.mode == Mode::L2 || network.backend != Backend::Direct {
            fast.hooks.insert(Device::vxlan(network.id));
        }
        match network.mode {
            Mode::L2 => add_switched(&mut fast, cluster, network, network_mtu(view, network)),
            Mode::L3 => add_paths(&mut fast, cluster, own, network),
        }
    }
    for endpoint in own.table.endpoints() {
        fast.merge(of_endpoint(cluster, context, Placed { node: own, endpoint }));
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

/// Whether the programs are for a network: unencrypted, between hosts, and built on this one.
fn is_for(cluster: &Cluster<'_>, network: &Network) -> bool {
    network.driver == Driver::Overlay
        && !network.encrypted
        && cluster.local.is_built(cluster.view, network.id)
}

/// Returns the entries of an endpoint: its address and its device if it is of this host, the path to it if it is of another
/// one and the network is switched.
pub(super) fn of_endpoint(cluster: &Cluster<'_>, context: Context<'_>, placed: Placed<'_>) -> Fast {
    let view = cluster.view;
    let Some(state) = view.networks.get(&placed.endpoint.network) else { return Fast::default() };
    let network = &state.network;
    let is_alone = |placed: Placed<'_>| {
        let Endpoint { network, mac, .. } = *placed.endpoint;
        view.all_with_mac(network, mac).filter(|other| view.is_counted(other)).nth(1).is_none()
            && view.all_allowing_mac(network, mac).next().is_none()
    };
    let mtu = network_mtu(view, network);
    if placed.node.record.id == view.me {
        of_own(cluster, context, network, mtu, placed, is_alone)
    } else if network.mode == Mode::L2 && is_for(cluster, network) && view.is_counted(&placed) {
        let routes = FrameRoutes::of(view, cluster.local, network);
        of_remote(cluster, network, mtu, &routes, placed, is_alone)
    } else {
        Fast::default()
    }
}

/// Returns the entries of an endpoint of this host, and its device.
///
/// On a routed network, an endpoint that the fast path is not for has entries too: its address may lie in a block of another
/// host. Only one that is disconnected has none, because its address is elsewhere.
fn of_own(
    cluster: &Cluster<'_>,
    context: Context<'_>,
    network: &Network,
    mtu: u16,
    placed: Placed<'_>,
    is_alone: impl Fn(Placed<'_>) -> bool,
) -> Fast {
    let (view, endpoint) = (cluster.view, placed.endpoint);
    let mut fast = Fast::default();
    if cluster.local.is_disconnected(endpoint) || view.address_conflict(view.me, endpoint).is_some() {
        return fast;
    }
    let (device, switched) = (Device::endpoint(endpoint.id), network.mode == Mode::L2);
    let is_for = is_for(cluster, network);
    if switched && !is_for {
        return fast;
    }
    if is_for {
        // Also where the fast path is not for it: what the stack translates is noted all the same.
        fast.hooks.insert(device);
    }
    let selection = selection(cluster, context.policies, endpoint);
    let is_reached = !switched || (is_inside(network, endpoint) && is_alone(placed));
    let [a, b, c, d, e] = endpoint.id.0;
    let pod = FastPod {
        device,
        epoch: u32::from_be_bytes([b, c, d, e]) ^ u32::from(a) << 12,
        network: network.id,
        mac: endpoint.mac,
        mtu,
        switched,
        fast: is_for && is_reached && selection != Selection::Undecided && !has_services(context, network),
        selected: selection == Selection::Selected,
    };
    fast.pods.extend(endpoint.addresses.iter().map(|net| (net.addr(), pod)));
    fast
}

/// Returns the paths to a used endpoint of another host on a switched network.
fn of_remote(
    cluster: &Cluster<'_>,
    network: &Network,
    mtu: u16,
    routes: &FrameRoutes,
    placed: Placed<'_>,
    is_alone: impl Fn(Placed<'_>) -> bool,
) -> Fast {
    let mut fast = Fast::default();
    // What is sealed takes the stack.
    let plain = routes.to(placed.node).filter(|exit| exit.device == Device::vxlan(network.id));
    let (Some(own), Some(Exit { remote, .. })) = (cluster.view.own(), plain) else { return fast };
    let (IpAddr::V4(vtep), IpAddr::V4(_)) = (remote.vtep, own.record.vtep) else { return fast };
    let endpoint = placed.endpoint;
    if !is_inside(network, endpoint) || !is_alone(placed) {
        return fast;
    }
    let carried = path_mtu(own, placed.node).saturating_sub(vxlan_overhead(own.record.vtep));
    let vxlan = FastVxlan { vtep, port: remote.port, vni: network.vni, mac: endpoint.mac, own_mac: None };
    let route = FastRoute { network: network.id, mtu: mtu.min(carried), vxlan: Some(vxlan) };
    fast.paths.extend(endpoint.addresses.iter().map(|net| (IpNet::from(net.addr()), route)));
    fast
}

/// Whether all addresses of an endpoint are in the subnets of its network, as frames to it need.
fn is_inside(network: &Network, endpoint: &Endpoint) -> bool {
    let usable = |net: &IpNet| network.subnets.iter().any(|subnet| addresses::is_usable(net.addr(), subnet));
    endpoint.addresses.iter().all(usable)
}

/// Adds the entries of all endpoints of a switched network.
fn add_switched(fast: &mut Fast, cluster: &Cluster<'_>, network: &Network, mtu: u16) {
    let view = cluster.view;
    let mut holders: BTreeMap<Mac, usize> = BTreeMap::new();
    let all: Vec<Placed<'_>> = view.endpoints(network.id).collect();
    for endpoint in all.iter().map(|placed| placed.endpoint) {
        *holders.entry(endpoint.mac).or_default() += 1;
    }
    // Also those of endpoints that are not used, as they may be soon.
    for mac in view.all_endpoints_on(network.id).flat_map(|placed| &placed.endpoint.allowed_macs) {
        *holders.entry(*mac).or_default() += 2;
    }
    let is_alone = |placed: Placed<'_>| holders.get(&placed.endpoint.mac) == Some(&1);
    let routes = FrameRoutes::of(view, cluster.local, network);
    for placed in all.into_iter().filter(|placed| placed.node.record.id != view.me) {
        fast.merge(of_remote(cluster, network, mtu, &routes, placed, is_alone));
    }
}

/// Whether network policies select an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Selection {
    /// No.
    Free,
    /// Yes: the stack judges its flows.
    Selected,
    /// They may, as soon as its labels are known.
    Undecided,
}

fn selection(cluster: &Cluster<'_>, policies: &Policies, endpoint: &Endpoint) -> Selection {
    let view = cluster.view;
    if policies.is_empty() {
        return Selection::Free;
    }
    let labels = view.known_labels(view.me, endpoint);
    let deciding = Direction::ALL.map(|direction| {
        policies.deciding(&view.resources, &endpoint.namespace, labels.as_deref(), direction)
    });
    if deciding.iter().any(|each| !each.undecided.is_empty()) {
        Selection::Undecided
    } else if deciding.iter().any(|each| !each.is_empty()) {
        Selection::Selected
    } else {
        Selection::Free
    }
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
        let path = match path_to(network, cluster.local, cluster.view, peer, block) {
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
                    own_mac: Some(addresses::mac_of_host(network.id, view.me)),
                };
                let mtu = narrower(outer.saturating_sub(vxlan_overhead(own.record.vtep)));
                FastRoute { network: network.id, mtu, vxlan: Some(vxlan) }
            }
            Some(PeerPath::Tunnel(_)) | None => continue,
        };
        fast.paths.insert(block, path);
    }
}
