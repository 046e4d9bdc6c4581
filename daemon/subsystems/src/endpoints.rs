//! The part of one endpoint in the data plane.
//!
//! That is its interface on its own host and, on a switched network, its FDB entries and neighbours on all hosts. The
//! module owns no state. Begin to read at [`endpoint_part`], which an attach uses; [`crate::networks`] uses the
//! sub-modules for all endpoints of a network.

pub mod hairpin;
pub(crate) mod routed;
pub(crate) mod silent;
pub(crate) mod switched;

use ovl_cluster::view::View;
use ovl_dataplane::state::Dataplane;
use ovl_proto::object::{Mode, Network};
use ovl_proto::table::Endpoint;

use crate::local::Local;

/// Returns the data plane of one endpoint of this host, beside its network's devices. The attach itself creates the
/// veth pair.
pub fn endpoint_part(
    view: &View,
    local: &Local,
    network: &Network,
    endpoint: &Endpoint,
    mtu: u16,
) -> Dataplane {
    let mut dataplane = Dataplane::default();
    match network.mode {
        Mode::L2 => switched::endpoint_part(&mut dataplane, view, network, endpoint, mtu),
        Mode::L3 => routed::endpoint_part(&mut dataplane, view, local, network, endpoint, mtu),
    }
    dataplane
}
