//! The judgement whether an offload damages packets: whether packets that the kernel or a network device divides or
//! completes arrive, while packets that were sent whole do.
//!
//! A [`Trial`] owns what was sent and answered for one path. It has no clock and no socket; times are since any moment that
//! stays the same. Begin to read at [`Trial::next`].

use std::time::Duration;

/// The interval of rounds while their packets are answered, or while an offload is known to damage them.
const CALM: Duration = Duration::from_secs(15);
/// The interval of rounds in doubt.
const HURRY: Duration = Duration::from_millis(250);
/// Time limit for the answers to a round.
const ANSWER: Duration = Duration::from_secs(2);
/// The answers that show that packets arrive.
const ENOUGH: u32 = 8;
/// Of this many rounds, at most one in [`FEW`] arrives where an offload damages most packets.
const MANY: u32 = 16;
/// See [`MANY`].
const FEW: u32 = 4;
/// The rounds after which a doubt ends without a judgement: the path loses packets of all kinds.
const MAX_ROUNDS: u32 = 64;
/// The same if no packet at all was answered.
const MAX_SILENT_ROUNDS: u32 = 12;
/// The interval until the next round after a doubt without any answer: the other host answers none, or nothing passes.
const SILENT: Duration = Duration::from_secs(120);

/// The judgement of an offload on a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Offload {
    /// It is too early to judge.
    #[default]
    Unknown,
    /// Packets arrive as they were sent.
    Works,
    /// Packets that pass through the offload do not arrive, and others do.
    Damages,
}

/// Packets to send now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// The number of the round, counted from 1.
    pub number: u32,
    /// Whether a packet that does not pass through the offload is to be sent after those that do.
    pub has_control: bool,
}

/// The trial of an offload on a path. In each round, `N` packets pass through the offload.
#[derive(Debug)]
pub struct Trial<const N: usize> {
    verdict: Offload,
    /// The number of the last round.
    number: u32,
    /// The time of the next round.
    next_at: Duration,
    phase: Phase<N>,
}

#[derive(Debug)]
enum Phase<const N: usize> {
    /// Waits for the next round, or for the answers of the last one.
    Calm { sent_at: Option<Duration>, answered: [bool; N] },
    /// Compares packets of both kinds. `first` is the number of the first round.
    Doubt { first: u32, answered: [u32; N], control: u32 },
}

impl<const N: usize> Trial<N> {
    const CALM: Phase<N> = Phase::Calm { sent_at: None, answered: [false; N] };

    /// Creates a trial whose first round is at `first_at`.
    pub fn new(first_at: Duration) -> Self {
        Self { verdict: Offload::Unknown, number: 0, next_at: first_at, phase: Self::CALM }
    }

    /// Returns the judgement.
    pub fn verdict(&self) -> Offload {
        self.verdict
    }

    /// Returns the round that is due now, which then counts as sent. `None` if none is.
    pub fn next(&mut self, now: Duration) -> Option<Round> {
        match &self.phase {
            Phase::Calm { sent_at: Some(at), answered } => {
                let is_answered = answered.iter().all(|answered| *answered);
                let is_late = now.saturating_sub(*at) >= ANSWER;
                match (self.verdict, is_answered) {
                    (Offload::Damages, true) => self.doubt(now),
                    (Offload::Damages, false) if is_late => self.phase = Self::CALM,
                    (Offload::Unknown | Offload::Works, true) => self.end(Offload::Works, now),
                    (Offload::Unknown | Offload::Works, false) if is_late => self.doubt(now),
                    _ => {}
                }
            }
            Phase::Calm { sent_at: None, .. } => {}
            Phase::Doubt { first, answered, control } => {
                let least = answered.iter().copied().min().unwrap_or_default();
                let rounds = self.number.saturating_sub(*first).saturating_add(1);
                if least >= ENOUGH {
                    self.end(Offload::Works, now);
                } else if (*control >= ENOUGH && least == 0) || (*control >= MANY && least <= *control / FEW)
                {
                    self.end(Offload::Damages, now);
                } else if rounds > MAX_SILENT_ROUNDS && *control == 0 && least == 0 {
                    self.end(self.verdict, now);
                    self.next_at = now.saturating_add(SILENT);
                } else if rounds > MAX_ROUNDS {
                    self.end(self.verdict, now);
                }
            }
        }
        if now < self.next_at {
            return None;
        }
        self.number = self.number.saturating_add(1);
        let has_control = matches!(self.phase, Phase::Doubt { .. });
        if !has_control {
            self.phase = Phase::Calm { sent_at: Some(now), answered: [false; N] };
        }
        self.next_at = now.saturating_add(if has_control { HURRY } else { CALM });
        Some(Round { number: self.number, has_control })
    }

