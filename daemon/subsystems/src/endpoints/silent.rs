//! An endpoint that must not talk.

use ovl_dataplane::device::Device;
use ovl_dataplane::state::{Dataplane, Link};
use ovl_proto::table::Endpoint;

/// The host's end of an endpoint that must not talk.
pub(crate) fn silent(dataplane: &mut Dataplane, endpoint: &Endpoint, mtu: u16) {
    let link = Link::Endpoint { mtu, master: None, up: false, tuned: false, hairpin: false };
    dataplane.links.insert(Device::endpoint(endpoint.id), link);
}
