//! Replays lists and watches that a real API server sent (Kubernetes 1.36.2, a cluster in which conformance tests ran): the
//! beginning of a list, and some events of each type.

#![cfg(test)]
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::BTreeMap;
use std::sync::Arc;

use ovl_manifest::object::read;
use ovl_proto::resource::{Kind, Name, Validation};
use serde_json::Value;

use crate::kind::{Object, differs, object};
use crate::position::{Position, Step};
use crate::store::{News, Store};

const RECORDED: [(Kind, &str); 5] = [
    (Kind::Namespace, include_str!("../tests/traces/kubernetes-1.36/namespaces.jsonl")),
    (Kind::Pod, include_str!("../tests/traces/kubernetes-1.36/pods.jsonl")),
    (Kind::Service, include_str!("../tests/traces/kubernetes-1.36/services.jsonl")),
    (Kind::EndpointSlice, include_str!("../tests/traces/kubernetes-1.36/endpointslices.jsonl")),
    (Kind::NetworkPolicy, include_str!("../tests/traces/kubernetes-1.36/networkpolicies.jsonl")),
];

/// What ovld has of what it was told.
#[derive(Default)]
struct Told(BTreeMap<Name, Arc<str>>);

impl Told {
    fn hear(&mut self, news: News) {
        if news.listed.is_some() {
            self.0.clear();
        }
        self.0.extend(news.objects);
        news.deleted.iter().for_each(|(name, _)| drop(self.0.remove(name)));
    }
}

fn version(value: &Value) -> u64 {
    value.pointer("/metadata/resourceVersion").unwrap().as_str().unwrap().parse().unwrap()
}

/// Replays a recording. Tells ovld after every `each` events.
fn replay(kind: Kind, recorded: &str, each: usize) -> Told {
    let (mut position, mut store, mut told) = (Position::default(), Store::new(kind), Told::default());
    let mut now: BTreeMap<Name, Option<Arc<str>>> = BTreeMap::new();
    let mut keep = |object: &Object| now.insert(object.name.clone(), object.manifest.clone());
    let mut gone = Vec::new();
    for (n, line) in recorded.lines().enumerate() {
        let line: Value = serde_json::from_str(line).unwrap();
        if let Some(list) = line.get("list") {
            assert_eq!(position.step(), Step::List);
            let items = list["items"].as_array().cloned().unwrap_or_default();
            let objects: Vec<Object> = items.into_iter().map(|item| object(kind, item).unwrap()).collect();
            assert!(position.listed(version(list)));
            objects.iter().for_each(|object| drop(keep(object)));
            store.listed(version(list), objects);
        } else {
            let (event, value) = (line["event"]["type"].as_str().unwrap(), line["event"]["object"].clone());
            position.seen(version(&value));
            match event {
                "ADDED" | "MODIFIED" => {
                    let found = object(kind, value).unwrap();
                    gone.retain(|name| *name != found.name);
                    keep(&found);
                    store.changed(found);
                }
                "DELETED" => {
                    let found = object(kind, value).unwrap();
                    gone.push(found.name.clone());
                    store.deleted(found);
                }
                "BOOKMARK" => {}
                other => panic!("{other}"),
            }
        }
        if n % each == 0 {
            store.take().into_iter().for_each(|news| told.hear(news));
        }
    }
    store.take().into_iter().for_each(|news| told.hear(news));
    gone.iter().for_each(|name| drop(now.remove(name)));
    let now: BTreeMap<Name, Arc<str>> =
        now.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
    let same = |(name, told): (&Name, &Arc<str>)| now.get(name).is_some_and(|now| !differs(told, now));
    let is_right = told.0.len() == now.len() && told.0.iter().all(same);
    assert!(is_right, "{kind}: {:?} instead of {:?}", told.0.keys(), now.keys());
    told
}

#[test]
fn ovld_ends_with_what_the_api_server_has_however_seldom_it_is_told() {
    for (kind, recorded) in RECORDED {
        for each in [1, 2, 5, 1000] {
            replay(kind, recorded, each);
        }
    }
}

#[test]
fn what_is_handed_on_of_recorded_objects_is_readable() {
    for (kind, recorded) in RECORDED {
        let mut count = 0;
        for line in recorded.lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            let listed = line.pointer("/list/items").and_then(Value::as_array).cloned().unwrap_or_default();
            let event = line.get("event").filter(|event| event["type"] != "BOOKMARK");
            for value in listed.into_iter().chain(event.map(|event| event["object"].clone())) {
                let Some(manifest) = object(kind, value).unwrap().manifest else { continue };
                let length = manifest.len();
                assert!(length < 16_384, "{length} bytes: {manifest}");
                let found = read(serde_json::from_str(&manifest).unwrap(), None, Validation::Ignore);
                assert!(found.is_ok(), "{:?} in {manifest}", found.unwrap_err());
                count += 1;
            }
        }
        assert!(count > 5, "{kind}: {count}");
    }
}
