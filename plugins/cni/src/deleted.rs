//! A `DEL` without ovld: it succeeds, for the runtime must be able to go on, and waits on disk.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process;

use ovl_control::{CniCall, CniDeleted, CniError};

use crate::call;

/// "Invalid necessary environment variables".
const ENVIRONMENT: u32 = 4;
/// "I/O failure".
const IO: u32 = 5;

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Puts the call where ovld finds it.
pub(crate) fn remember(call: &CniCall) -> Result<(), CniError> {
    let path = path(call).ok_or_else(|| {
        call::error(
            ENVIRONMENT,
            "this DEL names no attachment",
            "CNI_CONTAINERID, CNI_IFNAME and the configuration's `name` must be there, without slashes, colons and a \
             leading dot",
        )
    })?;
    write(&path, call).map_err(|error| {
        let details = format!(
            "writing {}: {error}. Is ovld to run here at all, and this plugin as root?",
            path.display()
        );
        call::error(IO, "ovld is not running, and the DEL cannot be remembered", &details)
    })
}

fn path(call: &CniCall) -> Option<PathBuf> {
    let network = call.config["name"].as_str().unwrap_or_default();
    let name = CniDeleted::file_name(network, &call.container_id, &call.ifname)?;
    Some(CniDeleted::dir(&call::socket(&call.config)).join(name))
}

/// All or nothing. It ends with the kernel, as the container does, so no disk is waited for.
fn write(path: &Path, call: &CniCall) -> io::Result<()> {
    let boot_id = fs::read_to_string(BOOT_ID)?.trim().to_owned();
    let bytes = serde_json::to_vec(&CniDeleted { boot_id, call: call.clone() })?;
    let dir = path.parent().unwrap_or(Path::new("/"));
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    // Hidden, so that ovld does not take it before it is whole.
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = dir.join(format!(".{name}.{}", process::id()));
    let write = || {
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)?
            .write_all(&bytes)?;
        fs::rename(&beside, path)
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&beside);
    })
}
