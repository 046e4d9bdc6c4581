//! Waiting for a condition. Only this module sleeps.

use std::fmt::Display;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

const FIRST_INTERVAL: Duration = Duration::from_millis(1);
const LONGEST_INTERVAL: Duration = Duration::from_millis(10);

/// The result of one check of an awaited condition: its value, or why it is not met yet.
pub trait Outcome {
    /// The value that waiting returns.
    type Value;
    /// Returns the value, or a description of the observed state.
    fn outcome(self) -> std::result::Result<Self::Value, String>;
}

impl Outcome for bool {
    type Value = ();
    fn outcome(self) -> std::result::Result<(), String> {
        if self { Ok(()) } else { Err("false".to_owned()) }
    }
}

impl Outcome for () {
    type Value = ();
    fn outcome(self) -> std::result::Result<(), String> {
        Ok(())
    }
}

impl<T> Outcome for Option<T> {
    type Value = T;
    fn outcome(self) -> std::result::Result<T, String> {
        self.ok_or_else(|| "no value".to_owned())
    }
}

/// An error counts as "not met yet": an awaited operation often fails before it succeeds.
impl<O: Outcome, E: Display> Outcome for std::result::Result<O, E> {
    type Value = O::Value;
    fn outcome(self) -> std::result::Result<O::Value, String> {
        match self {
            Ok(inner) => inner.outcome(),
            Err(error) => Err(format!("{error:#}")),
        }
    }
}

/// Checks a condition every few milliseconds until it is met, and returns its value.
///
/// `look` returns a `bool`, an `Option`, or a `Result` of one of these or of `()` (`ensure!(...); Ok(())`).
/// The condition is checked once more after the timeout.
///
/// # Errors
///
/// If the condition is not met within `timeout`. The error contains `what` and the last observed state.
pub fn wait_until<O: Outcome>(
    timeout: Duration,
    what: &str,
    mut look: impl FnMut() -> O,
) -> Result<O::Value> {
    let start = Instant::now();
    let mut interval = FIRST_INTERVAL;
    loop {
        let last_look = start.elapsed() >= timeout;
        let seen = match look().outcome() {
            Ok(value) => return Ok(value),
            Err(seen) => seen,
        };
        if last_look {
            bail!("timed out after {timeout:?} waiting for {what}; last state: {seen}");
        }
        thread::sleep(interval.min(timeout.saturating_sub(start.elapsed())));
        interval = (interval * 2).min(LONGEST_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_is_returned() {
        let mut looks = 0;
        let value = wait_until(Duration::from_secs(1), "the third look", || {
            looks += 1;
            (looks == 3).then_some(looks)
        });
        assert_eq!(value.unwrap(), 3);
    }

    #[test]
    fn timeout_error_contains_what_was_awaited_and_observed() {
        let error = wait_until(Duration::from_millis(5), "a miracle", || -> Result<bool> { bail!("rain") });
        let text = error.unwrap_err().to_string();
        assert!(text.contains("a miracle") && text.contains("rain"), "{text}");
    }
}
