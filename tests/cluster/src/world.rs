//! What the scenarios share: the machines, the packages, workloads on networks.

use std::thread;

use anyhow::{Context as _, Result, bail, ensure};
use netns_lab::{wait_until, without_prefix_length};
use serde_json::Value;

use crate::flow::Flow;
use crate::machine::{Machine, SOON};

/// Machines with files in them.
pub(crate) struct World<'a> {
    /// In the order of their numbers.
    pub(crate) machines: Vec<&'a dyn Machine>,
}

/// A namespace with an endpoint on a network; or the machine itself, on the underlay.
#[derive(Clone)]
pub(crate) struct Workload<'a> {
    pub(crate) machine: &'a dyn Machine,
    /// Of the namespace, or of the machine.
    pub(crate) name: String,
    pub(crate) address: String,
}

impl<'a> World<'a> {
    /// Does the same on all machines at once.
    pub(crate) fn on_all<T: Send>(
        &self,
        work: impl Fn(&'a dyn Machine) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        thread::scope(|scope| {
            let work = &work;
            let threads: Vec<_> =
                self.machines.iter().map(|machine| scope.spawn(move || work(*machine))).collect();
            let joined = threads.into_iter().map(|thread| thread.join());
            joined.map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        })
    }

    /// Makes a network, unless it is there, and waits until all machines know it.
    pub(crate) fn network(&self, name: &str, options: &str) -> Result<()> {
        self.machines[0].ok(&format!(
            "ovlctl network inspect {name} >/dev/null 2>&1 || ovlctl network create {name} {options}"
        ))?;
        self.on_all(|machine| machine.wait(&format!("ovlctl network inspect {name}")).map(drop)).map(drop)
    }

    /// One workload on each machine, attached to this network; those that are there stay.
    pub(crate) fn workloads(&self, network: &str) -> Result<Vec<Workload<'a>>> {
        self.on_all(|machine| workload(machine, network))
    }

    /// The machines themselves, on the underlay.
    pub(crate) fn hosts(&self) -> Vec<Workload<'a>> {
        let host = |machine: &&'a dyn Machine| Workload {
            machine: *machine,
            name: machine.name().to_owned(),
            address: machine.address().to_string(),
        };
        self.machines.iter().map(host).collect()
    }

    /// Pings between each two, in both directions.
    pub(crate) fn ping_all(&self, all: &[Workload<'a>]) -> Result<()> {
        self.on_all(|machine| {
            for from in all.iter().filter(|from| from.machine.name() == machine.name()) {
                for to in all.iter().filter(|to| to.name != from.name) {
                    from.ping(to)?;
                }
            }
            Ok(())
        })
        .map(drop)
    }

    /// Starts pings from each workload to the next one, on both networks that all scenarios use.
    pub(crate) fn load(&self) -> Result<Vec<Flow<'a>>> {
        let mut flows = Vec::new();
        for network in ["flat", "pods"] {
            let all = self.workloads(network)?;
            for (from, to) in all.iter().zip(all.iter().cycle().skip(1)) {
                flows.push(Flow::start(from, to)?);
            }
        }
        Ok(flows)
    }

    /// Waits until all daemons are members, see each other alive, and find nothing to repair.
    pub(crate) fn wait_settled(&self) -> Result<()> {
        let count = self.machines.len();
        self.on_all(|machine| {
            machine.wait_ctl("status", "a ready daemon", |status| {
                (status["state"] != "starting" && status["alive"] == count).then_some(())
            })?;
            machine.wait("ovlctl verify").map(drop)
        })
        .map(drop)
    }
}

/// The namespace `NETWORK-MACHINE` with an endpoint of the same name.
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
    /// What a command begins with that is to be run there.
    pub(crate) fn exec(&self) -> String {
        let host = self.name == self.machine.name();
        if host { String::new() } else { format!("ip netns exec {}", self.name) }
    }

    /// Runs a script in the namespace; it must succeed.
    pub(crate) fn ok(&self, script: &str) -> Result<String> {
        self.machine.ok(&format!("{} sh -c '{script}'", self.exec()))
    }

    /// Waits for an answer to a ping.
    pub(crate) fn ping(&self, to: &Self) -> Result<()> {
        self.machine
            .wait(&format!("{} ping -n -c 1 -W 2 {}", self.exec(), to.address))
            .with_context(|| format!("from {} to {} at {}", self.name, to.name, to.address))
            .map(drop)
    }

    /// Sends TCP for some seconds, and gives the rate in Mbit/s.
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

/// Fails with what was found unless a text has all of these.
pub(crate) fn ensure_says(text: &str, parts: &[&str]) -> Result<()> {
    for part in parts {
        if !text.contains(part) {
            bail!("{text:?} does not say {part:?}");
        }
    }
    Ok(())
}
