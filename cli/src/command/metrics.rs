//! `ovlctl metrics`

use ovl_control::{Reply, Request};
use serde_json::json;

use crate::context::Context;
use crate::error::{Error, Result};

/// Asks and prints, as it is: the format belongs to Prometheus.
pub(crate) fn run(context: &Context) -> Result<()> {
    let Reply::Text(text) = context.ask(&Request::Metrics)? else { return Err(Error::unexpected_reply()) };
    context.print(&json!({ "text": text }), |_| text.clone())
}
