//! The chains of the guard tables.
//!
//! The module owns no state. Begin to read at [`frames`].

use std::net::Ipv4Addr;
use std::sync::{Arc, LazyLock};

use ovl_dataplane::multicast::{JOINED, OPEN};
use ovl_dataplane::nft::{Chain, Object, Set, Skeleton};
use ovl_dataplane::resolver::{LOOPBACK, PORT_FROM_LOCALHOST};
use ovl_proto::PROBE_ETHERTYPE as PROBES;

use super::REFUSED;
use super::elements::{
    FRAME_RANGES4, FRAME_RANGES6, FRAME_SOURCES4, FRAMES4, FRAMES6, MACS, OWN4, OWN6, PACKET_RANGES4,
    PACKET_RANGES6, PACKET_SOURCES4, PACKETS4, PACKETS6,
};

/// The source address of a client that is bound to it.
const LOCALHOST: Ipv4Addr = Ipv4Addr::LOCALHOST;
/// The numbers of router advertisements and redirects (RFC 4861, sections 4.2 and 4.5).
const FROM_ROUTERS: &str = "{ 134, 137 }";
/// The numbers of all messages of neighbour discovery (RFC 4861, section 4).
const NEIGHBOUR_DISCOVERY: &str = "133-137";
/// The protocol number of IGMP (RFC 3376, section 4).
const IGMP: u8 = 2;
/// The number of its queries. All its other messages are reports.
const IGMP_QUERY: u8 = 0x11;
/// The number of queries of multicast listener discovery (RFC 3810, section 5).
const MLD_QUERY: u8 = 130;
/// The numbers of its reports.
const MLD_REPORTS: &str = "{ 131, 132, 143 }";
/// Matches a link-local source address that is not derived from a MAC address (RFC 7217, for example). One that is
/// derived from a MAC address belongs to the interface with that address.
const OPAQUE_LINK_LOCAL: &str = "@nh,64,10 0x3fa @nh,152,16 != 0xfffe";
/// The same for the target of a neighbour solicitation or advertisement.
const OPAQUE_TARGET: &str = "@th,64,10 0x3fa @th,152,16 != 0xfffe";
/// An element of an interface that has sent nothing forbidden for so long is deleted.
const COUNTED: &str = "type ifname; size 65535; flags dynamic,timeout; timeout 1d; counter";

