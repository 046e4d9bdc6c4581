//! Computes the desired data plane of a network from the view.
//!
//! Each network is computed alone, so that the cost of a change does not depend on other networks. The module owns no
//! state. Begin to read at [`network_part`].

use ovl_cluster::view::View;
use ovl_dataplane::state::Dataplane;
use ovl_proto::id::NetworkId;
use ovl_proto::object::Mode;

use super::mtu::{endpoint_mtu, network_mtu};
use super::{routed, switched};
use crate::endpoints::hairpin;
use crate::endpoints::silent::silent;
use crate::local::Local;

/// Returns the part of one network on this host. Empty if the host does not need its devices. Of a network that the host
/// refuses to build, only the interfaces of its endpoints remain, down and connected to nothing.
pub fn network_part(view: &View, local: &Local, id: NetworkId) -> Dataplane {
    let mut dataplane = Dataplane::default();
    let (Some(state), Some(own)) = (view.networks.get(&id), view.own()) else { return dataplane };
    let network = &state.network;
    if local.refused.contains(id) {
        let mtu = match network.mode {
            Mode::L2 => network_mtu(view, network),
            Mode::L3 => endpoint_mtu(network, own),
        };
        own.table.endpoints_on(id).for_each(|endpoint| silent(&mut dataplane, endpoint, mtu));
    }
    if !local.is_built(view, id) {
        return dataplane;
    }
    match network.mode {
        Mode::L2 => switched::part(&mut dataplane, view, local, network, own),
        Mode::L3 => routed::part(&mut dataplane, view, local, network, own),
    }
    for endpoint in local.attaches.endpoints().filter(|endpoint| endpoint.network == id) {
        hairpin::guard(&mut dataplane, view, network, endpoint);
    }
    dataplane
}
