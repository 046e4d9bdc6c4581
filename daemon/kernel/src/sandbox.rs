//! Network namespaces that outlive the programs in them and ovld: made, mounted where `ip netns`
//! looks for them, found again, taken away.
//!
//! Whatever enters another namespace here is a thread that was started for this one piece of work and
//! ends with it: no thread that goes on is ever elsewhere than ovld is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, umask};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::endpoint::LOOPBACK;
use super::error::{KernelError, Result};
use super::message::{self, Target};
use super::netns::{is_netns, of_processes, own};
use super::socket::Route;
use super::sys;

/// Where `ip netns` keeps namespaces by name.
const NETNS_DIR: &str = "/run/netns";
/// Where it looks for files that those inside see in place of the host's, by the namespaces' names.
const NETNS_CONFIG: &str = "/etc/netns";
const RESOLV_CONF: &str = "resolv.conf";
/// What a resolv.conf of ours begins with.
const OURS: &str = "# ovl: the resolver of this sandbox's networks\n";
/// The mount namespace that runtimes and people see.
const HOST_MOUNTS: &str = "/proc/1/ns/mnt";
const OWN_MOUNTS: &str = "/proc/thread-self/ns/mnt";

/// Names a network namespace. The kernel gives a cookie only once in a boot; the number of an inode
/// may come again with the next namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cookie(u64);

/// A network namespace that is held open.
#[derive(Debug)]
pub struct Held {
    /// Keeps it alive.
    pub netns: OwnedFd,
    /// Which one it is.
    pub cookie: Cookie,
}

/// What is found where a namespace should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Nothing.
    Free,
    /// A file with nothing in it: what a namespace is mounted on, without one.
    Empty,
    /// A network namespace; its inode is what `/proc/PID/ns/net` of those inside shows.
    Netns(Cookie, u64),
    /// Anything else.
    Other,
}

/// A process.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its id.
    pub pid: u32,
    /// The name of its command, at most 15 bytes, as it chose it.
    pub command: String,
}

/// Where a namespace of this name is mounted.
pub fn netns_file(name: &str) -> PathBuf {
    Path::new(NETNS_DIR).join(name)
}

/// Makes a namespace in which only the loopback device is, and is up. It ends with the descriptor,
/// unless it is mounted or somebody enters it.
pub async fn new_netns() -> Result<Held> {
    aside(|| {
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|error| KernelError::io("cannot make a network namespace", &error.into()))?;
        Route::open()?
            .request(message::set_up(Target::Index(LOOPBACK), true), 0)?
            .map_err(|refusal| refusal.into_error("cannot set lo up in a new network namespace"))?;
        held()
    })
    .await
}

/// The namespace that ovld itself is in: the host's.
pub async fn own_netns() -> Result<Held> {
    aside(held).await
}

/// Mounts the namespace on a file that is made for it, in the host's mount namespace. Nothing may be
/// there before; if it fails, nothing is afterwards. `ip netns exec` shows those inside this resolv.conf(5).
pub async fn mount_netns(netns: &OwnedFd, path: PathBuf, resolv_conf: Option<String>) -> Result<()> {
    let netns = netns
        .try_clone()
        .map_err(|error| KernelError::io("cannot copy the descriptor of a network namespace", &error))?;
    aside(move || {
        enter_host_mounts()?;
        // First, so that nobody is inside without it.
        if let (Some(text), Some(name)) = (resolv_conf, path.file_name())
            && let Err(error) = write_resolv_conf(&Path::new(NETNS_CONFIG).join(name), &text)
        {
            tracing::warn!("cannot write a resolv.conf for the sandbox {}: {error}", path.display());
        }
        mount_here(&netns, &path)
    })
    .await
}

/// What is at each of these paths of the host's mount namespace.
pub async fn look_at(paths: Vec<PathBuf>) -> Result<Vec<Place>> {
    aside(move || {
        enter_host_mounts()?;
        paths.iter().map(|path| place(path)).collect()
    })
    .await
}

