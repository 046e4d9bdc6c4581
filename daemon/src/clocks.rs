//! The wall clocks of this host and of its peers, and what they mean for the stamps of cluster objects.
//!
//! A host refuses a write that is stamped more than [`MAX_AHEAD_MS`] after its present, so that a wrong clock of one host
//! does not decide what the cluster keeps. What the present is, a majority of the live hosts says: the hosts whose clocks
//! are within that distance of the median. So a host whose own clock is wrong still takes what the others take. Without
//! such a majority (two hosts that disagree, or a host alone) each host has only its own clock.
//!
//! Everything here is decided from numbers. Begin to read at [`Clocks::new`].

use std::collections::BTreeMap;

use ovl_proto::clock::{MAX_AHEAD_MS, Stamp};
use ovl_proto::id::NodeId;

/// A clock before this time (2023-01-01) was never set: no release of ovl is older.
const EARLIEST_MS: u64 = 1_672_531_200_000;
/// What a host stays below the limit of its peers, in milliseconds, because it knows their clocks only roughly.
const MARGIN_MS: u64 = 60_000;
/// The time in milliseconds after which a refusal of objects is over. While it lasts, hosts compare their objects every
/// five seconds.
const REFUSAL_OVER_MS: u64 = 12_000;

/// The wall clocks of this host and of the live members, at one moment.
#[derive(Debug, Clone)]
pub(crate) struct Clocks {
    /// This host's clock, in milliseconds since 1970.
    own: u64,
    /// Those of the others that were ever set.
    others: Vec<(NodeId, u64)>,
    /// What a majority of these hosts, this one included, agrees on. `None` if there is none, or no other host.
    agreed: Option<u64>,
}

/// How far two clocks are apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Skew {
    /// The distance in milliseconds.
    pub by_ms: u64,
    /// Whether the clock that this is said of is ahead.
    pub ahead: bool,
}

/// Hosts that would refuse a write of this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusing {
    /// The hosts.
    pub hosts: Vec<NodeId>,
    /// How far the stamp is ahead of their clocks, in milliseconds.
    pub by_ms: u64,
    /// Whether a majority agrees on the time, so that this host's clock is the wrong one.
    pub decided: bool,
}

impl Clocks {
    /// Judges the clocks. All are in milliseconds since 1970.
    pub(crate) fn new(own: u64, others: impl IntoIterator<Item = (NodeId, u64)>) -> Self {
        let others: Vec<(NodeId, u64)> =
            others.into_iter().filter(|(_, clock)| *clock >= EARLIEST_MS).collect();
        let mut all: Vec<u64> = others.iter().map(|(_, clock)| *clock).collect();
        all.extend(Some(own).filter(|own| *own >= EARLIEST_MS));
        all.sort_unstable();
        let median = all.get(all.len().saturating_sub(1) / 2).copied().unwrap_or_default();
        let agree = all.iter().filter(|clock| is_near(**clock, median)).count();
        // Two clocks that disagree have no majority, and a clock that was never set has no vote.
        let agreed = (!others.is_empty() && agree * 2 > all.len()).then_some(median);
        Self { own, others, agreed }
    }

    /// Whether this host's clock was ever set.
    pub(crate) fn is_set(&self) -> bool {
        self.own >= EARLIEST_MS
    }

    /// Returns the present, against which the stamps of others are judged.
    pub(crate) fn now(&self) -> u64 {
        match self.agreed {
            Some(agreed) if is_near(self.own, agreed) => agreed.max(self.own),
            Some(agreed) => agreed,
            None if self.is_set() => self.own,
            None => self.others.iter().map(|(_, clock)| *clock).max().unwrap_or(self.own),
        }
    }

    /// Returns the time to stamp writes with: this host's clock, unless it is known to be wrong. `None` if it was never set,
    /// and no other host knows the time.
    pub(crate) fn stamping(&self) -> Option<u64> {
        match self.agreed {
            Some(agreed) if !is_near(self.own, agreed) => Some(agreed),
            Some(_) => Some(self.own),
            None if self.is_set() || !self.others.is_empty() => Some(self.now()),
            None => None,
        }
    }

    /// Returns the time after which a stamp, also of a stored object, is void: a majority agrees that it is in the future.
    /// `None` if there is no majority.
    pub(crate) fn void_after(&self) -> Option<u64> {
        self.agreed.map(|_| self.now().saturating_add(MAX_AHEAD_MS))
    }

    /// Returns the hosts that refuse what is stamped with this host's clock, if they are most of the others. `None` if most
    /// take it, or if this host alone has a clock.
    pub(crate) fn refusing(&self) -> Option<Refusing> {
        let stamp_ms = if self.is_set() { self.own } else { return None };
        let limit = |clock: u64| {
            clock.max(self.agreed.unwrap_or_default()).saturating_add(MAX_AHEAD_MS).saturating_sub(MARGIN_MS)
        };
        let refuse: Vec<(NodeId, u64)> =
            self.others.iter().filter(|(_, clock)| stamp_ms > limit(*clock)).copied().collect();
        if refuse.is_empty() || refuse.len() * 2 <= self.others.len() {
            return None;
        }
        let latest = refuse.iter().map(|(_, clock)| *clock).max().unwrap_or_default();
        Some(Refusing {
            hosts: refuse.into_iter().map(|(node, _)| node).collect(),
            by_ms: stamp_ms.saturating_sub(latest),
            decided: self.agreed.is_some(),
        })
    }

