//! The decisions of each part of ovl, side by side: what the cluster says ([`ovl_cluster`]) gives what the kernel
//! should hold ([`ovl_dataplane`]). Pure: no clock, no I/O, no async.

pub mod encryption;
pub mod endpoints;
pub mod firewall;
pub mod local;
pub mod mtu;
pub mod names;
pub mod networks;
pub mod policy;
pub mod publish;
pub mod services;
