//! The engine: its sockets, its threads, and the zone that they answer from.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use arc_swap::{ArcSwap, ArcSwapOption};
use ovl_metrics::Durations;
use ovl_zone::{Client, Name, Zone};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};

use crate::forward::{Forwarder, Job, Lookup, Waiter, Work};
use crate::resolv::{ResolvConfWatcher, Upstreams};
use crate::servers::{FailingServer, StubDomain};
use crate::share::Share;
use crate::shared::{Counters, ListenRole, Shared};
use crate::tcp::Connections;
use crate::told::Told;
use crate::wire::{RecordType, question};
use crate::{sys, tcp, udp};

/// The limit of threads that answer UDP queries. More do not increase the throughput.
const MAX_THREADS: usize = 4;
/// The limit of queries that wait for the forwarding thread.
const JOBS: usize = 1024;

/// A listening address for UDP and TCP. The host need not have the address yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listen {
    /// The address and port.
    pub address: SocketAddr,
    /// The kind of the clients.
    pub role: ListenRole,
}

/// The configuration of an engine.
#[derive(Debug, Clone)]
pub struct Config {
    /// The listening addresses.
    pub listen: Vec<Listen>,
    /// Other addresses at which queries reach the engine: to ask there would be a loop.
    pub own: Vec<SocketAddr>,
    /// The resolv.conf(5) with the upstream servers.
    pub resolv_conf: PathBuf,
    /// Domains with servers of their own.
    pub stubs: Vec<StubDomain>,
    /// Who is told of addresses of names that clients are watched for, before the clients are. `None`: none.
    pub told: Option<mpsc::Sender<Told>>,
}

/// Counters since the start of the engine.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Stats {
    /// Queries answered from the zone, including refusals.
    pub answered: u64,
    /// Queries dropped: from unknown clients, malformed, or more than can wait.
    pub ignored: u64,
    /// Queries answered from the cache.
    pub cached: u64,
    /// Questions sent to upstream servers.
    pub forwarded: u64,
    /// Forwarded questions that no server answered.
    pub failed: u64,
    /// Queries and connections that were refused or closed because the client had used up its share.
    pub limited: u64,
    /// Answers with addresses of a watched name that were sent before these were noted, because that took too long.
    pub late: u64,
}

/// A DNS server. It ends when it is dropped.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    jobs: mpsc::Sender<Work>,
}

impl Engine {
    /// Opens all sockets and starts the threads.
    ///
    /// # Errors
    ///
    /// What the kernel reports, with the address that cannot be opened in the text.
    pub fn start(config: Config, zone: Zone) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            zone: ArcSwap::from_pointee(zone),
            counters: Counters::default(),
            failing: ArcSwap::default(),
            upstreams: ArcSwapOption::default(),
            limited: Mutex::default(),
            waits: Mutex::default(),
            told: config.told,
            recent: Mutex::default(),
            ending: AtomicBool::new(false),
        });
        let explain = |listen: &Listen, error: io::Error| {
            io::Error::new(error.kind(), format!("cannot listen on {}: {error}", listen.address))
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
        let own = config.listen.iter().map(|listen| listen.address).chain(config.own).collect();
        let resolv_conf = ResolvConfWatcher::new(config.resolv_conf, own);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (thread_shared, sender) = (Arc::clone(&shared), jobs.clone());
        thread::Builder::new().name("dns-ask".to_owned()).spawn(move || {
            let forwarder = Forwarder::new(Arc::clone(&thread_shared), config.stubs);
            let work = run_forwarding(streams, &thread_shared, &sender, forwarder.run(inbox, resolv_conf));
            tokio::task::LocalSet::new().block_on(&runtime, work);
        })?;
        Ok(Self { shared, jobs })
    }

    /// Replaces the zone. No query is lost.
    pub fn set_zone(&self, zone: Zone) {
        self.shared.zone.store(Arc::new(zone));
    }

    /// Asks the cache or the upstream servers for a name. `None` if the engine has ended.
    pub async fn look_up(&self, name: &Name, kind: RecordType) -> Option<Lookup> {
        let (sender, receiver) = oneshot::channel();
        let message = question(0, name, kind, 0, Some(false));
        let job = Job { message, alias: None, asker: Client::Host, to: Waiter::Lookup(sender) };
        self.jobs.send(Work::Forward(Box::new(job))).await.ok()?;
        receiver.await.ok()
    }

    /// Returns what resolv.conf says of servers. `None` until it was read for the first time.
    pub fn upstreams(&self) -> Option<Arc<Upstreams>> {
        self.shared.upstreams.load_full()
    }

    /// Returns the upstream servers whose last two or more queries failed, and 127.0.0.1 if it is queried because
    /// resolv.conf names no server and its last query failed.
    pub fn failing(&self) -> Arc<Vec<FailingServer>> {
        self.shared.failing.load_full()
    }

    /// Returns the clients that used up a share lately.
    pub fn limited(&self) -> Vec<(Client, Share)> {
        let limited = self.shared.limited.lock().unwrap_or_else(PoisonError::into_inner);
        limited.lately(std::time::Instant::now())
    }

    /// Returns how long questions to upstream servers took, including those that none answered.
    pub fn waits(&self) -> Durations {
        self.shared.waits.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the counters.
    pub fn stats(&self) -> Stats {
        let Counters { answered, ignored, cached, forwarded, failed, limited, late } = &self.shared.counters;
        Stats {
            answered: answered.load(Relaxed),
            ignored: ignored.load(Relaxed),
            cached: cached.load(Relaxed),
            forwarded: forwarded.load(Relaxed),
            failed: failed.load(Relaxed),
            limited: limited.load(Relaxed),
            late: late.load(Relaxed),
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.ending.store(true, Relaxed);
    }
}

/// Runs the thread that serves TCP connections and forwards queries.
async fn run_forwarding(
    streams: Vec<(std::net::TcpListener, ListenRole)>,
    shared: &Arc<Shared>,
    jobs: &mpsc::Sender<Work>,
    forwarding: impl Future<Output = ()>,
) {
    let open = Rc::new(RefCell::new(Connections::default()));
    for (listener, role) in streams {
        match TcpListener::from_std(listener) {
            Ok(listener) => {
                let (shared, jobs) = (Arc::clone(shared), jobs.clone());
                tokio::task::spawn_local(tcp::serve(listener, role, shared, jobs, Rc::clone(&open)));
            }
            Err(error) => tracing::error!(%error, "cannot accept DNS queries over TCP"),
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
