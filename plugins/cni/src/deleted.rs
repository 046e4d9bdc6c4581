//! A `DEL` while ovld is unavailable: it succeeds, so that the runtime can go on, and is stored for ovld.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process;

use ovl_control::{CniCall, CniDeleted, CniError};

use crate::call;

/// The specification's "Invalid necessary environment variables".
const ENVIRONMENT: u32 = 4;
/// The specification's "I/O failure".
const IO: u32 = 5;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Stores the call for ovld.
pub(crate) fn store(call: &CniCall) -> Result<(), CniError> {
    let path = path(call).ok_or_else(|| {
        call::error(
            ENVIRONMENT,
            "the DEL does not identify an attachment",
            "CNI_CONTAINERID, CNI_IFNAME and the configuration's `name` must be set, without slashes, colons and a \
             leading dot",
        )
    })?;
    write(&path, call).map_err(|error| {
        let details = format!(
            "cannot write {}: {error}. Is ovld meant to run on this host, and does this plugin run as root?",
            path.display()
        );
        call::error(IO, "ovld is not running, and the DEL cannot be stored for it", &details)
    })
}

fn path(call: &CniCall) -> Option<PathBuf> {
    let network = call.config["name"].as_str().unwrap_or_default();
    let name = CniDeleted::file_name(network, &call.container_id, &call.ifname)?;
    Some(CniDeleted::dir(&call::socket(&call.config)).join(name))
}

/// Writes the file atomically. It is not synced to disk, because after a reboot neither it nor the container exists.
fn write(path: &Path, call: &CniCall) -> io::Result<()> {
    let boot_id = fs::read_to_string(BOOT_ID)?.trim().to_owned();
    let bytes = serde_json::to_vec(&CniDeleted { boot_id, call: call.clone() })?;
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
