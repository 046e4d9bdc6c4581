//! A change of the fast path. No command does that: it prints as a comment.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;

use crate::device::Device;
use crate::fast::{Fast, FastHost, FastPod, FastRoute, FastVxlan};
use crate::state::Dataplane;

/// A change of what the programs of the fast path know, or of where they are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FastOp {
    /// Loads the programs if they are not loaded, and tells them of this host.
    SetHost(FastHost),
    /// Detaches the programs from all devices, and deletes their maps.
    Unload,
    /// Adds or replaces an endpoint.
    SetPod(IpAddr, FastPod),
    /// Deletes an endpoint.
    DeletePod(IpAddr),
    /// Adds or replaces a block of another host.
    SetPath(IpNet, FastRoute),
    /// Deletes a block of another host.
    DeletePath(IpNet),
    /// Attaches the programs to a device. The kernel takes some milliseconds, so that is done in the background.
    Attach(Device),
    /// Detaches the programs from a device.
    Detach(Device),
}

impl FastOp {
    /// The device that it is about. `None` if it needs none: what is taken away may have lost its device before.
    pub fn device(&self) -> Option<Device> {
        match self {
            Self::SetPod(_, pod) => Some(pod.device),
            Self::Attach(device) => Some(*device),
            Self::SetHost(_)
            | Self::Unload
            | Self::Detach(_)
            | Self::DeletePod(_)
            | Self::SetPath(..)
            | Self::DeletePath(_) => None,
        }
    }

    /// Does to `state` what the kernel does.
    pub fn apply_to(&self, state: &mut Dataplane) {
        let fast = &mut state.fast;
        match self {
            Self::SetHost(host) => fast.host = Some(*host),
            Self::Unload => *fast = Fast::default(),
            Self::SetPod(at, pod) => {
                fast.pods.insert(*at, *pod);
            }
            Self::DeletePod(at) => {
                fast.pods.remove(at);
            }
            Self::SetPath(to, path) => {
                fast.paths.insert(*to, *path);
            }
            Self::DeletePath(to) => {
                fast.paths.remove(to);
            }
            Self::Attach(device) => {
                fast.hooks.insert(*device);
            }
            Self::Detach(device) => {
                fast.hooks.remove(device);
            }
        }
    }
}

impl fmt::Display for FastOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "# fast path: ")?;
        match self {
            Self::SetHost(FastHost { on, underlay, vtep, port }) => {
                let switch = if *on { "on" } else { "off for now" };
                write!(f, "{switch}, underlay {underlay}")?;
                vtep.map_or(Ok(()), |vtep| write!(f, ", VXLAN from {vtep} port {port}"))
            }
            Self::Unload => write!(f, "unload the programs"),
            Self::SetPod(at, FastPod { device, fast, selected, .. }) => {
                let how = match (fast, selected) {
                    (false, _) => ", by the stack",
                    (true, true) => ", judged by the stack",
                    (true, false) => "",
                };
                write!(f, "{at} is {device}{how}")
            }
            Self::DeletePod(at) => write!(f, "forget {at}"),
            Self::SetPath(to, FastRoute { mtu, vxlan: None, .. }) => {
                write!(f, "{to} by its route, mtu {mtu}")
            }
            Self::SetPath(to, FastRoute { mtu, vxlan: Some(FastVxlan { vtep, port, vni, .. }), .. }) => {
                write!(f, "{to} by VXLAN {vni} to {vtep} port {port}, mtu {mtu}")
            }
            Self::DeletePath(to) => write!(f, "forget {to}"),
            Self::Attach(device) => write!(f, "attach to {device}"),
            Self::Detach(device) => write!(f, "detach from {device}"),
        }
    }
}
