//! The lies of a member and of an outsider, who has the cluster key and no membership.
//!
//! The liar's own replica takes part as it should, besides: it does not vote for two maps, and makes no promise that
//! hides or invents a vote. That is the one lie that a majority of an odd number of members cannot survive, see the
//! documentation of the crate. So promises that lie come from the outsider.

use ovl_consensus::Signatures;
use ovl_proto::alloc::{
    AllocMap, AllocMessage, Ballot, Block, Change, Decision, MapStep, Proof, Refusal, Statement,
};
use ovl_proto::id::NodeId;
use ovl_proto::wire::fields::Unknown;

use super::fake::Fake;
use super::world::{World, network};

/// The outsider.
pub(crate) const OUTSIDER: NodeId = NodeId([250; 10]);

impl World {
    /// Sends a random lie of the liar or of the outsider to a random host.
    pub(crate) fn lie(&mut self, liar: usize) {
        let to = self.random.below(self.nodes.len() as u64) as usize;
        let from = if to == liar || self.random.percent(30) { None } else { Some(liar) };
        let me = from.map_or(OUTSIDER, |from| self.nodes[from].id);
        let Some(target) = &self.nodes[to].up else { return };
        let durable = target.durable().clone();
        let victim = self.nodes[to].id;
        // A host without a map believes those that it asks, and the only member decides alone.
        if durable.learned.cluster == 0 || durable.learned.members == [me].into() {
            return;
        }
        let any = Block { network: network(1), prefix: "10.7.0.0/29".parse().unwrap() };
        let near = Ballot { counter: durable.promised.counter + 1 + self.random.below(9), node: me };
        let far = Ballot { counter: u64::MAX - self.random.below(2), node: me };
        let message = match self.random.below(12) {
            0 => {
                let learned = Some(Box::new(self.forged(&durable.learned, me, &durable.proof)));
                AllocMessage::Promise { ballot: durable.promised, accepted: None, learned }
            }
            1 => {
                let map = self.forged(&durable.learned, me, &durable.proof).map;
                let accepted = Some((Ballot { counter: durable.promised.counter, node: me }, map));
                AllocMessage::Promise { ballot: durable.promised, accepted, learned: None }
            }
            2 => AllocMessage::Learn(Box::new(self.forged(&durable.learned, me, &durable.proof))),
            3 => {
                let ballot = if self.random.percent(50) { near } else { far };
                AllocMessage::Prepare { ballot, known: durable.learned.version }
            }
            4 => {
                let ballot = if self.random.percent(50) { near } else { far };
                let map = self.forged(&durable.learned, me, &durable.proof).map;
                AllocMessage::Accept { ballot, map }
            }
            5 => AllocMessage::Nack { ballot: durable.promised, promised: far },
            6 => {
                let open: Vec<u64> = self.nodes[to].open.keys().copied().collect();
                let Some(id) = open.first().copied() else { return };
                let version = durable.learned.version;
                let result = match self.random.below(4) {
                    0 => Ok(u64::MAX),
                    1 => Ok(version),
                    2 => Ok(version + 1),
                    _ => Err(Refusal::LastMember(victim)),
                };
                AllocMessage::Reply { id, result }
            }
            7 => {
                let change = match self.random.below(4) {
                    0 => Change::Forget(victim),
                    1 => Change::Ban(victim),
                    2 => Change::Release { block: any, owner: victim },
                    _ => Change::ClaimExact { block: any, owner: victim },
                };
                AllocMessage::Request { id: self.random.below(u64::MAX), change }
            }
            8 => {
                let ballot = if self.random.percent(50) { near } else { far };
                AllocMessage::AcceptStep {
                    ballot,
                    step: self.forged_step(&durable.learned, me, &durable.proof).0,
                }
            }
            9 => {
                let (step, proof) = self.forged_step(&durable.learned, me, &durable.proof);
                AllocMessage::Decided { step, proof }
            }
            10 => AllocMessage::Ask { known: if self.random.percent(50) { u64::MAX } else { 0 } },
            _ => {
                if self.sent.is_empty() {
                    return;
                }
                let pick = self.random.below(self.sent.len() as u64) as usize;
                self.sent[pick].clone()
            }
        };
        let from = from.filter(|_| !matches!(message, AllocMessage::Promise { .. }));
        self.inject(from, to, message);
    }

    /// Forges a step from a map, with the hash of the map that it leads to, of the one before, or of none.
    fn forged_step(&mut self, known: &AllocMap, liar: NodeId, proof: &Proof) -> (MapStep, Proof) {
        let Decision { map, proof: forged, .. } = self.forged(known, liar, proof);
        let hash = match self.random.below(3) {
            0 => proof.statement.map,
            1 => [0; 32],
            _ => forged.statement.map,
        };
        let step = MapStep {
            version: map.version,
            map: hash,
            members: Some(map.members),
            forgotten: Some(map.forgotten),
            held: map.blocks,
            ..MapStep::default()
        };
        (step, forged)
    }

    /// Forges a decision after a map: everything is the liar's, or one block is taken, or the version jumps.
    fn forged(&mut self, known: &AllocMap, liar: NodeId, proof: &Proof) -> Decision {
        let mut map = AllocMap {
            cluster: if self.random.percent(10) { 5 } else { known.cluster },
            version: known.version + 1,
            previous_members: known.members.clone(),
            ..known.clone()
        };
        match self.random.below(4) {
            0 => {
                map.members = [liar].into();
                map.blocks.values_mut().for_each(|owner| *owner = liar);
            }
            1 => map.version = u64::MAX,
            2 => map.version = known.version + 2,
            _ => {
                map.members.insert(liar);
                map.forgotten = [NodeId([251; 10])].into();
            }
        }
        let ballot = Ballot { counter: proof.statement.ballot.counter + 1, node: liar };
        let signer = Fake(liar);
        let statement = Statement {
            cluster: map.cluster,
            version: map.version,
            ballot,
            members: map.members.clone(),
            map: signer.digest(&map),
            unknown: Unknown::default(),
        };
        // The votes of others are those for the map before.
        let mut votes = proof.votes.clone();
        votes.push(signer.sign(&statement));
        Decision {
            map,
            proof: Proof { statement, votes },
            history: vec![proof.clone()],
            recoveries: Vec::new(),
        }
    }
}
