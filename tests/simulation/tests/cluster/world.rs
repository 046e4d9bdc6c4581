//! A cluster of simulated hosts: what is done to it, and what its daemons have acknowledged.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Error, Result, bail, ensure};
use ipnet::IpNet;
use ovl_control::{Attach, EndpointInfo, Failure, FailureKind, NetnsRef, NetworkCreate, Reply, Request};
use ovl_kernel::{SimulatedKernel, Underlay};
use ovl_mesh::keys::ClusterKey;
use ovl_proto::bandwidth::Bandwidth;
use ovl_proto::object::{Driver, Mode};
use ovl_proto::secret::Secret;
use ovld::{Config, Inspection};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::host::{Call, Host, Running};
use crate::nat::Kind;
use crate::network::Network;
use crate::random::Random;

/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a host that missed a rotation of the cluster key is left alone before it gets the key by hand.
const KEY_WITHIN: Duration = Duration::from_secs(20);
/// How many detached endpoints are remembered, to check that their names are gone.
const REMEMBERED: usize = 64;
/// How many actions are told after a failure.
const TOLD: usize = 60;

/// A cluster of simulated hosts. Runs on a paused tokio clock, on a `LocalSet`.
pub(crate) struct World {
    /// The links between the hosts.
    pub(crate) network: Network,
    /// What the schedule of faults draws from.
    pub(crate) random: Random,
    pub(crate) hosts: Vec<Host>,
    /// Acknowledged networks.
    pub(crate) networks: BTreeMap<String, Mode>,
    /// Networks whose removal was acknowledged.
    pub(crate) removed: BTreeSet<String>,
    /// Acknowledged endpoints by host and name.
    pub(crate) attached: BTreeMap<(usize, String), Given>,
    /// Endpoints whose attach or detach has no answer yet, or an error. They may exist or not, until the cluster has
    /// settled.
    pub(crate) unknown: BTreeSet<(usize, String)>,
    /// Network and name of endpoints that are no more, the newest one last. A name may be in use again.
    pub(crate) detached: VecDeque<(String, String)>,
    /// The cluster keys, the oldest one first.
    pub(crate) keys: Vec<ClusterKey>,
    /// Index of the last key whose rotation was acknowledged.
    pub(crate) acknowledged_key: usize,
    /// The address that was last given on each host and network.
    newest: BTreeMap<(usize, String), IpAddr>,
    pending: Vec<Pending>,
    directory: PathBuf,
    start: Instant,
    told: VecDeque<String>,
}

/// What an endpoint was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Given {
    /// The network's name.
    pub(crate) network: String,
    /// The addresses, each with the prefix length of its subnet.
    pub(crate) addresses: Vec<IpNet>,
}

/// A request that is in flight.
struct Pending {
    host: usize,
    wish: Wish,
    answer: oneshot::Receiver<Reply>,
    since: Instant,
}

/// What a request in flight asks for.
#[derive(Debug)]
enum Wish {
    Attach {
        name: String,
        /// It may be refused because something that it names is in use.
        may_clash: bool,
        /// The network is so small that it may be full.
        may_be_full: bool,
    },
    Detach {
        name: String,
        network: String,
    },
    /// Index of the key.
    Rotate(usize),
}

/// An endpoint to be attached.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted {
    /// The network's name.
    pub(crate) network: String,
    /// The endpoint's name.
    pub(crate) name: String,
    /// Another name, which several endpoints may have.
    pub(crate) alias: Option<String>,
    /// A particular address.
    pub(crate) address: Option<IpAddr>,
    /// Another endpoint had the name before.
    pub(crate) used_before: bool,
}

