//! All labs of this machine: their names and directories, and the sweep of those left behind.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;

use crate::config::LabConfig;
use crate::state::{LabState, Shared};
use crate::switch::{namespaces_of, remove_namespaces};

const ROOT: &str = "/run/netns-lab";
const LOCK: &str = ".lock";
const DISCARDED: &str = ".gone-";
const LONGEST_NAME: usize = 12;

/// A lab that a sweep has removed, or could not.
#[derive(Clone, Debug)]
pub struct Swept {
    /// The lab's name.
    pub name: String,
    /// Why it still stands.
    pub failure: Option<String>,
}

pub(crate) fn dir_of(name: &str) -> PathBuf {
    Path::new(ROOT).join(name)
}

/// The labs that have a directory, sorted.
pub fn lab_names() -> Result<Vec<String>> {
    if !Path::new(ROOT).exists() {
        return Ok(Vec::new());
    }
    let mut names = Vec::new();
    for entry in fs::read_dir(ROOT).with_context(|| format!("cannot list {ROOT}"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if !name.starts_with('.') {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Removes the labs whose owner has died: its daemons, namespaces and directory.
pub fn sweep() -> Result<Vec<Swept>> {
    let _lock = lock()?;
    sweep_locked()
}

/// Removes a lab that belongs to no living process.
pub fn remove(name: &str) -> Result<()> {
    let _lock = lock()?;
    let dir = dir_of(name);
    if !dir.exists() {
        let others = lab_names()?;
        let others =
            if others.is_empty() { "none is up".to_owned() } else { format!("up: {}", others.join(", ")) };
        bail!("there is no lab {name} ({others})");
    }
    if let Ok(state) = LabState::load(&dir)
        && let Some(owner) = state.owner
        && owner.is_alive()
    {
        bail!("lab {name} belongs to the running process {}: it goes when that ends", owner.pid);
    }
    remove_now(name)
}

/// Takes a name and makes the directory with the state in it, so that whatever is built
/// after this is found again.
pub(crate) fn claim(config: &LabConfig) -> Result<Shared> {
    let _lock = lock()?;
    // What cannot be swept is in nobody's way but its own; `netns-lab sweep` says so.
    sweep_locked()?;
    let name = match &config.name {
        Some(name) => chosen_name(name)?,
        None => made_up_name()?,
    };
    let state = LabState::new(config, name.clone())?;
    let dir = dir_of(&name);
    for host in &state.hosts {
        for part in ["state", "run"] {
            let path = dir.join(&host.name).join(part);
            fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
        }
    }
    state.save(&dir)?;
    Ok(Shared::new(dir, state))
}

/// Removes a lab whoever it belongs to. Goes as far as it can, and gives the first error.
pub(crate) fn remove_now(name: &str) -> Result<()> {
    let dir = dir_of(name);
    if let Ok(state) = LabState::load(&dir) {
        for daemon in state.hosts.iter().filter_map(|host| host.daemon) {
            // It may have left its namespace, so the namespaces' processes are not all. One
            // that we may not kill shows in what follows.
            daemon.signal(Signal::SIGKILL).ok();
        }
    }
    let namespaces = namespaces_of(name).and_then(|names| remove_namespaces(&names));
    namespaces.with_context(|| format!("lab {name} is not removed"))?;
    discard(name, &dir)
}

/// Gives a lab's name back. The directory is the claim on it, so it goes last and at once:
/// half removed, it would look like one whose maker died.
fn discard(name: &str, dir: &Path) -> Result<()> {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    let discarded = Path::new(ROOT).join(format!("{DISCARDED}{name}-{}-{number}", process::id()));
    match fs::rename(dir, &discarded) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(anyhow!(error).context(format!("cannot remove {}", dir.display())))
        }
        _ => {
            // What remains of it is in nobody's way, and the next sweep's.
            fs::remove_dir_all(discarded).ok();
            Ok(())
        }
    }
}

/// Removes what processes that died while they removed a lab left of it.
fn remove_discarded() -> Result<()> {
    for entry in fs::read_dir(ROOT).with_context(|| format!("cannot list {ROOT}"))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(DISCARDED) {
            // Another process may be about it at this moment.
            fs::remove_dir_all(entry.path()).ok();
        }
    }
    Ok(())
}

fn sweep_locked() -> Result<Vec<Swept>> {
    remove_discarded()?;
    let mut swept = Vec::new();
    for name in lab_names()? {
        let dir = dir_of(&name);
        let failure = match LabState::load(&dir) {
            Ok(state) => match state.owner {
                Some(owner) if !owner.is_alive() => remove_now(&name).err(),
                _ => continue,
            },
            // Its maker died before it had built anything.
            Err(_) if !LabState::is_saved_in(&dir) => remove_now(&name).err(),
            Err(error) => Some(error.context(format!("remove it with `netns-lab down --lab {name}`"))),
        };
        swept.push(Swept { name, failure: failure.map(|error| format!("{error:#}")) });
    }
    Ok(swept)
}

fn chosen_name(name: &str) -> Result<String> {
    // No hyphen: it separates the parts of the namespaces' names.
    let proper = name.starts_with(|first: char| first.is_ascii_lowercase())
        && name.chars().all(|each| each.is_ascii_lowercase() || each.is_ascii_digit())
        && name.len() <= LONGEST_NAME;
    ensure!(
        proper,
        "a lab's name is a lower-case letter, then letters and digits, at most {LONGEST_NAME}: not {name:?}"
    );
    ensure!(
        !dir_of(name).exists(),
        "lab {name} is up already: take it down (netns-lab down --lab {name}) or choose another name"
    );
    if let Some(namespace) = namespaces_of(name)?.first() {
        bail!("network namespace {namespace} is there and no lab's: remove it (ip netns del {namespace})");
    }
    Ok(name.to_owned())
}

/// Of the process's number and a counter: `t` and letters and digits.
fn made_up_name() -> Result<String> {
    let stem = format!("t{}", base36(process::id()));
    // Each once per process: the kernel takes its time to forget a namespace.
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    for _ in 0..10_000 {
        let name = format!("{stem}{}", base36(COUNTER.fetch_add(1, Ordering::Relaxed)));
        if !dir_of(&name).exists() && namespaces_of(&name)?.is_empty() {
            return Ok(name);
        }
    }
    bail!("no free name for a lab: too many are up in {ROOT}")
}

fn base36(mut number: u32) -> String {
    let mut digits = Vec::new();
    loop {
        digits.push(char::from_digit(number % 36, 36).unwrap_or('0'));
        number /= 36;
        if number == 0 {
            return digits.iter().rev().collect();
        }
    }
}

/// Held while names are taken or labs removed.
fn lock() -> Result<Flock<File>> {
    fs::create_dir_all(ROOT).with_context(|| format!("cannot create {ROOT} (only root can)"))?;
    let path = Path::new(ROOT).join(LOCK);
    let file = OpenOptions::new().create(true).append(true).open(&path);
    lock_file(file.with_context(|| format!("cannot open {} (only root can)", path.display()))?)
}

/// Locks one lab against other calls of the script. The directory itself: a file made in
/// it could come in the way of its removal.
pub(crate) fn lock_lab(dir: &Path) -> Result<Flock<File>> {
    lock_file(File::open(dir).with_context(|| format!("cannot open {}", dir.display()))?)
}

fn lock_file(file: File) -> Result<Flock<File>> {
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, error)| anyhow!("cannot take a lab's lock: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_base_36() {
        assert_eq!((base36(0), base36(35), base36(36)), ("0".to_owned(), "z".to_owned(), "10".to_owned()));
    }

    #[test]
    fn names_with_hyphens_are_refused() {
        for wrong in ["", "1a", "a-b", "A", "abcdefghijklm"] {
            assert!(chosen_name(wrong).is_err(), "{wrong}");
        }
    }
}
