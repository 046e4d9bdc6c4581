//! Sandboxes: network namespaces that outlive the programs in them and ovld. This module creates them, mounts them
//! where `ip netns` looks for them, finds them again, and unmounts them.
//!
//! Only short-lived threads enter another namespace, one for each call. All other threads of ovld stay in its own
//! namespaces.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, umask};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::error::{KernelError, Result};
use super::message::{self, Target};
use super::netns::{is_netns, of_processes, own};
use super::socket::Route;
use super::sys;
use super::sys::LOOPBACK;

/// The directory in which `ip netns` mounts named namespaces.
const NETNS_DIR: &str = "/run/netns";
/// The directory of files that `ip netns exec` mounts over those of /etc, by the name of the namespace.
const NETNS_CONFIG: &str = "/etc/netns";
const RESOLV_CONF: &str = "resolv.conf";
/// The first line of a resolv.conf that ovl wrote.
const OURS: &str = "# ovl: the resolver of this sandbox's networks\n";
/// The mount namespace of the host, which container runtimes and administrators use.
const HOST_MOUNTS: &str = "/proc/1/ns/mnt";
const OWN_MOUNTS: &str = "/proc/thread-self/ns/mnt";

/// The cookie of a network namespace, which is unique until the next boot. The number of an inode may be reused by
/// the next namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetnsCookie(u64);

/// An open network namespace with its cookie.
#[derive(Debug)]
pub struct NetnsHandle {
    /// The descriptor, which keeps the namespace alive.
    pub netns: OwnedFd,
    /// The cookie of the namespace.
    pub cookie: NetnsCookie,
}

/// The content of a path at which a namespace is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MountPoint {
    /// The path does not exist.
    Free,
    /// An empty file: a mount point without a namespace.
    Empty,
    /// A network namespace, with its inode, which `/proc/PID/ns/net` of its processes shows.
    Netns(NetnsCookie, u64),
    /// Any other content.
    Other,
}

/// A process in a namespace.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// The process id.
    pub pid: u32,
    /// The name of its command (`/proc/PID/comm`), at most 15 bytes.
    pub command: String,
}

/// The path at which a namespace of this name is mounted.
pub fn netns_file(name: &str) -> PathBuf {
    Path::new(NETNS_DIR).join(name)
}

/// Creates a namespace whose only device is the loopback device, which is up. It is deleted with the descriptor,
/// unless it is mounted or a process is in it.
///
/// # Errors
///
/// A system call is refused: it needs CAP_SYS_ADMIN.
pub async fn new_netns() -> Result<NetnsHandle> {
    on_new_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|error| KernelError::io("cannot create a network namespace", &error.into()))?;
        Route::open()?
            .request(message::set_up(Target::Index(LOOPBACK), true), 0)?
            .map_err(|refusal| refusal.into_error("cannot set lo up in a new network namespace"))?;
        current_netns()
    })
    .await
}

/// The namespace of ovld itself, which is the host's.
///
/// # Errors
///
/// /proc cannot be read.
pub async fn own_netns() -> Result<NetnsHandle> {
    on_new_thread(current_netns).await
}

/// Mounts a namespace on a new file, in the host's mount namespace. `ip netns exec` mounts `resolv_conf` as
/// resolv.conf(5) in it.
///
/// # Errors
///
/// The path exists, or the mount fails; then the path does not exist.
pub async fn mount_netns(netns: &OwnedFd, path: PathBuf, resolv_conf: Option<String>) -> Result<()> {
    let netns = netns
        .try_clone()
        .map_err(|error| KernelError::io("cannot copy the descriptor of a network namespace", &error))?;
    on_new_thread(move || {
        enter_host_mounts()?;
        // Before the mount, so that no process is in the namespace without it.
        if let (Some(text), Some(name)) = (resolv_conf, path.file_name())
            && let Err(error) = write_resolv_conf(&Path::new(NETNS_CONFIG).join(name), &text)
        {
            tracing::warn!(sandbox = %path.display(), %error, "cannot write the resolv.conf of a sandbox");
        }
        mount_here(&netns, &path)
    })
    .await
}

/// Reads the content of each path in the host's mount namespace.
///
/// # Errors
///
/// The host's mount namespace cannot be entered, or a path cannot be read.
pub async fn mount_points(paths: Vec<PathBuf>) -> Result<Vec<MountPoint>> {
    on_new_thread(move || {
        enter_host_mounts()?;
        paths.iter().map(|path| mount_point(path)).collect()
    })
    .await
}

