//! `ovlctl endpoint`

use clap::Subcommand;
use ovl_control::Request;

use crate::context::Context;
use crate::error::Result;

/// Arguments of `endpoint`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Have Services send connections to an endpoint of this host
    Ready(Which),
    /// Have Services send it no more connections
    Unready(Which),
}

#[derive(Debug, clap::Args)]
struct Which {
    /// The endpoint's name
    name: String,
    /// Only on this network
    #[arg(long, value_name = "NET")]
    network: Option<String>,
    /// Its Kubernetes namespace [default: default]
    #[arg(short, long, value_name = "NS")]
    namespace: Option<String>,
}

/// Asks.
pub(crate) fn run(context: &Context, args: Args) -> Result<()> {
    let (Which { name, network, namespace }, ready) = match args.command {
        Command::Ready(which) => (which, true),
        Command::Unready(which) => (which, false),
    };
    context.ask_done(&Request::EndpointReady { name, network, namespace, ready })
}
