//! Helpers that the multi-host tests share. Nothing here knows ovl's insides: it is what a person
//! would do with `ovlctl`, `ip` and `ping`.

mod capture;
pub mod cni;
mod flow;
pub mod policy;
pub mod ports;
pub mod resolver;
pub mod routed;
pub mod runtime;
pub mod sctp;
pub mod service;

use std::sync::Barrier;
use std::thread;
use std::time::Duration;

pub use capture::Capture;
pub use flow::{Flow, FlowReport};

use anyhow::{Context as _, Result, ensure};
use netns_lab::{Host, Lab, LabConfig, Output, Workload, wait_until, without_prefix_length};
use serde_json::Value;

/// How long anything may take that should take an instant: the tests of several labs share few cores.
pub const SOON: Duration = Duration::from_secs(20);

/// A lab of that many hosts, whose daemons run and see each other.
pub fn started(hosts: usize) -> Result<Lab> {
    started_with(LabConfig::hosts(hosts))
}

/// The same, made otherwise.
pub fn started_with(config: LabConfig) -> Result<Lab> {
    let lab = Lab::new(config)?;
    lab.start_all()?;
    Ok(lab)
}

/// Makes a network on the first host whose daemon runs, and waits until all such hosts have it.
pub fn make_network(lab: &Lab, name: &str, more: &[&str]) -> Result<()> {
    let running: Vec<&Host> = lab.hosts().iter().filter(|host| host.is_running()).collect();
    let first = running.first().context("no daemon runs")?;
    first.ctl_ok(&[&["network", "create", name], more].concat())?;
    for host in running {
        wait_until(SOON, &format!("network {name} on {}", host.name()), || {
            host.ctl_ok(&["network", "inspect", name]).map(drop)
        })?;
    }
    Ok(())
}

/// A workload that is attached.
#[derive(Debug, Clone)]
pub struct Attached {
    /// Its namespace.
    pub workload: Workload,
    /// The endpoint's name, which is the workload's too.
    pub name: String,
    /// What `attach -o json` printed.
    pub json: Value,
}

impl Attached {
    /// Its addresses without their lengths, in the order of the network's subnets.
    pub fn addresses(&self) -> Vec<String> {
        strings(&self.json["addresses"]).iter().map(|each| without_prefix_length(each).to_owned()).collect()
    }

    /// The first one.
    pub fn address(&self) -> String {
        self.addresses().into_iter().next().unwrap_or_default()
    }

    /// Its MAC address.
    pub fn mac(&self) -> String {
        text(&self.json["mac"])
    }

    /// The host's end of its pair of interfaces.
    pub fn device(&self) -> String {
        text(&self.json["device"])
    }
}

/// Makes a workload of that name and attaches it, with further arguments such as `--ip`.
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

/// Runs an `ovlctl` that must be refused, as refusals are told: exit status 1, nothing on standard
/// output, and on standard error the sentence that this gives.
pub fn refused(host: &Host, args: &[&str]) -> Result<String> {
    let output = host.ctl(args)?;
    ensure_status(&output, args, 1)?;
    ensure!(output.stdout.is_empty(), "`ovlctl {}` failed and printed {}", args.join(" "), output.stdout);
    output
        .stderr
        .strip_prefix("ovlctl: ")
        .map(|text| text.trim().to_owned())
        .with_context(|| format!("`ovlctl {}` says in a form of its own: {}", args.join(" "), output.stderr))
}

/// Checks an exit status.
pub fn ensure_status(output: &Output, args: &[&str], status: i32) -> Result<()> {
    ensure!(
        output.code() == Some(status),
        "`ovlctl {}` ended with {} and not with {status}: {}{}",
        args.join(" "),
        output.status,
        output.stdout,
        output.stderr
    );
    Ok(())
}

/// Fails unless the text has all of these parts.
#[track_caller]
pub fn assert_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }
}

/// Whether the host's own firewall sees bridged frames too (`net.bridge.bridge-nf-call-iptables`), as where Docker
/// set it.
pub fn show_frames_to_firewall(host: &Host, shown: bool) -> Result<()> {
    for family in ["iptables", "ip6tables"] {
        let setting = format!("net.bridge.bridge-nf-call-{family}={}", u8::from(shown));
        host.exec_ok(["sysctl", "-qw", &setting])?;
    }
    Ok(())
}

/// Waits until a host knows a network, which another one made.
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

/// Waits until each of these workloads has an answer to a ping from each other one.
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

/// `NAME on HOST is STATE` of each endpoint, sorted, as a host lists them.
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
    wait_until(timeout, &format!("on {} the endpoints {expected:?}", host.name()), || {
        let found = endpoints(host)?;
        ensure!(found == expected, "{found:?}");
        Ok(())
    })
}

/// The rows that an `ovlctl` with `-o json` lists.
pub fn rows(host: &Host, args: &[&str]) -> Result<Vec<Value>> {
    match host.ctl_json(args)? {
        Value::Array(rows) => Ok(rows),
        other => anyhow::bail!("`ovlctl {}` printed no array: {other}", args.join(" ")),
    }
}

/// The row of another host in `ovlctl peers`.
pub fn peer(host: &Host, name: &str) -> Result<Value> {
    let found = rows(host, &["peers"])?.into_iter().find(|row| row["name"] == name);
    found.with_context(|| format!("{} lists no peer {name}", host.name()))
}

/// What `ovlctl status` calls wrong.
pub fn problems(host: &Host) -> Result<Vec<String>> {
    let status = host.ctl_json(&["status"])?;
    let all = status["problems"].as_array().context("`problems` is no array")?;
    Ok(all.iter().map(|problem| problem["message"].as_str().unwrap_or_default().to_owned()).collect())
}

/// Waits until one of a host's problems has all of these parts.
pub fn wait_problem(host: &Host, parts: &[&str], timeout: Duration) -> Result<String> {
    wait_until(timeout, &format!("a problem on {} that says {parts:?}", host.name()), || {
        let all = problems(host)?;
        let found = all.iter().find(|each| parts.iter().all(|part| each.contains(part)));
        found.cloned().map(Some).with_context(|| format!("{all:?}"))
    })
}

/// A JSON string's text; nothing for what is none.
pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

/// The strings of a JSON array.
pub fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().map(text).collect()
}

/// Runs the closures at the same instant, each in a thread of its own.
pub fn at_once<T: Send>(work: Vec<impl FnOnce() -> T + Send>) -> Vec<T> {
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
