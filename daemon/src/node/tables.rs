//! Owner tables: changes the table of this host and merges updates of peers.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use ovl_cluster::table::{Rejected, Table};
use ovl_files::{Durability, replace};
use ovl_mesh::keys;
use ovl_proto::id::{EndpointId, Mac, NetworkId, NodeId};
use ovl_proto::record::{Domain, Signature};
use ovl_proto::resource::{Name, Pod, Resource};
use ovl_proto::sync::Message;
use ovl_proto::table::{Endpoint, Entry, Head, Key, PodIdentity, Update};
use ovl_proto::wire;
use ovl_runtimes::cni::MAX_NAME;
use ovl_subsystems::publish::MOST_RANGES;

use super::Node;
use super::state::State;
use crate::addresses::NetworkAddress;
use crate::config::{self, is_known_name};
use crate::peers::{PULL_AGAIN_MS, Pull};
use crate::problems::Code;
use ovl_subsystems::Change;

/// Maximum number of addresses of an endpoint, the same as the number of subnets of a network.
const MAX_ADDRESSES: usize = 16;
/// The smallest path MTU in bytes that a table may have, as the link MTU of a record: every IPv4 host accepts datagrams
/// of this size.
const MIN_PATH_MTU: u16 = 576;
/// Maximum number of changed entries of an update that is passed on to other hosts.
const MOST_PASSED_ON: usize = 256;
/// Maximum size of what a host says of an endpoint's pod, in bytes.
pub(super) const MAX_DESCRIBED: usize = 64 << 10;

