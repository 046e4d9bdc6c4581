//! `bench tunnel`: the figures that issue 4 asks for. ovl's encrypted networks and other tunnels that run in
//! a process, in labs side by side, in turns.

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

/// Of the peers' interfaces: what ovl's routed networks have on an underlay of 1500 bytes and IPv4, 60 less.
const MTU: u32 = 1440;
