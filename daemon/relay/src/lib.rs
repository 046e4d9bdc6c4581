//! Datagrams between hosts that cannot reach each other, through members that reach both.
//!
//! A *detour* stands in for the path to a host: a UDP socket of this host, to which WireGuard sends as if it were that host. What
//! it gets goes in a [frame] to a *relay*, which passes it on to the host, or to the next relay. There it comes out of the
//! detour to this host, so WireGuard answers the same way. Relays see who talks to whom, and how much.
//!
//! The engine knows nothing of clusters: it is told the next hop to each host.

mod engine;
pub mod frame;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod limits;
mod run;
mod tcp;

pub use engine::{Counters, Detour, Relay, RelayConfig};
/// The number of bytes by which a datagram is longer on the way through relays.
pub const OVERHEAD: u16 = 36;
const _: () = assert!(OVERHEAD as usize == frame::HEADER);

pub use frame::{Channel, HostId, RelayKey};
pub use tcp::{Cipher, TcpCounters, TcpPath};
