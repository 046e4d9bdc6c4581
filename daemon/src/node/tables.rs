//! Owner tables: writing our own, taking in those of others.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result};
use ovl_cluster::table::{Rejected, Table};
use ovl_files::{Durability, replace};
use ovl_mesh::keys;
use ovl_proto::id::{Mac, NetworkId, NodeId};
use ovl_proto::record::{Domain, Signature};
use ovl_proto::sync::Message;
use ovl_proto::table::{Entry, Head, Key, Update};
use ovl_proto::wire;
use ovl_runtimes::cni::MAX_NAME;
use ovl_subsystems::publish::MOST_RANGES;

use super::Node;
use super::state::State;
use crate::config::{is_name, is_name_within};
use ovl_subsystems::Change;

/// A borrower that never showed a leased address in its table loses it after this time.
const UNUSED_LEASE_MS: u64 = 60_000;
/// As many as a network has subnets.
const MAX_ADDRESSES: usize = 16;
/// A pull that was not answered is repeated after this time.
const PULL_AGAIN_MS: u64 = 1_000;

impl Node {
    /// Changes our own table and pushes the change to all peers at once.
    pub(super) fn write_table(&self, set: Vec<Entry>, unset: Vec<Key>) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let me = state.view.me;
        let Some(own) = state.view.nodes.get_mut(&me) else { return };
        let before = entries_of(&own.table, &set, &unset);
        let after = set.clone();
        let networks: Vec<NetworkId> = own.table.networks().collect();
        let epoch = own.record.generation;
        // What is on this host's own networks concerns nobody else.
        let is_own = |entry: &Entry| match entry {
            Entry::Endpoint(endpoint) => state.bridges.contains_key(&endpoint.network),
            Entry::Lease { .. } | Entry::PathMtu { .. } | Entry::Held(_) | Entry::Announced(_) => false,
        };
        let (kept, set): (Vec<Entry>, Vec<Entry>) = set.into_iter().partition(is_own);
        let (dropped, unset): (Vec<Key>, Vec<Key>) =
            unset.into_iter().partition(|key| own.table.is_kept(key));
        let silent = set.is_empty() && unset.is_empty() && !(kept.is_empty() && dropped.is_empty());
        own.table.keep(kept, &dropped);
        let update = (!silent || own.table.revision().epoch != epoch)
            .then(|| own.table.write(epoch, set, unset, |head| self.sign_head(head)));
        let built: Vec<NetworkId> = own.table.networks().collect();
        let moved = networks
            .iter()
            .filter(|id| !built.contains(id))
            .chain(built.iter().filter(|id| !networks.contains(id)));
        moved.for_each(|network| state.changed(Change::Built(*network)));
        before.iter().chain(&after).for_each(|entry| state.changed(Change::Entry { host: me, entry }));
        if let Some(update) = update {
            self.links().broadcast(&Message::Table(update));
            self.publish_hints(state);
        }
        self.work.notify_one();
        drop(guard);
        // Whoever hears that an endpoint came or went can rely on its name.
        self.refresh_names();
    }

    fn sign_head(&self, head: &Head) -> Signature {
        match wire::encode_body(head) {
            Ok(body) => self.identity.sign(Domain::Table, &body),
            // Fixed fields only: it always can be encoded. Peers would refuse this one.
            Err(_) => Signature([0; 64]),
        }
    }

    /// Takes in an update of another node's table; pulls the whole table if changes are missing.
    pub(super) fn take_table(&self, from: NodeId, update: Update) {
        let owner = update.head.owner;
        let outcome = self.apply_update(from, update);
        match outcome {
            Ok((returned, moved)) => {
                self.return_leases(returned);
                if moved {
                    self.recompute_networks();
                }
                self.work.notify_one();
                // The loop may be waiting for the kernel.
                self.refresh_names();
            }
            Err(Some(Rejected::Gap { .. })) => self.pull_table(owner),
            Err(Some(Rejected::Stale(_)) | None) => {}
            Err(Some(error @ Rejected::Digest)) => {
                tracing::warn!(%owner, %from, %error, "refused a table");
                self.pull_table(owner);
            }
        }
    }

    /// The leases that the update gives back, and whether it is about other networks than before; an
    /// error without a reason for one that is not for us or not signed.
    fn apply_update(&self, from: NodeId, update: Update) -> Result<(Vec<Key>, bool), Option<Rejected>> {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let owner = update.head.owner;
        if owner == state.view.me {
            return Err(None);
        }
        // Without a record there is no key to check the signature with: it comes by gossip, and the
        // table is pulled then.
        let node = state.view.nodes.get_mut(&owner).ok_or(None)?;
        let signed = wire::encode_body(&update.head)
            .is_ok_and(|body| keys::verify(&node.record.public_key, Domain::Table, &body, &update.signature));
        if !signed {
            tracing::warn!(%owner, %from, "refused a table that its owner did not sign");
            return Err(None);
        }
        if let Some(error) = update.set.iter().find_map(|entry| check_entry(entry).err()) {
            tracing::warn!(%owner, %from, error, "refused a table");
            return Err(None);
        }
        let networks: Vec<NetworkId> = node.table.networks().collect();
        let (mut changed, mut rights) = (Vec::new(), BTreeSet::new());
        let whole = update.base.is_none();
        if whole {
            rights.extend(networks_of(&node.table));
        } else {
            changed = entries_of(&node.table, &update.set, &update.unset);
            changed.extend_from_slice(&update.set);
        }
        let announced = node.table.announced().next().is_some();
        node.table.apply(update).map_err(Some)?;
        tracing::debug!(%owner, revision = %node.table.revision(), "table");
        let moved = !node.table.networks().eq(networks);
        if whole {
            rights.extend(networks_of(&node.table));
            let announced = announced || node.table.announced().next().is_some();
            rights.into_iter().for_each(|network| state.changed(Change::Rights(network)));
            if announced {
                state.changed(Change::Announcers);
            }
        }
        changed.iter().for_each(|entry| state.changed(Change::Entry { host: owner, entry }));
        state.uncached.insert(owner);
        if let Some(peer) = state.peers.get_mut(&owner) {
            peer.pulled_at = None;
        }
        Ok((returned_leases(state, owner), moved))
    }

    /// Asks for a node's whole table: the node itself, or else anyone.
    pub(super) fn pull_table(&self, owner: NodeId) {
        let mut state = self.state.borrow_mut();
        let now = state.now();
        let Some(peer) = state.peers.get_mut(&owner) else { return };
        let again = peer.pulled_at.is_some();
        if peer.pulled_at.is_some_and(|at| now.saturating_sub(at) < PULL_AGAIN_MS) {
            return;
        }
        peer.pulled_at = Some(now);
        let connected = self.links().connected();
        // Where the owner did not answer it takes turns with the others: it may be the only one that
        // has the table, and it may be the only one that cannot be reached.
        let others: Vec<NodeId> = connected.iter().copied().filter(|id| *id != owner).collect();
        let turn = usize::try_from(now / PULL_AGAIN_MS).unwrap_or(0);
        let ask_owner = connected.contains(&owner) && (!again || turn.is_multiple_of(2));
        let other = others.get(turn / 2 % others.len().max(1)).filter(|_| !ask_owner);
        let target = *other.unwrap_or(&owner);
        self.links().send(target, &Message::TablePull(owner));
    }

    /// Answers [`Message::TablePull`].
    pub(super) fn send_table(&self, to: NodeId, owner: NodeId) {
        let whole = self.state.borrow().view.nodes.get(&owner).and_then(|node| node.table.whole());
        let answer = whole.map_or(Message::TableUnknown(owner), Message::Table);
        self.links().send(to, &answer);
    }

    /// Pulls every table that is behind what its owner announces.
    pub(super) fn pull_missing(&self) {
        let behind: Vec<NodeId> = {
            let state = self.state.borrow();
            let is_behind = |id: &NodeId, announced| {
                state.view.nodes.get(id).is_some_and(|node| node.table.revision() < announced)
            };
            let peers = state.peers.iter();
            peers.filter(|(id, peer)| is_behind(id, peer.hints.table)).map(|(id, _)| *id).collect()
        };
        for owner in behind {
            self.pull_table(owner);
        }
    }

    /// Takes leases out of our table whose borrowers are done with them.
    fn return_leases(&self, returned: Vec<Key>) {
        if !returned.is_empty() {
            self.write_table(Vec::new(), returned);
            self.save_soon();
        }
    }

    /// Takes back leases that were given and never used.
    pub(super) fn expire_leases(&self) {
        let expired: Vec<Key> = {
            let mut guard = self.state.borrow_mut();
            let state = &mut *guard;
            let (now, alive, member) = (state.now(), state.alive(), state.is_member());
            let mut expired = Vec::new();
            let State { view, lent, .. } = state;
            lent.retain(|(network, address), lease| {
                let unused = !lease.seen
                    && alive.contains(&lease.to)
                    && now.saturating_sub(lease.at) > UNUSED_LEASE_MS;
                // The borrower was forgotten, or the block is not ours any more.
                let moot = member
                    && (!view.alloc.members.contains(&lease.to)
                        || view.holder_of(*network, *address) != Some(view.me));
                let over = unused || moot;
                if over {
                    expired.push(Key::Lease(*network, *address));
                }
                !over
            });
            expired
        };
        self.return_leases(expired);
    }

    /// Writes the tables of other nodes beside the socket: a daemon that is started while a peer's
    /// is down finds there what that peer owns. No sync: it ends with the kernel.
    pub(super) fn cache_tables(&self) -> Result<()> {
        let mut state = self.state.borrow_mut();
        while let Some(node) = state.uncached.pop_first() {
            let path = self.run_dir.tables().join(node.to_string());
            match state.view.nodes.get(&node).and_then(|node| node.table.whole()) {
                Some(update) => {
                    replace(&path, &wire::encode(&update)?, Durability::Unsynced)
                        .with_context(|| format!("writing {}", path.display()))?;
                }
                None => super::remove_if_there(&path)?,
            }
        }
        Ok(())
    }

    /// Reads what [`Self::cache_tables`] of the last run wrote. What cannot be used is passed over:
    /// the peers have it too.
    pub(super) fn read_cached_tables(&self) {
        let Ok(files) = fs::read_dir(self.run_dir.tables()) else { return };
        for file in files.flatten() {
            let owner = file.file_name().to_str().and_then(|name| name.parse::<NodeId>().ok());
            let update = fs::read(file.path()).ok().and_then(|bytes| wire::decode::<Update>(&bytes).ok());
            match (owner, update) {
                (Some(owner), Some(update)) if update.head.owner == owner => self.take_table(owner, update),
                _ => {
                    tracing::warn!(file = %file.path().display(), "passed over a damaged table; peers have it")
                }
            }
        }
    }
}

