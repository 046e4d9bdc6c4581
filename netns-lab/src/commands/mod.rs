//! The commands of `netns-lab`.

pub(crate) mod bench;
pub(crate) mod control;
pub(crate) mod exec;
pub(crate) mod fault;
pub(crate) mod nat;
pub(crate) mod pairs;
pub(crate) mod status;
pub(crate) mod updown;

use anyhow::{Result, bail};
use netns_lab::Lab;

/// Opens a lab to change it.
///
/// # Errors
///
/// If the lab belongs to a running test: two writers would overwrite each other's state.
pub(crate) fn open_to_change(name: &str) -> Result<Lab> {
    let lab = Lab::open(name)?;
    if let Some(owner) = lab.owner_pid() {
        bail!("lab {name} belongs to the running process {owner}: only status, exec and ctl work on it");
    }
    Ok(lab)
}
