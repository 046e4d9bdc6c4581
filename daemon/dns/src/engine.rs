//! The engine: its sockets, its threads, and the zone that they answer from.

use std::cell::Cell;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;

use arc_swap::ArcSwap;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};

use crate::answer::Asker;
use crate::forward::{Forwarder, Job, Lookup, Waiter};
use crate::name::Name;
use crate::resolv::Follow;
use crate::servers::{Failing, Stub};
use crate::wire::{Kind, question};
use crate::zone::Zone;
use crate::{sys, tcp, udp};

/// More threads than that have nothing to do.
const MAX_THREADS: usize = 4;
/// So many queries may wait to be taken by the thread that asks others.
const JOBS: usize = 1024;

/// Who asks at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Those that the zone knows by their addresses.
    Endpoints,
    /// The host.
    Host,
}

impl Role {
    #[inline]
    pub(crate) fn asker(self, from: IpAddr) -> Asker {
        match self {
            Self::Endpoints => Asker::At(from),
            Self::Host => Asker::Host,
        }
    }
}

/// Where to listen, by UDP and TCP. The address need not be there yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listen {
    /// Address and port.
    pub address: SocketAddr,
    /// Who asks there.
    pub role: Role,
}

/// What an engine is made of.
#[derive(Debug, Clone)]
pub struct Config {
    /// Its addresses.
    pub listen: Vec<Listen>,
    /// The file that names the other resolvers.
    pub resolv_conf: PathBuf,
    /// Domains that others are asked about.
    pub stubs: Vec<Stub>,
}

/// What was done since the start.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    /// Queries answered from the zone, refusals among them.
    pub answered: u64,
    /// Queries passed over: of strangers, malformed, or too many.
    pub ignored: u64,
    /// Queries answered from the cache.
    pub cached: u64,
    /// Questions put to other resolvers.
    pub forwarded: u64,
    /// Of these, those that none of them answered.
    pub failed: u64,
}

/// The same while it is counted.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) answered: AtomicU64,
    pub(crate) ignored: AtomicU64,
    pub(crate) cached: AtomicU64,
    pub(crate) forwarded: AtomicU64,
    pub(crate) failed: AtomicU64,
}

/// What all threads look at.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) zone: ArcSwap<Zone>,
    pub(crate) counters: Counters,
    pub(crate) failing: ArcSwap<Vec<Failing>>,
    pub(crate) ending: AtomicBool,
}

/// See the crate. It ends when dropped.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    jobs: mpsc::Sender<Job>,
}

impl Engine {
    /// Opens all sockets, or says which cannot be opened, and starts the threads.
    pub fn start(config: Config, zone: Zone) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            zone: ArcSwap::from_pointee(zone),
            counters: Counters::default(),
            failing: ArcSwap::default(),
            ending: AtomicBool::new(false),
        });
        let explain = |listen: &Listen, error: io::Error| {
            io::Error::new(error.kind(), format!("listening on {}: {error}", listen.address))
        };
        let count = thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
        let mut threads = Vec::new();
        for _ in 0..count {
            let open = |listen: &Listen| {
                let socket = sys::open_udp(listen.address).map_err(|error| explain(listen, error))?;
                Ok((Arc::new(socket), listen.role))
            };
            threads.push(config.listen.iter().map(open).collect::<io::Result<Vec<_>>>()?);
        }
        let open = |listen: &Listen| {
            let listener = sys::open_tcp(listen.address).map_err(|error| explain(listen, error))?;
            Ok((listener, listen.role))
        };
        let streams = config.listen.iter().map(open).collect::<io::Result<Vec<_>>>()?;
        let (jobs, inbox) = mpsc::channel(JOBS);
        for (i, sockets) in threads.into_iter().enumerate() {
            let (shared, jobs) = (Arc::clone(&shared), jobs.clone());
            thread::Builder::new()
                .name(format!("dns-{i}"))
                .spawn(move || udp::serve(&sockets, &shared, &jobs))?;
        }
        let own = config.listen.iter().map(|listen| listen.address).collect();
        let follow = Follow::new(config.resolv_conf, own);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (also, sender) = (Arc::clone(&shared), jobs.clone());
        thread::Builder::new().name("dns-ask".to_owned()).spawn(move || {
            let forwarder = Forwarder::new(Arc::clone(&also), config.stubs);
            let work = asker(streams, &also, &sender, forwarder.run(inbox, follow));
            tokio::task::LocalSet::new().block_on(&runtime, work);
        })?;
        Ok(Self { shared, jobs })
    }

    /// From now on this is answered. No query is lost to it.
    pub fn set_zone(&self, zone: Zone) {
        self.shared.zone.store(Arc::new(zone));
    }

    /// What others say about a name, by way of the cache.
    pub async fn look_up(&self, name: &Name, kind: Kind) -> Option<Lookup> {
        let (sender, receiver) = oneshot::channel();
        let message = question(0, name, kind, 0, Some(false));
        let job = Job { message, alias: None, to: Waiter::Look(sender) };
        self.jobs.send(job).await.ok()?;
        receiver.await.ok()
    }

    /// The resolvers that failed when they were asked last, and the time before.
    pub fn failing(&self) -> Arc<Vec<Failing>> {
        self.shared.failing.load_full()
    }

    /// What was done so far.
    pub fn stats(&self) -> Stats {
        let Counters { answered, ignored, cached, forwarded, failed } = &self.shared.counters;
        Stats {
            answered: answered.load(Relaxed),
            ignored: ignored.load(Relaxed),
            cached: cached.load(Relaxed),
            forwarded: forwarded.load(Relaxed),
            failed: failed.load(Relaxed),
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.ending.store(true, Relaxed);
    }
}

/// The thread that takes connections, and asks others.
async fn asker(
    streams: Vec<(std::net::TcpListener, Role)>,
    shared: &Arc<Shared>,
    jobs: &mpsc::Sender<Job>,
    forwarding: impl Future<Output = ()>,
) {
    let open = Rc::new(Cell::new(0));
    for (listener, role) in streams {
        match TcpListener::from_std(listener) {
            Ok(listener) => {
                let (shared, jobs) = (Arc::clone(shared), jobs.clone());
                tokio::task::spawn_local(tcp::serve(listener, role, shared, jobs, Rc::clone(&open)));
            }
            Err(error) => tracing::error!(%error, "cannot take DNS queries by TCP"),
        }
    }
    let ended = async {
        while !shared.ending.load(Relaxed) {
            tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        }
    };
    tokio::select! {
        () = forwarding => {}
        () = ended => {}
    }
}
