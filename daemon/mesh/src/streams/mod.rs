//! Sync streams: what one daemon has to say to another beside gossip, over TCP, encrypted, and with
//! each side's identity proved. Each node dials every peer and writes on the streams that it
//! dialled; on those that others dialled it only reads.
//!
//! | module | what is in it |
//! | --- | --- |
//! | [`noise`] | the handshake |
//! | [`frame`] | messages cut into sealed chunks |
//! | [`outbound`] | dialling and writing |
//! | [`inbound`] | accepting and reading |

mod frame;
mod inbound;
mod noise;
mod outbound;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use ovl_proto::id::{ClusterKeyId, NodeId};
use ovl_proto::record::{NodeRecord, SignedRecord};
use ovl_proto::sync::Message;
use ovl_proto::wire;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tracing::error;

use crate::keys::{Identity, Keyring};
use crate::transport::Transport;
use inbound::Inbound;
use outbound::{End, Outbound};

/// From the first packet to both identities proved.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// How long a shutdown waits for queues.
const FLUSH: Duration = Duration::from_secs(1);

/// What links have to be told.
pub struct LinksConfig {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Who we are.
    pub identity: Arc<Identity>,
    /// Who may connect at all.
    pub keyring: Arc<Keyring>,
    /// What we say of ourselves in handshakes.
    pub record: SignedRecord,
    /// Opens streams and listens for them.
    pub transport: Arc<dyn Transport>,
}

/// What links have to tell.
#[derive(Debug)]
pub enum LinkEvent {
    /// The stream that we dialled to a peer can be used.
    Up(NodeId),
    /// It cannot any more, and what was queued is lost. Always follows an `Up`.
    Down(NodeId),
    /// A peer says something.
    Message {
        /// Who, proved.
        from: NodeId,
        /// The cluster key that it has.
        key: ClusterKeyId,
        /// What.
        message: Message,
    },
    /// A peer has dialled us.
    Record {
        /// Verified. Not known to be the latest one.
        record: NodeRecord,
        /// The same, to be passed on.
        signed: SignedRecord,
    },
}

/// All streams. They end when it is dropped.
pub struct Links {
    shared: Arc<Shared>,
    peers: Mutex<Peers>,
    listener: JoinHandle<()>,
    #[cfg(test)]
    local_addr: SocketAddr,
}

#[derive(Default)]
struct Peers {
    outbound: BTreeMap<NodeId, Arc<Outbound>>,
    tasks: JoinSet<()>,
}

/// What all streams need.
struct Shared {
    transport: Arc<dyn Transport>,
    identity: Arc<Identity>,
    keyring: Mutex<Arc<Keyring>>,
    record: Mutex<SignedRecord>,
    events: mpsc::Sender<LinkEvent>,
    inbound: Inbound,
}

