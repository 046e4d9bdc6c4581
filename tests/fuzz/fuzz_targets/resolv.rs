//! Parses the resolv.conf of the host.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ovl_dns::fuzz::resolv_conf(bytes));
