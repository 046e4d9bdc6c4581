//! The on-link prefix of this host's underlay address.
//!
//! [`Underlay`] owns the state. Routed networks choose direct routes by it.

use std::net::IpAddr;

use ipnet::IpNet;

/// What this host observes of its underlay.
#[derive(Debug, Clone, Default)]
pub struct Underlay {
    segment: Option<IpNet>,
    by_peers: bool,
}

impl Underlay {
    /// Sets the on-link prefix of this host's underlay address. Returns whether it changed.
    pub fn set_segment(&mut self, prefix: IpNet) -> bool {
        self.segment.replace(prefix.trunc()) != Some(prefix.trunc())
    }

    /// Sets whether the underlay device is the one by which peers are reached, because this host's address is on a
    /// loopback device.
    pub fn set_by_peers(&mut self, by_peers: bool) {
        self.by_peers = by_peers;
    }

    /// Whether another peer may change the underlay device.
    pub fn by_peers(&self) -> bool {
        self.by_peers
    }

    /// Returns the on-link prefix. `None` until it was observed.
    pub fn segment(&self) -> Option<IpNet> {
        self.segment
    }

    /// Whether an address is reached without a router.
    pub fn is_near(&self, address: IpAddr) -> bool {
        self.segment.is_some_and(|segment| segment.contains(&address))
    }
}
