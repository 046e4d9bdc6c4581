//! What was refused: the sets in which the kernel counts it, and what their elements say.

use std::net::IpAddr;

use super::Direction;
use super::rules::{counted, remembered};

/// One of these sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counter {
    /// Whose policies.
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
    /// The number of its protocol.
    pub protocol: u8,
    /// Of the destination; 0 where there is none.
    pub port: u16,
}

/// A connection is remembered for so many milliseconds after its last packet.
pub const REMEMBERED_MS: u64 = 600_000;

impl Counter {
    /// All of them.
    pub fn all() -> [Self; 4] {
        let [ingress, egress] = Direction::ALL;
        [(ingress, true), (ingress, false), (egress, true), (egress, false)]
            .map(|(direction, v4)| Self { direction, v4 })
    }

    /// The set that counts packets by the isolated endpoint's address.
    pub fn by_endpoint(self) -> String {
        counted(self.direction, self.v4)
    }

    /// The set that counts packets by connection.
    pub fn by_connection(self) -> String {
        remembered(self.direction, self.v4)
    }

    /// The address that an element's key is.
    pub fn address(self, key: &[u8]) -> Option<IpAddr> {
        if self.v4 {
            <[u8; 4]>::try_from(key).ok().map(IpAddr::from)
        } else {
            <[u8; 16]>::try_from(key).ok().map(IpAddr::from)
        }
    }

    /// The connection that an element's key is.
    pub fn connection(self, key: &[u8]) -> Option<Connection> {
        let length = if self.v4 { 4 } else { 16 };
        let (from, rest) = key.split_at_checked(length)?;
        let (to, rest) = rest.split_at_checked(length)?;
        let [protocol, _, _, _, high, low, ..] = *rest else { return None };
        let port = u16::from_be_bytes([high, low]);
        Some(Connection { from: self.address(from)?, to: self.address(to)?, protocol, port })
    }
}
