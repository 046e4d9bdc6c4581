//! Opens sealed datagrams.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ovl_mesh::gossip::fuzz::datagram(bytes));
