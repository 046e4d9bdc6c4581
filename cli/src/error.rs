//! How a command fails: one sentence that says what is wrong, one that says what to do.

use std::io::{self, Write};
use std::process::ExitCode;

use clap::error::ErrorKind;
use ovl_control::ClientError;

use crate::text::printable_lines;

/// What commands return.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Why a command did not do what it was asked.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Error {
    /// It was tried: exit status 1.
    Failed(String),
    /// The command line is wrong in a way that clap cannot see: exit status 2.
    Usage(String),
}

impl Error {
    /// ovld sent a good reply that does not belong to the request.
    pub(crate) fn unexpected_reply() -> Self {
        Self::Failed(
            "ovld gave an answer that does not belong to the question. \
             Use ovlctl and ovld of the same release: `ovlctl --version`, `ovld --version`"
                .to_owned(),
        )
    }

    /// Nothing came back. `seconds` is how long it was waited for.
    pub(crate) fn no_reply(error: ClientError, seconds: u64) -> Self {
        Self::Failed(match error {
            // What a socket's timeout looks like depends on the system.
            ClientError::Io(error)
                if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) =>
            {
                format!(
                    "ovld did not answer within {seconds} s, and may still be at work. \
                     See what became of it with `ovlctl status` and `journalctl -u ovld`"
                )
            }
            ClientError::Protocol(_) => {
                format!(
                    "{error}. Use ovlctl and ovld of the same release: `ovlctl --version`, `ovld --version`"
                )
            }
            ClientError::Connect { .. } | ClientError::Io(_) | ClientError::Failed(_) => error.to_string(),
        })
    }

    /// Standard output cannot be written.
    pub(crate) fn output(error: &io::Error) -> Self {
        Self::Failed(format!("cannot write to standard output: {error}. Is the disk full?"))
    }

    /// Tells the user, and gives the exit status.
    pub(crate) fn report(&self) -> ExitCode {
        let (message, code) = match self {
            Self::Failed(message) => (message, 1),
            Self::Usage(message) => (message, 2),
        };
        // Without a standard error there is nobody to tell, and eprintln! would panic.
        let _ = writeln!(io::stderr(), "ovlctl: {}", printable_lines(message));
        ExitCode::from(code)
    }
}

/// Prints what clap has to say: help and version, or an error in the form of all our errors.
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print();
    } else {
        let text = error.render().to_string();
        let _ = write!(io::stderr(), "ovlctl: {}", text.strip_prefix("error: ").unwrap_or(&text));
    }
    ExitCode::from(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_told_from_a_broken_connection() {
        let timeout = Error::no_reply(io::Error::from(io::ErrorKind::WouldBlock).into(), 30);
        assert!(
            matches!(timeout, Error::Failed(text) if text.starts_with("ovld did not answer within 30 s"))
        );
        let broken = Error::no_reply(io::Error::from(io::ErrorKind::UnexpectedEof).into(), 30);
        assert!(matches!(broken, Error::Failed(text) if text.starts_with("lost the connection to ovld")));
    }
}
