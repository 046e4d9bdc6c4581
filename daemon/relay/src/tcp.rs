//! Datagrams over TCP, where UDP is blocked.
//!
//! A *TCP path* is a TCP connection to another host, and a UDP socket of this host that stands in for it, as a detour does: what a
//! local program sends to the socket comes out of the socket at the other end. So that program needs to know nothing of TCP.
//!
//! ```text
//! connection:  length (2) | sealed frame, repeated
//! frame:       length (2) | datagram, repeated
//! ```
//!
//! A frame without datagrams is a sign of life: each end sends one when it has had nothing to send for a while, so both know
//! whether the connection still works ([`TcpPath::heard`]). A NAT or a firewall may forget it without telling.
//!
//! TCP delays what it cannot send at once. A datagram that is late is worth less than the next one, so what has waited in the
//! socket for too long is dropped, and little is given to the kernel that it cannot send yet (`TCP_NOTSENT_LOWAT`).

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use nix::libc;
use nix::sys::socket::setsockopt;
use nix::{setsockopt_impl, sockopt_impl};
use ovl_udp::threads::{StopSignal, ThreadGroup};
use ovl_udp::{MAX_COALESCED, ReceiveBatch, Sharing};

use crate::run::{self, Kind, MOST_SENT, Run};

/// The number of coalesced datagrams that one call receives.
const SLOTS: usize = 4;
/// The maximum length of a sealed frame, which has a length field of two bytes.
const MAX_SEALED: usize = 65_535;
/// The number of bytes that a cipher adds, at most.
const MAX_TAG: usize = 16;
/// The maximum length of a frame.
const MAX_FRAME: usize = MAX_SEALED - MAX_TAG;
/// What has waited for so long to be sent is dropped.
const STALE: Duration = Duration::from_millis(200);
/// The number of bytes that wait in the kernel until they are sent for the first time, at most.
const NOT_SENT: u32 = 128 << 10;
/// The time without a frame after which an empty one is sent.
const IDLE: Duration = Duration::from_millis(400);
/// All datagrams of a TCP path are of one kind.
const KIND: Kind = Kind { channel: 0, from: [0; 10], to: [0; 10] };

sockopt_impl!(NotSentLowWater, SetOnly, libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, u32);

/// Seals and opens the frames of one connection, in order.
pub trait Cipher: Send {
    /// Seals a frame into `sealed`, which is 16 bytes longer. Returns the length of what it wrote; `None` if it cannot.
    fn seal(&mut self, frame: &[u8], sealed: &mut [u8]) -> Option<usize>;

    /// Opens a sealed frame into `frame`, which is as long. Returns the length of what it wrote; `None` if the frame is damaged,
    /// forged or out of order.
    fn open(&mut self, sealed: &[u8], frame: &mut [u8]) -> Option<usize>;
}

/// The numbers of datagrams of a TCP path.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TcpCounters {
    /// Sent to the other host.
    pub sent: u64,
    /// Received from it.
    pub received: u64,
    /// Dropped, because they had waited for too long.
    pub stale: u64,
}

/// A running TCP path. Dropping it closes the connection and ends its threads.
pub struct TcpPath {
    shared: Arc<Shared>,
    local: SocketAddr,
    _threads: ThreadGroup,
}

struct Shared {
    stream: TcpStream,
    socket: UdpSocket,
    /// The local program.
    program: SocketAddr,
    cipher: Mutex<Box<dyn Cipher>>,
    sent: AtomicU64,
    received: AtomicU64,
    stale: AtomicU64,
    start: Instant,
    /// When a frame last arrived, in milliseconds since the start.
    heard: AtomicU64,
    has_ended: AtomicBool,
    ended: Box<dyn Fn() + Send + Sync>,
}

