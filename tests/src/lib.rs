//! Helpers that the multi-host tests share. They use only `ovlctl` and standard tools such as `ip` and `ping`, and no
//! code of ovl.

pub mod browser;
mod capture;
pub mod cni;
mod connection;
pub mod fast;
mod flow;
pub mod frames;
pub mod inject;
pub mod kubernetes;
pub mod policy;
pub mod ports;
pub mod random;
pub mod resolver;
pub mod routed;
pub mod runtime;
pub mod sctp;
pub mod service;
pub mod storm;
mod traffic;

use std::sync::Barrier;
use std::thread;
use std::time::Duration;

pub use capture::{Capture, Captured};
pub use connection::Connection;
pub use flow::{Flow, FlowReport};
pub use traffic::Traffic;

use anyhow::{Context as _, Result, bail, ensure};
use netns_lab::{Host, Lab, LabConfig, Netns, Output, Workload, wait_until, without_prefix_length};
use serde_json::Value;

/// Timeout for anything that should happen at once. It is long because the tests of several labs share few cores.
pub const SOON: Duration = Duration::from_secs(20);

/// Creates a lab of this number of hosts, and waits until their daemons run and see each other.
pub fn start_lab(hosts: usize) -> Result<Lab> {
    start_lab_with(LabConfig::hosts(hosts))
}

/// Creates a lab from a configuration, and waits until its daemons run and see each other.
pub fn start_lab_with(config: LabConfig) -> Result<Lab> {
    let lab = Lab::new(config)?;
    lab.start_all()?;
    Ok(lab)
}

/// Creates a network on the first running host, and waits until all running hosts have it.
pub fn create_network(lab: &Lab, name: &str, more: &[&str]) -> Result<()> {
    let running: Vec<&Host> = lab.hosts().iter().filter(|host| host.is_running()).collect();
    let first = running.first().context("no daemon is running")?;
    first.ctl_ok(&[&["network", "create", name], more].concat())?;
    for host in running {
        wait_until(SOON, &format!("network {name} on {}", host.name()), || {
            host.ctl_ok(&["network", "inspect", name]).map(drop)
        })?;
    }
    Ok(())
}

/// An attached workload.
#[derive(Debug, Clone)]
pub struct Attached {
    /// Its network namespace.
    pub workload: Workload,
    /// Name of the endpoint and of the workload.
    pub name: String,
    /// Output of `attach -o json`.
    pub json: Value,
}

impl Attached {
    /// Its addresses without prefix lengths, in the order of the network's subnets.
    pub fn addresses(&self) -> Vec<String> {
        strings(&self.json["addresses"]).iter().map(|each| without_prefix_length(each).to_owned()).collect()
    }

    /// Its first address.
    pub fn address(&self) -> String {
        self.addresses().into_iter().next().unwrap_or_default()
    }

    /// Its MAC address.
    pub fn mac(&self) -> String {
        text(&self.json["mac"])
    }

    /// The host side of its veth pair.
    pub fn device(&self) -> String {
        text(&self.json["device"])
    }
}

/// Creates a workload of this name and attaches it, with further arguments such as `--ip`.
pub fn attach(host: &Host, name: &str, network: &str, more: &[&str]) -> Result<Attached> {
    attach_workload(host.workload(name)?, network, more)
}

/// Attaches a workload under its own name.
pub fn attach_workload(workload: Workload, network: &str, more: &[&str]) -> Result<Attached> {
    let name = workload.name().to_owned();
    let args = [&["attach", &name, "--network", network, "--netns", workload.path_str()], more].concat();
    let json = workload.host().ctl_json(&args)?;
    Ok(Attached { workload, name, json })
}

/// Runs an `ovlctl` command that must fail with exit status 1, nothing on standard output, and one error message,
/// which it returns without the prefix `ovlctl: `.
pub fn ctl_error(host: &Host, args: &[&str]) -> Result<String> {
    let output = host.ctl(args)?;
    ensure_status(&output, args, 1)?;
    ensure!(output.stdout.is_empty(), "`ovlctl {}` failed and printed {}", args.join(" "), output.stdout);
    output.stderr.strip_prefix("ovlctl: ").map(|text| text.trim().to_owned()).with_context(|| {
        format!("`ovlctl {}` does not start its error with `ovlctl: `: {}", args.join(" "), output.stderr)
    })
}

