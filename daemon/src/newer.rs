//! What later releases wrote and this one does not understand: it is kept and passed on, has no effect, and is a problem
//! that names it and its writer.

use std::collections::BTreeMap;

use ovl_cluster::view::View;
use ovl_proto::id::NodeId;
use ovl_proto::record::{RecordHead, SignedRecord};

use crate::objects::ObjectStore;

/// The maximum number of hosts whose records are not understood. Another one is not stored.
const MAX_UNREAD: usize = 64;

/// What is not understood of other hosts, besides their tables and objects.
#[derive(Debug, Default)]
pub(crate) struct Newer {
    /// The records, by host.
    records: BTreeMap<NodeId, UnreadRecord>,
    /// What messages of a host had that is not known, and how many such messages there were.
    messages: BTreeMap<NodeId, (String, u64)>,
}

/// A record that is not understood.
#[derive(Debug)]
pub(crate) struct UnreadRecord {
    /// What can be read of it.
    pub head: RecordHead,
    /// All of it.
    pub signed: SignedRecord,
    /// What is not known.
    pub why: String,
    /// Time in milliseconds since 1970 when it became known.
    pub since_ms: u64,
}

impl Newer {
    /// Stores a record. Returns whether it is later than the known one.
    pub(crate) fn take_record(&mut self, unread: UnreadRecord) -> bool {
        let id = unread.head.id;
        let order = |unread: &UnreadRecord| (unread.head.generation, unread.head.revision);
        let stale = self.records.get(&id).is_some_and(|known| order(known) >= order(&unread));
        if stale || (self.records.len() >= MAX_UNREAD && !self.records.contains_key(&id)) {
            return false;
        }
        self.records.insert(id, unread);
        true
    }

    /// Returns the records with the times since when they are known, for the state file.
    pub(crate) fn records(&self) -> impl Iterator<Item = (SignedRecord, u64)> {
        self.records.values().map(|unread| (unread.signed.clone(), unread.since_ms))
    }

    /// Counts a message. Returns whether it is the first one of its kind.
    pub(crate) fn take_message(&mut self, from: NodeId, what: String) -> bool {
        let (known, count) = self.messages.entry(from).or_default();
        *count = count.saturating_add(1);
        let new = *known != what;
        *known = what;
        new
    }

    /// Returns how many messages of a host were ignored.
    pub(crate) fn ignored(&self, host: NodeId) -> u64 {
        self.messages.get(&host).map_or(0, |(_, count)| *count)
    }

    /// Forgets what an earlier record and release of a host said.
    pub(crate) fn forget(&mut self, host: NodeId, upgraded: bool) {
        self.records.remove(&host);
        if upgraded {
            self.messages.remove(&host);
        }
    }

    /// Returns what is not understood, and for each a sentence for users.
    pub(crate) fn sentences(&self, view: &View, objects: &ObjectStore) -> Vec<(String, String)> {
        let advice = |writer: &str, what: &str| {
            format!(
                "host {writer} runs a later release of ovld, and this one does not know {what}, without which it must \
                 not act on that: it is kept and passed on, and has no effect here. Upgrade ovld on this host"
            )
        };
        let records = self.records.values().map(|unread| {
            let head = &unread.head;
            (
                format!("record of {}", head.name),
                format!("the record of a host: {}", advice(&head.name, &unread.why)),
            )
        });
        let messages = self.messages.iter().map(|(host, (what, _))| {
            let name = view.name_of(*host);
            (format!("messages of {name}"), format!("messages of a host: {}", advice(&name, what)))
        });
        let tables = view.nodes.values().filter_map(|node| {
            let name = &node.record.name;
            let what = node.table.opaque().next()?.why();
            Some((format!("table of {name}"), format!("entries of a table: {}", advice(name, &what))))
        });
        let objects = objects.all().opaque().map(|(key, writer, what)| {
            (key.to_string(), format!("{key}: {}", advice(&view.name_of(writer), what)))
        });
        records.chain(messages).chain(tables).chain(objects).collect()
    }
}

#[cfg(test)]
mod tests {
    use ovl_proto::clock::Clock;
    use ovl_proto::record::{Signature, WireVersions};

    use super::*;
    use crate::world::switched;

    fn unread(revision: u64) -> UnreadRecord {
        let head = RecordHead {
            id: NodeId([9; 10]),
            public_key: [0; 32],
            name: "newer".to_owned(),
            generation: 1,
            revision,
            cluster: 0,
            address: ([192, 0, 2, 1], 7940).into(),
            version: "9.0.0".to_owned(),
            wire: WireVersions::own(),
        };
        let signed = SignedRecord { body: Vec::new(), signature: Signature([0; 64]) };
        UnreadRecord { head, signed, why: "field 99 of NodeRecord".to_owned(), since_ms: 0 }
    }

    #[test]
    fn what_is_not_understood_names_itself_and_its_writer_until_it_is() {
        let (view, objects) = (switched(), ObjectStore::new(Clock::default()));
        let mut newer = Newer::default();
        assert!(
            newer.take_record(unread(2)) && !newer.take_record(unread(1)) && newer.take_record(unread(3))
        );
        assert_eq!(newer.records().count(), 1);
        let me = view.me;
        assert!(
            newer.take_message(me, "Message 70".to_owned())
                && !newer.take_message(me, "Message 70".to_owned())
        );
        assert_eq!(newer.ignored(me), 2);
        let sentences = newer.sentences(&view, &objects);
        assert_eq!(sentences.len(), 2);
        assert!(sentences[0].1.contains("host newer") && sentences[0].1.contains("field 99 of NodeRecord"));
        assert!(sentences[1].1.contains("Message 70"));
        newer.forget(NodeId([9; 10]), false);
        newer.forget(me, true);
        assert_eq!(newer.sentences(&view, &objects), []);
    }
}
