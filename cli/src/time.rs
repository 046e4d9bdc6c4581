//! Durations and timestamps for people. Time zones are left out on purpose: hosts of one cluster
//! may be in several, and their events are compared.

/// Microseconds as `0.04ms`, `0.4ms`, `12ms`, and from a second on as [`seconds`].
pub(crate) fn micros(us: u64) -> String {
    let ms = |us: u64| us as f64 / 1e3;
    match us {
        0..100 => format!("{:.2}ms", ms(us)),
        100..10_000 => format!("{:.1}ms", ms(us)),
        10_000..1_000_000 => format!("{}ms", us / 1000),
        _ => seconds(us / 1_000_000),
    }
}

/// Milliseconds as `120ms`, and from a second on as [`seconds`].
pub(crate) fn millis(ms: u64) -> String {
    if ms < 1000 { format!("{ms}ms") } else { seconds(ms / 1000) }
}

/// Seconds in at most two units: `12s`, `3m12s`, `4h5m`, `2d3h`.
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

/// Milliseconds since 1970 in UTC as RFC 3339 has it: `2026-02-28T23:59:59.007Z`.
pub(crate) fn timestamp(ms: u64) -> String {
    let (second_of_day, day) = (ms / 1000 % 86_400, ms / 86_400_000);
    let (year, month, day) = civil(day);
    let (hour, minute, second) = (second_of_day / 3600, second_of_day / 60 % 60, second_of_day % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", ms % 1000)
}

/// Year, month and day of a day since 1970: Howard Hinnant's `civil_from_days`, for days from
/// 1970 on. Its years begin in March, so that the leap day is the last one, and its eras are the
/// 400 years after which the calendar repeats.
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
    fn durations_are_short() {
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

    #[test]
    fn timestamps_agree_with_date() {
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
