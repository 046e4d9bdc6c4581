//! The commands. Each file holds the arguments, requests and tables of one group of commands.

pub(crate) mod attach;
pub(crate) mod bugreport;
pub(crate) mod cni;
pub(crate) mod completions;
pub(crate) mod detach;
pub(crate) mod dns;
pub(crate) mod endpoint;
pub(crate) mod endpoints;
pub(crate) mod events;
pub(crate) mod exec;
pub(crate) mod fdb;
pub(crate) mod key;
pub(crate) mod lifecycle;
pub(crate) mod man;
pub(crate) mod metrics;
pub(crate) mod network;
pub(crate) mod peers;
pub(crate) mod plan;
pub(crate) mod policy;
pub(crate) mod recover;
pub(crate) mod resource;
pub(crate) mod routes;
pub(crate) mod sandbox;
pub(crate) mod status;
pub(crate) mod subnets;
pub(crate) mod verify;