impl World {
    /// A world without hosts. Its files are removed when it is dropped.
    pub(crate) fn new(seed: u64) -> Result<Self> {
        let mut random = Random::new(seed);
        // Several worlds of one process may have one seed.
        static WORLDS: AtomicU64 = AtomicU64::new(0);
        let number = WORLDS.fetch_add(1, Ordering::Relaxed);
        let directory = files().join(format!("ovl-simulation-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&directory)?;
        std::fs::write(directory.join("ovld.toml"), "")?;
        // A host finds out by itself only if it owns the host's addresses.
        std::fs::write(directory.join("hidden.toml"), "behind_nat = true\n")?;
        let keys = vec![new_key(&mut random)];
        Ok(Self {
            network: Network::new(random.split()),
            random,
            hosts: Vec::new(),
            networks: BTreeMap::new(),
            removed: BTreeSet::new(),
            attached: BTreeMap::new(),
            unknown: BTreeSet::new(),
            detached: VecDeque::new(),
            keys,
            acknowledged_key: 0,
            newest: BTreeMap::new(),
            pending: Vec::new(),
            directory,
            start: Instant::now(),
            told: VecDeque::new(),
        })
    }

    /// Adds hosts, starts their daemons, and waits until all are members of one cluster.
    pub(crate) async fn start(&mut self, count: usize) -> Result<()> {
        (0..count).try_for_each(|_| self.add_host())?;
        self.wait_for_members().await
    }

    /// Waits until all hosts are members of one cluster.
    pub(crate) async fn wait_for_members(&mut self) -> Result<()> {
        let members = self.living().len();
        for _ in 0..120 {
            self.run_for(Duration::from_secs(1)).await;
            let all = self.inspect_all().await?;
            if all.values().all(|seen| seen.members.len() == members) {
                return Ok(());
            }
        }
        bail!("the cluster has not formed within two minutes")
    }

    /// Adds a host behind NAT and starts its daemon.
    pub(crate) fn add_hidden_host(&mut self, kind: Kind) -> Result<()> {
        let number = u32::try_from(self.hosts.len())?;
        let (inner, outer) = (address_of(number), Ipv4Addr::from_bits(0xcb00_0001 + number));
        self.network.hide(inner, kind, outer.into());
        self.add_host()
    }

    /// Adds a host and starts its daemon.
    pub(crate) fn add_host(&mut self) -> Result<()> {
        let number = self.hosts.len();
        let address = address_of(u32::try_from(number)?);
        let prefix = IpNet::new(address, 16)?;
        let underlay = Underlay { device: "eth0".to_owned(), index: 2, mtu: 1500, prefix, by_peers: false };
        let name = format!("host{number}");
        let directory = self.directory.join(&name);
        std::fs::create_dir_all(directory.join("state"))?;
        self.hosts.push(Host {
            name,
            address,
            kernel: SimulatedKernel::new(underlay),
            directory,
            ahead_ms: Arc::default(),
            slow_disk: Rc::default(),
            boots: 0,
            gone: false,
            running: None,
        });
        // As the operator of a new host does, from a host of the cluster.
        let first = self.hosts.iter().find(|host| !host.gone && host.key_file().exists());
        let key = match first {
            Some(host) => std::fs::read_to_string(host.key_file())?,
            None => self.keys.first().context("the world has no key")?.to_text().0,
        };
        self.put_key(number, &key)?;
        self.boot(number)
    }

    /// The hosts that have not died.
    pub(crate) fn living(&self) -> Vec<usize> {
        self.hosts.iter().enumerate().filter(|(_, host)| !host.gone).map(|(at, _)| at).collect()
    }

    /// The hosts whose daemon was started and not ended.
    pub(crate) fn running(&self) -> Vec<usize> {
        let running = self.hosts.iter().enumerate().filter(|(_, host)| host.running.is_some());
        running.map(|(at, _)| at).collect()
    }

    /// Whether the daemon of a host was started and not ended.
    pub(crate) fn is_running(&self, host: usize) -> bool {
        self.hosts.get(host).is_some_and(|host| host.running.is_some())
    }

    /// Starts the daemon of a host whose daemon does not run. Switches the host on if it is off.
    pub(crate) fn boot(&mut self, host: usize) -> Result<()> {
        self.tell(format!("boot host{host}"));
        let config = self.config(host)?;
        let (random, start) = (self.random.split(), self.start);
        let address = self.host(host)?.address;
        self.network.power(address, true);
        let interface = self.network.host(address);
        let entry = self.host_mut(host)?;
        ensure!(entry.running.is_none() && !entry.gone, "{} cannot be started", entry.name);
        entry.start(config, interface, start, random);
        Ok(())
    }

    fn config(&self, host: usize) -> Result<Config> {
        let entry = self.host(host)?;
        let (state, run) = (entry.directory.join("state"), entry.run_dir());
        std::fs::create_dir_all(&run)?;
        let mut args: Vec<OsString> = vec!["ovld".into()];
        let mut flag = |name: &str, value: &Path| args.extend([name.into(), value.into()]);
        let file = if self.network.is_hidden(entry.address) { "hidden.toml" } else { "ovld.toml" };
        flag("--config", &self.directory.join(file));
        flag("--node", Path::new(&entry.name));
        flag("--state-dir", &state);
        flag("--run-dir", &run);
        flag("--cluster-key", &entry.key_file());
        flag("--advertise", Path::new(&entry.address.to_string()));
        // All join the first two, so that a restart of the first one finds somebody.
        let living = self.hosts.iter().filter(|other| !other.gone).take(2);
        for other in living.filter(|other| other.address != entry.address) {
            flag("--join", Path::new(&other.address.to_string()));
        }
        if host == 0 {
            args.push("--bootstrap".into());
        }
        Config::parse(args)
    }

    /// Ends daemons at one instant as SIGKILL does. Their kernels go on.
    pub(crate) async fn kill(&mut self, hosts: &[usize]) -> Result<()> {
        self.tell(format!("kill {hosts:?}"));
        // What was answered before counts.
        self.collect()?;
        let mut ended: Vec<(usize, Running)> = Vec::new();
        for host in hosts {
            let entry = self.host_mut(*host)?;
            let running = entry.running.take().with_context(|| format!("{} does not run", entry.name))?;
            entry.kernel.halt();
            let address = entry.address;
            self.network.close(address);
            running.task.abort();
            ended.push((*host, running));
        }
        for (host, running) in ended {
            match running.task.await {
                Ok(ended) => ended.with_context(|| format!("host{host} had ended"))?,
                Err(error) if error.is_cancelled() => {}
                Err(error) => bail!("host{host}: {error}"),
            }
        }
        Ok(())
    }

    /// Ends a daemon as SIGTERM does.
    pub(crate) async fn stop(&mut self, host: usize) -> Result<()> {
        self.tell(format!("stop host{host}"));
        let entry = self.host_mut(host)?;
        let running = entry.running.take().with_context(|| format!("{} does not run", entry.name))?;
        let (reply, done) = oneshot::channel();
        drop(running.calls.send(Call::Stop(reply)));
        let _ = done.await;
        let ended = running.task.await?;
        let entry = self.host(host)?;
        // It does not wait long for a slow disk. What it has acknowledged is on it.
        if !entry.slow_disk.get() {
            ended?;
        }
        entry.kernel.halt();
        self.network.close(entry.address);
        Ok(())
    }

    /// Switches a host off: its kernel and its run directory are empty afterwards, and its state directory has what
    /// was written until then.
    pub(crate) async fn power_off(&mut self, host: usize) -> Result<()> {
        self.tell(format!("power off host{host}"));
        let entry = self.host(host)?;
        // First, so that the end of the daemon does not close its streams.
        self.network.power(entry.address, false);
        if entry.running.is_some() {
            self.kill(&[host]).await?;
        }
        let entry = self.host_mut(host)?;
        entry.kernel.empty();
        entry.boots += 1;
        let run_dir = entry.run_dir();
        // It is gone already if the host was off before.
        match std::fs::remove_dir_all(&run_dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("emptying {}", run_dir.display()));
            }
            Ok(()) | Err(_) => {}
        }
        for ((at, name), info) in &self.attached {
            if *at == host {
                remember(&mut self.detached, &info.network, name);
            }
        }
        self.attached.retain(|(at, _), _| *at != host);
        self.unknown.retain(|(at, _)| *at != host);
        Ok(())
    }

