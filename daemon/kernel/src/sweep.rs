//! Removes endpoints: disconnects them at once, and deletes their veth pairs later.
//!
//! To delete a veth pair takes tens of milliseconds, in which the kernel waits for its processors. A detach does not
//! wait for that: it sets the peer interface down and renames it, so that no traffic passes and the name in the
//! namespace is free, and dooms the pair. The sweeper thread deletes doomed pairs, many at a time, while the kernel
//! worker is idle.
//!
//! The host interface of a doomed pair is in the link group [`DOOMED`]. The rest of ovl does not treat it as a device
//! of ovl, and no dump contains it. The first dump after a crash finds the pairs that were not deleted.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use netlink_packet_route::link::LinkAttribute;
use nix::libc::ENODEV;
use tokio::sync::oneshot;

use super::apply::{self, Devices, Located};
use super::error::{KernelError, Result};
use super::link::{DOOMED, LinkView};
use super::message::{self, Target};
use super::netns::{NetnsWorker, id_of};
use super::socket::{Batch, Route};
use super::{Netns, PeerLocation, RetiredEndpoint};

/// The time without a request after which the kernel worker counts as idle.
const IDLE: Duration = Duration::from_millis(50);
/// The number of pairs deleted at a time while idle: small, because a request may arrive meanwhile.
const IDLE_BATCH: usize = 32;
/// If this many pairs are doomed, they are deleted even if the worker is not idle.
const MAX_DOOMED: usize = 512;
/// After this time doomed pairs are deleted even if the worker is not idle.
const MAX_DELAY: Duration = Duration::from_secs(10);

/// Disconnects an endpoint and dooms its pair. If its namespace is unknown, the pair is deleted at once.
pub(super) fn retire(
    route: &mut Route,
    netns_worker: &mut NetnsWorker,
    sweeper: &Sweeper,
    RetiredEndpoint { device, other }: RetiredEndpoint,
) -> Result<()> {
    let mut devices = Devices::default();
    let located = match devices.get(route, device) {
        Ok(located) => located,
        Err(KernelError::NoDevice(_)) => return Ok(()),
        Err(error) => return Err(error),
    };
    if matches!(other, PeerLocation::Moved) {
        let mut batch = Batch::default();
        batch.push(message::set(Target::Index(located.index), vec![LinkAttribute::Group(DOOMED)]), 0);
        // Only the host's interface: the container runtime manages the peer. No traffic passes all the same.
        batch.push(message::set_up(Target::Index(located.index), false), 0);
        let (results, _) = route.execute(batch)?;
        return match results.into_iter().find_map(Result::err) {
            // It was deleted with the container's namespace a moment ago.
            Some(refusal) if refusal.errno != ENODEV => {
                Err(refusal.into_error(format!("cannot mark {device} for deletion")))
            }
            _ => {
                sweeper.doom([located.index]);
                Ok(())
            }
        };
    }
    if let Some((netns, peer)) = other_end(route, other, located)? {
        let group = message::set(Target::Index(located.index), vec![LinkAttribute::Group(DOOMED)]);
        let action = || format!("cannot mark {device} for deletion");
        route.request(group, 0)?.map_err(|refusal| refusal.into_error(action()))?;
        let name = device.as_str().replacen("ove-", "ovd-", 1);
        let done = netns_worker.run_in(netns.fd, move |route| {
            let mut batch = Batch::default();
            // Down first: before Linux 6.2 an interface that is up cannot be renamed.
            batch.push(message::set_up(Target::Index(peer), false), 0);
            batch.push(message::set(Target::Index(peer), vec![LinkAttribute::IfName(name)]), 0);
            let (results, _) = route.execute(batch)?;
            Ok(results.into_iter().find_map(Result::err))
        });
        match done {
            // It was deleted with its namespace a moment ago, or by the sweeper.
            Ok(Some(refusal)) if refusal.errno == ENODEV => {}
            Ok(None) => {}
            Ok(Some(refusal)) => {
                tracing::warn!(%device, ?refusal, "cannot disable and rename the peer interface")
            }
            Err(error) => tracing::warn!(%device, %error, "cannot disable and rename the peer interface"),
        }
        sweeper.doom([located.index]);
        return Ok(());
    }
    apply::delete(route, &mut devices, &[device])?.into_iter().collect()
}

/// The namespace and index of the peer interface. `None` if it is not in the namespace that the caller names.
fn other_end(route: &mut Route, other: PeerLocation, located: Located) -> Result<Option<(Netns, u32)>> {
    let PeerLocation::Netns(netns) = other else { return Ok(None) };
    let Some((id, peer)) = located.peer_netns.zip(located.peer) else { return Ok(None) };
    Ok((id_of(route, &netns)? == Some(id)).then_some((netns, peer)))
}

