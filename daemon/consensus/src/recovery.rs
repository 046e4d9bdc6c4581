//! Recoveries from the loss of a majority: the map that one makes of another, and who believes it. The rules are in the
//! crate's documentation.

use std::collections::{BTreeMap, BTreeSet};

use ovl_proto::alloc::{AllocMap, Decision, Dissent, Proof, Recovery, RecoveryProof, Vote};
use ovl_proto::id::NodeId;

use super::acceptor::Durable;
use super::majority;
use super::proof::{MAX_VOTES, Signatures};

/// For how long a host must have seen no majority before it consents to a recovery, and a majority before it goes on in
/// spite of one. In milliseconds.
pub const LOST_MS: u64 = 30_000;
/// The maximum number of recoveries in a row whose proofs a host keeps, the latest ones.
pub const MAX_RECOVERIES: usize = 16;
/// The maximum number of recoveries that a host remembers not to join, the latest ones.
const MAX_REFUSED: usize = 64;

/// Which members a host sees, and since when these are a majority, or are none.
#[derive(Debug, Default)]
pub(super) struct Sight {
    present: BTreeSet<NodeId>,
    /// Whether there is a majority, and since when that is so. `None` before the first look.
    majority: Option<(bool, u64)>,
}

impl Sight {
    /// Notes the members that are seen now, without the host itself.
    pub(super) fn note(
        &mut self,
        now: u64,
        me: NodeId,
        present: BTreeSet<NodeId>,
        members: &BTreeSet<NodeId>,
    ) {
        let seen = members.iter().filter(|node| **node == me || present.contains(*node)).count();
        let seen = seen >= majority(members.len());
        self.present = present;
        if self.majority.is_none_or(|(before, _)| before != seen) {
            self.majority = Some((seen, now));
        }
    }

    /// Whether a majority, or the lack of one, has been seen for [`LOST_MS`].
    pub(super) fn is_lasting(&self, now: u64, seen: bool) -> bool {
        self.since(seen).is_some_and(|since| now >= since.saturating_add(LOST_MS))
    }

    /// Returns since when a majority, or the lack of one, has been seen. `None` if it is not so now.
    pub(super) fn since(&self, seen: bool) -> Option<u64> {
        self.majority.filter(|(now, _)| *now == seen).map(|(_, since)| since)
    }

    /// Returns the members that are seen.
    pub(super) fn present(&self) -> &BTreeSet<NodeId> {
        &self.present
    }

    /// Whether the host may consent to a recovery with these survivors.
    ///
    /// # Errors
    ///
    /// A majority lives, lived lately, or a member is seen that is not among the survivors.
    pub(super) fn consents(&self, now: u64, survivors: &BTreeSet<NodeId>) -> Result<(), Dissent> {
        if !self.is_lasting(now, false) {
            return Err(Dissent::Majority { present: self.present.clone() });
        }
        self.present.difference(survivors).next().map_or(Ok(()), |other| Err(Dissent::Sees(*other)))
    }
}

/// Returns the first map of a recovered cluster: the survivors with what they held. Who is lost is banned, as if
/// `ovlctl peers forget` had removed it.
pub fn first_map(last: &AllocMap, recovery: &Recovery) -> AllocMap {
    let survivors = &recovery.survivors;
    let lost = || last.members.difference(survivors).copied();
    AllocMap {
        cluster: recovery.cluster,
        version: recovery.version.saturating_add(1),
        members: survivors.clone(),
        previous_members: survivors.clone(),
        forgotten: last.forgotten.iter().copied().chain(lost()).collect(),
        banned: last.banned.iter().copied().chain(lost()).collect(),
        blocks: last
            .blocks
            .iter()
            .filter(|(_, holder)| survivors.contains(holder))
            .map(|(b, h)| (*b, *h))
            .collect(),
        key: last.key,
        origin: last.origin(),
        unknown: last.unknown.clone(),
    }
}

