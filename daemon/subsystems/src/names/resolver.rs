//! The packet filter rules by which endpoints reach the resolver of their host, without a socket in their namespaces.
//!
//! In an endpoint's namespace, 127.0.0.11 is not a local address: a route leads it to the host, and queries carry the
//! endpoint's own source address, which identifies the client. The host's kernel rewrites the destination of each query
//! to ovld's address and port, and the source of each answer to 127.0.0.11 port 53, without connection tracking. An
//! endpoint without an IPv4 address has no route to 127.0.0.11 and queries [`ADDRESS_V6`].
//!
//! A query from 127.0.0.1 has been given the endpoint's source address and the port [`PORT_FROM_LOCALHOST`] by the source
//! checks. Its answer goes to 127.0.0.1: on a routed network from here, by a neighbour of that address on the endpoint's
//! interface; on a switched one the answer has to find its bridge port first, and is rewritten there.
//!
//! The module owns no state. Begin to read at `tables`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use ovl_proto::object::Network;

use ovl_dataplane::device::Device;
use ovl_dataplane::nft::{Chain, Skeleton, Table};
pub use ovl_dataplane::resolver::{ADDRESS_V4, ADDRESS_V6, LOOPBACK, PORT_FROM_LOCALHOST};

/// The address on the host to which queries to the cluster DNS are rewritten, as [`ADDRESS_V4`] is for 127.0.0.11.
pub const CLUSTER_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 79, 10);
/// The address on the host to which queries to the cluster DNS are rewritten, over IPv6.
pub const CLUSTER_V6: Ipv6Addr = Ipv6Addr::new(0xfd6f, 0x766c, 0, 0, 0, 0, 0, 0xa);
/// The port on which ovld listens for rewritten queries. Port 53 may be in use by another server.
pub const PORT: u16 = 7953;
/// The port for queries that were sent to [`ADDRESS_V4`] itself, for example by a container whose 127.0.0.11 is served
/// by a Docker Engine.
pub const PORT_DIRECT: u16 = 7954;

/// The loopback port for queries of programs of the host itself to the cluster DNS.
pub const PORT_HOST: u16 = 7955;
/// The loopback port for queries of programs of the host itself to [`ADDRESS_V4`] and [`ADDRESS_V6`].
pub const PORT_HOST_DIRECT: u16 = 7956;

/// Addresses of this host that its endpoints may send queries to, whatever else of the host is closed to them.
pub const HOST_ADDRESSES: [IpAddr; 4] =
    [IpAddr::V4(ADDRESS_V4), IpAddr::V4(CLUSTER_V4), IpAddr::V6(ADDRESS_V6), IpAddr::V6(CLUSTER_V6)];

/// Returns the resolver's addresses on a network's bridge, of the address families that the network has.
pub(crate) fn on_bridge(network: &Network, cluster: &[IpAddr]) -> BTreeSet<(Device, IpNet)> {
    let bridge = Device::bridge(network.id);
    let has = |v4| network.subnets.iter().any(|subnet| subnet.prefix.addr().is_ipv4() == v4);
    let own = [IpAddr::from(ADDRESS_V4), IpAddr::from(ADDRESS_V6)];
    let cluster = cluster.iter().map(|address| stand_in(*address));
    let all = own.into_iter().chain(cluster).filter(|address| has(address.is_ipv4()));
    all.map(|address| (bridge, IpNet::from(address))).collect()
}

/// Returns the address on the host for an address of the cluster DNS.
fn stand_in(address: IpAddr) -> IpAddr {
    if address.is_ipv4() { CLUSTER_V4.into() } else { CLUSTER_V6.into() }
}

/// Returns the tables of the resolver: one that rewrites queries and answers, and if endpoints use the resolver, those that
/// deliver their queries past the firewalls of the host.
pub(crate) fn tables(cluster: &[IpAddr], for_endpoints: bool) -> BTreeMap<Table, Arc<Skeleton>> {
    let delivering = past_firewalls().filter(|_| for_endpoints);
    delivering.chain([(Table::Resolver, Arc::new(rewriting(cluster)))]).collect()
}