impl Node {
    /// Changes this host's table and sends the change to all peers at once.
    pub(super) fn write_table(&self, set: Vec<Entry>, unset: Vec<Key>) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let me = state.view.me;
        let Some((record, table)) = state.view.table_of(me) else { return };
        let before = entries_of(table, &set, &unset);
        let after = set.clone();
        let networks: Vec<NetworkId> = table.networks().collect();
        let epoch = record.generation;
        // Endpoints on bridge networks are not announced to peers.
        let is_own = |entry: &Entry| match entry {
            Entry::Endpoint(endpoint) => state.bridges.contains(endpoint.network),
            Entry::Lease { .. }
            | Entry::PathMtu { .. }
            | Entry::Held(_)
            | Entry::Announced(_)
            | Entry::Unreached(_)
            | Entry::Opaque(_) => false,
        };
        let (kept, set): (Vec<Entry>, Vec<Entry>) = set.into_iter().partition(is_own);
        let (dropped, unset): (Vec<Key>, Vec<Key>) = unset.into_iter().partition(|key| table.is_kept(key));
        let silent = set.is_empty() && unset.is_empty() && !(kept.is_empty() && dropped.is_empty());
        table.keep(kept, &dropped);
        table.set_time(self.wall_ms());
        let update = (!silent || table.revision().epoch != epoch)
            .then(|| table.write(epoch, set, unset, |head| self.sign_head(head)));
        let built: Vec<NetworkId> = table.networks().collect();
        let moved = networks
            .iter()
            .filter(|id| !built.contains(id))
            .chain(built.iter().filter(|id| !networks.contains(id)));
        moved.for_each(|network| state.changed(Change::Built(*network)));
        tell_entries(state, me, &before, &after);
        if let Some(update) = update {
            self.links().broadcast(&Message::Table(update));
            self.publish_hints(state);
        }
        self.work.notify_one();
        drop(guard);
        // A client that learns of an endpoint's creation or deletion can rely on the state of its name.
        self.refresh_names();
    }

    fn sign_head(&self, head: &Head) -> Signature {
        match wire::encode_body(head) {
            Ok(body) => self.identity.sign(Domain::Table, &body),
            // This cannot fail, since the head has only fixed fields. Peers would reject this signature.
            Err(_) => Signature([0; 64]),
        }
    }

    /// Takes an update of a peer's table, and passes on what it says of links.
    ///
    /// The hosts that its owner does not reach need that most, to find a way to it, and may not get it from the owner until they
    /// have one.
    pub(super) fn receive_table(&self, from: NodeId, update: Update) {
        let owner = update.head.owner;
        // Most changes say nothing of links.
        let is_about_links = update.base.is_none()
            || update.set.iter().any(|entry| matches!(entry, Entry::Unreached(_)))
            || update.unset.iter().any(|key| matches!(key, Key::Unreached(_)));
        if !is_about_links || update.set.len() + update.unset.len() > MOST_PASSED_ON {
            return self.take_table(from, update);
        }
        let copy = update.clone();
        let before = self.unreached_of(owner);
        self.take_table(from, update);
        let after = self.unreached_of(owner);
        if before == after {
            return;
        }
        let to: Vec<NodeId> = {
            let state = self.state.borrow();
            let is_direct = |id: &NodeId| *id != state.view.me && state.detours.relay(*id).is_none();
            after.into_iter().filter(|id| *id != from && is_direct(id)).collect()
        };
        let message = Message::Table(copy);
        for id in to {
            self.links().send(id, &message);
        }
    }

    /// Sends a host, which has just been connected to, the tables of hosts that do not reach it.
    pub(super) fn tell_of_unreached(&self, peer: NodeId) {
        let tables: Vec<Update> = {
            let state = self.state.borrow();
            if state.detours.relay(peer).is_some() {
                return;
            }
            let tables = state.view.nodes.values().map(|node| &node.table);
            let tables = tables.filter(|table| table.unreached().any(|id| id == peer));
            tables.filter(|table| table.size().0 <= MOST_PASSED_ON).filter_map(Table::whole).collect()
        };
        for table in tables.into_iter().filter(|table| table.head.owner != self.state.borrow().view.me) {
            self.links().send(peer, &Message::Table(table));
        }
    }

    /// The hosts that a host says it does not reach.
    fn unreached_of(&self, owner: NodeId) -> BTreeSet<NodeId> {
        let state = self.state.borrow();
        state.view.nodes.get(&owner).map(|node| node.table.unreached().collect()).unwrap_or_default()
    }

    /// Applies an update of a peer's table. Pulls the whole table if changes are missing.
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
                // Refresh now, because the reconcile loop may be waiting for the kernel.
                self.refresh_names();
            }
            Err(Some(Rejected::Gap { .. })) => self.pull_table(owner, Some(from)),
            Err(Some(Rejected::Stale(_)) | None) => {}
            // Its owner has signed it, so another pull returns the same.
            Err(Some(error @ Rejected::TooLarge { .. })) => self.refuse_table(owner, &error.to_string()),
            Err(Some(error @ Rejected::Digest)) => {
                tracing::warn!(%owner, %from, %error, "refused a table");
                self.pull_table(owner, None);
            }
        }
    }

    /// Reports that a host has signed a table that this host does not use.
    fn refuse_table(&self, owner: NodeId, reason: &str) {
        let mut state = self.state.borrow_mut();
        let name = state.view.name_of(owner);
        let sentence = format!(
            "the table of host {name} is refused, so what changed on it is not known here: {reason}. Run the same release \
             of ovld on both hosts; if they do, the host is faulty or compromised: remove it with 'ovlctl peers forget \
             {name}'"
        );
        state.problems.set(Code::TableRefused, owner.to_string(), Some(sentence));
    }

    /// Applies an update. Returns the leases that it gives back, and whether the set of its networks changed.
    ///
    /// # Errors
    ///
    /// The update does not fit the table. `None` if it is about this host's table, about an unknown host, not
    /// validly signed, or has an invalid entry.
    fn apply_update(
        &self,
        from: NodeId,
        update: Update,
    ) -> Result<(Vec<NetworkAddress>, bool), Option<Rejected>> {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let owner = update.head.owner;
        if owner == state.view.me {
            return Err(None);
        }
        // Without a record there is no key to verify the signature. The record comes by gossip, and the table
        // is pulled then.
        // The table of a host that is not a member is not used. It is pulled once the host is one.
        if state.is_member() && !state.view.alloc.members.contains(&owner) {
            return Err(None);
        }
        let (record, table) = state.view.table_of(owner).ok_or(None)?;
        // Older than what is known: neither verified nor reported.
        if update.head.revision <= table.revision() {
            return Err(Some(Rejected::Stale(update.head.revision)));
        }
        let signed = wire::encode_body(&update.head)
            .is_ok_and(|body| keys::verify(&record.public_key, Domain::Table, &body, &update.signature));
        if !signed {
            tracing::warn!(%owner, %from, "refused a table that its owner did not sign");
            return Err(None);
        }
        if let Some(error) = update.set.iter().find_map(|entry| check_entry(entry).err()) {
            drop(guard);
            self.refuse_table(owner, &error);
            return Err(None);
        }
        let networks: Vec<NetworkId> = table.networks().collect();
        // Most whole tables say what is known: that of a host whose daemon was restarted, for example.
        let (before, after) = match update.base {
            None => differences(table, &update.set),
            Some(_) => (entries_of(table, &update.set, &update.unset), update.set.clone()),
        };
        let known = table.revision();
        let written = update.head.written_ms.filter(|_| known.epoch == update.head.revision.epoch);
        table.apply(update).map_err(Some)?;
        // A host that joins learns of changes that are old. Of a run of the owner that was known, each change was waited for.
        if let Some(took) = written.and_then(|written| self.since(owner, written)) {
            self.measured.borrow_mut().convergence(took);
        }
        tracing::debug!(%owner, revision = %table.revision(), "table");
        let moved = !table.networks().eq(networks);
        state.problems.set(Code::TableRefused, owner.to_string(), None);
        tell_entries(state, owner, &before, &after);
        super::newer::note_newer(state);
        state.uncached.note(owner);
        state.peers.end_pull(owner);
        Ok((returned_leases(state, owner), moved))
    }

    /// Returns how long ago a moment of a host's clock is. Its answers to pings say what that clock shows, so the time for which the
    /// last answer was under way is missing. `None`: the clock is not known, or was set back.
    fn since(&self, host: NodeId, then_ms: u64) -> Option<Duration> {
        /// What an estimate of a clock may be behind, in milliseconds.
        const BEHIND: u64 = 1_000;
        let now = self.gossip().clock(host)?;
        (now + BEHIND >= then_ms).then(|| Duration::from_millis(now.saturating_sub(then_ms)))
    }

    /// Requests the whole table of a host from the host itself or from another one: from the one that has it for sure, if one is
    /// known.
    pub(super) fn pull_table(&self, owner: NodeId, has_it: Option<NodeId>) {
        let mut state = self.state.borrow_mut();
        let now = state.now();
        let Some(pull) = state.peers.pull(owner, now) else { return };
        let again = pull == Pull::Again;
        let connected = self.links().connected();
        if let Some(other) = has_it.filter(|id| connected.contains(id)) {
            self.links().send(other, &Message::TablePull(owner));
            return;
        }
        let is_direct = |id: &NodeId| state.detours.relay(*id).is_none();
        // It sends its table as soon as it is connected. When many hosts start at once, that is so for most of them.
        if !again && !connected.contains(&owner) && is_direct(&owner) {
            return;
        }
        // If the owner did not answer, ask it and the other hosts in turn: it may be the only one that has
        // the table, or the only one that cannot be reached. Those that this host does not reach itself know less.
        let mut others: Vec<NodeId> = connected.iter().copied().filter(|id| *id != owner).collect();
        if others.iter().any(is_direct) {
            others.retain(is_direct);
        }
        let again = again || !is_direct(&owner);
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

    /// Pulls every table that is behind the revision that its owner announces.
    pub(super) fn pull_missing(&self) {
        let behind: Vec<NodeId> = {
            let state = self.state.borrow();
            let is_behind = |id: &NodeId, announced| {
                state.view.nodes.get(id).is_some_and(|node| node.table.revision() < announced)
            };
            let peers = state.peers.iter();
            peers.filter(|(id, peer)| is_behind(id, peer.hints().table)).map(|(id, _)| id).collect()
        };
        for owner in behind {
            self.pull_table(owner, None);
        }
    }

    /// Removes leases from this host's table that their borrowers have given back.
    fn return_leases(&self, returned: Vec<NetworkAddress>) {
        if !returned.is_empty() {
            let keys = returned.into_iter().map(|(network, address)| Key::Lease(network, address));
            self.write_table(Vec::new(), keys.collect());
            self.save_soon();
        }
    }

    /// Revokes leases that were never used or that are void.
    pub(super) fn expire_leases(&self) {
        let expired = {
            let mut guard = self.state.borrow_mut();
            let (now, alive) = (guard.now(), guard.alive());
            let State { view, addresses, .. } = &mut *guard;
            addresses.take_expired(view, &alive, now)
        };
        self.return_leases(expired);
    }

    /// Saves the tables of peers in the run directory. A daemon that starts while a peer is down learns from
    /// there what the peer owns. The files are not synced, because they are valid only until the reboot.
    pub(super) fn cache_tables(&self) -> Result<()> {
        let mut state = self.state.borrow_mut();
        while let Some(node) = state.uncached.next() {
            let path = self.run_dir.tables().join(node.to_string());
            match state.view.nodes.get(&node).and_then(|node| node.table.whole()) {
                Some(update) => {
                    replace(&path, &wire::encode_body(&update)?, Durability::Unsynced)
                        .with_context(|| format!("writing {}", path.display()))?;
                }
                None => super::remove_if_there(&path)?,
            }
        }
        Ok(())
    }

    /// Reads the tables that [`Self::cache_tables`] of the last run saved. Skips damaged files, since peers
    /// have the tables too.
    pub(super) fn read_cached_tables(&self) {
        let Ok(files) = ovl_files::sorted(&self.run_dir.tables()) else { return };
        for path in files {
            let name = path.file_name().and_then(OsStr::to_str);
            let owner = name.and_then(|name| name.parse::<NodeId>().ok());
            let update = fs::read(&path).ok().and_then(|bytes| wire::decode_body::<Update>(&bytes).ok());
            match (owner, update) {
                (Some(owner), Some(update)) if update.head.owner == owner => self.take_table(owner, update),
                _ => {
                    tracing::warn!(file = %path.display(), "passed over a damaged table; peers have it")
                }
            }
        }
    }
}