impl TcpPath {
    /// Starts to carry datagrams between the local program at an address and the other end of a connection. `ended` is called when
    /// the connection has failed.
    ///
    /// # Errors
    ///
    /// What the kernel reports.
    pub fn start(
        stream: TcpStream,
        cipher: Box<dyn Cipher>,
        program: SocketAddr,
        ended: impl Fn() + Send + Sync + 'static,
    ) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        setsockopt(&stream, NotSentLowWater, &NOT_SENT)?;
        let socket = ovl_udp::open(SocketAddr::new(program.ip(), 0), Sharing::Alone)?;
        ovl_udp::stamp(&socket)?;
        // Datagrams of other senders do not arrive.
        socket.connect(program)?;
        let local = socket.local_addr()?;
        let shared = Arc::new(Shared {
            stream,
            socket,
            program,
            cipher: Mutex::new(cipher),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            stale: AtomicU64::new(0),
            start: Instant::now(),
            heard: AtomicU64::new(0),
            has_ended: AtomicBool::new(false),
            ended: Box::new(ended),
        });
        let mut threads = ThreadGroup::new()?;
        let (writer, reader) = (Arc::clone(&shared), Arc::clone(&shared));
        threads.spawn("tcp-out".to_owned(), move |stop| writer.run(stop, Shared::write_all_that_comes))?;
        threads.spawn("tcp-in".to_owned(), move |stop| reader.run(stop, Shared::read_all_that_comes))?;
        Ok(Self { shared, local, _threads: threads })
    }

    /// The address of the socket that stands in for the other end.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Whether the connection has failed.
    pub fn has_ended(&self) -> bool {
        self.shared.has_ended.load(Ordering::Relaxed)
    }

    /// When something last arrived from the other end. It sends something at least every 0.4 s.
    pub fn heard(&self) -> Instant {
        self.shared.start + Duration::from_millis(self.shared.heard.load(Ordering::Relaxed))
    }

    /// The numbers of datagrams since the start.
    pub fn counters(&self) -> TcpCounters {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Shared { sent, received, stale, .. } = &*self.shared;
        TcpCounters { sent: read(sent), received: read(received), stale: read(stale) }
    }
}

impl std::fmt::Debug for TcpPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TcpPath").field("local", &self.local).finish_non_exhaustive()
    }
}

impl Shared {
    /// Runs one direction, and ends the other one as well when the connection has failed.
    fn run(&self, stop: &StopSignal, direction: impl Fn(&Self, &StopSignal) -> io::Result<()>) {
        if direction(self, stop).is_err() && !self.has_ended.swap(true, Ordering::Relaxed) {
            stop.set();
            (self.ended)();
        }
    }

