//! Background traffic: numbered datagrams, and a paced TCP stream.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use netns_lab::Workload;
use nix::sys::socket::{setsockopt, sockopt::RcvBufForce};

/// Interval between packets: a thousand per second.
pub(crate) const PERIOD: Duration = Duration::from_millis(1);
/// How long to wait for packets after the last one was sent.
const TAIL: Duration = Duration::from_millis(500);
const READ_TIMEOUT: Duration = Duration::from_millis(50);
const RECEIVE_BUFFER: usize = 8 << 20;
const UDP_PORT: u16 = 7001;
const TCP_PORT: u16 = 7002;
/// Size of a TCP write in bytes; one every [`PERIOD`], so that the stream leaves the CPU mostly idle.
const CHUNK: usize = 4096;

/// A workload and its overlay address.
pub(crate) type Party = (Workload, IpAddr);

/// Statistics of the datagrams of one direction.
#[derive(Clone, Debug, Default)]
pub(crate) struct Datagrams {
    pub(crate) sent: usize,
    /// Datagrams that the kernel refused to send; also counted as lost.
    pub(crate) refused: usize,
    pub(crate) lost: usize,
    pub(crate) duplicates: usize,
    /// Longest time without a datagram.
    pub(crate) longest_gap: Duration,
}

/// Statistics of the TCP stream.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stream {
    /// Longest time without received data.
    pub(crate) longest_gap: Duration,
    pub(crate) retransmits: u64,
    pub(crate) bytes: u64,
}

/// Statistics of datagrams in both directions and of a stream from the first party to the second.
#[derive(Clone, Debug)]
pub(crate) struct Traffic {
    pub(crate) there: Datagrams,
    pub(crate) back: Datagrams,
    pub(crate) stream: Stream,
}

/// Runs the traffic while `during` runs, and shortly before and after.
pub(crate) fn run<T>(a: &Party, b: &Party, during: impl FnOnce() -> Result<T>) -> Result<(Traffic, T)> {
    let (socket_a, socket_b) = (bind(a)?, bind(b)?);
    let listener = b.0.run(|| TcpListener::bind((b.1, TCP_PORT)))?.context("cannot listen")?;
    let connection = a.0.run(|| TcpStream::connect_timeout(&(b.1, TCP_PORT).into(), TAIL * 10))?;
    let connection = connection.context("cannot connect through the overlay")?;
    connection.set_nodelay(true)?;
    connection.set_write_timeout(Some(TAIL * 60))?;
    let (accepted, _) = listener.accept()?;
    let retransmits = || a.0.run(retransmitted)?;
    let retransmits_before = retransmits()?;

    let ended = AtomicBool::new(false);
    let ended = &ended;
    let (there, back, stream, done) = thread::scope(|scope| {
        let there = scope.spawn(|| one_way(&socket_a, &socket_b, b.1, ended));
        let back = scope.spawn(|| one_way(&socket_b, &socket_a, a.1, ended));
        let stream = scope.spawn(|| paced(connection, accepted, ended));
        thread::sleep(TAIL);
        let done = during();
        thread::sleep(TAIL);
        // Stop the traffic on an error too: the scope waits for the threads.
        ended.store(true, Ordering::Relaxed);
        (there.join(), back.join(), stream.join(), done)
    });
    let panicked = |_| anyhow::anyhow!("a thread of the traffic panicked");
    let mut stream = stream.map_err(panicked)??;
    stream.retransmits = retransmits()?.saturating_sub(retransmits_before);
    let traffic = Traffic { there: there.map_err(panicked)??, back: back.map_err(panicked)??, stream };
    Ok((traffic, done?))
}

fn bind((workload, address): &Party) -> Result<UdpSocket> {
    let socket = workload.run(|| UdpSocket::bind((*address, UDP_PORT)))?.context("cannot bind")?;
    // A large buffer: otherwise a delayed receiver would count as loss.
    setsockopt(&socket, RcvBufForce, &RECEIVE_BUFFER)?;
    socket.set_read_timeout(Some(READ_TIMEOUT))?;
    Ok(socket)
}