/// Checks the properties of a table entry that every host relies on. An attach has the same limits.
fn check_entry(entry: &Entry) -> Result<(), String> {
    let endpoint = match entry {
        Entry::Endpoint(endpoint) => endpoint,
        Entry::Lease { address, .. } if !is_assignable(*address) => {
            return Err(format!("a lease of {address}, which no endpoint can have"));
        }
        Entry::Announced(address) if !is_assignable(*address) => {
            return Err(format!("an announced address {address}, which no LoadBalancer can have"));
        }
        // A smaller one would reduce the MTU of every network to it.
        Entry::PathMtu { mtu, .. } if *mtu < MIN_PATH_MTU => {
            return Err(format!("a path MTU of {mtu} bytes, below {MIN_PATH_MTU}"));
        }
        Entry::Lease { .. }
        | Entry::Announced(_)
        | Entry::Unreached(_)
        | Entry::PathMtu { .. }
        | Entry::Held(_)
        | Entry::Opaque(_) => return Ok(()),
    };
    if let Some(address) = endpoint.addresses.iter().find(|address| !is_assignable(address.addr())) {
        return Err(format!("endpoint {} with the address {address}", endpoint.name));
    }
    let others = endpoint.aliases.iter().chain([&endpoint.namespace]);
    if !is_known_name(&endpoint.name, MAX_NAME)
        || !others.into_iter().all(|name| is_known_name(name, config::MAX_NAME))
    {
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
    let (prefixes, macs) = (endpoint.allowed.len(), endpoint.allowed_macs.len());
    if prefixes > Endpoint::MAX_ALLOWED || macs > Endpoint::MAX_ALLOWED_MACS {
        return Err(format!(
            "endpoint {} with {prefixes} allowed prefixes and {macs} MAC addresses",
            endpoint.name
        ));
    }
    if let Some(groups) = &endpoint.groups
        && (groups.len() > Endpoint::MAX_GROUPS || !groups.iter().all(IpAddr::is_multicast))
    {
        return Err(format!("endpoint {} with {} multicast groups", endpoint.name, groups.len()));
    }
    if let Some(PodIdentity { name, uid, .. }) = endpoint.pod.as_deref() {
        super::attach::check_pod(name, uid)?;
    }
    if let Some(pod) = endpoint.described.as_deref() {
        check_described(endpoint, pod)?;
    }
    super::attach::check_sizes(&endpoint.aliases, &endpoint.labels)
}

/// Checks what a host says of the pod of its endpoint.
fn check_described(endpoint: &Endpoint, pod: &Pod) -> Result<(), String> {
    let named = Name::new(&pod.metadata.namespace, &pod.metadata.name);
    if named != endpoint.pod_name() {
        return Err(format!("endpoint {} is described by Pod {named}", endpoint.name));
    }
    let size = wire::encode_body(pod).map_or(usize::MAX, |bytes| bytes.len());
    if size > MAX_DESCRIBED {
        return Err(format!("endpoint {} is described in {size} bytes", endpoint.name));
    }
    ovl_manifest::object::check(&Resource::Pod(pod.clone())).map_err(|problems| {
        let first = problems.first().map(|it| format!("{} {}", it.field, it.reason)).unwrap_or_default();
        format!("endpoint {}: {first}", endpoint.name)
    })
}

/// Whether an address can be that of an endpoint or a LoadBalancer.
fn is_assignable(address: IpAddr) -> bool {
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some(),
    };
    !(address.is_unspecified() || address.is_loopback() || address.is_multicast() || link_local)
}

