//! The signatures that were found valid lately.
//!
//! One signature comes several ways: a record by gossip and with each handshake, votes for an allocation map one by one and
//! then as its proof, tables from their owners and from others. A verification takes 110 us, a hash 1 us.

use std::cell::RefCell;
use std::collections::HashSet;

use ovl_files::sha256;
use ovl_proto::record::{PublicKey, Signature};

/// Half the maximum number of remembered signatures.
const MOST: usize = 1024;

/// The hash of a signature, its key and what it signs.
type Hash = [u8; 32];

/// Remembers valid signatures: the last [`MOST`] ones, and up to as many before them.
#[derive(Debug, Default)]
struct Verified {
    recent: HashSet<Hash>,
    before: HashSet<Hash>,
}

impl Verified {
    fn has(&self, hash: &Hash) -> bool {
        self.recent.contains(hash) || self.before.contains(hash)
    }

    fn insert(&mut self, hash: Hash) {
        if self.recent.len() >= MOST {
            self.before = std::mem::take(&mut self.recent);
        }
        self.recent.insert(hash);
    }
}

thread_local! {
    // What is valid depends on nothing else, so it belongs to no daemon.
    static VERIFIED: RefCell<Verified> = RefCell::default();
}

/// Whether a signature of a message is valid, which `verify` finds out if it is not remembered.
pub(super) fn is_valid(
    key: &PublicKey,
    message: &[u8],
    signature: &Signature,
    verify: impl FnOnce() -> bool,
) -> bool {
    let hash = sha256(&[&key[..], &signature.0[..], message].concat());
    if VERIFIED.with_borrow(|verified| verified.has(&hash)) {
        return true;
    }
    let is_valid = verify();
    if is_valid {
        VERIFIED.with_borrow_mut(|verified| verified.insert(hash));
    }
    is_valid
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_valid_signatures_are_remembered_and_not_for_other_messages() {
        let (key, signature) = ([1; 32], Signature([2; 64]));
        let verified = |key: &PublicKey, message: &[u8], signature: &Signature, valid| {
            let mut asked = false;
            let is_valid = is_valid(key, message, signature, || {
                asked = true;
                valid
            });
            (is_valid, asked)
        };
        assert_eq!(verified(&key, b"message", &signature, false), (false, true));
        assert_eq!(verified(&key, b"message", &signature, true), (true, true));
        assert_eq!(verified(&key, b"message", &signature, false), (true, false));
        assert_eq!(verified(&key, b"massage", &signature, false), (false, true));
        assert_eq!(verified(&[3; 32], b"message", &signature, false), (false, true));
        assert_eq!(verified(&key, b"message", &Signature([4; 64]), false), (false, true));
        let remembered = || VERIFIED.with_borrow(|verified| verified.recent.len() + verified.before.len());
        for number in 0..5 * MOST {
            verified(&key, &number.to_be_bytes(), &signature, true);
            assert!(remembered() <= 2 * MOST);
        }
    }
}
