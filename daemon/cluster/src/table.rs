//! The owner table of a host, as every host stores it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use ovl_proto::id::{EndpointId, Mac, NetworkId, NodeId};
use ovl_proto::record::Signature;
use ovl_proto::table::{Endpoint, Entry, Head, Key, Opaque, Revision, Update, canonical_name, is_same_name};
use ovl_proto::wire;
use ovl_proto::wire::fields::Unknown;

use crate::digest::{Digest, Hash, hash};
use crate::index::EndpointIndex;
use crate::labels::SharedLabels;

/// Why an update was rejected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejected {
    /// This revision, or a later one, is known.
    #[error("revision {0} is not newer than the known one")]
    Stale(Revision),
    /// Earlier changes are missing: pull the whole table.
    #[error("the update builds on revision {base}, but revision {has} is known")]
    Gap {
        /// The known revision.
        has: Revision,
        /// The revision that the update builds on.
        base: Revision,
    },
    /// The entries do not match the signed digest.
    #[error("the entries do not match the signed digest")]
    Digest,
    /// The table would have too many entries, or be too large.
    #[error(
        "the table would have {entries} entries and {bytes} bytes, and at most {MAX_ENTRIES} and {MAX_BYTES} are allowed"
    )]
    TooLarge {
        /// The number of entries.
        entries: usize,
        /// The size of the encoded entries.
        bytes: usize,
    },
}

/// The maximum number of entries of a table.
pub const MAX_ENTRIES: usize = 65_536;
/// The maximum size of the encoded entries of a table, in bytes. The whole table must fit one message.
pub const MAX_BYTES: usize = wire::MAX_FRAME - (64 << 10);

/// An owner table with its owner's signature.
#[derive(Debug, Clone)]
pub struct Table {
    head: Head,
    signature: Signature,
    /// The time of the changes that the owner writes now, in milliseconds since 1970. It is not part of the table.
    now_ms: Option<u64>,
    contents: TableContents,
}

/// The entries of a table with their indexes, which are updated with each entry.
#[derive(Debug, Clone, Default)]
struct TableContents {
    /// The entries by key, with their hashes. Entries without a hash are private to the owner: they are not in the digest
    /// and not sent. Boxed, because half of the places in the nodes of a map are empty.
    entries: BTreeMap<Key, Box<(Entry, Option<Hash>)>>,
    labels: SharedLabels,
    /// The size of the encoded entries.
    bytes: usize,
    /// How many entries are not understood.
    opaque: usize,
    index: EndpointIndex,
    digest: Digest,
}

impl Table {
    /// Creates an empty table, older than any signed one.
    pub fn new(owner: NodeId) -> Self {
        let head = Head {
            owner,
            revision: Revision::default(),
            digest: [0; 32],
            written_ms: None,
            unknown: Unknown::default(),
        };
        Self { head, signature: Signature([0; 64]), now_ms: None, contents: TableContents::default() }
    }

    /// Returns the revision.
    pub fn revision(&self) -> Revision {
        self.head.revision
    }