#[derive(Debug)]
enum Command {
    Doomed(Vec<u32>),
    All(oneshot::Sender<Result<()>>),
}

/// A handle to the sweeper thread. The thread exits when the handle is dropped.
#[derive(Debug)]
pub(super) struct Sweeper {
    commands: mpsc::Sender<Command>,
    /// The number of requests to the kernel worker.
    work: Arc<AtomicU64>,
}

impl Sweeper {
    /// Starts the thread, in the network namespace of the calling thread.
    pub(super) fn start() -> Result<Self> {
        let mut route = Route::open()?;
        let (commands, inbox) = mpsc::channel();
        let work = Arc::<AtomicU64>::default();
        let counter = Arc::clone(&work);
        thread::Builder::new()
            .name("sweep".to_owned())
            .spawn(move || run(&mut route, &inbox, &counter))
            .map_err(|error| KernelError::io("cannot start the sweeper thread", &error))?;
        Ok(Self { commands, work })
    }

    /// Notes a request to the kernel worker: it is not idle.
    pub(super) fn note_work(&self) {
        self.work.fetch_add(1, Ordering::Relaxed);
    }

    /// Queues doomed devices for deletion, by index. To queue one twice is harmless.
    pub(super) fn doom(&self, indexes: impl IntoIterator<Item = u32>) {
        let indexes: Vec<u32> = indexes.into_iter().collect();
        if !indexes.is_empty() {
            let _ = self.commands.send(Command::Doomed(indexes));
        }
    }

    /// Deletes all doomed pairs, and sends the result to `reply`.
    pub(super) fn sweep_all(&self, reply: oneshot::Sender<Result<()>>) {
        let _ = self.commands.send(Command::All(reply));
    }

    /// Deletes all doomed pairs and waits for it. It blocks, so it must not run on a thread of the async runtime.
    pub(super) fn sweep_now(&self) -> Result<()> {
        let (reply, done) = oneshot::channel();
        self.sweep_all(reply);
        done.blocking_recv().map_err(|_| KernelError::Stopped)?
    }
}

fn run(route: &mut Route, commands: &mpsc::Receiver<Command>, work: &AtomicU64) {
    let mut doomed = BTreeSet::new();
    let (mut since, mut seen) = (Instant::now(), 0);
    loop {
        let word = if doomed.is_empty() {
            commands.recv().map_err(RecvTimeoutError::from)
        } else {
            commands.recv_timeout(IDLE)
        };
        let mut idle = false;
        match word {
            Ok(Command::Doomed(indexes)) => {
                if doomed.is_empty() {
                    since = Instant::now();
                }
                doomed.extend(indexes);
            }
            Ok(Command::All(reply)) => {
                let _ = reply.send(sweep(route, &mut doomed, usize::MAX));
            }
            Err(RecvTimeoutError::Timeout) => {
                let now = work.load(Ordering::Relaxed);
                idle = now == seen;
                seen = now;
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let count = if doomed.len() >= MAX_DOOMED || since.elapsed() >= MAX_DELAY {
            MAX_DOOMED
        } else if idle {
            IDLE_BATCH
        } else {
            continue;
        };
        since = Instant::now();
        // The next dump finds pairs that could not be deleted.
        if let Err(error) = sweep(route, &mut doomed, count) {
            tracing::warn!(%error, "cannot delete interfaces of removed endpoints; the next full pass retries");
        }
    }
}

/// Deletes up to `count` doomed devices in one request: the kernel waits once, however many they are.
fn sweep(route: &mut Route, doomed: &mut BTreeSet<u32>, count: usize) -> Result<()> {
    let mut some = Vec::new();
    while some.len() < count
        && let Some(index) = doomed.pop_first()
    {
        some.push(index);
    }
    let mut there = Vec::new();
    for some in some.chunks(apply::QUESTIONS) {
        let mut batch = Batch::default();
        some.iter().for_each(|index| batch.push(message::get_link_at(*index), 0));
        let (_, answers) = route.execute(batch)?;
        let views = answers.iter().filter_map(|answer| LinkView::parse(&answer.payload));
        // Another device may have reused the index meanwhile.
        there.extend(views.filter(LinkView::is_doomed).map(|view| view.index));
    }
    apply::delete_group(route, &there)?
        .map_err(|refusal| refusal.into_error("cannot delete interfaces of removed endpoints"))
}
