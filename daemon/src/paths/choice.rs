//! The choice of the hosts whose paths are watched: all of a small cluster, a sample of a large one.
//!
//! The module owns no state. Begin to read at [`choose`].

use std::collections::BTreeSet;
use std::time::Duration;

use ovl_proto::id::NodeId;

/// The number of hosts up to which all are watched.
const ALL: usize = 32;
/// In a larger cluster, the number of hosts before and after this one, in the order of the ids, that are always watched.
const NEAR: usize = 10;
/// The number of other hosts that are watched at a time, in turn.
const IN_TURN: usize = 8;
/// The time of a turn. It is long enough to find that a path is broken.
const TURN: Duration = Duration::from_secs(12);
/// The maximum number of hosts that are watched on because their paths are broken.
const MAX_BROKEN: usize = 16;

/// The hosts that are watched.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Watched {
    mutual: BTreeSet<NodeId>,
    others: BTreeSet<NodeId>,
}

impl Watched {
    /// Whether a host is watched.
    pub(super) fn contains(&self, id: NodeId) -> bool {
        self.mutual.contains(&id) || self.others.contains(&id)
    }

    /// Whether the host watches this one as well, as far as both know the same hosts.
    pub(super) fn is_mutual(&self, id: NodeId) -> bool {
        self.mutual.contains(&id)
    }

    /// Returns all watched hosts.
    pub(super) fn all(&self) -> impl Iterator<Item = NodeId> {
        self.mutual.union(&self.others).copied()
    }
}

/// Chooses the hosts to watch among those that can be. `broken` are those whose paths are broken; `now` decides whose
/// turn it is.
pub(super) fn choose(
    me: NodeId,
    candidates: &BTreeSet<NodeId>,
    broken: BTreeSet<NodeId>,
    now: Duration,
) -> Watched {
    if candidates.len() <= ALL {
        return Watched { mutual: candidates.clone(), others: BTreeSet::new() };
    }
    let after = || candidates.range(me..).chain(candidates.range(..me)).copied();
    let before = || candidates.range(..me).rev().chain(candidates.range(me..).rev()).copied();
    let mutual: BTreeSet<NodeId> = after().take(NEAR).chain(before().take(NEAR)).collect();
    let rest: Vec<NodeId> = candidates.difference(&mutual).copied().collect();
    let turn = usize::try_from(now.as_secs() / TURN.as_secs()).unwrap_or_default();
    let first = turn.wrapping_mul(IN_TURN).checked_rem(rest.len()).unwrap_or_default();
    let in_turn = rest.iter().cycle().skip(first).take(IN_TURN.min(rest.len())).copied();
    let kept = broken.into_iter().filter(|id| candidates.contains(id)).take(MAX_BROKEN);
    let others = in_turn.chain(kept).filter(|id| !mutual.contains(id)).collect();
    Watched { mutual, others }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u16) -> NodeId {
        let [a, b] = n.to_be_bytes();
        NodeId([a, b, 0, 0, 0, 0, 0, 0, 0, 0])
    }

    fn others(n: u16, me: u16) -> BTreeSet<NodeId> {
        (0..n).filter(|n| *n != me).map(id).collect()
    }

    fn chosen(n: u16, me: u16, now: u64) -> Watched {
        choose(id(me), &others(n, me), BTreeSet::new(), Duration::from_secs(now))
    }

    #[test]
    fn all_hosts_of_a_small_cluster_are_watched() {
        assert_eq!(chosen(33, 7, 0), Watched { mutual: others(33, 7), others: BTreeSet::new() });
    }

    #[test]
    fn hosts_of_a_large_cluster_watch_a_few_and_each_other() {
        let n = 1000;
        let all: Vec<Watched> = (0..n).map(|me| chosen(n, me, 5)).collect();
        for me in 0..n {
            let watched = &all[usize::from(me)];
            assert_eq!(watched.all().count(), 2 * NEAR + IN_TURN);
            assert!(!watched.contains(id(me)));
            for other in 0..n {
                assert_eq!(watched.is_mutual(id(other)), all[usize::from(other)].is_mutual(id(me)));
            }
        }
    }

    #[test]
    fn every_path_of_a_large_cluster_has_its_turn() {
        let (n, mut seen) = (100, BTreeSet::new());
        for turn in 0..10 {
            seen.extend(chosen(n, 3, turn * 12).all());
        }
        assert_eq!(seen, others(n, 3));
    }

    #[test]
    fn broken_paths_are_watched_on() {
        let candidates = others(100, 3);
        let watched = choose(id(3), &candidates, [id(60), id(200)].into(), Duration::ZERO);
        assert!(watched.contains(id(60)) && !watched.is_mutual(id(60)) && !watched.contains(id(200)));
    }
}
