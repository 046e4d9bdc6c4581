//! Helpers that the scenarios share: the machines, networks and workloads.

use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;

use anyhow::{Context as _, Result, bail, ensure};
use netns_lab::{wait_until, without_prefix_length};
use serde_json::Value;

use crate::flow::Flow;
use crate::machine::{Machine, SOON};

/// The machines of a cluster.
pub(crate) struct World<'a> {
    /// The machines, in the order of their numbers.
    pub(crate) machines: Vec<&'a dyn Machine>,
    /// Whether steps for one machine after the other are done only on the last one, because CI has little time.
    pub(crate) brief: bool,
}

/// A namespace with an endpoint on a network, or the machine itself on the underlay.
#[derive(Clone)]
pub(crate) struct Workload<'a> {
    pub(crate) machine: &'a dyn Machine,
    /// Name of the namespace or of the machine.
    pub(crate) name: String,
    pub(crate) address: String,
}

/// Reverts changes of a scenario when it is dropped, also after a failure.
pub(crate) struct Undo<'a> {
    machines: Vec<&'a dyn Machine>,
    script: String,
}

impl<'a> Undo<'a> {
    /// Runs this script on drop. It must be harmless if there is nothing to revert.
    pub(crate) fn on(machines: Vec<&'a dyn Machine>, script: String) -> Self {
        Self { machines, script }
    }
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        for machine in &self.machines {
            if let Err(error) = machine.ok_for(SOON * 4, &self.script) {
                println!("cannot revert: {error:#}");
            }
        }
    }
}

impl<'a> World<'a> {
    /// Runs a closure for all machines concurrently.
    pub(crate) fn on_all<T: Send>(
        &self,
        work: impl Fn(&'a dyn Machine) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> =
                self.machines.iter().map(|machine| scope.spawn(move || work(*machine))).collect();
            threads.into_iter().map(joined).collect()
        })
    }

    /// The last machine, which scenarios change.
    pub(crate) fn last(&self) -> &'a dyn Machine {
        self.machines[self.machines.len() - 1]
    }

    /// Creates a network unless it exists, and waits until all machines know it.
    pub(crate) fn network(&self, name: &str, options: &str) -> Result<()> {
        self.machines[0].ok(&format!(
            "ovlctl network inspect {name} >/dev/null 2>&1 || ovlctl network create {name} {options}"
        ))?;
        self.on_all(|machine| machine.wait(&format!("ovlctl network inspect {name}")).map(drop)).map(drop)
    }

    /// Deletes a network and its workloads, and waits until no machine knows it.
    pub(crate) fn remove_network(&self, name: &str) -> Result<()> {
        self.on_all(|machine| {
            let workload = format!("{name}-{}", machine.name());
            machine.ok(&format!("ovlctl detach {workload} && ip netns del {workload}")).map(drop)
        })?;
        // The network cannot be deleted until this machine knows that the other machines' endpoints are detached.
        self.machines[0].wait(&format!("ovlctl network rm {name}"))?;
        self.on_all(|machine| machine.wait(&format!("! ovlctl network inspect {name}")).map(drop)).map(drop)
    }

    /// Creates one workload on each machine and attaches it to this network. Existing ones stay.
    pub(crate) fn workloads(&self, network: &str) -> Result<Vec<Workload<'a>>> {
        self.on_all(|machine| workload(machine, network))
    }

    /// The machines themselves, as workloads on the underlay.
    pub(crate) fn hosts(&self) -> Vec<Workload<'a>> {
        let host = |machine: &&'a dyn Machine| Workload {
            machine: *machine,
            name: machine.name().to_owned(),
            address: machine.address().to_string(),
        };
        self.machines.iter().map(host).collect()
    }

    /// Pings between every two workloads, in both directions.
    pub(crate) fn ping_all(&self, all: &[Workload<'a>]) -> Result<()> {
        self.on_all(|machine| {
            // One script for each machine, because each command takes time.
            let own = all.iter().filter(|from| from.machine.name() == machine.name());
            let pings = own.flat_map(|from| {
                all.iter().filter(|to| to.name != from.name).map(move |to| from.ping_script(to, fresh_id()))
            });
            machine.ok_for(SOON * 2, &pings.collect::<Vec<_>>().join("\n")).map(drop)
        })
        .map(drop)
    }

    /// Starts pings from each workload to the next one, on the two networks that all scenarios use.
    pub(crate) fn load(&self) -> Result<Vec<Flow<'a>>> {
        let all = [self.workloads("flat")?, self.workloads("pods")?];
        let pairs: Vec<_> = all.iter().flat_map(|all| all.iter().zip(all.iter().cycle().skip(1))).collect();
        Flow::start(&pairs)
    }

    /// Waits until all daemons are members, see each other alive, and find no difference.
    pub(crate) fn wait_settled(&self) -> Result<()> {
        let count = self.machines.len();
        self.on_all(|machine| {
            // One script for each machine, as in `ping_all`.
            machine
                .wait(&format!(
                    "seen=$(ovlctl -o json status) && echo \"$seen\" | grep -q '\"alive\": *{count}\\b' && \
                     ! echo \"$seen\" | grep -q '\"state\": *\"starting\"' && ovlctl verify"
                ))
                .map(drop)
        })
        .map(drop)
    }
}

