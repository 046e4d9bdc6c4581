//! Runs arbitrary bytes through what reads files of the state directory, for the fuzzer in `tests/fuzz` and for a property
//! test.

/// Reads a state file: the bytes themselves, and as the content of a file that is whole.
pub fn state(bytes: &[u8]) {
    crate::store::fuzz(bytes);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            super::state(&bytes);
        }
    }

    #[test]
    fn corpus_passes() {
        ovl_corpus::replay("state", super::state);
    }
}
