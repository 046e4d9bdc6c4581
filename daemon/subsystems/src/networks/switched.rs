//! The data plane of a switched network on this host: one broadcast domain over all hosts.
//!
//! Each host has a bridge and a VXLAN device, and FDB entries and neighbours for the endpoints of all hosts. The module
//! owns no state. Begin to read at [`part`].

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use ovl_cluster::addresses;
use ovl_cluster::view::{Node, Placed, View};
use ovl_dataplane::device::Device;
use ovl_dataplane::state::{Dataplane, Hop, Link};
use ovl_proto::SEALED_VXLAN_PORT;
use ovl_proto::id::Mac;
use ovl_proto::object::{Driver, Encrypt, Mode, Network};
use ovl_proto::record::Tunnel;

use super::mtu::network_mtu;
use super::multicast;
use crate::encryption::tunnel;
use crate::endpoints::switched::{self, FrameRoutes, MacClaim, rank, shared_source};
use crate::local::Local;

/// Adds the data plane of a switched network on this host.
pub(super) fn part(dataplane: &mut Dataplane, view: &View, local: &Local, network: &Network, own: &Node) {
    let id = network.id;
    let mtu = network_mtu(view, network);
    devices(dataplane, view, network, own, mtu);
    let routes = FrameRoutes::of(view, local, network);
    let placed: Vec<Placed<'_>> = view.endpoints(id).collect();
    let mut best = BTreeMap::new();
    for rank in placed.iter().map(|placed| (placed.endpoint.mac, rank(network, placed))) {
        best.entry(rank.0).and_modify(|best| *best = rank.1.min(*best)).or_insert(rank.1);
    }
    let wins = |placed: &Placed<'_>| best.get(&placed.endpoint.mac) == Some(&rank(network, placed));
    for placed in &placed {
        let Some(claim) = MacClaim::of(view, local, network, &routes, *placed, wins) else { continue };
        claim.mac(dataplane, view);
        if let Some(exit) = claim.exit() {
            switched::host(dataplane, &routes, placed.node, exit);
        }
        for address in &claim.endpoint().addresses {
            dataplane.neighbours.insert((Device::bridge(id), address.addr()), claim.endpoint().mac);
        }
    }
    multicast::part(dataplane, view, network, &routes);
    let shared: BTreeSet<Mac> =
        placed.iter().flat_map(|placed| &placed.endpoint.allowed_macs).copied().collect();
    for mac in shared {
        dataplane.sources.extend(shared_source(view, network, &routes, mac));
    }
    if network.internal {
        // It has no gateway address, and so no connected route. The host routes packets back that a policy diverted, and
        // sends what other subsystems answer.
        let hop = Hop { device: Some(Device::bridge(id)), ..Hop::UNREACHABLE };
        dataplane.routes.extend(network.subnets.iter().map(|subnet| (subnet.prefix, hop)));
    }
    // Host interfaces of all endpoints in the table, also of isolated ones, so that none is deleted.
    for endpoint in own.table.endpoints_on(id) {
        switched::own_endpoint(dataplane, view, local, network, endpoint, mtu);
    }
}

/// Whether the host routes frames within a switched network, so that network policies apply to them.
pub(super) fn routes_for_policies(view: &View, network: &Network) -> bool {
    network.mode == Mode::L2 && view.resources.has_policies()
}

/// Adds the network's bridge with its addresses and, unless it is a bridge network, its VXLAN device. An encrypted
/// network sends VXLAN only through the tunnel: without a tunnel it has no such device. A network that is encrypted to some
/// hosts has both. The bridge passes nothing on from one of them to the other ([`Link::Vxlan::tuned`]).
pub(super) fn devices(dataplane: &mut Dataplane, view: &View, network: &Network, own: &Node, mtu: u16) {
    let (bridge, vxlan) = (Device::bridge(network.id), Device::vxlan(network.id));
    dataplane
        .links
        .insert(bridge, Link::Bridge { mac: Mac::of_gateway(network.id), mtu, up: true, tuned: true });
    let (vni, master) = (network.vni, Some(bridge));
    let (up, tuned) = (true, true);
    let on_underlay = || {
        let (local, port) = (own.record.vtep, own.record.vxlan_port);
        // The bridge passes frames for the address of a port up to the host: here, path probes.
        let mac = addresses::mac_of_host(network.id, own.record.id);
        Link::Vxlan { vni, local, port, mtu, master, mac, up, tuned, sealed: false }
    };
    let in_tunnel = |own: Tunnel| {
        let (local, port) = (tunnel::address(view.alloc.origin(), view.me).into(), SEALED_VXLAN_PORT);
        let mac = Mac::of_vxlan(network.id);
        match own.kernel {
            true => Link::Vxlan { vni, local, port, mtu, master, mac, up, tuned, sealed: true },
            false => Link::Tap { vni, mtu, master, up, tuned },
        }
    };
    if network.driver == Driver::Overlay {
        let encrypt = network.encrypt();
        if encrypt != Encrypt::Yes {
            dataplane.links.insert(vxlan, on_underlay());
        }
        let sealed = tunnel::own(view).filter(|_| encrypt != Encrypt::No);
        let device = tunnel::vxlan(network);
        dataplane.links.extend(sealed.map(|(_, own)| (device, in_tunnel(own))));
    }
    if !network.internal {
        for subnet in &network.subnets {
            if let Ok(address) = IpNet::new(subnet.gateway, subnet.prefix.prefix_len()) {
                dataplane.addresses.insert((bridge, address));
            }
        }
    }
}
