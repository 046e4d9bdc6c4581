//! The rules of a policy for one direction, merged: one set of addresses and one set of ports for each protocol, in
//! place of a line for each pair of a block and a port.
//!
//! Rules only allow, so their order means nothing, and rules with the same ports are one rule with the peers of all. What
//! a block excludes is taken out of that block alone, so the blocks become disjoint ranges of addresses: the kernel
//! looks a range up in a tree, in place of comparing an address with one block after the other.
//!
//! The module owns no state. Begin to read at [`merge`].

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use ovl_proto::resource::Protocol;

use super::{Rule, RulePeer, RulePort};

/// The ports of one or more rules.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    /// All ports and protocols: the other fields are empty.
    pub(super) any: bool,
    /// Protocols with all ports.
    pub(super) protocols: BTreeSet<Protocol>,
    /// The ports of other protocols.
    pub(super) numbers: BTreeMap<Protocol, Ranges>,
    /// Named ports: indexes into [`super::Policies`]'s list of them.
    pub(super) named: BTreeSet<usize>,
}

/// The peers of one or more rules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Peers {
    /// All peers: the other fields are empty.
    pub(super) everybody: bool,
    /// Selectors of endpoints: indexes into [`super::Policies::pods`].
    pub(super) pods: BTreeSet<usize>,
    /// Patterns of domain names: indexes into [`super::Policies`]'s list of them.
    pub(super) names: BTreeSet<usize>,
    /// IPv4 addresses.
    pub(super) v4: Ranges,
    /// IPv6 addresses.
    pub(super) v6: Ranges,
}

/// Numbers, as ranges that neither overlap nor touch, in ascending order.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ranges(Vec<(u128, u128)>);

impl Ranges {
    /// Merges ranges, each given by its first and its last number.
    fn of(mut all: Vec<(u128, u128)>) -> Self {
        all.sort_unstable();
        let mut merged: Vec<(u128, u128)> = Vec::with_capacity(all.len());
        for (first, last) in all {
            match merged.last_mut() {
                Some((_, end)) if first <= end.saturating_add(1) => *end = last.max(*end),
                _ => merged.push((first, last)),
            }
        }
        Self(merged)
    }

    /// Whether there is no range.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the ranges as nft writes ports.
    pub(super) fn ports(&self) -> Vec<String> {
        let show = |(first, last): &(u128, u128)| match first == last {
            true => first.to_string(),
            false => format!("{first}-{last}"),
        };
        self.0.iter().map(show).collect()
    }

    /// Whether the ranges have every address of a family.
    pub(super) fn is_whole(&self, v4: bool) -> bool {
        self.0 == [(0, u128::MAX >> (128 - width(v4)))]
    }

    /// Returns the ranges as nft writes addresses: as prefixes where they are some.
    pub(super) fn addresses(&self, v4: bool) -> Vec<String> {
        let show = |(first, last): &(u128, u128)| {
            let differing = first ^ last;
            // A prefix differs in its lower bits alone, and in all of them.
            let is_prefix = differing & differing.wrapping_add(1) == 0 && first & differing == 0;
            match (first == last, is_prefix) {
                (true, _) => address(*first, v4).to_string(),
                (false, true) => {
                    format!("{}/{}", address(*first, v4), width(v4).saturating_sub(differing.count_ones()))
                }
                (false, false) => format!("{}-{}", address(*first, v4), address(*last, v4)),
            }
        };
        self.0.iter().map(show).collect()
    }
}

/// Returns the number of bits of an address.
fn width(v4: bool) -> u32 {
    if v4 { 32 } else { 128 }
}

