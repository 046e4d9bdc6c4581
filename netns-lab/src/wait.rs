//! Waiting for a condition. The only place that sleeps.

use std::fmt::Display;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

const FIRST_INTERVAL: Duration = Duration::from_millis(1);
const LONGEST_INTERVAL: Duration = Duration::from_millis(10);

/// What one look at the awaited condition says: its value, or why it is not there yet.
pub trait Outcome {
    /// What waiting for it gives.
    type Value;
    /// The value, or the state seen in words.
    fn outcome(self) -> std::result::Result<Self::Value, String>;
}

impl Outcome for bool {
    type Value = ();
    fn outcome(self) -> std::result::Result<(), String> {
        if self { Ok(()) } else { Err("not so".to_owned()) }
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
        self.ok_or_else(|| "nothing there".to_owned())
    }
}

/// An error counts as "not yet": what is awaited often fails before it works.
impl<O: Outcome, E: Display> Outcome for std::result::Result<O, E> {
    type Value = O::Value;
    fn outcome(self) -> std::result::Result<O::Value, String> {
        match self {
            Ok(inner) => inner.outcome(),
            Err(error) => Err(format!("{error:#}")),
        }
    }
}

/// Looks again and again, every few milliseconds, until `look` gives what is awaited.
///
/// `look` returns a `bool`, an `Option`, or a `Result` of one of these or of `()`
/// (`ensure!(...); Ok(())`). The error after `timeout` says what was awaited and what
/// the last look saw. The condition is looked at once more after the time is over.
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
            bail!("waited {timeout:?} in vain for {what}; last seen: {seen}");
        }
        thread::sleep(interval.min(timeout.saturating_sub(start.elapsed())));
        interval = (interval * 2).min(LONGEST_INTERVAL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_the_value() {
        let mut looks = 0;
        let value = wait_until(Duration::from_secs(1), "the third look", || {
            looks += 1;
            (looks == 3).then_some(looks)
        });
        assert_eq!(value.unwrap(), 3);
    }

    #[test]
    fn says_what_was_awaited_and_seen() {
        let error = wait_until(Duration::from_millis(5), "a miracle", || -> Result<bool> { bail!("rain") });
        let text = error.unwrap_err().to_string();
        assert!(text.contains("a miracle") && text.contains("rain"), "{text}");
    }
}
