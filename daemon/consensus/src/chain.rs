//! Which decisions a host believes, by the chain of proofs from the map that it knows.

use ovl_proto::alloc::{Decision, Proof};

use super::acceptor::{Durable, MAX_HISTORY};
use super::proof::{Signatures, Signed, is_about_its_map, signed_by};

impl Durable {
    /// Returns the proofs of membership changes that lead from the known map to a later one; `None` if the later one
    /// is not proved.
    ///
    /// Each step is signed by a majority of the members that the step before it names. At most [`MAX_HISTORY`] steps
    /// are looked at, and the first invalid signature ends it.
    pub(super) fn proved_path(&self, signatures: &dyn Signatures, decision: &Decision) -> Option<Vec<Proof>> {
        let Decision { map, proof, history, .. } = decision;
        let later = map.cluster == self.learned.cluster && map.version > self.learned.version;
        if !later || !is_about_its_map(signatures, decision) {
            return None;
        }
        let mut members = &self.learned.members;
        let mut version = self.learned.version;
        let mut path = Vec::new();
        for step in history.iter().take(MAX_HISTORY) {
            let stated = &step.statement;
            let next = stated.cluster == map.cluster && stated.version > version;
            if !next || stated.version >= map.version || stated.members.is_empty() {
                continue;
            }
            match signed_by(signatures, step, members) {
                Signed::Majority => {
                    (members, version) = (&stated.members, stated.version);
                    path.push(step.clone());
                }
                // The step before it is missing. A later one may have votes of enough members that are known.
                Signed::Minority => {}
                Signed::Forged => return None,
            }
        }
        if signed_by(signatures, proof, members) != Signed::Majority {
            return None;
        }
        // A decree also needs a majority of the members that it names.
        let changed = map.members != *members;
        if changed && signed_by(signatures, proof, &map.members) != Signed::Majority {
            return None;
        }
        if changed {
            path.push(proof.clone());
        }
        Some(path)
    }

    /// Whether a decision of the known version is another map, in a higher ballot and proved. Then a member voted
    /// twice, because two majorities have a member in common.
    pub(super) fn is_fork(&self, signatures: &dyn Signatures, decision: &Decision) -> bool {
        let Decision { map, proof, .. } = decision;
        map.cluster == self.learned.cluster
            && map.version == self.learned.version
            && proof.statement.ballot > self.proof.statement.ballot
            && *map != self.learned
            && map.previous_members == self.learned.previous_members
            && is_about_its_map(signatures, decision)
            && signed_by(signatures, proof, &map.previous_members) == Signed::Majority
            && signed_by(signatures, proof, &map.members) == Signed::Majority
    }

    /// Returns the known map with its proof, for a host that knows an earlier version.
    pub(super) fn decision_since(&self, known: u64) -> Decision {
        let since = |proof: &&Proof| {
            proof.statement.version > known && proof.statement.version < self.learned.version
        };
        Decision {
            map: self.learned.clone(),
            proof: self.proof.clone(),
            history: self.history.proofs().iter().filter(since).cloned().collect(),
            // A host that knows a map of this cluster needs none.
            recoveries: if known == 0 { self.recoveries.clone() } else { Vec::new() },
        }
    }
}
