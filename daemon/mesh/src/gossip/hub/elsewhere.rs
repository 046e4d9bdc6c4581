//! Hosts with several addresses: which one is used, and trials of the others.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use ovl_proto::id::NodeId;
use tokio::time::Instant;

use super::super::GossipEvent;
use super::super::candidates::Turn;
use super::super::packet::Packet;
use super::{Hub, State};

/// The maximum number of trials a second. Members say which addresses are tried.
pub(super) const TRIALS: u32 = 60;

impl Hub {
    /// Sends the trials that are due.
    pub(in crate::gossip) fn try_others(&self, now: Instant) {
        let mut state = self.lock();
        let state = &mut *state;
        let silent_after = state.book.silent_soon();
        for trial in state.ends.trials(|host| state.book.is_tried(host, now), silent_after, now) {
            let Some(nonce) = state.book.nonce() else { return };
            if !state.trials.take(now) {
                return;
            }
            state.ends.sent(&trial, nonce, now);
            state.send_to_end(&*self.socket, (trial.known_as, trial.at), &Packet::Try { nonce });
        }
    }
}

impl State {
    /// Takes the addresses of a peer.
    pub(in crate::gossip) fn set_addresses(
        &mut self,
        node: NodeId,
        (main, further): (SocketAddr, &[SocketAddr]),
        now: Instant,
    ) {
        let is_apart = self.ends.set(node, (main, further), now);
        self.book.set_apart(node, is_apart, now);
    }

    /// Whether a live peer is at an address.
    pub(in crate::gossip) fn is_alive_at(&self, at: SocketAddr) -> bool {
        let main = self.ends.host_at(at).and_then(|host| self.ends.main_of(host));
        self.book.is_alive_at(main.unwrap_or(at))
    }

    pub(in crate::gossip) fn elsewhere(&self) -> BTreeMap<NodeId, SocketAddr> {
        self.ends.elsewhere()
    }

    /// Takes that a host has answered a ping from an address.
    pub(super) fn note_answer(&mut self, node: NodeId, at: SocketAddr, now: Instant) {
        let silent_after = self.book.silent_soon();
        let turn = self.ends.answered(node, at, silent_after, now);
        self.note_turn(node, turn, now);
    }

    /// Takes that a host has answered a trial.
    pub(super) fn note_tried(&mut self, node: NodeId, nonce: u64, now: Instant) {
        let silent_after = self.book.silent_soon();
        if let Some(turn) = self.ends.tried(node, nonce, silent_after, now) {
            // UDP works, if only to another address.
            self.tcp.note_answer(node, now);
            self.note_turn(node, turn, now);
        }
    }

    fn note_turn(&mut self, node: NodeId, turn: Turn, now: Instant) {
        if turn != Turn::Stays {
            // The path is another one.
            self.book.search_again(node, now);
        }
        if turn == Turn::Moved {
            self.tell(GossipEvent::Moved(node));
        }
    }
}
