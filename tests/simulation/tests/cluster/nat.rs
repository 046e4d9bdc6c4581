//! NAT boxes in memory, one for each host behind NAT (RFC 4787).

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

/// How a box maps and filters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// One outer port for all destinations. Each address and port that was sent to may answer.
    PortRestricted,
    /// The same, with an outer port for each destination.
    Symmetric,
}

/// The box of one host.
#[derive(Debug)]
pub(crate) struct Nat {
    kind: Kind,
    outer: IpAddr,
    /// The outer port of each inner socket, for each destination if they have ports of their own.
    outward: BTreeMap<(SocketAddr, Option<SocketAddr>), u16>,
    inward: BTreeMap<u16, SocketAddr>,
    /// The outer ports, each with where it has sent to.
    contacted: BTreeSet<(u16, SocketAddr)>,
    next_port: u16,
}

impl Nat {
    pub(crate) fn new(kind: Kind, outer: IpAddr) -> Self {
        let (outward, inward, contacted) = (BTreeMap::new(), BTreeMap::new(), BTreeSet::new());
        Self { kind, outer, outward, inward, contacted, next_port: 1024 }
    }

    pub(crate) fn outer(&self) -> IpAddr {
        self.outer
    }

    /// The outer socket of what an inner one sends.
    pub(crate) fn send(&mut self, from: SocketAddr, to: SocketAddr) -> SocketAddr {
        let key = (from, (self.kind == Kind::Symmetric).then_some(to));
        let next = &mut self.next_port;
        let port = *self.outward.entry(key).or_insert_with(|| {
            *next = next.checked_add(1).unwrap_or(1024);
            *next
        });
        self.inward.insert(port, from);
        self.contacted.insert((port, to));
        SocketAddr::new(self.outer, port)
    }

    /// The inner socket that gets what comes to an outer port. `None` if it is not let in.
    pub(crate) fn receive(&self, port: u16, from: SocketAddr) -> Option<SocketAddr> {
        self.contacted.contains(&(port, from)).then(|| self.inward.get(&port).copied())?
    }

    /// Forgets all mappings, as a box that is switched off and on. Ports are not used again.
    pub(crate) fn forget(&mut self) {
        self.outward.clear();
        self.inward.clear();
        self.contacted.clear();
    }
}
