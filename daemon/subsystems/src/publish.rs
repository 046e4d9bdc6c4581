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

use crate::local::Local;
use ovl_dataplane::device::Device;
use ovl_dataplane::nft::{Chain, Data, Field, Key, Set, Shape, Skeleton, Table, Type, Value};
use ovl_dataplane::state::Dataplane;

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
/// Devices, and those behind them whose translated packets' answers would not come back by themselves if
/// they leave there. By the source and not by the device that a packet came from: that is not known where the
/// kernel bridges what was translated (`net.bridge.bridge-nf-call-iptables`).
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
/// Ports of bridges by which frames may leave that came in by them.
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

/// The table of ports without elements. It is there while anything is published.
pub(crate) fn table() -> (Table, Arc<Skeleton>) {
    (Table::Publish, skeleton())
}

/// The table that goes with [`needs_hairpin`].
pub(crate) fn frames_table() -> (Table, Arc<Skeleton>) {
    (Table::PublishFrames, frames())
}

/// Whether an endpoint of a switched network may have to get back what it sent: it has published ports, or may be behind
/// a Service.
pub fn needs_hairpin(local: &Local, network: &Network, endpoint: &Endpoint) -> bool {
    network.mode == Mode::L2 && (!endpoint.publish.is_empty() || local.served)
}

/// The element that goes with [`needs_hairpin`].
pub(crate) fn guard(dataplane: &mut Dataplane, local: &Local, network: &Network, endpoint: &Endpoint) {
    if needs_hairpin(local, network, endpoint) {
        let (set, key) = hairpin(Device::endpoint(endpoint.id));
        dataplane.elements.insert(set, key, Value::None);
    }
}

/// With `net.bridge.bridge-nf-call-iptables`, as Docker sets it, the kernel translates packets while they are
/// still frames, and bridges those that are for the same bridge then. What an endpoint sends to a port that it has
/// published itself, or to a Service that it is behind, has to leave by the port of the bridge where it came in. The
/// bridge lets it do that ([`ovl_dataplane::state::Link::Endpoint`]'s `hairpin`); what is for a group does not come back that
/// way.
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

fn skeleton() -> Arc<Skeleton> {
    static SKELETON: LazyLock<Arc<Skeleton>> = LazyLock::new(|| {
        let ours = "{ \"ovb-*\", \"ove-*\" }";
        let turns = |family: &str, set: &Set| {
            format!("meta mark & {FROM_US} == {FROM_US} oifname . {family} saddr @{} masquerade", set.name)
        };
        Arc::new(Skeleton {
            sets: [&ANY4, &ANY6, &AT4, &AT6, &TURNS4, &TURNS6].map(Set::clone).into(),
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
                        &turns("ip", &TURNS4),
                        &turns("ip6", &TURNS6),
                    ],
                ),
            ],
        })
    });
    Arc::clone(&SKELETON)
}

/// What an endpoint of this host has published.
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
            for (set, key) in own_turns(endpoint) {
                dataplane.elements.insert(set, key, Value::None);
            }
            localnet(dataplane, device, endpoint);
        }
    }
}

/// What the bridge of a switched network needs for an endpoint with published ports: the same for all behind it.
pub(crate) fn bridge_part(dataplane: &mut Dataplane, network: &Network, endpoint: &Endpoint) {
    for (set, key) in bridge_turns(network) {
        dataplane.elements.insert(set, key, Value::None);
    }
    localnet(dataplane, Device::bridge(network.id), endpoint);
}

fn localnet(dataplane: &mut Dataplane, device: Device, endpoint: &Endpoint) {
    if endpoint.addresses.iter().any(|net| net.addr().is_ipv4()) {
        dataplane.localnets.insert(device);
    }
}

/// The keys of [`elements`] on whatever kind of network, those aside that an endpoint shares with its neighbours.
pub(crate) fn keys(endpoint: &Endpoint) -> impl Iterator<Item = (&'static Set, Key)> {
    let all = endpoint.publish.iter().flat_map(|published| translations(endpoint, *published));
    let of_device = (!endpoint.publish.is_empty()).then(|| own_turns(endpoint));
    all.map(|(set, key, _)| (set, key)).chain(of_device.into_iter().flatten())
}

/// On a switched network whoever is behind the bridge turns round there.
pub(crate) fn bridge_turns(network: &Network) -> impl Iterator<Item = (&'static Set, Key)> {
    let bridge = Device::bridge(network.id);
    network.subnets.iter().map(move |subnet| turn(bridge, subnet.prefix))
}

/// On a routed network the endpoint alone does.
fn own_turns(endpoint: &Endpoint) -> impl Iterator<Item = (&'static Set, Key)> {
    let device = Device::endpoint(endpoint.id);
    endpoint.addresses.iter().map(move |net| turn(device, IpNet::from(net.addr())))
}

fn turn(leaves: Device, from: IpNet) -> (&'static Set, Key) {
    let set = if from.addr().is_ipv4() { &TURNS4 } else { &TURNS6 };
    (set, Key::of(&[Field::Device(leaves.as_str()), Field::Net(from)]))
}

/// What keeps frames for groups from leaving by the port by which they came.
pub(crate) fn hairpin(device: Device) -> (&'static Set, Key) {
    (&HAIRPINS, Key::of(&[Field::Device(device.as_str()), Field::Device(device.as_str())]))
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
