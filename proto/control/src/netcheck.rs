//! What `ovlctl netcheck` finds of this host's connection to others.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::Severity;

/// The reply to [`crate::Request::Netcheck`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Netcheck {
    /// Whether there is no finding with a severity.
    pub clear: bool,
    /// The NAT that this host is behind.
    pub nat: NatKind,
    /// Where members see this host. Several if that depends on the member, or after NAT with several addresses.
    pub outer: Vec<SocketAddr>,
    /// The address families, IPv4 first.
    pub families: Vec<Family>,
    /// The members that were asked, the nearest first.
    pub members: Vec<NetcheckMember>,
    /// What follows, the most important first.
    pub findings: Vec<NetcheckFinding>,
}

/// The kind of a NAT (RFC 4787).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NatKind {
    /// The name of the kind, as in `docs/connectivity.md`: `none`, `firewall`, `full-cone`, `restricted`, `port-restricted`,
    /// `address-dependent`, `symmetric`, `udp-blocked`, or `unknown`.
    pub kind: String,
    /// Whether addresses are translated. `None` if it is not known.
    pub translates: Option<bool>,
    /// What the outer port depends on. `None` if it is not known.
    pub mapping: Option<Dependence>,
    /// What it depends on whether a datagram is let in. `None` if it is not known.
    pub filtering: Option<Dependence>,
    /// Whether hosts behind it reach one another by its outer address. `None` if it is not known.
    pub hairpin: Option<bool>,
}

/// What a mapping or a filter depends on (RFC 4787, sections 4.1 and 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dependence {
    /// On this host's address and port only.
    EndpointIndependent,
    /// On the address of the other end too.
    AddressDependent,
    /// On the address and the port of the other end too.
    AddressAndPortDependent,
}

/// An address family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Family {
    /// `ipv4` or `ipv6`.
    pub family: String,
    /// Whether this host has a global or private address of it.
    pub has_address: bool,
    /// The number of members that were asked over it.
    pub asked: u32,
    /// The number of those that answered by UDP.
    pub udp: u32,
    /// The number of those that accepted a TCP connection.
    pub tcp: u32,
}

/// A member that was asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetcheckMember {
    /// Its name.
    pub name: String,
    /// The address that was asked.
    pub address: SocketAddr,
    /// The round-trip time, in microseconds. `None` if it is not known.
    pub rtt_us: Option<u64>,
    /// Whether it answered by UDP.
    pub udp: bool,
    /// Whether it accepted a TCP connection.
    pub tcp: bool,
    /// The largest packet that passes to it, in bytes. `None` if it is not known.
    pub path_mtu: Option<u16>,
    /// Whether it would pass on for this host.
    pub relays: bool,
    /// Where it sees this host. `None` if it did not answer by UDP.
    pub seen_at: Option<SocketAddr>,
}

/// Something that follows from what was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetcheckFinding {
    /// How bad it is. `None` if it is not bad.
    pub severity: Option<Severity>,
    /// What is so.
    pub finding: String,
    /// What to do. Empty if nothing needs to be done.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub advice: String,
}
