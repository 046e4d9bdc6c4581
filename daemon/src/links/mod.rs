//! Sync streams (interface only as yet).

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use ovl_proto::id::NodeId;
use ovl_proto::record::SignedRecord;
use ovl_proto::sync::Message;
use tokio::sync::mpsc;

use crate::crypto::{Identity, Keyring};

pub(crate) struct LinksConfig {
    pub listen: SocketAddr,
    pub identity: Arc<Identity>,
    pub keyring: Arc<Keyring>,
    pub record: SignedRecord,
}

#[derive(Debug)]
pub(crate) enum LinkEvent {
    /// Our dialled link is usable.
    Up(NodeId),
    Down(NodeId),
    Message { from: NodeId, message: Message, size: usize },
    /// Of a peer that dialled us, verified.
    Record { record: ovl_proto::record::NodeRecord, signed: SignedRecord },
}

pub(crate) struct Links {
    _events: mpsc::Sender<LinkEvent>,
}

impl Links {
    pub(crate) async fn start(_config: LinksConfig, events: mpsc::Sender<LinkEvent>) -> anyhow::Result<Self> {
        Ok(Self { _events: events })
    }
    pub(crate) fn set_record(&self, _record: SignedRecord) {}
    pub(crate) fn set_peers(&self, _peers: BTreeMap<NodeId, SocketAddr>) {}
    /// Dial it now, whatever the backoff says.
    pub(crate) fn kick(&self, _node: NodeId) {}
    pub(crate) fn send(&self, _to: NodeId, _message: &Message) -> bool {
        false
    }
    /// To every connected peer; says to how many.
    pub(crate) fn broadcast(&self, _message: &Message) -> usize {
        0
    }
    pub(crate) fn connected(&self) -> BTreeSet<NodeId> {
        BTreeSet::new()
    }
    pub(crate) fn local_addr(&self) -> SocketAddr {
        SocketAddr::from(([0, 0, 0, 0], 0))
    }
    /// Flushes queues, within a second.
    pub(crate) async fn shutdown(self) {}
}
