//! A digest over a set that costs little to keep up when one element of many comes or goes.

use std::collections::BTreeSet;

use ring::digest::{Context, SHA256, digest};

/// A SHA-256.
pub type Hash = [u8; 32];

/// Into how many parts the elements fall.
pub const PARTS: usize = 64;

/// In two steps: the hash of each element belongs to the part that its first byte modulo [`PARTS`] names;
/// each part has the hash over its hashes in ascending order, or zeros if it has none; the digest is the
/// hash over the parts.
#[derive(Debug, Clone)]
pub struct Digest {
    hashes: [BTreeSet<Hash>; PARTS],
    parts: [Hash; PARTS],
}

impl Default for Digest {
    fn default() -> Self {
        Self { hashes: std::array::from_fn(|_| BTreeSet::new()), parts: [[0; 32]; PARTS] }
    }
}

impl Digest {
    /// Adds an element.
    pub fn insert(&mut self, hash: Hash) {
        self.with_part(&hash, |part| part.insert(hash));
    }

    /// Takes one out.
    pub fn remove(&mut self, hash: &Hash) {
        self.with_part(hash, |part| part.remove(hash));
    }

    fn with_part(&mut self, hash: &Hash, change: impl FnOnce(&mut BTreeSet<Hash>) -> bool) {
        let [first, ..] = hash;
        let number = usize::from(*first) % PARTS;
        if let (Some(hashes), Some(part)) = (self.hashes.get_mut(number), self.parts.get_mut(number)) {
            change(hashes);
            *part = if hashes.is_empty() { [0; 32] } else { hash_all(&*hashes) };
        }
    }

    /// Of all elements.
    pub fn total(&self) -> Hash {
        hash_all(&self.parts)
    }
}

/// The hash of an element.
pub fn hash(bytes: &[u8]) -> Hash {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, bytes).as_ref());
    out
}

fn hash_all<'a>(hashes: impl IntoIterator<Item = &'a Hash>) -> Hash {
    let mut context = Context::new(&SHA256);
    for hash in hashes {
        context.update(hash);
    }
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    out
}
