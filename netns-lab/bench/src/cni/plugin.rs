//! A CNI plugin, run as a container runtime runs it: a process for each call, the question in its
//! environment and on its standard input, the answer on its standard output.

use std::env;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use netns_lab::{Netns, Workload, without_prefix_length};
use serde_json::Value;

/// The version of the specification that both sides are asked for: the reference plugins of
/// Debian 12 know no later one.
pub(crate) const CNI_VERSION: &str = "1.0.0";
/// The pod's interface.
const INTERFACE: &str = "eth0";

/// What a plugin is asked.
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

/// A container and the namespace that was made for it.
#[derive(Clone, Debug)]
pub(crate) struct Pod {
    id: String,
    netns: String,
}

impl Pod {
    /// A container that never was before, in a namespace that may have served another one.
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

/// 64 hexadecimal digits that differ from the first one on, as runtimes make them: plugins cut
/// names of devices out of them.
fn container_id(serial: u64) -> String {
    // The finaliser of splitmix64: every bit of the number changes half of the result's.
    let mix = |number: u64| {
        let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        number ^ (number >> 31)
    };
    (1..=4).map(|part| format!("{:016x}", mix(serial.wrapping_mul(4).wrapping_add(part)))).collect()
}

/// A plugin with its configuration, on a host.
#[derive(Clone, Debug)]
pub(crate) struct Plugin {
    pub(crate) host: Netns,
    pub(crate) program: PathBuf,
    /// Where it finds the plugins that it calls.
    pub(crate) dir: PathBuf,
    /// What it gets on standard input.
    pub(crate) config: Value,
}

/// A call that succeeded.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    /// From before the process is made until its end is known and all it wrote is read.
    pub(crate) took: Duration,
    stdout: Vec<u8>,
}

/// What came of a call that a plugin may refuse.
#[derive(Clone, Debug)]
pub(crate) enum Reply {
    Done(Answer),
    /// The error as the specification wants it on standard output.
    Refused(String),
}

impl Plugin {
    /// Runs a closure in a thread on the host: whatever calls the plugin must be in there, since a
    /// process starts in the namespace of the thread that starts it.
    pub(crate) fn on_host<T: Send>(&self, closure: impl FnOnce(&Caller) -> Result<T> + Send) -> Result<T> {
        let caller = Caller { plugin: self, input: self.config.to_string() };
        self.host.run(move || closure(&caller))?
    }
}

/// A thread on the host that calls the plugin.
pub(crate) struct Caller<'a> {
    plugin: &'a Plugin,
    input: String,
}

impl Caller<'_> {
    /// A call that must succeed.
    pub(crate) fn call(&self, verb: Verb, pod: &Pod) -> Result<Answer> {
        match self.ask(verb, pod)? {
            Reply::Done(answer) => Ok(answer),
            Reply::Refused(error) => bail!("{} of {} failed: {error}", verb.text(), self.name()),
        }
    }

    /// A call that may be refused. One that ends without an error as specified is an error here.
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
                "{} of {} ended with {} and no error as CNI specifies it; it wrote: {}{}",
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

/// Runs a command with a text on its standard input, and takes the time. The standard library
/// makes the process by `posix_spawn`, which copies nothing of this one, however large it is.
pub(crate) fn timed(mut command: Command, input: &str) -> Result<(Duration, Output)> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn()?;
    if let Some(mut pipe) = child.stdin.take() {
        // Smaller than a pipe's buffer, so this does not wait. If the process has ended without
        // reading it, its status and its answer tell.
        pipe.write_all(input.as_bytes()).ok();
    }
    let output = child.wait_with_output()?;
    Ok((start.elapsed(), output))
}

/// The error that a plugin must write on standard output.
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
    /// The first address that ADD gave the pod.
    pub(crate) fn address(&self) -> Result<std::net::IpAddr> {
        let text = String::from_utf8_lossy(&self.stdout);
        let result: Value =
            serde_json::from_slice(&self.stdout).with_context(|| format!("ADD gave no JSON: {text}"))?;
        ensure!(result["cniVersion"] == CNI_VERSION, "ADD's result is not of version {CNI_VERSION}: {text}");
        let address =
            result["ips"][0]["address"].as_str().with_context(|| format!("no address in {text}"))?;
        without_prefix_length(address).parse().with_context(|| format!("{address:?} is no address"))
    }

    /// The versions that VERSION names.
    pub(crate) fn versions(&self) -> Result<Vec<String>> {
        let result: Value = serde_json::from_slice(&self.stdout).context("VERSION gave no JSON")?;
        let versions = result["supportedVersions"].as_array().context("no supportedVersions")?;
        Ok(versions.iter().filter_map(|version| version.as_str().map(str::to_owned)).collect())
    }
}

/// The directory that a program is in.
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
    fn container_ids_look_like_a_runtimes() {
        let ids: BTreeSet<String> = (0..10_000).map(container_id).collect();
        assert_eq!(ids.len(), 10_000);
        assert!(ids.iter().all(|id| id.len() == 64 && id.bytes().all(|digit| digit.is_ascii_hexdigit())));
        let beginnings: BTreeSet<&str> = ids.iter().map(|id| &id[..11]).collect();
        assert_eq!(beginnings.len(), 10_000, "names of devices are cut out of the ids");
    }

    #[test]
    fn results_are_read() {
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
    fn refusals_are_those_of_the_specification() {
        let read = |text: &str| refusal(text.as_bytes());
        assert_eq!(read(r#"{"cniVersion":"1.0.0","code":7,"msg":"bad"}"#).unwrap(), "code 7: bad");
        assert_eq!(read(r#"{"code":11,"msg":"full","details":"wait"}"#).unwrap(), "code 11: full (wait)");
        assert_eq!(read("panicked"), None);
        assert_eq!(read(r#"{"msg":"no code"}"#), None);
    }
}