    /// Returns the number of the last round; 0 before the first.
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Takes the answer to a packet of a round that passed through the offload. `place` is its place among the `N`.
    pub fn answered(&mut self, round: u32, place: usize) {
        match &mut self.phase {
            Phase::Calm { sent_at: Some(_), answered } if round == self.number => {
                if let Some(answered) = answered.get_mut(place) {
                    *answered = true;
                }
            }
            Phase::Doubt { first, answered, .. } if round >= *first => {
                if let Some(answered) = answered.get_mut(place) {
                    *answered = answered.saturating_add(1);
                }
            }
            _ => {}
        }
    }

    /// Takes the answer to a packet of a round that did not pass through the offload.
    pub fn control_answered(&mut self, round: u32) {
        if let Phase::Doubt { first, control, .. } = &mut self.phase
            && round >= *first
        {
            *control = control.saturating_add(1);
        }
    }

    fn doubt(&mut self, now: Duration) {
        self.phase = Phase::Doubt { first: self.number.saturating_add(1), answered: [0; N], control: 0 };
        self.next_at = now;
    }

    fn end(&mut self, verdict: Offload, now: Duration) {
        let was_doubt = matches!(self.phase, Phase::Doubt { .. });
        self.verdict = verdict;
        self.phase = Self::CALM;
        if was_doubt {
            self.next_at = now.saturating_add(CALM);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// A trial of pairs on a path with an immediate answer.
    struct World {
        trial: Trial<2>,
        now: Duration,
        sent: usize,
    }

    impl World {
        fn new() -> Self {
            Self { trial: Trial::new(SECOND), now: Duration::ZERO, sent: 0 }
        }

        /// Lets time pass. `passes` says whether a packet arrives, by its place; 2 is the control.
        fn run(&mut self, time: Duration, mut passes: impl FnMut(usize) -> bool) {
            let end = self.now + time;
            while self.now < end {
                self.now += HURRY;
                let Some(round) = self.trial.next(self.now) else { continue };
                for place in 0..2 {
                    self.sent += 1;
                    if passes(place) {
                        self.trial.answered(round.number, place);
                    }
                }
                if round.has_control {
                    self.sent += 1;
                    if passes(2) {
                        self.trial.control_answered(round.number);
                    }
                }
            }
        }
    }

    #[test]
    fn sound_offload_costs_a_pair_in_fifteen_seconds() {
        let mut world = World::new();
        world.run(SECOND * 150, |_| true);
        assert_eq!((world.trial.verdict(), world.sent), (Offload::Works, 20));
    }

    #[test]
    fn damage_is_found_within_seconds_and_its_end_as_well() {
        let mut world = World::new();
        world.run(SECOND * 7, |place| place == 2);
        assert_eq!(world.trial.verdict(), Offload::Damages, "from the start");
        world.run(SECOND * 19, |_| true);
        assert_eq!(world.trial.verdict(), Offload::Works, "repaired");
        world.run(SECOND * 22, |place| place != 1);
        assert_eq!(world.trial.verdict(), Offload::Damages, "one packet of each pair");
        let before = world.sent;
        world.run(SECOND * 150, |place| place != 1);
        assert!(world.sent - before <= 20, "the trial of a known fault is as rare");
    }

    #[test]
    fn path_that_loses_everything_or_a_third_is_no_damage() {
        let mut world = World::new();
        world.run(SECOND * 60, |_| false);
        assert_eq!(world.trial.verdict(), Offload::Unknown);
        assert!(world.sent < 50, "{} packets without an answer", world.sent);
        world.run(SECOND * 120, |_| true);
        let mut random = 1u32;
        for _ in 0..1000 {
            // Of the packets and of their answers, a third each.
            world.run(SECOND, |_| {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (random >> 16) % 9 < 4
            });
            assert_ne!(world.trial.verdict(), Offload::Damages, "{:?}", world.now);
        }
    }

    #[test]
    fn late_and_unknown_answers_are_ignored() {
        let mut trial = Trial::<2>::new(SECOND);
        trial.answered(1, 0);
        let round = trial.next(SECOND).unwrap();
        assert_eq!(round, Round { number: 1, has_control: false });
        for (number, place) in [(0, 0), (2, 1), (1, 0), (1, 7)] {
            trial.answered(number, place);
        }
        trial.control_answered(1);
        assert_eq!(trial.next(SECOND * 2), None);
        assert_eq!(trial.verdict(), Offload::Unknown);
        trial.answered(1, 1);
        assert_eq!(trial.next(SECOND * 2), None);
        assert_eq!(trial.verdict(), Offload::Works);
    }
}
