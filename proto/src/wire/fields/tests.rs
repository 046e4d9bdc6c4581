use proptest::collection::{btree_map, vec};
use proptest::prelude::*;

use super::*;
use crate::alloc::{AllocMap, AllocMessage, Change};
use crate::clock::Stamp;
use crate::object::{Body, Object, ObjectKey};
use crate::record::NodeRecord;
use crate::resource::{Kind, Resource, Service};
use crate::sync::Message;
use crate::table::{Endpoint, Entry, Key, Update};
use crate::wire::{decode_body, encode_body};

/// A value of a release.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Old {
    id: u32,
    text: String,
    list: Vec<u16>,
    unknown: Unknown,
}

crate::fields! { Old { 1 id, 3 text optional, 5 list optional, ..unknown } }

/// The same value of a later release.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct New {
    id: u32,
    count: u64,
    text: String,
    list: Vec<u16>,
    limit: Option<u8>,
    unknown: Unknown,
}

crate::fields! { New { 1 id, 2 count optional, 3 text optional, 5 list optional, 9 limit marked, ..unknown } }

/// What is not kept.
#[derive(Debug, PartialEq, Eq)]
struct Passing {
    id: u32,
}

crate::fields! { Passing { 1 id } }

fn error_of<T: std::fmt::Debug + DeserializeOwned>(bytes: &[u8]) -> String {
    decode_body::<T>(bytes).unwrap_err().to_string()
}

/// Encodes fields as a body.
fn body(fields: &[u8]) -> Vec<u8> {
    encode_body(&super::super::Bytes(fields)).unwrap()
}

#[test]
fn field_of_a_later_release_outlives_an_earlier_one() {
    let new = New { id: 1, count: 7, text: "a".to_owned(), ..New::default() };
    let bytes = encode_body(&new).unwrap();
    let mut old: Old = decode_body(&bytes).unwrap();
    assert_eq!(old.unknown.numbers().collect::<Vec<_>>(), [2]);
    assert_eq!(encode_body(&old).unwrap(), bytes);
    old.list = vec![3];
    let changed: New = decode_body(&encode_body(&old).unwrap()).unwrap();
    assert_eq!(changed, New { list: vec![3], ..new });
    // A value without the field has the same encoding in both, so the same hash.
    let (old, new) = (Old { id: 5, ..Old::default() }, New { id: 5, ..New::default() });
    assert_eq!(encode_body(&old).unwrap(), encode_body(&new).unwrap());
    assert_eq!(decode_body::<Passing>(&bytes).unwrap(), Passing { id: 1 });
}

#[test]
fn marked_field_is_not_understood_by_who_does_not_know_it() {
    let bytes = encode_body(&New { id: 1, limit: Some(3), ..New::default() }).unwrap();
    let expected = "a later release of ovld wrote it, and this one does not know field 9 of";
    assert_eq!(error_of::<Old>(&bytes), format!("{expected} Old"));
    assert_eq!(error_of::<Passing>(&bytes), format!("{expected} Passing"));
    // Nested in another value and in a message, too.
    assert_eq!(error_of::<(u8, Vec<Old>)>(&[&[1, 1][..], &bytes].concat()), format!("{expected} Old"));
    assert!(decode_body::<New>(&bytes).is_ok());
}

#[test]
fn each_value_has_one_encoding() {
    let id = [2, 1, 5];
    assert_eq!(decode_body::<Old>(&body(&id)).unwrap(), Old { id: 5, ..Old::default() });
    for (what, fields) in [
        ("absent", vec![]),
        ("twice", vec![2, 1, 5, 2, 1, 5]),
        ("out of order", vec![6, 2, 1, 97, 2, 1, 5]),
        ("default", vec![2, 1, 5, 6, 1, 0]),
        ("other mark", vec![3, 1, 5]),
        ("longer than the record", vec![2, 2, 5]),
        ("value longer than its type", vec![2, 2, 5, 5]),
        ("cut short", vec![2]),
        ("length cut short", vec![2, 0x80]),
        ("number not in its shortest form", vec![0x82, 0, 1, 5]),
        ("number too large", vec![2, 1, 5, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0]),
        ("huge length", vec![2, 1, 5, 80, 0xff, 0xff, 0xff, 0xff, 0x0f]),
    ] {
        assert!(error_of::<Old>(&body(&fields)).starts_with("malformed frame"), "{what}");
    }
    let many: Vec<u8> = (100..=356_u32).fold(id.to_vec(), |mut all, number| {
        write_varint(&mut all, u64::from(number) << 1);
        all.push(0);
        all
    });
    assert!(error_of::<Old>(&body(&many)).contains("more than 256 fields"));
}

