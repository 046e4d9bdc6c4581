//! An endpoint of a routed network: a device of its own, with a route for each of its addresses.

use ipnet::IpNet;
use ovl_cluster::addresses;
use ovl_cluster::view::View;
use ovl_dataplane::device::Device;
use ovl_dataplane::state::{Dataplane, Hop, Link};
use ovl_proto::object::Network;
use ovl_proto::table::Endpoint;

use super::silent::silent;
use crate::local::Local;

/// An endpoint of this host; one that must not talk is silent, and not swept away.
pub(crate) fn own_endpoint(
    dataplane: &mut Dataplane,
    view: &View,
    local: &Local,
    network: &Network,
    endpoint: &Endpoint,
    mtu: u16,
) {
    if local.isolated.contains_key(&endpoint.id) || view.address_conflict(view.me, endpoint).is_some() {
        silent(dataplane, endpoint, mtu);
    } else {
        endpoint_part(dataplane, view, local, network, endpoint, mtu);
    }
}

/// An endpoint of this host: routes and neighbours on its device.
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
    for net in &endpoint.addresses {
        let address = net.addr();
        dataplane.neighbours.insert((device, address), endpoint.mac);
        // The host speaks to its endpoints as their gateway. While an attach is under way its block
        // may be too new for the bridge to have the address.
        let source = addresses::gateway_on(network, address)
            .filter(|at| view.gateways(network.id, view.me).any(|g| g == *at));
        let hop = Hop { device: Some(device), gateway: None, source, mtu: None };
        dataplane.routes.insert(IpNet::from(address), hop);
        if address.is_ipv6() && local.fetched.contains(&endpoint.id) {
            // An Engine sets no neighbour for the gateway, and who asks for an IPv6 address is answered only where the
            // device has it.
            let gateway = addresses::gateway_on(network, address);
            dataplane.addresses.extend(gateway.map(|gateway| (device, IpNet::from(gateway))));
        }
    }
}
