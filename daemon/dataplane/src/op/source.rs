//! Which host may use a MAC address as source inside the tunnel. No command does that: it prints as a comment.

use std::fmt;

use ovl_proto::id::Mac;

use crate::device::Device;
use crate::state::{Dataplane, Source};

/// A change of the sources that an encrypted switched network takes frames from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceOp {
    /// A host may use a MAC address as source.
    Set(Device, Mac, Source),
    /// No host may.
    Delete(Device, Mac),
}

impl SourceOp {
    /// The VXLAN device of the network.
    pub fn device(&self) -> Device {
        let (Self::Set(device, _, _) | Self::Delete(device, _)) = self;
        *device
    }

    /// Does to `state` what the kernel does.
    pub fn apply_to(&self, state: &mut Dataplane) {
        match self {
            Self::Set(device, mac, source) => {
                state.sources.insert((*device, *mac), source.clone());
            }
            Self::Delete(device, mac) => {
                state.sources.remove(&(*device, *mac));
            }
        }
    }
}

impl fmt::Display for SourceOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Set(device, mac, Source { from, addresses }) => {
                write!(f, "# {device}: frames from {mac} are")?;
                from.iter().try_for_each(|host| write!(f, " {host}'s"))?;
                addresses.iter().try_for_each(|address| write!(f, " {address}"))
            }
            Self::Delete(device, mac) => write!(f, "# {device}: frames from {mac} are nobody's"),
        }
    }
}
