//! `ovlctl verify`: compares the kernel with the desired state.

use std::process::ExitCode;

use ovl_control::{Reply, Request, Verify};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::text::prefixed_lines;

/// Prints the differences to standard output. Exit status 1 if there are any.
pub(crate) fn run(context: &Context) -> Result<ExitCode> {
    let Reply::Verify(verify) = context.request(&Request::Verify)? else {
        return Err(Error::unexpected_reply());
    };
    context.print(&verify, render)?;
    Ok(if verify.clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn render(verify: &Verify) -> String {
    if verify.clean {
        "clean: the kernel matches the desired state\n".to_owned()
    } else {
        prefixed_lines("", &verify.differences)
    }
}