/// Takes the namespace with this cookie away from its path, and the file that it is mounted on. Where
/// only that file is left, it goes; what is anybody else's stays.
pub async fn unmount_netns(path: PathBuf, cookie: Cookie) -> Result<()> {
    aside(move || {
        enter_host_mounts()?;
        match place(&path)? {
            Place::Netns(found, _) if found == cookie => {
                let action = || format!("cannot unmount {}", path.display());
                // Lazily, as `ip netns del` does: somebody may have the file open.
                umount2(&path, MntFlags::MNT_DETACH)
                    .map_err(|error| KernelError::io(action(), &error.into()))?;
            }
            Place::Empty => {}
            Place::Free | Place::Netns(..) | Place::Other => return Ok(()),
        }
        if let Some(name) = path.file_name() {
            remove_resolv_conf(&Path::new(NETNS_CONFIG).join(name));
        }
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(KernelError::io(format!("cannot remove {}", path.display()), &error))
            }
            _ => Ok(()),
        }
    })
    .await
}

/// The processes in each of these namespaces, by the namespaces' inodes. One pass over /proc,
/// however many namespaces there are. A process is where its first thread is.
pub async fn processes_in(inodes: BTreeSet<u64>) -> Result<BTreeMap<u64, BTreeSet<Process>>> {
    aside(move || {
        let mut found: BTreeMap<u64, BTreeSet<Process>> = BTreeMap::new();
        for (inode, path) in of_processes().filter(|(inode, _)| inodes.contains(inode)) {
            let Some(dir) = path.ancestors().nth(2) else { continue };
            let pid = dir.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
            let Some(pid) = pid else { continue };
            let command = fs::read(dir.join("comm")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).trim_end().to_owned();
            found.entry(inode).or_default().insert(Process { pid, command });
        }
        Ok(found)
    })
    .await
}

/// Does the work on a thread of its own.
async fn aside<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (reply, answer) = oneshot::channel();
    std::thread::Builder::new()
        .name("sandbox".to_owned())
        .spawn(move || reply.send(work()))
        .map_err(|error| KernelError::io("cannot start a thread", &error))?;
    answer
        .await
        .unwrap_or_else(|_| Err(KernelError::Other("a thread that was at a sandbox has ended".to_owned())))
}

/// Leaves alone what somebody else has put there.
fn write_resolv_conf(dir: &Path, text: &str) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let path = dir.join(RESOLV_CONF);
    if fs::read_to_string(&path).is_ok_and(|found| !found.starts_with(OURS)) {
        return Ok(());
    }
    fs::write(path, format!("{OURS}{text}"))
}

/// If it is ours; and the directory if nothing else is in it.
fn remove_resolv_conf(dir: &Path) {
    let path = dir.join(RESOLV_CONF);
    if fs::read_to_string(&path).is_ok_and(|found| found.starts_with(OURS)) {
        let _ = fs::remove_file(path);
        let _ = fs::remove_dir(dir);
    }
}

/// The namespace that this thread is in.
fn held() -> Result<Held> {
    let netns = own()?.into();
    let cookie = sys::netns_cookie()
        .map_err(|error| KernelError::io("cannot tell which network namespace this is", &error))?;
    Ok(Held { netns, cookie: Cookie(cookie) })
}

/// Takes this thread to where runtimes and people see what is mounted. A service manager gives a daemon
/// a mount namespace of its own, which follows the host's; what is mounted in it stays in it.
fn enter_host_mounts() -> Result<()> {
    let error = |error: io::Error| {
        let action = "cannot enter the host's mount namespace, which takes CAP_SYS_PTRACE, CAP_SYS_CHROOT, \
                      CAP_SYS_ADMIN and the calls that ovld's unit allows";
        KernelError::io(action, &error)
    };
    // Root, working directory and umask are this thread's own from here on: the others keep theirs, and
    // only such a thread may change its mount namespace.
    unshare(CloneFlags::CLONE_FS).map_err(|errno| error(errno.into()))?;
    umask(Mode::from_bits_truncate(0o022));
    let ours = File::open(OWN_MOUNTS).map_err(error)?;
    let theirs = match File::open(HOST_MOUNTS) {
        Ok(theirs) => theirs,
        // Where the first process cannot be looked at, a mount table that follows another tells.
        Err(found) if follows_another() => return Err(error(found)),
        Err(_) => return Ok(()),
    };
    let inode = |file: &File| file.metadata().map(|metadata| metadata.ino()).map_err(error);
    if inode(&ours)? == inode(&theirs)? {
        return Ok(());
    }
    setns(theirs, CloneFlags::CLONE_NEWNS).map_err(|errno| error(errno.into()))
}

/// Whether the root of this mount namespace is told of mounts elsewhere and tells nobody of its own.
fn follows_another() -> bool {
    fs::read_to_string("/proc/thread-self/mountinfo").is_ok_and(|table| is_slave(&table))
}

