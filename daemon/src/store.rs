//! The state file: what must outlive a reboot, and the journal of its changes.
//!
//! The file is `ovl state 3`, the SHA-256 of the rest, and the encoded [`State`]. It is replaced as a whole: written to a
//! temporary file, synced and renamed. A file that is truncated or changed is an error that names it: to continue with
//! an empty state would break promises that other hosts rely on.
//!
//! While ovld runs, changes are appended to a [`journal`] and synced, so that a write costs what it changes. When the
//! journal is longer than the state file, the state is written whole again, with a new journal: first the empty journal,
//! whose name has the checksum of the state, then the state file, and then the old journal is deleted. So a crash leaves
//! a state file with its journal at each moment. [`State::journal`] says that there is one, in a marked field: a release
//! that would ignore the journal refuses the file. When ovld stops, the state is written whole and without a journal.

mod difference;
mod journal;

use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
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

use self::journal::{Journal, Sum};
use crate::environment::Disk;

const MAGIC: &[u8] = b"ovl state 3\n";
/// How the state file of every release begins.
const ANY_MAGIC: &[u8] = b"ovl state ";
/// How the name of each journal ends.
const JOURNAL_END: &str = ".journal";

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
    /// Whether the journal that has the checksum of this state in its name has later changes.
    pub journal: bool,
    /// Whether others could not dial this host.
    pub behind_nat: bool,
    /// Fields that this release does not know.
    pub unknown: Unknown,
}

ovl_proto::fields! {
    State {
        1 saved_ms, 2 generation, 3 clock, 4 objects optional, 5 peers optional, 6 leases optional, 7 alloc optional,
        8 bridges optional, 9 docker optional, 10 journal marked, 11 behind_nat optional, ..unknown
    }
}

/// Reads the state file, and its journal if there is one. `None` if there is no state file yet.
///
/// # Errors
///
/// A file cannot be read, or it is damaged, or the journal is missing.
pub(crate) fn read(path: &Path) -> Result<Option<State>> {
    let Some(bytes) = read_if_present(path)? else { return Ok(None) };
    let (sum, body) = open(&bytes).map_err(|error| refused(path, "state file", path, &error))?;
    let state: State =
        wire::decode_stored(body).map_err(|error| refused(path, "state file", path, &error.into()))?;
    if !state.journal {
        return Ok(Some(state));
    }
    let beside = journal_path(path, &sum);
    let refused = |error: anyhow::Error| refused(&beside, "journal of the state file", path, &error);
    let journal = read_if_present(&beside)?.ok_or_else(|| refused(anyhow!("it is missing")))?;
    let body = journal::replay(body.to_vec(), &sum, &journal).map_err(|error| match error {
        journal::JournalError::Content(error) => refused(error.into()),
        error => refused(error.into()),
    })?;
    wire::decode_stored(&body).map(Some).map_err(|error| refused(error.into()))
}

fn read_if_present(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
    }
}

/// The error about a file that cannot be used. `state` is the path of the state file.
fn refused(path: &Path, what: &str, state: &Path, error: &anyhow::Error) -> anyhow::Error {
    let path = path.display();
    let text = match error.downcast_ref() {
        Some(WireError::NotUnderstood(_)) => format!(
            "the {what} {path}: {error}. Start the release of ovld that wrote it, or a later one; the file was left as it is"
        ),
        _ => format!(
            "the {what} {path} is damaged ({error}), and to start without it could hand out addresses twice. \
             Restore the state directory from a backup; or, if this host is to begin anew, run `ovlctl peers forget` for it on \
             another host, then remove {} and start again",
            state.parent().unwrap_or(state).display()
        ),
    };
    Damaged(text).into()
}

/// Splits a state file into the checksum and the encoded state.
fn open(bytes: &[u8]) -> Result<(Sum, &[u8])> {
    let Some(rest) = bytes.strip_prefix(MAGIC) else {
        if bytes.starts_with(ANY_MAGIC) {
            bail!("another release of ovld wrote it, in a format that this one does not read");
        }
        bail!("it does not begin as a state file does")
    };
    let Some((sum, body)) = rest.split_first_chunk() else { bail!("it is cut short") };
    if sha256(body) != *sum {
        bail!("its checksum is wrong");
    }
    Ok((*sum, body))
}

