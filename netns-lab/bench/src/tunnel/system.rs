//! A path from one namespace to another, and the measurements on it.

use std::any::Any;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use netns_lab::Netns;

use super::processes::{self, Processes};
use crate::stats::Samples;
use crate::stream::{Cores, Path, Speed};

/// Timeout for the first packet: includes handshakes and routes that arrive by gossip.
const READY_TIMEOUT: Duration = Duration::from_secs(20);
/// Timeout for the answer to one datagram.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(2);
/// Interval at which the answering side checks for the end.
const STOP_TIMEOUT: Duration = Duration::from_millis(50);
const PAYLOAD: [u8; 64] = [0x5a; 64];
/// Number of warm-up exchanges, which do not count.
const WARM_UP: usize = 200;
/// Minimum share of one core that a userspace tunnel uses under TCP load.
const LEAST_WORK: f64 = 0.1;

/// The rate of datagrams sent without a pause.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    /// Datagrams received per second.
    pub(crate) received_s: f64,
    pub(crate) lost_percent: f64,
}

/// A path that carries packets.
pub(crate) struct System {
    from: Netns,
    to: Netns,
    target: IpAddr,
    /// The processes that every packet passes.
    pub(crate) processes: Processes,
    path: Path,
}

impl System {
    pub(crate) fn new(from: &Netns, to: &Netns, target: IpAddr, processes: Processes) -> Result<Self> {
        from.ping_until(target, READY_TIMEOUT)?;
        let path = Path::new(from, to, target)?;
        Ok(System { from: from.clone(), to: to.clone(), target, processes, path })
    }

    /// Measures one TCP stream.
    ///
    /// # Errors
    ///
    /// If the packets did not pass the tunnel's processes.
    pub(crate) fn stream(&self, length: Duration) -> Result<Speed> {
        let before = self.processes.cpu_time()?;
        let speed = self.path.run(length, Cores::Any)?;
        let used = self.processes.cpu_time()?.saturating_sub(before);
        ensure!(
            self.processes.0.is_empty() || used.as_secs_f64() > length.as_secs_f64() * LEAST_WORK,
            "in {length:?} of TCP the tunnel's processes used only {used:?} of CPU time: the packets did not pass them"
        );
        Ok(speed)
    }

    /// Measures datagrams sent without a pause.
    pub(crate) fn datagrams(&self, length: Duration) -> Result<Rate> {
        let [client, server] = self.sockets()?;
        let ended = AtomicBool::new(false);
        let (sent, received) = thread::scope(|scope| {
            let receiving = scope.spawn(|| receive(&server, &ended));
            let sending = scope.spawn(|| send(&client, length));
            let sent = sending.join();
            // Datagrams that arrive later do not count.
            ended.store(true, Ordering::Relaxed);
            Ok::<_, anyhow::Error>((sent.map_err(panicked)?, receiving.join().map_err(panicked)??))
        })?;
        ensure!(sent > 0 && received > 0, "{received} of {sent} datagrams arrived");
        let (sent, received) = (sent as f64, received as f64);
        Ok(Rate {
            received_s: received / length.as_secs_f64(),
            lost_percent: (1.0 - received / sent) * 100.0,
        })
    }

    /// Measures sequential round trips of a datagram with everything on one core, in microseconds.
    pub(crate) fn round_trips(&self, count: usize) -> Result<Samples> {
        let [client, server] = self.sockets()?;
        let _pinned = self.processes.pin()?;
        let ended = AtomicBool::new(false);
        thread::scope(|scope| {
            let answering = scope.spawn(|| answer(&server, &ended));
            let asking = scope.spawn(|| ask(&client, count));
            let asked = asking.join();
            // Stop on an error too: the scope waits for the thread.
            ended.store(true, Ordering::Relaxed);
            answering.join().map_err(panicked)??;
            asked.map_err(panicked)?
        })
    }

    /// Opens a sending and a receiving socket. The receiver has a timeout, so that it can check for the end.
    fn sockets(&self) -> Result<[UdpSocket; 2]> {
        let target = self.target;
        let bind = move |address: IpAddr| UdpSocket::bind((address, 0)).context("cannot bind");
        let server = self.to.run(|| bind(target))??;
        let own = if target.is_ipv4() { "0.0.0.0" } else { "::" };
        let client = self.from.run(|| bind(own.parse()?))??;
        client.connect(server.local_addr()?)?;
        client.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        server.set_read_timeout(Some(STOP_TIMEOUT))?;
        Ok([client, server])
    }
}

fn panicked(_: Box<dyn Any + Send>) -> anyhow::Error {
    anyhow!("a thread of the traffic panicked")
}

/// Sends datagrams for `length` and returns their number. Datagrams that the kernel drops for lack of buffer
/// space count as lost.
fn send(socket: &UdpSocket, length: Duration) -> usize {
    let start = Instant::now();
    let mut sent = 0;
    while start.elapsed() < length {
        socket.send(&PAYLOAD).ok();
        sent += 1;
    }
    sent
}

fn receive(socket: &UdpSocket, ended: &AtomicBool) -> Result<usize> {
    let mut buffer = [0; PAYLOAD.len()];
    let mut received = 0;
    while !ended.load(Ordering::Relaxed) {
        match socket.recv(&mut buffer) {
            Ok(_) => received += 1,
            Err(error) if is_timeout(&error) => {}
            Err(error) => return Err(error).context("cannot receive"),
        }
    }
    Ok(received)
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

fn answer(socket: &UdpSocket, ended: &AtomicBool) -> Result<()> {
    processes::pin_this_thread()?;
    let mut buffer = [0; PAYLOAD.len()];
    while !ended.load(Ordering::Relaxed) {
        match socket.recv_from(&mut buffer) {
            Ok((read, from)) => drop(socket.send_to(&buffer[..read], from).context("cannot answer")?),
            Err(error) if is_timeout(&error) => {}
            Err(error) => return Err(error).context("cannot receive"),
        }
    }
    Ok(())
}

fn ask(socket: &UdpSocket, count: usize) -> Result<Samples> {
    processes::pin_this_thread()?;
    let mut buffer = [0; PAYLOAD.len()];
    let mut times = Vec::with_capacity(count);
    for number in 0..WARM_UP + count {
        let start = Instant::now();
        socket.send(&PAYLOAD).context("cannot send")?;
        socket.recv(&mut buffer).with_context(|| format!("no answer in {ANSWER_TIMEOUT:?}"))?;
        if number >= WARM_UP {
            times.push(start.elapsed().as_secs_f64() * 1e6);
        }
    }
    Ok(Samples::new(times))
}
