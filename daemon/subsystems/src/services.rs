//! Services: their addresses and ports, what the kernel holds for them, and which host announces LoadBalancers.

pub mod allocation;
mod announcements;
mod divert;
mod elements;
pub mod ingress;
mod translation;

pub use announcements::Announcements;
pub use elements::{Services, inside};
pub use translation::Translation;
