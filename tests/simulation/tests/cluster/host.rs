//! One simulated host: its environment, and its daemon, which is called over a channel.

use std::cell::{Cell, RefCell};
use std::net::IpAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use ovl_control::{Reply, Request};
use ovl_kernel::{KernelEvent, KernelHandle, PathSocket, Prober, SimulatedKernel};
use ovl_mesh::gossip::WallClock;
use ovl_mesh::keys::TunnelSecret;
use ovl_mesh::transport::Transport;
use ovld::{Config, Daemon, Disk, Environment, Inspection};
use tokio::sync::{mpsc, oneshot};
use tokio::task::{JoinHandle, LocalSet, spawn_local};
use tokio::time::Instant;

use crate::network::Interface;
use crate::random::Random;

/// How long the kernel takes for a request.
const KERNEL_LATENCY: Duration = Duration::from_micros(500);
/// The wall clock at the start, in milliseconds since 1970.
const START_MS: u64 = 1_750_000_000_000;
/// How often a daemon may run while the clock stands still. A daemon that runs more often will do so forever.
const MOST_TURNS: u32 = 50_000;

/// A host. It outlives its daemons.
pub(crate) struct Host {
    pub(crate) name: String,
    pub(crate) address: IpAddr,
    pub(crate) kernel: SimulatedKernel,
    /// State directory, run directory and key file.
    pub(crate) directory: PathBuf,
    /// What its wall clock is ahead, in milliseconds.
    pub(crate) ahead_ms: Arc<AtomicI64>,
    pub(crate) slow_disk: Rc<Cell<bool>>,
    /// Number of reboots.
    pub(crate) boots: u64,
    /// It has died and never returns.
    pub(crate) gone: bool,
    pub(crate) running: Option<Running>,
}

impl Host {
    pub(crate) fn key_file(&self) -> PathBuf {
        self.directory.join("key")
    }

    pub(crate) fn run_dir(&self) -> PathBuf {
        self.directory.join("run")
    }

    /// Starts a daemon. `start` is the beginning of the world's clocks.
    pub(crate) fn start(&mut self, config: Config, interface: Interface, start: Instant, mut random: Random) {
        let environment = Rc::new(Simulated {
            interface,
            kernel: self.kernel.clone(),
            ahead_ms: Arc::clone(&self.ahead_ms),
            slow_disk: Rc::clone(&self.slow_disk),
            boot_id: format!("{}-{}", self.name, self.boots),
            disk: Rc::new(RefCell::new(random.split())),
            random: RefCell::new(random),
            start,
        });
        let (calls, inbox) = mpsc::unbounded_channel();
        // Its own set: dropped, it ends every task of the daemon, as the end of a process does.
        let daemon = async move {
            let local = LocalSet::new();
            local.run_until(serve(config, environment, inbox)).await
        };
        let task = spawn_local(Watched { daemon: Box::pin(daemon), at: Instant::now(), turns: 0 });
        self.running = Some(Running { calls, task });
    }

    /// Asks the daemon. `None` if it does not run.
    pub(crate) fn ask(&self, request: Request) -> Option<oneshot::Receiver<Reply>> {
        let running = self.running.as_ref()?;
        let (reply, answer) = oneshot::channel();
        running.calls.send(Call::Request(Box::new(request), reply)).ok()?;
        Some(answer)
    }
}

/// A daemon that was started and not ended.
pub(crate) struct Running {
    pub(crate) calls: mpsc::UnboundedSender<Call>,
    pub(crate) task: JoinHandle<Result<()>>,
}

pub(crate) enum Call {
    Request(Box<Request>, oneshot::Sender<Reply>),
    Inspect(oneshot::Sender<Inspection>),
    Stop(oneshot::Sender<()>),
}

/// The environment of one daemon.
struct Simulated {
    interface: Interface,
    kernel: SimulatedKernel,
    ahead_ms: Arc<AtomicI64>,
    slow_disk: Rc<Cell<bool>>,
    boot_id: String,
    disk: Rc<RefCell<Random>>,
    random: RefCell<Random>,
    start: Instant,
}

impl Environment for Simulated {
    fn wall_clock(&self) -> WallClock {
        let (start, ahead_ms) = (self.start, Arc::clone(&self.ahead_ms));
        Arc::new(move || {
            let passed = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
            (START_MS + passed).saturating_add_signed(ahead_ms.load(Ordering::Relaxed))
        })
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

    fn path_socket(&self, _port: u16) -> ovl_kernel::Result<Option<PathSocket>> {
        Ok(None)
    }

    fn prober(&self) -> ovl_kernel::Result<Prober> {
        Ok(Prober::simulated(Arc::new(self.interface.clone())))
    }

    fn boot_id(&self) -> Result<String> {
        Ok(self.boot_id.clone())
    }

    /// A write takes 1 to 5 ms, on a slow disk 50 ms to 2 s.
    fn disk(&self) -> Disk {
        let (slow, random) = (Rc::clone(&self.slow_disk), Rc::clone(&self.disk));
        Disk::Simulated(Rc::new(move || {
            let (least, most) = if slow.get() { (50, 2000) } else { (1, 5) };
            random.borrow_mut().duration_ms(least, most)
        }))
    }

    fn owns_host(&self) -> bool {
        false
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

/// A daemon that is ended when it runs again and again without waiting: the clock advances only while all daemons wait,
/// so the run would never end.
struct Watched<F> {
    daemon: Pin<Box<F>>,
    at: Instant,
    turns: u32,
}

impl<F: Future<Output = Result<()>>> Future for Watched<F> {
    type Output = Result<()>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        let this = self.get_mut();
        let now = Instant::now();
        if now != this.at {
            (this.at, this.turns) = (now, 0);
        }
        this.turns += 1;
        if this.turns > MOST_TURNS {
            return Poll::Ready(Err(anyhow!(
                "the daemon ran {MOST_TURNS} times while the clock stood still"
            )));
        }
        this.daemon.as_mut().poll(context)
    }
}
