//! Who reaches whom: every pod tries every other one at once, from one thread for each protocol.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use tokio::net::{TcpStream, UdpSocket};
use tokio::task::JoinSet;

use super::Pod;
use crate::sctp;

/// What all pods listen to.
pub const PORTS: [u16; 2] = [80, 81];

/// What is not answered within this time is refused.
const PATIENCE: Duration = Duration::from_secs(1);
const AGAIN: Duration = Duration::from_millis(250);

/// What is spoken.
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
    /// Those that pods listen to.
    pub const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::Sctp];

    /// In lower case.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Sctp => "sctp",
        }
    }
}

/// One try.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Probe {
    /// `x/a`.
    pub from: String,
    /// The same.
    pub to: String,
    /// Whether over IPv4.
    pub v4: bool,
    /// What is spoken.
    pub proto: Proto,
    /// To which port.
    pub port: u16,
}

impl std::fmt::Display for Probe {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { from, to, v4, proto, port } = self;
        write!(f, "{from} to {to}:{port}/{} over IPv{}", proto.name(), if *v4 { 4 } else { 6 })
    }
}

/// The tries that were answered.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reached(pub BTreeSet<Probe>);

impl Reached {
    /// What others expected and what not, in words.
    pub fn differences(&self, expected: &Self) -> Vec<String> {
        let wrong = |probes: &mut dyn Iterator<Item = &Probe>, word: &str| -> Vec<String> {
            probes.map(|probe| format!("{word} {probe}")).collect()
        };
        let mut all = wrong(&mut self.0.difference(&expected.0), "passes:");
        all.extend(wrong(&mut expected.0.difference(&self.0), "is refused:"));
        all
    }

    /// How many were answered.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none was.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Every pod tries every other one.
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

/// What one pod reaches.
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
        Proto::Sctp => sctp::ask(at, &targets, PATIENCE)?.into_keys().collect(),
    };
    Ok(answered.iter().filter_map(|target| probes.remove(target)).collect())
}

/// Those that answer, of all that are tried at once.
fn each<F>(targets: Vec<SocketAddr>, try_one: fn(SocketAddr) -> F) -> Result<Vec<SocketAddr>>
where
    F: Future<Output = Result<()>> + Send + 'static,
{
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut tries = JoinSet::new();
        for target in targets {
            tries.spawn(async move { (target, tokio::time::timeout(PATIENCE, try_one(target)).await) });
        }
        let mut answered = Vec::new();
        while let Some(done) = tries.join_next().await {
            let (target, answer) = done.context("a try panicked")?;
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
        if let Ok(answer) = tokio::time::timeout(AGAIN, socket.recv(&mut [0; 8])).await {
            return Ok(answer.map(drop)?);
        }
    }
}