/// Checks the exit status of an `ovlctl` command.
pub fn ensure_status(output: &Output, args: &[&str], status: i32) -> Result<()> {
    ensure!(
        output.code() == Some(status),
        "`ovlctl {}` exited with {} instead of {status}: {}{}",
        args.join(" "),
        output.status,
        output.stdout,
        output.stderr
    );
    Ok(())
}

/// Fails unless the text contains all of these parts.
#[track_caller]
pub fn assert_contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{text:?} does not contain {part:?}");
    }
}

/// Sets whether iptables on the host sees bridged frames (`net.bridge.bridge-nf-call-iptables`), as Docker does.
pub fn set_bridge_nf_call(host: &Host, shown: bool) -> Result<()> {
    for family in ["iptables", "ip6tables"] {
        let setting = format!("net.bridge.bridge-nf-call-{family}={}", u8::from(shown));
        host.exec_ok(["sysctl", "-qw", &setting])?;
    }
    Ok(())
}

/// Waits until a host knows a network that another host created.
pub fn wait_network(host: &Host, name: &str) -> Result<()> {
    wait_until(SOON, &format!("the network {name} on {}", host.name()), || {
        host.ctl_ok(&["network", "inspect", name]).map(drop)
    })
}

/// Waits until `ovlctl verify` finds no difference on any of these hosts.
pub fn wait_clean(hosts: &[Host], timeout: Duration) -> Result<()> {
    for host in hosts.iter().filter(|host| host.is_running()) {
        wait_until(timeout, &format!("`ovlctl verify` clean on {}", host.name()), || {
            host.ctl_ok(&["verify"]).map(drop)
        })?;
    }
    Ok(())
}

/// Time within which [`ensure_settled`] expects a verification to find no difference. It covers the comparison itself
/// on a loaded machine, and is half of the time for which `ovlctl verify` waits for differences to disappear.
const SETTLED: Duration = Duration::from_millis(250);

/// Result of `ovlctl verify`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verification {
    /// Whether there is no difference.
    pub clean: bool,
    /// The differences that are left.
    pub differences: Vec<String>,
    /// Time until there was no difference. `None` if there are differences left, and from an ovld that does not report
    /// it.
    pub settled: Option<Duration>,
}

/// Runs `ovlctl verify`, which waits up to 0.5 s for differences to disappear.
pub fn verify(host: &Host) -> Result<Verification> {
    let args = ["verify", "-o", "json"];
    let output = host.ctl(&args)?;
    let value: Value = serde_json::from_str(&output.stdout)
        .with_context(|| format!("`ovlctl verify`: {}{}", output.stdout, output.stderr))?;
    let verification = Verification {
        clean: value["clean"].as_bool().with_context(|| format!("no verdict in {value}"))?,
        differences: strings(&value["differences"]),
        settled: value["settled_ms"].as_u64().map(Duration::from_millis),
    };
    ensure_status(&output, &args, i32::from(!verification.clean))?;
    Ok(verification)
}

/// Fails unless `ovlctl verify` finds no difference, and finds that at once. A plain `verify` passes while drift is
/// repaired within 0.5 s, again and again. On a busy machine one may meet a pass that is late: what is repaired again and
/// again is there the next time too.
pub fn ensure_settled(host: &Host) -> Result<()> {
    let find = || -> Result<Option<Duration>> {
        let Verification { clean, differences, settled } = verify(host)?;
        ensure!(clean, "{}: {differences:?}", host.name());
        Ok(settled.filter(|settled| *settled > SETTLED))
    };
    if let Some(first) = find()?
        && let Some(second) = find()?
    {
        bail!("{} settled after {first:?}, and then after {second:?}", host.name());
    }
    Ok(())
}

/// How long [`assert_no_reply`] waits for a reply.
const NO_REPLY: Duration = Duration::from_millis(500);

