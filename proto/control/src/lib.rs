//! The control protocol on ovld's Unix socket.
//!
//! The client writes one [`Request`] as a line of JSON and reads one [`Reply`] as a line of JSON. Then it may write
//! the next request. The replies to [`Request::Events`] are [`Reply::Events`] lines until the client closes the
//! connection, and those to [`Request::Capture`] are [`Reply::Captured`] lines, those to a [`Request::Flows`] that
//! follows [`Reply::Flows`] lines. So are those to [`Request::MirrorTurn`] [`Reply::MirrorTurn`] lines, and those to [`Request::ApiReport`]
//! [`Reply::ApiReport`] lines. A request line has at most [`MAX_REQUEST`] bytes.
//!
//! `ovlctl -o json` prints the types of this crate. Field names are stable, see `docs/cli.md`.

mod capture;
mod client;
mod cni;
mod docker;
mod doctor;
mod flows;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod info;
mod kubernetes;
mod netcheck;
mod overview;
mod reply;
mod request;
mod resources;
mod stored;
mod trace;

pub use ovl_proto::record::PeerState;

pub use capture::*;
pub use client::{Client, ClientError};
pub use cni::{CNI_PLUGIN, CNI_VERSIONS, CniDeleted, Conflist};
pub use docker::DockerDeleted;
pub use doctor::{Check, CheckResult, Diagnosis, Finding, HostDiagnosis};
pub use flows::*;
pub use info::*;
pub use kubernetes::*;
pub use netcheck::{Dependence, Family, NatKind, Netcheck, NetcheckFinding, NetcheckMember};
pub use overview::*;
pub use reply::*;
pub use request::*;
pub use resources::*;
pub use trace::*;

/// The maximum length of a request line in bytes.
pub const MAX_REQUEST: usize = 4 << 20;
/// The maximum number of addresses of a [`Request::NamesOf`].
pub const MAX_NAMES: usize = 4096;