/// Unmounts the namespace with this cookie from its path, and deletes the mount point. An empty mount point is
/// deleted too; any other content is kept.
///
/// # Errors
///
/// The host's mount namespace cannot be entered, or the path cannot be unmounted or deleted.
pub async fn unmount_netns(path: PathBuf, cookie: NetnsCookie) -> Result<()> {
    on_new_thread(move || {
        enter_host_mounts()?;
        match mount_point(&path)? {
            MountPoint::Netns(found, _) if found == cookie => {
                let action = || format!("cannot unmount {}", path.display());
                // Lazily, as `ip netns del` does: a process may have the file open.
                umount2(&path, MntFlags::MNT_DETACH)
                    .map_err(|error| KernelError::io(action(), &error.into()))?;
            }
            MountPoint::Empty => {}
            MountPoint::Free | MountPoint::Netns(..) | MountPoint::Other => return Ok(()),
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

/// Lists the processes in each of these namespaces, by the inodes of the namespaces, in one pass over /proc. A process
/// counts as being in the namespace of its first thread.
///
/// # Errors
///
/// No thread can be started.
pub async fn processes_in(inodes: BTreeSet<u64>) -> Result<BTreeMap<u64, BTreeSet<Process>>> {
    on_new_thread(move || {
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

/// Runs `work` on a new thread.
async fn on_new_thread<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (reply, answer) = oneshot::channel();
    std::thread::Builder::new()
        .name("sandbox".to_owned())
        .spawn(move || reply.send(work()))
        .map_err(|error| KernelError::io("cannot start a thread", &error))?;
    answer
        .await
        .unwrap_or_else(|_| Err(KernelError::Other("a sandbox thread exited without a result".to_owned())))
}

/// Writes the resolv.conf of a sandbox, unless there is one that ovl did not write.
fn write_resolv_conf(dir: &Path, text: &str) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let path = dir.join(RESOLV_CONF);
    if fs::read_to_string(&path).is_ok_and(|found| !found.starts_with(OURS)) {
        return Ok(());
    }
    fs::write(&path, format!("{OURS}{text}"))?;
    // Programs of all users in the namespace read it, whatever the umask of the daemon is.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644))
}

/// Deletes the resolv.conf of a sandbox if ovl wrote it, and its directory if that is empty.
fn remove_resolv_conf(dir: &Path) {
    let path = dir.join(RESOLV_CONF);
    if fs::read_to_string(&path).is_ok_and(|found| found.starts_with(OURS)) {
        let _ = fs::remove_file(path);
        let _ = fs::remove_dir(dir);
    }
}

/// The namespace of the calling thread.
fn current_netns() -> Result<NetnsHandle> {
    let netns = own()?.into();
    let cookie = sys::netns_cookie()
        .map_err(|error| KernelError::io("cannot read the cookie of a network namespace", &error))?;
    Ok(NetnsHandle { netns, cookie: NetnsCookie(cookie) })
}

/// Moves the calling thread to the host's mount namespace. A service manager may run a daemon in a slave mount
/// namespace of the host's; mounts in it are invisible to the host.
fn enter_host_mounts() -> Result<()> {
    let error = |error: io::Error| {
        let action = "cannot enter the host's mount namespace, which needs CAP_SYS_PTRACE, CAP_SYS_CHROOT, \
                      CAP_SYS_ADMIN and the system calls that the unit of ovld allows";
        KernelError::io(action, &error)
    };
    // From here on the thread has its own root, working directory and umask: the other threads keep theirs, and the
    // kernel lets only such a thread change its mount namespace.
    unshare(CloneFlags::CLONE_FS).map_err(|errno| error(errno.into()))?;
    umask(Mode::from_bits_truncate(0o022));
    let ours = File::open(OWN_MOUNTS).map_err(error)?;
    let theirs = match File::open(HOST_MOUNTS) {
        Ok(theirs) => theirs,
        // Process 1 is not accessible. In a slave mount namespace that is an error, otherwise this is the host's.
        Err(found) if is_slave_namespace() => return Err(error(found)),
        Err(_) => return Ok(()),
    };
    let inode = |file: &File| file.metadata().map(|metadata| metadata.ino()).map_err(error);
    if inode(&ours)? == inode(&theirs)? {
        return Ok(());
    }
    setns(theirs, CloneFlags::CLONE_NEWNS).map_err(|errno| error(errno.into()))
}

/// Whether the root of this mount namespace is a slave mount: mounts propagate to it and not from it.
fn is_slave_namespace() -> bool {
    fs::read_to_string("/proc/thread-self/mountinfo").is_ok_and(|table| is_slave(&table))
}

/// Whether the root in the text of a mountinfo file is a slave mount.
fn is_slave(table: &str) -> bool {
    let mut roots = table.lines().filter(|line| line.split(' ').nth(4) == Some("/"));
    // The propagation fields are between the options and a lone hyphen.
    roots.any(|line| {
        line.split(' ').skip(6).take_while(|word| *word != "-").any(|word| word.starts_with("master:"))
    })
}

fn mount_here(netns: &OwnedFd, path: &Path) -> Result<()> {
    let shown = path.display();
    let _lock = path.parent().map(prepare).transpose()?;
    let file = OpenOptions::new().write(true).create_new(true).mode(0o000).open(path);
    file.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => KernelError::Other(format!("{shown} already exists")),
        _ => KernelError::io(format!("cannot create {shown}"), &error),
    })?;
    let source = format!("/proc/self/fd/{}", netns.as_fd().as_raw_fd());
    bind(Path::new(&source), path, MsFlags::MS_BIND).map_err(|error| {
        let _ = fs::remove_file(path);
        KernelError::io(format!("cannot mount a network namespace on {shown}"), &error)
    })
}

/// Creates the directory as `ip netns add` does: a shared mount, so that a namespace that is unmounted here does not
/// stay mounted in other mount namespaces. Returns a lock that keeps other programs from doing the same meanwhile.
fn prepare(dir: &Path) -> Result<Flock<File>> {
    let shown = dir.display();
    fs::create_dir_all(dir).map_err(|error| KernelError::io(format!("cannot create {shown}"), &error))?;
    let opened = File::open(dir).map_err(|error| KernelError::io(format!("cannot open {shown}"), &error))?;
    let lock = Flock::lock(opened, FlockArg::LockExclusive)
        .map_err(|(_, error)| KernelError::io(format!("cannot lock {shown}"), &error.into()))?;
    let share = || bind(Path::new(""), dir, MsFlags::MS_SHARED | MsFlags::MS_REC);
    let shared = share().or_else(|error| {
        if error.raw_os_error() != Some(libc::EINVAL) {
            return Err(error);
        }
        // It is not a mount point yet.
        bind(dir, dir, MsFlags::MS_BIND | MsFlags::MS_REC)?;
        share()
    });
    shared.map_err(|error| KernelError::io(format!("cannot make {shown} a shared mount"), &error))?;
    Ok(lock)
}

fn bind(source: &Path, target: &Path, flags: MsFlags) -> io::Result<()> {
    Ok(mount(Some(source), target, None::<&str>, flags, None::<&str>)?)
}

fn mount_point(path: &Path) -> Result<MountPoint> {
    let error = |error: io::Error| KernelError::io(format!("cannot read {}", path.display()), &error);
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(MountPoint::Free),
        Err(found) => return Err(error(found)),
    };
    // To open a FIFO would block.
    if !metadata.is_file() {
        return Ok(MountPoint::Other);
    }
    let file = File::open(path).map_err(error)?;
    if !is_netns(&file) {
        return Ok(if metadata.len() == 0 { MountPoint::Empty } else { MountPoint::Other });
    }
    Ok(MountPoint::Netns(cookie_of(&file)?, metadata.ino()))
}

/// The cookie of a network namespace. The kernel returns it only to a thread in the namespace, so this enters it.
fn cookie_of(netns: &File) -> Result<NetnsCookie> {
    let error = |error: io::Error| KernelError::io("cannot enter a network namespace", &error);
    let home = own()?;
    setns(netns, CloneFlags::CLONE_NEWNET).map_err(|errno| error(errno.into()))?;
    let cookie = sys::netns_cookie();
    // The thread exits soon, but the caller may unmount the namespace before that.
    setns(home, CloneFlags::CLONE_NEWNET).map_err(|errno| error(errno.into()))?;
    cookie.map(NetnsCookie).map_err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slave_mount_namespace_is_detected_by_its_root() {
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
