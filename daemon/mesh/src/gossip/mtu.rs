//! What the path to one peer carries: a state machine without clock or socket.
//!
//! In each round every size in question is sent once, beside a small control. A size counts as lost
//! only in rounds whose control came through, and it is given up only when so many losses in a row
//! are not to be explained by the loss that small packets suffer as well. So a lossy path makes
//! the search slower, and not the MTU smaller.

use std::time::Duration;
use tokio::time::Instant;

/// Every IPv6 link carries this much; less is not looked for.
const FLOOR: u16 = 1280;
/// Sizes that paths have for a reason: jumbo frames, Ethernet, PPPoE, tunnels of all kinds.
const COMMON: [u16; 15] =
    [9000, 8900, 1500, 1492, 1480, 1460, 1450, 1440, 1420, 1400, 1380, 1360, 1340, 1320, 1300];
/// A difference not worth more probes.
const GRANULARITY: u32 = 8;
/// How many sizes between two known ones are tried at a time.
const SPLIT: u32 = 8;
/// How unlikely losses in a row must be before they are taken for the size's fault.
const DOUBT: f64 = 1e-4;
/// The value in use is checked this often.
const CHECK_EVERY: Duration = Duration::from_secs(10);
/// A larger one is looked for this often, and sooner after a fall.
const SEARCH_EVERY: Duration = Duration::from_secs(300);
const SEARCH_AFTER_FALL: Duration = Duration::from_secs(30);

/// The size of a control.
pub(super) const CONTROL: u16 = 0;

/// A probe to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Probe {
    /// Of the whole IP packet, or [`CONTROL`].
    pub size: u16,
    pub round: u16,
}

/// The state for one peer.
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
    /// The largest size known to get through; the floor is taken for granted.
    good: u16,
    /// Whether `good` was seen to get through in this search.
    proven: bool,
    /// The smallest size known not to.
    bad: u32,
    /// Only the value in use is in question.
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
    /// Nothing is known yet. The links at both ends carry `limit`.
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

    /// The largest packet known to get through, once anything is known.
    pub(super) fn current(&self) -> Option<u16> {
        self.current
    }

    /// Whether it wants to be polled often.
    pub(super) fn is_searching(&self) -> bool {
        self.search.is_some()
    }

    /// The links at the ends have changed.
    pub(super) fn set_limit(&mut self, limit: u16, now: Instant) {
        if limit == self.limit {
            return;
        }
        self.limit = limit;
        self.current = self.current.map(|current| current.min(limit));
        self.search = None;
        self.next_search = now;
    }

    /// What to send now. `answered` is the share of pings that the peer answers.
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

    /// The peer has got a probe.
    pub(super) fn acked(&mut self, probe: Probe, now: Instant) {
        let Some(search) = &mut self.search else {
            // Late. A size that got through gets through.
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

    /// Our own kernel refuses the size.
    pub(super) fn too_big(&mut self, size: u16) {
        if let Some(search) = &mut self.search
            && size > search.good
        {
            search.bad = search.bad.min(u32::from(size));
        }
    }

    fn start(&mut self, now: Instant) {
        let floor = FLOOR.min(self.limit);
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
            // Mostly this is all there is to it.
            candidates: vec![Candidate { size: (bad - 1) as u16, lost: 0 }],
            round_ends: now,
            controls: 0,
            controls_back: 0,
            control_back: false,
        });
    }

    /// Goes on to other sizes where the present ones are settled.
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
            // The largest did not get through at once: see meanwhile what does.
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

    /// What did not come back in a round that was not lost altogether is lost.
    fn end_round(&mut self, answered: f64) {
        if !self.control_back {
            return;
        }
        let back = f64::from(self.controls_back + 1) / f64::from(self.controls + 2);
        let chance = 1.0 - back.min(answered.clamp(0.05, 1.0));
        for candidate in &mut self.candidates {
            candidate.lost += 1;
            if candidate.lost >= 3 && chance.powi(candidate.lost as i32) < DOUBT {
                self.bad = self.bad.min(u32::from(candidate.size));
            }
        }
    }
}

/// Sizes to try between two: the common ones, and where there are none, evenly spread ones.
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
