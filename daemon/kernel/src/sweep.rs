//! Endpoints that were taken away, and the removal of what is left of them.
//!
//! To delete a pair of interfaces takes tens of milliseconds, in which the kernel waits for its
//! processors. A detach does not wait for that: it sets the other end down and gives it another name,
//! so that nothing passes and the name in the namespace is free, and dooms the pair. A thread of its
//! own deletes doomed pairs, many at a time, when nobody is waiting for the kernel.
//!
//! A doomed pair is known by the group of the host's end, and is no device of ours any more for
//! anybody else: no dump shows it. What a daemon that was killed has left, the next dump finds.

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
use super::netns::{Visitor, id_of};
use super::socket::{Batch, Route};
use super::{Netns, Other, Retired};

/// Nobody has asked for anything for so long: time to sweep.
const QUIET: Duration = Duration::from_millis(50);
/// So many at a time then: somebody may ask meanwhile.
const FEW: usize = 32;
/// With so many waiting, or one waiting for so long, it is time in any case.
const MANY: usize = 512;
const LONG: Duration = Duration::from_secs(10);

/// Cuts an endpoint off and dooms it. Where its namespace is not at hand, it is deleted here and now.
pub(super) fn retire(
    route: &mut Route,
    visitor: &mut Visitor,
    sweeper: &Sweeper,
    Retired { device, other }: Retired,
) -> Result<()> {
    let mut devices = Devices::default();
    let located = match devices.get(route, device) {
        Ok(located) => located,
        Err(KernelError::NoDevice(_)) => return Ok(()),
        Err(error) => return Err(error),
    };
    if matches!(other, Other::Fetched) {
        let mut batch = Batch::default();
        batch.push(message::set(Target::Index(located.index), vec![LinkAttribute::Group(DOOMED)]), 0);
        // Not the other end, which is somebody else's to handle: nothing passes all the same.
        batch.push(message::set_up(Target::Index(located.index), false), 0);
        let (results, _) = route.execute(batch)?;
        return match results.into_iter().find_map(Result::err) {
            // It went with the container's namespace a moment ago.
            Some(refusal) if refusal.errno != ENODEV => {
                Err(refusal.into_error(format!("cannot doom {device}")))
            }
            _ => {
                sweeper.doom([located.index]);
                Ok(())
            }
        };
    }
    if let Some((netns, peer)) = other_end(route, other, located)? {
        let group = message::set(Target::Index(located.index), vec![LinkAttribute::Group(DOOMED)]);
        route.request(group, 0)?.map_err(|refusal| refusal.into_error(format!("cannot doom {device}")))?;
        let name = device.as_str().replacen("ove-", "ovd-", 1);
        let done = visitor.visit(netns.fd, move |route| {
            let mut batch = Batch::default();
            // Down first: before Linux 6.2 an interface that is up keeps its name.
            batch.push(message::set_up(Target::Index(peer), false), 0);
            batch.push(message::set(Target::Index(peer), vec![LinkAttribute::IfName(name)]), 0);
            let (results, _) = route.execute(batch)?;
            Ok(results.into_iter().find_map(Result::err))
        });
        match done {
            // It went with its namespace a moment ago, or was swept already.
            Ok(Some(refusal)) if refusal.errno == ENODEV => {}
            Ok(None) => {}
            Ok(Some(refusal)) => tracing::warn!(%device, ?refusal, "the other end cannot be put aside"),
            Err(error) => tracing::warn!(%device, %error, "the other end cannot be put aside"),
        }
        sweeper.doom([located.index]);
        return Ok(());
    }
    apply::delete(route, &mut devices, &[device])?.into_iter().collect()
}

/// The namespace, if it is the one that the other end was put into, and that end's index.
fn other_end(route: &mut Route, other: Other, located: Located) -> Result<Option<(Netns, u32)>> {
    let Other::In(netns) = other else { return Ok(None) };
    let Some((id, peer)) = located.peer_netns.zip(located.peer) else { return Ok(None) };
    Ok((id_of(route, &netns)? == Some(id)).then_some((netns, peer)))
}

#[derive(Debug)]
enum Word {
    Doomed(Vec<u32>),
    All(oneshot::Sender<Result<()>>),
}

/// The way to the thread that deletes.
#[derive(Debug)]
pub(super) struct Sweeper {
    words: mpsc::Sender<Word>,
    /// Counts what was asked of the kernel.
    work: Arc<AtomicU64>,
}

impl Sweeper {
    /// In the network namespace of the calling thread. It ends with the last way to it.
    pub(super) fn start() -> Result<Self> {
        let mut route = Route::open()?;
        let (words, inbox) = mpsc::channel();
        let work = Arc::<AtomicU64>::default();
        let counter = Arc::clone(&work);
        thread::Builder::new()
            .name("sweep".to_owned())
            .spawn(move || run(&mut route, &inbox, &counter))
            .map_err(|error| KernelError::io("cannot start a thread", &error))?;
        Ok(Self { words, work })
    }

    /// Somebody waits for something else.
    pub(super) fn note_work(&self) {
        self.work.fetch_add(1, Ordering::Relaxed);
    }

    /// To be deleted some time; told twice is fine.
    pub(super) fn doom(&self, indexes: impl IntoIterator<Item = u32>) {
        let indexes: Vec<u32> = indexes.into_iter().collect();
        if !indexes.is_empty() {
            let _ = self.words.send(Word::Doomed(indexes));
        }
    }

    /// Deletes all now.
    pub(super) fn all(&self, reply: oneshot::Sender<Result<()>>) {
        let _ = self.words.send(Word::All(reply));
    }

    /// The same, and waits until it is done; not for the runtime's threads.
    pub(super) fn now(&self) -> Result<()> {
        let (reply, done) = oneshot::channel();
        self.all(reply);
        done.blocking_recv().map_err(|_| KernelError::Stopped)?
    }
}

fn run(route: &mut Route, words: &mpsc::Receiver<Word>, work: &AtomicU64) {
    let mut doomed = BTreeSet::new();
    let (mut since, mut seen) = (Instant::now(), 0);
    loop {
        let word = if doomed.is_empty() {
            words.recv().map_err(RecvTimeoutError::from)
        } else {
            words.recv_timeout(QUIET)
        };
        let mut quiet = false;
        match word {
            Ok(Word::Doomed(indexes)) => {
                if doomed.is_empty() {
                    since = Instant::now();
                }
                doomed.extend(indexes);
            }
            Ok(Word::All(reply)) => {
                let _ = reply.send(sweep(route, &mut doomed, usize::MAX));
            }
            Err(RecvTimeoutError::Timeout) => {
                let now = work.load(Ordering::Relaxed);
                quiet = now == seen;
                seen = now;
            }
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let count = if doomed.len() >= MANY || since.elapsed() >= LONG {
            MANY
        } else if quiet {
            FEW
        } else {
            continue;
        };
        since = Instant::now();
        // What cannot be deleted now, the next dump finds again.
        if let Err(error) = sweep(route, &mut doomed, count) {
            tracing::warn!(%error, "interfaces of endpoints that are gone are left over for now");
        }
    }
}

/// Deletes some, in one request: however many they are, the kernel waits once.
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
        // Another device may have got the index meanwhile.
        there.extend(views.filter(LinkView::is_doomed).map(|view| view.index));
    }
    apply::delete_group(route, &there)?
        .map_err(|refusal| refusal.into_error("cannot delete interfaces of endpoints that are gone"))
}
