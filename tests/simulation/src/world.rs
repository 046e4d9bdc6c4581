//! Hosts, faults and invariants.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use ipnet::IpNet;
use ovl_control::{Attach, EndpointInfo, Failure, FailureKind, NetnsRef, NetworkCreate, Reply, Request};
use ovl_dataplane::diff::diff;
use ovl_kernel::{KernelEvent, KernelHandle, Prober, SimulatedKernel, Underlay};
use ovl_mesh::keys::{ClusterKey, TunnelSecret};
use ovl_mesh::transport::Transport;
use ovl_proto::object::{Driver, Mode};
use ovl_proto::table::Entry;
use ovld::{Config, Daemon, Disk, Environment, Inspection};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, LocalSet, spawn_local};
use tokio::time::Instant;

use crate::network::{Interface, Network};
use crate::random::Random;

/// How long the kernel takes for a request.
const KERNEL_LATENCY: Duration = Duration::from_micros(500);
/// How long the disk takes to write the state file.
const DISK_LATENCY: Duration = Duration::from_millis(3);
/// The wall clock at the start, in milliseconds since 1970.
const START_MS: u64 = 1_750_000_000_000;
/// How long a client waits for an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A cluster of simulated hosts. Runs on a paused tokio clock, on a `LocalSet`.
pub struct World {
    /// The links between the hosts.
    pub network: Network,
    /// What the schedule of faults draws from.
    pub random: Random,
    directory: PathBuf,
    hosts: Vec<Host>,
    /// Acknowledged endpoints by host and name.
    attached: BTreeMap<(usize, String), EndpointInfo>,
    /// Endpoints whose attach or detach got no answer, or an error. They may exist or not.
    unknown: BTreeSet<(usize, String)>,
    pending: Vec<Pending>,
}

/// A request that is in flight.
struct Pending {
    host: usize,
    name: String,
    /// Else it is attached.
    detach: bool,
    answer: oneshot::Receiver<Reply>,
    since: Instant,
}

struct Host {
    name: String,
    address: IpAddr,
    kernel: SimulatedKernel,
    /// What its wall clock is ahead, in milliseconds.
    ahead_ms: Rc<Cell<i64>>,
    running: Option<Running>,
}

struct Running {
    calls: mpsc::UnboundedSender<Call>,
    task: JoinHandle<Result<()>>,
}

enum Call {
    Request(Box<Request>, oneshot::Sender<Reply>),
    Inspect(oneshot::Sender<Inspection>),
    Stop(oneshot::Sender<()>),
}

/// The environment of one daemon.
struct Simulated {
    interface: Interface,
    kernel: SimulatedKernel,
    ahead_ms: Rc<Cell<i64>>,
    random: RefCell<Random>,
    start: Instant,
}

impl Environment for Simulated {
    fn wall_ms(&self) -> u64 {
        let passed = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        (START_MS + passed).saturating_add_signed(self.ahead_ms.get())
    }

    fn fill_random(&self, bytes: &mut [u8]) {
        self.random.borrow_mut().fill(bytes);
    }

    fn transport(&self) -> Arc<dyn Transport> {
        Arc::new(self.interface.clone())
    }

    fn start_kernel(
        &self,
        events: mpsc::Sender<KernelEvent>,
        _: &TunnelSecret,
    ) -> ovl_kernel::Result<KernelHandle> {
        Ok(self.kernel.start(events, KERNEL_LATENCY))
    }

    fn prober(&self) -> ovl_kernel::Result<Prober> {
        Ok(Prober::simulated(Arc::new(self.interface.clone())))
    }

    fn disk(&self) -> Disk {
        Disk::Simulated(DISK_LATENCY)
    }

    fn owns_host(&self) -> bool {
        false
    }
}

thread_local! {
    /// The instant at which the clocks of a world began.
    static START: Cell<Option<Instant>> = const { Cell::new(None) };
}

