//! Parses manifests of users and objects of other hosts. What is accepted can be printed and parsed again.

#![no_main]

use ovl_core::manifest;
use ovl_proto::resource::Resource;
use ovl_proto::wire;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(resource) = wire::decode_body::<Resource>(bytes) {
        let _ = manifest::check(&resource);
        let _ = resource.to_manifest();
    }
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(documents) = ovl_proto::manifest::read(text) else { return };
    for document in documents {
        let text = ovl_proto::manifest::to_yaml(&document.value);
        let again = ovl_proto::manifest::read(&text).map(|mut all| all.pop().map(|it| it.value));
        assert_eq!(again, Ok(Some(document.value.clone())), "{text}");
        for (_, value) in manifest::items(document.value) {
            if let Ok(found) = manifest::read(value, None, true) {
                assert_eq!(manifest::check(&found.resource), Ok(()));
            }
        }
    }
});
