//! Labs side by side for alternating rounds: one for ovl and one for each peer.

use anyhow::{Context, Result};
use netns_lab::{Host, Lab, LabConfig, Workload};
use serde_json::{Map, Value};

use super::MTU;
use super::ovl::{self, Network};
use super::peers::{End, Found, Peer, Program};
use super::processes::Processes;
use super::system::System;
use super::{nebula, tinc, wireguard};
use crate::Bench;
use crate::report::Measured;
use crate::turns::mtu_of;

/// Contender: two hosts without a tunnel.
pub(crate) const RAW: &str = "raw veth";
/// Contender: gotatun with a workload behind it on each host, as with ovl.
pub(crate) const BEHIND: &str = "gotatun, workloads behind it";

/// Why a contender has no value.
#[derive(Clone, Debug)]
enum Lack {
    NoPeer(String),
    Failed(String),
}

/// A system that is measured in alternating rounds.
struct Contender {
    name: String,
    system: Result<System, Lack>,
}

/// Labs and their contenders. Fields are dropped in this order: processes before their labs.
#[derive(Default)]
pub(crate) struct Ground {
    contenders: Vec<Contender>,
    running: Vec<End>,
    labs: Vec<Lab>,
    /// Descriptions of the contenders for the report.
    setup: Vec<String>,
}

/// The results of the rounds, by contender.
pub(crate) struct Results<T>(Vec<(String, Result<Vec<T>, Lack>)>);

impl Ground {
    /// Adds ovl's networks, in one lab. A failure is recorded for its contender; the other contenders are
    /// measured anyway.
    pub(crate) fn ovl(&mut self, bench: &Bench, networks: &[Network]) {
        let lab = ovl::start(bench, 2).map_err(|error| format!("{error:#}"));
        for (number, &network) in networks.iter().enumerate() {
            let system = match &lab {
                Ok(lab) => ovl_system(lab, network).map_err(|error| format!("{error:#}")),
                Err(error) if number == 0 => Err(error.clone()),
                // The error contains the end of a daemon's log: print it once.
                Err(_) => Err("its lab failed, see above".to_owned()),
            };
            let system = system.map(|(system, mtu)| {
                self.setup.push(format!("{} MTU {mtu}", network.contender()));
                system
            });
            self.add(network.contender(), system.map_err(Lack::Failed));
        }
        self.labs.extend(lab);
    }

    /// Adds all requested peers.
    pub(crate) fn peers(&mut self, bench: &Bench) {
        for found in &bench.peers {
            let system = self.if_here(found, |ground, program| ground.peer(found.peer, program));
            if let (Ok(_), Ok(program)) = (&system, &found.program) {
                self.setup.push(format!("{} MTU {MTU}", program.version));
            }
            self.add(found.peer.name(), system);
        }
    }

    /// Adds gotatun with a workload on each host: as many hops as with ovl.
    pub(crate) fn gotatun_workloads(&mut self, bench: &Bench) {
        if let Some(found) = bench.peers.iter().find(|found| found.peer == Peer::Gotatun) {
            let system = self.if_here(found, Ground::behind);
            self.add(BEHIND, system);
        }
    }

    fn if_here(
        &mut self,
        found: &Found,
        start: impl FnOnce(&mut Self, &Program) -> Result<System>,
    ) -> Result<System, Lack> {
        match &found.program {
            Ok(program) => start(self, program).map_err(|error| Lack::Failed(format!("{error:#}"))),
            Err(error) => Err(Lack::NoPeer(error.clone())),
        }
    }

    fn peer(&mut self, peer: Peer, program: &Program) -> Result<System> {
        let lab = Lab::new(LabConfig::hosts(2))?;
        let path = &program.path;
        let (ends, target) = match peer {
            Peer::Gotatun | Peer::Boringtun | Peer::WireguardGo => {
                (wireguard::start(peer, path, &lab)?, wireguard::address(1))
            }
            Peer::Nebula => (nebula::start(path, &lab)?, nebula::address(1)),
            Peer::Tinc => (tinc::start(path, &lab)?, tinc::address(1)),
        };
        let processes = Processes(ends.iter().map(|end| end.process.pid()).collect());
        // Registered before anything can fail, so that the lab is dropped in order.
        self.running.extend(ends);
        self.labs.push(lab);
        let [from, to] = self.labs.last().map(Lab::hosts).unwrap_or_default() else {
            anyhow::bail!("not two hosts");
        };
        System::new(from, to, target, processes)
    }

    fn behind(&mut self, program: &Program) -> Result<System> {
        let processes = self.peer(Peer::Gotatun, program)?.processes;
        let lab = self.labs.last().context("no lab")?;
        let [from, to] = lab.hosts() else { anyhow::bail!("not two hosts") };
        let from = wireguard::workload(from, 0)?;
        let to = wireguard::workload(to, 1)?;
        System::new(&from, &to, wireguard::workload_address(1), processes)
    }

