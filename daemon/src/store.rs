//! The state file: what must outlive a reboot. It is replaced as a whole: written to a temporary file, synced
//! and renamed.
//!
//! The file is `ovl state 3`, the SHA-256 of the rest, and the encoded [`State`]. A file that is truncated or
//! changed is an error that names it: to continue with an empty state would break promises that other hosts
//! rely on.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ovl_consensus as alloc;
use ovl_files::{Damaged, Durability, sha256};
use ovl_proto::clock::Clock;
use ovl_proto::id::{NetworkId, NodeId};
use ovl_proto::object::{Network, SignedObject};
use ovl_proto::record::SignedRecord;
use ovl_proto::wire::fields::Unknown;
use ovl_proto::wire::{self, WireError};
use ovl_runtimes::docker::EngineNetwork;
use tokio::sync::mpsc;

use crate::environment::Disk;

const MAGIC: &[u8] = b"ovl state 3\n";
/// How the state file of every release begins.
const ANY_MAGIC: &[u8] = b"ovl state ";

/// What must outlive a reboot.
///
/// A release that does not know a field of it writes it again as it was.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Time of the save, in milliseconds since 1970.
    pub saved_ms: u64,
    /// Generation of the last run. That of the next run is higher.
    pub generation: u64,
    /// Hybrid logical clock of the cluster objects.
    pub clock: Clock,
    /// All cluster objects.
    pub objects: Vec<SignedObject>,
    /// Every known host, with the time in milliseconds since 1970 when it was last alive.
    pub peers: Vec<(SignedRecord, u64)>,
    /// Addresses lent to other hosts.
    pub leases: Vec<(NetworkId, std::net::IpAddr, NodeId)>,
    /// State of the consensus replica: the promise, the accepted map, and the learned map with its proofs.
    pub alloc: Option<alloc::Durable>,
    /// Bridge networks of this host.
    pub bridges: Vec<Network>,
    /// Networks of Docker Engines, with the id of the Engine.
    pub docker: Vec<(String, EngineNetwork)>,
    /// Fields that this release does not know.
    pub unknown: Unknown,
}

ovl_proto::fields! {
    State {
        1 saved_ms, 2 generation, 3 clock, 4 objects optional, 5 peers optional, 6 leases optional, 7 alloc optional,
        8 bridges optional, 9 docker optional, ..unknown
    }
}

/// Reads the state file. `None` if there is none yet.
///
/// # Errors
///
/// The file cannot be read, or it is damaged.
pub(crate) fn read(path: &Path) -> Result<Option<State>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
    };
    match decode(&bytes) {
        Ok(state) => Ok(Some(state)),
        Err(error) if matches!(error.downcast_ref(), Some(WireError::NotUnderstood(_))) => Err(Damaged(format!(
            "the state file {}: {error}. Start the release of ovld that wrote it, or a later one; the file was left as it is",
            path.display()
        ))
        .into()),
        Err(error) => Err(Damaged(format!(
            "the state file {} is damaged ({error}), and to start without it could hand out addresses twice. \
             Restore it from a backup; or, if this host is to begin anew, run `ovlctl peers forget` for it on \
             another host, then remove {} and start again",
            path.display(),
            path.parent().unwrap_or(path).display()
        ))
        .into()),
    }
}

fn decode(bytes: &[u8]) -> Result<State> {
    let Some(rest) = bytes.strip_prefix(MAGIC) else {
        if bytes.starts_with(ANY_MAGIC) {
            bail!("another release of ovld wrote it, in a format that this one does not read");
        }
        bail!("it does not begin as a state file does")
    };
    let Some((sum, body)) = rest.split_at_checked(32) else { bail!("it is cut short") };
    if sha256(body) != sum {
        bail!("its checksum is wrong");
    }
    Ok(wire::decode_stored(body)?)
}

/// Decodes bytes, and bytes that a whole file could contain. What is accepted is written and read without a change.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let _ = decode(bytes);
    let Ok(state) = decode(&[MAGIC, &sha256(bytes), bytes].concat()) else { return };
    let written = encode(&state);
    let again =
        written.as_ref().ok().and_then(|bytes| decode(bytes).ok()).and_then(|state| encode(&state).ok());
    assert_eq!(written.ok(), again);
}