    /// Switches a host off for good. [`Self::forget_gone`] takes it out of the cluster.
    pub(crate) async fn bury(&mut self, host: usize) -> Result<()> {
        self.power_off(host).await?;
        self.host_mut(host)?.gone = true;
        Ok(())
    }

    /// Ends a daemon, gently or not, and starts it again.
    pub(crate) async fn restart(&mut self, host: usize, gently: bool) -> Result<()> {
        if gently {
            self.stop(host).await?;
        } else {
            self.kill(&[host]).await?;
        }
        self.boot(host)
    }

    /// Cuts these hosts off from all others.
    pub(crate) fn partition(&mut self, away: &BTreeSet<usize>) {
        self.tell(format!("cut off {away:?}"));
        let sides = self.hosts.iter().enumerate();
        self.network
            .partition(sides.map(|(at, host)| (host.address, usize::from(away.contains(&at)))).collect());
    }

    /// Sets the share of datagrams that are lost, in percent.
    pub(crate) fn set_loss(&mut self, percent: usize) {
        self.tell(format!("lose {percent} % of the datagrams"));
        self.network.set_loss(percent);
    }

    /// Ends the partition, makes disks fast, sets clocks right that are far off, and starts all daemons that do not run.
    pub(crate) fn heal(&mut self) -> Result<()> {
        self.tell("heal".to_owned());
        self.network.partition(BTreeMap::new());
        self.network.set_loss(0);
        self.hosts.iter().for_each(|host| host.slow_disk.set(false));
        self.set_clocks_right();
        let down: Vec<usize> = self.living().into_iter().filter(|at| !self.is_running(*at)).collect();
        down.into_iter().try_for_each(|host| self.boot(host))
    }

