//! The tunnels that ovl is compared with, and the sources of their programs.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use netns_lab::Spawned;

/// Cache directory in the build's output directory.
const CACHE: &str = "bench-peers";
/// Directories of Debian's programs.
const DEBIAN_DIRS: [&str; 2] = ["/usr/bin", "/usr/sbin"];

/// A userspace tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    /// Mullvad's WireGuard, built by `cargo install`
    Gotatun,
    /// Cloudflare's WireGuard, built by `cargo install`
    Boringtun,
    /// WireGuard's Go implementation, from Debian
    WireguardGo,
    /// From Debian
    Nebula,
    /// From Debian
    Tinc,
}

enum Source {
    /// A crate of crates.io, with the version of the published figures.
    Cargo { package: &'static str, version: &'static str, program: &'static str },
    /// A Debian package, in the distribution's version.
    Debian { package: &'static str, program: &'static str, version: &'static [&'static str] },
}

impl Peer {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Peer::Gotatun => "gotatun",
            Peer::Boringtun => "boringtun",
            Peer::WireguardGo => "wireguard-go",
            Peer::Nebula => "nebula",
            Peer::Tinc => "tinc",
        }
    }

    fn source(self) -> Source {
        match self {
            Peer::Gotatun => Source::Cargo { package: "gotatun-cli", version: "0.10.2", program: "gotatun" },
            Peer::Boringtun => {
                Source::Cargo { package: "boringtun-cli", version: "0.7.1", program: "boringtun-cli" }
            }
            Peer::WireguardGo => {
                Source::Debian { package: "wireguard-go", program: "wireguard-go", version: &["--version"] }
            }
            Peer::Nebula => Source::Debian { package: "nebula", program: "nebula", version: &["-version"] },
            Peer::Tinc => Source::Debian { package: "tinc", program: "tincd", version: &["--version"] },
        }
    }

    /// Finds the program. Builds a missing crate; installs a missing Debian package if `install` is set.
    fn find(self, install: bool) -> Result<Program> {
        match self.source() {
            Source::Cargo { package, version, program } => {
                let root = cache()?.join(format!("{package}-{version}"));
                let path = root.join("bin").join(program);
                if !path.is_file() {
                    cargo_install(package, version, &root)?;
                    ensure!(path.is_file(), "`cargo install {package}` did not create {}", path.display());
                }
                Ok(Program { path, version: format!("{} {version}", self.name()) })
            }
            Source::Debian { package, program, version } => {
                let find =
                    || DEBIAN_DIRS.iter().map(|dir| Path::new(dir).join(program)).find(|path| path.is_file());
                if find().is_none() && install {
                    apt_install(package)?;
                }
                let path = find().with_context(|| {
                    format!("no {program}: use `--install`, or `apt-get install {package}`")
                })?;
                let output = Command::new(&path).args(version).output()?;
                let text = String::from_utf8_lossy(&output.stdout);
                let line = text.lines().next().unwrap_or_default();
                Ok(Program { path, version: version_of(self.name(), line) })
            }
        }
    }
}

/// A peer's program.
#[derive(Clone, Debug)]
pub(crate) struct Program {
    pub(crate) path: PathBuf,
    /// Name and version, for the printed set-up.
    pub(crate) version: String,
}

/// A requested peer, with its program or the reason why there is none.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) peer: Peer,
    pub(crate) program: Result<Program, String>,
}

pub(crate) fn find(peers: &[Peer], install: bool) -> Vec<Found> {
    let find = |&peer: &Peer| {
        let program = peer.find(install).map_err(|error| format!("{error:#}"));
        if let Err(error) = &program {
            eprintln!("netns-lab: skipping {}: {error}", peer.name());
        }
        Found { peer, program }
    };
    peers.iter().map(find).collect()
}

/// A peer's process on one host. It is killed on drop.
pub(crate) struct End {
    pub(crate) process: Spawned,
    /// Its configuration socket, in a directory that all namespaces share.
    pub(crate) socket: Option<PathBuf>,
}

impl From<Spawned> for End {
    fn from(process: Spawned) -> Self {
        End { process, socket: None }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        if let Some(socket) = &self.socket {
            // Some peers delete it themselves.
            fs::remove_file(socket).ok();
        }
    }
}

/// Parses a program's version output, which may contain its name.
fn version_of(name: &str, line: &str) -> String {
    let number = line.split_whitespace().map(|word| word.trim_start_matches('v'));
    let number = number.into_iter().find(|word| word.starts_with(|first: char| first.is_ascii_digit()));
    format!("{name} {}", number.unwrap_or("of unknown version"))
}

/// Returns the cache directory in the build's output directory, which is two levels above this program.
fn cache() -> Result<PathBuf> {
    let program = env::current_exe().context("cannot find the path of this program")?;
    let target = program.ancestors().nth(2).context("this program is not in a build directory")?;
    Ok(target.join(CACHE))
}

fn cargo_install(package: &str, version: &str, root: &Path) -> Result<()> {
    eprintln!("netns-lab: building {package} {version} into {}, once ...", root.display());
    let mut command = Command::new("cargo");
    command.args(["install", "--quiet", "--locked", "--version", version, "--root"]).arg(root).arg(package);
    // The default target directory is temporary; with ours, the peer's large build output would stay.
    command.env_remove("CARGO_TARGET_DIR");
    run(command, &format!("cargo install {package}"))
}

fn apt_install(package: &str) -> Result<()> {
    eprintln!("netns-lab: installing Debian's {package} ...");
    let mut command = Command::new("apt-get");
    command.args(["install", "-y", "-q", "--no-install-recommends", package]);
    command.env("DEBIAN_FRONTEND", "noninteractive");
    run(command, &format!("apt-get install {package}")).context("if it is not found: `apt-get update` first")
}

/// Runs a command with its output on standard error, because standard output is for the table.
fn run(mut command: Command, shown: &str) -> Result<()> {
    command.stdin(Stdio::null()).stdout(std::io::stderr());
    let status = command.status().with_context(|| format!("cannot run `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` failed ({status}); see its output above");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_parsed() {
        assert_eq!(version_of("nebula", "Version: 1.6.1"), "nebula 1.6.1");
        assert_eq!(version_of("tinc", "tinc version 1.0.36"), "tinc 1.0.36");
        assert_eq!(version_of("wireguard-go", "wireguard-go v0.0.20220316"), "wireguard-go 0.0.20220316");
        assert_eq!(version_of("x", ""), "x of unknown version");
    }
}
