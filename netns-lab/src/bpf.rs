//! The BPF file system, in which daemons pin the programs of their fast path.
//!
//! Hosts of a lab share the machine's file systems. A daemon's folder there outlives its namespace, so it is deleted with it.
//! The daemon leaves a link to it in its run directory.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use crate::tool;

const MOUNT_POINT: &str = "/sys/fs/bpf";
/// What keeps two processes from mounting it twice: the second would hide what is in the first.
const LOCK: &str = "/run/netns-lab-bpf.lock";

/// Mounts the BPF file system, unless it is mounted.
pub(crate) fn mount() -> Result<()> {
    let lock = OpenOptions::new()
        .create(true)
        .append(true)
        .open(LOCK)
        .with_context(|| format!("cannot open {LOCK}"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
    if statfs(MOUNT_POINT).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC) {
        return Ok(());
    }
    tool::run(["mount", "-t", "bpf", "bpf", MOUNT_POINT], None).map(drop)
}

/// Returns the folder in which the daemon with this run directory has pinned its programs. `None` if it has never used the
/// fast path.
pub(crate) fn pins_of(run_dir: &Path) -> Option<PathBuf> {
    fs::read_link(run_dir.join("fast-path")).ok().filter(|folder| folder.starts_with(MOUNT_POINT))
}

/// Deletes what the daemon with this run directory has pinned.
pub(crate) fn remove_pins(run_dir: &Path) {
    pins_of(run_dir).iter().for_each(|folder| remove_all(folder));
}

/// Deletes a folder. The BPF file system has no other recursion: `remove_dir_all` opens what it deletes.
fn remove_all(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_all(&entry.path());
        } else {
            let _ = fs::remove_file(entry.path());
        }
    }
    let _ = fs::remove_dir(folder);
}
