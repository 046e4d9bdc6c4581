//! Stamps order the writes of cluster objects, and the clock makes them: the last write wins.
//!
//! A stamp is the wall clock's time, or one step after the stamp of the write that it replaces if that is later. So the
//! writes of one object grow along every chain of cause and effect, as with a hybrid logical clock (Kulkarni et al.,
//! "Logical Physical Clocks", 2014), and a stamp that is ahead of the time affects no other object.

use serde::{Deserialize, Serialize};

use crate::id::NodeId;

/// The time of a write of a cluster object. Stamps order all writes in the cluster; only the same write has an equal
/// stamp.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Stamp {
    /// Milliseconds since 1970. Ahead of the writer's own clock if the writer had seen a later stamp.
    pub wall_ms: u64,
    /// Distinguishes writes of one millisecond.
    pub count: u32,
    /// The writer.
    pub node: NodeId,
}

impl Stamp {
    /// Returns the smallest stamp of the host `node` that is later than this one.
    #[must_use]
    pub fn next(self, node: NodeId) -> Self {
        match self.count.checked_add(1) {
            Some(count) => Self { count, node, ..self },
            None => Self { wall_ms: self.wall_ms.saturating_add(1), count: 0, node },
        }
    }

    /// Checks that the stamp is not in the future, so that a wrong clock of one host does not decide what others keep.
    ///
    /// # Errors
    ///
    /// The stamp is more than [`MAX_AHEAD_MS`] after the present.
    pub fn check(self, now_ms: u64) -> Result<(), TooFarAhead> {
        if self.wall_ms > now_ms.saturating_add(MAX_AHEAD_MS) {
            return Err(TooFarAhead { by_ms: self.wall_ms.saturating_sub(now_ms) });
        }
        Ok(())
    }
}

/// The clock of one host: the last stamp that it gave without regard to an earlier write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Clock {
    wall_ms: u64,
    count: u32,
}

impl Clock {
    /// Returns the stamp of a write that replaces the one with the stamp `before`; the default if it replaces none.
    ///
    /// Stamps without a write before them grow, unless the wall clock is set back by more than [`MAX_BACK_MS`].
    pub fn tick(&mut self, now_ms: u64, before: Stamp, node: NodeId) -> Stamp {
        let last = Stamp { wall_ms: self.wall_ms, count: self.count, node };
        let now = Stamp { wall_ms: now_ms, count: 0, node };
        let back = self.wall_ms.saturating_sub(now_ms);
        let stamp = if now_ms > self.wall_ms || back > MAX_BACK_MS { now } else { last.next(node) };
        *self = Self { wall_ms: stamp.wall_ms, count: stamp.count };
        stamp.max(before.next(node))
    }

    /// Returns the time of the last stamp, in milliseconds since 1970.
    pub fn wall_ms(&self) -> u64 {
        self.wall_ms
    }
}

/// How far the wall clock may go back without an effect on stamps, in milliseconds.
pub const MAX_BACK_MS: u64 = 60 * 1000;

/// How far another host's clock may be ahead of the local one, in milliseconds.
pub const MAX_AHEAD_MS: u64 = 24 * 60 * 60 * 1000;

/// The error for a stamp that is too far in the future.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("stamped {by_ms} ms in the future")]
pub struct TooFarAhead {
    /// The distance to the local clock, in milliseconds.
    pub by_ms: u64,
}

/// Formats milliseconds since 1970 as UTC time (RFC 3339): `2026-02-28T23:59:59.007Z`.
pub fn timestamp(ms: u64) -> String {
    let (second_of_day, day) = (ms / 1000 % 86_400, ms / 86_400_000);
    let (year, month, day) = civil(day);
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", ms % 1000)
}

/// Returns the year, month and day of a number of days since 1970 (Howard Hinnant's `civil_from_days`, for days from
/// 1970 on). A year begins in March, so that the leap day is its last day. An era is the 400 years after which the
/// calendar repeats.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // from 0000-03-01
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOBODY: Stamp = Stamp { wall_ms: 0, count: 0, node: NodeId([0; 10]) };

    #[test]
    fn stamps_grow_when_the_wall_clock_goes_back_a_little() {
        let mut clock = Clock::default();
        let node = NodeId::default();
        let first = clock.tick(100_000, NOBODY, node);
        let second = clock.tick(100_000 - MAX_BACK_MS, NOBODY, node);
        let third = clock.tick(100_001, NOBODY, node);
        assert!(first < second && second < third);
    }

    #[test]
    fn a_clock_that_was_ahead_comes_back() {
        let mut clock = Clock::default();
        let node = NodeId::default();
        clock.tick(1_000_000_000, NOBODY, node);
        assert_eq!(clock.tick(1_000_000, NOBODY, node).wall_ms, 1_000_000);
    }

    #[test]
    fn a_write_is_one_step_after_a_later_one_that_it_replaces_and_no_other_write_is() {
        let mut clock = Clock::default();
        let before = Stamp { wall_ms: 5000, count: 7, node: NodeId([9; 10]) };
        let stamp = clock.tick(4000, before, NodeId::default());
        assert_eq!(stamp, Stamp { wall_ms: 5000, count: 8, node: NodeId::default() });
        assert_eq!(clock.tick(4001, NOBODY, NodeId::default()).wall_ms, 4001);
        let last = Stamp { count: u32::MAX, ..before };
        assert!(last.next(NodeId::default()) > last);
        assert!(
            Stamp { wall_ms: u64::MAX, ..last }.next(NodeId::default()).wall_ms == u64::MAX,
            "no overflow"
        );
    }

    #[test]
    fn stamp_far_in_the_future_is_rejected() {
        let stamp = Stamp { wall_ms: u64::MAX, count: 0, node: NodeId::default() };
        assert_eq!(stamp.check(1), Err(TooFarAhead { by_ms: u64::MAX - 1 }));
        assert_eq!(Stamp { wall_ms: MAX_AHEAD_MS + 1, ..stamp }.check(1), Ok(()));
    }

    #[test]
    fn timestamp_equals_that_of_date() {
        // Each from `date -u -d @SECONDS +%FT%TZ`.
        for (s, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (951_868_800, "2000-03-01T00:00:00.000Z"),
            (1_709_164_800, "2024-02-29T00:00:00.000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(timestamp(s * 1000), text);
        }
        assert_eq!(timestamp(1_735_689_599_007), "2024-12-31T23:59:59.007Z");
        // No clock is so wrong that this panics.
        assert!(timestamp(u64::MAX).ends_with('Z'));
    }
}
