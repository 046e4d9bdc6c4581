//! `ovlctl plan`: shows the pending kernel changes.

use ovl_control::{Reply, Request};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::prefixed_lines;

/// Prints the pending operations as commands. Prints nothing if there are none, so that a shell can run the
/// output.
pub(crate) fn run(context: &Context) -> Result<()> {
    let Reply::Plan(commands) = context.request(&Request::Plan)? else {
        return Err(Error::unexpected_reply());
    };
    context.print(&commands, |commands| prefixed_lines("", commands))
}
