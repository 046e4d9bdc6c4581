//! Packets out of the tunnel, and into it.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ovl_tunnel::fuzz::packet(bytes));
