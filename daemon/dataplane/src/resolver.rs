//! The addresses at which endpoints reach the resolver of their host.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Where endpoints find their resolver, as in Docker's networks.
pub const LOOPBACK: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
/// What stands for it on the host: link-local, the same on all hosts and on all networks' bridges.
pub const ADDRESS_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 79, 53);
/// The same for endpoints without an IPv4 address, who ask at this one; unique-local (RFC 4193).
pub const ADDRESS_V6: Ipv6Addr = Ipv6Addr::new(0xfd6f, 0x766c, 0, 0, 0, 0, 0, 0x53);
