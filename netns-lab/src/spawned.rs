//! A child process that is killed when its guard is dropped.

use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::tool::Output;
use crate::wait::wait_until;

/// How long the pipes of an exited process are read: its own children may hold them open.
const PIPE_GRACE: Duration = Duration::from_millis(200);

/// A running command. It is killed on drop.
#[derive(Debug)]
pub struct Spawned {
    child: Child,
    shown: String,
    stdout: Collector,
    stderr: Collector,
}

impl Spawned {
    /// Starts the command in the namespace of the calling thread.
    pub(crate) fn start(command: &mut Command, shown: &str, input: Option<&str>) -> Result<Self> {
        command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot run `{shown}`"))?;
        if let (Some(text), Some(mut pipe)) = (input, child.stdin.take()) {
            let text = text.to_owned();
            // Write in a thread: the child may write output before it has read all input. If it exits early,
            // the write fails, and the exit status shows that.
            thread::spawn(move || drop(pipe.write_all(text.as_bytes())));
        }
        let stdout = Collector::start(child.stdout.take());
        let stderr = Collector::start(child.stderr.take());
        Ok(Spawned { child, shown: shown.to_owned(), stdout, stderr })
    }

    /// Returns the process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns whether it is still running.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Returns its standard output so far.
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// Returns its standard error so far.
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Sends a signal if it is still running. `ping` and `tcpdump` print their summary after
    /// `Signal::SIGINT`.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.is_running() {
            kill(Pid::from_raw(self.child.id().cast_signed()), signal)
                .with_context(|| format!("cannot send {signal} to `{}`", self.shown))?;
        }
        Ok(())
    }

    /// Waits until it exits. After a timeout it keeps running until the drop.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let what = format!("`{}` to exit", self.shown);
        let child = &mut self.child;
        wait_until(timeout, &what, || child.try_wait()).with_context(|| self.said())
    }

    /// Waits until it exits and returns its output. Kills it after a timeout.
    pub fn finish(mut self, timeout: Duration) -> Result<Output> {
        let status = self.wait(timeout)?;
        self.stdout.wait_end();
        self.stderr.wait_end();
        Ok(Output { status, stdout: self.stdout.text(), stderr: self.stderr.text() })
    }

    fn said(&self) -> String {
        let text = self.stdout() + &self.stderr();
        match text.trim() {
            "" => "it wrote nothing".to_owned(),
            text => format!("it wrote: {text}"),
        }
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        // An error means that it has exited already.
        if self.is_running() {
            self.child.kill().ok();
            self.child.wait().ok();
        }
    }
}

/// Reads a pipe in a thread until its end, so that the writer never blocks.
#[derive(Debug)]
struct Collector {
    text: Arc<Mutex<Vec<u8>>>,
    end: Receiver<()>,
}

impl Collector {
    fn start(pipe: Option<impl Read + Send + 'static>) -> Self {
        let text = Arc::new(Mutex::new(Vec::new()));
        let (at_end, end) = channel();
        if let Some(mut pipe) = pipe {
            let sink = Arc::clone(&text);
            thread::spawn(move || {
                let mut buffer = [0; 16384];
                while let Ok(read @ 1..) = pipe.read(&mut buffer) {
                    sink.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buffer[..read]);
                }
                drop(at_end);
            });
        }
        Collector { text, end }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.text.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Waits for the end of the pipe, at most [`PIPE_GRACE`]. The sender is dropped at the end of the pipe,
    /// so both results of the receive are fine.
    fn wait_end(&self) {
        self.end.recv_timeout(PIPE_GRACE).ok();
    }
}