/// The path of the journal of a state with this checksum.
fn journal_path(path: &Path, sum: &Sum) -> PathBuf {
    let number = u64::from_be_bytes(sum.first_chunk().copied().unwrap_or_default());
    path.with_file_name(format!("{}{number:016x}{JOURNAL_END}", journal_start(path)))
}

/// How the name of each journal begins.
fn journal_start(path: &Path) -> String {
    format!("{}-", path.file_name().unwrap_or_default().display())
}

/// Decodes bytes, and bytes that a whole file could contain. What is accepted is written and read without a change.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    let _ = open(bytes);
    journal::fuzz(bytes);
    let Ok(state) = wire::decode_stored::<State>(bytes) else { return };
    let written = wire::encode_stored(&state);
    let again = written
        .as_ref()
        .ok()
        .and_then(|bytes| wire::decode_stored::<State>(bytes).ok())
        .and_then(|state| wire::encode_stored(&state).ok());
    assert_eq!(written.ok(), again);
}

/// Writes the state whole, without a journal. Returns when it is on the disk.
pub(crate) fn write(path: &Path, state: &State, disk: &Disk) -> Result<()> {
    let durability = match disk {
        Disk::Synced => Durability::Synced,
        Disk::Simulated(_) => Durability::Unsynced,
    };
    replace(path, &wire::encode_stored(state)?, durability)
}

/// Replaces the state file.
fn replace(path: &Path, body: &[u8], durability: Durability) -> Result<()> {
    let bytes = [MAGIC, &sha256(body), body].concat();
    ovl_files::replace(path, &bytes, durability).with_context(|| format!("writing {}", path.display()))
}

/// The state file and its journal, as this daemon writes them.
#[derive(Debug)]
struct Files {
    path: PathBuf,
    durability: Durability,
    /// What is on the disk. `None` until the first write, and after one that failed.
    journal: Option<Journal>,
}

impl Files {
    /// Writes a state. Returns when it is on the disk.
    fn save(&mut self, job: Job) -> Result<()> {
        let Job { state, whole, .. } = job;
        if whole {
            self.journal = None;
            replace(&self.path, &state, self.durability)?;
            self.remove_journals(None);
            return Ok(());
        }
        if let Some(mut journal) = self.journal.take()
            && let Some(record) = journal.record(&state)?
        {
            match self.append(&journal, &record) {
                Ok(()) => {
                    journal.appended(&record, state);
                    self.journal = Some(journal);
                    return Ok(());
                }
                // What is in the journal now is not known, so it gets no further record.
                Err(error) => {
                    tracing::warn!(%error, "cannot append to the journal: the state is written whole")
                }
            }
        }
        // Those of writes that failed: without that, there would be one for each try.
        if let Some(current) = self.current_journal() {
            self.remove_journals(Some(&current));
        }
        let journal = Journal::new(state);
        let beside = journal_path(&self.path, journal.sum());
        ovl_files::replace(&beside, &journal::begin(journal.sum()), self.durability).with_context(|| {
            format!("writing {}, the journal of {}", beside.display(), self.path.display())
        })?;
        replace(&self.path, journal.state(), self.durability)?;
        self.remove_journals(Some(&beside));
        self.journal = Some(journal);
        Ok(())
    }

    fn append(&self, journal: &Journal, record: &[u8]) -> io::Result<()> {
        // Opened each time, so that a file that was deleted or replaced is noticed.
        let path = journal_path(&self.path, journal.sum());
        let mut file = OpenOptions::new().write(true).open(&path)?;
        let end = file.seek(SeekFrom::End(0))?;
        if u64::try_from(journal.length()).ok() != Some(end) || self.current_journal() != Some(path) {
            return Err(io::Error::other("another program has changed the file, or the state file"));
        }
        file.write_all(record)?;
        match self.durability {
            Durability::Synced => file.sync_data(),
            Durability::Unsynced => Ok(()),
        }
    }

    /// Returns the path that the journal of the state file on the disk has. `None` if that cannot be read.
    fn current_journal(&self) -> Option<PathBuf> {
        let mut head = [0; MAGIC.len() + 32];
        fs::File::open(&self.path).ok()?.read_exact(&mut head).ok()?;
        Some(journal_path(&self.path, head.last_chunk()?))
    }

