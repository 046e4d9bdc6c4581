//! Parses packets in both directions of the tunnel.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ovl_tunnel::fuzz::packet(bytes));
