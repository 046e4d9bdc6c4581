//! The store of cluster objects: of each the last write, with its proof.

use std::collections::BTreeMap;

use ovl_proto::clock::Stamp;
use ovl_proto::id::NetworkId;
use ovl_proto::object::{Body, Network, Object, ObjectKey, SignedObject};
use ovl_proto::resource::ResourceKey;
use ovl_proto::wire;

use crate::digest::{Digest, Hash, hash};
use crate::resources::Resources;

/// Objects, removed ones included: an index of all of them fits a frame.
pub const MAX_OBJECTS: usize = 65_536;
/// One of them, encoded.
pub const MAX_OBJECT_BYTES: usize = 256 << 10;
/// All of them, encoded: together with all else they fit the state file.
pub const MAX_BYTES: usize = 128 << 20;

/// The last write of one object. What the cluster is to do about Kubernetes' objects is in [`Resources`].
#[derive(Debug, Clone)]
pub struct Stored {
    /// The write with its proof.
    pub signed: SignedObject,
    /// The write.
    pub stamp: Stamp,
    /// It is gone.
    pub deleted: bool,
    /// Of a network, also of one that is gone: its devices may still be in use.
    pub network: Option<Network>,
    hash: Hash,
}

/// Why a write was not kept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Full {
    /// Too many.
    #[error(
        "there are {MAX_OBJECTS} objects already, removed ones included; removed ones are forgotten after 30 days"
    )]
    Objects,
    /// Too large together.
    #[error("all objects together would be larger than {} MiB", MAX_BYTES >> 20)]
    Bytes,
    /// Too large.
    #[error("it is {0} bytes long and may be {MAX_OBJECT_BYTES}")]
    Object(usize),
}

/// All objects.
#[derive(Debug, Clone, Default)]
pub struct Objects {
    all: BTreeMap<ObjectKey, Stored>,
    digest: Digest,
    bytes: usize,
}

impl Objects {
    /// One of them.
    pub fn get(&self, key: &ObjectKey) -> Option<&Stored> {
        self.all.get(key)
    }

    /// All, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&ObjectKey, &Stored)> {
        self.all.iter()
    }

    /// How many, removed ones included.
    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Networks, and whether each is gone.
    pub fn networks(&self) -> impl Iterator<Item = (&Network, bool)> {
        // They come first.
        self.all.values().map_while(|stored| Some((stored.network.as_ref()?, stored.deleted)))
    }

    /// A network that somebody made, also one that is gone.
    pub fn network(&self, id: NetworkId) -> Option<&Stored> {
        self.get(&ObjectKey::Network(id))
    }

    /// Which objects there are, at which state; zeros where there are none.
    pub fn digest(&self) -> Hash {
        if self.all.is_empty() { [0; 32] } else { self.digest.total() }
    }

    /// Each with its stamp.
    pub fn index(&self) -> Vec<(ObjectKey, Stamp)> {
        self.all.iter().map(|(key, stored)| (key.clone(), stored.stamp)).collect()
    }

    /// Whether all of these can be put.
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

    /// Keeps the later one of two writes, in `resources` too. If that is this one, gives which of Kubernetes'
    /// objects it changes.
    pub fn put(
        &mut self,
        signed: SignedObject,
        object: Object,
        resources: &mut Resources,
    ) -> Result<Option<Vec<ResourceKey>>, Full> {
        let key = object.key();
        let old = self.all.get(&key);
        if old.is_some_and(|old| old.stamp >= object.stamp) {
            return Ok(None);
        }
        self.has_room(std::iter::once((key.clone(), &signed)))?;
        self.bytes = self.bytes - old.map_or(0, |old| old.signed.body.len()) + signed.body.len();
        // What cannot be encoded was never received or sent.
        let hash = hash(&wire::encode_body(&(&key, object.stamp)).unwrap_or_default());
        let Object { stamp, deleted, body } = object;
        let (network, changed) = match body {
            Body::Network(network) => (Some(network), Vec::new()),
            Body::Resource(resource) if deleted => (None, resources.remove(&resource.key())),
            Body::Resource(resource) => (None, resources.insert(resource)),
        };
        self.digest.insert(hash);
        if let Some(old) = self.all.insert(key, Stored { signed, stamp, deleted, network, hash }) {
            self.digest.remove(&old.hash);
        }
        Ok(Some(changed))
    }

    /// Forgets the objects for which `keep` says no.
    pub fn retain(&mut self, mut keep: impl FnMut(&ObjectKey, &Stored) -> bool) {
        let Self { all, digest, bytes } = self;
        all.retain(|key, stored| {
            let kept = keep(key, stored);
            if !kept {
                digest.remove(&stored.hash);
                *bytes -= stored.signed.body.len();
            }
            kept
        });
    }
}
