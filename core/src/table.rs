//! One node's owner table, as every node holds it.

use std::collections::BTreeMap;

use ovl_proto::id::NodeId;
use ovl_proto::record::Signature;
use ovl_proto::table::{Entry, Head, Key, Revision, Update};
use ovl_proto::wire;
use ring::digest::{Context, SHA256, digest};

/// Why an update was not taken in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// We have this state, or a later one.
    #[error("revision {0} is not news")]
    Stale(Revision),
    /// Changes before it are missing: pull the whole table.
    #[error("revision {has} is at hand and the update builds on {base}")]
    Gap {
        /// Ours.
        has: Revision,
        /// What it needs.
        base: Revision,
    },
    /// The entries are not those that the owner signed.
    #[error("the entries are not those that were signed")]
    Digest,
}

/// A table with the proof that its owner wrote it.
#[derive(Debug, Clone)]
pub struct Table {
    head: Head,
    signature: Signature,
    entries: BTreeMap<Key, (Entry, [u8; 32])>,
}

impl Table {
    /// An empty table, older than any that was ever signed.
    pub fn new(owner: NodeId) -> Self {
        let head = Head { owner, revision: Revision::default(), digest: [0; 32] };
        Self { head, signature: Signature([0; 64]), entries: BTreeMap::new() }
    }

    /// Its state.
    pub fn revision(&self) -> Revision {
        self.head.revision
    }

    /// All entries, by key.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values().map(|(entry, _)| entry)
    }

    /// The peers to which the path carries less than the owner's link, and how much: few entries, at
    /// the end of the table.
    pub fn path_mtus(&self) -> impl Iterator<Item = (NodeId, u16)> {
        self.entries.range(Key::PathMtu(NodeId::default())..).filter_map(|(_, (entry, _))| match entry {
            Entry::PathMtu { peer, mtu } => Some((*peer, *mtu)),
            Entry::Endpoint(_) | Entry::Lease { .. } => None,
        })
    }

    /// One entry.
    pub fn get(&self, key: &Key) -> Option<&Entry> {
        self.entries.get(key).map(|(entry, _)| entry)
    }

    /// Takes in an update whose signature was checked.
    pub fn apply(&mut self, update: Update) -> Result<(), Rejected> {
        if update.head.revision <= self.head.revision {
            return Err(Rejected::Stale(update.head.revision));
        }
        let mut next = match update.base {
            None => BTreeMap::new(),
            Some(base) if base != self.head.revision => {
                return Err(Rejected::Gap { has: self.head.revision, base });
            }
            // The changes are undone if the digest does not fit; a copy of the keys touched is
            // cheaper than one of the table.
            Some(_) => return self.apply_change(update),
        };
        for entry in update.set {
            insert(&mut next, entry);
        }
        if digest_of(&next) != update.head.digest {
            return Err(Rejected::Digest);
        }
        self.entries = next;
        self.head = update.head;
        self.signature = update.signature;
        Ok(())
    }

    fn apply_change(&mut self, update: Update) -> Result<(), Rejected> {
        let mut before = Vec::with_capacity(update.set.len() + update.unset.len());
        for key in &update.unset {
            before.push((*key, self.entries.remove(key)));
        }
        for entry in update.set {
            let key = entry.key();
            before.push((key, insert(&mut self.entries, entry)));
        }
        if digest_of(&self.entries) != update.head.digest {
            for (key, old) in before.into_iter().rev() {
                match old {
                    Some(old) => self.entries.insert(key, old),
                    None => self.entries.remove(&key),
                };
            }
            return Err(Rejected::Digest);
        }
        self.head = update.head;
        self.signature = update.signature;
        Ok(())
    }

    /// The whole table, for a node that has it not; nothing before the owner has signed any state.
    pub fn whole(&self) -> Option<Update> {
        (self.head.revision != Revision::default()).then(|| Update {
            head: self.head.clone(),
            signature: self.signature,
            base: None,
            set: self.entries().cloned().collect(),
            unset: Vec::new(),
        })
    }

    /// Makes a change as the owner and returns what to push to the peers. The first change of an
    /// epoch is sent as the whole table.
    pub fn write(
        &mut self,
        epoch: u64,
        set: Vec<Entry>,
        unset: Vec<Key>,
        sign: impl FnOnce(&Head) -> Signature,
    ) -> Update {
        let begun = self.head.revision.epoch == epoch;
        for key in &unset {
            self.entries.remove(key);
        }
        for entry in &set {
            insert(&mut self.entries, entry.clone());
        }
        let base = self.head.revision;
        let change = if begun { base.change + 1 } else { 1 };
        self.head.revision = Revision { epoch, change };
        self.head.digest = digest_of(&self.entries);
        self.signature = sign(&self.head);
        let (base, set, unset) = if begun {
            (Some(base), set, unset)
        } else {
            (None, self.entries().cloned().collect(), Vec::new())
        };
        Update { head: self.head.clone(), signature: self.signature, base, set, unset }
    }
}

