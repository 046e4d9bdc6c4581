//! Attaches the programs to devices, on a thread of its own: the kernel takes 5 to 19 ms for each, which no attach of an
//! endpoint shall wait for.
//!
//! [`Hooks`] owns the devices to which programs are attached or about to be. Begin to read at [`Hooks::attach`].

use std::collections::BTreeMap;
use std::fs;
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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    /// `from_pod`.
    Pod,
    /// `from_underlay`.
    Underlay,
    /// `from_stack`.
    Stack,
}

impl Program {
    pub(crate) const ALL: [Self; 3] = [Self::Pod, Self::Underlay, Self::Stack];

    /// Its name in the object.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Pod => "from_pod",
            Self::Underlay => "from_underlay",
            Self::Stack => "from_stack",
        }
    }

    fn side(self) -> TcAttachType {
        match self {
            Self::Pod | Self::Underlay => TcAttachType::Ingress,
            Self::Stack => TcAttachType::Egress,
        }
    }
}

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
    Attached,
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
    /// Takes the programs, and the links that an earlier run has left in `folder`: from now on they run these programs.
    ///
    /// # Errors
    ///
    /// A program is not in the object, the kernel refuses one, or the folder cannot be read.
    pub(crate) fn start(mut object: Ebpf, folder: PathBuf) -> Result<Self> {
        for program in Program::ALL {
            find(&mut object, program)?.load().map_err(|error| Error::new("cannot load a program", error))?;
        }
        let states = Arc::new(Mutex::new(adopt(&mut object, &folder)?));
        let (jobs, queue) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let mut thread =
            Thread { object, folder, states: Arc::clone(&states), queue, stop: Arc::clone(&stop) };
        let thread = std::thread::Builder::new()
            .name("fast path".to_owned())
            .spawn(move || thread.run())
            .map_err(|error| Error::new("cannot start a thread", error))?;
        Ok(Self { states, jobs: Some(jobs), stop, thread: Some(thread) })
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
            Some(Hook::Waiting | Hook::Attached) | None => Ok(()),
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

    /// Returns the indexes of the devices that have the programs, or are about to.
    pub(crate) fn attached(&self) -> Vec<u32> {
        let states = self.states();
        let there = states.iter().filter(|(_, hook)| matches!(hook, Hook::Waiting | Hook::Attached));
        there.map(|(ifindex, _)| *ifindex).collect()
    }

    fn states(&self) -> MutexGuard<'_, States> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the files of a device's links.
fn pins(folder: &Path, ifindex: u32) -> impl Iterator<Item = (Program, PathBuf)> {
    Program::ALL.map(|program| (program, folder.join(format!("{ifindex}-{}", program.name())))).into_iter()
}

fn find(object: &mut Ebpf, program: Program) -> Result<&mut SchedClassifier> {
    let missing = || Error::of("cannot load a program", format!("{} is missing", program.name()));
    let found = object.program_mut(program.name()).ok_or_else(missing)?;
    found.try_into().map_err(|error| Error::new("cannot load a program", EbpfError::ProgramError(error)))
}

/// Replaces the programs of all links in the folder, and deletes those whose device is gone. Each link is replaced at
/// once, so no packet passes without a program.
fn adopt(object: &mut Ebpf, folder: &Path) -> Result<States> {
    let mut states = States::new();
    let entries = fs::read_dir(folder).map_err(|error| Error::new("cannot read the links", error))?;
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let parsed = name.split_once('-').and_then(|(ifindex, program)| {
            let program = Program::ALL.into_iter().find(|known| known.name() == program)?;
            Some((ifindex.parse::<u32>().ok()?, program))
        });
        let adopted = parsed.filter(|(_, program)| replace(object, *program, &path).is_ok());
        match adopted {
            Some((ifindex, _)) => {
                states.insert(ifindex, Hook::Attached);
            }
            None => {
                let _ = fs::remove_file(&path);
            }
        }
    }
    Ok(states)
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
                            Ok(()) => Hook::Attached,
                            Err(error) => Hook::Failed(error.to_string()),
                        };
                    }
                }
                Job::Detach { ifindex } => {
                    for (_, pin) in pins(&self.folder, ifindex) {
                        let _ = fs::remove_file(pin);
                    }
                }
            }
        }
    }

    fn attach(&mut self, ifindex: u32, device: &str, kind: DeviceKind) -> Result<()> {
        for program in kind.programs() {
            let pin = self.folder.join(format!("{ifindex}-{}", program.name()));
            if pin.exists() {
                continue;
            }
            let error = |why: String| Error::of("cannot attach a program", format!("{device}: {why}"));
            let options = TcAttachOptions::TcxOrder(LinkOrder::default());
            let found = find(&mut self.object, *program)?;
            let id = found
                .attach_with_options(device, program.side(), options)
                .map_err(|it| error(describe(&it)))?;
            let link = found.take_link(id).map_err(|it| error(it.to_string()))?;
            let link = FdLink::try_from(link).map_err(|it| error(it.to_string()))?;
            link.pin(&pin).map_err(|it| error(describe(&it)))?;
        }
        Ok(())
    }
}