    /// Returns all entries by key.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.contents.entries.values().map(|stored| &stored.0)
    }

    /// Returns all endpoints by id.
    pub fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        // Endpoints come first in the order of keys.
        let entries = self.entries().take_while(|entry| matches!(entry.key(), Key::Endpoint(_)));
        entries.filter_map(as_endpoint)
    }

    /// Returns an endpoint.
    pub fn endpoint(&self, id: EndpointId) -> Option<&Endpoint> {
        self.get(&Key::Endpoint(id)).and_then(as_endpoint)
    }

    /// Returns the networks with endpoints.
    pub fn networks(&self) -> impl Iterator<Item = NetworkId> {
        self.contents.index.networks()
    }

    /// Returns the endpoints on a network by id.
    pub fn endpoints_on(&self, network: NetworkId) -> impl Iterator<Item = &Endpoint> {
        self.contents.index.on(network).filter_map(|id| self.endpoint(id))
    }

    /// Returns the endpoints with an address on a network.
    pub fn with_address(&self, network: NetworkId, address: IpAddr) -> impl Iterator<Item = &Endpoint> {
        self.contents.index.with_address(network, address).filter_map(|id| self.endpoint(id))
    }

    /// Returns the endpoints with a MAC address on a network.
    pub fn with_mac(&self, network: NetworkId, mac: Mac) -> impl Iterator<Item = &Endpoint> {
        self.contents.index.with_mac(network, mac).filter_map(|id| self.endpoint(id))
    }

    /// Returns the endpoints on a network that may send from an address that is not their own.
    pub fn allowing_address(&self, network: NetworkId, address: IpAddr) -> impl Iterator<Item = &Endpoint> {
        self.contents.index.allowing_address(network, address).filter_map(|id| self.endpoint(id))
    }

    /// Returns the endpoints on a network that may send from a MAC address that is not their own.
    pub fn allowing_mac(&self, network: NetworkId, mac: Mac) -> impl Iterator<Item = &Endpoint> {
        self.contents.index.allowing_mac(network, mac).filter_map(|id| self.endpoint(id))
    }

    /// Returns the endpoints of a name, in any spelling of it, on any network and in any namespace: see
    /// [`ovl_proto::table::canonical_name`].
    pub fn named<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a Endpoint> + use<'a> {
        let name = canonical_name(name);
        let called = self.contents.index.called(&name).filter_map(|id| self.endpoint(id));
        called.filter(move |endpoint| is_same_name(&endpoint.name, &name))
    }

    /// Returns the endpoints of a pod by its name, on any network and in any namespace: see [`Endpoint::pod_name`].
    pub fn of_pod<'a>(&'a self, name: &str) -> impl Iterator<Item = &'a Endpoint> + use<'a> {
        let called = self.contents.index.called(&canonical_name(name)).filter_map(|id| self.endpoint(id));
        let name = name.to_owned();
        called.filter(move |endpoint| {
            endpoint.pod.as_ref().map_or(&endpoint.name, |pod| &pod.name).as_str() == name
        })
    }

    /// Returns the endpoints with a name, alias or pod's name, given in its canonical form, on any network.
    pub fn called(&self, name: &str) -> impl Iterator<Item = &Endpoint> {
        self.contents.index.called(name).filter_map(|id| self.endpoint(id))
    }

    /// Returns the subnets with which endpoints on a network were attached.
    pub fn ranges(&self, network: NetworkId) -> impl Iterator<Item = IpNet> {
        self.contents.index.ranges(network)
    }

    /// Returns the multicast groups that endpoints on a network have joined, as far as the owner follows them: see
    /// [`Self::follows_groups`].
    pub fn groups(&self, network: NetworkId) -> impl Iterator<Item = IpAddr> {
        self.contents.index.groups(network)
    }

    /// Whether the owner follows the multicast groups of all its endpoints on a network. Otherwise it gets the packets of
    /// all groups.
    pub fn follows_groups(&self, network: NetworkId) -> bool {
        self.contents.index.is_followed(network)
    }

    /// Returns the path MTUs that are less than the MTU of the owner's link. They are few, at the end of the table.
    pub fn path_mtus(&self) -> impl Iterator<Item = (NodeId, u16)> {
        let entries = self.contents.entries.range(Key::PathMtu(NodeId::default())..);
        entries.filter_map(|(_, stored)| match &stored.0 {
            Entry::PathMtu { peer, mtu } => Some((*peer, *mtu)),
            Entry::Endpoint(_)
            | Entry::Lease { .. }
            | Entry::Held(_)
            | Entry::Announced(_)
            | Entry::Unreached(_)
            | Entry::Opaque(_) => None,
        })
    }

    /// Returns the entries that this release does not understand.
    pub fn opaque(&self) -> impl Iterator<Item = &Opaque> {
        // Most tables have none, so that the others are not looked at.
        let entries = (self.contents.opaque > 0).then(|| self.entries());
        entries.into_iter().flatten().filter_map(|entry| match entry {
            Entry::Opaque(opaque) => Some(opaque),
            Entry::Endpoint(_)
            | Entry::Lease { .. }
            | Entry::PathMtu { .. }
            | Entry::Held(_)
            | Entry::Announced(_)
            | Entry::Unreached(_) => None,
        })
    }

    /// Whether a container engine of the owner refers to a network.
    pub fn holds(&self, network: NetworkId) -> bool {
        matches!(self.get(&Key::Held(network)), Some(Entry::Held(_)))
    }

    /// Whether the owner announces an address of a LoadBalancer.
    pub fn announces(&self, address: IpAddr) -> bool {
        matches!(self.get(&Key::Announced(address)), Some(Entry::Announced(_)))
    }

    /// Returns all addresses that the owner announces.
    pub fn announced(&self) -> impl Iterator<Item = IpAddr> {
        let lowest = Key::Announced(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        self.contents.entries.range(lowest..).filter_map(|(_, stored)| match &stored.0 {
            Entry::Announced(address) => Some(*address),
            Entry::Endpoint(_)
            | Entry::Lease { .. }
            | Entry::PathMtu { .. }
            | Entry::Held(_)
            | Entry::Unreached(_)
            | Entry::Opaque(_) => None,
        })
    }

    /// Returns the live hosts that the owner does not reach directly. They are few, at the end of the table.
    pub fn unreached(&self) -> impl Iterator<Item = NodeId> {
        self.contents.entries.range(Key::Unreached(NodeId::default())..).filter_map(|(key, _)| match key {
            Key::Unreached(peer) => Some(*peer),
            Key::Endpoint(_)
            | Key::Lease(..)
            | Key::PathMtu(_)
            | Key::Held(_)
            | Key::Announced(_)
            | Key::Unknown(_) => None,
        })
    }

    /// Returns an entry.
    pub fn get(&self, key: &Key) -> Option<&Entry> {
        self.contents.entries.get(key).map(|stored| &stored.0)
    }

    /// Applies an update whose signature was verified.
    ///
    /// # Errors
    ///
    /// If the update is outdated, builds on an unknown revision, does not match its digest, or makes the table too
    /// large. The table is unchanged then.
    pub fn apply(&mut self, update: Update) -> Result<(), Rejected> {
        if update.head.revision <= self.head.revision {
            return Err(Rejected::Stale(update.head.revision));
        }
        match update.base {
            None => {
                let mut next = TableContents::default();
                for entry in update.set {
                    next.put(entry, true);
                    next.check_size()?;
                }
                if next.digest.total() != update.head.digest {
                    return Err(Rejected::Digest);
                }
                self.contents = next;
            }
            Some(base) if base != self.head.revision => {
                return Err(Rejected::Gap { has: self.head.revision, base });
            }
            // The changes are undone if the digest does not match. A copy of the changed entries is cheaper than
            // one of the table.
            Some(_) => self.contents.change(update.set, &update.unset, &update.head.digest)?,
        }
        self.head = update.head;
        self.signature = update.signature;
        Ok(())
    }

    /// Returns the whole table as an update; `None` before the owner has signed any revision.
    pub fn whole(&self) -> Option<Update> {
        (self.head.revision != Revision::default()).then(|| Update {
            head: self.head.clone(),
            signature: self.signature,
            base: None,
            set: self.contents.shared().cloned().collect(),
            unset: Vec::new(),
        })
    }

    /// Returns the number of entries, and their size encoded, in bytes.
    pub fn size(&self) -> (usize, usize) {
        (self.contents.entries.len(), self.contents.bytes)
    }

    /// Whether there is room for this number of entries, of this total size in bytes. An owner asks before it writes.
    pub fn has_room(&self, entries: usize, bytes: usize) -> bool {
        self.contents.entries.len() + entries <= MAX_ENTRIES && self.contents.bytes + bytes <= MAX_BYTES
    }

    /// Sets the time of the changes that the owner writes from now on, in milliseconds since 1970.
    pub fn set_time(&mut self, now_ms: u64) {
        self.now_ms = Some(now_ms);
    }

    /// Writes a change as the owner, and returns the update for the peers. The first update of an epoch is the whole
    /// table.
    pub fn write(
        &mut self,
        epoch: u64,
        set: Vec<Entry>,
        unset: Vec<Key>,
        sign: impl FnOnce(&Head) -> Signature,
    ) -> Update {
        let begun = self.head.revision.epoch == epoch;
        for key in &unset {
            self.contents.take(key);
        }
        for entry in &set {
            self.contents.put(entry.clone(), true);
        }
        let base = self.head.revision;
        let change = if begun { base.change + 1 } else { 1 };
        self.head.revision = Revision { epoch, change };
        self.head.digest = self.contents.digest.total();
        self.head.written_ms = self.now_ms;
        self.signature = sign(&self.head);
        let (base, set, unset) = if begun {
            (Some(base), set, unset)
        } else {
            (None, self.contents.shared().cloned().collect(), Vec::new())
        };
        Update { head: self.head.clone(), signature: self.signature, base, set, unset }
    }

    /// Writes a change of private entries: peers are not informed, and the revision stays.
    pub fn keep(&mut self, set: Vec<Entry>, unset: &[Key]) {
        for key in unset {
            self.contents.take(key);
        }
        for entry in set {
            self.contents.put(entry, false);
        }
    }

    /// Whether an entry exists and is private to the owner.
    pub fn is_kept(&self, key: &Key) -> bool {
        self.contents.entries.get(key).is_some_and(|stored| stored.1.is_none())
    }
}