    /// Steps the wall clock of a host.
    pub(crate) fn step_clock(&mut self, host: usize, by_ms: i64) -> Result<()> {
        self.tell(format!("step the clock of host{host} by {by_ms} ms"));
        let clock = &self.host(host)?.ahead_ms;
        clock.fetch_add(by_ms, Ordering::Relaxed);
        Ok(())
    }

    /// Sets all clocks right that are more than an hour off.
    fn set_clocks_right(&self) {
        for host in &self.hosts {
            if host.ahead_ms.load(Ordering::Relaxed).unsigned_abs() > 3_600_000 {
                host.ahead_ms.store(0, Ordering::Relaxed);
            }
        }
    }

    /// Makes the disk of a host slow, or fast if it is slow.
    pub(crate) fn toggle_disk(&mut self, host: usize) -> Result<()> {
        let slow = !self.host(host)?.slow_disk.get();
        self.tell(format!("{} disk on host{host}", if slow { "slow" } else { "fast" }));
        self.host(host)?.slow_disk.set(slow);
        Ok(())
    }

    /// Deletes an entry of a host's data plane behind the daemon's back.
    pub(crate) fn interfere(&mut self, host: usize) -> Result<()> {
        self.tell(format!("interfere on host{host}"));
        let pick = self.random.next_u64();
        self.host(host)?.kernel.interfere(|dataplane| {
            let count = u64::try_from(dataplane.remotes.len()).unwrap_or(0).max(1);
            let at = usize::try_from(pick % count).unwrap_or(0);
            if let Some(key) = dataplane.remotes.keys().nth(at).copied() {
                dataplane.remotes.remove(&key);
            }
        });
        Ok(())
    }

    /// Lets time pass.
    pub(crate) async fn run_for(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }

    /// Asks a daemon. `None` if it does not run or does not answer within a minute.
    pub(crate) async fn ask(&self, host: usize, request: Request) -> Result<Option<Reply>> {
        let Some(answer) = self.host(host)?.ask(request) else { return Ok(None) };
        Ok(tokio::time::timeout(PATIENCE, answer).await.ok().and_then(Result::ok))
    }

    /// Creates an overlay network. Returns whether it was acknowledged.
    pub(crate) async fn create_network(
        &mut self,
        host: usize,
        name: &str,
        mode: Mode,
        subnet: &str,
    ) -> Result<bool> {
        self.tell(format!("create network {name} on host{host}"));
        let create = NetworkCreate {
            name: name.to_owned(),
            driver: Driver::Overlay,
            mode,
            subnets: vec![subnet.parse()?],
            vni: None,
            encrypted: false,
            auto_encrypt: false,
            internal: false,
            mtu: None,
            backend: None,
            block_lengths: Vec::new(),
            dns: false,
            external_names: false,
        };
        match self.ask(host, Request::NetworkCreate(create)).await? {
            Some(Reply::Network(_)) => {
                self.networks.insert(name.to_owned(), mode);
                Ok(true)
            }
            Some(Reply::Error(Failure { kind: FailureKind::Unavailable, .. })) | None => Ok(false),
            Some(other) => bail!("network {name} was not created on host{host}: {other:?}"),
        }
    }

    /// Removes a network. Returns whether that was acknowledged.
    pub(crate) async fn remove_network(&mut self, host: usize, name: &str) -> Result<bool> {
        self.tell(format!("remove network {name} on host{host}"));
        match self.ask(host, Request::NetworkRm { name: name.to_owned() }).await? {
            Some(Reply::Done | Reply::Network(_)) => {
                self.networks.remove(name);
                self.removed.insert(name.to_owned());
                Ok(true)
            }
            Some(Reply::Error(Failure { kind: FailureKind::Unavailable, .. })) | None => Ok(false),
            Some(other) => bail!("network {name} was not removed on host{host}: {other:?}"),
        }
    }