fn address(bits: u128, v4: bool) -> IpAddr {
    match v4 {
        true => Ipv4Addr::from_bits(bits as u32).into(),
        false => Ipv6Addr::from_bits(bits).into(),
    }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_bits().into(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// Returns the addresses of a block without those of the prefixes that it excludes.
fn without(cidr: IpNet, except: &[IpNet]) -> Vec<(u128, u128)> {
    let ends = |net: &IpNet| (bits(net.network()), bits(net.broadcast()));
    let (mut next, end) = ends(&cidr);
    let here = except.iter().filter(|net| net.addr().is_ipv4() == cidr.addr().is_ipv4());
    let mut holes: Vec<_> = here.map(ends).filter(|(first, last)| *first <= end && *last >= next).collect();
    holes.sort_unstable();
    let mut left = Vec::with_capacity(holes.len() + 1);
    for (first, last) in holes {
        if let Some(before) = first.checked_sub(1).filter(|before| *before >= next) {
            left.push((next, before));
        }
        match last.checked_add(1) {
            Some(after) => next = next.max(after),
            None => return left,
        }
    }
    if next <= end {
        left.push((next, end));
    }
    left
}

fn ports_of(rule: &Rule) -> Ports {
    let mut ports = Ports { any: rule.ports.is_empty(), ..Ports::default() };
    let mut numbers: BTreeMap<Protocol, Vec<(u128, u128)>> = BTreeMap::new();
    for port in &rule.ports {
        match port {
            RulePort::All(protocol) => {
                ports.protocols.insert(*protocol);
            }
            RulePort::Range(protocol, first, last) => {
                numbers.entry(*protocol).or_default().push((u128::from(*first), u128::from(*last)));
            }
            RulePort::Named(place) => {
                ports.named.insert(*place);
            }
        }
    }
    numbers.retain(|protocol, _| !ports.protocols.contains(protocol));
    ports.numbers = numbers.into_iter().map(|(protocol, all)| (protocol, Ranges::of(all))).collect();
    ports
}

/// Merges the rules of a policy for one direction: the peers for each set of ports.
pub(super) fn merge(rules: &[Rule]) -> BTreeMap<Ports, Peers> {
    /// Peers, and the addresses that are still to be merged.
    #[derive(Default)]
    struct Collected {
        peers: Peers,
        v4: Vec<(u128, u128)>,
        v6: Vec<(u128, u128)>,
    }
    let mut all: BTreeMap<Ports, Collected> = BTreeMap::new();
    for rule in rules {
        let Collected { peers, v4, v6 } = all.entry(ports_of(rule)).or_default();
        peers.everybody |= rule.peers.is_empty();
        for peer in &rule.peers {
            match peer {
                RulePeer::Pods(place) => {
                    peers.pods.insert(*place);
                }
                RulePeer::Name(place) => {
                    peers.names.insert(*place);
                }
                RulePeer::Block { cidr, except } => {
                    let ranges = if cidr.addr().is_ipv4() { &mut *v4 } else { &mut *v6 };
                    ranges.extend(without(*cidr, except));
                }
            }
        }
    }
    let merged = all.into_iter().map(|(ports, Collected { peers, v4, v6 })| {
        let peers = match peers.everybody {
            true => Peers { everybody: true, ..Peers::default() },
            false => Peers { v4: Ranges::of(v4), v6: Ranges::of(v6), ..peers },
        };
        (ports, peers)
    });
    merged.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(cidr: &str, except: &[&str]) -> RulePeer {
        RulePeer::Block {
            cidr: cidr.parse().unwrap(),
            except: except.iter().map(|net| net.parse().unwrap()).collect(),
        }
    }

    fn tcp(first: u16, last: u16) -> RulePort {
        RulePort::Range(Protocol::Tcp, first, last)
    }

    fn addresses(peers: Vec<RulePeer>) -> (Vec<String>, Vec<String>) {
        let merged = merge(&[Rule { peers, ports: Vec::new() }]);
        let peers = merged.into_values().next().unwrap();
        (peers.v4.addresses(true), peers.v6.addresses(false))
    }

    #[test]
    fn a_block_excludes_only_from_itself() {
        let (v4, v6) = addresses(vec![
            block("10.0.0.0/8", &["10.1.0.0/16", "10.0.0.0/24", "10.255.255.255/32"]),
            block("10.1.2.0/24", &[]),
            block("fd00::/16", &["fd00:0:0:1::/64"]),
            block("192.168.0.0/16", &["192.168.0.0/16"]),
        ]);
        assert_eq!(v4, ["10.0.1.0-10.0.255.255", "10.1.2.0/24", "10.2.0.0-10.255.255.254"]);
        assert_eq!(v6, ["fd00::/64", "fd00:0:0:2::-fd00:ffff:ffff:ffff:ffff:ffff:ffff:ffff"]);
    }

    #[test]
    fn overlapping_and_adjacent_blocks_become_one_range() {
        let (v4, _) = addresses(vec![
            block("10.0.1.0/24", &[]),
            block("10.0.0.0/24", &[]),
            block("10.0.0.7/32", &[]),
            block("10.0.4.1/32", &[]),
        ]);
        assert_eq!(v4, ["10.0.0.0/23", "10.0.4.1"]);
    }

    #[test]
    fn the_ends_of_both_families_are_kept() {
        let all = Ranges::of(without("0.0.0.0/0".parse().unwrap(), &[]));
        assert!(all.is_whole(true) && !all.is_whole(false));
        let all = Ranges::of(without("::/0".parse().unwrap(), &[]));
        assert!(all.is_whole(false) && !all.is_whole(true));
        let (_, v6) = addresses(vec![block("::/0", &["ffff::/16", "::/16"])]);
        assert_eq!(v6, ["1::-fffe:ffff:ffff:ffff:ffff:ffff:ffff:ffff"]);
        let (v4, _) = addresses(vec![block("0.0.0.0/0", &["255.255.255.255/32"])]);
        assert_eq!(v4, ["0.0.0.0-255.255.255.254"]);
    }

    #[test]
    fn rules_with_the_same_ports_are_one() {
        let rule = |peers, ports| Rule { peers, ports };
        let merged = merge(&[
            rule(vec![block("10.0.0.0/24", &[])], vec![tcp(80, 80), tcp(443, 443)]),
            rule(vec![block("10.9.0.0/24", &[]), RulePeer::Pods(3)], vec![tcp(443, 443), tcp(80, 80)]),
            rule(vec![block("10.8.0.0/24", &[])], vec![tcp(443, 443)]),
        ]);
        let found: Vec<_> = merged
            .iter()
            .map(|(ports, peers)| {
                (ports.numbers[&Protocol::Tcp].ports(), peers.v4.addresses(true), peers.pods.len())
            })
            .collect();
        let texts = |all: &[&str]| all.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(
            found,
            [
                (texts(&["80", "443"]), texts(&["10.0.0.0/24", "10.9.0.0/24"]), 1),
                (texts(&["443"]), texts(&["10.8.0.0/24"]), 0),
            ]
        );
    }

    #[test]
    fn ports_of_a_protocol_that_is_allowed_as_a_whole_are_left_out() {
        let ports = vec![tcp(80, 90), tcp(85, 100), RulePort::Range(Protocol::Udp, 53, 53)];
        let ports = [ports, vec![RulePort::All(Protocol::Udp), tcp(101, 101)]].concat();
        let merged = merge(&[Rule { peers: Vec::new(), ports }]);
        let (ports, peers) = merged.first_key_value().unwrap();
        assert!(peers.everybody && !ports.any);
        assert_eq!(ports.protocols, BTreeSet::from([Protocol::Udp]));
        assert_eq!(ports.numbers.len(), 1);
        assert_eq!(ports.numbers[&Protocol::Tcp].ports(), ["80-101"]);
    }
}
