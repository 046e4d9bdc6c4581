//! A lab with a Docker Engine on each host, and one network that all of them have.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use netns_lab::{Engine, Host, Spawned, Workload, wait_until};

use crate::Bench;
use crate::client::{self, Client};
use crate::cluster::address_of;

/// Name of the network in the cluster and in each Engine.
pub(super) const NETWORK: &str = "bench";
const SUBNET: &str = "10.99.0.0/16";
pub(super) const IMAGE: &str = "tiny:1";
/// Timeout of operations that should take at most a second.
const SETTLE: Duration = Duration::from_secs(20);

/// A lab with Engines. The Engines are dropped first.
pub(super) struct Ground {
    pub(super) engines: Vec<Engine>,
    pub(super) lab: netns_lab::Lab,
}

impl Ground {
    pub(super) fn start(bench: &Bench, hosts: usize) -> Result<Self> {
        let program = bench.ovl_docker()?;
        let lab = bench.lab(hosts)?;
        lab.start_all()?;
        let mut engines = Vec::new();
        for host in lab.hosts() {
            let engine = Engine::start_with(host, &[], Some(&program))?;
            engine.import_busybox(IMAGE)?;
            let name = format!("ovl.network={NETWORK}");
            let create =
                ["network", "create", "-d", "ovl", "--ipam-driver", "ovl", "-o", &name, "--subnet", SUBNET];
            engine.call(&[&create[..], &[NETWORK]].concat())?;
            engines.push(engine);
            wait_until(SETTLE, "the network on all hosts", || {
                lab.hosts()
                    .iter()
                    .try_for_each(|host| host.ctl_ok(&["network", "inspect", NETWORK]).map(drop))
            })?;
        }
        Ok(Ground { engines, lab })
    }

    pub(super) fn host(&self, index: usize) -> Result<&Host> {
        self.lab.hosts().get(index).with_context(|| format!("no host of index {index}"))
    }

    pub(super) fn engine(&self, index: usize) -> Result<&Engine> {
        self.engines.get(index).with_context(|| format!("no Engine of index {index}"))
    }

    /// Creates a workload on the network that is not a container.
    pub(super) fn workload(&self, index: usize, name: &str) -> Result<(Workload, IpAddr)> {
        let host = self.host(index)?;
        let workload = host.workload(name)?;
        let request = client::attach(name, NETWORK, workload.path(), None);
        let endpoint = Client::connect(&host.socket())?.ask(&request)?;
        Ok((workload, address_of(&endpoint)?))
    }

    /// Starts a long-running container, with additional arguments.
    pub(super) fn run(&self, index: usize, name: &str, more: &[&str]) -> Result<()> {
        self.run_on(NETWORK, index, name, more)
    }

    /// Like [`run`](Self::run), on another network.
    pub(super) fn run_on(&self, network: &str, index: usize, name: &str, more: &[&str]) -> Result<()> {
        let run = ["run", "--detach", "--name", name, "--stop-signal", "SIGKILL", "--network", network];
        self.engine(index)?.call(&[&run, more, &[IMAGE, "busybox", "sleep", "100000"]].concat()).map(drop)
    }

    /// Joins the Engines into a Swarm with its own overlay network.
    pub(super) fn swarm(&self, network: &str, subnet: &str) -> Result<()> {
        let addresses = self.lab.hosts().iter().map(|host| host.address().map(|address| address.to_string()));
        let addresses: Vec<String> = addresses.collect::<Result<_>>()?;
        let (manager, address) = (self.engine(0)?, addresses.first().context("no hosts")?);
        manager.call(&["swarm", "init", "--advertise-addr", address])?;
        let token = manager.call(&["swarm", "join-token", "--quiet", "worker"])?;
        for (engine, own) in self.engines.iter().zip(&addresses).skip(1) {
            let at = format!("{address}:2377");
            engine.call(&["swarm", "join", "--advertise-addr", own, "--token", &token, &at])?;
        }
        let create =
            ["network", "create", "--driver", "overlay", "--attachable", "--subnet", subnet, network];
        manager.call(&create).map(drop)
    }

    /// Returns the path of the network namespace of a running container.
    pub(super) fn netns_of(&self, index: usize, name: &str) -> Result<String> {
        let container = self.engine(index)?.inspect("container", name)?;
        let pid = container["State"]["Pid"]
            .as_u64()
            .filter(|pid| *pid != 0)
            .context("the container is not running")?;
        Ok(format!("/proc/{pid}/ns/net"))
    }

    pub(super) fn remove(&self, index: usize, name: &str) -> Result<()> {
        self.engine(index)?.call(&["rm", "--force", name]).map(drop)
    }
}

/// Periodic pings to an address that may not exist yet.
pub(super) struct Pings(Spawned);

impl Pings {
    pub(super) fn start(from: &Workload, to: IpAddr, period: Duration) -> Result<Self> {
        Self::start_in(from.host(), from.path_str(), to, period)
    }

    /// Starts pings from the namespace at a path.
    pub(super) fn start_in(host: &Host, netns: &str, to: IpAddr, period: Duration) -> Result<Self> {
        let (enter, period) = (format!("--net={netns}"), format!("{:.3}", period.as_secs_f64()));
        host.spawn(["nsenter", &enter, "ping", "-n", "-D", "-i", &period, &to.to_string()]).map(Pings)
    }

    /// Returns the time of the first answer after `start`.
    pub(super) fn answered_after(&self, start: SystemTime, timeout: Duration) -> Result<SystemTime> {
        let start = start.duration_since(SystemTime::UNIX_EPOCH)?.as_secs_f64();
        let seconds = wait_until(timeout, "an answer", || answers(&self.0.stdout()).find(|at| *at > start))?;
        Ok(SystemTime::UNIX_EPOCH + Duration::from_secs_f64(seconds))
    }
}

/// Parses the Unix times of the answers that `ping -D` has printed, in seconds.
fn answers(text: &str) -> impl Iterator<Item = f64> {
    text.lines()
        .filter(|line| line.contains(" bytes from "))
        .filter_map(|line| line.strip_prefix('[')?.split_once(']')?.0.parse().ok())
}

/// Returns the milliseconds between two times.
pub(super) fn ms_between(from: SystemTime, to: SystemTime) -> Result<f64> {
    match to.duration_since(from) {
        Ok(time) => Ok(time.as_secs_f64() * 1000.0),
        Err(error) => bail!("the end is {:?} before the start", error.duration()),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn answers_of_ping_are_parsed() {
        let text = "PING 10.0.0.1\n[1700000000.25] From 10.0.0.2 icmp_seq=1 Destination Host Unreachable\n\
                    [1700000001.5] 64 bytes from 10.0.0.1: icmp_seq=2\n";
        assert_eq!(super::answers(text).collect::<Vec<_>>(), [1_700_000_001.5]);
    }
}
