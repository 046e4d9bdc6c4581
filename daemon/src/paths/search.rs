//! The search for the longest packets that pass to another host, after those of full length were found not to.
//!
//! A search halves the range between a length that passes and one that does not. [`Search`] owns the range, and which
//! trials were sent. It has no clock; times are since the start of the daemon. Begin to read at [`Search::next`].

use std::time::Duration;

/// The shortest length that is tried, in bytes: what every host accepts (RFC 1122, section 3.3.2).
const SHORTEST: u16 = 576;
/// The search ends when the range is as small, in bytes.
const PRECISION: u16 = 8;
/// The interval of trials.
const EVERY: Duration = Duration::from_millis(400);
/// The trials of one length, after which it counts as one that does not pass.
const TRIALS: u32 = 3;
/// The time after the last trial of a length in which the other host can say that one arrived.
const ANSWER: Duration = Duration::from_millis(1600);

/// A search.
#[derive(Debug)]
pub(super) struct Search {
    /// The longest length that passed, or the shortest that is tried.
    passes: u16,
    /// Whether one passed.
    has_passed: bool,
    /// The shortest length that did not.
    fails: u16,
    /// The number of the first trial of the present length. `None` before it.
    first: Option<u64>,
    /// The trials of the present length.
    sent: u32,
    /// The time of the last trial.
    sent_at: Duration,
}

/// What a search wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// To wait.
    Wait,
    /// To send a trial of this length, as an IP packet.
    Try(u16),
    /// The search has ended with the longest length that passes. `None`: no trial arrived.
    Found(Option<u16>),
}

impl Search {
    /// Begins a search below a length that does not pass.
    pub(super) fn new(fails: u16) -> Self {
        Self { passes: SHORTEST, has_passed: false, fails, first: None, sent: 0, sent_at: Duration::ZERO }
    }

    /// Returns the next step. `number` is that of the next trial, and `heard` that of the last one which arrived, as the
    /// other host says.
    pub(super) fn next(&mut self, number: u64, heard: u64, now: Duration) -> Step {
        if self.first.is_some_and(|first| heard >= first) {
            self.passes = self.length();
            self.has_passed = true;
            (self.first, self.sent) = (None, 0);
        } else if self.sent >= TRIALS && now.saturating_sub(self.sent_at) >= ANSWER {
            self.fails = self.length();
            (self.first, self.sent) = (None, 0);
        }
        if self.fails.saturating_sub(self.passes) <= PRECISION {
            return Step::Found(self.has_passed.then_some(self.passes));
        }
        if self.sent >= TRIALS || (self.sent > 0 && now.saturating_sub(self.sent_at) < EVERY) {
            return Step::Wait;
        }
        self.first.get_or_insert(number);
        self.sent += 1;
        self.sent_at = now;
        Step::Try(self.length())
    }

    /// The length that is tried.
    fn length(&self) -> u16 {
        self.passes.midpoint(self.fails)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Searches on a path that carries packets up to a length, of which every `lost`-th is lost.
    fn search(full: u16, carries: u16, lost: u64) -> (Option<u16>, Duration) {
        let (mut search, mut number, mut heard) = (Search::new(full), 1, 0);
        for tick in 1.. {
            let now = Duration::from_millis(250 * tick);
            match search.next(number, heard, now) {
                Step::Wait => {}
                Step::Try(length) => {
                    if length <= carries && !number.is_multiple_of(lost) {
                        heard = number;
                    }
                    number += 1;
                }
                Step::Found(length) => return (length, now),
            }
        }
        unreachable!()
    }

    #[test]
    fn longest_length_is_found_in_half_a_minute() {
        for (full, carries) in [(1450, 1449), (1450, 1300), (1450, 600), (8950, 1450)] {
            let (found, took) = search(full, carries, u64::MAX);
            let found = found.unwrap();
            assert!(found <= carries && found + PRECISION >= carries, "{carries}: {found}");
            assert!(took < Duration::from_secs(35), "{carries}: {took:?}");
        }
    }

    #[test]
    fn nothing_is_found_where_no_trial_arrives() {
        assert_eq!(search(1450, 100, u64::MAX).0, None);
    }

    #[test]
    fn some_loss_does_not_mislead() {
        let found = search(1450, 1400, 3).0.unwrap();
        assert!((1392..=1400).contains(&found), "{found}");
    }
}
