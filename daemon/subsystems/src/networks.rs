//! What each network needs on a host: devices, entries, routes, and the base table of the packet filter.

pub mod desired;
pub mod filter;
pub mod mtu;
mod routed;
mod switched;
pub mod touched;
