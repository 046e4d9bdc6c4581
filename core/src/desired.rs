//! What the kernel should hold, from what the cluster says. One network at a time, so that a
//! change costs what its own network costs. Switched networks are here, routed ones in [`crate::routed`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_proto::SEALED_VXLAN_PORT;
use ovl_proto::id::{EndpointId, Mac, NetworkId, NodeId};
use ovl_proto::object::{Driver, Mode, Network};
use ovl_proto::record::Tunnel;
use ovl_proto::table::Endpoint;

use crate::device::Device;
use crate::filter;
use crate::kernel::{Hop, Kernel, Link, Remote, Source};
use crate::publish;
use crate::resolver;
use crate::routed;
use crate::tunnel;
use crate::view::{Local, Node, Placed, View};

/// The smallest MTU that IPv6 allows (RFC 8200, section 5), and what a network gets at the least.
pub const MIN_MTU: u16 = 1280;

/// Bytes that VXLAN puts before an IP packet: inner Ethernet 14, VXLAN 8, UDP 8, outer IP.
pub(crate) fn overhead(vtep: IpAddr) -> u16 {
    14 + 8 + 8 + if vtep.is_ipv4() { 20 } else { 40 }
}

/// What is put around the packets of a switched network: VXLAN, which is inside the tunnel's IPv6 if the
/// network is encrypted.
fn switched_overhead(network: &Network, vtep: IpAddr) -> u16 {
    if network.encrypted { 14 + 8 + 8 + 40 + tunnel::overhead(vtep) } else { overhead(vtep) }
}

/// All of it: every network that has something here, and what concerns the host as a whole.
pub fn desired(view: &View, local: &Local) -> Kernel {
    let mut kernel = host(view, local);
    for network in view.networks.keys() {
        kernel.merge(network_part(view, local, *network));
    }
    kernel
}

/// Whether this host builds a network's devices: it has, or is about to have, an endpoint there; or
/// a block of a routed network, whose addresses it answers for; or the network is its own.
pub fn is_built(view: &View, local: &Local, network: NetworkId) -> bool {
    let is_routed = view.networks.get(&network).is_some_and(|state| state.network.mode == Mode::L3);
    local.wanted.contains_key(&network)
        || view.is_own(network)
        || (is_routed && routed::has_block(view, network))
        || view.own().is_some_and(|own| own.table.endpoints_on(network).next().is_some())
}

/// What concerns no single network: the packet filter, and the settings that it needs.
pub fn host(view: &View, local: &Local) -> Kernel {
    let built: Vec<&Network> = view
        .networks
        .values()
        .map(|state| &state.network)
        .filter(|network| is_built(view, local, network.id))
        .collect();
    let mut kernel = Kernel::default();
    tunnel::part(&mut kernel, view, local);
    if built.is_empty() && kernel.links.is_empty() {
        return kernel;
    }
    let vteps: BTreeSet<IpAddr> = view
        .nodes
        .values()
        .filter(|node| node.record.id != view.me && view.alloc.members.contains(&node.record.id))
        .map(|node| node.record.vtep)
        .collect();
    let port = view.own().map_or(ovl_proto::DEFAULT_VXLAN_PORT, |own| own.record.vxlan_port);
    let tunnel = kernel.tunnels.values().next().map(|end| filter::Tunnel {
        port: end.port,
        prefix: tunnel::prefix(view.alloc.cluster),
        // The kernel's device has no socket of ours.
        kernel: end.local.is_none(),
    });
    kernel.tables.extend(local.publishing.then(publish::table));
    if local.publishing || (local.served && built.iter().any(|network| network.mode == Mode::L2)) {
        kernel.tables.extend([publish::frames_table()]);
    }
    let mut text = filter::render(&built, &vteps, port, tunnel, local.masquerade);
    if let Some(chains) = resolver::chains(&built, &local.resolved, &local.cluster_dns) {
        text += &chains;
        kernel.tables.extend(resolver::past_firewalls());
    }
    kernel.filter = Some(text);
    for network in built.iter().filter(|network| !network.internal || routes_for_policies(view, network)) {
        for subnet in &network.subnets {
            let name = match subnet.prefix {
                IpNet::V4(_) => "net.ipv4.ip_forward",
                IpNet::V6(_) => "net.ipv6.conf.all.forwarding",
            };
            kernel.sysctls.insert(name.to_owned(), "1".to_owned());
        }
    }
    kernel
}

