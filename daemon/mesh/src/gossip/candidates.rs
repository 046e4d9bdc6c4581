//! Which of its addresses a host is reached at that can be dialled at several: of both families, or behind a forwarded port.
//!
//! The main address is preferred, because only there packets need not be sealed. Another one is used while the main one does not
//! answer; all that this host can send to are tried then, and seldom otherwise.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::time::Instant;

/// How long a host has to answer at the address that is used first before another one is used.
const FIRST: Duration = Duration::from_millis(300);
/// By how much sooner others are tried than the used one counts as silent.
const SOONER: Duration = Duration::from_millis(150);
/// The interval of trials of the others while the used one is silent.
const AGAIN: Duration = Duration::from_millis(200);
/// The same after the host has been silent for [`LONG`], as a dead one is.
const SELDOM_AGAIN: Duration = Duration::from_secs(2);
const LONG: Duration = Duration::from_secs(10);
/// The interval of trials of the main address while another one is used.
const MAIN_EVERY: Duration = Duration::from_millis(600);
/// The interval of other trials, which measure round trips.
const SELDOM: Duration = Duration::from_secs(5);
/// The gap between two answers at the main address after which it does not count as answering all the time.
const GAP: Duration = Duration::from_millis(1500);
/// How long the main address answers before it is used again.
const STEADY: Duration = Duration::from_secs(3);
/// The maximum of that time: it doubles when the main address falls silent again within [`LATELY`].
const MAX_STEADY: Duration = Duration::from_secs(60);
const LATELY: Duration = Duration::from_secs(120);
/// By how much more than half of it the round trip must be shorter at another address to be clearly better.
const CLEARLY: Duration = Duration::from_millis(5);
/// How many trials in a row must find that.
const TIMES: u32 = 3;

/// The addresses of one host that this host can send to.
#[derive(Debug)]
pub(super) struct Candidates {
    /// The preferred one is first.
    all: Vec<Candidate>,
    /// Whether the first one is the main address of the host.
    has_main: bool,
    used: usize,
    since: Instant,
    /// How long the main address must answer before it is used again.
    steady: Duration,
    /// When the main address was last used again.
    returned: Option<Instant>,
}

#[derive(Debug)]
struct Candidate {
    at: SocketAddr,
    heard: Option<Instant>,
    /// Since when it has answered without a gap.
    steady_since: Option<Instant>,
    rtt: Option<Duration>,
    /// The last trial, and when it was sent.
    trial: Option<(u64, Instant)>,
    /// How often in a row it was clearly better than the used one.
    better: u32,
}

/// What an answer has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// Nothing.
    Stays,
    /// The used address was silent, so what was sent to it is lost. Another one is used now.
    Moved,
    /// A better address is used now. The one before still works.
    Better,
}

impl Candidate {
    fn new(at: SocketAddr) -> Self {
        Self { at, heard: None, steady_since: None, rtt: None, trial: None, better: 0 }
    }
}

impl Candidates {
    /// The candidates at these addresses, the preferred one first. `has_main` says whether that is the main one.
    pub(super) fn new(addresses: &[SocketAddr], has_main: bool, now: Instant) -> Self {
        let all = addresses.iter().copied().map(Candidate::new).collect();
        Self { all, has_main, used: 0, since: now, steady: STEADY, returned: None }
    }

    /// Whether these are the addresses.
    pub(super) fn are(&self, addresses: &[SocketAddr], has_main: bool) -> bool {
        self.has_main == has_main
            && self.all.iter().map(|candidate| candidate.at).eq(addresses.iter().copied())
    }

    /// Replaces the addresses. The used one stays in use if it is among them.
    pub(super) fn replace(&mut self, addresses: &[SocketAddr], has_main: bool, now: Instant) {
        let used = self.used();
        let mut old = std::mem::take(&mut self.all);
        let kept = |at: &SocketAddr| {
            let place = old.iter().position(|candidate| candidate.at == *at);
            place.map_or_else(|| Candidate::new(*at), |place| old.swap_remove(place))
        };
        self.all = addresses.iter().map(kept).collect();
        let place = self.all.iter().position(|candidate| Some(candidate.at) == used);
        if place.is_none() {
            self.since = now;
        }
        (self.used, self.has_main) = (place.unwrap_or_default(), has_main);
    }

    /// The address that is used. `None` if this host can send to none.
    pub(super) fn used(&self) -> Option<SocketAddr> {
        self.all.get(self.used).map(|candidate| candidate.at)
    }

    /// Whether the main address is used.
    pub(super) fn is_main(&self) -> bool {
        self.has_main && self.used == 0
    }

    /// Whether an address is one of them.
    pub(super) fn has(&self, at: SocketAddr) -> bool {
        self.all.iter().any(|candidate| candidate.at == at)
    }

