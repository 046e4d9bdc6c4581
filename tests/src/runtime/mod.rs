//! Real container runtimes on a lab's hosts: Podman, containerd and Docker Engines, each with everything that is
//! its own below a directory of its host, which goes with its guard. Nothing is pulled.

mod cni;
mod containerd;
mod cri;
mod docker;
mod image;
mod podman;

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Output, Underlay, wait_until};
use nix::mount::{MntFlags, umount2};

pub use cni::{Call, Cni};
pub use containerd::{Containerd, Pod, PodOptions};
pub use docker::{Docker, DockerContainer};
pub use podman::{Container, Podman};

use crate::{SOON, make_network, started_with};

/// The network that the runtimes' CNI configuration names.
pub const NETWORK: &str = "pods";

/// How much of a log a failed test shows.
const LOG_LINES: usize = 20;

/// The port that the image's program serves on unless told otherwise.
pub const PORT: u16 = 8080;

/// A lab of two hosts, and the network that the runtimes' configuration names.
pub fn lab() -> Result<Lab> {
    let lab = started_with(LabConfig::hosts(2).underlay(Underlay::Dual))?;
    make_network(&lab, NETWORK, &["--mode", "l3", "--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"])?;
    Ok(lab)
}

/// Fails unless the program is there, with the package that has it.
fn need(program: &str, package: &str) -> Result<PathBuf> {
    let candidates = ["/usr/bin", "/usr/sbin", "/usr/lib/cni"].map(|dir| Path::new(dir).join(program));
    candidates.into_iter().find(|path| path.is_file()).with_context(|| {
        format!("no {program} on this machine: apt-get install {package} (tests/run does so)")
    })
}

/// Somewhere that commands run: in a container, in a pod, on a host.
pub trait Place {
    /// What it is called in messages.
    fn called(&self) -> String;

    /// Runs a command that must succeed, and gives its standard output.
    fn command(&self, words: &[&str]) -> Result<String>;

    /// The addresses that it sees for itself on `eth0`, IPv4 first.
    fn addresses(&self) -> Result<Vec<IpAddr>> {
        let text = self.command(&["busybox", "ip", "-o", "addr", "show", "dev", "eth0"])?;
        let mut found: Vec<IpAddr> = text
            .lines()
            .filter(|line| line.contains("scope global"))
            .filter_map(|line| line.split_whitespace().find_map(|word| word.split_once('/')?.0.parse().ok()))
            .collect();
        found.sort();
        ensure!(!found.is_empty(), "{} has no address: {text}", self.called());
        Ok(found)
    }

    /// Whether a ping is answered.
    fn ping(&self, to: IpAddr) -> Result<()> {
        let way = || format!("ping from {} to {to}", self.called());
        self.command(&["busybox", "ping", "-c1", "-W2", &to.to_string()]).map(drop).with_context(way)
    }

    /// Connects over TCP to the image's program, which tells where the connection came from.
    fn seen_from(&self, server: IpAddr, port: u16) -> Result<IpAddr> {
        let script =
            format!("printf 'GET /cgi-bin/peer HTTP/1.0\\r\\n\\r\\n' | busybox nc -w 3 {server} {port}");
        let answer = self
            .command(&["busybox", "sh", "-c", &script])
            .with_context(|| format!("TCP from {} to {server} port {port}", self.called()))?;
        let (_, told) = answer.split_once("\r\n\r\n").with_context(|| format!("no answer: {answer:?}"))?;
        let address = told.trim().trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        Ok(address.with_context(|| format!("{told:?} is no address"))?.to_canonical())
    }
}

impl Place for Host {
    fn called(&self) -> String {
        self.name().to_owned()
    }

    fn command(&self, words: &[&str]) -> Result<String> {
        self.exec_ok(words)
    }
}

/// Waits for an answer over TCP, and gives the address that the connection came from.
pub fn answered(from: &dyn Place, server: IpAddr, port: u16) -> Result<IpAddr> {
    wait_until(SOON, &format!("an answer to {}", from.called()), || from.seen_from(server, port).map(Some))
}

/// Pings and TCP from one to the other, over all its addresses: it is seen there under the very
/// addresses that it sees for itself.
pub fn reaches(from: &dyn Place, to: &dyn Place) -> Result<()> {
    let (own, theirs) = (from.addresses()?, to.addresses()?);
    for server in theirs {
        wait_until(SOON, &format!("an answer to {} from {server}", from.called()), || from.ping(server))?;
        let seen = answered(from, server, PORT)?;
        ensure!(own.contains(&seen), "{} has {own:?}, and {server} saw {seen}", from.called());
    }
    Ok(())
}

/// What a host had before a runtime used it.
#[derive(Debug)]
pub struct Before<'host> {
    host: &'host Host,
    interfaces: Vec<String>,
}

impl<'host> Before<'host> {
    /// Looks now.
    pub fn of(host: &'host Host) -> Result<Self> {
        Ok(Before { host, interfaces: interfaces(host)? })
    }

