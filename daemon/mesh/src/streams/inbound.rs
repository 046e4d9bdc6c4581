//! Streams that others dial: accepted, authenticated, read.

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
use super::noise::Secured;
use super::{HANDSHAKE, LinkEvent, Shared, noise};
use crate::gossip::Strangers;
use crate::keys::Keyring;
use crate::transport::{Listener, Stream};

/// Connections that have not yet said who they are: in all, and from one address.
const MAX_UNKNOWN: usize = 64;
const MAX_UNKNOWN_PER_SOURCE: usize = 16;
/// Connections that have.
const MAX_KNOWN: usize = 4096;

/// Who is connected to us.
#[derive(Default)]
pub(super) struct Inbound {
    /// Ends the connection of a node when a newer one replaces it, or its cluster key is dropped.
    known: Mutex<BTreeMap<NodeId, (ClusterKeyId, Arc<Notify>)>>,
    unknown: Mutex<HashMap<IpAddr, usize>>,
    strangers: Mutex<Strangers>,
}

/// Counts a connection as unknown for as long as it lives.
struct Unknown<'a> {
    inbound: &'a Inbound,
    source: IpAddr,
}

impl Inbound {
    fn admit(&self, source: IpAddr) -> Option<Unknown<'_>> {
        let mut unknown = self.unknown.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = unknown.values().sum();
        let own = unknown.entry(source).or_default();
        if all >= MAX_UNKNOWN || *own >= MAX_UNKNOWN_PER_SOURCE {
            return None;
        }
        *own += 1;
        Some(Unknown { inbound: self, source })
    }

    /// The connection of this node from now on; what it gets tells when it is no more.
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

    /// Ends all connections that a key has opened which is not in use any more.
    pub(super) fn set_keyring(&self, keyring: &Keyring) {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        for (_, ends) in known.values().filter(|(key, _)| keyring.get(*key).is_none()) {
            ends.notify_one();
        }
    }

    fn stranger(&self, from: SocketAddr, error: &anyhow::Error) {
        let worth =
            self.strangers.lock().unwrap_or_else(PoisonError::into_inner).note(from.ip(), Instant::now());
        if worth {
            warn!(source = %from, "a sync stream is refused: {error:#} (said at most once a minute for a source)");
        }
    }
}

impl Drop for Unknown<'_> {
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

/// Accepts for ever.
pub(super) async fn run(listener: Box<dyn Listener>, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        match poll_fn(|context| listener.poll_accept(context)).await {
            Ok((stream, from)) => {
                connections.spawn(connection(stream, from, Arc::clone(&shared)));
            }
            Err(error) => {
                // Out of descriptors, or reset before it was accepted: it passes.
                debug!(%error, "cannot accept a stream");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

async fn connection(mut stream: Box<dyn Stream>, from: SocketAddr, shared: Arc<Shared>) {
    let Some(unknown) = shared.inbound.admit(from.ip()) else {
        shared.inbound.stranger(from, &anyhow::anyhow!("too many connections do not say who they are"));
        return;
    };
    let handshake = async {
        stream.tune()?;
        noise::listen(&mut *stream, &shared.keyring(), &shared.identity, &shared.record()).await
    };
    let secured = match timeout(HANDSHAKE, handshake).await {
        Ok(Ok(secured)) => secured,
        Ok(Err(error)) => return shared.inbound.stranger(from, &error),
        Err(_) => return shared.inbound.stranger(from, &anyhow::anyhow!("it does not finish the handshake")),
    };
    drop(unknown);
    let node = secured.record.id;
    if node == shared.identity.id() {
        return shared.inbound.stranger(from, &anyhow::anyhow!("it has this node's own key"));
    }
    let Some(replaced) = shared.inbound.enter(node, secured.key) else {
        return shared.inbound.stranger(from, &anyhow::anyhow!("too many nodes are connected"));
    };
    if shared.keyring().get(secured.key).is_none() {
        // Dropped while it shook hands.
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
            // It will dial again and say it again: somebody must hear of it.
            shared.inbound.stranger(from, &error);
        }
        debug!(peer = %node, "incoming stream: {error:#}");
    }
}

async fn read(mut stream: Box<dyn Stream>, secured: Secured, shared: &Shared) -> anyhow::Result<()> {
    let Secured { mut noise, key, record, signed } = secured;
    let from = record.id;
    let gone = || anyhow::anyhow!("nobody listens to links any more");
    shared.events.send(LinkEvent::Record { record, signed }).await.map_err(|_| gone())?;
    let mut arrived = BytesMut::with_capacity(4096);
    let mut opening = Opening::default();
    loop {
        while let Some(bytes) = opening.next(&mut noise, &mut arrived)? {
            let message = wire::decode(&bytes).context("it says what this version does not understand")?;
            shared.events.send(LinkEvent::Message { from, key, message }).await.map_err(|_| gone())?;
        }
        arrived.reserve(4096);
        let length = stream.read_buf(&mut arrived).await?;
        if length == 0 {
            ensure!(arrived.is_empty(), "closed in the middle of a frame");
            bail!("closed by the peer");
        }
    }
}