    /// For how long the used address has not answered beyond what is usual; `silent_after` is the time after an answer in which the
    /// next one comes. `None` if it answers.
    fn silence(&self, silent_after: Duration, now: Instant) -> Option<Duration> {
        let heard = self.all.get(self.used)?.heard;
        let (from, patience) = heard.map_or((self.since, FIRST), |heard| (heard, silent_after));
        now.saturating_duration_since(from).checked_sub(patience).filter(|silence| !silence.is_zero())
    }

    /// The addresses to try now, each with the place to give to [`Self::sent`].
    pub(super) fn due(&self, silent_after: Duration, now: Instant) -> Vec<(usize, SocketAddr)> {
        let silence = self.silence(silent_after.saturating_sub(SOONER), now);
        let is_due = |(place, candidate): &(usize, &Candidate)| {
            let every = match silence {
                _ if *place == self.used => SELDOM,
                Some(silence) if silence < LONG => AGAIN,
                Some(_) => SELDOM_AGAIN,
                None if *place == 0 && self.has_main => MAIN_EVERY,
                None => SELDOM,
            };
            // A new host has time to answer at the address that is used.
            let has_time = silence.is_none() || *place == self.used;
            let first = has_time.then_some(self.since);
            let last = candidate.trial.map(|(_, sent)| sent).or(first);
            last.is_none_or(|last| now.saturating_duration_since(last) >= every)
        };
        let all = self.all.iter().enumerate().filter(is_due);
        all.map(|(place, candidate)| (place, candidate.at)).collect()
    }

    /// Takes that a trial is sent.
    pub(super) fn sent(&mut self, place: usize, nonce: u64, now: Instant) {
        if let Some(candidate) = self.all.get_mut(place) {
            candidate.trial = Some((nonce, now));
        }
    }

    /// Takes the answer to a trial. `None` if it answers none.
    pub(super) fn tried(&mut self, nonce: u64, silent_after: Duration, now: Instant) -> Option<Turn> {
        let is_answered = |candidate: &Candidate| candidate.trial.is_some_and(|(last, _)| last == nonce);
        let place = self.all.iter().position(is_answered)?;
        if let Some(candidate) = self.all.get_mut(place)
            && let Some((_, sent)) = candidate.trial
        {
            let sample = now.saturating_duration_since(sent);
            candidate.rtt = Some(candidate.rtt.map_or(sample, |rtt| (rtt * 7 + sample) / 8));
        }
        Some(self.hear(place, silent_after, now))
    }

    /// Takes that the host has answered a ping from an address. If that is none of its own, it answered at the used one.
    pub(super) fn answered(&mut self, at: SocketAddr, silent_after: Duration, now: Instant) -> Turn {
        let place = self.all.iter().position(|candidate| candidate.at == at).unwrap_or(self.used);
        self.hear(place, silent_after, now)
    }

    fn hear(&mut self, place: usize, silent_after: Duration, now: Instant) -> Turn {
        let is_silent = self.silence(silent_after, now).is_some();
        let used_rtt = self.all.get(self.used).and_then(|used| used.rtt);
        let Some(candidate) = self.all.get_mut(place) else { return Turn::Stays };
        let is_steady = candidate.heard.is_some_and(|last| now.saturating_duration_since(last) < GAP);
        candidate.heard = Some(now);
        let since = *candidate.steady_since.get_or_insert(now);
        let since = if is_steady { since } else { now };
        candidate.steady_since = Some(since);
        if place == self.used {
            return Turn::Stays;
        }
        let is_better = candidate.rtt.zip(used_rtt).is_some_and(|(rtt, used)| rtt * 2 + CLEARLY < used);
        candidate.better = if is_better { candidate.better + 1 } else { 0 };
        let is_better = candidate.better >= TIMES;
        let is_main = place == 0 && self.has_main;
        if is_silent {
            if self.is_main() {
                let is_again = self.returned.is_some_and(|at| now.saturating_duration_since(at) < LATELY);
                self.steady = if is_again { (self.steady * 2).min(MAX_STEADY) } else { STEADY };
            }
            self.turn_to(place, now);
            return Turn::Moved;
        }
        let returns = is_main && now.saturating_duration_since(since) >= self.steady;
        if returns || (is_better && !is_main && !self.is_main()) {
            self.turn_to(place, now);
            return Turn::Better;
        }
        Turn::Stays
    }

