//! Our nftables table: written and read by `nft`, watched by netlink.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::sys::memfd::{MFdFlags, memfd_create};
use ovl_core::filter::TABLE;

use super::attribute::{Message, attributes, messages, text, u8_at};
use super::error::{KernelError, Result};
use super::sys;

/// How long `nft` may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// A dump looks at the table when somebody changed it, and after this time in any case.
const MAX_AGE: Duration = Duration::from_secs(30);

/// What stands for a table in a dump that is not what we wrote: different from all that is wanted.
const UNKNOWN: &str = "unknown";

const NFNLGRP_NFTABLES: u32 = 7;
const NFPROTO_INET: u8 = 1;
/// NFNL_SUBSYS_NFTABLES, and NFT_MSG_NEWGEN, which ends a transaction.
const SUBSYSTEM: u8 = 10;
const NEW_GENERATION: u8 = 15;

/// What is known about the table.
#[derive(Debug)]
pub(super) struct Filter {
    monitor: Option<Socket>,
    buffer: Vec<u8>,
    /// The transaction that is being read touches our table.
    touched: bool,
    /// What was written last, and how `nft` lists it.
    written: Option<(String, String)>,
    /// What the last look found, and when; none if it has to be looked at.
    seen: Option<(Option<String>, Instant)>,
}

impl Filter {
    /// In the network namespace of the calling thread.
    pub(super) fn new() -> Self {
        let monitor = match monitor() {
            Ok(socket) => Some(socket),
            Err(error) => {
                // A kernel without nftables: `nft` will say so when it is needed.
                tracing::debug!("cannot watch nftables: {error}");
                None
            }
        };
        Self { monitor, buffer: Vec::with_capacity(64 * 1024), touched: false, written: None, seen: None }
    }

    /// Becomes readable when somebody changes tables.
    pub(super) fn descriptor(&self) -> Option<RawFd> {
        self.monitor.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Replaces the table; gives whether somebody else changed it meanwhile.
    pub(super) fn replace(&mut self, wanted: &str) -> Result<bool> {
        self.written = None;
        self.seen = None;
        let done = run(&["-f", "-"], wanted);
        let pid = done.as_ref().map_or(0, |done| done.pid);
        let result = done.and_then(Done::check);
        if result.is_err() {
            self.changed_by_others(pid);
            return result.map(|_| false);
        }
        let listing = list()?;
        // Between the two somebody else may have been there: then the listing is not of our text.
        let disturbed = self.changed_by_others(pid);
        if let Some(listing) = listing.filter(|_| !disturbed) {
            self.written = Some((wanted.to_owned(), listing));
            self.seen = Some((Some(wanted.to_owned()), Instant::now()));
        }
        Ok(disturbed)
    }

    /// Deletes the table.
    pub(super) fn remove(&mut self) -> Result<()> {
        self.written = None;
        self.seen = None;
        // The first makes the second succeed where there is none.
        let done = run(&["-f", "-"], &format!("table inet {TABLE}\ndelete table inet {TABLE}\n"))?;
        self.changed_by_others(done.pid);
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

    /// Reads notifications; gives whether somebody changed our table.
    pub(super) fn drain(&mut self) -> bool {
        let changed = self.changed_by_others(0);
        if changed {
            self.seen = None;
        }
        changed
    }

    fn changed_by_others(&mut self, own: u32) -> bool {
        let Some(monitor) = &self.monitor else { return false };
        let mut changed = false;
        loop {
            self.buffer.clear();
            match monitor.recv(&mut self.buffer, nix::libc::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => {
                    changed = true;
                    continue;
                }
                Err(_) => return changed,
            }
            for message in messages(&self.buffer) {
                let [kind, subsystem] = message.kind.to_le_bytes();
                if subsystem != SUBSYSTEM {
                    continue;
                }
                if kind == NEW_GENERATION {
                    // Seen from another process namespace the process has another number than its
                    // socket, which is named after the number that it has for us.
                    let is_own = message.sender == own || process(&message) == Some(own);
                    changed |= self.touched && !is_own;
                    self.touched = false;
                } else {
                    self.touched |= is_ours(&message);
                }
            }
        }
    }
}

fn monitor() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind(&SocketAddr::new(0, 0))?;
    let size = 4 << 20;
    let _ = nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &size);
    socket.add_membership(NFNLGRP_NFTABLES)?;
    Ok(socket)
}

/// All objects name their table in their first attribute.
fn is_ours(message: &Message<'_>) -> bool {
    u8_at(message.payload, 0) == Some(NFPROTO_INET)
        && attributes(message.payload, 4).any(|(kind, value)| kind == 1 && text(value) == TABLE)
}

/// Who made a generation.
fn process(message: &Message<'_>) -> Option<u32> {
    let (_, value) = attributes(message.payload, 4).find(|(kind, _)| *kind == 2)?;
    Some(u32::from_be_bytes(value.try_into().ok()?))
}

/// How `nft` shows our table, without counters; none if there is none.
fn list() -> Result<Option<String>> {
    let done = run(&["-s", "-n", "list", "table", "inet", TABLE], "")?;
    if !done.success && done.errors.contains("No such file or directory") {
        return Ok(None);
    }
    done.check().map(Some)
}

/// What came of a run of `nft`.
#[derive(Debug)]
pub(super) struct Done {
    pid: u32,
    success: bool,
    output: String,
    errors: String,
}

impl Done {
    pub(super) fn check(self) -> Result<String> {
        if self.success {
            return Ok(self.output);
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
