//! Decisions: what a host's kernel should hold, whatever way leads there.
#![cfg(test)]

mod encrypted;
mod routed;
mod switched;
mod touched;
mod world;
