//! Two processes: one measures, one waits for it and removes the labs that it leaves.
//!
//! A handler for signals would have to stop whatever the measuring threads are at. So nothing is
//! handled: the measuring process dies of an interrupt as any other does, and this one, which
//! blocks it, cleans up.

use std::env;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitCode, ExitStatus};

use anyhow::{Context, Result};
use netns_lab::sweep;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal};

/// Tells the measuring process from the waiting one.
const VARIABLE: &str = "NETNS_LAB_BENCH_PROCESS";

/// Whether this is the process that measures.
pub(crate) fn is_supervised() -> bool {
    env::var_os(VARIABLE).is_some()
}

/// The measuring process ends with the waiting one, however that ends.
pub(crate) fn end_with_supervisor() -> Result<()> {
    set_pdeathsig(Signal::SIGKILL).context("cannot bind this process to its parent")
}

/// Runs this command line again in a process that measures, and cleans up after it.
pub(crate) fn supervise() -> Result<ExitCode> {
    let program = env::current_exe().context("cannot find the program that runs")?;
    // Before the signals are blocked: the child would inherit that, and the daemons from it.
    let mut child = Command::new(program)
        .args(env::args_os().skip(1))
        .env(VARIABLE, "1")
        .spawn()
        .context("cannot start the process that measures")?;
    let (status, asked) = wait(&mut child)?;
    if status.success() {
        return Ok(ExitCode::SUCCESS);
    }
    for lab in sweep()? {
        if let Some(failure) = lab.failure {
            eprintln!("netns-lab: lab {} stays: {failure}", lab.name);
        }
    }
    match asked.map(|signal| signal as i32).or_else(|| status.signal()) {
        Some(signal) => {
            eprintln!("netns-lab: the benchmark was ended by signal {signal}; its labs are removed");
            // As a shell tells it.
            Ok(ExitCode::from(u8::try_from(128 + signal).unwrap_or(1)))
        }
        // Its own statuses say what kind of failure it was.
        None => Ok(status
            .code()
            .and_then(|code| u8::try_from(code).ok())
            .map_or(ExitCode::FAILURE, ExitCode::from)),
    }
}

/// Waits for the child's end. A signal that asks for an end kills it; gives that too.
fn wait(child: &mut Child) -> Result<(ExitStatus, Option<Signal>)> {
    let signals = SigSet::from_iter([Signal::SIGCHLD, Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block().context("cannot block signals")?;
    let mut asked = None;
    loop {
        // One that ended before SIGCHLD was blocked is found here.
        if let Some(status) = child.try_wait()? {
            return Ok((status, asked));
        }
        let signal = signals.wait()?;
        if signal != Signal::SIGCHLD {
            asked = Some(signal);
            child.kill()?;
        }
    }
}
