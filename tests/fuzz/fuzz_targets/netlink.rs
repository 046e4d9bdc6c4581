//! Parses answers and notifications of the kernel.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ovl_kernel::fuzz::netlink(bytes));
