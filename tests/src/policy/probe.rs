//! Probes between all pairs of pods at once, with one thread for each pod and protocol.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use tokio::net::{TcpStream, UdpSocket};
use tokio::task::JoinSet;

use super::Pod;
use crate::sctp;

/// Ports that all pods listen on.
pub const PORTS: [u16; 2] = [80, 81];

/// A probe without an answer within this time counts as refused.
const TIMEOUT: Duration = Duration::from_secs(1);
const RETRY_INTERVAL: Duration = Duration::from_millis(250);

/// Transport protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Proto {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Proto {
    /// Protocols that all pods listen on.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// Name in lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

/// A probe of one address and port.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Probe {
    /// Source pod, such as `x/a`.
    pub from: String,
    /// Destination pod.
    pub to: String,
    /// Whether it goes over IPv4.
    pub v4: bool,
    /// Protocol.
    pub proto: Proto,
    /// Destination port.
    pub port: u16,
}

impl std::fmt::Display for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { from, to, v4, proto, port } = self;
        write!(f, "{from} to {to}:{port}/{} over IPv{}", proto.name(), if *v4 { 4 } else { 6 })
    }
}

/// The probes that were answered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reached(pub BTreeSet<Probe>);

impl Reached {
    /// Describes each probe that was answered against expectation, or not answered although expected.
    pub fn differences(&self, expected: &Self) -> Vec<String> {
        let wrong = |probes: &mut dyn Iterator<Item = &Probe>, word: &str| -> Vec<String> {
            probes.map(|probe| format!("{word} {probe}")).collect()
        };
        let mut all = wrong(&mut self.0.difference(&expected.0), "unexpectedly allowed:");
        all.extend(wrong(&mut expected.0.difference(&self.0), "unexpectedly refused:"));
        all
    }

    /// Number of answered probes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether no probe was answered.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Probes every pod from every other pod.
pub(super) fn all(pods: &[Pod]) -> Result<Reached> {
    thread::scope(|scope| {
        let threads: Vec<_> = pods
            .iter()
            .flat_map(|pod| Proto::ALL.map(|proto| scope.spawn(move || from(pod, pods, proto))))
            .collect();
        let mut reached = Reached::default();
        for thread in threads {
            reached.0.extend(thread.join().map_err(|_| anyhow!("a prober panicked"))??);
        }
        Ok(reached)
    })
}

/// Probes all other pods from one pod, and returns the answered probes.
fn from(pod: &Pod, pods: &[Pod], proto: Proto) -> Result<Vec<Probe>> {
    let mut probes = BTreeMap::new();
    for to in pods.iter().filter(|to| to.full_name() != pod.full_name()) {
        for v4 in [true, false] {
            let Some(address) = to.address(v4) else { continue };
            let address: IpAddr = address.parse()?;
            for port in PORTS {
                let probe = Probe { from: pod.full_name(), to: to.full_name(), v4, proto, port };
                probes.insert(SocketAddr::new(address, port), probe);
            }
        }
    }
    let (at, targets) = (&pod.attached.workload, probes.keys().copied().collect::<Vec<_>>());
    let answered = match proto {
        Proto::Tcp => at.run(|| each(targets, tcp))??,
        Proto::Udp => at.run(|| each(targets, udp))??,
        Proto::Sctp => sctp::probe(at, &targets, TIMEOUT)?.into_keys().collect(),
    };
    Ok(answered.iter().filter_map(|target| probes.remove(target)).collect())
}

/// Probes all targets concurrently, and returns those that answer.
fn each<F>(targets: Vec<SocketAddr>, try_one: fn(SocketAddr) -> F) -> Result<Vec<SocketAddr>>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut tries = JoinSet::new();
        for target in targets {
            tries.spawn(async move { (target, tokio::time::timeout(TIMEOUT, try_one(target)).await) });
        }
        let mut answered = Vec::new();
        while let Some(done) = tries.join_next().await {
            let (target, answer) = done.context("a probe panicked")?;
            if matches!(answer, Ok(Ok(()))) {
                answered.push(target);
            }
        }
        Ok(answered)
    })
}

async fn tcp(target: SocketAddr) -> Result<()> {
    Ok(TcpStream::connect(target).await.map(drop)?)
}

async fn udp(target: SocketAddr) -> Result<()> {
    let any: IpAddr = if target.is_ipv4() { [0; 4].into() } else { [0_u16; 8].into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(target).await?;
    loop {
        socket.send(b"?").await?;
        if let Ok(answer) = tokio::time::timeout(RETRY_INTERVAL, socket.recv(&mut [0; 8])).await {
            return Ok(answer.map(drop)?);
        }
    }
}