impl World {
    /// A world without hosts. Its files are removed when it is dropped.
    pub fn new(seed: u64) -> Result<Self> {
        START.set(Some(Instant::now()));
        let mut random = Random::new(seed);
        // Several worlds of one process may have one seed.
        static WORLDS: AtomicU64 = AtomicU64::new(0);
        let number = WORLDS.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("ovl-simulation-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&directory)?;
        std::fs::write(directory.join("ovld.toml"), "")?;
        let mut key = [0; 32];
        random.fill(&mut key);
        std::fs::write(directory.join("key"), ClusterKey::new(key).to_text().0)?;
        set_private(&directory.join("key"))?;
        Ok(Self {
            network: Network::new(random.split()),
            random,
            directory,
            hosts: Vec::new(),
            attached: BTreeMap::new(),
            unknown: BTreeSet::new(),
            pending: Vec::new(),
        })
    }

    /// The number of hosts.
    pub fn len(&self) -> usize {
        self.hosts.len()
    }

    /// Whether there is no host.
    pub fn is_empty(&self) -> bool {
        self.hosts.is_empty()
    }

    /// Adds hosts, starts their daemons, and waits until all are members of one cluster.
    pub async fn start(&mut self, count: usize) -> Result<()> {
        for _ in 0..count {
            let number = self.hosts.len();
            let address = IpAddr::V4(Ipv4Addr::from_bits(0xc0a8_0001 + u32::try_from(number)?));
            let prefix = IpNet::new(address, 16)?;
            let underlay = Underlay { device: "eth0".to_owned(), index: 2, mtu: 1500, prefix };
            self.hosts.push(Host {
                name: format!("host{number}"),
                address,
                kernel: SimulatedKernel::new(underlay),
                ahead_ms: Rc::default(),
                running: None,
            });
            self.boot(number)?;
        }
        let members = self.hosts.len();
        for _ in 0..120 {
            self.run_for(Duration::from_secs(1)).await;
            let all = self.inspect_all().await?;
            if all.values().all(|seen| seen.members.len() == members) {
                return Ok(());
            }
        }
        bail!("the cluster has not formed within two minutes")
    }

    /// Starts the daemon of a host whose daemon does not run.
    pub fn boot(&mut self, host: usize) -> Result<()> {
        let seed = self.random.split();
        let config = self.config(host)?;
        let entry = self.host(host)?;
        ensure!(entry.running.is_none(), "{} runs already", entry.name);
        let environment = Rc::new(Simulated {
            interface: self.network.host(entry.address),
            kernel: entry.kernel.clone(),
            ahead_ms: Rc::clone(&entry.ahead_ms),
            random: RefCell::new(seed),
            start: START.get().context("the world has no clock")?,
        });
        let (calls, inbox) = mpsc::unbounded_channel();
        // Its own set: dropped, it ends every task of the daemon, as the end of a process does.
        let task = spawn_local(async move {
            let local = LocalSet::new();
            local.run_until(serve(config, environment, inbox)).await
        });
        self.host_mut(host)?.running = Some(Running { calls, task });
        Ok(())
    }

    fn config(&self, host: usize) -> Result<Config> {
        let entry = self.host(host)?;
        let dir = self.directory.join(&entry.name);
        let (state, run) = (dir.join("state"), dir.join("run"));
        std::fs::create_dir_all(&state)?;
        std::fs::create_dir_all(&run)?;
        let mut args: Vec<OsString> = vec!["ovld".into()];
        let mut flag = |name: &str, value: &Path| args.extend([name.into(), value.into()]);
        flag("--config", &self.directory.join("ovld.toml"));
        flag("--node", Path::new(&entry.name));
        flag("--state-dir", &state);
        flag("--run-dir", &run);
        flag("--cluster-key", &self.directory.join("key"));
        flag("--advertise", Path::new(&entry.address.to_string()));
        // All join the first two, so that a restart of the first one finds somebody.
        for other in self.hosts.iter().take(2).filter(|other| other.address != entry.address) {
            flag("--join", Path::new(&other.address.to_string()));
        }
        if host == 0 {
            args.push("--bootstrap".into());
        }
        Config::parse(args)
    }

    /// Ends a daemon as SIGKILL does. The kernel goes on.
    pub async fn kill(&mut self, host: usize) -> Result<()> {
        let entry = self.host_mut(host)?;
        let running = entry.running.take().with_context(|| format!("{} does not run", entry.name))?;
        entry.kernel.halt();
        let address = entry.address;
        self.network.close(address);
        running.task.abort();
        match running.task.await {
            Ok(ended) => ended.with_context(|| format!("host{host} had ended"))?,
            Err(error) if error.is_cancelled() => {}
            Err(error) => bail!("host{host}: {error}"),
        }
        Ok(())
    }

    /// Ends a daemon as SIGTERM does.
    pub async fn stop(&mut self, host: usize) -> Result<()> {
        let entry = self.host_mut(host)?;
        let running = entry.running.take().with_context(|| format!("{} does not run", entry.name))?;
        let (reply, done) = oneshot::channel();
        drop(running.calls.send(Call::Stop(reply)));
        let _ = done.await;
        running.task.await??;
        let entry = self.host(host)?;
        entry.kernel.halt();
        self.network.close(entry.address);
        Ok(())
    }

    /// Ends a daemon, gently or not, and starts it again.
    pub async fn restart(&mut self, host: usize, gently: bool) -> Result<()> {
        if gently {
            self.stop(host).await?;
        } else {
            self.kill(host).await?;
        }
        self.boot(host)
    }

    /// Cuts these hosts off from all others.
    pub fn partition(&self, away: &BTreeSet<usize>) {
        let sides = self.hosts.iter().enumerate();
        self.network
            .partition(sides.map(|(at, host)| (host.address, usize::from(away.contains(&at)))).collect());
    }

    /// Ends the partition and starts all daemons that do not run.
    pub fn heal(&mut self) -> Result<()> {
        self.network.partition(BTreeMap::new());
        self.network.set_loss(0);
        let down: Vec<usize> = (0..self.len()).filter(|at| !self.is_running(*at)).collect();
        down.into_iter().try_for_each(|host| self.boot(host))
    }

    /// Whether the daemon of a host was started and not ended.
    pub fn is_running(&self, host: usize) -> bool {
        self.hosts.get(host).is_some_and(|host| host.running.is_some())
    }

    /// Steps the wall clock of a host.
    pub fn step_clock(&mut self, host: usize, by_ms: i64) -> Result<()> {
        let clock = &self.host(host)?.ahead_ms;
        clock.set(clock.get() + by_ms);
        Ok(())
    }

    /// Deletes a device of a host's data plane behind the daemon's back.
    pub fn interfere(&mut self, host: usize) -> Result<()> {
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
    pub async fn run_for(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }

    /// Asks a daemon. `None` if it does not run or does not answer within a minute.
    pub async fn ask(&self, host: usize, request: Request) -> Result<Option<Reply>> {
        let Some(running) = &self.host(host)?.running else { return Ok(None) };
        let (reply, answer) = oneshot::channel();
        if running.calls.send(Call::Request(Box::new(request), reply)).is_err() {
            return Ok(None);
        }
        Ok(tokio::time::timeout(PATIENCE, answer).await.ok().and_then(Result::ok))
    }

    /// Creates an overlay network with a `/16` subnet.
    pub async fn create_network(&self, host: usize, name: &str, mode: Mode, subnet: &str) -> Result<()> {
        let create = NetworkCreate {
            name: name.to_owned(),
            driver: Driver::Overlay,
            mode,
            subnets: vec![subnet.parse()?],
            vni: None,
            encrypted: false,
            internal: false,
            mtu: None,
            backend: None,
            block_lengths: Vec::new(),
            dns: false,
        };
        match self.ask(host, Request::NetworkCreate(create)).await? {
            Some(Reply::Network(_)) => Ok(()),
            other => bail!("network {name} was not created: {other:?}"),
        }
    }

    /// Begins to attach an endpoint. [`Self::collect`] takes the answer.
    pub fn attach(&mut self, host: usize, network: &str, name: &str) -> Result<()> {
        let attach = Attach {
            name: name.to_owned(),
            network: network.to_owned(),
            netns: NetnsRef::Path(format!("/run/netns/{name}").into()),
            addresses: Vec::new(),
            mac: None,
            ifname: None,
            aliases: Vec::new(),
            namespace: None,
            labels: BTreeMap::new(),
            publish: Vec::new(),
            not_ready: false,
            allowed: Vec::new(),
            allowed_macs: Vec::new(),
        };
        self.begin(host, name, Request::Attach(attach), false)
    }

    /// Begins to detach an endpoint. [`Self::collect`] takes the answer.
    pub fn detach(&mut self, host: usize, name: &str) -> Result<()> {
        self.attached.remove(&(host, name.to_owned()));
        let request = Request::Detach { name: name.to_owned(), network: None, namespace: None };
        self.begin(host, name, request, true)
    }

    fn begin(&mut self, host: usize, name: &str, request: Request, detach: bool) -> Result<()> {
        let (reply, answer) = oneshot::channel();
        if let Some(running) = &self.host(host)?.running {
            drop(running.calls.send(Call::Request(Box::new(request), reply)));
        }
        let name = name.to_owned();
        self.unknown.insert((host, name.clone()));
        self.pending.push(Pending { host, name, detach, answer, since: Instant::now() });
        Ok(())
    }

    /// Takes the answers that have arrived.
    ///
    /// # Errors
    ///
    /// An address of an acknowledged endpoint was given away again, or a refusal is none that a fault explains.
    pub fn collect(&mut self) -> Result<()> {
        for mut pending in std::mem::take(&mut self.pending) {
            match pending.answer.try_recv() {
                Ok(reply) => self.answered(pending, reply)?,
                Err(oneshot::error::TryRecvError::Empty) if pending.since.elapsed() < PATIENCE => {
                    self.pending.push(pending);
                }
                // Its outcome stays unknown.
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// Waits for all answers.
    pub async fn collect_all(&mut self) -> Result<()> {
        while !self.pending.is_empty() {
            self.run_for(Duration::from_millis(20)).await;
            self.collect()?;
        }
        Ok(())
    }

    fn answered(&mut self, pending: Pending, reply: Reply) -> Result<()> {
        let Pending { host, name, detach, .. } = pending;
        let key = (host, name.clone());
        match reply {
            Reply::Done if detach => {
                self.unknown.remove(&key);
            }
            Reply::Endpoint(info) if !detach => {
                for other in self.attached.values().filter(|other| other.network == info.network) {
                    let shared = info.addresses.iter().find(|address| other.addresses.contains(address));
                    if let Some(address) = shared {
                        bail!(
                            "{address} of {} on {} was given to {name} on host{host}",
                            other.name,
                            other.node
                        );
                    }
                }
                self.unknown.remove(&key);
                self.attached.insert(key, *info);
            }
            Reply::Error(Failure { kind: FailureKind::Unavailable | FailureKind::NotFound, .. }) => {}
            other => bail!("{name} on host{host}: {other:?}"),
        }
        Ok(())
    }

    /// The acknowledged endpoints, by host and name.
    pub fn attached(&self) -> impl Iterator<Item = (usize, &str)> {
        self.attached.keys().map(|(host, name)| (*host, name.as_str()))
    }

    /// What all running daemons know.
    pub async fn inspect_all(&self) -> Result<BTreeMap<usize, Inspection>> {
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

    /// Waits until all invariants hold, and returns how long that took.
    ///
    /// # Errors
    ///
    /// Names the invariant that does not hold after `within`.
    pub async fn settle(&mut self, within: Duration) -> Result<Duration> {
        self.collect_all().await?;
        let start = Instant::now();
        loop {
            self.run_for(Duration::from_millis(500)).await;
            match self.check().await {
                Ok(()) => return Ok(start.elapsed()),
                Err(error) if start.elapsed() > within => {
                    return Err(error.context(format!("not settled within {within:?}")));
                }
                Err(_) => {}
            }
        }
    }

    /// Checks the invariants of a healed cluster at rest.
    ///
    /// # Errors
    ///
    /// Names the invariant that does not hold.
    pub async fn check(&self) -> Result<()> {
        let all = self.inspect_all().await?;
        ensure!(all.len() == self.len(), "not all daemons run");
        let Some(first) = all.get(&0) else { return Ok(()) };
        let mut addresses = BTreeMap::new();
        for (at, seen) in &all {
            ensure!(seen.members.len() == self.len(), "host{at} counts {} members", seen.members.len());
            ensure!(seen.version == first.version, "host{at} has map {} of {}", seen.version, first.version);
            ensure!(seen.networks == first.networks, "host{at} has other networks than host0");
            let own = seen.tables.get(&seen.id).context("a daemon without a table of its own")?;
            for (other, view) in &all {
                ensure!(view.tables.get(&seen.id) == Some(own), "host{other} has another table of host{at}");
            }
            let endpoints = own.iter().filter_map(|entry| match entry {
                Entry::Endpoint(endpoint) => Some(endpoint),
                _ => None,
            });
            let mut names = BTreeSet::new();
            for endpoint in endpoints {
                names.insert(endpoint.name.clone());
                for net in &endpoint.addresses {
                    let holder = addresses.insert((endpoint.network, net.addr()), endpoint.name.clone());
                    ensure!(holder.is_none(), "{net} belongs to {holder:?} and {}", endpoint.name);
                }
            }
            for (host, name) in self.attached.keys().filter(|(host, _)| host == at) {
                ensure!(names.contains(name), "{name} on host{host} was acknowledged and is lost");
            }
            for name in &names {
                let key = (*at, name.clone());
                let known = self.attached.contains_key(&key) || self.unknown.contains(&key);
                ensure!(known, "{name} on host{at} was detached and is there");
            }
            let kernel = self.host(*at)?.kernel.dataplane();
            let ops = diff(&kernel, &seen.desired, true);
            if let Some(op) = ops.first() {
                bail!("the kernel of host{at} differs by {} operations, first: {op}", ops.len());
            }
        }
        Ok(())
    }

    fn host(&self, host: usize) -> Result<&Host> {
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

/// Runs one daemon until it is told to stop.
async fn serve(
    config: Config,
    environment: Rc<Simulated>,
    mut calls: mpsc::UnboundedReceiver<Call>,
) -> Result<()> {
    let mut daemon = Daemon::start(config, environment).await?;
    loop {
        let call = tokio::select! {
            biased;
            call = calls.recv() => call,
            ended = daemon.failed() => bail!("a task of the daemon has ended: {ended:?}"),
        };
        match call {
            Some(Call::Request(request, reply)) => {
                let answer = daemon.answer(*request);
                spawn_local(async move { drop(reply.send(answer.await)) });
            }
            Some(Call::Inspect(reply)) => drop(reply.send(daemon.inspect())),
            Some(Call::Stop(reply)) => {
                let result = daemon.stop().await;
                let _ = reply.send(());
                return result;
            }
            None => return Ok(()),
        }
    }
}

fn set_private(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?)
}
