//! `netns-lab-bench`, which `netns-lab bench` runs: reads the command line and takes the figures.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Parser;
use netns_lab_bench::{Name, Peer, Plan, Suite, Wanted};

/// Longer runs say no more.
const LONGEST: u64 = 3600;

/// Those that a bar or a figure of the issue needs.
const PEERS: [Peer; 2] = [Peer::Gotatun, Peer::Boringtun];

/// Take the figures that ovl is measured by, in labs of their own
#[derive(Parser)]
#[command(name = "netns-lab-bench", bin_name = "netns-lab bench", version)]
struct Args {
    /// Which figures
    #[arg(value_enum, default_value_t = Suite::Core)]
    suite: Suite,
    /// This figure alone; may be repeated
    #[arg(long, value_enum, value_name = "NAME")]
    only: Vec<Name>,
    /// Where to write the figures as JSON [default: target/bench-SUITE.json]
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How long each TCP stream runs, in seconds [default: 2]
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// How long gossip loses datagrams, in seconds [default: 300]
    #[arg(long, value_name = "N")]
    loss_seconds: Option<u64>,
    /// Where ovld, ovlctl, ovl-cni, ovl-docker and ovl-kube are, such as target/release
    #[arg(long, value_name = "DIR")]
    release_dir: Option<PathBuf>,
    /// Everything once and briefly, to see that it works
    #[arg(long)]
    quick: bool,
    /// tunnel: what ovl is held against, separated by commas [default: gotatun,boringtun]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PEER,...")]
    peers: Vec<Peer>,
    /// tunnel: install those peers that Debian has
    #[arg(long)]
    install: bool,
}

fn main() -> ExitCode {
    match bench(Args::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("netns-lab: {error:#}");
            if !nix::unistd::geteuid().is_root() {
                eprintln!("netns-lab: you are not root; try again with sudo");
            }
            ExitCode::FAILURE
        }
    }
}

fn bench(args: Args) -> Result<ExitCode> {
    let suite = args.suite;
    let json = args.json.unwrap_or_else(|| format!("target/bench-{}.json", suite.text()).into());
    let mut plan = if args.quick { Plan::quick() } else { Plan::full() };
    for (seconds, setting) in [(args.seconds, &mut plan.stream), (args.loss_seconds, &mut plan.loss)] {
        if let Some(seconds) = seconds {
            ensure!((1..=LONGEST).contains(&seconds), "between 1 and {LONGEST} seconds, not {seconds}");
            *setting = Duration::from_secs(seconds);
        }
    }
    let peers = match (suite, args.peers.is_empty()) {
        (Suite::Tunnel, true) => PEERS.to_vec(),
        (Suite::Tunnel, false) => args.peers,
        (
            Suite::Core
            | Suite::Cni
            | Suite::Publish
            | Suite::Docker
            | Suite::Dns
            | Suite::Policy
            | Suite::Services
            | Suite::Path
            | Suite::Grow
            | Suite::Kube,
            _,
        ) => {
            ensure!(args.peers.is_empty() && !args.install, "only `bench tunnel` has --peers and --install");
            Vec::new()
        }
    };
    let binaries = args.release_dir;
    netns_lab_bench::run(Wanted {
        suite,
        only: args.only,
        json,
        binaries,
        plan,
        peers,
        install: args.install,
    })
}