    /// Begins to attach an endpoint. [`Self::collect`] takes the answer.
    pub(crate) fn attach(&mut self, host: usize, wanted: Wanted) -> Result<()> {
        let Wanted { network, name, alias, address, used_before } = wanted;
        self.tell(format!("attach {name} to {network} on host{host} {address:?}"));
        let attach = Attach {
            name: name.clone(),
            network: network.clone(),
            netns: NetnsRef::Path(format!("/run/netns/{name}").into()),
            addresses: address.into_iter().collect(),
            mac: None,
            ifname: None,
            aliases: alias.into_iter().collect(),
            namespace: None,
            labels: Default::default(),
            publish: Vec::new(),
            not_ready: false,
            allowed: Vec::new(),
            allowed_macs: Vec::new(),
            pod: None,
            bandwidth: Bandwidth::default(),
        };
        let may_be_full = network == "green";
        self.unknown.insert((host, name.clone()));
        let wish = Wish::Attach { name, may_clash: address.is_some() || used_before, may_be_full };
        self.begin(host, Request::Attach(Box::new(attach)), wish)
    }

    /// Begins to detach an endpoint. [`Self::collect`] takes the answer.
    pub(crate) fn detach(&mut self, host: usize, name: &str) -> Result<()> {
        self.tell(format!("detach {name} on host{host}"));
        let key = (host, name.to_owned());
        let Some(info) = self.attached.remove(&key) else { return Ok(()) };
        self.unknown.insert(key);
        let request = Request::Detach { name: name.to_owned(), network: None, namespace: None };
        self.begin(host, request, Wish::Detach { name: name.to_owned(), network: info.network })
    }

    /// Begins a rotation of the cluster key on a host. [`Self::collect`] takes the answer.
    pub(crate) fn rotate_key(&mut self, host: usize) -> Result<()> {
        self.tell(format!("rotate the cluster key on host{host}"));
        let key = new_key(&mut self.random);
        let request = Request::KeyRotateCluster { key: Secret(key.to_text().0) };
        self.keys.push(key);
        self.begin(host, request, Wish::Rotate(self.keys.len() - 1))
    }

    fn begin(&mut self, host: usize, request: Request, wish: Wish) -> Result<()> {
        let answer = match self.host(host)?.ask(request) {
            Some(answer) => answer,
            // A channel that is closed: nobody answers.
            None => oneshot::channel().1,
        };
        self.pending.push(Pending { host, wish, answer, since: Instant::now() });
        Ok(())
    }

    /// Takes the answers that have arrived.
    ///
    /// # Errors
    ///
    /// An address of an acknowledged endpoint was given away again, or a refusal is none that a fault explains.
    pub(crate) fn collect(&mut self) -> Result<()> {
        for mut pending in std::mem::take(&mut self.pending) {
            match pending.answer.try_recv() {
                Ok(reply) => self.answered(pending, reply)?,
                Err(oneshot::error::TryRecvError::Empty) => {
                    ensure!(
                        pending.since.elapsed() < PATIENCE,
                        "host{} does not answer {:?} within {PATIENCE:?}",
                        pending.host,
                        pending.wish
                    );
                    self.pending.push(pending);
                }
                // The daemon has ended: the outcome stays unknown.
                Err(oneshot::error::TryRecvError::Closed) => {}
            }
        }
        Ok(())
    }

    /// Waits for all answers.
    pub(crate) async fn collect_all(&mut self) -> Result<()> {
        while !self.pending.is_empty() {
            self.run_for(Duration::from_millis(20)).await;
            self.collect()?;
        }
        Ok(())
    }

