//! What a host may run out of: how much of it is in use, and when that is a problem.

use std::path::Path;

use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statvfs::statvfs;
use ovl_kernel as kernel;

/// Space of the file system with the state directory below which it is nearly full, in bytes: several times the largest
/// state file.
const LITTLE_SPACE: u64 = 64 << 20;
/// Likewise, the number of files that can be created.
const FEW_FILES: u64 = 1_000;

/// Something of which there is only so much.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Stock {
    /// The share in use at which it is short.
    short_at: f64,
    /// The share in use.
    used: f64,
    /// What is the case, and what to do.
    pub(crate) sentence: String,
}

impl Stock {
    /// Whether there is little left. If there `was` before, it takes somewhat more to have enough again, so that a use that
    /// varies is one problem and not many.
    pub(crate) fn is_short(&self, was: bool) -> bool {
        self.used >= if was { self.short_at * 0.9 } else { self.short_at }
    }
}

/// Reads how full the kernel's table of connections is. `None` if there is none.
pub(crate) fn connections() -> Option<Stock> {
    let of = |name: &str| kernel::read_sysctl(&format!("net.netfilter.nf_conntrack_{name}"))?.parse().ok();
    // Zero means no limit.
    let (count, most): (u64, u64) = (of("count")?, of("max").filter(|most| *most > 0)?);
    Some(Stock {
        short_at: 0.8,
        used: count as f64 / most as f64,
        sentence: format!(
            "the kernel tracks {count} connections and can track {most}; when it cannot track another, new connections fail. \
             Raise net.netfilter.nf_conntrack_max, or find who opens so many with `conntrack -L`"
        ),
    })
}

/// Reads how many open files this process has, and how many it may have. `None` if the kernel does not tell.
pub(crate) fn open_files() -> Option<(usize, u64)> {
    let most = getrlimit(Resource::RLIMIT_NOFILE).ok()?.0;
    // The directory itself is open while it is read.
    let count = std::fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1);
    Some((count, most))
}

/// Reads whether this process runs out of open files. `None` if the kernel does not tell.
pub(crate) fn descriptors() -> Option<Stock> {
    let (count, most) = open_files()?;
    Some(Stock {
        short_at: 0.8,
        used: count as f64 / most as f64,
        sentence: format!(
            "ovld has {count} open files and may have {most}. Raise LimitNOFILE in its unit: `systemctl edit ovld`"
        ),
    })
}

/// Reads how much space is left for the state. `None` if the kernel does not tell.
pub(crate) fn disk(dir: &Path) -> Option<Stock> {
    let found = statvfs(dir).ok()?;
    let space = found.blocks_available().saturating_mul(found.fragment_size());
    // Some file systems have no limit of files, and say zero.
    let files = if found.files() == 0 { u64::MAX } else { found.files_available() };
    let shares = [LITTLE_SPACE as f64 / space.max(1) as f64, FEW_FILES as f64 / files.max(1) as f64];
    Some(Stock {
        short_at: 1.0,
        used: shares.into_iter().fold(0.0, f64::max),
        sentence: format!(
            "the file system of {} has {} MiB left, and room for {files} files: free some, or nothing can be promised to \
             other hosts",
            dir.display(),
            space >> 20
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stock_that_was_short_needs_somewhat_more_to_be_enough() {
        let stock = |used| Stock { short_at: 0.8, used, sentence: String::new() };
        assert!(!stock(0.79).is_short(false) && stock(0.8).is_short(false));
        assert!(stock(0.73).is_short(true) && !stock(0.71).is_short(true));
    }

    #[test]
    fn this_process_and_disk_have_enough() {
        assert!(!descriptors().unwrap().is_short(false));
        assert!(!disk(&std::env::temp_dir()).unwrap().is_short(false));
        assert_eq!(disk(Path::new("/no/such/directory")), None);
    }
}
