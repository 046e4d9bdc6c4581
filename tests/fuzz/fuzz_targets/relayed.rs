//! Reads relayed datagrams, and collects them.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ovl_relay::fuzz::frame(bytes));
