//! Services: their addresses and ports, what the kernel holds for them, and which host announces LoadBalancers.

pub mod allocation;
mod divert;
mod elements;
pub mod ingress;

pub use elements::{Services, inside};
