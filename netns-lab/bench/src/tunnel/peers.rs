//! The systems that ovl's tunnel is held against: which there are, and where their programs come from.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use netns_lab::Spawned;

/// Beside the build's other output, so that it goes with it.
const CACHE: &str = "bench-peers";
/// Where Debian puts them.
const DEBIAN_DIRS: [&str; 2] = ["/usr/bin", "/usr/sbin"];

/// An encrypted tunnel in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    /// Mullvad's WireGuard, built by `cargo install`
    Gotatun,
    /// Cloudflare's WireGuard, built by `cargo install`
    Boringtun,
    /// WireGuard's own, of Debian
    WireguardGo,
    /// Of Debian
    Nebula,
    /// Of Debian
    Tinc,
}

enum Source {
    /// A package of the registry, and the version that figures are known of.
    Cargo { package: &'static str, version: &'static str, program: &'static str },
    /// A package of Debian's, whatever version that has.
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

    /// The program, built if it comes from the registry and is not there, installed if it is Debian's and that was
    /// asked for.
    fn find(self, install: bool) -> Result<Program> {
        match self.source() {
            Source::Cargo { package, version, program } => {
                let root = cache()?.join(format!("{package}-{version}"));
                let path = root.join("bin").join(program);
                if !path.is_file() {
                    cargo_install(package, version, &root)?;
                    ensure!(path.is_file(), "`cargo install {package}` made no {}", path.display());
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
                    format!("no {program}: `--install` gets it, or `apt-get install {package}`")
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
    /// With its name, for the set-up that is printed.
    pub(crate) version: String,
}

/// A peer that was asked for, and its program or why there is none.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    pub(crate) peer: Peer,
    pub(crate) program: Result<Program, String>,
}

pub(crate) fn find(peers: &[Peer], install: bool) -> Vec<Found> {
    let find = |&peer: &Peer| {
        let program = peer.find(install).map_err(|error| format!("{error:#}"));
        if let Err(error) = &program {
            eprintln!("netns-lab: {} is left out: {error}", peer.name());
        }
        Found { peer, program }
    };
    peers.iter().map(find).collect()
}

/// A peer on one host; it ends when this is dropped.
pub(crate) struct End {
    pub(crate) process: Spawned,
    /// By which it was configured, in a directory that all namespaces share.
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
            // Not all of them leave it there.
            fs::remove_file(socket).ok();
        }
    }
}

/// What a program says of its version: with its name or without.
fn version_of(name: &str, line: &str) -> String {
    let number = line.split_whitespace().map(|word| word.trim_start_matches('v'));
    let number = number.into_iter().find(|word| word.starts_with(|first: char| first.is_ascii_digit()));
    format!("{name} {}", number.unwrap_or("of unknown version"))
}

/// In the directory of the build's output, which is two above this program.
fn cache() -> Result<PathBuf> {
    let program = env::current_exe().context("cannot find the program that runs")?;
    let target = program.ancestors().nth(2).context("this program is in no build directory")?;
    Ok(target.join(CACHE))
}

fn cargo_install(package: &str, version: &str, root: &Path) -> Result<()> {
    eprintln!("netns-lab: building {package} {version} into {}, once ...", root.display());
    let mut command = Command::new("cargo");
    command.args(["install", "--quiet", "--locked", "--version", version, "--root"]).arg(root).arg(package);
    // Its own would stay there as large as ovl's; the default is a directory that goes afterwards.
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

/// Its output is for whoever waits; standard output is the table's.
fn run(mut command: Command, shown: &str) -> Result<()> {
    command.stdin(Stdio::null()).stdout(std::io::stderr());
    let status = command.status().with_context(|| format!("cannot run `{shown}`"))?;
    if !status.success() {
        bail!("`{shown}` failed ({status}); what it wrote is above");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(version_of("nebula", "Version: 1.6.1"), "nebula 1.6.1");
        assert_eq!(version_of("tinc", "tinc version 1.0.36"), "tinc 1.0.36");
        assert_eq!(version_of("wireguard-go", "wireguard-go v0.0.20220316"), "wireguard-go 0.0.20220316");
        assert_eq!(version_of("x", ""), "x of unknown version");
    }
}
