//! Permanent neighbours: which MAC address an address has.

use std::fmt;
use std::net::IpAddr;

use ovl_proto::id::Mac;

use crate::device::Device;
use crate::state::Dataplane;

/// A change of the neighbours on a device of ovl.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NeighbourOp {
    /// An address has this MAC address.
    Set(Device, IpAddr, Mac),
    /// Deletes the neighbour.
    Delete(Device, IpAddr),
}

impl NeighbourOp {
    /// The device that the neighbour is on.
    pub fn device(&self) -> Device {
        let (Self::Set(device, _, _) | Self::Delete(device, _)) = self;
        *device
    }

    /// Does to `state` what the kernel does.
    pub fn apply_to(&self, state: &mut Dataplane) {
        match self {
            Self::Set(device, address, mac) => {
                state.neighbours.insert((*device, *address), *mac);
            }
            Self::Delete(device, address) => {
                state.neighbours.remove(&(*device, *address));
            }
        }
    }
}

impl fmt::Display for NeighbourOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Set(device, address, mac) => {
                write!(f, "ip neigh replace {address} lladdr {mac} dev {device} nud permanent")
            }
            Self::Delete(device, address) => write!(f, "ip neigh del {address} dev {device}"),
        }
    }
}
