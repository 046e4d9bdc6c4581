//! Accepted streams: authenticates and reads them.

use std::collections::{BTreeMap, HashMap};
use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::BytesMut;
use ovl_proto::id::{ClusterKeyId, NodeId};
use ovl_proto::wire;
use tokio::io::AsyncReadExt;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tracing::{debug, warn};

use super::frame::Opening;
use super::noise::AuthenticatedStream;
use super::{HANDSHAKE, Shared, StreamEvent, noise};
use crate::gossip::Strangers;
use crate::keys::Keyring;
use crate::transport::{Listener, Stream};

/// The maximum number of unauthenticated connections.
const MAX_UNKNOWN: usize = 64;
/// The maximum number of unauthenticated connections from one address.
const MAX_UNKNOWN_PER_SOURCE: usize = 16;
/// The maximum number of authenticated connections.
const MAX_KNOWN: usize = 4096;

/// The accepted connections.
#[derive(Default)]
pub(super) struct Inbound {
    /// For each host, the cluster key of its connection, and the notification that closes it: because a newer connection
    /// replaces it, or the key is dropped.
    known: Mutex<BTreeMap<NodeId, (ClusterKeyId, Arc<Notify>)>>,
    unknown: Mutex<HashMap<IpAddr, usize>>,
    strangers: Mutex<Strangers>,
}

/// Counts a connection as unauthenticated until it is dropped.
struct UnauthenticatedGuard<'a> {
    inbound: &'a Inbound,
    source: IpAddr,
}

impl Inbound {
    /// Counts a new connection. `None` if there are too many unauthenticated ones.
    fn admit(&self, source: IpAddr) -> Option<UnauthenticatedGuard<'_>> {
        let mut unknown = self.unknown.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = unknown.values().sum();
        let own = unknown.entry(source).or_default();
        if all >= MAX_UNKNOWN || *own >= MAX_UNKNOWN_PER_SOURCE {
            return None;
        }
        *own += 1;
        Some(UnauthenticatedGuard { inbound: self, source })
    }

    /// Registers the connection of a host, and closes its older one. Returns the notification that closes the new one;
    /// `None` if there are too many connections.
    fn enter(&self, node: NodeId, key: ClusterKeyId) -> Option<Arc<Notify>> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.len() >= MAX_KNOWN && !known.contains_key(&node) {
            return None;
        }
        let replaced = Arc::new(Notify::new());
        if let Some((_, older)) = known.insert(node, (key, Arc::clone(&replaced))) {
            older.notify_one();
        }
        Some(replaced)
    }

    fn leave(&self, node: NodeId, mine: &Arc<Notify>) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.get(&node).is_some_and(|(_, current)| Arc::ptr_eq(current, mine)) {
            known.remove(&node);
        }
    }

    /// Closes all connections with a key that is not in the keyring.
    pub(super) fn set_keyring(&self, keyring: &Keyring) {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, ends) in known.values().filter(|(key, _)| keyring.get(*key).is_none()) {
            ends.notify_one();
        }
    }

    /// Logs a refused connection, at most once a minute per source.
    fn stranger(&self, from: SocketAddr, error: &anyhow::Error) {
        let worth =
            self.strangers.lock().unwrap_or_else(PoisonError::into_inner).note(from.ip(), Instant::now());
        if worth {
            warn!(source = %from, "refused a stream: {error:#} (logged at most once a minute per source)");
        }
    }
}

impl Drop for UnauthenticatedGuard<'_> {
    fn drop(&mut self) {
        let mut unknown = self.inbound.unknown.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = unknown.get_mut(&self.source) {
            *count -= 1;
            if *count == 0 {
                unknown.remove(&self.source);
            }
        }
    }
}

/// Accepts connections forever.
pub(super) async fn run(listener: Box<dyn Listener>, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        match poll_fn(|context| listener.poll_accept(context)).await {
            Ok((stream, from)) => {
                connections.spawn(connection(stream, from, Arc::clone(&shared)));
            }
            Err(error) => {
                // Temporary: out of descriptors, or the connection was reset before it was accepted.
                debug!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn connection(mut stream: Box<dyn Stream>, from: SocketAddr, shared: Arc<Shared>) {
    let Some(unknown) = shared.inbound.admit(from.ip()) else {
        shared.inbound.stranger(from, &anyhow::anyhow!("too many unauthenticated connections"));
        return;
    };
    let handshake = async {
        stream.tune()?;
        noise::listen(&mut *stream, &shared.keyring(), &shared.identity, &shared.record()).await
    };
    let secured = match timeout(HANDSHAKE, handshake).await {
        Ok(Ok(secured)) => secured,
        Ok(Err(error)) => return shared.inbound.stranger(from, &error),
        Err(_) => {
            return shared
                .inbound
                .stranger(from, &anyhow::anyhow!("the peer did not complete the handshake"));
        }
    };
    drop(unknown);
    let node = secured.record.id;
    if node == shared.identity.id() {
        return shared.inbound.stranger(from, &anyhow::anyhow!("the peer has the identity of this host"));
    }
    let Some(replaced) = shared.inbound.enter(node, secured.key) else {
        return shared.inbound.stranger(from, &anyhow::anyhow!("too many hosts are connected"));
    };
    if shared.keyring().get(secured.key).is_none() {
        // The key was dropped during the handshake.
        replaced.notify_one();
    }
    let ended = tokio::select! {
        biased;
        () = replaced.notified() => Ok(()),
        ended = read(stream, secured, &shared) => ended,
    };
    shared.inbound.leave(node, &replaced);
    if let Err(error) = ended {
        if error.is::<wire::WireError>() {
            // The peer will dial and send the message again, so an administrator must see it.
            shared.inbound.stranger(from, &error);
        }
        debug!(peer = %node, "incoming stream closed: {error:#}");
    }
}

async fn read(
    mut stream: Box<dyn Stream>,
    secured: AuthenticatedStream,
    shared: &Shared,
) -> anyhow::Result<()> {
    let AuthenticatedStream { mut noise, key, record, signed } = secured;
    let from = record.id;
    let gone = || anyhow::anyhow!("the receiver of stream events was dropped");
    shared.events.send(StreamEvent::Record { record, signed }).await.map_err(|_| gone())?;
    let mut arrived = BytesMut::with_capacity(4096);
    let mut opening = Opening::default();
    loop {
        while let Some(bytes) = opening.next(&mut noise, &mut arrived)? {
            let message = wire::decode(&bytes)
                .context("cannot decode a message: the peer may run another version of ovld")?;
            shared.events.send(StreamEvent::Message { from, key, message }).await.map_err(|_| gone())?;
        }
        arrived.reserve(4096);
        let length = stream.read_buf(&mut arrived).await?;
        if length == 0 {
            ensure!(arrived.is_empty(), "the peer closed the connection in the middle of a frame");
            bail!("the peer closed the connection");
        }
    }
}
