//! The on-link prefix of this host's underlay address.
//!
//! [`Underlay`] owns the state. Routed networks choose direct routes by it.

use std::net::IpAddr;

use ipnet::IpNet;

/// What this host observes of its underlay.
#[derive(Debug, Clone, Default)]
pub struct Underlay {
    segment: Option<IpNet>,
}

impl Underlay {
    /// Sets the on-link prefix of this host's underlay address. Returns whether it changed.
    pub fn set_segment(&mut self, prefix: IpNet) -> bool {
        self.segment.replace(prefix.trunc()) != Some(prefix.trunc())
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
