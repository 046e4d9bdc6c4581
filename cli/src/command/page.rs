//! `ovlctl page`: prints where the page is.

use ovl_control::{PageAddress, Reply, Request};

use crate::context::Context;
use crate::error::{Error, Result};

/// Prints the address of the page, or of its socket.
pub(crate) fn run(context: &Context) -> Result<()> {
    let Reply::Page(address) = context.request(&Request::Page)? else {
        return Err(Error::unexpected_reply());
    };
    context.print(&address, |address| match address {
        PageAddress::Url(url) => format!("{url}\n"),
        PageAddress::Unix(path) => format!("{}\n", path.display()),
    })?;
    context.note(match address {
        PageAddress::Url(_) => {
            "Keep this address to yourself: with it, all users of this host can see the page."
        }
        PageAddress::Unix(_) => {
            "From another machine: ssh -L 9641:PATH root@HOST, then http://localhost:9641/"
        }
    });
    Ok(())
}
