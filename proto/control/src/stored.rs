//! Files in which a plugin stores a call for ovld while that is unavailable: one file for each call.
//!
//! A file is written atomically. It is not synced to disk, because after a reboot neither it nor the container that it
//! is about exists.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::process;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::MAX_REQUEST;

/// The maximum length of a file in bytes: a request with what is stored beside it.
const MAX_FILE: u64 = 2 * MAX_REQUEST as u64;

/// Writes a file that only its owner may read, and its directory.
///
/// # Errors
///
/// If the directory or the file cannot be written.
pub(crate) fn write(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let bytes = serde_json::to_vec(value)?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    // Hidden, so that ovld does not read an incomplete file.
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = dir.join(format!(".{name}.{}", process::id()));
    let write = || {
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?
            .write_all(&bytes)?;
        fs::rename(&temporary, path)
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

/// Reads a file.
///
/// # Errors
///
/// If it cannot be read, or is not what was written.
pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE).read_to_end(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}
