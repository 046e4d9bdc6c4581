//! The lab: its hosts, their cluster as a whole, and its removal.

use std::env;
use std::fs::{self, File};
use std::ops::Index;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::Flock;
use serde_json::Value;

use crate::config::LabConfig;
use crate::host::Host;
use crate::netns::Netns;
use crate::preflight;
use crate::registry;
use crate::state::{LabState, Shared};
use crate::switch::switch_namespace;
use crate::wait::wait_until;
use crate::wiring;

/// Number of lines of each log that a failed test prints.
const LOG_LINES: usize = 40;

/// Simulated hosts on one switch. Removed on drop, unless it is persistent.
#[derive(Debug)]
pub struct Lab {
    shared: Arc<Shared>,
    hosts: Vec<Host>,
    remove_on_drop: bool,
    /// The lock of a lab that was opened by name.
    _lock: Option<Flock<File>>,
}

impl Lab {
    /// Removes labs of dead processes, then builds a lab. No daemon is started.
    pub fn new(config: LabConfig) -> Result<Self> {
        if let Err(failures) = preflight::once() {
            bail!("this machine cannot hold a lab:\n  {}", failures.join("\n  "));
        }
        let shared = Arc::new(registry::claim(&config)?);
        // Created before the network, so that its drop cleans up after a failure.
        let mut lab = Lab::with_hosts(shared, None);
        lab.remove_on_drop = true;
        make_room_for_neighbours(lab.hosts.len())?;
        wiring::build(&lab.shared.state()).with_context(|| format!("cannot build lab {}", lab.name()))?;
        lab.remove_on_drop = !config.persistent;
        Ok(lab)
    }

    /// Opens an existing lab, which is not removed on drop. Other callers that open it wait until this is
    /// dropped.
    pub fn open(name: &str) -> Result<Self> {
        let dir = registry::dir_of(name);
        ensure!(dir.exists(), "no lab {name}: create it with `netns-lab up 3 --lab {name}`");
        let lock = registry::lock_lab(&dir)?;
        let state = LabState::load(&dir)?;
        Ok(Lab::with_hosts(Arc::new(Shared::new(dir, state)), Some(lock)))
    }

    fn with_hosts(shared: Arc<Shared>, lock: Option<Flock<File>>) -> Self {
        let count = shared.state().hosts.len();
        let hosts = (0..count).map(|index| Host::new(Arc::clone(&shared), index)).collect();
        Lab { shared, hosts, remove_on_drop: false, _lock: lock }
    }

    /// Returns the lab's name.
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// Returns the directory of the lab's files.
    pub fn dir(&self) -> &Path {
        &self.shared.dir
    }

    /// Returns the process that the lab belongs to. `None` if it is not alive.
    pub fn owner_pid(&self) -> Option<i32> {
        self.shared.state().owner.filter(|owner| owner.is_alive()).map(|owner| owner.pid)
    }

    /// Returns all hosts, `h1` first.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Returns a host by its name. `lab["h1"]` does the same, and panics if there is none.
    pub fn host(&self, name: &str) -> Result<&Host> {
        self.hosts.iter().find(|host| host.name() == name).with_context(|| {
            let last = self.hosts.last().map_or("none", Host::name);
            format!("no host {name} in lab {}: its hosts are h1 to {last}", self.name())
        })
    }

