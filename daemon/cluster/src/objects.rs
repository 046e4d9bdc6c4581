//! The store of cluster objects: the last write of each object, with its signature.

use std::collections::BTreeMap;

use ovl_proto::clock::Stamp;
use ovl_proto::id::{NetworkId, NodeId};
use ovl_proto::object::{Body, Network, Object, ObjectKey, SignedObject};
use ovl_proto::resource::{ResourceKey, Source};
use ovl_proto::wire;

use crate::digest::{Digest, Hash, hash, part_of};
use crate::resources::Resources;

/// The maximum number of objects, tombstones included. An index of this many fits a frame.
pub const MAX_OBJECTS: usize = 65_536;
/// The maximum size of an encoded object in bytes.
pub const MAX_OBJECT_BYTES: usize = 1 << 20;
/// The maximum size of all encoded objects in bytes. Together with all other state they fit the state file.
pub const MAX_BYTES: usize = 128 << 20;

/// The last write of an object. The content of Kubernetes objects is in [`Resources`].
#[derive(Debug, Clone)]
pub struct Stored {
    /// The signed write.
    pub signed: SignedObject,
    /// The stamp of the write.
    pub stamp: Stamp,
    /// Whether it is a tombstone.
    pub deleted: bool,
    /// The network, also of a tombstone, because its devices may still be in use. `None` for a Kubernetes object.
    pub network: Option<Network>,
    /// What this release does not know of the object, which therefore has no effect here. `None` if it is understood.
    pub opaque: Option<String>,
    /// Where it was mirrored from; of a tombstone, where the object was deleted. `None`: it is ovl's own.
    pub source: Option<Box<Source>>,
    hash: Hash,
}

/// Why a write was rejected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// There are too many objects.
    #[error(
        "the limit of {MAX_OBJECTS} objects is reached, deleted ones included; deleted ones are removed after 30 days"
    )]
    Objects,
    /// All objects together are too large.
    #[error("all objects together would exceed the limit of {} MiB", MAX_BYTES >> 20)]
    Bytes,
    /// The object is too large.
    #[error("the object has {0} bytes, the limit is {MAX_OBJECT_BYTES}")]
    Object(usize),
}

/// The store of cluster objects.
#[derive(Debug, Clone, Default)]
pub struct Objects {
    all: BTreeMap<ObjectKey, Stored>,
    digest: Digest,
    bytes: usize,
    /// How many objects are not understood.
    opaque: usize,
}

impl Objects {
    /// Returns an object.
    pub fn get(&self, key: &ObjectKey) -> Option<&Stored> {
        self.all.get(key)
    }

    /// Returns all objects by key.
    pub fn iter(&self) -> impl Iterator<Item = (&ObjectKey, &Stored)> {
        self.all.iter()
    }

    /// Returns the number of objects, tombstones included.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether there are no objects.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Returns the networks, and whether each is deleted.
    pub fn networks(&self) -> impl Iterator<Item = (&Network, bool)> {
        // Networks come first in the order of keys.
        let networks = self.all.iter().take_while(|(key, _)| matches!(key, ObjectKey::Network(_)));
        networks.filter_map(|(_, stored)| Some((stored.network.as_ref()?, stored.deleted)))
    }

    /// Returns the objects that this release does not understand, with their writer and what is not known.
    pub fn opaque(&self) -> impl Iterator<Item = (&ObjectKey, NodeId, &str)> {
        // There are seldom any, so that the others are not looked at.
        let all = (self.opaque > 0).then(|| self.all.iter());
        all.into_iter()
            .flatten()
            .filter_map(|(key, stored)| Some((key, stored.stamp.node, stored.opaque.as_deref()?)))
    }

    /// Returns the Kubernetes objects that were mirrored and not deleted since, each with where it is from.
    pub fn mirrored(&self) -> impl Iterator<Item = (&ResourceKey, &Source)> {
        let living = self.all.iter().filter(|(_, stored)| !stored.deleted);
        living.filter_map(|(key, stored)| match key {
            ObjectKey::Resource(key) => Some((key, stored.source.as_deref()?)),
            ObjectKey::Network(_) | ObjectKey::Unknown { .. } => None,
        })
    }

    /// Returns the object of a network, also if it is a tombstone.
    pub fn network(&self, id: NetworkId) -> Option<&Stored> {
        self.get(&ObjectKey::Network(id))
    }

    /// Returns the digest of all keys and stamps; zeros if there are no objects.
    pub fn digest(&self) -> Hash {
        if self.all.is_empty() { [0; 32] } else { self.digest.total() }
    }

