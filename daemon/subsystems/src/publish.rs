//! Published ports: packets to a port of this host are translated to a port of an endpoint on it.
//!
//! The rules are in one nftables table with maps, so one more port is one more element. Packets are translated in
//! `prerouting` and then forwarded like any others, so the host's firewall for forwarded packets applies to them. The
//! client's address is kept, with two exceptions: where the answer would not come back through the host (hairpin
//! between endpoints behind one bridge, or to the endpoint itself), and where the address cannot be answered
//! (127.0.0.1). The kernel does not forward packets from `::1`, so the daemon relays these connections itself.
//!
//! The module owns no state: the elements belong to the network of the endpoint. Begin to read at `elements` and
//! `skeleton`.

use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

use ipnet::IpNet;
use ovl_proto::object::{Mode, Network};
use ovl_proto::publish::Published;
use ovl_proto::table::Endpoint;

use crate::local::Local;
use crate::marks::FROM_WORKLOAD;
use ovl_dataplane::device::Device;
use ovl_dataplane::nft::{Chain, Data, Field, Key, Set, Shape, Skeleton, Table, Type, Value};
use ovl_dataplane::state::Dataplane;

/// The maximum number of published ports of one endpoint: the daemon holds a socket for each.
pub const MOST_PORTS: u32 = 16_384;
/// The maximum number of published port ranges of one endpoint.
pub const MOST_RANGES: usize = 1_024;

static ANY4: Set = Set::new(
    Table::Publish,
    "any4",
    Shape {
        key: &[Type::Protocol, Type::Port],
        data: Data::Fields(&[Type::Ipv4, Type::Port]),
        ranges: false,
    },
);
static ANY6: Set = Set::new(
    Table::Publish,
    "any6",
    Shape {
        key: &[Type::Protocol, Type::Port],
        data: Data::Fields(&[Type::Ipv6, Type::Port]),
        ranges: false,
    },
);
static AT4: Set = Set::new(
    Table::Publish,
    "at4",
    Shape {
        key: &[Type::Ipv4, Type::Protocol, Type::Port],
        data: Data::Fields(&[Type::Ipv4, Type::Port]),
        ranges: false,
    },
);
static AT6: Set = Set::new(
    Table::Publish,
    "at6",
    Shape {
        key: &[Type::Ipv6, Type::Protocol, Type::Port],
        data: Data::Fields(&[Type::Ipv6, Type::Port]),
        ranges: false,
    },
);
/// Pairs of output interface and source prefix whose translated packets are masqueraded, because their answers would
/// not come back through the host: hairpin traffic.
///
/// The source is matched, not the input interface: that is unknown where the kernel bridges translated frames
/// (`net.bridge.bridge-nf-call-iptables`).
static TURNS4: Set = Set::new(
    Table::Publish,
    "turns4",
    Shape { key: &[Type::Leaves, Type::Ipv4], data: Data::None, ranges: true },
);
static TURNS6: Set = Set::new(
    Table::Publish,
    "turns6",
    Shape { key: &[Type::Leaves, Type::Ipv6], data: Data::None, ranges: true },
);
/// Bridge ports with hairpin mode.
static HAIRPINS: Set = Set::new(
    Table::PublishFrames,
    "hairpins",
    Shape { key: &[Type::Device, Type::Leaves], data: Data::None, ranges: false },
);

fn chain(name: &str, hook: Option<&str>, rules: &[&str]) -> Chain {
    Chain {
        name: name.to_owned(),
        hook: hook.map(str::to_owned),
        rules: rules.iter().map(|&rule| rule.to_owned()).collect(),
    }
}

/// Returns the table of published ports without elements. It exists while any port is published.
pub(crate) fn table() -> (Table, Arc<Skeleton>) {
    (Table::Publish, skeleton())
}

/// Returns the bridge table that endpoints with hairpin mode need, see [`needs_hairpin`].
pub(crate) fn frames_table() -> (Table, Arc<Skeleton>) {
    (Table::PublishFrames, frames())
}

/// Whether the bridge port of an endpoint needs hairpin mode: the endpoint has published ports or may be a backend of a
/// Service, so it can send to itself.
pub fn needs_hairpin(local: &Local, network: &Network, endpoint: &Endpoint) -> bool {
    network.mode == Mode::L2 && (!endpoint.publish.is_empty() || local.served)
}

