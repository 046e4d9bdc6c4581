//! Parses what daemons send each other: frames of streams, records in gossip, objects and tables. What is accepted reads
//! back as the same value, also what a later release has added to it.

#![no_main]

use std::fmt::Debug;

use ovl_proto::alloc::AllocMap;
use ovl_proto::object::Object;
use ovl_proto::record::{NodeRecord, SignedRecord};
use ovl_proto::serde::Serialize;
use ovl_proto::serde::de::DeserializeOwned;
use ovl_proto::sync::Message;
use ovl_proto::table::Update;
use ovl_proto::wire;

/// Decodes bytes, and checks that the value reads back.
fn check<T: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) {
    if let Ok(value) = wire::decode_body::<T>(bytes) {
        let again = wire::encode_body(&value).and_then(|bytes| wire::decode_body::<T>(&bytes));
        assert_eq!(again.ok().as_ref(), Some(&value));
    }
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = wire::decode::<Message>(bytes);
    let _ = wire::decode::<SignedRecord>(bytes);
    check::<Message>(bytes);
    check::<NodeRecord>(bytes);
    check::<Update>(bytes);
    check::<Object>(bytes);
    check::<AllocMap>(bytes);
});
