//! Decisions: what a host's kernel should hold, whatever way leads there.
#![cfg(test)]

mod encrypted;
mod ingress;
mod nft;
mod policy;
mod routed;
mod services;
mod switched;
mod touched;
#[path = "../../../cluster/tests/world/mod.rs"]
mod world;
