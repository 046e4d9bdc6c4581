//! Parses what daemons send each other: frames of streams, and records in gossip.

#![no_main]

use ovl_proto::record::{NodeRecord, SignedRecord};
use ovl_proto::sync::Message;
use ovl_proto::wire;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = wire::decode::<Message>(bytes);
    let _ = wire::decode::<SignedRecord>(bytes);
    let _ = wire::decode_body::<NodeRecord>(bytes);
});