/// Encodes the state and writes the file. Returns when it is on the disk.
pub(crate) fn write(path: &Path, state: &State, disk: &Disk) -> Result<()> {
    let durability = match disk {
        Disk::Synced => Durability::Synced,
        Disk::Simulated(_) => Durability::Unsynced,
    };
    replace(path, &encode(state)?, durability)
}

fn encode(state: &State) -> Result<Vec<u8>> {
    let body = wire::encode_stored(state)?;
    Ok([MAGIC, &sha256(&body), &body].concat())
}

fn replace(path: &Path, bytes: &[u8], durability: Durability) -> Result<()> {
    ovl_files::replace(path, bytes, durability).with_context(|| format!("writing {}", path.display()))
}

/// A request to the writer: the number of the state and its encoded bytes.
type Job = (u64, Vec<u8>);

/// Writes the state file in the background. Of several states that wait, only the last one is written.
#[derive(Debug)]
pub(crate) enum Writer {
    Thread(std::sync::mpsc::Sender<Job>),
    Task(mpsc::UnboundedSender<Job>),
}

impl Writer {
    /// Starts the writer. For each queued number, that number or a later one is sent on `done` when its state
    /// is on the disk. An error on `done` means that the write failed and is to be repeated.
    pub(crate) fn start(
        path: PathBuf,
        done: mpsc::UnboundedSender<(u64, Result<()>)>,
        disk: Disk,
    ) -> Result<Self> {
        if let Disk::Simulated(latency) = disk {
            let (jobs, mut queue) = mpsc::unbounded_channel::<Job>();
            tokio::task::spawn_local(async move {
                while let Some(mut job) = queue.recv().await {
                    while let Ok(later) = queue.try_recv() {
                        job = later;
                    }
                    tokio::time::sleep(latency()).await;
                    let (number, body) = job;
                    let result = replace(&path, &body, Durability::Unsynced);
                    if done.send((number, result)).is_err() {
                        return;
                    }
                }
            });
            return Ok(Self::Task(jobs));
        }
        let (jobs, queue) = std::sync::mpsc::channel::<Job>();
        std::thread::Builder::new().name("store".to_owned()).spawn(move || {
            while let Ok(mut job) = queue.recv() {
                while let Ok(later) = queue.try_recv() {
                    job = later;
                }
                let (number, body) = job;
                let result = replace(&path, &body, Durability::Synced);
                if done.send((number, result)).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self::Thread(jobs))
    }

    /// Queues a state to be written.
    pub(crate) fn save(&self, number: u64, state: &State) -> Result<()> {
        let job = (number, encode(state)?);
        let sent = match self {
            Self::Thread(jobs) => jobs.send(job).is_ok(),
            Self::Task(jobs) => jobs.send(job).is_ok(),
        };
        if !sent {
            bail!("the thread that writes the state has ended");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_reads_back_and_damage_is_refused() {
        let dir = std::env::temp_dir().join(format!("ovl-store-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("state");
        assert!(read(&path).unwrap().is_none());
        write(&path, &State { generation: 7, ..State::default() }, &Disk::Synced).unwrap();
        assert_eq!(read(&path).unwrap().unwrap().generation, 7);
        let good = fs::read(&path).unwrap();
        for bad in [&good[..good.len() - 1], &good[..20], b"", b"garbage"] {
            fs::write(&path, bad).unwrap();
            let error = read(&path).unwrap_err().to_string();
            assert!(error.contains(path.to_str().unwrap()), "{error}");
        }
        let other = [b"ovl state 1\n", &good[MAGIC.len()..]].concat();
        fs::write(&path, other).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("another release"), "{error}");
        let mut later = State { generation: 7, ..State::default() };
        later.unknown.set(900, false, b"kept");
        write(&path, &later, &Disk::Synced).unwrap();
        let kept = read(&path).unwrap().unwrap();
        assert_eq!((kept.generation, kept.unknown.get(900)), (7, Some(&b"kept"[..])));
        later.unknown.set(901, true, b"");
        write(&path, &later, &Disk::Synced).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("field 901 of State") && !error.contains("damaged"), "{error}");
        let mut flipped = good.clone();
        *flipped.last_mut().unwrap() ^= 1;
        fs::write(&path, flipped).unwrap();
        assert!(read(&path).is_err());
        fs::remove_dir_all(&dir).unwrap();
    }
}