/// What every host relies on when it reads another's entries: the same that an attach must keep to.
fn check_entry(entry: &Entry) -> Result<(), String> {
    let Entry::Endpoint(endpoint) = entry else { return Ok(()) };
    let others = endpoint.aliases.iter().chain([&endpoint.namespace]);
    if !is_name_within(&endpoint.name, MAX_NAME) || !others.into_iter().all(|name| is_name(name)) {
        return Err(format!("endpoint {}: a name that is none", endpoint.id));
    }
    if !endpoint.mac.is_unicast() || endpoint.mac == Mac::of_gateway(endpoint.network) {
        return Err(format!("endpoint {} with the MAC address {}", endpoint.name, endpoint.mac));
    }
    if endpoint.publish.len() > MOST_RANGES {
        return Err(format!("endpoint {} with {} published ranges", endpoint.name, endpoint.publish.len()));
    }
    if endpoint.addresses.is_empty() || endpoint.addresses.len() > MAX_ADDRESSES {
        return Err(format!("endpoint {} with {} addresses", endpoint.name, endpoint.addresses.len()));
    }
    super::attach::check_sizes(&endpoint.aliases, &endpoint.labels)
}

/// What an update replaces or removes.
fn entries_of(table: &Table, set: &[Entry], unset: &[Key]) -> Vec<Entry> {
    let keys = set.iter().map(Entry::key).chain(unset.iter().copied());
    keys.filter_map(|key| table.get(&key).cloned()).collect()
}

fn networks_of(table: &Table) -> Vec<NetworkId> {
    let mut networks: Vec<_> = table
        .entries()
        .filter_map(|entry| match entry {
            Entry::Endpoint(endpoint) => Some(endpoint.network),
            Entry::Lease { network, .. } => Some(*network),
            Entry::PathMtu { .. } | Entry::Held(_) | Entry::Announced(_) => None,
        })
        .collect();
    networks.sort_unstable();
    networks.dedup();
    networks
}

/// Which of the addresses lent to a node it has stopped using, now that its table has changed.
fn returned_leases(state: &mut State, borrower: NodeId) -> Vec<Key> {
    let Some(node) = state.view.nodes.get(&borrower) else { return Vec::new() };
    let mut returned = Vec::new();
    state.lent.retain(|(network, address), lease| {
        if lease.to != borrower {
            return true;
        }
        let used = node.table.with_address(*network, *address).next().is_some();
        let over = lease.seen && !used;
        lease.seen |= used;
        if over {
            returned.push(Key::Lease(*network, *address));
        }
        !over
    });
    returned
}
