//! Subnets and the address picker: which subnets a network may have, which of their addresses are for endpoints,
//! and how a host picks a free one from the blocks that it holds. (Consensus decides which host holds which block.)
//!
//! Addresses of both families are handled as `u128`, and sets of them are never enumerated: an IPv6 block costs no
//! more than an IPv4 block.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use ovl_proto::id::{Mac, NetworkId, NodeId};
use ovl_proto::object::{Network, Subnet};

/// Why a prefix cannot be a network's subnet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SubnetError {
    /// Host bits are set.
    #[error("subnet {0} has host bits set; did you mean {mean}?", mean = .0.trunc())]
    HostBits(IpNet),
    /// There is no room for a gateway and an endpoint.
    #[error("subnet {0} is too small: it needs at least four addresses (/30, or /126 for IPv6)")]
    TooSmall(IpNet),
    /// It overlaps addresses that no endpoint may have.
    #[error("subnet {prefix} overlaps {special}, the {what} addresses")]
    Special {
        /// The subnet.
        prefix: IpNet,
        /// What it overlaps.
        special: IpNet,
        /// The purpose of the special addresses.
        what: &'static str,
    },
    /// The block length is not between the subnet's and the longest one with room for a gateway and an endpoint.
    #[error("subnet {prefix}: invalid block length /{length}: expected /{from} to /{longest}", from = .prefix.prefix_len())]
    BlockLength {
        /// The subnet.
        prefix: IpNet,
        /// The requested block length.
        length: u8,
        /// The longest possible one.
        longest: u8,
    },
    /// A subnet can grow only to a prefix that contains it.
    #[error("subnet {new} does not contain the current subnet {old}")]
    NotLarger {
        /// The current subnet.
        old: IpNet,
        /// The requested subnet.
        new: IpNet,
    },
}

/// Creates a subnet of a switched network, with its gateway and the default block length.
///
/// # Errors
///
/// If the prefix is invalid, see [`validate_subnet`].
pub fn new_subnet(prefix: IpNet) -> Result<Subnet, SubnetError> {
    validate_subnet(prefix)?;
    Ok(Subnet { prefix, block_length: default_block_length(prefix), gateway: gateway(prefix), routed: false })
}

/// Creates a subnet of a routed network. The default block length is a /24, or a /64 for IPv6, if that leaves room
/// for 16 hosts.
///
/// # Errors
///
/// If the prefix or the block length is invalid.
pub fn new_routed_subnet(prefix: IpNet, block_length: Option<u8>) -> Result<Subnet, SubnetError> {
    validate_subnet(prefix)?;
    let (usual, longest) = match prefix {
        IpNet::V4(_) => (24, 30),
        IpNet::V6(_) => (64, 126),
    };
    let block_length = match block_length {
        Some(length) if (prefix.prefix_len()..=longest).contains(&length) => length,
        Some(length) => return Err(SubnetError::BlockLength { prefix, length, longest }),
        None => (prefix.prefix_len() + 4).max(usual).min(longest),
    };
    Ok(Subnet { prefix, block_length, gateway: gateway(prefix), routed: true })
}

/// Returns the subnet grown to a prefix that contains it. Gateway and block length stay: the endpoints have routes
/// via the gateway, and held blocks have that length.
///
/// # Errors
///
/// If the new prefix is invalid, or does not contain the subnet.
pub fn can_grow(old: &Subnet, new: IpNet) -> Result<Subnet, SubnetError> {
    validate_subnet(new)?;
    if !new.contains(&old.prefix) {
        return Err(SubnetError::NotLarger { old: old.prefix, new });
    }
    Ok(Subnet { prefix: new, ..*old })
}

/// Checks that a prefix can be a network's subnet.
///
/// # Errors
///
/// If it has host bits set, is too small, or overlaps special addresses.
pub fn validate_subnet(prefix: IpNet) -> Result<(), SubnetError> {
    if prefix != prefix.trunc() {
        return Err(SubnetError::HostBits(prefix));
    }
    if host_bits(prefix) < 2 {
        return Err(SubnetError::TooSmall(prefix));
    }
    let overlaps = |special: &IpNet| prefix.contains(special) || special.contains(&prefix);
    match special_ranges().into_iter().find(|(special, _)| overlaps(special)) {
        Some((special, what)) => Err(SubnetError::Special { prefix, special, what }),
        None => Ok(()),
    }
}

