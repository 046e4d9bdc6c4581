//! Computes the desired data plane of networks from the view.
//!
//! Each network is computed alone, so that the cost of a change does not depend on other networks. The module owns no
//! state. Begin to read at [`network_part`]; [`host`] adds the packet filter and the tunnel.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use ovl_cluster::view::View;
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::NetworkId;
use ovl_proto::object::{Mode, Network};

use super::switched::routes_for_policies;
use super::{filter, routed, switched};
use crate::encryption::tunnel;
use crate::local::Local;
use crate::publish;

/// Returns the desired data plane of all networks and of the host as a whole.
pub fn desired(view: &View, local: &Local) -> Dataplane {
    let mut dataplane = host(view, local);
    for network in view.networks.keys() {
        dataplane.merge(network_part(view, local, *network));
    }
    dataplane
}

/// Returns the part that belongs to no single network: the tunnel, the packet filter, tables and IP forwarding.
pub fn host(view: &View, local: &Local) -> Dataplane {
    let built: Vec<&Network> = view
        .networks
        .values()
        .map(|state| &state.network)
        .filter(|network| local.is_built(view, network.id))
        .collect();
    let mut dataplane = Dataplane::default();
    tunnel::part(&mut dataplane, view, &local.key_epochs);
    if built.is_empty() && dataplane.links.is_empty() {
        return dataplane;
    }
    let vteps: BTreeSet<IpAddr> = view
        .nodes
        .values()
        .filter(|node| node.record.id != view.me && view.alloc.members.contains(&node.record.id))
        .map(|node| node.record.vtep)
        .collect();
    let port = view.own().map_or(ovl_proto::DEFAULT_VXLAN_PORT, |own| own.record.vxlan_port);
    let tunnel = dataplane.tunnels.values().next().map(|tunnel| filter::FilterTunnel {
        port: tunnel.port,
        prefix: tunnel::prefix(view.alloc.cluster),
        // A kernel WireGuard interface needs no local socket address.
        kernel: tunnel.local.is_none(),
    });
    dataplane.tables.extend(local.publishing.then(publish::table));
    if local.publishing || (local.served && built.iter().any(|network| network.mode == Mode::L2)) {
        dataplane.tables.extend([publish::frames_table()]);
    }
    dataplane.filter = Some(filter::render(&built, &vteps, port, tunnel, local.masquerade, &local.open));
    for network in built.iter().filter(|network| !network.internal || routes_for_policies(view, network)) {
        for subnet in &network.subnets {
            let name = match subnet.prefix {
                IpNet::V4(_) => "net.ipv4.ip_forward",
                IpNet::V6(_) => "net.ipv6.conf.all.forwarding",
            };
            dataplane.sysctls.insert(name.to_owned(), "1".to_owned());
        }
    }
    dataplane
}

/// Returns the part of one network on this host. Empty if the host does not need its devices.
pub fn network_part(view: &View, local: &Local, id: NetworkId) -> Dataplane {
    let mut dataplane = Dataplane::default();
    let (Some(state), Some(own)) = (view.networks.get(&id), view.own()) else { return dataplane };
    if !local.is_built(view, id) {
        return dataplane;
    }
    let network = &state.network;
    match network.mode {
        Mode::L2 => switched::part(&mut dataplane, view, local, network, own),
        Mode::L3 => routed::part(&mut dataplane, view, local, network, own),
    }
    for endpoint in local.attaching.values().filter(|endpoint| endpoint.network == id) {
        publish::guard(&mut dataplane, local, network, endpoint);
        publish::elements(&mut dataplane, network, endpoint);
    }
    dataplane
}
