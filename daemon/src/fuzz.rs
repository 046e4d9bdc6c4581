//! Runs arbitrary bytes through what reads files of the state directory and probes of paths, for the fuzzer in `tests/fuzz`
//! and for property tests.

/// Reads a state file: the bytes themselves, and as the content of a file that is whole.
pub fn state(bytes: &[u8]) {
    crate::store::fuzz(bytes);
}

/// Reads a probe of a path, and takes the bytes as events of a host that watches paths.
pub fn paths(bytes: &[u8]) {
    crate::paths::fuzz::run(bytes);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            super::state(&bytes);
            super::paths(&bytes);
        }
    }

    #[test]
    fn corpus_passes() {
        ovl_corpus::replay("state", super::state);
        ovl_corpus::replay("paths", super::paths);
    }
}
