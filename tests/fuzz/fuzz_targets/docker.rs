//! Parses calls of Docker Engines.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ovl_runtimes::fuzz::docker(bytes));
