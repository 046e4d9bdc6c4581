//! Tests of the decisions of subsystems: the desired data plane of a host, and the plans that lead to it.
#![cfg(test)]

mod delivery;
mod encrypted;
#[path = "../host/mod.rs"]
mod host;
mod ingress;
mod multicast;
mod names;
mod nft;
mod policy;
mod ranges;
mod routed;
mod services;
mod switched;
mod touched;
#[path = "../../../cluster/tests/world/mod.rs"]
mod world;
