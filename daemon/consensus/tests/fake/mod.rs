//! Signatures without keys, for the unit tests and the simulation.

use ovl_proto::alloc::{AllocMap, Recovery, Statement, Vote};
use ovl_proto::id::NodeId;
use ovl_proto::record::Signature;
use ovl_proto::wire;

// The crate itself in unit tests, and the library in others.
use super::Signatures;

/// Signs as a host, with hashes in place of signatures. No test lets a host sign as another one.
#[derive(Debug)]
pub(crate) struct Fake(pub(crate) NodeId);

/// A hash that is good enough for a simulation: FNV-1a, then an expansion.
fn hash<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut state = 0xcbf2_9ce4_8422_2325_u64;
    for byte in bytes {
        state = (state ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    [(); N].map(|()| {
        state = (state ^ (state >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (state >> 56) as u8
    })
}

impl Fake {
    fn sign_any(&self, what: &impl serde::Serialize) -> Vote {
        let mut key = [0; 32];
        key[..10].copy_from_slice(&self.0.0);
        Vote { key, signature: Signature(hash(&wire::encode_body(&(self.0, what)).unwrap())) }
    }
}

impl Signatures for Fake {
    fn digest(&self, map: &AllocMap) -> [u8; 32] {
        hash(&wire::encode_body(map).unwrap())
    }

    fn sign(&self, statement: &Statement) -> Vote {
        self.sign_any(statement)
    }

    fn author(&self, vote: &Vote) -> NodeId {
        NodeId(vote.key[..10].try_into().unwrap())
    }

    fn verify(&self, statement: &Statement, vote: &Vote) -> bool {
        Self(self.author(vote)).sign(statement) == *vote
    }

    fn sign_recovery(&self, recovery: &Recovery) -> Vote {
        self.sign_any(&("recovery", recovery))
    }

    fn verify_recovery(&self, recovery: &Recovery, vote: &Vote) -> bool {
        Self(self.author(vote)).sign_recovery(recovery) == *vote
    }
}