/// Returns the table of bridged frames, without elements.
///
/// Most frames are TCP and UDP from an endpoint's own addresses: one rule and one lookup accepts them. The chain comes
/// before all others of ovl that match frames.
///
/// * **Fragments.** Only the first fragment of a packet has its ports or its ICMPv6 type. The others are useless without
///   it, so they pass with a source address that passes. A first fragment that is too short to show its ICMPv6 type is
///   refused.
/// * **VLAN tags.** The kernel takes one tag off before the chain, and receivers ignore a tag of VLAN 0, so the packet
///   behind it is checked. A second tag is refused.
/// * **Link-local addresses.** The one that is derived from a MAC address passes from that MAC address only. Others pass
///   from any endpoint: some systems choose them at random, and nobody else knows which.
/// * **Unspecified source.** It passes for DHCP clients, ARP probes (RFC 5227), duplicate address detection of an own
///   address (RFC 4862), router solicitations and multicast listener reports.
/// * **Path probes** are refused: only hosts send them.
/// * **Frames of other protocols** pass with the own MAC address.
/// * **Membership of multicast groups.** The bridge of each host follows the groups of its own ports and asks for them.
///   Queries of endpoints are refused, because a forged one can end what others have joined. Reports reach no port, so no
///   member leaves its report to another one, and neither reports nor queries leave the host.
/// * **Multicast to other hosts** leaves if one of them has joined a group with its MAC address, or follows none. Groups that
///   are never followed always leave ([`ovl_proto::table::is_followed`]), and so does what is not for a group by its IP
///   address.
/// * **Queries from 127.0.0.1** to the resolver get the endpoint's own source address, and a port on the host whose answers go
///   back to 127.0.0.1: see [`from_localhost`]. Namespaces therefore accept answers to that address, and only their host may
///   send there: frames from other hosts to 127.0.0.0/8 are dropped.
/// * **The host's own frames.** Its ARP and neighbour discovery messages stay on this host. Every host has the gateway's
///   addresses and MAC address, so it would answer requests of other hosts' endpoints for them, and no answer to its own
///   requests would find back to it.
pub(super) fn frames() -> Arc<Skeleton> {
    static SKELETON: LazyLock<Arc<Skeleton>> = LazyLock::new(|| {
        let [macs, own4, own6] = [&MACS, &OWN4, &OWN6].map(|set| &*set.name);
        let [addresses4, addresses6] = [&FRAMES4, &FRAMES6].map(|set| &*set.name);
        let [allowed4, allowed6] = [&FRAME_RANGES4, &FRAME_RANGES6].map(|set| &*set.name);
        let own4 = format!("iifname . ether saddr . ip saddr @{own4} accept");
        let own6 = format!("iifname . ether saddr . @nh,64,128 @{own6} accept");
        let prerouting = vec![
            "iifname != \"ove-*\" goto from-others".to_owned(),
            format!("meta l4proto 6 {own4}"),
            format!("udp sport != 67 {own4}"),
            format!("meta protocol ip6 meta l4proto 6 {own6}"),
            format!("meta protocol ip6 udp sport != 547 {own6}"),
            format!("iifname . ether saddr != @{macs} goto refuse"),
            format!(
                "meta protocol vmap {{ arp : goto check-arp, ip : goto check-ip, ip6 : goto check-ip6, \
                 0x8100 : goto refuse, 0x88a8 : goto refuse, {PROBES:#x} : goto refuse }}"
            ),
        ];
        let output = vec![
            "oifname != \"ovx-*\" goto to-endpoint".to_owned(),
            "ether type arp drop".to_owned(),
            format!("ether type ip6 meta l4proto 58 @th,0,8 {NEIGHBOUR_DISCOVERY} drop"),
        ];
        let to_endpoint = ["udp", "tcp"].map(|proto| {
            format!(
                "ip saddr {LOOPBACK} {proto} sport {PORT_FROM_LOCALHOST} ip daddr set {LOCALHOST} {proto} sport set 53"
            )
        });
        let [joined, open] = [&JOINED, &OPEN].map(|set| &*set.name);
        let postrouting = vec![
            "ether daddr & 01:00:00:00:00:00 == 00:00:00:00:00:00 accept".to_owned(),
            "ether daddr ff:ff:ff:ff:ff:ff accept".to_owned(),
            format!("meta protocol ip meta l4proto {IGMP} @th,0,8 != {IGMP_QUERY:#x} drop"),
            format!("meta protocol ip6 meta l4proto 58 @th,0,8 {MLD_REPORTS} drop"),
            "oifname != \"ovx-*\" accept".to_owned(),
            format!("meta protocol ip meta l4proto {IGMP} drop"),
            format!("meta protocol ip6 meta l4proto 58 @th,0,8 {MLD_QUERY} drop"),
            format!("oifname . ether daddr @{joined} accept"),
            "ip daddr 224.0.0.0/24 accept".to_owned(),
            "ip6 daddr { ff02::1, ff02::1:ff00:0/104 } accept".to_owned(),
            format!("oifname @{open} accept"),
            "ip daddr 224.0.0.0/4 drop".to_owned(),
            "ip6 daddr ff00::/8 drop".to_owned(),
        ];
        let refuse = || "goto refuse".to_owned();
        let check_arp = vec![
            format!("iifname . arp saddr ether != @{macs} goto refuse"),
            format!("iifname . arp saddr ip @{addresses4} accept"),
            format!("iifname . arp saddr ip @{allowed4} accept"),
            "arp saddr ip 0.0.0.0 arp operation 1 accept".to_owned(),
            refuse(),
        ];
        let check_ip = vec![
            "ip saddr 0.0.0.0 udp sport 68 udp dport 67 accept".to_owned(),
            "udp sport 67 goto refuse".to_owned(),
            format!("meta l4proto {IGMP} ip frag-off & 0x3fff != 0 goto refuse"),
            format!("meta l4proto {IGMP} @th,0,8 {IGMP_QUERY:#x} goto refuse"),
            format!("iifname . ip saddr @{addresses4} accept"),
            format!("iifname . ip saddr @{allowed4} accept"),
            format!("ip saddr {LOCALHOST} ip daddr {LOOPBACK} goto from-localhost"),
            refuse(),
        ];
        let check_ip6 = vec![
            "meta l4proto 58 goto check-icmpv6".to_owned(),
            "udp sport 547 goto refuse".to_owned(),
            "goto check-source6".to_owned(),
        ];
        let check_icmpv6 = vec![
            "frag frag-off != 0 goto check-source6".to_owned(),
            format!("@th,0,8 {{ {MLD_QUERY}, 134, 137 }} goto refuse"),
            "@th,0,8 136 goto check-target".to_owned(),
            "ip6 saddr :: @th,0,8 135 goto check-target".to_owned(),
            "ip6 saddr :: @th,0,8 { 131, 132, 133, 143 } accept".to_owned(),
            "@th,0,8 != 136 goto check-source6".to_owned(),
            refuse(),
        ];
        let check_source6 = vec![
            format!("iifname . @nh,64,128 @{addresses6} accept"),
            format!("iifname . @nh,64,128 @{allowed6} accept"),
            format!("{OPAQUE_LINK_LOCAL} accept"),
            refuse(),
        ];
        let check_target = vec![
            format!("iifname . @th,64,128 @{addresses6} accept"),
            format!("iifname . @th,64,128 @{allowed6} accept"),
            format!("{OPAQUE_TARGET} accept"),
            refuse(),
        ];
        skeleton(
            &[
                &MACS,
                &OWN4,
                &OWN6,
                &FRAMES4,
                &FRAMES6,
                &FRAME_RANGES4,
                &FRAME_RANGES6,
                &FRAME_SOURCES4,
                &JOINED,
                &OPEN,
            ],
            vec![
                chain("from-localhost", None, from_localhost(&FRAME_SOURCES4)),
                chain("to-endpoint", None, to_endpoint.into()),
                chain("from-others", None, vec!["iifname \"ovx-*\" ip daddr 127.0.0.0/8 drop".to_owned()]),
                chain("check-arp", None, check_arp),
                chain("check-ip", None, check_ip),
                chain("check-ip6", None, check_ip6),
                chain("check-icmpv6", None, check_icmpv6),
                chain("check-source6", None, check_source6),
                chain("check-target", None, check_target),
                chain("prerouting", Some("prerouting priority dstnat - 20"), prerouting),
                chain("output", Some("output priority filter"), output),
                chain("postrouting", Some("postrouting priority filter"), postrouting),
            ],
        )
    });
    Arc::clone(&SKELETON)
}

