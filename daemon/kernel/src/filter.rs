//! The base nftables table, written and read by `nft`.

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

/// The maximum run time of `nft`.
const NFT_TIMEOUT: Duration = Duration::from_secs(10);

/// A dump lists the table after a change by another program, and otherwise after this time.
const MAX_AGE: Duration = Duration::from_secs(30);

/// The text of a table in a dump that ovl did not write: it differs from every desired text.
const UNKNOWN: &str = "unknown";

/// The state of the table as far as it is known.
#[derive(Debug, Default)]
pub(super) struct Filter {
    /// The text that was written last, and how `nft` lists it.
    written: Option<(String, String)>,
    /// The text that was found last, and when; `None` if the table must be listed again.
    seen: Option<(Option<String>, Instant)>,
}

impl Filter {
    /// Replaces the table. `watch` reports changes by other programs meanwhile.
    pub(super) fn replace(&mut self, wanted: &str, watch: &mut Watch) -> Result<()> {
        self.written = None;
        self.seen = None;
        let done = run(&["-f", "-"], wanted);
        let pid = done.as_ref().map_or(0, |done| done.pid);
        let result = done.and_then(NftRun::check);
        if result.is_err() {
            watch.drain(pid);
            return result.map(drop);
        }
        let listing = list()?;
        // If another program changed the table between the two runs, the listing is not of the written text.
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
        // The first command creates the table if it is absent, so that the second succeeds.
        let done = run(&["-f", "-"], &format!("table inet {BASE_TABLE}\ndelete table inet {BASE_TABLE}\n"))?;
        watch.drain(done.pid);
        done.check().map(drop)
    }

    /// The text that created the table, or [`UNKNOWN`] if another program or process wrote it. `None` if there is no
    /// table.
    pub(super) fn current(&mut self) -> Result<Option<String>> {
        if let Some((seen, at)) = &self.seen
            && at.elapsed() < MAX_AGE
        {
            return Ok(seen.clone());
        }
        let current = match (list(), &self.written) {
            // The table cannot be present. An operation that needs it will report the missing `nft` or nftables.
            (
                Err(
                    KernelError::MissingProgram(_) | KernelError::MissingFeature { .. } | KernelError::Nft(_),
                ),
                None,
            ) => None,
            (listing, written) => listing?.map(|listing| match written {
                Some((text, ours)) if *ours == listing => text.clone(),
                _ => UNKNOWN.to_owned(),
            }),
        };
        self.seen = Some((current.clone(), Instant::now()));
        Ok(current)
    }

    /// Notes that another program has changed the table, or may have.
    pub(super) fn touched(&mut self) {
        self.seen = None;
    }
}

/// Lists the table with `nft`, without counters and what packets added. `None` if there is no table.
fn list() -> Result<Option<String>> {
    let done = run(&["-s", "-n", "list", "table", "inet", BASE_TABLE], "")?;
    if !done.success && done.errors.contains("No such file or directory") {
        return Ok(None);
    }
    done.check().map(|listing| Some(without_added(&listing)))
}

/// Removes the elements of dynamic sets, which packets add, from a listing of `nft`. The elements of a set are its last part,
/// after its flags.
fn without_added(listing: &str) -> String {
    let mut kept = String::with_capacity(listing.len());
    let mut dynamic = false;
    for line in listing.lines() {
        if let Some(flags) = line.strip_prefix("\t\tflags ") {
            dynamic = flags.split(',').any(|flag| flag == "dynamic");
        } else if line == "\t}" {
            dynamic = false;
        } else if dynamic && (line.starts_with("\t\telements = ") || line.starts_with("\t\t\t")) {
            continue;
        }
        kept.push_str(line);
        kept.push('\n');
    }
    kept
}

/// The result of a run of `nft`.
#[derive(Debug)]
pub(super) struct NftRun {
    pub(super) pid: u32,
    success: bool,
    output: String,
    errors: String,
}

impl NftRun {
    /// The output of a successful run.
    ///
    /// # Errors
    ///
    /// [`KernelError::MissingFeature`] if the kernel has no nftables, otherwise [`KernelError::Nft`].
    pub(super) fn check(self) -> Result<String> {
        if self.success {
            return Ok(self.output);
        }
        // The messages of nft if the kernel has no nftables or no nfnetlink.
        if ["cache initialization failed", "initialize Netlink socket"]
            .iter()
            .any(|no| self.errors.contains(no))
        {
            return Err(KernelError::MissingFeature { feature: "nftables", module: "nf_tables" });
        }
        Err(KernelError::Nft(format!("nft rejected the ruleset: {}", self.errors.trim())))
    }
}

/// Runs `nft` with `input` as its standard input.
pub(super) fn run(arguments: &[&str], input: &str) -> Result<NftRun> {
    try_run(arguments, input).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => KernelError::MissingProgram("nft".to_owned()),
        _ => KernelError::Nft(format!("cannot run nft: {error}")),
    })
}

fn try_run(arguments: &[&str], input: &str) -> io::Result<NftRun> {
    // A memfd holds input of any length. A pipe would need a thread that writes it.
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
    let read = read_both(&mut child, Instant::now() + NFT_TIMEOUT);
    if read.is_err() {
        let _ = child.kill();
    }
    let status = child.wait()?;
    let (output, errors) = read?;
    Ok(NftRun {
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
                format!("it did not exit within {} s", NFT_TIMEOUT.as_secs()),
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

/// Reads once. At the end of the stream it is dropped.
fn read_some(stream: &mut Option<impl Read>, to: &mut Vec<u8>) -> io::Result<()> {
    let Some(open) = stream else { return Ok(()) };
    let mut chunk = [0; 16 * 1024];
    match open.read(&mut chunk)? {
        0 => *stream = None,
        length => to.extend_from_slice(chunk.get(..length).unwrap_or_default()),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_packets_added_is_not_compared() {
        let listing = |added: &str| {
            format!(
                "table inet ovl {{\n\tset vteps4 {{\n\t\ttype ipv4_addr\n\t\telements = {{ 192.0.2.2,\n\t\t\t     \
                 192.0.2.3 }}\n\t}}\n\n\tset paths4 {{\n\t\ttypeof iif . ip saddr\n\t\tflags dynamic,timeout\n{added}\t}}\n\n\
                 \tset ports {{\n\t\ttype inet_service\n\t\telements = {{ 80 }}\n\t}}\n}}\n"
            )
        };
        let two = "\t\telements = { \"eth0\" . 192.0.2.2,\n\t\t\t     \"eth1\" . 192.0.2.2 }\n";
        assert_eq!(without_added(&listing(two)), listing(""));
        assert_eq!(without_added(&listing("")), listing(""));
    }
}
