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

    /// Returns the first eight bytes of the hash of each part, to compare with those of another digest.
    pub fn parts(&self) -> Vec<u64> {
        self.parts.iter().map(short).collect()
    }

    /// Returns the numbers of the parts that differ from [`Self::parts`] of another digest.
    pub fn differing(&self, parts: &[u64]) -> BTreeSet<usize> {
        let all = self.parts.iter().enumerate();
        all.filter(|(number, hash)| parts.get(*number) != Some(&short(hash)))
            .map(|(number, _)| number)
            .collect()
    }

    fn with_part(&mut self, hash: &Hash, change: impl FnOnce(&mut BTreeSet<Hash>) -> bool) {
        let number = part_of(hash);
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

/// Returns the number of the part that an element belongs to.
pub fn part_of(hash: &Hash) -> usize {
    let [first, ..] = hash;
    usize::from(*first) % PARTS
}

fn short(hash: &Hash) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *hash;
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
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
