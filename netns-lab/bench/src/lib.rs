//! `netns-lab bench`: measures ovl's performance figures in separate labs. Figures are grouped in suites.

#![warn(missing_docs)]

mod announce;
mod attach;
mod bulk;
mod by_hand;
mod checks;
mod client;
mod cluster;
mod cni;
mod commits;
mod connect;
mod dead;
mod dns;
mod docker;
mod flow;
mod grow;
mod idle;
mod kill;
mod kube;
mod loss;
mod neigh;
mod netlink;
mod path;
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
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use netns_lab::{Lab, LabConfig};

pub use plan::Plan;
use report::{Figure, Outcome, Tally};
use setup::Setup;
pub use tunnel::peers::Peer;
use tunnel::peers::{self, Found};

/// Exit status if a bar was not measured because a peer is unavailable.
const NO_PEER: u8 = 3;

/// A group of figures that are measured together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Suite {
    /// Core data-plane figures: workloads in networks
    Core,
    /// CNI figures: pods of container runtimes
    Cni,
    /// Encryption figures: encrypted networks compared with other tunnels
    Tunnel,
    /// Docker Engine figures: containers on ovl networks compared with the Engine's own networks
    Docker,
    /// Published-port figures
    Publish,
    /// DNS figures: compared with dnsmasq
    Dns,
    /// Network-policy figures
    Policy,
    /// Service figures: compared with the layouts of kube-proxy
    Services,
    /// The way of a packet: raw veth, by hand, the kernel path and the fast path
    Path,
    /// Figures of many hosts: 60 and 100 daemons on this machine
    Grow,
    /// Figures with a Kubernetes API server of the tests
    Kube,
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
            Suite::Path => "path",
            Suite::Grow => "grow",
            Suite::Kube => "kube",
        }
    }
}

/// A figure, with the name that `--only` takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Name {
    /// TCP through the overlay, compared with a manually built one
    Tcp,
    /// Cost of the source checks for TCP
    Checks,
    /// Time from an attach until the last other kernel has the entry
    Announce,
    /// Announcement of a thousand endpoints at once
    Bulk,
    /// Time of `attach` for the caller
    Attach,
    /// Time until a lost host's entries are withdrawn
    Dead,
    /// Hosts wrongly declared dead while gossip loses datagrams
    Loss,
    /// Memory and CPU time of an idle daemon
    Idle,
    /// Packets lost when a daemon is killed and restarted
    Kill,
    /// cni: sequential ADD and DEL
    Single,
    /// cni: eight concurrent ADD and DEL
    AtOnce,
    /// cni: a plugin process that does not call ovld
    Version,
    /// cni: TCP from pod to pod, compared with manually built routes
    PodTcp,
    /// cni: kernel entries for 250 pods on other hosts
    Routes,
    /// cni: leaks after 10,000 ADD and DEL
    Soak,
    /// tunnel: one TCP stream
    Streams,
    /// tunnel: one TCP stream without the underlay's segmentation offloads
    NoOffload,
    /// tunnel: round trip of a datagram on one core
    RoundTrip,
    /// tunnel: memory and retransmits during ten seconds of TCP
    Load,
    /// tunnel: one host that sends to seven at once
    FanOut,
    /// tunnel: rate of small datagrams
    Packets,
    /// tunnel: one TCP stream between hosts that do not reach each other
    Detours,
    /// docker: `docker run --rm`, compared with the Engine's own bridge
    Run,
    /// docker: time from a container's link until other kernels have its entry
    Link,
    /// docker: time until a new container answers pings to its address
    Pinging,
    /// docker: a host disconnected and healed
    Cut,
    /// publish: cost of one more port with 1,000 published, and a connection through the last
    Ports,
    /// dns: answers per second, and the cost of updates
    Answers,
    /// dns: time from an attach until the last host resolves the name
    #[value(name = "new-name")]
    Resolved,
    /// dns: queries for an external name by a pod with a search list
    Search,
    /// policy: cost of one more pod with 10,000 pods and 1,000 policies, and a connection
    Policies,
    /// services: 10,000 Services: loading, a change, and a connection through the last
    Many,
    /// services: time from a backend's removal until no host sends to it
    Removed,
    /// services: time until another host answers for a lost host's address
    Failover,
    /// path: round trip, small packets and TCP by each way
    Ways,
    /// grow: 60 hosts that start at once, and what their daemons use when idle
    Forming,
    /// grow: 100 hosts that start at once
    Hundred,
    /// grow: bytes on all links for Services and for a network
    Bytes,
    /// kube: time from a changed label until policies follow on 8 hosts
    Label,
    /// kube: time from an endpoint that becomes ready until 8 hosts send to it
    Ready,
    /// kube: memory and start with 5,000 Services and 50,000 endpoints
    Size,
}

