//! The objects of one kind as the API server has them, and what of that ovld was not told yet. Pure: no clock, no I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ovl_proto::resource::{Kind, Name};

use crate::kind::{Object, differs};

/// A deletion.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Deletion {
    /// The API's `resourceVersion` of the deletion.
    pub version: u64,
    /// The unique id of the object.
    pub uid: String,
}

/// What ovld is told in one request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct News {
    /// The kind.
    pub kind: Kind,
    /// The version of the list, if the objects are all there are.
    pub listed: Option<u64>,
    /// The manifests of objects.
    pub objects: Vec<(Name, Arc<str>)>,
    /// Objects that were deleted.
    pub deleted: Vec<(Name, Deletion)>,
}

/// The objects of one kind.
#[derive(Debug)]
pub(crate) struct Store {
    kind: Kind,
    objects: BTreeMap<Name, Object>,
    /// The version up to which the objects are known. `None` before the first list.
    version: Option<u64>,
    /// Whether ovld has to be told everything.
    whole: bool,
    changed: BTreeSet<Name>,
    deleted: BTreeMap<Name, Deletion>,
    /// Objects that ovld could not put in force.
    failed: BTreeSet<Name>,
}

impl Store {
    /// Creates a store of which nothing is known.
    pub(crate) fn new(kind: Kind) -> Self {
        Self {
            kind,
            objects: BTreeMap::new(),
            version: None,
            whole: false,
            changed: BTreeSet::new(),
            deleted: BTreeMap::new(),
            failed: BTreeSet::new(),
        }
    }

    /// Returns the kind.
    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Returns all objects, by name.
    pub(crate) fn objects(&self) -> impl Iterator<Item = &Object> {
        self.objects.values()
    }

    /// Returns an object.
    pub(crate) fn get(&self, name: &Name) -> Option<&Object> {
        self.objects.get(name)
    }

    /// Records a list of all objects.
    pub(crate) fn listed(&mut self, version: u64, objects: Vec<Object>) {
        self.objects = objects.into_iter().map(|object| (object.name.clone(), object)).collect();
        self.version = Some(version);
        self.tell_all();
    }

    /// Records that an object was added or changed.
    pub(crate) fn changed(&mut self, object: Object) {
        self.version = self.version.max(Some(object.version));
        self.deleted.remove(&object.name);
        // Heartbeats of Nodes and most changes of Pods are about nothing that ovl reads.
        let before = self.objects.get(&object.name).and_then(|before| before.manifest.as_deref());
        let is_same =
            before.zip(object.manifest.as_deref()).is_some_and(|(before, now)| !differs(before, now));
        if !is_same {
            self.changed.insert(object.name.clone());
        }
        self.objects.insert(object.name.clone(), object);
    }

    /// Records that an object was deleted.
    pub(crate) fn deleted(&mut self, object: Object) {
        let Object { name, version, uid, .. } = object;
        self.version = self.version.max(Some(version));
        self.objects.remove(&name);
        self.changed.remove(&name);
        self.failed.remove(&name);
        self.deleted.insert(name, Deletion { version, uid });
    }

    /// Requires that ovld is told everything: it was restarted, or did not answer.
    pub(crate) fn tell_all(&mut self) {
        self.whole = self.version.is_some();
    }

    /// Records which of the objects that ovld was told of are not in force.
    pub(crate) fn note_failed(&mut self, news: &[Name], failed: &BTreeSet<Name>) {
        for name in news {
            if failed.contains(name) {
                self.failed.insert(name.clone());
            } else {
                self.failed.remove(name);
            }
        }
    }

    /// Requires that ovld is told once more of the objects that are not in force: what was in the way may be gone.
    pub(crate) fn try_again(&mut self) {
        self.changed.extend(self.failed.iter().filter(|name| self.objects.contains_key(*name)).cloned());
    }

    /// Returns what ovld was not told yet. `None` if there is nothing.
    pub(crate) fn take(&mut self) -> Option<News> {
        let version = self.version?;
        let (changed, deleted) = (std::mem::take(&mut self.changed), std::mem::take(&mut self.deleted));
        let kind = self.kind;
        if std::mem::take(&mut self.whole) {
            self.failed.clear();
            let objects = self.objects.values().filter_map(told).collect();
            return Some(News { kind, listed: Some(version), objects, deleted: Vec::new() });
        }
        let changed = changed.iter().filter_map(|name| self.objects.get(name));
        let objects: Vec<_> = changed.filter_map(told).collect();
        let is_news = !objects.is_empty() || !deleted.is_empty();
        is_news.then(|| News { kind, listed: None, objects, deleted: deleted.into_iter().collect() })
    }
}

