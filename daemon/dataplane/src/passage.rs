//! Where a marked probe was seen on a host, and what dropped it. The kernel crate observes it; the daemon judges it and
//! sends it to the host on which the trace was requested.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// The kind of a probe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProbeKind {
    /// An ICMP echo request.
    Echo,
    /// A TCP segment with SYN to this port.
    Tcp(u16),
    /// A UDP datagram to this port.
    Udp(u16),
}

/// What was seen on one host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Passage {
    /// Packets, in the order in which they were seen.
    pub sightings: Vec<Sighting>,
    /// Rules of packet filters that dropped packets, in that order.
    pub drops: Vec<FilterDrop>,
    /// Why the kernel dropped the probe or an answer to it, such as `the probe: IP_RPFILTER`.
    #[serde(default)]
    pub reasons: Vec<String>,
    /// What could not be observed, in sentences.
    pub notes: Vec<String>,
}

/// A packet that a device sent or received.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sighting {
    /// The time, in microseconds since 1970.
    pub at_us: u64,
    /// Whether it was in the namespace of the workload, and not in that of the host.
    pub inside: bool,
    /// The device.
    pub device: String,
    /// Whether the device sent it.
    pub outgoing: bool,
    /// The source of the packet.
    pub source: IpAddr,
    /// The destination of the packet.
    pub destination: IpAddr,
    /// What the packet is.
    pub kind: PacketKind,
    /// The source and the destination of the VXLAN packet around it.
    pub outer: Option<(IpAddr, IpAddr)>,
}

/// What a packet is for a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PacketKind {
    /// The probe.
    Probe,
    /// An echo reply, or a TCP segment with SYN and ACK.
    Answer,
    /// A TCP segment with RST.
    Reset,
    /// An ICMP error about the probe.
    Error(IcmpError),
}

/// The ICMP errors that are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum IcmpError {
    /// Nothing listens at the port.
    PortUnreachable,
    /// A packet filter refuses the packet.
    Prohibited,
    /// The packet is longer than the path carries: the MTU in bytes, 0 if it is not said.
    TooBig(u32),
    /// It passed too many routers.
    Expired,
    /// There is no route, or no neighbour.
    Unreachable,
}

/// A rule, or the policy of a chain, that dropped a packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterDrop {
    /// The time, in microseconds since 1970.
    pub at_us: u64,
    /// `ip`, `ip6`, `inet`, `bridge` and so on.
    pub family: String,
    /// The table.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// The rule, as `nft list chain` prints it. `None`: the policy of the chain.
    pub rule: Option<String>,
    /// The source of the packet, which may be the VXLAN packet around the probe. `None` if it is not known.
    pub source: Option<IpAddr>,
    /// Whether the packet is an answer, or an error about the probe.
    pub is_answer: bool,
}

impl FilterDrop {
    /// What dropped the packet, for people.
    pub fn by(&self) -> String {
        let Self { family, table, chain, rule, .. } = self;
        match rule {
            Some(rule) => format!("the rule `{rule}` of chain {family} {table} {chain}"),
            None => format!("the policy of chain {family} {table} {chain}"),
        }
    }
}
