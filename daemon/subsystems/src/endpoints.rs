//! What one endpoint needs: its device on its own host, and on a switched network the entries that lead to it on
//! all hosts.

pub(crate) mod routed;
pub(crate) mod silent;
pub(crate) mod switched;

use ovl_cluster::view::View;
use ovl_dataplane::state::Dataplane;
use ovl_proto::object::{Mode, Network};
use ovl_proto::table::Endpoint;

use crate::local::Local;
use crate::publish;

/// What one endpoint of this host needs beside its network's devices. Its link is made by an
/// attach.
pub fn endpoint_part(
    view: &View,
    local: &Local,
    network: &Network,
    endpoint: &Endpoint,
    mtu: u16,
) -> Dataplane {
    let mut dataplane = Dataplane::default();
    match network.mode {
        Mode::L2 => switched::endpoint_part(&mut dataplane, local, network, endpoint, mtu),
        Mode::L3 => routed::endpoint_part(&mut dataplane, view, local, network, endpoint, mtu),
    }
    publish::elements(&mut dataplane, network, endpoint);
    dataplane
}
