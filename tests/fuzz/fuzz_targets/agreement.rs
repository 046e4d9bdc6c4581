//! Agrees on allocation maps among messages of hosts that lie.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ovl_consensus::fuzz::agreement(bytes));
