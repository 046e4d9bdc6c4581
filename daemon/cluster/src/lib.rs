//! What the hosts of a cluster say of themselves and of what they share: owner tables ([`table`]), cluster objects
//! ([`objects`], [`resources`]), liveness ([`liveness`]), and the whole as one host sees it ([`view`]). Every
//! subsystem reads this, and none is known here. No clock, no I/O.

pub mod addresses;
pub mod backends;
pub mod claims;
pub mod digest;
mod index;
pub mod keys;
pub mod liveness;
pub mod members;
pub mod networks;
pub mod objects;
pub mod resources;
pub mod table;
pub mod view;