    /// Returns how far this host's clock is from what the others agree on. `None` if it is near, or if nothing is agreed.
    pub(crate) fn own_skew(&self) -> Option<Skew> {
        self.agreed.and_then(|agreed| skew(self.own, agreed))
    }

    /// Returns the hosts whose clocks are far from the present, and how far. A host whose own clock is wrong names none.
    pub(crate) fn wrong_hosts(&self) -> Vec<(NodeId, Skew)> {
        if !self.is_set() || self.own_skew().is_some() {
            return Vec::new();
        }
        let present = self.agreed.unwrap_or(self.own);
        let far = |(node, clock): &(NodeId, u64)| Some((*node, skew(*clock, present)?));
        self.others.iter().filter_map(far).collect()
    }

    /// Returns the hosts whose clocks are near what is agreed.
    pub(crate) fn agreeing(&self) -> Vec<NodeId> {
        let Some(agreed) = self.agreed else { return Vec::new() };
        let near = self.others.iter().filter(|(_, clock)| is_near(*clock, agreed));
        near.map(|(node, _)| *node).collect()
    }

    /// Whether a majority agrees on the time.
    pub(crate) fn is_agreed(&self) -> bool {
        self.agreed.is_some()
    }
}

fn is_near(clock: u64, other: u64) -> bool {
    clock.abs_diff(other) <= MAX_AHEAD_MS
}

fn skew(clock: u64, present: u64) -> Option<Skew> {
    (!is_near(clock, present)).then(|| Skew { by_ms: clock.abs_diff(present), ahead: clock > present })
}

/// Describes a duration in words: `3 days`.
pub(crate) fn in_words(ms: u64) -> String {
    const MINUTE: u64 = 60_000;
    const HOUR: u64 = 60 * MINUTE;
    const DAY: u64 = 24 * HOUR;
    const YEAR: u64 = 365 * DAY;
    let count = |unit: u64| ms.saturating_add(unit / 2) / unit;
    if ms >= 2 * YEAR {
        format!("{} years", count(YEAR))
    } else if ms >= 2 * DAY {
        format!("{} days", count(DAY))
    } else if ms >= 2 * HOUR {
        format!("{} hours", count(HOUR))
    } else {
        format!("{} minutes", count(MINUTE))
    }
}

/// Objects that were refused for their stamps, by the host that sent them.
#[derive(Debug, Default)]
pub(crate) struct RefusedObjects(BTreeMap<NodeId, RefusedObject>);

/// The last refusal of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RefusedObject {
    /// What it is, as users see it.
    pub what: String,
    /// How far its stamp is in the future, in milliseconds.
    pub by_ms: u64,
    /// Time of the refusal, in milliseconds of this run.
    pub at: u64,
}

impl RefusedObjects {
    /// Notes a refusal. `from` is a known host, so that their number is bounded.
    pub(crate) fn note(&mut self, from: NodeId, refused: RefusedObject) {
        self.0.insert(from, refused);
    }

    /// Ends refusals that are over, and those of hosts for which `in_step` is true. Returns the others.
    pub(crate) fn current(
        &mut self,
        now: u64,
        in_step: impl Fn(&NodeId) -> bool,
    ) -> impl Iterator<Item = (NodeId, &RefusedObject)> {
        self.0.retain(|from, refused| now.saturating_sub(refused.at) < REFUSAL_OVER_MS && !in_step(from));
        self.0.iter().map(|(from, refused)| (*from, refused))
    }
}

/// A step of the wall clock by this time is a change of it by an operator or another program, in milliseconds.
const STEP_MS: u64 = 5000;

/// The wall clock at one moment: milliseconds since 1970, and of this run.
#[derive(Debug, Default)]
pub(crate) struct LastWall(Option<(u64, u64)>);

impl LastWall {
    /// Takes the next moment. Returns what the wall clock would say if it had gone on as the time of this run did. `None` if
    /// it did, about.
    pub(crate) fn step(&mut self, wall_ms: u64, now: u64) -> Option<u64> {
        let (wall_before, before) = self.0.replace((wall_ms, now))?;
        let expected = wall_before.saturating_add(now.saturating_sub(before));
        (wall_ms.abs_diff(expected) > STEP_MS).then_some(expected)
    }
}

