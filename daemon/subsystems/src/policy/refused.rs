//! Decodes the sets in which the kernel counts refused packets.
//!
//! The module owns no state: the sets are in the kernel. Begin to read at [`Counter`].

use std::net::IpAddr;

use super::Direction;
use super::rules::{counted, remembered};

/// A pair of sets that count refused packets: by endpoint and by connection, for one direction and address family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counter {
    /// The direction of the policies that refused the packets.
    pub direction: Direction,
    v4: bool,
}

/// A connection that was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection {
    /// The source.
    pub from: IpAddr,
    /// The destination.
    pub to: IpAddr,
    /// The IP protocol number.
    pub protocol: u8,
    /// The destination port. 0 if the protocol has none.
    pub port: u16,
}

/// The time for which a refused connection is kept after its last packet, in milliseconds.
pub const REMEMBERED_MS: u64 = 600_000;

impl Counter {
    /// Returns the counters of all directions and address families.
    pub fn all() -> [Self; 4] {
        let [ingress, egress] = Direction::ALL;
        [(ingress, true), (ingress, false), (egress, true), (egress, false)]
            .map(|(direction, v4)| Self { direction, v4 })
    }

    /// Returns the name of the set that counts packets by the isolated endpoint's address.
    pub fn by_endpoint(self) -> String {
        counted(self.direction, self.v4)
    }

    /// Returns the name of the set that counts packets by connection.
    pub fn by_connection(self) -> String {
        remembered(self.direction, self.v4)
    }

    /// Decodes the key of an element of the set by endpoint. `None` if its length is wrong.
    pub fn address(self, key: &[u8]) -> Option<IpAddr> {
        if self.v4 {
            <[u8; 4]>::try_from(key).ok().map(IpAddr::from)
        } else {
            <[u8; 16]>::try_from(key).ok().map(IpAddr::from)
        }
    }

    /// Decodes the key of an element of the set by connection. `None` if its length is wrong.
    pub fn connection(self, key: &[u8]) -> Option<Connection> {
        let length = if self.v4 { 4 } else { 16 };
        let (from, rest) = key.split_at_checked(length)?;
        let (to, rest) = rest.split_at_checked(length)?;
        let [protocol, _, _, _, high, low, ..] = *rest else { return None };
        let port = u16::from_be_bytes([high, low]);
        Some(Connection { from: self.address(from)?, to: self.address(to)?, protocol, port })
    }
}
