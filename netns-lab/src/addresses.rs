//! The lab's address plan.
//!
//! | network | IPv4 | IPv6 |
//! | --- | --- | --- |
//! | underlay | 192.168.77.0/24 | fd77::/64 |
//! | LAN behind each NAT box | 192.168.1.0/24 | of the underlay, each host's address alone |
//! | between a carrier's box and those behind it | 100.64.0.0/24 (RFC 6598) | |
//!
//! All LANs have the same prefix, as those of most homes do; hosts are numbered across LANs.

use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// The address families of the underlay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Underlay {
    /// IPv4: 192.168.77.i/24.
    #[default]
    V4,
    /// IPv6: fd77::i/64.
    V6,
    /// Both; a host advertises its IPv4 address by default.
    Dual,
}

impl Underlay {
    /// Returns whether hosts have an IPv4 address.
    pub fn has_v4(self) -> bool {
        self != Underlay::V6
    }

    /// Returns whether hosts have an IPv6 address.
    pub fn has_v6(self) -> bool {
        self != Underlay::V4
    }
}

/// The most hosts of a lab, and the highest number of an underlay address that hosts and their boxes have.
pub(crate) const MOST_HOSTS: u8 = 250;

/// The gateway's IPv4 address in a LAN.
pub(crate) const LAN_GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 254);

/// The gateway's IPv4 address behind a carrier's box.
pub(crate) const CARRIER_GATEWAY: Ipv4Addr = Ipv4Addr::new(100, 64, 0, 254);

/// The IPv6 address of each gateway.
pub(crate) const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

/// An address of the underlay.
pub(crate) fn underlay_v4(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 77, number)
}

/// An address of the underlay, with the same digits as the IPv4 address: `fd77::10` for 10.
pub(crate) fn underlay_v6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, same_digits(number))
}

/// A box's own IPv6 address, for its ICMP messages.
pub(crate) fn router_v6(number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 1, same_digits(number))
}

/// A host's address in a LAN.
pub(crate) fn lan_v4(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 1, number)
}

/// A box's address behind a carrier's box.
pub(crate) fn carrier_v4(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(100, 64, 0, number)
}

fn same_digits(number: u8) -> u16 {
    // At most three digits, which fit.
    u16::from_str_radix(&number.to_string(), 16).unwrap_or(u16::MAX)
}
