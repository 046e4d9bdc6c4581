//! The packet filter of a NAT box, as input for `nft`.
//!
//! Connection tracking translates, but leaves two questions open that the kinds of RFC 4787 answer differently. Which port does a
//! new connection get? The map `outward` remembers the outer port of each inner endpoint (and of its peer's address, if mapping
//! depends on that). Who may begin one from outside? The map `inward` leads from an outer port to the inner endpoint, and the set
//! `contacted` has the outer ports that something was sent from (without translation: the inner endpoints), each with as much of
//! the peer as filtering depends on.
//!
//! All three are learned after translation, from packets that leave. What is filtered then is dropped before connection tracking
//! confirms it, so it leaves no entry that would take the port of a later connection.

use std::net::Ipv4Addr;

use crate::nat::{Behavior, Nat};

/// Name of a box's interface towards its uplink.
pub(crate) const WAN: &str = "wan";

/// Name of a box's bridge, which the cables of the hosts behind it lead to.
pub(crate) const LAN: &str = "lan";

/// Priority after source translation (100) and before connection tracking confirms.
const AFTER_TRANSLATION: u8 = 200;

/// Entries of a map or set, at most: as many as there are ports.
const MOST_ENTRIES: u32 = 65535;

/// Renders the tables of both families as one transaction, which forgets all mappings. IPv4 is translated if there is an outer
/// address.
pub(crate) fn script(nat: &Nat, outer: Option<Ipv4Addr>) -> String {
    let translation = outer.map(|outer| maps(nat) + &translation(nat, outer)).unwrap_or_default();
    table(nat, &V4, outer.is_some(), &translation) + &table(nat, &V6, false, "")
}

/// What differs between address families.
struct Family {
    name: &'static str,
    address: &'static str,
    icmp: &'static str,
}

const V4: Family = Family { name: "ip", address: "ipv4_addr", icmp: "icmp" };
const V6: Family = Family { name: "ip6", address: "ipv6_addr", icmp: "ipv6-icmp" };

fn table(nat: &Nat, family: &Family, translates: bool, translation: &str) -> String {
    let name = family.name;
    let set = contacted(nat, family, translates);
    let filter = filter(nat, family, translates);
    // The first line ensures that there is a table to delete.
    format!(
        "add table {name} nat\ndelete table {name} nat\ntable {name} nat {{\n{set}{translation}{filter}}}\n"
    )
}

/// The options of maps and sets, whose elements live as long as a mapping.
fn options(nat: &Nat) -> String {
    let seconds = nat.lifetime.as_secs().max(1);
    format!("flags dynamic,timeout; timeout {seconds}s; size {MOST_ENTRIES};")
}

fn contacted(nat: &Nat, Family { address, .. }: &Family, translates: bool) -> String {
    let end = format!("{address} . inet_service");
    let own = if translates { "inet_service" } else { &end };
    let key = match nat.filtering {
        Behavior::EndpointIndependent => own.to_owned(),
        Behavior::AddressDependent => format!("{own} . {address}"),
        Behavior::AddressAndPortDependent => format!("{own} . {end}"),
    };
    format!("set contacted {{ type {key}; {} }}\n", options(nat))
}

fn maps(nat: &Nat) -> String {
    let options = options(nat);
    let key = match nat.mapping {
        Behavior::AddressDependent => "ipv4_addr . inet_service . ipv4_addr",
        Behavior::EndpointIndependent | Behavior::AddressAndPortDependent => "ipv4_addr . inet_service",
    };
    format!(
        "map outward {{ type {key} : inet_service; {options} }}\n\
         map inward {{ type inet_service : ipv4_addr . inet_service; {options} }}\n\
         set taken {{ type inet_service; {options} }}\n"
    )
}

