//! Records that hosts send outside the rounds of gossip: of this host to others, and of others to this one.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use ovl_proto::id::NodeId;
use ovl_proto::record::SignedRecord;
use ovl_proto::wire;
use tokio::time::Instant;
use tracing::debug;

use super::super::GossipEvent;
use super::super::admission::version_of;
use super::super::decode::Incarnation;
use super::super::packet::Packet;
use super::{Learned, MAX_ADDRESSES, MAX_PROVED, MAX_QUEUE, State};
use crate::keys::{self, RecordError};
use crate::transport::Datagrams;

/// The maximum number of hosts whose last announcement is remembered.
const MAX_ANNOUNCED: usize = 4096;
/// The minimum time between two introductions to an address.
const INTRODUCE_EVERY: Duration = Duration::from_secs(10);

impl State {
    /// Takes the record that a host has announced, once it has proved to be that host. Returns whether chitchat is to have
    /// it.
    pub(super) fn take_announced(&mut self, node: NodeId, now: Instant) -> bool {
        let Some(signed) = self.announced.get(&node) else { return false };
        let (Ok(head), Ok(text)) = (signed.head(), signed.to_text()) else { return false };
        let name = Incarnation { node, generation: head.generation, address: head.address };
        let version = version_of(head.revision);
        if self.learned.len() >= MAX_PROVED || !self.admission.take_own(name, &text, version, now) {
            return false;
        }
        self.learned.push(Learned { name, text, version });
        true
    }

    pub(super) fn introduce_self(&mut self, socket: &dyn Datagrams, to: SocketAddr) {
        let Some(record) = self.own_record.clone() else { return };
        if let Err(error) = self.send(socket, to, &Packet::Announce(record)) {
            debug!(%to, %error, "cannot send the record of this host");
        }
    }

    /// Sends the record of the local host in the form that every release reads, at most once in [`INTRODUCE_EVERY`].
    pub(super) fn introduce(
        &mut self,
        socket: &dyn Datagrams,
        to: SocketAddr,
        now: Instant,
    ) -> io::Result<()> {
        let Some(record) = self.own_record.as_ref() else { return Ok(()) };
        let plain = wire::encode_body(record).map_err(io::Error::other)?;
        let recent = |at: &Instant| now.saturating_duration_since(*at) < INTRODUCE_EVERY;
        if self.introduced.len() >= MAX_ADDRESSES {
            self.introduced.retain(|_, at| recent(at));
        }
        if self.introduced.len() >= MAX_ADDRESSES || self.introduced.get(&to).is_some_and(recent) {
            return Ok(());
        }
        self.introduced.insert(to, now);
        self.send_plain(socket, to, (wire::INTRODUCTION, &plain), None)
    }

    /// Verifies and queues an announced record. Returns whether it is new.
    pub(super) fn announced(&mut self, own: NodeId, signed: SignedRecord, now: Instant) -> bool {
        // Each announcement is sent three times. Verify its signature once.
        let Ok(claimed) = signed.head() else {
            self.counters.dropped_malformed += 1;
            return false;
        };
        if claimed.id == own || self.announced.get(&claimed.id) == Some(&signed) {
            return false;
        }
        if signed.to_text().is_ok_and(|text| self.admission.has_record(claimed.id, &text)) {
            return false;
        }
        if !self.strange_signatures.take(now) {
            return false;
        }
        match keys::open_record(&signed) {
            Ok(record) if self.queue.len() < MAX_QUEUE => {
                if self.announced.len() >= MAX_ANNOUNCED {
                    self.announced.clear();
                }
                self.announced.insert(record.id, signed.clone());
                self.queue.push_back(GossipEvent::Announced { record, signed });
                true
            }
            Err(RecordError::NotUnderstood { head, why }) if self.queue.len() < MAX_QUEUE => {
                if self.announced.len() >= MAX_ANNOUNCED {
                    self.announced.clear();
                }
                self.announced.insert(head.id, signed.clone());
                self.queue.push_back(GossipEvent::NotUnderstood { head, signed, why });
                true
            }
            Ok(_) | Err(RecordError::NotUnderstood { .. }) => false,
            Err(error) => {
                self.counters.dropped_malformed += 1;
                debug!(%error, "dropped an invalid announcement");
                false
            }
        }
    }
}