    fn write_all_that_comes(&self, stop: &StopSignal) -> io::Result<()> {
        let mut batch = ReceiveBatch::new(SLOTS, MAX_COALESCED);
        let mut frame = Frame::new();
        let mut written = self.start;
        while !stop.is_set() {
            match batch.receive(&self.socket, SLOTS) {
                Ok(received) => {
                    for datagrams in (0..received).filter_map(|slot| batch.get(slot)) {
                        let pieces = datagrams.bytes.chunks(datagrams.segment_size);
                        // The clock may have been set back.
                        let age = datagrams.arrived.and_then(|at| SystemTime::now().duration_since(at).ok());
                        if age.is_some_and(|age| age > STALE) {
                            self.stale.fetch_add(pieces.len() as u64, Ordering::Relaxed);
                            continue;
                        }
                        for piece in pieces {
                            if !frame.has_room(piece) {
                                self.write_frame(&mut frame, stop)?;
                            }
                            frame.add(piece);
                            self.sent.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    if !frame.plain.is_empty() {
                        self.write_frame(&mut frame, stop)?;
                        written = Instant::now();
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let idle = written.elapsed();
                    if idle >= IDLE {
                        self.write_frame(&mut frame, stop)?;
                        written = Instant::now();
                    } else {
                        stop.wait_readable_for(&self.socket, IDLE - idle);
                    }
                }
                // The local program does not listen at the moment.
                Err(_) => {}
            }
        }
        Ok(())
    }

    fn write_frame(&self, frame: &mut Frame, stop: &StopSignal) -> io::Result<()> {
        let mut rest = {
            let mut cipher = self.cipher.lock().unwrap_or_else(PoisonError::into_inner);
            frame.seal(&mut **cipher).ok_or(io::ErrorKind::InvalidData)?
        };
        while !rest.is_empty() && !stop.is_set() {
            match (&self.stream).write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    stop.wait_writable(&self.stream);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        frame.plain.clear();
        Ok(())
    }

    fn read_all_that_comes(&self, stop: &StopSignal) -> io::Result<()> {
        let mut arrived = Arrived::new();
        let mut plain = vec![0; MAX_SEALED];
        let mut run = Run::new(MOST_SENT);
        while !stop.is_set() {
            match (&self.stream).read(arrived.room()) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => arrived.filled(length),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    stop.wait_readable(&self.stream);
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            while let Some(sealed) = arrived.next() {
                let length = {
                    let mut cipher = self.cipher.lock().unwrap_or_else(PoisonError::into_inner);
                    cipher.open(sealed, &mut plain).ok_or(io::ErrorKind::InvalidData)?
                };
                let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
                self.heard.store(now, Ordering::Relaxed);
                self.deliver(plain.get(..length).unwrap_or_default(), &mut run);
            }
        }
        Ok(())
    }

    /// Sends the datagrams of a frame to the local program.
    fn deliver(&self, frame: &[u8], run: &mut Run) {
        let send = |run: &mut Run| {
            if let Some((_, bytes, segment)) = run.take() {
                // What the socket of the program has no room for is lost, as on a network.
                let (sent, _) = run::send(&self.socket, self.program, bytes, segment);
                self.received.fetch_add(sent as u64, Ordering::Relaxed);
            }
        };
        for datagram in datagrams(frame) {
            if !run.takes(KIND, datagram.len()) {
                send(run);
            }
            if let Some(place) = run.add(KIND, datagram.len()) {
                place.copy_from_slice(datagram);
            }
        }
        send(run);
    }
}

/// A frame that is being written, and memory for it when it is sealed.
struct Frame {
    plain: Vec<u8>,
    sealed: Box<[u8]>,
}

impl Frame {
    fn new() -> Self {
        Self { plain: Vec::with_capacity(MAX_FRAME), sealed: vec![0; 2 + MAX_SEALED].into() }
    }

    fn has_room(&self, datagram: &[u8]) -> bool {
        self.plain.len() + 2 + datagram.len() <= MAX_FRAME
    }

    /// Adds a datagram. Does nothing if it is empty, or longer than any frame.
    fn add(&mut self, datagram: &[u8]) {
        let Ok(length) = u16::try_from(datagram.len()) else { return };
        if length > 0 && self.has_room(datagram) {
            self.plain.extend_from_slice(&length.to_be_bytes());
            self.plain.extend_from_slice(datagram);
        }
    }

    /// Seals the frame, and returns it with its length.
    fn seal(&mut self, cipher: &mut dyn Cipher) -> Option<&[u8]> {
        let length = cipher.seal(&self.plain, self.sealed.get_mut(2..)?)?;
        let field = self.sealed.first_chunk_mut()?;
        *field = u16::try_from(length).ok()?.to_be_bytes();
        self.sealed.get(..2 + length)
    }
}

/// Received bytes of a connection, which become sealed frames.
struct Arrived {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Arrived {
    fn new() -> Self {
        Self { bytes: vec![0; 2 * (2 + MAX_SEALED)].into(), start: 0, end: 0 }
    }

    /// The memory for the next bytes, at least one frame of it.
    fn room(&mut self) -> &mut [u8] {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        self.bytes.get_mut(self.end..).unwrap_or_default()
    }

    fn filled(&mut self, length: usize) {
        self.end = (self.end + length).min(self.bytes.len());
    }

    /// The next complete frame, without its length.
    fn next(&mut self) -> Option<&[u8]> {
        let arrived = self.bytes.get(self.start..self.end)?;
        let length = usize::from(u16::from_be_bytes(*arrived.first_chunk()?));
        let frame = arrived.get(2..2 + length)?;
        self.start += 2 + length;
        Some(frame)
    }
}

/// The datagrams of a frame, up to the first one that is not complete.
fn datagrams(mut frame: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let (length, rest) = frame.split_first_chunk()?;
        let (datagram, rest) = rest.split_at_checked(usize::from(u16::from_be_bytes(*length)))?;
        frame = rest;
        Some(datagram)
    })
    .filter(|datagram| !datagram.is_empty())
}

/// Takes bytes apart as a connection and as a frame, and as datagrams that are written and read back, for the fuzzer.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let mut arrived = Arrived::new();
    for piece in bytes.chunks(7) {
        if let Some(place) = arrived.room().get_mut(..piece.len()) {
            place.copy_from_slice(piece);
        }
        arrived.filled(piece.len());
        while arrived.next().is_some() {}
    }
    assert!(datagrams(bytes).all(|datagram| datagram.len() < bytes.len()));
    let mut frame = Frame::new();
    let given = || bytes.chunk_by(|one, other| one <= other);
    given().for_each(|datagram| frame.add(datagram));
    assert!(datagrams(&frame.plain).eq(given()));
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};
    use std::sync::mpsc;

    use super::*;

    /// Adds 16 bytes, and counts frames.
    struct Plain(u8, u8);

    impl Cipher for Plain {
        fn seal(&mut self, frame: &[u8], sealed: &mut [u8]) -> Option<usize> {
            sealed.get_mut(..frame.len())?.copy_from_slice(frame);
            sealed.get_mut(frame.len()..frame.len() + MAX_TAG)?.fill(self.0);
            self.0 = self.0.wrapping_add(1);
            Some(frame.len() + MAX_TAG)
        }

        fn open(&mut self, sealed: &[u8], frame: &mut [u8]) -> Option<usize> {
            let (plain, tag) = sealed.split_at_checked(sealed.len().checked_sub(MAX_TAG)?)?;
            (tag == [self.1; MAX_TAG]).then_some(())?;
            self.1 = self.1.wrapping_add(1);
            frame.get_mut(..plain.len())?.copy_from_slice(plain);
            Some(plain.len())
        }
    }

    fn program() -> UdpSocket {
        let socket = ovl_udp::open((Ipv4Addr::LOCALHOST, 0).into(), Sharing::Alone).unwrap();
        socket.set_nonblocking(false).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket
    }

    fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (one, listener.accept().unwrap().0)
    }