impl Shared {
    fn record(&self) -> SignedRecord {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn keyring(&self) -> Arc<Keyring> {
        Arc::clone(&self.keyring.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Links {
    /// Listens, and dials nobody yet.
    pub async fn start(config: LinksConfig, events: mpsc::Sender<LinkEvent>) -> anyhow::Result<Self> {
        let LinksConfig { listen, identity, keyring, record, transport } = config;
        let listener = transport
            .listen(listen)
            .with_context(|| format!("cannot listen for sync streams on {listen} (TCP)"))?;
        #[cfg(test)]
        let local_addr = listener.local_addr()?;
        let (record, keyring, inbound) = (Mutex::new(record), Mutex::new(keyring), Inbound::default());
        let shared = Arc::new(Shared { transport, identity, keyring, record, events, inbound });
        let listener = tokio::spawn(inbound::run(listener, Arc::clone(&shared)));
        Ok(Self {
            shared,
            peers: Mutex::default(),
            listener,
            #[cfg(test)]
            local_addr,
        })
    }

    /// Whether whoever listens there has our own identity: a clash is believed only if so.
    pub fn is_us(&self, addr: SocketAddr) -> impl Future<Output = bool> + Send + use<> {
        let shared = Arc::clone(&self.shared);
        async move {
            let ask = async {
                let mut stream = shared.transport.connect(addr).await?;
                let keyring = shared.keyring();
                noise::dial(&mut *stream, keyring.sealing(), &shared.identity, &shared.record()).await
            };
            let answer = tokio::time::timeout(Duration::from_secs(5), ask).await;
            matches!(answer, Ok(Ok(secured)) if secured.record.id == shared.identity.id())
        }
    }

    /// What later handshakes say of us.
    pub fn set_record(&self, record: SignedRecord) {
        *self.shared.record.lock().unwrap_or_else(PoisonError::into_inner) = record;
    }

    /// The first of these keys opens new streams, and all of them are taken. Streams that another one
    /// has opened are renewed where we dialled them, without losing anything; those that a key opened
    /// which is not among these end.
    pub fn set_keyring(&self, keyring: Arc<Keyring>) {
        *self.shared.keyring.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&keyring);
        self.shared.inbound.set_keyring(&keyring);
        for peer in self.lock().outbound.values() {
            peer.set_keyring(&keyring);
        }
    }

    /// Those to be connected to, for ever; links to others end.
    pub fn set_peers(&self, wanted: BTreeMap<NodeId, SocketAddr>) {
        let mut peers = self.lock();
        let Peers { outbound, tasks } = &mut *peers;
        outbound.retain(|node, peer| {
            let keep = wanted.contains_key(node);
            if !keep {
                peer.end(End::Now);
            }
            keep
        });
        for (node, addr) in wanted {
            if node == self.shared.identity.id() {
                continue;
            }
            if let Some(peer) = outbound.get(&node) {
                peer.set_addr(addr);
                continue;
            }
            let peer = Arc::new(Outbound::new(node, addr));
            outbound.insert(node, Arc::clone(&peer));
            tasks.spawn(outbound::run(peer, Arc::clone(&self.shared)));
        }
        while tasks.try_join_next().is_some() {}
    }

    /// Dials a peer now if it is not connected, whatever the backoff says.
    pub fn kick(&self, node: NodeId) {
        if let Some(peer) = self.lock().outbound.get(&node)
            && !peer.is_connected()
        {
            peer.kick();
        }
    }

    /// Queues a message; false if there is no link to that peer.
    pub fn send(&self, to: NodeId, message: &Message) -> bool {
        let Some(peer) = self.lock().outbound.get(&to).map(Arc::clone) else { return false };
        peer.is_connected() && encode(message).is_some_and(|bytes| peer.send(bytes))
    }

    /// Queues a message for everybody who is connected; says for how many.
    pub fn broadcast(&self, message: &Message) -> usize {
        let connected: Vec<_> =
            self.lock().outbound.values().filter(|peer| peer.is_connected()).map(Arc::clone).collect();
        if connected.is_empty() {
            return 0;
        }
        let Some(bytes) = encode(message) else { return 0 };
        connected.iter().filter(|peer| peer.send(bytes.clone())).count()
    }

    /// Peers that [`Self::send`] reaches.
    pub fn connected(&self) -> BTreeSet<NodeId> {
        let peers = self.lock();
        peers.outbound.iter().filter(|(_, peer)| peer.is_connected()).map(|(node, _)| *node).collect()
    }

    /// Where it listens, for tests that let the kernel choose.
    #[cfg(test)]
    fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Writes what is queued, for a second at most, then ends all. Events must still be received, or
    /// have room, until this returns.
    pub async fn shutdown(mut self) {
        let mut tasks = {
            let mut peers = self.lock();
            for peer in peers.outbound.values() {
                peer.end(End::Flushed);
            }
            std::mem::take(&mut peers.tasks)
        };
        let flushed = tokio::time::timeout(FLUSH, async { while tasks.join_next().await.is_some() {} }).await;
        if flushed.is_err() {
            tracing::debug!("not all streams could be flushed");
        }
        tasks.shutdown().await;
        self.listener.abort();
        // The port is free when this returns.
        if let Err(error) = (&mut self.listener).await
            && !error.is_cancelled()
        {
            error!(%error, "the listener for sync streams had failed");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Peers> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Links {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

fn encode(message: &Message) -> Option<Bytes> {
    match wire::encode(message) {
        Ok(bytes) if bytes.len() <= wire::MAX_FRAME => Some(bytes.into()),
        Ok(bytes) => {
            error!(length = bytes.len(), "a message is too large to be sent");
            None
        }
        Err(error) => {
            error!(%error, "a message cannot be encoded");
            None
        }
    }
}

#[cfg(test)]
mod tests;
