//! A digest of a set with cheap updates when an element is added or removed.

use std::collections::BTreeSet;

use ring::digest::{Context, SHA256, digest};

/// A SHA-256 hash.
pub type Hash = [u8; 32];

/// The number of parts of a digest.
pub const PARTS: usize = 64;

/// A digest of a set of hashes, in two steps.
///
/// The hash of each element belongs to the part that its first byte modulo [`PARTS`] selects. The hash of a part is
/// the hash of its elements' hashes in ascending order, or zeros if it is empty. The digest is the hash of the
/// parts' hashes.
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
    /// Adds the hash of an element.
    pub fn insert(&mut self, hash: Hash) {
        self.with_part(&hash, |part| part.insert(hash));
    }

    /// Removes the hash of an element.
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

    /// Returns the digest of all elements.
    pub fn total(&self) -> Hash {
        hash_all(&self.parts)
    }
}

/// Returns the hash of an element.
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
