//! The data plane of an isolated endpoint: an interface that is down.
//!
//! The module owns no state and has one function.

use ovl_dataplane::device::Device;
use ovl_dataplane::state::{Dataplane, Link};
use ovl_proto::table::Endpoint;

/// Adds the host interface of an isolated endpoint, without a bridge and down.
pub(crate) fn silent(dataplane: &mut Dataplane, endpoint: &Endpoint, mtu: u16) {
    let link = Link::Endpoint { mtu, master: None, up: false, tuned: false, hairpin: false };
    dataplane.links.insert(Device::endpoint(endpoint.id), link);
}
