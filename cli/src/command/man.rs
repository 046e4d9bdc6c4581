//! `ovlctl man`

use std::path::PathBuf;

use clap::CommandFactory;
use serde_json::json;

use crate::args::Cli;
use crate::context::Context;
use crate::error::{Error, Result};

/// Arguments of `man`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where they go: one page for each command
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

/// Makes and writes.
pub(crate) fn run(context: &Context, args: &Args) -> Result<()> {
    clap_mangen::generate_to(Cli::command(), &args.dir).map_err(|error| {
        Error::Failed(format!("cannot write the pages into {}: {error}. Is it a folder?", args.dir.display()))
    })?;
    context.print(&json!({ "dir": args.dir }), |_| String::new())
}
