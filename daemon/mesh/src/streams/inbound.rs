//! Accepted streams: authenticates and reads them.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::future::poll_fn;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::BytesMut;
use ovl_proto::id::{ClusterKeyId, NodeId};
use ovl_proto::wire::{self, WireError};
use tokio::io::AsyncReadExt;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tracing::{debug, warn};

use super::frame::Opening;
use super::noise::{AuthenticatedStream, Purpose};
use super::{HANDSHAKE, Shared, StreamEvent, datagrams, noise, relayed};
use crate::gossip::Strangers;
use crate::keys::Keyring;
use crate::transport::{Listener, Side, Stream};

/// The maximum number of unauthenticated connections from addresses that are not those of peers.
const MAX_UNKNOWN: usize = 64;
/// The maximum number of unauthenticated connections from one source.
const MAX_UNKNOWN_PER_SOURCE: usize = 16;
/// The maximum number of unauthenticated connections from the address of one peer, besides [`MAX_UNKNOWN`].
const MAX_PER_PEER: usize = 4;
/// The maximum number of authenticated connections.
const MAX_KNOWN: usize = 4096;

/// The accepted connections.
#[derive(Default)]
pub(super) struct Inbound {
    /// For each host, the cluster key of its connection, and the notification that closes it: because a newer connection
    /// replaces it, or the key is dropped.
    known: Mutex<BTreeMap<NodeId, (ClusterKeyId, Arc<Notify>)>>,
    unknown: Mutex<Unknown>,
    strangers: Mutex<Strangers>,
}

/// The unauthenticated connections.
#[derive(Default)]
struct Unknown {
    /// The addresses of peers, which have places of their own.
    peers: HashSet<IpAddr>,
    /// The oldest is first.
    places: VecDeque<Place>,
    next: u64,
}

/// The place of an unauthenticated connection.
struct Place {
    number: u64,
    source: IpAddr,
    is_peer: bool,
    /// Closes the connection, because a newer one needs the place.
    ends: Arc<Notify>,
}

impl Unknown {
    /// Takes a place. If there is none left, the oldest connection that competes for it is closed: from the same source
    /// if it has too many, otherwise from any address that is not that of a peer. So outsiders that keep silent cannot
    /// keep others out.
    fn enter(&mut self, address: IpAddr) -> (u64, Arc<Notify>) {
        let (source, is_peer) = (source(address), self.peers.contains(&address));
        let source = if is_peer { address } else { source };
        let own = |place: &Place| place.is_peer == is_peer && place.source == source;
        let most = if is_peer { MAX_PER_PEER } else { MAX_UNKNOWN_PER_SOURCE };
        if self.places.iter().filter(|place| own(place)).count() >= most {
            self.close_oldest(own);
        }
        let unknown = |place: &Place| !place.is_peer;
        if !is_peer && self.places.iter().filter(|place| unknown(place)).count() >= MAX_UNKNOWN {
            self.close_oldest(unknown);
        }
        let (number, ends) = (self.next, Arc::new(Notify::new()));
        self.next += 1;
        self.places.push_back(Place { number, source, is_peer, ends: Arc::clone(&ends) });
        (number, ends)
    }

    fn close_oldest(&mut self, which: impl Fn(&Place) -> bool) {
        if let Some(at) = self.places.iter().position(which)
            && let Some(oldest) = self.places.remove(at)
        {
            oldest.ends.notify_one();
        }
    }
}

/// What counts as one source: an IPv4 address, or an IPv6 /64, in which anybody has as many addresses as he wants.
fn source(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => IpAddr::from((u128::from(v6) >> 64 << 64).to_be_bytes()),
    }
}

/// Counts a connection as unauthenticated until it is dropped.
struct UnauthenticatedGuard<'a> {
    inbound: &'a Inbound,
    number: u64,
    ends: Arc<Notify>,
}

impl Inbound {
    /// Counts a new connection, and closes an older one if there are too many.
    fn admit(&self, address: IpAddr) -> UnauthenticatedGuard<'_> {
        let (number, ends) = self.unknown().enter(address);
        UnauthenticatedGuard { inbound: self, number, ends }
    }

    /// Sets the addresses of peers, which have places of their own.
    pub(super) fn set_peers(&self, peers: HashSet<IpAddr>) {
        self.unknown().peers = peers;
    }

    fn unknown(&self) -> MutexGuard<'_, Unknown> {
        self.unknown.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.inbound.unknown().places.retain(|place| place.number != self.number);
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
    let unknown = shared.inbound.admit(from.ip());
    let handshake = async {
        stream.tune(Side::Accepted)?;
        noise::listen(&mut *stream, &shared.keyring(), &shared.identity, &shared.record()).await
    };
    let handshake = async {
        tokio::select! {
            secured = handshake => secured,
            () = unknown.ends.notified() => Err(anyhow::anyhow!("too many unauthenticated connections")),
        }
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
    serve(stream, secured, from, &shared).await;
}