#[test]
fn unknown_fields_are_set_and_found() {
    let mut unknown = Unknown::default();
    for (number, value) in [(7, "b"), (3, "a"), (7, "c")] {
        unknown.set(number, false, value.as_bytes());
    }
    assert_eq!(unknown.numbers().collect::<Vec<_>>(), [3, 7]);
    assert_eq!((unknown.get(7), unknown.get(8)), (Some(&b"c"[..]), None));
}

#[test]
fn unknown_message_change_and_content_are_not_understood() {
    let message = |number: u32, content: &[u8]| encode_body(&(number, super::super::Bytes(content))).unwrap();
    assert!(error_of::<Message>(&message(99, &[])).ends_with("does not know Message 99"));
    // A message whose content is of a later release, or broken: its frame is good, so the stream can go on.
    assert!(matches!(decode_body::<Message>(&message(3, &[9, 9])), Err(WireError::NotUnderstood(_))));
    let change = |number| {
        let mut request = Writer::new(None);
        request.put(1, false, &7_u64).unwrap();
        request.put(2, false, &(number, super::super::Bytes(&[]))).unwrap();
        message(8, &request.finish())
    };
    assert!(error_of::<AllocMessage>(&change(99_u32)).ends_with("does not know Change 99"));
    let known =
        encode_body(&AllocMessage::Request { id: 7, change: Change::DropNetwork(Default::default()) });
    assert!(decode_body::<AllocMessage>(&known.unwrap()).is_ok());
    assert!(matches!(decode_body::<Message>(&[1, 200]), Err(WireError::Malformed(_))));
}

#[test]
fn unknown_entry_and_object_are_kept() {
    let entry = encode_body(&(77_u32, super::super::Bytes(b"key"), super::super::Bytes(b"content"))).unwrap();
    let decoded: Entry = decode_body(&entry).unwrap();
    assert_eq!(encode_body(&decoded).unwrap(), entry);
    let Entry::Opaque(opaque) = &decoded else { panic!("{decoded:?}") };
    assert_eq!(opaque.why(), "table entries of kind 77");
    let key = encode_body(&decoded.key()).unwrap();
    assert_eq!(encode_body(&decode_body::<Key>(&key).unwrap()).unwrap(), key);
    let long = (77_u32, super::super::Bytes(&[1; 33]), super::super::Bytes(b""));
    assert!(decode_body::<Entry>(&encode_body(&long).unwrap()).is_err());

    let key = ObjectKey::Unknown { kind: 40, name: vec![1, 2] };
    let body = Body::Opaque { key: key.clone(), content: vec![3], why: "objects of kind 40".to_owned() };
    let object = Object { stamp: Stamp::default(), deleted: true, body };
    let bytes = encode_body(&object).unwrap();
    assert_eq!(decode_body::<Object>(&bytes).unwrap(), object);
    assert_eq!(key.to_string(), "object 0102 of kind 40");
}

#[test]
fn object_with_a_marked_field_is_opaque_under_its_name() {
    let mut service = Service::default();
    service.metadata.name = "web".to_owned();
    service.spec.unknown.set(500, true, b"x");
    let body = Body::Resource(Resource::Service(Box::new(service)));
    let object = Object { stamp: Stamp::default(), deleted: false, body };
    let decoded: Object = decode_body(&encode_body(&object).unwrap()).unwrap();
    assert_eq!(decoded.key(), object.key());
    let Body::Opaque { key: ObjectKey::Resource(key), why, .. } = &decoded.body else {
        panic!("{decoded:?}")
    };
    assert_eq!((key.kind, why.as_str()), (Kind::Service, "field 500 of ServiceSpec"));
    assert_eq!(encode_body(&decoded).unwrap(), encode_body(&object).unwrap());
}