fn as_endpoint(entry: &Entry) -> Option<&Endpoint> {
    match entry {
        Entry::Endpoint(endpoint) => Some(endpoint),
        Entry::Lease { .. }
        | Entry::PathMtu { .. }
        | Entry::Held(_)
        | Entry::Announced(_)
        | Entry::Unreached(_)
        | Entry::Opaque(_) => None,
    }
}

impl TableContents {
    /// Returns the entries that are sent to peers.
    fn shared(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values().filter(|stored| stored.1.is_some()).map(|stored| &stored.0)
    }

    /// Adds or replaces an entry. Returns the replaced entry.
    fn put(&mut self, mut entry: Entry, shared: bool) -> Option<Entry> {
        // An entry that cannot be encoded was never received or sent either. Its hash is then that of no bytes,
        // which no peer has.
        let encoded = wire::encode_body(&entry).unwrap_or_default();
        let hash = shared.then(|| hash(&encoded));
        let key = entry.key();
        let old = self.take(&key);
        self.bytes += encoded.len();
        match &mut entry {
            Entry::Endpoint(endpoint) => {
                self.labels.share(&mut endpoint.labels);
                self.index.insert(endpoint);
            }
            Entry::Opaque(_) => self.opaque += 1,
            Entry::Lease { .. }
            | Entry::PathMtu { .. }
            | Entry::Held(_)
            | Entry::Announced(_)
            | Entry::Unreached(_) => {}
        }
        if let Some(hash) = hash {
            self.digest.insert(hash);
        }
        self.entries.insert(key, Box::new((entry, hash)));
        old
    }

