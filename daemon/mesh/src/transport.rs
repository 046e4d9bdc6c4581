//! The network under gossip and streams: sockets of this host, or a network in memory.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};

use crate::socket;

pub use crate::socket::SOCKET_MARK;

/// A peer that acknowledges nothing for so long is gone.
const DEAD_AFTER: Duration = Duration::from_secs(10);
/// The same on a host behind NAT.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(4);

/// Opens sockets.
#[async_trait]
pub trait Transport: fmt::Debug + Send + Sync {
    /// Opens a datagram socket that is bound to this address.
    fn datagrams(&self, listen: SocketAddr) -> io::Result<Box<dyn Datagrams>>;

    /// Listens for streams on this address.
    fn listen(&self, listen: SocketAddr) -> io::Result<Box<dyn Listener>>;

    /// Opens a stream to this address.
    async fn connect(&self, to: SocketAddr) -> io::Result<Box<dyn Stream>>;
}

/// A datagram socket that never fragments.
pub trait Datagrams: Send + Sync {
    /// Sends one datagram at once, or fails.
    ///
    /// # Errors
    ///
    /// `EMSGSIZE` if the datagram is larger than the MTU of the local device.
    fn send(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()>;

    /// Receives one datagram. Only one task may wait at a time.
    fn poll_receive(
        &self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<SocketAddr>>;
}

/// The sockets of both address families, or of one, as one socket.
pub(crate) struct BothFamilies {
    main: Box<dyn Datagrams>,
    is_main_ipv4: bool,
    /// That of the other family.
    other: Option<Box<dyn Datagrams>>,
    /// Whether the other one is asked first for the next datagram, so that each has its turn.
    is_others_turn: AtomicBool,
}

impl BothFamilies {
    /// Opens a socket on an address, and one on an address of the other family.
    ///
    /// # Errors
    ///
    /// What the kernel reports, with the address.
    pub(crate) fn open(
        transport: &dyn Transport,
        listen: SocketAddr,
        also: Option<SocketAddr>,
    ) -> io::Result<Box<dyn Datagrams>> {
        let open = |at: SocketAddr| {
            transport.datagrams(at).map_err(|error| io::Error::new(error.kind(), format!("{at}: {error}")))
        };
        let other = also.map(open).transpose()?;
        let (main, is_others_turn) = (open(listen)?, AtomicBool::new(false));
        Ok(Box::new(Self { main, is_main_ipv4: listen.is_ipv4(), other, is_others_turn }))
    }
}

impl Datagrams for BothFamilies {
    fn send(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        let other = self.other.as_ref().filter(|_| to.is_ipv4() != self.is_main_ipv4);
        other.unwrap_or(&self.main).send(datagram, to)
    }

    fn poll_receive(
        &self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<SocketAddr>> {
        let Some(other) = &self.other else { return self.main.poll_receive(context, buffer) };
        let sockets = [&self.main, other];
        let first = usize::from(self.is_others_turn.fetch_xor(true, Ordering::Relaxed));
        for socket in sockets.iter().cycle().skip(first).take(sockets.len()) {
            if let Poll::Ready(received) = socket.poll_receive(context, buffer) {
                return Poll::Ready(received);
            }
        }
        Poll::Pending
    }
}

/// A socket that accepts streams.
pub trait Listener: Send + Sync {
    /// Accepts one stream.
    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<(Box<dyn Stream>, SocketAddr)>>;

    /// The address that it is bound to.
    fn local_addr(&self) -> io::Result<SocketAddr>;
}

/// The side of a stream that this host is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// It dialled, and writes messages.
    Dialled,
    /// It accepted, and reads messages.
    Accepted,
    /// It dialled, and is behind NAT.
    Hidden,
}

/// One stream. On the side that dialled, it fails when the other one has acknowledged nothing for ten seconds. On the other
/// side it does so within two minutes: only a descriptor depends on it, and each probe of an idle stream costs both hosts
/// a packet, for each of their peers. A host behind NAT must know soon that its NAT has forgotten a stream, because the other side
/// cannot tell it, and cannot dial: on such a host it fails within four seconds, idle ones within six.
pub trait Stream: AsyncRead + AsyncWrite + Send + Sync + Unpin {
    /// Disables the delay of small writes, has what is lost sent again soon, and enables the detection of dead peers.
    fn tune(&self, side: Side) -> io::Result<()>;

    /// The TCP connection itself, for threads that read and write it. `None` if there is none below.
    fn into_tcp(self: Box<Self>) -> Option<std::net::TcpStream> {
        None
    }
}

/// The sockets of this host. Who opens one that is open gets the same, so that a host can begin a new generation at its address
/// while the old one ends.
#[derive(Debug, Default)]
pub struct HostTransport {
    datagrams: Mutex<HashMap<SocketAddr, Weak<UdpSocket>>>,
    listeners: Mutex<HashMap<SocketAddr, Weak<TcpListener>>>,
}

/// Returns the open socket on an address, or opens it.
fn shared<T>(
    open: &Mutex<HashMap<SocketAddr, Weak<T>>>,
    listen: SocketAddr,
    new: impl FnOnce() -> io::Result<T>,
) -> io::Result<Arc<T>> {
    let mut open = open.lock().unwrap_or_else(PoisonError::into_inner);
    open.retain(|_, socket| socket.strong_count() > 0);
    // Of port 0, each is another one.
    if let Some(socket) = open.get(&listen).and_then(Weak::upgrade).filter(|_| listen.port() != 0) {
        return Ok(socket);
    }
    let socket = Arc::new(new()?);
    open.insert(listen, Arc::downgrade(&socket));
    Ok(socket)
}

#[async_trait]
impl Transport for HostTransport {
    fn datagrams(&self, listen: SocketAddr) -> io::Result<Box<dyn Datagrams>> {
        Ok(Box::new(shared(&self.datagrams, listen, || socket::open(listen))?))
    }

    fn listen(&self, listen: SocketAddr) -> io::Result<Box<dyn Listener>> {
        let new = || {
            let socket = Socket::new(Domain::for_address(listen), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_nonblocking(true)?;
            // What an earlier run left in TIME_WAIT is no reason to fail.
            socket.set_reuse_address(true)?;
            if listen.is_ipv6() {
                socket.set_only_v6(true)?;
            }
            socket.bind(&listen.into())?;
            socket.listen(1024)?;
            TcpListener::from_std(socket.into())
        };
        Ok(Box::new(shared(&self.listeners, listen, new)?))
    }

    async fn connect(&self, to: SocketAddr) -> io::Result<Box<dyn Stream>> {
        let socket = if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket::mark(&socket);
        Ok(Box::new(socket.connect(to).await?))
    }
}

impl Datagrams for Arc<UdpSocket> {
    fn send(&self, datagram: &[u8], to: SocketAddr) -> io::Result<()> {
        // Not through tokio, which would have to be told first that the socket is writable.
        SockRef::from(&**self).send_to(datagram, &to.into()).map(drop)
    }

    fn poll_receive(
        &self,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<SocketAddr>> {
        self.poll_recv_from(context, buffer)
    }
}

impl Listener for Arc<TcpListener> {
    fn poll_accept(&self, context: &mut Context<'_>) -> Poll<io::Result<(Box<dyn Stream>, SocketAddr)>> {
        TcpListener::poll_accept(self, context)
            .map_ok(|(stream, from)| -> (Box<dyn Stream>, SocketAddr) { (Box::new(stream), from) })
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        TcpListener::local_addr(self)
    }
}

impl Stream for TcpStream {
    fn into_tcp(self: Box<Self>) -> Option<std::net::TcpStream> {
        self.into_std().ok()
    }

    fn tune(&self, side: Side) -> io::Result<()> {
        self.set_nodelay(true)?;
        let socket = SockRef::from(self);
        // Where many packets are lost, waits that double with each of them last for seconds.
        socket.set_tcp_thin_linear_timeouts(true)?;
        let keepalive = TcpKeepalive::new().with_retries(3);
        match side {
            Side::Dialled => {
                let (time, interval) = (Duration::from_secs(8), Duration::from_secs(2));
                socket.set_tcp_keepalive(&keepalive.with_time(time).with_interval(interval))?;
                socket.set_tcp_user_timeout(Some(DEAD_AFTER))
            }
            Side::Hidden => {
                let (time, interval) = (Duration::from_secs(2), Duration::from_secs(1));
                socket.set_tcp_keepalive(&keepalive.with_time(time).with_interval(interval))?;
                socket.set_tcp_user_timeout(Some(FORGOTTEN_AFTER))
            }
            // Without a user timeout, which would end the stream after one lost probe.
            Side::Accepted => {
                let (time, interval) = (Duration::from_secs(60), Duration::from_secs(10));
                socket.set_tcp_keepalive(&keepalive.with_time(time).with_interval(interval))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn socket_that_is_open_is_shared_and_closed_when_its_last_user_is_gone() {
        let transport = HostTransport::default();
        let any: SocketAddr = ([127, 0, 0, 1], 0).into();
        let at = transport.listen(any).unwrap().local_addr().unwrap();
        let (one, other) = (transport.listen(at).unwrap(), transport.listen(at).unwrap());
        let (sender, receiver) = (transport.datagrams(at).unwrap(), transport.datagrams(at).unwrap());
        sender.send(b"x", at).unwrap();
        let mut buffer = [0; 8];
        let mut buffer = ReadBuf::new(&mut buffer);
        std::future::poll_fn(|context| receiver.poll_receive(context, &mut buffer)).await.unwrap();
        assert!(TcpListener::bind(at).await.is_err() && UdpSocket::bind(at).await.is_err());
        drop((one, sender));
        assert!(TcpListener::bind(at).await.is_err() && UdpSocket::bind(at).await.is_err());
        drop((other, receiver));
        assert!(TcpListener::bind(at).await.is_ok() && UdpSocket::bind(at).await.is_ok());
    }

    #[tokio::test]
    async fn only_the_side_that_dialled_probes_often() {
        let any: SocketAddr = ([127, 0, 0, 1], 0).into();
        let listener = tokio::net::TcpListener::bind(any).await.unwrap();
        let to = listener.local_addr().unwrap();
        let (dialled, accepted) = tokio::join!(TcpStream::connect(to), listener.accept());
        let (dialled, (accepted, _)) = (dialled.unwrap(), accepted.unwrap());
        dialled.tune(Side::Dialled).unwrap();
        accepted.tune(Side::Accepted).unwrap();
        let options = |stream: &TcpStream| {
            let socket = SockRef::from(stream);
            assert!(socket.keepalive().unwrap() && stream.nodelay().unwrap());
            assert!(socket.tcp_thin_linear_timeouts().unwrap());
            (socket.tcp_keepalive_time().unwrap().as_secs(), socket.tcp_user_timeout().unwrap())
        };
        assert_eq!(options(&dialled), (8, Some(DEAD_AFTER)));
        assert_eq!(options(&accepted), (60, None));
        dialled.tune(Side::Hidden).unwrap();
        assert_eq!(options(&dialled), (2, Some(FORGOTTEN_AFTER)));
    }
}
