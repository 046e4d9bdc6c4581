//! Answers the handshake of a stream.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ovl_mesh::streams::fuzz::handshake(bytes));
