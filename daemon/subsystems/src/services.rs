//! The subsystems of Services: address translation, and announcements of LoadBalancer addresses.
//!
//! [`Translation`] owns the set elements that were last sent ([`Services`]); [`Announcements`] owns the addresses that
//! this host announces ([`ingress`]). [`allocation`] chooses addresses and ports when a Service is applied, and [`permits`]
//! holds each Service to what it may take; both own no state. Begin to read at [`Services::plan`].

pub mod allocation;
mod announcements;
pub mod cluster_dns;
mod divert;
mod elements;
pub mod ingress;
pub mod permits;
mod translation;

pub use announcements::Announcements;
pub use elements::{Client, Services, Translated, inside, translate};
pub use translation::Translation;