    fn path(stream: TcpStream, program: &UdpSocket) -> (TcpPath, mpsc::Receiver<()>) {
        let (tell, ended) = mpsc::channel();
        let at = program.local_addr().unwrap();
        let path = TcpPath::start(stream, Box::new(Plain(0, 0)), at, move || tell.send(()).unwrap()).unwrap();
        (path, ended)
    }

    #[test]
    fn datagrams_of_all_sizes_arrive_at_the_other_end_and_answers_come_back() {
        let (near, far) = (program(), program());
        let (one, other) = connection();
        let ((near_path, near_ended), (far_path, far_ended)) = (path(one, &near), path(other, &far));
        // Those of one call are coalesced.
        let datagrams: Vec<u8> = (0..40).flat_map(|number| vec![number; 1400]).collect();
        run::send(&near, near_path.local_addr(), &datagrams, 1400);
        let mut buffer = vec![0; 1 << 16];
        let mut got = Vec::new();
        while got.len() < datagrams.len() {
            let (length, from) = far.recv_from(&mut buffer).unwrap();
            assert_eq!(from, far_path.local_addr());
            got.extend_from_slice(&buffer[..length]);
        }
        assert!(got == datagrams);
        for length in [1, 1200, 9000, 60_000] {
            far.send_to(&vec![7; length], far_path.local_addr()).unwrap();
            let (arrived, from) = near.recv_from(&mut buffer).unwrap();
            assert_eq!((arrived, from), (length, near_path.local_addr()));
        }
        // The last one is counted after it was sent.
        let start = Instant::now();
        while near_path.counters().received < 4 {
            assert!(start.elapsed() < Duration::from_secs(5));
            std::thread::yield_now();
        }
        assert_eq!(near_path.counters(), TcpCounters { sent: 40, received: 4, stale: 0 });
        drop(far_path);
        near_ended.recv_timeout(Duration::from_secs(5)).unwrap();
        assert!(near_path.has_ended() && far_ended.try_recv().is_err(), "it was dropped");
    }

