//! Runs arbitrary bytes as what an owner writes and a sender changes, for the fuzzer in `tests/fuzz` and for a property
//! test.

use ovl_proto::id::NodeId;
use ovl_proto::record::Signature;
use ovl_proto::table::{Entry, Key, Update};
use ovl_proto::wire;

use crate::table::Table;

const OWNER: NodeId = NodeId([1; 10]);
/// More would only make a run slower.
const MAX_STEPS: usize = 64;

/// Writes a table in steps, and applies each update to a copy of the table on its way to another host. A step is a byte
/// that says what happens to the update, the length of an entry, and the entry or the key of one.
pub fn tables(bytes: &[u8]) {
    let (mut owner, mut copy) = (Table::new(OWNER), Table::new(OWNER));
    let (mut rest, mut epoch) = (bytes, 1);
    for _ in 0..MAX_STEPS {
        let [change, length, behind @ ..] = rest else { return };
        let (chunk, behind) = behind.split_at(behind.len().min(usize::from(*length)));
        rest = behind;
        let (set, unset) = match (wire::decode_body::<Entry>(chunk), wire::decode_body::<Key>(chunk)) {
            (Ok(entry), _) if change & 1 == 0 => (vec![entry], Vec::new()),
            (_, Ok(key)) => (Vec::new(), vec![key]),
            _ => (Vec::new(), Vec::new()),
        };
        epoch += u64::from(change >> 1 & 1);
        let mut update = owner.write(epoch, set, unset, |_| Signature([0; 64]));
        let sent = update.clone();
        changed(&mut update, change >> 2);
        let (before, is_same) = (copy.whole(), update == sent);
        match copy.apply(update) {
            Ok(()) => assert_eq!(copy.whole().map(|whole| whole.head.digest), Some(sent.head.digest)),
            // An update can build on one that was changed and refused.
            Err(_) => assert_eq!(copy.whole(), before),
        }
        if !is_same || copy.whole() != owner.whole() {
            // The whole table always arrives.
            if let Some(whole) = owner.whole() {
                let _ = copy.apply(whole);
            }
        }
        assert_eq!(copy.entries().collect::<Vec<_>>(), owner.entries().collect::<Vec<_>>());
    }
    if let Ok(update) = wire::decode_body::<Update>(bytes) {
        let before = copy.whole();
        if copy.apply(update).is_err() {
            assert_eq!(copy.whole(), before);
        }
    }
}

/// Changes an update in one of several ways, or not at all.
fn changed(update: &mut Update, how: u8) {
    match how {
        1 => drop(update.set.pop()),
        2 => drop(update.unset.pop()),
        3 => update.base = None,
        // The owner signs the head, so nobody can make it later.
        4 => update.head.revision.change = 0,
        5 => update.head.digest = [how; 32],
        6 => update.set.extend(update.set.first().cloned()),
        7 => update.unset.extend(update.set.first().map(Entry::key)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            super::tables(&bytes);
        }
    }

    #[test]
    fn corpus_passes() {
        ovl_corpus::replay("tables", super::tables);
    }
}
