//! What is known of each peer besides its record and its table: signs of life, hints, and questions to it.

use std::collections::{BTreeMap, BTreeSet};

use ovl_cluster::liveness::{self, Signs};
use ovl_cluster::view::View;
use ovl_control::PeerState;
use ovl_mesh::gossip::Hints;
use ovl_proto::id::NodeId;
use ovl_proto::record::SignedRecord;

/// Time in milliseconds after which an unanswered pull is repeated.
pub(crate) const PULL_AGAIN_MS: u64 = 1_000;

/// State of a peer besides its record and its table.
#[derive(Debug)]
pub(crate) struct Peer {
    /// Its record with the signature, to be forwarded and saved.
    signed: SignedRecord,
    /// Signs of life from gossip and probes.
    signs: Signs,
    /// Hints in its gossip record.
    hints: Hints,
    /// Time when gossip last considered it alive, in milliseconds since 1970.
    last_alive_ms: u64,
    /// Time of a request for its whole table that is still unanswered, in milliseconds of this run. `None` if
    /// there is none.
    pulled_at: Option<u64>,
    /// Time of the last probe, in milliseconds of this run.
    probe_sent_at: u64,
    /// Whether gossip has considered it alive during this run.
    heard: bool,
    /// Whether its identity has proved to be at its address: it answered a ping or connected, now or in an earlier run.
    /// A host that is not a member is not dialled before.
    proved: bool,
    /// The position in which it became known, among the hosts that are known.
    number: u64,
}

impl Peer {
    /// Returns its record with the signature.
    pub(crate) fn signed(&self) -> &SignedRecord {
        &self.signed
    }

    /// Returns the signs of life from gossip and probes.
    pub(crate) fn signs(&self) -> Signs {
        self.signs
    }

    /// Returns the hints in its gossip record.
    pub(crate) fn hints(&self) -> Hints {
        self.hints
    }

    /// Returns the time when gossip last considered it alive, in milliseconds since 1970.
    pub(crate) fn last_alive_ms(&self) -> u64 {
        self.last_alive_ms
    }

    /// Returns the time of the last probe, in milliseconds of this run.
    pub(crate) fn probe_sent_at(&self) -> u64 {
        self.probe_sent_at
    }

    /// Whether its identity has proved to be at its address, so that it may be dialled.
    pub(crate) fn is_proved(&self) -> bool {
        self.proved
    }
}

/// A request for a peer's whole table that is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pull {
    /// None is unanswered.
    First,
    /// The last one was not answered in time.
    Again,
}

/// All peers. Each is in the picture of the cluster, too.
#[derive(Debug, Default)]
pub(crate) struct Peers(BTreeMap<NodeId, Peer>);

impl Peers {
    /// Returns a peer. `None` if it is not known.
    pub(crate) fn get(&self, id: NodeId) -> Option<&Peer> {
        self.0.get(&id)
    }