/// Adds the element that keeps broadcast frames from the bridge port of an endpoint with hairpin mode.
pub(crate) fn guard(dataplane: &mut Dataplane, local: &Local, network: &Network, endpoint: &Endpoint) {
    if needs_hairpin(local, network, endpoint) {
        let (set, key) = hairpin_guard(Device::endpoint(endpoint.id));
        dataplane.elements.insert(set, key, Value::None);
    }
}

/// The bridge table that drops group frames which would leave by the bridge port by which they arrived.
///
/// With `net.bridge.bridge-nf-call-iptables`, as Docker sets it, the kernel translates packets of bridged frames and
/// bridges them again if the new destination is on the same bridge. A packet that an endpoint sends to its own
/// published port, or to a Service of which it is a backend, must then leave by the port by which it arrived. Hairpin
/// mode ([`ovl_dataplane::state::Link::Endpoint`]) allows that; this table keeps it from returning broadcast and
/// multicast.
fn frames() -> Arc<Skeleton> {
    static SKELETON: LazyLock<Arc<Skeleton>> = LazyLock::new(|| {
        let rule = format!(
            "ether daddr & 01:00:00:00:00:00 != 00:00:00:00:00:00 iifname . oifname @{} drop",
            HAIRPINS.name
        );
        let hook = "type filter hook forward priority filter; policy accept;";
        Arc::new(Skeleton {
            sets: vec![HAIRPINS.clone()],
            objects: Vec::new(),
            chains: vec![chain("forward", Some(hook), &[&rule])],
        })
    });
    Arc::clone(&SKELETON)
}

/// Returns the table of published ports without elements.
fn skeleton() -> Arc<Skeleton> {
    static SKELETON: LazyLock<Arc<Skeleton>> = LazyLock::new(|| {
        let ours = "{ \"ovb-*\", \"ove-*\" }";
        let hairpins = |family: &str, set: &Set| {
            format!(
                "meta mark & {FROM_WORKLOAD:#x} == {FROM_WORKLOAD:#x} oifname . {family} saddr @{} masquerade",
                set.name
            )
        };
        Arc::new(Skeleton {
            sets: [&ANY4, &ANY6, &AT4, &AT6, &TURNS4, &TURNS6].map(Set::clone).into(),
            objects: Vec::new(),
            chains: vec![
                // route_localnet makes 127.0.0.1 work for the host, but would also open it to workloads.
                chain(
                    "guard",
                    Some("type filter hook prerouting priority raw; policy accept;"),
                    &[&format!("iifname {ours} ip daddr 127.0.0.0/8 counter drop")],
                ),
                chain(
                    "translate",
                    None,
                    &[
                        "dnat ip to ip daddr . meta l4proto . th dport map @at4",
                        "dnat ip6 to ip6 daddr . meta l4proto . th dport map @at6",
                        "dnat ip to meta l4proto . th dport map @any4",
                        "dnat ip6 to meta l4proto . th dport map @any6",
                    ],
                ),
                chain(
                    "prerouting",
                    Some("type nat hook prerouting priority dstnat; policy accept;"),
                    &[
                        "fib daddr type != local return",
                        &format!("iifname {ours} meta mark set meta mark | {FROM_WORKLOAD:#x}"),
                        "jump translate",
                    ],
                ),
                chain(
                    "output",
                    Some("type nat hook output priority -100; policy accept;"),
                    &["ip6 daddr ::1 return", "fib daddr type local jump translate"],
                ),
                chain(
                    "postrouting",
                    Some("type nat hook postrouting priority srcnat; policy accept;"),
                    &[
                        &format!("ip saddr 127.0.0.0/8 oifname {ours} masquerade"),
                        &hairpins("ip", &TURNS4),
                        &hairpins("ip6", &TURNS6),
                    ],
                ),
            ],
        })
    });
    Arc::clone(&SKELETON)
}

