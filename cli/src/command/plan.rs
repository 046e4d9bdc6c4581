//! `ovlctl plan`

use ovl_control::{Reply, Request};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::lines;

/// Asks and prints. Nothing to do is no output, so that what is printed can be read by a shell.
pub(crate) fn run(context: &Context) -> Result<()> {
    let Reply::Plan(commands) = context.ask(&Request::Plan)? else { return Err(Error::unexpected_reply()) };
    context.print(&commands, |commands| lines("", commands))
}
