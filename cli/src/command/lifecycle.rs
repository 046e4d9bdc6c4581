//! `ovlctl leave` and `ovlctl teardown`: withdraw this host from the cluster.

use std::io::{self, IsTerminal};

use ovl_control::Request;

use crate::context::Context;
use crate::error::{Error, Result};

/// Arguments of `teardown`.
#[derive(Debug, clap::Args)]
pub(crate) struct TeardownArgs {
    /// Confirm; required if standard input is a terminal
    #[arg(long)]
    yes: bool,
}

/// Withdraws this host from the cluster.
pub(crate) fn leave(context: &Context) -> Result<()> {
    context.request_done(&Request::Leave)
}

/// Withdraws this host and deletes everything that ovl created on it.
pub(crate) fn teardown(context: &Context, args: &TeardownArgs) -> Result<()> {
    confirmed(args.yes, io::stdin().is_terminal())?;
    context.request_done(&Request::Teardown)
}

/// Requires `--yes` at a terminal, where the command may be a mistake. Scripts need no confirmation.
fn confirmed(yes: bool, terminal: bool) -> Result<()> {
    if yes || !terminal {
        return Ok(());
    }
    Err(Error::Usage(
        "teardown disconnects every endpoint on this host and deletes all of ovl's devices. \
         Confirm with `ovlctl teardown --yes`"
            .to_owned(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn confirmation_is_required_at_a_terminal_only() {
        assert!(confirmed(true, true).is_ok());
        assert!(confirmed(false, false).is_ok());
        assert!(matches!(confirmed(false, true), Err(Error::Usage(_))));
    }
}