    fn answered(&mut self, pending: Pending, reply: Reply) -> Result<()> {
        let Pending { host, wish, .. } = pending;
        match (wish, reply) {
            (Wish::Detach { name, network }, Reply::Done) => {
                self.tell(format!("{name} is detached"));
                self.unknown.remove(&(host, name.clone()));
                remember(&mut self.detached, &network, &name);
            }
            (Wish::Attach { name, .. }, Reply::Endpoint(info)) => {
                let EndpointInfo { network, addresses, .. } = *info;
                self.given(host, name, Given { network, addresses })?;
            }
            (Wish::Rotate(key), Reply::Keys(_)) => {
                self.tell(format!("key {key} is agreed"));
                self.acknowledged_key = self.acknowledged_key.max(key);
            }
            (_, Reply::Error(Failure { kind: FailureKind::Unavailable | FailureKind::NotFound, .. })) => {}
            // Refused, and nothing else than that.
            (
                Wish::Attach { name, may_clash: true, .. },
                Reply::Error(Failure { kind: FailureKind::Conflict, .. }),
            )
            | (
                Wish::Attach { name, may_be_full: true, .. },
                Reply::Error(Failure { kind: FailureKind::Exhausted, .. }),
            ) => {
                self.tell(format!("{name} is refused"));
                self.unknown.remove(&(host, name));
            }
            // Another rotation is under way.
            (Wish::Rotate(_), Reply::Error(Failure { kind: FailureKind::Conflict, .. })) => {}
            (Wish::Attach { name, .. } | Wish::Detach { name, .. }, other) => {
                bail!("{name} on host{host}: {other:?}")
            }
            (Wish::Rotate(_), other) => bail!("a rotation of the cluster key on host{host}: {other:?}"),
        }
        Ok(())
    }

    /// An attach was acknowledged.
    fn given(&mut self, host: usize, name: String, info: Given) -> Result<()> {
        self.tell(format!("{name} has {:?}", info.addresses));
        for ((at, known), other) in self.attached.iter().filter(|(_, other)| other.network == info.network) {
            if let Some(address) = info.addresses.iter().find(|address| other.addresses.contains(address)) {
                bail!("{address} of {known} on host{at} was given to {name} on host{host}");
            }
        }
        if let Some(address) = info.addresses.first() {
            self.newest.insert((host, info.network.clone()), address.addr());
        }
        self.unknown.remove(&(host, name.clone()));
        self.attached.insert((host, name), info);
        Ok(())
    }

    /// The address that was last given on a host and network. `None` if there was none yet.
    pub(crate) fn newest_address(&self, host: usize, network: &str) -> Option<IpAddr> {
        self.newest.get(&(host, network.to_owned())).copied()
    }

    /// The acknowledged endpoints of a host.
    pub(crate) fn attached_on(&self, host: usize) -> Vec<String> {
        self.attached.keys().filter(|(at, _)| *at == host).map(|(_, name)| name.clone()).collect()
    }

    /// Takes hosts that have died out of the cluster, as an operator does.
    pub(crate) async fn forget_gone(&mut self) -> Result<()> {
        let gone: Vec<String> =
            self.hosts.iter().filter(|host| host.gone).map(|host| host.name.clone()).collect();
        for node in gone {
            let mut last = None;
            for second in 0..120 {
                // Hosts that missed a rotation may be needed for a majority.
                if second == KEY_WITHIN.as_secs() {
                    self.deliver_keys().await?;
                }
                let ask = self.random.pick(&self.running()).context("no daemon runs")?;
                match self.ask(ask, Request::PeersForget { node: node.clone() }).await? {
                    Some(Reply::Done) => {
                        last = None;
                        break;
                    }
                    // Forgotten before.
                    Some(Reply::Error(Failure { kind: FailureKind::NotFound, .. })) => {
                        last = None;
                        break;
                    }
                    other => last = Some(other),
                }
                self.run_for(Duration::from_secs(1)).await;
            }
            if let Some(answer) = last {
                bail!("{node} has died and is not forgotten within two minutes: {answer:?}");
            }
        }
        Ok(())
    }

    /// Puts the agreed cluster key into the key file of each host that does not have it, and restarts its daemon, as
    /// the problem that it reports tells the operator to do.
    pub(crate) async fn deliver_keys(&mut self) -> Result<()> {
        let all = self.inspect_all().await?;
        let Some(newest) = all.values().max_by_key(|seen| seen.version) else { return Ok(()) };
        let Some(agreed) = newest.agreed_key else { return Ok(()) };
        let key = self.keys.iter().find(|key| key.id() == agreed).context("a key that nobody made")?;
        let text = key.to_text().0;
        for (host, _) in all.iter().filter(|(_, seen)| !seen.keys.has(agreed)) {
            self.tell(format!("put key {agreed} on host{host}"));
            self.put_key(*host, &text)?;
            self.restart(*host, false).await?;
        }
        Ok(())
    }

