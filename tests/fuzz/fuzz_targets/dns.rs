//! Parses DNS messages of clients and upstream resolvers.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ovl_dns::fuzz::message(bytes));
