//! Parses requests and replies on the control socket.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ovl_control::fuzz::line(bytes));
