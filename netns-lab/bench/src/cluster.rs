//! A lab with daemons and one network, in which most figures are measured.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use netns_lab::{Host, Lab, Workload, wait_until, without_prefix_length};
use serde_json::{Value, json};

use super::client::{self, Client, Mac, parse_mac};
use super::neigh::Watcher;

/// Name of the network.
pub(crate) const NETWORK: &str = "bench";
/// Subnet with room for thousands of endpoints.
pub(crate) const SUBNET: &str = "10.99.0.0/16";
/// Timeout of operations that should take milliseconds.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(20);

/// A lab whose daemons are running and know the network.
pub(crate) struct Cluster {
    pub(crate) lab: Lab,
}

/// A MAC address and the destination to which a kernel entry sends its frames.
pub(crate) type Entry = (Mac, IpAddr);

/// How the MAC addresses of hosts' VXLAN devices begin.
const OF_HOSTS: [u8; 1] = [0x1a];

impl Cluster {
    /// Starts the daemons and creates the network.
    pub(crate) fn start(lab: Lab) -> Result<Self> {
        lab.start_all()?;
        let cluster = Cluster { lab };
        cluster.client(0)?.ask(&json!({
            "request": "network-create", "name": NETWORK, "driver": "overlay", "mode": "l2", "subnets": [SUBNET],
        }))?;
        for host in cluster.hosts() {
            let what = format!("the network on {}", host.name());
            let inspect = json!({"request": "network-inspect", "name": NETWORK});
            wait_until(SETTLE_TIMEOUT, &what, || Client::connect(&host.socket())?.ask(&inspect).map(drop))?;
        }
        Ok(cluster)
    }

    pub(crate) fn hosts(&self) -> &[Host] {
        self.lab.hosts()
    }

    pub(crate) fn host(&self, index: usize) -> Result<&Host> {
        self.hosts().get(index).with_context(|| format!("no host of index {index}"))
    }

    pub(crate) fn client(&self, index: usize) -> Result<Client> {
        Client::connect(&self.host(index)?.socket())
    }

    /// Creates a workload, attaches it under its own name, and returns it with its address.
    pub(crate) fn workload(&self, index: usize, name: &str) -> Result<(Workload, IpAddr)> {
        let workload = self.host(index)?.workload(name)?;
        let request = client::attach(name, NETWORK, workload.path(), None);
        let endpoint = self.client(index)?.ask(&request)?;
        Ok((workload, address_of(&endpoint)?))
    }

    /// Creates one workload on each host, named after its host, so that each host builds the network's
    /// devices.
    pub(crate) fn one_workload_each(&self) -> Result<Vec<(Workload, IpAddr)>> {
        let names = self.hosts().iter().map(|host| format!("{}w", host.name()));
        let workloads =
            names.enumerate().map(|(index, name)| self.workload(index, &name)).collect::<Result<_>>()?;
        let everyone: Vec<usize> = (0..self.hosts().len()).collect();
        for (index, host) in self.hosts().iter().enumerate() {
            let others: Vec<usize> = everyone.iter().copied().filter(|other| *other != index).collect();
            let what = format!("{}'s endpoint in the other kernels", host.name());
            wait_until(SETTLE_TIMEOUT, &what, || self.each_holds(&others, index, 1))?;
        }
        Ok(workloads)
    }

    /// Checks that these hosts' kernels hold exactly `count` endpoints of a host. Flood entries, and the host's own, do not
    /// count.
    pub(crate) fn each_holds(&self, hosts: &[usize], of: usize, count: usize) -> Result<()> {
        let destination = self.host(of)?.address()?;
        for index in hosts {
            let held = self.entries(*index, destination)?;
            let is_endpoint = |mac: &Mac| *mac != Mac::default() && !mac.starts_with(&OF_HOSTS);
            let endpoints = held.iter().filter(|(mac, _)| is_endpoint(mac)).count();
            ensure!(endpoints == count, "{} has {endpoints} of {count} endpoints", self.host(*index)?.name());
        }
        Ok(())
    }

    /// Waits until [`each_holds`](Self::each_holds) succeeds.
    pub(crate) fn wait_each_holds(&self, hosts: &[usize], of: usize, count: usize) -> Result<()> {
        let what = format!("{count} endpoints of {} in other kernels", self.host(of)?.name());
        wait_until(SETTLE_TIMEOUT, &what, || self.each_holds(hosts, of, count))
    }

    /// Returns the entries of a host's VXLAN devices towards a destination, including flood entries (zero MAC
    /// address).
    pub(crate) fn entries(&self, index: usize, destination: IpAddr) -> Result<BTreeSet<Entry>> {
        let dump = self.host(index)?.bridge_json(&["fdb", "show"])?;
        let entries = dump.as_array().into_iter().flatten().filter_map(|entry| {
            let to: IpAddr = entry["dst"].as_str()?.parse().ok()?;
            Some((parse_mac(entry["mac"].as_str()?)?, to))
        });
        Ok(entries.filter(|(_, to)| *to == destination).collect())
    }

    /// Attaches an endpoint in each namespace, at most `at_once` at a time. Returns the callers' times in
    /// milliseconds.
    pub(crate) fn attach_all(
        &self,
        index: usize,
        workloads: &[Workload],
        mac: impl Fn(usize) -> Mac + Sync,
        at_once: usize,
    ) -> Result<Vec<Duration>> {
        self.ask_all(index, workloads.len(), at_once, |number| {
            let workload = &workloads[number];
            client::attach(workload.name(), NETWORK, workload.path(), Some(mac(number)))
        })
    }

    pub(crate) fn detach_all(&self, index: usize, workloads: &[Workload], at_once: usize) -> Result<()> {
        self.ask_all(index, workloads.len(), at_once, |number| client::detach(workloads[number].name()))
            .map(drop)
    }

    /// Sends requests to a daemon, each as soon as a connection is free.
    pub(crate) fn ask_all(
        &self,
        index: usize,
        count: usize,
        at_once: usize,
        request: impl Fn(usize) -> Value + Sync,
    ) -> Result<Vec<Duration>> {
        let next = AtomicUsize::new(0);
        let clients = (0..at_once).map(|_| self.client(index)).collect::<Result<Vec<_>>>()?;
        let work = |mut client: Client| -> Result<Vec<Duration>> {
            let mut times = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return Ok(times);
                }
                let request = request(number);
                let start = Instant::now();
                client.ask(&request)?;
                times.push(start.elapsed());
            }
        };
        thread::scope(|scope| {
            let threads: Vec<_> = clients.into_iter().map(|client| scope.spawn(|| work(client))).collect();
            let times = threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(|_| Err(anyhow!("a client panicked"))));
            times.collect::<Result<Vec<_>>>().map(|times| times.concat())
        })
    }

    /// Starts a watcher of the kernels of all hosts but one, in the order of their indices.
    pub(crate) fn watch_others(&self, index: usize) -> Result<Watcher> {
        let others = self.hosts().iter().enumerate().filter(|(other, _)| *other != index);
        Watcher::start(&others.map(|(_, host)| host).collect::<Vec<_>>())
    }
}

/// Returns the first address of an endpoint in a reply of ovld.
pub(crate) fn address_of(endpoint: &Value) -> Result<IpAddr> {
    let text = endpoint["addresses"][0].as_str().with_context(|| format!("no address in {endpoint}"))?;
    without_prefix_length(text).parse().with_context(|| format!("invalid address {text:?}"))
}
