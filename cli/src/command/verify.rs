//! `ovlctl verify`

use std::process::ExitCode;

use ovl_control::{Reply, Request, Verify};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::lines;

/// Asks and prints. Differences are findings, so they go to standard output.
pub(crate) fn run(context: &Context) -> Result<ExitCode> {
    let Reply::Verify(verify) = context.ask(&Request::Verify)? else { return Err(Error::unexpected_reply()) };
    context.print(&verify, render)?;
    Ok(if verify.clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn render(verify: &Verify) -> String {
    if verify.clean {
        "clean: the kernel holds what it should\n".to_owned()
    } else {
        lines("", &verify.differences)
    }
}