impl Name {
    fn text(self) -> &'static str {
        match self {
            Name::Tcp => "tcp",
            Name::Checks => "checks",
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
            Name::Detours => "detours",
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
            Name::Ways => "ways",
            Name::Forming => "forming",
            Name::Hundred => "hundred",
            Name::Bytes => "bytes",
            Name::Label => "label",
            Name::Ready => "ready",
            Name::Size => "size",
        }
    }

    fn suite(self) -> Suite {
        match self {
            Name::Tcp
            | Name::Checks
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
            Name::Streams
            | Name::NoOffload
            | Name::RoundTrip
            | Name::Load
            | Name::FanOut
            | Name::Packets
            | Name::Detours => Suite::Tunnel,
            Name::Run | Name::Link | Name::Pinging | Name::Cut => Suite::Docker,
            Name::Ports => Suite::Publish,
            Name::Answers | Name::Resolved | Name::Search => Suite::Dns,
            Name::Policies => Suite::Policy,
            Name::Many | Name::Removed | Name::Failover => Suite::Services,
            Name::Ways => Suite::Path,
            Name::Forming | Name::Hundred | Name::Bytes => Suite::Grow,
            Name::Label | Name::Ready | Name::Size => Suite::Kube,
        }
    }

    fn measure(self, bench: &Bench) -> Result<Figure> {
        match self {
            Name::Tcp => tcp::measure(bench),
            Name::Checks => checks::measure(bench),
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
            Name::Detours => tunnel::detours::measure(bench),
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
            Name::Ways => path::measure(bench),
            Name::Forming => grow::measure_forming(bench),
            Name::Hundred => grow::measure_hundred(bench),
            Name::Bytes => grow::measure_bytes(bench),
            Name::Label => kube::follow::measure_label(bench),
            Name::Ready => kube::follow::measure_ready(bench),
            Name::Size => kube::size::measure(bench),
        }
    }
}

/// The options of `bench`.
pub struct Wanted {
    /// The suite.
    pub suite: Suite,
    /// Figures of that suite. All if empty.
    pub only: Vec<Name>,
    /// Where the figures are written.
    pub json: PathBuf,
    /// Directory of the binaries. If `None`: as for every lab.
    pub binaries: Option<PathBuf>,
    /// Counts and durations.
    pub plan: Plan,
    /// Peers that ovl's tunnel is compared with. Empty except for `bench tunnel`.
    pub peers: Vec<Peer>,
    /// Install missing peers that Debian packages.
    pub install: bool,
}

/// The environment of all figures.
pub(crate) struct Bench {
    plan: Plan,
    ovld: PathBuf,
    ovlctl: PathBuf,
    binaries: Option<PathBuf>,
    peers: Vec<Found>,
}

impl Bench {
    /// Creates a lab for one figure, without starting daemons.
    fn lab(&self, hosts: usize) -> Result<Lab> {
        self.lab_with(hosts, "")
    }

    /// Like [`lab`](Self::lab), with TOML for the daemons' configuration.
    fn lab_with(&self, hosts: usize, toml: &str) -> Result<Lab> {
        Lab::new(self.lab_config(hosts).config(toml))
    }

    /// Like [`lab`](Self::lab), with more time until all hosts are there.
    fn patient_lab(&self, hosts: usize, ready_timeout: Duration) -> Result<Lab> {
        Lab::new(LabConfig { ready_timeout, ..self.lab_config(hosts) })
    }

    fn lab_config(&self, hosts: usize) -> LabConfig {
        let (ovld, ovlctl) = (Some(self.ovld.clone()), Some(self.ovlctl.clone()));
        LabConfig { ovld, ovlctl, ..LabConfig::hosts(hosts) }
    }

    /// Returns the path of the Docker plugin.
    fn ovl_docker(&self) -> Result<PathBuf> {
        binary(self.binaries.as_deref(), "ovl-docker")
    }

    /// Returns the path of the program that follows an API server.
    fn ovl_kube(&self) -> Result<PathBuf> {
        binary(self.binaries.as_deref(), "ovl-kube")
    }

    /// Returns the path of the CNI plugin.
    fn ovl_cni(&self) -> Result<PathBuf> {
        binary(self.binaries.as_deref(), "ovl-cni")
    }
}

/// Measures the figures, prints the table and writes the JSON. A missed bar is not a failure; a figure that
/// cannot be measured is.
pub fn run(wanted: Wanted) -> Result<ExitCode> {
    for name in &wanted.only {
        let (name, of, suite) = (name.text(), name.suite(), wanted.suite);
        ensure!(
            of == suite,
            "{name} is not a figure of `bench {}`: use `bench {} --only {name}`",
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

/// Resolves the path of a binary once, so that the report names the binary that was measured.
fn binary(dir: Option<&Path>, name: &str) -> Result<PathBuf> {
    let Some(dir) = dir else {
        return netns_lab::find_binary(name);
    };
    let path = env::current_dir().context("no current directory")?.join(dir).join(name);
    ensure!(path.is_file(), "no {}: build it with `cargo build --release -p {name}`", path.display());
    Ok(path)
}