    /// Returns the switch's namespace, for inspection.
    pub fn switch(&self) -> Netns {
        Netns::new(switch_namespace(self.name()))
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Starts all daemons that are not running, waits until they are ready and see each other alive, and
    /// returns the time that it took.
    ///
    /// # Errors
    ///
    /// If a daemon exits meanwhile.
    pub fn start_all(&self) -> Result<Duration> {
        let start = Instant::now();
        let timeout = self.shared.state().ready_timeout;
        // Determined now: a daemon that exits later must be noticed.
        let hosts: Vec<&Host> = self.hosts.iter().filter(|host| host.is_present()).collect();
        for host in &hosts {
            if !host.is_running() {
                host.start()?;
            }
        }
        for host in &hosts {
            host.wait_ready(timeout.saturating_sub(start.elapsed()))?;
        }
        wait_alive(&hosts, timeout.saturating_sub(start.elapsed()))?;
        Ok(start.elapsed())
    }

    /// Waits until every running daemon lists all other running daemons as alive.
    pub fn wait_all_alive(&self, timeout: Duration) -> Result<()> {
        let running: Vec<&Host> = self.hosts.iter().filter(|host| host.is_running()).collect();
        wait_alive(&running, timeout)
    }

    /// Removes the lab now, and returns the error if that fails.
    pub fn remove(mut self) -> Result<()> {
        self.remove_on_drop = false;
        self.tear_down()
    }

    fn tear_down(&self) -> Result<()> {
        let killed: Result<()> = self.hosts.iter().map(Host::kill_if_running).fold(Ok(()), Result::and);
        registry::remove_now(self.name()).and(killed)
    }

    /// Keeps the lab, so that sweeps do not remove it.
    fn keep(&self) {
        let kept = self.shared.update(|state| {
            state.owner = None;
            Ok(())
        });
        let name = self.name();
        eprintln!(
            "netns-lab: lab {name} is kept in {}: netns-lab status --lab {name}, down --lab {name}",
            self.dir().display()
        );
        if let Err(error) = kept {
            eprintln!("netns-lab: the next sweep will remove it: {error:#}");
        }
    }

    fn print_logs(&self) {
        for host in &self.hosts {
            if host.log_path().exists() {
                eprintln!("--- {} {}", self.name(), host.log_tail(LOG_LINES));
            }
        }
    }
}

/// Waits until each host lists all other hosts as alive.
fn wait_alive(hosts: &[&Host], timeout: Duration) -> Result<()> {
    let start = Instant::now();
    for host in hosts {
        let what = format!("{} to see all other hosts alive", host.name());
        let left = timeout.saturating_sub(start.elapsed());
        wait_until(left, &what, || sees_alive(host, hosts)).map_err(|error| host.with_log(&error))?;
    }
    Ok(())
}

fn sees_alive(host: &Host, all: &[&Host]) -> Result<()> {
    let peers = host.ctl_json(&["peers"])?;
    let alive: Vec<&str> = peers
        .as_array()
        .into_iter()
        .flatten()
        .filter(|peer| peer["state"] == "alive")
        .filter_map(|peer| peer["name"].as_str())
        .collect();
    let others = all.iter().map(|other| other.name()).filter(|&name| name != host.name());
    let missing: Vec<&str> = others.filter(|name| !alive.contains(name)).collect();
    ensure!(missing.is_empty(), "not alive: {}; it lists {}", missing.join(", "), brief(&peers));
    Ok(())
}

/// Formats the peers that a host lists: `h2 alive, h3 dead`.
fn brief(peers: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
    let list: Vec<String> = peers
        .as_array()
        .into_iter()
        .flatten()
        .map(|peer| format!("{} {}", text(&peer["name"]), text(&peer["state"])))
        .collect();
    if list.is_empty() { "none".to_owned() } else { list.join(", ") }
}

impl Index<&str> for Lab {
    type Output = Host;

    #[expect(clippy::panic, reason = "an index that is out of range panics; `host` does not")]
    fn index(&self, name: &str) -> &Host {
        match self.host(name) {
            Ok(host) => host,
            Err(error) => panic!("{error:#}"),
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.remove_on_drop {
            return;
        }
        let failed = thread::panicking();
        if failed {
            self.print_logs();
        }
        let asked = |variable| env::var_os(variable).is_some_and(|value| value == "1");
        if asked("NETNS_LAB_KEEP") || (failed && asked("NETNS_LAB_KEEP_FAILED")) {
            self.keep();
        } else if let Err(error) = self.tear_down() {
            eprintln!("netns-lab: {error:#}");
        }
    }
}

/// Raises the limits of the kernel's neighbour tables if a lab of this many hosts needs more: all namespaces of a machine
/// share them, and each host has an entry for each other one. A full table loses packets to hosts that it lacks.
/// The limits stay raised, because other labs may need them.
fn make_room_for_neighbours(hosts: usize) -> Result<()> {
    let needed = hosts.saturating_mul(hosts).saturating_mul(2);
    for family in ["ipv4", "ipv6"] {
        let path = |number: u8| format!("/proc/sys/net/{family}/neigh/default/gc_thresh{number}");
        // Absent without IPv6.
        let Ok(text) = fs::read_to_string(path(3)) else { continue };
        if text.trim().parse::<usize>().is_ok_and(|most| most >= needed) {
            continue;
        }
        // The highest first: each must not be above the next one.
        for (number, limit) in [(3, needed), (2, needed / 2), (1, needed / 4)] {
            fs::write(path(number), limit.to_string())
                .with_context(|| format!("cannot write {}", path(number)))?;
        }
    }
    Ok(())
}
