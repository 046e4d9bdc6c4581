//! `ovlctl detach`: detaches an endpoint.

use ovl_control::Request;

use crate::context::Context;
use crate::error::Result;

/// Arguments of `detach`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The endpoint's name
    name: String,
    /// Detach only from this network [default: from all]
    #[arg(long, value_name = "NET")]
    network: Option<String>,
    /// The endpoint's Kubernetes namespace [default: default]
    #[arg(long, value_name = "NS")]
    namespace: Option<String>,
}

/// Detaches the endpoint. Succeeds if it is not attached.
pub(crate) fn run(context: &Context, args: Args) -> Result<()> {
    let Args { name, network, namespace } = args;
    context.request_done(&Request::Detach { name, network, namespace })
}