/// Random fields of later releases.
fn later() -> impl Strategy<Value = Unknown> {
    btree_map(200..MAX_NUMBER, vec(any::<u8>(), 0..20), 0..6).prop_map(|all| {
        let mut unknown = Unknown::default();
        all.iter().for_each(|(number, value)| unknown.set(*number, false, value));
        unknown
    })
}

fn endpoint(unknown: Unknown) -> Endpoint {
    Endpoint {
        id: Default::default(),
        name: "a".to_owned(),
        namespace: "default".to_owned(),
        network: Default::default(),
        mac: Default::default(),
        addresses: vec!["10.0.0.1/24".parse().unwrap(), "fd00::1/64".parse().unwrap()],
        aliases: Vec::new(),
        labels: [("app".to_owned(), "web".to_owned())].into(),
        ready: true,
        publish: Vec::new(),
        allowed: Vec::new(),
        allowed_macs: Vec::new(),
        groups: None,
        described: None,
        pod: None,
        unknown,
    }
}

proptest! {
    #[test]
    fn values_with_fields_of_later_releases_read_back(
        a in later(), b in later(), c in later(), id in any::<u32>(), text in ".{0,20}", list in vec(any::<u16>(), 0..5)
    ) {
        let old = Old { id, text, list, unknown: a.clone() };
        let bytes = encode_body(&old).unwrap();
        prop_assert_eq!(&decode_body::<Old>(&bytes).unwrap(), &old);
        // An empty list of unknown fields is stored in one way only.
        let new: New = decode_body(&bytes).unwrap();
        prop_assert_eq!(encode_body(&new).unwrap(), bytes);

        let entry = Entry::Endpoint(endpoint(b.clone()));
        prop_assert_eq!(&decode_body::<Entry>(&encode_body(&entry).unwrap()).unwrap(), &entry);
        let map = AllocMap { cluster: 1, version: 2, unknown: c.clone(), ..AllocMap::default() };
        prop_assert_eq!(&decode_body::<AllocMap>(&encode_body(&map).unwrap()).unwrap(), &map);
        let mut service = Box::<Service>::default();
        (service.unknown, service.spec.unknown, service.metadata.unknown) = (a, b, c);
        let body = Body::Resource(Resource::Service(service));
        let object = Object { stamp: Stamp::default(), deleted: false, body };
        prop_assert_eq!(&decode_body::<Object>(&encode_body(&object).unwrap()).unwrap(), &object);
    }

    #[test]
    fn random_fields_never_panic_and_have_one_encoding(bytes in vec(any::<u8>(), 0..200)) {
        let framed = body(&bytes);
        if let Ok(value) = decode_body::<New>(&framed) {
            prop_assert_eq!(decode_body::<New>(&encode_body(&value).unwrap()).unwrap(), value);
        }
        for bytes in [&bytes, &framed] {
            let _ = decode_body::<NodeRecord>(bytes);
            let _ = decode_body::<Update>(bytes);
            let _ = decode_body::<Entry>(bytes);
            let _ = decode_body::<Object>(bytes);
            let _ = decode_body::<AllocMap>(bytes);
        }
    }

    #[test]
    fn changed_bytes_of_an_entry_never_panic(at in 0..120_usize, byte in any::<u8>(), cut in 0..140_usize) {
        let mut bytes = encode_body(&Entry::Endpoint(endpoint(Unknown::default()))).unwrap();
        if let Some(place) = bytes.get_mut(at) {
            *place = byte;
        }
        bytes.truncate(cut);
        if let Ok(entry) = decode_body::<Entry>(&bytes) {
            let again = encode_body(&entry).unwrap();
            prop_assert_eq!(decode_body::<Entry>(&again).unwrap(), entry);
        }
    }
}
