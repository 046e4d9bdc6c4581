//! SCTP over raw sockets, for kernels without SCTP: an INIT chunk, and the INIT ACK that answers it (RFC 9260,
//! sections 3.3.2 and 3.3.3), with the CRC32c checksum that connection tracking checks.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use netns_lab::Netns;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recvfrom, sendto, setsockopt,
    socket, sockopt::ReceiveTimeout,
};
use nix::sys::time::TimeVal;

const INIT: u8 = 1;
const INIT_ACK: u8 = 2;

/// Receive timeout: how often a server checks whether to stop.
const POLL_INTERVAL: Duration = Duration::from_millis(50);
/// Time after which an INIT is sent again.
const RETRY_INTERVAL: Duration = Duration::from_millis(250);

/// Answers each INIT to its ports, over IPv4 and IPv6, until it is dropped.
#[derive(Debug)]
pub struct Server {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Starts a server in a namespace.
    pub fn start(at: &Netns, ports: &[u16]) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for v4 in [true, false] {
            let (socket, stop, ports) = (Socket::open(at, v4)?, Arc::clone(&stop), ports.to_vec());
            threads.push(thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    if let Ok(Some((from, asked))) = socket.receive()
                        && asked.kind == INIT
                        && ports.contains(&asked.to)
                    {
                        // If this is lost, the client sends its INIT again.
                        let answer = Packet {
                            from: asked.to,
                            to: asked.from,
                            verification_tag: asked.initiate_tag,
                            ..INIT_ACK.into()
                        };
                        let _ = socket.send(from, answer);
                    }
                }
            }));
        }
        Ok(Self { stop, threads })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.drain(..).for_each(|thread| drop(thread.join()));
    }
}

/// Sends INITs to all targets until they are answered or the time is up. Returns who answered each.
pub fn probe(
    from: &Netns,
    targets: &[SocketAddr],
    timeout: Duration,
) -> Result<BTreeMap<SocketAddr, SocketAddr>> {
    let of_family = |v4: bool| -> Result<_> {
        let socket = Socket::open(from, v4)?;
        let targets = targets.iter().copied().filter(|target| target.is_ipv4() == v4);
        ask_by(&socket, targets, timeout)
    };
    thread::scope(|scope| {
        let v4 = scope.spawn(|| of_family(true));
        let mut answered = of_family(false)?;
        answered.extend(v4.join().map_err(|_| anyhow!("a prober panicked"))??);
        Ok(answered)
    })
}

fn ask_by(
    socket: &Socket,
    targets: impl Iterator<Item = SocketAddr>,
    timeout: Duration,
) -> Result<BTreeMap<SocketAddr, SocketAddr>> {
    // Connection tracking identifies an association by its ports, so each INIT has a source port of its own.
    static PORT: AtomicU16 = AtomicU16::new(0);
    let mut waiting: BTreeMap<u16, SocketAddr> =
        targets.map(|target| (0x8000 | PORT.fetch_add(1, Ordering::Relaxed), target)).collect();
    let mut answered = BTreeMap::new();
    let begin = Instant::now();
    let mut again = begin;
    while !waiting.is_empty() && begin.elapsed() < timeout {
        if Instant::now() >= again {
            again += RETRY_INTERVAL;
            for (port, target) in &waiting {
                // If it cannot be sent, the target counts as unanswered.
                let _ = socket.send(target.ip(), Packet { from: *port, to: target.port(), ..INIT.into() });
            }
        }
        if let Some((by, answer)) = socket.receive()?
            && answer.kind == INIT_ACK
            && let Some(target) = waiting.remove(&answer.to)
        {
            answered.insert(target, SocketAddr::new(by, answer.from));
        }
    }
    Ok(answered)
}

/// The fields of a packet with an INIT or INIT ACK chunk.
#[derive(Debug, Clone, Copy)]
struct Packet {
    from: u16,
    to: u16,
    /// Verification tag; 0 in an INIT.
    verification_tag: u32,
    kind: u8,
    /// Initiate tag.
    initiate_tag: u32,
}

impl From<u8> for Packet {
    fn from(kind: u8) -> Self {
        Self { from: 0, to: 0, verification_tag: 0, kind, initiate_tag: 7 }
    }
}

impl Packet {
    fn bytes(self) -> Vec<u8> {
        let mut bytes = [self.from.to_be_bytes(), self.to.to_be_bytes()].concat();
        bytes.extend(self.verification_tag.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend([self.kind, 0, 0, 20]);
        // Initiate verification_tag, receiver window, one stream in each direction, initial TSN.
        [self.initiate_tag, 65_536, 0x0001_0001, 1].iter().for_each(|word| bytes.extend(word.to_be_bytes()));
        let sum = crc32c(&bytes).to_le_bytes();
        bytes.splice(8..12, sum);
        bytes
    }

    fn read(bytes: &[u8]) -> Option<Self> {
        let u16_at = |at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let u32_at = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        Some(Self {
            from: u16_at(0)?,
            to: u16_at(2)?,
            verification_tag: u32_at(4)?,
            kind: *bytes.get(12)?,
            initiate_tag: u32_at(16)?,
        })
    }
}

fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(
            sum ^ u32::from(*byte),
            |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0x82f6_3b78 } else { sum >> 1 },
        )
    })
}

/// A raw SCTP socket of one address family.
struct Socket {
    fd: OwnedFd,
    v4: bool,
}

impl Socket {
    fn open(at: &Netns, v4: bool) -> Result<Self> {
        let family = if v4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let fd = at
            .run(|| socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Sctp))?
            .context("a raw socket")?;
        setsockopt(&fd, ReceiveTimeout, &TimeVal::new(0, POLL_INTERVAL.subsec_micros().into()))?;
        Ok(Self { fd, v4 })
    }

    fn send(&self, to: IpAddr, packet: Packet) -> Result<()> {
        let to = SockaddrStorage::from(SocketAddr::new(to, 0));
        sendto(self.fd.as_raw_fd(), &packet.bytes(), &to, MsgFlags::empty())?;
        Ok(())
    }

    /// Receives a packet and its sender; `None` if none arrives within [`POLL_INTERVAL`].
    fn receive(&self) -> Result<Option<(IpAddr, Packet)>> {
        let mut buffer = [0; 2048];
        let (length, from) = match recvfrom::<SockaddrStorage>(self.fd.as_raw_fd(), &mut buffer) {
            Ok(received) => received,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let from = from.context("a packet without a sender")?;
        let from = match (from.as_sockaddr_in(), from.as_sockaddr_in6()) {
            (Some(v4), _) => IpAddr::V4(v4.ip()),
            (_, Some(v6)) => IpAddr::V6(v6.ip()),
            (None, None) => return Ok(None),
        };
        // A raw IPv4 socket delivers the IP header too.
        let start = if self.v4 { 4 * usize::from(buffer[0] & 15) } else { 0 };
        Ok(buffer.get(start..length).and_then(Packet::read).map(|packet| (from, packet)))
    }
}
