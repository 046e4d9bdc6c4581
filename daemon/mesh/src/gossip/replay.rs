//! Replay protection: the counters of a run that were received.

/// The size of the window: older counters are rejected.
const WINDOW: u64 = 2048;
const WORDS: usize = (WINDOW / 64) as usize;

/// A sliding window over counters, as in RFC 6479.
pub(super) struct ReplayWindow {
    /// One more than the highest received counter.
    next: u64,
    /// A ring: the bit of a counter is at `counter % WINDOW`.
    bits: Box<[u64; WORDS]>,
}

impl Default for ReplayWindow {
    fn default() -> Self {
        Self { next: 0, bits: Box::new([0; WORDS]) }
    }
}

impl ReplayWindow {
    /// Whether a counter was received before, or is older than the window.
    pub(super) fn has(&self, counter: u64) -> bool {
        if counter >= self.next {
            // The maximum would overflow `next`. No correct sender reaches it.
            return counter == u64::MAX;
        }
        let (word, bit) = position(counter);
        self.next - counter > WINDOW || self.bits.get(word).is_none_or(|word| word & bit != 0)
    }

    /// Inserts a counter for which [`Self::has`] returns false.
    pub(super) fn insert(&mut self, counter: u64) {
        if counter >= self.next {
            if counter - self.next >= WINDOW {
                self.bits.fill(0);
            } else {
                for skipped in self.next..counter {
                    self.change(skipped, false);
                }
            }
            self.next = counter.saturating_add(1);
        }
        self.change(counter, true);
    }

    fn change(&mut self, counter: u64, seen: bool) {
        let (word, bit) = position(counter);
        if let Some(word) = self.bits.get_mut(word) {
            if seen {
                *word |= bit;
            } else {
                *word &= !bit;
            }
        }
    }
}

fn position(counter: u64) -> (usize, u64) {
    let index = counter % WINDOW;
    ((index / 64) as usize, 1 << (index % 64))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn jumps_and_edges_of_the_window() {
        let mut window = ReplayWindow::default();
        window.insert(0);
        assert!(window.has(0));
        window.insert(WINDOW - 1);
        assert!(window.has(0) && !window.has(1));
        window.insert(WINDOW);
        assert!(window.has(0), "too old");
        assert!(!window.has(1));
        window.insert(1 << 40);
        assert!(window.has(WINDOW) && !window.has((1 << 40) - WINDOW + 1));
        assert!(window.has((1 << 40) - WINDOW));
        assert!(window.has(u64::MAX));
    }

    proptest! {
        #[test]
        fn window_agrees_with_a_set(counters in proptest::collection::vec(0_u64..6000, 1..400)) {
            let mut window = ReplayWindow::default();
            let mut seen = BTreeSet::new();
            for counter in counters {
                let too_old = seen.last().is_some_and(|&last: &u64| last + 1 > counter + WINDOW);
                prop_assert_eq!(window.has(counter), too_old || seen.contains(&counter));
                if !window.has(counter) {
                    window.insert(counter);
                    seen.insert(counter);
                }
            }
        }
    }
}
