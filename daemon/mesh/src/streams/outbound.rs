//! Dialled streams: one task and one queue for each peer.
//!
//! Connections cost each host two descriptors for each peer, and the probes that find a lost one. So beyond the first
//! [`KEPT`], an idle stream *rests*: its connection is closed, and the next message dials again. The stream is up all the
//! time for the daemon, which learns only if that fails.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use ovl_proto::id::{ClusterKeyId, NodeId};
use ovl_proto::record::named_by;
use ring::rand::{SecureRandom as _, SystemRandom};
use snow::TransportState;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tracing::{debug, warn};

use super::frame::Sealing;
use super::noise::{self, AuthenticatedStream, Purpose};
use super::relayed;
use super::{HANDSHAKE, Shared, StreamEvent};
use crate::keys::{ClusterKey, Keyring};
use crate::transport::Stream;

/// The maximum size of a queue in bytes. If it is exceeded, the stream is closed and dialled again.
const MAX_QUEUE: usize = 16 << 20;
/// The number of bytes that are sealed before a write: many small messages, or some chunks of a large one.
const BATCH: usize = 256 << 10;
/// The capacity of the write buffer that is kept while the stream is idle.
const KEEP_CAPACITY: usize = 16 << 10;
/// The number of dialled connections that stay open while they are idle.
const KEPT: usize = if cfg!(test) { 1 } else { 16 };
/// The time without a message after which a stream may rest.
const REST_AFTER: Duration = Duration::from_millis(if cfg!(test) { 500 } else { 60_000 });
const MIN_BACKOFF: Duration = Duration::from_millis(50);
const MAX_BACKOFF: Duration = Duration::from_secs(2);
/// After a stream that lasted this long, the backoff is reset.
const RESET_BACKOFF_AFTER: Duration = Duration::from_secs(5);
/// How long the peer may take to read the rest of a connection through a member. That may be gone, and nothing goes on before.
const CLOSE_RELAYED: Duration = Duration::from_secs(1);
/// How long a handshake on a connection that was lent may take.
const LENT: Duration = Duration::from_secs(2);
const WARN_EVERY: Duration = Duration::from_secs(60);

/// The dialled stream to one peer.
pub(super) struct Outbound {
    node: NodeId,
    queue: Mutex<Queue>,
    /// Wakes the task: there is something to write, or the task must end.
    wake: Notify,
    /// Closes the connection.
    halt: Notify,
    /// Ends the backoff: dial now.
    kick: Notify,
}

struct Queue {
    addr: SocketAddr,
    /// Whether messages are accepted.
    connected: bool,
    /// Whether there is no connection although it is connected.
    resting: bool,
    /// The generation of the peer's record in the last handshake.
    generation: u64,
    /// The cluster key of the connection.
    key: ClusterKeyId,
    /// The member through which the connection goes.
    through: Option<SocketAddr>,
    /// Whether the connection must be replaced by one with another key, or without a member, once the queue is written.
    renew: bool,
    messages: VecDeque<Bytes>,
    bytes: usize,
    end: Option<Shutdown>,
}

/// How the task of a stream ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shutdown {
    /// After the queue is written.
    Flushed,
    /// At once.
    Now,
}

