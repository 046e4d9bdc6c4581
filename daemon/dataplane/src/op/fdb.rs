//! Entries of forwarding databases: where frames for a MAC address go.

use std::fmt;

use ovl_proto::id::Mac;

use crate::device::Device;
use crate::state::{Dataplane, Remote};

/// A change of a forwarding database.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FdbOp {
    /// Sends frames for a MAC address to a VTEP.
    SetRemote(Device, Mac, Remote),
    /// Deletes the entry of a MAC address behind a VTEP.
    DeleteRemote(Device, Mac),
    /// Sends broadcast and multicast to a VTEP too.
    AddFlood(Device, Remote),
    /// Sends broadcast and multicast to a VTEP no longer.
    DeleteFlood(Device, Remote),
    /// Sends frames for the MAC address of a multicast group to a VTEP too, and no longer to those that get all others.
    AddGroup(Device, Mac, Remote),
    /// Sends frames for the MAC address of a multicast group to a VTEP no longer.
    DeleteGroup(Device, Mac, Remote),
    /// A MAC address is behind this port of its bridge.
    AddPort(Device, Mac),
    /// Deletes the entry of a MAC address behind a port.
    DeletePort(Device, Mac),
}

impl FdbOp {
    /// The VXLAN device, or the port of a bridge.
    pub fn device(&self) -> Device {
        match self {
            Self::SetRemote(device, _, _)
            | Self::DeleteRemote(device, _)
            | Self::AddFlood(device, _)
            | Self::DeleteFlood(device, _)
            | Self::AddGroup(device, _, _)
            | Self::DeleteGroup(device, _, _)
            | Self::AddPort(device, _)
            | Self::DeletePort(device, _) => *device,
        }
    }

    /// Whether it is about the VXLAN device itself (`self`), and not about a port of a bridge (`master`).
    pub fn is_remote(&self) -> bool {
        match self {
            Self::SetRemote(..)
            | Self::DeleteRemote(..)
            | Self::AddFlood(..)
            | Self::DeleteFlood(..)
            | Self::AddGroup(..)
            | Self::DeleteGroup(..) => true,
            Self::AddPort(..) | Self::DeletePort(..) => false,
        }
    }

    /// Whether it deletes an entry.
    pub fn is_deletion(&self) -> bool {
        match self {
            Self::DeleteRemote(..) | Self::DeleteFlood(..) | Self::DeleteGroup(..) | Self::DeletePort(..) => {
                true
            }
            Self::SetRemote(..) | Self::AddFlood(..) | Self::AddGroup(..) | Self::AddPort(..) => false,
        }
    }

    /// Does to `state` what the kernel does.
    pub fn apply_to(&self, state: &mut Dataplane) {
        match self {
            Self::SetRemote(device, mac, remote) => {
                state.remotes.insert((*device, *mac), *remote);
            }
            Self::DeleteRemote(device, mac) => {
                state.remotes.remove(&(*device, *mac));
            }
            Self::AddFlood(device, remote) => {
                state.floods.insert((*device, *remote));
            }
            Self::DeleteFlood(device, remote) => {
                state.floods.remove(&(*device, *remote));
            }
            Self::AddGroup(device, mac, remote) => {
                state.groups.insert((*device, *mac, *remote));
            }
            Self::DeleteGroup(device, mac, remote) => {
                state.groups.remove(&(*device, *mac, *remote));
            }
            Self::AddPort(device, mac) => {
                state.ports.insert((*device, *mac));
            }
            Self::DeletePort(device, mac) => {
                state.ports.remove(&(*device, *mac));
            }
        }
    }
}

impl fmt::Display for FdbOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::SetRemote(device, mac, remote) => {
                write!(f, "bridge fdb replace {mac} dev {device} self static {}", To(*remote))
            }
            Self::DeleteRemote(device, mac) => write!(f, "bridge fdb del {mac} dev {device} self"),
            Self::AddFlood(device, remote) => {
                write!(f, "bridge fdb append 00:00:00:00:00:00 dev {device} self static {}", To(*remote))
            }
            Self::DeleteFlood(device, remote) => {
                write!(f, "bridge fdb del 00:00:00:00:00:00 dev {device} self {}", To(*remote))
            }
            Self::AddGroup(device, mac, remote) => {
                write!(f, "bridge fdb append {mac} dev {device} self static {}", To(*remote))
            }
            Self::DeleteGroup(device, mac, remote) => {
                write!(f, "bridge fdb del {mac} dev {device} self {}", To(*remote))
            }
            Self::AddPort(device, mac) => write!(f, "bridge fdb replace {mac} dev {device} master static"),
            Self::DeletePort(device, mac) => write!(f, "bridge fdb del {mac} dev {device} master"),
        }
    }
}

/// `dst` and `port` of a VXLAN entry.
struct To(Remote);

impl fmt::Display for To {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dst {} port {}", self.0.vtep, self.0.port)
    }
}
