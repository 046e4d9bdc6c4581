//! Human-readable durations and moments.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const DAY: Duration = Duration::from_secs(86_400);

/// A moment that a user gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moment {
    /// In milliseconds since 1970.
    pub(crate) ms: u64,
    /// Whether it was given as a time of the last 24 hours.
    is_time_of_day: bool,
}

impl Moment {
    /// Returns this moment as the end of a period, in milliseconds since 1970. A time of day that is still to come was taken for
    /// that of yesterday, so the end is the first such time after the beginning.
    ///
    /// # Errors
    ///
    /// The end is before the beginning.
    pub(crate) fn end_of(self, since: Option<Self>) -> Result<u64, String> {
        match since {
            Some(since) if self.ms < since.ms && self.is_time_of_day => {
                let days = (since.ms - self.ms).div_ceil(DAY.as_millis() as u64);
                Ok(self.ms + days * DAY.as_millis() as u64)
            }
            Some(since) if self.ms < since.ms => {
                Err("the end of the period is before its beginning".to_owned())
            }
            Some(_) | None => Ok(self.ms),
        }
    }
}

/// Parses a moment: a time of the last 24 hours (`03:10`, `03:10:20`), a date, a date with a time (`2026-03-01 03:10`, as
/// `ovlctl events` prints it too), or how long ago it was (`10m`, `2h 30m`). Times are UTC.
///
/// # Errors
///
/// What can be given instead.
pub(crate) fn moment(text: &str) -> Result<Moment, String> {
    moment_before(text, SystemTime::now())
}

fn moment_before(text: &str, now: SystemTime) -> Result<Moment, String> {
    let is_time = text.contains(':') && text.chars().all(|c| c.is_ascii_digit() || c == ':');
    let seconds = if text.matches(':').count() == 1 && !text.ends_with('Z') { ":00" } else { "" };
    let found = if is_time {
        let today = humantime::format_rfc3339_seconds(now).to_string();
        let date = today.split('T').next().unwrap_or_default();
        let today = humantime::parse_rfc3339_weak(&format!("{date} {text}{seconds}")).ok();
        today.map(|at| if at > now { at - DAY } else { at })
    } else if text.contains('-') {
        let midnight = if text.contains(':') { "" } else { " 00:00:00" };
        humantime::parse_rfc3339_weak(&format!("{text}{midnight}{seconds}")).ok()
    } else {
        humantime::parse_duration(text).ok().and_then(|ago| now.checked_sub(ago))
    };
    let since = found.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    since.map(|since| Moment { ms: since.as_millis() as u64, is_time_of_day: is_time }).ok_or_else(|| {
        "give a time such as 03:10 or 2026-03-01 03:10:20 (UTC), or how long ago it was, such as 10m"
            .to_owned()
    })
}

/// Returns the wall-clock time in milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// Formats microseconds as `0.04ms`, `0.4ms` or `12ms`; from one second on like [`seconds`].
pub(crate) fn micros(us: u64) -> String {
    let ms = |us: u64| us as f64 / 1e3;
    match us {
        0..100 => format!("{:.2}ms", ms(us)),
        100..10_000 => format!("{:.1}ms", ms(us)),
        10_000..1_000_000 => format!("{}ms", us / 1000),
        _ => seconds(us / 1_000_000),
    }
}

/// Formats milliseconds as `120ms`; from one second on like [`seconds`].
pub(crate) fn millis(ms: u64) -> String {
    if ms < 1000 { format!("{ms}ms") } else { seconds(ms / 1000) }
}

/// Formats seconds in at most two units: `12s`, `3m12s`, `4h5m`, `2d3h`.
pub(crate) fn seconds(s: u64) -> String {
    let (minutes, hours, days) = (s / 60, s / 3600, s / 86_400);
    if days > 0 {
        two(days, "d", hours % 24, "h")
    } else if hours > 0 {
        two(hours, "h", minutes % 60, "m")
    } else if minutes > 0 {
        two(minutes, "m", s % 60, "s")
    } else {
        format!("{s}s")
    }
}

fn two(large: u64, large_unit: &str, small: u64, small_unit: &str) -> String {
    if small == 0 {
        format!("{large}{large_unit}")
    } else {
        format!("{large}{large_unit}{small}{small_unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_times_dates_and_durations() {
        let now = humantime::parse_rfc3339("2026-03-01T03:00:00Z").unwrap();
        for (text, expected) in [
            ("02:10", "2026-03-01T02:10:00.000Z"),
            ("02:10:20", "2026-03-01T02:10:20.000Z"),
            ("03:10", "2026-02-28T03:10:00.000Z"),
            ("2026-02-27", "2026-02-27T00:00:00.000Z"),
            ("2026-02-27 03:10", "2026-02-27T03:10:00.000Z"),
            ("2026-02-27T03:10:20", "2026-02-27T03:10:20.000Z"),
            ("2026-02-27T03:10:20.311Z", "2026-02-27T03:10:20.311Z"),
            ("10m", "2026-03-01T02:50:00.000Z"),
            ("1h 30m", "2026-03-01T01:30:00.000Z"),
        ] {
            assert_eq!(
                moment_before(text, now).map(|at| ovl_proto::clock::timestamp(at.ms)).as_deref(),
                Ok(expected),
                "{text}"
            );
        }
        for wrong in ["", "3", "25:00", "2026-13-01", "yesterday", "100000000y", ":", "1969-01-01"] {
            assert!(moment_before(wrong, now).is_err(), "{wrong}");
        }
    }

    #[test]
    fn end_of_a_period_is_after_its_beginning() {
        let now = humantime::parse_rfc3339("2026-03-01T03:15:00Z").unwrap();
        let end = |since: &str, until: &str| {
            let since = moment_before(since, now).unwrap();
            moment_before(until, now).unwrap().end_of(Some(since)).map(ovl_proto::clock::timestamp)
        };
        // The end is still to come.
        assert_eq!(end("03:10", "03:20").as_deref(), Ok("2026-03-01T03:20:00.000Z"));
        assert_eq!(end("10m", "03:20").as_deref(), Ok("2026-03-01T03:20:00.000Z"));
        assert_eq!(end("23:50", "00:10").as_deref(), Ok("2026-03-01T00:10:00.000Z"));
        assert_eq!(end("2026-02-20", "5m").as_deref(), Ok("2026-03-01T03:10:00.000Z"));
        assert!(end("5m", "10m").is_err() && end("2026-02-20", "2026-02-19").is_err());
    }

    #[test]
    fn durations_have_at_most_two_units() {
        for (us, text) in [
            (0, "0.00ms"),
            (40, "0.04ms"),
            (412, "0.4ms"),
            (9_949, "9.9ms"),
            (12_345, "12ms"),
            (999_999, "999ms"),
            (1_500_000, "1s"),
        ] {
            assert_eq!(micros(us), text);
        }
        assert_eq!((millis(7), millis(999), millis(12_900)), ("7ms".into(), "999ms".into(), "12s".into()));
        for (s, text) in [
            (0, "0s"),
            (59, "59s"),
            (60, "1m"),
            (192, "3m12s"),
            (3600, "1h"),
            (14_700, "4h5m"),
            (183_600, "2d3h"),
        ] {
            assert_eq!(seconds(s), text);
        }
    }
}
