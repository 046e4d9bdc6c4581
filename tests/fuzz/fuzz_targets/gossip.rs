//! Decodes the plaintext of gossip datagrams, through the bounded decoder.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ovl_mesh::gossip::fuzz::message(bytes));
