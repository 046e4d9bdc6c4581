//! Human-readable durations.

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
