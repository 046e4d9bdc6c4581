//! `netns-lab bench`: the figures that ovl is measured by, taken in labs of its own, in suites by topic.

#![warn(missing_docs)]

mod announce;
mod attach;
mod bulk;
mod by_hand;
mod client;
mod cluster;
mod cni;
mod connect;
mod dead;
mod dns;
mod docker;
mod flow;
mod idle;
mod kill;
mod loss;
mod neigh;
mod netlink;
mod plan;
mod policy;
mod publish;
mod report;
mod services;
mod setup;
mod stats;
mod stream;
mod supervisor;
mod tcp;
#[cfg(test)]
mod tests;
mod tunnel;
mod turns;

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use netns_lab::{Lab, LabConfig};

pub use plan::Plan;
use report::{Figure, Outcome, Tally};
use setup::Setup;
pub use tunnel::peers::Peer;
use tunnel::peers::{self, Found};

/// The exit status where a bar could not be held against anything, for want of a peer.
const NO_PEER: u8 = 3;

/// What is measured together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Suite {
    /// Workloads in networks: the figures of issue 2
    Core,
    /// Pods by container runtimes: the figures of issue 3
    Cni,
    /// Encrypted networks, beside other tunnels: the figures of issue 4
    Tunnel,
    /// Containers of Docker Engines, beside the Engine's own networks: figures of issue 6
    Docker,
    /// Published ports: figures of issue 6
    Publish,
    /// Names, beside dnsmasq: figures of issue 6
    Dns,
    /// Network policies: figures of issue 7
    Policy,
    /// Services, beside kube-proxy's layouts: figures of issue 7
    Services,
}

impl Suite {
    /// The name by which the command line has it.
    pub fn text(self) -> &'static str {
        match self {
            Suite::Core => "core",
            Suite::Cni => "cni",
            Suite::Tunnel => "tunnel",
            Suite::Docker => "docker",
            Suite::Publish => "publish",
            Suite::Dns => "dns",
            Suite::Policy => "policy",
            Suite::Services => "services",
        }
    }
}

/// The figures, by the names that `--only` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Name {
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
    /// cni: one ADD, one DEL at a time
    Single,
    /// cni: eight ADDs, eight DELs at once
    AtOnce,
    /// cni: a process of the plugin that asks nobody
    Version,
    /// cni: TCP from pod to pod against routes built by hand
    PodTcp,
    /// cni: what 250 pods are on other hosts
    Routes,
    /// cni: 10,000 ADDs and DELs in a row, and what is left of them
    Soak,
    /// tunnel: one TCP stream
    Streams,
    /// tunnel: the same without the underlay's segmentation offloads
    NoOffload,
    /// tunnel: a datagram there and back on one core
    RoundTrip,
    /// tunnel: memory and retransmits of ten seconds of TCP
    Load,
    /// tunnel: one host that sends to seven
    FanOut,
    /// tunnel: small datagrams
    Packets,
    /// docker: `docker run --rm` against the Engine's own bridge
    Run,
    /// docker: from a container's link until other kernels hold its entry
    Link,
    /// docker: pings to an address until the container that takes it answers
    Pinging,
    /// docker: a host cut off, and healed
    Cut,
    /// publish: one more of a thousand published ports, and a connection through the last
    Ports,
    /// dns: answers a second, and what updates cost
    Answers,
    /// dns: from an attach until the last host answers the name
    #[value(name = "new-name")]
    Resolved,
    /// dns: what an external name costs a pod with a search list
    Search,
    /// policy: one more of ten thousand pods under a thousand policies, and a connection
    Policies,
    /// services: 10,000 of them: loaded, changed, and a connection through the last
    Many,
    /// services: from a backend that is removed until no host sends to it
    Removed,
    /// services: an address whose host is lost, until another one answers
    Failover,
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
            Name::Single => "single",
            Name::AtOnce => "at-once",
            Name::Version => "version",
            Name::PodTcp => "pod-tcp",
            Name::Routes => "routes",
            Name::Soak => "soak",
            Name::Streams => "streams",
            Name::NoOffload => "no-offload",
            Name::RoundTrip => "round-trip",
            Name::Load => "load",
            Name::FanOut => "fan-out",
            Name::Packets => "packets",
            Name::Run => "run",
            Name::Link => "link",
            Name::Pinging => "pinging",
            Name::Cut => "cut",
            Name::Ports => "ports",
            Name::Answers => "answers",
            Name::Resolved => "new-name",
            Name::Search => "search",
            Name::Policies => "policies",
            Name::Many => "many",
            Name::Removed => "removed",
            Name::Failover => "failover",
        }
    }

    fn suite(self) -> Suite {
        match self {
            Name::Tcp
            | Name::Announce
            | Name::Bulk
            | Name::Attach
            | Name::Dead
            | Name::Loss
            | Name::Idle
            | Name::Kill => Suite::Core,
            Name::Single | Name::AtOnce | Name::Version | Name::PodTcp | Name::Routes | Name::Soak => {
                Suite::Cni
            }
            Name::Streams | Name::NoOffload | Name::RoundTrip | Name::Load | Name::FanOut | Name::Packets => {
                Suite::Tunnel
            }
            Name::Run | Name::Link | Name::Pinging | Name::Cut => Suite::Docker,
            Name::Ports => Suite::Publish,
            Name::Answers | Name::Resolved | Name::Search => Suite::Dns,
            Name::Policies => Suite::Policy,
            Name::Many | Name::Removed | Name::Failover => Suite::Services,
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
            Name::Single => cni::single::measure(bench),
            Name::AtOnce => cni::at_once::measure(bench),
            Name::Version => cni::version::measure(bench),
            Name::PodTcp => cni::pod_tcp::measure(bench),
            Name::Routes => cni::routes::measure(bench),
            Name::Soak => cni::soak::measure(bench),
            Name::Streams => tunnel::streams::measure(bench),
            Name::NoOffload => tunnel::streams::measure_no_offload(bench),
            Name::RoundTrip => tunnel::round_trip::measure(bench),
            Name::Load => tunnel::load::measure(bench),
            Name::FanOut => tunnel::fan_out::measure(bench),
            Name::Packets => tunnel::packets::measure(bench),
            Name::Run => docker::run::measure(bench),
            Name::Link => docker::link::measure(bench),
            Name::Pinging => docker::pinging::measure(bench),
            Name::Cut => docker::cut::measure(bench),
            Name::Ports => publish::measure(bench),
            Name::Answers => dns::measure_answers(bench),
            Name::Resolved => dns::measure_spread(bench),
            Name::Search => dns::measure_search(bench),
            Name::Policies => policy::measure(bench),
            Name::Many => services::many::measure(bench),
            Name::Removed => services::removed::measure(bench),
            Name::Failover => services::failover::measure(bench),
        }
    }
}

