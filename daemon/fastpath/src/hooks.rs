//! Attaches the programs to devices, on a thread of its own: the kernel takes 5 to 19 ms for each, which no attach of an
//! endpoint shall wait for.
//!
//! [`Hooks`] owns the devices to which programs are attached or about to be. Begin to read at [`Hooks::attach`].

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use aya::programs::links::{FdLink, LinkOrder, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::{SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfError};

use crate::error::{Error, Result, describe};

/// Which packets of a device the programs see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// The host's interface of an endpoint.
    Pod,
    /// The device of the underlay.
    Underlay,
    /// A VXLAN device.
    Vxlan,
}

/// A program of the object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Program {
    /// `from_pod`.
    Pod,
    /// `from_underlay`.
    Underlay,
    /// `from_stack`.
    Stack,
}

impl Program {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Pod, Self::Underlay, Self::Stack];

    /// Returns its name in the object.
    pub fn name(self) -> &'static str {
        match self {
            Self::Pod => "from_pod",
            Self::Underlay => "from_underlay",
            Self::Stack => "from_stack",
        }
    }

    /// Whether it sees the packets that leave by a device, in place of those that enter.
    pub fn is_egress(self) -> bool {
        match self {
            Self::Pod | Self::Underlay => false,
            Self::Stack => true,
        }
    }
}

/// Returns whether the kernel has tcx (Linux 6.6). [`Filters`] attach the programs to devices if it has not.
pub fn has_tcx() -> bool {
    SchedClassifier::query_tcx("lo", TcAttachType::Ingress).is_ok()
}

/// Attaches programs to devices on a kernel without tcx.
pub trait Filters: Debug + Send {
    /// Returns the programs of ovl on all devices, by the indexes of the devices.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    fn list(&mut self) -> std::result::Result<Vec<(u32, Program)>, String>;

    /// Attaches a program to a device. One of an earlier run is replaced at once.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    fn set(
        &mut self,
        ifindex: u32,
        program: Program,
        loaded: BorrowedFd<'_>,
    ) -> std::result::Result<(), String>;

    /// Detaches the programs of ovl from a device. It is no error if it has none.
    ///
    /// # Errors
    ///
    /// The kernel refuses.
    fn remove(&mut self, ifindex: u32) -> std::result::Result<(), String>;
}

/// Shared with the thread, which takes it for one attachment at a time.
type SharedFilters = Arc<Mutex<Box<dyn Filters>>>;

impl DeviceKind {
    /// The programs of a device, in the order in which they are attached. What the stack sends is seen before the device's
    /// own packets can become fast.
    fn programs(self) -> &'static [Program] {
        match self {
            Self::Pod => &[Program::Stack, Program::Pod],
            Self::Underlay => &[Program::Stack, Program::Underlay],
            Self::Vxlan => &[Program::Stack],
        }
    }
}

/// The state of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Hook {
    /// The thread has yet to attach the programs.
    Waiting,
    /// These are attached. A run that was ended may have left fewer than the device should have.
    Attached(Vec<Program>),
    /// Why the programs could not be attached.
    Failed(String),
}

enum Job {
    Attach { ifindex: u32, device: String, kind: DeviceKind },
    Detach { ifindex: u32 },
}

type States = BTreeMap<u32, Hook>;

