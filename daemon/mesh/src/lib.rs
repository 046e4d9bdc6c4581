//! How daemons talk to each other.
//!
//! | module | what is in it |
//! | --- | --- |
//! | [`gossip`] | sealed datagrams, chitchat over them, pings, path MTU |
//! | [`streams`] | encrypted TCP streams between daemons |
//! | [`transport`] | the sockets under both |
//! | [`keys`] | identity, cluster key, signatures, and the files that hold them |

#![warn(missing_docs)]

pub mod gossip;
pub mod keys;
pub mod streams;
pub mod transport;
