//! The hybrid logical clock (Kulkarni et al., "Logical Physical Clocks", 2014). Its stamps grow along every chain of
//! cause and effect, and stay close to the wall clock.

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

/// The clock of one host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Clock {
    wall_ms: u64,
    count: u32,
}

impl Clock {
    /// Returns a stamp that is later than all that this clock returned or observed.
    pub fn tick(&mut self, now_ms: u64, node: NodeId) -> Stamp {
        if now_ms > self.wall_ms {
            *self = Self { wall_ms: now_ms, count: 0 };
        } else if self.count == u32::MAX {
            *self = Self { wall_ms: self.wall_ms.saturating_add(1), count: 0 };
        } else {
            self.count += 1;
        }
        Stamp { wall_ms: self.wall_ms, count: self.count, node }
    }

    /// Advances the clock to another host's stamp.
    ///
    /// # Errors
    ///
    /// If the stamp is more than [`MAX_AHEAD_MS`] in the future, so that a host with a wrong clock does not advance
    /// the clocks of the cluster.
    pub fn observe(&mut self, stamp: Stamp, now_ms: u64) -> Result<(), TooFarAhead> {
        if stamp.wall_ms > now_ms.saturating_add(MAX_AHEAD_MS) {
            return Err(TooFarAhead { by_ms: stamp.wall_ms - now_ms });
        }
        if (stamp.wall_ms, stamp.count) > (self.wall_ms, self.count) {
            *self = Self { wall_ms: stamp.wall_ms, count: stamp.count };
        }
        Ok(())
    }
}

/// How far another host's clock may be ahead of the local one, in milliseconds.
pub const MAX_AHEAD_MS: u64 = 24 * 60 * 60 * 1000;

/// The error for a stamp that is too far in the future.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("stamped {by_ms} ms in the future; check the clocks of the hosts")]
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

    #[test]
    fn stamps_grow_when_the_wall_clock_goes_back() {
        let mut clock = Clock::default();
        let node = NodeId::default();
        let first = clock.tick(1000, node);
        let second = clock.tick(900, node);
        let third = clock.tick(1001, node);
        assert!(first < second && second < third);
    }

    #[test]
    fn stamp_is_later_than_observed_stamps() {
        let mut clock = Clock::default();
        let seen = Stamp { wall_ms: 5000, count: 7, node: NodeId([9; 10]) };
        assert_eq!(clock.observe(seen, 4000), Ok(()));
        assert!(clock.tick(4000, NodeId::default()) > seen);
    }

    #[test]
    fn stamp_far_in_the_future_is_rejected() {
        let mut clock = Clock::default();
        let stamp = Stamp { wall_ms: u64::MAX, count: 0, node: NodeId::default() };
        assert!(clock.observe(stamp, 0).is_err());
        assert_eq!(clock, Clock::default());
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