/// Returns the entries that an update replaces or removes.
fn entries_of(table: &Table, set: &[Entry], unset: &[Key]) -> Vec<Entry> {
    let keys = set.iter().map(Entry::key).chain(unset.iter().copied());
    keys.filter_map(|key| table.get(&key).cloned()).collect()
}

/// Returns the entries of a table that differ from those of the whole table that replaces it, and their new values.
fn differences(table: &Table, whole: &[Entry]) -> (Vec<Entry>, Vec<Entry>) {
    let new: BTreeMap<Key, &Entry> = whole.iter().map(|entry| (entry.key(), entry)).collect();
    let before = table.entries().filter(|entry| new.get(&entry.key()) != Some(entry)).cloned().collect();
    let after = new.into_iter().filter(|(key, entry)| table.get(key) != Some(entry));
    (before, after.map(|(_, entry)| entry.clone()).collect())
}

/// Tells what has changed in a host's table, from its entries before and after.
fn tell_entries(state: &mut State, host: NodeId, before: &[Entry], after: &[Entry]) {
    fn endpoint(entry: &Entry) -> Option<(EndpointId, &Endpoint)> {
        match entry {
            Entry::Endpoint(endpoint) => Some((endpoint.id, endpoint)),
            _ => None,
        }
    }
    let new: BTreeMap<EndpointId, &Endpoint> = after.iter().filter_map(endpoint).collect();
    let joined: BTreeMap<EndpointId, NetworkId> = before
        .iter()
        .filter_map(endpoint)
        .filter(|(id, old)| {
            new.get(id).is_some_and(|new| {
                new.groups != old.groups && **new == Endpoint { groups: new.groups.clone(), ..(*old).clone() }
            })
        })
        .map(|(id, old)| (id, old.network))
        .collect();
    for entry in before.iter().chain(after) {
        match entry {
            Entry::Endpoint(endpoint) if joined.contains_key(&endpoint.id) => {}
            entry => state.changed(Change::Entry { host, entry }),
        }
    }
    let networks: BTreeSet<NetworkId> = joined.into_values().collect();
    networks.into_iter().for_each(|network| state.changed(Change::Groups(network)));
}

