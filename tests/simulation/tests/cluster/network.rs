//! Datagrams and streams in memory.
//!
//! Each direction has a latency of 0.2 to 1.2 ms. A partition drops datagrams and holds back streams. A stream that is
//! held back for ten seconds breaks, as TCP with `TCP_USER_TIMEOUT` does. The kernel of a host answers probes also while
//! its daemon does not run.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use async_trait::async_trait;
use ovl_kernel::Probe;
use ovl_mesh::transport::{Datagrams, Listener, Side, Stream, Transport};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use crate::nat::{Kind, Nat};
use crate::random::Random;

/// After this a stream that is held back breaks, and a connection attempt fails.
const DEAD_AFTER: Duration = Duration::from_secs(10);
/// The bytes that one direction of a stream holds.
const WINDOW: usize = 1 << 20;
/// The largest datagram, with 28 bytes of headers.
const MTU: usize = 1500;

/// All links between all hosts. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Network(Arc<Mutex<Fabric>>);

#[derive(Debug)]
struct Fabric {
    random: Random,
    /// Lost datagrams, in percent.
    loss: usize,
    /// The side of a partition that a host is on; 0 if absent.
    sides: BTreeMap<IpAddr, usize>,
    /// Hosts without power: their kernels do not answer either.
    off: BTreeSet<IpAddr>,
    /// The boxes of hosts behind NAT.
    boxes: BTreeMap<IpAddr, Nat>,
    datagrams: BTreeMap<SocketAddr, Arc<Inbox>>,
    listeners: BTreeMap<SocketAddr, Arc<Backlog>>,
    connections: Vec<Weak<Connection>>,
    next_port: u16,
    order: u64,
    /// Over all datagrams.
    digest: u64,
    /// The bytes that were written to streams.
    streamed: u64,
}

impl Network {
    /// A network without loss and partitions.
    pub(crate) fn new(random: Random) -> Self {
        Self(Arc::new(Mutex::new(Fabric {
            random,
            loss: 0,
            sides: BTreeMap::new(),
            off: BTreeSet::new(),
            boxes: BTreeMap::new(),
            datagrams: BTreeMap::new(),
            listeners: BTreeMap::new(),
            connections: Vec::new(),
            next_port: 32768,
            order: 0,
            digest: 0,
            streamed: 0,
        })))
    }

    /// The network as one host sees it.
    pub(crate) fn host(&self, address: IpAddr) -> Interface {
        Interface { network: self.clone(), address }
    }

    /// The share of datagrams that are lost, in percent.
    pub(crate) fn set_loss(&self, percent: usize) {
        self.lock().loss = percent;
    }

    /// Cuts all links between hosts on different sides. A host that is absent is on side 0.
    pub(crate) fn partition(&self, sides: BTreeMap<IpAddr, usize>) {
        self.cut(|fabric| fabric.sides = sides);
    }

    /// Switches a host off or on.
    pub(crate) fn power(&self, address: IpAddr, on: bool) {
        self.cut(|fabric| {
            if on {
                fabric.off.remove(&address);
            } else {
                fabric.off.insert(address);
            }
        });
    }

    /// Puts a host behind a NAT box, with this outer address.
    pub(crate) fn hide(&self, address: IpAddr, kind: Kind, outer: IpAddr) {
        self.lock().boxes.insert(address, Nat::new(kind, outer));
    }

    /// Whether a host is behind NAT.
    pub(crate) fn is_hidden(&self, address: IpAddr) -> bool {
        self.lock().boxes.contains_key(&address)
    }

    /// Makes the box of a host forget all mappings and connections.
    pub(crate) fn forget_mappings(&self, address: IpAddr) {
        let connections: Vec<_> = {
            let mut fabric = self.lock();
            if let Some(nat) = fabric.boxes.get_mut(&address) {
                nat.forget();
            }
            fabric.connections.iter().filter_map(Weak::upgrade).collect()
        };
        for connection in connections {
            if connection.ends.iter().any(|end| end.ip() == address) {
                let mut state = lock(&connection.state);
                state.forgotten = true;
                connection.hold(&mut state);
            }
        }
    }

    /// Changes which hosts reach each other, and holds or releases the streams between them.
    fn cut(&self, change: impl FnOnce(&mut Fabric)) {
        let connections: Vec<_> = {
            let mut fabric = self.lock();
            change(&mut fabric);
            fabric.connections.retain(|connection| connection.strong_count() > 0);
            let cut = |connection: Arc<Connection>| {
                let [a, b] = connection.ends;
                (fabric.reaches(a.ip(), b.ip()), connection)
            };
            fabric.connections.iter().filter_map(Weak::upgrade).map(cut).collect()
        };
        for (reachable, connection) in connections {
            let mut state = lock(&connection.state);
            if reachable && !state.forgotten {
                state.held_since = None;
                state.wake();
            } else {
                connection.hold(&mut state);
            }
        }
    }

