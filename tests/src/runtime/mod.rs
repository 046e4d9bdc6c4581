//! Real container runtimes on the hosts of a lab: Podman, containerd and Docker Engines. Each keeps everything in a
//! directory of its host, which is removed when the runtime is dropped. No image is pulled.

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

use crate::{SOON, create_network, start_lab_with};

/// Network in the CNI configuration of the runtimes.
pub const NETWORK: &str = "pods";

/// Number of log lines that a failed test prints.
const LOG_LINES: usize = 20;

/// Default port of the HTTP server in the image.
pub const PORT: u16 = 8080;

/// Starts a lab of two hosts and creates [`NETWORK`].
pub fn lab() -> Result<Lab> {
    let lab = start_lab_with(LabConfig::hosts(2).underlay(Underlay::Dual))?;
    create_network(&lab, NETWORK, &["--mode", "l3", "--subnet", "10.60.0.0/16", "--subnet", "fd60::/48"])?;
    Ok(lab)
}

/// Returns the path of a program, or an error that names its Debian package.
fn require_program(program: &str, package: &str) -> Result<PathBuf> {
    let candidates = ["/usr/bin", "/usr/sbin", "/usr/lib/cni"].map(|dir| Path::new(dir).join(program));
    candidates
        .into_iter()
        .find(|path| path.is_file())
        .with_context(|| format!("{program} is not installed: apt-get install {package} (tests/run does so)"))
}

/// A place where commands run: a container, a pod or a host.
pub trait CommandTarget {
    /// Its name in messages.
    fn called(&self) -> String;

    /// Runs a command, which must succeed, and returns its standard output.
    fn command(&self, words: &[&str]) -> Result<String>;

    /// Its global addresses on `eth0`, sorted, IPv4 first.
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

    /// Sends one ping. Fails if there is no reply.
    fn ping(&self, to: IpAddr) -> Result<()> {
        let path = || format!("ping from {} to {to}", self.called());
        self.command(&["busybox", "ping", "-c1", "-W2", &to.to_string()]).map(drop).with_context(path)
    }

    /// Connects over TCP to the image's HTTP server, and returns the source address that the server saw.
    fn http_source(&self, server: IpAddr, port: u16) -> Result<IpAddr> {
        let script =
            format!("printf 'GET /cgi-bin/peer HTTP/1.0\\r\\n\\r\\n' | busybox nc -w 3 {server} {port}");
        let answer = self
            .command(&["busybox", "sh", "-c", &script])
            .with_context(|| format!("TCP from {} to {server} port {port}", self.called()))?;
        let (_, body) =
            answer.split_once("\r\n\r\n").with_context(|| format!("not an HTTP response: {answer:?}"))?;
        let address = body.trim().trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        Ok(address.with_context(|| format!("{body:?} is not an address"))?.to_canonical())
    }
}

impl CommandTarget for Host {
    fn called(&self) -> String {
        self.name().to_owned()
    }

    fn command(&self, words: &[&str]) -> Result<String> {
        self.exec_ok(words)
    }
}

/// Waits for an HTTP response, and returns the source address that the server saw.
pub fn wait_http_source(from: &dyn CommandTarget, server: IpAddr, port: u16) -> Result<IpAddr> {
    wait_until(SOON, &format!("an HTTP response from {server} to {}", from.called()), || {
        from.http_source(server, port).map(Some)
    })
}

/// Checks ping and TCP to every address of a target, and that the target sees the source's own address (no NAT).
pub fn ensure_reaches(from: &dyn CommandTarget, to: &dyn CommandTarget) -> Result<()> {
    let (own, theirs) = (from.addresses()?, to.addresses()?);
    for server in theirs {
        wait_until(SOON, &format!("a ping reply to {} from {server}", from.called()), || from.ping(server))?;
        let seen = wait_http_source(from, server, PORT)?;
        ensure!(own.contains(&seen), "{} has {own:?}, and {server} saw {seen}", from.called());
    }
    Ok(())
}

/// The interfaces of a host before a runtime used it.
#[derive(Debug)]
pub struct HostSnapshot<'host> {
    host: &'host Host,
    interfaces: Vec<String>,
}

impl<'host> HostSnapshot<'host> {
    /// Takes the snapshot now.
    pub fn take(host: &'host Host) -> Result<Self> {
        Ok(HostSnapshot { host, interfaces: interfaces(host)? })
    }

