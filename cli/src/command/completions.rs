//! `ovlctl completions`: prints a shell completion script.

use clap::CommandFactory;
use clap_complete::Shell;
use serde_json::json;

use crate::args::Cli;
use crate::context::Context;
use crate::error::Result;

/// Arguments of `completions`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The shell
    shell: Shell,
}

/// Generates and prints the script. Generates it in memory, because the generator panics on a failed write.
pub(crate) fn run(context: &Context, args: &Args) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "ovlctl", &mut script);
    let script = String::from_utf8_lossy(&script).into_owned();
    context.print(&json!({ "text": script }), |_| script.clone())
}