/// The same of the text of a mountinfo file.
fn is_slave(table: &str) -> bool {
    let mut roots = table.lines().filter(|line| line.split(' ').nth(4) == Some("/"));
    // Between the options and a lone hyphen stands how mounts propagate.
    roots.any(|line| {
        line.split(' ').skip(6).take_while(|word| *word != "-").any(|word| word.starts_with("master:"))
    })
}

fn mount_here(netns: &OwnedFd, path: &Path) -> Result<()> {
    let shown = path.display();
    let _lock = path.parent().map(prepare).transpose()?;
    let file = OpenOptions::new().write(true).create_new(true).mode(0o000).open(path);
    file.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => KernelError::Other(format!("{shown} is there already")),
        _ => KernelError::io(format!("cannot make {shown}"), &error),
    })?;
    let source = format!("/proc/self/fd/{}", netns.as_fd().as_raw_fd());
    bind(Path::new(&source), path, MsFlags::MS_BIND).map_err(|error| {
        let _ = fs::remove_file(path);
        KernelError::io(format!("cannot mount a network namespace on {shown}"), &error)
    })
}

/// Makes the directory as `ip netns add` does: a mount point that tells other mount namespaces, so that
/// a namespace which is unmounted here does not live on in them. Its lock keeps others from doing
/// the same at this moment.
fn prepare(dir: &Path) -> Result<Flock<File>> {
    let shown = dir.display();
    fs::create_dir_all(dir).map_err(|error| KernelError::io(format!("cannot make {shown}"), &error))?;
    let opened = File::open(dir).map_err(|error| KernelError::io(format!("cannot open {shown}"), &error))?;
    let lock = Flock::lock(opened, FlockArg::LockExclusive)
        .map_err(|(_, error)| KernelError::io(format!("cannot lock {shown}"), &error.into()))?;
    let share = || bind(Path::new(""), dir, MsFlags::MS_SHARED | MsFlags::MS_REC);
    let shared = share().or_else(|error| {
        if error.raw_os_error() != Some(libc::EINVAL) {
            return Err(error);
        }
        // It is no mount point yet.
        bind(dir, dir, MsFlags::MS_BIND | MsFlags::MS_REC)?;
        share()
    });
    shared.map_err(|error| KernelError::io(format!("cannot make {shown} a shared mount"), &error))?;
    Ok(lock)
}

fn bind(source: &Path, target: &Path, flags: MsFlags) -> io::Result<()> {
    Ok(mount(Some(source), target, None::<&str>, flags, None::<&str>)?)
}

fn place(path: &Path) -> Result<Place> {
    let error = |error: io::Error| KernelError::io(format!("cannot look at {}", path.display()), &error);
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Place::Free),
        Err(found) => return Err(error(found)),
    };
    // What is no file might be a FIFO, and hold up the one who opens it.
    if !metadata.is_file() {
        return Ok(Place::Other);
    }
    let file = File::open(path).map_err(error)?;
    if !is_netns(&file) {
        return Ok(if metadata.len() == 0 { Place::Empty } else { Place::Other });
    }
    Ok(Place::Netns(cookie_of(&file)?, metadata.ino()))
}

/// Asked inside, for nobody else can say.
fn cookie_of(netns: &File) -> Result<Cookie> {
    let error = |error: io::Error| KernelError::io("cannot look into a network namespace", &error);
    let home = own()?;
    setns(netns, CloneFlags::CLONE_NEWNET).map_err(|errno| error(errno.into()))?;
    let cookie = sys::netns_cookie();
    // The thread would end soon anyway; but what comes next may be that the namespace is to go.
    setns(home, CloneFlags::CLONE_NEWNET).map_err(|errno| error(errno.into()))?;
    cookie.map(Cookie).map_err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_namespace_that_follows_another_is_told_by_its_root() {
        let own = "22 27 0:21 / /proc rw - proc proc rw\n27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
                   30 27 0:4 net:[4026532318] /run/netns/a rw shared:2 master:7 - nsfs nsfs rw\n";
        assert!(!is_slave(own));
        let shared = "27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n";
        assert!(!is_slave(shared));
        let slave = "27 1 254:0 / / rw,relatime shared:9 master:1 - ext4 master:x rw\n";
        assert!(is_slave(slave));
        let private = "27 1 254:0 / / rw,relatime - ext4 master:x rw\n";
        assert!(!is_slave(private));
    }
}
