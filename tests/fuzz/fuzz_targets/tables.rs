//! Applies updates of owner tables that were changed on their way.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ovl_cluster::fuzz::tables(bytes));
