//! The pending work of the reconcile loop, and its results so far.
//!
//! [`Progress`] owns what the loop has to do besides what subsystems have marked, and the operations that the kernel
//! rejects.

use std::collections::BTreeMap;

use crate::problems::{Code, Problem};

/// Pending work of the reconcile loop, and the results so far.
#[derive(Debug)]
pub(crate) struct Progress {
    /// A full pass is due.
    full: bool,
    /// Another program changed an object of ovl since the last full pass.
    drift: bool,
    /// The right of this host's endpoints to their addresses may have changed.
    rights: bool,
    /// The networks that this host must not build may have changed.
    ranges: bool,
    /// Rejected operations, each with a sentence that has the reason.
    failing: BTreeMap<String, String>,
    counts: Counts,
    /// Operations that repaired drift, by kind.
    repairs: BTreeMap<&'static str, u64>,
    /// Number of changes of what the cluster consists of.
    changes: u64,
}

/// Counters of the reconcile loop.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    /// Number of full passes.
    pub(crate) passes: u64,
    /// Number of operations applied.
    pub(crate) operations: u64,
    /// Number of those operations that repaired drift.
    pub(crate) repairs: u64,
}

impl Progress {
    /// Nothing has been done yet. The rights of endpoints that the last run left are to be checked.
    pub(crate) fn new() -> Self {
        Self {
            full: false,
            drift: false,
            rights: true,
            ranges: true,
            failing: BTreeMap::new(),
            counts: Counts::default(),
            repairs: BTreeMap::new(),
            changes: 0,
        }
    }

    /// Requests that the next pass is a full one.
    pub(crate) fn ask_full(&mut self) {
        self.full = true;
    }

    /// Requests that the next pass is a full one that repairs drift. Returns `false` if a full pass was
    /// already due.
    pub(crate) fn ask_for_drift(&mut self) -> bool {
        self.drift = true;
        !std::mem::replace(&mut self.full, true)
    }

    /// Whether a full pass is due.
    pub(crate) fn is_full_due(&self) -> bool {
        self.full
    }

    /// Begins a full pass. Returns whether it repairs drift.
    pub(crate) fn begin_full(&mut self) -> bool {
        self.full = false;
        std::mem::take(&mut self.drift)
    }

    /// Records a full pass, which clears what was rejected before. `repairs` are the kinds of its operations if they
    /// repaired drift.
    pub(crate) fn end_full(&mut self, repairs: impl IntoIterator<Item = &'static str>) {
        self.failing.clear();
        self.counts.passes += 1;
        for kind in repairs {
            self.counts.repairs += 1;
            *self.repairs.entry(kind).or_default() += 1;
        }
    }

    /// Returns the numbers of operations that repaired drift, by kind.
    pub(crate) fn repairs(&self) -> impl Iterator<Item = (&'static str, u64)> {
        self.repairs.iter().map(|(kind, count)| (*kind, *count))
    }

    /// Counts a change of what the cluster consists of, as `ovlctl endpoints` and its like list it.
    pub(crate) fn count_change(&mut self) {
        self.changes = self.changes.wrapping_add(1);
    }

    /// Returns a number that is another one after such a change.
    pub(crate) fn changes(&self) -> u64 {
        self.changes
    }

    /// Records that the rights of this host's endpoints to their addresses may have changed.
    pub(crate) fn mark_rights(&mut self) {
        self.rights = true;
    }

    /// Returns whether these rights may have changed since the last call.
    pub(crate) fn take_rights(&mut self) -> bool {
        std::mem::take(&mut self.rights)
    }

    /// Records that the networks that this host must not build may have changed.
    pub(crate) fn mark_ranges(&mut self) {
        self.ranges = true;
    }

    /// Returns whether these networks may have changed since the last call.
    pub(crate) fn take_ranges(&mut self) -> bool {
        std::mem::take(&mut self.ranges)
    }

    /// Counts operations that were applied.
    pub(crate) fn count(&mut self, operations: usize) {
        self.counts.operations += operations as u64;
    }

    /// Records a rejected operation. `sentence` has the reason. It is kept until the next full pass.
    pub(crate) fn fail(&mut self, operation: String, sentence: String) {
        self.failing.insert(operation, sentence);
    }

    /// Whether the kernel rejects an operation.
    pub(crate) fn is_failing(&self) -> bool {
        !self.failing.is_empty()
    }

    /// Returns the counters.
    pub(crate) fn counts(&self) -> Counts {
        self.counts
    }

    /// Returns one sentence for each operation that the kernel rejects.
    pub(crate) fn failing(&self) -> impl Iterator<Item = &str> {
        self.failing.values().map(String::as_str)
    }

    /// Returns the rejected operations as problems.
    pub(crate) fn problems(&self) -> impl Iterator<Item = Problem> {
        self.failing
            .iter()
            .map(|(op, failing)| Code::KernelRefusal.about(op, format!("the kernel refuses: {failing}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drift_is_repaired_by_the_next_full_pass_alone() {
        let mut progress = Progress::new();
        assert!(!progress.is_full_due());
        assert!(progress.ask_for_drift() && !progress.ask_for_drift(), "one is due already");
        assert!(progress.is_full_due() && progress.begin_full() && !progress.is_full_due());
        progress.ask_full();
        assert!(!progress.begin_full(), "nobody else changed anything");
    }

    #[test]
    fn rejection_lasts_until_the_next_full_pass() {
        let mut progress = Progress::new();
        progress.fail("ip link add".to_owned(), "ip link add: no".to_owned());
        progress.count(3);
        assert!(progress.is_failing());
        assert_eq!(progress.failing().collect::<Vec<_>>(), ["ip link add: no"]);
        assert_eq!(progress.problems().next().unwrap().message, "the kernel refuses: ip link add: no");
        progress.end_full([]);
        assert!(!progress.is_failing());
        progress.end_full(["route", "link", "route"]);
        assert_eq!(progress.counts(), Counts { passes: 2, operations: 3, repairs: 3 });
        assert_eq!(progress.repairs().collect::<Vec<_>>(), [("link", 1), ("route", 2)]);
    }

    #[test]
    fn rights_are_checked_once_at_the_start_and_after_each_change() {
        let mut progress = Progress::new();
        assert!(progress.take_rights() && !progress.take_rights());
        progress.mark_rights();
        assert!(progress.take_rights());
    }
}