/// Checks that a ping gets no reply. A dropped packet leaves no event to wait for, so this observes for a bounded time:
/// 500 ms are a hundred times what a reply takes in a lab, and a late reply can only hide a failure, not cause one.
#[track_caller]
pub fn assert_no_reply(from: &Netns, address: &str) {
    assert!(!from.ping(address, NO_REPLY), "{address} answers {}", from.netns_name());
}

/// Waits until each of these workloads gets a ping reply from every other one.
pub fn ping_all_pairs(all: &[Attached], timeout: Duration) -> Result<()> {
    for from in all {
        for to in all.iter().filter(|to| to.name != from.name) {
            from.workload
                .ping_until(to.address(), timeout)
                .with_context(|| format!("from {} to {} at {}", from.name, to.name, to.address()))?;
        }
    }
    Ok(())
}

/// Lines `NAME on HOST is STATE` for each endpoint that a host lists, sorted.
pub fn endpoints(host: &Host) -> Result<Vec<String>> {
    let mut all: Vec<String> = rows(host, &["endpoints"])?
        .iter()
        .map(|row| format!("{} on {} is {}", text(&row["name"]), text(&row["node"]), text(&row["state"])))
        .collect();
    all.sort();
    Ok(all)
}

/// Waits until a host lists exactly these endpoints, as [`endpoints`] gives them.
pub fn wait_endpoints(host: &Host, expected: &[&str], timeout: Duration) -> Result<()> {
    let mut expected: Vec<&str> = expected.to_vec();
    expected.sort_unstable();
    wait_until(timeout, &format!("{} to list the endpoints {expected:?}", host.name()), || {
        let found = endpoints(host)?;
        ensure!(found == expected, "{found:?}");
        Ok(())
    })
}

/// Rows that `ovlctl` lists with `-o json`.
pub fn rows(host: &Host, args: &[&str]) -> Result<Vec<Value>> {
    match host.ctl_json(args)? {
        Value::Array(rows) => Ok(rows),
        other => anyhow::bail!("`ovlctl {}` did not print an array: {other}", args.join(" ")),
    }
}

/// The row of another host in `ovlctl peers`.
pub fn peer(host: &Host, name: &str) -> Result<Value> {
    let found = rows(host, &["peers"])?.into_iter().find(|row| row["name"] == name);
    found.with_context(|| format!("{} lists no peer {name}", host.name()))
}

/// Problems in `ovlctl status`.
pub fn problems(host: &Host) -> Result<Vec<String>> {
    let status = host.ctl_json(&["status"])?;
    let all = status["problems"].as_array().context("`problems` is no array")?;
    Ok(all.iter().map(|problem| problem["message"].as_str().unwrap_or_default().to_owned()).collect())
}

/// Waits until a host reports a problem that contains all of these parts.
pub fn wait_problem(host: &Host, parts: &[&str], timeout: Duration) -> Result<String> {
    wait_until(timeout, &format!("a problem on {} that contains {parts:?}", host.name()), || {
        let all = problems(host)?;
        let found = all.iter().find(|each| parts.iter().all(|part| each.contains(part)));
        found.cloned().map(Some).with_context(|| format!("{all:?}"))
    })
}

/// Waits until a host reports no problem.
pub fn wait_no_problem(host: &Host, timeout: Duration) -> Result<()> {
    wait_until(timeout, &format!("no problem on {}", host.name()), || {
        let all = problems(host)?;
        ensure!(all.is_empty(), "{all:?}");
        Ok(())
    })
}

/// The text of a JSON string; empty if the value is not a string.
pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// The strings of a JSON array.
pub fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().map(text).collect()
}

/// Runs the closures concurrently, each in a thread of its own, started by a barrier.
pub fn run_concurrently<T: Send>(work: Vec<impl FnOnce() -> T + Send>) -> Vec<T> {
    let barrier = Barrier::new(work.len());
    thread::scope(|scope| {
        let threads: Vec<_> = work
            .into_iter()
            .map(|each| {
                let barrier = &barrier;
                scope.spawn(move || {
                    barrier.wait();
                    each()
                })
            })
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}