/// The translating chains. Packets from inside have mark 1.
fn translation(nat: &Nat, outer: Ipv4Addr) -> String {
    let from = if nat.hairpin { String::new() } else { format!("iifname {WAN} ") };
    let udp = format!("meta mark 1 meta l4proto udp snat to {outer}");
    let known = match nat.mapping {
        Behavior::EndpointIndependent => format!("{udp}:ip saddr . udp sport map @outward\n"),
        Behavior::AddressDependent => {
            format!("{udp}:ip saddr . udp sport . ct original ip daddr map @outward\n")
        }
        Behavior::AddressAndPortDependent => String::new(),
    };
    let kept = if nat.keeps_ports {
        format!("meta mark 1 udp sport != @taken snat to {outer}\n")
    } else {
        String::new()
    };
    format!(
        "chain prerouting {{ type nat hook prerouting priority dstnat;\n\
         {from}ip daddr {outer} meta l4proto udp dnat ip addr . port to udp dport map @inward\n}}\n\
         chain postrouting {{ type nat hook postrouting priority srcnat;\n\
         {known}{kept}{udp}:1024-65535 fully-random\nmeta mark 1 snat to {outer}\n}}\n"
    )
}

/// The filtering and learning chains.
fn filter(nat: &Nat, Family { name, icmp, .. }: &Family, translates: bool) -> String {
    let udp = if nat.udp { "" } else { "meta l4proto udp drop\n" };
    let arrived = if translates { "ct status dnat " } else { "" };
    let own =
        if translates { "ct original proto-dst".to_owned() } else { format!("{name} daddr . udp dport") };
    let peer = match nat.filtering {
        Behavior::EndpointIndependent => String::new(),
        Behavior::AddressDependent => format!(" . {name} saddr"),
        Behavior::AddressAndPortDependent => format!(" . {name} saddr . udp sport"),
    };
    let learn: String =
        ["original", "reply"].map(|direction| learn(nat, name, direction, translates)).concat();
    format!(
        "chain input {{ type filter hook input priority filter; policy drop;\n\
         meta l4proto {icmp} accept\n}}\n\
         chain forward {{ type filter hook forward priority filter; policy drop;\n\
         {udp}iifname {LAN} meta mark set 1\n\
         ct state established,related accept\n\
         ct state invalid drop\n\
         iifname {LAN} accept\n\
         iifname {WAN} {arrived}meta l4proto udp accept\n}}\n\
         chain learn {{\n{learn}}}\n\
         chain deliver {{ type filter hook postrouting priority {AFTER_TRANSLATION};\n\
         meta mark 1 jump learn\n\
         oifname {LAN} meta l4proto udp ct state new {own}{peer} != @contacted drop\n}}\n"
    )
}

/// The rule that learns from a packet that an inner endpoint sent: connection tracking has the endpoint and its peer (for
/// hairpinned packets by its outer address) as the endpoint itself sees them, and the packet is translated already.
fn learn(nat: &Nat, name: &str, direction: &str, translates: bool) -> String {
    let end = |side: &str| {
        format!(
            "ct {direction} {name} {side}addr . ct {direction} proto-{}",
            if side == "s" { "src" } else { "dst" }
        )
    };
    let (inside, peer, peer_address) = (end("s"), end("d"), format!("ct {direction} {name} daddr"));
    // A mapping that depends on its destination is open for no other one.
    let own = if translates { "udp sport" } else { &inside };
    let contacted = match nat.filtering {
        Behavior::EndpointIndependent => own.to_owned(),
        Behavior::AddressDependent => format!("{own} . {peer_address}"),
        Behavior::AddressAndPortDependent => format!("{own} . {peer}"),
    };
    let outward = match nat.mapping {
        Behavior::EndpointIndependent => format!(" update @outward {{ {inside} : udp sport }}"),
        Behavior::AddressDependent => format!(" update @outward {{ {inside} . {peer_address} : udp sport }}"),
        Behavior::AddressAndPortDependent => String::new(),
    };
    let mapping = if translates {
        format!("{outward} update @inward {{ udp sport : {inside} }} update @taken {{ udp sport }}")
    } else {
        String::new()
    };
    // nft knows the type of `ct ... proto-src` by the protocol that the same rule matches.
    format!("meta l4proto udp ct direction {direction} update @contacted {{ {contacted} }}{mapping}\n")
}