    /// Waits until the host has no endpoint, the same interfaces as before, and no packet filter rule, route or
    /// neighbour with one of these addresses.
    pub fn wait_nothing_left(&self, addresses: &[IpAddr]) -> Result<()> {
        let host = self.host;
        wait_endpoint_count(host, 0)?;
        wait_until(SOON, &format!("the interfaces of {} as before", host.name()), || {
            let now = interfaces(host)?;
            ensure!(now == self.interfaces, "{now:?}, before {:?}", self.interfaces);
            Ok(())
        })?;
        wait_until(SOON, &format!("no trace of {addresses:?} on {}", host.name()), || {
            let left = traces(host, addresses)?;
            ensure!(left.is_empty(), "{left:?}");
            Ok(())
        })
    }
}

/// Lines with any of these addresses in a host's packet filter, routes and neighbour table.
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

/// Parses the address in a word of a tool's output, with or without a prefix length or port.
fn address_in(word: &str) -> Option<IpAddr> {
    let word = word.trim_matches(['{', '}', ';', '"']);
    let alone = word.split('/').next().unwrap_or(word);
    alone.parse().ok().or_else(|| word.parse::<SocketAddr>().ok().map(|at| at.ip()))
}

/// Waits until a host lists this number of endpoints, of all hosts.
pub fn wait_endpoint_count(host: &Host, count: usize) -> Result<()> {
    wait_until(SOON, &format!("{count} endpoints on {}", host.name()), || {
        let found = crate::endpoints(host)?;
        ensure!(found.len() == count, "{found:?}");
        Ok(())
    })
}

/// Interface names of a host, sorted.
fn interfaces(host: &Host) -> Result<Vec<String>> {
    let links = host.ip_json(&["link", "show"])?;
    let mut names: Vec<String> =
        links.as_array().into_iter().flatten().map(|link| crate::text(&link["ifname"])).collect();
    names.sort();
    Ok(names)
}

/// The directory of a runtime on its host. When it is dropped, mounts in it are unmounted and it is removed.
#[derive(Debug)]
struct RuntimeDir {
    host: Host,
    dir: PathBuf,
}

impl RuntimeDir {
    /// Creates the directory.
    fn new(host: &Host, name: &str) -> Result<Self> {
        let dir = host.dir().join(name);
        fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        Ok(RuntimeDir { host: host.clone(), dir })
    }

    /// Path of an entry, as text.
    fn path(&self, name: &str) -> String {
        self.dir.join(name).to_string_lossy().into_owned()
    }

    /// Writes a file in the directory.
    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path(name);
        fs::write(&path, text).with_context(|| format!("cannot write {path}"))
    }

    fn clean(&self) -> Result<()> {
        let mounts = fs::read_to_string("/proc/self/mounts").context("cannot list mounts")?;
        // Unmount the latest mount first: it may lie on an earlier one.
        for mount in mounts.lines().rev().filter_map(|line| line.split(' ').nth(1)) {
            if Path::new(mount).starts_with(&self.dir) {
                umount2(mount, MntFlags::MNT_DETACH).with_context(|| format!("cannot unmount {mount}"))?;
            }
        }
        fs::remove_dir_all(&self.dir).with_context(|| format!("cannot remove {}", self.dir.display()))
    }
}

impl Drop for RuntimeDir {
    fn drop(&mut self) {
        if thread::panicking() {
            let calls = fs::read_to_string(self.dir.join(cni::RECORD)).unwrap_or_default();
            eprintln!("--- {}: last plugin calls:\n{}", self.host.name(), tail(&calls));
        }
        if let Err(error) = self.clean() {
            eprintln!("{}: {error:#}", self.host.name());
        }
    }
}

/// The last [`LOG_LINES`] lines of a log.
fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
}

/// Returns the standard output of a command, or an error if it failed.
fn succeeded(output: Output, what: &str) -> Result<String> {
    let Output { status, stdout, stderr } = output;
    ensure!(status.success(), "`{what}` failed ({status}): {}{}", stdout.trim(), stderr.trim());
    Ok(stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_parsed_from_tool_output() {
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
    fn missing_program_error_names_its_package() {
        let error = require_program("no-such-program", "some-package").unwrap_err().to_string();
        assert!(
            error.contains("no-such-program") && error.contains("apt-get install some-package"),
            "{error}"
        );
    }
}