    /// Returns all peers in the order of their ids.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (NodeId, &Peer)> {
        self.0.iter().map(|(id, peer)| (*id, peer))
    }

    /// Takes the record of a peer. One that was not known counts as alive until now: `now` is in milliseconds of this run, and
    /// `wall_ms` since 1970.
    pub(crate) fn set_record(&mut self, id: NodeId, signed: SignedRecord, now: u64, wall_ms: u64) {
        if let Some(peer) = self.0.get_mut(&id) {
            peer.signed = signed;
            return;
        }
        let number = self.0.values().map(|peer| peer.number + 1).max().unwrap_or(0);
        let peer = Peer {
            signed,
            signs: Signs { gossip: false, silent_since: now, probed_at: None },
            hints: Hints::default(),
            last_alive_ms: wall_ms,
            pulled_at: None,
            probe_sent_at: 0,
            heard: false,
            proved: false,
            number,
        };
        self.0.insert(id, peer);
    }

    /// Forgets a peer.
    pub(crate) fn remove(&mut self, id: NodeId) {
        self.0.remove(&id);
    }

    /// Takes the hints of a peer. Returns whether it is known.
    pub(crate) fn announce(&mut self, id: NodeId, hints: Hints) -> bool {
        let peer = self.0.get_mut(&id);
        peer.map(|peer| peer.hints = hints).is_some()
    }

    /// Takes what gossip says of a peer's life. What it hears is proved to come from there. Returns whether that is new.
    pub(crate) fn hear(&mut self, id: NodeId, alive: bool, now: u64) -> bool {
        let Some(peer) = self.0.get_mut(&id) else { return false };
        if peer.signs.gossip && !alive {
            peer.signs.silent_since = now;
        }
        peer.signs.gossip = alive;
        alive && !std::mem::replace(&mut peer.proved, true)
    }

    /// Notes that a peer has proved to be at its address. Returns whether that is new.
    pub(crate) fn prove(&mut self, id: NodeId) -> bool {
        self.0.get_mut(&id).is_some_and(|peer| !std::mem::replace(&mut peer.proved, true))
    }

    /// Notes that peers are being probed.
    pub(crate) fn probe(&mut self, ids: impl Iterator<Item = NodeId>, now: u64) {
        for id in ids {
            if let Some(peer) = self.0.get_mut(&id) {
                peer.probe_sent_at = now;
            }
        }
    }

    /// Notes that the kernel of a peer has answered a probe.
    pub(crate) fn note_probe_reply(&mut self, id: NodeId, now: u64) {
        if let Some(peer) = self.0.get_mut(&id) {
            peer.signs.probed_at = Some(now);
        }
    }

    /// Notes a request for the whole table of a peer. `None` if the last one may still be answered, or if there is no such
    /// peer.
    pub(crate) fn pull(&mut self, id: NodeId, now: u64) -> Option<Pull> {
        let peer = self.0.get_mut(&id)?;
        if peer.pulled_at.is_some_and(|at| now.saturating_sub(at) < PULL_AGAIN_MS) {
            return None;
        }
        Some(peer.pulled_at.replace(now).map_or(Pull::First, |_| Pull::Again))
    }

    /// Notes that a request for the whole table of a peer is answered, or can no longer be.
    pub(crate) fn end_pull(&mut self, id: NodeId) {
        if let Some(peer) = self.0.get_mut(&id) {
            peer.pulled_at = None;
        }
    }

    /// Restores the time when a peer was last alive, in milliseconds since 1970.
    pub(crate) fn recall(&mut self, id: NodeId, last_alive_ms: u64) {
        if let Some(peer) = self.0.get_mut(&id) {
            peer.last_alive_ms = last_alive_ms;
        }
    }

    /// Takes a peer for one that was never alive, because an operator has it forgotten.
    pub(crate) fn give_up(&mut self, id: NodeId) {
        self.recall(id, 0);
    }

    /// Keeps the times for which peers have been silent when the wall clock is set from `before` to `after`, in milliseconds
    /// since 1970.
    pub(crate) fn shift(&mut self, before: u64, after: u64) {
        for peer in self.0.values_mut() {
            let silent = before.saturating_sub(peer.last_alive_ms);
            peer.last_alive_ms = after.saturating_sub(silent);
        }
    }

    /// Judges the liveness of every peer, and returns the verdicts that are not in the view. Times are in milliseconds: `now`
    /// of this run, `wall_ms` since 1970, and `keep` is how long a host whose kernel alone answers stays suspect.
    pub(crate) fn judge(
        &mut self,
        view: &View,
        now: u64,
        wall_ms: u64,
        keep: u64,
    ) -> Vec<(NodeId, PeerState)> {
        // A daemon that has just started has not heard any peer, so it keeps the entries that it found for a
        // while.
        let settling = now < liveness::PROBE_VALID_MS * 3;
        let mut changed = Vec::new();
        for (id, peer) in &mut self.0 {
            let Some(node) = view.nodes.get(id) else { continue };
            let mut verdict = liveness::judge(peer.signs, node.record.presence, now, keep);
            peer.heard |= peer.signs.gossip;
            if settling && !peer.heard && verdict == PeerState::Dead {
                verdict = PeerState::Suspect;
            }
            if peer.signs.gossip {
                peer.last_alive_ms = wall_ms;
            }
            if node.state != verdict {
                changed.push((*id, verdict));
            }
        }
        changed
    }

    /// Returns the peers that are not members, in the order in which they are to be dropped if there are too many: those that
    /// have proved nothing first, and the oldest first.
    pub(crate) fn unknown(&self, members: &BTreeSet<NodeId>) -> Vec<NodeId> {
        let unknown = self.0.iter().filter(|(id, _)| !members.contains(id));
        let mut unknown: Vec<_> = unknown.map(|(id, peer)| (peer.proved, peer.number, *id)).collect();
        unknown.sort_unstable();
        unknown.into_iter().map(|(_, _, id)| id).collect()
    }
}