    /// Returns the hashes of the parts of the digest.
    pub fn parts(&self) -> Vec<u64> {
        self.digest.parts()
    }

    /// Returns the key and stamp of each object in a part that differs from [`Self::parts`] of another host.
    pub fn index(&self, parts: &[u64]) -> Vec<(ObjectKey, Stamp)> {
        let differing = self.digest.differing(parts);
        let all = self.all.iter().filter(|(_, stored)| differing.contains(&part_of(&stored.hash)));
        all.map(|(key, stored)| (key.clone(), stored.stamp)).collect()
    }

    /// Whether an object is absent, or its write is older than this one.
    pub fn lacks(&self, key: &ObjectKey, stamp: Stamp) -> bool {
        self.get(key).is_none_or(|stored| stored.stamp < stamp)
    }

    /// Checks that writes fit the limits.
    ///
    /// # Errors
    ///
    /// If they do not.
    pub fn has_room<'a>(
        &self,
        writes: impl Iterator<Item = (ObjectKey, &'a SignedObject)>,
    ) -> Result<(), Full> {
        let (mut count, mut bytes) = (self.all.len(), self.bytes);
        for (key, signed) in writes {
            let length = signed.body.len();
            if length > MAX_OBJECT_BYTES {
                return Err(Full::Object(length));
            }
            bytes += length;
            match self.get(&key) {
                Some(old) => bytes -= old.signed.body.len(),
                None => count += 1,
            }
            if bytes > MAX_BYTES {
                return Err(Full::Bytes);
            }
            if count > MAX_OBJECTS {
                return Err(Full::Objects);
            }
        }
        Ok(())
    }

    /// Applies a write to the store and to `resources`.
    ///
    /// Returns the keys of the Kubernetes objects that it changes; `None` if a later write is known.
    ///
    /// # Errors
    ///
    /// If the write exceeds a limit.
    pub fn put(
        &mut self,
        signed: SignedObject,
        object: Object,
        resources: &mut Resources,
    ) -> Result<Option<Vec<ResourceKey>>, Full> {
        let later = self.all.get(&object.key()).is_some_and(|old| old.stamp >= object.stamp);
        if later { Ok(None) } else { self.replace(signed, object, resources).map(Some) }
    }

    /// Applies a write to the store and to `resources`, whatever is stored.
    ///
    /// Returns the keys of the Kubernetes objects that it changes.
    ///
    /// # Errors
    ///
    /// If the write exceeds a limit.
    pub fn replace(
        &mut self,
        signed: SignedObject,
        object: Object,
        resources: &mut Resources,
    ) -> Result<Vec<ResourceKey>, Full> {
        let key = object.key();
        let old = self.all.get(&key);
        self.has_room(std::iter::once((key.clone(), &signed)))?;
        self.bytes = self.bytes - old.map_or(0, |old| old.signed.body.len()) + signed.body.len();
        // A key and stamp that cannot be encoded were never received or sent.
        let hash = hash(&wire::encode_body(&(&key, object.stamp)).unwrap_or_default());
        let Object { stamp, deleted, body } = object;
        let source = match &body {
            Body::Resource(resource) => resource.meta().source.clone(),
            Body::Network(_) | Body::Opaque { .. } => None,
        };
        let (network, opaque, changed) = match body {
            Body::Network(network) => (Some(network), None, Vec::new()),
            Body::Resource(resource) if deleted => (None, None, resources.remove(&resource.key())),
            Body::Resource(resource) => (None, None, resources.insert(resource)),
            // What was understood of an earlier write is no longer true.
            Body::Opaque { key: ObjectKey::Resource(key), why, .. } => {
                (None, Some(why), resources.remove(&key))
            }
            Body::Opaque { why, .. } => (None, Some(why), Vec::new()),
        };
        self.digest.insert(hash);
        self.opaque += usize::from(opaque.is_some());
        let stored = Stored { signed, stamp, deleted, network, opaque, source, hash };
        if let Some(old) = self.all.insert(key, stored) {
            self.digest.remove(&old.hash);
            self.opaque -= usize::from(old.opaque.is_some());
        }
        Ok(changed)
    }

    /// Removes the objects for which `keep` returns false.
    pub fn retain(&mut self, mut keep: impl FnMut(&ObjectKey, &Stored) -> bool) {
        let Self { all, digest, bytes, opaque } = self;
        all.retain(|key, stored| {
            let kept = keep(key, stored);
            if !kept {
                digest.remove(&stored.hash);
                *bytes -= stored.signed.body.len();
                *opaque -= usize::from(stored.opaque.is_some());
            }
            kept
        });
    }
}
