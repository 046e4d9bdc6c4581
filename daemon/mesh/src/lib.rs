//! Communication between daemons.
//!
//! | module | content |
//! | --- | --- |
//! | [`gossip`] | sealed datagrams: chitchat, pings, path MTU probes |
//! | [`streams`] | encrypted TCP streams |
//! | [`transport`] | the sockets under both |
//! | [`keys`] | identity, cluster key, signatures, and the files that hold them |

#![warn(missing_docs)]

pub mod gossip;
pub mod keys;
mod socket;
pub mod streams;
pub mod transport;
