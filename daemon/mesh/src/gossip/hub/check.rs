//! Questions of a member about its own NAT: where it is seen, and what is let in.
//!
//! Only hosts that have proved who they are ask, for answers to where they ask from. An answer is no longer than its question, and
//! there are few a second, so members are no use as reflectors or scanners.

use std::net::SocketAddr;

use ovl_proto::id::NodeId;
use tokio::time::Instant;
use tracing::debug;

use super::super::GossipEvent;
use super::super::ends::is_plausible;
use super::super::packet::{Answerer, Packet};
use super::super::seal::Sender;
use super::{Hub, MAX_QUEUE, State};

impl Hub {
    /// Handles a question of a host whose datagram came from `at`, or what a member asks for another host.
    pub(super) fn answer_check(
        &self,
        state: &mut State,
        packet: Packet,
        (node, at): (NodeId, SocketAddr),
        now: Instant,
    ) {
        // What came by TCP says nothing of a NAT.
        let known_as = state.book.address(node).filter(|_| state.tcp.remote(at).is_none());
        let Some(known_as) = known_as.filter(|_| state.checks.take(now)) else { return };
        match packet {
            Packet::Check { nonce, by: Answerer::SamePort } => {
                state.send_to_end(&*self.socket, (known_as, at), &Packet::Checked { nonce, at });
            }
            Packet::Check { nonce, by: Answerer::OtherPort } => {
                let datagram = state.sealed(known_as, &Packet::Checked { nonce, at }, Some(node));
                if let Some(datagram) = datagram
                    && state.queue.len() < MAX_QUEUE
                {
                    state.queue.push_back(GossipEvent::Knock { at, datagram });
                    self.news.notify_one();
                }
            }
            Packet::Check { nonce, by: Answerer::OtherHost } => {
                if let Some(to) = state.book.introducers(node, now).into_iter().find(|to| to.ip() != at.ip())
                    && let Err(error) = state.send(&*self.socket, to, &Packet::CheckFor { node, nonce, at })
                {
                    debug!(%to, %error, "cannot ask another member to answer");
                }
            }
            Packet::CheckFor { node, nonce, at } if is_plausible(at) => {
                if let Some(known_as) = state.book.address(node) {
                    state.send_to_end(&*self.socket, (known_as, at), &Packet::Checked { nonce, at });
                }
            }
            _ => {}
        }
    }
}

impl State {
    /// A sealed question to a member, which another socket than that of gossip sends.
    pub(in crate::gossip) fn check(&mut self, to: NodeId, nonce: u64, by: Answerer) -> Option<Vec<u8>> {
        let address = self.book.address(to)?;
        self.sealed(address, &Packet::Check { nonce, by }, Some(to))
    }

    /// Opens an answer. Returns the nonce of its question, and where that came from.
    pub(in crate::gossip) fn open_checked(&mut self, datagram: &mut [u8]) -> Option<(u64, SocketAddr)> {
        let (run, plain) = self.opener.open(datagram).ok()?;
        let Sender::Proved(_) = self.opener.sender(&run) else { return None };
        match Packet::decode(plain).ok()? {
            Packet::Checked { nonce, at } => Some((nonce, at)),
            _ => None,
        }
    }
}
