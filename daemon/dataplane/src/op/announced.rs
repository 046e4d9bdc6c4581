//! Addresses of LoadBalancers, on devices that are not ours.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::device::Device;
use crate::state::{Dataplane, PROTOCOL};

/// A change of the addresses of LoadBalancers that this host answers for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AnnouncedOp {
    /// Answers for an address on a device that is not ours.
    Add(Device, IpAddr),
    /// Answers for it no longer.
    Delete(Device, IpAddr),
}

impl AnnouncedOp {
    /// Does to `state` what the kernel does.
    pub fn apply_to(&self, state: &mut Dataplane) {
        match self {
            Self::Add(device, address) => {
                state.announced.insert((*device, *address));
            }
            Self::Delete(device, address) => {
                state.announced.remove(&(*device, *address));
            }
        }
    }
}

impl fmt::Display for AnnouncedOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Add(device, address) => {
                let rest = if address.is_ipv4() { "scope host" } else { "nodad preferred_lft 0" };
                write!(f, "ip addr add {} dev {device} proto {PROTOCOL} {rest}", IpNet::from(*address))
            }
            Self::Delete(device, address) => {
                write!(f, "ip addr del {} dev {device}", IpNet::from(*address))
            }
        }
    }
}
