//! `ovlctl metrics`: prints the daemon's metrics.

use ovl_control::{Reply, Request};
use serde_json::json;

use crate::context::Context;
use crate::error::{Error, Result};

/// Prints the metrics unmodified, in the Prometheus text format.
pub(crate) fn run(context: &Context) -> Result<()> {
    let Reply::Text(text) = context.request(&Request::Metrics)? else {
        return Err(Error::unexpected_reply());
    };
    context.print(&json!({ "text": text }), |_| text.clone())
}
