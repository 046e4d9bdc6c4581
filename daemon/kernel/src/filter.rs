//! Our base table of nftables: written and read by `nft`.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use ovl_dataplane::nft::BASE_TABLE;

use super::error::{KernelError, Result};
use super::sys;
use super::watch::Watch;

/// How long `nft` may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A dump looks at the table when somebody changed it, and after this time in any case.
const MAX_AGE: Duration = Duration::from_secs(30);

/// What stands for a table in a dump that is not what we wrote: different from all that is wanted.
const UNKNOWN: &str = "unknown";

/// What is known about the table.
#[derive(Debug, Default)]
pub(super) struct Filter {
    /// What was written last, and how `nft` lists it.
    written: Option<(String, String)>,
    /// What the last look found, and when; none if it has to be looked at.
    seen: Option<(Option<String>, Instant)>,
}

impl Filter {
    /// Replaces the table. What others do to it meanwhile, the watch tells.
    pub(super) fn replace(&mut self, wanted: &str, watch: &mut Watch) -> Result<()> {
        self.written = None;
        self.seen = None;
        let done = run(&["-f", "-"], wanted);
        let pid = done.as_ref().map_or(0, |done| done.pid);
        let result = done.and_then(Done::check);
        if result.is_err() {
            watch.drain(pid);
            return result.map(drop);
        }
        let listing = list()?;
        // Between the two somebody else may have been there: then the listing is not of our text.
        watch.drain(pid);
        if let Some(listing) = listing.filter(|_| !watch.is_filter_touched()) {
            self.written = Some((wanted.to_owned(), listing));
            self.seen = Some((Some(wanted.to_owned()), Instant::now()));
        }
        Ok(())
    }

    /// Deletes the table.
    pub(super) fn remove(&mut self, watch: &mut Watch) -> Result<()> {
        self.written = None;
        self.seen = None;
        // The first makes the second succeed where there is none.
        let done = run(&["-f", "-"], &format!("table inet {BASE_TABLE}\ndelete table inet {BASE_TABLE}\n"))?;
        watch.drain(done.pid);
        done.check().map(drop)
    }

    /// The text that made the table; another one if somebody else, or another run, did; none if
    /// there is no table.
    pub(super) fn current(&mut self) -> Result<Option<String>> {
        if let Some((seen, at)) = &self.seen
            && at.elapsed() < MAX_AGE
        {
            return Ok(seen.clone());
        }
        let current = match (list(), &self.written) {
            // Nothing of ours can be there, and what needs the table will say that `nft` is missing.
            (Err(KernelError::Other(_)), None) => None,
            (listing, written) => listing?.map(|listing| match written {
                Some((text, ours)) if *ours == listing => text.clone(),
                _ => UNKNOWN.to_owned(),
            }),
        };
        self.seen = Some((current.clone(), Instant::now()));
        Ok(current)
    }

    /// Somebody else has changed it, or may have.
    pub(super) fn touched(&mut self) {
        self.seen = None;
    }
}

/// How `nft` shows our table, without counters; none if there is none.
fn list() -> Result<Option<String>> {
    let done = run(&["-s", "-n", "list", "table", "inet", BASE_TABLE], "")?;
    if !done.success && done.errors.contains("No such file or directory") {
        return Ok(None);
    }
    done.check().map(Some)
}

/// What came of a run of `nft`.
#[derive(Debug)]
pub(super) struct Done {
    pub(super) pid: u32,
    success: bool,
    output: String,
    errors: String,
}

impl Done {
    pub(super) fn check(self) -> Result<String> {
        if self.success {
            return Ok(self.output);
        }
        // What nft says where the kernel has no nftables, or nothing that it could be asked by.
        if ["cache initialization failed", "initialize Netlink socket"]
            .iter()
            .any(|no| self.errors.contains(no))
        {
            return Err(KernelError::missing("nftables", "nf_tables"));
        }
        Err(KernelError::Other(format!("nft refuses the packet filter: {}", self.errors.trim())))
    }
}

pub(super) fn run(arguments: &[&str], input: &str) -> Result<Done> {
    try_run(arguments, input).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            KernelError::Other("the program nft is missing: install nftables".to_owned())
        }
        _ => KernelError::Other(format!("cannot run nft: {error}")),
    })
}

fn try_run(arguments: &[&str], input: &str) -> io::Result<Done> {
    // A file in memory takes any length at once; a pipe would need somebody to feed it.
    let mut stdin = File::from(memfd_create("nft", MFdFlags::MFD_CLOEXEC)?);
    stdin.write_all(input.as_bytes())?;
    stdin.rewind()?;
    let mut child = Command::new("nft")
        .args(arguments)
        .env("LC_ALL", "C")
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let read = read_both(&mut child, Instant::now() + PATIENCE);
    if read.is_err() {
        let _ = child.kill();
    }
    let status = child.wait()?;
    let (output, errors) = read?;
    Ok(Done {
        pid: child.id(),
        success: status.success(),
        output: String::from_utf8_lossy(&output).into_owned(),
        errors: String::from_utf8_lossy(&errors).into_owned(),
    })
}

fn read_both(child: &mut Child, deadline: Instant) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    let (mut output, mut errors) = (Vec::new(), Vec::new());
    while stdout.is_some() || stderr.is_some() {
        let left = deadline.saturating_duration_since(Instant::now());
        let fds = [stdout.as_ref().map(AsRawFd::as_raw_fd), stderr.as_ref().map(AsRawFd::as_raw_fd)];
        let [out_ready, err_ready] = sys::poll(fds, Some(left))?;
        if left.is_zero() {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("no end after {} s", PATIENCE.as_secs()),
            ));
        }
        if out_ready {
            read_some(&mut stdout, &mut output)?;
        }
        if err_ready {
            read_some(&mut stderr, &mut errors)?;
        }
    }
    Ok((output, errors))
}

/// Reads once; at the end the stream is dropped.
fn read_some(stream: &mut Option<impl Read>, to: &mut Vec<u8>) -> io::Result<()> {
    let Some(open) = stream else { return Ok(()) };
    let mut chunk = [0; 16 * 1024];
    match open.read(&mut chunk)? {
        0 => *stream = None,
        length => to.extend_from_slice(chunk.get(..length).unwrap_or_default()),
    }
    Ok(())
}