fn special_ranges() -> [(IpNet, &'static str); 10] {
    let v4 = |a, b, c, d, len| IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), len));
    let v6 =
        |first, f, g, h, len| IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::new(first, 0, 0, 0, 0, f, g, h), len));
    [
        (v4(0, 0, 0, 0, 8), "unspecified"),
        (v4(127, 0, 0, 0, 8), "loopback"),
        (v4(169, 254, 0, 0, 16), "link-local"),
        (v4(224, 0, 0, 0, 4), "multicast"),
        (v4(255, 255, 255, 255, 32), "broadcast"),
        (v6(0, 0, 0, 0, 128), "unspecified"),
        (v6(0, 0, 0, 1, 128), "loopback"),
        (v6(0, 0xffff, 0, 0, 96), "IPv4-mapped"),
        (v6(0xfe80, 0, 0, 0, 10), "link-local"),
        (v6(0xff00, 0, 0, 0, 8), "multicast"),
    ]
}

/// Returns the default block length of a switched network's subnet: a compromise between many hosts in a small subnet
/// and few claims in a large one. /24 gives 32 blocks of 8 addresses, /16 gives 256 of 256.
pub fn default_block_length(prefix: IpNet) -> u8 {
    let bits = host_bits(prefix);
    let most = if bits < 32 { 8 } else { 16 };
    let block_bits = bits.saturating_sub(8).max(bits.saturating_sub(5).min(3)).min(most);
    prefix.max_prefix_len() - block_bits
}

/// Returns the gateway of a new subnet or block: its first host address.
pub fn gateway(prefix: IpNet) -> IpAddr {
    let (first, last) = span(prefix);
    address(prefix, first.saturating_add(1).min(last))
}

/// Returns the number of addresses of a subnet that are for endpoints.
pub fn usable(subnet: &Subnet) -> u128 {
    usable_in_block(subnet.prefix, subnet)
}

/// Returns the number of addresses of a block that are for endpoints. It is 0 for some of the smallest blocks; a host
/// that gets such a block claims another one.
pub fn usable_in_block(block: IpNet, subnet: &Subnet) -> u128 {
    let Some((first, last)) = common(block, subnet.prefix) else { return 0 };
    let size = (last - first).saturating_add(1);
    let units =
        if subnet.routed { size >> (subnet.prefix.max_prefix_len() - subnet.block_length) } else { 1 };
    let of_first = reserved(unit(first, subnet), gateway_in_unit(first, subnet));
    let of_first = of_first.filter(|at| (first..=last).contains(at)).count() as u128;
    size.saturating_sub(of_first.saturating_mul(units))
}

/// Whether an endpoint may have the address.
pub fn is_usable(at: IpAddr, subnet: &Subnet) -> bool {
    subnet.prefix.contains(&at) && !is_reserved(number(at), subnet)
}

/// Picks the next free address of a host's blocks.
///
/// The search starts after `cursor`, the last picked address, so that a released address is not reused at once:
/// neighbours and DNS clients remember its former holder.
pub fn allocate(
    blocks: &[IpNet],
    subnet: &Subnet,
    in_use: impl Fn(IpAddr) -> bool,
    cursor: Option<IpAddr>,
) -> Option<IpAddr> {
    let mut spans: Vec<_> = blocks.iter().filter_map(|block| common(*block, subnet.prefix)).collect();
    spans.sort_unstable();
    let free = |first, last| first_free(first, last, subnet, &in_use);
    let behind = cursor.filter(|at| is_ipv4(*at) == is_ipv4(subnet.prefix.addr())).map(number);
    let Some(behind) = behind else {
        return spans.iter().find_map(|(first, last)| free(*first, *last));
    };
    let after = spans.iter().filter(|(_, last)| *last > behind);
    let before = spans.iter().filter(|(first, _)| *first <= behind);
    after
        .filter_map(|(first, last)| free(*first.max(&behind.saturating_add(1)), *last))
        .next()
        .or_else(|| before.filter_map(|(first, last)| free(*first, *last.min(&behind))).next())
}

