//! The parts of ovl that want something in the kernel, side by side: each owns its state and its decisions, and none
//! uses another's inside. What the cluster says ([`ovl_cluster`]) gives what the kernel should hold
//! ([`ovl_dataplane`]).
//!
//! A change in the cluster or on this host is told to each of them ([`Subsystem::changed`]), at the cost of that
//! change. The reconcile loop, `plan`, `verify`, attach, detach and teardown iterate over the list ([`Subsystems`]) and
//! name none. To add a subsystem: a folder here, and a line in the list.

pub mod encryption;
pub mod endpoints;
pub mod firewall;
mod list;
pub mod local;
pub mod mtu;
pub mod names;
pub mod networks;
pub mod policy;
pub mod publish;
pub mod services;
mod subsystem;

pub use list::{
    SubsystemList, Subsystems, afterwards, desired, detached, outcomes, plan, prepare, refusal, resync,
};
pub use subsystem::{Change, Cluster, Outcome, Part, Subsystem, TableChange};
