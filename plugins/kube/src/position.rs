//! What a watcher of one kind does next: list, or watch from a version, and after which wait. Pure: no clock, no I/O.

use std::time::Duration;

/// The wait after the first failure in a row. It doubles with each further one, up to [`LONGEST`].
const SHORTEST: Duration = Duration::from_millis(200);
/// The longest wait.
const LONGEST: Duration = Duration::from_secs(10);
/// How many lists in a row are refused because they are older than what is known. An API server that was restored from a
/// backup goes on to send such lists, so in the end one is accepted.
const MOST_OLD_LISTS: u32 = 6;

/// What a watcher does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// List all objects.
    List,
    /// Watch for changes after a version.
    Watch(u64),
}

/// How a list or a watch has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// The server has closed the watch, as it does after a few minutes.
    Closed,
    /// The server does not remember the version any more (410 Gone).
    Gone,
    /// Something failed.
    Failed,
}

/// The position of a watcher.
#[derive(Debug, Default)]
pub(crate) struct Position {
    /// The version up to which everything is known. 0: nothing is.
    version: u64,
    /// Whether a list is needed.
    relist: bool,
    /// Failures since the last success.
    failures: u32,
    /// Lists in a row that were older than what is known.
    old_lists: u32,
}

impl Position {
    /// Returns what to do.
    pub(crate) fn step(&self) -> Step {
        if self.relist || self.version == 0 { Step::List } else { Step::Watch(self.version) }
    }

    /// Whether a list of this version may be used: it is not older than what is known. If it may, everything up to it is
    /// known.
    pub(crate) fn listed(&mut self, version: u64) -> bool {
        if version < self.version && self.old_lists < MOST_OLD_LISTS {
            self.old_lists += 1;
            return false;
        }
        *self = Self { version, ..Self::default() };
        true
    }

    /// Records an event, or a bookmark, of this version.
    pub(crate) fn seen(&mut self, version: u64) {
        self.version = self.version.max(version);
        self.failures = 0;
    }

    /// Records an end. Returns how long to wait before the next step.
    pub(crate) fn ended(&mut self, end: End) -> Duration {
        match end {
            // The first time at once. One that is closed again and again without an event is a failure.
            End::Closed => {}
            End::Gone => self.relist = true,
            End::Failed => {}
        }
        let failures = self.failures;
        self.failures = self.failures.saturating_add(1);
        match (end, failures) {
            (End::Closed | End::Gone, 0) => Duration::ZERO,
            (_, failures) => SHORTEST.saturating_mul(1 << failures.min(10)).min(LONGEST),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_goes_on_where_it_ended() {
        let mut position = Position::default();
        assert_eq!(position.step(), Step::List);
        assert!(position.listed(10));
        assert_eq!(position.step(), Step::Watch(10));
        position.seen(12);
        // A bookmark that is behind changes nothing.
        position.seen(11);
        assert_eq!(position.ended(End::Closed), Duration::ZERO);
        assert_eq!(position.step(), Step::Watch(12));
    }

    #[test]
    fn a_forgotten_version_is_listed_again_at_once() {
        let mut position = Position::default();
        position.listed(10);
        assert_eq!(position.ended(End::Gone), Duration::ZERO);
        assert_eq!(position.step(), Step::List);
        assert!(position.listed(20));
        assert_eq!(position.step(), Step::Watch(20));
    }

    #[test]
    fn waits_grow_up_to_a_bound_and_end_with_a_success() {
        let mut position = Position::default();
        let waits: Vec<u128> = (0..9).map(|_| position.ended(End::Failed).as_millis()).collect();
        assert_eq!(waits, [200, 400, 800, 1600, 3200, 6400, 10_000, 10_000, 10_000]);
        for _ in 0..100 {
            position.ended(End::Failed);
        }
        position.listed(1);
        assert_eq!(position.ended(End::Failed).as_millis(), 200);
        // A server that closes each watch at once is not asked without a pause.
        position.seen(2);
        assert!(position.ended(End::Closed).is_zero() && !position.ended(End::Closed).is_zero());
    }

    #[test]
    fn old_lists_are_refused_but_not_for_ever() {
        let mut position = Position::default();
        position.listed(10);
        position.ended(End::Gone);
        for _ in 0..MOST_OLD_LISTS {
            assert!(!position.listed(9));
            assert_eq!(position.step(), Step::List);
        }
        assert!(position.listed(9));
        assert_eq!(position.step(), Step::Watch(9));
    }
}