    /// A digest of all datagrams that were delivered so far. Two runs with the same digest were the same run.
    pub(crate) fn digest(&self) -> u64 {
        self.lock().digest
    }

    /// The number of bytes that were written to all streams so far.
    pub(crate) fn streamed(&self) -> u64 {
        self.lock().streamed
    }

    /// Closes all sockets of a host, as the end of its daemon's process does.
    pub(crate) fn close(&self, address: IpAddr) {
        let mut fabric = self.lock();
        fabric.datagrams.retain(|at, _| at.ip() != address);
        fabric.listeners.retain(|at, _| at.ip() != address);
    }

    fn lock(&self) -> MutexGuard<'_, Fabric> {
        lock(&self.0)
    }
}

impl Fabric {
    fn reaches(&self, a: IpAddr, b: IpAddr) -> bool {
        let side = |address| self.sides.get(&address).copied().unwrap_or(0);
        side(a) == side(b) && !self.off.contains(&a) && !self.off.contains(&b)
    }

    /// Takes a datagram into the digest: FNV-1a over words of eight bytes.
    fn note(&mut self, datagram: &[u8], to: SocketAddr) {
        let receiver = match to.ip() {
            IpAddr::V4(address) => u64::from(address.to_bits()),
            IpAddr::V6(address) => address.to_bits() as u64,
        };
        let words =
            datagram.chunks(8).map(|chunk| chunk.iter().fold(0, |word, byte| word << 8 | u64::from(*byte)));
        for word in words.chain([receiver, u64::from(to.port())]) {
            self.digest = (self.digest ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(23);
        }
    }

    fn latency(&mut self) -> Duration {
        Duration::from_micros(200 + self.random.below(1000) as u64)
    }

    /// The receiver of a datagram, and the sender as it sees it. `None` if a NAT box is in the way.
    fn translate(&mut self, from: SocketAddr, to: SocketAddr) -> Option<(SocketAddr, SocketAddr)> {
        let from = self.boxes.get_mut(&from.ip()).map_or(from, |nat| nat.send(from, to));
        if self.boxes.contains_key(&to.ip()) {
            return None;
        }
        let receiver = match self.boxes.values().find(|nat| nat.outer() == to.ip()) {
            Some(nat) => nat.receive(to.port(), from)?,
            None => to,
        };
        Some((receiver, from))
    }

    /// Whether a host can be dialled.
    fn is_public(&self, address: IpAddr) -> bool {
        !self.boxes.iter().any(|(inner, nat)| *inner == address || nat.outer() == address)
    }
}

/// The network as one host sees it.
#[derive(Debug, Clone)]
pub(crate) struct Interface {
    network: Network,
    address: IpAddr,
}

impl Probe for Interface {
    fn round_trip(&self, address: IpAddr) -> Option<Duration> {
        let mut fabric = self.network.lock();
        let reached = fabric.reaches(self.address, address) && fabric.is_public(address);
        reached.then(|| fabric.latency() + fabric.latency())
    }
}

#[async_trait]
impl Transport for Interface {
    fn datagrams(&self, listen: SocketAddr) -> io::Result<Box<dyn Datagrams>> {
        let inbox = Arc::new(Inbox::default());
        self.network.lock().datagrams.insert(listen, Arc::clone(&inbox));
        Ok(Box::new(Socket { network: self.network.clone(), address: listen, inbox }))
    }

    fn listen(&self, listen: SocketAddr) -> io::Result<Box<dyn Listener>> {
        let backlog = Arc::new(Backlog::default());
        self.network.lock().listeners.insert(listen, Arc::clone(&backlog));
        Ok(Box::new(Accepting { address: listen, backlog }))
    }