/// Whether a stamp is void: see [`Clocks::void_after`].
pub(crate) fn is_void(stamp: Stamp, void_after: Option<u64>) -> bool {
    void_after.is_some_and(|limit| stamp.wall_ms > limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000_000;
    const DAY: u64 = 24 * 60 * 60 * 1000;

    #[test]
    fn steps_of_the_wall_clock_are_noticed_once() {
        let mut wall = LastWall::default();
        assert_eq!(wall.step(NOW, 0), None);
        assert_eq!(wall.step(NOW + 1200, 1000), None);
        assert_eq!(wall.step(NOW + DAY, 2000), Some(NOW + 2200));
        assert_eq!(wall.step(NOW + DAY + 1000, 3000), None);
        assert_eq!(wall.step(NOW, 4000), Some(NOW + DAY + 2000));
    }

    fn node(n: u8) -> NodeId {
        NodeId([n; 10])
    }

    fn clocks(own: u64, others: &[u64]) -> Clocks {
        Clocks::new(own, others.iter().zip(1..).map(|(clock, n)| (node(n), *clock)))
    }

    #[test]
    fn a_host_alone_has_its_own_clock() {
        let alone = clocks(NOW, &[]);
        assert_eq!((alone.now(), alone.stamping(), alone.void_after()), (NOW, Some(NOW), None));
        assert_eq!(alone.refusing(), None);
        assert_eq!(alone.own_skew(), None);
    }

    #[test]
    fn the_clock_that_is_ahead_of_two_others_is_wrong() {
        let ahead = clocks(NOW + 3 * DAY, &[NOW, NOW + 500]);
        assert_eq!(ahead.own_skew(), Some(Skew { by_ms: 3 * DAY - 500, ahead: true }));
        let refusing = ahead.refusing().unwrap();
        assert_eq!(refusing, Refusing { hosts: vec![node(1), node(2)], by_ms: 3 * DAY - 500, decided: true });
        // What it has stored may be stamped again at once, with the time of the others.
        assert_eq!((ahead.stamping(), ahead.void_after()), (Some(NOW + 500), Some(NOW + 500 + MAX_AHEAD_MS)));
        let right = clocks(NOW, &[NOW, NOW + 3 * DAY]);
        assert_eq!(right.wrong_hosts(), [(node(2), Skew { by_ms: 3 * DAY, ahead: true })]);
        assert_eq!((right.own_skew(), right.refusing()), (None, None));
        assert_eq!(right.now(), NOW);
    }

    #[test]
    fn two_hosts_that_disagree_have_no_majority_and_the_later_one_does_not_write() {
        let (early, late) = (clocks(NOW, &[NOW + 3 * DAY]), clocks(NOW + 3 * DAY, &[NOW]));
        for one in [&early, &late] {
            assert!(!one.is_agreed() && one.own_skew().is_none() && one.wrong_hosts().len() == 1);
            assert_eq!(one.void_after(), None);
        }
        assert_eq!(early.refusing(), None);
        let refusing = late.refusing().unwrap();
        assert_eq!(refusing, Refusing { hosts: vec![node(1)], by_ms: 3 * DAY, decided: false });
    }

    #[test]
    fn a_clock_that_was_never_set_follows_the_others() {
        let unset = clocks(5000, &[NOW]);
        assert!(!unset.is_set() && unset.is_agreed());
        assert_eq!((unset.now(), unset.stamping()), (NOW, Some(NOW)));
        assert_eq!(unset.refusing(), None);
        // It has no vote, and no host waits for it.
        let right = clocks(NOW, &[5000]);
        assert_eq!((right.refusing(), right.is_agreed()), (None, false));
        let alone = clocks(5000, &[]);
        assert_eq!((alone.now(), alone.stamping()), (5000, None));
    }

    #[test]
    fn a_host_that_is_behind_takes_and_stamps_by_the_time_of_the_majority() {
        let behind = clocks(NOW - 100 * DAY, &[NOW, NOW]);
        assert_eq!((behind.now(), behind.stamping()), (NOW, Some(NOW)));
        assert_eq!(behind.own_skew(), Some(Skew { by_ms: 100 * DAY, ahead: false }));
        assert_eq!(behind.refusing(), None);
    }

    #[test]
    fn clocks_within_a_day_are_all_right() {
        let near = clocks(NOW, &[NOW + DAY / 2, NOW - DAY / 2, NOW + 1]);
        assert!(near.is_agreed() && near.wrong_hosts().is_empty() && near.own_skew().is_none());
        assert_eq!(near.refusing(), None);
        assert_eq!(near.stamping(), Some(NOW));
    }

    #[test]
    fn refusals_end_with_time_or_when_both_hosts_have_the_same_objects() {
        let mut refused = RefusedObjects::default();
        let object = |at| RefusedObject { what: "network early".to_owned(), by_ms: DAY, at };
        refused.note(node(1), object(0));
        refused.note(node(2), object(5000));
        assert_eq!(refused.current(6000, |_| false).count(), 2);
        assert_eq!(
            refused.current(REFUSAL_OVER_MS, |_| false).map(|(from, _)| from).collect::<Vec<_>>(),
            [node(2)]
        );
        assert_eq!(refused.current(REFUSAL_OVER_MS, |_| true).count(), 0);
    }

    #[test]
    fn durations_in_words() {
        assert_eq!(in_words(3 * DAY + 60_000), "3 days");
        assert_eq!(in_words(25 * DAY / 24), "25 hours");
        assert_eq!(in_words(3650 * DAY), "10 years");
        assert_eq!(in_words(90 * 60_000), "90 minutes");
        assert!(in_words(u64::MAX).ends_with("years"));
    }
}
