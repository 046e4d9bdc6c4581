//! The subsystems of ovld: source checks, networks, endpoints, encryption, published ports, names, Services and
//! policies.
//!
//! Each subsystem computes its part of the data plane ([`ovl_dataplane`]) from the state of the cluster
//! ([`ovl_cluster`]). It owns its state and its decisions, and does not use the private parts of another one.
//!
//! Each change in the cluster or on the local host is reported to all subsystems ([`Subsystem::changed`]); the cost
//! depends on the change, not on the size of the cluster. The reconcile loop, `plan`, `verify`, attach, detach and
//! teardown iterate over the list ([`Subsystems`]) and name no subsystem. A new subsystem is a folder here and a line
//! in the list. Begin to read at [`Subsystem`].

pub mod encryption;
pub mod endpoints;
pub mod fastpath;
pub mod firewall;
pub mod guard;
mod list;
pub mod local;
pub mod marks;
pub mod mtu;
pub mod names;
pub mod networks;
mod off;
pub mod policy;
pub mod publish;
mod rejected;
pub mod services;
mod subsystem;

pub use list::{
    Settings, SubsystemList, Subsystems, afterwards, desired, detached, outcomes, plan, prepare, refusal,
    resync,
};
pub use subsystem::{Change, Cluster, Outcome, Part, Subsystem, TableChange};
