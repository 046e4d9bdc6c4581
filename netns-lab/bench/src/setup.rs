//! The set-up of a measurement: the machine and the binaries.

use std::fmt::{self, Display, Formatter};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Load average above which other work would affect the figures.
const QUIET_LOAD: f64 = 0.7;

/// The machine and the daemon.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    kernel: String,
    processor: String,
    cores: usize,
    memory_mib: u64,
    congestion_control: String,
    load_before: f64,
    unix_time: u64,
    ovld: PathBuf,
    version: String,
    profile: Profile,
    quick: bool,
}

/// The build profile of a binary, derived from its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Profile {
    Release,
    Debug,
    Unknown,
}

impl Profile {
    fn of(path: &Path) -> Self {
        match path.parent().and_then(Path::file_name).and_then(|name| name.to_str()) {
            Some("release") => Profile::Release,
            Some("debug" | "deps") => Profile::Debug,
            _ => Profile::Unknown,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Profile::Release => "release build",
            Profile::Debug => "debug build",
            Profile::Unknown => "unknown build",
        }
    }
}

impl Setup {
    pub(crate) fn look(ovld: &Path, quick: bool) -> Result<Self> {
        let version = Command::new(ovld)
            .arg("--version")
            .output()
            .with_context(|| format!("cannot run {}", ovld.display()))?;
        if !version.status.success() {
            bail!("`{} --version` failed ({})", ovld.display(), version.status);
        }
        Ok(Setup {
            kernel: line_of("/proc/sys/kernel/osrelease"),
            processor: processor(),
            cores: thread::available_parallelism().map_or(0, usize::from),
            memory_mib: memory_mib(),
            congestion_control: line_of("/proc/sys/net/ipv4/tcp_congestion_control"),
            load_before: line_of("/proc/loadavg")
                .split(' ')
                .next()
                .and_then(|load| load.parse().ok())
                .unwrap_or(f64::NAN),
            unix_time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
            ovld: ovld.to_owned(),
            version: String::from_utf8_lossy(&version.stdout).trim().to_owned(),
            profile: Profile::of(ovld),
            quick,
        })
    }

    /// Returns warnings that limit the significance of the figures.
    pub(crate) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.profile != Profile::Release {
            warnings.push(format!(
                "{} is not known to be a release build ({}): measure with --release-dir target/release",
                self.ovld.display(),
                self.profile.name()
            ));
        }
        if self.load_before > QUIET_LOAD {
            warnings.push(format!(
                "the machine was not idle (load {} before the start): times are too long",
                self.load_before
            ));
        }
        if self.quick {
            warnings.push("--quick: too few samples for a verdict".to_owned());
        }
        warnings
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({
            "unix_time": self.unix_time,
            "kernel": self.kernel,
            "processor": self.processor,
            "cores": self.cores,
            "memory_mib": self.memory_mib,
            "tcp_congestion_control": self.congestion_control,
            "load_before": self.load_before,
            "ovld": self.ovld,
            "ovld_version": self.version,
            "ovld_profile": self.profile.name(),
            "quick": self.quick,
            "warnings": self.warnings(),
        })
    }
}

impl Display for Setup {
    fn fmt(&self, out: &mut Formatter) -> fmt::Result {
        write!(
            out,
            "{} cores of {}, {} MiB, kernel {}, load {} before the start; {} ({}, {}). All hosts of a lab share \
             these cores.",
            self.cores,
            self.processor,
            self.memory_mib,
            self.kernel,
            self.load_before,
            self.version,
            self.profile.name(),
            self.ovld.display()
        )
    }
}

fn line_of(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

fn processor() -> String {
    let text = line_of("/proc/cpuinfo");
    let model = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or("an unnamed processor", |(_, name)| name).to_owned()
}

fn memory_mib() -> u64 {
    let text = line_of("/proc/meminfo");
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_by_directory() {
        let profile = |path: &str| Profile::of(Path::new(path));
        assert_eq!(profile("/x/target/release/ovld"), Profile::Release);
        assert_eq!(profile("/x/target/debug/ovld"), Profile::Debug);
        assert_eq!(profile("/usr/sbin/ovld"), Profile::Unknown);
    }
}
