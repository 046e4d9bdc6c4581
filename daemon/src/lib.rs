//! ovld: builds overlay networks on this host and shares them with its peers by gossip.
//!
//! [`main`] is the program. [`Daemon`] is one daemon in an [`Environment`], for tests that run many in one
//! process.

#![warn(missing_docs)]

mod addresses;
mod admitted;
mod advertised;
mod asked;
mod capture;
mod clashes;
mod clocks;
mod config;
mod control;
mod detours;
mod doctor;
mod encryption;
mod endpoints;
mod engines;
mod environment;
mod events;
mod exchange;
mod failed;
mod firewall;
mod flows;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod health;
mod keys;
mod kubernetes;
mod limits;
mod links;
mod log;
mod maps;
mod metrics;
mod modes;
mod multicast;
mod names;
mod netcheck;
mod networks;
mod newer;
mod node;
mod objects;
mod page;
mod paths;
mod peers;
mod phase;
mod picture;
mod policy;
mod ports;
mod problems;
mod progress;
mod publish;
mod reach;
mod sandboxes;
mod saving;
mod slots;
mod store;
mod tcp_paths;
mod trace;
mod web;
mod workloads;
#[cfg(test)]
#[path = "../cluster/tests/world/mod.rs"]
mod world;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{CommandFactory as _, Parser as _};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::config::{Args, NoAddress};

pub use crate::config::Config;
pub use crate::environment::{Disk, Environment, Host};
pub use crate::node::{Daemon, Inspection};

/// Exit status `EX_CONFIG` of sysexits.h. A restart would not help, so the systemd unit does not restart
/// ovld.
const EX_CONFIG: u8 = 78;
/// How long to wait for another process to release the lock.
const LOCK_WITHIN: Duration = Duration::from_secs(1);

/// Runs the program `ovld`.
pub fn main() -> ExitCode {
    let args = Args::parse();
    let result = if args.man { print_manual() } else { start(args) };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ovld: {error:#}");
            let in_vain = error.is::<node::StoodAside>()
                || error.is::<Misconfigured>()
                || error.is::<ovl_files::Damaged>();
            if in_vain { ExitCode::from(EX_CONFIG) } else { ExitCode::FAILURE }
        }
    }
}

/// The configuration is invalid, so a restart would fail in the same way.
#[derive(Debug, thiserror::Error)]
#[error("wrong configuration")]
struct Misconfigured;

fn print_manual() -> Result<()> {
    clap_mangen::Man::new(Args::command()).section("8").render(&mut std::io::stdout())?;
    Ok(())
}

fn start(args: Args) -> Result<()> {
    let config = Config::load(args).map_err(|error| match error.is::<NoAddress>() {
        true => error,
        false => error.context(Misconfigured),
    })?;
    log::init(config.log);
    if !nix::unistd::geteuid().is_root() {
        bail!("ovld makes network devices, which only root may: start it by systemd, or with sudo");
    }
    // The memory contains keys: no core dump, and no access for processes without CAP_SYS_PTRACE.
    nix::sys::prctl::set_dumpable(false).context("disabling core dumps")?;
    for dir in [&config.state_dir, &config.run_dir] {
        private_dir(dir)?;
    }
    let _locks = [
        lock(&config.run_dir, "run directory", "--run-dir")?,
        lock(&config.state_dir, "state directory", "--state-dir")?,
    ];
    // All state is on one thread. The kernel worker and the state file's writer have threads of their own.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the event loop")?;
    tokio::task::LocalSet::new().block_on(&runtime, node::run(config, Rc::new(Host::default())))
}

/// Creates a directory that only its owner may access, or takes away the access of other users from one that exists.
///
/// # Errors
///
/// The directory cannot be created, or belongs to another user.
fn private_dir(dir: &Path) -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("making {}", dir.display()))?;
    let mode = std::fs::metadata(dir).with_context(|| format!("reading the mode of {}", dir.display()))?;
    if mode.permissions().mode() & 0o777 != 0o700 {
        // Not only if others have access: a strict umask would leave the daemon without its own.
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
            .with_context(|| format!("protecting {}", dir.display()))?;
    }
    Ok(())
}

/// Locks a directory, so that only one daemon uses it. The lock is held until the process ends, however it
/// ends.
///
/// # Errors
///
/// Another process holds the lock for longer than [`LOCK_WITHIN`].
fn lock(dir: &Path, what: &str, flag: &str) -> Result<Flock<File>> {
    let path = dir.join("lock");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))?;
    let start = Instant::now();
    loop {
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            // A process that was killed a moment ago may still hold the lock.
            Err((same, Errno::EWOULDBLOCK)) if start.elapsed() < LOCK_WITHIN => file = same,
            Err((_, Errno::EWOULDBLOCK)) => bail!(
                "another ovld is running with the {what} {}: stop it, or give this one its own with {flag}",
                dir.display()
            ),
            Err((_, error)) => return Err(error).with_context(|| format!("locking {}", path.display())),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
