//! Runs arbitrary bytes through what parses messages of other daemons, for the fuzzer in `tests/fuzz` and for a property
//! test.

use std::fmt::Debug;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::alloc::AllocMap;
use crate::object::Object;
use crate::record::{NodeRecord, SignedRecord};
use crate::sync::Message;
use crate::table::Update;
use crate::wire;

/// Decodes frames of streams, records in gossip, objects, tables and maps. What is accepted reads back as the same value,
/// also what a later release has added to it.
pub fn record(bytes: &[u8]) {
    let _ = wire::decode::<Message>(bytes);
    let _ = wire::decode::<SignedRecord>(bytes);
    check::<Message>(bytes);
    check::<NodeRecord>(bytes);
    check::<Update>(bytes);
    check::<Object>(bytes);
    check::<AllocMap>(bytes);
}

/// Decodes bytes, and checks that the value reads back.
fn check<T: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) {
    if let Ok(value) = wire::decode_body::<T>(bytes) {
        let again = wire::encode_body(&value).and_then(|bytes| wire::decode_body::<T>(&bytes));
        assert_eq!(again.ok().as_ref(), Some(&value));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            super::record(&bytes);
        }
    }

    #[test]
    fn corpus_passes() {
        ovl_corpus::replay("records", super::record);
    }
}
