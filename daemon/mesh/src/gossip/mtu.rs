//! The path MTU search for one peer: a state machine without clock or socket.
//!
//! Each round sends one probe of each candidate size, and a small control probe. A candidate counts as lost only in
//! rounds whose control probe was acknowledged. It is given up only if that many consecutive losses are unlikely at
//! the loss rate of small packets. So a lossy path makes the search slower, but the MTU not smaller.

use std::time::Duration;
use tokio::time::Instant;

/// The smallest path MTU that is searched: the minimum link MTU of IPv6 (RFC 8200, section 5).
const MIN_MTU: u16 = 1280;
/// Common MTUs: jumbo frames, Ethernet, PPPoE, and various tunnels.
const COMMON: [u16; 15] =
    [9000, 8900, 1500, 1492, 1480, 1460, 1450, 1440, 1420, 1400, 1380, 1360, 1340, 1320, 1300];
/// The precision of the result, in bytes.
const GRANULARITY: u32 = 8;
/// The number of parts into which the range between two known sizes is split per stage.
const SPLIT: u32 = 8;
/// A size is given up if its consecutive losses would occur by chance with at most this probability.
const MAX_CHANCE: f64 = 1e-4;
/// The interval between checks of the current value.
const CHECK_EVERY: Duration = Duration::from_secs(10);
/// The interval between searches for a larger value, which is shorter after a decrease.
const SEARCH_EVERY: Duration = Duration::from_secs(300);
const SEARCH_AFTER_FALL: Duration = Duration::from_secs(30);

/// The size of a control probe.
pub(super) const CONTROL: u16 = 0;

/// A probe to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Probe {
    /// The size of the whole IP packet in bytes, or [`CONTROL`].
    pub size: u16,
    pub round: u16,
}

/// The path MTU search for one peer.
#[derive(Debug)]
pub(super) struct PathMtu {
    limit: u16,
    current: Option<u16>,
    search: Option<Search>,
    round: u16,
    next_check: Instant,
    next_search: Instant,
    patience: Duration,
}

#[derive(Debug)]
struct Search {
    /// The largest size known to pass. The minimum is assumed to pass.
    good: u16,
    /// Whether a probe of the size `good` was acknowledged in this search.
    proven: bool,
    /// The smallest size known not to pass.
    bad: u32,
    /// Whether this is only a check of the current value.
    check: bool,
    candidates: Vec<Candidate>,
    round_ends: Instant,
    controls: u32,
    controls_back: u32,
    control_back: bool,
}

#[derive(Debug)]
struct Candidate {
    size: u16,
    lost: u32,
}

impl PathMtu {
    /// Starts without a value. `limit` is the smaller link MTU of both hosts.
    pub(super) fn new(limit: u16, now: Instant) -> Self {
        Self {
            limit,
            current: None,
            search: None,
            round: 0,
            next_check: now,
            next_search: now,
            patience: SEARCH_EVERY,
        }
    }

    /// The path MTU in bytes; `None` if it is not known yet.
    pub(super) fn current(&self) -> Option<u16> {
        self.current
    }

    /// Whether a search is in progress, so that it must be polled often.
    pub(super) fn is_searching(&self) -> bool {
        self.search.is_some()
    }

    /// Sets the smaller link MTU of both hosts.
    pub(super) fn set_limit(&mut self, limit: u16, now: Instant) {
        if limit == self.limit {
            return;
        }
        self.limit = limit;
        self.current = self.current.map(|current| current.min(limit));
        self.search = None;
        self.next_search = now;
    }

    /// The probes to send now. `answered` is the share of pings that the peer answers. A new search begins only if
    /// `may_start`.
    pub(super) fn poll(&mut self, now: Instant, rtt: Duration, answered: f64, may_start: bool) -> Vec<Probe> {
        match &mut self.search {
            None if may_start => self.start(now),
            None => return Vec::new(),
            Some(search) if now < search.round_ends => return Vec::new(),
            Some(search) => {
                search.end_round(answered);
                self.end_stage(now);
            }
        }
        let Some(search) = &mut self.search else { return Vec::new() };
        self.round = self.round.wrapping_add(1);
        search.controls += 1;
        search.control_back = false;
        search.round_ends = now + (rtt * 2 + Duration::from_millis(20)).max(Duration::from_millis(60));
        let sizes = std::iter::once(CONTROL).chain(search.candidates.iter().map(|candidate| candidate.size));
        sizes.map(|size| Probe { size, round: self.round }).collect()
    }

