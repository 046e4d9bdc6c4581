//! The state of the cluster: owner tables ([`table`]), cluster objects ([`objects`], [`resources`]), liveness
//! ([`liveness`]), and the whole as one host sees it ([`view`]). Every subsystem reads it; this crate knows no
//! subsystem. It has no clock and no I/O.

pub mod addresses;
pub mod backends;
pub mod claims;
pub mod digest;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod index;
pub mod keys;
mod labels;
pub mod liveness;
pub mod networks;
pub mod objects;
pub mod pods;
pub mod resources;
pub mod selectables;
pub mod table;
pub mod view;
