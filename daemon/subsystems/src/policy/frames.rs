//! The table `bridge ovl-policy`: it diverts frames of isolated endpoints on switched networks to the host's IP stack,
//! where the table `inet ovl-policy` applies the policies.
//!
//! A frame is diverted when its destination is rewritten to the gateway's MAC address. It is routed back out of the
//! same bridge by the permanent neighbours, and its source MAC address is restored, so that other hosts and the source
//! check of the tunnel see the original address. A frame that is still bridged to or from an isolated endpoint is not
//! an IP packet for its address; it is dropped unless it is ARP or neighbour discovery.
//!
//! With `net.bridge.bridge-nf-call-iptables`, as Docker and Kubernetes set it, the kernel bridges frames whose packets
//! it translated instead of routing them, and `inet ovl-policy` judges them in passing. The chain `forward` comes later
//! and accepts only frames that were translated and judged: other frames may be for an unknown address, to which no
//! policy was applied.
//!
//! The module owns no state. Begin to read at [`skeleton`].

use super::Direction;
use super::members;
use crate::marks::SEEN;
use ovl_dataplane::nft::{Chain, Skeleton};

/// Neighbour discovery (RFC 4861). It must not be routed: receivers require a hop limit of 255.
const DISCOVERY: &str = "icmpv6 type { 133, 134, 135, 136 }";
/// Neighbour discovery and multicast listener reports. Without the reports, a switch may withhold neighbour discovery.
const DISCOVERY_AND_GROUPS: &str = "icmpv6 type { 130, 131, 132, 133, 134, 135, 136, 143 }";

/// A priority after -1 (`NF_BR_PRI_BRNF` - 1), at which the kernel passes bridged frames to the IP forward chains.
const AFTER_BRIDGE_NF: &str = "10";

/// Returns the table without elements.
pub(super) fn skeleton() -> Skeleton {
    let families = [("ip", true), ("ip6", false)];
    let unsee = format!("meta mark set meta mark & {:#010x}", !SEEN);
    let mut prerouting = vec![unsee.clone()];
    prerouting.push("meta pkttype { broadcast, multicast } accept".to_owned());
    prerouting.push(format!("{DISCOVERY} accept"));
    for end in ["daddr", "saddr"] {
        for (ip, v4) in families {
            let map = members::diverted(v4).name;
            prerouting.push(format!("ether daddr set {ip} {end} map @{map} meta pkttype set host accept"));
        }
    }
    let [to, from] = Direction::ALL.map(|direction| members::closed(direction).name);
    let forward = vec![
        format!("meta mark & {SEEN:#x} == {SEEN:#x} {unsee} accept"),
        "ether type arp accept".to_owned(),
        format!("{DISCOVERY_AND_GROUPS} accept"),
        format!("oifname @{to} counter drop"),
        format!("iifname @{from} counter drop"),
    ];
    let restored =
        families.map(|(ip, v4)| format!("ether saddr set {ip} saddr map @{}", members::macs(v4).name));
    let output = [unsee].into_iter().chain(restored).collect();
    let chain = |name: &str, priority: &str, rules| Chain {
        name: name.to_owned(),
        hook: Some(format!("type filter hook {name} priority {priority}; policy accept;")),
        rules,
    };
    let mut sets = Vec::new();
    for (_, v4) in families {
        sets.extend([members::diverted(v4), members::macs(v4)]);
    }
    sets.extend(Direction::ALL.map(members::closed));
    Skeleton {
        sets,
        objects: Vec::new(),
        chains: vec![
            // Before all chains of ovld that match the destination of a frame.
            chain("prerouting", "dstnat - 10", prerouting),
            chain("forward", AFTER_BRIDGE_NF, forward),
            chain("output", "filter", output),
        ],
    }
}
