//! Signatures of votes for allocation maps, with this host's identity.

use std::sync::Arc;

use ovl_consensus::Signatures;
use ovl_files::sha256;
use ovl_mesh::keys::{Identity, node_id, verify};
use ovl_proto::alloc::{AllocMap, Recovery, Statement, Vote};
use ovl_proto::id::NodeId;
use ovl_proto::record::Domain;
use ovl_proto::wire;

/// Signs with the identity of this host, and verifies signatures of any host.
#[derive(Debug)]
pub(crate) struct Signer {
    identity: Arc<Identity>,
}

impl Signer {
    /// Creates a signer for an identity.
    pub(crate) fn new(identity: Arc<Identity>) -> Self {
        Self { identity }
    }
}

/// Encodes what is signed, which is far below the size limit of encodings.
fn body(statement: &impl serde::Serialize) -> Vec<u8> {
    wire::encode_body(statement).unwrap_or_default()
}

impl Signatures for Signer {
    fn digest(&self, map: &AllocMap) -> [u8; 32] {
        // A map that exceeds the size limit cannot be sent either.
        sha256(&wire::encode_body(map).unwrap_or_default())
    }

    fn sign(&self, statement: &Statement) -> Vote {
        let signature = self.identity.sign(Domain::Map, &body(statement));
        Vote { key: *self.identity.public_key(), signature }
    }

    fn author(&self, vote: &Vote) -> NodeId {
        node_id(&vote.key)
    }

    fn verify(&self, statement: &Statement, vote: &Vote) -> bool {
        verify(&vote.key, Domain::Map, &body(statement), &vote.signature)
    }

    fn sign_recovery(&self, recovery: &Recovery) -> Vote {
        let signature = self.identity.sign(Domain::Recovery, &body(recovery));
        Vote { key: *self.identity.public_key(), signature }
    }

    fn verify_recovery(&self, recovery: &Recovery, vote: &Vote) -> bool {
        verify(&vote.key, Domain::Recovery, &body(recovery), &vote.signature)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, VecDeque};
    use std::rc::Rc;

    use ovl_consensus::{Durable, Output, Replica};
    use ovl_proto::alloc::Change;
    use ovl_proto::id::NetworkId;

    use super::*;

    fn identity(name: &str) -> Arc<Identity> {
        let dir = std::env::temp_dir().join(format!("ovl-votes-{}-{name}", std::process::id()));
        let identity = Identity::load_or_create(&dir).unwrap();
        std::fs::remove_file(&dir).unwrap();
        Arc::new(identity)
    }

    #[test]
    fn vote_is_valid_for_its_statement_and_author_only() {
        let (a, b) = (Signer::new(identity("a")), Signer::new(identity("b")));
        let map = AllocMap { cluster: 7, version: 3, ..AllocMap::default() };
        let statement = Statement { cluster: 7, version: 3, map: a.digest(&map), ..Statement::default() };
        let vote = a.sign(&statement);
        assert_eq!(b.author(&vote), a.identity.id());
        assert!(b.verify(&statement, &vote));
        for changed in [
            Statement { cluster: 8, ..statement.clone() },
            Statement { version: 4, ..statement.clone() },
            Statement { map: a.digest(&AllocMap::default()), ..statement.clone() },
            Statement { members: [a.identity.id()].into(), ..statement.clone() },
        ] {
            assert!(!b.verify(&changed, &vote), "{changed:?}");
        }
        let forged = Vote { key: b.sign(&statement).key, ..vote };
        assert!(!a.verify(&statement, &forged));
    }

    /// Delivers all messages until none is left. Returns how many there were.
    fn settle(hosts: &mut BTreeMap<NodeId, Replica>, from: NodeId, output: Output) -> usize {
        let mut queue: VecDeque<_> =
            output.send.into_iter().map(|(to, message)| (from, to, message)).collect();
        let mut count = 0;
        while let Some((from, to, message)) = queue.pop_front() {
            count += 1;
            let output = hosts.get_mut(&to).unwrap().handle(0, from, message);
            queue.extend(output.send.into_iter().map(|(next, message)| (to, next, message)));
        }
        count
    }

    #[test]
    #[ignore = "measures what a change costs"]
    fn cost_of_a_change() {
        for members in [3, 24, 60] {
            let signers: Vec<_> = (0..members).map(|n| Signer::new(identity(&format!("m{n}")))).collect();
            let mut hosts: BTreeMap<NodeId, Replica> = signers
                .into_iter()
                .map(|signer| {
                    let id = signer.identity.id();
                    (id, Replica::new(id, Rc::new(signer), Durable::default(), 1))
                })
                .collect();
            let ids: Vec<NodeId> = hosts.keys().copied().collect();
            let (first, alive) = (ids[0], ids.iter().copied().collect());
            let _ = hosts.get_mut(&first).unwrap().bootstrap(7);
            for id in &ids[1..] {
                let output = hosts.get_mut(id).unwrap().ask(first);
                settle(&mut hosts, *id, output);
                let _ = hosts.get_mut(id).unwrap().tick(1000, &alive);
                let (_, output) = hosts.get_mut(id).unwrap().request(1000, Change::Admit(*id), &alive);
                settle(&mut hosts, *id, output);
            }
            assert_eq!(hosts[&first].map().members.len(), members);
            let subnet = "10.0.0.0/8".parse().unwrap();
            let (changes, began) = (100, std::time::Instant::now());
            let mut messages = 0;
            for blocks in 1..=changes {
                let network = NetworkId([1; 5]);
                let claim = Change::Claim { network, subnet, block_length: 24, owner: first, blocks };
                let (_, output) = hosts.get_mut(&first).unwrap().request(1000, claim, &alive);
                messages += settle(&mut hosts, first, output);
            }
            let each = began.elapsed() / changes;
            assert_eq!(hosts[&ids[1]].map().blocks.len(), changes as usize);
            let state = wire::encode_stored(hosts[&first].durable()).unwrap().len();
            let proof = wire::encode_body(&hosts[&first].durable().proof).unwrap().len();
            println!(
                "{members} members: {each:?} for all hosts and {:?} for each, {} messages a change, proof {proof} \
                 bytes, state {state} bytes",
                each / members as u32,
                messages / changes as usize
            );
        }
    }
}