/// Returns what ovld is told of an object. `None` if it does not concern ovl.
fn told(object: &Object) -> Option<(Name, Arc<str>)> {
    Some((object.name.clone(), object.manifest.clone()?))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;
    use crate::status::Status;

    fn object(name: &str, version: u64) -> Object {
        let manifest = Some(json!({ "name": name, "version": version }).to_string().into());
        let status = Status::default();
        Object { name: Name::new("shop", name), version, uid: format!("uid-{name}"), manifest, status }
    }

    fn names(news: &News) -> Vec<&str> {
        news.objects.iter().map(|(name, _)| name.name.as_str()).collect()
    }

    #[test]
    fn a_change_of_the_version_alone_is_not_told() {
        let node = |version: u64, role: &str| {
            let manifest =
                json!({ "metadata": { "resourceVersion": version.to_string(), "labels": { "r": role } } });
            Object { manifest: Some(manifest.to_string().into()), ..object("n1", version) }
        };
        let mut store = Store::new(Kind::Node);
        store.listed(5, vec![node(5, "db")]);
        assert!(store.take().is_some());
        store.changed(node(6, "db"));
        assert_eq!(store.take(), None);
        store.changed(node(7, "web"));
        assert_eq!(store.take().unwrap().objects.len(), 1);
        // Another object under the name.
        store.deleted(node(8, "web"));
        store.changed(node(9, "web"));
        assert_eq!(store.take().unwrap().objects.len(), 1);
        // A later version is told with the next whole list.
        store.changed(node(10, "web"));
        store.tell_all();
        assert_eq!(store.take().unwrap().listed, Some(10));
    }

    #[test]
    fn ovld_is_told_a_list_and_then_what_has_changed() {
        let mut store = Store::new(Kind::Service);
        assert_eq!(store.take(), None);
        store.listed(7, vec![object("b", 5), object("a", 6)]);
        let news = store.take().unwrap();
        assert_eq!((news.listed, names(&news)), (Some(7), vec!["a", "b"]));
        assert_eq!(store.take(), None);
        store.changed(object("a", 8));
        store.changed(object("a", 9));
        store.deleted(object("b", 10));
        let news = store.take().unwrap();
        assert_eq!((news.listed, news.objects.len()), (None, 1));
        assert!(news.objects[0].1.contains("\"version\":9"), "{news:?}");
        let deletion = Deletion { version: 10, uid: "uid-b".to_owned() };
        assert_eq!(news.deleted, [(Name::new("shop", "b"), deletion)]);
        // After a restart of ovld: all, as of the last event.
        store.tell_all();
        let news = store.take().unwrap();
        assert_eq!((news.listed, names(&news)), (Some(10), vec!["a"]));
    }

    #[test]
    fn an_object_that_comes_again_is_not_deleted() {
        let mut store = Store::new(Kind::Service);
        store.listed(1, vec![object("a", 1)]);
        store.take();
        store.deleted(object("a", 2));
        store.changed(object("a", 3));
        let news = store.take().unwrap();
        assert_eq!((names(&news), news.deleted.len()), (vec!["a"], 0));
        store.changed(object("a", 4));
        store.deleted(object("a", 5));
        let news = store.take().unwrap();
        assert_eq!((news.objects.len(), news.deleted.len()), (0, 1));
    }

    #[test]
    fn nothing_is_told_before_the_first_list() {
        let mut store = Store::new(Kind::Pod);
        store.tell_all();
        assert_eq!(store.take(), None);
    }

    #[test]
    fn what_is_not_in_force_is_told_again_until_it_is() {
        let mut store = Store::new(Kind::Service);
        store.listed(2, vec![object("a", 1), object("b", 2)]);
        store.take();
        let name = |name: &str| Name::new("shop", name);
        store.note_failed(&[name("a"), name("b")], &BTreeSet::from([name("a")]));
        store.try_again();
        assert_eq!(names(&store.take().unwrap()), ["a"]);
        store.note_failed(&[name("a")], &BTreeSet::new());
        store.try_again();
        assert_eq!(store.take(), None);
    }
}
