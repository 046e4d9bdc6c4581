//! Which members reach each other directly, as they say themselves (link state), and the paths that follow from it.
//!
//! Each host publishes in its table which live hosts it does not reach directly. That is seldom any, so all other links count as
//! there. Every host computes the paths from the same statements, so each next hop is closer to the destination.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use ovl_proto::id::NodeId;

/// The number of members that a path goes through, at most: one less than the hosts that a relayed datagram passes.
const MOST_RELAYS: usize = ovl_relay::frame::HOP_LIMIT as usize - 1;

/// The links between members.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Links {
    /// All members, each with whether it relays.
    members: BTreeMap<NodeId, bool>,
    /// Pairs of which one says that it does not reach the other. The smaller id is first.
    cut: BTreeSet<(NodeId, NodeId)>,
}

impl Links {
    /// The links between members, each with whether it relays. `unreached` has pairs of which the first one says that it does not
    /// reach the second one.
    pub(crate) fn new(
        members: impl IntoIterator<Item = (NodeId, bool)>,
        unreached: impl IntoIterator<Item = (NodeId, NodeId)>,
    ) -> Self {
        let members: BTreeMap<NodeId, bool> = members.into_iter().collect();
        // A member can say so of any id.
        let is_known =
            |(one, other): &(NodeId, NodeId)| members.contains_key(one) && members.contains_key(other);
        let cut = unreached.into_iter().filter(is_known).map(|(one, other)| pair(one, other)).collect();
        Self { members, cut }
    }

    /// Whether two members reach each other directly.
    pub(crate) fn has(&self, one: NodeId, other: NodeId) -> bool {
        self.members.contains_key(&one)
            && self.members.contains_key(&other)
            && !self.cut.contains(&pair(one, other))
    }

    /// The members through which a host reaches each member that it does not reach directly, in order, and as few as possible.
    /// `cost` says which members the host prefers as the first one, in any unit. Members to which there is no path are left out.
    pub(crate) fn paths<C: Ord>(
        &self,
        from: NodeId,
        cost: impl Fn(NodeId) -> C,
    ) -> BTreeMap<NodeId, Vec<NodeId>> {
        if self.cut.is_empty() {
            return BTreeMap::new();
        }
        // Breadth first (Moore, 1959).
        let mut paths: BTreeMap<NodeId, Vec<NodeId>> = BTreeMap::from([(from, Vec::new())]);
        let mut first: Vec<NodeId> = self.members.keys().copied().filter(|id| self.has(from, *id)).collect();
        first.retain(|id| *id != from);
        first.sort_by_cached_key(|id| (cost(*id), *id));
        paths.extend(first.iter().map(|id| (*id, Vec::new())));
        let mut queue = VecDeque::from(first);
        while let Some(at) = queue.pop_front() {
            let Some(before) = paths.get(&at) else { continue };
            if before.len() >= MOST_RELAYS || self.members.get(&at) != Some(&true) {
                continue;
            }
            let path: Vec<NodeId> = before.iter().copied().chain([at]).collect();
            for next in self.members.keys().filter(|next| self.has(at, **next)) {
                if let std::collections::btree_map::Entry::Vacant(place) = paths.entry(*next) {
                    place.insert(path.clone());
                    queue.push_back(*next);
                }
            }
        }
        paths.retain(|_, path| !path.is_empty());
        paths
    }
}

