//! What happened on this host, for `ovlctl events`: the latest events in memory, and more of them in two files of the state
//! directory, which outlive the daemon.
//!
//! A thread writes and reads the files, so a slow disk holds nothing up. Events that it cannot take are only kept in memory.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;

use ovl_control::Event;
use tokio::sync::{broadcast, oneshot};

/// How many events are kept in memory.
const KEPT: usize = 1000;
/// The size from which on the file of the events becomes the older one of the two, in bytes.
const FILE_SIZE: u64 = 1 << 20;
/// How many events may wait for the thread.
const WAITING: usize = 4096;

/// A period of time, in milliseconds since 1970. Each end is included; `None` has no bound.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Period {
    /// The beginning.
    pub(crate) since_ms: Option<u64>,
    /// The end.
    pub(crate) until_ms: Option<u64>,
}

impl Period {
    fn contains(self, event: &Event) -> bool {
        self.since_ms.is_none_or(|since| since <= event.time_ms)
            && self.until_ms.is_none_or(|until| event.time_ms <= until)
    }
}

enum Order {
    Write(Event),
    Read(Period, oneshot::Sender<Vec<Event>>),
}

/// The events of this host.
#[derive(Debug)]
pub(crate) struct Events {
    kept: RefCell<VecDeque<Event>>,
    live: broadcast::Sender<Event>,
    /// The thread with the files. `None` if none are written.
    history: Option<mpsc::SyncSender<Order>>,
}

impl Events {
    /// Keeps events in memory alone.
    pub(crate) fn in_memory() -> Self {
        Self { kept: RefCell::default(), live: broadcast::channel(KEPT).0, history: None }
    }

    /// Keeps events in a directory too, and begins with the latest ones that are there.
    ///
    /// # Errors
    ///
    /// The thread cannot be started.
    pub(crate) fn in_dir(dir: &Path) -> io::Result<Self> {
        let files = Files { current: dir.join("events"), older: dir.join("events.old") };
        let mut kept = files.read(Period::default());
        let latest = kept.split_off(kept.len().saturating_sub(KEPT));
        let (orders, inbox) = mpsc::sync_channel(WAITING);
        thread::Builder::new().name("events".to_owned()).spawn(move || files.obey(&inbox))?;
        Ok(Self { kept: RefCell::new(latest.into()), history: Some(orders), ..Self::in_memory() })
    }

    /// Adds an event and sends it to all subscribers. If there are too many, the oldest is dropped from memory.
    pub(crate) fn push(&self, event: Event) {
        let mut kept = self.kept.borrow_mut();
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(event.clone());
        if let Some(history) = &self.history {
            // It may be full while the disk is stuck.
            history.try_send(Order::Write(event.clone())).ok();
        }
        // There may be no subscriber.
        self.live.send(event).ok();
    }

    /// Returns the latest events, oldest first.
    pub(crate) fn latest(&self) -> Vec<Event> {
        self.kept.borrow().iter().cloned().collect()
    }

    /// Returns the events of a period, oldest first: of the files if there are any, else of those in memory.
    pub(crate) async fn of(&self, period: Period) -> Vec<Event> {
        let (reply, read) = oneshot::channel();
        let asked = self.history.as_ref().is_some_and(|it| it.try_send(Order::Read(period, reply)).is_ok());
        match if asked { read.await.ok() } else { None } {
            Some(events) => events,
            None => self.latest().into_iter().filter(|event| period.contains(event)).collect(),
        }
    }

    /// Returns the latest events and a receiver for all later ones.
    pub(crate) fn follow(&self) -> (Vec<Event>, broadcast::Receiver<Event>) {
        (self.latest(), self.live.subscribe())
    }
}

/// The files: each line is an event in JSON. What a crash cut off is passed over.
#[derive(Debug)]
struct Files {
    current: PathBuf,
    older: PathBuf,
}

