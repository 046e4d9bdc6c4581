//! `ovlctl detach`

use ovl_control::Request;

use crate::context::Context;
use crate::error::Result;

/// Arguments of `detach`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The endpoint's name
    name: String,
    /// Only from this network; otherwise from all
    #[arg(long, value_name = "NET")]
    network: Option<String>,
    /// Its Kubernetes namespace [default: default]
    #[arg(long, value_name = "NS")]
    namespace: Option<String>,
}

/// Asks. It is no error if nothing is attached.
pub(crate) fn run(context: &Context, args: Args) -> Result<()> {
    let Args { name, network, namespace } = args;
    context.ask_done(&Request::Detach { name, network, namespace })
}
