//! `ovlctl bugreport`: one archive with what it takes to understand a fault on this host.
//!
//! It runs commands that show states and logs, and never copies a file that has a key. What cannot be had is noted in the
//! archive, so a report can be made while ovld is down.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use flate2::Compression;
use flate2::write::GzEncoder;
use ovl_proto::clock::timestamp;

use crate::context::Context;
use crate::error::{Error, Result};
use crate::time::now_ms;

/// What `ovlctl` shows, as JSON where there is some.
const OVLCTL: &[&str] = &[
    "status -o json",
    "status",
    "peers -o json",
    "peers -o wide",
    "network ls -o json",
    "endpoints -o json",
    "subnets -o json",
    "routes -o json",
    "fdb -o json",
    "plan",
    "verify -o json",
    "policy ls -o json",
    "policy drops -o json",
    "sandbox ls -o json",
    "get services -A -o yaml",
    "get endpointslices -A -o yaml",
    "get networkpolicies -A -o yaml",
    "get pods -A -o yaml",
    "get namespaces -o yaml",
    "key status -o json",
    "events --since 30days -o json",
    "metrics",
];

/// What the host shows. None of these prints a key: `wg` and `ip` keep those of WireGuard to themselves.
const HOST: &[&str] = &[
    "uname -a",
    "cat /etc/os-release",
    "cat /proc/version /proc/cmdline /proc/meminfo /proc/loadavg /proc/net/snmp /proc/net/netstat /proc/net/softnet_stat",
    "date --iso-8601=ns",
    "ip -d -s link show",
    "ip -d address show",
    "ip -d route show table all",
    "ip -6 -d route show table all",
    "ip rule show",
    "ip -s neighbour show",
    "bridge -d link show",
    "bridge -d fdb show",
    "bridge -d mdb show",
    "bridge -d vlan show",
    "tc -s qdisc show",
    "nft -a list ruleset",
    "iptables-save -c",
    "ip6tables-save -c",
    "conntrack -S",
    "ss -lnptu",
    "sysctl -a --pattern ^net\\.(core|ipv4|ipv6|bridge|netfilter|nf_conntrack)",
    "lsmod",
    "ls -l /run/netns /run/ovl /var/lib/ovl",
    "systemctl status --no-pager ovld ovl-docker ovl-kube",
    "journalctl --no-pager -o short-iso-precise -n 20000 -u ovld -u ovl-docker -u ovl-kube",
    "journalctl --no-pager -k -n 2000",
];

/// Time that a command may take, as `timeout` takes it.
const COMMAND_TIMEOUT: &str = "20";

/// Arguments of `bugreport`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Path of the archive, or `-` for standard output [default: ovl-bugreport-HOST-TIME.tar.gz here]
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// ovld's configuration file, which is copied
    #[arg(long, value_name = "FILE", default_value = "/etc/ovl/ovld.toml")]
    config: PathBuf,
}

/// Writes the archive and prints its path.
pub(crate) fn run(context: &Context, args: &Args) -> Result<()> {
    let time: String = timestamp(now_ms()).chars().take(19).filter(|c| *c != ':').collect();
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = format!("ovl-bugreport-{}-{time}", host.trim());
    if args.file.as_deref() == Some(Path::new("-")) {
        return collect(context, args, &name, io::stdout().lock()).map_err(|error| Error::output(&error));
    }
    let path = args.file.clone().unwrap_or_else(|| format!("{name}.tar.gz").into());
    let failed = |error: io::Error| {
        Error::Failed(format!("cannot write {}: {error}. Name another file with --file", path.display()))
    };
    // It shows much of the host: for its owner alone.
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(failed)?;
    let written = collect(context, args, &name, file);
    if written.is_err() {
        let _ = fs::remove_file(&path);
    }
    written.map_err(failed)?;
    context.note(
        "It has states, rules, addresses, names and logs of this host, and no key. Look through it before you pass it on.",
    );
    context.print(&serde_json::json!({ "file": path }), |_| format!("{}\n", path.display()))
}

/// Runs all commands and writes their output to an archive, in a directory of this name.
fn collect(context: &Context, args: &Args, name: &str, out: impl Write) -> io::Result<()> {
    let mut archive = tar::Builder::new(GzEncoder::new(out, Compression::default()));
    let mut add = |path: String, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(now_ms() / 1000);
        archive.append_data(&mut header, format!("{name}/{path}"), content)
    };
    let mut missing = String::new();
    let ovlctl = std::env::current_exe()?;
    let socket = context.socket.display().to_string();
    for line in OVLCTL {
        let (content, problem) = output_of(&[ovlctl.as_os_str(), "--socket".as_ref(), socket.as_ref()], line);
        add(format!("ovlctl/{}", file_name(line)), &content)?;
        missing.extend(problem.map(|problem| format!("ovlctl {line}: {problem}\n")));
    }
    for line in HOST {
        let (content, problem) = output_of(&[], line);
        add(format!("host/{}", file_name(line)), &content)?;
        missing.extend(problem.map(|problem| format!("{line}: {problem}\n")));
    }
    match fs::read(&args.config) {
        Ok(content) => add("ovld.toml".to_owned(), &content)?,
        Err(error) => missing.push_str(&format!("{}: {error}\n", args.config.display())),
    }
    let versions = format!("ovlctl {}\n", ovl_proto::VERSION);
    add("version.txt".to_owned(), versions.as_bytes())?;
    add("missing.txt".to_owned(), missing.as_bytes())?;
    archive.into_inner()?.finish()?.flush()
}

/// Runs a command line of words without quotes. Returns its output, errors included, and why it has none or not all.
fn output_of(before: &[&std::ffi::OsStr], line: &str) -> (Vec<u8>, Option<String>) {
    let run = Command::new("timeout")
        .arg(COMMAND_TIMEOUT)
        .args(before)
        .args(line.split(' '))
        .stdin(Stdio::null())
        .env("LC_ALL", "C")
        .output();
    match run {
        Ok(output) => {
            let problem = (!output.status.success()).then(|| {
                let errors = String::from_utf8_lossy(&output.stderr);
                format!("{}: {}", output.status, errors.lines().last().unwrap_or_default())
            });
            ([output.stdout, output.stderr].concat(), problem)
        }
        Err(error) => (Vec::new(), Some(error.to_string())),
    }
}

/// Returns the name of the file for a command line: its words, without what is no letter, digit, dot or dash.
fn file_name(line: &str) -> String {
    let kept = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.');
    let name: String = line.chars().map(|c| if kept(c) { c } else { '_' }).collect();
    let name: String = name.chars().take(80).collect();
    format!("{}.txt", name.trim_matches(['_', '.']))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn each_command_has_a_file_of_its_own() {
        for all in [OVLCTL, HOST] {
            let names: BTreeSet<String> = all.iter().map(|line| file_name(line)).collect();
            assert_eq!(names.len(), all.len(), "{names:?}");
            assert!(names.iter().all(|name| !name.contains("..") && !name.contains('/')), "{names:?}");
        }
    }

    #[test]
    fn output_has_errors_and_the_reason_of_a_failure() {
        let (content, problem) = output_of(&[], "sh -c exit");
        assert_eq!((content.as_slice(), problem), (&b""[..], None));
        let (content, problem) = output_of(&[], "ls /no/such/file");
        assert!(String::from_utf8_lossy(&content).contains("/no/such/file"));
        assert!(problem.unwrap().contains("exit status"));
        let (_, problem) = output_of(&[], "no-such-program");
        assert!(problem.unwrap().contains("127"));
    }
}
