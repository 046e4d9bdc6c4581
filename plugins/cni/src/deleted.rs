//! A `DEL` while ovld is unavailable: it succeeds, so that the runtime can go on, and is stored for ovld.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

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

fn write(path: &Path, call: &CniCall) -> io::Result<()> {
    let boot_id = fs::read_to_string(BOOT_ID)?.trim().to_owned();
    CniDeleted { boot_id, call: call.clone() }.keep(path)
}