/// Whether each survivor signed.
pub(super) fn is_signed(signatures: &dyn Signatures, proof: &RecoveryProof) -> bool {
    let Recovery { from, cluster, survivors, .. } = &proof.recovery;
    let votes: BTreeMap<NodeId, &Vote> =
        proof.votes.iter().take(MAX_VOTES).map(|vote| (signatures.author(vote), vote)).collect();
    let signed = |node| votes.get(node).is_some_and(|vote| signatures.verify_recovery(&proof.recovery, vote));
    *from != 0 && *cluster != 0 && from != cluster && !survivors.is_empty() && survivors.iter().all(signed)
}

/// Returns the recoveries since a cluster, each signed by its survivors, of which one is a survivor of the one before it.
/// Empty if they do not lead from one to the other.
fn chain<'a>(
    signatures: &dyn Signatures,
    recoveries: &'a [RecoveryProof],
    from: u64,
    to: u64,
) -> Vec<&'a RecoveryProof> {
    let mut links: Vec<&RecoveryProof> = Vec::new();
    let start = recoveries.iter().position(|link| link.recovery.from == from).unwrap_or(recoveries.len());
    for link in recoveries.iter().skip(start).take(MAX_RECOVERIES) {
        let follows = links.last().is_none_or(|before| {
            let (before, this) = (&before.recovery, &link.recovery);
            before.cluster == this.from && !before.survivors.is_disjoint(&this.survivors)
        });
        if !follows || !is_signed(signatures, link) {
            return Vec::new();
        }
        links.push(link);
    }
    if links.last().is_some_and(|last| last.recovery.cluster == to) { links } else { Vec::new() }
}

impl Durable {
    /// Whether a recovery is of the known cluster, and signed by its survivors, of which this host knows one as a member.
    pub(super) fn is_left_by(&self, signatures: &dyn Signatures, proof: &RecoveryProof) -> bool {
        let Recovery { from, survivors, .. } = &proof.recovery;
        !self.is_fresh()
            && *from == self.learned.cluster
            && !survivors.is_disjoint(&self.learned.members)
            && is_signed(signatures, proof)
    }

    /// Returns the recoveries that lead from the known cluster to that of a decision, and the proofs of membership changes
    /// since the last one. `None` if the decision is not proved by them.
    pub(super) fn recovered_path(
        &self,
        signatures: &dyn Signatures,
        decision: &Decision,
    ) -> Option<(Vec<RecoveryProof>, Vec<Proof>)> {
        let links = chain(signatures, &decision.recoveries, self.learned.cluster, decision.map.cluster);
        let first = links.first()?;
        if first.recovery.survivors.is_disjoint(&self.learned.members) {
            return None;
        }
        let last = &links.last()?.recovery;
        let begin = AllocMap {
            cluster: last.cluster,
            version: last.version,
            members: last.survivors.clone(),
            ..AllocMap::default()
        };
        let begin = Self { learned: begin, ..Self::default() };
        let path = begin.proved_path(signatures, decision)?;
        Some((links.into_iter().cloned().collect(), path))
    }

    /// Adopts a decision of a cluster that the known one was recovered as.
    pub(super) fn adopt_recovered(
        &mut self,
        decision: &Decision,
        links: Vec<RecoveryProof>,
        path: Vec<Proof>,
    ) {
        // Promises stay: a ballot number is used once, whatever the cluster.
        self.accepted = None;
        self.history = Default::default();
        self.adopt(decision, path);
        self.recoveries.extend(links);
        let surplus = self.recoveries.len().saturating_sub(MAX_RECOVERIES);
        self.recoveries.drain(..surplus);
        self.held = None;
        self.refused.clear();
    }

    /// Takes over the recoveries that come with the first map of a new host.
    pub(super) fn note_origin(&mut self, signatures: &dyn Signatures, decision: &Decision) {
        let Some(first) = decision.recoveries.first() else { return };
        let links = chain(signatures, &decision.recoveries, first.recovery.from, decision.map.cluster);
        self.recoveries = links.into_iter().cloned().collect();
    }

    /// Remembers not to join a recovery.
    pub(super) fn refuse(&mut self, cluster: u64) {
        self.held = None;
        if !self.refused.contains(&cluster) {
            self.refused.push(cluster);
            let surplus = self.refused.len().saturating_sub(MAX_REFUSED);
            self.refused.drain(..surplus);
        }
    }
}
