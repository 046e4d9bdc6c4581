//! WireGuard inside a process, for hosts whose kernel has none: it does what the kernel's device does,
//! and speaks the same protocol.
//!
//! An [`Engine`] has interfaces (each a TUN device, a UDP socket and a private key, with peers and the
//! addresses that each may use) and switched networks (each a TAP device, with what is behind which
//! host). Frames of switched networks travel as VXLAN inside of the tunnel, so a host whose kernel
//! does it all understands them; the engine itself puts the headers on and takes them off.
//!
//! The engine knows nothing of clusters, records or netlink. Its devices live as long as it does.

mod api;
mod checksum;
mod cut;
mod engine;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod interface;
mod join;
mod packet;
mod peers;
#[cfg(test)]
mod roundtrip;
mod switch;
mod sys;

pub use api::{
    Drops, InterfaceConfig, InterfaceState, Mac, PeerConfig, PeerStatus, PrivateKey, PublicKey, Source,
    State, TapState, public_key,
};
pub use engine::Engine;
