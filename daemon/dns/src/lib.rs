//! A DNS server for names that come and go, beside the resolvers that know all others.
//!
//! An [`Engine`] has listening addresses, and answers from a [`Zone`]: who asks is known by the address
//! that a query comes from, and says which names there are. The zone is an immutable snapshot, replaced as a
//! whole, so a change never costs a query; its parts are shared between snapshots, so a change costs what
//! it changes. What the zone does not know goes to the resolvers of a resolv.conf(5), which is followed when
//! it changes.
//!
//! The engine knows nothing of clusters, hosts or networks' devices.

mod answer;
mod cache;
mod engine;
mod forward;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod message;
mod name;
mod resolv;
mod servers;
mod sys;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;
mod upstream;
mod wire;
mod zone;

pub use answer::{Asker, Outcome, Target, Transport, answer, target};
pub use engine::{Config, Engine, Listen, Role, Stats};
pub use forward::{Lookup, Via};
pub use message::{Data, Record, records};
pub use name::Name;
pub use servers::{Failing, Stub};
pub use wire::{Kind, Query, Rcode, question};
pub use zone::{NetworkKey, Place, Records, Standing, Zone};