impl Outbound {
    pub(super) fn new(node: NodeId, addr: SocketAddr) -> Self {
        let queue = Queue {
            addr,
            connected: false,
            resting: false,
            generation: 0,
            key: ClusterKeyId::default(),
            through: None,
            renew: false,
            messages: VecDeque::new(),
            bytes: 0,
            end: None,
        };
        Self { node, queue: Mutex::new(queue), wake: Notify::new(), halt: Notify::new(), kick: Notify::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_connected(&self) -> bool {
        self.lock().connected
    }

    pub(super) fn kick(&self) {
        self.kick.notify_one();
    }

    /// Sets the address of the peer. A connection to another address is closed, and an attempt to open one ends.
    pub(super) fn set_addr(&self, addr: SocketAddr) {
        let mut queue = self.lock();
        if queue.addr != addr {
            queue.addr = addr;
            drop(queue);
            self.moved();
        }
    }

    /// Sets the address of the peer without closing its connection.
    #[cfg(test)]
    pub(super) fn replace_addr(&self, addr: SocketAddr) {
        self.lock().addr = addr;
    }

    /// Notes that the peer has moved: its connection is closed, and it is dialled at once.
    pub(super) fn moved(&self) {
        if !self.lock().resting {
            self.halt.notify_one();
        }
        self.kick.notify_one();
    }

    /// Notes that the peer is reached through another member now, or directly.
    pub(super) fn turn(&self, through: Option<SocketAddr>) {
        let mut queue = self.lock();
        if queue.resting || (queue.connected && queue.through == through) {
            return;
        }
        if queue.connected && through.is_none() {
            queue.renew = true;
            self.wake.notify_one();
        } else {
            // The way of the connection, or of the attempt to open one, is cut.
            self.halt.notify_one();
            self.kick.notify_one();
        }
    }

    /// Applies new cluster keys: a connection with a key that no longer seals is replaced, and one with an unknown key is
    /// closed.
    pub(super) fn set_keyring(&self, keyring: &Keyring) {
        let mut queue = self.lock();
        // One that rests is dialled with the new keys.
        if !queue.connected || queue.resting {
            return;
        }
        if keyring.get(queue.key).is_none() {
            self.halt.notify_one();
        } else if queue.key != keyring.sealing().id() {
            queue.renew = true;
            self.wake.notify_one();
        }
    }

    pub(super) fn end(&self, end: Shutdown) {
        self.lock().end = Some(end);
        self.wake.notify_one();
        self.kick.notify_one();
        if end == Shutdown::Now {
            self.halt.notify_one();
        }
    }

    /// Queues an encoded message. Returns false if the stream is not connected.
    pub(super) fn send(&self, message: Bytes) -> bool {
        let mut queue = self.lock();
        if !queue.connected || queue.end.is_some() {
            return false;
        }
        if queue.bytes + message.len() > MAX_QUEUE && !queue.messages.is_empty() {
            warn!(peer = %self.node, "the queue to a peer is full: the stream is closed and dialled again");
            if !queue.resting {
                self.halt.notify_one();
            }
            queue.disconnect();
            self.wake.notify_one();
            return false;
        }
        queue.bytes += message.len();
        queue.messages.push_back(message);
        self.wake.notify_one();
        true
    }

    /// Notes that the peer runs with a generation. If it was started again while the stream rests, the stream has failed.
    pub(super) fn met(&self, generation: u64) {
        let mut queue = self.lock();
        if queue.resting && queue.generation != generation {
            queue.disconnect();
            self.wake.notify_one();
        }
    }

    /// Notes a new connection. The keyring may have changed during the handshake, and the way to the peer.
    fn connected(&self, shared: &Shared, dialled: &Dialled) {
        let key = dialled.secured.key;
        {
            let mut queue = self.lock();
            queue.connected = true;
            queue.resting = false;
            queue.generation = dialled.secured.record.generation;
            queue.key = key;
            queue.through = dialled.through;
            queue.renew = dialled.through.is_some() && !shared.ways().through.contains_key(&self.node);
        }
        if shared.keyring().get(key).is_none() {
            self.halt.notify_one();
        }
    }

    fn pop(&self) -> Option<Bytes> {
        let mut queue = self.lock();
        let message = queue.messages.pop_front()?;
        queue.bytes -= message.len();
        Some(message)
    }

    fn ends(&self) -> Option<Shutdown> {
        self.lock().end
    }

    fn rests(&self) -> bool {
        self.lock().resting
    }

    /// Completes when a stream that rests must be dialled, has failed, or must end. It must be the only waiter for `wake`.
    async fn roused(&self) {
        loop {
            {
                let queue = self.lock();
                if !queue.resting || !queue.messages.is_empty() || queue.end.is_some() {
                    return;
                }
            }
            self.wake.notified().await;
        }
    }

    /// Completes when the task must end. It must be the only waiter for `wake`.
    async fn ended(&self) {
        while self.ends().is_none() {
            self.wake.notified().await;
        }
    }
}

impl Shared {
    /// Takes an open connection out of the count, unless as few are left as stay open.
    fn take_rest(&self) -> bool {
        let fewer = |open: usize| (open > KEPT).then(|| open - 1);
        self.open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fewer).is_ok()
    }
}

impl Queue {
    fn disconnect(&mut self) {
        self.connected = false;
        self.resting = false;
        self.messages.clear();
        self.bytes = 0;
    }
}

/// Dials the peer and serves its stream until the task must end.
pub(super) async fn run(peer: Arc<Outbound>, shared: Arc<Shared>) {
    let mut backoff = MIN_BACKOFF;
    let mut warned: Option<Instant> = None;
    while peer.ends().is_none() {
        let rested = peer.rests();
        if rested {
            peer.roused().await;
            if peer.ends().is_some() {
                return;
            }
        }
        // It does not rest any more if it has failed meanwhile.
        let resumes = peer.rests();
        if rested && !resumes && shared.events.send(StreamEvent::Down(peer.node)).await.is_err() {
            return;
        }
        let addr = peer.lock().addr;
        let start = Instant::now();
        // One behind NAT that is reached directly has dialled already, and lends another connection soon if that one is lost.
        let is_lent = named_by(addr.ip()).is_some() && !shared.ways().through.contains_key(&peer.node);
        let patience = if is_lent { LENT } else { HANDSHAKE };
        let dialled = tokio::select! {
            dialled = timeout(patience, dial(&peer, &shared, addr)) => dialled,
            () = peer.halt.notified() => {
                Ok(Err(DialError::Connect(anyhow::anyhow!("it is reached by another way now"))))
            }
            () = peer.ended() => return,
        };
        let result = match dialled {
            Ok(Ok(dialled)) => {
                let result = serve(&peer, &shared, dialled, resumes).await;
                if matches!(result, Ok(WriteEnd::Rest)) {
                    continue;
                }
                if start.elapsed() > RESET_BACKOFF_AFTER {
                    backoff = MIN_BACKOFF;
                }
                result.map(drop)
            }
            Ok(Err(DialError::Connect(error))) => Err(error),
            Ok(Err(DialError::Handshake(error))) => {
                // Another host, or a host without the cluster key, listens at the address.
                if warned.is_none_or(|last| last.elapsed() > WARN_EVERY) {
                    warned = Some(Instant::now());
                    warn!(peer = %peer.node, %addr, "cannot open a stream to the peer: {error:#} (logged at most once a minute)");
                }
                Err(error)
            }
            Err(_) => Err(anyhow::anyhow!("no answer within {patience:?}")),
        };
        if peer.rests() {
            // It could not be dialled again.
            peer.lock().disconnect();
            if shared.events.send(StreamEvent::Down(peer.node)).await.is_err() {
                return;
            }
        }
        if let Err(error) = result {
            debug!(peer = %peer.node, %addr, "outgoing stream closed: {error:#}");
        }
        if peer.ends().is_some() {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(jitter(backoff)) => backoff = (backoff * 2).min(MAX_BACKOFF),
            () = peer.kick.notified() => backoff = MIN_BACKOFF,
            () = lent_again(&shared, peer.node), if is_lent => {}
        }
    }
}

/// Completes a moment after a host behind NAT has lent another connection.
async fn lent_again(shared: &Shared, host: NodeId) {
    tokio::time::sleep(MIN_BACKOFF).await;
    shared.lent.came(host).await;
}

enum DialError {
    Connect(anyhow::Error),
    Handshake(anyhow::Error),
}

/// A new connection.
struct Dialled {
    stream: Box<dyn Stream>,
    secured: AuthenticatedStream,
    /// The member through which it goes.
    through: Option<SocketAddr>,
}

/// Dials with each key until the peer accepts one: a peer that joined late or was away does not have all of them.
async fn dial(peer: &Outbound, shared: &Shared, addr: SocketAddr) -> Result<Dialled, DialError> {
    let keyring = shared.keyring();
    let mut keys = keyring.all();
    let mut result = dial_with(peer, shared, addr, keyring.sealing()).await;
    keys.next();
    for key in keys {
        if !matches!(result, Err(DialError::Handshake(_))) {
            break;
        }
        if let Ok(good) = dial_with(peer, shared, addr, key).await {
            result = Ok(good);
        }
    }
    result
}

async fn dial_with(
    peer: &Outbound,
    shared: &Shared,
    addr: SocketAddr,
    key: &ClusterKey,
) -> Result<Dialled, DialError> {
    let connecting = relayed::connect(shared, peer.node, addr, key);
    let (mut stream, through) = connecting.await.map_err(DialError::Connect)?;
    let record = shared.record();
    let secured = noise::dial(&mut *stream, key, &shared.identity, &record, Purpose::Messages)
        .await
        .map_err(DialError::Handshake)?;
    if secured.record.id != peer.node {
        let other = format!("another host answers: {} ({})", secured.record.name, secured.record.id);
        return Err(DialError::Handshake(anyhow::anyhow!(other)));
    }
    Ok(Dialled { stream, secured, through })
}

/// Serves a connected stream until it is closed or rests. `resumes` says whether it has rested, and is up.
async fn serve(
    peer: &Outbound,
    shared: &Shared,
    dialled: Dialled,
    resumes: bool,
) -> anyhow::Result<WriteEnd> {
    let generation = dialled.secured.record.generation;
    let is_same_run = peer.lock().generation == generation;
    if resumes && !is_same_run && shared.events.send(StreamEvent::Down(peer.node)).await.is_err() {
        return Ok(WriteEnd::All);
    }
    let resumes = resumes && is_same_run;
    if !resumes {
        peer.lock().disconnect();
    }
    peer.connected(shared, &dialled);
    let told = resumes || shared.events.send(StreamEvent::Up(peer.node)).await.is_ok();
    shared.open.fetch_add(1, Ordering::Relaxed);
    let result = match told {
        true => write_on(peer, shared, dialled.stream, dialled.secured.noise).await,
        false => Ok(WriteEnd::All),
    };
    if matches!(result, Ok(WriteEnd::Rest)) {
        peer.lock().resting = true;
        return result;
    }
    shared.open.fetch_sub(1, Ordering::Relaxed);
    peer.lock().disconnect();
    if shared.events.send(StreamEvent::Down(peer.node)).await.is_err() {
        debug!("the receiver of stream events was dropped");
    }
    result
}

/// Writes the queue, over several connections if the key or the way changes: a connection is replaced after the peer has read
/// everything on it, so that no message is lost and the stream stays up.
async fn write_on(
    peer: &Outbound,
    shared: &Shared,
    mut stream: Box<dyn Stream>,
    mut noise: TransportState,
) -> anyhow::Result<WriteEnd> {
    loop {
        let end = write(peer, shared, stream, noise).await?;
        if end != WriteEnd::Renew {
            return Ok(end);
        }
        let addr = peer.lock().addr;
        let dialled = match timeout(HANDSHAKE, dial(peer, shared, addr)).await {
            Ok(Ok(dialled)) => dialled,
            Ok(Err(DialError::Connect(error) | DialError::Handshake(error))) => {
                return Err(error.context("cannot replace the stream by a new one"));
            }
            Err(_) => bail!("cannot replace the stream by a new one: no answer within {HANDSHAKE:?}"),
        };
        peer.connected(shared, &dialled);
        (stream, noise) = (dialled.stream, dialled.secured.noise);
    }
}

/// The reason why writing to a connection ended.
#[derive(Debug, PartialEq, Eq)]
enum WriteEnd {
    /// The task must end.
    All,
    /// Another connection replaces it.
    Renew,
    /// It is idle, and there are enough others.
    Rest,
}

async fn write(
    peer: &Outbound,
    shared: &Shared,
    stream: Box<dyn Stream>,
    mut noise: TransportState,
) -> anyhow::Result<WriteEnd> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut buffer = Vec::new();
    let mut current: Option<Sealing> = None;
    let mut idle = false;
    loop {
        buffer.clear();
        while buffer.len() < BATCH {
            let Some(mut sealing) = current.take().or_else(|| peer.pop().map(Sealing::new)) else { break };
            if sealing.chunk(&mut noise, &mut buffer)? {
                current = Some(sealing);
            }
        }
        if !buffer.is_empty() {
            tokio::select! {
                written = writer.write_all(&buffer) => written.context("cannot write")?,
                () = peer.halt.notified() => bail!("ended by ourselves"),
            }
            continue;
        }
        buffer.shrink_to(KEEP_CAPACITY);
        if peer.ends() == Some(Shutdown::Flushed) {
            writer.shutdown().await.context("cannot close")?;
            return Ok(WriteEnd::All);
        }
        let renews = peer.lock().renew;
        let rests = !renews && idle && shared.take_rest();
        if renews || rests {
            let patience = if peer.lock().through.is_some() { CLOSE_RELAYED } else { HANDSHAKE };
            let closed = tokio::select! {
                closed = close(&mut reader, &mut writer, patience) => closed,
                () = peer.halt.notified() => Err(anyhow::anyhow!("ended by ourselves")),
            };
            if rests && closed.is_err() {
                shared.open.fetch_add(1, Ordering::Relaxed);
            }
            return closed.map(|()| if renews { WriteEnd::Renew } else { WriteEnd::Rest });
        }
        let mut nothing = [0];
        idle = false;
        tokio::select! {
            () = peer.wake.notified() => {}
            () = tokio::time::sleep(REST_AFTER) => idle = true,
            () = peer.halt.notified() => bail!("ended by ourselves"),
            read = reader.read(&mut nothing) => {
                let length = read.context("the connection failed")?;
                ensure!(length == 0, "the peer sent data on a stream that it must only read");
                bail!("the peer closed the connection");
            }
        }
    }
}

/// Closes a connection after the peer has read everything on it, which it shows by closing it too.
async fn close(
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
    patience: Duration,
) -> anyhow::Result<()> {
    writer.shutdown().await.context("cannot close")?;
    let closed = timeout(patience, reader.read(&mut [0])).await;
    closed.context("the peer does not read the remaining messages")?.context("the connection failed")?;
    Ok(())
}

/// Varies the backoff, so that hosts that lost a peer at the same time do not all dial it at the same time.
fn jitter(backoff: Duration) -> Duration {
    let mut random = [0; 2];
    // Without random numbers there is no jitter, and no handshake either.
    if SystemRandom::new().fill(&mut random).is_err() {
        return backoff;
    }
    backoff * 3 / 4 + backoff.mul_f64(f64::from(u16::from_be_bytes(random)) / 65536.0 / 2.0)
}
