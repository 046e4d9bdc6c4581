//! UDP has no connections that end: what is remembered of its flows leads where it led, for as long as something is
//! sent. So when a port leads elsewhere, they are ended.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

/// UDP at a port of a Service's or of this host: what leads elsewhere than it should is to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flows {
    /// The address; none: any of this host's.
    pub address: Option<IpAddr>,
    /// The port there.
    pub port: u16,
    /// Where it leads now; of one family.
    pub keep: BTreeSet<(IpAddr, u16)>,
    /// Whether it is about IPv4.
    pub ipv4: bool,
    /// Whether no program of the host's own can have the port at any of its addresses: then what leads to the host
    /// itself is older than that.
    pub held: bool,
}

impl fmt::Display for Flows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.ipv4 { "ipv4" } else { "ipv6" };
        write!(f, "conntrack -D -f {family} -p udp")?;
        if !self.held {
            write!(f, " --dst-nat")?;
        }
        if let Some(address) = self.address {
            write!(f, " --orig-dst {address}")?;
        }
        write!(f, " --orig-port-dst {} # but for {} backends", self.port, self.keep.len())
    }
}
