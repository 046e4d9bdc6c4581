//! What carries encrypted networks: the tunnel between hosts, and its keys while they are rotated.

pub mod epochs;
pub mod tunnel;
