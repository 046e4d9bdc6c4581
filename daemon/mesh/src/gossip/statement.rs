//! Signed statements: only they, and those of the module `pair`, prove that a host is alive, and set its hints.
//!
//! Every host with the cluster key can seal a datagram as any other host. So liveness and hints are believed only if the
//! host's identity has signed them: as the answer to a random nonce, or with a sequence number that only grows. Or the host
//! has authenticated the answer with a key of which it has signed the public half.

use std::time::Duration;

use ovl_proto::id::NodeId;
use ovl_proto::record::{Domain, PublicKey, Signature};
use ovl_proto::table::Revision;
use ovl_proto::wire::{self, WireError};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::bytes::Bytes;
use super::seal::RunId;
use crate::keys::{self, Identity};

/// The hints of a host: a summary of its state, by which peers detect missing state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Hints {
    /// The revision of its owner table.
    pub table: Revision,
    /// The digest of its cluster objects.
    pub objects: [u8; 32],
    /// The version of its allocation map.
    pub alloc: u64,
}

ovl_proto::fields! { Hints { 1 table, 2 objects, 3 alloc } }

/// The position of hints in the sequence of a host: the generation of its record, and a number that grows with each
/// change.
pub(super) type Sequence = (u64, u64);

/// The public X25519 key of a run of a host.
pub(super) type AgreementKey = [u8; 32];

/// What a host says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Statement {
    /// The ping that it answers; `None` if it only announces hints.
    pub(super) answer: Option<Answer>,
    pub(super) sequence: Sequence,
    pub(super) hints: Hints,
    /// Its wall clock when it made an answer, in milliseconds since 1970. 0 without an answer, and in releases that do
    /// not say it.
    pub(super) wall_ms: u64,
    /// The key with which the other host computes the key of the two, see the module `pair`. Only in signed answers; `None` in
    /// releases that have none.
    pub(super) agreement: Option<AgreementKey>,
    /// The nonce of a ping of its own, which saves a datagram. Only in answers that are authenticated with the key of two hosts.
    /// `None` if it is not due, and in releases that send each ping by itself.
    pub(super) ping: Option<u64>,
}

ovl_proto::fields! {
    Statement { 1 answer optional, 2 sequence, 3 hints, 4 wall_ms optional, 5 agreement optional, 6 ping optional }
}

/// The answer to a ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Answer {
    /// The nonce of the ping.
    pub(super) nonce: u64,
    /// The run that the answering host seals with, so that no other host passes it off as an answer of its own run.
    pub(super) run: RunId,
}

/// A statement with the signature of the host that it is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SignedStatement {
    key: PublicKey,
    body: Bytes,
    signature: Signature,
}

impl SignedStatement {
    /// Encodes and signs a statement.
    ///
    /// # Errors
    ///
    /// The statement cannot be encoded.
    pub(super) fn sign(identity: &Identity, statement: &Statement) -> Result<Self, WireError> {
        let body = wire::encode_body(statement)?;
        let signature = identity.sign(Domain::Statement, &body);
        Ok(Self { key: *identity.public_key(), body: Bytes(body), signature })
    }

    /// Decodes the claimed host and statement, without verifying the signature, which costs 110 us.
    pub(super) fn claim(&self) -> Option<(NodeId, Statement)> {
        Some((keys::node_id(&self.key), wire::decode_body(&self.body.0).ok()?))
    }

    /// Replaces the key, for tests: the signature is then invalid.
    #[cfg(test)]
    pub(super) fn with_key(self, key: PublicKey) -> Self {
        Self { key, ..self }
    }

    /// Whether the host has signed the statement.
    pub(super) fn is_valid(&self) -> bool {
        keys::verify(&self.key, Domain::Statement, &self.body.0, &self.signature)
    }
}

/// Limits how often something expensive is done: `rate` times a second, and `rate` times at once.
#[derive(Debug)]
pub(super) struct Budget {
    rate: u32,
    left: f64,
    at: Instant,
}

impl Budget {
    pub(super) fn new(rate: u32, now: Instant) -> Self {
        Self { rate, left: f64::from(rate), at: now }
    }

    /// Takes one out of the budget. Returns whether there was one.
    pub(super) fn take(&mut self, now: Instant) -> bool {
        let passed: Duration = now.saturating_duration_since(self.at);
        self.at = now;
        self.left = (self.left + passed.as_secs_f64() * f64::from(self.rate)).min(f64::from(self.rate));
        let has = self.left >= 1.0;
        if has {
            self.left -= 1.0;
        }
        has
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_host_itself_makes_valid_statements() {
        let (identity, other) = (Identity::ephemeral(), Identity::ephemeral());
        let answer = Some(Answer { nonce: 5, run: [1; 16] });
        let statement = Statement {
            answer,
            sequence: (1, 2),
            hints: Hints::default(),
            wall_ms: 7,
            agreement: Some([3; 32]),
            ping: None,
        };
        let signed = SignedStatement::sign(&identity, &statement).unwrap();
        assert_eq!(signed.claim(), Some((identity.id(), statement)));
        assert!(signed.is_valid());
        let forged = SignedStatement { key: *other.public_key(), ..signed.clone() };
        assert!(!forged.is_valid());
        let later = wire::encode_body(&Statement { sequence: (1, 3), ..statement }).unwrap();
        assert!(!SignedStatement { body: Bytes(later), ..signed }.is_valid());
    }

    #[test]
    fn budget_refills_to_its_rate() {
        let start = Instant::now();
        let mut budget = Budget::new(10, start);
        let taken = |budget: &mut Budget, now| (0..100).filter(|_| budget.take(now)).count();
        assert_eq!(taken(&mut budget, start), 10);
        assert_eq!(taken(&mut budget, start + Duration::from_millis(550)), 5);
        assert_eq!(taken(&mut budget, start + Duration::from_secs(100)), 10);
    }

    #[test]
    #[ignore = "a measurement"]
    fn cost_of_statements() {
        let identity = Identity::ephemeral();
        let answer = Some(Answer { nonce: u64::MAX, run: [1; 16] });
        let statement = Statement {
            answer,
            sequence: (u64::MAX, 2),
            hints: Hints::default(),
            wall_ms: 7,
            agreement: Some([3; 32]),
            ping: None,
        };
        let start = std::time::Instant::now();
        let signed: Vec<_> =
            (0..2000).map(|_| SignedStatement::sign(&identity, &statement).unwrap()).collect();
        let signing = start.elapsed() / 2000;
        let start = std::time::Instant::now();
        assert!(signed.iter().all(SignedStatement::is_valid));
        println!("sign {signing:?}, verify {:?}", start.elapsed() / 2000);
    }
}
