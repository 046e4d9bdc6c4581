//! Parses what daemons send each other.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ovl_proto::fuzz::record(bytes));
