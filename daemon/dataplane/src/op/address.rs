//! Addresses on our devices.

use std::fmt;

use ipnet::IpNet;

use crate::device::Device;
use crate::state::Dataplane;

/// A change of the addresses of a device of ovl.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressOp {
    /// Gives a device an address.
    Add(Device, IpNet),
    /// Takes it away.
    Delete(Device, IpNet),
}

impl AddressOp {
    /// The device that has the address.
    pub fn device(&self) -> Device {
        let (Self::Add(device, _) | Self::Delete(device, _)) = self;
        *device
    }

    /// Does to `state` what the kernel does.
    pub fn apply_to(&self, state: &mut Dataplane) {
        match self {
            Self::Add(device, address) => {
                state.addresses.insert((*device, *address));
            }
            Self::Delete(device, address) => {
                state.addresses.remove(&(*device, *address));
            }
        }
    }
}

impl fmt::Display for AddressOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Add(device, address) => write!(f, "ip addr replace {address} dev {device}"),
            Self::Delete(device, address) => write!(f, "ip addr del {address} dev {device}"),
        }
    }
}
