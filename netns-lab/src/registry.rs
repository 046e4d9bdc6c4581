//! The labs of this machine: their names and directories, and the removal of abandoned ones.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;

use crate::bpf;
use crate::config::LabConfig;
use crate::state::{LabState, Shared};
use crate::switch::{namespaces_of, remove_namespaces};

const ROOT: &str = "/run/netns-lab";
const LOCK: &str = ".lock";
const DISCARDED: &str = ".gone-";
const LONGEST_NAME: usize = 12;

/// A lab that a sweep removed or failed to remove.
#[derive(Clone, Debug)]
pub struct Swept {
    /// The lab's name.
    pub name: String,
    /// Why it could not be removed. `None` if it was removed.
    pub failure: Option<String>,
}

pub(crate) fn dir_of(name: &str) -> PathBuf {
    Path::new(ROOT).join(name)
}

/// Returns the names of the labs that have a directory, sorted.
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

/// Removes the labs whose owner has died, with their daemons, namespaces and directories.
pub fn sweep() -> Result<Vec<Swept>> {
    let _lock = lock()?;
    sweep_locked()
}

/// Removes a lab.
///
/// # Errors
///
/// If the lab belongs to a running process.
pub fn remove(name: &str) -> Result<()> {
    let _lock = lock()?;
    let dir = dir_of(name);
    if !dir.exists() {
        let others = lab_names()?;
        let others =
            if others.is_empty() { "none is up".to_owned() } else { format!("up: {}", others.join(", ")) };
        bail!("no lab {name} ({others})");
    }
    if let Ok(state) = LabState::load(&dir)
        && let Some(owner) = state.owner
        && owner.is_alive()
    {
        bail!("lab {name} belongs to the running process {}: it is removed when that exits", owner.pid);
    }
    remove_now(name)
}

/// Claims a name and creates the directory with the lab's state, so that everything built afterwards can be
/// found and removed.
pub(crate) fn claim(config: &LabConfig) -> Result<Shared> {
    let _lock = lock()?;
    // A lab that cannot be swept does not affect this one; `netns-lab sweep` reports it.
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

/// Removes a lab regardless of its owner. Continues after an error, and returns the first one.
pub(crate) fn remove_now(name: &str) -> Result<()> {
    let dir = dir_of(name);
    if let Ok(state) = LabState::load(&dir) {
        for daemon in state.hosts.iter().filter_map(|host| host.daemon) {
            // A daemon may have left its namespace, so kill it in addition to the processes in the
            // namespaces. If that is not permitted, the following steps fail.
            daemon.signal(Signal::SIGKILL).ok();
        }
    }
    let namespaces = namespaces_of(name).and_then(|names| remove_namespaces(&names));
    namespaces.with_context(|| format!("cannot remove lab {name}"))?;
    let hosts = fs::read_dir(&dir).into_iter().flatten().flatten();
    hosts.for_each(|host| bpf::remove_pins(&host.path().join("run")));
    discard(name, &dir)
}

/// Releases a lab's name. The directory is the claim on the name, so it is removed last and atomically:
/// partly removed, it would look like a lab whose creator died.
fn discard(name: &str, dir: &Path) -> Result<()> {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let number = COUNTER.fetch_add(1, Ordering::Relaxed);
    let discarded = Path::new(ROOT).join(format!("{DISCARDED}{name}-{}-{number}", process::id()));
    match fs::rename(dir, &discarded) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(anyhow!(error).context(format!("cannot remove {}", dir.display())))
        }
        _ => {
            // Remains of it disturb nothing; the next sweep removes them.
            fs::remove_dir_all(discarded).ok();
            Ok(())
        }
    }
}

/// Removes the remains of labs whose removal was interrupted.
fn remove_discarded() -> Result<()> {
    for entry in fs::read_dir(ROOT).with_context(|| format!("cannot list {ROOT}"))? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(DISCARDED) {
            // Another process may be removing it at the same time.
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
            // Its creator died before it had built anything.
            Err(_) if !LabState::is_saved_in(&dir) => remove_now(&name).err(),
            Err(error) => Some(error.context(format!("remove it with `netns-lab down --lab {name}`"))),
        };
        swept.push(Swept { name, failure: failure.map(|error| format!("{error:#}")) });
    }
    Ok(swept)
}

fn chosen_name(name: &str) -> Result<String> {
    // No hyphen: it separates the parts of namespace names.
    let proper = name.starts_with(|first: char| first.is_ascii_lowercase())
        && name.chars().all(|each| each.is_ascii_lowercase() || each.is_ascii_digit())
        && name.len() <= LONGEST_NAME;
    ensure!(
        proper,
        "invalid lab name {name:?}: a lower-case letter, then letters and digits, at most {LONGEST_NAME}"
    );
    ensure!(
        !dir_of(name).exists(),
        "lab {name} exists already: remove it (netns-lab down --lab {name}) or choose another name"
    );
    if let Some(namespace) = namespaces_of(name)?.first() {
        bail!(
            "network namespace {namespace} exists and belongs to no lab: remove it (ip netns del {namespace})"
        );
    }
    Ok(name.to_owned())
}

/// Generates a name from the process id and a counter: `t`, then letters and digits.
fn made_up_name() -> Result<String> {
    let stem = format!("t{}", base36(process::id()));
    // Each name is used once per process, because the kernel deletes a namespace with a delay.
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    for _ in 0..10_000 {
        let name = format!("{stem}{}", base36(COUNTER.fetch_add(1, Ordering::Relaxed)));
        if !dir_of(&name).exists() && namespaces_of(&name)?.is_empty() {
            return Ok(name);
        }
    }
    bail!("no free name for a lab: too many labs in {ROOT}")
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

/// Takes the lock that is held while names are claimed or labs are removed.
fn lock() -> Result<Flock<File>> {
    fs::create_dir_all(ROOT).with_context(|| format!("cannot create {ROOT} (only root can)"))?;
    let path = Path::new(ROOT).join(LOCK);
    let file = OpenOptions::new().create(true).append(true).open(&path);
    lock_file(file.with_context(|| format!("cannot open {} (only root can)", path.display()))?)
}

/// Locks one lab against other `netns-lab` processes. Locks the directory itself, because a lock file in it
/// could obstruct its removal.
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
    fn numbers_are_encoded_in_base_36() {
        assert_eq!((base36(0), base36(35), base36(36)), ("0".to_owned(), "z".to_owned(), "10".to_owned()));
    }

    #[test]
    fn invalid_lab_names_are_rejected() {
        for wrong in ["", "1a", "a-b", "A", "abcdefghijklm"] {
            assert!(chosen_name(wrong).is_err(), "{wrong}");
        }
    }
}
