//! A CNI plugin, run as by a container runtime: a process for each call, the request in its environment and
//! on its standard input, the result on its standard output.

use std::env;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use netns_lab::{Netns, Workload, without_prefix_length};
use serde_json::Value;

/// CNI version of all calls: the latest that the reference plugins of Debian 12 support.
pub(crate) const CNI_VERSION: &str = "1.0.0";
/// Name of the pod's interface.
const INTERFACE: &str = "eth0";

/// A CNI command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    Add,
    Del,
    Version,
}

impl Verb {
    pub(crate) fn text(self) -> &'static str {
        match self {
            Verb::Add => "ADD",
            Verb::Del => "DEL",
            Verb::Version => "VERSION",
        }
    }
}

/// A container and its namespace.
#[derive(Clone, Debug)]
pub(crate) struct Pod {
    id: String,
    netns: String,
}

impl Pod {
    /// Returns a container with a new id, in a namespace that may have been used by another one.
    pub(crate) fn new(workload: &Workload) -> Self {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        Pod {
            id: container_id(SERIAL.fetch_add(1, Ordering::Relaxed)),
            netns: workload.path_str().to_owned(),
        }
    }

    pub(crate) fn all(workloads: &[Workload]) -> Vec<Pod> {
        workloads.iter().map(Pod::new).collect()
    }
}

/// Generates a container id: 64 hexadecimal digits that differ from the first one on, as those of runtimes.
/// Plugins derive device names from them.
fn container_id(serial: u64) -> String {
    // The finaliser of splitmix64: every input bit affects half of the output bits.
    let mix = |number: u64| {
        let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        number ^ (number >> 31)
    };
    (1..=4).map(|part| format!("{:016x}", mix(serial.wrapping_mul(4).wrapping_add(part)))).collect()
}

/// A plugin with its configuration on a host.
#[derive(Clone, Debug)]
pub(crate) struct Plugin {
    pub(crate) host: Netns,
    pub(crate) program: PathBuf,
    /// Directory of the plugins that it calls (`CNI_PATH`).
    pub(crate) dir: PathBuf,
    /// Network configuration, passed on standard input.
    pub(crate) config: Value,
}

/// The result of a successful call.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    /// Time from before the process starts until it has exited and its output is read.
    pub(crate) took: Duration,
    stdout: Vec<u8>,
}

/// The result of a call that may fail.
#[derive(Clone, Debug)]
pub(crate) enum Reply {
    Done(Answer),
    /// The error that the plugin printed as CNI specifies.
    Refused(String),
}

impl Plugin {
    /// Runs a closure in a thread on the host. All calls of the plugin must be in the closure, because a
    /// process inherits the namespace of the thread that starts it.
    pub(crate) fn on_host<T: Send>(&self, closure: impl FnOnce(&Caller) -> Result<T> + Send) -> Result<T> {
        let caller = Caller { plugin: self, input: self.config.to_string() };
        self.host.run(move || closure(&caller))?
    }
}

/// A caller of the plugin in a thread on the host.
pub(crate) struct Caller<'a> {
    plugin: &'a Plugin,
    input: String,
}

impl Caller<'_> {
    /// Makes a call that must succeed.
    pub(crate) fn call(&self, verb: Verb, pod: &Pod) -> Result<Answer> {
        match self.ask(verb, pod)? {
            Reply::Done(answer) => Ok(answer),
            Reply::Refused(error) => bail!("{} of {} failed: {error}", verb.text(), self.name()),
        }
    }

    /// Makes a call that may fail. A failure without an error as CNI specifies it is an error of this
    /// function.
    pub(crate) fn ask(&self, verb: Verb, pod: &Pod) -> Result<Reply> {
        let mut command = Command::new(&self.plugin.program);
        command
            .env_clear()
            .env("PATH", env::var_os("PATH").unwrap_or_default())
            .env("CNI_COMMAND", verb.text())
            .env("CNI_CONTAINERID", &pod.id)
            .env("CNI_NETNS", &pod.netns)
            .env("CNI_IFNAME", INTERFACE)
            .env("CNI_PATH", &self.plugin.dir);
        let (took, output) = timed(command, &self.input)
            .with_context(|| format!("cannot run {}", self.plugin.program.display()))?;
        if output.status.success() {
            return Ok(Reply::Done(Answer { took, stdout: output.stdout }));
        }
        match refusal(&output.stdout) {
            Some(error) => Ok(Reply::Refused(error)),
            None => bail!(
                "{} of {} exited with {} without a CNI error; output: {}{}",
                verb.text(),
                self.name(),
                output.status,
                String::from_utf8_lossy(&output.stdout).trim(),
                String::from_utf8_lossy(&output.stderr).trim()
            ),
        }
    }

    fn name(&self) -> String {
        let name = self.plugin.program.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }
}