/// The devices with programs, and the thread that attaches them.
#[derive(Debug)]
pub(crate) struct Hooks {
    states: Arc<Mutex<States>>,
    /// `None`: the programs are attached by links of tcx.
    filters: Option<SharedFilters>,
    /// None while it is being dropped.
    jobs: Option<Sender<Job>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Hooks {
    /// Ends the thread, which leaves the jobs that wait undone.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.jobs = None;
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Hooks {
    /// Takes the programs, and the filters that an earlier run has left, or its links in `folder`: from now on they run
    /// these programs.
    ///
    /// # Errors
    ///
    /// A program is not in the object, the kernel refuses one, or what was left cannot be read.
    pub(crate) fn start(
        mut object: Ebpf,
        folder: PathBuf,
        filters: Option<Box<dyn Filters>>,
    ) -> Result<Self> {
        for program in Program::ALL {
            find(&mut object, program)?.load().map_err(|error| Error::new("cannot load a program", error))?;
        }
        let filters = filters.map(|filters| Arc::new(Mutex::new(filters)));
        let adopted = match &filters {
            Some(filters) => adopt_filters(&mut object, filters)?,
            None => adopt_links(&mut object, &folder)?,
        };
        let states = Arc::new(Mutex::new(adopted));
        let (jobs, queue) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let mut thread = Thread {
            object,
            folder,
            filters: filters.clone(),
            states: Arc::clone(&states),
            queue,
            stop: Arc::clone(&stop),
        };
        let thread = std::thread::Builder::new()
            .name("fast path".to_owned())
            .spawn(move || thread.run())
            .map_err(|error| Error::new("cannot start a thread", error))?;
        Ok(Self { states, filters, jobs: Some(jobs), stop, thread: Some(thread) })
    }

    /// Attaches the programs to a device, soon.
    ///
    /// # Errors
    ///
    /// The last attempt failed; another one is made.
    pub(crate) fn attach(&self, ifindex: u32, device: &str, kind: DeviceKind) -> Result<()> {
        let before = self.states().insert(ifindex, Hook::Waiting);
        self.send(Job::Attach { ifindex, device: device.to_owned(), kind });
        match before {
            Some(Hook::Failed(why)) => Err(Error::of("cannot attach the programs", why)),
            Some(Hook::Waiting | Hook::Attached(_)) | None => Ok(()),
        }
    }

    /// Detaches the programs from a device, soon.
    pub(crate) fn detach(&self, ifindex: u32) {
        self.states().remove(&ifindex);
        self.send(Job::Detach { ifindex });
    }

    fn send(&self, job: Job) {
        // The thread ends only with this.
        let _ = self.jobs.as_ref().map(|jobs| jobs.send(job));
    }

    /// Returns the indexes of the devices that have programs, or are about to.
    ///
    /// # Errors
    ///
    /// The kernel does not say which filters there are.
    pub(crate) fn devices(&self) -> Result<Vec<u32>> {
        self.look_at_filters()?;
        let states = self.states();
        let there = states.iter().filter(|(_, hook)| !matches!(hook, Hook::Failed(_)));
        Ok(there.map(|(ifindex, _)| *ifindex).collect())
    }

    /// Whether a device has all programs for its kind, or is about to.
    pub(crate) fn is_complete(&self, ifindex: u32, kind: DeviceKind) -> bool {
        match self.states().get(&ifindex) {
            Some(Hook::Waiting) => true,
            Some(Hook::Attached(programs)) => kind.programs().iter().all(|each| programs.contains(each)),
            Some(Hook::Failed(_)) | None => false,
        }
    }

    /// Filters, unlike links, may be deleted by other programs.
    fn look_at_filters(&self) -> Result<()> {
        let Some(filters) = &self.filters else { return Ok(()) };
        let mut filters = filters.lock().unwrap_or_else(PoisonError::into_inner);
        let found = by_device(filters.list().map_err(|error| Error::of("cannot read the filters", error))?);
        let attached = |hook: &Hook| matches!(hook, Hook::Attached(_));
        self.states().iter_mut().filter(|(_, hook)| attached(hook)).for_each(|(ifindex, hook)| {
            *hook = Hook::Attached(found.get(ifindex).cloned().unwrap_or_default());
        });
        Ok(())
    }

    fn states(&self) -> MutexGuard<'_, States> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the files of a device's links.
fn pins(folder: &Path, ifindex: u32) -> [PathBuf; 3] {
    Program::ALL.map(|program| folder.join(format!("{ifindex}-{}", program.name())))
}

fn find(object: &mut Ebpf, program: Program) -> Result<&mut SchedClassifier> {
    let missing = || Error::of("cannot load a program", format!("{} is missing", program.name()));
    let found = object.program_mut(program.name()).ok_or_else(missing)?;
    found.try_into().map_err(|error| Error::new("cannot load a program", EbpfError::ProgramError(error)))
}

fn by_device(all: Vec<(u32, Program)>) -> BTreeMap<u32, Vec<Program>> {
    let mut devices: BTreeMap<u32, Vec<Program>> = BTreeMap::new();
    all.into_iter().for_each(|(ifindex, program)| devices.entry(ifindex).or_default().push(program));
    devices
}

/// Replaces the programs of all filters. Each is replaced at once, so no packet passes without a program.
fn adopt_filters(object: &mut Ebpf, filters: &SharedFilters) -> Result<States> {
    let mut filters = filters.lock().unwrap_or_else(PoisonError::into_inner);
    let error = |error: String| Error::of("cannot replace a program", error);
    let mut adopted = Vec::new();
    for (ifindex, program) in filters.list().map_err(error)? {
        // One that fails is attached again later, as one that is missing.
        if set_filter(object, filters.as_mut(), ifindex, program).is_ok() {
            adopted.push((ifindex, program));
        }
    }
    Ok(by_device(adopted).into_iter().map(|(ifindex, found)| (ifindex, Hook::Attached(found))).collect())
}

fn set_filter(object: &mut Ebpf, filters: &mut dyn Filters, ifindex: u32, program: Program) -> Result<()> {
    let error = |error: String| Error::of("cannot attach a program", error);
    let loaded = find(object, program)?.fd().map_err(|it| error(describe(&it)))?;
    filters.set(ifindex, program, loaded.as_fd()).map_err(error)
}

/// Replaces the programs of all links in the folder, and deletes those whose device is gone. Each link is replaced at
/// once, so no packet passes without a program.
fn adopt_links(object: &mut Ebpf, folder: &Path) -> Result<States> {
    let mut adopted = Vec::new();
    let entries = fs::read_dir(folder).map_err(|error| Error::new("cannot read the links", error))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let parsed = name.split_once('-').and_then(|(ifindex, program)| {
            let program = Program::ALL.into_iter().find(|known| known.name() == program)?;
            Some((ifindex.parse::<u32>().ok()?, program))
        });
        match parsed.filter(|(_, program)| replace(object, *program, &path).is_ok()) {
            Some(link) => adopted.push(link),
            None => {
                let _ = fs::remove_file(&path);
            }
        }
    }
    Ok(by_device(adopted).into_iter().map(|(ifindex, found)| (ifindex, Hook::Attached(found))).collect())
}

fn replace(object: &mut Ebpf, program: Program, pin: &Path) -> Result<()> {
    let error = |error: String| Error::of("cannot replace a program", error);
    let link = PinnedLink::from_pin(pin).map_err(|it| error(it.to_string()))?;
    let link = SchedClassifierLink::try_from(FdLink::from(link)).map_err(|it| error(it.to_string()))?;
    let program = find(object, program)?;
    let id = program.attach_to_link(link).map_err(|it| error(it.to_string()))?;
    // What is pinned stays attached.
    program.take_link(id).map(drop).map_err(|it| error(it.to_string()))
}

struct Thread {
    object: Ebpf,
    folder: PathBuf,
    filters: Option<SharedFilters>,
    states: Arc<Mutex<States>>,
    queue: Receiver<Job>,
    stop: Arc<AtomicBool>,
}

impl Thread {
    /// Serves jobs until the other end is dropped.
    fn run(&mut self) {
        while let Ok(job) = self.queue.recv() {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            match job {
                Job::Attach { ifindex, device, kind } => {
                    let result = self.attach(ifindex, &device, kind);
                    let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
                    // It may be detached again by now.
                    if let Some(state) = states.get_mut(&ifindex) {
                        *state = match result {
                            Ok(()) => Hook::Attached(kind.programs().to_vec()),
                            Err(error) => Hook::Failed(error.to_string()),
                        };
                    }
                }
                Job::Detach { ifindex } => self.detach(ifindex),
            }
        }
    }

    fn attach(&mut self, ifindex: u32, device: &str, kind: DeviceKind) -> Result<()> {
        for program in kind.programs() {
            if let Some(filters) = &self.filters {
                let mut filters = filters.lock().unwrap_or_else(PoisonError::into_inner);
                set_filter(&mut self.object, filters.as_mut(), ifindex, *program)?;
                continue;
            }
            let pin = self.folder.join(format!("{ifindex}-{}", program.name()));
            if pin.exists() {
                continue;
            }
            let error = |why: String| Error::of("cannot attach a program", format!("{device}: {why}"));
            let options = TcAttachOptions::TcxOrder(LinkOrder::default());
            let found = find(&mut self.object, *program)?;
            let side = if program.is_egress() { TcAttachType::Egress } else { TcAttachType::Ingress };
            let id = found.attach_with_options(device, side, options).map_err(|it| error(describe(&it)))?;
            let link = found.take_link(id).map_err(|it| error(it.to_string()))?;
            let link = FdLink::try_from(link).map_err(|it| error(it.to_string()))?;
            link.pin(&pin).map_err(|it| error(describe(&it)))?;
        }
        Ok(())
    }
    fn detach(&self, ifindex: u32) {
        if let Some(filters) = &self.filters {
            // The device may be gone, and its filters with it.
            let _ = filters.lock().unwrap_or_else(PoisonError::into_inner).remove(ifindex);
        }
        for pin in pins(&self.folder, ifindex) {
            let _ = fs::remove_file(pin);
        }
    }
}
