//! What this host waits for in the agreement on the allocation map. `node::alloc` speaks with the other members.

use std::collections::HashMap;

use ovl_consensus::RecoveryEnd;
use ovl_proto::alloc::Refusal;
use tokio::sync::oneshot;

/// Time without a verified map after which a map that cannot be verified is reported, in milliseconds.
const UNPROVED_MS: u64 = 10_000;

/// The requester of a change, who is told the version of the map with it, or why it is refused.
pub(crate) type Requester = oneshot::Sender<Result<u64, Refusal>>;

/// What this host waits for.
#[derive(Debug, Default)]
pub(crate) struct Maps {
    /// Requests for changes that are in flight.
    changes: HashMap<u64, Requester>,
    /// The version of the map at the last tick, if peers announced a later one.
    behind_since: Option<u64>,
    /// A later map that could not be verified: its version, and the time of the first try, in milliseconds of this run.
    unproved: Option<(u64, u64)>,
    /// The request for the recovery that is under way on this host.
    recovery: Option<oneshot::Sender<RecoveryEnd>>,
}

impl Maps {
    /// Notes the requester of a change that is in flight.
    pub(crate) fn request(&mut self, id: u64, requester: Requester) {
        self.changes.insert(id, requester);
    }

    /// Returns the requester of a change that is decided, once. `None` if there is none.
    pub(crate) fn take_requester(&mut self, id: u64) -> Option<Requester> {
        self.changes.remove(&id)
    }

    /// Whether a request waits for the end of a recovery.
    pub(crate) fn is_recovering(&self) -> bool {
        self.recovery.as_ref().is_some_and(|waiting| !waiting.is_closed())
    }

    /// Notes the request for a recovery.
    pub(crate) fn recover(&mut self, requester: oneshot::Sender<RecoveryEnd>) {
        self.recovery = Some(requester);
    }

    /// Returns the request for the recovery that has ended, once. `None` if there is none.
    pub(crate) fn take_recovery(&mut self) -> Option<oneshot::Sender<RecoveryEnd>> {
        self.recovery.take()
    }

    /// Notes the version of the map at a tick, and whether peers announced a later one. Returns whether they did so at the last
    /// tick too, and the map is still the same.
    pub(crate) fn is_behind(&mut self, version: u64, is_later_known: bool) -> bool {
        let before = std::mem::replace(&mut self.behind_since, is_later_known.then_some(version));
        is_later_known && before == Some(version)
    }

    /// Notes a later map that could not be verified, now, in milliseconds of this run.
    pub(crate) fn note_unproved(&mut self, version: u64, now: u64) {
        self.unproved.get_or_insert((version, now));
    }

    /// Notes that a map was verified.
    pub(crate) fn proved(&mut self) {
        self.unproved = None;
    }

    /// The version of a map that could not be verified for a while, to be reported. `None` if there is none.
    pub(crate) fn unproved(&self, now: u64) -> Option<u64> {
        self.unproved
            .filter(|(_, since)| now.saturating_sub(*since) >= UNPROVED_MS)
            .map(|(version, _)| version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_is_behind_when_a_later_map_is_known_at_two_ticks() {
        let mut maps = Maps::default();
        assert!(!maps.is_behind(3, true) && maps.is_behind(3, true));
        assert!(!maps.is_behind(4, true), "it has learned another one");
        assert!(!maps.is_behind(4, false) && !maps.is_behind(4, true));
    }

    #[test]
    fn map_that_cannot_be_verified_is_reported_after_a_while() {
        let mut maps = Maps::default();
        maps.note_unproved(7, 1000);
        maps.note_unproved(8, 5000);
        assert_eq!((maps.unproved(10_999), maps.unproved(11_000)), (None, Some(7)));
        maps.proved();
        assert_eq!(maps.unproved(20_000), None);
    }
}
