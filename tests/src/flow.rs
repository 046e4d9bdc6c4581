//! A flow of numbered datagrams, to detect packet loss.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use netns_lab::{EchoServer, wait_until};

use crate::{Attached, SOON};

/// Time between two datagrams.
const INTERVAL: Duration = Duration::from_millis(5);
/// How long to wait for the last replies.
const TAIL: Duration = Duration::from_secs(3);
/// Datagrams in a second.
const PER_SECOND: u32 = 200;

/// Datagrams that one workload sends to another and gets back, 200 a second, from the start until
/// [`finish`](Flow::finish).
#[derive(Debug)]
pub struct Flow {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU32>,
    sender: Option<JoinHandle<FlowReport>>,
    _echo: EchoServer,
}

/// Result of a flow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlowReport {
    /// Number of datagrams sent.
    pub sent: u32,
    /// Numbers of the datagrams without a reply.
    pub lost: Vec<u32>,
}

impl FlowReport {
    /// The longest time without replies.
    pub fn longest_gap(&self) -> Duration {
        let (mut longest, mut length, mut last) = (0, 0, None);
        for &number in &self.lost {
            length = if last == Some(number.wrapping_sub(1)) { length + 1 } else { 1 };
            longest = longest.max(length);
            last = Some(number);
        }
        INTERVAL * longest
    }
}

impl Flow {
    /// Starts the flow once a ping gets through.
    pub fn start(from: &Attached, to: &Attached) -> Result<Self> {
        from.workload.ping_until(to.address(), SOON)?;
        let address: IpAddr = to.address().parse()?;
        let echo = to.workload.udp_echo_on(SocketAddr::new(address, 0))?;
        let any = if address.is_ipv4() {
            Ipv4Addr::UNSPECIFIED.into()
        } else {
            IpAddr::from(Ipv6Addr::UNSPECIFIED)
        };
        let socket = from.workload.run(|| UdpSocket::bind((any, 0)))??;
        socket.connect((address, echo.port()))?;
        let stop = Arc::new(AtomicBool::new(false));
        let sent = Arc::new(AtomicU32::new(0));
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&sent));
        let sender = std::thread::spawn(move || send(&socket, &stopped, &count));
        Ok(Self { stop, sent, sender: Some(sender), _echo: echo })
    }

    /// Stops the flow, after the last replies have arrived or timed out.
    pub fn finish(mut self) -> Result<FlowReport> {
        self.stop.store(true, Ordering::Relaxed);
        let sender = self.sender.take().context("the flow is already finished")?;
        sender.join().map_err(|_| anyhow!("the flow's thread panicked"))
    }

    /// Waits until one more second's datagrams are sent.
    pub fn run_for_a_second(&self) -> Result<()> {
        let enough = self.sent.load(Ordering::Relaxed) + PER_SECOND;
        wait_until(SOON, "more datagrams of a flow", || self.sent.load(Ordering::Relaxed) >= enough)
    }

    /// Stops the flow after one more second, and fails if a datagram was lost.
    pub fn finish_without_loss(self) -> Result<()> {
        self.run_for_a_second()?;
        let FlowReport { sent, lost } = self.finish()?;
        let ends = (lost.first(), lost.last());
        ensure!(lost.is_empty(), "{} of {sent} datagrams were lost (first and last: {ends:?})", lost.len());
        Ok(())
    }
}

impl Drop for Flow {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(sender) = self.sender.take() {
            sender.join().ok();
        }
    }
}

fn send(socket: &UdpSocket, stop: &AtomicBool, count: &AtomicU32) -> FlowReport {
    let mut unanswered = BTreeSet::new();
    let mut sent = 0_u32;
    while !stop.load(Ordering::Relaxed) {
        unanswered.insert(sent);
        // A datagram that the kernel refuses to send counts as lost.
        socket.send(&sent.to_be_bytes()).ok();
        sent += 1;
        count.store(sent, Ordering::Relaxed);
        collect(socket, &mut unanswered, Instant::now() + INTERVAL, false);
    }
    collect(socket, &mut unanswered, Instant::now() + TAIL, true);
    FlowReport { sent, lost: unanswered.into_iter().collect() }
}

/// Receives replies until the deadline, or earlier if `until_all` is set and none is missing.
fn collect(socket: &UdpSocket, unanswered: &mut BTreeSet<u32>, deadline: Instant, until_all: bool) {
    let mut buffer = [0; 4];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || (until_all && unanswered.is_empty()) {
            return;
        }
        // Errors other than a timeout come from ICMP messages. They do not end the wait.
        if socket.set_read_timeout(Some(left)).is_ok() && socket.recv(&mut buffer).is_ok() {
            unanswered.remove(&u32::from_be_bytes(buffer));
        }
    }
}