    async fn connect(&self, to: SocketAddr) -> io::Result<Box<dyn Stream>> {
        let (latency, reached) = {
            let mut fabric = self.network.lock();
            let reached = fabric.reaches(self.address, to.ip()) && fabric.is_public(to.ip());
            (fabric.latency() + fabric.latency(), reached)
        };
        if !reached {
            tokio::time::sleep(DEAD_AFTER).await;
            return Err(io::ErrorKind::TimedOut.into());
        }
        tokio::time::sleep(latency).await;
        let mut fabric = self.network.lock();
        let Some(backlog) = fabric.listeners.get(&to).map(Arc::clone) else {
            return Err(io::ErrorKind::ConnectionRefused.into());
        };
        let seen = fabric.boxes.get(&self.address).map_or(self.address, Nat::outer);
        let port = fabric.next_port;
        let from = SocketAddr::new(self.address, port);
        fabric.next_port = fabric.next_port.checked_add(1).unwrap_or(32768);
        let held_since = (!fabric.reaches(self.address, to.ip())).then(Instant::now);
        let state = State { held_since, ..State::default() };
        let connection = Arc::new(Connection {
            network: self.network.clone(),
            ends: [from, to],
            state: Mutex::new(state),
        });
        fabric.connections.push(Arc::downgrade(&connection));
        drop(fabric);
        let mut waiting = lock(&backlog.waiting);
        waiting.0.push_back((End::new(Arc::clone(&connection), 1), SocketAddr::new(seen, port)));
        if let Some(waker) = waiting.1.take() {
            waker.wake();
        }
        Ok(Box::new(End::new(connection, 0)))
    }
}

/// What a datagram socket has received.
#[derive(Debug, Default)]
struct Inbox(Mutex<Arrivals>);

#[derive(Debug, Default)]
struct Arrivals {
    /// By the time of arrival.
    waiting: BTreeMap<(Instant, u64), (SocketAddr, Vec<u8>)>,
    waker: Option<Waker>,
    timer: Option<Pin<Box<Sleep>>>,
}

struct Socket {
    network: Network,
    address: SocketAddr,
    inbox: Arc<Inbox>,
}

impl Datagrams for Socket {
    fn send(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        if datagram.len() + 28 > MTU {
            return Err(io::Error::from_raw_os_error(EMSGSIZE));
        }
        let mut fabric = self.network.lock();
        // A daemon that was killed sends nothing.
        let open = fabric.datagrams.get(&self.address).is_some_and(|inbox| Arc::ptr_eq(inbox, &self.inbox));
        let loss = fabric.loss;
        if !open {
            return Ok(());
        }
        let Some((to, from)) = fabric.translate(self.address, to) else { return Ok(()) };
        if !fabric.reaches(self.address.ip(), to.ip()) || fabric.random.percent(loss) {
            return Ok(());
        }
        let Some(inbox) = fabric.datagrams.get(&to).map(Arc::clone) else { return Ok(()) };
        let at = Instant::now() + fabric.latency();
        fabric.order += 1;
        let key = (at, fabric.order);
        fabric.note(datagram, to);
        drop(fabric);
        let mut arrivals = lock(&inbox.0);
        arrivals.waiting.insert(key, (from, datagram.to_vec()));
        if let Some(waker) = arrivals.waker.take() {
            waker.wake();
        }
        Ok(())
    }