    fn take(&mut self, key: &Key) -> Option<Entry> {
        let (entry, hash) = *self.entries.remove(key)?;
        self.bytes -= wire::encode_body(&entry).map_or(0, |bytes| bytes.len());
        match &entry {
            Entry::Endpoint(endpoint) => {
                self.labels.release(&endpoint.labels);
                self.index.remove(endpoint);
            }
            Entry::Opaque(_) => self.opaque -= 1,
            Entry::Lease { .. }
            | Entry::PathMtu { .. }
            | Entry::Held(_)
            | Entry::Announced(_)
            | Entry::Unreached(_) => {}
        }
        if let Some(hash) = hash {
            self.digest.remove(&hash);
        }
        Some(entry)
    }

    /// Applies a change, or undoes it if the digest does not match.
    fn change(&mut self, set: Vec<Entry>, unset: &[Key], signed: &Hash) -> Result<(), Rejected> {
        let mut before = Vec::with_capacity(set.len() + unset.len());
        for key in unset {
            before.push((*key, self.take(key)));
        }
        for entry in set {
            before.push((entry.key(), self.put(entry, true)));
        }
        let size = self.check_size();
        if size.is_ok() && self.digest.total() == *signed {
            return Ok(());
        }
        for (key, old) in before.into_iter().rev() {
            match old {
                Some(old) => self.put(old, true),
                None => self.take(&key),
            };
        }
        Err(size.err().unwrap_or(Rejected::Digest))
    }

