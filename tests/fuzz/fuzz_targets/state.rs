//! Reads state files.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ovld::fuzz::state(bytes));
