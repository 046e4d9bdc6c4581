//! `ovlctl verify`: what differs between peers, the desired data plane and the kernel, apart from work in flight.

use std::collections::BTreeMap;
use std::time::Duration;

use ovl_control::{PeerState, Verify};
use tokio::time::Instant;

use super::peers::millis;
use super::{Failed, Node};

/// A difference of the kernel, or of addresses, that lasts for this time is no work in flight.
const LASTING: Duration = Duration::from_millis(500);
/// The same for what a peer announces, which it repeats every 0.6 to 1.5 s.
const ANNOUNCED_LASTING: Duration = Duration::from_secs(3);
/// Maximum time of a comparison. Many endpoints that come and go at once are work for seconds.
const SETTLE_WITHIN: Duration = Duration::from_secs(5);
/// Interval between two looks.
const SETTLE_STEP: Duration = Duration::from_millis(50);

/// A difference.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Difference {
    /// The sentence for the user.
    text: String,
    /// For how long work in flight may look like this.
    lasting: Duration,
}

impl Difference {
    fn new(text: String) -> Self {
        Self { text, lasting: LASTING }
    }

    /// One from what a peer announces.
    fn announced(text: String) -> Self {
        Self { text, lasting: ANNOUNCED_LASTING }
    }
}

/// The differences of one look after the other. Work in flight differs from look to look, and drift stays.
#[derive(Default)]
struct Looks {
    /// When each difference of the last look was first seen, counted from the first look.
    since: BTreeMap<Difference, Duration>,
}

impl Looks {
    /// Records a look. Returns whether the comparison is over: nothing differs, or something has differed for long, or
    /// there was time enough.
    fn record(&mut self, now: Duration, differences: &[Difference]) -> bool {
        let seen = |found: &Difference| (found.clone(), self.since.get(found).copied().unwrap_or(now));
        self.since = differences.iter().map(seen).collect();
        let lasts = self.since.iter().any(|(found, since)| now.saturating_sub(*since) >= found.lasting);
        differences.is_empty() || lasts || now >= SETTLE_WITHIN
    }
}

impl Node {
    /// Compares what peers announce, the desired data plane and the kernel. Work in flight gets time to settle.
    pub(super) async fn verify(&self) -> Result<Verify, Failed> {
        let begun = Instant::now();
        let mut looks = Looks::default();
        loop {
            let differences = self.differences().await?;
            if looks.record(begun.elapsed(), &differences) {
                let clean = differences.is_empty();
                let differences = differences.into_iter().map(|found| found.text).collect();
                return Ok(Verify { clean, settled_ms: clean.then(|| millis(begun.elapsed())), differences });
            }
            tokio::time::sleep(SETTLE_STEP).await;
        }
    }

    async fn differences(&self) -> Result<Vec<Difference>, Failed> {
        let (ops, lost) = self.compare().await?;
        let needs = ops.iter().map(|op| format!("kernel: needs `{op}`"));
        let gone = lost.iter().map(|device| format!("kernel: endpoint device {device} is gone"));
        let mut differences: Vec<Difference> = needs.chain(gone).map(Difference::new).collect();
        let state = self.state.borrow();
        for (id, peer) in state.peers.iter() {
            let hints = peer.hints();
            let Some(node) = state.view.nodes.get(&id).filter(|node| node.state == PeerState::Alive) else {
                continue;
            };
            let name = &node.record.name;
            if node.table.revision() < hints.table {
                differences.push(Difference::announced(format!(
                    "gossip: the table of {name} is at {} and {} is announced",
                    node.table.revision(),
                    hints.table
                )));
            }
            if hints.objects != state.objects.digest() {
                differences.push(Difference::announced(format!(
                    "gossip: {name} has other cluster objects than this host, or other states of them"
                )));
            }
            if hints.alloc > state.view.alloc.version {
                differences.push(Difference::announced(format!(
                    "gossip: {name} has version {} of the allocation map and this host {}",
                    hints.alloc, state.view.alloc.version
                )));
            }
        }
        for placed in state.view.all_endpoints().filter(|placed| state.view.counts(placed.node)) {
            if let Some(address) = state.view.address_conflict(placed.node.record.id, placed.endpoint) {
                differences.push(Difference::new(format!(
                    "addresses: endpoint {} on {} uses {address}, which is in no block of that host",
                    placed.endpoint.name, placed.node.record.name
                )));
            }
        }
        Ok(differences)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns after how many looks the comparison is over, and what the last one saw. One look takes 100 ms.
    fn compare(look: impl Fn(u32) -> Vec<String>) -> (u32, Vec<String>) {
        compare_all(|at| look(at).into_iter().map(Difference::new).collect())
    }

    fn compare_all(look: impl Fn(u32) -> Vec<Difference>) -> (u32, Vec<String>) {
        let mut looks = Looks::default();
        for at in 0..1_000 {
            let differences = look(at);
            if looks.record(Duration::from_millis(100) * at, &differences) {
                return (at, differences.into_iter().map(|found| found.text).collect());
            }
        }
        panic!("the comparison does not end");
    }

    #[test]
    fn drift_is_reported_after_half_a_second() {
        assert_eq!(compare(|_| vec!["a".into()]), (5, vec!["a".to_owned()]));
        // Among work in flight too.
        assert_eq!(compare(|at| vec![at.to_string(), "a".into()]).0, 5);
    }

    #[test]
    fn peer_has_time_to_repeat_what_it_announces() {
        let until = |end: u32| {
            compare_all(|at| if at < end { vec![Difference::announced("a".into())] } else { Vec::new() })
        };
        assert_eq!(until(20), (20, Vec::new()));
        assert_eq!(until(100), (30, vec!["a".to_owned()]));
    }

    #[test]
    fn work_in_flight_is_waited_for_as_long_as_it_goes_on() {
        assert_eq!(compare(|_| Vec::new()), (0, Vec::new()));
        // Each of many deletions takes 300 ms, two seconds in all.
        let deletions = |at: u32| if at < 20 { vec![format!("endpoint {}", at / 3)] } else { Vec::new() };
        assert_eq!(compare(deletions), (20, Vec::new()));
        // A difference that comes again is a new one.
        let again = |at: u32| match at {
            20.. => Vec::new(),
            _ if at.is_multiple_of(4) => vec!["a".to_owned()],
            _ => vec!["b".to_owned()],
        };
        assert_eq!(compare(again), (20, Vec::new()));
    }

    #[test]
    fn endless_work_is_reported_at_last() {
        let (at, differences) = compare(|at| vec![at.to_string()]);
        assert_eq!((at, differences), (50, vec!["50".to_owned()]));
    }
}