    /// Adds the hosts' own link.
    pub(crate) fn raw(&mut self) {
        let system = (|| -> Result<System> {
            self.labs.push(Lab::new(LabConfig::hosts(2))?);
            let [from, to] = self.labs.last().map(Lab::hosts).unwrap_or_default() else {
                anyhow::bail!("not two hosts");
            };
            System::new(from, to, to.address()?, Processes::default())
        })();
        self.add(RAW, system.map_err(|error| Lack::Failed(format!("{error:#}"))));
    }

    fn add(&mut self, name: &str, system: Result<System, Lack>) {
        if let Err(Lack::Failed(error)) = &system {
            eprintln!("netns-lab: {name} failed: {error}");
        }
        self.contenders.push(Contender { name: name.to_owned(), system });
    }

    /// Returns all hosts of all labs.
    pub(crate) fn hosts(&self) -> impl Iterator<Item = &Host> {
        self.labs.iter().flat_map(Lab::hosts)
    }

    /// Returns the description of the contenders for the report.
    pub(crate) fn setup(&self) -> String {
        if self.setup.is_empty() { "No tunnel ran".to_owned() } else { self.setup.join(", ") }
    }

    /// Measures all contenders in rounds. The order changes with each round, so that drift of the machine
    /// affects all equally. The first round is a warm-up and does not count. A contender that fails is
    /// skipped from then on.
    pub(crate) fn in_turns<T>(&mut self, turns: usize, take: impl Fn(&System) -> Result<T>) -> Results<T> {
        let count = self.contenders.len();
        let mut taken: Vec<Vec<T>> = (0..count).map(|_| Vec::new()).collect();
        for turn in 0..=turns {
            for place in 0..count {
                let index = (turn + place) % count;
                let contender = &mut self.contenders[index];
                let Ok(system) = &contender.system else { continue };
                match take(system) {
                    Ok(value) if turn > 0 => taken[index].push(value),
                    Ok(_) => {}
                    Err(error) => {
                        eprintln!("netns-lab: {} failed: {error:#}", contender.name);
                        contender.system = Err(Lack::Failed(format!("{error:#}")));
                    }
                }
            }
        }
        let contenders = self.contenders.iter().zip(taken);
        Results(
            contenders
                .map(|(contender, taken)| {
                    let taken = match &contender.system {
                        Ok(_) => Ok(taken),
                        Err(lack) => Err(lack.clone()),
                    };
                    (contender.name.clone(), taken)
                })
                .collect(),
        )
    }
}

impl<T> Results<T> {
    /// Returns the contenders' names, in the order in which they were added.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }

    /// Computes one value of a contender's rounds. A peer that was not requested counts as unavailable.
    pub(crate) fn of(&self, name: &str, number: impl Fn(&[T]) -> f64) -> Measured {
        match self.0.iter().find(|(each, _)| each == name) {
            Some((_, Ok(taken))) => Measured::Value(number(taken)),
            Some((_, Err(Lack::Failed(_)))) => Measured::Failed,
            Some((_, Err(Lack::NoPeer(_)))) | None => Measured::NoPeer,
        }
    }

    /// Returns the reasons why contenders have no value.
    pub(crate) fn notes(&self) -> Vec<String> {
        let note = |(name, taken): &(String, Result<Vec<T>, Lack>)| match taken {
            Ok(_) => None,
            Err(Lack::NoPeer(error)) => Some(format!("{name} is unavailable: {error}")),
            Err(Lack::Failed(error)) => Some(format!("{name} failed: {error}")),
        };
        self.0.iter().filter_map(note).collect()
    }

    /// Renders every round for the JSON.
    pub(crate) fn to_json(&self, shown: impl Fn(&[T]) -> Value) -> Value {
        let all = self.0.iter().filter_map(|(name, taken)| Some((name.clone(), shown(taken.as_ref().ok()?))));
        Value::Object(all.collect::<Map<_, _>>())
    }
}

fn ovl_system(lab: &Lab, network: Network) -> Result<(System, u64)> {
    let workloads = ovl::network(lab, network)?;
    let [(from, _), (to, target)]: &[(Workload, _)] = workloads.as_slice() else {
        anyhow::bail!("not two workloads");
    };
    Ok((System::new(from, to, *target, ovl::processes(lab, network)?)?, mtu_of(from)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_values_have_reasons() {
        let failed = Lack::Failed("it broke".to_owned());
        let results = Results(vec![
            ("a".to_owned(), Ok(vec![1.0, 3.0])),
            ("b".to_owned(), Err(Lack::NoPeer("no cargo".to_owned()))),
            ("c".to_owned(), Err(failed)),
        ]);
        let sum = |all: &[f64]| all.iter().sum();
        let values = ["a", "b", "c", "d"].map(|name| results.of(name, sum));
        assert_eq!(values, [Measured::Value(4.0), Measured::NoPeer, Measured::Failed, Measured::NoPeer]);
        assert_eq!(results.notes(), ["b is unavailable: no cargo", "c failed: it broke"]);
    }
}