/// Returns the first free address from `first` to `last`, with one step for each taken address before it.
fn first_free(first: u128, last: u128, subnet: &Subnet, in_use: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
    (first..=last)
        .filter(|at| !is_reserved(*at, subnet))
        .map(|at| address(subnet.prefix, at))
        .find(|at| !in_use(*at))
}

fn is_reserved(at: u128, subnet: &Subnet) -> bool {
    reserved(unit(at, subnet), gateway_in_unit(at, subnet)).any(|reserved| reserved == at)
}

/// Returns the range that has its own gateway: the block on a routed network, else the whole subnet.
fn unit(at: u128, subnet: &Subnet) -> IpNet {
    if !subnet.routed {
        return subnet.prefix;
    }
    IpNet::new(address(subnet.prefix, at), subnet.block_length).map_or(subnet.prefix, |block| block.trunc())
}

/// Returns the gateway for an address of a network: that of its subnet, or on a routed network that of its block.
pub fn gateway_on(network: &Network, at: IpAddr) -> Option<IpAddr> {
    let subnet = network.subnets.iter().find(|subnet| subnet.prefix.contains(&at))?;
    Some(gateway_in_unit(number(at), subnet))
}

fn gateway_in_unit(at: u128, subnet: &Subnet) -> IpAddr {
    if subnet.routed { gateway(unit(at, subnet)) } else { subnet.gateway }
}

/// Returns the reserved addresses: the network address (IPv6: the subnet-router anycast address), the
/// IPv4 broadcast address, and the gateway. An internal network reserves the gateway too, for the case that it gets
/// one later.
fn reserved(unit: IpNet, gateway: IpAddr) -> impl Iterator<Item = u128> {
    let (first, last) = span(unit);
    let broadcast = matches!(unit, IpNet::V4(_)).then_some(last);
    [Some(first), Some(number(gateway)), broadcast].into_iter().flatten()
}

/// Returns the MAC address of an endpoint, the same on every host: locally administered, and for IPv4
/// with the address in it, so that two endpoints of a network never share one. The first byte
/// distinguishes it from [`Mac::of_gateway`].
pub fn mac_of(network: NetworkId, at: IpAddr) -> Mac {
    match at {
        IpAddr::V4(at) => {
            let [a, b, c, d] = at.octets();
            let [hash, ..] = hash(&network.0, &[]);
            Mac([0x02, hash, a, b, c, d])
        }
        IpAddr::V6(at) => {
            let [a, b, c, d, e, ..] = hash(&network.0, &at.octets());
            Mac([0x02, a, b, c, d, e])
        }
    }
}

/// Returns the MAC address of a host's VXLAN device on an unencrypted network, the same on every host. The
/// first byte distinguishes it from those of endpoints and gateways.
pub fn mac_of_host(network: NetworkId, host: NodeId) -> Mac {
    let [a, b, c, d, e, ..] = hash(&network.0, &host.0);
    Mac([0x1a, a, b, c, d, e])
}

