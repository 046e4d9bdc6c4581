//! A supervisor process that waits for the measuring process and removes the labs that it leaves.
//!
//! A signal handler would have to stop all measuring threads. Instead, an interrupt kills the measuring
//! process, and the supervisor, which blocks the signal, cleans up.

use std::env;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitCode, ExitStatus};

use anyhow::{Context, Result};
use netns_lab::sweep;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal};

/// Environment variable that marks the measuring process.
const VARIABLE: &str = "NETNS_LAB_BENCH_PROCESS";

/// Returns whether this is the measuring process.
pub(crate) fn is_supervised() -> bool {
    env::var_os(VARIABLE).is_some()
}

/// Makes the measuring process die with the supervisor.
pub(crate) fn end_with_supervisor() -> Result<()> {
    set_pdeathsig(Signal::SIGKILL).context("cannot bind this process to its parent")
}

/// Runs this command line again in a measuring process, and cleans up after it.
pub(crate) fn supervise() -> Result<ExitCode> {
    let program = env::current_exe().context("cannot find the path of this program")?;
    // Start the child before blocking the signals: it and the daemons would inherit the mask.
    let mut child = Command::new(program)
        .args(env::args_os().skip(1))
        .env(VARIABLE, "1")
        .spawn()
        .context("cannot start the measuring process")?;
    let (status, asked) = wait(&mut child)?;
    if status.success() {
        return Ok(ExitCode::SUCCESS);
    }
    for lab in sweep()? {
        if let Some(failure) = lab.failure {
            eprintln!("netns-lab: cannot remove lab {}: {failure}", lab.name);
        }
    }
    match asked.map(|signal| signal as i32).or_else(|| status.signal()) {
        Some(signal) => {
            eprintln!("netns-lab: the benchmark was interrupted by signal {signal}; its labs are removed");
            // The exit status that a shell reports.
            Ok(ExitCode::from(u8::try_from(128 + signal).unwrap_or(1)))
        }
        // Its own exit status tells the kind of failure.
        None => Ok(status
            .code()
            .and_then(|code| u8::try_from(code).ok())
            .map_or(ExitCode::FAILURE, ExitCode::from)),
    }
}

/// Waits until the child exits. A termination signal kills it, and is returned too.
fn wait(child: &mut Child) -> Result<(ExitStatus, Option<Signal>)> {
    let signals = SigSet::from_iter([Signal::SIGCHLD, Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    signals.thread_block().context("cannot block signals")?;
    let mut asked = None;
    loop {
        // Also finds a child that exited before SIGCHLD was blocked.
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
