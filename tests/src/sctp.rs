//! SCTP by raw packets, for kernels that have no such sockets: an INIT chunk, and the INIT ACK that answers it
//! (RFC 9260, sections 3.3.2 and 3.3.3), with the checksum that connection tracking asks for.

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

/// How long one wait for a packet is: how often a server looks whether it shall end.
const TURN: Duration = Duration::from_millis(50);
/// When a question is asked again.
const AGAIN: Duration = Duration::from_millis(250);

/// Answers each INIT to its ports, of both families, until this is dropped.
#[derive(Debug)]
pub struct Server {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Starts one in a namespace.
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
                        // Whoever asked asks again if this does not arrive.
                        let answer =
                            Packet { from: asked.to, to: asked.from, tag: asked.own_tag, ..INIT_ACK.into() };
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

/// Sends INITs to all of these until they are answered or patience ends: who answered each.
pub fn ask(
    from: &Netns,
    targets: &[SocketAddr],
    patience: Duration,
) -> Result<BTreeMap<SocketAddr, SocketAddr>> {
    let of_family = |v4: bool| -> Result<_> {
        let socket = Socket::open(from, v4)?;
        let targets = targets.iter().copied().filter(|target| target.is_ipv4() == v4);
        ask_by(&socket, targets, patience)
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
    patience: Duration,
) -> Result<BTreeMap<SocketAddr, SocketAddr>> {
    // An association is tracked by its ports: each question has one of its own.
    static PORT: AtomicU16 = AtomicU16::new(0);
    let mut waiting: BTreeMap<u16, SocketAddr> =
        targets.map(|target| (0x8000 | PORT.fetch_add(1, Ordering::Relaxed), target)).collect();
    let mut answered = BTreeMap::new();
    let begin = Instant::now();
    let mut again = begin;
    while !waiting.is_empty() && begin.elapsed() < patience {
        if Instant::now() >= again {
            again += AGAIN;
            for (port, target) in &waiting {
                // One that cannot be sent is one that is not answered.
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

/// What of a packet with one such chunk counts here.
#[derive(Debug, Clone, Copy)]
struct Packet {
    from: u16,
    to: u16,
    /// The receiver's tag; none in an INIT.
    tag: u32,
    kind: u8,
    /// The sender's tag.
    own_tag: u32,
}

impl From<u8> for Packet {
    fn from(kind: u8) -> Self {
        Self { from: 0, to: 0, tag: 0, kind, own_tag: 7 }
    }
}

impl Packet {
    fn bytes(self) -> Vec<u8> {
        let mut bytes = [self.from.to_be_bytes(), self.to.to_be_bytes()].concat();
        bytes.extend(self.tag.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend([self.kind, 0, 0, 20]);
        // The own tag, a receiver's window, one stream each way, the first number.
        [self.own_tag, 65_536, 0x0001_0001, 1].iter().for_each(|word| bytes.extend(word.to_be_bytes()));
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
            tag: u32_at(4)?,
            kind: *bytes.get(12)?,
            own_tag: u32_at(16)?,
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

/// A raw socket of SCTP's, of one family.
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
        setsockopt(&fd, ReceiveTimeout, &TimeVal::new(0, TURN.subsec_micros().into()))?;
        Ok(Self { fd, v4 })
    }

    fn send(&self, to: IpAddr, packet: Packet) -> Result<()> {
        let to = SockaddrStorage::from(SocketAddr::new(to, 0));
        sendto(self.fd.as_raw_fd(), &packet.bytes(), &to, MsgFlags::empty())?;
        Ok(())
    }

    /// A packet, if one comes in a turn, and who sent it.
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
        // Of IPv4, its header too.
        let start = if self.v4 { 4 * usize::from(buffer[0] & 15) } else { 0 };
        Ok(buffer.get(start..length).and_then(Packet::read).map(|packet| (from, packet)))
    }
}