/// Returns the table that rewrites queries and answers.
///
/// Packets from the underlay to the resolver are dropped, whatever address they use. A packet that was rewritten
/// matches no rule again.
fn rewriting(cluster: &[IpAddr]) -> Skeleton {
    let (v4, v6, lo) = (ADDRESS_V4, ADDRESS_V6, LOOPBACK);
    let (local, localhost) = (PORT_FROM_LOCALHOST, Ipv4Addr::LOCALHOST);
    let drop_others = "iifname != \"ovb-*\" iifname != \"ove-*\" iifname != \"lo\" counter drop";
    let mut queries =
        vec![format!("ip daddr {{ {lo}, {v4} }} {drop_others}"), format!("ip6 daddr {v6} {drop_others}")];
    let mut answers = Vec::new();
    for proto in ["udp", "tcp"] {
        queries.extend([
            format!(
                "ip daddr {lo} iifname != \"lo\" {proto} dport 53 ip daddr set {v4} {proto} dport set {PORT} notrack"
            ),
            format!(
                "ip daddr {lo} iifname {{ \"ovb-*\", \"ove-*\" }} {proto} dport {local} ip daddr set {v4} notrack"
            ),
            format!("ip daddr {v4} {proto} dport 53 {proto} dport set {PORT_DIRECT} notrack"),
            format!("ip6 daddr {v6} {proto} dport 53 {proto} dport set {PORT} notrack"),
        ]);
        answers.extend([
            format!(
                "ip saddr {v4} {proto} sport {PORT} oifname != \"lo\" ip saddr set {lo} {proto} sport set 53 notrack"
            ),
            format!("ip saddr {v4} {proto} sport {local} oifname \"ovb-*\" ip saddr set {lo} notrack"),
            format!(
                "ip saddr {v4} {proto} sport {local} oifname \"ove-*\" ip saddr set {lo} ip daddr set {localhost} \
                 {proto} sport set 53 notrack"
            ),
            format!("ip saddr {v4} {proto} sport {PORT_DIRECT} oifname != \"lo\" {proto} sport set 53 notrack"),
            format!("ip6 saddr {v6} {proto} sport {PORT} oifname != \"lo\" {proto} sport set 53 notrack"),
        ]);
    }
    for (family, address, at) in cluster.iter().map(with_stand_in) {
        queries.push(format!("{family} daddr {{ {address}, {at} }} {drop_others}"));
        for proto in ["udp", "tcp"] {
            queries.push(format!(
                "{family} daddr {address} iifname != \"lo\" {proto} dport 53 {family} daddr set {at} {proto} dport set {PORT} notrack"
            ));
            answers.push(format!(
                "{family} saddr {at} {proto} sport {PORT} oifname != \"lo\" {family} saddr set {address} {proto} sport set 53 notrack"
            ));
        }
    }
    let at = cluster.iter().map(|address| stand_in(*address));
    let served = [ADDRESS_V4.into(), ADDRESS_V6.into()].into_iter().chain(cluster.iter().copied());
    let asked = [LOOPBACK.into()].into_iter().chain(served.clone()).chain(at.clone());
    let answering = [ADDRESS_V4.into(), ADDRESS_V6.into()];
    let (hook, output) = ("type filter hook", "output priority raw - 5; policy accept;");
    // Before the Services, which refuse what they do not have.
    let translated = "type nat hook output priority -110; policy accept;";
    let chains = [
        led_to(
            "queries",
            &format!("{hook} prerouting priority raw - 5; policy accept;"),
            "daddr",
            asked.collect(),
            queries,
        ),
        led_to(
            "answers",
            &format!("{hook} {output}"),
            "saddr",
            answering.into_iter().chain(at).collect(),
            answers,
        ),
        led_to("host", translated, "daddr", served.collect(), of_host(cluster)),
    ];
    Skeleton { chains: chains.into_iter().flatten().collect(), ..Skeleton::default() }
}