    /// Whether the table has a size that is allowed.
    fn check_size(&self) -> Result<(), Rejected> {
        let (entries, bytes) = (self.entries.len(), self.bytes);
        if entries > MAX_ENTRIES || bytes > MAX_BYTES {
            return Err(Rejected::TooLarge { entries, bytes });
        }
        Ok(())
    }
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
    fn updates_apply_and_gaps_are_detected() {
        let owner = NodeId([1; 10]);
        let (mut here, mut there) = (Table::new(owner), Table::new(owner));
        here.set_time(5_000);
        let first = here.write(7, vec![lease(1)], vec![], sign);
        // The signed head says when it was written, and stays as it is until the next change.
        here.set_time(6_000);
        assert_eq!(first.head.written_ms, Some(5_000));
        assert_eq!(here.whole().unwrap().head.written_ms, Some(5_000));
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
    fn forged_update_is_rejected_and_undone() {
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
    fn table_is_bounded_by_entries_and_bytes() {
        let owner = NodeId([1; 10]);
        let (mut here, mut there) = (Table::new(owner), Table::new(owner));
        let many = |count: usize| -> Vec<Entry> {
            (0..count)
                .map(|number| Entry::Lease {
                    network: NetworkId::default(),
                    address: IpAddr::from((number as u32).to_be_bytes()),
                    to: NodeId::default(),
                })
                .collect()
        };
        let whole = here.write(1, many(MAX_ENTRIES), vec![], sign);
        there.apply(whole).unwrap();
        assert!(!there.has_room(1, 20) && there.has_room(0, 0));
        let revision = there.revision();
        let one_more = here.write(1, many(MAX_ENTRIES + 1).split_off(MAX_ENTRIES), vec![], sign);
        assert!(
            matches!(there.apply(one_more), Err(Rejected::TooLarge { entries, .. }) if entries > MAX_ENTRIES)
        );
        assert_eq!((there.revision(), there.entries().count()), (revision, MAX_ENTRIES), "it is undone");
        let whole = here.whole().unwrap();
        assert!(matches!(Table::new(owner).apply(whole), Err(Rejected::TooLarge { .. })));

        let large = |number: u8| {
            Entry::Endpoint(Endpoint {
                id: EndpointId([number; 5]),
                name: "large".to_owned(),
                namespace: "default".to_owned(),
                network: NetworkId::default(),
                mac: Mac([2, 0, 0, 0, 0, number]),
                addresses: vec![],
                aliases: vec![],
                labels: [("k".to_owned(), "x".repeat(1 << 20))].into(),
                ready: true,
                publish: vec![],
                allowed: vec![],
                allowed_macs: vec![],
                groups: None,
                described: None,
                pod: None,
                unknown: Unknown::default(),
            })
        };
        let (mut here, mut there) = (Table::new(owner), Table::new(owner));
        there.apply(here.write(1, (0..15).map(large).collect(), vec![], sign)).unwrap();
        let update = here.write(1, vec![large(15)], vec![], sign);
        assert!(matches!(there.apply(update), Err(Rejected::TooLarge { .. })));
        // What replaces an entry does not count twice.
        here.write(1, vec![], vec![large(15).key()], sign);
        let mut there = Table::new(owner);
        there.apply(here.whole().unwrap()).unwrap();
        there.apply(here.write(1, vec![large(3)], vec![], sign)).unwrap();
        assert_eq!(there.contents.bytes, here.contents.bytes);
    }

    #[test]
    #[ignore = "a measurement"]
    fn cost_of_a_full_table() {
        let resident = || -> usize {
            let text = std::fs::read_to_string("/proc/self/statm").unwrap();
            text.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
        };
        let owner = NodeId([1; 10]);
        let mut here = Table::new(owner);
        let endpoints = (0..MAX_ENTRIES as u32).map(|number| {
            let [_, a, b, c] = number.to_be_bytes();
            Entry::Endpoint(Endpoint {
                id: EndpointId([0, 0, a, b, c]),
                name: format!("endpoint-{number}"),
                namespace: "default".to_owned(),
                network: NetworkId::default(),
                mac: Mac([2, 0, 0, a, b, c]),
                addresses: vec![IpNet::new(IpAddr::from([10, a, b, c]), 8).unwrap()],
                aliases: vec![],
                labels: [("app".to_owned(), "x".repeat(150))].into(),
                ready: true,
                publish: vec![],
                allowed: vec![],
                allowed_macs: vec![],
                groups: None,
                described: None,
                pod: None,
                unknown: Unknown::default(),
            })
        });
        let whole = here.write(1, endpoints.collect(), vec![], sign);
        let (before, start) = (resident(), std::time::Instant::now());
        let mut there = Table::new(owner);
        there.apply(whole).unwrap();
        let time = start.elapsed();
        println!(
            "{} bytes encoded, {} more resident, {time:?}",
            there.contents.bytes,
            resident().saturating_sub(before)
        );
    }

    #[test]
    fn private_entries_are_not_sent() {
        let owner = NodeId([1; 10]);
        let (mut here, mut there) = (Table::new(owner), Table::new(owner));
        here.keep(vec![lease(9)], &[]);
        assert!(here.whole().is_none());
        there.apply(here.write(1, vec![lease(1)], vec![], sign)).unwrap();
        let state = here.revision();
        here.keep(vec![lease(8)], &[lease(9).key()]);
        assert_eq!((here.revision(), here.is_kept(&lease(8).key())), (state, true));
        assert_eq!(here.entries().count(), 2);
        there.apply(here.write(2, vec![lease(2)], vec![], sign)).unwrap();
        assert_eq!(there.entries().cloned().collect::<Vec<_>>(), [lease(1), lease(2)]);
        here.keep(vec![], &[lease(8).key()]);
        assert_eq!(here.whole(), there.whole());
    }

    #[test]
    fn new_epoch_starts_with_the_whole_table() {
        let owner = NodeId([1; 10]);
        let (mut here, mut there) = (Table::new(owner), Table::new(owner));
        there.apply(here.write(1, vec![lease(1)], vec![], sign)).unwrap();
        let update = here.write(2, vec![lease(2)], vec![], sign);
        assert_eq!((update.base, update.set.len()), (None, 2));
        there.apply(update).unwrap();
        assert_eq!(there.revision(), Revision { epoch: 2, change: 1 });
    }
}