fn one_way(from: &UdpSocket, to: &UdpSocket, address: IpAddr, ended: &AtomicBool) -> Result<Datagrams> {
    let sending_ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let receiving = scope.spawn(|| receive(to, &sending_ended));
        let sent = send(from, (address, UDP_PORT).into(), ended);
        sending_ended.store(true, Ordering::Relaxed);
        let mut result = receiving.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
        (result.sent, result.refused) = sent;
        // Until here, `lost` holds the number of received datagrams.
        result.lost = result.sent.saturating_sub(result.lost);
        Ok(result)
    })
}

/// Sends numbered datagrams. Returns how many were sent, and how many of them the kernel refused.
fn send(socket: &UdpSocket, to: SocketAddr, ended: &AtomicBool) -> (usize, usize) {
    let (mut number, mut refused) = (0, 0);
    let start = Instant::now();
    while !ended.load(Ordering::Relaxed) {
        if socket.send_to(&(number as u64).to_be_bytes(), to).is_err() {
            refused += 1;
        }
        number += 1;
        // Follow the clock, so that a late wake-up does not slow the flow down.
        let next = start + PERIOD * u32::try_from(number).unwrap_or(u32::MAX);
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    (number, refused)
}

/// Counts the distinct numbers that arrive; returns the count in `lost`.
fn receive(socket: &UdpSocket, sending_ended: &AtomicBool) -> Result<Datagrams> {
    let mut result = Datagrams::default();
    let mut seen: Vec<bool> = Vec::new();
    let mut last: Option<Instant> = None;
    let mut ended_at: Option<Instant> = None;
    let mut buffer = [0; 64];
    while ended_at.is_none_or(|at| at.elapsed() < TAIL) {
        if ended_at.is_none() && sending_ended.load(Ordering::Relaxed) {
            ended_at = Some(Instant::now());
        }
        let read = match socket.recv(&mut buffer) {
            Ok(read) => read,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => continue,
            // An ICMP error about an earlier send of the same socket. The other direction's statistics cover
            // it.
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => continue,
            Err(error) => return Err(error).context("cannot receive"),
        };
        let now = Instant::now();
        result.longest_gap = result.longest_gap.max(last.map_or(Duration::ZERO, |last| now - last));
        last = Some(now);
        let number = buffer.get(..read).and_then(|bytes| bytes.try_into().ok()).map(u64::from_be_bytes);
        let number = number
            .and_then(|number| usize::try_from(number).ok())
            .context("a datagram from another sender")?;
        ensure!(number < 100_000_000, "a datagram from another sender");
        if number >= seen.len() {
            seen.resize(number + 1, false);
        }
        if seen[number] {
            result.duplicates += 1;
        } else {
            seen[number] = true;
            result.lost += 1;
        }
    }
    Ok(result)
}

/// Writes small chunks periodically, and reads them at the other end.
fn paced(mut from: TcpStream, mut to: TcpStream, ended: &AtomicBool) -> Result<Stream> {
    thread::scope(|scope| {
        let reading = scope.spawn(move || -> std::io::Result<Stream> {
            let mut stream = Stream::default();
            let mut buffer = [0; 65536];
            let mut last = Instant::now();
            while let read @ 1.. = to.read(&mut buffer)? {
                stream.bytes += read as u64;
                stream.longest_gap = stream.longest_gap.max(last.elapsed());
                last = Instant::now();
            }
            Ok(stream)
        });
        let mut written = Ok(());
        while written.is_ok() && !ended.load(Ordering::Relaxed) {
            written = from.write_all(&[0; CHUNK]);
            thread::sleep(PERIOD);
        }
        // Ends the reader, for which the scope waits.
        drop(from);
        let read = reading.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?;
        written.context("the TCP stream broke")?;
        read.context("the TCP stream broke")
    })
}

/// Returns the number of TCP retransmits in the calling thread's namespace.
fn retransmitted() -> Result<u64> {
    let text = fs::read_to_string("/proc/thread-self/net/snmp")?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = lines.next().zip(lines.next()).context("no Tcp in /proc/net/snmp")?;
    let place = names.split(' ').position(|name| name == "RetransSegs").context("no RetransSegs")?;
    values.split(' ').nth(place).and_then(|value| value.parse().ok()).context("no number in RetransSegs")
}
