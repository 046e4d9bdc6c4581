//! Our end of the streams that we dial: one task and one queue for each peer.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use ovl_proto::id::{ClusterKeyId, NodeId};
use ring::rand::{SecureRandom as _, SystemRandom};
use snow::TransportState;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};
use tracing::{debug, warn};

use super::frame::Sealing;
use super::noise::{self, Secured};
use super::{HANDSHAKE, LinkEvent, Shared};
use crate::keys::{ClusterKey, Keyring};
use crate::transport::Stream;

/// Bytes that wait for one peer. One that does not keep up starts anew.
const MAX_QUEUE: usize = 16 << 20;
/// What is sealed before it is written: many small messages, or some chunks of a large one.
const BATCH: usize = 256 << 10;
/// The room for it that is kept while there is nothing to do.
const KEEP: usize = 16 << 10;
const MIN_BACKOFF: Duration = Duration::from_millis(50);
const MAX_BACKOFF: Duration = Duration::from_secs(2);
/// A link that held for so long was a good one: it is dialled again at once.
const GOOD_LINK: Duration = Duration::from_secs(5);
const WARN_EVERY: Duration = Duration::from_secs(60);

/// One peer that we dial.
pub(super) struct Outbound {
    node: NodeId,
    queue: Mutex<Queue>,
    /// There is something to write, or nothing more will come.
    wake: Notify,
    /// The connection must end.
    halt: Notify,
    /// Dial now.
    kick: Notify,
}

struct Queue {
    addr: SocketAddr,
    connected: bool,
    /// The cluster key that opened the connection.
    key: ClusterKeyId,
    /// The connection is to be replaced by one that another key opens, once all is written.
    renew: bool,
    messages: VecDeque<Bytes>,
    bytes: usize,
    end: Option<End>,
}

/// Why a task is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// As soon as all is written.
    Flushed,
    /// At once.
    Now,
}

