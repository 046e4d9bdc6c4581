//! Changes that wait to be made, in the order in which they came.

use std::collections::BTreeMap;

use ovl_proto::alloc::Change;
use ovl_proto::id::NodeId;

/// So many requests of other hosts wait here; more are ignored, and their hosts propose them
/// themselves after a while.
pub const MOST_REMOTE_REQUESTS: usize = 1024;

/// A change that waits.
#[derive(Debug)]
pub(super) struct Pending {
    /// The asker's number for it.
    pub(super) id: u64,
    /// Who asked, if not we.
    pub(super) origin: Option<NodeId>,
    pub(super) change: Change,
    pub(super) deadline: u64,
    pub(super) route: Route,
}

/// On whom a change waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Route {
    /// Not decided yet.
    New,
    /// On the coordinator, until then.
    Asked { whom: NodeId, until: u64 },
    /// On the map of this version, in which the coordinator says that it is done.
    Learning { whom: NodeId, version: u64, until: u64 },
    /// On our own next ballot.
    Own,
}

/// All that wait, by a number of our own that grows.
#[derive(Debug, Default)]
pub(super) struct Queue {
    pending: BTreeMap<u64, Pending>,
    next: u64,
    remote: usize,
}

impl Queue {
    pub(super) fn push_local(&mut self, id: u64, change: Change, deadline: u64) {
        self.push(Pending { id, origin: None, change, deadline, route: Route::New });
    }

    /// Adds another host's request, unless it waits already or there are too many.
    pub(super) fn push_remote(&mut self, from: NodeId, id: u64, change: Change, deadline: u64) {
        let waits = |pending: &Pending| pending.origin == Some(from) && pending.id == id;
        if self.remote < MOST_REMOTE_REQUESTS && !self.pending.values().any(waits) {
            self.push(Pending { id, origin: Some(from), change, deadline, route: Route::Own });
        }
    }

    fn push(&mut self, pending: Pending) {
        self.remote += usize::from(pending.origin.is_some());
        self.pending.insert(self.next, pending);
        self.next += 1;
    }

    pub(super) fn remove(&mut self, key: u64) -> Option<Pending> {
        let pending = self.pending.remove(&key)?;
        self.remote -= usize::from(pending.origin.is_some());
        Some(pending)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &Pending)> {
        self.pending.iter().map(|(key, pending)| (*key, pending))
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = (u64, &mut Pending)> {
        self.pending.iter_mut().map(|(key, pending)| (*key, pending))
    }

    /// The changes for our own next ballot.
    pub(super) fn own(&self) -> impl Iterator<Item = (u64, &Change)> {
        self.iter().filter(|(_, pending)| pending.route == Route::Own).map(|(key, p)| (key, &p.change))
    }

    /// Our own request of this number that was given to this host.
    pub(super) fn asked(&mut self, asked: NodeId, id: u64) -> Option<(u64, &mut Pending)> {
        let given = move |pending: &Pending| match pending.route {
            Route::Asked { whom, .. } | Route::Learning { whom, .. } => whom == asked,
            Route::New | Route::Own => false,
        };
        self.iter_mut().find(|(_, pending)| pending.origin.is_none() && pending.id == id && given(pending))
    }

    /// Those that meet a condition.
    pub(super) fn keys(&self, condition: impl Fn(&Pending) -> bool) -> Vec<u64> {
        self.iter().filter(|(_, pending)| condition(pending)).map(|(key, _)| key).collect()
    }
}
