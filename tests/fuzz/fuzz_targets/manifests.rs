//! Parses manifests of users and objects of other hosts. What is accepted can be printed and parsed again.

#![no_main]

use ovl_manifest::{object, yaml};
use ovl_proto::resource::{Resource, Validation};
use ovl_proto::wire;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(resource) = wire::decode_body::<Resource>(bytes) {
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
});
