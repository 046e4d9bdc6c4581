//! Parses manifests of users and objects of other hosts.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ovl_manifest::fuzz::manifest(bytes));
