//! The processes of a tunnel: CPU affinity and resource usage.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::idle::field;

/// Core to which everything is pinned.
const CORE: usize = 0;

/// The tunnel's processes, one on each host. Empty if the kernel does all the work.
#[derive(Clone, Debug, Default)]
pub(crate) struct Processes(pub(crate) Vec<u32>);

impl Processes {
    /// Pins all their threads to one core until the guard is dropped.
    pub(crate) fn pin(&self) -> Result<Pinned> {
        let mut pinned = Pinned { threads: Vec::new() };
        for pid in &self.0 {
            for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
                let name = entry?.file_name();
                let thread = name.to_str().and_then(|name| name.parse().ok()).map(Pid::from_raw);
                let thread = thread.with_context(|| format!("no thread's number: {}", name.display()))?;
                let before = match sched_getaffinity(thread) {
                    // Threads may exit at any time.
                    Err(Errno::ESRCH) => continue,
                    other => other.context("cannot read a thread's cores")?,
                };
                pinned.threads.push((thread, before));
                match pin(thread) {
                    Ok(()) | Err(Errno::ESRCH) => {}
                    Err(error) => return Err(error).context("cannot pin a thread"),
                }
            }
        }
        Ok(pinned)
    }

    /// Resets the peaks of resident memory.
    pub(crate) fn reset_peaks(&self) -> Result<()> {
        // proc(5): "5" resets the peak resident set size.
        self.0
            .iter()
            .try_for_each(|pid| fs::write(format!("/proc/{pid}/clear_refs"), "5"))
            .context("cannot reset the memory peak of a process")
    }

    /// Returns the largest peak of resident memory since the reset, in MiB.
    pub(crate) fn peak_mib(&self) -> Result<f64> {
        ensure!(!self.0.is_empty(), "this network has no tunnel process");
        self.0.iter().try_fold(0.0, |peak: f64, pid| {
            let kib = field(format!("/proc/{pid}/status").as_ref(), "VmHWM:")?;
            Ok(peak.max(kib / 1024.0))
        })
    }

    /// Returns the CPU time used by all of them so far.
    pub(crate) fn cpu_time(&self) -> Result<Duration> {
        self.0.iter().try_fold(Duration::ZERO, |sum, pid| Ok(sum + netns_lab::cpu_time(*pid)?))
    }
}

fn pin(thread: Pid) -> nix::Result<()> {
    let mut cores = CpuSet::new();
    cores.set(CORE)?;
    sched_setaffinity(thread, &cores)
}

/// Pins the calling thread permanently.
pub(crate) fn pin_this_thread() -> Result<()> {
    pin(Pid::from_raw(0)).context("cannot pin this thread")
}

/// Guard that restores the CPU affinity of threads on drop.
pub(crate) struct Pinned {
    threads: Vec<(Pid, CpuSet)>,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        for (thread, cores) in &self.threads {
            // This fails only for threads that have exited.
            sched_setaffinity(*thread, cores).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_pinned_until_the_guard_is_dropped() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid::from_raw(child.id().cast_signed());
        let before = sched_getaffinity(pid).unwrap();
        let processes = Processes(vec![child.id()]);
        let pinned = processes.pin().unwrap();
        let mut one = CpuSet::new();
        one.set(CORE).unwrap();
        assert_eq!(sched_getaffinity(pid).unwrap(), one);
        drop(pinned);
        assert_eq!(sched_getaffinity(pid).unwrap(), before);

        processes.reset_peaks().unwrap();
        assert!(
            processes.peak_mib().unwrap() > 0.0 && processes.cpu_time().unwrap() < Duration::from_secs(60)
        );
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
