//! How much each pair of hosts may have passed on: a token bucket each.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::frame::HostId;

/// The maximum number of pairs with a bucket. Those that have been idle longest enough to be full give way.
const MOST_PAIRS: usize = 4096;
/// The capacity of a bucket, as the time in which it fills.
const BURST: Duration = Duration::from_millis(100);
/// The minimum capacity, in bytes: two datagrams of the maximum size.
const MIN_BURST: u64 = 2 * 65_536;

/// The buckets of the pairs of hosts.
#[derive(Debug)]
pub(crate) struct Limits {
    /// Bytes a second.
    rate: u64,
    pairs: HashMap<(HostId, HostId), Bucket>,
}

#[derive(Debug)]
struct Bucket {
    bytes: u64,
    at: Instant,
}

impl Limits {
    /// Allows each pair of hosts so many bytes a second, in both directions together.
    pub(crate) fn new(rate: u64) -> Self {
        Self { rate, pairs: HashMap::new() }
    }

    /// Takes the bytes of a datagram out of the bucket of its pair. Returns false if they are not there.
    pub(crate) fn take(&mut self, from: HostId, to: HostId, bytes: usize, now: Instant) -> bool {
        let (rate, bytes) = (self.rate, u64::try_from(bytes).unwrap_or(u64::MAX));
        let most = most(rate);
        let pair = (from.min(to), from.max(to));
        if self.pairs.len() >= MOST_PAIRS && !self.pairs.contains_key(&pair) {
            self.pairs.retain(|_, bucket| bucket.filled(rate, now) < most);
            if self.pairs.len() >= MOST_PAIRS {
                return false;
            }
        }
        let bucket = self.pairs.entry(pair).or_insert(Bucket { bytes: most, at: now });
        bucket.bytes = bucket.filled(rate, now);
        bucket.at = now;
        let left = bucket.bytes.checked_sub(bytes);
        bucket.bytes = left.unwrap_or(bucket.bytes);
        left.is_some()
    }
}

/// The capacity of a bucket, in bytes.
fn most(rate: u64) -> u64 {
    bytes_in(rate, BURST).max(MIN_BURST)
}

fn bytes_in(rate: u64, time: Duration) -> u64 {
    let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    rate.saturating_mul(micros) / 1_000_000
}

impl Bucket {
    /// What is in it now.
    fn filled(&self, rate: u64, now: Instant) -> u64 {
        let since = now.saturating_duration_since(self.at).min(Duration::from_secs(3600));
        self.bytes.saturating_add(bytes_in(rate, since)).min(most(rate))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(number: u16) -> HostId {
        let mut id = [0; 10];
        id[..2].copy_from_slice(&number.to_be_bytes());
        id
    }

    #[test]
    fn pair_gets_its_rate_in_both_directions_together_and_others_theirs() {
        let (mut limits, start) = (Limits::new(10_000_000), Instant::now());
        let mut taken = [0_u64; 2];
        for step in 0..20_000 {
            let now = start + Duration::from_micros(100) * step;
            let (from, to) = if step % 2 == 0 { (1, 2) } else { (2, 1) };
            taken[0] += 1000 * u64::from(limits.take(host(from), host(to), 1000, now));
            taken[0] += 1000 * u64::from(limits.take(host(from), host(to), 1000, now));
            taken[1] += 500 * u64::from(limits.take(host(1), host(3), 500, now));
        }
        // Two seconds, and a bucket that was full.
        assert!((20_000_000..=21_100_000).contains(&taken[0]), "{}", taken[0]);
        assert_eq!(taken[1], 20_000 * 500, "half of the rate");
    }

    #[test]
    fn pairs_are_bounded_and_idle_ones_give_way() {
        let (mut limits, start) = (Limits::new(1_000_000), Instant::now());
        let most = u16::try_from(MOST_PAIRS).unwrap();
        for number in 1..=most {
            assert!(limits.take(host(0), host(number), 60_000, start));
        }
        assert!(!limits.take(host(0), host(most + 1), 1, start), "all are in use");
        let later = start + Duration::from_secs(1);
        assert!(limits.take(host(0), host(most + 1), 1, later));
        assert_eq!(limits.pairs.len(), 1);
    }
}
