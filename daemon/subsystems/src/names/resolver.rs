//! How endpoints reach the resolver of their host, without a socket in their namespaces.
//!
//! In the namespace 127.0.0.11 is no local address: a route leads it to the host, whatever the network is like,
//! and packets for it come from the endpoint's own address, by which the asker is known. The host's kernel puts
//! ovld's address and port into each packet, and 127.0.0.11 with port 53 back into each answer; no connection
//! is tracked for that. An endpoint without an IPv4 address has no way to 127.0.0.11, and asks at
//! [`ADDRESS_V6`].

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use ovl_proto::id::NetworkId;
use ovl_proto::object::Network;

use ovl_dataplane::device::Device;
use ovl_dataplane::nft::{BASE_TABLE, Chain, Skeleton, Table};
pub use ovl_dataplane::resolver::{ADDRESS_V4, ADDRESS_V6, LOOPBACK};
use ovl_dataplane::state::Dataplane;

/// What stands for the addresses of the cluster's DNS on the host, as [`ADDRESS_V4`] does for 127.0.0.11.
pub const CLUSTER_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 79, 10);
/// The same for an IPv6 address.
pub const CLUSTER_V6: Ipv6Addr = Ipv6Addr::new(0xfd6f, 0x766c, 0, 0, 0, 0, 0, 0xa);
/// Where ovld listens there: port 53 may be anybody's.
pub const PORT: u16 = 7953;
/// The same for who asks at [`ADDRESS_V4`] itself, such as a container whose 127.0.0.11 is a Docker Engine's.
pub const PORT_DIRECT: u16 = 7954;

/// The addresses of ovld's resolver on a network's bridge, as far as its endpoints have such addresses.
pub(crate) fn on_bridge(dataplane: &mut Dataplane, network: &Network, cluster: &[IpAddr]) {
    let bridge = Device::bridge(network.id);
    let has = |v4| network.subnets.iter().any(|subnet| subnet.prefix.addr().is_ipv4() == v4);
    let own = [IpAddr::from(ADDRESS_V4), IpAddr::from(ADDRESS_V6)];
    let cluster = cluster.iter().map(|address| stand_in(*address));
    for address in own.into_iter().chain(cluster).filter(|address| has(address.is_ipv4())) {
        dataplane.addresses.insert((bridge, IpNet::from(address)));
    }
}

/// What stands for an address of the cluster's DNS.
fn stand_in(address: IpAddr) -> IpAddr {
    if address.is_ipv4() { CLUSTER_V4.into() } else { CLUSTER_V6.into() }
}

