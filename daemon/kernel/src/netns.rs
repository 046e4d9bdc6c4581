//! Network namespaces of endpoints. A descriptor keeps its namespace alive, so none is held longer than a request
//! takes.

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

/// The namespace of the calling thread.
const OWN: &str = "/proc/thread-self/ns/net";

/// An open network namespace other than that of ovld.
#[derive(Debug)]
pub struct Netns {
    /// The descriptor.
    pub fd: OwnedFd,
    /// The inode, which identifies the namespace while it exists (as in `net:[4026531840]`).
    pub inode: u64,
}

/// Opens a network namespace by path, such as `/run/netns/NAME` or `/proc/PID/ns/net`.
///
/// # Errors
///
/// The path does not exist or is not a network namespace, or it is the namespace of ovld itself.
pub fn open_netns(path: &Path) -> Result<Netns> {
    let text = path.display();
    // Without O_NONBLOCK, to open a FIFO would block.
    let file =
        OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(
            |error| match error.kind() {
                io::ErrorKind::NotFound => {
                    KernelError::Other(format!("network namespace {text} does not exist"))
                }
                _ => KernelError::io(format!("cannot open the network namespace {text}"), &error),
            },
        )?;
    if !is_netns(&file) {
        return Err(KernelError::Other(format!("{text} is not a network namespace")));
    }
    let inode = inode(&file)?;
    if inode == own_inode()? {
        return Err(KernelError::Other(format!(
            "{text} is the network namespace of ovld itself: a container on the host network needs no endpoint"
        )));
    }
    Ok(Netns { fd: file.into(), inode })
}

/// Whether an open file is a network namespace.
pub(super) fn is_netns(file: &File) -> bool {
    // On another file system the ioctl below could have another meaning.
    nix::sys::statfs::fstatfs(file)
        .is_ok_and(|system| system.filesystem_type() == nix::sys::statfs::NSFS_MAGIC)
        && sys::namespace_type(file.as_fd()).is_ok_and(|kind| kind == libc::CLONE_NEWNET)
}

/// The namespace of the calling thread.
pub(super) fn own() -> Result<File> {
    File::open(OWN).map_err(|error| KernelError::io("cannot open ovld's own network namespace", &error))
}

/// The inode of the namespace of the calling thread.
pub(super) fn own_inode() -> Result<u64> {
    inode(&own()?)
}

fn inode(file: &File) -> Result<u64> {
    let metadata =
        file.metadata().map_err(|error| KernelError::io("cannot inspect a network namespace", &error))?;
    Ok(metadata.ino())
}

/// Work in a namespace. It returns a closure that sends the result, to be called after the namespace was left.
type Job = Box<dyn FnOnce() -> Answer + Send>;
type Answer = Box<dyn FnOnce() + Send>;

/// A handle to the thread that works in other namespaces. If the thread cannot return to its own namespace, it exits,
/// and the next job starts a new one.
#[derive(Debug, Default)]
pub(super) struct NetnsWorker {
    jobs: Option<mpsc::Sender<(OwnedFd, Job)>>,
}

impl NetnsWorker {
    /// Runs a job with a netlink socket in a namespace, and closes the namespace. It blocks until the job is done.
    pub(super) fn run_in<T: Send + 'static>(
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
            Err(KernelError::Other("cannot enter the network namespace of a workload".to_owned()))
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
            .map_err(|error| KernelError::io("cannot start the thread that enters namespaces", &error))?;
        let _ = sender.send(job);
        self.jobs = Some(sender);
        Ok(())
    }
}

fn serve(home: &File, jobs: &mpsc::Receiver<(OwnedFd, Job)>) {
    for (netns, job) in jobs {
        if let Err(error) = setns(&netns, CloneFlags::CLONE_NEWNET) {
            tracing::error!(%error, "cannot enter a network namespace");
            return;
        }
        let answer = job();
        let left = setns(home, CloneFlags::CLONE_NEWNET);
        // When the requester receives the result, nothing of ovld may keep the namespace alive: neither its
        // descriptor, nor the job's socket, nor this thread.
        drop(netns);
        answer();
        if let Err(error) = left {
            tracing::error!(%error, "cannot leave a network namespace");
            return;
        }
    }
}

/// Opens the namespaces with these ids, which are relative to the namespace of `route`. An id cannot be opened, so this
/// compares the ids of all namespaces that have a name or a process.
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
        // The namespace may have been deleted meanwhile, and its path refer to another.
        let Some(netns) = open_netns(&path).ok().filter(|netns| netns.inode == inode) else { continue };
        if let Some(id) = id_of(route, &netns)?.filter(|id| wanted.contains(id)) {
            found.insert(id, netns.fd);
        }
    }
    Ok(found)
}

/// The id of a namespace in the namespace of `route`. `None` if it has none there.
pub(super) fn id_of(route: &mut Route, netns: &Netns) -> Result<Option<i32>> {
    /// Not defined by `libc`.
    const NETNSA_NSID: u16 = 1;
    let mut message = NsidMessage::default();
    message.attributes.push(NsidAttribute::Fd(netns.fd.as_raw_fd().unsigned_abs()));
    let mut batch = Batch::default();
    batch.push(RouteNetlinkMessage::GetNsId(message), 0);
    let (_, answers) = route.execute(batch)?;
    Ok(answers.first().and_then(|answer| {
        let (_, id) = attributes(&answer.payload, 4).find(|(kind, _)| *kind == NETNSA_NSID)?;
        u32_at(id, 0).map(|id| id as i32)
    }))
}

/// Lists the namespaces that are mounted, with their inodes.
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

/// Decodes the octal escapes of white space and backslashes in mountinfo.
fn unescape(word: &str) -> String {
    ["\\040", "\\011", "\\012", "\\134"]
        .into_iter()
        .zip([" ", "\t", "\n", "\\"])
        .fold(word.to_owned(), |word, (code, char)| word.replace(code, char))
}

/// Lists the namespaces of all processes, with their inodes.
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

/// Parses the inode in a text such as `net:[4026531840]`.
fn inode_in(text: &str) -> Option<u64> {
    text.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()
}
