//! Runs arbitrary bytes through what parses control requests, for the fuzzer in `tests/fuzz` and for a property test.

use crate::{CniDeleted, Reply, Request};

/// Parses a request, a reply and a stored call. What is accepted is written and read again without a change.
pub fn line(bytes: &[u8]) {
    again::<Request>(bytes);
    again::<Reply>(bytes);
    again::<CniDeleted>(bytes);
}

fn again<T: serde::de::DeserializeOwned + serde::Serialize>(bytes: &[u8]) {
    let Ok(value) = serde_json::from_slice::<T>(bytes) else { return };
    let written = serde_json::to_vec(&value);
    let once = written.as_deref().ok().and_then(|text| serde_json::from_slice::<T>(text).ok());
    let twice = once.and_then(|value| serde_json::to_vec(&value).ok());
    assert_eq!(written.ok(), twice);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            super::line(&bytes);
        }
    }

    #[test]
    fn corpus_passes() {
        ovl_corpus::replay("requests", super::line);
    }
}