fn pair(one: NodeId, other: NodeId) -> (NodeId, NodeId) {
    (one.min(other), one.max(other))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(number: u16) -> NodeId {
        let mut id = [0; 10];
        id[..2].copy_from_slice(&number.to_be_bytes());
        NodeId(id)
    }

    /// Links of `count` members of which exactly these pairs reach each other.
    fn only(count: u16, links: &[(u16, u16)]) -> Links {
        let pairs = (0..count).flat_map(|one| (one + 1..count).map(move |other| (one, other)));
        let cut = pairs.filter(|(one, other)| !links.contains(&(*one, *other)));
        Links::new((0..count).map(|number| (id(number), true)), cut.map(|(one, other)| (id(one), id(other))))
    }

    #[test]
    fn chain_is_walked_as_far_as_relayed_datagrams_go() {
        let chain = only(6, &[(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]);
        let paths = chain.paths(id(0), |_| 0);
        assert_eq!(paths.keys().copied().collect::<Vec<_>>(), [2, 3, 4].map(id), "the sixth is too far");
        assert_eq!(paths[&id(4)], [1, 2, 3].map(id));
        assert_eq!(chain.paths(id(2), |_| 0)[&id(0)], [id(1)]);
    }

    #[test]
    fn nearest_relay_is_preferred_and_a_host_that_does_not_relay_is_no_way() {
        let mut square = only(4, &[(0, 1), (0, 2), (1, 3), (2, 3)]);
        assert_eq!(square.paths(id(0), |relay| relay != id(2))[&id(3)], [id(2)]);
        square.members.insert(id(1), false);
        assert_eq!(square.paths(id(0), |relay| relay != id(1))[&id(3)], [id(2)]);
        square.members.insert(id(2), false);
        assert!(square.paths(id(0), |_| 0).is_empty());
    }

    /// Follows the next hops that each host computes for itself. `None` if they do not lead to `to`.
    fn walk(links: &Links, from: NodeId, to: NodeId, costs: &[u8]) -> Option<usize> {
        let mut at = from;
        for hops in 0..=usize::from(ovl_relay::frame::HOP_LIMIT) {
            if at == to {
                return Some(hops);
            }
            // Hosts have different opinions of what is near.
            let cost = |id: NodeId| {
                costs[usize::from(id.0[1]).wrapping_mul(31 + usize::from(at.0[1])) % costs.len()]
            };
            let next = links.paths(at, cost).get(&to).and_then(|path| path.first().copied());
            if next.is_none() && !links.has(at, to) {
                return None;
            }
            at = next.unwrap_or(to);
        }
        None
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// In any topology of up to two hundred hosts the next hops of all hosts lead to the destination without a circle, in as
        /// many hops as the first one computed.
        #[test]
        fn next_hops_lead_to_the_destination(
            count in 3_u16..200,
            seeds in prop::collection::vec((any::<u16>(), any::<u16>()), 0..600),
            silent in prop::collection::vec(any::<u16>(), 0..20),
            costs in prop::collection::vec(any::<u8>(), 1..50),
            sparse in any::<bool>(),
        ) {
            let some: Vec<(u16, u16)> = seeds.iter().map(|(a, b)| (a % count, b % count)).filter(|(a, b)| a != b).collect();
            let mut links = if sparse {
                let some: Vec<_> = some.iter().map(|(a, b)| (*a.min(b), *a.max(b))).collect();
                only(count, &some)
            } else {
                Links::new((0..count).map(|n| (id(n), true)), some.iter().map(|(a, b)| (id(*a), id(*b))))
            };
            for number in silent {
                links.members.insert(id(number % count), false);
            }
            for from in [0, count / 2] {
                let paths = links.paths(id(from), |_| 0);
                for to in (0..count).step_by(7).filter(|to| *to != from) {
                    match paths.get(&id(to)) {
                        Some(path) => {
                            prop_assert!(path.len() <= MOST_RELAYS && !path.contains(&id(to)) && !path.contains(&id(from)));
                            prop_assert!(path.iter().all(|relay| links.members[relay]));
                            prop_assert_eq!(walk(&links, id(from), id(to), &costs), Some(path.len() + 1));
                        }
                        None => {
                            let reaches = links.has(id(from), id(to));
                            prop_assert_eq!(walk(&links, id(from), id(to), &costs), reaches.then_some(1));
                        }
                    }
                }
            }
        }
    }
}
