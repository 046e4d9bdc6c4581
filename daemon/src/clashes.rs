//! Identities that two daemons use, because a state directory was copied.

use std::collections::BTreeMap;

use ovl_proto::id::NodeId;

/// Time without a report after which a clash is over, in milliseconds.
const OVER_MS: u64 = 15_000;

#[derive(Debug, Clone, Copy)]
struct Clash {
    /// Time of the last report, in milliseconds of this run.
    seen: u64,
    later: u64,
}

/// The clashes that last.
#[derive(Debug, Default)]
pub(crate) struct Clashes(BTreeMap<NodeId, Clash>);

impl Clashes {
    /// Notes a report: `later` is the generation of the daemon that was started later. `now` is in milliseconds of this run.
    pub(crate) fn note(&mut self, node: NodeId, later: u64, now: u64) {
        self.0.insert(node, Clash { seen: now, later });
    }

    /// Ends the clashes that are over, and returns each with the generation of the daemon that was started later.
    pub(crate) fn end(&mut self, now: u64) -> Vec<(NodeId, u64)> {
        let over = self.0.extract_if(.., |_, clash| now.saturating_sub(clash.seen) > OVER_MS);
        over.map(|(node, clash)| (node, clash.later)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clash_lasts_for_as_long_as_it_is_reported() {
        let (one, other) = (NodeId([1; 10]), NodeId([2; 10]));
        let mut clashes = Clashes::default();
        clashes.note(one, 7, 0);
        clashes.note(other, 3, 0);
        clashes.note(one, 8, 10);
        assert_eq!(clashes.end(OVER_MS), []);
        assert_eq!(clashes.end(OVER_MS + 1), [(other, 3)]);
        assert_eq!(clashes.end(OVER_MS + 11), [(one, 8)]);
        assert_eq!(clashes.end(u64::MAX), []);
    }
}
