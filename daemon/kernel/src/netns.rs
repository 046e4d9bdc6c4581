//! Network namespaces of endpoints. A descriptor of one keeps it alive, so none is held longer than
//! a request takes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::{io, thread};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use nix::libc;
use nix::sched::{CloneFlags, setns};

use super::attribute::{attributes, u32_at};
use super::error::{KernelError, Result};
use super::socket::{Batch, Route};
use super::sys;

/// The namespace of the thread that looks.
const OWN: &str = "/proc/thread-self/ns/net";

/// An open network namespace that is not ovld's own.
#[derive(Debug)]
pub struct Netns {
    /// The descriptor.
    pub fd: OwnedFd,
    /// The number that names it while it exists (as in `net:[4026531840]`).
    pub inode: u64,
}

/// Opens `/run/netns/NAME`, `/proc/PID/ns/net` or the like.
pub fn open_netns(path: &Path) -> Result<Netns> {
    let text = path.display();
    // What is not a namespace might be a FIFO, and hold up the one who opens it.
    let file =
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(
            |error| match error.kind() {
                io::ErrorKind::NotFound => {
                    KernelError::Other(format!("there is no network namespace {text}"))
                }
                _ => KernelError::io(format!("cannot open the network namespace {text}"), &error),
            },
        )?;
    let no_namespace = || KernelError::Other(format!("{text} is not a network namespace"));
    if !is_netns(&file) {
        return Err(no_namespace());
    }
    let inode = inode(&file)?;
    if inode == self::inode(&own()?)? {
        return Err(KernelError::Other(format!(
            "{text} is the network namespace of ovld itself: a container with the host's network needs no endpoint"
        )));
    }
    Ok(Netns { fd: file.into(), inode })
}

/// Whether an open file is a network namespace.
pub(super) fn is_netns(file: &File) -> bool {
    // On another file system the request below could mean something else.
    nix::sys::statfs::fstatfs(file)
        .is_ok_and(|system| system.filesystem_type() == nix::sys::statfs::NSFS_MAGIC)
        && sys::namespace_type(file.as_fd()).is_ok_and(|kind| kind == libc::CLONE_NEWNET)
}

/// The namespace of the calling thread.
pub(super) fn own() -> Result<File> {
    File::open(OWN).map_err(|error| KernelError::io("cannot open ovld's own network namespace", &error))
}

fn inode(file: &File) -> Result<u64> {
    let metadata =
        file.metadata().map_err(|error| KernelError::io("cannot look at a network namespace", &error))?;
    Ok(metadata.ino())
}

/// What to do inside, and then, outside again, how to answer.
type Job = Box<dyn FnOnce() -> Answer + Send>;
type Answer = Box<dyn FnOnce() + Send>;

/// A thread that works inside of other namespaces. It is the only one of ovld that ever enters one;
/// should it not find back, it ends, and another takes its place.
#[derive(Debug, Default)]
pub(super) struct Visitor {
    jobs: Option<mpsc::Sender<(OwnedFd, Job)>>,
}

impl Visitor {
    /// Does the job with a netlink socket in the namespace, and lets go of the namespace.
    pub(super) fn visit<T: Send + 'static>(
        &mut self,
        netns: OwnedFd,
        job: impl FnOnce(&mut Route) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let job: Job = Box::new(move || {
            let result = Route::open().and_then(|mut route| job(&mut route));
            Box::new(move || {
                let _ = sender.send(result);
            })
        });
        self.send((netns, job))?;
        receiver.recv().unwrap_or_else(|_| {
            self.jobs = None;
            Err(KernelError::Other("cannot enter the network namespace".to_owned()))
        })
    }

    fn send(&mut self, job: (OwnedFd, Job)) -> Result<()> {
        let job = match &self.jobs {
            Some(jobs) => match jobs.send(job) {
                Ok(()) => return Ok(()),
                Err(mpsc::SendError(job)) => job,
            },
            None => job,
        };
        let (sender, receiver) = mpsc::channel();
        let home = own()?;
        thread::Builder::new()
            .name("netns".to_owned())
            .spawn(move || serve(&home, &receiver))
            .map_err(|error| KernelError::io("cannot start a thread", &error))?;
        let _ = sender.send(job);
        self.jobs = Some(sender);
        Ok(())
    }
}

fn serve(home: &File, jobs: &mpsc::Receiver<(OwnedFd, Job)>) {
    for (netns, job) in jobs {
        if let Err(error) = setns(&netns, CloneFlags::CLONE_NEWNET) {
            tracing::error!("cannot enter a network namespace: {error}");
            return;
        }
        let answer = job();
        let left = setns(home, CloneFlags::CLONE_NEWNET);
        // Who gets the answer may rely on it that we do not hold the namespace any more: its
        // descriptor, the job's socket and this thread all did.
        drop(netns);
        answer();
        if let Err(error) = left {
            tracing::error!("cannot leave a network namespace: {error}");
            return;
        }
    }
}

/// Opens the namespaces that the kernel knows under these ids, seen from `route`'s. An id cannot be
/// opened, so all namespaces that have a name or a process are asked for theirs.
pub(super) fn by_id(route: &mut Route, wanted: &BTreeSet<i32>) -> Result<BTreeMap<i32, OwnedFd>> {
    let mut found = BTreeMap::new();
    let mut seen = BTreeSet::new();
    for (inode, path) in mounted().into_iter().chain(of_processes()) {
        if found.len() == wanted.len() {
            break;
        }
        if !seen.insert(inode) {
            continue;
        }
        // What was read a moment ago may have ended, and its path lead to another.
        let Some(netns) = open_netns(&path).ok().filter(|netns| netns.inode == inode) else { continue };
        if let Some(id) = id_of(route, &netns)?.filter(|id| wanted.contains(id)) {
            found.insert(id, netns.fd);
        }
    }
    Ok(found)
}

/// The id under which `route`'s namespace knows another, if it does.
pub(super) fn id_of(route: &mut Route, netns: &Netns) -> Result<Option<i32>> {
    let mut message = NsidMessage::default();
    message.attributes.push(NsidAttribute::Fd(netns.fd.as_raw_fd().unsigned_abs()));
    let mut batch = Batch::default();
    batch.push(RouteNetlinkMessage::GetNsId(message), 0);
    let (_, answers) = route.execute(batch)?;
    Ok(answers.first().and_then(|answer| {
        let (_, id) = attributes(&answer.payload, 4).find(|(kind, _)| *kind == 1)?;
        u32_at(id, 0).map(|id| id as i32)
    }))
}

/// Namespaces with a name: mounts of the namespace file system.
fn mounted() -> Vec<(u64, PathBuf)> {
    let Ok(text) = std::fs::read_to_string("/proc/thread-self/mountinfo") else { return Vec::new() };
    text.lines()
        .filter_map(|line| {
            let mut words = line.split(' ').skip(3);
            let inode = inode_in(words.next()?)?;
            Some((inode, PathBuf::from(unescape(words.next()?))))
        })
        .collect()
}

/// Spaces and the like are octal numbers in mountinfo.
fn unescape(word: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .into_iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(word.to_owned(), |word, (code, char)| word.replace(code, char))
}

/// Namespaces of processes.
pub(super) fn of_processes() -> impl Iterator<Item = (u64, PathBuf)> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(|c: char| c.is_ascii_digit()))
        .filter_map(|entry| {
            let path = entry.path().join("ns/net");
            let link = std::fs::read_link(&path).ok()?;
            Some((inode_in(link.to_str()?)?, path))
        })
}

/// Of `net:[4026531840]`.
fn inode_in(text: &str) -> Option<u64> {
    text.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()
}
