//! Runs arbitrary bytes through what parses manifests, for the fuzzer in `tests/fuzz` and for property tests.

use ovl_proto::object::{Body, Object};
use ovl_proto::resource::Validation;
use ovl_proto::wire;

use crate::{object, yaml};

/// Parses a manifest of a user, and an object of another host. What is accepted can be printed and parsed again.
pub fn manifest(bytes: &[u8]) {
    if let Ok(Object { body: Body::Resource(resource), .. }) = wire::decode_body(bytes) {
        let _ = object::check(&resource);
        let _ = resource.to_manifest();
    }
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(documents) = yaml::read(text) else { return };
    for document in documents {
        let text = yaml::to_yaml(&document.value);
        let again = yaml::read(&text).map(|mut all| all.pop().map(|it| it.value));
        assert_eq!(again, Ok(Some(document.value.clone())), "{text}");
        for item in object::items(document.value) {
            if let Ok(found) = object::read(item.value, None, Validation::Warn) {
                assert_eq!(object::check(&found.resource), Ok(()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            super::manifest(&bytes);
        }
    }

    #[test]
    fn corpus_passes() {
        ovl_corpus::replay("manifests", super::manifest);
    }
}
