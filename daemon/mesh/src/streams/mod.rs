//! Streams: encrypted TCP connections between daemons, with both identities authenticated. Tables, objects and
//! consensus messages travel over them. Each host dials every peer. It writes only on the streams that it dialled, and
//! reads only on those that it accepted.
//!
//! | module | content |
//! | --- | --- |
//! | [`noise`] | the handshake |
//! | [`frame`] | the sealed chunks of messages |
//! | [`outbound`] | dialling and writing |
//! | [`inbound`] | accepting and reading |
//! | [`relayed`] | streams through members |
//! | [`lent`] | connections that hosts behind NAT lend |
//! | [`datagrams`] | streams that carry datagrams where UDP is blocked |

mod datagrams;
mod frame;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod inbound;
mod lent;
mod noise;
mod outbound;
mod relayed;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use ovl_proto::id::{ClusterKeyId, NodeId};
use ovl_proto::record::{NodeRecord, SignedRecord, named_by};
use ovl_proto::sync::Message;
use ovl_proto::wire;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};
use tracing::error;

use crate::keys::{Identity, Keyring};
use crate::transport::Transport;
pub use datagrams::{DatagramStream, Datagrams, FrameCipher};
use inbound::Inbound;
use lent::{Lending, Lent};
use noise::Purpose;
use outbound::{Outbound, Shutdown};
use relayed::Passed;
pub use relayed::Ways;

/// The timeout of dialling and the handshake.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// The time that a shutdown waits for the queues to be written.
const FLUSH: Duration = Duration::from_secs(1);

/// The configuration of streams.
pub struct StreamsConfig {
    /// The TCP address to listen on.
    pub listen: SocketAddr,
    /// The address of the other family to listen on. `None` if this host has none.
    pub listen_also: Option<SocketAddr>,
    /// The identity of the local host.
    pub identity: Arc<Identity>,
    /// The cluster keys. A peer needs one of them to connect.
    pub keyring: Arc<Keyring>,
    /// The record of the local host, which handshakes send.
    pub record: SignedRecord,
    /// Opens streams and listens for them.
    pub transport: Arc<dyn Transport>,
    /// Whether others cannot dial this host.
    pub behind_nat: bool,
}

/// An event of streams.
#[derive(Debug)]
pub enum StreamEvent {
    /// The dialled stream to a peer is connected. It stays so while it rests.
    Up(NodeId),
    /// The dialled stream to a peer was closed, and queued messages are lost. It follows an `Up`.
    Down(NodeId),
    /// A message arrived.
    Message {
        /// The authenticated sender.
        from: NodeId,
        /// The cluster key of the stream.
        key: ClusterKeyId,
        /// The message.
        message: Message,
    },
    /// A message arrived that this release does not understand. It has no effect.
    NotUnderstood {
        /// The authenticated sender.
        from: NodeId,
        /// What is not known.
        what: String,
    },
    /// A peer has connected.
    Record {
        /// Its record, verified. It may not be the latest one.
        record: NodeRecord,
        /// The signed record, to be passed on.
        signed: SignedRecord,
    },
    /// A peer has connected for datagrams.
    Datagrams(Box<DatagramStream>),
}

/// All streams. They are closed when it is dropped.
pub struct Streams {
    shared: Arc<Shared>,
    peers: Mutex<Peers>,
    listeners: Vec<JoinHandle<()>>,
    #[cfg(test)]
    local_addr: SocketAddr,
}

#[derive(Default)]
struct Peers {
    outbound: BTreeMap<NodeId, Arc<Outbound>>,
    lending: Lending,
    tasks: JoinSet<()>,
}

/// The state that all streams share.
struct Shared {
    transport: Arc<dyn Transport>,
    identity: Arc<Identity>,
    keyring: Mutex<Arc<Keyring>>,
    record: Mutex<SignedRecord>,
    events: mpsc::Sender<StreamEvent>,
    inbound: Inbound,
    ways: Mutex<Ways>,
    /// The addresses of all peers.
    addresses: Mutex<BTreeMap<NodeId, SocketAddr>>,
    /// Where hosts are dialled that are not dialled at the address that they are known by.
    ends: Mutex<BTreeMap<SocketAddr, SocketAddr>>,
    passed: Passed,
    lent: Lent,
    /// Whether others cannot dial this host, so that it lends connections.
    behind_nat: bool,
    /// The number of dialled connections, without those that are being closed to rest.
    open: AtomicUsize,
}