impl Outbound {
    pub(super) fn new(node: NodeId, addr: SocketAddr) -> Self {
        let queue = Queue {
            addr,
            connected: false,
            key: ClusterKeyId::default(),
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

    /// Where it is now. A connection to elsewhere ends.
    pub(super) fn set_addr(&self, addr: SocketAddr) {
        let mut queue = self.lock();
        if queue.addr != addr {
            queue.addr = addr;
            if queue.connected {
                self.halt.notify_one();
            }
            self.kick.notify_one();
        }
    }

    /// A connection that another key opened than the one that seals now is renewed; one whose key is
    /// not in use any more ends.
    pub(super) fn set_keyring(&self, keyring: &Keyring) {
        let mut queue = self.lock();
        if !queue.connected {
            return;
        }
        if keyring.get(queue.key).is_none() {
            self.halt.notify_one();
        } else if queue.key != keyring.sealing().id() {
            queue.renew = true;
            self.wake.notify_one();
        }
    }

    pub(super) fn end(&self, end: End) {
        self.lock().end = Some(end);
        self.wake.notify_one();
        self.kick.notify_one();
        if end == End::Now {
            self.halt.notify_one();
        }
    }

    /// Queues an encoded message; says whether there is a link for it.
    pub(super) fn send(&self, message: Bytes) -> bool {
        let mut queue = self.lock();
        if !queue.connected || queue.end.is_some() {
            return false;
        }
        if queue.bytes + message.len() > MAX_QUEUE && !queue.messages.is_empty() {
            warn!(peer = %self.node, "it does not take what is sent to it: the stream is started again");
            queue.disconnect();
            self.halt.notify_one();
            return false;
        }
        queue.bytes += message.len();
        queue.messages.push_back(message);
        self.wake.notify_one();
        true
    }

    /// A connection is there, which that key opened. The keys may have changed meanwhile.
    fn connected(&self, shared: &Shared, key: ClusterKeyId) {
        {
            let mut queue = self.lock();
            queue.connected = true;
            queue.key = key;
            queue.renew = false;
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

    fn ends(&self) -> Option<End> {
        self.lock().end
    }

    /// Returns when the task is to end. Only where nothing else waits to be woken.
    async fn ended(&self) {
        while self.ends().is_none() {
            self.wake.notified().await;
        }
    }
}

impl Queue {
    fn disconnect(&mut self) {
        self.connected = false;
        self.messages.clear();
        self.bytes = 0;
    }
}

/// Dials until it is told to end.
pub(super) async fn run(peer: Arc<Outbound>, shared: Arc<Shared>) {
    let mut backoff = MIN_BACKOFF;
    let mut warned: Option<Instant> = None;
    while peer.ends().is_none() {
        let addr = peer.lock().addr;
        let start = Instant::now();
        let dialled = tokio::select! {
            dialled = timeout(HANDSHAKE, dial(&peer, &shared, addr)) => dialled,
            () = peer.ended() => return,
        };
        let result = match dialled {
            Ok(Ok((stream, secured))) => {
                let result = serve(&peer, &shared, stream, secured).await;
                if start.elapsed() > GOOD_LINK {
                    backoff = MIN_BACKOFF;
                }
                result
            }
            Ok(Err(Failed::Connect(error))) => Err(error),
            Ok(Err(Failed::Handshake(error))) => {
                // Somebody is there, and it is not the one, or not with our key.
                if warned.is_none_or(|last| last.elapsed() > WARN_EVERY) {
                    warned = Some(Instant::now());
                    warn!(peer = %peer.node, %addr, "the sync stream is refused: {error:#} (said at most once a minute)");
                }
                Err(error)
            }
            Err(_) => Err(anyhow::anyhow!("no answer in {HANDSHAKE:?}")),
        };
        if let Err(error) = result {
            debug!(peer = %peer.node, %addr, "stream: {error:#}");
        }
        if peer.ends().is_some() {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(jitter(backoff)) => backoff = (backoff * 2).min(MAX_BACKOFF),
            () = peer.kick.notified() => backoff = MIN_BACKOFF,
        }
    }
}

enum Failed {
    Connect(anyhow::Error),
    Handshake(anyhow::Error),
}

/// With each key until the peer takes one: whoever joins late or was away has not all of them.
async fn dial(
    peer: &Outbound,
    shared: &Shared,
    addr: SocketAddr,
) -> Result<(Box<dyn Stream>, Secured), Failed> {
    let keyring = shared.keyring();
    let mut keys = keyring.all();
    let mut result = dial_with(peer, shared, addr, keyring.sealing()).await;
    keys.next();
    for key in keys {
        if !matches!(result, Err(Failed::Handshake(_))) {
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
) -> Result<(Box<dyn Stream>, Secured), Failed> {
    let connect = async {
        let stream = shared.transport.connect(addr).await?;
        stream.tune()?;
        anyhow::Ok(stream)
    };
    let mut stream = connect.await.map_err(Failed::Connect)?;
    let record = shared.record();
    let secured =
        noise::dial(&mut *stream, key, &shared.identity, &record).await.map_err(Failed::Handshake)?;
    if secured.record.id != peer.node {
        let other = format!("the node {} ({}) answers there", secured.record.name, secured.record.id);
        return Err(Failed::Handshake(anyhow::anyhow!(other)));
    }
    Ok((stream, secured))
}

/// From up to down.
async fn serve(
    peer: &Outbound,
    shared: &Shared,
    stream: Box<dyn Stream>,
    secured: Secured,
) -> anyhow::Result<()> {
    peer.lock().disconnect();
    peer.connected(shared, secured.key);
    let result = match shared.events.send(LinkEvent::Up(peer.node)).await {
        Ok(()) => write_on(peer, shared, stream, secured.noise).await,
        Err(_) => Ok(()),
    };
    peer.lock().disconnect();
    if shared.events.send(LinkEvent::Down(peer.node)).await.is_err() {
        debug!("nobody listens to links any more");
    }
    result
}

/// Over one connection after the other: one is renewed when all is written to it and read by the peer,
/// so that nothing is lost and nobody notices.
async fn write_on(
    peer: &Outbound,
    shared: &Shared,
    mut stream: Box<dyn Stream>,
    mut noise: TransportState,
) -> anyhow::Result<()> {
    while write(peer, stream, noise).await? == Written::Renew {
        let addr = peer.lock().addr;
        let secured = match timeout(HANDSHAKE, dial(peer, shared, addr)).await {
            Ok(Ok((fresh, secured))) => {
                stream = fresh;
                secured
            }
            Ok(Err(Failed::Connect(error) | Failed::Handshake(error))) => {
                return Err(error.context("renewed for another cluster key"));
            }
            Err(_) => bail!("no answer in {HANDSHAKE:?} when it was renewed for another cluster key"),
        };
        peer.connected(shared, secured.key);
        noise = secured.noise;
    }
    Ok(())
}

/// Why nothing more is written to a connection.
#[derive(Debug, PartialEq, Eq)]
enum Written {
    /// The task is to end.
    All,
    /// Another connection goes on.
    Renew,
}

async fn write(
    peer: &Outbound,
    stream: Box<dyn Stream>,
    mut noise: TransportState,
) -> anyhow::Result<Written> {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let mut buffer = Vec::new();
    let mut current: Option<Sealing> = None;
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
        buffer.shrink_to(KEEP);
        if peer.ends() == Some(End::Flushed) {
            writer.shutdown().await.context("cannot close")?;
            return Ok(Written::All);
        }
        let mut nothing = [0];
        if peer.lock().renew {
            writer.shutdown().await.context("cannot close")?;
            let closed = timeout(HANDSHAKE, reader.read(&mut nothing)).await;
            // It closes when it has read all that there is.
            closed.context("the peer does not read what is left")?.context("the connection broke")?;
            return Ok(Written::Renew);
        }
        tokio::select! {
            () = peer.wake.notified() => {}
            () = peer.halt.notified() => bail!("ended by ourselves"),
            read = reader.read(&mut nothing) => {
                let length = read.context("the connection broke")?;
                ensure!(length == 0, "the peer talks where it should listen");
                bail!("the peer closed the connection");
            }
        }
    }
}

/// Hosts that lost a peer at one instant shall not all come back at one instant.
fn jitter(backoff: Duration) -> Duration {
    let mut random = [0; 2];
    // Without random numbers there is no jitter, and no handshake either.
    if SystemRandom::new().fill(&mut random).is_err() {
        return backoff;
    }
    backoff * 3 / 4 + backoff.mul_f64(f64::from(u16::from_be_bytes(random)) / 65536.0 / 2.0)
}
