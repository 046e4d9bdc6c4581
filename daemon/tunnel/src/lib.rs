//! WireGuard in userspace, for hosts whose kernel has no WireGuard. It interoperates with the kernel's
//! WireGuard devices.
//!
//! An [`Engine`] has interfaces (a TUN device, UDP sockets, a private key, and peers with their allowed IPs)
//! and switched networks (a TAP device with forwarding and filter entries). Frames of switched networks
//! travel as VXLAN in the tunnel, so a host that uses the kernel's devices understands them. The engine adds
//! and removes the VXLAN headers itself.
//!
//! The engine knows nothing of clusters, records or netlink. Its devices are deleted with it.

mod api;
mod backend;
mod checksum;
mod cut;
mod engine;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod interface;
mod join;
#[cfg(test)]
mod memory;
mod packet;
mod peers;
#[cfg(test)]
mod roundtrip;
mod segments;

mod switch;
mod sys;
#[cfg(test)]
mod tests;

pub use api::{
    Drops, EngineState, FrameSource, InterfaceConfig, InterfaceState, Mac, PeerConfig, PeerStatus,
    PrivateKey, PublicKey, TapState, public_key,
};
pub use engine::Engine;
pub use ovl_udp::trial::Offload;