/// Adds the elements for the published ports of an endpoint of this host.
pub(crate) fn elements(dataplane: &mut Dataplane, network: &Network, endpoint: &Endpoint) {
    if endpoint.publish.is_empty() {
        return;
    }
    for (set, key, value) in endpoint.publish.iter().flat_map(|published| translations(endpoint, *published))
    {
        dataplane.elements.insert(set, key, value);
    }
    match network.mode {
        Mode::L2 => bridge_part(dataplane, network, endpoint),
        Mode::L3 => {
            let device = Device::endpoint(endpoint.id);
            for (set, key) in endpoint_hairpins(endpoint) {
                dataplane.elements.insert(set, key, Value::None);
            }
            localnet(dataplane, device, endpoint);
        }
    }
}

/// Adds the elements for the bridge of a switched network that has an endpoint with published ports. All such endpoints
/// behind the bridge share them.
pub(crate) fn bridge_part(dataplane: &mut Dataplane, network: &Network, endpoint: &Endpoint) {
    for (set, key) in bridge_hairpins(network) {
        dataplane.elements.insert(set, key, Value::None);
    }
    localnet(dataplane, Device::bridge(network.id), endpoint);
}

/// Enables `route_localnet` on a device if the endpoint has an IPv4 address.
fn localnet(dataplane: &mut Dataplane, device: Device, endpoint: &Endpoint) {
    if endpoint.addresses.iter().any(|net| net.addr().is_ipv4()) {
        dataplane.localnets.insert(device);
    }
}

/// Returns the keys of [`elements`] for a network of any mode, without those that endpoints of one bridge share.
pub(crate) fn keys(endpoint: &Endpoint) -> impl Iterator<Item = (&'static Set, Key)> {
    let all = endpoint.publish.iter().flat_map(|published| translations(endpoint, *published));
    let of_device = (!endpoint.publish.is_empty()).then(|| endpoint_hairpins(endpoint));
    all.map(|(set, key, _)| (set, key)).chain(of_device.into_iter().flatten())
}

/// Returns the hairpin elements of a switched network: any endpoint behind its bridge may send to any other.
pub(crate) fn bridge_hairpins(network: &Network) -> impl Iterator<Item = (&'static Set, Key)> {
    let bridge = Device::bridge(network.id);
    network.subnets.iter().map(move |subnet| hairpin_source(bridge, subnet.prefix))
}

/// Returns the hairpin elements of an endpoint of a routed network: only the endpoint itself is behind its device.
fn endpoint_hairpins(endpoint: &Endpoint) -> impl Iterator<Item = (&'static Set, Key)> {
    let device = Device::endpoint(endpoint.id);
    endpoint.addresses.iter().map(move |net| hairpin_source(device, IpNet::from(net.addr())))
}

/// Returns the element for packets from a prefix with this output interface.
fn hairpin_source(output: Device, from: IpNet) -> (&'static Set, Key) {
    let set = if from.addr().is_ipv4() { &TURNS4 } else { &TURNS6 };
    (set, Key::of(&[Field::Device(output.as_str()), Field::Net(from)]))
}

/// Returns the element that keeps group frames from leaving by the bridge port by which they arrived.
pub(crate) fn hairpin_guard(device: Device) -> (&'static Set, Key) {
    (&HAIRPINS, Key::of(&[Field::Device(device.as_str()), Field::Device(device.as_str())]))
}

/// Returns the translation of each published port, once for each address family of the endpoint.
fn translations(
    endpoint: &Endpoint,
    published: Published,
) -> impl Iterator<Item = (&'static Set, Key, Value)> {
    let protocol = Field::Protocol(published.transport.number());
    let targets = endpoint.addresses.iter().map(IpNet::addr);
    let targets = targets.filter(move |target| published.is_for(target.is_ipv4()));
    targets.flat_map(move |target| {
        let at = published.address.filter(|address| !address.is_unspecified());
        published.pairs().map(move |(host, container)| {
            let port = Field::Port(host);
            let (set, key) = match (at, target) {
                (None, IpAddr::V4(_)) => (&ANY4, Key::of(&[protocol, port])),
                (None, IpAddr::V6(_)) => (&ANY6, Key::of(&[protocol, port])),
                (Some(at), IpAddr::V4(_)) => (&AT4, Key::of(&[Field::Ip(at), protocol, port])),
                (Some(at), IpAddr::V6(_)) => (&AT6, Key::of(&[Field::Ip(at), protocol, port])),
            };
            (set, key, Value::of(&[Field::Ip(target), Field::Port(container)]))
        })
    })
}
