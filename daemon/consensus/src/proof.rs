//! Signatures under maps, and whether they are those of a majority.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

use ovl_proto::alloc::{AllocMap, Ballot, Decision, Proof, Recovery, Statement, Vote};
use ovl_proto::id::NodeId;
use ovl_proto::wire::fields::Unknown;

use super::majority;

/// The maximum number of votes in a proof that are looked at.
pub(super) const MAX_VOTES: usize = 4096;

/// The signatures of hosts. The crate itself contains no cryptography.
pub trait Signatures: Debug {
    /// Returns a collision-resistant hash of the encoded map.
    fn digest(&self, map: &AllocMap) -> [u8; 32];
    /// Signs a statement as the local host.
    fn sign(&self, statement: &Statement) -> Vote;
    /// Returns the host that a vote claims to be of: the hash of its key. It does not verify the signature.
    fn author(&self, vote: &Vote) -> NodeId;
    /// Whether the signature of a vote is valid for its key.
    fn verify(&self, statement: &Statement, vote: &Vote) -> bool;
    /// Signs a recovery as the local host.
    fn sign_recovery(&self, recovery: &Recovery) -> Vote;
    /// Whether the signature of a vote for a recovery is valid for its key.
    fn verify_recovery(&self, recovery: &Recovery, vote: &Vote) -> bool;
}

/// Returns what a vote for a map in a ballot states.
pub(super) fn statement(signatures: &dyn Signatures, ballot: Ballot, map: &AllocMap) -> Statement {
    Statement {
        cluster: map.cluster,
        version: map.version,
        ballot,
        members: map.members.clone(),
        map: signatures.digest(map),
        unknown: Unknown::default(),
    }
}

/// Whether a vote for a statement is of this host.
pub(super) fn is_vote_of(
    signatures: &dyn Signatures,
    from: NodeId,
    statement: &Statement,
    vote: &Vote,
) -> bool {
    signatures.author(vote) == from && signatures.verify(statement, vote)
}

/// Whether a majority of some members signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Signed {
    /// A majority did.
    Majority,
    /// There are not enough votes of these members. Their signatures were not verified.
    Minority,
    /// A signature is invalid.
    Forged,
}

/// Verifies the signatures of a majority of these members.
pub(super) fn signed_by(signatures: &dyn Signatures, proof: &Proof, members: &BTreeSet<NodeId>) -> Signed {
    let needed = majority(members.len());
    let votes: BTreeMap<NodeId, &Vote> = proof
        .votes
        .iter()
        .take(MAX_VOTES)
        .map(|vote| (signatures.author(vote), vote))
        .filter(|(author, _)| members.contains(author))
        .collect();
    if votes.len() < needed {
        return Signed::Minority;
    }
    // A majority is enough, so the cost does not grow with the rest.
    if votes.values().take(needed).all(|vote| signatures.verify(&proof.statement, vote)) {
        Signed::Majority
    } else {
        Signed::Forged
    }
}

/// Whether the statement of the proof is about the map of the decision.
pub(super) fn is_about_its_map(signatures: &dyn Signatures, decision: &Decision) -> bool {
    let stated = &decision.proof.statement;
    *stated == statement(signatures, stated.ballot, &decision.map)
}

/// Whether the members before and after the decision signed it. That makes a decision believable only for a host that
/// knows no map.
pub(super) fn is_consistent(signatures: &dyn Signatures, decision: &Decision) -> bool {
    let Decision { map, proof, .. } = decision;
    map.cluster != 0
        && map.version != 0
        && is_about_its_map(signatures, decision)
        // There were no members before the first version.
        && (map.version == 1 || signed_by(signatures, proof, &map.previous_members) == Signed::Majority)
        && (map.version != 1 || map.members.len() == 1)
        && signed_by(signatures, proof, &map.members) == Signed::Majority
}
