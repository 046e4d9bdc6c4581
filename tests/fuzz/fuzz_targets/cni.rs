//! Parses calls of CNI runtimes.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ovl_runtimes::fuzz::cni(bytes));
