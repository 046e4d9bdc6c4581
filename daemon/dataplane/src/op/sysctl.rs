//! Settings under `net.`.

use std::fmt;

use crate::device::Device;
use crate::state::Dataplane;

/// The mark of packets to 127.0.0.0/8 that may enter by a device with `route_localnet`: answers to the host, which the
/// kernel translates back before they enter where bridges call the packet filter.
pub const ANSWERS_LOCALHOST: u32 = 0x4000;

/// A change of a setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SysctlOp {
    /// Sets one for the host.
    Set {
        /// Its name with dots.
        name: String,
        /// The value.
        value: String,
    },
    /// Lets packets from 127.0.0.1 leave by a device (`route_localnet`).
    AllowLocalnet(Device),
    /// Keeps packets from 127.0.0.1 from leaving by a device.
    ForbidLocalnet(Device),
}

impl SysctlOp {
    /// The device that the setting is of. None if it is of the host.
    pub fn device(&self) -> Option<Device> {
        match self {
            Self::Set { .. } => None,
            Self::AllowLocalnet(device) | Self::ForbidLocalnet(device) => Some(*device),
        }
    }

    /// Does to `state` what the kernel does.
    pub fn apply_to(&self, state: &mut Dataplane) {
        match self {
            Self::Set { name, value } => {
                state.sysctls.insert(name.clone(), value.clone());
            }
            Self::AllowLocalnet(device) => {
                state.localnets.insert(*device);
            }
            Self::ForbidLocalnet(device) => {
                state.localnets.remove(device);
            }
        }
    }
}

impl fmt::Display for SysctlOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Set { name, value } => write!(f, "sysctl -w {name}={value}"),
            Self::AllowLocalnet(device) => write!(f, "sysctl -w net.ipv4.conf.{device}.route_localnet=1"),
            Self::ForbidLocalnet(device) => write!(f, "sysctl -w net.ipv4.conf.{device}.route_localnet=0"),
        }
    }
}
