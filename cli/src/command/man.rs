//! `ovlctl man`: writes the manual pages.

use std::path::PathBuf;

use clap::CommandFactory;
use serde_json::json;

use crate::args::Cli;
use crate::context::Context;
use crate::error::{Error, Result};

/// Arguments of `man`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The directory to write to: one page per command
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

/// Generates and writes the pages.
pub(crate) fn run(context: &Context, args: &Args) -> Result<()> {
    clap_mangen::generate_to(Cli::command(), &args.dir).map_err(|error| {
        Error::Failed(format!(
            "cannot write manual pages to {}: {error}. Is it a directory?",
            args.dir.display()
        ))
    })?;
    context.print(&json!({ "dir": args.dir }), |_| String::new())
}
