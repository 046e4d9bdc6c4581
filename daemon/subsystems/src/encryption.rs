//! The tunnel between hosts that carries encrypted networks, and the epochs of its keys.
//!
//! [`tunnel`] computes the WireGuard interfaces, peers and routes; [`epochs`] chooses the interface for each peer while
//! keys are rotated. Both own no state: the daemon keeps [`epochs::KeyEpochs`] in [`crate::local::Local`]. Begin to
//! read at [`tunnel::peers`].

pub mod epochs;
pub mod tunnel;
