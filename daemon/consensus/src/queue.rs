//! The queue of pending changes, in the order of their arrival.

use std::collections::BTreeMap;

use ovl_proto::alloc::Change;
use ovl_proto::id::NodeId;

/// The maximum number of pending requests of other hosts. Further ones are ignored, and their hosts propose the
/// changes themselves after [`super::DELEGATE_MS`].
pub const MAX_REMOTE_REQUESTS: usize = 1024;

/// A pending change.
#[derive(Debug)]
pub(super) struct PendingChange {
    /// The requester's number for it.
    pub(super) id: u64,
    /// The requesting host; `None` for the local host.
    pub(super) origin: Option<NodeId>,
    pub(super) change: Change,
    pub(super) deadline: u64,
    /// How many hosts were asked to propose it.
    pub(super) asked: u32,
    pub(super) route: Delegation,
}

/// What a pending change waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Delegation {
    /// Not decided yet.
    New,
    /// A reply of the coordinator, until a time.
    Asked { coordinator: NodeId, until: u64 },
    /// The map of the version in which the change is done, as the coordinator replied.
    Learning { coordinator: NodeId, version: u64, until: u64 },
    /// The next ballot of this node.
    Own,
}

/// The pending changes, by a local number that grows.
#[derive(Debug, Default)]
pub(super) struct ChangeQueue {
    pending: BTreeMap<u64, PendingChange>,
    next: u64,
    remote: usize,
}

impl ChangeQueue {
    pub(super) fn push_local(&mut self, id: u64, change: Change, deadline: u64) {
        self.push(PendingChange { id, origin: None, change, deadline, asked: 0, route: Delegation::New });
    }

    /// Adds another host's request, unless it is pending already or there are too many.
    pub(super) fn push_remote(
        &mut self,
        from: NodeId,
        id: u64,
        change: Change,
        deadline: u64,
        route: Delegation,
    ) {
        let waits = |pending: &PendingChange| pending.origin == Some(from) && pending.id == id;
        if self.remote < MAX_REMOTE_REQUESTS && !self.pending.values().any(waits) {
            self.push(PendingChange { id, origin: Some(from), change, deadline, asked: 0, route });
        }
    }

    fn push(&mut self, pending: PendingChange) {
        self.remote += usize::from(pending.origin.is_some());
        self.pending.insert(self.next, pending);
        self.next += 1;
    }

    pub(super) fn remove(&mut self, key: u64) -> Option<PendingChange> {
        let pending = self.pending.remove(&key)?;
        self.remote -= usize::from(pending.origin.is_some());
        Some(pending)
    }

    pub(super) fn get(&self, key: u64) -> Option<&PendingChange> {
        self.pending.get(&key)
    }

    pub(super) fn get_mut(&mut self, key: u64) -> Option<&mut PendingChange> {
        self.pending.get_mut(&key)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &PendingChange)> {
        self.pending.iter().map(|(key, pending)| (*key, pending))
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (u64, &mut PendingChange)> {
        self.pending.iter_mut().map(|(key, pending)| (*key, pending))
    }

    /// Returns the changes for this node's next ballot.
    pub(super) fn own(&self) -> impl Iterator<Item = (u64, &Change)> {
        self.iter().filter(|(_, pending)| pending.route == Delegation::Own).map(|(key, p)| (key, &p.change))
    }

    /// Returns the request of this number that was sent to a host.
    pub(super) fn asked(&mut self, asked: NodeId, id: u64) -> Option<(u64, &mut PendingChange)> {
        let given = move |pending: &PendingChange| match pending.route {
            Delegation::Asked { coordinator, .. } | Delegation::Learning { coordinator, .. } => {
                coordinator == asked
            }
            Delegation::New | Delegation::Own => false,
        };
        self.iter_mut().find(|(_, pending)| pending.id == id && given(pending))
    }

    /// Returns the keys of the changes that meet a condition.
    pub(super) fn keys(&self, condition: impl Fn(&PendingChange) -> bool) -> Vec<u64> {
        self.iter().filter(|(_, pending)| condition(pending)).map(|(key, _)| key).collect()
    }
}
