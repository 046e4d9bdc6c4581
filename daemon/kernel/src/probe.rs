//! Probes hosts with ICMP echo requests. The kernel of a host replies even while its ovld is stopped.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use etherparse::{IcmpEchoHeader, Icmpv4Header, Icmpv4Type, Icmpv6Header, Icmpv6Type, Ipv4HeaderSlice};
use socket2::Domain;
use tokio::net::UdpSocket;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::echo;
use super::error::{KernelError, Result};

/// The payload of echo requests, which has no meaning.
const PAYLOAD: &[u8] = b"ovl: is this host up?";

/// Answers probes in place of a network.
pub trait Probe: fmt::Debug + Send + Sync {
    /// The round-trip time to an address. `None` if it does not answer.
    fn round_trip(&self, address: IpAddr) -> Option<Duration>;
}

/// Sends ICMP echo requests. Clones share the sockets.
#[derive(Debug, Clone)]
pub struct Prober(Kind);

#[derive(Debug, Clone)]
enum Kind {
    Host(Arc<Inner>),
    Simulated(Arc<dyn Probe>),
}

#[derive(Debug)]
struct Inner {
    v4: Family,
    /// `None` on a kernel without IPv6.
    v6: Option<Family>,
    id: u16,
    next: AtomicU16,
}

#[derive(Debug)]
struct Family {
    socket: Arc<UdpSocket>,
    waiting: Waiting,
    reader: JoinHandle<()>,
}

/// The probes that wait for a reply, by address, identifier and sequence number.
type Waiting = Arc<Mutex<HashMap<(IpAddr, u16, u16), oneshot::Sender<()>>>>;

impl Prober {
    /// Opens the sockets. It must be called within a tokio runtime.
    ///
    /// # Errors
    ///
    /// A raw socket cannot be opened: it needs CAP_NET_RAW.
    pub fn new() -> Result<Self> {
        let error = |error| KernelError::io("cannot open a socket for ICMP", &error);
        let v4 = Family::open(Domain::IPV4, echo_reply_v4).map_err(error)?;
        let v6 = Family::open(Domain::IPV6, echo_reply_v6).ok();
        // A raw socket receives the replies for all processes of the host, another ovld included.
        let id = std::process::id() as u16;
        Ok(Self(Kind::Host(Arc::new(Inner { v4, v6, id, next: AtomicU16::new(0) }))))
    }

    /// Asks this instead of a network.
    pub fn simulated(probe: Arc<dyn Probe>) -> Self {
        Self(Kind::Simulated(probe))
    }

    /// Sends an echo request. Returns whether a reply arrived in time. Probes may run in parallel.
    pub async fn probe(&self, address: IpAddr, timeout: Duration) -> bool {
        let inner = match &self.0 {
            Kind::Host(inner) => inner,
            Kind::Simulated(probe) => {
                let answered = probe.round_trip(address).filter(|trip| *trip <= timeout);
                tokio::time::sleep(answered.unwrap_or(timeout)).await;
                return answered.is_some();
            }
        };
        let family = match address {
            IpAddr::V4(_) => Some(&inner.v4),
            IpAddr::V6(_) => inner.v6.as_ref(),
        };
        let Some(family) = family else { return false };
        let seq = inner.next.fetch_add(1, Ordering::Relaxed);
        let echo = IcmpEchoHeader { id: inner.id, seq };
        let key = (address, echo.id, echo.seq);
        let (sender, answer) = oneshot::channel();
        lock(&family.waiting).insert(key, sender);
        let answered = async { family.send(address, echo).await.is_ok() && answer.await.is_ok() };
        let answered = tokio::time::timeout(timeout, answered).await.unwrap_or(false);
        lock(&family.waiting).remove(&key);
        answered
    }
}

impl Family {
    fn open(domain: Domain, parse: fn(&[u8]) -> Option<IcmpEchoHeader>) -> io::Result<Self> {
        let socket = Arc::new(echo::socket(domain)?);
        let waiting = Waiting::default();
        let reader = tokio::spawn(read(Arc::clone(&socket), Arc::clone(&waiting), parse));
        Ok(Self { socket, waiting, reader })
    }

    async fn send(&self, to: IpAddr, echo: IcmpEchoHeader) -> io::Result<()> {
        let packet = echo::request(to, echo, PAYLOAD)?;
        self.socket.send_to(&packet, SocketAddr::new(to, 0)).await.map(drop)
    }
}

impl Drop for Family {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

async fn read(socket: Arc<UdpSocket>, waiting: Waiting, parse: fn(&[u8]) -> Option<IcmpEchoHeader>) {
    let mut packet = [0; 512];
    loop {
        // Errors such as "no route to host" are about packets that were sent. The socket remains usable.
        let Ok((length, from)) = socket.recv_from(&mut packet).await else { continue };
        if let Some(echo) = packet.get(..length).and_then(parse)
            && let Some(sender) = lock(&waiting).remove(&(from.ip(), echo.id, echo.seq))
        {
            let _ = sender.send(());
        }
    }
}

/// Parses an echo reply in a packet with its IP header.
fn echo_reply_v4(packet: &[u8]) -> Option<IcmpEchoHeader> {
    let header = Ipv4HeaderSlice::from_slice(packet).ok()?;
    match Icmpv4Header::from_slice(packet.get(header.slice().len()..)?).ok()?.0.icmp_type {
        Icmpv4Type::EchoReply(echo) => Some(echo),
        _ => None,
    }
}

/// Parses an echo reply in a packet that begins with its ICMPv6 header.
fn echo_reply_v6(packet: &[u8]) -> Option<IcmpEchoHeader> {
    match Icmpv6Header::from_slice(packet).ok()?.0.icmp_type {
        Icmpv6Type::EchoReply(echo) => Some(echo),
        _ => None,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
