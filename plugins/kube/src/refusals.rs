//! Which Events tell that objects are not in force as the API server has them: each reason once, and again only while it lasts
//! and after a long time. Pure: no clock, no I/O.

use std::collections::BTreeMap;
use std::time::Duration;

use ovl_proto::resource::ResourceKey;

/// After this time a reason that lasts is told again: API servers delete Events after an hour.
const AGAIN: Duration = Duration::from_secs(30 * 60);
/// How many reasons are remembered at most.
const MOST: usize = 1000;
/// How many Events may be sent at once.
const BURST: f64 = 25.0;
/// How many Events a second may be sent in the long run.
const RATE: f64 = 0.2;

/// An object that is not in force as the API server has it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Refusal {
    /// The object.
    pub key: ResourceKey,
    /// Its unique id; may be empty.
    pub uid: String,
    /// Why, and what to do.
    pub reason: String,
}

/// What is known of a refusal.
#[derive(Debug, Clone, Copy)]
struct Known {
    /// How often it was told.
    count: u32,
    at: Duration,
}

/// The refusals that were told.
#[derive(Debug)]
pub(crate) struct Refusals {
    told: BTreeMap<Refusal, Known>,
    /// How many Events may be sent now.
    tokens: f64,
    at: Duration,
}

impl Default for Refusals {
    fn default() -> Self {
        Self { told: BTreeMap::new(), tokens: BURST, at: Duration::ZERO }
    }
}

impl Refusals {
    /// Records a refusal at this time since the start. Returns how often it was told before, if an Event is to tell it now.
    /// Otherwise it was told lately, or too much was; it is recorded again for as long as it lasts.
    pub(crate) fn note(&mut self, refusal: &Refusal, now: Duration) -> Option<u32> {
        let elapsed = now.saturating_sub(self.at).as_secs_f64();
        (self.tokens, self.at) = ((self.tokens + elapsed * RATE).min(BURST), now);
        let known = self.told.get(refusal).copied();
        let is_due = known.is_none_or(|known| now.saturating_sub(known.at) >= AGAIN);
        if !is_due || self.tokens < 1.0 {
            return None;
        }
        if known.is_none() && self.told.len() >= MOST {
            self.told.retain(|_, known| now.saturating_sub(known.at) < AGAIN);
            if self.told.len() >= MOST {
                return None;
            }
        }
        self.tokens -= 1.0;
        let count = known.map_or(0, |known| known.count);
        self.told.insert(refusal.clone(), Known { count: count.saturating_add(1), at: now });
        Some(count)
    }

    /// Records that the Event was not sent.
    pub(crate) fn not_told(&mut self, refusal: &Refusal) {
        self.told.remove(refusal);
    }
}

#[cfg(test)]
mod tests {
    use ovl_proto::resource::{Kind, Name};

    use super::*;

    fn refusal(name: &str, reason: &str) -> Refusal {
        let key = ResourceKey { kind: Kind::Service, name: Name::new("shop", name) };
        Refusal { key, uid: "u".to_owned(), reason: reason.to_owned() }
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_reason_is_told_once_and_again_after_a_long_time() {
        let mut refusals = Refusals::default();
        let web = refusal("web", "x");
        assert_eq!(refusals.note(&web, at(0)), Some(0));
        for seconds in (10..1800).step_by(10) {
            assert_eq!(refusals.note(&web, at(seconds)), None);
        }
        assert_eq!(refusals.note(&web, at(1800)), Some(1));
        assert_eq!(refusals.note(&web, at(1810)), None);
        assert_eq!(refusals.note(&refusal("web", "y"), at(1810)), Some(0));
        // The server was away.
        refusals.not_told(&web);
        assert_eq!(refusals.note(&web, at(1820)), Some(0));
    }

    #[test]
    fn many_refusals_are_told_slowly_and_all_of_them_in_the_end() {
        let mut refusals = Refusals::default();
        let told = |refusals: &mut Refusals, now| {
            (0..100).filter(|n| refusals.note(&refusal(&format!("s{n}"), "x"), at(now)).is_some()).count()
        };
        assert_eq!(told(&mut refusals, 0), 25);
        assert_eq!(told(&mut refusals, 10), 2);
        let rest: usize = (2..40).map(|n| told(&mut refusals, n * 10)).sum();
        assert_eq!(rest, 73);
    }

    #[test]
    fn memory_is_bounded() {
        let mut refusals = Refusals::default();
        for n in 0..3000u64 {
            refusals.note(&refusal(&format!("s{n}"), "x"), at(n * 10));
            assert!(refusals.told.len() <= MOST);
        }
    }
}
