//! `bench tunnel`: the encryption figures. ovl's encrypted networks and other userspace tunnels in labs side
//! by side, in alternating rounds.

pub(super) mod detours;
pub(super) mod fan_out;
mod ground;
pub(super) mod load;
mod nebula;
mod ovl;
pub(super) mod packets;
pub(super) mod peers;
pub(crate) mod processes;
pub(super) mod round_trip;
pub(super) mod streams;
mod system;
#[cfg(test)]
mod tests;
mod tinc;
mod uapi;
mod wireguard;

/// MTU of the peers' interfaces: that of ovl's routed networks on an IPv4 underlay with 1500 bytes (60 bytes
/// overhead).
const MTU: u32 = 1440;
