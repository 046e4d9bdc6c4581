//! `ovlctl verify`: what differs between peers, the desired data plane and the kernel, apart from work in flight.

use std::collections::BTreeMap;
use std::time::Duration;

use ovl_control::{PeerState, Verify};
use tokio::time::Instant;

use super::peers::millis;
use super::{Failed, Node};

/// A difference of this age is no work in flight.
const LASTING: Duration = Duration::from_millis(500);
/// Maximum time of a comparison. Many endpoints that come and go at once are work for seconds.
const SETTLE_WITHIN: Duration = Duration::from_secs(5);
/// Interval between two looks.
const SETTLE_STEP: Duration = Duration::from_millis(50);

/// The differences of one look after the other. Work in flight differs from look to look, and drift stays.
#[derive(Default)]
struct Looks {
    /// When each difference of the last look was first seen, counted from the first look.
    since: BTreeMap<String, Duration>,
}

impl Looks {
    /// Records a look. Returns whether the comparison is over: nothing differs, or something has differed for long, or
    /// there was time enough.
    fn record(&mut self, now: Duration, differences: &[String]) -> bool {
        let seen = |text: &String| (text.clone(), self.since.get(text).copied().unwrap_or(now));
        self.since = differences.iter().map(seen).collect();
        let lasting = self.since.values().any(|since| now.saturating_sub(*since) >= LASTING);
        differences.is_empty() || lasting || now >= SETTLE_WITHIN
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
                return Ok(Verify { clean, settled_ms: clean.then(|| millis(begun.elapsed())), differences });
            }
            tokio::time::sleep(SETTLE_STEP).await;
        }
    }

    async fn differences(&self) -> Result<Vec<String>, Failed> {
        let (ops, lost) = self.compare().await?;
        let mut differences: Vec<String> = ops.iter().map(|op| format!("kernel: needs `{op}`")).collect();
        differences.extend(lost.iter().map(|device| format!("kernel: endpoint device {device} is gone")));
        let state = self.state.borrow();
        for (id, peer) in &state.peers {
            let Some(node) = state.view.nodes.get(id).filter(|node| node.state == PeerState::Alive) else {
                continue;
            };
            let name = &node.record.name;
            if node.table.revision() < peer.hints.table {
                differences.push(format!(
                    "gossip: the table of {name} is at {} and {} is announced",
                    node.table.revision(),
                    peer.hints.table
                ));
            }
            if peer.hints.objects != state.objects.digest() {
                differences.push(format!(
                    "gossip: {name} has other cluster objects than this host, or other states of them"
                ));
            }
            if peer.hints.alloc > state.view.alloc.version {
                differences.push(format!(
                    "gossip: {name} has version {} of the allocation map and this host {}",
                    peer.hints.alloc, state.view.alloc.version
                ));
            }
        }
        for placed in state.view.all_endpoints().filter(|placed| state.view.counts(placed.node)) {
            if let Some(address) = state.view.address_conflict(placed.node.record.id, placed.endpoint) {
                differences.push(format!(
                    "addresses: endpoint {} on {} uses {address}, which is in no block of that host",
                    placed.endpoint.name, placed.node.record.name
                ));
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
        let mut looks = Looks::default();
        for at in 0..1_000 {
            let differences = look(at);
            if looks.record(Duration::from_millis(100) * at, &differences) {
                return (at, differences);
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