/// The chains that lead queries to ovld and its answers back, if one of these networks has endpoints with a
/// resolver. Nobody else reaches it: not from the underlay, whatever address is used.
pub(crate) fn chains(
    networks: &[&Network],
    resolved: &BTreeSet<NetworkId>,
    cluster: &[IpAddr],
) -> Option<String> {
    if !networks.iter().any(|network| resolved.contains(&network.id)) {
        return None;
    }
    let (v4, v6, lo) = (ADDRESS_V4, ADDRESS_V6, LOOPBACK);
    let strange = "iifname != \"ovb-*\" iifname != \"ove-*\" iifname != \"lo\" counter drop";
    let mut text = format!("table inet {BASE_TABLE} {{\n\tchain resolver-in {{\n");
    let _ = writeln!(
        text,
        "\t\ttype filter hook prerouting priority raw - 5; policy accept;\n\
         \t\tip daddr {{ {lo}, {v4} }} {strange}\n\
         \t\tip6 daddr {v6} {strange}"
    );
    for proto in ["udp", "tcp"] {
        let _ = writeln!(
            text,
            "\t\tip daddr {lo} iifname != \"lo\" {proto} dport 53 ip daddr set {v4} {proto} dport set {PORT} notrack\n\
             \t\tip daddr {v4} {proto} dport 53 {proto} dport set {PORT_DIRECT} notrack\n\
             \t\tip6 daddr {v6} {proto} dport 53 {proto} dport set {PORT} notrack"
        );
    }
    for (family, address, at) in cluster.iter().map(with_stand_in) {
        let _ = writeln!(text, "\t\t{family} daddr {{ {address}, {at} }} {strange}");
        for proto in ["udp", "tcp"] {
            let _ = writeln!(
                text,
                "\t\t{family} daddr {address} iifname != \"lo\" {proto} dport 53 {family} daddr set {at} {proto} dport set {PORT} notrack"
            );
        }
    }
    let _ = writeln!(
        text,
        "\t}}\n\tchain resolver-out {{\n\t\ttype filter hook output priority raw - 5; policy accept;"
    );
    for proto in ["udp", "tcp"] {
        let _ = writeln!(
            text,
            "\t\tip saddr {v4} {proto} sport {PORT} oifname != \"lo\" ip saddr set {lo} {proto} sport set 53 notrack\n\
             \t\tip saddr {v4} {proto} sport {PORT_DIRECT} oifname != \"lo\" {proto} sport set 53 notrack\n\
             \t\tip6 saddr {v6} {proto} sport {PORT} oifname != \"lo\" {proto} sport set 53 notrack"
        );
    }
    for (family, address, at) in cluster.iter().map(with_stand_in) {
        for proto in ["udp", "tcp"] {
            let _ = writeln!(
                text,
                "\t\t{family} saddr {at} {proto} sport {PORT} oifname != \"lo\" {family} saddr set {address} {proto} sport set 53 notrack"
            );
        }
    }
    let _ = writeln!(text, "\t}}\n}}");
    Some(text)
}

/// The tables that give queries to ovld as if they came by the loopback device. A firewall of the host that lets in
/// only what it knows knows that device, and would drop what comes from a bridge: a later chain's drop is final, so
/// none of ours could let it in there. Whom the resolver answers it decides itself.
pub(crate) fn past_firewalls() -> impl Iterator<Item = (Table, Arc<Skeleton>)> {
    // The last address says by which route of the loopback device a packet goes; its own address stays.
    let all: [(Table, [IpAddr; 3]); 2] = [
        (Table::Resolver4, [ADDRESS_V4.into(), CLUSTER_V4.into(), Ipv4Addr::LOCALHOST.into()]),
        (Table::Resolver6, [ADDRESS_V6.into(), CLUSTER_V6.into(), Ipv6Addr::LOCALHOST.into()]),
    ];
    all.into_iter().map(|(table, [own, cluster, loopback])| {
        let family = table.family();
        let rule = format!(
            "iifname {{ \"ovb-*\", \"ove-*\" }} {family} daddr {{ {own}, {cluster} }} meta l4proto {{ tcp, udp }} \
             th dport {{ {PORT}, {PORT_DIRECT} }} dup to {loopback} device \"lo\" drop"
        );
        // After the chain that puts these addresses and ports in.
        let hook = "type filter hook prerouting priority raw - 4; policy accept;".to_owned();
        let chain = Chain { name: "prerouting".to_owned(), hook: Some(hook), rules: vec![rule] };
        (table, Arc::new(Skeleton { chains: vec![chain], ..Skeleton::default() }))
    })
}

/// With its family as nftables has it.
fn with_stand_in(address: &IpAddr) -> (&'static str, IpAddr, IpAddr) {
    (if address.is_ipv4() { "ip" } else { "ip6" }, *address, stand_in(*address))
}

/// What belongs into an endpoint's resolv.conf(5): names are asked for as they are.
pub fn resolv_conf(addresses: &[IpNet]) -> String {
    let server = match addresses.iter().any(|net| net.addr().is_ipv4()) {
        true => IpAddr::from(LOOPBACK),
        false => IpAddr::from(ADDRESS_V6),
    };
    format!("nameserver {server}\noptions ndots:0\n")
}
