//! The addresses at which endpoints reach the resolver of their host, and the port on the host that two tables name.

use std::net::{Ipv4Addr, Ipv6Addr};

/// Where endpoints find their resolver, as in Docker's networks.
pub const LOOPBACK: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);
/// What stands for it on the host: link-local, the same on all hosts and on all networks' bridges.
pub const ADDRESS_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 79, 53);
/// The same for endpoints without an IPv4 address, who ask at this one; unique-local (RFC 4193).
pub const ADDRESS_V6: Ipv6Addr = Ipv6Addr::new(0xfd6f, 0x766c, 0, 0, 0, 0, 0, 0x53);

/// The port on which ovld listens for queries that an endpoint sends from 127.0.0.1. Answers from it go back to that address.
pub const PORT_FROM_LOCALHOST: u16 = 7957;