    /// Notes that the peer acknowledged a probe.
    pub(super) fn acked(&mut self, probe: Probe, now: Instant) {
        let Some(search) = &mut self.search else {
            // A late acknowledgement still proves that the size passes.
            if self.current.is_some_and(|current| current < probe.size) && probe.size <= self.limit {
                self.current = Some(probe.size);
            }
            return;
        };
        if probe.size == CONTROL {
            if probe.round == self.round && !search.control_back {
                search.control_back = true;
                search.controls_back += 1;
            }
            return;
        }
        if probe.size >= search.good && probe.size <= self.limit {
            search.good = probe.size;
            search.proven = true;
            if search.bad <= u32::from(probe.size) {
                search.bad = u32::from(self.limit) + 1;
            }
            search.candidates.retain(|candidate| candidate.size > probe.size);
            if search.is_over() || search.check {
                self.finish(now);
            }
        }
    }

    /// Notes that the local kernel refused to send a size (EMSGSIZE).
    pub(super) fn too_big(&mut self, size: u16) {
        if let Some(search) = &mut self.search
            && size > search.good
        {
            search.bad = search.bad.min(u32::from(size));
        }
    }

    fn start(&mut self, now: Instant) {
        let floor = MIN_MTU.min(self.limit);
        let above = u32::from(self.limit) + 1;
        let (good, bad, check) = match self.current {
            Some(current) if now >= self.next_search && current < self.limit => (current, above, false),
            None if now >= self.next_search => (floor, above, false),
            Some(current) if now >= self.next_check && current > floor => {
                (floor, u32::from(current) + 1, true)
            }
            _ => return,
        };
        if bad - u32::from(good) <= 1 {
            self.current = Some(good);
            self.next_search = now + SEARCH_EVERY;
            return;
        }
        self.search = Some(Search {
            good,
            proven: false,
            bad,
            check,
            // On most paths the largest size passes, and the search ends.
            candidates: vec![Candidate { size: (bad - 1) as u16, lost: 0 }],
            round_ends: now,
            controls: 0,
            controls_back: 0,
            control_back: false,
        });
    }

    /// Selects new candidates if the present ones are decided.
    fn end_stage(&mut self, now: Instant) {
        let Some(search) = &mut self.search else { return };
        let (good, bad) = (u32::from(search.good), search.bad);
        search.candidates.retain(|candidate| (good + 1..bad).contains(&u32::from(candidate.size)));
        if search.is_over() {
            return self.finish(now);
        }
        if search.candidates.is_empty() {
            let fell = self.current.is_some_and(|current| u32::from(current) >= bad);
            if search.proven && self.current.is_none_or(|current| fell || current < search.good) {
                self.current = Some(search.good);
            }
            if fell {
                self.patience = SEARCH_AFTER_FALL;
            }
            search.check = false;
            search.candidates = between(search.good, bad);
        } else if !search.check && !search.proven && search.candidates.len() == 1 {
            // The largest size was not acknowledged at once: try smaller ones meanwhile.
            search.candidates.extend(between(search.good, bad - 1));
        }
    }

    fn finish(&mut self, now: Instant) {
        let Some(search) = self.search.take() else { return };
        if self.current.is_some_and(|current| current > search.good) {
            self.patience = SEARCH_AFTER_FALL;
        }
        self.current = Some(search.good);
        self.next_check = now + CHECK_EVERY;
        if !search.check {
            self.next_search = now + self.patience;
            self.patience = (self.patience * 2).min(SEARCH_EVERY);
        }
    }
}

impl Search {
    fn is_over(&self) -> bool {
        self.bad <= u32::from(self.good) + GRANULARITY
    }

    /// Counts the remaining candidates as lost, if the control probe was acknowledged.
    fn end_round(&mut self, answered: f64) {
        if !self.control_back {
            return;
        }
        let back = f64::from(self.controls_back + 1) / f64::from(self.controls + 2);
        let chance = 1.0 - back.min(answered.clamp(0.05, 1.0));
        for candidate in &mut self.candidates {
            candidate.lost += 1;
            if candidate.lost >= 3 && chance.powi(candidate.lost as i32) < MAX_CHANCE {
                self.bad = self.bad.min(u32::from(candidate.size));
            }
        }
    }
}

/// The candidates between two sizes: common MTUs, or evenly spaced sizes if there are none.
fn between(good: u16, bad: u32) -> Vec<Candidate> {
    let inside = |size: &u16| (u32::from(good) + 1..bad).contains(&u32::from(*size));
    let mut sizes: Vec<u16> = COMMON.into_iter().filter(inside).collect();
    if sizes.is_empty() {
        let gap = bad.saturating_sub(u32::from(good));
        sizes = (1..SPLIT).map(|part| good + (gap * part / SPLIT) as u16).filter(inside).collect();
        sizes.dedup();
    }
    sizes.into_iter().map(|size| Candidate { size, lost: 0 }).collect()
}

#[cfg(test)]
#[path = "mtu_tests.rs"]
mod tests;