impl Shared {
    fn record(&self) -> SignedRecord {
        self.record.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn ways(&self) -> MutexGuard<'_, Ways> {
        self.ways.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn address_of(&self, peer: NodeId) -> Option<SocketAddr> {
        self.addresses.lock().unwrap_or_else(PoisonError::into_inner).get(&peer).copied()
    }

    fn ends(&self) -> MutexGuard<'_, BTreeMap<SocketAddr, SocketAddr>> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the listener the addresses of peers.
    fn know_sources(&self) {
        let mut sources: HashSet<IpAddr> = self.ends().values().map(SocketAddr::ip).collect();
        let addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner);
        sources.extend(addresses.values().map(SocketAddr::ip));
        self.inbound.set_peers(sources);
    }

    fn keyring(&self) -> Arc<Keyring> {
        Arc::clone(&self.keyring.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Streams {
    /// Starts to listen. No peer is dialled until [`Self::set_peers`].
    ///
    /// # Errors
    ///
    /// The address cannot be bound.
    pub async fn start(config: StreamsConfig, events: mpsc::Sender<StreamEvent>) -> anyhow::Result<Self> {
        let StreamsConfig { listen, listen_also, identity, keyring, record, transport, behind_nat } = config;
        let open = |at: SocketAddr| {
            let listener = transport.listen(at);
            listener.with_context(|| format!("cannot listen for streams on {at} (TCP)"))
        };
        let listener = open(listen)?;
        #[cfg(test)]
        let local_addr = listener.local_addr()?;
        let listeners: Vec<_> =
            [Ok(listener)].into_iter().chain(listen_also.map(open)).collect::<anyhow::Result<_>>()?;
        let (record, keyring, inbound) = (Mutex::new(record), Mutex::new(keyring), Inbound::default());
        let open = AtomicUsize::new(0);
        let (ways, addresses, passed) = (Mutex::default(), Mutex::default(), Passed::default());
        let shared = Arc::new(Shared {
            transport,
            identity,
            keyring,
            record,
            events,
            inbound,
            ways,
            addresses,
            ends: Mutex::default(),
            passed,
            lent: Lent::default(),
            behind_nat,
            open,
        });
        let listeners = listeners
            .into_iter()
            .map(|listener| tokio::spawn(inbound::run(listener, Arc::clone(&shared))))
            .collect();
        Ok(Self {
            shared,
            peers: Mutex::default(),
            listeners,
            #[cfg(test)]
            local_addr,
        })
    }

    /// Checks whether the daemon at an address has the identity of the local host. Only then is a clash real.
    pub fn is_us(&self, addr: SocketAddr) -> impl Future<Output = bool> + Send + use<> {
        let shared = Arc::clone(&self.shared);
        async move {
            let ask = async {
                let mut stream = shared.connect(addr).await?;
                let keyring = shared.keyring();
                let record = shared.record();
                noise::dial(&mut *stream, keyring.sealing(), &shared.identity, &record, Purpose::Messages)
                    .await
            };
            let answer = tokio::time::timeout(Duration::from_secs(5), ask).await;
            matches!(answer, Ok(Ok(secured)) if secured.record.id == shared.identity.id())
        }
    }

    /// Sets the record that later handshakes send.
    pub fn set_record(&self, record: SignedRecord) {
        *self.shared.record.lock().unwrap_or_else(PoisonError::into_inner) = record;
    }

    /// Replaces the cluster keys: the first one dials new streams, and all are accepted. Dialled streams with another
    /// of these keys are replaced by new ones without losing a message. Streams with any other key are closed.
    pub fn set_keyring(&self, keyring: Arc<Keyring>) {
        *self.shared.keyring.lock().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&keyring);
        self.shared.inbound.set_keyring(&keyring);
        for peer in self.lock().outbound.values() {
            peer.set_keyring(&keyring);
        }
    }

    /// Sets the peers to dial, and their addresses. Streams to other peers are closed.
    pub fn set_peers(&self, wanted: BTreeMap<NodeId, SocketAddr>) {
        *self.shared.addresses.lock().unwrap_or_else(PoisonError::into_inner) = wanted.clone();
        self.shared.know_sources();
        let mut peers = self.lock();
        let Peers { outbound, lending, tasks } = &mut *peers;
        let is_own = |node: &NodeId| *node == self.shared.identity.id();
        if self.shared.behind_nat {
            let dialled = wanted.iter().filter(|(node, at)| !is_own(node) && named_by(at.ip()).is_none());
            lending.set(&dialled.map(|(_, at)| *at).collect(), &self.shared);
        }
        self.shared.lent.retain(|node| wanted.contains_key(&node));
        outbound.retain(|node, peer| {
            let keep = wanted.contains_key(node);
            if !keep {
                peer.end(Shutdown::Now);
            }
            keep
        });
        for (node, addr) in wanted {
            if is_own(&node) {
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

    /// Sets where hosts are dialled that are not dialled at the address that they are known by. Open streams stay.
    pub fn set_ends(&self, ends: BTreeMap<SocketAddr, SocketAddr>) {
        *self.shared.ends() = ends;
        self.shared.know_sources();
    }

    /// Sets the ways to hosts. A stream to a host that is reached by another way now is dialled again: at once if it goes through a
    /// member now, and without losing a message if it is direct again.
    pub fn set_ways(&self, ways: Ways) {
        let mut current = self.shared.ways();
        let before = std::mem::replace(&mut *current, ways.clone());
        drop(current);
        for (node, peer) in &self.lock().outbound {
            let through = ways.through.get(node).copied();
            if before.through.get(node).copied() != through {
                peer.turn(through);
            }
        }
    }

    /// The number of streams of other hosts that are being passed on.
    pub fn passed_on(&self) -> usize {
        self.shared.passed.counts().values().sum()
    }

    /// Dials a peer now if it is not connected, regardless of the backoff.
    pub fn kick(&self, node: NodeId) {
        if let Some(peer) = self.lock().outbound.get(&node)
            && !peer.is_connected()
        {
            peer.kick();
        }
    }

    /// Notes that a host behind NAT is at another address now, so that the connections that it has lent are lost, also those that are used
    /// for streams which are passed on to it.
    pub fn moved(&self, node: NodeId) {
        self.shared.lent.forget(node);
        self.shared.passed.moved(node);
        if let Some(peer) = self.lock().outbound.get(&node) {
            peer.moved();
        }
    }

    /// Notes that a peer runs with the generation of its record, so that a stream which rests does not go on where an earlier
    /// run ended.
    pub fn met(&self, node: NodeId, generation: u64) {
        if let Some(peer) = self.lock().outbound.get(&node) {
            peer.met(generation);
        }
    }

    /// Queues a message. Returns false if there is no connected stream to the peer.
    pub fn send(&self, to: NodeId, message: &Message) -> bool {
        let Some(peer) = self.lock().outbound.get(&to).map(Arc::clone) else { return false };
        peer.is_connected() && encode(message).is_some_and(|bytes| peer.send(bytes))
    }

    /// Queues a message for all connected peers. Returns their number.
    pub fn broadcast(&self, message: &Message) -> usize {
        let connected: Vec<_> =
            self.lock().outbound.values().filter(|peer| peer.is_connected()).map(Arc::clone).collect();
        if connected.is_empty() {
            return 0;
        }
        let Some(bytes) = encode(message) else { return 0 };
        connected.iter().filter(|peer| peer.send(bytes.clone())).count()
    }

    /// The peers with a connected stream.
    pub fn connected(&self) -> BTreeSet<NodeId> {
        let peers = self.lock();
        peers.outbound.iter().filter(|(_, peer)| peer.is_connected()).map(|(node, _)| *node).collect()
    }

    /// The address that it listens on, for tests that let the kernel choose the port.
    #[cfg(test)]
    fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Writes queued messages for up to one second, then closes all streams. Until it returns, events must be received
    /// or have room in their channel.
    pub async fn shutdown(mut self) {
        let mut tasks = {
            let mut peers = self.lock();
            for peer in peers.outbound.values() {
                peer.end(Shutdown::Flushed);
            }
            std::mem::take(&mut peers.tasks)
        };
        let flushed = tokio::time::timeout(FLUSH, async { while tasks.join_next().await.is_some() {} }).await;
        if flushed.is_err() {
            tracing::debug!("cannot write all queued messages before the shutdown");
        }
        tasks.shutdown().await;
        for listener in &mut self.listeners {
            listener.abort();
            // Wait for the task, so that the port is free when this returns.
            if let Err(error) = listener.await
                && !error.is_cancelled()
            {
                error!(%error, "the listener for streams has failed");
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Peers> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.listeners.iter().for_each(JoinHandle::abort);
    }
}

fn encode(message: &Message) -> Option<Bytes> {
    match wire::encode(message) {
        Ok(bytes) if bytes.len() <= wire::MAX_FRAME => Some(bytes.into()),
        Ok(bytes) => {
            error!(length = bytes.len(), "cannot send a message: it is too large");
            None
        }
        Err(error) => {
            error!(%error, "cannot encode a message");
            None
        }
    }
}

#[cfg(test)]
mod tests;