    fn turn_to(&mut self, place: usize, now: Instant) {
        self.used = place;
        if self.is_main() {
            self.returned = Some(now);
        }
        self.all.iter_mut().for_each(|candidate| candidate.better = 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SILENT: Duration = Duration::from_millis(800);

    fn at(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A host with two addresses, and what is sent to it. Each address answers after its round trip, or not at all.
    struct World {
        candidates: Candidates,
        now: Instant,
        next: u64,
        turns: Vec<Turn>,
        trials: usize,
    }

    impl World {
        fn new(addresses: &[&str]) -> Self {
            let (now, addresses) =
                (Instant::now(), addresses.iter().map(|text| at(text)).collect::<Vec<_>>());
            let candidates = Candidates::new(&addresses, true, now);
            Self { candidates, now, next: 0, turns: Vec::new(), trials: 0 }
        }

        /// Lets time pass. `rtts` are the round trips at the addresses.
        fn run(&mut self, time: Duration, rtts: &[Option<u64>]) {
            let end = self.now + time;
            while self.now < end {
                self.now += ms(100);
                for (place, _) in self.candidates.due(SILENT, self.now) {
                    self.next += 1;
                    self.trials += 1;
                    self.candidates.sent(place, self.next, self.now);
                    if let Some(rtt) = rtts[place] {
                        let turn = self.candidates.tried(self.next, SILENT, self.now + ms(rtt));
                        self.turns.extend(turn.filter(|turn| *turn != Turn::Stays));
                    }
                }
                // The pings.
                if let Some(rtt) = rtts[self.candidates.used] {
                    let used = self.candidates.used().unwrap();
                    assert_eq!(self.candidates.answered(used, SILENT, self.now + ms(rtt)), Turn::Stays);
                }
            }
        }

        fn turns(&mut self) -> Vec<Turn> {
            std::mem::take(&mut self.turns)
        }
    }

    #[test]
    fn main_address_is_used_while_it_answers_and_others_are_tried_seldom() {
        let mut world = World::new(&["192.0.2.1:7940", "[2001:db8::1]:7940"]);
        world.run(Duration::from_secs(60), &[Some(20), Some(1)]);
        assert!(world.candidates.is_main() && world.turns().is_empty());
        assert!(world.trials <= 24, "{}", world.trials);
    }

    #[test]
    fn other_address_is_used_while_the_main_one_is_silent() {
        let mut world = World::new(&["192.0.2.1:7940", "[2001:db8::1]:7940"]);
        world.run(Duration::from_secs(2), &[Some(1), Some(1)]);
        world.run(ms(1200), &[None, Some(1)]);
        assert_eq!(world.turns(), [Turn::Moved]);
        assert_eq!(world.candidates.used(), Some(at("[2001:db8::1]:7940")));
        world.run(Duration::from_secs(20), &[None, Some(1)]);
        assert!(world.turns().is_empty());
        world.run(ms(2900), &[Some(1), Some(1)]);
        assert!(world.turns().is_empty(), "not steady yet");
        world.run(ms(1000), &[Some(1), Some(1)]);
        assert_eq!(world.turns(), [Turn::Better]);
        assert!(world.candidates.is_main());
        // The second time it must have answered for twice as long.
        world.run(ms(1200), &[None, Some(1)]);
        assert_eq!(world.turns(), [Turn::Moved]);
        world.run(ms(5900), &[Some(1), Some(1)]);
        assert!(world.turns().is_empty());
        world.run(ms(1000), &[Some(1), Some(1)]);
        assert_eq!(world.turns(), [Turn::Better]);
    }

    #[test]
    fn host_that_is_never_reached_at_its_main_address_is_reached_soon() {
        let mut world = World::new(&["192.0.2.1:7940", "203.0.113.1:7940"]);
        world.run(ms(500), &[None, Some(10)]);
        assert_eq!(world.turns(), [Turn::Moved]);
        assert!(!world.candidates.is_main() && world.candidates.has(at("203.0.113.1:7940")));
    }

    #[test]
    fn dead_host_is_tried_seldom() {
        let mut world = World::new(&["192.0.2.1:7940", "203.0.113.1:7940"]);
        world.run(Duration::from_secs(12), &[None, None]);
        let before = std::mem::take(&mut world.trials);
        world.run(Duration::from_secs(20), &[None, None]);
        assert!(before <= 65 && world.trials <= 16, "{before} {}", world.trials);
    }

    #[test]
    fn of_two_other_addresses_the_clearly_nearer_one_is_used_without_flapping() {
        let mut world = World::new(&["192.0.2.1:7940", "203.0.113.1:7940", "[2001:db8::1]:7940"]);
        world.run(Duration::from_secs(2), &[None, Some(50), None]);
        assert_eq!(world.turns(), [Turn::Moved]);
        world.run(Duration::from_secs(60), &[None, Some(50), Some(48)]);
        assert!(world.turns().is_empty(), "not clearly better");
        world.run(Duration::from_secs(60), &[None, Some(50), Some(2)]);
        assert_eq!(world.turns(), [Turn::Better]);
        assert_eq!(world.candidates.used(), Some(at("[2001:db8::1]:7940")));
    }

    #[test]
    fn used_address_stays_in_use_when_others_change() {
        let mut world = World::new(&["192.0.2.1:7940", "[2001:db8::1]:7940"]);
        world.run(Duration::from_secs(2), &[None, Some(1)]);
        let new = [at("192.0.2.9:7940"), at("203.0.113.1:7940"), at("[2001:db8::1]:7940")];
        assert!(!world.candidates.are(&new, true));
        world.candidates.replace(&new, true, world.now);
        assert!(world.candidates.are(&new, true));
        assert_eq!(world.candidates.used(), Some(new[2]));
        world.candidates.replace(&[], false, world.now);
        assert_eq!((world.candidates.used(), world.candidates.is_main()), (None, false));
    }
}