/// Returns the table of packets from routed endpoints, without elements.
///
/// Link-local and unspecified IPv6 sources pass for ICMPv6 alone: neighbour discovery with the host. The chain comes before
/// those of the resolver, which take queries out of the way of all others.
pub(super) fn packets() -> Arc<Skeleton> {
    static SKELETON: LazyLock<Arc<Skeleton>> = LazyLock::new(|| {
        let [addresses4, addresses6] = [&PACKETS4, &PACKETS6].map(|set| &*set.name);
        let [allowed4, allowed6] = [&PACKET_RANGES4, &PACKET_RANGES6].map(|set| &*set.name);
        let prerouting = vec![
            "iifname != \"ove-*\" accept".to_owned(),
            format!("iifname . ip saddr @{addresses4} accept"),
            format!("iifname . ip saddr @{allowed4} accept"),
            format!("ip saddr {LOCALHOST} ip daddr {LOOPBACK} goto from-localhost"),
            format!("meta l4proto 58 @th,0,8 {FROM_ROUTERS} goto refuse"),
            format!("iifname . ip6 saddr @{addresses6} accept"),
            format!("iifname . ip6 saddr @{allowed6} accept"),
            "ip6 saddr { ::, fe80::/10 } meta l4proto 58 accept".to_owned(),
            "goto refuse".to_owned(),
        ];
        skeleton(
            &[&PACKETS4, &PACKETS6, &PACKET_RANGES4, &PACKET_RANGES6, &PACKET_SOURCES4],
            vec![
                chain("from-localhost", None, from_localhost(&PACKET_SOURCES4)),
                chain("prerouting", Some("prerouting priority raw - 10"), prerouting),
            ],
        )
    });
    Arc::clone(&SKELETON)
}

/// Returns the rules for packets from 127.0.0.1 to 127.0.0.11 that come out of the namespace of an endpoint: a client there
/// has bound its socket to 127.0.0.1. Queries get the address of the endpoint in the map `sources` as their source, which
/// tells the resolver who asks, and the port [`PORT_FROM_LOCALHOST`]. Everything else is refused.
fn from_localhost(sources: &Set) -> Vec<String> {
    let query = |proto: &str| {
        format!(
            "{proto} dport 53 ip saddr set iifname map @{} {proto} dport set {PORT_FROM_LOCALHOST} accept",
            sources.name
        )
    };
    vec![query("udp"), query("tcp"), "goto refuse".to_owned()]
}

fn skeleton(sets: &[&Set], mut chains: Vec<Chain>) -> Arc<Skeleton> {
    // Two rules: with a full set, the first one ends.
    let refuse = vec![format!("update @{REFUSED} {{ iifname }}"), "drop".to_owned()];
    chains.push(chain("refuse", None, refuse));
    Arc::new(Skeleton {
        sets: sets.iter().map(|set| (*set).clone()).collect(),
        objects: vec![Object { kind: "set", name: REFUSED.to_owned(), body: COUNTED.to_owned() }],
        chains,
    })
}

fn chain(name: &str, hook: Option<&str>, rules: Vec<String>) -> Chain {
    let hook = hook.map(|hook| format!("type filter hook {hook}; policy accept;"));
    Chain { name: name.to_owned(), hook, rules }
}