    fn put_key(&self, host: usize, text: &str) -> Result<()> {
        use std::os::unix::fs::PermissionsExt as _;
        let path = self.host(host)?.key_file();
        std::fs::write(&path, text)?;
        Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?)
    }

    /// What all running daemons know.
    pub(crate) async fn inspect_all(&self) -> Result<BTreeMap<usize, Inspection>> {
        let mut all = BTreeMap::new();
        for (at, host) in self.hosts.iter().enumerate() {
            let Some(running) = &host.running else { continue };
            let (reply, answer) = oneshot::channel();
            drop(running.calls.send(Call::Inspect(reply)));
            let seen = tokio::time::timeout(PATIENCE, answer).await;
            all.insert(at, seen.context("no answer")?.with_context(|| format!("{} has ended", host.name))?);
        }
        Ok(all)
    }

    /// Returns the error of a daemon that has ended by itself.
    pub(crate) async fn failed(&mut self) -> Option<Error> {
        for host in &mut self.hosts {
            if let Some(running) = host.running.take_if(|running| running.task.is_finished()) {
                let why = match running.task.await {
                    Ok(Ok(())) => anyhow::anyhow!("without an error"),
                    Ok(Err(error)) => error,
                    Err(error) => error.into(),
                };
                return Some(why.context(format!("the daemon of {} has ended", host.name)));
            }
        }
        None
    }

    /// Waits until all invariants hold, and returns how long that took.
    ///
    /// # Errors
    ///
    /// Names the invariant that does not hold after `within`.
    pub(crate) async fn settle(&mut self, within: Duration) -> Result<Duration> {
        self.collect_all().await?;
        self.forget_gone().await?;
        let start = Instant::now();
        let mut keys_at = start + KEY_WITHIN;
        loop {
            self.run_for(Duration::from_millis(500)).await;
            match self.check().await {
                Ok(found) => {
                    self.resolve(found);
                    return Ok(start.elapsed());
                }
                Err(error) if start.elapsed() > within => {
                    return Err(error.context(format!("not settled within {within:?}")));
                }
                Err(_) => {}
            }
            if let Some(error) = self.failed().await {
                return Err(error);
            }
            if Instant::now() > keys_at {
                self.deliver_keys().await?;
                keys_at += KEY_WITHIN;
            }
        }
    }

    /// Takes note of all endpoints of a cluster at rest: nothing is unknown any more.
    fn resolve(&mut self, mut found: BTreeMap<(usize, String), Given>) {
        for key in std::mem::take(&mut self.unknown) {
            if let Some(given) = found.remove(&key) {
                self.attached.insert(key, given);
            }
        }
    }

    /// Notes an action, to be told after a failure.
    pub(crate) fn tell(&mut self, action: String) {
        let at = self.start.elapsed().as_secs_f64();
        self.told.push_back(format!("{at:10.3} {action}"));
        if self.told.len() > TOLD {
            self.told.pop_front();
        }
    }

    /// The last actions, with the seconds since the start.
    pub(crate) fn told(&self) -> String {
        self.told.iter().map(|line| format!("{line}\n")).collect()
    }

    /// A host.
    pub(crate) fn host(&self, host: usize) -> Result<&Host> {
        self.hosts.get(host).with_context(|| format!("there is no host{host}"))
    }

    fn host_mut(&mut self, host: usize) -> Result<&mut Host> {
        self.hosts.get_mut(host).with_context(|| format!("there is no host{host}"))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Where the files of hosts are: in memory if possible. Daemons write some hundred times in a simulated second.
fn files() -> PathBuf {
    let memory = PathBuf::from("/dev/shm");
    if memory.is_dir() { memory } else { std::env::temp_dir() }
}

fn new_key(random: &mut Random) -> ClusterKey {
    let mut bytes = [0; 32];
    random.fill(&mut bytes);
    ClusterKey::new(bytes)
}

fn remember(detached: &mut VecDeque<(String, String)>, network: &str, name: &str) {
    detached.push_back((network.to_owned(), name.to_owned()));
    if detached.len() > REMEMBERED {
        detached.pop_front();
    }
}

/// The address of a host on its own device.
fn address_of(number: u32) -> IpAddr {
    Ipv4Addr::from_bits(0xc0a8_0001 + number).into()
}