/// What one network needs on this host.
pub fn network_part(view: &View, local: &Local, id: NetworkId) -> Kernel {
    let mut kernel = Kernel::default();
    let (Some(state), Some(own)) = (view.networks.get(&id), view.own()) else { return kernel };
    if !is_built(view, local, id) {
        return kernel;
    }
    let network = &state.network;
    match network.mode {
        Mode::L2 => switched(&mut kernel, view, local, network, own),
        Mode::L3 => routed::part(&mut kernel, view, local, network, own),
    }
    for endpoint in local.attaching.values().filter(|endpoint| endpoint.network == id) {
        publish::guard(&mut kernel, local, network, endpoint);
        publish::elements(&mut kernel, network, endpoint);
    }
    if local.resolved.contains(&id) {
        resolver::on_bridge(&mut kernel, network, &local.cluster_dns);
    }
    kernel
}

fn switched(kernel: &mut Kernel, view: &View, local: &Local, network: &Network, own: &Node) {
    let id = network.id;
    let mtu = network_mtu(view, network);
    let ways = Ways::of(view, network);
    devices(kernel, view, network, own, mtu);
    let placed: Vec<Placed<'_>> = view.endpoints(id).collect();
    let mut best = BTreeMap::new();
    for rank in placed.iter().map(|placed| (placed.endpoint.mac, rank(network, placed))) {
        best.entry(rank.0).and_modify(|best| *best = rank.1.min(*best)).or_insert(rank.1);
    }
    let wins = |placed: &Placed<'_>| best.get(&placed.endpoint.mac) == Some(&rank(network, placed));
    for claim in placed.iter().filter_map(|placed| Claim::of(view, local, network, &ways, *placed, wins)) {
        claim.mac(kernel);
        kernel.floods.extend(claim.remote.map(|remote| (Device::vxlan(id), remote)));
        for address in &claim.endpoint.addresses {
            kernel.neighbours.insert((Device::bridge(id), address.addr()), claim.endpoint.mac);
        }
    }
    if network.internal && (routes_for_policies(view, network) || local.resolved.contains(&id)) {
        // Without a gateway's address there is no other.
        let hop = Hop { device: Some(Device::bridge(id)), ..Hop::UNREACHABLE };
        kernel.routes.extend(network.subnets.iter().map(|subnet| (subnet.prefix, hop)));
    }
    // The host's ends: all that the table names, isolated or not, so that none is swept away.
    for endpoint in own.table.endpoints_on(id) {
        own_endpoint(kernel, local, network, endpoint, mtu);
        if !local.isolated.contains_key(&endpoint.id) {
            publish::elements(kernel, network, endpoint);
        }
    }
}

/// Whether the host's IP stack takes frames of a network, and gives them back to it, for network policies.
fn routes_for_policies(view: &View, network: &Network) -> bool {
    network.mode == Mode::L2 && !view.resources.policies.is_empty()
}

/// Where a switched network's frames for other hosts go.
#[derive(Debug)]
pub(crate) enum Ways {
    /// To the VTEPs of this family: a VXLAN device sends to one only; `status` names other hosts.
    Plain {
        /// IPv4.
        v4: bool,
    },
    /// Through the tunnel, to these hosts and no others.
    Sealed(BTreeMap<NodeId, Remote>),
}

