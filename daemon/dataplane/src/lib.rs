//! The data plane: what a kernel should hold and what it does hold ([`state`], [`nft`]), the difference between the
//! two ([`diff`]), and the operations that it consists of ([`op`]). No clock, no I/O, nothing of clusters.

pub mod device;
pub mod diff;
pub mod fast;
pub mod flows;
pub mod ledger;
pub mod multicast;
pub mod nft;
pub mod observed;
pub mod op;
pub mod passage;
pub mod resolver;
pub mod state;
