//! `bench`: measures ovl's performance figures.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;

use crate::bench::{self, Name, Peer, Plan, Suite, Wanted};

/// Maximum length of a run in seconds; longer runs give no better figures.
const LONGEST: u64 = 3600;

/// The default peers: those that a bar or a figure needs.
const PEERS: [Peer; 2] = [Peer::Gotatun, Peer::Boringtun];

#[derive(Args)]
pub(crate) struct BenchArgs {
    /// The suite of figures to measure
    #[arg(value_enum, default_value_t = Suite::Core)]
    suite: Suite,
    /// Measure only this figure; may be repeated
    #[arg(long, value_enum, value_name = "NAME")]
    only: Vec<Name>,
    /// File for the figures in JSON [default: target/bench-SUITE.json]
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Length of each TCP stream in seconds [default: 2]
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// Length of the gossip loss in seconds [default: 300]
    #[arg(long, value_name = "N")]
    loss_seconds: Option<u64>,
    /// Directory of ovld, ovlctl, ovl-cni and ovl-docker, such as target/release
    #[arg(long, value_name = "DIR")]
    release_dir: Option<PathBuf>,
    /// Measure every figure once and briefly, as a smoke test
    #[arg(long)]
    quick: bool,
    /// tunnel: peers to compare ovl with, separated by commas [default: gotatun,boringtun]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PEER,...")]
    peers: Vec<Peer>,
    /// tunnel: install missing peers that Debian packages
    #[arg(long)]
    install: bool,
}

pub(crate) fn bench(args: BenchArgs) -> Result<ExitCode> {
    let suite = args.suite;
    let json = args.json.unwrap_or_else(|| format!("target/bench-{}.json", suite.text()).into());
    let mut plan = if args.quick { Plan::quick() } else { Plan::full() };
    for (seconds, setting) in [(args.seconds, &mut plan.stream), (args.loss_seconds, &mut plan.loss)] {
        if let Some(seconds) = seconds {
            ensure!(
                (1..=LONGEST).contains(&seconds),
                "invalid length of {seconds} s: must be 1 to {LONGEST}"
            );
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
            | Suite::Services,
            _,
        ) => {
            ensure!(
                args.peers.is_empty() && !args.install,
                "--peers and --install are options of `bench tunnel` only"
            );
            Vec::new()
        }
    };
    let binaries = args.release_dir;
    bench::run(Wanted { suite, only: args.only, json, binaries, plan, peers, install: args.install })
}
