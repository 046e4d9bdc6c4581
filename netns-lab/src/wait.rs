//! Waiting for a condition. Only this module sleeps.

use std::fmt::Display;
use std::io;
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

/// Repeats a call as long as it ends with [`io::ErrorKind::Interrupted`].
///
/// Receiving from a socket with a timeout ends so when the process was stopped and continued meanwhile, whether or not it
/// handles signals (signal(7), "Interruption of system calls and library functions by stop signals").
///
/// # Errors
///
/// Any other error of the call.
pub fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupted_call_is_repeated_and_other_errors_are_returned() {
        let mut results =
            vec![Err(io::ErrorKind::Interrupted), Err(io::ErrorKind::Interrupted), Ok(7)].into_iter();
        let value = uninterrupted(|| results.next().unwrap().map_err(io::Error::from));
        assert_eq!((value.unwrap(), results.len()), (7, 0));
        let error = uninterrupted(|| Err::<(), _>(io::ErrorKind::WouldBlock.into())).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    }

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