/// Ends the leases of a borrower that its changed table no longer uses. Returns their addresses.
fn returned_leases(state: &mut State, borrower: NodeId) -> Vec<NetworkAddress> {
    let State { view, addresses, .. } = state;
    let table = view.nodes.get(&borrower).map(|node| &node.table);
    table.map_or_else(Vec::new, |table| addresses.take_returned(borrower, table))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_all_kinds_are_checked() {
        let network = NetworkId::default();
        let lease = |address: &str| Entry::Lease {
            network,
            address: address.parse().unwrap(),
            to: NodeId::default(),
        };
        let announced = |address: &str| Entry::Announced(address.parse().unwrap());
        let mtu = |mtu| Entry::PathMtu { peer: NodeId::default(), mtu };
        for good in ["10.1.0.5", "fd00::5", "203.0.113.1"] {
            assert_eq!(check_entry(&lease(good)), Ok(()));
            assert_eq!(check_entry(&announced(good)), Ok(()));
        }
        let bad =
            ["0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "169.254.0.1", "::", "::1", "ff02::1"];
        for bad in bad.into_iter().chain(["fe80::1", "::ffff:10.0.0.1"]) {
            assert!(check_entry(&lease(bad)).is_err() && check_entry(&announced(bad)).is_err(), "{bad}");
        }
        assert_eq!(check_entry(&mtu(576)), Ok(()));
        assert!(check_entry(&mtu(0)).is_err() && check_entry(&mtu(575)).is_err());
        assert_eq!(check_entry(&Entry::Held(network)), Ok(()));
    }
}