impl Ways {
    pub(crate) fn of(view: &View, network: &Network) -> Self {
        match network.encrypted {
            true => Self::Sealed(tunnel::remotes(view)),
            false => Self::Plain { v4: view.own().is_some_and(|own| own.record.vtep.is_ipv4()) },
        }
    }

    /// Where a host receives frames; nothing if it cannot be reached.
    pub(crate) fn to(&self, node: &Node) -> Option<Remote> {
        let Remote { vtep, port } = Remote { vtep: node.record.vtep, port: node.record.vxlan_port };
        match self {
            Self::Plain { v4 } => (vtep.is_ipv4() == *v4).then_some(Remote { vtep, port }),
            Self::Sealed(remotes) => remotes.get(&node.record.id).copied(),
        }
    }
}

/// An endpoint that frames are sent to.
#[derive(Debug)]
pub(crate) struct Claim<'a> {
    /// The endpoint.
    pub(crate) endpoint: &'a Endpoint,
    /// Where it is; nothing if it is here.
    pub(crate) remote: Option<Remote>,
    /// Whether frames from it must come from there.
    sealed: bool,
}

impl<'a> Claim<'a> {
    /// Nothing for one of those that count which has no business on the network after all.
    pub(crate) fn of(
        view: &View,
        local: &Local,
        network: &Network,
        ways: &Ways,
        placed: Placed<'a>,
        wins: impl Fn(&Placed<'_>) -> bool,
    ) -> Option<Self> {
        let Placed { node, endpoint } = placed;
        let usable =
            |address: IpAddr| network.subnets.iter().any(|subnet| crate::ipam::is_usable(address, subnet));
        if !endpoint.addresses.iter().all(|net| usable(net.addr())) || !wins(&placed) {
            return None;
        }
        let mine = node.record.id == view.me;
        let remote = if mine { None } else { Some(ways.to(node)?) };
        if mine && local.isolated.contains_key(&endpoint.id) {
            return None;
        }
        Some(Self { endpoint, remote, sealed: network.encrypted })
    }

    /// Where frames for its MAC address go.
    pub(crate) fn mac(&self, kernel: &mut Kernel) {
        let Endpoint { id, network, mac, .. } = *self.endpoint;
        let vxlan = Device::vxlan(network);
        kernel.remotes.extend(self.remote.map(|remote| ((vxlan, mac), remote)));
        kernel.ports.insert((if self.remote.is_some() { vxlan } else { Device::endpoint(id) }, mac));
        if let Some(remote) = self.remote.filter(|_| self.sealed) {
            let addresses = self.endpoint.addresses.iter().map(IpNet::addr).collect();
            kernel.sources.insert((vxlan, mac), Source { from: remote.vtep, addresses });
        }
    }
}

/// The network's bridge with its addresses, and its VXLAN device, if it has other hosts. An encrypted network has one in the tunnel
/// alone: without a tunnel, none.
pub(crate) fn devices(kernel: &mut Kernel, view: &View, network: &Network, own: &Node, mtu: u16) {
    let (bridge, vxlan) = (Device::bridge(network.id), Device::vxlan(network.id));
    kernel
        .links
        .insert(bridge, Link::Bridge { mac: Mac::of_gateway(network.id), mtu, up: true, tuned: true });
    let (vni, master, mac) = (network.vni, Some(bridge), Mac::of_vxlan(network.id));
    let (up, tuned) = (true, true);
    let plain = || {
        let (local, port) = (own.record.vtep, own.record.vxlan_port);
        Link::Vxlan { vni, local, port, mtu, master, mac, up, tuned, sealed: false }
    };
    let sealed = |end: Tunnel| {
        let (local, port) = (tunnel::address(view.alloc.cluster, view.me).into(), SEALED_VXLAN_PORT);
        match end.kernel {
            true => Link::Vxlan { vni, local, port, mtu, master, mac, up, tuned, sealed: true },
            false => Link::Tap { vni, mtu, master, up, tuned },
        }
    };
    let link = match network.driver {
        Driver::Bridge => None,
        Driver::Overlay if network.encrypted => tunnel::own(view).map(|(_, end)| sealed(end)),
        Driver::Overlay => Some(plain()),
    };
    kernel.links.extend(link.map(|link| (vxlan, link)));
    if !network.internal {
        for subnet in &network.subnets {
            if let Ok(address) = IpNet::new(subnet.gateway, subnet.prefix.prefix_len()) {
                kernel.addresses.insert((bridge, address));
            }
        }
    }
}

/// The host's end of an endpoint's pair.
pub(crate) fn own_endpoint(
    kernel: &mut Kernel,
    local: &Local,
    network: &Network,
    endpoint: &Endpoint,
    mtu: u16,
) {
    if local.isolated.contains_key(&endpoint.id) {
        silent(kernel, endpoint, mtu);
    } else {
        port(kernel, local, network, endpoint, mtu);
    }
}

/// The host's end of an endpoint that must not talk.
pub(crate) fn silent(kernel: &mut Kernel, endpoint: &Endpoint, mtu: u16) {
    let link = Link::Endpoint { mtu, master: None, up: false, tuned: false, hairpin: false };
    kernel.links.insert(Device::endpoint(endpoint.id), link);
}

/// The port of a bridge.
fn port(kernel: &mut Kernel, local: &Local, network: &Network, endpoint: &Endpoint, mtu: u16) {
    let hairpin = publish::turns_round(local, network, endpoint);
    let link =
        Link::Endpoint { mtu, master: Some(Device::bridge(network.id)), up: true, tuned: true, hairpin };
    kernel.links.insert(Device::endpoint(endpoint.id), link);
    publish::guard(kernel, local, network, endpoint);
}

/// Orders the endpoints that claim a MAC address; it belongs to the first: the one whose own address
/// makes it (nobody else can hold that), then the one on the host with the smaller id. The same on all
/// hosts, so that a frame never wanders.
pub(crate) fn rank(network: &Network, placed: &Placed<'_>) -> (bool, NodeId, EndpointId) {
    let makes = |net: &IpNet| crate::ipam::mac_of(network.id, net.addr()) == placed.endpoint.mac;
    let by_right = placed.endpoint.addresses.iter().any(makes);
    (!by_right, placed.node.record.id, placed.endpoint.id)
}

/// The MTU of a network's endpoints on this host, in bytes.
pub fn network_mtu(view: &View, network: &Network) -> u16 {
    match (network.driver, network.mode) {
        // Nothing is put around its packets.
        (Driver::Bridge, _) => {
            let link = view.own().map_or(MIN_MTU, |own| own.record.link_mtu);
            link.min(network.mtu.unwrap_or(u16::MAX)).max(MIN_MTU)
        }
        (Driver::Overlay, Mode::L2) => switched_mtu(view, network),
        (Driver::Overlay, Mode::L3) => view.own().map_or(MIN_MTU, |own| routed::endpoint_mtu(network, own)),
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

/// What one endpoint of this host needs beside its network's devices. Its link is made by an
/// attach.
pub fn endpoint_part(view: &View, local: &Local, network: &Network, endpoint: &Endpoint, mtu: u16) -> Kernel {
    let mut kernel = Kernel::default();
    let device = Device::endpoint(endpoint.id);
    match network.mode {
        Mode::L2 => {
            let bridge = Device::bridge(network.id);
            port(&mut kernel, local, network, endpoint, mtu);
            kernel.ports.insert((device, endpoint.mac));
            for address in &endpoint.addresses {
                kernel.neighbours.insert((bridge, address.addr()), endpoint.mac);
            }
        }
        Mode::L3 => routed::endpoint_part(&mut kernel, view, local, network, endpoint, mtu),
    }
    publish::elements(&mut kernel, network, endpoint);
    kernel
}
