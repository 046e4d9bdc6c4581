//! Published ports: what is sent to a port of this host goes to an endpoint on it. All of it is in one nftables
//! table, in maps: a port more is an element more.
//!
//! Packets are translated where they arrive, and then forwarded like any others, so the rules of the host's firewall
//! for forwarded packets decide about them. The client's address stays, but where an answer would not come back through
//! the host (from an endpoint to its neighbour behind one bridge, or to itself) and where nobody could answer it
//! (127.0.0.1). The kernel forwards nothing from `::1`: there the daemon passes on by itself.

use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

use ipnet::IpNet;
use ovl_proto::object::{Mode, Network};
use ovl_proto::publish::Published;
use ovl_proto::table::Endpoint;

use crate::device::Device;
use crate::kernel::Kernel;
use crate::nft::{Chain, Data, Field, Key, Set, Shape, Skeleton, Table, Type, Value};

/// Ports of one endpoint, at most: the daemon holds a socket for each.
pub const MOST_PORTS: u32 = 16_384;
/// Ranges of them, at most.
pub const MOST_RANGES: usize = 1_024;

/// Set from where a packet of a workload is translated to where it leaves: the answer may have to come back the same
/// way. Bits of others are let alone.
const FROM_US: &str = "0x1000";

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
/// Devices between whose two sides a translated packet's answer would not come back by itself.
static TURNS: Set = Set::new(
    Table::Publish,
    "turns",
    Shape { key: &[Type::Device, Type::Leaves], data: Data::None, ranges: false },
);

/// The table without elements. It is there while anything is published.
pub fn skeleton() -> Arc<Skeleton> {
    static SKELETON: LazyLock<Arc<Skeleton>> = LazyLock::new(|| {
        let chain = |name: &str, hook: Option<&str>, rules: &[&str]| Chain {
            name: name.to_owned(),
            hook: hook.map(str::to_owned),
            rules: rules.iter().map(|&rule| rule.to_owned()).collect(),
        };
        let ours = "{ \"ovb-*\", \"ove-*\" }";
        Arc::new(Skeleton {
            sets: [&ANY4, &ANY6, &AT4, &AT6, &TURNS].map(Set::clone).into(),
            objects: Vec::new(),
            chains: vec![
                // What makes 127.0.0.1 work for the host would open it to workloads.
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
                        &format!("iifname {ours} meta mark set meta mark | {FROM_US}"),
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
                        &format!("meta mark & {FROM_US} == {FROM_US} iifname . oifname @turns masquerade"),
                    ],
                ),
            ],
        })
    });
    Arc::clone(&SKELETON)
}

/// What an endpoint of this host has published.
pub(crate) fn elements(kernel: &mut Kernel, network: &Network, endpoint: &Endpoint) {
    if endpoint.publish.is_empty() {
        return;
    }
    for (set, key, value) in endpoint.publish.iter().flat_map(|published| translations(endpoint, *published))
    {
        kernel.elements.insert(set, key, value);
    }
    device_part(kernel, network, endpoint);
}

/// What its device needs for that: the same for all endpoints behind one bridge.
pub(crate) fn device_part(kernel: &mut Kernel, network: &Network, endpoint: &Endpoint) {
    let device = device(network, endpoint);
    kernel.elements.insert(&TURNS, turn(device), Value::None);
    if endpoint.addresses.iter().any(|net| net.addr().is_ipv4()) {
        kernel.localnets.insert(device);
    }
}

/// The keys of [`elements`], those aside that an endpoint shares with its neighbours.
pub(crate) fn keys(endpoint: &Endpoint) -> impl Iterator<Item = (&'static Set, Key)> {
    let all = endpoint.publish.iter().flat_map(|published| translations(endpoint, *published));
    all.map(|(set, key, _)| (set, key))
}

/// The set of devices, and a device's element in it.
pub(crate) fn turns(device: Device) -> (&'static Set, Key) {
    (&TURNS, turn(device))
}

/// Where packets for an endpoint leave the host.
fn device(network: &Network, endpoint: &Endpoint) -> Device {
    match network.mode {
        Mode::L2 => Device::bridge(network.id),
        Mode::L3 => Device::endpoint(endpoint.id),
    }
}

fn turn(device: Device) -> Key {
    Key::of(&[Field::Device(device.as_str()), Field::Device(device.as_str())])
}

/// Each port that is published, once for each family for which the endpoint has an address.
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
