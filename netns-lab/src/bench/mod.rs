//! `bench`: the figures that issue 2 asks for, measured in labs of its own.

mod announce;
mod attach;
mod bulk;
mod by_hand;
mod client;
mod cluster;
mod dead;
mod flow;
mod idle;
mod kill;
mod loss;
mod neigh;
mod plan;
mod report;
mod setup;
mod stats;
mod stream;
mod supervisor;
mod tcp;
#[cfg(test)]
mod tests;

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use netns_lab::{Lab, LabConfig};

pub(crate) use plan::Plan;
use report::{Figure, Outcome};
use setup::Setup;

/// The figures, by the names that `--only` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Name {
    /// TCP through the overlay against one built by hand
    Tcp,
    /// From an attach until the last other kernel has the entry
    Announce,
    /// A thousand endpoints at once
    Bulk,
    /// `attach`, as seen by the caller
    Attach,
    /// How soon a lost host's entries are gone
    Dead,
    /// Gossip loss, and who is declared dead by mistake
    Loss,
    /// Memory and processor time of an idle daemon
    Idle,
    /// Packets lost when a daemon is killed and started again
    Kill,
}

impl Name {
    fn text(self) -> &'static str {
        match self {
            Name::Tcp => "tcp",
            Name::Announce => "announce",
            Name::Bulk => "bulk",
            Name::Attach => "attach",
            Name::Dead => "dead",
            Name::Loss => "loss",
            Name::Idle => "idle",
            Name::Kill => "kill",
        }
    }

    fn measure(self, bench: &Bench) -> Result<Figure> {
        match self {
            Name::Tcp => tcp::measure(bench),
            Name::Announce => announce::measure(bench),
            Name::Bulk => bulk::measure(bench),
            Name::Attach => attach::measure(bench),
            Name::Dead => dead::measure(bench),
            Name::Loss => loss::measure(bench),
            Name::Idle => idle::measure(bench),
            Name::Kill => kill::measure(bench),
        }
    }
}

/// What is asked for.
pub(crate) struct Wanted {
    /// None: all.
    pub(crate) only: Vec<Name>,
    pub(crate) json: PathBuf,
    /// Where the binaries are; else as for every lab.
    pub(crate) binaries: Option<PathBuf>,
    pub(crate) plan: Plan,
}

/// What every figure needs.
pub(crate) struct Bench {
    plan: Plan,
    ovld: PathBuf,
    ovlctl: PathBuf,
}

impl Bench {
    /// Hosts of their own for one figure, without a daemon started.
    fn lab(&self, hosts: usize) -> Result<Lab> {
        let mut config = LabConfig::hosts(hosts);
        config.ovld = Some(self.ovld.clone());
        config.ovlctl = Some(self.ovlctl.clone());
        Lab::new(config)
    }
}

/// Measures, prints and writes. A missed bar is no failure, a figure that cannot be taken is one.
pub(crate) fn run(wanted: Wanted) -> Result<ExitCode> {
    if !supervisor::is_supervised() {
        return supervisor::supervise();
    }
    supervisor::end_with_supervisor()?;
    let bench = Bench {
        ovld: binary(wanted.binaries.as_deref(), "ovld")?,
        ovlctl: binary(wanted.binaries.as_deref(), "ovlctl")?,
        plan: wanted.plan,
    };
    let setup = Setup::look(&bench.ovld, bench.plan.quick)?;
    for warning in setup.warnings() {
        eprintln!("netns-lab: {warning}");
    }
    let names = Name::value_variants().iter().copied();
    let outcomes: Vec<Outcome> = names
        .filter(|name| wanted.only.is_empty() || wanted.only.contains(name))
        .map(|name| {
            let start = Instant::now();
            eprintln!("{}: measuring ...", name.text());
            let outcome = name.measure(&bench);
            let took = start.elapsed().as_secs_f64();
            match &outcome {
                Ok(_) => eprintln!("{}: done in {took:.1} s", name.text()),
                Err(error) => eprintln!("{}: failed after {took:.1} s: {error:#}", name.text()),
            }
            (name.text(), outcome)
        })
        .collect();

    print!("{}", report::table(&setup, &outcomes));
    report::write_json(&wanted.json, &setup, bench.plan.to_json(), &outcomes)?;
    println!("Written to {}", wanted.json.display());
    let (_, failed) = report::failures(&outcomes);
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Resolved here, once: the report names what was measured.
fn binary(dir: Option<&Path>, name: &str) -> Result<PathBuf> {
    let Some(dir) = dir else {
        return netns_lab::find_binary(name);
    };
    let path = env::current_dir().context("no current directory")?.join(dir).join(name);
    ensure!(
        path.is_file(),
        "no {} : build it with `cargo build --release -p ovld -p ovlctl`",
        path.display()
    );
    Ok(path)
}
