//! A DNS server for names that change often, which forwards all other queries to upstream servers.
//!
//! An [`Engine`] has listening addresses and answers from a [`Zone`]. The source address of a query
//! identifies the client, and the client's context selects the names that it may see. The zone is an
//! immutable snapshot that is replaced as a whole, so a change never delays a query. Snapshots share their
//! unchanged parts, so a change costs what it changes. Queries for other names go to the servers of a
//! resolv.conf(5), which is read again when it changes.
//!
//! The engine knows nothing of clusters, hosts or network devices.

mod answer;
mod cache;
mod engine;
mod forward;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod message;
mod resolv;
mod servers;
mod share;
mod shared;
mod sys;
mod tcp;
#[cfg(test)]
mod tests;
mod told;
mod udp;
mod upstream;
mod wire;

pub use answer::{Outcome, Target, Transport, answer};
pub use engine::{Config, Engine, Listen, Stats};
pub use forward::{AnswerOrigin, Lookup};
pub use message::{Record, RecordData, records};
pub use ovl_zone::{Client, ClientContext, Name, NamePattern, NetworkKey, Records, Resolution, Zone};
pub use resolv::{ResolvConfWatcher, UnusedLine, UnusedReason, Upstreams};
pub use servers::{FailingServer, StubDomain};
pub use share::Share;
pub use shared::ListenRole;
pub use told::{Found, Told};
pub use wire::{Query, Rcode, RecordType, question};
