//! The data plane of one endpoint of a routed network: its interface, and a route and a neighbour for each address.
//!
//! The module owns no state. Begin to read at [`endpoint_part`].

use std::net::Ipv4Addr;

use ipnet::IpNet;
use ovl_cluster::addresses;
use ovl_cluster::view::View;
use ovl_dataplane::device::Device;
use ovl_dataplane::state::{Dataplane, Hop, Link};
use ovl_proto::object::Network;
use ovl_proto::table::Endpoint;

use super::silent::silent;
use crate::local::Local;

/// Adds an endpoint of this host. An isolated endpoint keeps its interface, which is down, so that it is not deleted.
pub(crate) fn own_endpoint(
    dataplane: &mut Dataplane,
    view: &View,
    local: &Local,
    network: &Network,
    endpoint: &Endpoint,
    mtu: u16,
) {
    if local.isolation.contains(endpoint.id) || view.address_conflict(view.me, endpoint).is_some() {
        silent(dataplane, endpoint, mtu);
    } else {
        endpoint_part(dataplane, view, local, network, endpoint, mtu);
    }
}

/// Adds the interface of an endpoint of this host, with its routes and neighbours.
pub(crate) fn endpoint_part(
    dataplane: &mut Dataplane,
    view: &View,
    local: &Local,
    network: &Network,
    endpoint: &Endpoint,
    mtu: u16,
) {
    let device = Device::endpoint(endpoint.id);
    dataplane
        .links
        .insert(device, Link::Endpoint { mtu, master: None, up: true, tuned: false, hairpin: false });
    if endpoint.addresses.iter().any(|net| net.addr().is_ipv4()) {
        // Answers to queries that a client sends from 127.0.0.1 leave by the interface with that destination.
        dataplane.neighbours.insert((device, Ipv4Addr::LOCALHOST.into()), endpoint.mac);
    }
    for net in &endpoint.addresses {
        let address = net.addr();
        dataplane.neighbours.insert((device, address), endpoint.mac);
        // The host talks to its endpoints from their gateway address. During an attach, the block may be too new for
        // the bridge to have that address.
        let source = addresses::gateway_on(network, address)
            .filter(|at| view.gateways(network.id, view.me).any(|g| g == *at));
        let hop = Hop { device: Some(device), gateway: None, source, mtu: None };
        dataplane.routes.insert(IpNet::from(address), hop);
        if address.is_ipv6() && local.attaches.is_by_engine(endpoint.id) {
            // A Docker Engine sets no neighbour for the gateway, and the kernel answers a neighbour solicitation only
            // if the receiving device has the address.
            let gateway = addresses::gateway_on(network, address);
            dataplane.addresses.extend(gateway.map(|gateway| (device, IpNet::from(gateway))));
        }
    }
}
