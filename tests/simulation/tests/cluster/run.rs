//! One simulation: a thread with a seed, a runtime with a paused clock, and what ends a run that makes no progress.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use tokio::runtime::{Builder, Runtime};
use tokio::task::{LocalSet, spawn_local};

use crate::entropy;
use crate::world::World;

/// How long the clock of a simulation may stand still while time passes on the real one.
const STALLED: Duration = Duration::from_secs(120);

/// The places of simulations in this process. Two that run at the same time must not have the same one, and a run
/// repeats only in the same one.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Slot {
    /// Of the test with three hosts.
    Three,
    /// Of the test with a rotation, reboots and a death.
    Reboots,
    /// Of the storm with five hosts.
    Five,
    /// Of the storm with twenty hosts.
    Twenty,
    /// Of the test that repeats a run.
    Same,
    /// Of the test of hosts that were cut off.
    Behind,
    /// Of the test with clocks that are wrong.
    Clocks,
    /// Of the test with requests right after a start.
    Starts,
    /// Of the test with hosts behind NAT.
    Hidden,
}

/// The number of slots.
const SLOTS: usize = 9;

/// Runs a test on a paused clock, on a thread of its own, for which nothing random has been drawn yet.
///
/// # Panics
///
/// With the seed, the last actions and the error, if the test fails.
pub(crate) fn simulate(slot: Slot, seed: u64, test: impl AsyncFnOnce(&mut World) -> Result<()> + Send) {
    if let Ok(level) = std::env::var("OVL_SIM_LOG") {
        let level: tracing_subscriber::filter::LevelFilter = level.parse().unwrap();
        let _ = tracing_subscriber::fmt().with_max_level(level).with_test_writer().try_init();
    }
    // Holds the seconds of the simulated clock.
    let clock = Arc::new(AtomicU64::new(0));
    let (_end, ended) = mpsc::channel();
    let watched = Arc::clone(&clock);
    thread::spawn(move || watch(seed, &watched, &ended));
    let runtime = take_runtime(slot);
    let result = thread::scope(|scope| scope.spawn(|| run(&runtime, seed, &clock, test)).join().unwrap());
    if let Err(error) = result {
        panic!("seed {seed}: {error:#}");
    }
}

fn run(
    runtime: &Runtime,
    seed: u64,
    clock: &Arc<AtomicU64>,
    test: impl AsyncFnOnce(&mut World) -> Result<()>,
) -> Result<()> {
    entropy::seed(seed);
    let clock = Arc::clone(clock);
    LocalSet::new().block_on(runtime, async {
        spawn_local(async move {
            loop {
                tokio::time::sleep(Duration::from_secs(1)).await;
                clock.fetch_add(1, Ordering::Relaxed);
            }
        });
        let mut world = World::new(seed)?;
        let result = test(&mut world).await;
        let error = match result {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        println!("seed {seed}, the last actions:\n{}", world.told());
        // The error of a daemon that has ended says more than that it does not answer.
        Err(match world.failed().await {
            Some(why) => why.context(format!("{error:#}")),
            None => error,
        })
    })
}

/// Ends the process if the simulated clock stands still: a daemon that never returns cannot be ended otherwise.
fn watch(seed: u64, clock: &AtomicU64, ended: &mpsc::Receiver<()>) {
    let mut last = clock.load(Ordering::Relaxed);
    while ended.recv_timeout(STALLED) == Err(mpsc::RecvTimeoutError::Timeout) {
        let now = clock.load(Ordering::Relaxed);
        if now == last {
            eprintln!("seed {seed}: the simulated clock has stood still at {now} s for {STALLED:?}");
            std::process::exit(101);
        }
        last = now;
    }
}

/// A runtime for this slot.
///
/// tokio seeds the `select!` of each runtime by a counter of the process. So the builders of all slots are made before
/// anything else in this process has a runtime, in the same order always.
fn take_runtime(slot: Slot) -> Runtime {
    static BUILDERS: OnceLock<Mutex<Vec<Builder>>> = OnceLock::new();
    let builders = BUILDERS.get_or_init(|| {
        let make = || {
            entropy::seed(0);
            (0..SLOTS).map(|_| Builder::new_current_thread()).collect()
        };
        Mutex::new(thread::spawn(make).join().unwrap())
    });
    let mut builders = builders.lock().unwrap_or_else(PoisonError::into_inner);
    let builder = builders.get_mut(slot as usize).unwrap();
    builder.enable_time().enable_io().start_paused(true).build().unwrap()
}

/// The seed of the schedule.
pub(crate) fn seed() -> u64 {
    number("OVL_SIM_SEED", 1)
}

/// A number of the environment.
pub(crate) fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}