    /// Deletes all journals but one, and what was to become one. They are of earlier state files.
    fn remove_journals(&self, but: Option<&Path>) {
        let start = journal_start(&self.path);
        let is_old = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            Some(path.as_path()) != but
                && name
                    .strip_prefix(&start)
                    .is_some_and(|name| name.ends_with(JOURNAL_END) || name.ends_with(".new"))
        };
        let found = ovl_files::sorted(self.path.parent().unwrap_or(&self.path)).unwrap_or_default();
        for path in found.into_iter().filter(is_old) {
            if let Err(error) = ovl_files::remove_if_present(&path) {
                tracing::warn!(%error, path = %path.display(), "cannot delete an old journal of the state file");
            }
        }
    }
}

/// A request to the writer.
#[derive(Debug)]
pub(crate) struct Job {
    /// The number of the state.
    number: u64,
    /// The encoded state.
    state: Vec<u8>,
    /// Whether to write it whole, without a journal.
    whole: bool,
}

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
        let files = |durability| Files { path, durability, journal: None };
        if let Disk::Simulated(latency) = disk {
            let mut files = files(Durability::Unsynced);
            let (jobs, mut queue) = mpsc::unbounded_channel::<Job>();
            tokio::task::spawn_local(async move {
                while let Some(mut job) = queue.recv().await {
                    while let Ok(later) = queue.try_recv() {
                        job = later;
                    }
                    tokio::time::sleep(latency()).await;
                    if done.send((job.number, files.save(job))).is_err() {
                        return;
                    }
                }
            });
            return Ok(Self::Task(jobs));
        }
        let mut files = files(Durability::Synced);
        let (jobs, queue) = std::sync::mpsc::channel::<Job>();
        std::thread::Builder::new().name("store".to_owned()).spawn(move || {
            while let Ok(mut job) = queue.recv() {
                while let Ok(later) = queue.try_recv() {
                    job = later;
                }
                if done.send((job.number, files.save(job))).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self::Thread(jobs))
    }

    /// Queues a state to be written: whole and without a journal, or as it is cheapest.
    pub(crate) fn save(&self, number: u64, mut state: State, whole: bool) -> Result<()> {
        state.journal = !whole;
        let job = Job { number, state: wire::encode_stored(&state)?, whole };
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

    /// A directory that is deleted after the test, and the files in it as a daemon writes them.
    struct Disk {
        dir: PathBuf,
        files: Files,
    }

    impl Disk {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("ovl-store-{name}-{}", std::process::id()));
            fs::create_dir_all(&dir).unwrap();
            let files = Files { path: dir.join("state"), durability: Durability::Unsynced, journal: None };
            Self { dir, files }
        }

        fn save(&mut self, state: &State, whole: bool) -> Result<()> {
            let state = wire::encode_stored(&State { journal: !whole, ..copy(state) }).unwrap();
            self.files.save(Job { number: 0, state, whole })
        }

        fn read(&self) -> Result<Option<State>> {
            read(&self.files.path)
        }

        fn generation(&self) -> u64 {
            self.read().unwrap().unwrap().generation
        }

        fn names(&self) -> Vec<String> {
            let paths = ovl_files::sorted(&self.dir).unwrap();
            paths.iter().map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect()
        }

        /// The only journal.
        fn journal(&self) -> PathBuf {
            let mut paths = ovl_files::sorted(&self.dir).unwrap();
            paths.retain(|path| path.extension().is_some_and(|extension| extension == "journal"));
            assert_eq!(paths.len(), 1);
            paths.remove(0)
        }
    }

    impl Drop for Disk {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.dir).unwrap();
        }
    }

    fn copy(state: &State) -> State {
        wire::decode_stored(&wire::encode_stored(state).unwrap()).unwrap()
    }

    fn of(generation: u64) -> State {
        State { generation, ..State::default() }
    }

    #[test]
    fn changes_are_appended_and_the_state_is_whole_at_the_end() {
        let mut disk = Disk::new("append");
        disk.save(&of(1), false).unwrap();
        let whole = fs::read(disk.dir.join("state")).unwrap();
        for generation in 2..20 {
            disk.save(&of(generation), false).unwrap();
            assert_eq!(disk.generation(), generation);
        }
        assert_eq!(fs::read(disk.dir.join("state")).unwrap(), whole, "only the journal has grown");
        assert_eq!(disk.names().len(), 2);
        disk.save(&of(20), true).unwrap();
        assert_eq!((disk.generation(), disk.names()), (20, vec!["state".to_owned()]));
        assert!(!disk.read().unwrap().unwrap().journal);
        disk.save(&of(21), false).unwrap();
        assert_eq!((disk.generation(), disk.names().len()), (21, 2));
    }

    #[test]
    fn state_is_there_after_a_crash_at_each_step_of_a_new_journal() {
        let mut disk = Disk::new("steps");
        disk.save(&of(1), false).unwrap();
        disk.save(&of(2), false).unwrap();
        let state = disk.dir.join("state");
        let (old_state, old_journal) =
            (fs::read(&state).unwrap(), (disk.journal(), fs::read(disk.journal()).unwrap()));
        disk.files.journal = None;
        disk.save(&of(3), false).unwrap();
        let (new_state, new_journal) = (fs::read(&state).unwrap(), disk.journal());
        // The old journal is deleted last.
        fs::write(&old_journal.0, &old_journal.1).unwrap();
        assert_eq!(disk.generation(), 3);
        // Before the state file is replaced, the new journal is there already.
        fs::write(&state, &old_state).unwrap();
        assert_eq!(disk.generation(), 2);
        fs::write(new_journal.with_extension("new"), b"half").unwrap();
        fs::remove_file(&new_journal).unwrap();
        assert_eq!(disk.generation(), 2);
        // What a crash left is deleted with the next state file.
        disk.files.journal = None;
        disk.save(&of(4), false).unwrap();
        assert_eq!((disk.generation(), disk.names().len()), (4, 2));
        assert_ne!(fs::read(&state).unwrap(), new_state);
    }

    #[test]
    fn journal_that_cannot_be_continued_is_replaced() {
        let mut disk = Disk::new("replaced");
        disk.save(&of(1), false).unwrap();
        fs::remove_file(disk.journal()).unwrap();
        disk.save(&of(2), false).unwrap();
        assert_eq!((disk.generation(), disk.names().len()), (2, 2));
        let first = disk.journal();
        let mut longer = fs::read(&first).unwrap();
        longer.extend(b"half of a record");
        fs::write(&first, longer).unwrap();
        disk.save(&of(3), false).unwrap();
        assert_eq!((disk.generation(), disk.names().len()), (3, 2));
        assert_ne!(disk.journal(), first);
        fs::remove_file(disk.dir.join("state")).unwrap();
        disk.save(&of(3), false).unwrap();
        assert_eq!((disk.generation(), disk.names().len()), (3, 2));
        // Nothing is told to be on the disk that is not.
        fs::remove_file(disk.journal()).unwrap();
        fs::create_dir(disk.dir.join("state.new")).unwrap();
        for generation in 4..8 {
            let error = disk.save(&of(generation), false).unwrap_err();
            assert!(format!("{error:#}").contains(disk.dir.join("state").to_str().unwrap()), "{error:#}");
        }
        assert_eq!(disk.names().len(), 3, "{:?}", disk.names());
        fs::remove_dir(disk.dir.join("state.new")).unwrap();
        disk.save(&of(5), false).unwrap();
        assert_eq!((disk.generation(), disk.names().len()), (5, 2));
    }

    #[test]
    fn missing_or_damaged_journal_is_refused_by_name() {
        let mut disk = Disk::new("refused");
        for generation in 1..4 {
            disk.save(&of(generation), false).unwrap();
        }
        let path = disk.journal();
        let good = fs::read(&path).unwrap();
        let mut flipped = good.clone();
        flipped[100] ^= 1;
        for bad in [&good[..20], b"", b"garbage", &flipped] {
            fs::write(&path, bad).unwrap();
            let error = disk.read().unwrap_err();
            assert!(error.is::<Damaged>());
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        }
        fs::remove_file(&path).unwrap();
        assert!(disk.read().unwrap_err().to_string().contains("missing"));
        // The last record was not written completely, so nothing depends on it.
        fs::write(&path, &good[..good.len() - 1]).unwrap();
        assert_eq!(disk.generation(), 2);
    }

    /// A release without the journal.
    #[derive(Debug, Default)]
    struct Earlier {
        saved_ms: u64,
        generation: u64,
        clock: Clock,
        unknown: Unknown,
    }

    ovl_proto::fields! { Earlier { 1 saved_ms, 2 generation, 3 clock, ..unknown } }

    #[test]
    fn earlier_release_reads_the_state_of_a_stopped_daemon_and_refuses_that_of_a_running_one() {
        let mut disk = Disk::new("earlier");
        let body = |disk: &Disk| fs::read(disk.dir.join("state")).unwrap()[MAGIC.len() + 32..].to_vec();
        disk.save(&of(1), false).unwrap();
        let error = wire::decode_stored::<Earlier>(&body(&disk)).unwrap_err();
        assert!(
            matches!(error, WireError::NotUnderstood(_)) && error.to_string().contains("field 10"),
            "{error}"
        );
        disk.save(&of(2), true).unwrap();
        let earlier: Earlier = wire::decode_stored(&body(&disk)).unwrap();
        assert_eq!((earlier.generation, earlier.saved_ms, earlier.clock), (2, 0, Clock::default()));
        assert_eq!(earlier.unknown.numbers().count(), 0);
        // It writes the file and knows nothing of journals, of which none is taken for its own.
        replace(&disk.files.path, &wire::encode_stored(&earlier).unwrap(), Durability::Unsynced).unwrap();
        assert_eq!(disk.generation(), 2);
    }

    #[test]
    #[ignore = "a measurement"]
    fn bytes_written_for_a_change() {
        use ovl_proto::alloc::{AllocMap, Block};
        let random = |number: u32| sha256(&number.to_le_bytes());
        let object = |number: u32| {
            let body = [
                format!("default/s{number} selector app=a{number} TCP 80 8080 ").as_bytes(),
                &random(number)[..20],
            ]
            .concat();
            SignedObject {
                body: [body, vec![0; 60]].concat(),
                writer_key: [1; 32],
                signature: ovl_proto::record::Signature(
                    [random(number), random(number + 1)].concat().try_into().unwrap(),
                ),
            }
        };
        let host = |number: u32| NodeId(random(number)[..10].try_into().unwrap());
        let map = |claims: u32| AllocMap {
            cluster: 7,
            version: claims.into(),
            members: (0..24).map(host).collect(),
            blocks: (0..claims)
                .map(|number| {
                    let address = std::net::Ipv4Addr::from((10 << 24) + (number << 8));
                    let prefix = ipnet::Ipv4Net::new(address, 24).unwrap();
                    (Block { network: NetworkId([1; 5]), prefix: prefix.into() }, host(number % 24))
                })
                .collect(),
            ..AllocMap::default()
        };
        let state = |objects: u32, claims: u32| State {
            saved_ms: 1_700_000_000_000 + u64::from(claims) * 1000,
            objects: (0..objects).map(object).collect(),
            alloc: Some(alloc::Durable {
                promised: ovl_proto::alloc::Ballot { counter: claims.into(), ..Default::default() },
                accepted: Some((Default::default(), map(claims + 1))),
                learned: map(claims),
                ..Default::default()
            }),
            ..State::default()
        };
        for (objects, claims) in [(0, 24), (2000, 24), (2000, 600)] {
            let mut disk = Disk::new("bytes");
            let size = |disk: &Disk| -> u64 {
                let paths = ovl_files::sorted(&disk.dir).unwrap();
                paths.iter().map(|path| fs::metadata(path).unwrap().len()).sum()
            };
            disk.save(&state(objects, claims), false).unwrap();
            let whole = size(&disk);
            let start = std::time::Instant::now();
            disk.save(&state(objects, claims + 1), false).unwrap();
            let took = start.elapsed();
            let claim = size(&disk) - whole;
            disk.save(&state(objects + 1, claims + 1), false).unwrap();
            let write = size(&disk) - whole - claim;
            println!(
                "{objects} Services, {claims} blocks: whole {whole} bytes; a claim {claim} (without its proof), an object {write}; {took:?}"
            );
        }
    }

    #[test]
    fn a_state_reads_back_and_damage_is_refused() {
        let dir = std::env::temp_dir().join(format!("ovl-store-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("state");
        assert!(read(&path).unwrap().is_none());
        write(&path, &State { generation: 7, ..State::default() }, &crate::environment::Disk::Synced)
            .unwrap();
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
        write(&path, &later, &crate::environment::Disk::Synced).unwrap();
        let kept = read(&path).unwrap().unwrap();
        assert_eq!((kept.generation, kept.unknown.get(900)), (7, Some(&b"kept"[..])));
        later.unknown.set(901, true, b"");
        write(&path, &later, &crate::environment::Disk::Synced).unwrap();
        let error = read(&path).unwrap_err().to_string();
        assert!(error.contains("field 901 of State") && !error.contains("damaged"), "{error}");
        let mut flipped = good.clone();
        *flipped.last_mut().unwrap() ^= 1;
        fs::write(&path, flipped).unwrap();
        assert!(read(&path).is_err());
        fs::remove_dir_all(&dir).unwrap();
    }
}