#[cfg(test)]
mod tests {
    use ovl_proto::record::Signature;

    use super::*;
    use crate::world::{id, switched};

    /// Peers with the ids of hosts 2 and 3, known since 100 ms of this run.
    fn peers() -> Peers {
        let mut peers = Peers::default();
        for n in [3, 2] {
            let signed = SignedRecord { body: Vec::new(), signature: Signature([0; 64]) };
            peers.set_record(id(n), signed, 100, 1_000_000);
        }
        peers
    }

    #[test]
    fn table_is_pulled_again_after_a_while_and_at_once_after_an_answer() {
        let mut peers = peers();
        assert_eq!(peers.pull(id(2), 100), Some(Pull::First));
        assert_eq!(peers.pull(id(2), 99 + PULL_AGAIN_MS), None);
        assert_eq!(peers.pull(id(2), 100 + PULL_AGAIN_MS), Some(Pull::Again));
        peers.end_pull(id(2));
        assert_eq!(peers.pull(id(2), 101 + PULL_AGAIN_MS), Some(Pull::First));
        assert_eq!(peers.pull(id(9), 0), None);
    }

    #[test]
    fn what_gossip_hears_is_proved_and_its_silence_counts_from_its_end() {
        let mut peers = peers();
        assert!(peers.hear(id(2), true, 200) && !peers.hear(id(2), true, 300) && !peers.prove(id(2)));
        assert!(!peers.hear(id(2), false, 400) && !peers.hear(id(2), false, 500));
        let signs = peers.get(id(2)).unwrap().signs();
        assert_eq!(signs, Signs { gossip: false, silent_since: 400, probed_at: None });
        // Host 3 became known first, and host 2 alone has proved where it is.
        assert_eq!(peers.unknown(&BTreeSet::new()), [id(3), id(2)]);
        assert_eq!(peers.unknown(&[id(3)].into()), [id(2)]);
    }

    #[test]
    fn peer_that_was_not_heard_yet_is_no_more_than_suspect_at_first() {
        let (mut peers, view, keep) = (peers(), switched(), 0);
        let verdict = |peers: &mut Peers, now| {
            let changed = peers.judge(&view, now, 2_000_000, keep);
            changed.into_iter().find(|(host, _)| *host == id(2)).map(|(_, verdict)| verdict)
        };
        let settled = liveness::PROBE_VALID_MS * 3;
        assert_eq!(verdict(&mut peers, settled - 1), Some(PeerState::Suspect));
        assert_eq!(verdict(&mut peers, settled), Some(PeerState::Dead));
        assert_eq!(peers.get(id(2)).unwrap().last_alive_ms(), 1_000_000);
        peers.hear(id(2), true, settled);
        assert_eq!(verdict(&mut peers, settled), None);
        assert_eq!(peers.get(id(2)).unwrap().last_alive_ms(), 2_000_000);
    }

    #[test]
    fn silence_is_kept_when_the_clock_is_set() {
        let mut peers = peers();
        peers.shift(1_500_000, 9_000_000);
        assert_eq!(peers.get(id(2)).unwrap().last_alive_ms(), 8_500_000);
    }
}
