//! ovl's decisions, as pure functions: no clock, no I/O, no async. What the cluster says
//! ([`view`]) gives what the kernel should hold ([`desired`]); the difference to what it does hold
//! ([`kernel`]) gives the operations ([`diff`], [`op`]).

pub mod alloc;
pub mod allocation;
pub mod backends;
pub mod cluster_names;
pub mod cni;
pub mod desired;
pub mod device;
pub mod diff;
pub mod digest;
mod divert;
pub mod docker;
pub mod ends;
pub mod filter;
pub mod firewall;
pub mod flows;
mod index;
pub mod ingress;
pub mod ipam;
pub mod kernel;
pub mod keys;
pub mod ledger;
pub mod liveness;
pub mod manifest;
pub mod members;
pub mod networks;
pub mod nft;
pub mod objects;
pub mod op;
pub mod policy;
pub mod publish;
pub mod resolver;
pub mod resources;
pub mod routed;
pub mod services;
pub mod table;
pub mod touched;
pub mod tunnel;
pub mod view;
pub mod zone;
