//! `ovlctl leave` and `ovlctl teardown`

use std::io::{self, IsTerminal};

use ovl_control::Request;

use crate::context::Context;
use crate::error::{Error, Result};

/// Arguments of `teardown`.
#[derive(Debug, clap::Args)]
pub(crate) struct TeardownArgs {
    /// Do it; needed where standard input is a terminal
    #[arg(long)]
    yes: bool,
}

/// Withdraws this host.
pub(crate) fn leave(context: &Context) -> Result<()> {
    context.ask_done(&Request::Leave)
}

/// Withdraws this host and removes all that ovl made on it.
pub(crate) fn teardown(context: &Context, args: &TeardownArgs) -> Result<()> {
    confirmed(args.yes, io::stdin().is_terminal())?;
    context.ask_done(&Request::Teardown)
}

/// A script means what it says; at a terminal a second word is asked for.
fn confirmed(yes: bool, terminal: bool) -> Result<()> {
    if yes || !terminal {
        return Ok(());
    }
    Err(Error::Usage(
        "teardown cuts off every endpoint on this host and removes all of ovl's devices. \
         `ovlctl teardown --yes` does it"
            .to_owned(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_person_is_asked() {
        assert!(confirmed(true, true).is_ok());
        assert!(confirmed(false, false).is_ok());
        assert!(matches!(confirmed(false, true), Err(Error::Usage(_))));
    }
}