    fn poll_receive(
        &self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<SocketAddr>> {
        let mut arrivals = lock(&self.inbox.0);
        loop {
            arrivals.waker = Some(context.waker().clone());
            let Some(at) = arrivals.waiting.first_key_value().map(|((at, _), _)| *at) else {
                return Poll::Pending;
            };
            if at <= Instant::now() {
                let Some((_, (from, bytes))) = arrivals.waiting.pop_first() else { return Poll::Pending };
                let length = bytes.len().min(buffer.remaining());
                buffer.put_slice(bytes.get(..length).unwrap_or_default());
                return Poll::Ready(Ok(from));
            }
            ready!(wait(&mut arrivals.timer, at, context));
        }
    }
}

/// With who dialled, and the task to wake.
type Waiting = (VecDeque<(End, SocketAddr)>, Option<Waker>);

/// Streams that wait to be accepted.
#[derive(Debug, Default)]
struct Backlog {
    waiting: Mutex<Waiting>,
}

struct Accepting {
    address: SocketAddr,
    backlog: Arc<Backlog>,
}

impl Listener for Accepting {
    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<(Box<dyn Stream>, SocketAddr)>> {
        let mut waiting = lock(&self.backlog.waiting);
        if let Some((end, from)) = waiting.0.pop_front() {
            return Poll::Ready(Ok((Box::new(end), from)));
        }
        waiting.1 = Some(context.waker().clone());
        Poll::Pending
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}

/// Two directions between two hosts.
#[derive(Debug)]
struct Connection {
    network: Network,
    /// Who dialled, and who accepted.
    ends: [SocketAddr; 2],
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Since when a partition lies between the ends.
    held_since: Option<Instant>,
    /// Whether a NAT box has forgotten it.
    forgotten: bool,
    broken: bool,
    /// What each end has written.
    written: [Direction; 2],
}

impl Connection {
    /// Holds back what is written from now on. The connection breaks if that lasts.
    fn hold(self: &Arc<Self>, state: &mut State) {
        if state.held_since.is_none() {
            let now = Instant::now();
            state.held_since = Some(now);
            let connection = Arc::downgrade(self);
            tokio::spawn(async move {
                tokio::time::sleep(DEAD_AFTER).await;
                if let Some(connection) = connection.upgrade() {
                    let mut state = lock(&connection.state);
                    if state.held_since == Some(now) {
                        state.broken = true;
                        state.wake();
                    }
                }
            });
        }
        state.wake();
    }
}

#[derive(Debug, Default)]
struct Direction {
    chunks: VecDeque<(Instant, VecDeque<u8>)>,
    bytes: usize,
    /// When the last chunk arrives.
    last: Option<Instant>,
    /// Nothing more is written.
    finished: bool,
    /// Nobody reads any more.
    abandoned: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl State {
    fn wake(&mut self) {
        let wakers = self.written.iter_mut().flat_map(|way| [way.reader.take(), way.writer.take()]);
        wakers.flatten().for_each(Waker::wake);
    }
}

/// One end of a connection.
#[derive(Debug)]
struct End {
    connection: Arc<Connection>,
    /// 0 if it dialled, 1 if it accepted.
    side: usize,
    timer: Option<Pin<Box<Sleep>>>,
}

impl End {
    fn new(connection: Arc<Connection>, side: usize) -> Self {
        Self { connection, side, timer: None }
    }
}

impl AsyncRead for End {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let mut state = lock(&this.connection.state);
        loop {
            if state.broken {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            let held = state.held_since.is_some();
            let [dialler, listener] = &mut state.written;
            let way = if this.side == 0 { listener } else { dialler };
            way.reader = Some(context.waker().clone());
            if held {
                return Poll::Pending;
            }
            let Some((at, chunk)) = way.chunks.front_mut() else {
                return if way.finished { Poll::Ready(Ok(())) } else { Poll::Pending };
            };
            if *at > Instant::now() {
                let at = *at;
                ready!(wait(&mut this.timer, at, context));
                continue;
            }
            let (first, _) = chunk.as_slices();
            let length = first.len().min(buffer.remaining());
            buffer.put_slice(first.get(..length).unwrap_or_default());
            chunk.drain(..length);
            if chunk.is_empty() {
                way.chunks.pop_front();
            }
            way.bytes -= length;
            if let Some(writer) = way.writer.take() {
                writer.wake();
            }
            return Poll::Ready(Ok(()));
        }
    }
}

impl AsyncWrite for End {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let latency = this.connection.network.lock().latency();
        let mut state = lock(&this.connection.state);
        if state.broken {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let [dialler, listener] = &mut state.written;
        let way = if this.side == 0 { dialler } else { listener };
        if way.abandoned || way.finished {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if way.bytes >= WINDOW {
            way.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        // In order, whatever the latency of each.
        let at = way.last.map_or(Instant::now() + latency, |last| last.max(Instant::now() + latency));
        way.last = Some(at);
        way.chunks.push_back((at, bytes.iter().copied().collect()));
        way.bytes += bytes.len();
        this.connection.network.lock().streamed += bytes.len() as u64;
        if let Some(reader) = way.reader.take() {
            reader.wake();
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = lock(&self.connection.state);
        let [dialler, listener] = &mut state.written;
        let way = if self.side == 0 { dialler } else { listener };
        way.finished = true;
        state.wake();
        Poll::Ready(Ok(()))
    }
}

impl Stream for End {
    fn tune(&self, _: Side) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for End {
    fn drop(&mut self) {
        let mut state = lock(&self.connection.state);
        let [dialler, listener] = &mut state.written;
        let (own, other) = if self.side == 0 { (dialler, listener) } else { (listener, dialler) };
        own.finished = true;
        other.abandoned = true;
        state.wake();
    }
}

const EMSGSIZE: i32 = 90;

/// Ready at that time.
fn wait(timer: &mut Option<Pin<Box<Sleep>>>, at: Instant, context: &mut Context<'_>) -> Poll<()> {
    let timer = timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
    if timer.deadline() != at {
        timer.as_mut().reset(at);
    }
    timer.as_mut().poll(context)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
