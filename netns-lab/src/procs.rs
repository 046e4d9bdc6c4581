//! Processes: identity, liveness, resource usage, and the processes in a namespace.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::wait::wait_until;

/// USER_HZ: the unit of times in /proc, regardless of the kernel's own clock.
const TICKS_PER_SECOND: u64 = 100;

const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// A process. The start time distinguishes it from a later process with the same id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcId {
    pub(crate) pid: i32,
    pub(crate) start: u64,
}

impl ProcId {
    /// Returns the process with that id. `None` if it is not alive.
    pub(crate) fn of(pid: i32) -> Option<Self> {
        let stat = Stat::read(pid)?;
        stat.is_alive().then_some(ProcId { pid, start: stat.start })
    }

    /// Returns this process.
    pub(crate) fn own() -> Option<Self> {
        ProcId::of(process::id().cast_signed())
    }

    /// Returns whether it is alive. A zombie is not.
    pub(crate) fn is_alive(self) -> bool {
        ProcId::of(self.pid) == Some(self)
    }

    /// Sends a signal. Returns false if the process has exited.
    pub(crate) fn signal(self, signal: Signal) -> Result<bool> {
        if !self.is_alive() {
            return Ok(false);
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Ok(()) => Ok(true),
            Err(Errno::ESRCH) => Ok(false),
            Err(error) => Err(error).with_context(|| format!("cannot send {signal} to process {}", self.pid)),
        }
    }

    /// Returns the CPU time used, user and system.
    pub(crate) fn cpu_time(self) -> Result<Duration> {
        let stat = Stat::read(self.pid).with_context(|| format!("process {} has exited", self.pid))?;
        Ok(Duration::from_millis(stat.ticks * 1000 / TICKS_PER_SECOND))
    }

    /// Returns the resident memory in KiB.
    pub(crate) fn rss_kib(self) -> Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid))
            .with_context(|| format!("process {} has exited", self.pid))?;
        text.lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .and_then(|rest| rest.split_whitespace().next())
            .and_then(|number| number.parse().ok())
            .with_context(|| format!("no VmRSS in /proc/{}/status", self.pid))
    }
}

/// Returns the CPU time that a process has used, user and system.
pub fn cpu_time(pid: u32) -> Result<Duration> {
    ProcId::of(pid.cast_signed()).with_context(|| format!("process {pid} has exited"))?.cpu_time()
}

struct Stat {
    state: char,
    ticks: u64,
    start: u64,
}

impl Stat {
    fn read(pid: i32) -> Option<Self> {
        Stat::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// Parses `/proc/PID/stat`. The second field is the name in parentheses and may contain anything, so
    /// fields are counted from its end.
    fn parse(text: &str) -> Option<Self> {
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        Some(Stat {
            state: fields.first()?.chars().next()?,
            ticks: number(14)? + number(15)?,
            start: number(22)?,
        })
    }

    fn is_alive(&self) -> bool {
        !matches!(self.state, 'Z' | 'X')
    }
}

/// Kills all processes in these namespaces and waits until they have exited.
pub(crate) fn kill_all_in(namespaces: &[String]) -> Result<()> {
    let inodes: Vec<(u64, u64)> =
        namespaces.iter().filter_map(|name| namespace_id(&crate::netns::path_of(name))).collect();
    if inodes.is_empty() {
        return Ok(());
    }
    wait_until(KILL_TIMEOUT, "the processes in the lab's namespaces to exit", || -> Result<bool> {
        let found = processes_in(&inodes)?;
        for process in &found {
            process.signal(Signal::SIGKILL)?;
        }
        Ok(found.is_empty())
    })
}

fn processes_in(namespaces: &[(u64, u64)]) -> Result<Vec<ProcId>> {
    let own = process::id().cast_signed();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("cannot list /proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let inside = namespace_id(Path::new(&format!("/proc/{pid}/ns/net")))
            .is_some_and(|id| namespaces.contains(&id));
        if inside && pid != own {
            found.extend(ProcId::of(pid));
        }
    }
    Ok(found)
}

fn namespace_id(path: &Path) -> Option<(u64, u64)> {
    let metadata = fs::metadata(path).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_names_with_parentheses_are_parsed() {
        let text = "42 (a) b) S 1 42 42 0 -1 4194560 100 0 0 0 7 5 0 0 20 0 1 0 999 1000 10 0";
        let stat = Stat::parse(text).unwrap();
        assert_eq!((stat.state, stat.ticks, stat.start), ('S', 12, 999));
    }

    #[test]
    fn own_process_is_alive() {
        let own = ProcId::own().unwrap();
        assert!(own.is_alive() && own.rss_kib().unwrap() > 0);
        assert!(!ProcId { start: own.start + 1, ..own }.is_alive());
    }
}