fn insert(entries: &mut BTreeMap<Key, (Entry, [u8; 32])>, entry: Entry) -> Option<(Entry, [u8; 32])> {
    // An entry that cannot be encoded cannot have been received or sent either; its hash is then
    // that of nothing, which no peer's is.
    let hash = hash(&wire::encode_body(&entry).unwrap_or_default());
    entries.insert(entry.key(), (entry, hash))
}

fn hash(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(digest(&SHA256, bytes).as_ref());
    out
}

fn digest_of(entries: &BTreeMap<Key, (Entry, [u8; 32])>) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    for (_, hash) in entries.values() {
        context.update(hash);
    }
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    out
}

#[cfg(test)]
mod tests {
    use ovl_proto::id::NetworkId;

    use super::*;

    fn lease(last: u8) -> Entry {
        Entry::Lease {
            network: NetworkId::default(),
            address: [10, 0, 0, last].into(),
            to: NodeId::default(),
        }
    }

    fn sign(_: &Head) -> Signature {
        Signature([1; 64])
    }

    #[test]
    fn changes_travel_and_gaps_are_noticed() {
        let owner = NodeId([1; 10]);
        let (mut here, mut there) = (Table::new(owner), Table::new(owner));
        let first = here.write(7, vec![lease(1)], vec![], sign);
        assert_eq!(first.base, None);
        there.apply(first.clone()).unwrap();
        let second = here.write(7, vec![lease(2), lease(3)], vec![lease(1).key()], sign);
        let third = here.write(7, vec![], vec![lease(2).key()], sign);
        assert_eq!(
            there.apply(third.clone()),
            Err(Rejected::Gap { has: first.head.revision, base: second.head.revision })
        );
        there.apply(second).unwrap();
        there.apply(third.clone()).unwrap();
        assert_eq!(there.apply(third), Err(Rejected::Stale(there.revision())));
        assert_eq!(there.entries().cloned().collect::<Vec<_>>(), [lease(3)]);

        let mut late = Table::new(owner);
        late.apply(there.whole().unwrap()).unwrap();
        assert_eq!(late.entries().collect::<Vec<_>>(), here.entries().collect::<Vec<_>>());
    }

    #[test]
    fn entries_that_were_not_signed_are_refused_and_leave_nothing() {
        let owner = NodeId([1; 10]);
        let (mut here, mut there) = (Table::new(owner), Table::new(owner));
        there.apply(here.write(1, vec![lease(1), lease(2)], vec![], sign)).unwrap();
        let mut forged = here.write(1, vec![lease(3)], vec![lease(1).key()], sign);
        forged.set.push(lease(9));
        assert_eq!(there.apply(forged), Err(Rejected::Digest));
        assert_eq!(there.entries().cloned().collect::<Vec<_>>(), [lease(1), lease(2)]);
        let mut forged = here.whole().unwrap();
        forged.set.pop();
        assert_eq!(there.apply(forged), Err(Rejected::Digest));
    }

    #[test]
    fn a_new_epoch_begins_with_the_whole_table() {
        let owner = NodeId([1; 10]);
        let (mut here, mut there) = (Table::new(owner), Table::new(owner));
        there.apply(here.write(1, vec![lease(1)], vec![], sign)).unwrap();
        let update = here.write(2, vec![lease(2)], vec![], sign);
        assert_eq!((update.base, update.set.len()), (None, 2));
        there.apply(update).unwrap();
        assert_eq!(there.revision(), Revision { epoch: 2, change: 1 });
    }
}