/// Runs a command with text on its standard input, and measures its time. The standard library starts it with
/// `posix_spawn`, whose cost does not depend on the size of this process.
pub(crate) fn timed(mut command: Command, input: &str) -> Result<(Duration, Output)> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn()?;
    if let Some(mut pipe) = child.stdin.take() {
        // The input is smaller than a pipe's buffer, so this does not block. If the process exits without
        // reading it, its status and its output show that.
        pipe.write_all(input.as_bytes()).ok();
    }
    let output = child.wait_with_output()?;
    Ok((start.elapsed(), output))
}

/// Parses the error that a plugin prints on standard output. `None` if it is not a CNI error.
fn refusal(stdout: &[u8]) -> Option<String> {
    let error: Value = serde_json::from_slice(stdout).ok()?;
    let (code, message) = (error["code"].as_u64()?, error["msg"].as_str()?);
    let details = error["details"].as_str().filter(|details| !details.is_empty());
    Some(details.map_or_else(
        || format!("code {code}: {message}"),
        |details| format!("code {code}: {message} ({details})"),
    ))
}

impl Answer {
    /// Returns the first address of ADD's result.
    pub(crate) fn address(&self) -> Result<std::net::IpAddr> {
        let text = String::from_utf8_lossy(&self.stdout);
        let result: Value =
            serde_json::from_slice(&self.stdout).with_context(|| format!("ADD printed no JSON: {text}"))?;
        ensure!(result["cniVersion"] == CNI_VERSION, "ADD's result is not of version {CNI_VERSION}: {text}");
        let address =
            result["ips"][0]["address"].as_str().with_context(|| format!("no address in {text}"))?;
        without_prefix_length(address).parse().with_context(|| format!("invalid address {address:?}"))
    }

    /// Returns the versions of VERSION's result.
    pub(crate) fn versions(&self) -> Result<Vec<String>> {
        let result: Value = serde_json::from_slice(&self.stdout).context("VERSION printed no JSON")?;
        let versions = result["supportedVersions"].as_array().context("no supportedVersions")?;
        Ok(versions.iter().filter_map(|version| version.as_str().map(str::to_owned)).collect())
    }
}

/// Returns the directory of a program.
pub(crate) fn dir_of(program: &Path) -> PathBuf {
    program.parent().map(Path::to_owned).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn answer(text: &str) -> Answer {
        Answer { took: Duration::ZERO, stdout: text.as_bytes().to_vec() }
    }

    #[test]
    fn container_ids_differ_in_their_first_digits() {
        let ids: BTreeSet<String> = (0..10_000).map(container_id).collect();
        assert_eq!(ids.len(), 10_000);
        assert!(ids.iter().all(|id| id.len() == 64 && id.bytes().all(|digit| digit.is_ascii_hexdigit())));
        let beginnings: BTreeSet<&str> = ids.iter().map(|id| &id[..11]).collect();
        assert_eq!(beginnings.len(), 10_000, "device names are derived from the ids");
    }

    #[test]
    fn results_are_parsed() {
        let result = r#"{"cniVersion":"1.0.0","ips":[{"address":"10.60.3.4/32"},{"address":"fd00::1/128"}]}"#;
        assert_eq!(answer(result).address().unwrap().to_string(), "10.60.3.4");
        for wrong in ["", "{}", r#"{"cniVersion":"0.3.1","ips":[{"address":"10.60.3.4/32"}]}"#] {
            assert!(answer(wrong).address().is_err(), "{wrong}");
        }
        let versions = answer(r#"{"cniVersion":"1.1.0","supportedVersions":["0.3.1","1.1.0"]}"#);
        assert_eq!(versions.versions().unwrap(), ["0.3.1", "1.1.0"]);
        assert!(answer(r#"{"cniVersion":"1.1.0"}"#).versions().is_err());
    }

    #[test]
    fn errors_are_parsed_as_specified() {
        let read = |text: &str| refusal(text.as_bytes());
        assert_eq!(read(r#"{"cniVersion":"1.0.0","code":7,"msg":"bad"}"#).unwrap(), "code 7: bad");
        assert_eq!(read(r#"{"code":11,"msg":"full","details":"wait"}"#).unwrap(), "code 11: full (wait)");
        assert_eq!(read("panicked"), None);
        assert_eq!(read(r#"{"msg":"no code"}"#), None);
    }
}
