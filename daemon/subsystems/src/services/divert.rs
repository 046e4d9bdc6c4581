//! The table `bridge ovl-divert`: on a switched network, it diverts frames between a local endpoint and a backend of a
//! Service to the host's IP stack.
//!
//! Both directions are diverted, so that connection tracking sees the whole connection and restores the Service's
//! address in answers. A frame is diverted when its destination is rewritten to the gateway's MAC address. It is routed
//! back out of the same bridge by the permanent neighbours, and its source MAC address is restored, so that other hosts
//! and the source check of the tunnel see the original address. Fragments after the first have no ports and are not
//! diverted.
//!
//! The module owns no state. Begin to read at [`skeleton`].

use ovl_dataplane::nft::{Chain, Data, Set, Shape, Skeleton, Table, Type};

const fn set(name: &'static str, key: &'static [Type], data: Data, ranges: bool) -> Set {
    Set::new(Table::Divert, name, Shape { key, data, ranges })
}

const MAC: Data = Data::Fields(&[Type::Mac]);

/// Backends, by address, protocol and port.
pub(crate) static BACKENDS: [Set; 2] = [
    set("backends4", &[Type::Ipv4, Type::Protocol, Type::Port], Data::None, false),
    set("backends6", &[Type::Ipv6, Type::Protocol, Type::Port], Data::None, false),
];
/// MAC addresses of this host's endpoints.
pub(crate) const LOCAL: Set = set("local", &[Type::Mac], Data::None, false);
/// MAC addresses of this host's endpoints, by IP address.
pub(crate) static MACS: [Set; 2] =
    [set("macs4", &[Type::Ipv4], MAC, false), set("macs6", &[Type::Ipv6], MAC, false)];
/// The gateway's MAC address on each subnet.
pub(crate) static GATEWAYS: [Set; 2] =
    [set("gateways4", &[Type::Ipv4], MAC, true), set("gateways6", &[Type::Ipv6], MAC, true)];

/// Ports of ovld's bridges.
const PORTS: &str = "{ \"ove-*\", \"ovx-*\" }";

/// Returns the table without elements.
pub(crate) fn skeleton() -> Skeleton {
    let (mut prerouting, mut divert, mut output) = (Vec::new(), Vec::new(), Vec::new());
    // A host that routes a packet back by its input interface sends a redirect. The sender must not get it.
    output.push(format!("oifname {PORTS} icmp type redirect drop"));
    output.push(format!("oifname {PORTS} icmpv6 type nd-redirect drop"));
    for (ip, n) in [("ip", 0), ("ip6", 1)] {
        let [backends, gateways, macs] = [&BACKENDS, &GATEWAYS, &MACS].map(|sets| sets[n].name.clone());
        prerouting
            .push(format!("iifname \"ove-*\" {ip} daddr . meta l4proto . th dport @{backends} goto divert"));
        prerouting
            .push(format!("ether daddr @local {ip} saddr . meta l4proto . th sport @{backends} goto divert"));
        divert.push(format!("ether daddr set {ip} saddr map @{gateways} meta pkttype set host accept"));
        output.push(format!("oifname {PORTS} ether saddr set {ip} saddr map @{macs}"));
    }
    let chain = |name: &str, hook: Option<&str>, rules| Chain {
        name: name.to_owned(),
        hook: hook.map(|hook| format!("type filter hook {hook}; policy accept;")),
        rules,
    };
    Skeleton {
        sets: [&BACKENDS, &MACS, &GATEWAYS].into_iter().flatten().cloned().chain([LOCAL]).collect(),
        objects: Vec::new(),
        chains: vec![
            chain("divert", None, divert),
            chain("prerouting", Some("prerouting priority dstnat"), prerouting),
            chain("output", Some("output priority filter"), output),
        ],
    }
}
