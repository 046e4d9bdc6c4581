//! Answers to pings that are authenticated with a key of two hosts in place of a signature.
//!
//! A signature and its verification take 180 us, and each host answers 40 pings a second. So each run of a host has an
//! X25519 key pair, and the answers that it signs have its public key. Two hosts with the public keys of each other
//! authenticate the later answers with HMAC-SHA256, which takes a hundredth of the time. Only these two hosts can compute
//! the key, and a host does not believe answers of its own, so such an answer proves to the other host what a signature
//! does. It proves nothing to third hosts: what is passed on is signed.

use ovl_proto::id::NodeId;
use ovl_proto::wire::{self, WireError};
use ring::hmac;
use ring::rand::{SecureRandom as _, SystemRandom};
use serde::{Deserialize, Serialize};
use x25519_dalek::{PublicKey, StaticSecret};

use super::bytes::Bytes;
use super::statement::{AgreementKey, Statement};

/// The id of the secret of two runs, which does not disclose it.
pub(super) type PairId = [u8; 8];

/// The X25519 key pair of this run of the local host.
pub(super) struct Agreement {
    node: NodeId,
    secret: StaticSecret,
    public: AgreementKey,
}

impl Agreement {
    /// Creates a key pair.
    ///
    /// # Errors
    ///
    /// The kernel returns no random numbers.
    pub(super) fn new(node: NodeId) -> anyhow::Result<Self> {
        let mut bytes = [0; 32];
        SystemRandom::new()
            .fill(&mut bytes)
            .map_err(|_| anyhow::anyhow!("cannot start gossip: the kernel returned no random numbers"))?;
        let secret = StaticSecret::from(bytes);
        let public = PublicKey::from(&secret).to_bytes();
        Ok(Self { node, secret, public })
    }

    /// The public key.
    pub(super) fn public(&self) -> AgreementKey {
        self.public
    }

    /// Derives the keys of this run and a run of another host. `None` if its public key is none of a secret key.
    pub(super) fn pair(&self, node: NodeId, public: AgreementKey) -> Option<Pair> {
        let shared = self.secret.diffie_hellman(&PublicKey::from(public));
        if !shared.was_contributory() {
            return None;
        }
        let shared = hmac::Key::new(hmac::HMAC_SHA256, shared.as_bytes());
        let own = (&self.node, &self.public);
        let other = (&node, &public);
        let derive = |label: &[u8], (from, from_key): (&NodeId, &AgreementKey), (to, to_key)| {
            let (to, to_key): (&NodeId, &AgreementKey) = (to, to_key);
            hmac::sign(&shared, &[label, &from.0, from_key, &to.0, to_key].concat())
        };
        let (first, second) = if own < other { (own, other) } else { (other, own) };
        let id = derive(b"ovl pair id v1\0", first, second);
        let key = |tag: hmac::Tag| hmac::Key::new(hmac::HMAC_SHA256, tag.as_ref());
        Some(Pair {
            public,
            id: *id.as_ref().first_chunk()?,
            send: key(derive(b"ovl pair v1\0", own, other)),
            receive: key(derive(b"ovl pair v1\0", other, own)),
        })
    }
}

/// The keys of this run of the local host and a run of another host. Their `Debug` shows no secret.
#[derive(Debug)]
pub(super) struct Pair {
    /// The public key of the other run.
    public: AgreementKey,
    id: PairId,
    send: hmac::Key,
    receive: hmac::Key,
}

impl Pair {
    /// The id, which is the same on both hosts.
    pub(super) fn id(&self) -> PairId {
        self.id
    }

    /// Whether the other run has this public key.
    pub(super) fn is_with(&self, public: &AgreementKey) -> bool {
        self.public == *public
    }
}

/// A statement that is authenticated with the key of two hosts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PairStatement {
    body: Bytes,
    tag: [u8; 32],
}

impl PairStatement {
    /// Encodes and authenticates a statement for the other host.
    ///
    /// # Errors
    ///
    /// The statement cannot be encoded.
    pub(super) fn new(pair: &Pair, statement: &Statement) -> Result<Self, WireError> {
        let body = wire::encode_body(statement)?;
        let mut tag = [0; 32];
        tag.iter_mut().zip(hmac::sign(&pair.send, &body).as_ref()).for_each(|(to, from)| *to = *from);
        Ok(Self { body: Bytes(body), tag })
    }

    /// Decodes the statement. `None` if the other host has not made it.
    pub(super) fn open(&self, pair: &Pair) -> Option<Statement> {
        hmac::verify(&pair.receive, &self.body.0, &self.tag).ok()?;
        wire::decode_body(&self.body.0).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::super::statement::{Answer, Hints};
    use super::*;

    fn statement(nonce: u64) -> Statement {
        let answer = Some(Answer { nonce, run: [1; 16] });
        Statement {
            answer,
            sequence: (1, 2),
            hints: Hints::default(),
            wall_ms: 7,
            agreement: None,
            ping: None,
        }
    }

    #[test]
    fn only_the_other_host_of_a_pair_makes_valid_statements() {
        let [a, b, c] = [1, 2, 3].map(|byte| Agreement::new(NodeId([byte; 10])).unwrap());
        let ab = a.pair(b.node, b.public()).unwrap();
        let ba = b.pair(a.node, a.public()).unwrap();
        let ac = a.pair(c.node, c.public()).unwrap();
        let ca = c.pair(a.node, a.public()).unwrap();
        assert_eq!(ab.id(), ba.id());
        assert_ne!(ab.id(), ac.id());
        let made = PairStatement::new(&ba, &statement(5)).unwrap();
        assert_eq!(made.open(&ab), Some(statement(5)));
        // Not a host of its own answers, nor in the name of another host.
        assert_eq!(made.open(&ba), None);
        assert_eq!(made.open(&ac), None);
        assert_eq!(PairStatement::new(&ca, &statement(5)).unwrap().open(&ab), None);
        // A host that claims the key of another one as its own.
        let claimed = a.pair(c.node, b.public()).unwrap();
        assert_ne!(claimed.id(), ab.id());
        assert_eq!(made.open(&claimed), None);
        let mut changed = made.clone();
        changed.body = PairStatement::new(&ba, &statement(6)).unwrap().body;
        assert_eq!(changed.open(&ab), None);
        let mut changed = made;
        changed.tag[31] ^= 1;
        assert_eq!(changed.open(&ab), None);
    }

    #[test]
    fn keys_of_no_secret_are_refused() {
        let a = Agreement::new(NodeId([1; 10])).unwrap();
        assert!(a.pair(NodeId([2; 10]), [0; 32]).is_none());
    }

    #[test]
    #[ignore = "a measurement"]
    fn cost_of_statements() {
        let [a, b] = [1, 2].map(|byte| Agreement::new(NodeId([byte; 10])).unwrap());
        let start = std::time::Instant::now();
        let pairs: Vec<Pair> = (0..2000).filter_map(|_| a.pair(b.node, b.public())).collect();
        println!("agree {:?}", start.elapsed() / 2000);
        let ba = b.pair(a.node, a.public()).unwrap();
        let start = std::time::Instant::now();
        let made: Vec<_> = pairs.iter().map(|_| PairStatement::new(&ba, &statement(1)).unwrap()).collect();
        let making = start.elapsed() / 2000;
        let start = std::time::Instant::now();
        assert!(pairs.iter().zip(&made).all(|(pair, made)| made.open(pair).is_some()));
        println!("make {making:?}, open {:?}", start.elapsed() / 2000);
    }
}
