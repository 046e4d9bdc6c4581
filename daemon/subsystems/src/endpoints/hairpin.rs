//! Hairpin mode of bridge ports: an endpoint of a switched network may send to itself.
//!
//! With `net.bridge.bridge-nf-call-iptables`, as Docker sets it, the kernel translates packets of bridged frames and
//! bridges them again if the new destination is on the same bridge. A packet that an endpoint sends to its own
//! published port, or to a Service of which it is a backend, must then leave by the port by which it arrived. Hairpin
//! mode ([`ovl_dataplane::state::Link::Endpoint`]) allows that; a bridge table keeps it from returning broadcast and
//! multicast.
//!
//! The module owns no state. Begin to read at [`is_needed`].

use std::sync::{Arc, LazyLock};

use ovl_cluster::view::View;
use ovl_dataplane::device::Device;
use ovl_dataplane::nft::{Chain, Data, Field, Key, Set, Shape, Skeleton, Table, Type, Value};
use ovl_dataplane::state::Dataplane;
use ovl_proto::object::{Mode, Network};
use ovl_proto::table::Endpoint;

/// Bridge ports with hairpin mode.
pub(crate) static HAIRPINS: Set = Set::new(
    Table::PublishFrames,
    "hairpins",
    Shape { key: &[Type::Device, Type::Leaves], data: Data::None, ranges: false },
);

/// Whether the bridge port of an endpoint needs hairpin mode: the endpoint has published ports or may be a backend of a
/// Service, so it can send to itself.
pub fn is_needed(view: &View, network: &Network, endpoint: &Endpoint) -> bool {
    network.mode == Mode::L2 && (!endpoint.publish.is_empty() || view.has_services())
}

/// Adds the element that keeps broadcast frames from the bridge port of an endpoint with hairpin mode.
pub(crate) fn guard(dataplane: &mut Dataplane, view: &View, network: &Network, endpoint: &Endpoint) {
    if is_needed(view, network, endpoint) {
        let (set, key) = guard_of(Device::endpoint(endpoint.id));
        dataplane.elements.insert(set, key, Value::None);
    }
}

/// Returns the element that keeps group frames from leaving by the bridge port by which they arrived.
pub(crate) fn guard_of(device: Device) -> (&'static Set, Key) {
    (&HAIRPINS, Key::of(&[Field::Device(device.as_str()), Field::Device(device.as_str())]))
}

/// Returns the bridge table that drops group frames which would leave by the bridge port by which they arrived.
pub(crate) fn table() -> (Table, Arc<Skeleton>) {
    static SKELETON: LazyLock<Arc<Skeleton>> = LazyLock::new(|| {
        let rule = format!(
            "ether daddr & 01:00:00:00:00:00 != 00:00:00:00:00:00 iifname . oifname @{} drop",
            HAIRPINS.name
        );
        let hook = "type filter hook forward priority filter; policy accept;".to_owned();
        Arc::new(Skeleton {
            sets: vec![HAIRPINS.clone()],
            objects: Vec::new(),
            chains: vec![Chain { name: "forward".to_owned(), hook: Some(hook), rules: vec![rule] }],
        })
    });
    (HAIRPINS.table, Arc::clone(&SKELETON))
}
