//! Where `ovld`, `ovlctl` and `ovl-cni` are.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};

/// `ovld`, `ovlctl` or `ovl-cni`, where a lab without further configuration finds it.
pub fn find_binary(name: &str) -> Result<PathBuf> {
    find(name, None)
}

/// The binary `name`: what was configured, else the environment variable of that name in
/// capitals (`OVL_CNI` for `ovl-cni`), else the file beside the current executable (a test's is in `target/debug/deps`,
/// so its parent counts too), else PATH.
pub(crate) fn find(name: &str, configured: Option<&Path>) -> Result<PathBuf> {
    let variable = name.to_uppercase().replace('-', "_");
    let explicit = configured.map(Path::to_owned).or_else(|| env::var_os(&variable).map(PathBuf::from));
    if let Some(path) = explicit {
        if !path.is_file() {
            bail!("no {name} at {}: build it, or correct ${variable}", path.display());
        }
        return Ok(std::path::absolute(path)?);
    }

    let executable = env::current_exe()?;
    let beside = executable.ancestors().skip(1).take(2).map(Path::to_owned);
    let in_path: Vec<PathBuf> =
        env::var_os("PATH").map(|path| env::split_paths(&path).collect()).unwrap_or_default();
    beside.chain(in_path).map(|dir| dir.join(name)).find(|path| path.is_file()).ok_or_else(|| {
        anyhow!(
            "no {name} beside {} or in PATH: build it (cargo build -p {name}), or set ${variable} to its path",
            executable.display()
        )
    })
}
