//! `bench`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Args, ValueEnum};

use crate::bench::{self, Name, Plan, Wanted};

/// Longer runs say no more.
const LONGEST: u64 = 3600;

#[derive(Args)]
pub(crate) struct BenchArgs {
    /// Which figures
    #[arg(value_enum, default_value_t = Suite::Core)]
    suite: Suite,
    /// This figure alone; may be repeated
    #[arg(long, value_enum, value_name = "NAME")]
    only: Vec<Name>,
    /// Where to write the figures as JSON
    #[arg(long, value_name = "FILE", default_value = "target/bench-core.json")]
    json: PathBuf,
    /// How long each TCP stream runs, in seconds [default: 5]
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// How long gossip loses datagrams, in seconds [default: 300]
    #[arg(long, value_name = "N")]
    loss_seconds: Option<u64>,
    /// Where ovld and ovlctl are, such as target/release
    #[arg(long, value_name = "DIR")]
    release_dir: Option<PathBuf>,
    /// Everything once and briefly, to see that it works
    #[arg(long)]
    quick: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Suite {
    /// The figures of issue 2
    Core,
}

pub(crate) fn bench(args: BenchArgs) -> Result<ExitCode> {
    let Suite::Core = args.suite;
    let mut plan = if args.quick { Plan::quick() } else { Plan::full() };
    for (seconds, setting) in [(args.seconds, &mut plan.stream), (args.loss_seconds, &mut plan.loss)] {
        if let Some(seconds) = seconds {
            ensure!((1..=LONGEST).contains(&seconds), "between 1 and {LONGEST} seconds, not {seconds}");
            *setting = Duration::from_secs(seconds);
        }
    }
    bench::run(Wanted { only: args.only, json: args.json, binaries: args.release_dir, plan })
}
