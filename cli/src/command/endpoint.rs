//! `ovlctl endpoint`: marks endpoints as ready or not ready.

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
    /// Mark an endpoint of this host as ready: Services send it connections
    Ready(Which),
    /// Mark an endpoint of this host as not ready: Services send it no new connections
    Unready(Which),
}

#[derive(Debug, clap::Args)]
struct Which {
    /// The endpoint's name
    name: String,
    /// Only the endpoint on this network [default: on all]
    #[arg(long, value_name = "NET")]
    network: Option<String>,
    /// The endpoint's Kubernetes namespace [default: default]
    #[arg(short, long, value_name = "NS")]
    namespace: Option<String>,
}

/// Marks the endpoint.
pub(crate) fn run(context: &Context, args: Args) -> Result<()> {
    let (Which { name, network, namespace }, ready) = match args.command {
        Command::Ready(which) => (which, true),
        Command::Unready(which) => (which, false),
    };
    context.request_done(&Request::EndpointReady { name, network, namespace, ready })
}