    /// Waits until the host has no endpoint, no interface more than before, and nothing in its rules,
    /// routes and neighbours of these addresses.
    pub fn wait_nothing_left(&self, addresses: &[IpAddr]) -> Result<()> {
        let host = self.host;
        wait_endpoint_count(host, 0)?;
        wait_until(SOON, &format!("the interfaces of {} as before", host.name()), || {
            let now = interfaces(host)?;
            ensure!(now == self.interfaces, "{now:?}, before {:?}", self.interfaces);
            Ok(())
        })?;
        wait_until(SOON, &format!("nothing of {addresses:?} on {}", host.name()), || {
            let left = traces(host, addresses)?;
            ensure!(left.is_empty(), "{left:?}");
            Ok(())
        })
    }
}

/// The lines with any of these addresses in a host's packet filters, routes and neighbours.
pub fn traces(host: &Host, addresses: &[IpAddr]) -> Result<Vec<String>> {
    let is_of_these = |word: &str| address_in(word).is_some_and(|found| addresses.contains(&found));
    let mut lines = Vec::new();
    for command in [
        &["nft", "list", "ruleset"][..],
        &["ip", "route", "show", "table", "all"],
        &["ip", "-6", "route", "show", "table", "all"],
        &["ip", "neigh", "show", "nud", "all"],
    ] {
        let text = host.exec_ok(command)?;
        let found = text.lines().filter(|line| line.split([' ', ',', '\t']).any(is_of_these));
        lines.extend(found.map(|line| line.trim().to_owned()));
    }
    Ok(lines)
}

/// The address that a word of a tool's output has, with a prefix length or a port or without.
fn address_in(word: &str) -> Option<IpAddr> {
    let word = word.trim_matches(['{', '}', ';', '"']);
    let alone = word.split('/').next().unwrap_or(word);
    alone.parse().ok().or_else(|| word.parse::<SocketAddr>().ok().map(|at| at.ip()))
}

/// Waits until a host lists that many endpoints, of all hosts.
pub fn wait_endpoint_count(host: &Host, count: usize) -> Result<()> {
    wait_until(SOON, &format!("{count} endpoints on {}", host.name()), || {
        let found = crate::endpoints(host)?;
        ensure!(found.len() == count, "{found:?}");
        Ok(())
    })
}

/// The names of a host's interfaces.
fn interfaces(host: &Host) -> Result<Vec<String>> {
    let links = host.ip_json(&["link", "show"])?;
    let mut names: Vec<String> =
        links.as_array().into_iter().flatten().map(|link| crate::text(&link["ifname"])).collect();
    names.sort();
    Ok(names)
}

/// A runtime's directory on its host. What is mounted in it is unmounted with it.
#[derive(Debug)]
struct Home {
    host: Host,
    dir: PathBuf,
}

impl Home {
    /// Makes the directory.
    fn new(host: &Host, name: &str) -> Result<Self> {
        let dir = host.dir().join(name);
        fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Home { host: host.clone(), dir })
    }

    /// A path in it, as text.
    fn path(&self, name: &str) -> String {
        self.dir.join(name).to_string_lossy().into_owned()
    }

    /// Writes a file into it.
    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path(name);
        fs::write(&path, text).with_context(|| format!("cannot write {path}"))
    }

    fn clean(&self) -> Result<()> {
        let mounts = fs::read_to_string("/proc/self/mounts").context("cannot list mounts")?;
        // The latest first: it may lie on an earlier one.
        for mount in mounts.lines().rev().filter_map(|line| line.split(' ').nth(1)) {
            if Path::new(mount).starts_with(&self.dir) {
                umount2(mount, MntFlags::MNT_DETACH).with_context(|| format!("cannot unmount {mount}"))?;
            }
        }
        fs::remove_dir_all(&self.dir).with_context(|| format!("cannot remove {}", self.dir.display()))
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        if thread::panicking() {
            let calls = fs::read_to_string(self.dir.join(cni::RECORD)).unwrap_or_default();
            eprintln!("--- {}: the last calls of the plugin:\n{}", self.host.name(), tail(&calls));
        }
        if let Err(error) = self.clean() {
            eprintln!("{}: {error:#}", self.host.name());
        }
    }
}

/// The last lines of a log.
fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}

/// The standard output of a command that must have succeeded.
fn succeeded(output: Output, what: &str) -> Result<String> {
    let Output { status, stdout, stderr } = output;
    ensure!(status.success(), "`{what}` failed ({status}): {}{}", stdout.trim(), stderr.trim());
    Ok(stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_found_in_what_tools_print() {
        let v4 = Some("10.60.0.5".parse().unwrap());
        let v6 = Some("fd60::5".parse().unwrap());
        for word in ["10.60.0.5", "10.60.0.5/32", "10.60.0.5:8080", "{10.60.0.5", "10.60.0.5;"] {
            assert_eq!(address_in(word), v4, "{word}");
        }
        for word in ["fd60::5", "fd60::5/128", "[fd60::5]:8080", "\"fd60::5\""] {
            assert_eq!(address_in(word), v6, "{word}");
        }
        for word in ["", "dport", "8080", "eth0", "10.60.0", "02:00:00:00:00:01"] {
            assert_eq!(address_in(word), None, "{word}");
        }
    }

    #[test]
    fn a_program_that_is_missing_is_named_with_its_package() {
        let error = need("no-such-program", "some-package").unwrap_err().to_string();
        assert!(
            error.contains("no-such-program") && error.contains("apt-get install some-package"),
            "{error}"
        );
    }
}