/// Creates the namespace `NETWORK-MACHINE` with an endpoint of the same name.
fn workload<'a>(machine: &'a dyn Machine, network: &str) -> Result<Workload<'a>> {
    let name = format!("{network}-{}", machine.name());
    machine.ok(&format!("[ -e /run/netns/{name} ] || ip netns add {name}; ip -n {name} link set lo up"))?;
    let own = |all: &Value| all.as_array()?.iter().find(|each| each["name"] == *name).cloned();
    let endpoint = match own(&machine.ctl("endpoints")?) {
        Some(found) => found,
        None => wait_until(SOON, &format!("an endpoint {name}"), || {
            machine.ctl(&format!("attach {name} --network {network} --netns {name}")).map(Some)
        })?,
    };
    let address = endpoint["addresses"][0].as_str().context("an endpoint without address")?;
    Ok(Workload { machine, address: without_prefix_length(address).to_owned(), name })
}

impl Workload<'_> {
    /// Prefix of a command that runs in the workload.
    pub(crate) fn exec(&self) -> String {
        let host = self.name == self.machine.name();
        if host { String::new() } else { format!("ip netns exec {}", self.name) }
    }

    /// Runs a script in the namespace, which must succeed.
    pub(crate) fn ok(&self, script: &str) -> Result<String> {
        self.machine.ok(&format!("{} sh -c '{script}'", self.exec()))
    }

    /// Script that waits for a ping reply with this identifier, and fails after a timeout.
    pub(crate) fn ping_script(&self, to: &Self, id: u16) -> String {
        format!(
            "end=$(($(date +%s) + {seconds})); until {exec} ping -n -e {id} -c 1 -W 2 {address} >/dev/null 2>&1; do \
             [ $(date +%s) -lt $end ] || {{ echo 'no reply to {from} from {to} at {address}' >&2; exit 1; }}; \
             sleep 0.2; done",
            seconds = SOON.as_secs(),
            exec = self.exec(),
            from = self.name,
            to = to.name,
            address = to.address
        )
    }

    /// Sends over TCP for some seconds, and returns the throughput in Mbit/s.
    pub(crate) fn tcp(&self, to: &Self, seconds: u32) -> Result<f64> {
        to.machine.ok(&format!(
            "ip netns exec {} sh -c 'iperf3 -s -1 -D -B {} >/dev/null 2>&1 </dev/null'",
            to.name, to.address
        ))?;
        to.machine.wait(&format!("ip netns exec {} ss -Hltn sport = :5201 | grep -q .", to.name))?;
        let text = self.ok(&format!("iperf3 -J -t {seconds} -c {}", to.address))?;
        let report: Value = serde_json::from_str(&text)?;
        let rate = report["end"]["sum_received"]["bits_per_second"].as_f64().context("no rate")?;
        ensure!(rate > 0.0, "nothing arrived");
        Ok(rate / 1e6)
    }
}

/// Returns an ICMP identifier that no other ping uses.
pub(crate) fn fresh_id() -> u16 {
    static LAST: AtomicU16 = AtomicU16::new(0);
    LAST.fetch_add(1, Ordering::Relaxed) + 1
}

/// Joins a thread, and resumes its panic.
pub(crate) fn joined<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Fails unless a text contains all of these parts.
pub(crate) fn ensure_contains(text: &str, parts: &[&str]) -> Result<()> {
    for part in parts {
        if !text.contains(part) {
            bail!("{text:?} does not contain {part:?}");
        }
    }
    Ok(())
}
