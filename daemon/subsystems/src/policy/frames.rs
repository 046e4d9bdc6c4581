//! The table `bridge ovl-policy`: on a switched network the frames of isolated endpoints of this host, to and
//! from them, go through its IP stack, where the other table judges them.
//!
//! A frame is diverted by giving it the gateway's MAC address; it is routed back out of the same bridge by the
//! permanent neighbours, and gets its sender's MAC address again: other hosts, and the check of what comes out
//! of the tunnel, see it as it was. What is bridged to or from an isolated endpoint all the same is no IP
//! packet for its address, and dropped but for ARP and neighbour discovery.
//!
//! With `net.bridge.bridge-nf-call-iptables`, as Docker and Kubernetes set it, frames that the kernel translates are bridged
//! and not routed, and the other table judges them on their way: `forward` comes after that, and lets those pass that
//! it has seen. Only those: what was not translated may be for nobody's address, and nobody would judge it.

use super::Direction;
use super::members;
use ovl_dataplane::nft::{Chain, Skeleton};

/// Neighbour discovery: it must not be routed, its hop limit says so.
const DISCOVERY: &str = "icmpv6 type { 133, 134, 135, 136 }";
/// And who listens to which multicast group: without that a switch may keep discovery back.
const DISCOVERY_AND_GROUPS: &str = "icmpv6 type { 130, 131, 132, 133, 134, 135, 136, 143 }";

/// A bit of the packet mark of what was translated and then judged by the other table, on its way from a bridge to a
/// bridge. No packet comes with it, and none leaves with it.
pub(super) const SEEN: u32 = 0x2000;
/// The kernel has frames looked at by IP's forward chains at -1 (`NF_BR_PRI_BRNF` - 1).
const AFTER_BRIDGE_NF: &str = "10";

pub(super) fn skeleton() -> Skeleton {
    let families = [("ip", true), ("ip6", false)];
    let unsee = format!("meta mark set meta mark & {:#010x}", !SEEN);
    let mut prerouting = vec![unsee.clone()];
    for (ip, v4) in families {
        let (owned, none) = (members::owned(v4).name, if v4 { "0.0.0.0" } else { "{ ::, fe80::/10 }" });
        prerouting.push(format!(
            "iifname \"ove-*\" {ip} saddr != {none} iifname . {ip} saddr != @{owned} counter drop"
        ));
    }
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
        sets.extend([members::owned(v4), members::diverted(v4), members::macs(v4)]);
    }
    sets.extend(Direction::ALL.map(members::closed));
    Skeleton {
        sets,
        objects: Vec::new(),
        chains: vec![
            // Before anything of ours looks at where a frame goes.
            chain("prerouting", "dstnat - 10", prerouting),
            chain("forward", AFTER_BRIDGE_NF, forward),
            chain("output", "filter", output),
        ],
    }
}
