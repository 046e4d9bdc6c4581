//! Network namespaces of endpoints. A descriptor of one keeps it alive, so none is held longer than
//! a request takes.

use std::os::fd::OwnedFd;
use std::path::Path;

use super::error::{KernelError, Result};

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
    Err(KernelError::Other(format!("{} is not a network namespace", path.display())))
}