/// Serves a connection of an authenticated host until it ends.
pub(super) async fn serve(
    stream: Box<dyn Stream>,
    secured: AuthenticatedStream,
    from: SocketAddr,
    shared: &Shared,
) {
    let node = secured.record.id;
    if node == shared.identity.id() {
        return shared.inbound.stranger(from, &anyhow::anyhow!("the peer has the identity of this host"));
    }
    match secured.purpose {
        Purpose::Messages => {}
        Purpose::Lend => return shared.lent.put(node, stream),
        Purpose::Datagrams(kind) => return datagrams::accept(stream, secured, (kind, from), shared).await,
        Purpose::Onward(onward) => {
            if let Err(error) = relayed::pass_on(stream, secured, onward, shared).await {
                debug!(peer = %node, "stream that is passed on closed: {error:#}");
            }
            return;
        }
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
        ended = read(stream, secured, shared) => ended,
    };
    shared.inbound.leave(node, &replaced);
    if let Err(error) = ended {
        if error.is::<WireError>() {
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
    let AuthenticatedStream { mut noise, key, record, signed, purpose: _ } = secured;
    let from = record.id;
    let gone = || anyhow::anyhow!("the receiver of stream events was dropped");
    shared.events.send(StreamEvent::Record { record, signed }).await.map_err(|_| gone())?;
    let mut arrived = BytesMut::with_capacity(4096);
    let mut opening = Opening::default();
    loop {
        while let Some(bytes) = opening.next(&mut noise, &mut arrived)? {
            let event = match wire::decode(&bytes) {
                Ok(message) => StreamEvent::Message { from, key, message },
                Err(WireError::NotUnderstood(what)) => StreamEvent::NotUnderstood { from, what },
                Err(error) => {
                    return Err(error)
                        .context("cannot decode a message: the peer may run another version of ovld");
                }
            };
            shared.events.send(event).await.map_err(|_| gone())?;
        }
        arrived.reserve(4096);
        let length = stream.read_buf(&mut arrived).await?;
        if length == 0 {
            ensure!(arrived.is_empty(), "the peer closed the connection in the middle of a frame");
            bail!("the peer closed the connection");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn silent_outsiders_keep_nobody_out_and_leave_nothing() {
        let inbound = Inbound::default();
        inbound.set_peers([ip("10.0.0.1")].into());
        let outsiders: Vec<_> =
            (0..=255).map(|last| inbound.admit(IpAddr::from([192, 0, 2, last]))).collect();
        assert_eq!(inbound.unknown().places.len(), MAX_UNKNOWN);
        // A host that is not known yet, and one that is.
        let (joining, peer) = (inbound.admit(ip("10.0.0.9")), inbound.admit(ip("10.0.0.1")));
        let held = |guard: &UnauthenticatedGuard<'_>| {
            inbound.unknown().places.iter().any(|place| place.number == guard.number)
        };
        assert!(held(&joining) && held(&peer));
        assert!(!held(&outsiders[192]) && held(&outsiders[255]), "the oldest was closed");
        for _ in 0..1000 {
            drop(inbound.admit(ip("192.0.2.1")));
        }
        assert!(held(&peer), "outsiders do not take the places of peers");
        drop((outsiders, joining, peer));
        assert!(inbound.unknown().places.is_empty());
    }

    #[test]
    fn one_source_has_few_places_and_an_ipv6_network_is_one_source() {
        let inbound = Inbound::default();
        let other = inbound.admit(ip("2001:db8:0:2::1"));
        let many: Vec<_> = (0..1000_u16)
            .map(|last| inbound.admit(IpAddr::from([0x2001, 0xdb8, 0, 1, 0, 0, 0, last])))
            .collect();
        let places = inbound.unknown().places.len();
        assert_eq!(places, 1 + MAX_UNKNOWN_PER_SOURCE);
        assert!(inbound.unknown().places.iter().any(|place| place.number == other.number));
        drop(many);
        assert_eq!(inbound.unknown().places.len(), 1);
    }
}
