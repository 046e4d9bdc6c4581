//! Paths of `ovld`, `ovlctl` and `ovl-cni`.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Result, anyhow, bail};

/// Returns the path at which a lab without further configuration finds `ovld`, `ovlctl` or `ovl-cni`.
pub fn find_binary(name: &str) -> Result<PathBuf> {
    find(name, None)
}

/// Finds the binary `name`: the configured path, else the environment variable of that name in upper case
/// (`OVL_CNI` for `ovl-cni`), else the file next to the current executable or in its parent directory (a
/// test's executable is in `target/debug/deps`), else in PATH.
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
            "no {name} next to {} or in PATH: build it (cargo build -p {name}), or set ${variable} to its path",
            executable.display()
        )
    })
}
