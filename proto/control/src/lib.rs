//! The control protocol on ovld's Unix socket.
//!
//! The client writes one [`Request`] as a line of JSON and reads one [`Reply`] as a line of JSON;
//! then it may write the next one. [`Request::Events`] is answered with [`Reply::Events`] lines
//! until the client closes the connection. A request line is at most [`MAX_REQUEST`] bytes.
//!
//! The types here are also what `ovlctl -o json` prints: field names are stable, see `docs/cli.md`.

mod client;
mod cni;
mod docker;
mod reply;
mod request;
mod resources;

pub use ovl_proto::record::PeerState;

pub use client::{Client, ClientError};
pub use cni::{CNI_VERSIONS, CniDeleted};
pub use docker::DockerDeleted;
pub use reply::*;
pub use request::*;
pub use resources::*;

/// The longest request line, in bytes.
pub const MAX_REQUEST: usize = 1 << 20;