    #[test]
    fn what_cannot_be_sent_in_time_is_dropped_and_the_next_ones_arrive() {
        let (near, (one, mut other)) = (program(), connection());
        let (near_path, _ended) = path(one, &near);
        let start = Instant::now();
        // Nothing reads the connection.
        let mut sent = 0_u64;
        while near_path.counters().stale == 0 {
            assert!(start.elapsed() < Duration::from_secs(20));
            for _ in 0..20 {
                sent += 1;
                let _ = near.send_to(&sent.to_be_bytes().repeat(150), near_path.local_addr());
            }
            if start.elapsed() > STALE * 2 && sent.is_multiple_of(1000) {
                let mut buffer = vec![0; 1 << 20];
                other.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
                while matches!(other.read(&mut buffer), Ok(length) if length > 0) {}
            }
        }
        assert!(near_path.counters().sent < sent, "{:?}", near_path.counters());
    }

    #[test]
    fn idle_connection_is_heard_until_it_is_cut() {
        let (near, far) = (program(), program());
        let (one, mut other) = connection();
        let ((near_path, _near_ended), (middle, mut last)) = (path(one, &near), connection());
        let (far_path, _far_ended) = path(middle, &far);
        // Copies from the far end to the near one, as long as it is asked to.
        let wait = |is_due: &dyn Fn() -> bool| {
            let start = Instant::now();
            while !is_due() {
                assert!(start.elapsed() < Duration::from_secs(5));
                std::thread::yield_now();
            }
        };
        let start = near_path.heard();
        let mut buffer = [0; 18];
        for _ in 0..3 {
            last.read_exact(&mut buffer).unwrap();
            other.write_all(&buffer).unwrap();
            let before = Instant::now() - IDLE;
            wait(&|| near_path.heard() > before);
        }
        assert!(near_path.heard() >= start + IDLE * 2 && near_path.counters() == TcpCounters::default());
        assert_eq!(near.recv(&mut [0; 1]).map_err(|error| error.kind()), Err(io::ErrorKind::WouldBlock));
        let last_heard = near_path.heard();
        last.read_exact(&mut buffer).unwrap();
        assert_eq!(near_path.heard(), last_heard, "nothing was passed on");
        assert!(!near_path.has_ended() && !far_path.has_ended());
    }

    #[test]
    fn forged_frame_ends_the_connection() {
        let (near, (one, mut other)) = (program(), connection());
        let (near_path, ended) = path(one, &near);
        let mut frame = Frame::new();
        frame.add(b"good");
        let bytes = frame.seal(&mut Plain(0, 0)).unwrap().to_vec();
        other.write_all(&bytes).unwrap();
        let mut buffer = [0; 100];
        assert_eq!(near.recv(&mut buffer).unwrap(), 4);
        // The same one again.
        other.write_all(&bytes).unwrap();
        ended.recv_timeout(Duration::from_secs(5)).unwrap();
        assert_eq!(near_path.counters().received, 1);
    }
}
