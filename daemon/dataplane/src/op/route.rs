//! Routes of our protocol and metric.

use std::fmt;

use ipnet::IpNet;

use crate::device::Device;
use crate::state::{Dataplane, Hop, METRIC, PROTOCOL};

/// A change of our routes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteOp {
    /// Sets the route to a destination.
    Set(IpNet, Hop),
    /// Deletes the route to a destination.
    Delete(IpNet),
}

impl RouteOp {
    /// The device of ovl that the route names. None if it names none, or is deleted.
    pub fn device(&self) -> Option<Device> {
        match self {
            Self::Set(_, hop) => hop.device,
            Self::Delete(_) => None,
        }
    }

    /// Does to `state` what the kernel does.
    pub fn apply_to(&self, state: &mut Dataplane) {
        match self {
            Self::Set(to, hop) => {
                state.routes.insert(*to, *hop);
            }
            Self::Delete(to) => {
                state.routes.remove(to);
            }
        }
    }
}

impl fmt::Display for RouteOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Set(to, hop) => set_route(f, *to, hop),
            Self::Delete(to) => write!(f, "ip route del {to} proto {PROTOCOL} metric {METRIC}"),
        }
    }
}

fn set_route(f: &mut fmt::Formatter<'_>, to: IpNet, hop: &Hop) -> fmt::Result {
    f.write_str("ip route replace ")?;
    if *hop == Hop::UNREACHABLE {
        f.write_str("unreachable ")?;
    }
    write!(f, "{to}")?;
    if let Some(gateway) = hop.gateway {
        write!(f, " via {gateway}")?;
    }
    if let Some(device) = hop.device {
        write!(f, " dev {device}")?;
        f.write_str(if hop.gateway.is_some() { " onlink" } else { " scope link" })?;
    }
    if let Some(source) = hop.source {
        write!(f, " src {source}")?;
    }
    if let Some(mtu) = hop.mtu {
        write!(f, " mtu {mtu}")?;
    }
    write!(f, " proto {PROTOCOL} metric {METRIC}")
}
