//! Reads probes of paths, and judges what arrives.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ovld::fuzz::paths(bytes));