impl Files {
    /// Carries out orders until the sender is dropped.
    fn obey(&self, inbox: &mpsc::Receiver<Order>) {
        let mut file = None;
        let mut failed = false;
        for order in inbox {
            match order {
                Order::Write(event) => {
                    let result = self.write(&mut file, &event);
                    // Told once, not for each event.
                    if let Err(error) = &result
                        && !failed
                    {
                        tracing::warn!(path = %self.current.display(), %error, "events are not written to disk");
                    }
                    failed = result.is_err();
                }
                // The client may be gone.
                Order::Read(period, reply) => drop(reply.send(self.read(period))),
            }
        }
    }

    /// Appends an event. Opens the file if it is not open, and leaves it closed if it has its full size.
    fn write(&self, open: &mut Option<(File, u64)>, event: &Event) -> io::Result<()> {
        let mut line = serde_json::to_vec(event)?;
        line.push(b'\n');
        let (mut file, size) = match open.take() {
            Some(open) => open,
            None => {
                let mut file =
                    OpenOptions::new().append(true).create(true).mode(0o600).open(&self.current)?;
                let size = file.metadata()?.len();
                // The end of a line that a crash cut off.
                if size > 0 {
                    file.write_all(b"\n")?;
                }
                (file, size + 1)
            }
        };
        file.write_all(&line)?;
        let size = size + line.len() as u64;
        if size < FILE_SIZE {
            *open = Some((file, size));
            return Ok(());
        }
        fs::rename(&self.current, &self.older)
    }

    fn read(&self, period: Period) -> Vec<Event> {
        let lines = |path: &Path| {
            let mut bytes = Vec::new();
            // A file that is not there has no events. Whatever else somebody put there costs no more than twice its size.
            let file = File::open(path).ok().map(|file| file.take(2 * FILE_SIZE));
            file.and_then(|mut file| file.read_to_end(&mut bytes).ok());
            bytes
        };
        [&self.older, &self.current]
            .into_iter()
            .flat_map(|path| {
                let bytes = lines(path);
                let events =
                    bytes.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
                events.filter(|event| period.contains(event)).collect::<Vec<Event>>()
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("ovl-events-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    fn event(n: u64) -> Event {
        let [kind, object] = ["peer", "h2"].map(str::to_owned);
        Event { time_ms: n, kind, object, message: format!("event {n}") }
    }

    fn times(events: &[Event]) -> Vec<u64> {
        events.iter().map(|event| event.time_ms).collect()
    }

    #[tokio::test(flavor = "current_thread")]
    async fn events_of_a_period_are_found_after_a_restart_and_behind_a_line_that_was_cut_off() {
        let dir = Dir::new("period");
        let events = Events::in_dir(&dir.0).unwrap();
        (1..=5).for_each(|n| events.push(event(n)));
        let of = |since, until| Period { since_ms: since, until_ms: until };
        assert_eq!(times(&events.of(of(Some(2), Some(4))).await), [2, 3, 4]);
        drop(events);
        let path = dir.0.join("events");
        let mut file = OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"{\"time_ms\":6,\"ki").unwrap();
        let events = Events::in_dir(&dir.0).unwrap();
        events.push(event(7));
        assert_eq!(times(&events.latest()), [1, 2, 3, 4, 5, 7]);
        assert_eq!(times(&events.of(of(Some(4), None)).await), [4, 5, 7]);
        assert_eq!(times(&events.of(of(None, Some(1))).await), [1]);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn files_are_bounded() {
        let dir = Dir::new("bound");
        let files = Files { current: dir.0.join("events"), older: dir.0.join("events.old") };
        let mut open = None;
        let long = |n| Event { message: "x".repeat(10_000), ..event(n) };
        (0..400).for_each(|n| files.write(&mut open, &long(n)).unwrap());
        let sizes: u64 =
            fs::read_dir(&dir.0).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
        assert!(sizes < 2 * FILE_SIZE + 20_000, "{sizes}");
        let kept = times(&files.read(Period::default()));
        assert!(kept.len() > 100 && kept.last() == Some(&399) && kept.is_sorted(), "{kept:?}");
        assert!(!kept.contains(&0));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn unwritable_directory_leaves_the_latest_events() {
        let events = Events::in_dir(Path::new("/proc/no/such/directory")).unwrap();
        events.push(event(1));
        assert_eq!(times(&events.latest()), [1]);
    }
}
