//! Gossip (interface only as yet).

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ovl_proto::control::GossipCounters;
use ovl_proto::id::NodeId;
use ovl_proto::record::{NodeRecord, SignedRecord};
use ovl_proto::table::Revision;
use tokio::sync::mpsc;

use crate::crypto::Keyring;

/// What a node tells in gossip of its state, so that peers notice what they missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Hints {
    pub table: Revision,
    pub objects: [u8; 32],
    pub alloc: u64,
}

pub(crate) struct GossipConfig {
    /// Where to listen.
    pub listen: SocketAddr,
    pub keyring: Arc<Keyring>,
    /// The own record; its id, generation, address and link MTU are used.
    pub record: SignedRecord,
    pub hints: Hints,
    /// `host[:port]`.
    pub join: Vec<String>,
    pub interval: Duration,
}

#[derive(Debug)]
pub(crate) enum GossipEvent {
    Peer { record: NodeRecord, signed: SignedRecord, hints: Hints, alive: bool },
    Gone(NodeId),
    Announced { record: NodeRecord, signed: SignedRecord },
    PathMtu { node: NodeId, mtu: u16 },
    /// Two daemons of one node id at work at once, for longer than a restart takes.
    Clash { node: NodeId, addresses: [SocketAddr; 2], generations: [u64; 2] },
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Contact {
    /// When anything came from it directly.
    pub last_heard: Instant,
    pub rtt: Option<Duration>,
    pub addr: SocketAddr,
}

pub(crate) struct Gossip {
    _events: mpsc::Sender<GossipEvent>,
}

impl Gossip {
    pub(crate) async fn start(_config: GossipConfig, events: mpsc::Sender<GossipEvent>) -> anyhow::Result<Self> {
        Ok(Self { _events: events })
    }
    pub(crate) fn set_record(&self, _record: SignedRecord) {}
    pub(crate) fn set_hints(&self, _hints: Hints) {}
    pub(crate) fn set_known(&self, _known: Vec<(NodeId, SocketAddr)>) {}
    pub(crate) fn set_link_mtu(&self, _mtu: u16) {}
    /// Sends in the background.
    pub(crate) fn announce(&self, _record: SignedRecord) {}
    /// Returns when all is sent, after about 50 ms.
    pub(crate) async fn announce_now(&self, _record: SignedRecord) {}
    pub(crate) fn contacts(&self) -> HashMap<NodeId, Contact> {
        HashMap::new()
    }
    pub(crate) fn path_mtus(&self) -> HashMap<NodeId, u16> {
        HashMap::new()
    }
    pub(crate) fn counters(&self) -> GossipCounters {
        GossipCounters::default()
    }
    /// The socket actually bound (for port 0).
    pub(crate) fn local_addr(&self) -> SocketAddr {
        SocketAddr::from(([0, 0, 0, 0], 0))
    }
    pub(crate) async fn shutdown(self) {}
}
