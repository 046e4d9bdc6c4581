//! The table of published ports, and the elements of one endpoint: packets to a port of this host are translated to a
//! port of an endpoint on it.
//!
//! The rules are in one nftables table with maps, so one more port is one more element. Packets are translated in
//! `prerouting` and then forwarded like any others, so the host's firewall for forwarded packets applies to them. The
//! client's address is kept, with two exceptions: where the answer would not come back through the host (hairpin
//! between endpoints behind one bridge, or to the endpoint itself), and where the address cannot be answered
//! (127.0.0.1). The kernel does not forward packets from `::1`, so the daemon relays these connections itself.
//!
//! The module owns no state. Begin to read at `part` and `skeleton`.

use std::net::IpAddr;
use std::sync::{Arc, LazyLock};

use ipnet::IpNet;
use ovl_proto::object::{Mode, Network};
use ovl_proto::publish::Published;
use ovl_proto::table::Endpoint;

use crate::marks::FROM_WORKLOAD;
use ovl_dataplane::device::Device;
use ovl_dataplane::ledger::Entries;
use ovl_dataplane::nft::{Chain, Data, Elements, Field, Key, Set, Shape, Skeleton, Table, Type, Value};
use ovl_dataplane::op::ANSWERS_LOCALHOST;

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
/// Link-local packets are not translated: the kernel forwards none from such an address (RFC 4291, section 2.5.6), so a
/// translated connection would hang. Relaying them, as those from `::1`, would pass neighbours off as the host, which no
/// policy keeps out. So ovld, which has bound the port, refuses them.
const LINK_LOCAL: &str = "ip6 daddr fe80::/10 return";

fn chain(name: &str, hook: Option<&str>, rules: &[&str]) -> Chain {
    Chain {
        name: name.to_owned(),
        hook: hook.map(str::to_owned),
        rules: rules.iter().map(|&rule| rule.to_owned()).collect(),
    }
}

/// Returns the endpoint's address and port to which packets to a port of this host are translated. `None` if the port is
/// not published.
pub(super) fn published(
    elements: &Elements,
    (address, protocol, port): (IpAddr, u8, u16),
) -> Option<(IpAddr, u16)> {
    let [at, any] = if address.is_ipv4() { [&AT4, &ANY4] } else { [&AT6, &ANY6] };
    let (protocol, port) = (Field::Protocol(protocol), Field::Port(port));
    let found = |set, key: &[Field<'_>]| elements.of(set)?.get(&Key::of(key))?.as_target();
    found(at, &[Field::Ip(address), protocol, port]).or_else(|| found(any, &[protocol, port]))
}

/// Returns the table of published ports without elements. It exists while any port is published.
pub(super) fn table() -> (Table, Arc<Skeleton>) {
    (Table::Publish, skeleton())
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
                        LINK_LOCAL,
                        &format!("iifname {ours} meta mark set meta mark | {FROM_WORKLOAD:#x}"),
                        "jump translate",
                    ],
                ),
                // Where bridges call the packet filter, an answer to a program of the host is to 127.0.0.1 again before
                // it enters by the bridge, whose filter lets such packets pass by this mark alone.
                chain(
                    "answers",
                    Some("type filter hook prerouting priority dstnat + 1; policy accept;"),
                    &[&format!(
                        "iifname {ours} ip daddr 127.0.0.0/8 ct status dnat ct direction reply \
                         meta mark set meta mark | {ANSWERS_LOCALHOST:#x}"
                    )],
                ),
                chain(
                    "output",
                    Some("type nat hook output priority -100; policy accept;"),
                    &["ip6 daddr ::1 return", LINK_LOCAL, "fib daddr type local jump translate"],
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

/// Returns the elements for the published ports of an endpoint of this host, and the device that packets from 127.0.0.1
/// may leave by (`route_localnet`), if there is one. Endpoints behind one bridge share some of them.
pub(super) fn part(network: &Network, endpoint: &Endpoint) -> (Entries, Option<Device>) {
    if endpoint.publish.is_empty() {
        return Default::default();
    }
    let translated =
        endpoint.publish.iter().flat_map(|published| translations(endpoint, *published)).map(owned);
    let mut entries: Entries = translated.collect();
    let turning = |(set, key): (&'static Set, Key)| owned((set, key, Value::None));
    let device = match network.mode {
        Mode::L2 => {
            entries.extend(bridge_hairpins(network).map(turning));
            Device::bridge(network.id)
        }
        Mode::L3 => {
            entries.extend(endpoint_hairpins(endpoint).map(turning));
            Device::endpoint(endpoint.id)
        }
    };
    let has_v4 = endpoint.addresses.iter().any(|net| net.addr().is_ipv4());
    (entries, has_v4.then_some(device))
}

fn owned((set, key, value): (&'static Set, Key, Value)) -> ((Set, Key), Value) {
    ((set.clone(), key), value)
}

/// Returns the hairpin elements of a switched network: any endpoint behind its bridge may send to any other.
fn bridge_hairpins(network: &Network) -> impl Iterator<Item = (&'static Set, Key)> {
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