/// Returns a hash: FNV-1a followed by a bit mixer. FNV-1a alone barely mixes the last input bytes into the high bytes
/// of the hash, which are the ones used.
fn hash(first: &[u8], then: &[u8]) -> [u8; 8] {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in first.iter().chain(then) {
        hash = (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    (hash ^ (hash >> 32)).to_be_bytes()
}

/// Returns the first and the last address of a prefix as numbers.
pub fn span(range: IpNet) -> (u128, u128) {
    (number(range.network()), number(range.broadcast()))
}

/// Returns the addresses that are in both prefixes: one contains the other, or they are disjoint.
fn common(one: IpNet, other: IpNet) -> Option<(u128, u128)> {
    match (one.contains(&other), other.contains(&one)) {
        (_, true) => Some(span(one)),
        (true, false) => Some(span(other)),
        (false, false) => None,
    }
}

/// Returns the address of a number in the family of `like`.
pub fn address(like: IpNet, number: u128) -> IpAddr {
    match like {
        IpNet::V4(_) => IpAddr::V4(Ipv4Addr::from_bits(number as u32)),
        IpNet::V6(_) => IpAddr::V6(Ipv6Addr::from_bits(number)),
    }
}

fn number(at: IpAddr) -> u128 {
    match at {
        IpAddr::V4(at) => at.to_bits().into(),
        IpAddr::V6(at) => at.to_bits(),
    }
}

fn is_ipv4(at: IpAddr) -> bool {
    at.is_ipv4()
}

fn host_bits(range: IpNet) -> u8 {
    range.max_prefix_len() - range.prefix_len()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn subnet(text: &str) -> Subnet {
        new_subnet(net(text)).unwrap()
    }

    /// Picks addresses until none is left.
    fn exhaust(blocks: &[IpNet], subnet: &Subnet, mut cursor: Option<IpAddr>) -> BTreeSet<IpAddr> {
        let mut in_use = BTreeSet::new();
        while let Some(at) = allocate(blocks, subnet, |at| in_use.contains(&at), cursor) {
            assert!(is_usable(at, subnet), "{at} of {subnet:?}");
            assert!(blocks.iter().any(|block| block.contains(&at)), "{at} of {blocks:?}");
            assert!(in_use.insert(at), "{at} twice");
            cursor = Some(at);
        }
        in_use
    }

    #[test]
    fn blocks_have_a_sensible_length() {
        let cases = [
            ("10.0.0.0/8", 24),
            ("10.1.0.0/16", 24),
            ("10.1.0.0/20", 28),
            ("10.1.4.0/24", 29),
            ("10.1.4.0/26", 31),
            ("10.1.4.0/28", 32),
            ("10.1.4.0/30", 32),
            ("fd00::/48", 112),
            ("fd00::/64", 112),
            ("fd00::/112", 120),
            ("fd00::/126", 128),
        ];
        for (prefix, length) in cases {
            assert_eq!(default_block_length(net(prefix)), length, "{prefix}");
        }
    }

    #[test]
    fn special_and_too_small_subnets_are_rejected() {
        let special = [
            "0.0.0.0/0",
            "0.1.0.0/16",
            "127.1.0.0/16",
            "169.254.4.0/24",
            "168.0.0.0/7",
            "239.0.0.0/24",
            "240.0.0.0/4",
            "::/64",
            "::/0",
            "::ffff:10.0.0.0/120",
            "fe80::/64",
            "ff05::/64",
        ];
        for prefix in special {
            assert!(matches!(validate_subnet(net(prefix)), Err(SubnetError::Special { .. })), "{prefix}");
        }
        for prefix in ["10.0.0.0/31", "10.0.0.1/32", "fd00::/127", "fd00::/128"] {
            assert_eq!(validate_subnet(net(prefix)), Err(SubnetError::TooSmall(net(prefix))));
        }
        let error = validate_subnet(net("10.1.4.1/24")).unwrap_err();
        assert_eq!(error.to_string(), "subnet 10.1.4.1/24 has host bits set; did you mean 10.1.4.0/24?");
        for prefix in ["10.0.0.0/8", "192.168.1.0/30", "100.64.0.0/10", "fd00::/64", "2001:db8::/126"] {
            assert_eq!(validate_subnet(net(prefix)), Ok(()));
        }
    }

    #[test]
    fn growing_subnet_keeps_its_gateway_and_block_length() {
        let old = subnet("10.1.4.0/24");
        let new = can_grow(&old, net("10.1.0.0/16")).unwrap();
        assert_eq!(new.gateway, "10.1.4.1".parse::<IpAddr>().unwrap());
        assert_eq!(new.block_length, 29);
        assert_eq!(usable(&new), 65536 - 3);
        assert!(is_usable("10.1.0.1".parse().unwrap(), &new));
        assert!(is_usable("10.1.4.0".parse().unwrap(), &new));
        assert!(!is_usable("10.1.4.1".parse().unwrap(), &new));
        assert_eq!(usable_in_block(net("10.1.4.0/29"), &new), 7);
        assert_eq!(usable_in_block(net("10.1.0.0/29"), &new), 7);
        for not in ["10.1.5.0/24", "10.1.4.0/25", "fd00::/64"] {
            assert!(matches!(can_grow(&old, net(not)), Err(SubnetError::NotLarger { .. })), "{not}");
        }
        assert_eq!(can_grow(&old, old.prefix), Ok(old));
    }

    #[test]
    fn released_address_is_not_reused_at_once() {
        let subnet = subnet("10.1.4.0/24");
        let blocks = [net("10.1.4.8/29"), net("10.1.4.0/29")];
        let mut in_use = BTreeSet::new();
        let first = allocate(&blocks, &subnet, |at| in_use.contains(&at), None).unwrap();
        assert_eq!(first.to_string(), "10.1.4.2");
        let next = allocate(&blocks, &subnet, |at| in_use.contains(&at), Some(first)).unwrap();
        assert_eq!(next.to_string(), "10.1.4.3");
        in_use.extend((3..16).map(|last| IpAddr::from([10, 1, 4, last])));
        let again = allocate(&blocks, &subnet, |at| in_use.contains(&at), Some("10.1.4.15".parse().unwrap()));
        assert_eq!(again, Some(first));
        in_use.insert(first);
        assert_eq!(allocate(&blocks, &subnet, |at| in_use.contains(&at), Some(first)), None);
    }

    #[test]
    fn huge_block_costs_no_more() {
        let subnet = subnet("fd00::/64");
        let mut in_use = BTreeSet::new();
        for _ in 0..1000 {
            let at = allocate(&[subnet.prefix], &subnet, |at| in_use.contains(&at), None).unwrap();
            assert!(in_use.insert(at));
        }
        let last: IpAddr = "fd00::ffff:ffff:ffff:ffff".parse().unwrap();
        assert_eq!(
            allocate(&[subnet.prefix], &subnet, |at| in_use.contains(&at), Some(last)).unwrap(),
            "fd00::3ea".parse::<IpAddr>().unwrap()
        );
        assert_eq!(usable(&subnet), (1 << 64) - 2);
    }

    #[test]
    fn mac_address_derives_from_the_address() {
        let network = NetworkId([1, 2, 3, 4, 5]);
        let mac = mac_of(network, "10.1.4.2".parse().unwrap());
        assert_eq!(mac.0[0], 0x02);
        assert_eq!(mac.0[2..], [10, 1, 4, 2]);
        let v6: BTreeSet<Mac> =
            (0..10_000_u128).map(|at| mac_of(network, IpAddr::V6(Ipv6Addr::from_bits(at)))).collect();
        assert_eq!(v6.len(), 10_000);
        assert!(v6.iter().all(|mac| mac.0[0] == 0x02 && *mac != Mac::of_gateway(network)));
    }

    proptest! {
        #[test]
        fn every_usable_address_is_picked_once(
            at: u32, length in 22_u8..=30, v6: bool, blocks in 1_usize..6, start: u16, grown in 0_u8..4,
        ) {
            let bits = 32 - length;
            let small = if v6 {
                IpNet::V6(Ipv6Net::new_assert(Ipv6Addr::from_bits((0xfd00 << 112) | u128::from(at)), 128 - bits))
            } else {
                IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::from_bits((10 << 24) | (at >> 8)), length))
            };
            let mut subnet = new_subnet(small.trunc()).unwrap();
            if let Ok(large) = IpNet::new(small.addr(), small.prefix_len() - grown.min(bits / 3)) {
                subnet = can_grow(&subnet, large.trunc()).unwrap();
            }
            let all = exhaust(&[subnet.prefix], &subnet, Some(address(subnet.prefix, span(subnet.prefix).0 + u128::from(start))));
            prop_assert_eq!(all.len() as u128, usable(&subnet));

            let held: Vec<IpNet> = subnet.prefix.subnets(subnet.block_length).unwrap().step_by(3).take(blocks).collect();
            let some = exhaust(&held, &subnet, None);
            let expected: u128 = held.iter().map(|block| usable_in_block(*block, &subnet)).sum();
            prop_assert_eq!(some.len() as u128, expected);
        }
    }
}
