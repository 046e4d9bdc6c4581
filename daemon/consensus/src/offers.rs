//! How a node without a map chooses the first one: it believes the majority of the peers that it asked.

use std::collections::BTreeMap;

use ovl_proto::alloc::Decision;
use ovl_proto::id::NodeId;

use super::proof::{Signatures, is_consistent};

/// How long a node waits for more answers after the first one, in milliseconds.
const COLLECT_MS: u64 = 100;
/// The maximum number of peers that are asked.
const MAX_ASKED: usize = 16;
/// The number of answers after which a node waits for no more, if they agree.
const ENOUGH: usize = 3;

/// The maps that peers offer to a node without a map.
#[derive(Debug, Default)]
pub(super) struct Offers {
    /// The peers that were asked, with their answers.
    asked: BTreeMap<NodeId, Option<Decision>>,
    /// The time after which it chooses.
    until: Option<u64>,
}

impl Offers {
    /// Notes that a peer is asked. Returns false if too many others are.
    pub(super) fn note_asked(&mut self, peer: NodeId) -> bool {
        let may = self.asked.len() < MAX_ASKED || self.asked.contains_key(&peer);
        if may {
            self.asked.entry(peer).or_default();
        }
        may
    }

    /// Takes a peer's answer, if the peer was asked and the map is signed by the members that it names.
    pub(super) fn put(&mut self, now: u64, from: NodeId, decision: Decision, signatures: &dyn Signatures) {
        let Some(answer) = self.asked.get_mut(&from) else { return };
        let later = answer.as_ref().is_none_or(|known| known.map.version < decision.map.version);
        if later && is_consistent(signatures, &decision) {
            *answer = Some(decision);
            self.until.get_or_insert(now.saturating_add(COLLECT_MS));
        }
    }

    /// Returns the latest map of the cluster that most answers are about, once enough peers answered.
    pub(super) fn choose(&mut self, now: u64) -> Option<Decision> {
        let answers: Vec<&Decision> = self.asked.values().flatten().collect();
        let mut count: BTreeMap<u64, usize> = BTreeMap::new();
        for answer in &answers {
            *count.entry(answer.map.cluster).or_default() += 1;
        }
        let enough = count.len() == 1 && answers.len() >= ENOUGH;
        if !enough && self.until.is_none_or(|until| now < until) {
            return None;
        }
        let (most, _) = count.into_iter().max_by_key(|(_, count)| *count)?;
        let of_it = answers.into_iter().filter(|answer| answer.map.cluster == most);
        of_it.max_by_key(|answer| answer.map.version).cloned()
    }
}