/// Returns a chain with these rules, and one at the hook that leads the packets there which have one of the addresses in
/// this field. Every packet of the host passes the hook, those of the overlay several times, so it is one look-up there.
fn led_to(
    name: &str,
    hook: &str,
    field: &str,
    addresses: BTreeSet<IpAddr>,
    rules: Vec<String>,
) -> [Chain; 2] {
    let (v4, v6): (Vec<IpAddr>, Vec<IpAddr>) = addresses.into_iter().partition(IpAddr::is_ipv4);
    let lead = |family: &str, addresses: Vec<IpAddr>| {
        let set: Vec<String> = addresses.iter().map(IpAddr::to_string).collect();
        format!("{family} {field} {{ {} }} goto {name}", set.join(", "))
    };
    [
        Chain { name: name.to_owned(), hook: None, rules },
        Chain {
            name: format!("{name}-hook"),
            hook: Some(hook.to_owned()),
            rules: vec![lead("ip", v4), lead("ip6", v6)],
        },
    ]
}

/// Returns the rules that lead the queries of programs of the host itself to loopback, where only the host can send, so the
/// client is not an endpoint. Pods with the host's network are such programs.
///
/// Connection tracking translates them: the kubelet has a rule that drops what goes to 127.0.0.0/8 from other addresses, unless
/// that was translated.
fn of_host(cluster: &[IpAddr]) -> Vec<String> {
    let cluster = cluster.iter().map(|address| (*address, PORT_HOST));
    let own = [IpAddr::from(ADDRESS_V4), IpAddr::from(ADDRESS_V6)].map(|address| (address, PORT_HOST_DIRECT));
    let rule = |(address, port): (IpAddr, u16)| {
        let (family, to) = match address {
            IpAddr::V4(_) => ("ip", SocketAddr::from((Ipv4Addr::LOCALHOST, port))),
            IpAddr::V6(_) => ("ip6", SocketAddr::from((Ipv6Addr::LOCALHOST, port))),
        };
        format!("{family} daddr {address} meta l4proto {{ tcp, udp }} th dport 53 dnat {family} to {to}")
    };
    cluster.chain(own).map(rule).collect()
}

/// Returns the tables that deliver queries to ovld by the loopback device.
///
/// A firewall of the host that drops unknown packets accepts that device, but would drop packets from a bridge: the
/// drop of a later chain is final, so ovld could not accept them in a chain of its own. The resolver itself decides
/// which clients it answers.
fn past_firewalls() -> impl Iterator<Item = (Table, Arc<Skeleton>)> {
    // The last address selects the route over the loopback device. The packet's destination does not change.
    let all: [(Table, [IpAddr; 3]); 2] = [
        (Table::Resolver4, [ADDRESS_V4.into(), CLUSTER_V4.into(), Ipv4Addr::LOCALHOST.into()]),
        (Table::Resolver6, [ADDRESS_V6.into(), CLUSTER_V6.into(), Ipv6Addr::LOCALHOST.into()]),
    ];
    all.into_iter().map(|(table, [own, cluster, loopback])| {
        let family = table.family();
        let rule = format!(
            "{family} daddr {{ {own}, {cluster} }} iifname {{ \"ovb-*\", \"ove-*\" }} meta l4proto {{ tcp, udp }} \
             th dport {{ {PORT}, {PORT_DIRECT}, {PORT_FROM_LOCALHOST} }} dup to {loopback} device \"lo\" drop"
        );
        // After the chain that rewrites addresses and ports.
        let hook = "type filter hook prerouting priority raw - 4; policy accept;".to_owned();
        let chain = Chain { name: "prerouting".to_owned(), hook: Some(hook), rules: vec![rule] };
        (table, Arc::new(Skeleton { chains: vec![chain], ..Skeleton::default() }))
    })
}

/// Returns the family's name in nft, the address, and the address on the host that it is rewritten to.
fn with_stand_in(address: &IpAddr) -> (&'static str, IpAddr, IpAddr) {
    (if address.is_ipv4() { "ip" } else { "ip6" }, *address, stand_in(*address))
}

/// Returns the content of an endpoint's resolv.conf(5). Names are queried as they are (`ndots:0`).
pub fn resolv_conf(addresses: &[IpNet]) -> String {
    let server = match addresses.iter().any(|net| net.addr().is_ipv4()) {
        true => IpAddr::from(LOOPBACK),
        false => IpAddr::from(ADDRESS_V6),
    };
    format!("nameserver {server}\noptions ndots:0\n")
}