/// What is asked for.
pub struct Wanted {
    /// Which figures.
    pub suite: Suite,
    /// Figures of that suite. None: all.
    pub only: Vec<Name>,
    /// Where the figures are written.
    pub json: PathBuf,
    /// Where the binaries are; else as for every lab.
    pub binaries: Option<PathBuf>,
    /// How often and how long each figure is taken.
    pub plan: Plan,
    /// Those that ovl's tunnel is held against; none but for `bench tunnel`.
    pub peers: Vec<Peer>,
    /// Those of them that Debian has may be installed.
    pub install: bool,
}

/// What every figure needs.
pub(crate) struct Bench {
    plan: Plan,
    ovld: PathBuf,
    ovlctl: PathBuf,
    binaries: Option<PathBuf>,
    peers: Vec<Found>,
}

impl Bench {
    /// Hosts of their own for one figure, without a daemon started.
    fn lab(&self, hosts: usize) -> Result<Lab> {
        self.lab_with(hosts, "")
    }

    /// The same with TOML for the daemons' configuration.
    fn lab_with(&self, hosts: usize, toml: &str) -> Result<Lab> {
        let mut config = LabConfig::hosts(hosts).config(toml);
        config.ovld = Some(self.ovld.clone());
        config.ovlctl = Some(self.ovlctl.clone());
        Lab::new(config)
    }

    /// The plugin that Docker Engines find.
    fn ovl_docker(&self) -> Result<PathBuf> {
        binary(self.binaries.as_deref(), "ovl-docker")
    }

    /// The plugin that container runtimes start.
    fn ovl_cni(&self) -> Result<PathBuf> {
        binary(self.binaries.as_deref(), "ovl-cni")
    }
}

/// Measures, prints and writes. A missed bar is no failure, a figure that cannot be taken is one.
pub fn run(wanted: Wanted) -> Result<ExitCode> {
    for name in &wanted.only {
        let (name, of, suite) = (name.text(), name.suite(), wanted.suite);
        ensure!(
            of == suite,
            "{name} is no figure of `bench {}`: `bench {} --only {name}` takes it",
            suite.text(),
            of.text()
        );
    }
    if !supervisor::is_supervised() {
        return supervisor::supervise();
    }
    supervisor::end_with_supervisor()?;
    let bench = Bench {
        ovld: binary(wanted.binaries.as_deref(), "ovld")?,
        ovlctl: binary(wanted.binaries.as_deref(), "ovlctl")?,
        plan: wanted.plan,
        binaries: wanted.binaries,
        peers: peers::find(&wanted.peers, wanted.install),
    };
    let setup = Setup::look(&bench.ovld, bench.plan.quick)?;
    for warning in setup.warnings() {
        eprintln!("netns-lab: {warning}");
    }
    let names = Name::value_variants().iter().copied().filter(|name| name.suite() == wanted.suite);
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
    report::write_json(&wanted.json, wanted.suite.text(), &setup, bench.plan.to_json(), &outcomes)?;
    println!("Written to {}", wanted.json.display());
    Ok(match report::tally(&outcomes) {
        Tally { failed: 1.., .. } => ExitCode::FAILURE,
        Tally { unmeasured: 1.., .. } => ExitCode::from(NO_PEER),
        Tally { .. } => ExitCode::SUCCESS,
    })
}

/// Resolved here, once: the report names what was measured.
fn binary(dir: Option<&Path>, name: &str) -> Result<PathBuf> {
    let Some(dir) = dir else {
        return netns_lab::find_binary(name);
    };
    let path = env::current_dir().context("no current directory")?.join(dir).join(name);
    ensure!(path.is_file(), "no {}: build it with `cargo build --release -p {name}`", path.display());
    Ok(path)
}
